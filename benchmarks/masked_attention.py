"""Claim: text that is padded and masked costs attention at most a tenth more than text that is not.

Gate: output and gradients of every way against attention in fp64 over the real keys alone. Then
forward and backward of attention as the network calls it, in a CUDA graph over inputs that exceed
the L2 cache: without a mask, with one in every way that PyTorch has, and in those of
`mvsplit.kernels.masked_attention`. Samples have 256 image tokens and 1 … 64 or 1 … 256 real text
tokens. The gate is repeated with queries and keys that point away from each other, where leaving
out zero keys has least precision.

    python benchmarks/masked_attention.py [--ways NAME…] [--json FILE]

Cost: half a minute on one H200.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fused_ops import graph_ms
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mvsplit.kernels import Segments
from mvsplit.kernels.attention import Way, attend, attention_backend, ways
from mvsplit.kernels.masked_attention import _InSequences, _packed

HEADS, HEAD = 8, 128
SHAPES = (
    (26, 256, 64),
    (64, 256, 64),
    (26, 256, 256),
    (64, 256, 256),
    (29, 256, 32),
    (16, 256, 32),
)
TOLERANCE = 1.2e-2  # bf16 rounds what softmax weighs with, and gradients twice
SETS = 4


def padded(shape: tuple[int, int, int], device: str) -> Segments:
    batch, image, text = shape
    generator = torch.Generator(device).manual_seed(batch + text)
    valid = torch.randint(1, text + 1, (batch,), generator=generator, device=device)
    return Segments.image_and_text(image, text, valid)


def inputs(segments: Segments, away: float, seed: int, device: str, batch: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, token-major in memory as in the network: rows of
    padding are zero, heads of q and k have RMS 1. `away`: how far the mean of the keys points away
    from that of the queries, from 0 to 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    mean = draw(HEADS, HEAD)
    size = (batch, segments.total, HEADS, HEAD)
    q, k, v, grad = (draw(*size) for _ in range(4))
    q, k = away * mean + (1 - away) * q, -away * mean + (1 - away) * k
    q, k = (t * torch.rsqrt(t.square().mean(-1, keepdim=True)) for t in (q, k))
    if segments.mask is not None:
        q, k, v, grad = (t * segments.mask[..., None, None] for t in (q, k, v, grad))
    return [t.bfloat16().transpose(1, 2) for t in (q, k, v, grad)]


def forward_backward(way: Way, given: list[Tensor], segments: Segments) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in given[:3]]
    out = way(*leaves, segments)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def truth(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(QKᵀ/√K)V over the real keys, as it is written."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if segments.mask is not None:
        scores = scores.masked_fill(~segments.mask[:, None, None, :], -torch.inf)
    return torch.softmax(scores, -1) @ v


def error(way: Way, given: list[Tensor], segments: Segments) -> float:
    """The largest ‖found − fp64‖/‖fp64‖ of the output and the three gradients, over real tokens."""
    found = forward_backward(way, given, segments)
    wanted = forward_backward(truth, [t.double() for t in given], segments)
    real = slice(None) if segments.mask is None else segments.mask
    pairs = [(f.transpose(1, 2)[real].double(), w.transpose(1, 2)[real]) for f, w in zip(
        found, wanted, strict=True)]  # fmt: skip
    errors = [float((f - w).norm() / w.norm()) for f, w in pairs]
    return max(float("inf") if e != e else e for e in errors)


# Ways that are measured beside those of the library


def square_mask(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: Any) -> Tensor:
    """A mask with a row for each query, all of them equal."""
    row = segments.key_bias(q)
    assert row is not None
    with torch.nn.attention.sdpa_kernel(backend):
        mask = row.expand(-1, -1, q.shape[2], -1).contiguous()
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def packed(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, at: Tensor, bounds: Tensor
) -> Tensor:
    """Real tokens gathered into one row, attention there, and scattered back."""
    rows = [_packed(t).index_select(0, at).unsqueeze(0).transpose(1, 2) for t in (q, k, v)]
    out = _InSequences.apply(*rows, bounds, segments.total)
    spread = torch.zeros_like(_packed(q)).index_copy(0, at, _packed(out))
    return spread.unflatten(0, (len(q), -1)).transpose(1, 2)


def others(segments: Segments) -> dict[str, Way]:
    assert segments.mask is not None
    kinds = torch.nn.attention.SDPBackend
    at = segments.mask.flatten().nonzero().flatten()
    lengths = segments.mask.sum(1, dtype=torch.int32)
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return {
        "cudnn, square mask": partial(square_mask, backend=kinds.CUDNN_ATTENTION),
        "flash, packed": partial(packed, at=at, bounds=bounds),
    }


# Time


def time_way(way: Way, segments: Segments, batch: int) -> list[float]:
    """µs (forward, forward and backward)."""
    sets = [inputs(segments, 0.0, seed, "cuda", batch) for seed in range(SETS)]
    leaves = [[t.requires_grad_() for t in given[:3]] for given in sets]

    def both(i: int) -> object:
        out = way(*leaves[i], segments)
        return out, torch.autograd.grad(out, leaves[i], sets[i][3])

    forward = graph_ms(lambda i: way(*leaves[i], segments), SETS)
    return [1e3 * forward, 1e3 * graph_ms(both, SETS)]


def measure(shape: tuple[int, int, int], only: list[str] | None) -> dict[str, Any]:
    batch, image, text = shape
    whole, masked = Segments((image, text)), padded(shape, "cuda")
    unmasked = {f"{name}, no mask": (way, whole) for name, way in ways(whole).items()}
    there = {f"{n}, mask" if n in ways(whole) else n: w for n, w in ways(masked, True).items()}
    tried = unmasked | {name: (way, masked) for name, way in (there | others(masked)).items()}
    rows: dict[str, Any] = {}
    for name, (way, segments) in tried.items():
        if name.startswith("math") or (only and name not in only):
            continue
        try:
            errors = [error(way, inputs(segments, a, 9, "cuda", batch), segments)
                      for a in (0.0, 0.6, 0.9)]  # fmt: skip
            us = time_way(way, segments, batch)
        except RuntimeError as refused:  # a way that does not take such inputs
            rows[name] = {"refused": str(refused).partition("\n")[0][:200]}
        else:
            rows[name] = {"error": errors[0], "error_away": errors[1:], "us": us}
        print(shape, name, rows[name], flush=True)
        torch.cuda.synchronize()
    best = min(rows[name]["us"][1] for name in unmasked if "us" in rows.get(name, {}))
    unmasked_away = rows["cudnn, no mask"]["error_away"]
    for row in rows.values():
        if "us" in row:
            row["over_unmasked"] = row["us"][1] / best - 1
            away = zip(row["error_away"], unmasked_away, strict=True)
            row["passed"] = row["error"] < TOLERANCE and all(e < 1.5 * m for e, m in away)
    q, k, v, _ = inputs(masked, 0.0, 0, "cuda", batch)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    attend(*leaves, masked, zero_padding=True)
    chosen = attention_backend(leaves[0], leaves[1], masked, zero_padding=True)
    real = int(masked.mask.sum()) / masked.mask.numel() if masked.mask is not None else 1.0
    return {"shape": shape, "real_tokens": real, "chosen": chosen, "best_unmasked_us": best,
            "ways": rows}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ways", nargs="*", help="only these, by the names of the result")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default one
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "rows": [],
    }
    for shape in SHAPES:
        row = measure(shape, args.ways)
        result["rows"].append(row)
        chosen = row["ways"].get(row["chosen"]) or row["ways"].get(f"{row['chosen']}, mask", {})
        print(f"{shape}: {row['chosen']}: {chosen.get('over_unmasked', float('nan')):+.1%}")
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [(r["shape"], n) for r in result["rows"] for n, w in r["ways"].items()
             if w.get("passed") is False]  # fmt: skip
    if wrong:
        raise SystemExit(f"the gate failed: {wrong}")


if __name__ == "__main__":
    main()
