"""Builds what a run needs from its configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import nn

from mvsplit.data import (
    Cache,
    CachedText,
    Loader,
    WordEmbedder,
    build_dataset,
    load_latent_encoder,
    load_text_encoder,
    sample_shape,
)
from mvsplit.data.encoders import LatentEncoder, Pixels
from mvsplit.data.pairs import Pairs
from mvsplit.data.types import Dataset, WordDataset
from mvsplit.diagnostics.taps import taps_for_dit
from mvsplit.errors import UserError
from mvsplit.flow import DPOConfig
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.init import initialise
from mvsplit.training.checkpoint import copy_tensors
from mvsplit.training.config import DataConfig, Experiment, TrainConfig
from mvsplit.training.distributed import (
    is_first_of_machine,
    launched_device,
    rank,
    together,
    world,
)
from mvsplit.training.ema import EMA
from mvsplit.training.finetune import choose_parameters
from mvsplit.training.graphs import Graphs
from mvsplit.training.host_memory import require_memory
from mvsplit.training.layout import choose_layout, with_layout
from mvsplit.training.memory_plan import Planner
from mvsplit.training.objective import build_objective
from mvsplit.training.optimizer import (
    AdamW,
    flatten_parameters,
    peak_learning_rate,
    warmup_then_constant,
)
from mvsplit.training.parallelize import parallelize, shards
from mvsplit.training.pieces import padded
from mvsplit.training.randomness import fix_orders, generator_for, seed_globals
from mvsplit.training.state import TrainState

UNKNOWN_TEXT = 64  # tokens of a caption, where the data do not know their longest


def build_state(experiment: Experiment) -> TrainState:
    """Everything at step 0; sets the global random generators.

    Raises:
        UserError: the data do not fit the model, the device does not exist, the batch cannot be
            divided among the processes, or a CPU's memory surely does not suffice.
    """
    model_config, config = experiment.model, experiment.train
    seed_globals(config.seed)
    if config.deterministic:
        fix_orders()
    check_share(config, world(), "processes of torchrun")
    device = resolve_device(config.device)
    loader = build_loader(experiment)
    layout = choose_layout(model_config, config, device, _tokens(experiment, loader.dataset))
    config = with_layout(config, layout.name)
    _check_policy(config)
    # Several processes have parts of it, and must not come to different answers: they share memory.
    if device.type == "cpu" and world() == 1:
        image = min(_image_tokens(model_config, loader.dataset))
        require_memory(model_config, config, _samples(config), image)
    model = build_model(model_config, config, device)
    choose_parameters(model, config.tune, generator_for(config.seed, "lora", device=device))
    taps = taps_for_dit(model)
    groups = flatten_parameters(model, gains_apart=config.gain_lr != 1)
    peak = peak_learning_rate(config, model_config.width)
    return TrainState(
        model=model,
        optimizer=AdamW(groups, config),
        schedule=warmup_then_constant(peak, config.warmup),
        ema=EMA(groups, config.ema_decay) if config.ema_decay else None,
        loader=loader,
        taps=taps,
        device=device,
        planner=Planner(model, config, device),
        graphs=None if shards(config) else Graphs(model, device),
        layout=layout.reason,
        objective=build_objective(model, config),
    )


def build_model(model_config: DiTConfig, config: TrainConfig, device: torch.device) -> DiT:
    """The network at its start, laid out for training. It is drawn on the device, for billions of
    numbers take minutes on a CPU; where it is sharded piece by piece, for the whole may not fit.

    Raises:
        UserError: it cannot be laid out as `train.parallel` says.
    """
    generator = generator_for(config.seed, "weights", device=device)
    if not shards(config):
        with device:
            model = DiT(model_config, generator)
        parallelize(model, config, device)
        return model
    with torch.device("meta"):
        model = DiT(model_config)
        pieces = [copy.deepcopy(piece) for piece in _pieces(model)]
    parallelize(model, config, device)
    model.to_empty(device=device)
    for target, piece in zip(_pieces(model), pieces, strict=True):
        initialise(piece.to_empty(device=device), model_config, generator)
        copy_tensors(piece.state_dict(), target.state_dict(), "a piece of the network")
        piece.to("meta")
    return model


def _pieces(model: DiT) -> list[nn.Module]:
    """All that has parameters, in the order in which they are drawn."""
    return [model.patch_in, model.text_in, *model.blocks, model.head]


def resolve_device(name: str, option: str = "train.device") -> torch.device:
    """The device that `name` means; auto is cuda where there is one. A GPU that is named by its
    number becomes the current one, for kernels are launched and graphs recorded there.

    Args:
        option: what the caller knows it by.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = launched_device(name)
    try:
        torch.zeros(1, device=name).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{option}={name!r} cannot be used here: {_why_not(name, error)}; choose cpu"
            f"{' or cuda' if torch.cuda.is_available() else ''}"
        ) from error
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def build_loader(experiment: Experiment) -> Loader:
    """The loader at its first batch. Raises UserError where data and model do not fit."""
    config, train = experiment.data, experiment.train
    dataset = build_data(config)
    text = CachedText(dataset, load_text_encoder) if isinstance(dataset, Cache) else None
    check_fit(experiment.model, dataset, None if text is None else text.width)
    embedder = text or build_embedder(config, dataset, experiment.model.text_width)
    loader = partial(
        Loader,
        embedder=embedder,
        batch_size=train.batch_size,
        seed=train.seed,
        caption_dropout=train.caption_dropout,
        rank=rank(),
        world=world(),
    )
    if (pairs := build_pairs(experiment, dataset, embedder)) is None:
        return loader(dataset, prefetch=config.prefetch)
    check_fit(experiment.model, pairs)
    beside = loader(dataset) if train.dpo.real else None
    return loader(pairs, prefetch=config.prefetch, beside=beside)


