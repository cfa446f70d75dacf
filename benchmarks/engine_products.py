"""Claim: the engine's products in CUDA C++, with what follows them fused in, take little longer on
a Hopper GPU than cuBLAS takes for the product alone, and its attention less than cuDNN's.

Gate: each agrees with an fp32 computation of the same inputs as closely as bf16 can (twice the
error of rounding the fp32 result), masked text too. Every variant runs in a process that is ended
when it hangs; the next ones go on in another.

    python benchmarks/engine_products.py [--seconds 60] [--json FILE]
    python benchmarks/engine_products.py --table FILE    # of docs/sampling.md

Cost: about half a minute on one H200; another Hopper GPU will do.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvsplit.kernels import Gains, Segments, forced_backend, qk_norm_rope, split_merge, swiglu
from mvsplit.kernels.choices import cache_folder
from mvsplit.kernels.fused.stream import Stream
from mvsplit.kernels.hopper import attention, product
from mvsplit.kernels.hopper.attention import Heads
from mvsplit.kernels.hopper.driver import check_waits
from mvsplit.kernels.hopper.product import Cut
from mvsplit.models.rope import rope_tables
from mvsplit.sampling.engine_tune import graph_time

WIDTH, HEADS, IMAGE, TEXT, LAYERS = 1024, 8, 256, 32, 12
TOKENS, SIDE = IMAGE + TEXT, 16
COLUMNS = {"qkv": 3072, "swiglu": 6144, "write": 1024, "part": 1024, "attention": 1024}
KINDS = {
    "qkv": product.QKV,
    "swiglu": product.SWIGLU,
    "write": product.WRITE,
    "part": product.PART,
}
ALLOWED = 2.0  # times the error of rounding the truth to bf16
SILENCE = 20.0  # seconds after which a variant hangs

# kind, samples, depth, then tokens, products along them, warpgroups, stages, parts along
# K; of attention, the warpgroups
VARIANTS: list[tuple[str, int, int, tuple[int, ...]]] = [
    *(("attention", 16, 3072, cut) for cut in ((2,), (3,))),
    *(("attention", 2, 3072, cut) for cut in ((1,),)),
    *(("qkv", 16, 1024, cut) for cut in ((288, 2, 2, 4),)),
    *(("swiglu", 16, 1024, cut) for cut in ((288, 2, 2, 4), (192, 1, 3, 4))),
    *(("write", 16, 3072, cut) for cut in ((288, 2, 2, 4),)),
    *(("write", 16, 1024, cut) for cut in ((288, 2, 2, 4),)),
    *(("swiglu", 2, 1024, cut) for cut in ((144, 1, 3, 4), (288, 2, 2, 4))),
    *(("part", 2, 3072, cut) for cut in ((144, 1, 2, 4, 4), (96, 1, 2, 5, 2))),
    *(("part", 2, 1024, cut) for cut in ((144, 1, 2, 4, 4), (96, 1, 2, 5, 2))),
    *(("qkv", 2, 1024, cut) for cut in ((144, 1, 2, 4), (288, 2, 2, 4))),
    *(("part", 2, 3072, cut) for cut in ((144, 1, 2, 4, 3), (144, 1, 1, 4, 2), (288, 2, 1, 4, 4))),
    *(("part", 2, 1024, cut) for cut in ((144, 1, 2, 4, 2), (144, 1, 1, 4, 2), (288, 2, 1, 4, 4))),
]


class Case:
    """Inputs of a variant, its kernel and its truth."""

    def __init__(self, kind: str, samples: int, depth: int, cut: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.kind, self.stream = kind, Stream(samples, IMAGE, TEXT)
        self.cut: Cut | Heads = Heads(*cut) if kind == "attention" else Cut(*cut)
        rows, columns = samples * TOKENS, COLUMNS[kind]
        self.a = self._draw(rows, depth)
        self.weights = [self._draw(columns, depth) / depth**0.5 for _ in range(LAYERS)]
        self.x = self._draw(rows, WIDTH)
        outputs = columns // 2 if kind == "swiglu" else columns
        self.out = torch.full((rows, outputs), torch.nan, device="cuda", dtype=torch.bfloat16)
        self.cos, self.sin = rope_tables(SIDE, SIDE, TEXT, 128, 10000.0, self.a.device)
        self.turn = product.rotation(self.cos, self.sin, IMAGE, SIDE)
        heads = self.a.unflatten(0, (samples, TOKENS)).unflatten(-1, (-1, 128)).transpose(1, 2)
        if kind == "attention":  # on the packed rows, normalised as QK-norm does
            heads[:, : 2 * HEADS] = functional.rms_norm(
                heads[:, : 2 * HEADS].float(), (128,)
            ).bfloat16()
            self.q, self.k, self.v = heads.split(HEADS, 1)
        self.gains = Gains(*(self._draw(WIDTH) for _ in range(2)))
        self.place = product.meeting(self.stream, WIDTH, self.a.device)
        self.sums = torch.full((samples, 2, WIDTH), torch.nan, device="cuda")
        counts = [(7 * i + 5) % (TEXT + 1) for i in range(samples)]
        self.valid = torch.tensor(counts, device="cuda", dtype=torch.int32)
        if kind == "part":
            self.parts = product.part_buffers(self.stream, columns, self.cut, self.a.device)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").bfloat16()

    def run(self, weight: Tensor, cut: Any, valid: Tensor | None = None) -> None:
        a, stream = self.a, self.stream
        if self.kind == "attention":
            sums = self.sums if len(a) <= 2048 else None
            attention.attention(self.q, self.k, self.v, self.out, valid, self.x, sums, stream, cut)
        elif self.kind == "part":
            product.part(a, weight, *self.parts, valid, stream, cut)
        elif self.kind == "qkv":
            product.qkv(a, weight, self.turn, self.out, stream, HEADS, HEADS, 1e-6, cut)
        elif self.kind == "swiglu":  # with few rows the sums of A are taken along
            sums = self.sums if len(a) <= 2048 else None
            product.swiglu(a, weight, self.out, sums, valid, stream, cut)
        else:
            product.write(
                a, weight, self.x, self.out, self.gains, valid, stream, 1e-5, self.place, cut
            )

    def truths(self, valid: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """What was written, and what should have been, in fp32."""
        if self.kind == "attention":
            yield from self._attended(valid)
            return
        f = self.a.float() @ self.weights[0].float().T
        by_sample = f.unflatten(0, (-1, TOKENS))
        segments = self.stream.segments(valid, f.device)
        real = torch.ones(f.shape[:1], dtype=torch.bool, device="cuda")
        if segments.mask is not None:
            real = segments.mask.flatten()
        if self.kind == "qkv":
            q, k, v = qk_norm_rope(by_sample, self.cos, self.sin, HEADS, HEADS, 1e-6)
            yield (
                self.out,
                torch.cat([t.transpose(1, 2).flatten(-2) for t in (q, k, v)], -1).flatten(0, 1),
            )
        elif self.kind == "swiglu":
            yield self.out, swiglu(f)
            if len(f) <= 2048:
                yield self.sums, self._by_segment(self.a.float(), real)
        elif self.kind == "part":
            yield self.parts[0].sum(0), f
            yield self.parts[1].sum((0, 2)), self._by_segment(f, real)
        else:
            gains = Gains(*(g.float() for g in self.gains[:2]))
            x = self.x.float().unflatten(0, (-1, TOKENS))
            segments = Segments((IMAGE, TEXT)) if valid is None else segments
            yield self.out, split_merge(x, by_sample, *gains, segments, 1e-5).flatten(0, 1)

    def _by_segment(self, rows: Tensor, real: Tensor) -> Tensor:
        rows = torch.where(real[:, None], rows, 0).unflatten(0, (-1, TOKENS))
        return torch.stack([rows[:, :IMAGE].sum(1), rows[:, IMAGE:].sum(1)], 1)

    def _attended(self, valid: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        mask = self.stream.segments(valid, self.a.device).mask
        keys = None if mask is None else mask[:, None, None, :]
        q, k, v = (t.float() for t in (self.q, self.k, self.v))
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        yield self.out, out.transpose(1, 2).flatten(-2).flatten(0, 1)
        if len(self.a) <= 2048:
            every = torch.ones(len(self.a), dtype=torch.bool, device="cuda")
            real = every if mask is None else mask.flatten()
            yield self.sums, self._by_segment(self.x.float(), real)

    def library(self, weight: Tensor) -> object:
        """cuBLAS or cuDNN for the same, alone."""
        if self.kind == "attention":
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return functional.scaled_dot_product_attention(self.q, self.k, self.v)
        return functional.linear(self.a, weight)


def relative(actual: Tensor, truth: Tensor) -> float:
    value = ((actual.float() - truth).norm() / truth.norm()).item()
    return float("inf") if value != value else value


def measure(kind: str, samples: int, depth: int, cut: tuple[int, ...]) -> dict[str, Any]:
    case, row = Case(kind, samples, depth, cut), {"kind": kind, "rows": samples * TOKENS}
    row |= {"depth": depth, "cut": cut}
    if kind in KINDS and not product.suits(case.cut, KINDS[kind], case.stream, case.weights[0]):
        return {**row, "failed": "does not suit"}
    for name, valid in (("errors", None), ("errors_masked", case.valid)):
        case.run(case.weights[0], case.cut, valid)
        torch.cuda.synchronize()
        check_waits()
        with forced_backend("reference"):
            pairs = list(case.truths(valid))
        row[name] = [relative(a, t) for a, t in pairs]
        rounding = relative(pairs[0][1].bfloat16(), pairs[0][1])
        if not all(error <= ALLOWED * rounding for error in row[name]):
            return {**row, "failed": f"{name} {row[name]}, rounding alone {rounding:.2e}"}

    def micro(run: Callable[[Tensor], object]) -> float:
        return round(
            graph_time(lambda: [run(w) for w in case.weights] and None, 15) / LAYERS * 1e6, 2
        )

    early = case.cut.with_pdl(True)
    row["us"] = micro(lambda w: case.run(w, case.cut))
    row["us_early"] = micro(lambda w: case.run(w, early))
    row["cublas_us"] = micro(case.library)
    flops = 2 * samples * TOKENS * COLUMNS[kind] * depth
    if kind == "attention":
        flops = 4 * samples * HEADS * TOKENS * TOKENS * 128
    row["tflops"] = round(flops / row["us_early"] / 1e6, 1)
    return row


def worker(first: int) -> None:
    """Measures the variants from `first` on; a line in JSON for each."""

    def build(variant: tuple[str, int, int, tuple[int, ...]]) -> None:
        kind, _, depth, cut = variant
        if kind == "attention":
            texts = [attention.source(Heads(*cut), TOKENS, masked) for masked in (False, True)]
        else:
            image, side = IMAGE if kind == "write" else 0, SIDE if kind == "qkv" else 1
            given = (Cut(*cut), KINDS[kind], depth, image, torch.bfloat16, side)
            texts = [product.source(*given)]
        for text in texts:
            product.compiled(text, cache_folder() / "cuda")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(build, VARIANTS[first:]))
    for i, variant in enumerate(VARIANTS[first:], first):
        print(f"START {i}", flush=True)
        print("ROW " + json.dumps(measure(*variant)), flush=True)


def guarded(first: int, until: float, rows: list[dict[str, Any]]) -> int:
    """Runs a worker; returns the variant at which it ended."""
    command = [sys.executable, "-u", __file__, "--worker", str(first)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    at, heard = first - 1, time.perf_counter()

    def listen() -> None:
        nonlocal at, heard
        assert child.stdout is not None
        for line in child.stdout:
            heard = time.perf_counter()
            if line.startswith("START"):
                at = int(line.split()[1])
            elif line.startswith("ROW"):
                rows.append(json.loads(line[4:]))
                print(line[4:], end="", flush=True)

    listener = threading.Thread(target=listen)
    listener.start()
    while child.poll() is None:
        time.sleep(0.1)
        now = time.perf_counter()
        if now - heard > SILENCE or now > until:
            child.kill()
    listener.join()
    if child.returncode and time.perf_counter() < until and at >= first:
        rows.append(
            {"variant": VARIANTS[at], "failed": f"the process ended with {child.returncode}"}
        )
        print(json.dumps(rows[-1]), flush=True)
    return at if child.returncode else len(VARIANTS)


NAMES = {
    ("qkv", 1024): "qkv, rotation, QK-norm",
    ("attention", 3072): "attention",
    ("write", 1024): "W_O and the merge",
    ("part", 1024): "W_O in parts along K",
    ("swiglu", 1024): "w13 and SwiGLU",
    ("write", 3072): "W_2 and the merge",
    ("part", 3072): "W_2 in parts along K",
}


def table(rows: list[dict[str, Any]]) -> str:
    """The fastest cut of each product as a table in Markdown."""
    lines = [
        "| | rows | cut | µs | TFLOP/s | cuBLAS or cuDNN, without what is fused, µs |",
        "|---|---|---|---|---|---|",
    ]
    for count in sorted({row["rows"] for row in rows}, reverse=True):
        for (kind, depth), name in NAMES.items():
            here = [r for r in rows if (r["kind"], r["rows"], r["depth"]) == (kind, count, depth)]
            if here:
                best = min(here, key=lambda r: r["us_early"])
                cut = ", ".join(str(int(n)) for n in best["cut"])
                figures = (f"{best[k]:.1f}" for k in ("us_early", "tflops", "cublas_us"))
                lines.append(f"| {' | '.join((name, str(count), cut, *figures))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        rows = json.loads(args.table.read_text())["rows"]
        print(table([row for row in rows if "us" in row]))
        return
    if args.worker is not None:
        worker(args.worker)
        return
    rows: list[dict[str, Any]] = []
    until, first = time.perf_counter() + args.seconds, 0
    while first < len(VARIANTS) and time.perf_counter() < until:
        first = guarded(first, until, rows) + 1
    if args.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if any("failed" in row for row in rows) or len(rows) < len(VARIANTS):
        sys.exit(
            f"{len(rows)} of {len(VARIANTS)} variants, failed: {[r for r in rows if 'failed' in r]}"
        )


if __name__ == "__main__":
    main()
