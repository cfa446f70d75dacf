"""The watch for a training loop of one's own, over any PyTorch transformer.

    monitor = Monitor(model)
    for batch in batches:
        with monitor.look():                      # every layer, now and then; else nothing
            loss = compute_loss(model, batch)
            loss.backward()
        if monitor.step(loss, lr=lr).apply:       # before clipping: the norms of this step
            optimizer.step()
        optimizer.zero_grad()

Each step costs a few norms and one wait for the device. A look into every layer is rare in calm and
comes at once when the step before left the usual.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvsplit.diagnostics.detector import Detector, Thresholds
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.hand_written import linear_maps
from mvsplit.diagnostics.probe import CHEAP_FIELDS, LayerProbe
from mvsplit.diagnostics.ranks import (
    arrays_over_ranks,
    is_first_rank,
    joined_norm,
    mean_over_ranks,
)
from mvsplit.diagnostics.retrospect import is_run_of_train
from mvsplit.diagnostics.shards import GradientPart, norms, part_of
from mvsplit.diagnostics.sinks import Sink
from mvsplit.diagnostics.structure import TapNames, find_taps, unwrapped
from mvsplit.diagnostics.taps import LayerTap, deepest_quarter, family_gradients
from mvsplit.errors import UserError, nearest

Policy = Literal["record", "stop", "skip"]
POLICIES: tuple[Policy, ...] = ("record", "stop", "skip")
_NAMED = {  # what may be missing: the fields of TapNames that name it
    "no queries and keys": ("query", "key"),
    "no attention writer": ("writer_attn",),
    "no FFN writer": ("writer_ffn",),
}
_UNSEEN_AT_MOST = 20  # steps without look() before that is said

_logger = logging.getLogger(__name__)


class Stopped(UserError):
    """An alarm ended the run, as its policy asked; the update of that step was not made."""


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When every layer is looked into.

    Attributes:
        calm: steps between two looks when nothing happens.
        start: the same at first; it doubles up to `calm`.
        burst: looks at one step after the other once something stirs, before they thin out again.
    """

    calm: int = 128
    start: int = 1
    burst: int = 10

    def __post_init__(self) -> None:
        for name in ("calm", "start", "burst"):
            if getattr(self, name) < 1:
                raise UserError(f"cadence.{name}={getattr(self, name)}: must be at least 1")


