"""What all evaluators have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

STDERR = "_stderr"  # ends the name of a score's standard error


def share(name: str, right: Sequence[bool]) -> Iterator[tuple[str, float]]:
    """A share of trials that went well, and its standard error √(p(1 − p)/n)."""
    p = sum(right) / len(right)
    yield name, p
    yield name + STDERR, math.sqrt(p * (1 - p) / len(right))
