"""Writes docs/what-you-get.md: what trains, draws and is trained further on which machine.

    mvsplit bench page [--check]    # writes docs/performance.md as well, from the same results

Predicted figures are those of `mvsplit plan`, measured ones those of files in benchmarks/results/.
--check writes nothing and fails where the page is not what both give. Takes seconds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from performance_parts import markdown
from what_you_get_measured import drawn, further, on_cpu, trained

from mvsplit.models import DiTConfig
from mvsplit.presets import PRESETS, get_preset
from mvsplit.training.gpus import GIB, GPUS
from mvsplit.training.memory_plan import SPARE
from mvsplit.training.step_memory import CONTEXT, count_parameters, step_memory
from mvsplit.training.step_plan import StepPlan, plan_step, sample_of

PAGE = Path(__file__).parents[1] / "docs" / "what-you-get.md"
MACHINES = (("rtx4090", 1), ("h100", 1), ("h200", 1), ("h200", 2), ("h100", 8), ("h200", 8))
WIDE = 512  # narrower presets fit everywhere, and their time is more than that of kernels
DEEP = [name for name, preset in PRESETS.items() if preset.model.width >= WIDE]
SMALL = [name for name in PRESETS if name not in DEEP]
ON_ONE = "mvsplit-400l-h200"  # whose width and settings are those of "most layers"
FEW = 8  # samples of a piece, of these
MOST = 4096  # layers that are tried
DAY = 86400
HEAD = """# What you get on which machine

