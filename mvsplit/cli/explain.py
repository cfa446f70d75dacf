"""`mvsplit explain FLIGHT`, or `mvsplit monitor explain`: what made a gradient spike."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mvsplit.errors import UserError
from mvsplit.training.explanation import Explanation, explain
from mvsplit.training.files import write_atomically
from mvsplit.training.flight import Flight, flight_of_run, read_flight

_LAYERS = 5  # rows of the table of writers
_WIDTH = 100  # columns where there is no terminal


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Runs a step of a run again, as it was and under what might have caused its gradient spike:
    samples dropped, in fp32, with the mean adjoint shut off after attention, the FFN, and both.

    Attributes:
        source: a flight that the recorder wrote, or a run's folder.
        step: which step; the one whose gradient norm stands out most if not given.
        json: where the numbers go; explain.json of the flight, or explain_STEP.json of the run.
        device: where to run; where the run was if not given.
    """

    source: Annotated[Path, tyro.conf.Positional]
    step: int | None = None
    json: Path | None = None
    device: str | None = None


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status.

    Raises:
        UserError: there is no flight and no run, the step cannot be run again, or its numbers not
            written.
    """
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit explain")
    flight = _find(args)
    progress = Console(stderr=True)
    found = explain(flight, device=args.device, say=lambda line: progress.print(f"{line} …"))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    show(found, console)
    out = args.json or _default_output(args.source, flight)
    try:
        write_atomically(out, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"json: cannot write {out}: {error.strerror}; give --json FILE") from error
    console.print(f"numbers: {out}", soft_wrap=True)
    return 0


def _find(args: Arguments) -> Flight:
    if (args.source / "flight.json").exists():
        return read_flight(args.source, args.step)
    return flight_of_run(args.source, args.step)


def _default_output(source: Path, flight: Flight) -> Path:
    is_flight = (source / "flight.json").exists()
    return source / ("explain.json" if is_flight else f"explain_{flight.step:08d}.json")


def show(found: Explanation, console: Console) -> None:
    """The explanation for a reader."""
    console.print(
        f"step {found.step} of {found.source}: rule {found.rule}, {found.depth} layers, "
        f"{found.precision}; {found.reason}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(_reproduction(found), soft_wrap=True, highlight=False)
    for table in (_trials(found), _families(found), _writers(found)):
        console.print(table)
    for line in (*_trace(found), "", *found.conclusion.sentences):
        console.print(line, soft_wrap=True, highlight=False)


def _reproduction(found: Explanation) -> str:
    again = found.reproduction
    pairs = [(again.recorded[name], again.again[name]) for name in ("loss", "grad_norm")]
    if again.exact:
        how = f"all {len(again.recorded)} recorded numbers come back to the bit"
    else:
        error = max(abs(b - a) / abs(a) if a else math.inf for a, b in pairs)
        close = "within the tolerance" if again.close else "NOT the step that was recorded"
        how = f"recorded loss and gradient norm come back to {error:.1e}, {close}"
        if found.altered is not None:
            how += f" (in between, a policy changed the run: {found.altered})"
    return f"run again from the state of step {found.state_step}: {how}"


def _trials(found: Explanation) -> Table:
    calm = "?" if found.calm is None else f"{found.calm:.3g}"
    table = Table(title="what makes the spike vanish", title_justify="left")
    table.add_column("the step")
    columns = ("loss", "gradient norm", f"÷ calm {calm}", "W_O", "W_2", "spike removed")
    for name in columns:
        table.add_column(name, justify="right")
    for trial in found.trials:
        share = found.removed.get(trial.name)
        ratio = "" if not found.calm else f"{trial.grad_norm / found.calm:.3g}"
        writers = (_short(trial.writer_attn), _short(trial.writer_ffn))
        style = "bold" if trial.name in found.conclusion.removed_by else ""
        removed = "" if share is None else f"{share:.0%}"
        row = (trial.label, _short(trial.loss), _short(trial.grad_norm), ratio, *writers, removed)
        table.add_row(*row, style=style)
    return table


def _families(found: Explanation) -> Table:
    table = Table(title="gradient norms by family", title_justify="left")
    table.add_column("family")
    for name in ("all layers", "÷ calm", "largest", "in layer"):
        table.add_column(name, justify="right")
    for family, norms in found.trace.family_norms.items():
        calm = found.trace.calm_family_norms.get(family)
        total = math.hypot(*norms)
        ratio = f"{total / math.hypot(*calm):.3g}" if calm and any(calm) else ""
        layer = max(range(len(norms)), key=lambda l: _rank(norms[l]))
        place = (_short(norms[layer]), str(layer)) if len(norms) > 1 else ("", "")
        table.add_row(family, _short(total), ratio, *place)
    return table


def _writers(found: Explanation) -> Table:
    """The writers whose mean-coherent gradient is largest."""
    split = found.trace.mode_split
    rows = [
        (writer, layer, split[f"g_mean_{branch}"][layer], split[f"g_ctr_{branch}"][layer])
        for writer, branch in (("W_O", "attn"), ("W_2", "ffn"))
        for layer in range(found.depth)
    ]
    title = "mode split at the writers, the largest G_mean first"
    table = Table(title=title, title_justify="left")
    for name in ("writer", "layer", "G_mean", "G_ctr", "G_mean / G_ctr", "token similarity"):
        table.add_column(name, justify="right")
    for writer, layer, mean, centered in sorted(rows, key=lambda row: -_rank(row[2]))[:_LAYERS]:
        ratio = f"{mean / centered:.3g}" if mean is not None and centered else ""
        tcs = _short(split["tcs"][layer])
        table.add_row(writer, str(layer), _short(mean), _short(centered), ratio, tcs)
    return table


def _trace(found: Explanation) -> Iterable[str]:
    trace = found.trace
    losses = ", ".join(_short(loss) for loss in trace.rank_losses)
    where = " by rank" if len(trace.rank_losses) > 1 else ""
    yield f"loss{where}: {losses}; RMS of the output's gradient: {trace.output_gradient_rms:.3g}"
    worst = ", ".join(f"{s.index} ({_short(s.loss)})" for s in trace.worst_samples)
    yield f"samples with the largest loss: {worst}"
    bad = [f"{what}: {place}" for what, place in trace.not_finite.items() if place]
    yield f"not finite: {'; '.join(bad) if bad else 'nothing'}"


def _rank(value: float | None) -> float:
    return -1.0 if value is None else value if math.isfinite(value) else math.inf


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
