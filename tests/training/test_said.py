"""What the watch said at a step that is explained, and the spike that lies before it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvsplit.cli import main
from mvsplit.diagnostics.attribution import Conclusion, ModeSplit
from mvsplit.diagnostics.attribution import Verdict as Found
from mvsplit.diagnostics.events import Event, Verdict
from mvsplit.training.flight import read_flight
from mvsplit.training.said import no_spike, said_at, sentences, spike_before
from tests.training import flights

ALIKE: dict[str, list[float | None]] = {
    "tcs": [0.1, 0.95, 1.0, 1.0],
    "g_mean_attn": [0.1, 1.0, 5.0, 2.0],
    "g_ctr_attn": [1.0, 1.0, 0.01, 0.01],
    "g_mean_ffn": [0.1, 0.1, 0.1, 0.1],
    "g_ctr_ffn": [1.0, 1.0, 1.0, 1.0],
}
LARGEST = ModeSplit(writer="W_O", layer=2, g_mean=5.0, g_ctr=0.01)


def event(verdict: Verdict, level: Any = "alarm", **evidence: float) -> Event:
    return Event(step=5, level=level, verdict=verdict, message="As it said.", evidence=evidence)


def found(verdict: Found) -> Conclusion:
    return Conclusion(verdict=verdict, removed_by=(), sentences=())


def test_an_alarm_of_the_layers_is_explained_by_them() -> None:
    said = [event("mean-mode")]
    first, layers = sentences(said, found("no-spike"), ALIKE, LARGEST)
    assert first == "The watch said at this step: ALARM mean-mode: As it said."
    assert "similarity of 1.000, alike from layer 1 down, and" in layers
    assert (
        "is 200 times the centered (medians); the mean part is largest in W_O of layer 2" in layers
    )
    instead = no_spike(found("no-spike"), said)
    assert instead is not None
    assert "the mean-mode alarm was not given for it" in instead


def test_tokens_that_are_not_alike_are_not_said_to_be() -> None:
    """Of a verdict that the gradients of queries and keys gave."""
    calm = ALIKE | {"tcs": [0.1, 0.2, 0.3, 0.2]}
    *_, layers = sentences([event("mean-mode")], found("no-spike"), calm, None)
    assert "similarity of 0.200, and" in layers


def test_where_the_watch_said_nothing_nothing_is_said_of_it() -> None:
    assert sentences([], found("no-spike"), ALIKE, LARGEST) == ()
    assert no_spike(found("no-spike"), []) is None
    assert no_spike(found("mean-mode"), [event("mean-mode")]) is None


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("mean-mode", "The trials see otherwise: mean-mode, not data-outlier."),
        ("unexplained", "The trials do not bear out data-outlier"),
        ("data-outlier", None),
    ],
)
def test_another_verdict_of_the_trials_is_said(verdict: Found, words: str | None) -> None:
    told = sentences([event("data-outlier", "info")], found(verdict), ALIKE, None)
    assert told[0].startswith("The watch said at this step: INFO data-outlier")
    assert any(words in line for line in told) if words else len(told) == 1


def test_the_baselines_of_both_are_said() -> None:
    told = sentences([event("data-outlier", grad_rise=7.29)], found("data-outlier"), ALIKE, None)
    assert "medians of up to 20 steps before" in told[-1]
    assert "up to 32 recorded steps before" in told[-1]


@pytest.fixture(scope="module")
def flight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flight whose own step is as calm as those before."""
    run = tmp_path_factory.mktemp("run")
    path = flights.fly(run, flights.plain(), flights.nothing)
    told = [event("mean-mode"), event("mean-mode"), replace(event("mean-mode"), step=4)]
    lines = [{"event": e.level, **e.as_dict(), "step": 4, "at_step": e.step} for e in told]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def record_norms(flight: Path, *norms: float) -> None:
    content = json.loads((flight / "flight.json").read_text())
    for record, norm in zip(content["records"], norms, strict=False):
        record["grad_norm"] = norm
    (flight / "flight.json").write_text(json.dumps(content))


def test_what_was_said_at_a_step_is_read_from_the_run(flight: Path) -> None:
    assert said_at(read_flight(flight)) == [event("mean-mode")]


def test_the_spike_before_an_alarm_is_explained_too(
    flight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = read_flight(flight)
    assert spike_before(calm) is None
    last = calm.records[-1]["grad_norm"]
    record_norms(flight, last, last, 3 * last, last)
    assert spike_before(read_flight(flight)) == 3
    assert main(["explain", str(flight)]) == 0
    said = capsys.readouterr().out
    assert "The watch said at this step: ALARM mean-mode" in said
    assert "the gradient norm of step 3 stands out most, a spike, which is explained here" in said
    assert json.loads((flight / "explain.json").read_text())["step"] == 5
    assert json.loads((flight / "explain_00000003.json").read_text())["step"] == 3
