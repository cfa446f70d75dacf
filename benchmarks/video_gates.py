"""Gates of benchmarks/video.py: the network on clips on this device is the one of the formulas."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from mvsplit.kernels import Segments, reference, split_merge
from mvsplit.models import DiT, DiTConfig

FRAMES = 32


def gates(device: str) -> dict[str, Any]:
    """Largest relative differences; raises SystemExit where one is too large."""
    found = {
        "merge with a mean per frame, fp32 against fp64": _merge(device),
        **{f"velocity, mean={mean}, fp32 against fp64": _velocity(device, mean) for mean in MEANS},
        "a clip of one frame against a picture": _one_frame(device),
    }
    limits = dict.fromkeys(found, 2e-5) | {"a clip of one frame against a picture": 0.0}
    for name, value in found.items():
        print(f"gate: {name}: {value:.2g}", flush=True)
        if not value <= limits[name]:
            raise SystemExit(f"gate failed: {name}: {value:.3g} > {limits[name]:g}")
    return found


MEANS = ("clip", "frame", "sequence")


def _difference(ours: Tensor, exact: Tensor) -> float:
    exact = exact.detach()
    return float((ours.detach().double().cpu() - exact).norm() / exact.norm())


def _merge(device: str) -> float:
    """Forward and backward of the op with 33 segments and padding."""
    lengths = (16,) * FRAMES + (11,)
    valid = torch.full((3, len(lengths)), 16)
    valid[:, -1] = torch.tensor([11, 4, 1])
    make = torch.Generator().manual_seed(0)
    total = sum(lengths)
    x, f, up = (torch.randn(3, total, 128, generator=make, dtype=torch.float64) for _ in range(3))
    gains = [torch.rand(128, generator=make, dtype=torch.float64) for _ in range(2)]

    def run(op: Any, dtype: torch.dtype, where: str) -> list[Tensor]:
        leaves = [t.detach().to(where, dtype).requires_grad_() for t in (x, f, *gains)]
        y = op(*leaves, None, Segments(lengths, valid.to(where)))
        return [y, *torch.autograd.grad(y, leaves, up.to(where, dtype))]

    ours = run(split_merge, torch.float32, device)
    exact = run(reference.split_merge, torch.float64, "cpu")
    return max(_difference(a, b) for a, b in zip(ours, exact, strict=True))


def _network(**changes: Any) -> DiT:
    sizes: dict[str, Any] = {"depth": 3, "width": 64, "heads": 2, "ffn_width": 96, "channels": 3}
    config = DiTConfig(**sizes, text_width=24, patch=4, writers="standard", **changes)
    model = DiT(config, torch.Generator().manual_seed(0))
    for name, gain in model.named_parameters():
        if name.endswith("alpha"):
            gain.data.fill_(0.3)
    return model.requires_grad_(False)


def _inputs(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, frames, 16, 16, generator=make)
    return latents, torch.randn(2, 7, 24, generator=make), torch.tensor([7, 3])


def _velocity(device: str, mean: str) -> float:
    model = _network(mean=mean)
    latents, text, valid = _inputs(8)
    exact = copy.deepcopy(model).double()(latents.double(), text.double(), valid)
    ours = model.to(device)(latents.to(device), text.to(device), valid.to(device))
    return _difference(ours, exact)


def _one_frame(device: str) -> float:
    """The largest difference in any bit, as a number."""
    latents, text, valid = (t.to(device) for t in _inputs(1))
    model = _network().to(device)
    as_clip, as_picture = (model(z, text, valid) for z in (latents, latents[:, :, 0]))
    return float((as_clip[:, :, 0] - as_picture).abs().max())
