"""What the detector reads off a line of a log, whichever of the fields it has."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mvsplit.diagnostics.logs import Record, as_number

WRITERS = ("grad_writer_attn", "grad_writer_ffn")
QUERY_KEY = ("grad_query", "grad_key")
LOGITS = ("attention_logit_max", "attn_logit_max", "max_attention_logit", "max_logit")
SCALARS = ("loss", "grad_norm", *WRITERS, *QUERY_KEY, *LOGITS)
LAYERED = (
    "tcs",
    "rho",
    *(f"{name}_{branch}" for branch in ("attn", "ffn") for name in ("g_mean", "g_ctr")),
)
_ALIKE = 0.9  # a similarity from which on the tokens of a layer count as alike


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSignals:
    """A line of metrics.jsonl. What it does not hold is None.

    Attributes:
        writer: L2 norm of the writers' gradients together.
        attention_share: norm of the gradients of W_Q and W_K over that of the writers.
        logit: the largest attention logit.
        loss_scale: what the loss was multiplied by for half precision; None or 1 for nothing.
        broken: the fields that are not finite.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    lr: float | None
    loss_scale: float | None
    writer: float | None
    attention_share: float | None
    logit: float | None
    broken: dict[str, float]

    @classmethod
    def of(cls, record: Record) -> StepSignals | None:
        """The signals of a line, None if it has no field of this kind."""
        numbers: dict[str, float] = {}
        broken: dict[str, float] = {}
        for name in SCALARS:
            value = as_number(record.get(name))
            if value is not None:
                (numbers if math.isfinite(value) else broken)[name] = value
        if not numbers and not broken:
            return None
        writer = _norm(numbers, WRITERS)
        attention = _norm(numbers, QUERY_KEY)
        lr = as_number(record.get("lr", record.get("learning_rate")))
        return cls(
            step=record["step"],
            loss=numbers.get("loss"),
            grad_norm=numbers.get("grad_norm"),
            lr=lr if lr is not None and math.isfinite(lr) else None,
            loss_scale=as_number(record.get("loss_scale")),
            writer=writer,
            attention_share=attention / writer if attention is not None and writer else None,
            logit=max((numbers[n] for n in LOGITS if n in numbers), default=None),
            broken=broken,
        )

    @property
    def overflowed(self) -> bool:
        """Whether gradients are not finite because the loss scale was too large for them, as far as
        one line tells: the loss is finite, and a scaler leaves the update out and lowers its scale.
        """
        scaled = self.loss_scale is not None and self.loss_scale > 1
        return scaled and bool(self.broken) and "loss" not in self.broken


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSignals:
    """A line of layers.jsonl, reduced to the deepest quarter of the layers it holds.

    Attributes:
        similarity: median token cosine similarity (TCS).
        mode_ratio: median G_mean / G_ctr, of the writer in which it is larger.
        front: the layer from which on the tokens of all deeper ones are alike; where there is none,
            the layer with the most similar tokens.
        logit: the largest attention logit of all layers.
        broken: the first layer and field that is not finite.
    """

    step: int
    similarity: float | None
    mode_ratio: float | None
    front: int | None
    logit: float | None
    broken: tuple[int, str] | None

    @classmethod
    def of(cls, record: Record) -> LayerSignals | None:
        """The signals of a line, None if it has no field of this kind."""
        columns = {n: record[n] for n in (*LAYERED, *LOGITS) if isinstance(record.get(n), list)}
        if not columns:
            return None
        ratios = [_mode_ratios(record, branch) for branch in ("attn", "ffn")]
        known = [statistics.median(r) for r in map(_deep, ratios) if r]
        deep = _deep(columns.get("tcs", []))
        logits = [v for n in LOGITS for v in _numbers(columns.get(n, [])) if v is not None]
        layers = _layers(record, max(map(len, columns.values())))
        return cls(
            step=record["step"],
            similarity=statistics.median(deep) if deep else None,
            mode_ratio=max(known, default=None),
            front=_front(columns.get("tcs", []), layers),
            logit=max((v for v in logits if math.isfinite(v)), default=None),
            broken=_first_broken(columns, layers),
        )


def has_scalars(record: Record) -> bool:
    """Whether a line holds a number of a step, as lines of metrics do; those of layers have lists
    under some of the same names."""
    return any(as_number(record.get(name)) is not None for name in SCALARS)


def _norm(numbers: dict[str, float], names: Sequence[str]) -> float | None:
    found = [numbers[name] for name in names if name in numbers]
    return math.hypot(*found) if found else None


def _numbers(column: Any) -> list[float | None]:
    return [as_number(value) for value in column] if isinstance(column, list) else []


def _layers(record: Record, count: int) -> list[int]:
    """The layer of each place; counted from 0 where the line does not say."""
    named = [as_number(v) for v in record["layer"]] if _is_list(record.get("layer")) else []
    if len(named) != count or not all(v is not None and math.isfinite(v) for v in named):
        return list(range(count))
    return [int(v) for v in named if v is not None]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _deep(column: Any) -> list[float]:
    """The finite values of the deepest quarter, rounded up."""
    values = _numbers(column)
    quarter = values[len(values) - -(-len(values) // 4) :]
    return [v for v in quarter if v is not None and math.isfinite(v)]


def _mode_ratios(record: Record, branch: str) -> list[float | None]:
    """G_mean / G_ctr of each layer (paper Eq. 5), None where there is no gradient at all."""
    means, rests = (_numbers(record.get(f"{name}_{branch}")) for name in ("g_mean", "g_ctr"))
    return [
        None
        if mean is None or rest is None or mean + rest <= 0
        else mean / max(rest, 1e-9 * mean, 1e-300)
        for mean, rest in zip(means, rests, strict=False)
    ]


def _front(tcs: Any, layers: list[int]) -> int | None:
    known = {
        layer: value
        for layer, value in zip(layers, _numbers(tcs), strict=False)
        if value is not None and math.isfinite(value)
    }
    front = None
    for layer, value in reversed(known.items()):
        if value <= _ALIKE:
            break
        front = layer
    return max(known, key=known.__getitem__, default=None) if front is None else front


def _first_broken(columns: dict[str, Any], layers: list[int]) -> tuple[int, str] | None:
    found = [
        (layers[place], name)
        for name, column in columns.items()
        for place, value in enumerate(_numbers(column)[: len(layers)])
        if value is not None and not math.isfinite(value)
    ]
    return min(found, default=None)
