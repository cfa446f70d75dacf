"""Gathers what a run folder holds into what the report shows of it."""

from __future__ import annotations

import io
import json
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mvsplit.diagnostics.logs import Dropped, Record, as_number, read_jsonl
from mvsplit.diagnostics.report_layers import LayerMap, LayerMapsBuilder
from mvsplit.diagnostics.report_series import Series, SeriesTable
from mvsplit.errors import UserError, nearest_run

MOST_EVENTS = 400
MOST_PICTURES = 8
_PICTURE_SIDE = 320  # pixels; a picture of the report is a thumbnail
_HEAVY = 40_000  # bytes from which a picture is no PNG any more
_TEXT = 400  # characters kept of one text out of a log
_NON_FINITE = "nonfinite"  # the event with which a training run stops at such a value
_ENDS = ("finished", "interrupted", "stopped", _NON_FINITE)
_LOGS = ("metrics.jsonl", "layers.jsonl", "events.jsonl")


@dataclass(frozen=True)
class Picture:
    name: str
    data: str  # a data: URL


@dataclass
class RunRecord:
    """One run, small enough to draw."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)  # dotted name → value of config.json
    series: dict[str, Series] = field(default_factory=dict)
    maps: dict[str, LayerMap] = field(default_factory=dict)
    events: list[Record] = field(default_factory=list)
    watched: bool = False  # a detector looked on: it said so, or gave a verdict
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out, and why


def read_run(folder: Path | str) -> RunRecord:
    """Reads whatever of config, logs and samples a run folder has.

    Raises:
        UserError: no such folder, or one without a log.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"run {str(folder)!r} is no folder; {nearest_run(folder)}")
    if not any((folder / name).is_file() for name in _LOGS):
        raise UserError(f"run {str(folder)!r} has none of {', '.join(_LOGS)}; name a run's folder")
    run = RunRecord(name=name_of(folder))
    put_settings(run, folder / "config.json")
    for name, read in zip(_LOGS, (_read_metrics, _read_layers, _read_events), strict=True):
        if (folder / name).is_file():
            read(run, folder / name)
    put_pictures(run, find_pictures(folder))
    return run


def name_of(folder: Path) -> str:
    """What a run is called: the name of its folder."""
    return _text(folder.resolve().name)


