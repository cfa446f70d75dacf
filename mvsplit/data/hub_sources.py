"""Sources through the package `datasets`: parquet, webdataset tars, data sets of the hub."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mvsplit.data.sources import (
    PICTURES,
    BrokenPicture,
    Picture,
    Record,
    Source,
    as_captions,
    read_image,
    split_captions,
)
from mvsplit.errors import UserError, nearest

_IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img")
_CAPTIONS = ("captions", "caption", "text", "txt", "prompt", "label")
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


def open_dataset(
    place: str,
    *,
    split: str = "train",
    streaming: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Source:
    """Pictures of local parquet or tar files, or of a data set of the hub.

    Args:
        place: a path, pattern or folder of .parquet or .tar files, or OWNER/NAME[:CONFIG].
        split: of a data set of the hub.
        streaming: read a hub data set as it arrives, keeping nothing on the disk.
        image_column, caption_column: where the usual names do not fit.

    Raises UserError where nothing is found or `datasets` is not installed.
    """
    local = "/" not in place or place.startswith(("/", ".", "~"))
    if local and not place.endswith(tuple(_BUILDERS)) and not glob.glob(place):
        raise UserError(f"source: there is no folder {place}; check the path")
    if Path(place).suffix.lower() in PICTURES:
        raise UserError(f"source: {place} is one picture; give the folder that it lies in")
    if find_spec("datasets") is None:
        raise UserError(
            f"source: {place} is no folder of pictures, and everything else is read by the "
            "package datasets; install it with: pip install 'mvsplit[data]'"
        )
    files = _local_files(place)
    if files:
        data = _load(_BUILDERS[files[0].suffix], split="train", data_files=files)
        digest = _fingerprint_files(files)
    elif "/" in place and not Path(place).exists() and place.count("/") == 1:
        name, _, config = place.partition(":")
        data = _load(name, split=split, name=config or None, streaming=streaming)
        digest = f"{place}@{split}:{getattr(data.info, 'version', None)}"
    else:
        raise UserError(
            f"source: nothing at {place}; give a folder of pictures, .parquet or .tar files, or a "
            "data set of the hub as OWNER/NAME"
        )
    return DatasetSource(data, digest, image_column=image_column, caption_column=caption_column)


class DatasetSource:
    """The rows of a data set that `datasets` has opened, in their order; pictures stay encoded
    until they are asked for."""

    def __init__(
        self,
        data: Any,
        fingerprint: str,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        from datasets import Image

        columns = list(data.features or next(iter(data)))
        self._image = _column("image_column", image_column, _IMAGES, columns)
        self._caption = _caption_column(caption_column, columns)
        feature = (data.features or {}).get(self._image)
        self._data = (
            data.cast_column(self._image, Image(decode=False))
            if isinstance(feature, Image)
            else data
        )
        label = (data.features or {}).get(self._caption) if self._caption else None
        self._classes: list[str] | None = getattr(label, "names", None)
        self._fingerprint = fingerprint
        self.size: int | None = len(data) if hasattr(data, "__len__") else None

    def fingerprint(self) -> str:
        """Of names and sizes of local files, or the hub's name, split and version."""
        return self._fingerprint

    def __iter__(self) -> Iterator[Record]:
        if self.size is not None:
            for number in range(self.size):
                yield Record(name=f"row {number}", load=partial(self._load_row, number))
        else:
            for number, row in enumerate(self._data):
                name = str(row.get("__key__", f"row {number}"))
                yield Record(name=name, load=partial(self._picture, row))

    def _load_row(self, number: int) -> Picture:
        return self._picture(self._data[number])

    def _picture(self, row: Mapping[str, Any]) -> Picture:
        return Picture(image=read_image(_encoded(row[self._image])), captions=self._captions(row))

    def _captions(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        value = row[self._caption] if self._caption else None
        if self._classes is not None and value is not None:
            return (self._classes[value].replace("_", " "),)
        if isinstance(value, bytes):
            value = value.decode("utf-8", errors="replace")
        if isinstance(value, str) and self._caption == "txt":
            return split_captions(value)
        return as_captions(value)


def _encoded(value: Any) -> bytes | Path:
    """The bytes of a picture, or its file."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        return Path(value)
    if not isinstance(value, bytes):
        raise BrokenPicture(f"holds {type(value).__name__}, not the bytes of a picture")
    return value


def _load(builder: str, **options: Any) -> Any:
    import datasets

    if "data_files" in options:
        options["data_files"] = [str(path) for path in options["data_files"]]
        options["streaming"] = True  # local files need no second copy in the cache of `datasets`
    try:
        return datasets.load_dataset(builder, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"source: {builder} cannot be opened: {reason}") from error


def _local_files(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        found = sorted(path.glob("*.parquet")) or sorted(path.glob("*.tar"))
    else:
        found = [Path(name) for name in sorted(glob.glob(place))]
    files = [path for path in found if path.suffix in _BUILDERS]
    if len({path.suffix for path in files}) > 1:
        raise UserError(f"source: {place} matches .parquet and .tar files; give one kind")
    return files


def _fingerprint_files(files: list[Path]) -> str:
    lines = "".join(f"{path.name}\0{path.stat().st_size}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _column(option: str, wanted: str | None, usual: tuple[str, ...], columns: list[str]) -> str:
    if wanted is not None and wanted not in columns:
        raise UserError(f"{option}={wanted!r} is no column; {nearest(wanted, columns)}")
    found = wanted or next((name for name in usual if name in columns), None)
    if found is None:
        raise UserError(f"{option}: none of {', '.join(usual)}; choose one of {', '.join(columns)}")
    return found


def _caption_column(wanted: str | None, columns: list[str]) -> str | None:
    if wanted is None and not set(_CAPTIONS) & set(columns):
        return None
    return _column("caption_column", wanted, _CAPTIONS, columns)
