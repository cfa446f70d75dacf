"""What a GPU does in this network's work, as far as a plan needs to know.

Rates are those that kernels reach, not those of data sheets; only `peak` is, for it is what MFU is
counted in. Units: bytes, bytes a second, FLOP a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mvsplit.errors import UserError

GIB = 2**30
_INSTEAD = "--memory-gib, --tflops and --bandwidth"
_SHEET = "data sheet, times the share that an H200 reaches of its own; not measured"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        name: for people.
        memory: that PyTorch may see.
        products: matrix products in bf16 of blocks of D = 1024, at 8,000 tokens or more, by a card
            that has just been idle.
        under_load: the same of numbers that are not zero after seconds of work, when the card's
            power holds its clock down; smaller products may reach it too.
        alone: the same with nothing between them, which takes more power; None: not known.
        products_fp32: the same in fp32, without TF32.
        copy: device copy, bytes read and written.
        peak: dense bf16, of the data sheet.
        processors: multiprocessors.
        hopper: whether kernels for Hopper serve: the merge in clusters of blocks, products and
            gradients of attention that do what follows them.
        link: an assumption of what FSDP's collectives reach, one direction.
        source: where memory, products and copy come from.
    """

    name: str
    memory: float
    products: float
    under_load: float
    products_fp32: float
    copy: float
    peak: float
    processors: int
    hopper: bool
    link: float
    source: str
    alone: float | None = None


GPUS: dict[str, Gpu] = {
    "h200": Gpu(
        name="NVIDIA H200",
        memory=139.8 * GIB,
        products=784e12,
        under_load=687e12,
        products_fp32=52e12,
        copy=4.25e12,
        peak=989e12,
        processors=132,
        hopper=True,
        link=300e9,
        source="benchmarks/results: train_step_eager_h200 (profile), step_classes_h200 (load), "
        "ffn_products_h200_2026-11-30T1341 (alone), fused_ops_merge_h200 (copy)",
        alone=640e12,
    ),
    "h100": Gpu(
        name="NVIDIA H100",
        memory=79.1 * GIB,
        products=778e12,
        under_load=682e12,
        products_fp32=52e12,
        copy=3.0e12,
        peak=989e12,
        processors=132,
        hopper=True,
        link=300e9,
        source="products and copy measured by hand on an 80 GB SXM card; products under load and "
        "alone not measured: an H200's, in proportion to products",
        alone=635e12,
    ),
    "a100": Gpu(
        name="NVIDIA A100",
        memory=79.1 * GIB,
        products=247e12,
        under_load=247e12,
        products_fp32=15e12,
        copy=1.8e12,
        peak=312e12,
        processors=108,
        hopper=False,
        link=200e9,
        source=_SHEET,
    ),
    "rtx4090": Gpu(
        name="NVIDIA GeForce RTX 4090",
        memory=23.6 * GIB,
        products=131e12,
        under_load=115e12,
        products_fp32=64e12,
        copy=0.89e12,
        peak=165e12,
        processors=128,
        hopper=False,
        link=20e9,
        source=_SHEET,
    ),
}


def find_gpu(name: str) -> Gpu:
    """A row of the table, or for `auto` that of the GPU of this machine.

    Raises:
        UserError: the table does not have it, or this machine has none.
    """
    if name == "auto":
        return _this_gpu()
    if name.lower() not in GPUS:
        raise UserError(
            f"gpu={name!r} is unknown; known: {', '.join((*GPUS, 'auto'))}; for another name the "
            f"nearest and give {_INSTEAD}"
        )
    return GPUS[name.lower()]


def _this_gpu() -> Gpu:
    known = ", ".join(GPUS)
    if not torch.cuda.is_available():
        raise UserError(f"gpu='auto': this machine has no GPU; name one of {known}")
    found = torch.cuda.get_device_name()
    words = found.lower().replace(" ", "")
    for name, gpu in GPUS.items():
        if name in words and "laptop" not in words:  # which have less of everything
            return gpu
    raise UserError(
        f"gpu='auto': nothing is known of {found}; name the nearest of {known} and give {_INSTEAD}"
    )
