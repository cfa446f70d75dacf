"""The sections of docs/performance.md, each a function of results (`performance_page.py`).

Shapes: samples, image and text tokens. Units: those of the column.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from mvsplit.models import DiTConfig
from mvsplit.presets import get_preset
from mvsplit.residuals import RuleConfig
from mvsplit.training import TrainConfig
from mvsplit.training.config import ParallelConfig
from mvsplit.training.gpus import GIB, GPUS
from mvsplit.training.kernel_times import APART, FIRST, KERNELS, Kernels
from mvsplit.training.memory_plan import kept_bytes
from mvsplit.training.step_memory import count_parameters, step_memory
from mvsplit.training.step_time import Shape, left_seconds, merge_seconds, step_time

Found = dict[str, Any]
LENGTH = 320  # tokens of a sample in train_step.py
PRODUCTS_SINCE = "2026-11-30T10"  # do they do what follows them
CLUSTERS_FROM = 8192  # tokens: `merge_choice.FEWEST_TOKENS`, which wants Triton
NAMES = {
    "merge": "merge with means",
    "plain": "merge without",
    "rope": "QK-norm, rotation",
    "swiglu": "SwiGLU",
}
# Groups of kernels in the profile, by what their names contain.
GROUPS = {
    "matrix products": ("nvjet", "gemm", "cutlass", "block_product"),
    "attention": ("flash", "cudnn", "sdpa", "zero_keys", "attention"),
    "merges": ("split_merge", "scaled_merge"),
    "SwiGLU": ("swiglu",),
    "QK-norm and rotation": ("qk_norm_rope",),
    "copies, fills and the rest": ("",),
}
PASSES = {  # of [n, D] in bf16 that have to move in a block, forward and backward
    "merges": 2 * (3 + 5),
    "SwiGLU": 3 * (3 + 6),
    "QK-norm and rotation": 4 + 8,
}


def day(date: str) -> str:
    return date.replace("T", " ")


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# Fused ops


def fused(rows: list[Found]) -> str:
    """Each op beside its bytes floor and its rivals."""
    head = ("op", "samples, tokens", "forward, µs (× floor)", "backward, µs (× floor)")
    head = (*head, "copy bandwidth", "torch.compile", "released")
    text = markdown(head, [_op(row) for row in rows])
    return f"""## Fused ops

