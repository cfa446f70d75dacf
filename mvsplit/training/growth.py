"""A run that goes on with a deeper network: what its optimiser knew is carried over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mvsplit.errors import UserError
from mvsplit.models.growth import moved_name, new_layers
from mvsplit.training.carried import correction
from mvsplit.training.checkpoint import Snapshot
from mvsplit.training.config import TrainConfig
from mvsplit.training.state import TrainState


@torch.no_grad()
def carry_over(
    state: TrainState, source: Snapshot, moved: Sequence[int], config: TrainConfig
) -> None:
    """Gives a run whose network has grown the moments and the data position of the run before.

    The new layers begin with fresh moments and a bias correction of their own. Moments of layers
    that were new in the run before, and have seen fewer updates than the rest, are put into the
    units of the rest, so that after the bias correction they are what they were; so are those of
    gains that came by a surgery.

    Args:
        state: of the deeper network, at step 0.
        source: a checkpoint of the shallower one, with its moments.
        moved: for each of its layers, where that is now.

    Raises:
        UserError: the checkpoint has no moments, or they cannot be carried; the data are others.
    """
    theirs, counts = source.tensors.get("optimizer", {}), source.values.get("updates", {})
    if not theirs:
        raise UserError("grow: the source has no moments; name a run or a checkpoint of mvsplit")
    if "low" in counts or "low" in state.optimizer.updates():
        raise UserError(
            "train.weights: layers that come later need a bias correction of their own, which "
            "weights in bf16 or split do not have; choose fp32"
        )
    state.set_apart(new_layers(moved, state.model.config.depth))
    late = source.values.get("new_layers", [])
    moments = state.optimizer.moments()
    fresh = {f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in state.parameters_apart()}
    for name, moment in theirs.items():
        kind, _, parameter = name.partition(".")
        target = moments.pop(f"{kind}.{moved_name(parameter, moved)}", None)
        if target is not None:
            target.copy_(moment).mul_(correction(name, late, counts, config.betas))
    if lost := sorted(moments.keys() - fresh):
        raise UserError(f"grow: the source has no {lost[0]}; it trained only some of its weights")
    kinds = state.optimizer.updates()
    state.optimizer.set_updates({k: 0 if k.startswith("joined") else counts[k] for k in kinds})
    state.loader.load_state_dict(source.values["data"])
