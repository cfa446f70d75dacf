"""The detector's rules on lines of metrics, with the looks into the layers behind them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mvsplit.diagnostics.baseline import Baseline
from mvsplit.diagnostics.events import Event, Level, Verdict
from mvsplit.diagnostics.findings_layers import FRESH, MANY, LayerHistory
from mvsplit.diagnostics.signals import StepSignals
from mvsplit.diagnostics.thresholds import Thresholds

_SHORT, _MEDIUM, _LONG = 10, 20, 50  # lines of a window
USUAL_LINES = _MEDIUM  # of which a loss or a gradient is usual


class StepHistory:
    """What the lines of metrics have shown."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.t = thresholds
        self.first_loss: float | None = None  # of the whole run: where a collapsed one goes back to
        self._rich = False  # whether the log ever held more than loss and gradient norm
        self.restart()

    def restart(self) -> None:
        """After a rollback the run settles anew, and keeps where it began."""
        self.lines = 0
        self.stirred = False
        self._loss, self._grad, self._writer = (Baseline(_MEDIUM) for _ in range(3))
        self._recent = Baseline(_SHORT)
        self._share, self._logit = Baseline(_LONG), Baseline(_LONG)
        self._share_most = 0.0
        self._best, self._noise = MANY, 0.0
        self._early: float | None = None  # the loss once settled, for what does not move
        self._elevated = 0
        self._shocked, self._shock_grad = 0, 1.0
        self._overflows = 0  # lines in a row
        # The spikes before a rise of the loss and at its beginning, not those of its noise.
        self._spikes: deque[float] = deque([1.0], maxlen=_MEDIUM + self.t.bare_lines)
        self._lr: float | None = None
        self._jump, self._jump_line, self._jump_step = 1.0, -FRESH, 0
        self._dead = 0

    @property
    def settling(self) -> bool:
        return 0 < self.lines <= self.t.settle

    def look(self, s: StepSignals, layers: LayerHistory) -> Iterator[Event]:
        """What a line of metrics says, with the looks into the layers behind it."""
        self.lines += 1
        self._rich |= s.attention_share is not None
        self.stirred = bool(s.broken)
        if s.broken:
            yield self._non_finite(s)
        self._overflows = self._overflows + 1 if s.overflowed else 0
        yield from self._learning_rate(s)
        yield from self._starvation(s, layers)
        if not self.settling:
            yield from self._spike(s, layers)
            yield from self._logits(s)
        yield from self._loss_level(s, layers)
        self._remember(s)

    # The rules

    def _non_finite(self, s: StepSignals) -> Event:
        names = " and ".join(s.broken)
        if s.overflowed and self._overflows < self.t.overflows:
            message = (
                f"Not finite at a loss scale of {s.loss_scale:g}, which may be too large: {names}."
            )
            return self._event(s, "warning", "non-finite", message, s.broken)
        return self._event(s, "alarm", "non-finite", f"Not finite: {names}.", s.broken)

    def _learning_rate(self, s: StepSignals) -> Iterator[Event]:
        before, self._lr = self._lr, s.lr if s.lr is not None else self._lr
        if s.lr is None or not before or s.lr <= self.t.lr_jump * before:
            return
        self._jump, self._jump_line, self._jump_step = s.lr / before, self.lines, s.step
        self.stirred = True  # what it does to the layers shows at the next step
        if not self.settling:
            found = {"lr": s.lr, "lr_before": before, "rise": self._jump}
            message = f"The learning rate rose {self._jump:.3g} times, to {s.lr:.3g}, in one step."
            yield self._event(s, "warning", "learning-rate", message, found)

    def _starvation(self, s: StepSignals, layers: LayerHistory) -> Iterator[Event]:
        """Q and K receive no gradient once all values are equal (Lemma 1); the writers still do."""
        share = s.attention_share
        if share is None:
            return
        usual = self._share.median if len(self._share) >= _SHORT else self._share_most
        fall = usual / max(share, usual / MANY) if usual else 1.0
        self.stirred |= fall > self.t.starved**0.5
        if self.settling:
            dead = share < self.t.starved_at_start and fall > _SHORT
        else:
            dead = fall > self.t.starved
        # From its first line on dead, and not on the rise as after a start from zero writers.
        never = self.lines > _SHORT and self._share_most < self.t.starved_at_start / 10
        self._dead = self._dead + 1 if dead or (never and fall >= 1) else 0
        if self._dead and not layers.refutes(self.lines):
            level: Level = "alarm" if self._dead > (1 if self.settling else 0) else "warning"
            begins = "Mean-mode collapse" if level == "alarm" else "Signs of a mean-mode collapse"
            yield self._event(
                s,
                level,
                "mean-mode",
                f"{begins}: the gradients of queries and keys have died away to "
                f"{share:.1e} of the writers' ({usual:.1e} was usual), as they do once all tokens "
                f"are alike.",
                {"attention_share": share, "usual_share": usual} | layers.evidence(),
                layers.front,
            )

    def _spike(self, s: StepSignals, layers: LayerHistory) -> Iterator[Event]:
        grad = max(
            self._grad.times(s.grad_norm) if s.grad_norm is not None else 1.0,
            self._writer.times(s.writer) if s.writer is not None else 1.0,
        )
        rise, sigmas = self._loss_rise(s)
        self.stirred |= grad > self.t.spike_grad / 2 or sigmas > self.t.spike_sigmas / 2
        if self._elevated < self.t.bare_lines:
            self._spikes.append(grad)
        in_loss = rise > self.t.spike_loss and sigmas > self.t.spike_sigmas
        yield from self._shock(s, layers, grad, in_loss)
        if grad <= self.t.spike_grad and not in_loss:
            return
        found = {"grad_rise": grad, "loss_rise": rise, **layers.evidence()}
        if layers.near(self.lines) and grad > self.t.spike_grad:
            message = (
                f"Mean-mode collapse begins: the gradients are {grad:.3g} times the usual while "
                f"the tokens of the deep layers are alike."
            )
            yield self._event(s, "alarm", "mean-mode", message, found, layers.front)
        elif in_loss and self.lines - self._jump_line <= self.t.lr_memory:
            yield self._too_fast(s, found)
        elif in_loss:
            rate = "" if self._lr else " So is the learning rate, which the log does not have."
            message = (
                f"One step stands out: loss {rise:.3g} times the usual, gradient {grad:.3g} times. "
                f"Its batch is the first suspect.{rate}"
            )
            yield self._event(s, "warning", "data-outlier", message, found)
        elif grad > 2 * self.t.spike_grad:
            message = f"The gradient is {grad:.3g} times the usual for one step; the loss is not."
            yield self._event(s, "info", "data-outlier", message, found)

    def _too_fast(self, s: StepSignals, found: dict[str, float]) -> Event:
        """The first step after a jump of the learning rate at which the run breaks: which way it
        will go, its layers do not show yet, and few runs come back from there."""
        both = found["grad_rise"] > self.t.spike_grad
        steps = s.step - self._jump_step
        message = (
            f"The loss is {found['loss_rise']:.3g} times the usual and the gradients are "
            f"{found['grad_rise']:.3g} times, {steps} {'step' if steps == 1 else 'steps'} after "
            f"the learning rate rose {self._jump:.3g} times"
        )
        message += ": this network does not bear that rate." if both else "."
        level: Level = "alarm" if both else "warning"
        return self._event(s, level, "learning-rate", message, found | {"rise": self._jump})

    def _shock(
        self, s: StepSignals, layers: LayerHistory, grad: float, in_loss: bool
    ) -> Iterator[Event]:
        """A loss that jumped with the gradient and stays: all that a bare log shows of a run that
        breaks, and long before its level tells which way."""
        if s.loss is not None and (in_loss or self._shocked):
            self._shocked = self._shocked + 1 if self._loss.times(s.loss) > self.t.shock else 0
            self._shock_grad = max(grad, self._shock_grad) if self._shocked > 1 else grad
        broken = self._shocked == self.t.shock_lines and self._shock_grad > self.t.spike_grad
        if s.loss is None or not broken or not self._is_bare(layers):
            return
        rise = self._loss.times(s.loss)
        found = {"loss": s.loss, "loss_rise": rise, "grad_rise": self._shock_grad}
        message = (
            f"The loss jumped together with the gradient ({self._shock_grad:.3g} times the usual) "
            f"and is {rise:.3g} times the usual {self._shocked} lines later; the log holds too "
            f"little to say whether it is a mean-mode collapse."
        )
        yield self._event(s, "alarm", "divergence", message, found)

    def _loss_rise(self, s: StepSignals) -> tuple[float, float]:
        if s.loss is None or not self._loss.full:
            return 1.0, 0.0
        usual, sigma = self._loss.median, self._loss.sigma
        spread = max(sigma, 1e-3 * abs(usual), 1e-12)
        return self._loss.times(s.loss), (s.loss - usual) / spread

    def _logits(self, s: StepSignals) -> Iterator[Event]:
        if s.logit is None or s.logit <= self.t.logit:
            return
        rise = self._logit.times(s.logit)
        if rise > self.t.logit_rise:
            level: Level = "alarm" if rise > self.t.logit_rise**2 else "warning"
            message = (
                f"The largest attention logit is {s.logit:.3g}, {rise:.3g} times the usual: the "
                f"softmax is close to a hard choice."
            )
            found = {"logit": s.logit, "rise": rise}
            yield self._event(s, level, "attention-logits", message, found)

    def _loss_level(self, s: StepSignals, layers: LayerHistory) -> Iterator[Event]:
        """A loss that rose and does not come back, or that never moved."""
        if s.loss is None or not self._recent.full or self.settling:
            return
        now = self._recent.median
        high = now > self.t.elevated * self._best and now - self._best > 4 * self._noise
        self._elevated = self._elevated + 1 if high else 0
        stays = self._elevated >= self.t.elevated_lines and now > 0.97 * self._loss.median
        if stays or self._back_at_start(layers, now):
            yield self._risen(s, layers, now)
        elif self._has_not_moved():
            message = (
                f"The loss has not moved in {self.lines} lines: {now:.4g}, after "
                f"{self._early:.4g} in the beginning."
            )
            found = {"loss": now, "loss_early": self._early or 0.0}
            yield self._event(s, "warning", "stalled", message, found)

    def _has_not_moved(self) -> bool:
        """Whether the loss is where it was after the first lines. A network that collapsed in its
        first steps looks so, and one whose rate is too small; a log of the loss cannot tell."""
        if self._early is None or self.lines < self.t.stalled_lines or self.first_loss is None:
            return False
        if self._loss.median <= self.t.stalled_of_start * self.first_loss:
            return False  # it has learned something, and rests
        least = self.t.stalled * self._early
        return self._loss.median > least and self._best > (2 * self.t.stalled - 1) * self._early

    def _risen(self, s: StepSignals, layers: LayerHistory, now: float) -> Event:
        found = {"loss": now, "loss_best": self._best, "grad_rise": max(self._spikes)}
        found |= layers.evidence()
        verdict: Verdict = "divergence"
        if layers.collapsed(settling=False) or self._back_at_start(layers, now):
            verdict = "mean-mode"
            why = (
                f"it is back at about its first value after the gradient rose "
                f"{max(self._spikes):.3g} times, as in a mean-mode collapse"
            )
        elif self._is_bare(layers):
            why = "the log holds too little to say whether it is a mean-mode collapse"
        else:
            why = "nothing shows a mean-mode collapse"
        jump = self.lines - self._jump_line
        cause = f", since the learning rate rose {self._jump:.3g} times" if jump < 3 * _LONG else ""
        message = (
            f"The loss has risen from {self._best:.4g} to {now:.4g}{cause} and does not come "
            f"back; {why}."
        )
        return self._event(s, "alarm", verdict, message, found, layers.front)

    def _is_bare(self, layers: LayerHistory) -> bool:
        """Whether the log holds nothing of queries and keys, nor of the layers."""
        return not self._rich and layers.latest is None

    def _back_at_start(self, layers: LayerHistory, now: float) -> bool:
        """What a mean-mode collapse looks like in the loss and the gradient norm alone."""
        if self.first_loss is None or self._elevated < self.t.bare_lines:
            return False
        back = now > self.t.back_to_start * self.first_loss
        return self._is_bare(layers) and back and max(self._spikes) > self.t.bare_spike

    # What is usual

    def _remember(self, s: StepSignals) -> None:
        for baseline, value in (
            (self._grad, s.grad_norm),
            (self._writer, s.writer),
            (self._logit, s.logit),
        ):
            if value is not None:
                baseline.add(value)
        if s.attention_share is not None:
            self._share_most = max(self._share_most, s.attention_share)
            if not self._dead:  # a dead layer is no standard
                self._share.add(s.attention_share)
        if s.loss is not None:
            self._remember_loss(s.loss)

    def _remember_loss(self, loss: float) -> None:
        if self.first_loss is None:
            self.first_loss = loss
        for baseline in (self._loss, self._recent):
            baseline.add(loss)
        if self._recent.full and self._recent.median < self._best and not self.settling:
            self._best, self._noise = self._recent.median, self._recent.sigma
        if self._early is None and self.lines >= 2 * _MEDIUM and self._loss.full:
            self._early = self._loss.median

    def _event(
        self,
        s: StepSignals,
        level: Level,
        verdict: Verdict,
        message: str,
        evidence: dict[str, float],
        layer: int | None = None,
    ) -> Event:
        return Event(
            step=s.step,
            level=level,
            verdict=verdict,
            layer=layer,
            message=message,
            evidence=evidence,
        )
