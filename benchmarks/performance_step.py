"""Sections of docs/performance.md about the step: padded text, a thousand layers, low precision.

Each is a function of results (`performance_page.py`), and empty where there is none. Units: those
of the column.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from performance_parts import kernels_of, markdown
from performance_training import ONE_BYTE_SINCE

from mvsplit.kernels.block_parts import Recompute
from mvsplit.presets import get_preset
from mvsplit.training.gpus import GPUS
from mvsplit.training.kernel_times import FIRST
from mvsplit.training.memory_plan import kept_bytes
from mvsplit.training.step_plan import StepPlan, plan_step, sample_of
from mvsplit.training.step_time import Shape, step_time

Found = dict[str, Any]
_OTHER_BITS = (
    "**other bits**, for the backward of attention adds up in any order (`--deterministic` has it "
    "fixed since, not run on a GPU yet)"
)
_ONE_BYTE = " The second moment had two bytes then, and\nhas one since."
_BATCH_THEN = 64  # samples a step of recipe.py, before its results said so
_SAVED = 4.05  # bytes of a parameter in a checkpoint: its weight and the moments
_RACE = "2026-11-29"  # the run with the kernel of `masked_race_h200`
OURS, ZERO_KEYS = "unit heads in CUDA C++, gradients by cudnn", "cudnn with zero keys"
_MASKS = {
    ZERO_KEYS: "padding left out of the finished softmax instead of masked in it",
    OURS: "masked inside a kernel of our own for up to 320 tokens, against cuDNN's without a mask",
}
WARMUP = 10  # of thousand_layers.py
WAYS = ("cudnn, mask", "cudnn, square mask", "flash in sequences", "flash, packed")


def masked(found: Found, first: Found, race: Found | None = None, since: str | None = None) -> str:
    """What a mask on padded text costs in attention; `first` is of a kernel that did not compute
    rows anew, `race` of one that did it wrong; `since`: when gradients by our kernel first served
    in a block."""
    if not found:
        return ""
    rows = []
    for row in found["rows"]:
        batch, image, text = row["shape"]
        tokens = f"{batch}, {image}+{text} ({row['real_tokens']:.0%} real)"
        each = [_way(row, name) for name in (OURS, ZERO_KEYS, *WAYS)]
        rows.append([tokens, f"{row['best_unmasked_us']:.0f}", *each])
    head = ("samples, tokens", "no mask, µs", "ours in CUDA C++", "zero keys", "cuDNN, one row")
    head = (*head, "cuDNN, T×T", "flash, unequal lengths", "flash, packed")
    away = [e for row in found["rows"] for e in _ratios(row)]
    return f"""## Padded text

