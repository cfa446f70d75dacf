"""The watch's numbers in TensorBoard: `Monitor(model, sinks=[TensorBoardSink("runs/x")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mvsplit.diagnostics.sinks import measured
from mvsplit.errors import needs_extra

with needs_extra("track"):
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Writes numbers of steps and of layers as scalars, layers also as histograms over depth, and
    events as texts, all under `watch/`."""

    def __init__(self, folder: Path | str) -> None:
        self._writer = SummaryWriter(str(folder))

    def append(self, log: str, line: dict[str, Any]) -> None:
        step = line["step"]
        if log == "metrics":
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(f"watch/{name}", value, step)
        elif log == "layers":
            for name, values in measured(line).items():
                self._writer.add_scalar(f"watch/layers/{name}", values.mean(), step)
                if len(values[values.isfinite()]):
                    finite = values[values.isfinite()]
                    self._writer.add_histogram(f"watch/layers/{name}/depth", finite, step)
        else:
            self._writer.add_text("watch/events", _text(line), step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _text(line: dict[str, Any]) -> str:
    what = line.get("verdict", line["event"])
    return f"**{line.get('level', 'info')}: {what}** {line['message']}"
