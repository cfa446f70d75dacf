"""The watch's numbers in Weights & Biases: `Monitor(model, sinks=[WandbSink(wandb.init(…))])`."""

from __future__ import annotations

from typing import Any

from mvsplit.diagnostics.sinks import measured
from mvsplit.errors import needs_extra

with needs_extra("track"):
    import wandb


class WandbSink:
    """Logs numbers of steps, means and histograms over the layers, and events, all under `watch/`
    and with `watch/step` as their axis, so that they do not meddle with the steps of the run. An
    alarm is an alert too.

    Args:
        run: what `wandb.init` returned; it stays the caller's to finish.
    """

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        run.define_metric("watch/step", hidden=True)
        run.define_metric("watch/*", step_metric="watch/step")

    def append(self, log: str, line: dict[str, Any]) -> None:
        found: dict[str, Any] = {"watch/step": line["step"]}
        if log == "metrics":
            found |= {f"watch/{name}": v for name, v in line.items() if name != "step"}
        elif log == "layers":
            for name, values in measured(line).items():
                found[f"watch/layers/{name}"] = values.mean().item()
                finite = values[values.isfinite()]
                if len(finite):
                    found[f"watch/layers/{name}/depth"] = wandb.Histogram(finite.tolist())
        else:
            found["watch/event"] = line.get("verdict", line["event"])
            found["watch/message"] = line["message"]
            if line.get("level") == "alarm":
                self._run.alert(title=line["verdict"], text=line["message"])
        self._run.log(found)
