"""The kernel times of `mvsplit plan` are those of the results, and of the kernels that serve."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import TrainConfig
from mvsplit.training.gpus import GPUS
from mvsplit.training.kernel_times import (
    APART,
    COLUMNS,
    COPY,
    FEWEST_ROWS,
    HEAD,
    KERNELS,
    MOST_TOKENS,
    TOKENS,
    WIDTHS,
    own_attention,
    served,
)
from mvsplit.training.step_time import Shape, left_seconds, step_time
from tests.training import measured

FFN_FORWARD, FFN_BACKWARD = ("swiglu", "forward"), ("swiglu", "backward")
FORWARD, BACKWARD = ("rotation", "forward"), ("rotation", "backward")
FFN = {FFN_FORWARD, FFN_BACKWARD}
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LOW = TrainConfig(steps=1, batch_size=1, precision="bf16", weights="bf16", ema_decay=0.0)


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def elements(width: int, tokens: int, gpu: str = "h200", config: TrainConfig = LOW) -> float:
    """Seconds of a block's element-wise kernels."""
    model = DiTConfig(
        depth=1, width=width, heads=8, ffn_width=3 * width, channels=32, text_width=1024,
        rule=RuleConfig(name="mvsplit"),
    )  # fmt: skip
    shape = Shape(samples=1, length=tokens, pieces=1)
    time = step_time(model, config, shape, ["nothing"], GPUS[gpu], kernels=APART)
    return time.parts["element-wise kernels"]


def test_constants_of_kernels_of_their_own_are_those_of_the_results() -> None:
    """Merges by `fused_ops`; two launches, and what is small together, by profiles of a block."""
    late = result("fused_ops_h200_2026-11-29_late_merge.json")["rows"]
    left_out = [16, 1024, 256], [16, 256, 32]  # of long segments; in clusters
    bench = {
        row["shape"][0] * sum(row["shape"][1:]): row["ms"]["ours"]
        for row in late
        if row["shape"] not in left_out
    }
    rows = result("step_classes_h200_2026-11-29_late.json")["rows"]
    for n, name in ((4608, "16 × (256+32 masked), packed"),
                    (8191, "26 × (256+64), nothing, merge without clusters")):  # fmt: skip
        each = rows[name]["by_kernel_us"]
        bench[n] = [
            sum(us for kernel, us in each.items() if f"split_merge_{way}" in kernel) / 2e3
            for way in ("fwd", "bwd")
        ]
    assert {n for n, *_ in APART.merge} == set(bench)
    for n, *seconds in APART.merge:
        assert seconds == pytest.approx([1e-3 * ms for ms in bench[n]], rel=0.01)
    row = rows["26 × (256+64), nothing"]
    kinds = row["by_kind_us"]
    waits = sum(us for kernel, us in row["by_kernel_us"].items() if "split_merge_gains" in kernel)
    small = sum(kinds.values()) - kinds["matrix products"] - kinds["attention"] - waits
    assert elements(1024, 8320) == pytest.approx(1e-6 * small, rel=0.03)


def test_clusters_are_planned_where_they_serve() -> None:
    """As many numbers in another width, in fp32 or on another GPU are merged by other kernels."""
    gain = 2 * sum(b - a for a, b in ((21.6e-6, 32.7e-6), (31.2e-6, 49.7e-6)))
    assert elements(512, 2 * 8320) - elements(1024, 8320) == pytest.approx(gain, rel=0.03)
    a100 = elements(1024, 8320, "a100") * GPUS["a100"].copy / GPUS["h200"].copy
    assert a100 == pytest.approx(elements(512, 2 * 8320))
    fp32 = elements(1024, 8320, config=replace(LOW, precision="fp32", weights="fp32"))
    assert fp32 == pytest.approx(2 * elements(512, 2 * 8320))


def network(heads: int = 8, hidden: int = 3072) -> DiTConfig:
    return replace(measured.network(1), heads=heads, ffn_width=hidden)


SIZES = 4608, 8320
LONG, SHORT = "26 × (256+64), nothing", "16 × (256+32 masked), packed"


