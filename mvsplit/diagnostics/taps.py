"""Where to listen in a network: the blocks, writers, queries and keys that a probe watches.

The probe and the gradient norms know these records only, so any PyTorch model can be watched once
something has written them down; `taps_for_dit` does so for our DiT.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mvsplit.diagnostics.shards import GradientPart, norms, part_of
from mvsplit.errors import UserError
from mvsplit.kernels import Segments
from mvsplit.models import Block, DiT
from mvsplit.residuals import Rule

BranchName = Literal["attn", "ffn"]


@dataclass(frozen=True, kw_only=True)
class ParameterRows:
    """Rows of the weight of a linear map: all of it, or the part of a packed one that is Q or K.

    It names the map, for sharding puts another tensor in the place of its weight, which is the
    parameter of the name `weight`. Of a map with a low-rank adapter (`mvsplit.models.lora`) it is
    the matrix B, whose rows are those of the weight.
    """

    projection: nn.Module
    start: int = 0
    stop: int | None = None
    weight: str = "weight"

    @property
    def parameter(self) -> Tensor:
        """Whose gradient is read."""
        adapter = getattr(self.projection, "lora_B", None)
        if isinstance(adapter, nn.Linear):
            return adapter.weight
        return cast(Tensor, getattr(self.projection, self.weight))

    def gradient(self) -> GradientPart | None:
        """What this rank holds of the gradient's rows, a view; None before a backward pass."""
        gradient = self.parameter.grad
        return None if gradient is None else part_of(gradient, self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class BranchTap:
    """One branch of a block.

    Attributes:
        name: "attn" or "ffn", the end of the names of its fields.
        writer: the token-wise linear map that ends the branch, W_O or W_2; its output is U.
        trunk_at: a module whose first input is the trunk X that the branch joins; None where no
            module sees it, and then what compares U with X is not measured.
        called: whether the writer is called as a module; else only its gradient can be seen.
    """

    name: BranchName
    writer: nn.Module
    trunk_at: nn.Module | None
    called: bool = True

    @property
    def rows(self) -> ParameterRows:
        """The writer's weight."""
        return ParameterRows(projection=self.writer)


@dataclass(frozen=True, kw_only=True)
class LayerTap:
    """One layer: `block` takes the trunk [B, T, D], or [T, B, D] where it is not `batch_first`, as
    its first input and returns the next trunk, alone or in a tuple. What a layer does not have is
    None or left out."""

    layer: int
    block: nn.Module
    branches: tuple[BranchTap, ...]
    query: ParameterRows | None = None
    key: ParameterRows | None = None
    batch_first: bool = True

    def oriented(self, x: Tensor) -> Tensor:
        """What lies as the trunk does, [B, T, ...]."""
        return x if self.batch_first or x.dim() < 3 else x.transpose(0, 1)


def taps_for_dit(model: DiT) -> list[LayerTap]:
    """The taps of every block of our DiT, in order of depth."""
    config = model.config
    queries = config.heads * config.head_width
    keys = queries + config.groups * config.head_width
    taps = []
    for layer, block in enumerate(cast(Iterable[Block], model.blocks)):
        packed = block.attention.qkv
        # A rule that normalises on entry hides the trunk from the FFN module.
        post_norm = type(block.rule_ffn).enter is Rule.enter
        ffn = BranchTap(name="ffn", writer=block.ffn.w2, trunk_at=block.ffn if post_norm else None)
        attention = BranchTap(name="attn", writer=block.attention.proj, trunk_at=block)
        taps.append(
            LayerTap(
                layer=layer,
                block=block,
                branches=(attention, ffn),
                query=ParameterRows(projection=packed, stop=queries),
                key=ParameterRows(projection=packed, start=queries, stop=keys),
            )
        )
    return taps


FAMILIES = ("grad_writer_attn", "grad_writer_ffn", "grad_query", "grad_key")


def family_gradients(tap: LayerTap) -> dict[str, GradientPart | None]:
    """The gradients of W_O, W_2, W_Q and W_K of one layer, by the name of their field; families
    that the layer does not have, or whose weights are frozen, are left out, and None means that no
    backward pass reached it."""
    rows = {f"grad_writer_{b.name}": b.rows for b in tap.branches}
    rows |= {
        name: found
        for name, found in (("grad_query", tap.query), ("grad_key", tap.key))
        if found is not None
    }
    return {name: r.gradient() for name, r in rows.items() if r.parameter.requires_grad}


def deepest_quarter(taps: Sequence[LayerTap]) -> Sequence[LayerTap]:
    """The last quarter of the layers, rounded up: where a collapse is seen first."""
    return taps[len(taps) - -(-len(taps) // 4) :]


def gradient_norm_tensors(taps: Sequence[LayerTap]) -> dict[str, Tensor]:
    """`gradient_norms` as scalars on the device, for a loop that reads them with its own numbers.

    They are those of the whole gradients where these are spread over ranks, which then all have to
    call this, and the same on every rank.

    Raises:
        UserError: there is no tap, or a watched weight that learns has no gradient.
    """
    if not taps:
        raise UserError("taps=[]: there is no layer to watch; pass the taps of at least one layer")
    collected: dict[str, list[GradientPart]] = {}
    for tap in deepest_quarter(taps):
        for name, gradient in family_gradients(tap).items():
            if gradient is None:
                raise UserError(
                    f"{name} of layer {tap.layer} has no gradient; read gradient norms after "
                    f"backward() and before zero_grad()"
                )
            collected.setdefault(name, []).append(gradient)
    if not collected:  # all frozen
        return {}
    per_tensor = iter(norms([g for gradients in collected.values() for g in gradients]))
    return {
        name: torch.linalg.vector_norm(torch.stack([next(per_tensor) for _ in gradients]))
        for name, gradients in collected.items()
    }


def gradient_norms(taps: Sequence[LayerTap]) -> dict[str, float]:
    """What is read every step: L2 norms of the gradients of W_O, W_2, W_Q and W_K over the deepest
    quarter of the layers, with one synchronisation of the device.

    Returns:
        `grad_writer_attn, grad_writer_ffn, grad_query, grad_key`, those the model has.

    Raises:
        UserError: there is no tap, or a watched weight has no gradient.
    """
    scalars = gradient_norm_tensors(taps)
    return dict(zip(scalars, read(scalars.values()), strict=True))


def read(scalars: Iterable[Tensor]) -> list[float]:
    """The numbers in one-dimensional or scalar tensors, one after the other, by one copy."""
    flat = [s.detach().reshape(-1) for s in scalars]
    if not flat:
        return []
    return torch.cat([s.to(flat[0].device) for s in flat]).tolist()


def trunk_among(output: Any, total: int, tap: LayerTap) -> Tensor | None:
    """The output of a block, or the last of several, that has the trunk's number of tokens: blocks
    with a text stream return (text, image), others (trunk, weights). None where the block changed
    that number, or returned something else."""
    outputs = (output,) if isinstance(output, Tensor) else output
    trunks = [tap.oriented(o) for o in outputs if isinstance(o, Tensor) and o.dim() == 3]
    return next((x for x in reversed(trunks) if x.shape[1] == total), None)


def segments_among(args: Any, kwargs: Any, tap: LayerTap) -> Segments:
    """The segments that a block is given, else one over all tokens of its first tensor."""
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, Segments)]
    return given[0] if given else Segments.whole(tap.oriented(first_tensor(args, kwargs)))


def first_tensor(args: Any, kwargs: dict[str, Any]) -> Tensor:
    found = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if found is None:
        raise UserError(
            "a watched block is called without a tensor; name blocks that take the trunk [B, T, D] "
            "by TapNames(blocks=…)"
        )
    return found
