"""`mvsplit convert SOURCE TARGET`: weights between formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from mvsplit.hub import load_weights, write_weights
from mvsplit.hub.adapter import export_adapter, merge_adapter, read_adapter
from mvsplit.hub.convert import SHARD_GB

DTYPES: dict[str, torch.dtype | None] = {
    "keep": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Converts weights; every format holds them bit for bit. pt, safetensors and shards are the
    released layout, which holds only networks of the rule mvsplit with a tied leak;
    checkpoint and diffusers hold every rule. pt does not hold the number of heads.

    Attributes:
        source: model.pt, a .safetensors file, the index of shards or their folder; a run or one of
            its checkpoints; a diffusers folder.
        target: a new file or folder.
        adapter: a folder with a low-rank adapter for these weights, to be merged into them.
        to: the format; pt or safetensors follow from the target's suffix; adapter is what a run
            with --tune.what lora has learned, as a folder for peft.
        dtype: of the weights; keep leaves them as they are.
        ema: of a run, the averaged weights where it keeps any.
        num_heads: of a file in the released layout; width / 128 if neither given nor in the file.
        num_kv_heads: the same for key/value heads; from the shapes if not given.
        shard_gb: size of a shard at most, in 10⁹ bytes.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    adapter: Path | None = None
    to: Literal["pt", "safetensors", "shards", "checkpoint", "diffusers", "adapter"] | None = None
    dtype: Literal["keep", "fp32", "bf16"] = "keep"
    ema: bool = True
    num_heads: int | None = None
    num_kv_heads: int | None = None
    shard_gb: float = SHARD_GB


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: weights that cannot be read, or a target that cannot be written.
    """
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit convert")
    if args.to == "adapter":
        print(f"wrote the adapter to {export_adapter(args.source, args.target, ema=args.ema)}")
        return 0
    model = load_weights(
        args.source,
        ema=args.ema,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        dtype=DTYPES[args.dtype],
    )
    if args.adapter is not None:
        merge_adapter(model, read_adapter(args.adapter), weights=str(args.source))
    path = write_weights(model, args.target, args.to, shard_gb=args.shard_gb)
    weights = sum(parameter.numel() for parameter in model.parameters())
    layers, width = model.config.depth, model.config.width
    print(f"wrote {weights:,} parameters ({layers} layers of width {width}) to {path}")
    return 0
