"""The diffusion transformer."""

from mvsplit.models.block import Attention, Block, SwiGLU
from mvsplit.models.config import DiTConfig
from mvsplit.models.dit import DiT

__all__ = ["Attention", "Block", "DiT", "DiTConfig", "SwiGLU"]
