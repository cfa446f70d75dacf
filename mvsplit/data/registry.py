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
from mvsplit.errors import UserError, nearest, nearest_of_all

DATASETS: dict[str, Callable[..., Dataset]] = {
    "cache": Cache,
    "clips": Clips,
    "digits": Digits,
    "shapes": Shapes,
}


def build_dataset(name: str, **options: Any) -> Dataset:
    """The data set `name` with its options. Raises UserError for an unknown name or option."""
    if name not in DATASETS:
        raise UserError(f"data.dataset={name!r} is unknown; {nearest_of_all(name, DATASETS)}")
    known = inspect.signature(DATASETS[name]).parameters
    for option, value in options.items():
        if option not in known:
            remedy = nearest(option, known) if known else "it takes no options"
            field = "series" if option == "seed" else option  # as DataConfig names it
            remedy += "" if option == "motions" else f"; for none: --data.{field} None"
            raise UserError(
                f"data.{field}={value!r}: dataset {name}: unknown option {option!r}; {remedy}"
            )
    return DATASETS[name](**options)
