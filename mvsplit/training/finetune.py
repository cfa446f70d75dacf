"""Training that starts from weights instead of chance, and may leave most of them as they are."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from mvsplit.errors import UserError, nearest
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.growth import grown, places
from mvsplit.models.lora import add_lora, fingerprint, lora_parameters
from mvsplit.residuals import RuleConfig
from mvsplit.training.carried import correction
from mvsplit.training.checkpoint import Snapshot, copy_tensors
from mvsplit.training.config import Experiment, Origin, TrainConfig, TuneConfig
from mvsplit.training.distributed import world
from mvsplit.training.ema import EMA
from mvsplit.training.growth import carry_over
from mvsplit.training.optimizer import peak_learning_rate
from mvsplit.training.randomness import generator_for
from mvsplit.training.spread import local
from mvsplit.training.state import TrainState
from mvsplit.training.surgery import protect

# Where the weights started says nothing about what they are.
_FREE_SHAPE = ("rule", "writers")
_FREE_RULE = ("beta", "alpha", "leak", "gamma")
# Learning rates that a gain should have: at 5.2 of them runs went on, at 1.3 they died
# (docs/surgery.md).
_RATES_OF_A_GAIN = 4


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with.

    Attributes:
        model: the weights, on the CPU.
        source: the checkpoint whose moments the optimiser takes over; None for fresh ones.
        adapter: values of the adapters by parameter name; None for those drawn.
    """

    model: DiT
    source: Snapshot | None = None
    adapter: Mapping[str, Tensor] | None = None


# What learns


def choose_parameters(
    model: DiT, tune: TuneConfig, generator: torch.Generator | None = None
) -> None:
    """Adds the adapters that `tune` asks for, drawn from `generator`, and freezes what is not to
    learn.

    Raises:
        UserError: nothing would learn, or the run lies on several processes.
    """
    if not tune.freezes:
        return
    if world() > 1:
        raise UserError(
            f"train.tune.what={tune.what!r}: only a single process can freeze parameters; start "
            f"the command without torchrun, or let all of them learn"
        )
    chosen = _adapt(model, tune, generator) if tune.what == "lora" else _chosen(model, tune)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def _adapt(model: DiT, tune: TuneConfig, generator: torch.Generator | None) -> set[str]:
    """Adds adapters and names their parameters."""
    modules = {name.rpartition(".")[0] for name in _matching(model, tune)}
    add_lora(model, tune.lora, only=modules, generator=generator)
    if not (found := lora_parameters(model)):
        raise UserError(
            f"train.tune.only={' '.join(tune.only)!r} matches none of the weights that "
            f"train.tune.lora.targets={' '.join(tune.lora.targets)!r} names; change one of them"
        )
    return set(found)


def learning(model: DiT) -> str | None:
    """Says how many parameters learn; None if all of them do."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    whole, chosen = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    if chosen == whole:
        return None
    return f"{chosen:,} of {whole:,} parameters learn ({chosen / whole:.2%})"


def _chosen(model: DiT, tune: TuneConfig) -> set[str]:
    names = _matching(model, tune)
    if tune.what == "all":
        return set(names)
    gains = {name for name in names if ".rule_" in name}
    if not gains:
        where = f" that match {' '.join(tune.only)!r}" if tune.only else ""
        raise UserError(
            f"train.tune.what='gains': the rule {model.config.rule.name} has no gains{where}; "
            f"choose all or lora"
        )
    return gains


def _matching(model: DiT, tune: TuneConfig) -> list[str]:
    """The parameters whose names match one of the patterns; all where there are none.

    Raises:
        UserError: a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in tune.only:
        if not any(fnmatchcase(name, pattern) for name in names):
            kinds = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
            near = nearest(pattern, names[:200], listed=kinds, cutoff=0.5)  # of the names a part
            raise UserError(f"train.tune.only={pattern!r} matches no parameter; {near}")
    return [n for n in names if not tune.only or any(fnmatchcase(n, p) for p in tune.only)]


# Where it starts


def begin_from(
    state: TrainState, experiment: Experiment, start: Callable[[], Start] | None
) -> None:
    """Puts the weights of `experiment.origin`, if it names any, into a run that has taken no step.
    The averages start from them too.

    Raises:
        UserError: they are of another shape or rule; the moments are not those of this run; there
            are adapters to train, but no weights; nobody can read the weights.
    """
    origin = experiment.origin
    if origin is None:
        _require_no_start(experiment.train)
        return
    if start is None:
        raise UserError(f"origin.source={origin.source}: pass what reads it as `start`")
    found = start()
    state.base = fingerprint(found.model)
    model = found.model if origin.grow is None else _grown(state, experiment, found.model)
    check_same(model.config, state.model.config, origin.source, split=origin.split)
    weights = dict(state.model.state_dict())
    adapters = {name: weights.pop(name) for name in lora_parameters(state.model)}
    copy_tensors(dict(model.state_dict()), weights, origin.source)
    if found.adapter is not None:
        copy_tensors(found.adapter, adapters, f"{origin.adapter}")
    if origin.grow is not None and found.source is not None:
        moved = places(found.model.config.depth, model.config.depth, origin.grow)
        carry_over(state, found.source, moved, experiment.train)
    elif found.source is not None:
        _take_moments(state, found.source, origin, experiment.train)
    state.objective.begin()  # before a surgery: the reference has the rule of the source
    if origin.split:
        _split(state, found.source, experiment.train)
    if state.ema is not None:
        state.ema = EMA(state.optimizer.groups, state.ema.decay)


