"""What a run starts from: the options of `mvsplit train`, and what reads the weights for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from mvsplit.cli.subject import nothing_at
from mvsplit.errors import UserError
from mvsplit.hub import load_weights
from mvsplit.hub.adapter import Adapter, merge_adapter, read_adapter
from mvsplit.hub.released import LikelyHeads
from mvsplit.hub.weights import find_checkpoint, is_ours
from mvsplit.models import DiT
from mvsplit.models.lora import fingerprint
from mvsplit.training import Experiment, Origin, Start, TuneConfig
from mvsplit.training.checkpoint import DamagedCheckpoint, Snapshot, read_checkpoint


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """Weights to start from.

    Attributes:
        weights: a run, a checkpoint, model.pt, safetensors or a diffusers folder.
        ema: of a run, the averaged weights where it keeps any.
        optimizer: fresh moments, or those kept in the checkpoint.
        adapter: folder of a LoRA for the weights: with --tune.what lora it goes on learning, else
            it is merged.
        grow_from: instead of --from: a run with fewer layers, as trained, whose moments and data
            position are taken over; the new layers do nothing at first (docs/growth.md).
        grow_where: where these come.
        split_from: instead of --from: a run of the same network, as trained, that is turned into
            MV-Split and goes on, its moments and data position with it (docs/surgery.md).
    """

    weights: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    ema: Annotated[bool, tyro.conf.arg(name="from-ema")] = True
    optimizer: Literal["fresh", "kept"] = "fresh"
    adapter: Path | None = None
    grow_from: Path | None = None
    grow_where: Literal["evenly", "end"] = "evenly"
    split_from: Path | None = None


def origin_of(options: StartOptions) -> Origin | None:
    """The record of the options.

    Raises:
        UserError: options that need --from are given without it.
    """
    sources = {"--grow-from": options.grow_from, "--split-from": options.split_from}
    if chosen := [name for name, source in sources.items() if source is not None]:
        others = {"--from": options.weights, "--adapter": options.adapter}
        too_many = chosen[1:] + [name for name, value in others.items() if value is not None]
        if too_many:
            raise UserError(
                f"{chosen[0]} takes neither --from nor --adapter nor another source; leave out "
                f"{too_many[0]}"
            )
    if options.split_from is not None:
        split_from = str(options.split_from)
        return Origin(source=split_from, ema=False, optimizer="kept", split=True)
    if options.grow_from is not None:
        return Origin(
            source=str(options.grow_from), ema=False, optimizer="kept", grow=options.grow_where
        )
    if options.weights is None:
        if options.optimizer == "kept" or options.adapter is not None:
            given = "--optimizer kept" if options.adapter is None else "--adapter"
            raise UserError(f"{given} belongs to weights to start from; name them with --from")
        return None
    return Origin(
        source=str(options.weights),
        ema=options.ema,
        optimizer=options.optimizer,
        adapter=None if options.adapter is None else str(options.adapter),
    )


def starter(experiment: Experiment) -> Callable[[], Start] | None:
    """What reads the weights that `experiment.origin` names."""
    origin = experiment.origin
    return None if origin is None else lambda: _read(experiment, origin)


def _read(experiment: Experiment, origin: Origin) -> Start:
    source = Path(origin.source)
    if not source.exists():
        split = "--split-from" if origin.split else "--from"
        option = split if origin.grow is None else "--grow-from"
        why = "there is no file of that name" if source.suffix else nothing_at(source)
        raise UserError(f"{option} {source}: {why}")
    heads = LikelyHeads(
        count=experiment.model.heads,
        whose="the model.heads of this training",
        option="--model.heads",
    )
    model = load_weights(source, ema=origin.ema, likely_heads=heads, dtype=torch.float32)
    adapter = None if origin.adapter is None else read_adapter(origin.adapter)
    tune = experiment.train.tune
    goes_on = tune.what == "lora" and adapter is not None
    if adapter is not None and goes_on:
        _require_same(adapter, tune, model, origin.source)
    elif adapter is not None:
        merge_adapter(model, adapter, weights=origin.source)
    return Start(
        model=model,
        source=_moments(source) if origin.optimizer == "kept" else None,
        adapter=adapter.tensors if adapter is not None and goes_on else None,
    )


def _require_same(adapter: Adapter, tune: TuneConfig, model: DiT, source: str) -> None:
    """Raises UserError where the adapter is of other weights or of another shape."""
    adapter.require_base(fingerprint(model), source)
    for name in ("rank", "alpha"):
        ours, theirs = getattr(tune.lora, name), getattr(adapter.config, name)
        if ours != theirs:
            raise UserError(
                f"train.tune.lora.{name}={ours}: the adapter {adapter.source} has {theirs}; use "
                f"--tune.lora.{name} {theirs:g}"
            )


def _moments(source: Path) -> Snapshot:
    if not is_ours(source):
        raise UserError(
            f"optimizer=kept: {source} is no run and no checkpoint of mvsplit, which alone keep "
            "moments; choose fresh"
        )
    try:
        return read_checkpoint(find_checkpoint(source), ["optimizer"])
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; give another checkpoint of the run") from error
