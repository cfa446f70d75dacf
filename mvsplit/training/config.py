"""What an experiment is: a model, its data and how it is trained; and its form in JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mvsplit.errors import UserError
from mvsplit.flow import DPOConfig
from mvsplit.models import DiTConfig
from mvsplit.models.lora import LoRAConfig
from mvsplit.residuals import RuleConfig, as_recorded
from mvsplit.residuals.mvsplit import starts_by_default, written_out
from mvsplit.training.typed_json import read_as


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples a run sees.

    Attributes:
        dataset: digits, shapes, clips of moving shapes, or cache for pictures that `mvsplit encode`
            has written.
        size: pixels a side, for data sets that are rendered at a choice of sizes.
        frames: of a clip, for data sets of clips.
        motions: of the clips, those of move, bounce, pair, pass that are drawn; all if empty.
        series: which endless series of a data set without end (its own seed).
        split: of the digits, "train" keeps a quarter for `mvsplit evaluate`; all if not given.
        embedder_seed: which frozen word embedding.
        path: folder of a cache that `mvsplit encode` has made.
        verify: compute the checksums of a cache before the first step.
        prefetch: batches that a thread makes ahead of time.
        pairs: a parquet file of captions and samples of which one was preferred, for
            train.objective=dpo; the data set then says how captions and pictures are encoded.
    """

    dataset: str = "digits"
    size: int | None = None
    frames: int | None = None
    motions: tuple[str, ...] = ()
    series: int | None = None
    split: str | None = None
    embedder_seed: int = 0
    path: str | None = None
    verify: bool = True
    prefetch: int = 2
    pairs: str | None = None

    def __post_init__(self) -> None:
        if self.prefetch < 0:
            raise UserError(f"data.prefetch={self.prefetch}: must not be negative")


Policy = Literal["record", "stop", "skip", "rollback", "protect"]
POLICIES: tuple[str, ...] = typing.get_args(Policy)


