"""How a network's evaluation is cut into stages, and the ways in which each stage can be done.

A block is five stages: packed projection with rotation and QK-norm; attention; W_O with its merge;
w13 with SwiGLU; W_2 with its merge. Each is either one of this project's kernels for few rows, with
a cut, or the ordinary ops (cuBLAS and the fused ops of training). Both read the weights where they
lie in the model, so weights that change in place need nothing.

Shapes: B samples, N rows of the padded stream (`kernels/fused/stream.py`), T rows of a sample.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvsplit.kernels import Gains, qk_norm_rope, split_merge, swiglu
from mvsplit.kernels.fused import stream_attention, stream_gemm, stream_merge
from mvsplit.kernels.fused.stream import Stream
from mvsplit.kernels.fused.stream_attention import Blocks
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
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
    """A writer and the merge after it, by the kernels for few rows."""

    tile: Tile
    rows: Rows

    def with_pdl(self, pdl: bool) -> Writing:
        return Writing(self.tile.with_pdl(pdl), self.rows.with_pdl(pdl))


Choice = Ordinary | Tile | Blocks | Writing
_CHOICES = {"ordinary": Ordinary, "tile": Tile, "blocks": Blocks}


@dataclass(frozen=True)
class Plan:
    """One choice for each stage; the same for all layers."""

    qkv: Choice
    attention: Choice
    proj: Choice
    w13: Choice
    w2: Choice

    def with_choice(self, stage: str, choice: Choice) -> Plan:
        return replace(self, **{stage: choice})

    def with_pdl(self, pdl: bool) -> Plan:
        """Whether the project's own kernels start before the kernel before them has ended."""
        return Plan(*(getattr(self, stage).with_pdl(pdl) for stage in STAGES))

    def to_json(self) -> dict[str, Any]:
        return {stage: _choice_to_json(getattr(self, stage)) for stage in STAGES}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Plan:
        return cls(**{stage: _choice_from_json(fields[stage]) for stage in STAGES})


ORDINARY = Plan(*[Ordinary()] * 5)


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    if isinstance(choice, Writing):
        return {"kind": "writing", "tile": asdict(choice.tile), "rows": asdict(choice.rows)}
    return {"kind": type(choice).__name__.lower(), **asdict(choice)}


