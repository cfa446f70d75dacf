"""AdamW on flat buffers, the learning rate, and the global gradient norm.

A deep network has thousands of small tensors, and on a CPU an operation on each costs more than its
arithmetic. So all parameters that are treated alike are views of one buffer, and so are their
gradients: clipping, the update, the average and the zeroing are a handful of operations at any
depth. What is saved is cut out of the buffers by parameter name and knows nothing of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, distributed, nn

from mvsplit.diagnostics.ranks import is_distributed
from mvsplit.errors import UserError
from mvsplit.kernels.low_adamw import BLOCK, LowSettings, LowState, low_adamw_
from mvsplit.kernels.split_adamw import SplitState, split_adamw_
from mvsplit.training.config import TrainConfig
from mvsplit.training.distributed import rank
from mvsplit.training.replicas import Replicas, equal_parts
from mvsplit.training.spread import Spread, is_spread, joined_norms, local

# Every parameter starts at a multiple of 64 bytes (fp32), as a tensor of its own would; in bf16, at
# a block of elements that share a scale.
_ALIGNMENT = 16

Kind = Literal["decayed", "low", "rest", "gains", "joined", "joined-decayed"]


@dataclass(frozen=True, eq=False)
class FlatGroup:
    """Parameters end to end in one buffer, and their gradients in another.

    Attributes:
        kind: decayed (2-D, under weight decay), low (the same in bf16), rest, gains (of the rules,
            where they have a learning rate of their own), or joined and joined-decayed (those that
            came to the model later, with fewer updates behind them).
        places: for each parameter name, its first element in the buffers and its shape.
        values: [N] the parameters; between them a few zeros that stay zero.
        grads: [N] their gradients.
        spread: where the parameters are spread over ranks, what ties the buffers to them; the
            buffers and `places` are then of this rank's shards.
        replicas: where every rank holds the buffers whole, what ties them to those of the others.
        tied: else each parameter with its `.grad`, which is a view of `grads`.
    """

    kind: Kind
    places: dict[str, tuple[int, torch.Size]]
    values: Tensor
    grads: Tensor
    spread: Spread | None = None
    replicas: Replicas | None = None
    tied: tuple[tuple[nn.Parameter, Tensor], ...] = ()

    def mine(self) -> FlatGroup:
        """What this rank updates: all that it holds, or its part of what every rank holds."""
        if self.replicas is None:
            return self
        values, grads = self.replicas.part(self.values), self.replicas.part(self.grads)
        first = self.replicas.rank * len(values)
        places = {
            name: (start - first, shape)
            for name, (start, shape) in self.places.items()
            if first <= start < first + len(values)
        }
        return FlatGroup(self.kind, places, values, grads)

    def tie(self) -> None:
        """Gives the parameters their gradients back, in case that somebody has dropped them."""
        for parameter, grad in self.tied:
            if parameter.grad is not grad:
                parameter.grad = grad

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        return self.kind in ("decayed", "low", "joined-decayed")

    def cut(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parts of `buffer` [N] by parameter name, as views of the parameters' shapes."""
        return {
            name: buffer[start : start + shape.numel()].view(shape)
            for name, (start, shape) in self.places.items()
        }

    def named(self, buffer: Tensor) -> dict[str, Tensor]:
        """The same as tensors like the parameters: DTensors where these are spread over ranks."""
        parts = self.cut(buffer)
        return parts if self.spread is None else self.spread.wrap(parts)


