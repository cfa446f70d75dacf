"""Samples that a training never sees, and the loss on them at fixed noise and times.

Shapes: B samples, C, h, w of the latents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mvsplit.data import Cache, Digits, Embedder
from mvsplit.data.types import BucketedDataset, Dataset
from mvsplit.errors import UserError
from mvsplit.evaluation.scores import STDERR
from mvsplit.flow import flow_losses, interpolate
from mvsplit.sampling import sample_noise
from mvsplit.training import DataConfig
from mvsplit.training.builders import build_data, build_embedder

SERIES = 1_000_003  # of the shapes and clips that no preset trains on
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Samples apart from the training.

    Attributes:
        dataset: at the places 0 … its size - 1, or without end.
        embedder: of its captions, where it is another than the training's.
        name: which samples these are.
    """

    dataset: Dataset
    embedder: Embedder | None
    name: str


def held_out(config: DataConfig, text_width: int, path: Path | None = None) -> HeldOut:
    """Samples of the same kind as those of `config` that a training on it never sees.

    Digits: the quarter that split="train" leaves out. Shapes and clips: another series. A cache:
    another one, at `path`, made with the same encoders.

    Raises:
        UserError: the training saw all digits; no path for a cache, or one that shares pictures
            with the training's or was made with other encoders.
    """
    if config.dataset == "cache":
        return _other_cache(config, text_width, path)
    if path is not None:
        raise UserError(f"validation-data={path}: {config.dataset} has held-out samples of its own")
    if config.dataset == "digits":
        if config.split != "train":
            raise UserError(
                "this run was trained on all digits, so there is none to validate on; train with "
                "--data.split train, or leave the validation loss out with --validation-samples 0"
            )
        return HeldOut(dataset=Digits("held-out"), embedder=None, name="digits held-out")
    series = SERIES if config.series != SERIES else SERIES + 1
    dataset = build_data(replace(config, series=series))
    return HeldOut(dataset=dataset, embedder=None, name=f"{config.dataset} series {series}")


def _other_cache(config: DataConfig, text_width: int, path: Path | None) -> HeldOut:
    if path is None:
        raise UserError(
            "validation-data: a cache has no held-out samples of its own; name a second cache that "
            "mvsplit encode made of other pictures, or set --validation-samples 0"
        )
    other = replace(config, path=str(path))
    cache, training = build_data(other), build_data(replace(config, verify=False))
    assert isinstance(cache, Cache)
    assert isinstance(training, Cache)
    for field in ("vae", "text_encoder"):
        mine, theirs = cache.identity[field], training.identity[field]
        if mine != theirs:
            raise UserError(
                f"validation-data={path}: its {field} is {mine}, the training's {theirs}; encode "
                "with the encoders of the training"
            )
    shared = _shards(cache) & _shards(training)
    if shared:
        raise UserError(
            f"validation-data={path}: shares {len(shared)} shards with the training's cache; name "
            "pictures that were not trained on"
        )
    embedder = build_embedder(other, cache, text_width)
    return HeldOut(dataset=cache, embedder=embedder, name=f"cache {path}")


def _shards(cache: Cache) -> set[str]:
    return {shard.sha256 for shard in cache.manifest.shards}


def validation_loss(
    model: nn.Module,
    embedder: Embedder,
    dataset: Dataset,
    *,
    samples: int,
    bins: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    on_batch: Callable[[int], None] | None = None,
    on_each: Callable[[list[float]], None] | None = None,
) -> Iterator[tuple[str, float]]:
    """The training's loss (Eq. 2) on the first `samples` samples, captions kept.

    Sample i is seen once in each of `bins` equal parts of [0, 1), at the time (b + u)/bins with
    u = frac((i + ½)·φ), φ the golden ratio, so that the times of a part are spread evenly; its
    noise depends on (seed, i, b). So two networks are asked exactly the same.

    Args:
        on_batch: told how many samples are done after each batch.
        on_each: given the loss of each sample, over all parts.

    Yields:
        `validation_loss` and `validation_loss_t0-0.1`, … of each part, each with its standard error
        over samples.
    """
    count = samples if dataset.size is None else min(samples, dataset.size)
    losses = torch.zeros(count, bins, dtype=torch.float64)
    for indices in _batches(dataset, count, batch_size):
        losses[indices] = _losses(model, embedder, dataset, indices, bins, seed)
        if on_batch is not None:
            on_batch(len(indices))
    if on_each is not None:
        on_each(losses.mean(1).tolist())
    yield from _mean("validation_loss", losses.mean(1))
    for b in range(bins):
        yield from _mean(f"validation_loss_t{b / bins:g}-{(b + 1) / bins:g}", losses[:, b])


