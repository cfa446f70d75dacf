"""Packs the numbers of runs into what the page carries, within a weight.

Curves travel as float32. Maps travel as one byte a cell: for each field one scale over all runs,
linear or logarithmic, of 254 levels; differences between neighbouring probes, deflated, base64.
"""

from __future__ import annotations

import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mvsplit.diagnostics.report_layers import LayerMap
from mvsplit.diagnostics.report_run import RunRecord
from mvsplit.diagnostics.report_series import Series

LEVELS = 254  # 0 … 253
NOT_FINITE = 254
NOT_MEASURED = 255
MAP_BUDGET = 5_500_000  # bytes of base64 for all maps of a page
_DECADES = 9  # of a logarithmic scale; smaller values show as its lower end
_SHARES = ("tcs", "mu_eff", "row_div", "retention")  # fields that live between 0 and 1
_LOG_FROM = 30.0  # largest / smallest value from which a scale is logarithmic
_POINTS = 2000  # of one scatter plot, one run


@dataclass(frozen=True)
class Scale:
    """How a value becomes a level: (v − low) / (high − low), or the same of log10 v."""

    low: float
    high: float
    log: bool


def scale_of(name: str, maps: Sequence[LayerMap]) -> Scale:
    """One scale over the finite values of all runs: from 0 to 1 at least for shares and cosines,
    logarithmic for other positive values of very different size."""
    finite = [m.values[np.isfinite(m.values)] for m in maps]
    values = np.concatenate(finite) if finite else np.empty(0, dtype=np.float32)
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if name.startswith(_SHARES):
        return Scale(min(low, 0.0), max(high, 1.0), log=False)
    positive = values[values > 0]
    if low >= 0 and len(positive) and high > _LOG_FROM * float(np.percentile(positive, 1)):
        return Scale(max(float(positive.min()), high / 10**_DECADES), high, log=True)
    return Scale(low, high, log=False)


def quantise(values: np.ndarray, scale: Scale) -> np.ndarray:
    """float32 [L, N] → uint8 levels [L, N]; NaN is `NOT_MEASURED`, infinity `NOT_FINITE`."""
    low, high = scale.low, scale.high
    v = np.where(np.isfinite(values), values, low).astype(np.float64)
    if scale.log:
        low, high, v = np.log10(low), np.log10(high), np.log10(np.maximum(v, low))
    level = np.rint((v - low) / ((high - low) or 1.0) * (LEVELS - 1))
    level = np.clip(level, 0, LEVELS - 1)
    level[np.isinf(values)] = NOT_FINITE
    level[np.isnan(values)] = NOT_MEASURED
    return level.astype(np.uint8)


def pack_levels(levels: np.ndarray) -> str:
    """uint8 [L, N] → base64 of the deflated differences (mod 256) along N, probe after probe."""
    probes = np.ascontiguousarray(levels.T)
    steps = np.diff(probes, axis=0, prepend=np.zeros((1, probes.shape[1]), dtype=np.uint8))
    return b64encode(zlib.compress(steps.tobytes(), 6)).decode()


def pack_array(values: np.ndarray, dtype: str) -> str:
    """Little-endian bytes in base64."""
    return b64encode(
        np.asarray(values).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    ).decode()


