"""Where a non-finite value came from: the message that stops a run names a layer and a family."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mvsplit.errors import UserError
from mvsplit.models import DiT
from mvsplit.training.spread import whole

_FAMILIES = (
    (r"(patch_in|text_in)\.", "Embed"),
    (r"blocks\.\d+\.attention\.proj\.", "Attn_WO"),
    (r"blocks\.\d+\.ffn\.w13\.", "FFN_W13"),
    (r"blocks\.\d+\.ffn\.w2\.", "FFN_W2"),
    (r"blocks\.\d+\.rule_\w+\.", "gains"),
    (r"head\.", "Final"),
)


class NonFiniteError(UserError):
    """A loss or gradient was NaN or infinite; the update was not made."""


def families(model: DiT, name: str, value: Tensor, rows: int) -> dict[str, Tensor]:
    """`value` by family (paper App. F): packed queries, keys and values are taken apart.

    Args:
        name: the name of a parameter, or of a module and a dot. The matrix B of an adapter counts
            to the family of the map that it belongs to, A is one of its own.
        value: a parameter, its gradient, or the module's output.
        rows: the axis of `value` along which the output features lie.
    """
    if ".lora_A." in name:
        return {"LoRA_A": value}
    if re.match(r"blocks\.\d+\.attention\.qkv\.", name):
        config = model.config
        sizes = [n * config.head_width for n in (config.heads, config.groups, config.groups)]
        return dict(zip("QKV", value.split(sizes, dim=rows), strict=True))
    for pattern, family in _FAMILIES:
        if re.match(pattern, name):
            return {family: value}
    raise KeyError(f"{name} belongs to no family")


def first_in_weights(model: DiT) -> str | None:
    """The first parameter, in order of depth, that is not finite."""
    return _first(model, [(n, p) for n, p in model.named_parameters()])


def first_in_gradients(model: DiT) -> str | None:
    """The non-finite gradient that backward reached first: the deepest."""
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    return _first(model, sorted(named, key=lambda item: -_depth(model, item[0])))


def first_in_activations(model: DiT, forward: Callable[[], Any]) -> str | None:
    """Runs `forward` again and names the first linear map whose output is not finite."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if not found and (place := _first(model, [(f"{name}.", output)], rows=-1)):
            found.append(place)

    with ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                handle = module.register_forward_hook(partial(look, name))
                stack.callback(handle.remove)
        forward()
    return found[0] if found else None


def _first(model: DiT, named: list[tuple[str, Tensor]], rows: int = 0) -> str | None:
    for name, value in named:
        value = whole(value)
        if not bool(torch.isfinite(value).all()):
            for family, part in families(model, name, value, rows).items():
                if not bool(torch.isfinite(part).all()):
                    return _place(name, family)
    return None


def _place(name: str, family: str) -> str:
    layer = re.match(r"blocks\.(\d+)\.", name)
    return f"{family} of layer {layer[1]}" if layer else family


def _depth(model: DiT, name: str) -> float:
    layer = re.match(r"blocks\.(\d+)\.(attention|rule_attention)?", name)
    if layer:
        return int(layer[1]) + (0.0 if layer[2] else 0.5)
    return model.config.depth if name.startswith("head.") else -1