def put_settings(run: RunRecord, path: Path) -> None:
    """Gives the run the settings of its config.json, if it has one."""
    if not path.is_file():
        return
    try:
        run.settings = dict(_leaves(json.loads(path.read_text(encoding="utf-8"))))
    except ValueError:
        run.notes.append("config.json could not be read as JSON and is left out.")


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        parts = (_leaves(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
        return list(chain.from_iterable(parts))
    text = value if isinstance(value, str) else json.dumps(value)
    return [(_text(prefix), _text(text))] if prefix else []


def _read_metrics(run: RunRecord, path: Path) -> None:
    lines, table = read_jsonl(path), SeriesTable()
    for record in lines:
        table.add(record)
    put_metrics(run, table, lines.dropped)


def put_metrics(run: RunRecord, table: SeriesTable, dropped: Dropped) -> None:
    """Gives the run its curves, and says in its notes what they leave out."""
    run.series = table.build()
    _note_dropped(run, "metrics.jsonl", dropped)
    widest = max((series.stride for series in run.series.values()), default=1)
    if widest > 1:
        run.notes.append(
            f"metrics.jsonl has {table.lines:,} lines; a point of a curve stands for up to "
            f"{widest:,} steps, with their smallest and largest value."
        )


def _read_layers(run: RunRecord, path: Path) -> None:
    lines, builder = read_jsonl(path), LayerMapsBuilder()
    for record in lines:
        builder.add(record)
    put_layers(run, builder.build(), builder, lines.dropped)


def put_layers(
    run: RunRecord, maps: dict[str, LayerMap], builder: LayerMapsBuilder, dropped: Dropped
) -> None:
    """Gives the run the maps that `builder` built, and says in its notes what they leave out."""
    run.maps = maps
    _note_dropped(run, "layers.jsonl", dropped)
    if builder.unfit:
        run.notes.append(
            f"layers.jsonl: {builder.unfit:,} arrays do not fit the layers of their line "
            "and are left out."
        )
    if builder.thinned:
        run.notes.append(f"layers.jsonl has {builder.lines:,} probes; evenly spaced ones are kept.")


class EventsBuilder:
    """Keeps warnings and alarms from the start, so that the first of them are never crowded out,
    and other events apart."""

    def __init__(self) -> None:
        self._serious: list[Record] = []
        self._others: list[Record] = []
        self.watched = False
        self.ended = False  # the run said so, and was not resumed since
        self.omitted = 0

    def add(self, record: Record) -> None:
        if record.get("event") in (*_ENDS, "resumed"):
            self.ended = record["event"] in _ENDS
        self.watched |= "verdict" in record or record.get("event") == "watching"
        if record.get("event") == _NON_FINITE:
            record.setdefault("level", "alarm")
        serious = record.get("level") in ("warning", "alarm")
        kept = self._serious if serious else self._others
        if len(kept) < MOST_EVENTS // 2:
            kept.append(_bounded(record))
        else:
            self.omitted += 1

    def build(self) -> list[Record]:
        return sorted(self._serious + self._others, key=lambda event: event["step"])


def _read_events(run: RunRecord, path: Path) -> None:
    lines, builder = read_jsonl(path, latest=False), EventsBuilder()
    for record in lines:
        builder.add(record)
    put_events(run, builder, lines.dropped)


def put_events(run: RunRecord, builder: EventsBuilder, dropped: Dropped) -> None:
    """Gives the run its events, and says in its notes what is left out of them."""
    run.events, run.watched = builder.build(), builder.watched
    _note_dropped(run, "events.jsonl", dropped)
    if builder.omitted:
        run.notes.append(f"events.jsonl: {builder.omitted:,} later events are left out.")


def _note_dropped(run: RunRecord, log: str, dropped: Dropped) -> None:
    if dropped.total:
        run.notes.append(f"{log}, lines left out: {dropped}.")


def _bounded(value: Any, depth: int = 3) -> Any:
    """The value with long texts cut and deep or long parts shortened; non-finite numbers become
    their names, which JSON in a browser can hold."""
    if isinstance(value, dict) and depth:
        return {_text(str(k)): _bounded(v, depth - 1) for k, v in list(value.items())[:40]}
    if isinstance(value, list) and depth:
        return [_bounded(v, depth - 1) for v in value[:40]]
    number = as_number(value)
    if number is not None:
        return value if np.isfinite(number) else str(number)
    return value if value is None or isinstance(value, bool) else _text(str(value))


def _text(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"


def find_pictures(folder: Path) -> list[Path]:
    """Up to `MOST_PICTURES` of the folder's samples, evenly over the training, the last always
    among them."""
    samples = folder / "samples"
    paths = sorted(
        [*samples.glob("*.png"), *samples.glob("*/grid.png"), *samples.glob("*/contact.png")],
        key=_natural,
    )
    if not paths:
        return []
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(MOST_PICTURES, len(paths))).round())
    return [paths[index] for index in chosen.astype(int)]


def put_pictures(run: RunRecord, paths: Sequence[Path]) -> None:
    """Gives the run these pictures, as thumbnails."""
    for path in paths:
        try:
            run.pictures.append(_picture(path))
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
            run.notes.append(f"samples/{_text(path.name)} is no readable picture.")


def _natural(path: Path) -> list[tuple[int, str]]:
    """step_9 before step_10."""
    parts = re.findall(r"\d+|\D+", _label(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _label(path: Path) -> str:
    return path.parent.name if path.name == "grid.png" else path.stem


def _picture(path: Path) -> Picture:
    with Image.open(path) as image:
        small = image.convert("RGB")
    scale = _PICTURE_SIDE / max(small.size)
    if scale < 1:
        size = (max(1, round(small.width * scale)), max(1, round(small.height * scale)))
        small = small.resize(size, Image.Resampling.LANCZOS)
    return Picture(_text(_label(path)), _data_url(small))


def _data_url(image: Image.Image) -> str:
    """PNG, or JPEG where PNG is heavy, as it is for photographs."""
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        if buffer.tell() <= _HEAVY:
            break
    return f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}"
