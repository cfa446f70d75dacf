"""The watch as a callback of Lightning, for `lightning` and `pytorch_lightning` alike.

trainer = Trainer(callbacks=[MonitorCallback(run_dir="runs/vit")], …)
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mvsplit.diagnostics.monitor import Monitor
from mvsplit.errors import needs_extra

with needs_extra("trainers"):
    if TYPE_CHECKING or find_spec("lightning") is not None:
        from lightning.pytorch.callbacks import Callback
    else:
        from pytorch_lightning.callbacks import Callback


class MonitorCallback(Callback):
    """Watches the training of a LightningModule that has one optimiser.

    Args:
        options: of `Monitor`. Under the policy `skip` the gradients of the step are dropped, so
            that the optimiser finds none; under `stop` `Trainer.fit` raises `Stopped`.

    Attributes:
        monitor: from the start of the training on.
    """

    def __init__(self, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._options = options
        self._loss: Tensor | None = None  # of the passes of a step so far
        self._look = ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.monitor = Monitor(pl_module, **self._options)
        self.monitor.steps = trainer.global_step

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._loss is None and self.monitor is not None:
            self._look.enter_context(self.monitor.look())

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        loss = loss.detach() / _scale(trainer)
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are there, without the scale of mixed precision, and not yet clipped."""
        assert self.monitor is not None  # `on_train_start` made it
        assert self._loss is not None  # a step is made of backward passes
        self._look.close()
        loss, self._loss = self._loss, None
        lr = float(optimizer.param_groups[0]["lr"])
        if not self.monitor.step(loss, lr=lr).apply:
            pl_module.zero_grad(set_to_none=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._look.close()


def _scale(trainer: Any) -> float:
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()
