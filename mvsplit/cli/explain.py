"""`mvsplit explain FLIGHT`, or `mvsplit monitor explain`: what made a gradient spike, or what
is known of a training that `Monitor` watched."""

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

from mvsplit.cli import explain_logs
from mvsplit.cli.explain_logs import rank, short, writers_table
from mvsplit.cli.tables import table_console
from mvsplit.diagnostics.retrospect import Retrospect, is_watched_elsewhere, look_back
from mvsplit.errors import UserError
from mvsplit.training.checkpoint import list_checkpoints
from mvsplit.training.explanation import Explanation, explain
from mvsplit.training.fatal import FatalStep, fatal_step
from mvsplit.training.files import write_atomically
from mvsplit.training.flight import Flight, flight_of_run, reachable_steps, read_flight
from mvsplit.training.rerun import writers
from mvsplit.training.said import spike_before


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Runs a step of a run again, as it was and under what might have caused its gradient spike:
    samples dropped, in fp32, with the mean adjoint shut off after attention, the FFN, and both. Of
    a training of your own that Monitor watched, which cannot be run again, says what was seen.

    Attributes:
        source: a flight that the recorder wrote, a run's folder, or the run_dir of a Monitor.
        step: which step; if not given, of a flight its own, else the one that ended the run by a
            value that was not finite, else that of the first of the gravest verdicts, and without
            any the one whose gradient norm stands out most. Where that has no spike and a recorded
            step before it has, that step too, with its numbers in explain_STEP.json beside.
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
        UserError: there is no flight, no run and no log of a monitor, the step cannot be run again,
            or its numbers not written.
    """
    args = tyro.cli(Arguments, args=list(arguments), prog="mvsplit explain")
    found: Explanation | Retrospect
    if is_watched_elsewhere(args.source):
        if args.device is not None:
            raise UserError(
                f"device={args.device}: {args.source} holds no run, only what a monitor "
                f"wrote, and nothing is run; leave --device out"
            )
        found = look_back(args.source, args.step)
        explain_logs.show(found, table_console())
    else:
        progress = Console(stderr=True)
        if (fatal := fatal_step(args.source)) is not None:
            table_console().print(str(fatal), soft_wrap=True, highlight=False, markup=False)
        flight = _find(args, fatal)
        found = _shown(flight, args, progress)
        _write(found, args)
        if args.step is None and found.conclusion.verdict == "no-spike":
            _explain_spike_before(flight, args, progress)
        return 0
    _write(found, args)
    return 0


def _shown(flight: Flight, args: Arguments, progress: Console) -> Explanation:
    found = explain(flight, device=args.device, say=lambda line: progress.print(f"{line} …"))
    show(found, table_console())
    return found


def _explain_spike_before(flight: Flight, args: Arguments, progress: Console) -> None:
    """An alarm that the layers gave often comes a few steps after the spike of its collapse."""
    if (step := spike_before(flight)) is None:
        return
    said = f"\nOf the steps before, the gradient norm of step {step:,} stands out most, a spike"
    is_flight = (flight.path / "flight.json").exists()
    if is_flight:
        run, lacks = flight.path.parent.parent, "this flight does not reach"
        near = step in reachable_steps(flight.path)
    else:  # from the start it could be hours
        run, lacks = flight.path, "has no checkpoint before it"
        saved = list_checkpoints(run / "checkpoints")
        near = any(int(path.name.rpartition("_")[2]) < step for path in saved)
    if not near:
        remedy = f"mvsplit explain {run} --step {step} explains it where a checkpoint is left."
        table_console().print(f"{said}, which {lacks}; {remedy}", soft_wrap=True, highlight=False)
        return
    table_console().print(f"{said}, which is explained here:\n", soft_wrap=True, highlight=False)
    source = read_flight(flight.path, step) if is_flight else flight_of_run(flight.path, step)
    found = _shown(source, args, progress)
    beside = (args.json or _default_output(args.source, flight.step)).with_name(
        f"explain_{step:08d}.json"
    )
    _write(found, dataclasses.replace(args, json=beside))


def _write(found: Explanation | Retrospect, args: Arguments) -> None:
    out = args.json or _default_output(args.source, found.step)
    try:
        write_atomically(out, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"json: cannot write {out}: {error.strerror}; give --json FILE") from error
    table_console().print(f"numbers: {out}", soft_wrap=True)


def _find(args: Arguments, fatal: FatalStep | None) -> Flight:
    if (args.source / "flight.json").exists():
        return read_flight(args.source, args.step)
    if fatal is not None and fatal.flight is not None and args.step in (None, fatal.step):
        return read_flight(fatal.flight, args.step)
    return flight_of_run(args.source, args.step)


def _default_output(source: Path, step: int) -> Path:
    is_flight = (source / "flight.json").exists()
    return source / ("explain.json" if is_flight else f"explain_{step:08d}.json")


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
    watch = (*found.watch, "") if found.watch else ()
    for line in (*_trace(found), "", *watch, *found.conclusion.sentences):
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
        writers = (short(trial.writer_attn), short(trial.writer_ffn))
        style = "bold" if trial.name in found.conclusion.removed_by else ""
        removed = "" if share is None else f"{share:.0%}"
        row = (trial.label, short(trial.loss), short(trial.grad_norm), ratio, *writers, removed)
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
        layer = max(range(len(norms)), key=lambda l: rank(norms[l]))
        place = (short(norms[layer]), str(layer)) if len(norms) > 1 else ("", "")
        table.add_row(family, short(total), ratio, *place)
    return table


def _writers(found: Explanation) -> Table:
    split = found.trace.mode_split
    rows = ((*row, split["tcs"][row[1]]) for row in writers(split))
    return writers_table(rows, "mode split at the writers, the largest G_mean first")


def _trace(found: Explanation) -> Iterable[str]:
    trace = found.trace
    losses = ", ".join(short(loss) for loss in trace.rank_losses)
    where = " by rank" if len(trace.rank_losses) > 1 else ""
    yield f"loss{where}: {losses}; RMS of the output's gradient: {trace.output_gradient_rms:.3g}"
    worst = ", ".join(f"{s.index} ({short(s.loss)})" for s in trace.worst_samples)
    yield f"samples with the largest loss: {worst}"
    bad = [f"{what}: {place}" for what, place in trace.not_finite.items() if place]
    yield f"not finite: {'; '.join(bad) if bad else 'nothing'}"
