"""Weights from elsewhere and for elsewhere.

What needs the extra `hub` is imported only when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mvsplit.hub.convert import write_weights
from mvsplit.hub.released import export_released, load_released
from mvsplit.hub.weights import load_weights

if TYPE_CHECKING:
    from mvsplit.hub.diffusers_model import MVSplitDiTTransformer2DModel
    from mvsplit.hub.diffusers_pipeline import MVSplitPipeline

__all__ = [
    "MVSplitDiTTransformer2DModel",
    "MVSplitPipeline",
    "export_released",
    "load_released",
    "load_weights",
    "write_weights",
]

_LAZY = {
    "MVSplitDiTTransformer2DModel": "mvsplit.hub.diffusers_model",
    "MVSplitPipeline": "mvsplit.hub.diffusers_pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