@dataclass(frozen=True, kw_only=True)
class ReactionConfig:
    """The numbers of the policies (`mvsplit.training.policies`; docs/policies.md says where they
    come from).

    Attributes:
        margin: a checkpoint counts as good if it lies so many steps before the alarm.
        lr_factor: rollback multiplies the learning rate by it, each time.
        rewarm: steps over which the learning rate rises again after a rollback or surgery.
        fresh_moments: whether a rollback forgets the moments of the optimiser.
        limit: how often a run may go back before it stops instead.
        gain: g of protect, the part of the gains that is taken over from the writers: β = α = g,
            W ← W/g. A power of two changes no bit of what the network computes.
        anneal: steps over which α and λ of a protected network go where a network that had MV-Split
            from the start begins; 0 leaves them to learn from g and 0 on.
        alpha, leak: where they go.
        go_back: whether protect restores the last good checkpoint before the surgery.
    """

    margin: int = 20
    lr_factor: float = 0.5
    rewarm: int = 0
    fresh_moments: bool = False
    limit: int = 5
    gain: float = 1 / 64
    anneal: int = 50
    alpha: float = 0.0
    leak: float = 0.0
    go_back: bool = True

    def __post_init__(self) -> None:
        where = "train.reaction"
        for name in ("margin", "rewarm", "limit", "anneal"):
            _require(self, name, getattr(self, name) >= 0, "must not be negative", where)
        for name in ("lr_factor", "gain"):
            _require(self, name, 0 < getattr(self, name) <= 1, "must be in (0, 1]", where)
        for name in ("alpha", "leak"):
            _require(self, name, 0 <= getattr(self, name) <= 1, "must be in [0, 1]", where)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run lies on the processes of torchrun; one process alone ignores it (docs/parallel.md).

    Attributes:
        layout: replicate, every process holds the whole network and updates a part of it; shard,
            every process holds a part of each parameter (FSDP2), and the fields below say how; or
            auto: replicate where the network fits so.
        unit: successive blocks whose weights are gathered, and their gradients scattered, together.
        reshard: let a unit's weights go after its forward pass and gather them again in backward;
            False keeps them, for speed.
        prefetch: units that are gathered ahead of the one that runs.
        replicas: parts that the processes are divided into; the network is sharded within a part,
            and each part holds all of it.
        timeout: seconds without a move of one process after which all stop and it is named.
    """

    layout: Literal["auto", "replicate", "shard"] = "auto"
    unit: int = 4
    reshard: bool = True
    prefetch: int = 1
    replicas: int = 1
    timeout: float = 600.0

    def __post_init__(self) -> None:
        where = "train.parallel"
        _require_choices(self, where)
        fits = self.layout != "replicate" or self.replicas == 1
        _require(self, "replicas", fits, "only layout=shard divides the processes", where)
        for name in ("unit", "replicas"):
            _require(self, name, getattr(self, name) >= 1, "must be at least 1", where)
        _require(self, "prefetch", self.prefetch >= 0, "must not be negative", where)
        _require(self, "timeout", 0 < self.timeout < math.inf, "must be greater than 0", where)


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Which parameters learn, when a run starts from trained weights (docs/fine-tuning.md).

    Attributes:
        what: all of them, the gains of the residual rules, or low-rank adapters (LoRA) beside
            frozen weights.
        only: of these, the ones whose names match one of the patterns, such as 'blocks.3?.*'; all
            if empty. Adapters count by the name of the weight that they belong to.
        lora: the adapters.
    """

    what: Literal["all", "gains", "lora"] = "all"
    only: tuple[str, ...] = ()
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        _require_choices(self, "train.tune")

    @property
    def freezes(self) -> bool:
        """Whether some parameters may not learn."""
        return self.what != "all" or bool(self.only)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained (paper §4 where the defaults are its own).

    Attributes:
        steps: optimiser steps of the whole run.
        batch_size: samples a step, whatever they are cut into, over all processes.
        accumulate: pieces that a batch is cut into to save memory, as equal as they can be.
        lr: learning rate; None for 1e-3 / (0.2·√width), the µP rule of paper §4.
        lr_factor: multiplies the learning rate.
        gain_lr: multiplies it once more for the gains of the residual rules.
        warmup: steps of linear warm-up; constant afterwards.
        weight_decay: on 2-D weights only, not on gains and biases.
        betas, eps: of AdamW.
        clip: largest global gradient norm.
        ema_decay: of the averaged weights; 0 keeps none.
        precision: fp32, or bf16 arithmetic.
        weights: of the blocks' matrices, with their gradients and moments: fp32, 16 bytes a
            parameter; split, fp32 stored as bf16 and the bits that it leaves out, 14 bytes and no
            casts; bf16, rounded stochastically with moments of 2 bytes an element, 6 bytes. The
            last two have gradients in bf16 and need precision=bf16; averages are of their bf16.
        recompute: what the backward of a block computes again instead of keeping it, on a GPU:
            nothing; the packed FFN projection; the attention branch too; the trunk between the
            branches too; all; or auto: as little as memory allows.
        deterministic: whether sums on a GPU are made in a fixed order, so that a run that was
            resumed has the bits of one that was not stopped; attention's backward is slower then.
        seed: of initial weights, order of the data, dropped captions, noise and times.
        save_every: steps between checkpoints; the last step is always saved.
        keep: how many checkpoints stay on the disk.
        keep_every: checkpoints of the multiples of so many steps stay too; 0 for none.
        probe_every: steps between looks into every layer; 0 for none.
        probe: the fields of such a look: the cheap ones, with the alignment of the writers, or all.
        probe_burst: most looks in a row that the watch may ask for beside them.
        record_steps: steps that the flight recorder keeps in memory.
        on_alarm: what the run does when the watch raises an alarm (docs/policies.md).
        reaction: how rollback and protect go about it.
        caption_dropout: share of captions replaced by "", for classifier-free guidance.
        time_shift: shift of the training times; 1 leaves them uniform.
        sample_shift: shift of the times when pictures are drawn; None for that of the training.
        device: cpu, cuda, cuda:1, …; auto is cuda where there is one.
        parallel: how the run lies on several processes.
        tune: which parameters learn.
        objective: flow matching, or dpo: the pairs that data.pairs names.
        dpo: how it learns from pairs.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    lr: float | None = None
    lr_factor: float = 1.0
    gain_lr: float = 1.0
    warmup: int = 1000
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0
    ema_decay: float = 0.9999
    precision: Literal["fp32", "bf16"] = "fp32"
    weights: Literal["fp32", "split", "bf16"] = "fp32"
    recompute: Literal["auto", "nothing", "packed", "attention", "trunk", "all"] = "auto"
    deterministic: bool = False
    seed: int = 0
    save_every: int = 1000
    keep: int = 3
    keep_every: int = 0
    probe_every: int = 128
    probe: Literal["cheap", "writers", "all"] = "cheap"
    probe_burst: int = 10
    record_steps: int = 32
    on_alarm: Policy = "record"
    reaction: ReactionConfig = field(default_factory=ReactionConfig)
    caption_dropout: float = 0.1
    time_shift: float = 1.0
    sample_shift: float | None = None
    device: str = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    objective: Literal["flow", "dpo"] = "flow"
    dpo: DPOConfig = field(default_factory=DPOConfig)

    @property
    def bf16_weights(self) -> bool:
        """Whether the matrices that the blocks read are bf16."""
        return self.weights != "fp32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "keep", "record_steps"):
            _require(self, name, getattr(self, name) >= 1, "must be at least 1")
        counts = ("warmup", "weight_decay", "seed", "probe_every", "probe_burst", "keep_every")
        for name in counts:
            _require(self, name, getattr(self, name) >= 0, "must not be negative")
        for name in ("lr_factor", "gain_lr", "eps", "clip", "time_shift"):
            _require(self, name, getattr(self, name) > 0, "must be greater than 0")
        _require(self, "lr", self.lr is None or self.lr > 0, "must be greater than 0")
        for name in ("lr", "lr_factor", "gain_lr", "weight_decay", "eps", "time_shift"):
            _require(self, name, getattr(self, name) != math.inf, "must be finite")
        shift = self.sample_shift
        _require(self, "sample_shift", shift is None or 0 < shift < math.inf, "must be positive")
        _require(self, "ema_decay", 0 <= self.ema_decay < 1, "must be in [0, 1)")
        _require(self, "betas", all(0 <= b < 1 for b in self.betas), "both must be in [0, 1)")
        _require(self, "caption_dropout", 0 <= self.caption_dropout <= 1, "must be in [0, 1]")
        _require_choices(self, "train")
        fits = self.weights == "fp32" or self.precision == "bf16"
        _require(self, "weights", fits, "needs train.precision=bf16")
        if self.tune.freezes and self.on_alarm == "protect":
            raise UserError(
                "train.on_alarm='protect' gives every branch new gains, which train.tune would "
                "freeze; choose rollback"
            )
        if self.gain_lr != 1 and self.on_alarm == "protect":
            raise UserError(
                f"train.gain_lr={self.gain_lr}: gains that train.on_alarm='protect' puts into a "
                "running model have the learning rate of all; choose rollback, or train.gain_lr=1"
            )
        if self.accumulate > self.batch_size:
            raise UserError(
                f"train.accumulate={self.accumulate}: there are only train.batch_size="
                f"{self.batch_size} samples to cut; choose at most so many pieces"
            )


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the weights of a run come from, if they are not drawn.

    Attributes:
        source: the weights, as they were named.
        ema: of a run, the averaged weights where it keeps any.
        optimizer: moments that start at zero, or those of the source.
        adapter: a LoRA for these weights that goes on learning, or is merged into them.
        grow: where new layers come between those of the source, which then are fewer; None where
            there are as many. Moments and data position go on where the source was.
        split: whether the source's network becomes an MV-Split network that computes the same, with
            the gain and the way of α and λ in `train.reaction`; its data position goes on.
        sha256: of their values (`mvsplit.models.lora.fingerprint`); None until they are read.
    """

    source: str
    ema: bool = True
    optimizer: Literal["fresh", "kept"] = "fresh"
    adapter: str | None = None
    grow: Literal["evenly", "end"] | None = None
    split: bool = False
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that decides what a run computes; `config.json` of a run folder holds one.

    Attributes:
        origin: the weights that it starts from; None where they are drawn at random.
        rule_now: the rule that a policy has given the running network since; None as long as it is
            `model.rule`. It records and decides nothing: each checkpoint knows its own rule.
    """

    model: DiTConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    origin: Origin | None = None
    rule_now: RuleConfig | None = None

    def asked(self) -> Experiment:
        """Without what is only recorded."""
        origin = None if self.origin is None else replace(self.origin, sha256=None)
        return replace(self, rule_now=None, origin=origin)