def left_of_products(kind: tuple[str, str], n: int) -> tuple[float, float, float]:
    """µs that the best form takes beyond the library's product alone, and least and most of it by
    the repetitions of both."""
    name = {FFN_FORWARD: "up", FFN_BACKWARD: "down", FORWARD: "heads"}[kind]
    rows = [r for r in result("ffn_products_h200_2026-11-30T1341.json")["rows"] if "us" in r]
    ways = {r["way"]: r for r in rows if (r["product"], r["rows"]) == (name, n)}
    alone = ways.pop("library, the product alone")
    best = min((r for way, r in ways.items() if way != "library"), key=lambda r: r["us"])
    ends = [(min(r["all_us"]), max(r["all_us"])) for r in (best, alone)]
    return best["us"] - alone["us"], ends[0][0] - ends[1][1], ends[0][1] - ends[1][0]


def profile(time: str, name: str) -> dict[str, float]:
    return result(f"step_classes_h200_2026-11-30T{time}.json")["rows"][name]["by_kernel_us"]


def us(kind: tuple[str, str], n: int) -> float:
    return 1e6 * left_seconds(KERNELS.fused[kind], n)


@pytest.mark.parametrize("kind", [FFN_FORWARD, FFN_BACKWARD, FORWARD])
@pytest.mark.parametrize("n", SIZES)
def test_what_is_left_in_products_is_what_was_measured(kind, n) -> None:
    """To the decimal that is written down; less than nothing as nothing."""
    if n < FEWEST_ROWS[kind[0]]:
        assert n not in dict(KERNELS.fused[kind])  # libraries serve
        return
    found, least, most = left_of_products(kind, n)
    assert us(kind, n) == pytest.approx(max(0.0, found), abs=0.06)
    assert least <= us(kind, n) <= most
    own, slower = KERNELS.passes[kind[0]][kind[1]]
    width = 3072 if kind[0] == "swiglu" else 1024
    assert us(kind, n) < 1e6 * own * slower * 2 * n * width / COPY


