"""FID, Inception Score, precision and recall of real pictures, as ADM computes them (Dhariwal and
Nichol 2021, arXiv 2105.05233), with torch-fidelity's network and formulas.

- Features are the 2048 of the pool3 layer of the Inception of 2015; the Inception Score takes the
  logits without their bias. (torch-fidelity's own default for precision and recall is VGG-16.)
- The Inception Score is the mean over parts of 5000 pictures in the order in which they were drawn.
- Precision and recall use the 3rd nearest neighbour (Kynkäänniemi et al. 2019, arXiv 1904.06991).
- A reference picture is halved with a box filter while that leaves it large enough, resized with a
  bicubic one, and cut around its centre.

What was extracted is kept on the disk in parts, so that a killed evaluation goes on. Needs the
extra `eval`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvsplit.data.atomic import sha256
from mvsplit.errors import UserError, needs_extra
from mvsplit.evaluation.drawn import png_batches
from mvsplit.evaluation.passport import files_sha256

EXTRACTOR = "inception-v3-compat"
SPLIT = 5000  # pictures of one part of the Inception Score
NEIGHBOURS = 3
PART = 1000  # pictures whose features are one file
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_ROWS = 2500  # of a matrix of distances at a time


class Extractor(Protocol):
    """torch-fidelity's feature extractor."""

    def __call__(self, pictures: Tensor) -> tuple[Tensor, ...]: ...

    def convert_features_tuple_to_dict(self, features: Any) -> dict[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class Features:
    """Of N pictures: what distances use [N, D], and the logits [N, classes], as stored."""

    points: Tensor
    logits: Tensor


@dataclass(frozen=True, kw_only=True)
class Network:
    """A feature extractor of torch-fidelity's registry with its layers.

    Attributes:
        extractor: the module, on its device.
        points, logits: names of the layers.
        batch_size: pictures at a time.
        sha256: of its weights.
    """

    extractor: Extractor
    points: str
    logits: str
    batch_size: int
    sha256: str


def load_network(
    weights: Path, device: torch.device, *, name: str = EXTRACTOR, batch_size: int = 64
) -> Network:
    """The extractor `name` of torch-fidelity's registry with weights from a file.

    Raises:
        UserError: the extra is not installed; no such file, or none with such weights.
    """
    utils = _fidelity("utils")
    if not weights.is_file():
        raise UserError(
            f"inception={weights}: there is no such file; it is the one that torch-fidelity calls "
            "weights-inception-2015-12-05-6726825d.pth"
        )
    layers = {
        metric: utils.resolve_feature_layer_for_metric(metric, feature_extractor=name)
        for metric in ("fid", "isc")
    }
    try:
        extractor = utils.create_feature_extractor(
            name,
            list(dict.fromkeys(layers.values())),
            cuda=False,
            feature_extractor_weights_path=str(weights),
            verbose=False,
        )
    except (RuntimeError, KeyError, ValueError, OSError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"inception={weights}: holds no weights of {name} ({reason})") from error
    return Network(
        extractor=extractor.to(device),
        points=layers["fid"],
        logits=layers["isc"],
        batch_size=batch_size,
        sha256=sha256(weights),
    )


class Reference:
    """Real pictures: a folder of files, or ADM's .npz with `arr_0` [N, H, W, 3] uint8 and perhaps
    `mu` and `sigma` of a larger set, which then the FID uses.

    Raises:
        UserError: no pictures there, or of another size than what is drawn.
    """

    def __init__(self, path: Path, side: tuple[int, int]) -> None:
        self.path, self._side = path, side
        self.moments: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        self._files: list[Path] = []
        if path.is_dir():
            self._files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS)
            self.count = len(self._files)
            self.sha256 = files_sha256(self._files)
        elif path.suffix == ".npz" and path.is_file():
            self._open(path)
        else:
            raise UserError(f"reference={path}: is neither a folder of pictures nor a .npz file")
        if self.count <= NEIGHBOURS:
            raise UserError(f"reference={path}: holds {self.count} pictures, which are too few")

    def batches(self, size: int, first: int = 0) -> Iterator[Tensor]:
        """From picture `first` on, [B, 3, H, W] uint8, `size` at a time."""
        for start in range(first, self.count, size):
            yield torch.from_numpy(self._read(start, min(start + size, self.count)))

    def _open(self, path: Path) -> None:
        with np.load(path) as arrays:
            self._pixels = arrays["arr_0"]
            if "mu" in arrays:
                self.moments = (arrays["mu"].astype("f8"), arrays["sigma"].astype("f8"))
        self.count, self.sha256 = len(self._pixels), sha256(path)
        if self._pixels.shape[1:] != (*self._side, 3) or self._pixels.dtype != np.uint8:
            raise UserError(
                f"reference={path}: arr_0 is {self._pixels.dtype} {list(self._pixels.shape)}; "
                f"needed is uint8 [N, {self._side[0]}, {self._side[1]}, 3], as is drawn"
            )

    def _read(self, start: int, end: int) -> NDArray[np.uint8]:
        if not self._files:
            return np.ascontiguousarray(self._pixels[start:end].transpose(0, 3, 1, 2))
        return np.stack([adm_crop(path, self._side) for path in self._files[start:end]])