Floor: the bytes that have to move, at the copy bandwidth of the same run; *copy bandwidth* is its share
that forward and backward reach together. The last columns: how many times longer they take, forward and
backward. Medians in a CUDA graph over inputs that exceed the L2 cache; each op is compared with fp64
before it is timed. SwiGLU, and QK-norm with rotation, are here kernels of their own{_apart(rows)}, which serve where
no [product](#products-with-what-follows-them) does it.

{text}"""  # noqa: E501


def _apart(rows: list[Found]) -> str:
    """When they were timed."""
    dates = sorted({r["run"] for r in rows if r["op"] in ("rope", "swiglu") and r.get("run")})
    return f" (of {', '.join(map(day, dates))})" if dates else ""


def _op(row: Found) -> list[str]:
    batch, image, words = row["shape"]
    ours, floor = row["ms"]["ours"], row["floor_ms"]
    each = [f"{o * 1e3:.1f} ({o / f:.2f})" for o, f in zip(ours, floor, strict=True)]
    rivals = (row["ms"].get("compile"), row.get("released_ms"))
    times = [f"{sum(r) / sum(ours):.1f}×" if r else "–" for r in rivals]
    share = f"{sum(floor) / sum(ours):.0%}"
    name = NAMES.get(row["op"], row["op"])
    if (row.get("clusters_from") or CLUSTERS_FROM) <= batch * (image + words) < CLUSTERS_FROM:
        name += ", in clusters"  # which served in that run, and do not today
    return [name, f"{batch}, {image}+{words}", *each, share, *times]


# What `mvsplit plan` foretells


def network(depth: int) -> DiTConfig:
    """That of train_step.py."""
    return DiTConfig(
        depth=depth,
        width=1024,
        heads=8,
        ffn_width=3072,
        channels=128,
        text_width=1024,
        rule=RuleConfig(name="mvsplit", beta=0.05),
    )


def foretold(
    stage: Found,
    model: DiTConfig,
    weights: Any,
    graph: bool,
    ranks: int = 1,
    parallel: ParallelConfig | None = None,
    *,
    zeros: bool = True,
) -> tuple[float, float]:
    """Seconds and peak GiB of the model, for the recompute plan that the run had, and what it kept
    of a parameter. `zeros`: its writers were zero, so that power did not hold the clock down."""
    samples = stage.get("piece", 26)
    levels = [level for level, count in stage["recompute"].items() for _ in range(count)]
    config = TrainConfig(
        steps=1,
        batch_size=1,
        precision="bf16",
        weights=weights,
        ema_decay=0.0,
        parallel=parallel or ParallelConfig(),
    )
    length = stage.get("length", LENGTH)
    shape = Shape(samples=samples, length=length, pieces=stage["samples"] // samples)
    gpu = GPUS["h200"]
    if zeros and "load" not in stage:
        gpu = replace(gpu, under_load=gpu.products)
    memory = step_memory(model, config, shape.tokens, gpu, ranks)
    kept: float = sum(shape.tokens * kept_bytes(model, level) for level in levels)
    if weights == "bf16":  # a second moment of two bytes in older runs
        each = stage.get("bytes_a_parameter", 7) - 6
        shards = ranks if ranks > 1 else 1
        kept += each * count_parameters(model).low / shards
    peak = memory.allocated - memory.parts["activations"] + kept
    ran = kernels_of(stage)
    time = step_time(model, config, shape, levels, gpu, graph=graph, ranks=ranks, kernels=ran)
    return time.seconds, peak / GIB


def kernels_of(stage: Found) -> Kernels:
    """Those that ran, by what only later runs note, and by its date."""
    if "load" not in stage:
        return FIRST
    return KERNELS if stage.get("run", stage.get("date", "")) >= PRODUCTS_SINCE else APART


def plans(graphs: Found, eager: Found, deep: Found) -> str:
    preset = get_preset("mvsplit-1000l-h200").model
    thousand = deep.get("thousand")
    cases = (
        ("400 layers, bf16 weights, graphs", graphs["step bf16"], network(400), "bf16", True),
        (
            "400 layers, split weights, graphs",
            graphs.get("step split"),
            network(400),
            "split",
            True,
        ),
        ("400 layers, fp32 weights, graphs", graphs["step fp32"], network(400), "fp32", True),
        ("1000 layers, bf16 weights, graphs", thousand, preset, "bf16", True),
        ("400 layers, bf16 weights, one by one", eager["step bf16"], network(400), "bf16", False),
        ("400 layers, fp32 weights, one by one", eager["step fp32"], network(400), "fp32", False),
        ("1000 layers, bf16 weights, one by one", eager["thousand"], network(1000), "bf16", False),
    )
    rows = []
    for name, stage, model, weights, graph in cases:
        if not stage or "seconds" not in stage:
            continue
        seconds, peak = foretold(stage, model, weights, graph, zeros=stage is not thousand)
        took, most = stage["seconds"], stage["peak_gib"]
        times = [f"{took:.2f}", f"{seconds:.2f}", f"{seconds / took - 1:+.1%}"]
        rows.append([name, *times, f"{most:.1f}", f"{peak:.1f}", f"{peak / most - 1:+.1%}"])
    head = ("", "s, measured", "planned", "", "peak GiB, measured", "planned", "")
    return f"""## What `mvsplit plan` foretells

Its constants are those of the profile below, of fused ops, of cuDNN's attention and of one block under
load ([above](#what-the-cards-power-allows)), none fitted to a whole step. *One by one*: without CUDA graphs; the CPU's launches decide, so that these say little about the
kernels. A run that had another recompute plan in its day, or kept more, is compared with that one; where
writers were zero, with products as fast as a card has them that power does not hold down.

{markdown(head, rows)}"""  # noqa: E501


# The distance that is left


WAITS = "split_merge_gains"  # begins while the kernel before it runs, and waits for its end


def grouped(profile: Found) -> dict[str, float]:
    """µs a block by group of kernels; the last has what the list of the largest leaves out."""
    sums = dict.fromkeys(GROUPS, 0.0)
    for kernel, us in profile["by_kernel_us"].items():
        name = next(g for g, parts in GROUPS.items() if any(p in kernel for p in parts))
        sums[name] += 0 if WAITS in kernel else us
    waits = sum(us for kernel, us in profile["by_kernel_us"].items() if WAITS in kernel)
    sums[list(GROUPS)[-1]] += profile["kernels_us"] - waits - sum(sums.values())
    return sums


def distance(graphs: Found, eager: Found, classes: Found) -> str:
    gpu, tokens = GPUS["h200"], eager["step bf16"]["piece"] * LENGTH
    flops = 6 * tokens * _matrices()
    before, now = eager["profile"], classes["rows"]["26 × (256+64), nothing"]
    rows = []
    for name, us in grouped(now).items():
        floor = flops / gpu.peak * 1e6 if name == "matrix products" else None
        if not us:  # done by another
            rows.append([name, f"{grouped(before)[name]:.0f}", *3 * ["–"]])
            continue
        if name in PASSES:
            floor = PASSES[name] * 2 * tokens * 1024 / gpu.copy * 1e6
        limit = "–" if floor is None else f"{floor:.0f}"
        above = "" if floor is None else f"{us - floor:.0f}"
        rows.append([name, f"{grouped(before)[name]:.0f}", f"{us:.0f}", limit, above])
    each = [f"{sum(grouped(profile).values()):.0f}" for profile in (before, now)]
    rows.append(["all kernels", *each, "", ""])
    reached = flops / grouped(now)["matrix products"] / 1e6
    head = ("a block, forward and backward", "at first, µs", f"{day(now['run'])}, µs")
    head = (*head, "limit, µs", "above it")
    return f"""## The distance to the limit

Kernels of a block at {tokens:,} tokens, from short profiles: at first, with flash attention, writers of zeros and
fp32 weights that were cast whenever they were used, and later, with bf16 weights and writers that are not zero. Limits: 989 TFLOP/s
for products, of which they reach {reached:.0f}{_besides(now)}; for element-wise kernels the bytes at {gpu.copy / 1e12:.2f} TB/s.

{markdown(head, rows)}
{_merges(now, tokens)}

{_split(graphs)}"""  # noqa: E501


def _besides(profile: Found) -> str:
    """What of a profile's products is not products alone."""
    us = profile["by_kind_us"].get("products with what follows")
    if us is None:
        return ""
    return (
        f" with all that follows in them ({us:.0f} µs are of such [products]"
        "(#products-with-what-follows-them);\ngradients of attention go on to the projection)"
    )


def _matrices() -> int:
    return 1024 * (4 * 1024 + 3 * 3072)  # of a block: W_QKV, W_O, W13, W_2


def _merges(profile: Found, tokens: int) -> str:
    one = 2 * tokens * 1024 / GPUS["h200"].copy * 1e6
    each = {}
    for way, passes in (("fwd", 3), ("bwd", 5)):
        names = {"fwd": "split_merge_forward", "bwd": "split_merge_backward"}
        kernels = (k for k in profile["by_kernel_us"] if names[way] in k)
        each[way] = (sum(profile["by_kernel_us"][k] for k in kernels) / 2, passes * one)
    (forward, low), (backward, least) = each["fwd"], each["bwd"]
    return (
        f"A merge at {tokens // LENGTH} samples takes {forward:.0f} µs forward where its bytes "
        f"need {low:.0f}, and {backward:.0f} µs backward\nwhere they need {least:.0f}: further "
        f"from the limit than at 64 samples (table of fused ops)."
    )


def _split(graphs: Found) -> str:
    """The measured step, by the parts of the model and what these leave."""
    stage = graphs["step bf16"]
    shape = Shape(samples=stage["piece"], length=LENGTH, pieces=stage["samples"] // stage["piece"])
    config = TrainConfig(steps=1, batch_size=1, precision="bf16", weights="bf16", ema_decay=0.0)
    gpu = GPUS["h200"]
    if "load" not in stage:  # zero writers
        gpu = replace(gpu, under_load=gpu.products)
    levels = [level for level, count in stage["recompute"].items() for _ in range(count)]
    time = step_time(network(400), config, shape, levels, gpu, kernels=kernels_of(stage))
    ideal = stage["mfu"] * stage["seconds"]
    products = time.parts["matrix products"]
    blocks = 400 * shape.pieces
    best = 6 * _matrices() * shape.tokens * blocks / gpu.peak
    passes, inside = _own_and_inside(kernels_of(stage), shape.tokens)
    inside *= blocks
    bytes_ = passes * 2 * shape.tokens * 1024 * blocks / gpu.copy
    above = time.parts["element-wise kernels"] - inside - bytes_
    merges = _merges_above(kernels_of(stage), shape.tokens) * blocks
    rows = [
        ["model FLOPs at the peak", f"{ideal:.2f}"],
        ["products below the peak", f"{products - best:+.2f}"],
        ["attention below the peak", f"{time.parts['attention'] - (ideal - best):+.2f}"],
        ["element-wise kernels, their bytes", f"{bytes_:+.2f}"],
        [
            f"element-wise kernels above them, {merges / above:.0%} of it merges",
            f"{above:+.2f}",
        ],
        *([["what products and attention do beside their own", f"{inside:+.2f}"]] * bool(inside)),
        *(
            [name, f"{seconds:+.2f}"]
            for name, seconds in time.parts.items()
            if name not in ("matrix products", "attention", "element-wise kernels")
        ),
        [
            "what the model has too much (−) or too little",
            f"{stage['seconds'] - time.seconds:+.2f}",
        ],
        ["measured", f"{stage['seconds']:.2f}"],
    ]
    return (
        "The step of 400 layers with bf16 weights, by cause (the model of `mvsplit plan`):\n\n"
        + markdown(("", "s"), rows)
    )


def _own_and_inside(kernels: Kernels, tokens: int) -> tuple[float, float]:
    """Passes over [n, D] that merges, SwiGLU and QK-norm have to make in a block of today's network
    where kernels of their own do it, and seconds that it takes others where they do it."""
    own, inside = float(PASSES["merges"]), 0.0
    for name, width in (("swiglu", 3), ("rotation", 1)):
        for way, (passes, _) in kernels.passes[name].items():
            if (name, way) in kernels.fused:
                inside += left_seconds(kernels.fused[name, way], tokens)
            else:
                own += width * passes
    return own, inside


def _merges_above(kernels: Kernels, tokens: int) -> float:
    """Seconds of a block's two merges, forward and backward, beyond their bytes."""
    pairs = [[(n, row[i]) for n, *row in kernels.merge] for i in (0, 1)]
    floor = PASSES["merges"] * 2 * tokens * 1024 / GPUS["h200"].copy
    return 2 * sum(merge_seconds(rows, tokens) for rows in pairs) - floor


# Ideas


def ideas(
    runs: Found, eager: Found, reference: Found, ops: list[Found], more: list[list[str]]
) -> str:
    """`runs`: results by the name of their file. What an idea gave is of two results of one day,
    for those of later days have other changes, too."""
    graphs, one = runs["train_step_h200_2026-11-24"], runs["train_step_eager_h200_2026-11-24"]
    before, before_full = eager["step bf16"], eager["step fp32"]
    low = runs["train_step_h200_2026-11-29_late"]["step bf16"]
    full = runs["train_step_h200_2026-11-29_late_weights"]["step fp32"]
    flash, cudnn = _attention(reference)
    merge = next(r for r in ops if r["op"] == "merge")
    thousand = eager["thousand"]["recompute"]
    again = ", ".join(f"{count} blocks {level}" for level, count in thousand.items())
    rows = [
        [
            "forward and backward of a piece as one CUDA graph",
            f"{_changed(one, graphs, 'step bf16')} with bf16 weights, "
            f"{_changed(one, graphs, 'step fp32')} with fp32; cuDNN's attention came with it "
            f"({graphs['date']}, writers of zeros)",
        ],
        [
            "bf16 weights, then 6 bytes a parameter: pieces twice as large in the same memory",
            f"{full['seconds']:.2f} → {low['seconds']:.2f} s (2026-11-29); no casts of weights "
            "either",
        ],
        [
            "nothing computed again where memory allows, decided for each block",
            f"400 layers: nothing; 1000 layers at 26 samples: {again} "
            f"(full checkpointing costs a forward pass of each)",
        ],
        [
            "cuDNN's attention instead of flash",
            f"{sum(flash)} → {sum(cudnn)} µs at 32 samples of 320 tokens",
        ],
        [
            "one merge kernel a direction, deterministic",
            f"{sum(merge['ms']['compile']) * 1e3:.0f} µs under torch.compile → "
            f"{sum(merge['ms']['ours']) * 1e3:.0f} µs at 64 samples of 256+64",
        ],
    ]
    text = markdown(("idea", "what it gave"), rows + more)
    return f"""## What each idea gave

{text}
Gave nothing, or less than hoped:

- Choosing attention by wall time: launches took longer than kernels, so that all looked alike, and flash
  was taken although cuDNN is faster. It is chosen by its time in a graph since.
- A block as one autograd node with few, large kernels, launched one by one:
  {before["tokens_per_second"]:,.0f} tokens/s with bf16 weights, {before_full["tokens_per_second"]:,.0f}
  with fp32, near the released {_released(reference):,} or below. Without graphs the CPU decides.
- ∂L/∂β from the gradients of the writers, ⟨W_d, ∇W_d⟩ = β ∂L/∂β + α c with c from means alone, so that no
  block keeps what its branches gave: right in fp64, but in bf16 the difference is off by some 2⁻⁹ α c,
  divided by β, which is noise once α has been learned and a β comes near zero.
- For sampling: see [what did not help](sampling.md#what-did-not-help).
"""  # noqa: E501


def _changed(before: Found, after: Found, stage: str) -> str:
    return f"{before[stage]['seconds']:.2f} → {after[stage]['seconds']:.2f} s"


def _attention(reference: Found) -> tuple[list[int], list[int]]:
    row = next(r for r in reference["attention_us"]["rows"] if r[:2] == [32, 320])
    return row[2], row[3]


def _released(reference: Found) -> int:
    return reference["released"]["training_step_400_layers"]["rows"][-1][2]