Forward and backward of attention as the network calls it, in µs and against the best without a mask
(cuDNN's); 1 … 64 or 1 … 256 of the text tokens are real. *Ours*: forward in CUDA C++, up to 320 tokens, which leaves
padding out, gradients by cuDNN; of these ways it is taken where it has a figure, else zero keys are. *Zero keys*: padding takes part in the
softmax, where a key of zero counts as exp(0) = 1, and is subtracted afterwards
([how](../mvsplit/kernels/masked_attention.py)). *One row*, *T×T*: of the mask, for all queries or for each.
*Unequal lengths*: flash attention on the padded batch as twice as many sequences, real and padding
in turn. *Packed*: real tokens gathered and scattered back.

{markdown(head, rows)}
Gate: against fp64 over the real keys alone, the chosen way is off by at most {_worst(found):.4f} (output and
gradients), and by at most {max(away):.2f} times what cuDNN without a mask is where queries and keys point away from each
other, which leaves the real keys next to no share of the softmax.{_lost_rows(found, first, race)} cuDNN's kernel for unequal lengths
cannot be recorded in a CUDA graph. Sorting or splitting a batch removes no mask unless lengths are equal.
{_dated(found, since)}"""  # noqa: E501


def _dated(found: Found, since: str | None) -> str:
    """Of when the table is, and what it cannot have for that."""
    date, words = found.get("date", ""), ""
    if since is not None and date < since:
        words = (
            ", before gradients of attention\nby our own kernel served, as they do since ("
            f"{since.replace('T', ' ')}, [above](#what-the-cards-power-allows)): *ours* is without "
            "them"
        )
    note = f"\n{found['note']}" if "note" in found else ""
    return f"\nThe latest rows are of {date.replace('T', ' ')}{words}.{note}\n"


def _lost_rows(found: Found, first: Found, race: Found | None) -> str:
    """How rows without a share are computed, and what was wrong with it before."""
    if not first or not race:
        return ""
    before = [row["ways"][_chosen(row)]["over_unmasked"] for row in first["rows"]]
    off = max(max(_ratios(row)) for row in first["rows"])
    wrong = [row["ways"]["cudnn with zero keys"] for row in race["rows"]]
    errors, away = (
        sorted(each)
        for each in zip(*((w["error"], w["error_away"][0]) for w in wrong), strict=True)
    )
    return f"""
Such rows are computed anew by a kernel of their own: without, a run cost {min(before):+.1%} to {max(before):+.1%}, but was
{off:.1f} times as far off there. That kernel's first form was right in Triton's interpreter and wrong on a GPU, by
{errors[0]:.4f} to {errors[-1]:.3f} and by up to {away[-1]:.2f} where queries and keys point away: it corrected the log-sum-exp in place, of which
several warps load the same number, and some loaded what another had stored already. It goes to a
tensor of its own since. The comparison before first use let two of these four sizes pass; it is made
head by head and sample by sample since, several times, and allows twice a mask's own distance to fp32."""  # noqa: E501


def _chosen(row: Found) -> str:
    return row["chosen"] if row["chosen"] in row["ways"] else f"{row['chosen']}, mask"


def _way(row: Found, name: str) -> str:
    way = row["ways"].get(name, {})
    if "us" not in way:
        return "–"
    return f"{way['us'][1]:.0f} ({way['over_unmasked']:+.0%})"


def _worst(found: Found) -> float:
    return max(row["ways"][_chosen(row)]["error"] for row in found["rows"])


def _ratios(row: Found) -> list[float]:
    ours = row["ways"][_chosen(row)]["error_away"]
    theirs = row["ways"]["cudnn, no mask"]["error_away"]
    return [o / t for o, t in zip(ours, theirs, strict=True)]


def learning(results: Sequence[Found]) -> Found:
    """The stage of 1000 layers of the latest day: of the run with the most steps, the later of
    two."""
    stages = [result["thousand"] | _source(result) for result in results if "thousand" in result]
    day = max(stage["date"][:10] for stage in stages)
    of_day = (stage for stage in stages if stage["date"][:10] == day)
    return max(of_day, key=lambda stage: (stage.get("steps", 0), stage["date"]))


def _source(result: Found) -> Found:
    return {key: result[key] for key in ("date", "note") if key in result}


def thousand(found: Found, results: Sequence[Found] = ()) -> str:
    """13.64 billion parameters on one GPU; `results`: all there are."""
    stage = found.get("thousand", {})
    if "seconds" not in stage:
        return ""
    preset = get_preset("mvsplit-1000l-h200")
    plan = plan_step(preset, GPUS["h200"], 1, sample_of(preset))
    again = ", ".join(f"{count} × {level}" for level, count in sorted(stage["recompute"].items()))
    samples = f"{stage['samples']} samples in pieces of {stage['piece']}"
    runs = _same_pieces(stage, results)
    rows = [
        ["parameters", f"{stage['parameters']:,}"],
        ["a step", f"{stage['seconds']:.2f} s, {samples}{_all_of(runs, 'seconds', '.2f')}"],
        ["tokens/s", f"{stage['tokens_per_second']:,.0f}, {stage['length']} a sample"],
        [
            "MFU",
            f"{stage['mfu']:.1%}{_all_of(runs, 'mfu', '.1%')}; of the real tokens "
            f"{stage['mfu_of_real_tokens']:.1%}",
        ],
        ["peak, GiB", f"{stage['peak_gib']:.1f} ({stage['reserved_gib']:.1f} held by PyTorch)"],
        ["computed again", again],
        ["loss", f"{_loss(stage)}; a warm-up of {WARMUP} steps, not of {preset.train.warmup:,}"],
        [
            "cold start",
            f"{stage['cold_start_seconds']:.0f} s from the process to the second step, as a graph"
            f"{_all_of(runs, 'cold_start_seconds', '.0f')}",
        ],
    ]
    if "seconds_per_layer" in stage:
        each = stage["seconds_per_layer"].items()
        shown = ", ".join(f"{1e6 * s:.0f} µs at {depth}" for depth, s in each)
        ratio = stage["per_layer_ratio"] - 1
        burst = "" if "loads_per_layer" in stage else ", a short burst"
        rows.append(["a layer, forward and backward", f"{shown} layers: {ratio:+.1%}{burst}"])
    saved = found.get("resume")
    if saved:
        same = "the same bits" if saved["same"] else _OTHER_BITS
        whole = stage["parameters"] * _SAVED / 1e9
        rows.append(
            [
                "saved and resumed",
                f"{saved['depth']} layers, 2 + 2 steps against 4: {same}; "
                f"{saved['bytes'] / 1e9:.1f} GB (1000 layers have {whole:.0f} GB, more than that "
                "machine's disk)",
            ]
        )
    return f"""## 1000 layers on one GPU

`mvsplit train mvsplit-1000l-h200` by the run's own step: every parameter, clipping by the true global
norm, {_bytes(stage)} bytes a parameter. Captions are padded to the longest of the batch, masked.

{markdown(("", ""), rows)}{_note(stage)}{_again(stage)}{_others(stage, runs)}{_pieces(stage, plan, found["date"] == _RACE)}"""  # noqa: E501


def _loss(stage: Found) -> str:
    """How it falls, and of what batches the steps were."""
    sizes = " of one piece"
    if "whole_steps" in stage:
        sizes = f", the last {stage['whole_steps']} of the whole batch, the others of a piece"
    if stage["steps"] < 10:
        first, last = stage["losses"][0], stage["losses"][-1]
        return f"{first:.3f} → {last:.3f}, first and last of {stage['steps']} steps{sizes}"
    first, last = stage["mean_of_first_5"], stage["mean_of_last_5"]
    return f"{first:.3f} → {last:.3f}, first and last 5 of {stage['steps']} steps{sizes}"


def _again(stage: Found) -> str:
    """The share of the step that backward computes again, by the plan's model."""
    if kernels_of(stage) is FIRST:  # `_pieces` says it
        return ""
    levels: list[Recompute] = [n for n, count in stage["recompute"].items() for _ in range(count)]
    share = _recompute_seconds(stage, levels) / stage["seconds"]
    return f"\nOf the step, {share:.0%} is what backward computes again, by the plan.\n"


def _note(stage: Found) -> str:
    return f"\n{stage['note']}\n" if "note" in stage else ""


def _same_pieces(stage: Found, results: Sequence[Found]) -> list[Found]:
    """All runs in the pieces of `stage`, with as many bytes a parameter, the oldest first."""
    stages = [r["thousand"] | _source(r) for r in results if "mfu" in r.get("thousand", {})]
    return [
        run for run in stages if run["piece"] == stage["piece"] and _bytes(run) == _bytes(stage)
    ]


def _all_of(runs: Sequence[Found], field: str, form: str) -> str:
    """The range of a field over the runs."""
    ends = [format(end(run[field] for run in runs), form) for end in (min, max)] if runs else []
    return f" ({' to '.join(ends)} in {len(runs)} runs)" if len(runs) > 1 else ""


def _others(stage: Found, runs: Sequence[Found]) -> str:
    """Each of the runs, where there are several."""
    if len(runs) < 2:
        return ""
    lines = "\n".join(
        f"- {run['date'].replace('T', ' ')}, {run['steps']} steps, loss {run['losses'][0]:.3f} → "
        f"{run['losses'][-1]:.3f}: {run['seconds']:.2f} s, {run['mfu']:.1%} MFU. "
        f"{run.get('note', '')}".rstrip()
        for run in runs
    )
    return (
        f"\nThe table is of {stage['date'].replace('T', ' ')}. All runs in such pieces, by the "
        f"kernels of their time:\n\n{lines}\n"
    )


def _bytes(stage: Found) -> int:
    """Of a parameter, gradient and moments included."""
    return stage.get("bytes_a_parameter", 7)


def _pieces(stage: Found, plan: StepPlan, wrong: bool) -> str:
    """What the preset's pieces are now, where they were others in the run."""
    if stage["piece"] == plan.shape.samples and "bytes_a_parameter" in stage:
        return ""
    preset, now = get_preset("mvsplit-1000l-h200"), plan.shape
    again = ", ".join(
        f"{plan.memory.levels.count(n)} × {n}" for n in sorted(set(plan.memory.levels))
    )
    levels = [name for name, count in stage["recompute"].items() for _ in range(count)]
    shape = Shape(
        samples=stage["piece"],
        length=stage["length"],
        pieces=stage["samples"] // stage["piece"],
    )
    ran = kernels_of(stage)
    time = step_time(preset.model, preset.train, shape, levels, GPUS["h200"], kernels=ran)
    attention = (
        "Attention ran with the kernel for zero keys that was wrong ([below](#padded-text)), in "
        "the same time.\n"
    )
    return f"""
{attention if wrong else ""}Of the step, {time.parts["recompute"] / time.seconds:.0%} is what backward computes again. The preset has pieces of {now.samples} samples since, and a
second moment of one byte instead of two, so that less is computed again: {again}. For that
the plan foretells {plan.time.seconds:.1f} s for {plan.batch_size} samples, {plan.time.mfu:.1%} MFU; it gives the run above within {abs(time.seconds / stage["seconds"] - 1):.0%}
([below](#what-mvsplit-plan-foretells)).
"""  # noqa: E501


def recipes(results: Sequence[Found]) -> Found:
    """Of results of recipe.py, oldest first: the latest in which all steps were taken, or else the
    latest; `parts`: those that were stopped since."""
    whole = [each for each in results if each["steps"] >= each.get("of_steps", 1000)]
    kept = (whole or results)[-1]
    return kept | {"parts": [each for each in results if each["date"] > kept["date"]]}


def low_precision(recipe: Found, graphs: Found, moments: Found | None = None) -> str:
    """What bf16 weights and gradients cost in learning, and what `moments` of fewer bytes."""
    lines = []
    if recipe.get("gaps"):
        gaps = _gaps(recipe)
        seeds = len({name.partition(", seed ")[2] for name in recipe["gaps"]})
        spread = "1 seed, no spread" if seeds == 1 else f"{seeds} seeds"
        then = _ONE_BYTE if recipe["date"] < ONE_BYTE_SINCE else ""
        lines.append(
            f"{recipe['depth']} layers at D = {recipe['width']} on the shapes, "
            f"{recipe['steps']:,} of {recipe.get('of_steps', 1000):,} steps of "
            f"{recipe.get('batch_size', _BATCH_THEN)} samples, mean loss of the last 100 against\n"
            f"fp32 AdamW from the same seed: {gaps} ({spread}). At most 2 % was allowed.{then}"
            + "".join(
                f"\nRun again in part, stopped by its time at {part['steps']:,} of "
                f"{part['of_steps']:,} steps: {_gaps(part)}, of the 100 steps before that."
                for part in recipe.get("parts", ())
            )
        )
    if moments:
        costs = {n: statistics.fmean(each) for n, each in moments["over_fp32"].items()}
        lines.append(
            f"A small network on the digits, {len(moments['loss']['fp32'])} seeds of "
            f"{moments['steps']:,} steps on a CPU, mean loss of the last 1,000\n"
            "against fp32 AdamW: "
            f"{costs['two bytes']:+.2%} with the second moment in two bytes, "
            f"{costs['one byte']:+.2%} in one (`mvsplit bench low_moments`)."
        )
    rounding = graphs.get("rounding", {}).get("pieces")
    if rounding:
        each = "; ".join(
            f"{pieces} pieces {found['sum bf16']:.4f} (sum in fp32 {found['sum fp32']:.4f})"
            for pieces, found in rounding.items()
        )
        most = rounding[max(rounding, key=int)]
        added = max(0.0, most["sum bf16"] ** 2 - most["sum fp32"] ** 2) ** 0.5
        lines.append(
            "Gradients of the matrices are added up in bf16. Their distance to fp32, "
            f"‖g − g₃₂‖/‖g₃₂‖:\n{each}:\nthe rounding of the sum adds {added:.2%} where bf16 "
            f"arithmetic alone is off by {most['sum fp32']:.2%}."
        )
    if not lines:
        return ""
    return "## What low precision costs\n\n" + "\n\n".join(lines) + "\n"


def _gaps(recipe: Found) -> str:
    return ", ".join(f"{name} {gap:+.2%}" for name, gap in recipe["gaps"].items())


def updates(graphs: Found) -> str:
    """What of a step follows the gradients."""
    names = {"step bf16": "bf16", "step split": "two halves", "step fp32": "fp32"}
    each = [
        f"{1e3 * graphs[stage]['update_seconds']:.0f} ms ({name})"
        for stage, name in names.items()
        if "update_seconds" in graphs.get(stage, {})
    ]
    if not each:
        return ""
    return f"\nNorm, clipping and update take {', '.join(each)} of a step.\n"


def layers(graphs: Found) -> str:
    """Seconds a layer at two depths."""
    found = graphs.get("per layer", {})
    if "ratio" not in found:
        return ""
    each = found["seconds_per_layer"]
    each = each.get("graph", each)
    shown = ", ".join(f"{s * 1e3:.3f} ms at {depth}" for depth, s in each.items())
    return (
        "\nForward and backward of a layer of 26 samples, all computed again: "
        f"{shown} layers ({found['ratio'] - 1:+.1%}).\n"
    )


def more_ideas(deep: Found, padded: Found) -> list[list[str]]:
    """Rows of the table of ideas."""
    rows = []
    stage = deep.get("thousand", {})
    if "seconds" in stage:
        before, now = (_recompute_seconds(stage, levels) for levels in (_three_levels(stage), None))
        rows.append(
            [
                "what a block keeps in five steps instead of three: f of the FFN first",
                f"{before:.2f} → {now:.2f} s of recompute in the step of 1000 layers above (by the "
                "plan, in the same memory)",
            ]
        )
    if padded:
        for name, idea in _MASKS.items():
            costs = [
                [w["over_unmasked"] for w in ways if "over_unmasked" in w]
                for ways in (
                    [r["ways"].get(n, {}) for r in padded["rows"]] for n in (WAYS[0], name)
                )
            ]
            if all(costs):
                each = " → ".join(f"{min(c):+.0%} … {max(c):+.0%}" for c in costs)
                rows.append([idea, f"{each}, each against no mask in its own run"])
    return rows


def _costs(padded: Found, name: str) -> list[float]:
    """What a way costs over none, of the rows that have it."""
    ways = [row["ways"].get(name, {}) for row in padded["rows"]]
    return [way["over_unmasked"] for way in ways if "over_unmasked" in way]


def _recompute_seconds(stage: Found, levels: list[Recompute] | None) -> float:
    """Of the step of 1000 layers by the plan's model: with such levels, or with those it had."""
    found = levels or [name for name, n in stage["recompute"].items() for _ in range(n)]
    preset = get_preset("mvsplit-1000l-h200")
    pieces = stage["samples"] // stage["piece"]
    shape = Shape(samples=stage["piece"], length=stage["length"], pieces=pieces)
    ran = kernels_of(stage)
    time = step_time(preset.model, preset.train, shape, found, GPUS["h200"], kernels=ran)
    return time.parts["recompute"]


def _three_levels(stage: Found) -> list[Recompute]:
    """All or the packed projection computed again, in the bytes that the run kept."""
    model = get_preset("mvsplit-1000l-h200").model
    bytes_kept = sum(kept_bytes(model, name) * n for name, n in stage["recompute"].items())
    each: dict[Recompute, int] = {name: kept_bytes(model, name) for name in ("packed", "all")}
    packed = (bytes_kept - model.depth * each["all"]) // (each["packed"] - each["all"])
    return ["all"] * (model.depth - packed) + ["packed"] * packed