def _check_policy(config: TrainConfig) -> None:
    """Raises UserError where a policy would change a network of which each process has a part."""
    if shards(config) and config.on_alarm == "protect":
        raise UserError(
            f"train.on_alarm='protect' changes the network while it runs, which it cannot where "
            f"{world()} processes have a part each; choose rollback, or "
            f"train.parallel.layout=replicate"
        )


def _why_not(name: str, error: Exception) -> str:
    """What a device lacks, as PyTorch says it where it is no question of CUDA."""
    if not name.startswith("cuda"):
        return str(error).partition("\n")[0]
    if not torch.backends.cuda.is_built():
        return "this PyTorch is built without CUDA"
    count = torch.cuda.device_count()
    return f"PyTorch sees {count} GPUs" if count else "PyTorch sees no GPU (nvidia-smi lists them)"


def check_share(config: TrainConfig, count: int, of_what: str) -> int:
    """The samples that each of `count` processes has of a batch.

    Raises:
        UserError: they cannot have as many, or fewer than there are to be pieces.
    """
    share, rest = divmod(config.batch_size, count)
    if rest:
        raise UserError(
            f"train.batch_size={config.batch_size} is not divisible by the {count} {of_what}; "
            f"choose a multiple of {count}"
        )
    if share < config.accumulate:
        raise UserError(
            f"train.accumulate={config.accumulate}: each of the {count} {of_what} has {share} "
            f"samples of a batch; choose at most so many pieces"
        )
    return share


