"""Short runs on pairs of noise, and what they minimise by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.cli.start import starter
from mvsplit.flow import DPOConfig
from mvsplit.models import DiT
from mvsplit.models.lora import LoRAConfig
from mvsplit.training import DataConfig, Experiment, Origin, TrainState, TuneConfig, build_state
from mvsplit.training.finetune import begin_from
from mvsplit.training.pieces import Piece
from tests.training import runs

TUNES = {
    "all": TuneConfig(),
    "layers": TuneConfig(only=("blocks.1.*", "head.*")),
    "lora": TuneConfig(what="lora", lora=LoRAConfig(rank=2, alpha=4.0)),
}
BETA, ANCHOR = 30.0, 0.2


def aligning(whole: Path, pairs: Path, tune: str = "all", **changes: Any) -> Experiment:
    """Four steps on the pairs from the weights of the run `whole`."""
    dpo = DPOConfig(beta=BETA, anchor=ANCHOR)
    fields = {"steps": 4, "seed": 1, "dpo": dpo, "tune": TUNES[tune], **changes}
    return Experiment(
        model=runs.MODEL,
        train=replace(runs.TRAIN, objective="dpo", **fields),
        data=DataConfig(pairs=str(pairs)),
        origin=Origin(source=str(whole)),
    )


def begun(experiment: Experiment) -> TrainState:
    state = build_state(experiment)
    begin_from(state, experiment, starter(experiment))
    return state


def moved_away(model: DiT) -> None:
    """So that the network is no longer its reference."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.05 * noise


def by_hand(model: DiT, reference: DiT, piece: Piece) -> Tensor:
    """The mean of what is minimised, sample after sample, from the formula as it is printed."""
    total = torch.zeros((), dtype=torch.float64)
    for k in range(len(piece.data)):
        error: dict[tuple[str, str], Tensor] = {}
        assert piece.rejected is not None
        for which, x0 in (("w", piece.data[k]), ("l", piece.rejected[k])):
            t, x1 = piece.times[k], piece.noise[k]
            for name, network in (("θ", model), ("ref", reference)):
                z = (1 - t) * x0 + t * x1
                velocity = network(z[None], piece.text[k : k + 1], None)[0]
                error[which, name] = (x0 - x1 - velocity).square().sum() / x0.numel()
        inside = (error["w", "θ"] - error["w", "ref"]) - (error["l", "θ"] - error["l", "ref"])
        total = total - torch.log(1 / (1 + torch.exp(BETA / 2 * inside)))
        total = total + ANCHOR * error["w", "θ"]
    return total / len(piece.data)