class Schedule:
    """Decides step by step whether to look: rarely in calm, at once when something stirs."""

    def __init__(self, cadence: Cadence) -> None:
        self.cadence = cadence
        self._interval, self._since, self._stirred_looks = cadence.start, 0, 0

    def due(self, stirred: bool) -> bool:
        """Whether to look at the step that begins; call it once for each step."""
        self._since += 1
        if stirred and self._stirred_looks < self.cadence.burst:
            self._stirred_looks += 1
            self._interval, self._since = self.cadence.start, 0
            return True
        if self._since < self._interval:
            return False
        self._interval = min(2 * self._interval, self.cadence.calm)
        self._since = 0
        if not stirred:
            self._stirred_looks = 0
        return True


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a step came to.

    Attributes:
        events: what the detector says, most often nothing.
        apply: whether the policy lets the update be made.
        numbers: the step's line of metrics.
    """

    events: tuple[Event, ...]
    apply: bool
    numbers: dict[str, float]


class Monitor:
    """Watches the training of a transformer; it changes no bit of it.

    Where torch.distributed is initialised, every rank has to call it: sharded gradients are
    measured whole, all numbers are averaged over the ranks, and so all ranks say the same.

    Args:
        model: its blocks, writers, queries and keys are found by structure.
        names: overrides what is found.
        taps: the layers to watch, instead of those that are found.
        policy: on an alarm `record` goes on, `skip` leaves that update out (`Report.apply`), and
            every one that is not finite, `stop` raises `Stopped`.
        cadence: when every layer is looked into.
        fields: what such a look measures, names of `FIELDS`.
        run_dir: a folder in which metrics.jsonl, layers.jsonl and events.jsonl are written on, best
            not that of a run of `mvsplit train`; None writes nothing.
        receive: is called with each event.
        sinks: are handed every line that run_dir would hold (`mvsplit.diagnostics.integrations`).
        thresholds: of the detector.

    Attributes:
        missing: what this model does not have and what is therefore not measured; it is also
            logged, once, as a warning.

    Raises:
        UserError: no blocks were found, or an unknown policy.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        names: TapNames | None = None,
        taps: Sequence[LayerTap] | None = None,
        policy: Policy = "record",
        cadence: Cadence | None = None,
        fields: Sequence[str] = CHEAP_FIELDS,
        run_dir: Path | str | None = None,
        receive: Callable[[Event], None] | None = None,
        sinks: Sequence[Sink] = (),
        thresholds: Thresholds | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise UserError(f"policy={policy!r} is unknown; {nearest(policy, POLICIES)}")
        self.taps = find_taps(model, names) if taps is None else taps
        self.policy = policy
        self.missing = _missing(self.taps)
        self.detector = Detector(thresholds)
        self.steps = 0
        self._model, self._fields, self._receive = model, fields, receive
        self._schedule = Schedule(cadence or Cadence())
        self._sinks: list[Sink] = [*sinks, *([] if run_dir is None else [_Logs(Path(run_dir))])]
        self._probe: LayerProbe | None = None
        self._announced = self._looked = False
        if self.missing and is_first_rank():
            remedy = _names_to_give(self.missing, self.taps) if taps is None else ""
            words = "; ".join(self.missing)
            _logger.warning("%s: %s%s", type(unwrapped(model)).__name__, words, remedy)

    def look(self) -> AbstractContextManager[Any]:
        """The context for the forward and backward passes of the step that begins."""
        self._probe, self._looked = None, True
        if not self._schedule.due(self.detector.stirred):
            return nullcontext()
        self._probe = LayerProbe(self.taps, fields=self._fields)
        return self._probe

    @torch.no_grad()
    def step(self, loss: Tensor | float, *, lr: float | None = None, scale: float = 1.0) -> Report:
        """Reads the gradients of the step and judges them, before they are clipped or applied.

        Args:
            loss: of this step, a scalar; with gradient accumulation the mean over its passes.
            lr: the learning rate of the update to come, so that a jump is seen.
            scale: what the loss was multiplied by before backward(), as GradScaler does.

        Raises:
            Stopped: an alarm, under the policy `stop`.
            UserError: no weight has a gradient.
        """
        if not self._announced:
            self._announced = True
            self._log("events", self._announcement())
        self.steps += 1
        if not self._looked and self.steps == min(2 * self._schedule.cadence.calm, _UNSEEN_AT_MOST):
            self._warn_unseen()
        numbers = self._read(loss, scale)
        if lr is not None:
            numbers["lr"] = lr
        if scale != 1:
            numbers["loss_scale"] = scale
        events = self.detector.update({"step": self.steps, **numbers})
        self._log("metrics", {"step": self.steps, **numbers})
        if self._probe is not None:
            device = next(self._model.parameters()).device
            arrays = arrays_over_ranks(self._probe.arrays(), self._fields, device)
            layers = {"step": self.steps, **arrays}
            self._probe = None
            events += self.detector.update(layers)
            self._log("layers", layers)
        return self._act(events, numbers)

    def _act(self, events: list[Event], numbers: dict[str, float]) -> Report:
        alarms = [event for event in events if event.level == "alarm"]
        for event in events:
            self._log("events", {"event": "watch", "time": time.time(), **event.as_dict()})
            if self._receive is not None:
                self._receive(event)
        if alarms and self.policy == "stop":
            raise Stopped(f"step {self.steps}: {alarms[0].message} The update was not made.")
        # The detector says once that a run is not finite; each such update would spoil the weights.
        # A gradient that overflowed under a loss scale is left to the scaler, which has to see it.
        broken = not all(math.isfinite(value) for value in numbers.values())
        broken = broken and ("loss_scale" not in numbers or not math.isfinite(numbers["loss"]))
        apply = self.policy != "skip" or not (alarms or broken)
        if not apply:
            self._log("events", self._skipped(alarms[0].verdict if alarms else "non-finite"))
        return Report(events=tuple(events), apply=apply, numbers=numbers)

    def _announcement(self) -> dict[str, Any]:
        """That somebody looks on: a log without it and without a verdict was not watched."""
        message = f"watching {len(self.taps)} layers of {type(unwrapped(self._model)).__name__}"
        message += "".join(f"; {words}" for words in self.missing)
        head = {"event": "watching", "time": time.time(), "step": self.steps, "level": "info"}
        return head | {"message": message}

    def _warn_unseen(self) -> None:
        message = "monitor.look() was never entered: layers are not looked into"
        head = {"event": "unseen", "time": time.time(), "step": self.steps, "level": "info"}
        self._log("events", head | {"message": message})
        if is_first_rank():
            _logger.warning(message)

    def _skipped(self, verdict: str) -> dict[str, Any]:
        message = f"The update of step {self.steps} is left out, because of {verdict}."
        return {"event": "skipped", "time": time.time(), "step": self.steps, "message": message}

    def _read(self, loss: Tensor | float, scale: float) -> dict[str, float]:
        """The numbers of the step, with one wait for the device."""
        families = self._families()
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        if not gradients:
            raise UserError(
                "no weight has a gradient; call step() after backward() and before zero_grad()"
            )
        device = gradients[0].device
        groups = {"grad_norm": [part_of(gradient) for gradient in gradients], **families}
        each = iter(norms([part for parts in groups.values() for part in parts]))
        joined = [joined_norm([next(each) for _ in parts], device) for parts in groups.values()]
        loss = torch.as_tensor(loss, dtype=torch.float32, device=device)
        values = torch.stack([loss, *(norm.float() / scale for norm in joined)])
        return dict(zip(("loss", *groups), mean_over_ranks(values).tolist(), strict=True))

    def _families(self) -> dict[str, list[GradientPart]]:
        """The gradients of the deepest quarter by family; frozen weights have none."""
        found: dict[str, list[GradientPart]] = {}
        for tap in deepest_quarter(self.taps):
            for name, gradient in family_gradients(tap).items():
                if gradient is not None:
                    found.setdefault(name, []).append(gradient)
        return found

    def _log(self, name: str, line: dict[str, Any]) -> None:
        for sink in self._sinks if is_first_rank() else ():
            sink.append(name, line)


