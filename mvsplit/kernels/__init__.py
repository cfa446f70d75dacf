"""The ops of the model. `reference.py` says what they compute; fused versions say it faster."""

from mvsplit.kernels.dispatch import (
    backend,
    forced_backend,
    qk_norm_rope,
    rms_norm,
    split_merge,
    swiglu,
)
from mvsplit.kernels.reference import Gains
from mvsplit.kernels.segments import Segments

__all__ = [
    "Gains",
    "Segments",
    "backend",
    "forced_backend",
    "qk_norm_rope",
    "rms_norm",
    "split_merge",
    "swiglu",
]
