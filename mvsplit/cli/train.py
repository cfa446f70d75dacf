"""`mvsplit train PRESET [--field value …]`: trains a named experiment, or goes on with it.

`--from WEIGHTS` starts from trained weights (docs/fine-tuning.md).

On several processes: `torchrun --nproc-per-node N -m mvsplit train PRESET …` (docs/parallel.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mvsplit.cli.start import StartOptions, origin_of, starter
from mvsplit.errors import UserError
from mvsplit.models import DiTConfig
from mvsplit.presets import PRESETS, get_preset, list_presets
from mvsplit.training import DataConfig, Experiment, ProgressLine, TrainConfig, train

STOPPED_BY_ALARM = 3


@dataclass(frozen=True, kw_only=True)
class _Options:
    run_dir: Path  # the run's folder; the same folder again resumes the run
    start: Annotated[StartOptions, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    model: DiTConfig
    data: DataConfig


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status: 0, 3 where an alarm stopped the run, or 130
    and 143 after Ctrl-C and SIGTERM.

    Raises:
        UserError: something in the options or the run folder that the caller can put right.
    """
    options = _parse(list(arguments))
    experiment = Experiment(
        model=options.model,
        data=options.data,
        train=options.train,
        origin=origin_of(options.start),
    )
    progress = ProgressLine()
    try:
        outcome = train(
            experiment, options.run_dir, observers=[progress], start=starter(experiment)
        )
    finally:
        progress.close()
    if outcome.alarm:
        return STOPPED_BY_ALARM
    return 0 if outcome.signal is None else 128 + outcome.signal


def _parse(arguments: list[str]) -> _Options:
    """The fields of the preset that comes first, as the options change them."""
    prog = "mvsplit train PRESET"
    if arguments and arguments[0] in ("-h", "--help"):
        preset, arguments = "tiny", ["--help"]
    elif not arguments or arguments[0].startswith("-"):
        raise UserError(f"preset: name one first, for example tiny; known: {', '.join(PRESETS)}")
    else:
        preset, arguments = arguments[0], arguments[1:]
        prog = f"mvsplit train {preset}"
    experiment = get_preset(preset)
    defaults = _Options(
        run_dir=Path("runs") / preset,
        start=StartOptions(),
        train=experiment.train,
        model=experiment.model,
        data=experiment.data,
    )
    return tyro.cli(
        _Options,
        default=defaults,
        args=arguments,
        prog=prog,
        description=f"Trains or resumes. Presets:\n\n{list_presets()}\n\n"
        f"The defaults shown are those of {preset}.",
    )