def _require_choices(config: Any, where: str) -> None:
    """Raises UserError where a field is none of the values that its type names."""
    for name, kind in typing.get_type_hints(type(config)).items():
        if typing.get_origin(kind) is Literal:
            allowed = typing.get_args(kind)
            known = getattr(config, name) in allowed
            _require(config, name, known, f"choose one of: {', '.join(allowed)}", where)


def _require(config: Any, name: str, holds: bool, rule: str, where: str = "train") -> None:
    if not holds:
        raise UserError(f"{where}.{name}={getattr(config, name)}: {rule}")


# A run may be continued with other values of these: they do not change what a step computes, but
# for rounding (another cut of the batch), for the noise (each kind of device draws its own), or
# only for what an alarm leads to.
CHANGEABLE = frozenset(
    f"train.{name}"
    for name in (
        *("steps", "save_every", "keep", "probe_every", "probe", "probe_burst", "record_steps"),
        *("accumulate", "recompute", "device", "on_alarm", "keep_every", "sample_shift"),
        *(f"reaction.{item.name}" for item in dataclasses.fields(ReactionConfig)),
        *(f"parallel.{item.name}" for item in dataclasses.fields(ParallelConfig)),
    )
) | {"data.path", "data.pairs", "data.verify", "data.prefetch"}


