"""A look into every layer during one training step; what it sees is reduced to scalars on the spot.

The probe holds no [B, T, D] tensor of its own: what it needs in the backward pass is what autograd
keeps anyway (and recomputes, under activation checkpointing). It waits for the device once, when
the numbers are read. The step itself is not changed by one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from mvsplit.diagnostics import metrics
from mvsplit.diagnostics.shards import norms
from mvsplit.diagnostics.taps import (
    FAMILIES,
    BranchTap,
    LayerTap,
    family_gradients,
    first_tensor,
    read,
    segments_among,
    trunk_among,
)
from mvsplit.errors import UserError, nearest
from mvsplit.kernels import Segments
from mvsplit.kernels.attention import attend, attention_mask

TRUNK_FIELDS = ("tcs", "rho")
ATTENTION_FIELDS = ("mu_eff", "row_div", "retention", "leakage")
BRANCH_FIELDS = ("tr_ratio", "var_gain")
MODE_FIELDS = ("g_mean", "g_ctr")
ALIGNMENT_FIELDS = ("amplification", "envelope")


def _of_branches(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name}_{branch}" for branch in ("attn", "ffn") for name in names)


BACKWARD_FIELDS = _of_branches(MODE_FIELDS + ALIGNMENT_FIELDS)
CHEAP_FIELDS = ("tcs", *_of_branches(MODE_FIELDS))
WRITER_FIELDS = (*CHEAP_FIELDS, *_of_branches(ALIGNMENT_FIELDS))
FIELDS = (
    *TRUNK_FIELDS,
    *ATTENTION_FIELDS,
    *_of_branches(BRANCH_FIELDS),
    *BACKWARD_FIELDS,
    *FAMILIES,
)
NAMED_FIELDS = {"cheap": CHEAP_FIELDS, "writers": WRITER_FIELDS, "all": FIELDS}


Names = tuple[tuple[str, int], ...]  # of values: column, layer
Receiver = Callable[[Tensor, Tensor], None]  # of a writer's inputs and output adjoints


class ByScope(Protocol):
    """Gives one number for each group of a scope, [S]."""

    def __call__(self, *, scope: metrics.Scope) -> Tensor: ...


class LayerProbe:
    """Watches the first forward and backward pass that run inside it.

        with LayerProbe(taps_for_dit(model)) as probe:
            loss(model, batch).backward()
        line = probe.arrays()   # {"layer": [0, 1, …], "tcs": [0.1, …], …}

    Fields, one value a layer, means over the samples of the batch (equations in `metrics`):
    `tcs`, `rho` of the trunk that leaves the layer; `tr_ratio_*`, `var_gain_*` of a branch against
    the trunk it joins; `g_mean_*`, `g_ctr_*` of a writer, summed over the batch as ∇W is, of the
    gradient of the loss as it was scaled; `grad_*`, the L2 norm of what the parameter holds at the
    end. `mu_eff`, `row_div`, `retention`, `leakage` (means over the heads) and `amplification_*`,
    `envelope_*` (= (T−1)κ̂, against A − 1) look at the first `samples` samples only.

    The segments are those that a block receives among its arguments; without any, all tokens of a
    sample are one segment. Compiled code runs uncompiled inside the probe, so that it can be seen.

    Args:
        taps: the layers to watch.
        fields: which numbers; `FIELDS` are all, `CHEAP_FIELDS` those for a CPU.
        per_segment: adds each field of activations and writers for each segment s alone, as
            `NAME_segment_s`.
        samples: how many samples the fields that need T×T matrices look at.

    Raises:
        UserError: an unknown field, or `samples` < 1.
    """

    def __init__(
        self,
        taps: Sequence[LayerTap],
        *,
        fields: Sequence[str] = FIELDS,
        per_segment: bool = False,
        samples: int = 2,
    ) -> None:
        for name in fields:
            if name not in FIELDS:
                raise UserError(f"probe field {name!r} is unknown; {nearest(name, FIELDS)}")
        if samples < 1:
            raise UserError(f"samples={samples}: must be at least 1")
        self.taps = taps
        self.fields = frozenset(fields)
        self.per_segment = per_segment
        self.samples = samples
        self._scalars: dict[tuple[str, int], Tensor] = {}  # (column, layer) → a scalar
        self._segments: dict[int, Segments] = {}
        self._trunks: dict[BranchTap, Tensor] = {}  # from the branch's start to its writer
        self._layer: LayerTap | None = None  # the layer that is running forward
        self._recalled: tuple[Names, list[Tensor]] = (), []  # of passes that a graph repeated
        self._ran = False
        self._active = ExitStack()

    def __enter__(self) -> LayerProbe:
        self._active.enter_context(self.passes())
        return self

    @contextmanager
    def passes(self) -> Iterator[None]:
        """For a forward and a backward pass: looks into them, and no more. What a `with` of the
        probe itself does beyond that is `read_gradients`, at its end."""
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for tap in self.taps:
                for handle in self._hook(tap):
                    stack.callback(handle.remove)
            if self.fields.intersection(ATTENTION_FIELDS):
                stack.enter_context(_AttentionWatch(self._on_attention))
            stack.callback(self._let_go)
            yield

    def _let_go(self) -> None:
        self._trunks.clear()
        self._layer = None

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._active.close()
        if exc_type is None:
            self.read_gradients()

    @property
    def key(self) -> Hashable:
        """What it looks at: of passes of one network that are alike, probes with the same key see
        the same."""
        parts = tuple(
            (t.layer, id(t.block), *(id(b.writer) for b in t.branches)) for t in self.taps
        )
        return self.fields, self.per_segment, self.samples, parts

    def seen(self) -> tuple[Names, Tensor]:
        """What it has seen so far: names (column, layer) and their values, [n]."""
        values = [v.reshape(-1) for v in self._scalars.values()]
        return tuple(self._scalars), torch.cat(values) if values else torch.empty(0)

    def recall(self, names: Names, values: Tensor) -> None:
        """Takes for seen what another probe with the same key saw, as `seen` gave it: values of
        passes that a CUDA graph has repeated, which calls no hook. What it saw itself is gone."""
        self.forget()
        self._recalled, self._ran = (names, [values] if names else []), True

    def forget(self) -> None:
        """Lets go of what it has seen."""
        self._scalars.clear()
        self._segments.clear()
        self._recalled, self._ran = ((), []), False

    def arrays(self) -> dict[str, list[float | None]]:
        """The fields over the layers, in the order of the taps, as numbers: the one place that
        waits for the device. None: not measured there; NaN: measured, and not a number.

        Raises:
            UserError: no watched layer ran, or no backward pass where a field needs one.
        """
        self._check_complete()
        columns: dict[str, dict[int, float]] = {}
        names, values = self._recalled
        found = read([*values, *self._scalars.values()])
        for (column, layer), value in zip((*names, *self._scalars), found, strict=True):
            columns.setdefault(column, {})[layer] = value
        layers = [tap.layer for tap in self.taps]
        arrays: dict[str, list[float | None]] = {"layer": [*layers]}
        return arrays | {name: [c.get(n) for n in layers] for name, c in columns.items()}

    def _check_complete(self) -> None:
        names = (*self._recalled[0], *self._scalars)
        if not self._ran:
            raise UserError(
                "the probe saw no layer run; run the forward and backward pass inside the probe"
            )
        wanted = self.fields.intersection(BACKWARD_FIELDS + FAMILIES)
        if wanted and not any(name in wanted for name, _ in names):
            raise UserError(
                f"the probe saw no backward pass, which {sorted(wanted)[0]!r} needs; call "
                f"backward() inside the probe"
            )

    # Hooks

    def _hook(self, tap: LayerTap) -> list[RemovableHandle]:
        handles = [
            # The layer's own hook first: it notes the segments that the others use.
            tap.block.register_forward_pre_hook(partial(self._on_enter, tap), with_kwargs=True),
            tap.block.register_forward_hook(partial(self._on_leave, tap)),
        ]
        for branch in tap.branches:
            if branch.trunk_at is not None and self._needs_trunk(branch):
                read_trunk = partial(self._on_trunk, tap, branch)
                handles.append(
                    branch.trunk_at.register_forward_pre_hook(read_trunk, with_kwargs=True)
                )
            if branch.called:
                on_write = partial(self._on_write, tap, branch)
                handles.append(branch.writer.register_forward_hook(on_write))
        return handles

    def _needs_trunk(self, branch: BranchTap) -> bool:
        fields = {f"{field}_{branch.name}" for field in BRANCH_FIELDS}
        if branch.name == "attn":
            fields.update(("retention", "leakage"))
        return not self.fields.isdisjoint(fields)

    def _on_enter(self, tap: LayerTap, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._segments.setdefault(tap.layer, segments_among(args, kwargs, tap))
        self._layer, self._ran = tap, True

    def _on_leave(self, tap: LayerTap, _: nn.Module, args: Any, output: Any) -> None:
        self._layer = None
        segments = self._segments[tap.layer]
        x = trunk_among(output, segments.total, tap)
        if x is None or self.fields.isdisjoint(TRUNK_FIELDS):
            return
        with _quietly(x):
            tcs = partial(metrics.token_cosine_similarity, x)
            self._put("tcs", tap, _sample_mean(tcs, x, segments, at_least=2))
            self._put("rho", tap, _sample_mean(partial(metrics.mean_ratio, x), x, segments))

    def _on_trunk(
        self, tap: LayerTap, branch: BranchTap, _: nn.Module, args: Any, kwargs: Any
    ) -> None:
        self._trunks[branch] = tap.oriented(first_tensor(args, kwargs)).detach()

    def _on_write(
        self, tap: LayerTap, branch: BranchTap, _: nn.Module, args: Any, update: Tensor
    ) -> Tensor | None:
        segments, x = self._segments[tap.layer], self._trunks.pop(branch, None)
        if x is not None and update.numel() == x.numel():
            with _quietly(x):
                u = tap.oriented(update).reshape(x.shape)
                for field, metric in _BRANCH_METRICS.items():
                    values = _sample_mean(partial(metric, u, x), x, segments)
                    self._put(f"{field}_{branch.name}", tap, values)
        watched = {f"{field}_{branch.name}" for field in MODE_FIELDS + ALIGNMENT_FIELDS}
        if not update.requires_grad or self.fields.isdisjoint(watched):
            return None
        return _WriterTap.apply(update, args[0], partial(self._on_adjoint, tap, branch))

    def _on_adjoint(self, tap: LayerTap, branch: BranchTap, y: Tensor, delta: Tensor) -> None:
        """y [..., E] went into the writer, and δ [..., D] came back to its output."""
        segments = self._segments[tap.layer]
        y, delta = tap.oriented(y), tap.oriented(delta)
        if y.dim() == 3 and y.shape[1] != segments.total:
            segments = Segments.whole(y)  # a writer that serves more tokens than the trunk's
        y = y.reshape(-1, segments.total, y.shape[-1])
        delta = delta.reshape(-1, segments.total, delta.shape[-1])
        for field, norm in _MODE_METRICS.items():
            self._put(f"{field}_{branch.name}", tap, partial(norm, y, delta, segments))
        few = _first_samples(segments, self.samples)
        y, delta = y[: self.samples], delta[: self.samples]
        law = cache(partial(metrics.alignment, y, delta, few))  # by scope, once for both fields
        for field in ALIGNMENT_FIELDS:
            one = partial(_alignment_field, field, law)
            self._put(f"{field}_{branch.name}", tap, _sample_mean(one, y, few, at_least=2))

    def _on_attention(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> None:
        """A call of attention, [B, H, T, K] and [B, G, T, K], named as PyTorch names them."""
        tap, tokens = self._layer, query.shape[2]
        if tap is None or not tokens == key.shape[2] == self._segments[tap.layer].total:
            return  # cross-attention mixes no tokens of the trunk with each other
        with _quietly(query):
            a = attention_matrix(query, key, *args, **kwargs, samples=self.samples)
            joins = [b for b in tap.branches if b.name == "attn" and b in self._trunks]
            self._put_attention(tap, a, self._trunks[joins[0]][: self.samples] if joins else None)

    def _put_attention(self, tap: LayerTap, a: Tensor, x: Tensor | None) -> None:
        """a [B, H, T, T]; the trunk x [B, T, D] that its layer reads, where it is known."""
        few = _first_samples(self._segments[tap.layer], self.samples)
        found = {
            "mu_eff": partial(metrics.mu_eff, a),
            "row_div": partial(metrics.row_divergence, a),
        }
        if x is not None:
            found["retention"] = partial(metrics.retention, a, x)
            found["leakage"] = partial(metrics.leakage, a, x)
        for field, metric in found.items():
            over_heads = partial(_mean_over_heads, metric)
            self._put(field, tap, _sample_mean(over_heads, a.transpose(1, 2), few))

    def _put(self, field: str, tap: LayerTap, values: ByScope) -> None:
        """Keeps what `values(scope=…)` [S] gives, if the field is wanted and not there yet: with
        activation checkpointing or several micro-batches a hook runs more than once."""
        if field not in self.fields or (field, tap.layer) in self._scalars:
            return
        self._scalars[field, tap.layer] = values(scope="global").squeeze(0)
        if self.per_segment:
            for s, value in enumerate(values(scope="segment")):
                self._scalars[f"{field}_segment_{s}", tap.layer] = value

    def read_gradients(self) -> None:
        """Reads what the parameters hold, once it is the gradient of the whole batch."""
        found = {
            (name, tap.layer): gradient
            for tap in self.taps
            for name, gradient in family_gradients(tap).items()
            if name in self.fields and gradient is not None
        }
        self._scalars |= zip(found, norms(list(found.values())), strict=True)


_BRANCH_METRICS = {"tr_ratio": metrics.trunk_ratio, "var_gain": metrics.variance_gain}
_MODE_METRICS = {
    "g_mean": metrics.mean_gradient_norm,
    "g_ctr": metrics.centered_gradient_norm,
}


class _WriterTap(torch.autograd.Function):
    """The identity on a writer's output. It saves the writer's input, which the writer saves for
    its own gradient too, and hands it on with the adjoint when that comes back."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, y: Tensor, receive: Receiver) -> Tensor:
        ctx.save_for_backward(y)
        ctx.receive = receive
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (delta,), (y,) = grads, ctx.saved_tensors
        with _quietly(delta):
            ctx.receive(y, delta)
        return delta, None, None