def test_what_is_left_is_not_in_proportion_to_tokens() -> None:
    """Else one number of passes would do: it would be outside what repetitions of the other size
    allow."""
    few, many = SIZES
    _, least, _ = left_of_products(FFN_BACKWARD, few)
    assert us(FFN_BACKWARD, many) * few / many < least
    between = us(FFN_BACKWARD, (few + many) // 2)
    assert between == pytest.approx((us(FFN_BACKWARD, few) + us(FFN_BACKWARD, many)) / 2)


def test_what_is_left_in_gradients_of_attention_is_what_was_measured() -> None:
    """At 8,320 tokens of one run; at 4,608 of two, in which kernels of both differ by up to 6 %."""
    name = "attention_backward ×1"
    late = profile("1343", LONG)[name]
    alone = profile("1343", f"{LONG}, norm and rotation on their own")[name]
    assert us(BACKWARD, 8320) == pytest.approx(late - alone, abs=0.06)
    late, before = profile("1343", SHORT), profile("0846", SHORT)
    assert us(BACKWARD, 4608) == pytest.approx(late[name] - before[name], abs=0.06)
    both = [k for k in late if k in before and k != name and late[k] > 10]
    assert len(both) > 8
    assert [late[k] for k in both] == pytest.approx([before[k] for k in both], rel=0.06)


def test_what_is_left_in_products_is_that_of_a_block() -> None:
    """A profile of all of them together, whose clock is another, within what the repetitions by
    themselves allow."""
    rows = result("step_classes_h200_2026-11-30T1343.json")["rows"]
    ours, theirs = (
        rows[LONG]["by_kind_us"],
        rows[f"{LONG}, all products by libraries"]["by_kind_us"],
    )
    found = ours["matrix products"] + ours["products with what follows"] - theirs["matrix products"]
    kinds = (FFN_FORWARD, FFN_BACKWARD, FORWARD)
    _, least, most = map(sum, zip(*(left_of_products(kind, 8320) for kind in kinds), strict=True))
    assert least < found < most
    assert least < sum(us(kind, 8320) for kind in kinds) < most


def test_attention_of_ours_takes_what_a_block_s_profile_says() -> None:
    rows = result("step_classes_h200_2026-11-30T0846.json")["rows"]
    for samples, length, name in (
        (26, 320, "26 × (256+64), nothing"),
        (16, 288, "16 × (256+32 masked), packed"),
    ):
        assert rows[name]["attention_backend"] == ["unit heads in CUDA C++, gradients by it"]
        shape = Shape(samples=samples, length=length, pieces=1)
        time = step_time(network(), LOW, shape, ["nothing"], GPUS["h200"])
        us = rows[name]["by_kind_us"]["attention"]
        assert 1e6 * time.parts["attention"] == pytest.approx(us, rel=0.02)


def test_what_the_plan_says_kernels_take_is_what_they_take() -> None:
    pytest.importorskip("triton")
    from mvsplit.kernels.hopper import block_product, block_product_choice, unit_heads

    (many, _), (few, _) = block_product_choice.SIZES
    assert {"rotation": many, "swiglu": few} == FEWEST_ROWS
    widths = {
        which: {block_product.width_of(cut, which) for cut in cuts}
        for which, cuts in block_product.CUTS.items()
    }
    assert {min(each) for each in widths.values()} == {COLUMNS}
    assert all(width % COLUMNS == 0 for each in widths.values() for width in each)
    assert (block_product._DEPTH, block_product.HEAD, unit_heads.HEAD) == (WIDTHS, HEAD, HEAD)
    assert unit_heads.MOST_ROWS == MOST_TOKENS
    for rows in range(1, MOST_TOKENS + 1):
        takes = any(rows % n == 0 for n in unit_heads._AT_A_TIME)
        assert takes == any(rows % n == 0 for n in TOKENS)


@pytest.mark.parametrize(
    ("model", "samples", "length", "gpu", "precision", "fused"),
    [
        (network(), 26, 320, "h200", "bf16", {*FFN, FORWARD, BACKWARD}),
        (network(), 28, 288, "h100", "bf16", {*FFN, FORWARD, BACKWARD}),
        (network(), 16, 288, "h200", "bf16", {*FFN, BACKWARD}),  # too few rows for W_QKV's
        (network(), 26, 320, "a100", "bf16", set()),
        (network(), 26, 320, "rtx4090", "bf16", set()),
        (network(), 26, 320, "h200", "fp32", set()),
        (network(), 12, 320, "h200", "bf16", {BACKWARD}),  # too few rows for the products
        (network(), 26, 321, "h200", "bf16", {*FFN, FORWARD}),  # by cuDNN
        (network(), 26, 512, "h200", "bf16", {*FFN, FORWARD}),
        (network(heads=16), 26, 320, "h200", "bf16", FFN),
        (network(hidden=3008), 26, 320, "h200", "bf16", {FORWARD, BACKWARD}),
        (replace(network(), kv_heads=4), 26, 320, "h200", "bf16", set()),
    ],
)
def test_passes_are_taken_out_where_kernels_take_them(
    model, samples, length, gpu, precision, fused
) -> None:
    found = served(KERNELS, model, precision, samples, length, GPUS[gpu])
    assert set(found) == fused
    own = own_attention(KERNELS, model, precision, length, GPUS[gpu])
    assert bool(own) == (BACKWARD in fused)


@pytest.mark.parametrize(("gpu", "moves"), [("h100", True), ("a100", False), ("rtx4090", False)])
def test_a_plan_moves_on_hopper_alone(gpu, moves) -> None:
    shape, levels = Shape(samples=26, length=320, pieces=1), ["all"]
    then, now = (
        step_time(network(), LOW, shape, levels, GPUS[gpu], kernels=kernels)
        for kernels in (APART, KERNELS)
    )
    assert (then != now) is moves
    nodes = [time.parts["graph nodes"] for time in (then, now)]
    fewer = 2 + 2 + 2 if moves else 0  # forward, backward, forward again
    assert nodes[0] - nodes[1] == pytest.approx(1.3e-6 * fewer)