Written by `mvsplit bench page`. **Predicted** figures are those of `mvsplit plan`; how near they are to what an H200
took is on [another page](performance.md#what-mvsplit-plan-foretells). The rates of an H100 are in no file of results
({h100_rates}), nor those of an RTX 4090 ({rtx4090_rates}). **Measured** figures are of the file in their row.

| | trains | draws | trains further |
| --- | --- | --- | --- |
| a CPU, two cores | {small} | what it has trained | the same networks |
| one consumer GPU of 24 GB | the same; {layers} layers of width 1024, predicted {seconds} s a step, {days} days | {drawable} | the same networks |
| one H100 | {h100} | every preset | the same, whole or in part |
| one H200 | {h200} | every preset | the same, whole or in part |
| two GPUs and more | the same in less time; {rest} | on one of them | whole; in part, by preferences or in depth on one |
"""  # noqa: E501
TRAINING = """## Training, predicted

GiB on each GPU, seconds a step, days for all steps of the preset. `mvsplit plan PRESET --gpu {gpus}`
with `--gpus N` writes each in full. Where the preset does not fit, the change that `plan` names first; on several
GPUs, where that is faster, `--accumulate` is given too.

{table}
{narrow}
*Most layers*: of width 1024 that one GPU trains with the settings of `{settings}`, in pieces of {few} samples.
{deepest}
"""  # noqa: E501
DRAWING = """## Drawing

On one GPU, or a CPU. Weights in bf16 are all that counts: a picture of 1000 layers took {more:.1f} GiB more
than they do. Without a GPU they lie in memory, in fp32 twice as large.

{table}
Measured: {measured}
No time was measured on another card, none of a deep network on a CPU. [The engine](sampling.md) is what serves;
its products in CUDA C++ are for Hopper GPUs, elsewhere Triton's and the libraries' serve.
"""  # noqa: E501
FURTHER = """## Training further

`--from` with everything free takes what training takes. What freezes a part (`--tune`: adapters, gains, some layers)
keeps no gradients and moments of the rest, preferences (`--train.objective dpo`) hold a second copy of what learns
and take twice the samples: `plan` foretells neither. Both, and growth, need a single process. Nothing of it was measured
at width 1024; at smaller ones:

{table}
[Fine-tuning](fine-tuning.md), [preferences](alignment.md), [growth](growth.md), [surgery](surgery.md) say what came of it.
"""  # noqa: E501


def machine(gpu: str, count: int) -> str:
    """For example "8 × H200, 140 GiB each"."""
    found = GPUS[gpu]
    name = found.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    before, after = (f"{count} × ", " each") if count > 1 else ("", "")
    return f"{before}{name}, {found.memory / GIB:.0f} GiB{after}"


@cache
def planned(preset: str, gpu: str, count: int, pieces: int) -> StepPlan:
    experiment = get_preset(preset)
    train = replace(experiment.train, accumulate=pieces)
    return plan_step(replace(experiment, train=train), GPUS[gpu], count, sample_of(experiment))


def chosen(preset: str, gpu: str, count: int) -> StepPlan:
    """As the preset has it; on several GPUs the fastest that fits, also of fewer pieces, for the
    preset's are many small ones there."""
    own = get_preset(preset).train.accumulate
    usual = planned(preset, gpu, count, own)
    fewer = [2**n for n in range(own.bit_length()) if 2**n < own] if count > 1 else []
    plans = [usual, *(planned(preset, gpu, count, pieces) for pieces in fewer)]
    fitting = [plan for plan in plans if plan.memory.fits]
    return min(fitting, key=lambda plan: plan.time.seconds, default=usual)


def cell(preset: str, gpu: str, count: int) -> str:
    plan = chosen(preset, gpu, count)
    train = get_preset(preset).train
    if not plan.memory.fits:
        return f"no ({plan.memory.total / GIB:.0f} GiB); {_typed(plan.remedies[0].changes)}"
    days = plan.time.seconds * train.steps / DAY
    found = f"{plan.memory.total / GIB:.0f} GiB, {plan.time.seconds:.2g} s, {days:.2g} d"
    pieces = plan.shape.pieces
    return found if pieces == train.accumulate else f"{found}; {_typed({'accumulate': pieces})}"


def _typed(changes: dict[str, object]) -> str:
    options = (f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
    return f"`{' '.join(options)}`"


def most_layers(gpu: str) -> int:
    """Of the network of `ON_ONE`, that one GPU trains in pieces of `FEW` samples."""
    experiment = get_preset(ON_ONE)
    tokens = FEW * sample_of(experiment).length
    low, high = 0, MOST
    while low < high:
        middle = (low + high + 1) // 2
        model = replace(experiment.model, depth=middle)
        fits = step_memory(model, experiment.train, tokens, GPUS[gpu]).fits
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def training() -> str:
    rows = []
    for gpu, count in MACHINES:
        layers = str(most_layers(gpu)) if count == 1 else "–"
        cells = [cell(preset, gpu, count) for preset in DEEP]
        rows.append([machine(gpu, count), *cells, layers])
    largest = max(planned_alone(name).memory.total for name in SMALL) / GIB
    narrow = (
        f"{_names(SMALL)}\ntake {largest:.0f} GiB at most and fit on all of them. Of their time "
        "`plan` says an order of magnitude only.\n"
    )
    return TRAINING.format(
        gpus="|".join(dict.fromkeys(gpu for gpu, _ in MACHINES)),
        table=markdown(("", *(f"`{name}`" for name in DEEP), "most layers"), rows),
        narrow=narrow,
        settings=ON_ONE,
        few=FEW,
        deepest=deepest(),
    )


def deepest() -> str:
    """The command that foretells the deepest network of the smallest card, and what it says."""
    card, train = MACHINES[0][0], get_preset(ON_ONE).train
    options = f"--model.depth {most_layers(card)} --accumulate {train.batch_size // FEW}"
    seconds = deepest_seconds()
    return (
        f"On the {machine(card, 1).partition(',')[0]} "
        f"`mvsplit plan {ON_ONE} --gpu {card} {options}`\nforetells {seconds:.2g} s a step of "
        f"{train.batch_size} samples, {seconds * train.steps / DAY:.2g} days for {train.steps:,} "
        f"steps; `mvsplit train {ON_ONE}` with\n`{options}` trains it. Nothing of it was measured."
    )


@cache
def deepest_seconds() -> float:
    """Of a step of that network, predicted."""
    card, experiment = MACHINES[0][0], get_preset(ON_ONE)
    model = replace(experiment.model, depth=most_layers(card))
    train = replace(experiment.train, accumulate=experiment.train.batch_size // FEW)
    changed = replace(experiment, model=model, train=train)
    return plan_step(changed, GPUS[card], 1, sample_of(changed)).time.seconds


def planned_alone(preset: str) -> StepPlan:
    return planned(preset, "h200", 1, get_preset(preset).train.accumulate)


def weights(model: DiTConfig) -> float:
    """GiB of them in bf16."""
    return 2 * count_parameters(model).all / GIB


def holds(gpu: str, model: DiTConfig) -> bool:
    """Whether the weights leave what a GPU keeps for itself, and what they leave is left."""
    usable = (1 - SPARE) * GPUS[gpu].memory - CONTEXT
    return weights(model) * GIB <= usable


def drawing() -> str:
    networks = {get_preset(name).model.depth: get_preset(name).model for name in DEEP}
    cards = [gpu for gpu, count in MACHINES if count == 1]
    rows = [
        [f"{depth} layers of width {model.width}", f"{weights(model):.1f}"]
        + ["fits" if holds(card, model) else "does not fit" for card in cards]
        for depth, model in networks.items()
    ]
    small = max(weights(get_preset(name).model) for name in SMALL)
    rows.append(["the small presets", f"{small:.2f} at most", *("fits" for _ in cards)])
    head = ("predicted", "weights, GiB", *(machine(card, 1) for card in cards))
    more, measured = drawn()
    return DRAWING.format(more=more, table=markdown(head, rows), measured=measured)


def _names(presets: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in presets)


def head() -> str:
    fit = {gpu: [name for name in DEEP if fits(name, gpu)] for gpu in ("h100", "h200")}
    draws = sorted({p.depth for p in (get_preset(n).model for n in DEEP) if holds("rtx4090", p)})
    return HEAD.format(
        small=on_cpu(),
        layers=most_layers("rtx4090"),
        seconds=f"{deepest_seconds():.2g}",
        days=f"{deepest_seconds() * get_preset(ON_ONE).train.steps / DAY:.2g}",
        drawable=f"networks of {' and '.join(map(str, draws))} layers of that width",
        h100=_names(fit["h100"]),
        h200=_names(fit["h200"]),
        h100_rates=GPUS["h100"].source,
        rtx4090_rates=GPUS["rtx4090"].source,
        rest="; ".join(
            f"`{name}` on {_first_that_holds(name)}" for name in DEEP if name not in fit["h200"]
        ),
    )


def _first_that_holds(preset: str) -> str:
    return next(machine(*each) for each in MACHINES if chosen(preset, *each).memory.fits)


def fits(preset: str, gpu: str) -> bool:
    return chosen(preset, gpu, 1).memory.fits


def page() -> str:
    parts = (head(), training(), "## Training, measured\n\n" + trained())
    return "\n".join((*parts, drawing(), FURTHER.format(table=further())))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE}")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is out of date: mvsplit bench page writes it")


if __name__ == "__main__":
    main()
