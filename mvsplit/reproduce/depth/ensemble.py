"""Many networks of one shape as one: their weights side by side, their products in one batch.

A narrow network leaves a GPU idle, for each of its kernels is over before it has filled the
device; and processes that share one take turns. Here the members of an ensemble differ in their
weights, gains, ε and data, and each kernel works for all of them. No member sees another: a product
has a batch for each, a norm is over its own tokens, attention over its own samples. It computes
what `mvsplit.models.DiT` computes for each (`tests/reproduce/depth/test_ensemble.py`), and serves
the bench alone; a network is trained for its own sake by `mvsplit.training`.

A merge is Z = kX + β⊙PF + α⊙JF − λ⊙JX for all rules. Which parameter of a rule is its β, α or λ is
read off its `gains()`.

Shapes: E members, B samples of each, T tokens, D width, L layers, I and O of a matrix, N numbers of
a network, S = 3 places for a rule's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mvsplit.diagnostics.metrics import token_cosine_similarity
from mvsplit.errors import UserError
from mvsplit.kernels import Gains, Segments, qk_norm_rope, rms_norm, swiglu
from mvsplit.kernels.attention import attend
from mvsplit.kernels.reference import Gain, zero_padding
from mvsplit.models import DiT
from mvsplit.models.block import Block
from mvsplit.models.config import DiTConfig
from mvsplit.models.patching import patchify, unpatchify
from mvsplit.models.rope import rope_tables
from mvsplit.residuals import (
    Keel,
    PostNorm,
    PreNorm,
    Rule,
    RuleConfig,
    Sandwich,
    build_rule,
)

_ALIGNMENT = 16  # elements, so that every matrix starts where kernels can read it in one go
SLOTS = 3  # the most parameters that a rule has


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the rules of an ensemble must have in common.

    Attributes:
        enters_normed: whether a branch reads the norm of the trunk.
        branch_normed: whether the branch's output is normed before it joins.
        normalised: whether the trunk leaves a merge normed.
    """

    enters_normed: bool
    branch_normed: bool
    normalised: bool

    @classmethod
    def of(cls, rule: Rule) -> Family:
        return cls(
            enters_normed=isinstance(rule, (Keel, PreNorm)),
            branch_normed=isinstance(rule, Sandwich),
            normalised=rule.normalised,
        )

    @classmethod
    def named(cls, rule: RuleConfig, *, width: int, depth: int) -> Family:
        """Of the rule that a configuration asks for."""
        return cls.of(build_rule(rule, width=width, depth=depth, branch="attention"))


