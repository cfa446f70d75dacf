"""How a network's evaluation is cut into stages, and the ways in which each stage can be done.

A block is five stages: packed projection with rotation and QK-norm; attention; W_O with its merge;
w13 with SwiGLU; W_2 with its merge. Each is either one of this project's kernels for few rows, with
a cut, or the ordinary ops (cuBLAS and the fused ops of training). Both read the weights where they
lie in the model, so weights that change in place need nothing.

Shapes: B samples, N rows of the padded stream (`kernels/fused/stream.py`), T rows of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvsplit.kernels import Gains, qk_norm_rope, split_merge, swiglu
from mvsplit.kernels.fused import stream_attention, stream_gemm, stream_merge
from mvsplit.kernels.fused.stream import CHUNK, Stream
from mvsplit.kernels.fused.stream_attention import Blocks
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.kernels.hopper import attention as hopper_attention
from mvsplit.kernels.hopper import product
from mvsplit.kernels.hopper.attention import Heads
from mvsplit.kernels.hopper.product import Cut
from mvsplit.models import Block, DiT
from mvsplit.models.patching import unpatchify
from mvsplit.models.rope import rope_tables
from mvsplit.residuals import PostNorm

STAGES = ("qkv", "attention", "proj", "w13", "w2")


@dataclass(frozen=True)
class Ordinary:
    """A stage done by the ordinary ops; `name` is the backend of attention, where it matters."""

    name: str = "default"

    def with_pdl(self, pdl: bool) -> Ordinary:
        return self


@dataclass(frozen=True)
class Writing:
    """A writer and the merge after it, by the kernels for few rows; without a tile the product is
    the ordinary one, and the sums of F and X are a launch of their own."""

    tile: Tile | Cut | None
    rows: Rows

    def with_pdl(self, pdl: bool) -> Writing:
        tile = None if self.tile is None else self.tile.with_pdl(pdl)
        return Writing(tile, self.rows.with_pdl(pdl))


Choice = Ordinary | Tile | Blocks | Writing | Cut | Heads
_CHOICES = {"ordinary": Ordinary, "tile": Tile, "blocks": Blocks, "cut": Cut, "heads": Heads}


@dataclass(frozen=True)
class Plan:
    """One choice for each stage; the same for all layers.

    Attributes:
        ahead: whether kernels that leave the memory idle ask the L2 cache for the weights of the
            next product.
        without: why kernels in CUDA C++ could not be tried, if so.
    """

    qkv: Choice
    attention: Choice
    proj: Choice
    w13: Choice
    w2: Choice
    _: KW_ONLY
    ahead: bool = False
    without: str = ""

    def with_choice(self, stage: str, choice: Choice) -> Plan:
        choices: dict[str, Any] = {stage: choice}
        return replace(self, **choices)

    def with_pdl(self, pdl: bool) -> Plan:
        """Whether the project's own kernels start before the kernel before them has ended."""
        return replace(self, **{stage: getattr(self, stage).with_pdl(pdl) for stage in STAGES})

    def to_json(self) -> dict[str, Any]:
        choices = {stage: _choice_to_json(getattr(self, stage)) for stage in STAGES}
        return {**choices, "ahead": self.ahead, "without": self.without}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Plan:
        choices = {stage: _choice_from_json(fields[stage]) for stage in STAGES}
        return cls(**choices, ahead=fields["ahead"], without=fields.get("without", ""))


ORDINARY = Plan(*[Ordinary()] * 5)


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    if isinstance(choice, Writing):
        return {"kind": "writing", **asdict(choice)}
    return {"kind": type(choice).__name__.lower(), **asdict(choice)}


def _choice_from_json(fields: dict[str, Any]) -> Choice:
    kind, rest = fields["kind"], {k: v for k, v in fields.items() if k != "kind"}
    if kind == "writing":
        given = rest["tile"]
        tile = None if given is None else (Cut if "tokens" in given else Tile)(**given)
        return Writing(tile, Rows(**rest["rows"]))
    return _CHOICES[kind](**rest)


