"""The section of docs/performance.md on several GPUs (`performance_page.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from performance_parts import Found, foretold, markdown, network

from mvsplit.training.config import ParallelConfig

STAGES = {  # of parallel_step.py, and the stage of one GPU that each is compared with
    "alone bf16": ("each alone, bf16 weights", None),
    "replicated bf16": ("replicated, bf16 weights", "alone bf16"),
    "alone fp32": ("each alone, fp32 weights", None),
    "replicated fp32": ("replicated, fp32 weights", "alone fp32"),
    "sharded": ("sharded, fp32 weights, {}", "alone fp32"),
    "thousand replicated": ("1000 layers, replicated, bf16 weights", None),
    "thousand sharded": ("1000 layers, sharded, {weights} weights", None),
}
NOT_YET = "Not run on GPUs yet."
_ZEROS = """All with zero writers, whose times are too good for training
([above](#what-the-cards-power-allows)); what several GPUs cost beside one is not changed by that.
"""


def several(found: Found, eight: Found, predicted: Found) -> str:
    """What was measured on as many GPUs as were at hand, and what is foretold of eight.

    Args:
        found: of parallel_step.py, empty where there is none; `eight` of eight_gpus.py.
        predicted: of eight_gpus.py --predict.
    """
    return f"""## Several GPUs

*Replicated*: every GPU holds the whole network and runs the step of one, graphs and all; gradients are
averaged, moments and update divided. *Sharded*: FSDP2, kernels launched one by one. How both work, and
what was tested without GPUs: [parallel.md](parallel.md).

{_measured(found)}
{_foretold(predicted, eight, found.get("links"))}"""  # noqa: E501


def _measured(found: Found) -> str:
    rows = list(_rows(found))
    if not rows:
        return NOT_YET + "\n"
    head = ("400 layers unless said", "GPUs", "samples", "s", "planned", "tokens/s")
    head = (*head, "of as many times one", "MFU", "peak GiB", "planned", "exchange, s", "update, s")
    text = markdown(head, rows)
    zeros = [_ZEROS] if found["date"] < "2026-11-29" else []  # `step_parts.Size.model` since
    return "\n".join([text, *zeros, *_gates(found), *_saving(found)]) + "\n"


def _rows(found: Found) -> Iterator[list[str]]:
    for stage, (name, single) in STAGES.items():
        one = found.get(single) if single else None
        step = found.get(stage)
        if not isinstance(step, dict):
            continue
        steps = step if stage == "sharded" else {step.get("weights", ""): step}
        for layout, each in steps.items():
            if "seconds" in each:
                label = name.format(layout, weights=layout)
                yield _row(label, found["processes"], each, one, _plan(stage, each, found))


def _plan(stage: str, step: Found, found: Found) -> tuple[float, float]:
    """Seconds and GiB that the plan gives such a step."""
    sharded = "sharded" in stage
    model = network(1000 if stage.startswith("thousand") else found["layers"])
    parallel = ParallelConfig(layout="shard", unit=8) if sharded else None
    return foretold(
        {"piece": step["samples_on_each"], **step, "samples": step["samples_on_each"]},
        model,
        step["weights"],
        not sharded,
        1 if stage.startswith("alone") else found["processes"],
        parallel,
    )


def _row(name: str, gpus: int, step: Found, one: Any, planned: tuple[float, float]) -> list[str]:
    share = "–"
    if isinstance(one, dict):
        share = f"{step['tokens_per_second'] / one['tokens_per_second'] / gpus:.1%}"
    alone = name.startswith("each alone")
    samples = step.get("samples_on_each", step.get("samples", 0)) * (1 if alone else gpus)
    return [
        name,
        "1" if alone else str(gpus),
        f"{samples:,}",
        f"{step['seconds']:.2f}",
        f"{planned[0]:.2f}",
        f"{step['tokens_per_second']:,.0f}",
        share,
        f"{step['mfu']:.1%}",
        f"{step['peak_gib']:.1f}" if step["peak_gib"] else "–",
        f"{planned[1]:.1f}",
        f"{step['exchange_seconds']:.3f}" if "exchange_seconds" in step and not alone else "–",
        f"{step['update_seconds']:.3f}" if "update_seconds" in step else "–",
    ]


def _gates(found: Found) -> Iterator[str]:
    gate, links = found.get("gate"), found.get("links")
    if isinstance(gate, dict):
        each = ", ".join(f"{v:.1e} ({name})" for name, v in gate["largest_difference"].items())
        yield f"Gate: losses and norms of a small network differ from those of one GPU by\n{each}."
    if isinstance(links, dict) and links:
        rates = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in links.items())
        yield f"Each GPU sends, in messages of 1 GiB: {rates}."


def _saving(found: Found) -> Iterator[str]:
    save, resume = found.get("save"), found.get("resume")
    if isinstance(save, dict) and "seconds_with" in save:
        size, gpus = save["checkpoint_bytes"] / 1e9, _gpus(save["processes"])
        more, share = save["cost_of_a_save_in_steps"], save["by_the_clock_if_every_1000"]
        yield (
            f"A save in the background ({save['layers']} layers with bf16 weights, {size:.1f} GB, "
            f"{gpus}): {save['steps_in_a_window']} steps take {save['seconds_without']:.2f} s\n"
            f"without and {save['seconds_with']:.2f} s with it, {more:.2f} steps more, "
            f"{share:.2%} at a save every 1,000 steps;\n"
            f"steps wait {save['seconds_of_the_copy']:.2f} s for the copy, which is on the disk "
            f"after {save['seconds_until_written']:.1f} s."
        )
    if isinstance(resume, dict) and "same_bits" in resume:
        bits = "bit for bit" if resume["same_bits"] else "with other bits"
        yield (
            f"On {_gpus(resume['processes'])} it is read, compared with its checksums and taken "
            f"over in {resume['seconds']:.1f} s, {bits}."
        )


def _gpus(count: int) -> str:
    return "one GPU" if count == 1 else f"{count} GPUs"


def _foretold(predicted: Found, eight: Found, links: Any) -> str:
    runs = eight.get("runs", {})
    rows = []
    base = {row["weights"]: row for row in predicted["rows"] if row["gpus"] == 1}
    for row in predicted["rows"]:
        one = base[row["weights"]]["tokens_per_second"]
        share = row["tokens_per_second"] / one / row["gpus"]
        rows.append(
            [
                f"{row['gpus']}, {row['weights']} weights",
                f"{row['seconds']:.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{share:.1%}",
                f"{row['mfu']:.1%}",
                f"{row['gib']:.0f}",
                f"{row['parts'].get('communication not hidden', 0.0):.3f}",
                _seconds_of(runs, row),
            ]
        )
    head = ("GPUs", "s", "tokens/s", "of as many times one", "MFU", "peak GiB", "exchange, s")
    gpu, paper, target = predicted["gpu"], predicted["paper"], predicted["target"]
    return f"""### The paper's step on eight GPUs, foretold

400 layers, D = 1024, {predicted["batch"]:,} samples of 256 + {predicted["text"]} tokens a step, in pieces of
at most {predicted["piece"]}; the paper's own takes {paper["seconds"]} s on {paper["gpus"]}. What `mvsplit plan` said before any
run ({predicted["date"]}, `{predicted["command"]}`); wanted are {target["seconds"]} s and {target["of_eight_times_one"]:.0%} of eight
times one.

{markdown((*head, "measured, s"), rows)}
Assumed: each GPU sends and receives {gpu["link"] / 1e9:.0f} GB/s at a time in collectives, at any number of them;
nothing of the exchange is hidden behind the arithmetic; each GPU computes as one alone does; loading
and saving cost nothing.{_at_measured_rates(predicted, links)} {_left(runs)}
"""  # noqa: E501


def _at_measured_rates(predicted: Found, links: Any) -> str:
    if not links:
        return ""
    row = max(predicted["rows"], key=lambda row: (row["weights"] == "bf16", row["gpus"]))
    sent = row["bytes_sent"]
    took = sent["all-reduce"] / links["average bf16"] + sent["all-gather"] / links["all-gather"]
    return (
        f" At the rates that two GPUs reached, the exchange\nof bf16 weights between {row['gpus']} "
        f"would take {took:.3f} s."
    )


def _seconds_of(runs: Found, row: Found) -> str:
    if row["weights"] == "bf16":
        name, stage = str(row["gpus"]), "replicated bf16"
    else:
        most = max((line["gpus"] for line in runs.values()), default=0)
        name = {1: "fp32 on one", most: "fp32"}.get(row["gpus"], "")
        stage = "replicated fp32"
    step = runs.get(name, {}).get(stage)
    return f"{step['seconds']:.2f}" if isinstance(step, dict) else "–"


def _left(runs: Found) -> str:
    most = max((line["gpus"] for line in runs.values()), default=0)
    if most >= 8:
        return ""
    return "Not run: 4 and 8 GPUs, which `python benchmarks/eight_gpus.py` does in one call."