class Ensemble:
    """The members of one shape and family, with the gradients of all.

    Args:
        models: a network for each member, from which weights and gains are copied.
        dtype: of the arithmetic; weights and gradients are fp32, or fp64 where it is that.

    Attributes:
        values, grads: [E, N], all but the gains.
        gains, gain_grads: [E, S, 2L, D], the parameters of the rules; zero where a rule has fewer.
        decays: [N], 1 where weight decay applies.

    Raises:
        UserError: the networks differ in more than their rules, or in their family.
    """

    def __init__(self, models: Sequence[DiT], dtype: torch.dtype = torch.float32) -> None:
        first = models[0]
        self.config, self.dtype = first.config, dtype
        self.family = Family.of(cast(Block, first.blocks[0]).rule_attention)
        for model in models:
            _check(model, first, self.family)
        named = {n: p for n, p in first.named_parameters() if ".rule_" not in n}
        self.places = _places({name: p.shape for name, p in named.items()})
        self.device = next(iter(named.values())).device
        full = torch.promote_types(dtype, torch.float32)
        size = max(start + _room(shape) for start, shape in self.places.values())
        self.values = torch.zeros(len(models), size, dtype=full, device=self.device)
        self.grads = torch.zeros_like(self.values)
        self.decays = self.values.new_zeros(size)
        for name, (start, shape) in self.places.items():
            self.decays[start : start + shape.numel()] = float(named[name].ndim == 2)
        rules = [Wiring.of(model, full) for model in models]
        self.gains = torch.stack([rule.start for rule in rules])
        self.gain_grads = torch.zeros_like(self.gains)
        self._learning = self.gains
        self._wiring = Wiring.stacked(rules)
        self._low = self.values.to(dtype) if dtype != full else self.values
        self._matrices = {name: self._cut(self._low, name) for name in self.places}
        self._matrix_grads = {name: self._cut(self.grads, name) for name in self.places}
        self._merge: Callable[..., Tensor] = merge
        if self.device.type == "cuda":
            self._merge = _compiled(merge)
        for member, model in enumerate(models):
            self._take(member, model)

    def __len__(self) -> int:
        return len(self.values)

    @torch.no_grad()
    def _take(self, member: int, model: DiT) -> None:
        for name, parameter in model.named_parameters():
            if name in self.places:
                self._cut(self.values, name)[member] = parameter.detach()

    def _cut(self, buffer: Tensor, name: str) -> Tensor:
        """[E, *shape] of one parameter, a view of `buffer` [E, N]."""
        start, shape = self.places[name]
        return buffer[:, start : start + shape.numel()].view(len(buffer), *shape)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over what was written to `values`."""
        if self._low is not self.values:
            self._low.copy_(self.values)

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        text_valid: Tensor,
        *,
        recompute: bool = False,
        similarity: list[Tensor] | None = None,
    ) -> Tensor:
        """The velocities [E, B, C, H, W] of noisy latents of that shape.

        Args:
            text: [E, B, T, text_width], padded at the end.
            text_valid: [E, B], its real tokens.
            recompute: whether backward computes each block again instead of keeping it.
            similarity: takes the token cosine similarity [E] of each layer.
        """
        c, size = self.config, latents.shape[3:]
        rows, columns = size[0] // c.patch, size[1] // c.patch
        segments = Segments.image_and_text(rows * columns, text.shape[2], text_valid.flatten())
        x = self._embed(latents, text, segments)
        tables = rope_tables(rows, columns, text.shape[2], c.head_width, c.rope_theta, x.device)
        # A leaf of each pass: one that stays would add its gradient on the stream of the first.
        self._learning = self.gains.detach().requires_grad_(torch.is_grad_enabled())
        gains = self._wiring.gains(self._learning)
        for layer, (attention, ffn) in enumerate(zip(gains[::2], gains[1::2], strict=True)):
            parts = (x, layer, attention, ffn, tables, segments)
            if recompute and torch.is_grad_enabled():
                # A block draws nothing, and a recording forbids to read a generator's state.
                again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
                x = cast(Tensor, checkpoint(self._block, *parts, **again))
            else:
                x = self._block(*parts)
            if similarity is not None:
                similarity.append(self._similarity(x, segments))
        image = x[:, :, : rows * columns]
        if not self.family.normalised:
            image = rms_norm(image, c.norm_eps)
        patches = self._linear(image.flatten(1, 2), "head")
        return unpatchify(
            patches.view(-1, rows * columns, c.patch_values), c.patch, size
        ).unflatten(0, latents.shape[:2])

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss of the last forward pass, into `grads` and `gain_grads`."""
        loss.backward()
        assert self._learning.grad is not None
        self.gain_grads.copy_(self._learning.grad)

    def _embed(self, latents: Tensor, text: Tensor, segments: Segments) -> Tensor:
        """[E, B, T, D]: what enters the first block."""
        assert segments.mask is not None
        eps, shape = self.config.norm_eps, text.shape[:2]
        patches = patchify(latents.flatten(0, 1), self.config.patch).unflatten(0, shape)
        image_tokens = patches.shape[2]
        real = segments.mask[:, image_tokens:].unflatten(0, shape)
        text = torch.where(real[..., None], text, 0)
        image = rms_norm(self._leaf(patches, "patch_in"), eps)
        words = self._leaf(text, "text_in") if "text_in.weight" in self.places else text
        return torch.cat((image, rms_norm(words.to(self.dtype), eps)), dim=2)

    def _leaf(self, x: Tensor, name: str) -> Tensor:
        """A projection of the input [E, B, T, I], whose gradient nobody asks for, but without one
        autograd would pass the projection's by."""
        flat = x.to(self.dtype).flatten(1, 2).detach().requires_grad_(torch.is_grad_enabled())
        return self._linear(flat, name).unflatten(1, x.shape[1:3])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """[E, R, I] → [E, R, O], and in backward the gradients of the matrix into `grads`."""
        bias = f"{name}.bias" if f"{name}.bias" in self.places else None
        return _Linear.apply(
            x,
            self._matrices[f"{name}.weight"],
            None if bias is None else self._matrices[bias],
            self._matrix_grads[f"{name}.weight"],
            None if bias is None else self._matrix_grads[bias],
        )

    def _block(
        self,
        x: Tensor,
        layer: int,
        of_attention: Sequence[Tensor],
        of_ffn: Sequence[Tensor],
        tables: tuple[Tensor, Tensor],
        segments: Segments,
    ) -> Tensor:
        """[E, B, T, D] → [E, B, T, D]."""
        c, name = self.config, f"blocks.{layer}"
        qkv = self._linear(self._enter(x).flatten(1, 2), f"{name}.attention.qkv")
        packed = qkv.view(-1, x.shape[2], qkv.shape[-1])
        q, k, v = qk_norm_rope(packed, *tables, c.heads, c.groups, c.qk_eps)
        mixed = attend(q, k, v, segments).transpose(1, 2).flatten(-2)
        f = self._linear(mixed.reshape(len(x), -1, c.width), f"{name}.attention.proj")
        x = self._join(x, f, of_attention, segments)
        hidden = swiglu(self._linear(self._enter(x).flatten(1, 2), f"{name}.ffn.w13"))
        return self._join(x, self._linear(hidden, f"{name}.ffn.w2"), of_ffn, segments)

    def _enter(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.config.rule.eps) if self.family.enters_normed else x

    def _join(self, x: Tensor, f: Tensor, gains: Sequence[Tensor], segments: Segments) -> Tensor:
        assert segments.mask is not None
        assert segments.valid is not None
        f = f.view(x.shape)
        if self.family.branch_normed:
            f = zero_padding(f.flatten(0, 1), segments).view(x.shape)
            f = rms_norm(f, self.config.rule.eps)
        mask = segments.mask.view(*x.shape[:3], 1)
        words = segments.valid[:, 1].view(*x.shape[:2], 1, 1)
        eps = self._wiring.eps if self.family.normalised else None
        return self._merge(x, f, *gains, mask, words, segments.lengths[0], eps)

    @torch.no_grad()
    def _similarity(self, x: Tensor, segments: Segments) -> Tensor:
        """Token cosine similarity of each member, [E]."""
        values = token_cosine_similarity(x.flatten(0, 1), segments, "global").view(*x.shape[:2])
        return values.mean(1)


