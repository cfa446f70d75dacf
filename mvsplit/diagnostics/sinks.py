"""Where the lines of a monitor go besides its run folder."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Sink(Protocol):
    """Takes what a `Monitor` writes down, on the first rank only."""

    def append(self, log: str, line: dict[str, Any]) -> None:
        """A line of `log`, which is "metrics", "layers" or "events"; it has a `step`."""


def measured(line: dict[str, Any]) -> dict[str, Tensor]:
    """The fields of a line of layers as vectors of what was measured; those that hold nothing are
    left out."""
    arrays = {n: v for n, v in line.items() if isinstance(v, list) and n != "layer"}
    known = {name: [v for v in values if v is not None] for name, values in arrays.items()}
    return {name: torch.tensor(values) for name, values in known.items() if values}