def differences(old: Experiment, new: Experiment) -> dict[str, tuple[Any, Any]]:
    """The fields in which two experiments differ, by dotted name: (old, new); but for what nobody
    asks for, and for gains that start alike though one leaves that to the default, unless its
    writers start otherwise for that."""
    if _start(old.model) == _start(new.model):
        old = replace(old, model=replace(old.model, rule=new.model.rule))
    before, after = (flat_fields(dataclasses.asdict(e.asked())) for e in (old, new))
    names = sorted(before.keys() | after.keys())
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _start(model: DiTConfig) -> tuple[RuleConfig, bool]:
    """The rule as it starts, and whether it is one whose writers are not zero by default."""
    standard = model.writers == "rule" and starts_by_default(model.rule)
    return written_out(model.rule, model.depth), standard


def flat_fields(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flat_fields(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def to_json(experiment: Experiment) -> str:
    """The experiment as indented JSON; `from_json` reads it back to an equal one."""
    return json.dumps(dataclasses.asdict(experiment), indent=2) + "\n"


def from_json(text: str, source: Path | str = "config.json") -> Experiment:
    """The experiment that `text` describes.

    Raises:
        UserError: not JSON, or a field that is unknown, missing, or of the wrong type; the message
            begins with `source`.
    """
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{source} is not valid JSON ({error}); restore it, or start a new run folder"
        ) from error
    try:
        return read_as(Experiment, _recorded(tree, "rule_now"), "")
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def read_model_config(tree: Any, name: str) -> DiTConfig:
    """The configuration of the network of some weights, from parsed JSON. Raises UserError that
    begins with `name`."""
    return read_as(DiTConfig, _recorded(tree, "rule"), name)


def _recorded(tree: Any, field: str) -> Any:
    """Parsed JSON with the rule in `field`, which decides nothing, as one may be."""
    if isinstance(tree, dict) and isinstance(tree.get(field), dict):
        return {**tree, field: as_recorded(tree[field])}
    return tree