def _choice_from_json(fields: dict[str, Any]) -> Choice:
    kind, rest = fields["kind"], {k: v for k, v in fields.items() if k != "kind"}
    if kind == "writing":
        return Writing(Tile(**rest["tile"]), Rows(**rest["rows"]))
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
        self.sums = new(len(latents), 2, config.width, dtype=torch.float32)
        self.valid = new(len(latents), dtype=torch.int32).add_(text.shape[1]) if padded else None
        self.segments = self.stream.segments(self.valid, weight.device)
        tables = rope_tables(
            *patched, text.shape[1], config.head_width, config.rope_theta, weight.device
        )
        self.cos = self.stream.spread(tables[0], 1.0)
        self.sin = self.stream.spread(tables[1], 0.0)
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}
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
        for block in self.model.blocks:
            self.run_block(cast(Block, block), plan)
        image = self.stream.image_tokens(self.x)
        return unpatchify(self.model.head(image), self.config.patch, *self.size)

    def run_block(self, block: Block, plan: Plan) -> None:
        for stage in STAGES:
            self.run(stage, block, plan)

    def run(self, stage: str, block: Block, plan: Plan, compile_only: bool = False) -> None:
        """One stage of a block; `compile_only` compiles its kernels and launches nothing."""
        choice = getattr(plan, stage)
        if stage == "qkv":
            self._qkv(block, choice, compile_only)
        elif stage == "attention":
            self._attention(block, choice, plan.proj, compile_only)
        elif stage == "w13":
            self._w13(block, choice, plan.w2, compile_only)
        elif stage == "proj":
            self._write(block.attention.proj, self.mixed, _post(block.rule_attention), choice,
                        compile_only)  # fmt: skip
        else:
            self._write(block.ffn.w2, self.hidden, _post(block.rule_ffn), choice, compile_only)

    def result(self, stage: str) -> Tensor:
        """What a stage wrote."""
        if stage == "qkv":
            heads = (t.transpose(1, 2).flatten(-2) for t in (self.q, self.k, self.v))
            return torch.cat(list(heads), -1)
        return {"attention": self.mixed, "w13": self.hidden}.get(stage, self.x)

    def _by_sample(self, rows: Tensor) -> Tensor:
        return rows.view(self.stream.batch, self.stream.sample_rows, -1)

    def _qkv(self, block: Block, choice: Choice, compile_only: bool) -> None:
        c, w = self.config, block.attention.qkv.weight
        if isinstance(choice, Tile):
            stream_gemm.qkv(
                self.x, w, self.cos, self.sin, self.packed, self.stream, c.heads, c.groups,
                c.qk_eps, choice, compile_only=compile_only,
            )  # fmt: skip
            heads = self._by_sample(self.packed).unflatten(-1, (-1, c.head_width)).transpose(1, 2)
            self.q, self.k, self.v = heads.split((c.heads, c.groups, c.groups), 1)
        elif not compile_only:
            packed = functional.linear(self._by_sample(self.x), w)
            qkv = qk_norm_rope(packed, self.cos, self.sin, c.heads, c.groups, c.qk_eps)
            self.q, self.k, self.v = qkv

    def _attention(self, block: Block, choice: Choice, after: Choice, compile_only: bool) -> None:
        sums = self._sums(_post(block.rule_attention).gains(), after)
        if isinstance(choice, Blocks):
            self.mixed = self.attended
            stream_attention.attention(
                self.q, self.k, self.v, self.mixed, self.valid, self.x, sums, self.stream, choice,
                compile_only=compile_only,
            )  # fmt: skip
        elif not compile_only:
            self.mixed = self._library_attention(cast(Ordinary, choice).name)
            if sums is not None:
                stream_merge.segment_sums(self.x, sums, self.stream)

    def _library_attention(self, name: str) -> Tensor:
        mask = self.segments.mask
        keys = None if mask is None else mask[:, None, None, :]
        grouped = self.config.heads != self.config.groups
        with sdpa_kernel(_BACKENDS[name]):
            out = functional.scaled_dot_product_attention(
                self.q, self.k, self.v, attn_mask=keys, enable_gqa=grouped
            )
        return out.transpose(1, 2).flatten(-2).flatten(0, 1)

    def _w13(self, block: Block, choice: Choice, after: Choice, compile_only: bool) -> None:
        sums = self._sums(_post(block.rule_ffn).gains(), after)
        if isinstance(choice, Tile):
            self.hidden = self.activated
            stream_gemm.swiglu(
                self.x, block.ffn.w13.weight, self.hidden, sums, self.stream, choice,
                compile_only=compile_only,
            )  # fmt: skip
        elif not compile_only:
            self.hidden = swiglu(functional.linear(self.x, block.ffn.w13.weight))
            if sums is not None:
                stream_merge.segment_sums(self.x, sums, self.stream)

    def _write(
        self, matrix: nn.Linear, a: Tensor, rule: PostNorm, choice: Choice, compile_only: bool
    ) -> None:
        gains = rule.gains()
        if isinstance(choice, Writing):
            out, partial = self._writer_buffers(choice.tile.split)
            stream_gemm.writer(
                a, matrix.weight, out, partial if stream_merge.takes_means(gains) else None,
                self.valid, self.stream, choice.tile, compile_only=compile_only,
            )  # fmt: skip
            stream_merge.merge(
                self.x, out, self.x, partial if stream_merge.takes_means(gains) else None,
                self._sums(gains, choice), gains, self.valid, self.stream, rule.eps, choice.rows,
                compile_only=compile_only,
            )  # fmt: skip
        elif not compile_only:
            f = functional.linear(self._by_sample(a), matrix.weight)
            merged = split_merge(self._by_sample(self.x), f, *gains, self.segments, rule.eps)
            self.x = merged.flatten(0, 1)

    def _sums(self, gains: Gains, merge: Choice) -> Tensor | None:
        """Where the column sums of the trunk go, if the merge to come wants them."""
        wanted = isinstance(merge, Writing) and stream_merge.leaks(gains)
        return self.sums if wanted else None

    def _writer_buffers(self, split: int) -> tuple[Tensor, Tensor]:
        if split not in self._parts:
            width = self.config.width
            self._parts[split] = stream_gemm.writer_buffers(self.stream, width, split, self.trunk)
        return self._parts[split]


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
