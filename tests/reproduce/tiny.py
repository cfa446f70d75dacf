"""A size of seconds, and logs made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mvsplit.reproduce.runlog import RunLog
from mvsplit.reproduce.sizes import Regime, Size

FLOOR = 1.5
_REGIME = Regime(
    depth=4, width=16, heads=1, lr=1e-2, steps=8, batch_size=4, warmup=2, probe_every=2
)
TINY = Size(
    name="tiny",
    hardware="anything",
    workers=2,
    seeds=(0, 1),
    few=(0, 1),
    regimes={
        "start": _REGIME,
        "jump": Regime(**{**vars(_REGIME), "jump": 4, "factor": 10.0, "probe": "all"}),
        "front": Regime(**{**vars(_REGIME), "probe_every": 1}),
        "calm": _REGIME,
        "thousand": _REGIME,
    },
)
ONE_SEED = replace(TINY, name="small", seeds=(0,), few=(0,))
STEPS, JUMP = 100, 50
LAYERS = 8


def hand_made(
    label: str,
    seed: int = 0,
    *,
    loss: float = 0.7,
    similarity: float = 0.1,
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
    ended: str = "finished",
    **record: Any,
) -> RunLog:
    """A run of 100 steps that changes at step 50: loss 0.7 and similarity 0.1 before, as given
    after. `before` and `after` hold further fields, gradients in metrics and the rest by layer."""
    metrics, layers = [], []
    for step in range(1, STEPS + 1):
        late = step > JUMP
        fields = (after if late else before) or {}
        scalars = {k: v for k, v in fields.items() if k.startswith("grad_")}
        metrics.append({"step": step, "loss": loss if late else 0.7 * FLOOR, **scalars})
        if step % 2 == 0:
            arrays = {k: [v] * LAYERS for k, v in fields.items() if k not in scalars}
            tcs = [similarity if late else 0.1] * LAYERS
            layers.append({"step": step, "layer": list(range(LAYERS)), "tcs": tcs, **arrays})
    return RunLog(
        label=label,
        seed=seed,
        steps=STEPS,
        record={"ended": ended, "floor": FLOOR, "jump": JUMP, "times": None, **record},
        metrics=metrics,
        layers=layers,
    )


DEAD: dict[str, Any] = {"loss": 1.02 * FLOOR, "similarity": 0.99}
LIVE: dict[str, Any] = {"loss": 0.5 * FLOOR, "similarity": 0.2}
HALF: dict[str, Any] = {"loss": 0.85 * FLOOR, "similarity": 0.93}
