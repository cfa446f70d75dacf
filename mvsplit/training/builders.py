"""Builds what a run needs from its configuration."""

from __future__ import annotations

import torch

from mvsplit.data import Loader, WordEmbedder, build_dataset
from mvsplit.data.types import WordDataset
from mvsplit.diagnostics.taps import taps_for_dit
from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig
from mvsplit.training.config import DataConfig, Experiment
from mvsplit.training.ema import EMA
from mvsplit.training.optimizer import (
    AdamW,
    flatten_parameters,
    peak_learning_rate,
    warmup_then_constant,
)
from mvsplit.training.randomness import generator_for, seed_globals
from mvsplit.training.state import TrainState


def build_state(experiment: Experiment) -> TrainState:
    """Everything at step 0; sets the global random generators.

    Raises:
        UserError: the data do not fit the model, or the device does not exist.
    """
    model_config, config = experiment.model, experiment.train
    seed_globals(config.seed)
    device = resolve_device(config.device)
    loader = build_loader(experiment)
    model = DiT(model_config, generator_for(config.seed, "weights")).to(device)
    groups = flatten_parameters(model)
    peak = peak_learning_rate(config, model_config.width)
    return TrainState(
        model=model,
        optimizer=AdamW(groups, config),
        schedule=warmup_then_constant(peak, config.warmup),
        ema=EMA(groups, config.ema_decay) if config.ema_decay else None,
        loader=loader,
        taps=taps_for_dit(model),
        device=device,
    )


def resolve_device(name: str) -> torch.device:
    """The device that `name` means; auto is cuda where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"train.device={name!r} cannot be used here; choose cpu"
            f"{' or cuda' if torch.cuda.is_available() else ''}"
        ) from error
    return torch.device(name)


def build_loader(experiment: Experiment) -> Loader:
    """The loader at its first batch. Raises UserError where data and model do not fit."""
    config, train = experiment.data, experiment.train
    dataset = build_data(config)
    check_fit(experiment.model, dataset)
    return Loader(
        dataset,
        build_embedder(config, dataset, experiment.model.text_width),
        batch_size=train.batch_size,
        seed=train.seed,
        caption_dropout=train.caption_dropout,
    )


def build_data(config: DataConfig) -> WordDataset:
    """The data set. Raises UserError for a name that is unknown or options it does not have."""
    given = {"size": config.size, "seed": config.series}
    return build_dataset(config.dataset, **{k: v for k, v in given.items() if v is not None})


def build_embedder(config: DataConfig, dataset: WordDataset, width: int) -> WordEmbedder:
    """The frozen word embedder of the data set's vocabulary."""
    return WordEmbedder(
        dataset.vocabulary, width, config.embedder_seed, max_tokens=dataset.caption_words
    )


def check_fit(model: DiTConfig, dataset: WordDataset) -> None:
    """Raises UserError where the model cannot take the samples of the data set."""
    if model.channels != dataset.channels:
        raise UserError(
            f"model.channels={model.channels}: the data have {dataset.channels}; use "
            f"model.channels={dataset.channels}"
        )
    if dataset.height % model.patch or dataset.width % model.patch:
        raise UserError(
            f"model.patch={model.patch} does not divide the image size "
            f"{dataset.height}×{dataset.width}; choose a patch that divides both sides"
        )
