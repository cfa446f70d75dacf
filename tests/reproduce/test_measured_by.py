"""The fingerprint of what measures a claim's figures."""

from __future__ import annotations

import dataclasses

from mvsplit.reproduce import CLAIMS, get_claim, runlog
from mvsplit.reproduce.measured_by import _tokens, measure_fingerprint
from mvsplit.reproduce.runlog import RunLog

MODES = get_claim("modes")


def test_each_claim_has_its_own_and_it_stays():
    found = {name: measure_fingerprint(claim) for name, claim in CLAIMS.items()}
    assert len(set(found.values())) == len(CLAIMS)
    assert found["modes"] == measure_fingerprint(MODES)
    easier = dataclasses.replace(MODES, rule=MODES.rule[:1])
    assert measure_fingerprint(easier) == found["modes"]


def test_it_is_the_same_on_every_version_of_python():
    """3.12 takes an f-string apart, 3.11 has it as one token."""
    text = """f"{'50' if writer == 'W_O' else  x } or more" + 'a {b } c' """
    assert _tokens(text) == """f"{'50'ifwriter=='W_O'elsex} or more"+'a {b } c'"""


def test_a_constant_that_a_measure_comes_to_is_part_of_it(monkeypatch):
    before = measure_fingerprint(MODES)
    monkeypatch.setattr(runlog, "SPIKE", 41)  # read by a method that another calls
    assert measure_fingerprint(MODES) != before


def test_a_method_that_a_measure_comes_to_is_part_of_it(monkeypatch):
    before = measure_fingerprint(MODES)
    monkeypatch.setattr("mvsplit.reproduce.measured_by._METHODS", {**vars(RunLog), "rise": _rise})
    assert measure_fingerprint(MODES) != before


def _rise(log: RunLog) -> float:
    return 1.0


_rise.__module__ = RunLog.__module__
