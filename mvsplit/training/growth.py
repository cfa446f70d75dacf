"""A run that goes on with a deeper network: what its optimiser knew is carried over."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from mvsplit.errors import UserError
from mvsplit.models.growth import moved_name, new_layers
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
    units of the rest, so that after the bias correction they are what they were.

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
    late = set(source.values.get("new_layers", []))
    moments = state.optimizer.moments()
    fresh = {f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in state.parameters_apart()}
    for name, moment in theirs.items():
        kind, _, parameter = name.partition(".")
        decay = config.betas[0 if kind == "exp_avg" else 1]
        target = moments.pop(f"{kind}.{moved_name(parameter, moved)}", None)
        if target is not None:
            target.copy_(moment).mul_(_correction(parameter, late, counts, decay))
    if lost := sorted(moments.keys() - fresh):
        raise UserError(f"grow: the source has no {lost[0]}; it trained only some of its weights")
    kinds = state.optimizer.updates()
    state.optimizer.set_updates({k: 0 if k.startswith("joined") else counts[k] for k in kinds})
    state.loader.load_state_dict(source.values["data"])


def _correction(name: str, late: set[int], counts: dict[str, int], decay: float) -> float:
    """(1 − d^n) / (1 − d^k) for a parameter with k updates behind it among others with n."""
    layer = re.match(r"blocks\.(\d+)\.", name)
    if layer is None or int(layer[1]) not in late:
        return 1.0
    whole, own = counts["decayed"], counts["joined-decayed"]
    return (1 - decay**whole) / (1 - decay**own) if own else 1.0
