"""A compiled model is watched as the model itself is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mvsplit.diagnostics.monitor import Cadence, Monitor
from tests.diagnostics.test_ranks import batch, dit


class Kept:
    """A sink that keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def append(self, log: str, line: dict[str, Any]) -> None:
        self.lines.append((log, line))


def watched(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    kept = Kept()
    monitor = Monitor(model, sinks=[kept], cadence=Cadence(start=2, calm=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(5):
        with monitor.look():
            loss = model(*batch(slice(None))).square().mean()
            loss.backward()
        monitor.step(loss)
        optimizer.step()
        optimizer.zero_grad()
    return kept.lines


@pytest.mark.parametrize("how", ["around the model", "each block in place"])
def test_compiled_or_not_the_lines_are_the_same(how):
    torch._dynamo.reset()
    model = dit()
    if how == "around the model":
        model = torch.compile(model, backend="aot_eager")
    else:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    found, expected = watched(model), watched(dit())
    assert [log for log, _ in found] == [log for log, _ in expected]
    assert [log for log, _ in found].count("layers") == 2
    for (_, line), (_, known) in zip(found, expected, strict=True):
        assert line.keys() == known.keys()
        if "event" in known:
            assert line["message"] == known["message"]
            continue
        for name, value in known.items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
