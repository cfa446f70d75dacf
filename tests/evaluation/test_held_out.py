"""The validation loss against a loop in fp64, and samples that the training never sees."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mvsplit.cli import main
from mvsplit.data import Digits, Shapes, WordEmbedder
from mvsplit.errors import UserError
from mvsplit.evaluation.held_out import examples_sha256, held_out, times_of, validation_loss
from mvsplit.sampling import sample_noise
from mvsplit.training import DataConfig
from tests.data.photographs import fill


class Toy(nn.Module):
    """v = a·z + b·(sum of the real text tokens), which depends on all that it is given."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))

    def forward(self, z, text, valid):
        length = torch.full((len(text),), text.shape[1]) if valid is None else valid
        real = torch.arange(text.shape[1]) < length[:, None]
        return self.a * z + 0.01 * (text * real[..., None]).sum((1, 2)).view(-1, 1, 1, 1)


def embedder(data):
    return WordEmbedder(data.vocabulary, 32, max_tokens=data.caption_words)


@pytest.mark.parametrize("data", [Digits("held-out"), Shapes(32, seed=9)], ids=["digits", "shapes"])
def test_it_is_the_mean_over_samples_and_times(data):
    count, bins, seed, model = 7, 3, 4, Toy()
    found = dict(validation_loss(model, embedder(data), data, samples=count, bins=bins, seed=seed))
    losses = np.zeros((count, bins))
    for i in range(count):
        example = data.fetch([i])
        text, _ = embedder(data).encode(example.captions)
        x0 = example.latents.double()
        for b in range(bins):
            x1 = sample_noise([i * bins + b], x0.shape[1:], seed=seed).double()
            t = (b + ((i + 0.5) * (5**0.5 - 1) / 2) % 1) / bins
            z = (1 - t) * x0 + t * x1
            v = model.a.item() * z + 0.01 * float(text.double().sum())
            losses[i, b] = float((v - (x0 - x1)).square().mean())
    assert found["validation_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    spread = losses.mean(1).std(ddof=1) / count**0.5
    assert found["validation_loss_stderr"] == pytest.approx(spread, rel=1e-4)
    names = ["validation_loss_t0-0.333333", "validation_loss_t0.333333-0.666667"]
    for b, name in enumerate(names):
        assert found[name] == pytest.approx(losses[:, b].mean(), rel=1e-5)
    assert len([name for name in found if "_t" in name and "stderr" not in name]) == bins


def test_it_does_not_depend_on_the_batch():
    data, model, told = Shapes(32, seed=9), Toy(), []
    losses = [
        dict(
            validation_loss(
                model, embedder(data), data, samples=11, batch_size=size, on_batch=told.append
            )
        )
        for size in (1, 4, 64)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert sum(told) == 33


def test_times_of_a_part_are_spread_evenly():
    times = times_of(range(1000), 2, 5)
    assert 0.4 <= float(times.min()) < float(times.max()) < 0.6
    counts = np.histogram(times, bins=10, range=(0.4, 0.6))[0]
    assert counts.min() >= 97
    assert counts.max() <= 103


def test_digits_are_divided_once_and_for_all():
    parts = {split: Digits(split) for split in ("all", "train", "held-out")}
    rows = {
        name: [row.numpy().tobytes() for row in data.fetch(range(len(data))).latents]
        for name, data in parts.items()
    }
    assert len(rows["all"]) == len(rows["train"]) + len(rows["held-out"]) == 1797
    assert sorted(rows["all"]) == sorted(rows["train"] + rows["held-out"])
    assert set(rows["train"]).isdisjoint(rows["held-out"])
    assert len(rows["held-out"]) == 435
    assert np.bincount(parts["held-out"].labels).min() > 30
    kept = held_out(DataConfig(dataset="digits", split="train"), 32)
    assert examples_sha256(kept.dataset, 9999) == examples_sha256(parts["held-out"], 9999)
    labels, captions = parts["train"].labels[:20], parts["train"].fetch(range(20)).captions
    assert captions == [parts["train"].vocabulary[label] for label in labels.tolist()]
    with pytest.raises(UserError, match="split='half'"):
        Digits("half")


def test_a_run_on_all_digits_has_nothing_held_out():
    with pytest.raises(UserError, match=r"--data\.split train"):
        held_out(DataConfig(dataset="digits"), 32)


@pytest.mark.parametrize("series", [None, 0, 1_000_003])
def test_shapes_come_from_another_series(series):
    config = DataConfig(dataset="shapes", size=32, series=series)
    other, own = held_out(config, 32).dataset, Shapes(32, seed=series or 0)
    assert not torch.equal(other.fetch(range(4)).latents, own.fetch(range(4)).latents)
    assert examples_sha256(other, 5) != examples_sha256(own, 5)


def test_a_path_belongs_to_a_cache(tmp_path):
    with pytest.raises(UserError, match="held-out samples of its own"):
        held_out(DataConfig(dataset="shapes", size=32), 32, tmp_path)
    with pytest.raises(UserError, match="name a second cache"):
        held_out(DataConfig(dataset="cache", path=str(tmp_path)), 32)


def test_the_hash_knows_values_captions_and_number():
    data = Shapes(32, seed=1)
    found = {examples_sha256(data, 3), examples_sha256(data, 4), examples_sha256(Shapes(32, 2), 3)}
    assert len(found) == 3


ENCODE = ["--vae", "pixels", "--resolution", "16", "--multiple", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache to train on, one of other pictures, and that with another text encoder."""
    place = tmp_path_factory.mktemp("caches")
    fill(place / "pictures")
    (place / "others").mkdir()
    for path in sorted((place / "pictures").rglob("*.png"))[::2]:
        with Image.open(path) as picture:
            picture.convert("RGB").rotate(180).save(place / "others" / path.name)
    for source, name, text in (
        ("pictures", "own", "words:32"),
        ("others", "other", "words:32"),
        ("others", "foreign", "words:16"),
    ):
        command = ["encode", str(place / source), str(place / name), "--text-encoder", text]
        assert main([*command, *ENCODE]) == 0
    return place


def test_a_cache_is_validated_on_another(caches):
    own = DataConfig(dataset="cache", path=str(caches / "own"))
    found = held_out(own, 32, caches / "other")
    losses = dict(validation_loss(Toy(), found.embedder, found.dataset, samples=6, batch_size=4))
    alone = dict(validation_loss(Toy(), found.embedder, found.dataset, samples=6, batch_size=1))
    assert losses == pytest.approx(alone, rel=1e-6)
    assert losses["validation_loss"] > 0.5
    assert len(examples_sha256(found.dataset, 6)) == 64


def test_a_cache_of_the_same_pictures_or_other_encoders_is_refused(caches):
    own = DataConfig(dataset="cache", path=str(caches / "own"))
    with pytest.raises(UserError, match="shares 1 shards"):
        held_out(own, 32, caches / "own")
    with pytest.raises(UserError, match="its text_encoder is"):
        held_out(own, 32, caches / "foreign")