def flatten_parameters(
    model: nn.Module, joined: Collection[str] = (), *, gains_apart: bool = False
) -> list[FlatGroup]:
    """Moves all parameters that learn into flat buffers: those with weight decay (2-D), the rest,
    and of both those that are named in `joined`, which came to the model later. `gains_apart` puts
    the gains of the residual rules into a buffer of their own.

    The parameters keep their names, shapes and values; they and their `.grad` become views. Call it
    once the model is on its device, and again when parameters have come or gone. `AdamW.zero_grad`
    zeroes the gradients in place, where `model.zero_grad` would drop them.

    Parameters that are spread over ranks stay where they are, and the buffers hold this rank's
    shards of them (`mvsplit.training.spread`). Those that every rank holds get the first rank's
    values, each in a part of the buffer that one rank updates (`mvsplit.training.replicas`).

    Raises:
        UserError: gains have a learning rate of their own, and whole layers came later.
    """
    if gains_apart and not all(".rule_" in name for name in joined):
        raise UserError(
            "train.gain_lr: layers that come to a running model have the learning rate of all; "
            "use train.gain_lr=1 with layers that are put in"
        )
    kinds: dict[Kind, list[tuple[str, nn.Parameter]]] = {
        "decayed": [],
        "low": [],
        "rest": [],
        "gains": [],
        "joined": [],
        "joined-decayed": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind: Kind = "joined" if name in joined else "rest"
        if gains_apart and ".rule_" in name and name not in joined:
            kind = "gains"
        if parameter.ndim == 2:
            kind = "joined-decayed" if name in joined else "decayed"
            kind = "low" if parameter.dtype == torch.bfloat16 else kind
        kinds[kind].append((name, parameter))
    return [_flatten(named, kind) for kind, named in kinds.items() if named]


def _flatten(named: list[tuple[str, nn.Parameter]], kind: Kind) -> FlatGroup:
    alignment = BLOCK if kind == "low" else _ALIGNMENT
    shapes = [local(parameter).shape for _, parameter in named]
    sizes = [-(-shape.numel() // alignment) * alignment for shape in shapes]
    spread = Spread(dict(named)) if is_spread(named[0][1]) else None
    replicas = Replicas() if spread is None and is_distributed() else None
    parts_of_ranks = 1 if replicas is None else replicas.world
    starts, room = equal_parts(sizes, parts_of_ranks)
    names = (name for name, _ in named)
    places = dict(zip(names, zip(starts, shapes, strict=True), strict=True))
    values = local(named[0][1]).new_zeros(parts_of_ranks * room).detach()
    group = FlatGroup(kind, places, values, torch.zeros_like(values), spread, replicas)
    if spread is not None:
        spread.pull_values(group.cut(values))
        return group
    parts, grads = group.cut(group.values), group.cut(group.grads)
    for name, parameter in named:
        parts[name].copy_(parameter.detach())
        parameter.data = parts[name]
        parameter.grad = grads[name]
    if replicas is not None:
        distributed.broadcast(values, 0)
    return replace(group, tied=tuple((p, cast(Tensor, p.grad)) for _, p in named))


def clip_gradients_(groups: Iterable[FlatGroup], norm: float, limit: float) -> None:
    """Scales all gradients so that their global norm, which is `norm` now, is at most `limit`."""
    if norm > limit:
        for group in groups:
            group.grads.mul_(limit / norm)


def global_norm(groups: Iterable[FlatGroup]) -> Tensor:
    """The L2 norm of all gradients together, on all ranks; a scalar on the device."""
    groups = list(groups)
    each = [norm_of(group.grads) * counts for group, counts in counted_once(groups)]
    return over_ranks(groups, [torch.linalg.vector_norm(torch.stack(each))])[0]


def norm_of(x: Tensor, dim: int | None = None) -> Tensor:
    """The L2 norm over all elements or one axis, in fp32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=dim, dtype=dtype)


def counted_once(groups: Sequence[FlatGroup]) -> Iterator[tuple[FlatGroup, float]]:
    """Each group with 1, or with 0 where it is another rank's to count it before `over_ranks`."""
    spread = next((group.spread for group in groups if group.spread is not None), None)
    first = spread is None or all(distributed.get_rank(ranks) == 0 for ranks in spread.groups)
    for group in groups:
        yield group, float(first or group.replicas is None)


def over_ranks(groups: Sequence[FlatGroup], norms: list[Tensor]) -> list[Tensor]:
    """Norms of gradients in `groups`, each of what this rank counts, as those of the whole."""
    spread = next((group.spread for group in groups if group.spread is not None), None)
    return norms if spread is None else joined_norms(norms, spread.groups)


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over flat groups, by torch's fused kernel;
    for bf16 groups with moments of 2 bytes an element (`mvsplit.kernels.low_adamw`), or with the
    other half of fp32 weights and moments in fp32 (`mvsplit.kernels.split_adamw`). Of groups that
    every rank holds, a rank has the moments of its part only."""

    def __init__(self, groups: list[FlatGroup], config: TrainConfig) -> None:
        self.groups = groups
        self._config = config
        held = [group.mine() for group in groups]
        self._full = [group for group in held if group.kind != "low"]
        kind = SplitState if config.weights == "split" else LowState
        self._low = {g: kind.zeros(g.values) for g in held if g.kind == "low"}
        self._low_updates = 0
        for group in self._full:
            group.values.grad = group.grads
        self._inner = torch.optim.AdamW(
            [
                {"params": [g.values], "weight_decay": config.weight_decay if g.decays else 0.0}
                for g in self._full
            ],
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for group in self._full:
            self._inner.state[group.values] = {
                "step": torch.zeros((), dtype=torch.float32, device=group.values.device),
                "exp_avg": torch.zeros_like(group.values),
                "exp_avg_sq": torch.zeros_like(group.values),
            }

    def step(self, lr: float) -> None:
        """One update from the gradients in the groups."""
        for settings, held in zip(self._inner.param_groups, self._full, strict=True):
            # Where gains have a rate of their own, what joined is gains and nothing else.
            gains = held.kind == "gains" or (held.kind == "joined" and self.gains_apart)
            settings["lr"] = lr * (self._config.gain_lr if gains else 1.0)
        for group in self.groups:
            if group.spread is not None:
                group.spread.pull_values(group.cut(group.values))
        self._inner.step()
        if self._low:
            self._low_updates += 1
        config = self._config
        settings_low = LowSettings(
            lr, *config.betas, config.eps, config.weight_decay, self._low_updates
        )
        for group, state in self._low.items():
            if isinstance(state, SplitState):
                split_adamw_(group.values, group.grads, state, settings_low)
            else:
                low_adamw_(group.values, group.grads, state, settings_low)
        for group in self.groups:
            if group.spread is not None:
                group.spread.push_values(group.cut(group.values))
            elif group.replicas is not None:
                group.replicas.gather_(group.values)

    def zero_grad(self) -> None:
        for group in self.groups:
            if group.spread is None:
                group.grads.zero_()
                group.tie()
            else:
                group.spread.drop_grads()

    def collect_grads(self) -> None:
        """Takes over the gradients of a backward pass where they are not in the groups anyway, and
        averages those that every rank has of its own samples."""
        for group in self.groups:
            if group.spread is not None:
                group.spread.pull_grads(group.cut(group.grads))
            elif group.replicas is not None:
                group.replicas.average_(group.grads)

    def mine(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of parameters by name, those that this rank is to save: all, or where every rank holds
        them what it updates; the first rank also what nobody updates."""
        if all(group.replicas is None for group in self.groups):
            return dict(named)
        held = {name for group in (*self._full, *self._low) for name in group.places}
        learning = {name for group in self.groups for name in group.places}
        return {n: t for n, t in named.items() if n in held or (rank() == 0 and n not in learning)}

    def moments(self) -> dict[str, Tensor]:
        """Both moments as views, named `exp_avg.PARAMETER` and `exp_avg_sq.PARAMETER`; of a bf16
        group the first as `exp_avg_codes.PARAMETER` and `exp_avg_scales.PARAMETER`, the second as
        `exp_avg_sq_powers.PARAMETER` and `exp_avg_sq_bases.PARAMETER`, or with
        `low_bits.PARAMETER` what the weights leave out."""
        found = {
            f"{moment}.{name}": part
            for moment in ("exp_avg", "exp_avg_sq")
            for group in self._full
            for name, part in group.named(self._inner.state[group.values][moment]).items()
        }
        for group, state in self._low.items():
            if isinstance(state, SplitState):
                for name, values in zip(("low_bits", "exp_avg", "exp_avg_sq"), state, strict=True):
                    found |= {f"{name}.{n}": part for n, part in group.named(values).items()}
                continue
            found |= {f"exp_avg_codes.{n}": part for n, part in group.named(state.codes).items()}
            powers = group.named(state.powers).items()
            found |= {f"exp_avg_sq_powers.{n}": part for n, part in powers}
            for name, of_blocks in (
                ("exp_avg_scales", state.scales),
                ("exp_avg_sq_bases", state.bases),
            ):
                found |= {f"{name}.{n}": part for n, part in _rows(group, of_blocks).items()}
        return found

    def updates(self) -> dict[str, int]:
        """By group, how many updates the moments have seen, which their bias correction needs."""
        counts: dict[str, int] = {g.kind: self._low_updates for g in self._low}
        return counts | {g.kind: int(self._inner.state[g.values]["step"]) for g in self._full}

    def set_updates(self, counts: Mapping[str, int]) -> None:
        """The inverse of `updates`."""
        for group in self._full:
            self._inner.state[group.values]["step"].fill_(counts[group.kind])
        if self._low:
            self._low_updates = counts["low"]

    @property
    def betas(self) -> tuple[float, float]:
        """The decay of both moments."""
        return self._config.betas

    def forget(self) -> None:
        """Begins with fresh moments."""
        for name, moment in self.moments().items():
            if not name.startswith("low_bits."):
                local(moment).zero_()
        self.set_updates(dict.fromkeys(self.updates(), 0))

    @property
    def gains_apart(self) -> bool:
        """Whether the gains of the rules have a learning rate of their own."""
        return self._config.gain_lr != 1

    def regrouped(self, groups: list[FlatGroup]) -> AdamW:
        """The same optimiser with fresh moments for other groups."""
        return AdamW(groups, self._config)


def _rows(group: FlatGroup, of_blocks: Tensor) -> dict[str, Tensor]:
    """What the blocks of each parameter have in common, a row of it."""
    parts = {}
    for name, (start, shape) in group.places.items():
        blocks = slice(start // BLOCK, -(-(start + shape.numel()) // BLOCK))
        parts[name] = of_blocks[blocks]
    return parts if group.spread is None else group.spread.wrap_rows(parts)


def peak_learning_rate(config: TrainConfig, width: int) -> float:
    """1e-3 / (0.2·√D), 1.5625e-4 at D = 1024 (µP, paper §4), unless the configuration names one."""
    rate = 1e-3 / (0.2 * math.sqrt(width)) if config.lr is None else config.lr
    return rate * config.lr_factor


def warmup_then_constant(peak: float, warmup: int) -> Callable[[int], float]:
    """The learning rate of step n = 1, 2, …: peak·n/warmup until it reaches the peak."""
    return lambda step: peak * min(1.0, step / max(warmup, 1))
