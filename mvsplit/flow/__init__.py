"""Rectified flow: path, target, losses and times."""

from mvsplit.flow.preference import DPOConfig, implicit_rewards, preference_losses
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
    "DPOConfig",
    "advance",
    "flow_loss",
    "flow_losses",
    "implicit_rewards",
    "interpolate",
    "log_snr",
    "preference_losses",
    "sample_times",
    "schedule",
    "shift_time",
    "velocity_target",
]
