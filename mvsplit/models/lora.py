"""Low-rank adapters: W stays as it is, and a product of two thin matrices learns beside it.

y = Wx + (α/r)·B(Ax) with A [r, E], B [D, r]; A starts as PyTorch's own Linear does and B at zero,
so that at first nothing changes. Source: Hu et al., LoRA (arXiv 2106.09685), Eq. 3.

W keeps its name; the new parameters are `….lora_A.weight` and `….lora_B.weight`, which with the
prefix `base_model.model.` are the names in a file of the peft library.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvsplit.errors import UserError, nearest
from mvsplit.models.dit import DiT


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The shape of an adapter.

    Attributes:
        rank: r.
        alpha: α; the adapter is scaled by α/r.
        targets: the linear maps that get one, by the last part of their names.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("qkv", "proj", "w13", "w2")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank}: must be at least 1, for example 8")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha={self.alpha}: must be greater than 0, for example 16")
        if not self.targets:
            raise UserError("lora.targets: name at least one, for example qkv")


class LoRALinear(nn.Linear):
    """A linear map, whose weight it shares, with an adapter in fp32.

    Attributes:
        enabled: whether the adapter is added.
    """

    def __init__(
        self, base: nn.Linear, config: LoRAConfig, generator: torch.Generator | None = None
    ) -> None:
        size = {"in_features": base.in_features, "out_features": base.out_features}
        super().__init__(**size, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        like = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.utils.skip_init(nn.Linear, base.in_features, config.rank, **like)
        self.lora_B = nn.utils.skip_init(nn.Linear, config.rank, base.out_features, **like)
        bound = base.in_features**-0.5
        nn.init.uniform_(self.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B.weight)
        self.scale = config.alpha / config.rank
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """[…, E] → […, D]."""
        y = super().forward(x)
        return y + self.scale * self.lora_B(self.lora_A(x)) if self.enabled else y

    def merged(self) -> nn.Linear:
        """One linear map that does the same: W + (α/r)·BA."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta", bias=False)
        product = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        weight = (self.weight + product).to(self.weight.dtype).detach()
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear


def add_lora(
    model: DiT,
    config: LoRAConfig,
    *,
    only: Collection[str] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Gives linear maps an adapter, in place.

    Args:
        only: names of maps; None for all that `config.targets` names.
        generator: source of A; the default generator if None.

    Returns:
        The names of the maps.

    Raises:
        UserError: a target that no linear map of the model has.
    """
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    ends = {name.rpartition(".")[2] for name in linears}
    for target in config.targets:
        if target not in ends:
            raise UserError(
                f"lora.targets: no linear map is named {target!r}; {nearest(target, ends)}"
            )
    names = [n for n in linears if n.rpartition(".")[2] in config.targets]
    names = [n for n in names if only is None or n in only]
    for name in names:
        _put(model, name, LoRALinear(linears[name], config, generator))
    return names


def merge_lora(model: DiT) -> None:
    """Turns every map with an adapter into one without, which does the same, in place."""
    for name, module in _adapted(model):
        _put(model, name, module.merged())


def lora_parameters(model: DiT) -> dict[str, nn.Parameter]:
    """The parameters of all adapters by name."""
    return {n: p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}


@contextmanager
def without_lora(model: DiT) -> Iterator[None]:
    """The network as it was before: what a frozen reference needs, without a second copy."""
    modules = [module for _, module in _adapted(model)]
    before = [module.enabled for module in modules]
    try:
        for module in modules:
            module.enabled = False
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and values in fp32 of all parameters but those of adapters: the
    same for the same weights, in whichever file or half precision they were stored."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name:
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            values = parameter.detach().to("cpu", torch.float32).contiguous()
            digest.update(values.numpy().data)
    return digest.hexdigest()


def _adapted(model: DiT) -> list[tuple[str, LoRALinear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
