"""What a page that is open on running runs has to be told: all of it once, then what is new."""

from __future__ import annotations

import json
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from mvsplit.diagnostics.follow import FollowedRun
from mvsplit.diagnostics.report import render
from mvsplit.diagnostics.report_layers import LayerMap
from mvsplit.diagnostics.report_pack import Scale, pack_map, pack_run, scales_over

_SNAPSHOTS = 16  # how many of the latest states can be told apart from the present one


@dataclass(frozen=True)
class _MapState:
    """How a map was when a page was told of it."""

    generation: int
    scale: Scale
    layers: int
    steps: np.ndarray  # [N]

    def kept(self, other: _MapState) -> int:
        """How many of the first probes of `other` were here already, drawn the same."""
        if (self.generation, self.scale, self.layers) != (
            other.generation,
            other.scale,
            other.layers,
        ):
            return 0
        both = min(len(self.steps), len(other.steps))
        differing = np.flatnonzero(self.steps[:both] != other.steps[:both])
        return int(differing[0]) if len(differing) else both


@dataclass(frozen=True)
class _RunState:
    parts: dict[str, bytes]  # name of a part of the packed run → digest
    maps: dict[str, _MapState]


class LiveReport:
    """Follows run folders, which need not exist yet, and knows what each page was told.

    Files are read only when a page asks. Safe to use from several threads.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._runs = [FollowedRun(folder) for folder in folders]
        self._lock = Lock()
        self._prefix = secrets.token_hex(4)  # a page of an earlier server knows nothing of this one
        self._number = 0
        self._states: OrderedDict[str, list[_RunState]] = OrderedDict()
        self._packed: list[dict[str, Any]] = []
        self._scales: dict[str, Scale] = {}

    def page(self) -> str:
        """The whole page with all that is known now."""
        title = " · ".join(run.record.name for run in self._runs)
        return render(self.news(None) or {}, title=title, live=True)

    def news(self, known: str | None) -> dict[str, Any] | None:
        """What a page that was last told `known` does not know yet, None where there is nothing.

        Returns:
            `token` to ask with next time, `scales`, and for each run the parts that changed; of
            its maps the probes from number `from` on, or all of the map where there is no `from`,
            or null where the map is gone.
        """
        with self._lock:
            self._refresh()
            token = next(reversed(self._states))
            if known == token:
                return None
            before = self._states.get(known or "")
            runs = [
                self._run_news(i, None if before is None else before[i])
                for i in range(len(self._runs))
            ]
            scales = {name: asdict(scale) for name, scale in self._scales.items()}
            return {"token": token, "scales": scales, "runs": runs}

    def _refresh(self) -> None:
        changed = [run.refresh() for run in self._runs]
        if self._states and not any(changed):
            return
        records = [run.record for run in self._runs]
        self._scales = scales_over(records)
        self._packed = [pack_run(r.record) | {"status": r.status} for r in self._runs]
        self._number += 1
        self._states[f"{self._prefix}-{self._number}"] = [
            self._state(run, packed) for run, packed in zip(self._runs, self._packed, strict=True)
        ]
        while len(self._states) > _SNAPSHOTS:
            self._states.popitem(last=False)

    def _state(self, run: FollowedRun, packed: dict[str, Any]) -> _RunState:
        parts = {name: _digest(part) for name, part in packed.items()}
        maps = {
            name: _MapState(run.maps_generation, self._scales[name], len(m.values), m.steps)
            for name, m in run.record.maps.items()
        }
        return _RunState(parts, maps)

    def _run_news(self, index: int, before: _RunState | None) -> dict[str, Any]:
        before = before or _RunState({}, {})
        now = self._states[next(reversed(self._states))][index]
        parts = self._packed[index]
        news = {n: part for n, part in parts.items() if before.parts.get(n) != now.parts[n]}
        news["maps"] = self._maps_news(self._runs[index].record.maps, before.maps, now.maps)
        return news

    def _maps_news(
        self,
        maps: dict[str, LayerMap],
        before: dict[str, _MapState],
        now: dict[str, _MapState],
    ) -> dict[str, Any]:
        news: dict[str, Any] = {name: None for name in before if name not in now}
        for name, state in now.items():
            kept = before[name].kept(state) if name in before else 0
            m, scale = maps[name], self._scales[name]
            if not kept:
                news[name] = pack_map(m, scale)
            elif kept < len(m.steps) or kept < len(before[name].steps):
                rest = replace(m, steps=m.steps[kept:], values=m.values[:, kept:])
                news[name] = pack_map(rest, scale) | {"from": kept}
        return news


def _digest(part: Any) -> bytes:
    return blake2b(json.dumps(part).encode(), digest_size=16).digest()
