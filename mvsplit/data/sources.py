"""Where pictures and captions come from: folders, parquet, webdataset tars, the hub.

A source is gone through once, in an order that never changes. Its records are lazy: nothing is read
before `load`, so that passing over what is encoded already costs next to nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps

from mvsplit.errors import UserError

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))
_CAPTION_FIELDS = ("captions", "caption", "text")


class BrokenPicture(Exception):
    """A picture that cannot be read; the message says why, in one line."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in RGB and its captions, of which there may be none."""

    image: Image.Image
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture of a source. `load` raises BrokenPicture where it cannot be read."""

    name: str
    load: Callable[[], Picture]


class Source(Protocol):
    """An ordered collection of pictures."""

    @property
    def size(self) -> int | None:
        """Number of pictures; None where only the end will tell."""

    def fingerprint(self) -> str:
        """Changes where pictures or captions were added, removed or replaced."""

    def __iter__(self) -> Iterator[Record]: ...


def open_source(place: str, **options: Any) -> Source:
    """The source at `place`.

    Args:
        place: a folder of pictures; parquet files or webdataset tars (a path, a pattern or a
            folder of them); or the name of a data set of the hub, OWNER/NAME or OWNER/NAME:CONFIG.
        options: `split`, `streaming`, `image_column` and `caption_column` of a data set; a folder
            of pictures takes none.

    Raises UserError where there is nothing, or where the package `datasets` is needed and absent.
    """
    path = Path(place)
    if path.is_dir() and not any(path.glob("*.parquet")) and not any(path.glob("*.tar")):
        given = [name for name, value in options.items() if name != "split" and value]
        if given:
            raise UserError(f"{given[0]}: a folder of pictures has none; leave it away")
        return ImageFolder(path)
    from mvsplit.data.hub_sources import open_dataset  # here: `datasets` takes a second to import

    return open_dataset(place, **options)


class ImageFolder:
    """All pictures of a folder and of the folders in it, by name.

    A picture's captions are, in this order of preference: the lines of the .txt beside it, its line
    in the metadata.jsonl of its folder (`file_name`, and `text`, `caption` or `captions`), the name
    of the folder it lies in below the top. Otherwise it has none.

    Raises UserError where there is no picture, or a metadata.jsonl that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(path for path in folder.rglob("*") if not _hidden(path, folder))
        self._pictures = [path for path in files if path.suffix.lower() in PICTURES]
        if not self._pictures:
            raise UserError(f"source: {folder} holds no picture; known: {', '.join(_suffixes())}")
        self._metadata: dict[Path, tuple[str, ...]] = {}
        for path in files:
            if path.name == "metadata.jsonl":
                self._metadata |= _read_metadata(path)
        self.size: int | None = len(self._pictures)

    def fingerprint(self) -> str:
        """From names and sizes of pictures and captions, not from where the folder lies."""
        digest = hashlib.sha256()
        texts = (path.with_suffix(".txt") for path in self._pictures)
        metadata = {path.parent / "metadata.jsonl" for path in self._pictures}
        for path in (*self._pictures, *sorted({*texts, *metadata})):
            if path.exists():
                name = path.relative_to(self.folder).as_posix()
                digest.update(f"{name}\0{path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Record]:
        for path in self._pictures:
            name = path.relative_to(self.folder).as_posix()
            yield Record(name=name, load=partial(self._load, path))

    def _load(self, path: Path) -> Picture:
        return Picture(image=read_image(path), captions=self._captions(path))

    def _captions(self, path: Path) -> tuple[str, ...]:
        text = path.with_suffix(".txt")
        if text.exists():
            return split_captions(text.read_text(encoding="utf-8", errors="replace"))
        if path in self._metadata:
            return self._metadata[path]
        return () if path.parent == self.folder else (path.parent.name.replace("_", " "),)


def read_image(file: Path | bytes) -> Image.Image:
    """The picture in RGB, upright, on white where it is transparent.

    Raises BrokenPicture where the file is no picture, cut off, or too large to be one.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                layers = upright.convert("RGBA")
                white = Image.new("RGBA", layers.size, "white")
                return Image.alpha_composite(white, layers).convert("RGB")
            return upright.convert("RGB")
    # Pillow's decoders also raise SyntaxError, ValueError and others of their own on bad bytes.
    except Exception as error:
        raise BrokenPicture(" ".join(f"{type(error).__name__}: {error}".split())) from error


def split_captions(text: str) -> tuple[str, ...]:
    """A caption for each line that is not blank."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def as_captions(value: Any) -> tuple[str, ...]:
    """What a metadata field or a column holds: None, a string, or a list of strings."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    return tuple(caption for item in value for caption in as_captions(item))


def caption_field(row: Mapping[str, Any]) -> str | None:
    """The field of `row` that holds captions, by the names in use."""
    return next((name for name in _CAPTION_FIELDS if name in row), None)


def _read_metadata(path: Path) -> dict[Path, tuple[str, ...]]:
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            picture = path.parent / row["file_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}: is no JSON object with file_name; put it right"
            ) from error
        field = caption_field(row)
        found[picture] = () if field is None else as_captions(row[field])
    return found


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _suffixes() -> list[str]:
    return sorted(suffix.removeprefix(".") for suffix in PICTURES)
