"""Sections of docs/performance.md about the step: padded text, a thousand layers, low precision.

Each is a function of results (`performance_page.py`), and empty where there is none. Units: those
of the column.
"""

from __future__ import annotations

from typing import Any

from performance_parts import markdown

Found = dict[str, Any]
_SAVED = 5.03  # bytes of a parameter in a checkpoint: its weight and the moments
WAYS = ("cudnn, mask", "cudnn, square mask", "flash in sequences", "flash, packed")


def masked(found: Found) -> str:
    """What a mask on padded text costs in attention."""
    if not found:
        return ""
    rows = []
    for row in found["rows"]:
        batch, image, text = row["shape"]
        tokens = f"{batch}, {image}+{text} ({row['real_tokens']:.0%} real)"
        each = [_way(row, name) for name in (_chosen(row), *WAYS)]
        rows.append([tokens, f"{row['best_unmasked_us']:.0f}", *each])
    chosen = sorted({row["chosen"] for row in found["rows"]})
    head = ("samples, tokens", "no mask, µs", f"chosen: {', '.join(chosen)}")
    head = (*head, "cuDNN, one row", "cuDNN, T×T", "flash, unequal lengths", "flash, packed")
    away = [e for row in found["rows"] for e in _ratios(row)]
    return f"""## Padded text

Forward and backward of attention as the network calls it, in µs and against the best without a mask
(cuDNN's); 1 … 64 or 1 … 256 of the text tokens are real. *Zero keys*: padding takes part in the
softmax, where a key of zero counts as exp(0) = 1, and is subtracted afterwards
([how](../mvsplit/kernels/masked_attention.py)). *One row*, *T×T*: of the mask, for all queries or for each.
*Unequal lengths*: flash attention on the padded batch as twice as many sequences, real and padding
in turn. *Packed*: real tokens gathered and scattered back.

{markdown(head, rows)}
Gate: against fp64 over the real keys alone, the chosen way is off by at most {_worst(found):.4f} (output and
gradients), and by at most {max(away):.2f} times what cuDNN without a mask is where queries and keys point away from each
other, which leaves the real keys next to no share of the softmax. cuDNN's kernel for unequal lengths
cannot be recorded in a CUDA graph. Sorting or splitting a batch removes no mask unless lengths are equal.
"""  # noqa: E501


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


def thousand(found: Found) -> str:
    """13.64 billion parameters on one GPU."""
    stage = found.get("thousand", {})
    if "seconds" not in stage:
        return ""
    again = ", ".join(f"{count} × {level}" for level, count in sorted(stage["recompute"].items()))
    samples = f"{stage['samples']} samples in pieces of {stage['piece']}"
    fall = f"{stage['mean_of_first_5']:.3f} → {stage['mean_of_last_5']:.3f}"
    rows = [
        ["parameters", f"{stage['parameters']:,}"],
        ["a step", f"{stage['seconds']:.2f} s, {samples}"],
        ["tokens/s", f"{stage['tokens_per_second']:,.0f}, {stage['length']} a sample"],
        ["MFU", f"{stage['mfu']:.1%}; of the real tokens {stage['mfu_of_real_tokens']:.1%}"],
        ["peak, GiB", f"{stage['peak_gib']:.1f} ({stage['reserved_gib']:.1f} held by PyTorch)"],
        ["computed again", again],
        ["loss", f"{fall}, first and last 5 of {stage['steps']} steps of one piece"],
        [
            "cold start",
            f"{stage['cold_start_seconds']:.0f} s from the process to the second step, as a graph",
        ],
    ]
    saved = found.get("resume")
    if saved:
        same = "the same bits" if saved["same"] else "**other bits**"
        whole = stage["parameters"] * _SAVED / 1e9
        rows.append(
            [
                "saved and resumed",
                f"{saved['depth']} layers: 2 + 2 steps give {same} as 4, "
                f"{saved['bytes'] / 1e9:.1f} GB (1000 layers have {whole:.0f} GB, more than that "
                "machine's disk)",
            ]
        )
    return f"""## 1000 layers on one GPU

`mvsplit train mvsplit-1000l-h200` by the run's own step: every parameter, clipping by the true global
norm, 7 bytes a parameter. Captions are padded to the longest of the batch, masked.

{markdown(("", ""), rows)}"""  # noqa: E501


def low_precision(recipe: Found, graphs: Found) -> str:
    """What bf16 weights and gradients cost in learning."""
    lines = []
    if recipe.get("gaps"):
        gaps = ", ".join(f"{name} {gap:+.2%}" for name, gap in recipe["gaps"].items())
        steps = recipe["steps"]
        lines.append(
            f"{recipe['depth']} layers at D = {recipe['width']} on the shapes, {steps:,} steps, "
            f"mean loss of the last 100 against\nfp32 AdamW from the same seed: {gaps}. "
            "At most 2 % was allowed."
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
            f"‖g − g₃₂‖/‖g₃₂‖: {each}:\nthe rounding of the sum adds {added:.2%} where bf16 "
            f"arithmetic alone is off by {most['sum fp32']:.2%}."
        )
    if not lines:
        return ""
    return "## What low precision costs\n\n" + "\n\n".join(lines) + "\n"


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