def adm_crop(path: Path, side: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture [3, H, W] at height and width `side`, made as for ADM's references.

    Raises:
        UserError: no picture that can be read.
    """
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except OSError as error:
        raise UserError(f"reference: {path} cannot be read as a picture ({error})") from error
    height, width = side
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(width / picture.width, height / picture.height)
    scaled = (round(picture.width * scale), round(picture.height * scale))
    array = np.asarray(picture.resize(scaled, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width].transpose(2, 0, 1)


def evaluate_pictures(
    drawn: Sequence[Path],
    reference: Reference,
    network: Network,
    store: Path,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """Scores of drawn pictures.

    Args:
        drawn: PNG files, in order.
        store: folder in which features are kept.
        on_batch: told how many pictures, drawn or real, have their features.

    Yields:
        `fid`, `inception_score`, its standard deviation over parts where there are several,
        `precision` and `recall`.
    """
    mine = _extract(
        lambda first: png_batches(drawn[first:], network.batch_size),
        len(drawn),
        network,
        store / f"drawn_{network.sha256[:8]}",
        on_batch,
    )
    real = _extract(
        lambda first: reference.batches(network.batch_size, first),
        reference.count,
        network,
        store / f"reference_{reference.sha256[:8]}_{network.sha256[:8]}",
        on_batch,
    )
    yield from scores_of(mine, real, reference.moments)


def scores_of(
    mine: Features,
    real: Features,
    moments: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
) -> Iterator[tuple[str, float]]:
    """As `evaluate_pictures`, from features; `moments` replace those of `real` in the FID."""
    fid, isc, prc = (_fidelity(f"metric_{name}") for name in ("fid", "isc", "prc"))
    first = fid.fid_features_to_statistics(mine.points.double())
    second = (
        fid.fid_features_to_statistics(real.points.double())
        if moments is None
        else dict(zip(("mu", "sigma"), moments, strict=True))
    )
    yield "fid", fid.fid_statistics_to_metric(first, second, verbose=False)[fid.KEY_METRIC_FID]
    parts = max(1, round(len(mine.logits) / SPLIT))
    inception = isc.isc_features_to_metric(mine.logits, splits=parts, shuffle=False)
    yield "inception_score", inception[isc.KEY_METRIC_ISC_MEAN]
    if parts > 1:
        yield "inception_score_std", inception[isc.KEY_METRIC_ISC_STD]
    found = prc.prc_features_to_metric(
        mine.points.float(),
        real.points.float(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    yield "precision", found[prc.KEY_METRIC_PRECISION]
    yield "recall", found[prc.KEY_METRIC_RECALL]


def _extract(
    batches: Callable[[int], Iterator[Tensor]],
    count: int,
    network: Network,
    store: Path,
    on_batch: Callable[[int], None] | None,
) -> Features:
    """Features of pictures 0 … count - 1, those of each `PART` of them kept in one file."""
    store.mkdir(parents=True, exist_ok=True)
    pending: list[tuple[Tensor, Tensor]] = []
    done = PART * next(k for k in range(count // PART + 1) if not _part(store, k).exists())
    told = on_batch or (lambda pictures: None)
    told(done)
    for batch in batches(done):
        pending += zip(*_of_batch(network, batch), strict=True)
        while len(pending) >= PART:
            _keep(store, done // PART, pending[:PART])
            done, pending = done + PART, pending[PART:]
        told(len(batch))
    return _collect(store, count // PART, pending)


@torch.no_grad()
def _of_batch(network: Network, batch: Tensor) -> tuple[Tensor, Tensor]:
    parameters = getattr(network.extractor, "parameters", lambda: iter(()))
    device = next((p.device for p in parameters()), torch.device("cpu"))
    found = network.extractor.convert_features_tuple_to_dict(network.extractor(batch.to(device)))
    return found[network.points].cpu(), found[network.logits].cpu()


def _part(store: Path, number: int) -> Path:
    return store / f"{number:05d}.npz"


def _keep(store: Path, number: int, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
    points, logits = (torch.stack(column).numpy() for column in zip(*rows, strict=True))
    temporary = store / f".{number:05d}.tmp.npz"
    np.savez(temporary, points=points, logits=logits)
    os.replace(temporary, _part(store, number))


def _collect(store: Path, parts: int, rest: Sequence[tuple[Tensor, Tensor]]) -> Features:
    columns: list[list[Tensor]] = [[], []]
    for number in range(parts):
        with np.load(_part(store, number)) as arrays:
            for column, name in zip(columns, ("points", "logits"), strict=True):
                column.append(torch.from_numpy(arrays[name]))
    if rest:
        for column, rows in zip(columns, zip(*rest, strict=True), strict=True):
            column.append(torch.stack(rows))
    return Features(points=torch.cat(columns[0]), logits=torch.cat(columns[1]))


def _fidelity(module: str) -> ModuleType:
    """A module of torch-fidelity.

    Raises:
        UserError: it is not installed, or its torchvision belongs to another torch.
    """
    from importlib import import_module

    with needs_extra("eval"):
        try:
            return import_module(f"torch_fidelity.{module}")
        except (RuntimeError, ImportError) as error:
            if isinstance(error, ModuleNotFoundError):
                raise
            raise UserError(
                f"torch-fidelity cannot be used here ({error}); install the torchvision that "
                f"belongs to torch {torch.__version__}"
            ) from error
