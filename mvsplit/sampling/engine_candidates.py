"""What the engine's tuner tries for each stage of a block, on the device and at the shape at hand.

Products and attention by Triton anywhere; on Hopper those in CUDA C++ too (`kernels/hopper`), which
`in_cuda` tells apart: they run in a process of their own first (`engine_apart.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from mvsplit.kernels.fused.stream_attention import Blocks
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.kernels.hopper import attention, product
from mvsplit.kernels.hopper.attention import Heads
from mvsplit.kernels.hopper.product import Cut
from mvsplit.models import Block
from mvsplit.sampling.engine_plan import Choice, Network, Ordinary, Writing


def _tiles(*rows: tuple[int, int, int, int, int]) -> list[Tile]:
    return [Tile(*row) for row in rows]


# rows, columns, depth, warps, stages
_WIDE = _tiles(
    (64, 128, 64, 4, 4), (64, 128, 64, 4, 5), (64, 256, 64, 8, 4), (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
)  # fmt: skip
_WRITERS = _tiles(
    (64, 64, 64, 4, 4), (64, 64, 64, 4, 6), (64, 64, 128, 4, 3), (64, 128, 64, 4, 4),
    (64, 128, 128, 4, 3), (128, 128, 64, 8, 4),
)  # fmt: skip
_BLOCKS = [
    Blocks(*row)
    for row in (
        (64, 32, 4, 2), (64, 32, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 1),
        (64, 128, 4, 2), (64, 256, 8, 1), (128, 32, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2),
    )
]  # fmt: skip
MERGES = [Rows(*row) for row in ((2, 4), (4, 4), (4, 8), (8, 8))]


# tokens, products along them, warpgroups, stages, parts along K
_CUTS = [
    Cut(*row)
    for row in (
        (288, 2, 2, 4), (288, 2, 2, 3), (192, 1, 3, 4), (144, 1, 2, 4),
        (144, 1, 3, 4),
    )
]  # fmt: skip
# the same, of writers of few rows, before a merge of its own
_PARTS = [
    Cut(*row)
    for row in (
        (144, 1, 2, 4, 2), (144, 1, 2, 4, 3), (144, 1, 2, 4, 4), (144, 1, 1, 4, 2),
        (144, 1, 1, 6, 2), (288, 2, 1, 4, 4), (96, 1, 2, 5, 2),
    )
]  # fmt: skip
_KINDS = {"qkv": product.QKV, "w13": product.SWIGLU, "proj": product.WRITE, "w2": product.WRITE}


def cuts(stage: str, network: Network, weight: Tensor) -> list[Choice]:
    """The products in CUDA C++ that can do a stage at this shape."""
    if not product.runs_on(weight) or weight.data_ptr() % 16:
        return []
    can = [cut for cut in _CUTS if product.suits(cut, _KINDS[stage], network.stream, weight)]
    if stage == "qkv":
        can = [cut for cut in can if cut.columns == network.config.head_width]
    return list[Choice](can)


def parts(network: Network, weight: Tensor) -> list[Cut]:
    """The products in CUDA C++ in parts along K that can do a writer of few rows."""
    if not product.runs_on(weight) or weight.data_ptr() % 16 or network.stream.rows > 2048:
        return []
    return [cut for cut in _PARTS if product.suits(cut, product.PART, network.stream, weight)]


def heads(network: Network) -> list[Choice]:
    """The attention in CUDA C++, where it can do the samples of this shape."""
    block = cast(Block, network.model.blocks[0])
    config, stream = network.config, network.stream
    fits = attention.suits(stream, config.head_width, network.trunk.dtype)
    if not product.runs_on(block.attention.qkv.weight) or not fits:
        return []
    return [Heads(1), Heads(2), Heads(3)]


def candidates(stage: str, network: Network) -> list[Choice]:
    """What is tried for a stage on this device, the ordinary ops first."""
    ordinary: list[Choice] = [Ordinary()]
    if stage == "attention":
        return [*map(Ordinary, ("default", "cudnn", "flash")), *_BLOCKS, *heads(network)]
    block = cast(Block, network.model.blocks[0])
    weight = {
        "qkv": block.attention.qkv.weight, "w13": block.ffn.w13.weight,
        "proj": block.attention.proj.weight, "w2": block.ffn.w2.weight,
    }[stage]  # fmt: skip
    tiles = _WRITERS if stage in ("proj", "w2") else _WIDE
    tiles = [tile for tile in tiles if _worthwhile(tile, stage, network)]
    if is_hopper(weight) and tiles[0].fits_tma(weight):  # the copy engine was faster every time
        copied = [replace(t, tma=True) for t in tiles if _tma_fits(t, stage, network)]
        tiles = copied or tiles
    own = cuts(stage, network, weight)
    if stage not in ("proj", "w2"):
        return [*ordinary, *tiles, *own]
    deep = weight.shape[1] >= 2 * weight.shape[0]
    splits = ((1, 2, 3) if deep else (1, 2)) if network.stream.rows <= 2048 else (1,)
    tiles = [replace(tile, split=split) for tile in tiles for split in splits]
    by_tile = [None, *tiles, *parts(network, weight)]
    return [*ordinary, *(Writing(tile, Rows()) for tile in by_tile), *own]


def _worthwhile(tile: Tile, stage: str, network: Network) -> bool:
    return tile.rows >= 128 or network.stream.rows <= 2048


def is_hopper(x: Tensor) -> bool:
    """Whether the device has the bulk copy engine and programmatic dependent launch."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def _tma_fits(tile: Tile, stage: str, network: Network) -> bool:
    """The copy engine takes heads and hidden units as they lie: whole heads of a power of two."""
    if stage == "qkv":
        width = network.config.head_width
        return width & (width - 1) == 0 and tile.columns % width == 0
    return True


def in_cuda(choice: Choice) -> bool:
    """Whether a choice is a kernel in CUDA C++."""
    tile = choice.tile if isinstance(choice, Writing) else choice
    return isinstance(tile, Cut | Heads)
