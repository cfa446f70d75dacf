"""`mvsplit plan PRESET [--gpu NAME] [--gpus N] [--field value …]`: memory and time before a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from mvsplit.cli.plan_key import LAST_LINE, key
from mvsplit.cli.tables import table_console
from mvsplit.errors import UserError
from mvsplit.models import DiTConfig
from mvsplit.presets import PRESETS, get_preset, list_presets
from mvsplit.training import DataConfig, Experiment, TrainConfig
from mvsplit.training.gpus import GIB, Gpu, find_gpu
from mvsplit.training.memory_plan import SPARE
from mvsplit.training.step_memory import OUTSIDE
from mvsplit.training.step_plan import Remedy, StepPlan, plan_step, sample_of


@dataclass(frozen=True, kw_only=True)
class _Options:
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    model: DiTConfig
    data: DataConfig
    gpu: str = "h200"  # h200, h100, a100, rtx4090, or auto: that of this machine
    gpus: int = 1  # that share the batch and the network
    image_tokens: int | None = None  # of a sample; as the data have it if not given
    text_tokens: int | None = None  # the same for captions
    memory_gib: float | None = None  # of a GPU, instead of the table's
    tflops: float | None = None  # that matrix products reach in bf16, instead of the table's
    bandwidth: float | None = None  # of a device copy in TB/s, instead of the table's
    link: float | None = None  # between GPUs in GB/s, instead of the assumption
    json: bool = False  # print one JSON object and nothing else


def main(arguments: Sequence[str]) -> int:
    """Prints the plan and returns 0, or 1 where the step does not fit.

    Raises:
        UserError: an unknown preset or GPU, --device, or a batch that cannot be divided.
    """
    preset, options = _parse(list(arguments))
    experiment = Experiment(model=options.model, data=options.data, train=options.train)
    sample = sample_of(experiment, image=options.image_tokens, text=options.text_tokens)
    plan = plan_step(experiment, _gpu(options), options.gpus, sample)
    if options.json:
        print(json.dumps(as_dict(preset, plan), indent=1, allow_nan=False))
    else:
        show(preset, plan, table_console(highlight=False))
    return 0 if plan.memory.fits else 1


def _parse(arguments: list[str]) -> tuple[str, _Options]:
    prog = "mvsplit plan PRESET"
    if arguments and arguments[0] in ("-h", "--help"):
        arguments = ["tiny", "--help"]
    elif not arguments or arguments[0].startswith("-"):
        raise UserError(f"preset: name one first, for example tiny; known: {', '.join(PRESETS)}")
    else:
        prog = f"mvsplit plan {arguments[0]}"
    preset, *rest = arguments
    if any(word.split("=")[0] == "--device" for word in rest):  # a field of the training's
        raise UserError("device: plan takes --gpu NAME, or --gpu auto for that of this machine")
    experiment = get_preset(preset)
    defaults = _Options(train=experiment.train, model=experiment.model, data=experiment.data)
    return preset, tyro.cli(
        _Options,
        default=defaults,
        args=rest,
        prog=prog,
        description="Memory and time of a training step on a GPU. Presets:\n\n"
        f"{list_presets()}\n\n{key()}\n\nThe defaults shown are those of {preset}.",
    )


def _gpu(options: _Options) -> Gpu:
    """The row of the table with what was given instead."""
    units = {"memory_gib": ("memory", GIB), "tflops": ("products", 1e12)}
    units |= {"bandwidth": ("copy", 1e12), "link": ("link", 1e9)}
    given = {}
    for option, (name, unit) in units.items():
        value = getattr(options, option)
        if value is None:
            continue
        if not 0 < value < float("inf"):
            raise UserError(f"{option}={value}: must be positive and finite")
        given[name] = value * unit
    if "products" in given:
        given["under_load"] = given["products"]
    return replace(find_gpu(options.gpu), **given)


def as_dict(preset: str, plan: StepPlan) -> dict[str, Any]:
    """The plan for JSON, in bytes and seconds."""
    memory, time = plan.memory, plan.time
    return {
        "preset": preset,
        "gpu": asdict(plan.gpu),
        "gpus": plan.gpus,
        "parameters": plan.parameters,
        "sample": asdict(plan.sample),
        "piece": asdict(plan.shape),
        "batch_size": plan.batch_size,
        "layout": plan.layout,
        "memory": {
            "parts": memory.parts,
            "total": memory.total,
            "peak_allocated": memory.allocated,
            "available": memory.available,
        },
        "fits": memory.fits,
        "recompute": {level: memory.levels.count(level) for level in sorted(set(memory.levels))},
        "seconds": time.seconds,
        "time": {
            "parts": time.parts,
            "tokens_per_second": time.tokens_per_second,
            "mfu": time.mfu,
            "communication": time.communication,
            "bytes_sent": time.bytes_sent,
        },
        "remedies": [asdict(remedy) for remedy in plan.remedies],
        "notes": list(plan.notes),
    }


def show(preset: str, plan: StepPlan, console: Console) -> None:
    """The plan for a reader."""
    for line in _head(preset, plan):
        console.print(line, soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_time_table(plan))
    for line in _foot(plan):
        console.print(line, soft_wrap=True)


def _head(preset: str, plan: StepPlan) -> Iterable[str]:
    shape, sample, gpu = plan.shape, plan.sample, plan.gpu
    yield (
        f"[bold]{preset}[/] on {plan.gpus} × {gpu.name}: {_count(plan.parameters)} parameters, "
        f"batch {plan.batch_size} as {plan.gpus} × {shape.pieces} pieces of {shape.samples}"
    )
    yield (
        f"sample: {sample.image} image + {sample.text} text tokens ({sample.source}); "
        f"{shape.tokens:,} tokens at a time"
    )
    if plan.layout is not None:
        yield plan.layout


def _memory_table(plan: StepPlan) -> Table:
    memory = plan.memory
    table = Table("memory of a GPU", box=None, pad_edge=False)
    table.add_column("GiB", justify="right")
    for name, size in memory.parts.items():
        table.add_row(f"  {name}", _gib(size))
    table.add_row("together", _gib(memory.total), style="bold")
    table.add_row(f"  of it not counted by PyTorch ({', '.join(OUTSIDE)})", _gib(_outside(plan)))
    table.add_row("may be used", _gib(memory.available))
    return table


def _outside(plan: StepPlan) -> float:
    return plan.memory.total - plan.memory.allocated


def _time_table(plan: StepPlan) -> Table:
    time = plan.time
    table = Table("time of a step", box=None, pad_edge=False)
    table.add_column("s", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in time.parts.items():
        table.add_row(f"  {name}", f"{seconds:.3g}", f"{seconds / time.seconds:.0%}")
    table.add_row("together", f"{time.seconds:.3g}", "", style="bold")
    return table


def _foot(plan: StepPlan) -> Iterable[str]:
    time, memory = plan.time, plan.memory
    peak = plan.gpu.peak / 1e12
    yield f"{time.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.1%} of {peak:.0f} TFLOP/s"
    levels = memory.levels
    counts = [f"{levels.count(name)} × {name}" for name in sorted(set(levels))]
    yield f"computed again in backward, by block: {', '.join(counts)}"
    if time.bytes_sent:
        sent = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in time.bytes_sent.items())
        rate = plan.gpu.link / 1e9
        yield f"sent by each GPU: {sent}; {time.communication:.3g} s at {rate:.0f} GB/s (assumed)"
    yield from _verdict(plan)
    yield f"rates: {plan.gpu.source}"
    for note in plan.notes:
        yield f"note: {note}"
    yield LAST_LINE


def _verdict(plan: StepPlan) -> Iterable[str]:
    memory = plan.memory
    if memory.fits:
        left = _gib(memory.available - memory.total)
        yield (
            f"[green]it fits[/]: {left} GiB left of what may be used, which is {1 - SPARE:.0%} of "
            f"the GPU's memory"
        )
        return
    if not plan.remedies:
        yield "[red]it does not fit[/], and no change that was tried takes less"
        return
    yield (
        "[red]it does not fit[/]; with these changes it does:"
        if any(remedy.fits for remedy in plan.remedies)
        else "[red]it does not fit[/], and no change that was tried makes it; the nearest:"
    )
    for remedy in plan.remedies:
        yield f"  {_options(remedy)}: {_gib(remedy.memory)} GiB, {remedy.seconds:.3g} s a step"


def _options(remedy: Remedy) -> str:
    return " ".join(
        f"--{name.replace('_', '-')} {value:g}"
        if isinstance(value, float)
        else f"--{name.replace('_', '-')} {value}"
        for name, value in remedy.changes.items()
    )


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:,.1f}" if gib >= 0.1 else f"{gib:.4f}"


def _count(n: int) -> str:
    return f"{n / 1e9:.4g} B" if n >= 1e9 else f"{n / 1e6:.3g} M"
