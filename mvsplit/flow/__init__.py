"""Rectified flow: path, target, loss and times."""

from mvsplit.flow.rectified import (
    advance,
    flow_loss,
    flow_losses,
    interpolate,
    log_snr,
    sample_times,
    schedule,
    shift_time,
    velocity_target,
)

__all__ = [
    "advance",
    "flow_loss",
    "flow_losses",
    "interpolate",
    "log_snr",
    "sample_times",
    "schedule",
    "shift_time",
    "velocity_target",
]
