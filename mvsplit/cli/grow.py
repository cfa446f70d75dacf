"""`mvsplit grow WEIGHTS --depth N --out TARGET`: deeper weights that compute the same.

`mvsplit train PRESET --grow-from RUN` grows a run together with its optimiser (docs/growth.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from mvsplit.hub import load_weights, write_weights
from mvsplit.models.growth import grown
from mvsplit.training.randomness import generator_for


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Puts layers that do nothing at first between those of trained weights.

    Attributes:
        weights: a run, a checkpoint, model.pt, safetensors or a diffusers folder.
        depth: layers of the deeper network.
        out: a new folder for a checkpoint, or a new file .pt or .safetensors.
        where: with the new layers after each of the old ones, or all at the end.
        ema: of a run, the averaged weights where it keeps any.
        num_heads: of a file in the released layout; width / 128 if neither given nor in the file.
        seed: of what is drawn for the new layers.
    """

    weights: tyro.conf.Positional[Path]
    depth: int
    out: Path
    where: Literal["evenly", "end"] = "evenly"
    ema: bool = True
    num_heads: int | None = None
    seed: int = 0


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: the weights cannot be read, their rule cannot grow, or the target exists.
    """
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit grow")
    model = load_weights(args.weights, ema=args.ema, num_heads=args.num_heads, dtype=torch.float32)
    generator = generator_for(args.seed, "growth")
    deeper = grown(model, args.depth, where=args.where, generator=generator)
    kind = None if args.out.suffix else "checkpoint"
    path = write_weights(deeper, args.out, kind)
    weights = sum(parameter.numel() for parameter in deeper.parameters())
    print(
        f"wrote {weights:,} parameters ({model.config.depth} layers grown to {args.depth}) to "
        f"{path}"
    )
    return 0