class _Logs:
    """The logs of a run folder, each line handed to the system at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run_dir={str(folder)!r}: {error.strerror}; choose a folder that can be written"
            ) from error
        if is_run_of_train(folder) and is_first_rank():
            _logger.warning(
                "run_dir=%r holds a run of mvsplit train: the monitor adds its lines, whose steps "
                "count from 1, to its metrics.jsonl, layers.jsonl and events.jsonl; resumed, the "
                "run cuts them off the first two; choose another folder, of the monitor's own",
                str(folder),
            )

    def append(self, name: str, line: dict[str, Any]) -> None:
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _names_to_give(missing: Sequence[str], taps: Sequence[LayerTap]) -> str:
    """How to name what was not found, as the end of a sentence, and what there is to name."""
    lacks = " ".join(missing)
    fields = [name for words, names in _NAMED.items() if words in lacks for name in names]
    if not fields:
        return ""
    given = ", ".join(f"{name}='…'" for name in fields)
    maps = linear_maps(taps[0].block) or "none"
    return (
        f"; where a block has them by other names, give these: names=TapNames({given}); its linear "
        f"maps: {maps}"
    )


def _missing(taps: Sequence[LayerTap]) -> tuple[str, ...]:
    """What no layer has, in words."""
    lacks = []
    if not any(tap.query is not None and tap.key is not None for tap in taps):
        lacks.append("no queries and keys: their gradients are not measured")
    branches = [branch for tap in taps for branch in tap.branches]
    for name, words in (("attn", "attention"), ("ffn", "FFN")):
        named = [branch for branch in branches if branch.name == name]
        if not named:
            lacks.append(f"no {words} writer: its gradients are not measured")
        elif not any(branch.called for branch in named):
            lacks.append(
                f"PyTorch's own {words} hides what its writer reads: of it the gradient norm is "
                f"measured, not its mean and centered part"
            )
    return tuple(lacks)