def pack_runs(runs: Sequence[RunRecord], budget: int = MAP_BUDGET) -> dict[str, Any]:
    """Everything the page's script reads, as one JSON-able dict.

    Where the maps weigh more than `budget` bytes, every second probe is left out until they do
    not, and each run says so in its notes. Curves over depth are taken from all probes.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.maps))
    scales = {
        name: scale_of(name, [run.maps[name] for run in runs if name in run.maps]) for name in names
    }
    maps = [dict(run.maps) for run in runs]
    packed = [_pack_maps(m, scales) for m in maps]
    every = 1
    while sum(len(p["data"]) for run in packed for p in run.values()) > budget:
        every *= 2
        maps = [{name: _every_second(m) for name, m in run.items()} for run in maps]
        packed = [_pack_maps(m, scales) for m in maps]
    return {
        "scales": {name: asdict(scale) for name, scale in scales.items()},
        "runs": [_pack_run(r, p, every) for r, p in zip(runs, packed, strict=True)],
    }


def _every_second(m: LayerMap) -> LayerMap:
    """Half of the probes, the last among them."""
    kept = slice((len(m.steps) - 1) % 2, None, 2)
    return replace(m, steps=m.steps[kept], values=m.values[:, kept])


def _pack_maps(maps: Mapping[str, LayerMap], scales: Mapping[str, Scale]) -> dict[str, Any]:
    return {
        name: {
            "layers": m.values.shape[0],
            "steps": pack_array(m.steps, "f8"),
            "data": pack_levels(quantise(m.values, scales[name])),
        }
        for name, m in maps.items()
    }


def _pack_run(run: RunRecord, maps: dict[str, Any], every: int) -> dict[str, Any]:
    notes = list(run.notes)
    if every > 1 and maps:
        notes.append(f"The maps show every {every}th probe, to keep this page small.")
    curves = {name: _pack_series(series) for name, series in run.series.items()}
    return {
        "name": run.name,
        "settings": run.settings,
        "series": curves | _curves_over_depth(run),
        "maps": maps,
        "alignment": {b: points for b in ("attn", "ffn") if (points := _alignment(run.maps, b))},
        "events": run.events,
        "pictures": [asdict(picture) for picture in run.pictures],
        "notes": notes,
    }


def _pack_series(series: Series) -> dict[str, Any]:
    packed: dict[str, Any] = {
        "stride": series.stride,
        "step": pack_array(series.step, "f8"),
        "mean": pack_array(series.mean, "f4"),
    }
    if series.stride > 1:
        packed["low"] = pack_array(series.low, "f4")
        packed["high"] = pack_array(series.high, "f4")
    if series.broken.any():
        packed["broken"] = pack_array(series.step[series.broken > 0], "f8")
    return packed


def _curves_over_depth(run: RunRecord) -> dict[str, Any]:
    """Norms that belong to layers, joined over depth; a norm over several layers is the root of
    the sum of squares. What metrics.jsonl has under its own name is left to it."""
    curves = {}
    for branch in ("attn", "ffn"):
        for mode in ("g_mean", "g_ctr"):
            name = f"{mode}_{branch}"
            if name in run.maps:
                curves[f"depth:{name}"] = _joined(run.maps[name], first_layer=0)
    for name in ("grad_query", "grad_key"):
        if name in run.maps and name not in run.series:
            layers = run.maps[name].values.shape[0]
            curves[name] = _joined(run.maps[name], first_layer=layers - max(1, layers // 4))
    return curves


def _joined(m: LayerMap, first_layer: int) -> dict[str, Any]:
    values = m.values[first_layer:].astype(np.float64)
    norm = np.sqrt(np.nansum(values**2, axis=0))
    norm[np.isnan(values).all(axis=0)] = np.nan
    broken = np.isinf(norm)
    norm[broken] = np.nan
    empty = np.full_like(norm, np.nan)
    return _pack_series(Series(m.steps, norm, empty, empty, broken.astype(np.int64), stride=1))


def _alignment(maps: Mapping[str, LayerMap], branch: str) -> dict[str, Any] | None:
    """A − 1 against (T−1)κ̂ (Eq. 6), a point for each layer of each probe that has both."""
    a, envelope = maps.get(f"amplification_{branch}"), maps.get(f"envelope_{branch}")
    if a is None or envelope is None:
        return None
    steps, of_a, of_envelope = np.intersect1d(a.steps, envelope.steps, return_indices=True)
    layers = min(len(a.values), len(envelope.values))
    x, y = envelope.values[:layers, of_envelope], a.values[:layers, of_a] - 1.0
    layer, probe = np.nonzero(np.isfinite(x) & np.isfinite(y) & (x > 0))
    known = len(layer)
    order = np.lexsort((layer, probe))  # probe after probe, so that thinning keeps all of training
    few = order[np.linspace(0, known - 1, min(known, _POINTS)).round().astype(int)]
    layer, probe = layer[few], probe[few]
    return {
        "of": known,
        "step": pack_array(steps[probe], "f8"),
        "layer": pack_array(layer, "f4"),
        "envelope": pack_array(x[layer, probe], "f4"),
        "excess": pack_array(y[layer, probe], "f4"),
    }