def build_data(config: DataConfig) -> Dataset:
    """The data set, whose checksums one process of a machine computes for all. Raises UserError for
    a name that is unknown, options it does not have, or data that are damaged."""
    given = {
        "size": config.size,
        "frames": config.frames,
        "motions": config.motions or None,
        "seed": config.series,
        "split": config.split,
        "path": config.path,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if config.dataset == "cache":
        options["verify"] = config.verify and is_first_of_machine()
    return together(lambda: build_dataset(config.dataset, **options))


def build_pairs(
    experiment: Experiment, dataset: Dataset, embedder: WordEmbedder | CachedText
) -> Pairs | None:
    """The pairs that `data.pairs` names, encoded as the samples of `dataset` are; None for flow
    matching.

    Raises:
        UserError: there are pairs without use for them, or none where they are needed; they cannot
            be read; a word embedder does not know the words of a caption.
    """
    path, objective = experiment.data.pairs, experiment.train.objective
    if objective == "flow":
        if (dpo := experiment.train.dpo) != DPOConfig():
            raise UserError(f"train.dpo={dpo}: flow matching has no pairs; add --objective dpo")
        if path is not None:
            raise UserError(f"data.pairs={path}: flow matching reads none; add --objective dpo")
        return None
    if path is None:
        raise UserError(
            "train.objective='dpo' learns from pairs: name a parquet file with --data.pairs; "
            "mvsplit pairs draws some with a run on shapes or digits"
        )
    codec = build_codec(dataset, resolve_device(experiment.train.device))
    encode = None if isinstance(codec, Pixels) else codec.encode
    pairs = Pairs(path, dataset.channels, encode)
    if isinstance(embedder, WordEmbedder):
        for row, caption in enumerate(pairs.captions):
            _check_caption(embedder, caption, f"row {row} of {path}")
    return pairs


def _check_caption(embedder: WordEmbedder, caption: str, where: str) -> None:
    try:
        embedder.encode([caption])
    except UserError as error:
        raise UserError(f"data.pairs: {where}: {error}") from error


def build_embedder(config: DataConfig, dataset: Dataset, width: int) -> WordEmbedder | CachedText:
    """The text states of a cache, or the frozen word embedder of the data set's vocabulary.

    Raises:
        UserError: the text states have another width.
    """
    if isinstance(dataset, Cache):
        text = CachedText(dataset, load_text_encoder)
        if text.width != width:
            raise UserError(
                f"model.text_width={width}: the cache's text states have {text.width}; use "
                f"model.text_width={text.width}"
            )
        return text
    words = cast(WordDataset, dataset)
    return WordEmbedder(
        words.vocabulary, width, config.embedder_seed, max_tokens=words.caption_words
    )


def build_codec(dataset: Dataset, device: torch.device) -> LatentEncoder:
    """What turns pictures [B, C or 3, H, W] into latents of the data set, and these into pictures.

    Raises:
        UserError: the VAE that made a cache cannot be loaded, or is another by now.
    """
    if not isinstance(dataset, Cache):
        return Pixels()
    settings = dataset.manifest.settings
    vae = load_latent_encoder(settings.vae_name, device)
    if vae.fingerprint() != settings.vae:
        raise UserError(
            f"vae: {settings.vae_name} is {vae.fingerprint()}, the cache was made with "
            f"{settings.vae}; put the weights that made it there"
        )
    return vae


def largest_sample(dataset: Dataset, model: DiTConfig) -> tuple[int, int]:
    """Image tokens of the largest sample and words of the longest caption, `UNKNOWN_TEXT` where
    the data do not know them."""
    image = max(_image_tokens(model, dataset))
    return image, getattr(dataset, "caption_words", UNKNOWN_TEXT)


def _tokens(experiment: Experiment, dataset: Dataset) -> int:
    """Of the largest piece of a batch on one process, padding included."""
    config = experiment.train
    image, words = largest_sample(dataset, experiment.model)
    return _samples(config) * (image + padded(words))


def _samples(config: TrainConfig) -> int:
    """Of the largest piece of a batch on one process."""
    return -(-config.batch_size // (world() * config.accumulate))


def _image_tokens(model: DiTConfig, dataset: Dataset) -> list[int]:
    return [math.prod(model.patch_grid(size)) for size in _sizes(dataset)]


def _sizes(dataset: Dataset) -> Sequence[tuple[int, ...]]:
    """(H, W) of the latents, of clips (F, H, W)."""
    if isinstance(dataset, (Cache, Pairs)):
        return dataset.shapes
    return [sample_shape(dataset)[1:]]


def check_fit(model: DiTConfig, dataset: Dataset, text_width: int | None = None) -> None:
    """Raises UserError where the model cannot take the samples of the data set, with every setting
    that has to change and the options that change them.

    Args:
        text_width: of the data's text states, where they have one of their own.
    """
    wrong: dict[str, str] = {}  # by option
    if model.channels != dataset.channels:
        told = f"model.channels={model.channels}: the data have {dataset.channels}"
        wrong[f"--model.channels {dataset.channels}"] = told
    if text_width is not None and model.text_width != text_width:
        told = f"model.text_width={model.text_width}: the cache's text states have {text_width}"
        wrong[f"--model.text-width {text_width}"] = told
    sizes = [size[-2:] for size in _sizes(dataset)]
    if odd := [size for size in sizes if any(side % model.patch for side in size)]:
        common = math.gcd(*(side for size in sizes for side in size))
        fits = max(n for n in range(1, model.patch) if common % n == 0)
        told = f"model.patch={model.patch} does not divide the image size {odd[0][0]}×{odd[0][1]}"
        wrong[f"--model.patch {fits}"] = told
    if wrong:
        raise UserError(f"{'; '.join(wrong.values())}; use {' '.join(wrong)}")
    for *frames, _, _ in _sizes(dataset):
        model.check_frames(*frames or (1,))
