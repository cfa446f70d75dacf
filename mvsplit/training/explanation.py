"""Why a step's gradient spiked: the step as it was, the trials, the trace and the conclusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mvsplit.diagnostics.attribution import (
    Conclusion,
    ModeSplit,
    Sample,
    Trial,
    calm_norm,
    conclude,
    removed_share,
)
from mvsplit.diagnostics.events import Event
from mvsplit.training.flight import Flight
from mvsplit.training.rerun import Gradient, Rerun, Trace, state_before, writers
from mvsplit.training.said import no_spike, said_at, sentences

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # relative, where a step ran on another machine


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Whether the step as it was gives what was recorded.

    Attributes:
        recorded, again: `loss`, `grad_norm`, and where they were recorded the families' norms.
        exact: bit for bit.
        close: within the tolerance for the run's precision.
    """

    recorded: dict[str, float]
    again: dict[str, float]
    exact: bool
    close: bool


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that is known of a step, and what its spike is put down to; `altered` is of `Flight`,
    `said` what the watch said at the step, and `watch` the same beside the trials, in sentences."""

    source: str
    step: int
    reason: str
    rule: str
    depth: int
    precision: str
    state_step: int
    calm: float | None
    reproduction: Reproduction
    altered: str | None
    trials: list[Trial]
    removed: dict[str, float | None]
    dropped: list[Sample]
    trace: Trace
    conclusion: Conclusion
    said: list[Event] = field(default_factory=list)
    watch: tuple[str, ...] = ()


def explain(
    flight: Flight, *, device: str | None = None, say: Callable[[str], None] = lambda line: None
) -> Explanation:
    """Runs the step again in every way that this module knows.

    Args:
        flight: the step.
        device: where; None for where the run was.
        say: is told what is being done.

    Raises:
        UserError: there is no state to start from, or the run cannot be rebuilt here.
    """
    state, start = state_before(flight, device, say)
    again = Rerun(flight, state)
    say("running the step as it was")
    whole = again.run(again.samples)
    not_finite = again.not_finite()
    reproduction = _compare(flight, whole)
    calm = calm_norm([r["grad_norm"] for r in flight.records if r["step"] < flight.step])
    trials = [again.trial("as-it-was", "as it was", whole)]
    say("dropping samples")
    dropped, without = again.without_samples(whole, calm)
    if without is not None:
        label = "without sample " + ", ".join(s.name for s in dropped)
        trials.append(again.trial("without-samples", label, without))
    say("changing precision and backward")
    trials += again.other_trials()
    trace = again.trace(whole, not_finite)
    said, largest = said_at(flight), largest_mean(trace.mode_split)
    conclusion = conclude(
        trials,
        calm=calm,
        reproduced=reproduction.close,
        dropped=dropped,
        split=largest,
    )
    if (instead := no_spike(conclusion, said)) is not None:
        conclusion = replace(conclusion, sentences=(instead,))
    observed = trials[0].grad_norm
    return Explanation(
        source=str(flight.path),
        step=flight.step,
        reason=flight.reason,
        rule=flight.experiment.model.rule.name,
        depth=flight.experiment.model.depth,
        precision=flight.experiment.train.precision,
        state_step=start,
        calm=calm,
        reproduction=reproduction,
        altered=flight.altered,
        trials=trials,
        removed={t.name: removed_share(observed, t.grad_norm, calm) for t in trials[1:]},
        dropped=dropped,
        trace=trace,
        conclusion=conclusion,
        said=said,
        watch=sentences(said, conclusion, trace.mode_split, largest),
    )


def _compare(flight: Flight, whole: Gradient) -> Reproduction:
    record = next(r for r in reversed(flight.records) if r["step"] == flight.step)
    recorded = {"loss": record["loss"], "grad_norm": record["grad_norm"]}
    again = {"loss": whole.loss, "grad_norm": whole.grad_norm}
    for family, norms in record.get("family_norms", {}).items():
        for layer, norm in enumerate(norms):
            recorded[f"{family}.{layer}"] = norm
            again[f"{family}.{layer}"] = whole.family_norms[family][layer]
    tolerance = TOLERANCE[flight.experiment.train.precision]
    pairs = [(recorded[name], again[name]) for name in recorded]
    scale = record["grad_norm"]  # the norm of a layer is compared on the scale of all of them
    return Reproduction(
        recorded=recorded,
        again=again,
        exact=all(_same(a, b) for a, b in pairs),
        close=all(_same(a, b) or abs(a - b) <= tolerance * max(abs(a), scale) for a, b in pairs),
    )


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def largest_mean(split: dict[str, list[float | None]]) -> ModeSplit | None:
    """The writer with the largest finite G_mean."""
    found = [
        ModeSplit(writer=w, layer=l, g_mean=m, g_ctr=c)
        for w, l, m, c in writers(split)
        if m is not None and c is not None and math.isfinite(m) and math.isfinite(c)
    ]
    return max(found, key=lambda s: s.g_mean) if found else None
