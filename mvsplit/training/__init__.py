"""Training: the loop, optimiser, averaged weights, checkpoints and the run folder."""

from mvsplit.training.builders import build_state
from mvsplit.training.config import DataConfig, Experiment, Origin, TrainConfig, TuneConfig
from mvsplit.training.finetune import Start
from mvsplit.training.load import LoadedRun, RunSettings, load_run, load_settings
from mvsplit.training.loop import Outcome, train
from mvsplit.training.nonfinite import NonFiniteError
from mvsplit.training.observer import Observer
from mvsplit.training.progress import ProgressLine
from mvsplit.training.run_folder import RunFolder, read_experiment
from mvsplit.training.state import TrainState
from mvsplit.training.step import train_step

__all__ = [
    "DataConfig",
    "Experiment",
    "LoadedRun",
    "NonFiniteError",
    "Observer",
    "Origin",
    "Outcome",
    "ProgressLine",
    "RunFolder",
    "RunSettings",
    "Start",
    "TrainConfig",
    "TrainState",
    "TuneConfig",
    "build_state",
    "load_run",
    "load_settings",
    "read_experiment",
    "train",
    "train_step",
]
