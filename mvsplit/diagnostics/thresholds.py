"""The numbers of the detector, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where the detector draws its lines. Counts are of lines, ratios are to the usual value.

    Attributes:
        settle: lines after a start, a resume or a rollback in which large changes are normal.
        hold: lines for which a verdict, once given, is not repeated.
        alike, mode_ratio: similarity of the deep tokens, and G_mean / G_ctr, of a collapse.
        mode_ratio_at_once: the ratio from which one look is enough; below it, two in a row.
        alike_at_start, mode_ratio_at_start: the same while the run settles.
        worse: by how much either must have changed for the worse since the run was calm.
        near_alike, near_mode_ratio: the same of a network that is close to it.
        starved: fall of the Q/K gradients against the writers'.
        starved_at_start: share of the writers' at which they count as dead from the start.
        spike_loss, spike_sigmas, spike_grad: a spike, in ratios and standard deviations.
        lr_jump: rise of the learning rate from one line to the next.
        lr_memory: lines for which a later rise of the loss is put down to it.
        elevated, elevated_lines: a loss above the run's best that does not come back.
        back_to_start: share of the first loss to which a collapsed network returns.
        bare_spike, bare_lines: in a log without more: the spike of the gradient norm that, if the
            loss is then back at its start for so many lines, means mean-mode.
        shock, shock_lines: in such a log, a loss that jumped with the gradient and is still this
            many times the usual after so many lines.
        stalled_lines, stalled: lines after which a loss that is still this share of what it was
            after the first 40 has not moved, if it is above `stalled_of_start` of its first value.
        overflows: lines in a row that may overflow under a loss scale before it is an alarm.
        logit, logit_rise: attention logits that saturate a softmax, and their rise.
    """

    settle: int = 20
    hold: int = 40
    alike: float = 0.9
    mode_ratio: float = 10.0
    mode_ratio_at_once: float = 30.0
    alike_at_start: float = 0.99
    mode_ratio_at_start: float = 100.0
    worse: float = 2.0
    near_alike: float = 0.5
    near_mode_ratio: float = 5.0
    starved: float = 30.0
    starved_at_start: float = 1e-3
    spike_loss: float = 1.8
    spike_sigmas: float = 8.0
    spike_grad: float = 4.0
    lr_jump: float = 2.5
    lr_memory: int = 20
    elevated: float = 1.3
    elevated_lines: int = 40
    back_to_start: float = 0.75
    bare_spike: float = 8.0
    bare_lines: int = 12
    shock: float = 1.4
    shock_lines: int = 3
    stalled_lines: int = 80
    stalled: float = 0.97
    stalled_of_start: float = 0.6
    overflows: int = 10
    logit: float = 50.0
    logit_rise: float = 3.0