class Network:
    """A DiT's evaluation at one shape by a plan, on buffers of its own.

    Args:
        model: its blocks are plain post-norm blocks without biases (`engine.py` checks it).
        latents: [B, C, H, W], of whose shape and dtype the evaluation is.
        text: [B, tokens, Dc].
        padded: whether counts of real text tokens are given with every call.
    """

    def __init__(self, model: DiT, latents: Tensor, text: Tensor, *, padded: bool) -> None:
        config = model.config
        self.model, self.config = model, config
        self.size = (latents.shape[2], latents.shape[3])
        patched = (self.size[0] // config.patch, self.size[1] // config.patch)
        self.stream = Stream(len(latents), patched[0] * patched[1], text.shape[1])
        weight = cast(Block, model.blocks[0]).attention.qkv.weight
        new = weight.new_zeros
        self.trunk = new(self.stream.rows, config.width)
        self.packed = new(self.stream.rows, (config.heads + 2 * config.groups) * config.head_width)
        self.attended = new(self.stream.rows, config.heads * config.head_width)
        self.activated = new(self.stream.rows, config.ffn_width)
        self.sums, self.sums_f = new(2, len(latents), 2, config.width, dtype=torch.float32)
        self.valid = new(len(latents), dtype=torch.int32).add_(text.shape[1]) if padded else None
        self.segments = self.stream.segments(self.valid, weight.device)
        tables = rope_tables(
            *patched, text.shape[1], config.head_width, config.rope_theta, weight.device
        )
        self.cos = self.stream.spread(tables[0], 1.0)
        self.sin = self.stream.spread(tables[1], 0.0)
        self.rotation = product.rotation(*tables, self.stream.image, patched[1])
        self.meeting = product.meeting(self.stream, config.width, weight.device)
        self._parts: dict[object, tuple[Tensor, Tensor]] = {}
        self.x = self.trunk  # [N, D]; what a stage reads, and then what it wrote:
        self.q = self.k = self.v = self.packed  # [B, H or G, T, K]
        self.mixed, self.hidden = self.attended, self.activated  # [N, H·K], [N, F]

    def __call__(self, latents: Tensor, text: Tensor, valid: Tensor | None, plan: Plan) -> Tensor:
        """The velocity [B, C, H, W]; as `DiT.forward`."""
        if self.valid is not None and valid is not None:
            self.valid.copy_(valid)
            self.segments = self.stream.segments(self.valid, self.valid.device)
        tokens, _ = self.model.embed(latents, text, valid)
        self.stream.place(tokens, self.trunk)
        self.x = self.trunk
        self.run_blocks([cast(Block, block) for block in self.model.blocks], plan)
        image = self.stream.image_tokens(self.x)
        return unpatchify(self.model.head(image), self.config.patch, self.size)

    def run_blocks(self, blocks: Sequence[Block], plan: Plan) -> None:
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            for stage in STAGES:
                self.run(stage, block, plan, following)

    def run(
        self, stage: str, block: Block, plan: Plan, following: Block | None = None,
        compile_only: bool = False,
    ) -> None:  # fmt: skip
        """One stage of a block; `compile_only` compiles its kernels and launches nothing."""
        choice = getattr(plan, stage)
        ahead = self._ahead(stage, block, following) if plan.ahead else None
        if stage == "qkv":
            self._qkv(block, choice, ahead, compile_only)
        elif stage == "attention":
            self._attention(block, choice, plan.proj, ahead, compile_only)
        elif stage == "w13":
            self._w13(block, choice, plan.w2, ahead, compile_only)
        elif stage == "proj":
            rule = _post(block.rule_attention)
            self._write(block.attention.proj, self.mixed, rule, choice, ahead, compile_only)
        else:
            rule = _post(block.rule_ffn)
            self._write(block.ffn.w2, self.hidden, rule, choice, ahead, compile_only)

    def _ahead(self, stage: str, block: Block, following: Block | None) -> Tensor | None:
        """The weights that the L2 cache is to fetch while a stage runs: those of w13, twice as
        many as any other's, during attention, which needs none."""
        if stage == "w2":
            return None if following is None else following.attention.qkv.weight
        product = {"qkv": block.attention.proj, "attention": block.ffn.w13, "w13": block.ffn.w2}
        return product[stage].weight if stage in product else None

    def result(self, stage: str) -> Tensor:
        """What a stage wrote."""
        if stage == "qkv":
            heads = (t.transpose(1, 2).flatten(-2) for t in (self.q, self.k, self.v))
            return torch.cat(list(heads), -1)
        return {"attention": self.mixed, "w13": self.hidden}.get(stage, self.x)

    def sums_left(self, stage: str, block: Block, plan: Plan) -> tuple[Tensor, Tensor] | None:
        """The column sums that a stage, which has run, left for a merge, and the same by torch:
        [B, 2, D] each. None where the merge needs none."""
        rule = block.rule_attention if stage in ("attention", "proj") else block.rule_ffn
        gains, choice = _post(rule).gains(), getattr(plan, stage)
        if stage in ("attention", "w13"):
            sums = self._sums(gains, plan.proj if stage == "attention" else plan.w2)
            return None if sums is None else (sums, self._by_segment(self.x))
        if not isinstance(choice, Writing) or not stream_merge.takes_means(gains):
            return None
        if isinstance(choice.tile, Cut):
            out, partial = self._cut_buffers(choice.tile)
            return partial.sum((0, 2)), self._by_segment(out.sum(0))
        out, partial = self._writer_buffers(1 if choice.tile is None else choice.tile.split)
        f = self._by_segment(out.float().sum(0))
        if choice.tile is None:
            return self.sums_f, f
        chunks = partial.sum(0).view(self.stream.batch, -1, self.config.width)
        return self._both(chunks, self.stream.image_rows // CHUNK), f

    def _by_segment(self, rows: Tensor) -> Tensor:
        rows, mask = self._by_sample(rows).float(), self.segments.mask
        rows = rows if mask is None else torch.where(mask[..., None], rows, 0)
        return self._both(rows, self.stream.image_rows)

    @staticmethod
    def _both(rows: Tensor, image: int) -> Tensor:
        return torch.stack((rows[:, :image].sum(1), rows[:, image:].sum(1)), 1)

    def _by_sample(self, rows: Tensor) -> Tensor:
        return rows.view(self.stream.batch, self.stream.sample_rows, -1)

    def _qkv(self, block: Block, choice: Choice, ahead: Tensor | None, compile_only: bool) -> None:
        c, w = self.config, block.attention.qkv.weight
        if isinstance(choice, Tile):
            stream_gemm.qkv(
                self.x, w, self.cos, self.sin, self.packed, self.stream, c.heads, c.groups,
                c.qk_eps, choice, compile_only=compile_only,
            )  # fmt: skip
            self._take_heads()
        elif isinstance(choice, Cut):
            product.qkv(
                self.x, w, self.rotation, self.packed, self.stream, c.heads,
                c.groups, c.qk_eps, choice, ahead=ahead, compile_only=compile_only,
            )  # fmt: skip
            self._take_heads()
        elif not compile_only:
            packed = functional.linear(self._by_sample(self.x), w)
            qkv = qk_norm_rope(packed, self.cos, self.sin, c.heads, c.groups, c.qk_eps)
            self.q, self.k, self.v = qkv

    def _take_heads(self) -> None:
        c = self.config
        heads = self._by_sample(self.packed).unflatten(-1, (-1, c.head_width)).transpose(1, 2)
        self.q, self.k, self.v = heads.split((c.heads, c.groups, c.groups), 1)

    def _attention(
        self, block: Block, choice: Choice, after: Choice, ahead: Tensor | None, compile_only: bool
    ) -> None:
        sums = self._sums(_post(block.rule_attention).gains(), after)
        if isinstance(choice, Blocks):
            self.mixed = self.attended
            stream_attention.attention(
                self.q, self.k, self.v, self.mixed, self.valid, self.x, sums, self.stream, choice,
                ahead=ahead, compile_only=compile_only,
            )  # fmt: skip
        elif isinstance(choice, Heads):
            self.mixed = self.attended
            hopper_attention.attention(
                self.q, self.k, self.v, self.mixed, self.valid, self.x, sums, self.stream, choice,
                ahead=ahead, compile_only=compile_only,
            )  # fmt: skip
        elif not compile_only:
            self.mixed = self._library_attention(cast(Ordinary, choice).name)
            if sums is not None:
                stream_merge.segment_sums(self.x, sums, self.valid, self.stream)

    def _library_attention(self, name: str) -> Tensor:
        mask = self.segments.mask
        keys = None if mask is None else mask[:, None, None, :]
        grouped = self.config.heads != self.config.groups
        with sdpa_kernel(_BACKENDS[name]):
            out = functional.scaled_dot_product_attention(
                self.q, self.k, self.v, attn_mask=keys, enable_gqa=grouped
            )
        return out.transpose(1, 2).flatten(-2).flatten(0, 1)

    def _w13(
        self, block: Block, choice: Choice, after: Choice, ahead: Tensor | None, compile_only: bool
    ) -> None:
        sums = self._sums(_post(block.rule_ffn).gains(), after)
        if isinstance(choice, Tile):
            self.hidden = self.activated
            stream_gemm.swiglu(
                self.x, block.ffn.w13.weight, self.hidden, sums, self.valid, self.stream, choice,
                ahead=ahead, compile_only=compile_only,
            )  # fmt: skip
        elif isinstance(choice, Cut):
            self.hidden = self.activated
            product.swiglu(
                self.x, block.ffn.w13.weight, self.hidden, sums, self.valid, self.stream, choice,
                ahead=ahead, compile_only=compile_only,
            )  # fmt: skip
        elif not compile_only:
            self.hidden = swiglu(functional.linear(self.x, block.ffn.w13.weight))
            if sums is not None:
                stream_merge.segment_sums(self.x, sums, self.valid, self.stream)

    def _write(
        self, matrix: nn.Linear, a: Tensor, rule: PostNorm, choice: Choice, ahead: Tensor | None,
        compile_only: bool,
    ) -> None:  # fmt: skip
        gains = rule.gains()
        if isinstance(choice, Writing):
            out, partial = self._product(a, matrix.weight, gains, choice, compile_only)
            stream_merge.merge(
                self.x, out, self.x, partial if stream_merge.takes_means(gains) else None,
                self.sums if stream_merge.leaks(gains) else None, gains, self.valid, self.stream,
                rule.eps, choice.rows, ahead=ahead, compile_only=compile_only,
            )  # fmt: skip
        elif isinstance(choice, Cut):
            product.write(
                a, matrix.weight, self.x, self.x, gains, self.valid, self.stream, rule.eps,
                self.meeting, choice, ahead=ahead, compile_only=compile_only,
            )  # fmt: skip
        elif not compile_only:
            f = functional.linear(self._by_sample(a), matrix.weight)
            merged = split_merge(self._by_sample(self.x), f, *gains, self.segments, rule.eps)
            self.x = merged.flatten(0, 1)

    def _product(
        self, a: Tensor, weight: Tensor, gains: Gains, choice: Writing, compile_only: bool
    ) -> tuple[Tensor, Tensor]:
        """F in parts, and the column sums that a merge with these gains needs."""
        means = stream_merge.takes_means(gains)
        if isinstance(choice.tile, Cut):
            out, partial = self._cut_buffers(choice.tile)
            product.part(
                a, weight, out, partial, self.valid, self.stream, choice.tile,
                compile_only=compile_only,
            )  # fmt: skip
            return out, partial
        if choice.tile is not None:
            out, partial = self._writer_buffers(choice.tile.split)
            stream_gemm.writer(
                a, weight, out, partial if means else None, self.valid, self.stream, choice.tile,
                compile_only=compile_only,
            )  # fmt: skip
            return out, partial
        out, _ = self._writer_buffers(1)
        if not compile_only:
            torch.mm(a, weight.T, out=out[0])
        if means:
            stream_merge.segment_sums(
                self.x, self.sums, self.valid, self.stream, out[0], self.sums_f,
                pdl=choice.rows.pdl, compile_only=compile_only,
            )  # fmt: skip
        return out, self.sums_f[None, :, None]

    def _sums(self, gains: Gains, merge: Choice) -> Tensor | None:
        """Where the column sums of the trunk go, if the merge to come wants them from here."""
        own = isinstance(merge, Writing) and merge.tile is not None
        return self.sums if own and stream_merge.leaks(gains) else None

    def _writer_buffers(self, split: int) -> tuple[Tensor, Tensor]:
        if split not in self._parts:
            width = self.config.width
            self._parts[split] = stream_gemm.writer_buffers(self.stream, width, split, self.trunk)
        return self._parts[split]

    def _cut_buffers(self, cut: Cut) -> tuple[Tensor, Tensor]:
        key = (cut.tokens, cut.split)
        if key not in self._parts:
            width, device = self.config.width, self.trunk.device
            self._parts[key] = product.part_buffers(self.stream, width, cut, device)
        return self._parts[key]


def _post(rule: nn.Module) -> PostNorm:
    return cast(PostNorm, rule)


_BACKENDS = {
    "default": [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
}
