"""What the card does while a benchmark runs: clock and power, as `nvidia-smi` reports them.

A GPU that draws all the power it may lowers its clock, and products of random numbers draw more
than those of zeros. So a time says little without the load that it was taken under.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from types import TracebackType
from typing import Any

_FIELDS = (
    "clocks.sm",
    "clocks.mem",
    "power.draw",
    "temperature.gpu",
    "clocks_event_reasons.active",
)
_EVERY = 50  # ms
_POWER_CAP = 0x4  # the bit of `clocks_event_reasons.active` that says so


class CardLoad:
    """Reads the card's clock and power until it is left.

    Attributes:
        found: median clock in MHz, median and largest power in W, temperature in °C, and the share
            of the readings in which the power limit held the clock down; else what the tool said.
            Empty without the tool.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def __enter__(self) -> CardLoad:
        tool = shutil.which("nvidia-smi")
        self._process = None
        if tool is not None:
            query = (f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits")
            self._process = subprocess.Popen(
                [tool, *query, f"--loop-ms={_EVERY}", "-i", "0"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is None:
            return
        self._process.terminate()
        said, _ = self._process.communicate()
        self.found = summary(said)


def summary(said: str) -> dict[str, Any]:
    """Of lines of comma-separated readings; those that are not whole are left out."""
    rows = []
    for line in said.splitlines():
        parts = [part.strip() for part in line.split(",")]
        try:
            rows.append([*map(float, parts[:4]), int(parts[4], 16)])
        except (ValueError, IndexError):
            continue
    if not rows:
        return {"said": said[:300]}
    clock, memory, power, heat, reasons = zip(*rows, strict=True)
    return {
        "readings": len(rows),
        "sm_mhz": statistics.median(clock),
        "memory_mhz": statistics.median(memory),
        "watts": statistics.median(power),
        "most_watts": max(power),
        "celsius": max(heat),
        "held_by_power": statistics.fmean(bool(r & _POWER_CAP) for r in reasons),
    }