def merge(
    x: Tensor,
    f: Tensor,
    beta: Tensor,
    alpha: Tensor,
    leak: Tensor,
    mask: Tensor,
    words: Tensor,
    image: int,
    eps: Tensor | None,
) -> Tensor:
    """Z = X + β⊙F + J((α − β)⊙F − λ⊙X), which is the merge of `kernels.reference`, and its norm.

    Args:
        x, f: [E, B, T, D], `image` tokens and then words; `x` is zero on padding.
        beta, alpha, leak: [E, D].
        mask: [E, B, T, 1], true for real tokens.
        words: [E, B, 1, 1], the real ones among them.
        eps: [E, 1, 1, 1]; None leaves Z as it is.
    """
    dtype = beta.dtype
    beta, alpha, leak = (gain[:, None, None] for gain in (beta, alpha, leak))
    # The trunk is zero on padding, but its mean would have a gradient there, which the norm of
    # each layer below multiplies by 1/√ε.
    trunk, branch = (torch.where(mask, each.to(dtype), 0) for each in (x, f))
    shared = (alpha - beta) * branch - leak * trunk
    of_image = shared[:, :, :image].mean(2, keepdim=True).expand(-1, -1, image, -1)
    of_words = shared[:, :, image:].sum(2, keepdim=True) / words.clamp(min=1)
    of_words = of_words.expand(-1, -1, x.shape[2] - image, -1)
    z = trunk + beta * branch + torch.cat((of_image, of_words), 2) * mask
    if eps is not None:
        z = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt()
    return z.to(x.dtype)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` by torch.compile, once for any number of members and samples, the first two axes
    of its tensors."""
    compiled = torch.compile(function)

    def call(*arguments: Any) -> Tensor:
        for each in arguments:
            if isinstance(each, Tensor):
                torch._dynamo.maybe_mark_dynamic(each, [0, 1] if each.ndim > 2 else [0])
        return compiled(*arguments)

    return call


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_grad: Tensor,
        bias_grad: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grads = weight_grad, bias_grad
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight = ctx.saved_tensors
        weight_grad, bias_grad = ctx.grads
        _product_into(weight_grad, grad.mT, x)
        if bias_grad is not None:
            bias_grad.copy_(grad.sum(1, dtype=bias_grad.dtype))
        return torch.bmm(grad, weight), None, None, None, None


def _product_into(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target = a·b, in fp32 without rounding the sums to the precision of `a`."""
    if target.dtype == a.dtype:
        target.copy_(torch.bmm(a, b))
    elif a.is_cuda:
        target.copy_(torch.ops.aten.bmm.dtype(a, b, target.dtype))
    else:
        target.copy_(torch.bmm(a.to(target.dtype), b.to(target.dtype)))


@dataclass(frozen=True)
class Wiring:
    """How the gains of merges follow from the parameters of rules: each of β, α and λ is one of
    them, or a number.

    Attributes:
        start: [S, 2L, D] the parameters; of one that is a single number every element is it.
        choice: [2L, 3, S], 1 where a gain is a parameter.
        numbers: [2L, 3], the gains that are none.
        single: [S], 1 where a parameter is a single number.
        eps: of the norms.
    """

    start: Tensor
    choice: Tensor
    numbers: Tensor
    single: Tensor
    eps: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: DiT, dtype: torch.dtype) -> Wiring:
        blocks = [cast(Block, block) for block in model.blocks]
        rules = [rule for block in blocks for rule in (block.rule_attention, block.rule_ffn)]
        device = next(model.parameters()).device
        start = torch.zeros(SLOTS, len(rules), model.config.width, dtype=dtype, device=device)
        choice = torch.zeros(len(rules), 3, SLOTS, dtype=dtype)
        numbers = torch.zeros(len(rules), 3, dtype=dtype)
        single = torch.zeros(SLOTS, dtype=dtype)
        for place, rule in enumerate(rules):
            parameters = list(rule.parameters())
            for slot, parameter in enumerate(parameters):
                start[slot, place] = parameter
                single[slot] = float(parameter.numel() == 1)
            for i, gain in enumerate(_gains(rule)):
                if isinstance(gain, Tensor):
                    slot = next(s for s, parameter in enumerate(parameters) if parameter is gain)
                    choice[place, i, slot] = 1
                else:
                    numbers[place, i] = gain
        eps = torch.tensor(getattr(rules[0], "eps", 0.0), dtype=dtype)
        return cls(start, *(t.to(device) for t in (choice, numbers, single, eps)))

    @classmethod
    def stacked(cls, wirings: Sequence[Wiring]) -> Wiring:
        """Of all members, each field with [E] in front; ε as [E, 1, 1, 1]."""
        fields = ("start", "choice", "numbers", "single", "eps")
        stacked = [torch.stack([getattr(w, name) for w in wirings]) for name in fields]
        stacked[-1] = stacked[-1].view(-1, 1, 1, 1)
        return cls(*stacked)

    def gains(self, parameters: Tensor) -> list[list[Tensor]]:
        """β, α and λ, each [E, D], of every merge, from [E, S, 2L, D]."""
        single = self.single[:, :, None, None].bool()
        full = torch.where(single, parameters[..., :1], parameters)
        chosen = torch.einsum("elgs,esld->lged", self.choice, full)
        gains = chosen + self.numbers.permute(1, 2, 0)[..., None]
        return [list(each.unbind(0)) for each in gains.unbind(0)]


def _gains(rule: Rule) -> tuple[Gain, Gain, Gain]:
    """β, α and λ of a rule; without any, its branches join as they are."""
    beta, alpha, leak = rule.gains() if isinstance(rule, PostNorm) else Gains(1.0, 1.0, 0.0)
    return beta, alpha, alpha if leak is None else leak


def _check(model: DiT, first: DiT, family: Family) -> None:
    """Raises UserError where a network cannot be a member."""
    for block in model.blocks:
        for rule in (cast(Block, block).rule_attention, cast(Block, block).rule_ffn):
            if Family.of(rule) != family:
                raise UserError(
                    f"rule {rule.config.name!r} does not join its branches as "
                    f"{first.config.rule.name!r} does; train them apart"
                )
    if _shape(model.config) != _shape(first.config):
        raise UserError("networks of several shapes cannot be trained as one; train them apart")


def _shape(config: DiTConfig) -> tuple[Any, ...]:
    names = ("depth", "width", "heads", "kv_heads", "ffn_width", "channels", "patch", "text_width")
    if config.attention_bias or config.ffn_bias or config.mean != "clip":
        raise UserError("an ensemble has no biases in its blocks, and the mean of a clip")
    return tuple(getattr(config, name) for name in names)


def _places(shapes: dict[str, torch.Size]) -> dict[str, tuple[int, torch.Size]]:
    """For each parameter its first element and its shape."""
    places, start = {}, 0
    for name, shape in shapes.items():
        places[name] = (start, shape)
        start += _room(shape)
    return places


def _room(shape: torch.Size) -> int:
    return -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT
