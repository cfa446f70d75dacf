"""Gives a network that is not ours MV-Split rules while it trains, with no change of its function.

    grafted = graft(model, {"x": images}, optimizer=optimizer, gain=1 / 64)
    for step in range(steps):
        ...                                   # the training loop as it was
        grafted.anneal(left=50 - step - 1)    # α to 0; λ stays at 0

Where a branch joins the trunk is found by structure (`mvsplit.models.joins`), the writers as the
watch finds them (`mvsplit.diagnostics.structure`). Each join becomes X + β⊙PF + α⊙JF − λ⊙JX with
β = α = 1, or γ where a LayerScale was, and λ = 0 (paper §2); then W_O, W_2 ← W/g and β, α ← gβ, gα,
as in `mvsplit.models.surgery`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mvsplit.diagnostics.structure import TapNames, attention_writer, find_taps, unwrapped
from mvsplit.diagnostics.taps import LayerTap
from mvsplit.errors import UserError
from mvsplit.models import DiT
from mvsplit.models.joins import Call, Found, Join, with_rules
from mvsplit.models.surgery import anneal_gains, check_gain
from mvsplit.residuals import MVSplit

# By the power of the gradient's unit that they carry.
_MOMENTS = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@dataclass(frozen=True, kw_only=True)
class Grafted:
    """What a network was given.

    Attributes:
        rules: in order of depth, those of a block in the order of its branches.
        new: the names of the gains in the network.
        gone: the names of the vectors γ whose values the gains took over.
    """

    rules: list[MVSplit]
    new: list[str]
    gone: list[str]

    def anneal(self, left: int, *, alpha: float = 0.0, leak: float = 0.0) -> None:
        """Takes α and λ of all rules a step towards `alpha` and `leak`, where they arrive once
        `left` is 0; call it after each update with one less. What they learn meanwhile shrinks
        with the distance. Does nothing for a `left` below 0."""
        anneal_gains(self.rules, left, alpha=alpha, leak=leak)


def graft(
    model: nn.Module,
    example: Mapping[str, Any],
    *,
    gain: float = 1.0,
    prefix: int | None = None,
    absorb: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    names: TapNames | None = None,
) -> Grafted:
    """Gives every block of `model` MV-Split rules, in place; all other parameters stay the objects
    that they are.

    Args:
        model: a transformer whose blocks are found by structure, such as a timm ViT or a diffusers
            DiT. Not wrapped, compiled or sharded yet.
        example: arguments of a forward pass, a sample or two; with them the joins are found, and
            every block is checked to compute what it did.
        gain: g, the part of β and α that is taken over from the writers W_O and W_2.
        prefix: tokens at the start of the trunk (class token, registers) that have a mean of their
            own; `model.num_prefix_tokens` (timm) if None, else 0.
        absorb: let β and α start at the γ of a LayerScale, which goes; its product is then rounded
            together with the sum, no longer before it. False leaves γ in the branch.
        optimizer: of the model. It gets a group of the gains, without weight decay, and forgets γ;
            what it knows of the writers is put into the units of W/g, all else stays.
        names: blocks and writers, where they are not found.

    Raises:
        UserError: no blocks or joins, or a block that would not compute what it did; `gain` is not
            in (0, 1]; the optimiser keeps something that cannot be rescaled. All is as it was.
    """
    check_gain(gain)
    if unwrapped(model) is not model:
        raise UserError("graft: the model is wrapped; graft it first, then compile or shard it")
    if isinstance(model, DiT):
        raise UserError("graft: this is a DiT of mvsplit; use mvsplit.models.surgery.into_mvsplit")
    taps = find_taps(model, names)
    if prefix is None:
        prefix = getattr(model, "num_prefix_tokens", 0)
    with _evaluating(model), torch.no_grad():
        calls = _calls(model, taps, example)
        made = [_made(tap, calls[tap.block], prefix, absorb, gain) for tap in taps]
    writers = [writer for each in made for writer in each.writers]
    if optimizer is not None:
        _check_rescalable(optimizer, writers)
    places = {module: name for name, module in model.named_modules()}
    gone: dict[str, nn.Parameter] = {}
    for tap, each in zip(taps, made, strict=True):
        place = places[tap.block]
        gone |= {f"{place}.{name}": vector for name, vector in each.gone.items()}
        parent, _, last = place.rpartition(".")
        setattr(model.get_submodule(parent), last, each.block.train(tap.block.training))
    joins = {n: m for n, m in model.named_modules() if isinstance(m, Join)}
    _scale(writers, 1 / gain)
    if optimizer is not None:
        _take_over(optimizer, joins.values(), gone.values(), writers, gain)
    new = [f"{n}.{gain}" for n, join in joins.items() for gain, _ in join.named_parameters()]
    return Grafted(rules=[join.rule for join in joins.values()], new=new, gone=list(gone))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, for which no two passes agree."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _calls(
    model: nn.Module, taps: Sequence[LayerTap], example: Mapping[str, Any]
) -> dict[nn.Module, Call]:
    """What each block is called with in a forward pass."""
    calls: dict[nn.Module, Call] = {}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[block] = Call(args=args, kwargs=kwargs)

    handles = [tap.block.register_forward_pre_hook(note, with_kwargs=True) for tap in taps]
    try:
        model(**example)
    finally:
        for handle in handles:
            handle.remove()
    if lost := [tap.layer for tap in taps if tap.block not in calls]:
        raise UserError(f"example: block {lost[0]} was not called; give arguments that reach it")
    return calls


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A block with rules, and what is to happen outside of it.

    Attributes:
        gone: the vectors γ that it does without, by name.
        writers: the parameters to be divided by the gain.
    """

    block: nn.Module
    gone: dict[str, nn.Parameter]
    writers: list[nn.Parameter]


def _made(tap: LayerTap, call: Call, prefix: int, absorb: bool, gain: float) -> _Made:
    """The block of a layer with rules. The writers are as they were.

    Raises:
        UserError: with writers divided by `gain` it does not compute what the block does.
    """
    block, found = with_rules(tap.block, call, prefix, absorb=absorb)
    writers = [] if gain == 1 else [p for join in found for p in _writer_parameters(tap, join)]
    before, kept = _first(tap.block(*call.args, **call.kwargs)), [w.clone() for w in writers]
    rules = [join.rule for join in block.children() if isinstance(join, Join)]
    _scale([g for rule in rules for g in (rule.beta, rule.alpha)], gain)
    try:
        _scale(writers, 1 / gain)
        after = _first(block(*call.args, **call.kwargs))
    finally:
        for writer, values in zip(writers, kept, strict=True):
            writer.copy_(values)
    limit = 8 * torch.finfo(before.dtype).eps * float(before.double().norm())
    if not float((after.double() - before.double()).norm()) <= limit:
        raise UserError(
            f"block {tap.layer}: with gain={gain} it would compute something else, as where a norm "
            f"follows a writer; use gain=1, or name the writers (TapNames)"
        )
    gone = {join.gamma[0]: join.gamma[1] for join in found if join.gamma is not None}
    return _Made(block=block, gone=gone, writers=writers)


def _writer_parameters(tap: LayerTap, join: Found) -> list[nn.Parameter]:
    """W_O or W_2 of a branch, with its bias: of its parts, the one nearest to the join that holds a
    writer that the watch knows, or that is an attention."""
    known = {branch.writer for branch in tap.branches}
    for name in join.parts:
        part = tap.block.get_submodule(name)
        writer = next((m for m in part.modules() if m in known), None) or attention_writer(part)
        if writer is not None:
            return list(writer.parameters())
    raise UserError(
        f"block {tap.layer}: no writer was found in its branch through {join.parts[0]}; use gain=1"
    )


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def _scale(tensors: Iterable[Tensor], factor: float) -> None:
    for tensor in tensors:
        tensor.mul_(factor)


# The optimiser


def _check_rescalable(optimizer: torch.optim.Optimizer, writers: Iterable[Tensor]) -> None:
    for writer in writers:
        for name, value in optimizer.state.get(writer, {}).items():
            if isinstance(value, Tensor) and value.ndim and name not in _MOMENTS:
                raise UserError(
                    f"optimizer: {type(optimizer).__name__} keeps {name!r} of a writer, which "
                    f"cannot be put into other units; use gain=1, or begin with a new optimiser"
                )


def _take_over(
    optimizer: torch.optim.Optimizer,
    joins: Iterable[Join],
    gone: Iterable[Tensor],
    writers: Iterable[Tensor],
    gain: float,
) -> None:
    """Lets the optimiser know the new gains, forget the vectors that are gone, and speak of the
    writers in their new units: the gradient of W/g is g times that of W."""
    lost = {id(vector) for vector in gone}
    for vector in gone:
        optimizer.state.pop(vector, None)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in lost]
    for writer in writers:
        for name, power in _MOMENTS.items():
            if isinstance(moment := optimizer.state.get(writer, {}).get(name), Tensor):
                moment.mul_(gain**power)
    gains = [gain for join in joins for gain in join.parameters()]
    rate = optimizer.param_groups[0]["lr"]
    optimizer.add_param_group({"params": gains, "lr": rate, "weight_decay": 0.0})