def _require_no_start(config: TrainConfig) -> None:
    """Raises UserError where training makes no sense from weights that are drawn."""
    if config.tune.what == "lora":
        raise UserError(
            "train.tune.what='lora': an adapter belongs to trained weights; name them with --from"
        )
    if config.objective == "dpo":
        raise UserError(
            "train.objective='dpo': a preference is measured against trained weights; name them "
            "with --from"
        )


def _split(state: TrainState, source: Snapshot | None, config: TrainConfig) -> None:
    """Turns the network into MV-Split and goes on with the data of the source."""
    if world() > 1 or config.tune.freezes:
        raise UserError(
            "origin.split: every branch gets new gains, on one process and with all parameters "
            "learning; leave out torchrun and train.tune"
        )
    assert source is not None
    state.loader.load_state_dict(source.values["data"])
    _warn_of_gain(state.model.config, config)
    protect(state, gain=config.reaction.gain)
    state.reactions = replace(state.reactions, protected_at=state.step)


def _warn_of_gain(model: DiTConfig, config: TrainConfig) -> None:
    """Says what a gain does to a network that has such gains, and where it is a small one."""
    gain = config.reaction.gain
    if gain != 1 and model.rule.name.startswith("mvsplit"):
        warnings.warn(
            f"train.reaction.gain={gain:g}: the source has MV-Split already, and its gains are "
            f"multiplied by {gain:g} once more: a change of how it learns, not of its function; "
            f"--reaction.gain 1 leaves them",
            stacklevel=2,
        )
    rate = peak_learning_rate(config, model.width) * config.gain_lr
    if gain < _RATES_OF_A_GAIN * rate:
        warnings.warn(
            f"train.reaction.gain={gain:g} is only {gain / rate:.2g} times the learning rate of "
            f"gains, {rate:.3g}, which moves them by about itself at each step; take a gain of "
            f"several times that, or a smaller --gain-lr (docs/surgery.md)",
            stacklevel=2,
        )


def _grown(state: TrainState, experiment: Experiment, model: DiT) -> DiT:
    """The source as deep as the run; what is drawn is drawn on the CPU."""
    origin, wanted = experiment.origin, state.model.config
    assert origin is not None
    assert origin.grow is not None
    if world() > 1:
        raise UserError(
            f"origin.grow={origin.grow}: only a single process can carry the moments; grow the "
            f"weights with `mvsplit grow` and start from them with --from"
        )
    # Before anything is made: so that the error is about what differs.
    check_same(replace(model.config, depth=wanted.depth), wanted, origin.source)
    generator = generator_for(experiment.train.seed, "growth")
    return grown(model, wanted.depth, where=origin.grow, rule=wanted.rule, generator=generator)


def check_same(found: DiTConfig, wanted: DiTConfig, source: str, *, split: bool = False) -> None:
    """Raises UserError that names the first field in which weights differ from what is to be
    trained, or, with `split`, from what is to be turned into MV-Split."""
    for name, theirs, ours in _fields(found, wanted):
        if theirs != ours:
            remedy = f"model.{name}={theirs}"
            if name == "rule.name":
                remedy = f"--model.rule.name {theirs}"
                remedy += " (the rule before the surgery)" if split else ""
            raise UserError(
                f"model.{name}={ours}: the weights of {source} have {theirs}; use {remedy}, or "
                f"other weights"
            )


def _fields(found: DiTConfig, wanted: DiTConfig) -> Iterable[tuple[str, Any, Any]]:
    """The name and both values of what makes two networks the same but for their weights."""
    found, wanted = (replace(c, kv_heads=c.groups) for c in (found, wanted))
    for name in vars(wanted):
        if name not in _FREE_SHAPE:
            yield name, getattr(found, name), getattr(wanted, name)
    rules: tuple[RuleConfig, RuleConfig] = (found.rule, wanted.rule)
    for name in vars(wanted.rule):
        if name not in _FREE_RULE:
            yield f"rule.{name}", *(getattr(rule, name) for rule in rules)


def _take_moments(state: TrainState, source: Snapshot, origin: Origin, config: TrainConfig) -> None:
    """The moments of what learns, and how many updates they have seen; those that have seen fewer
    than the rest are put into its units."""
    moments, theirs = state.optimizer.moments(), source.tensors.get("optimizer", {})
    if origin.ema:  # what split weights leave out is of the raw ones
        moments = {n: moment for n, moment in moments.items() if not n.startswith("low_bits.")}
    lost = [moment for moment in moments if moment not in theirs]
    if lost:
        raise UserError(
            f"optimizer=kept: {origin.source} has no {lost[0]}; only checkpoints of mvsplit train "
            f"with the same train.weights have the moments, choose fresh"
        )
    copy_tensors({moment: theirs[moment] for moment in moments}, moments, origin.source)
    counts, late = source.values["updates"], source.values.get("new_layers", [])
    for moment, values in moments.items():
        factor = correction(moment, late, counts, config.betas)
        if factor != 1:  # codes and the bits of split weights are integers, and never need it
            local(values).mul_(factor)
    whole = max(counts.values())  # of gains too, that were no group of their own
    kinds = state.optimizer.updates()
    state.optimizer.set_updates({kind: counts.get(kind, whole) for kind in kinds})