class _AttentionWatch(TorchFunctionMode):
    """Shows the arguments of every call of attention, PyTorch's or ours, to `receive`, as PyTorch's
    takes them."""

    def __init__(self, receive: Callable[..., None]) -> None:
        super().__init__()
        self.receive = receive

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self.receive(*args, **kwargs)
        elif func is attend:
            query, key, value, segments = args
            grouped, mask = query.shape[1] != key.shape[1], attention_mask(segments)
            self.receive(query, key, value, attn_mask=mask, enable_gqa=grouped)
        return func(*args, **kwargs)


def attention_matrix(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    samples: int,
) -> Tensor:
    """A = softmax(QKᵀ·scale + mask) of the first n samples, as `scaled_dot_product_attention` with
    these arguments computes it inside, before dropout. [B, H, T, K], [B, G, T, K] → [n, H, T, T].
    """
    q, k = metrics.upcast(query[:samples]), metrics.upcast(key[:samples])
    if enable_gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], *logits.shape[1:])[:samples]
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        else:
            logits = logits + attn_mask
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1)


def _sample_mean(
    metric: Callable[..., Tensor], x: Tensor, segments: Segments, at_least: int = 1
) -> ByScope:
    """What gives the mean of `metric` [B, S] over the samples with `at_least` tokens in a group.
    `x` [B, T, ...] is what the metric looks at."""

    def values(scope: metrics.Scope) -> Tensor:
        groups = metrics.token_groups(x, segments, scope)
        return metrics.batch_mean(metric(segments=segments, scope=scope), groups, at_least)

    return values


def _mean_over_heads(metric: Callable[..., Tensor], segments: Segments, scope: str) -> Tensor:
    """[B, H, S] → [B, S]."""
    return metric(segments=segments, scope=scope).mean(1)


def _alignment_field(
    field: str, law: Callable[[Any], metrics.Alignment], segments: Segments, scope: metrics.Scope
) -> Tensor:
    return getattr(law(scope), field)


def _first_samples(segments: Segments, samples: int) -> Segments:
    if segments.valid is None:
        return segments
    return Segments(segments.lengths, segments.valid[:samples], segments.real_first)


@contextmanager
def _quietly(x: Tensor) -> Iterator[None]:
    """No graph, and the precision of the metrics instead of the step's autocast."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield
