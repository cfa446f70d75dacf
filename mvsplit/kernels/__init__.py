"""The ops of the model. `reference.py` says what they compute; fused versions say it faster."""

from mvsplit.kernels.reference import qk_norm_rope, rms_norm, split_merge, swiglu
from mvsplit.kernels.segments import Segments

__all__ = ["Segments", "qk_norm_rope", "rms_norm", "split_merge", "swiglu"]
