"""The watch as a callback of transformers' Trainer.

trainer = Trainer(model=model, …)
trainer.add_callback(MonitorCallback(trainer, run_dir="runs/llama"))
trainer.train()
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from mvsplit.diagnostics.monitor import Monitor
from mvsplit.errors import needs_extra

with needs_extra("trainers"):
    from transformers import Trainer, TrainerCallback


class MonitorCallback(TrainerCallback):
    """Watches the training of a Trainer's model.

    The Trainer tells its callbacks neither the loss of a step nor its gradients before they are
    clipped. So this takes the place of `trainer.training_step` while it trains: what the Trainer
    or a subclass of it does there runs as before, and the monitor reads its outcome.

    Args:
        trainer: the one that the callback is added to.
        options: of `Monitor`. Under the policy `skip` the gradients of the step are dropped, so
            that the optimiser finds none; under `stop` `Trainer.train` raises `Stopped`.

    Attributes:
        monitor: from the first step on.
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._trainer: Any = trainer
        self._options = options
        self._loss: Tensor | None = None  # of the passes of a step so far
        self._look = ExitStack()
        self._original: Callable[..., Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._original is None:  # else an earlier training ended by an exception
            self._original = self._trainer.training_step
        self._trainer.training_step = self._training_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.training_step, self._original = self._original, None

    def _training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        assert self._original is not None  # `on_train_begin` put this method in its place
        if self.monitor is None:  # now, for only here the model is as it will be trained
            self.monitor = Monitor(model, **self._options)
            self.monitor.steps = self._trainer.state.global_step
        if self._loss is None:
            self._look.enter_context(self.monitor.look())
        with self._look as look:
            loss = self._original(model, *args, **kwargs)
            self._loss = loss if self._loss is None else self._loss + loss
            if not self._trainer.accelerator.sync_gradients:
                self._look = look.pop_all()
                return loss
        self._finish(model, self.monitor, self._loss)
        return loss

    def _finish(self, model: nn.Module, monitor: Monitor, loss: Tensor) -> None:
        self._loss = None
        scaler = self._trainer.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        lr = self._trainer.optimizer.param_groups[0]["lr"]
        if not monitor.step(loss, lr=float(lr), scale=scale).apply:
            model.zero_grad(set_to_none=True)
