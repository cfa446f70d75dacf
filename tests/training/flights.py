"""Short flights: a few calm steps, then something happens to the state, and an alarm."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mvsplit.data import Batch
from mvsplit.residuals import RuleConfig
from mvsplit.training import Experiment, NonFiniteError, TrainState, build_state, train_step
from mvsplit.training.flight import FlightRecorder
from mvsplit.training.step import Gradients
from tests.training import runs

ALARM = {"event": "alarm", "level": "alarm", "message": "a test"}


def plain(depth: int = 3, **changes: Any) -> Experiment:
    """A plain network on the digits, without warm-up noise in its calm steps."""
    model = replace(runs.MODEL, depth=depth, rule=RuleConfig(name="plain"))
    return Experiment(model=model, train=replace(runs.TRAIN, lr=1e-3, ema_decay=0, **changes))


def fly(
    run: Path,
    experiment: Experiment,
    happens: Callable[[TrainState], None],
    *,
    calm: int = 4,
    begin: Callable[[Experiment], TrainState] = build_state,
) -> Path:
    """`calm` steps, then one to which something happens; an alarm before its update.

    Returns:
        The flight of the last step.
    """
    run.mkdir(exist_ok=True)
    state = begin(experiment)
    recorder = FlightRecorder(run)
    recorder.on_start(state, experiment)
    look = partial(recorder.on_gradients, state)

    def alarm(gradients: Gradients) -> None:
        look(gradients)
        recorder.on_event(ALARM)

    for _ in range(calm):
        train_step(state, experiment.train, before_update=look)
    happens(state)
    with suppress(NonFiniteError):
        train_step(state, experiment.train, before_update=alarm)
    return recorder.folder / f"step_{calm + 1:08d}"


def nothing(state: TrainState) -> None:
    """Nothing happens."""


def spoil_batches(state: TrainState, spoil: Callable[[Batch], Batch]) -> None:
    """Every batch from now on goes through `spoil`."""
    following = state.loader.next_batch
    state.loader.next_batch = lambda: spoil(following())  # type: ignore[method-assign]


@torch.no_grad()
def align_tokens(state: TrainState, branch: str) -> None:
    """All image tokens alike, and one branch with large writer inputs: its mean mode opens."""
    model = state.model
    model.patch_in.weight.zero_()
    model.patch_in.bias.copy_(torch.linspace(-1, 1, len(model.patch_in.bias)))
    model.head.bias.fill_(1.0)  # so that the adjoints of all tokens agree too
    for block in model.blocks:
        block.attention.proj.weight.zero_()
        block.ffn.w2.weight.zero_()
        if branch == "ffn":
            block.ffn.w13.weight.mul_(30)
        else:
            block.attention.qkv.weight[: -model.config.width].zero_()  # every token attends alike
            block.attention.qkv.weight[-model.config.width :].mul_(1000)