def _mean(name: str, losses: Tensor) -> Iterator[tuple[str, float]]:
    yield name, float(losses.mean())
    if len(losses) > 1:
        yield name + STDERR, float(losses.std() / math.sqrt(len(losses)))


def times_of(indices: Sequence[int], part: int, bins: int) -> Tensor:
    """The times [B] of samples in part `part` of `bins`, fp32."""
    within = np.modf((np.asarray(indices, dtype=np.float64) + 0.5) * _GOLDEN)[0]
    return torch.from_numpy(((part + within) / bins).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a network is asked about some samples in one part of the times.

    Attributes:
        data, noise, noisy: x0, x1 and z_t, [B, C, h, w]; the last in the network's precision.
        text, valid: text states [B, T, Dc] in that precision, and their real tokens [B].
        padded: whether some of them are not real.
    """

    data: Tensor
    noise: Tensor
    noisy: Tensor
    text: Tensor
    valid: Tensor
    padded: bool


def questions(
    embedder: Embedder,
    dataset: Dataset,
    indices: list[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    bins: int = 10,
    seed: int = 0,
) -> Iterator[Question]:
    """What `validation_loss` asks about some samples, a question for each part of the times."""
    examples = dataset.fetch(indices)
    data = examples.latents.to(device)
    text, valid = embedder.encode(examples.captions)
    padded = bool((valid < text.shape[1]).any())
    text, valid = text.to(device, dtype), valid.to(device)
    for part in range(bins):
        places = [index * bins + part for index in indices]
        noise = sample_noise(places, data.shape[1:], seed=seed, device=device)
        times = times_of(indices, part, bins).to(device)
        noisy = interpolate(data, noise, times).to(dtype)
        yield Question(data=data, noise=noise, noisy=noisy, text=text, valid=valid, padded=padded)


@torch.no_grad()
def _losses(
    model: nn.Module,
    embedder: Embedder,
    dataset: Dataset,
    indices: list[int],
    bins: int,
    seed: int,
) -> Tensor:
    """[B, bins] in fp64."""
    weight = next(model.parameters())
    asked = questions(
        embedder, dataset, indices, device=weight.device, dtype=weight.dtype, bins=bins, seed=seed
    )
    found = []
    for question in asked:
        valid = question.valid if question.padded else None
        velocity = model(question.noisy, question.text, valid)
        found.append(flow_losses(velocity, question.data, question.noise).double().cpu())
    return torch.stack(found, 1)


def examples_sha256(dataset: Dataset, samples: int, batch_size: int = 64) -> str:
    """SHA-256 of the values and captions of the first `samples` samples."""
    count = samples if dataset.size is None else min(samples, dataset.size)
    digest = hashlib.sha256()
    for indices in _batches(dataset, count, batch_size):
        examples = dataset.fetch(indices)
        digest.update(examples.latents.contiguous().cpu().numpy().tobytes())
        digest.update("\n".join(examples.captions).encode())
    return digest.hexdigest()


def _batches(dataset: Dataset, count: int, batch_size: int) -> Iterator[list[int]]:
    """0 … count - 1 in batches of one shape."""
    groups: Sequence[Sequence[int]] = [range(count)]
    if isinstance(dataset, BucketedDataset):
        groups = [[int(i) for i in bucket if i < count] for bucket in dataset.buckets]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield list(group[start : start + batch_size])
