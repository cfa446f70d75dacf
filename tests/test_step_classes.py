"""benchmarks/step_classes.py: a row says which attention served in it, and the page believes no
other row."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from mvsplit.kernels import attention

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("way", ["", "merge in clusters"])
def test_a_row_names_the_attention_that_served_in_it_alone(way, script, monkeypatch):
    classes = script("step_classes")
    before = {"of another row": attention._WAYS["flash"]}
    monkeypatch.setattr(attention, "_chosen", before)
    monkeypatch.setattr(
        classes,
        "add_gradients",
        lambda *_: attention._chosen.update(here=attention._WAYS["cudnn"]),
    )
    monkeypatch.setattr(classes, "keep_busy", lambda run, seconds: (run(), (1, 1.0))[1])
    with classes.changed(way):
        row = classes.measure(classes.Row(1, 5, False, way=way), 1, 64, "cpu")
    assert row["attention_backend"] == ["cudnn"]
    assert attention._chosen is before


def test_a_kernel_has_run_in_a_block_only_where_it_served(script):
    page = script("performance_not_run")
    entry = page.UNMEASURED[page.IN_CUDA]
    left_out = {"a, attention without CUDA C++": {"us": 1, "attention_backend": ["cudnn"]}}
    for rows in (
        left_out,
        {**left_out, "a": {"us": 1}},
        {**left_out, "a": {"us": 1, "attention_backend": ["cudnn"]}},
    ):
        found = page.served({"rows": rows}, page.BACKEND)
        assert entry in page.not_run({page.IN_CUDA: found})
    rows = {**left_out, "a": {"us": 1, "attention_backend": ["cudnn", page.BACKEND]}}
    found = page.served({"rows": rows}, page.BACKEND)
    assert list(found) == ["a"]
    assert entry not in page.not_run({page.IN_CUDA: found})


def test_what_the_page_looks_for_is_a_name_of_attention(script):
    pytest.importorskip("triton")
    assert script("performance_not_run").BACKEND in attention._IN_CUDA
