"""Data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mvsplit.data.cache import Cache
from mvsplit.data.clips import Clips
from mvsplit.data.digits import Digits
from mvsplit.data.shapes import Shapes
from mvsplit.data.types import Dataset
from mvsplit.errors import UserError, nearest

DATASETS: dict[str, Callable[..., Dataset]] = {
    "cache": Cache,
    "clips": Clips,
    "digits": Digits,
    "shapes": Shapes,
}


def build_dataset(name: str, **options: Any) -> Dataset:
    """The data set `name` with its options. Raises UserError for an unknown name or option."""
    if name not in DATASETS:
        raise UserError(f"dataset: unknown name {name!r}; {nearest(name, DATASETS)}")
    known = inspect.signature(DATASETS[name]).parameters
    for option in options:
        if option not in known:
            remedy = nearest(option, known) if known else "it takes no options"
            raise UserError(f"dataset {name}: unknown option {option!r}; {remedy}")
    return DATASETS[name](**options)
