"""Packs the numbers of runs into what the page carries, within a weight.

Curves travel as float32. Maps travel as one byte a cell: for each field one scale over all runs,
linear or logarithmic, of 254 levels; differences between neighbouring probes, deflated, base64.
"""

from __future__ import annotations

import json
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


def scales_over(runs: Sequence[RunRecord]) -> dict[str, Scale]:
    """A scale for every field that has a map in any of the runs."""
    names = dict.fromkeys(name for run in runs for name in run.maps)
    return {n: scale_of(n, [run.maps[n] for run in runs if n in run.maps]) for n in names}


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


def pack_runs(runs: Sequence[RunRecord], budget: int) -> dict[str, Any]:
    """Everything the page's script reads, as one JSON-able dict of at most `budget` bytes.

    Where it would weigh more, the maps keep fewer probes, evenly chosen, and each run says so in
    its notes. Curves over depth are taken from all probes.
    """
    scales = scales_over(runs)
    packed = [pack_run(run) for run in runs]
    budget -= len(json.dumps(packed))
    maps, share = _pack_within(runs, scales, budget)
    for run, run_maps in zip(packed, maps, strict=True):
        run["maps"] = run_maps
        if share < 1 and run_maps:
            run["notes"].append(
                f"The maps show {share:.0%} of the probes, evenly chosen, to keep this page small."
            )
    return {"scales": {name: asdict(scale) for name, scale in scales.items()}, "runs": packed}


def _pack_within(
    runs: Sequence[RunRecord], scales: Mapping[str, Scale], budget: int
) -> tuple[list[dict[str, Any]], float]:
    """The packed maps of each run, and the share of the probes that they hold."""
    share = 1.0
    while True:
        packed = [
            {name: pack_map(_thinned(m, share), scales[name]) for name, m in run.maps.items()}
            for run in runs
        ]
        weight = len(json.dumps(packed))
        most = max((len(m.steps) for run in runs for m in run.maps.values()), default=0)
        if weight <= budget or share * most <= 2:  # two probes are the least that is still a map
            return packed, share
        share *= min(0.9, 0.95 * max(budget, 0) / weight)


def _thinned(m: LayerMap, share: float) -> LayerMap:
    """That share of the probes, the first and the last among them."""
    probes = len(m.steps)
    kept = np.linspace(0, probes - 1, min(probes, max(2, int(share * probes)))).round().astype(int)
    return replace(m, steps=m.steps[kept], values=m.values[:, kept])


def pack_map(m: LayerMap, scale: Scale) -> dict[str, Any]:
    """One map, in levels of `scale`."""
    return {
        "layers": m.values.shape[0],
        "steps": pack_array(m.steps, "f8"),
        "data": pack_levels(quantise(m.values, scale)),
    }


def pack_run(run: RunRecord) -> dict[str, Any]:
    """All of a run but its maps."""
    curves = {name: _pack_series(series) for name, series in run.series.items()}
    return {
        "name": run.name,
        "settings": run.settings,
        "series": curves | _curves_over_depth(run),
        "alignment": {b: points for b in ("attn", "ffn") if (points := _alignment(run.maps, b))},
        "events": run.events,
        "watched": run.watched,
        "pictures": [asdict(picture) for picture in run.pictures],
        "notes": list(run.notes),
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
    """What the layers have to say together. A curve that metrics.jsonl has is left to it."""
    curves = {}
    for branch in ("attn", "ffn"):
        for mode in ("g_mean", "g_ctr"):
            name = f"{mode}_{branch}"
            if name in run.maps:
                curves[f"depth:{name}"] = _pack_curve(_norm_over_layers(run.maps[name]))
    for name in ("grad_query", "grad_key"):
        if name in run.maps and name not in run.series:
            curves[name] = _pack_curve(_norm_over_layers(_deepest_quarter(run.maps[name])))
    if "tcs" in run.maps:
        curves["depth:tcs"] = _pack_curve(_mean_over_layers(_deepest_quarter(run.maps["tcs"])))
    return curves


def _deepest_quarter(m: LayerMap) -> LayerMap:
    layers = len(m.values)
    return replace(m, values=m.values[layers - max(1, layers // 4) :])


def _norm_over_layers(m: LayerMap) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and root of the sum of squares over the measured layers [N]."""
    values = m.values.astype(np.float64)
    norm = np.sqrt(np.nansum(values**2, axis=0))
    norm[np.isnan(values).all(axis=0)] = np.nan
    return m.steps, norm


def _mean_over_layers(m: LayerMap) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and mean over the measured layers [N]."""
    measured = np.count_nonzero(~np.isnan(m.values), axis=0)
    total = np.nansum(m.values, axis=0, dtype=np.float64)
    return m.steps, np.where(measured > 0, total / np.maximum(measured, 1), np.nan)


def _pack_curve(curve: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    steps, values = curve
    broken = np.isinf(values)
    known = np.where(broken, np.nan, values)
    return _pack_series(Series(steps, known, known, known, broken.astype(np.int64), stride=1))


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
