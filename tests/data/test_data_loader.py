"""The loader: every sample once an epoch, exact resumption, dropout by position, errors."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from mvsplit.data import Digits, Examples, Loader, Shapes, WordEmbedder
from mvsplit.data.counter import random_bits
from mvsplit.data.order import epoch_order
from mvsplit.errors import UserError

EMBEDDER = WordEmbedder(("even", "odd", "number"), 32, max_tokens=2)


class Numbers:
    """Sample i is the number i; odd ones have a caption of two words."""

    channels = height = width = 1

    def __init__(self, size):
        self.size = size

    def fetch(self, indices):
        latents = torch.tensor(indices, dtype=torch.float32).reshape(-1, 1, 1, 1)
        return Examples(
            latents=latents, captions=["odd number" if i % 2 else "even" for i in indices]
        )


def loader(size=7, **options):
    return Loader(Numbers(size), EMBEDDER, **{"batch_size": 4, "seed": 0, **options})


def take(source, batches):
    return [source.next_batch() for _ in range(batches)]


def tokens(batches):
    """The real tokens of every sample in turn."""
    rows = []
    for batch in batches:
        for sample, text in enumerate(batch.text):
            rows.append(text if batch.text_valid is None else text[: batch.text_valid[sample]])
    return rows


def same(first, second):
    """Whether two lists of batches hold the same samples, however cut."""
    latents = [torch.cat([batch.latents for batch in side]) for side in (first, second)]
    indices = [torch.cat([batch.indices for batch in side]) for side in (first, second)]
    texts = zip(tokens(first), tokens(second), strict=True)
    return (
        torch.equal(*latents) and torch.equal(*indices) and all(torch.equal(a, b) for a, b in texts)
    )


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 20])
def test_every_epoch_visits_every_sample_once(batch_size):
    batches = take(loader(batch_size=batch_size), -(-140 // batch_size))
    visited = torch.cat([batch.indices for batch in batches])[:140].reshape(20, 7)
    assert torch.equal(visited.sort(1).values, torch.arange(7).expand(20, 7))
    assert len({tuple(epoch) for epoch in visited.tolist()}) > 15


def test_orders_are_uniform():
    counts = Counter(tuple(epoch_order(5, epoch, 3)) for epoch in range(6000))
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts.values()) < 130  # 4.5 standard deviations


def test_unlimited_data_is_read_in_order():
    batches = take(loader(size=None, position=10), 3)
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(10, 22))


@pytest.mark.parametrize("size", [7, None])
def test_samples_do_not_depend_on_the_batch_size(size):
    cuts = [take(loader(size, batch_size=b, caption_dropout=0.4), 60 // b) for b in (1, 4, 15, 60)]
    assert all(same(cuts[0], cut) for cut in cuts[1:])


@pytest.mark.parametrize("size", [7, None])
def test_resumes_exactly(size):
    straight = loader(size, caption_dropout=0.3)
    take(straight, 5)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = loader(size, caption_dropout=0.3)
    resumed.load_state_dict(state)
    assert resumed.position == 20
    assert same(take(straight, 6), take(resumed, 6))


def test_latents_and_text_belong_to_the_indices():
    for batch in take(loader(), 8):
        assert torch.equal(batch.latents.flatten(), batch.indices.float())
        lengths = 1 + batch.indices % 2
        valid = batch.text_valid
        assert torch.equal(
            torch.full((4,), batch.text.shape[1]) if valid is None else valid, lengths
        )
        captions = ["odd number" if index % 2 else "even" for index in batch.indices]
        assert torch.equal(batch.text, EMBEDDER.encode(captions)[0])


def test_no_lengths_where_all_are_full():
    full = Loader(Numbers(2), EMBEDDER, batch_size=1, seed=0)
    assert [batch.text_valid for batch in take(full, 4)] == [None] * 4
    mixed = Loader(Numbers(2), EMBEDDER, batch_size=2, seed=0).next_batch()
    assert sorted(mixed.text_valid.tolist()) == [1, 2]


def test_dropout_share_and_independence_of_the_order():
    null = EMBEDDER.encode([""])[0][0, 0]

    def dropped(**options):
        rows = tokens(take(loader(batch_size=1000, caption_dropout=0.25, **options), 8))
        return np.array([torch.equal(row[0], null) for row in rows])

    first, same_seed, other_seed = dropped(), dropped(size=None), dropped(seed=1)
    assert first.mean() == pytest.approx(0.25, abs=0.02)  # 4 standard deviations
    assert (first == same_seed).all()
    assert (first == other_seed).mean() == pytest.approx(0.625, abs=0.03)


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 50)])
def test_dropout_bounds(share, dropped):
    null = EMBEDDER.encode([""])[0][0, 0]
    rows = tokens([loader(batch_size=50, caption_dropout=share).next_batch()])
    assert sum(torch.equal(row[0], null) for row in rows) == dropped


def test_seed_changes_the_order():
    first, second = (take(loader(size=100, seed=seed), 5) for seed in (0, 1))
    assert not same(first, second)


def test_digits_and_shapes_go_through():
    digits = Digits()
    embedder = WordEmbedder(digits.vocabulary, 16, max_tokens=digits.caption_words)
    batch = Loader(digits, embedder, batch_size=16, seed=0).next_batch()
    names = [digits.vocabulary[digits.labels[index]] for index in batch.indices]
    assert torch.equal(batch.text, embedder.encode(names)[0])
    shapes = Shapes()
    embedder = WordEmbedder(shapes.vocabulary, 64, max_tokens=shapes.caption_words)
    batch = Loader(shapes, embedder, batch_size=5, seed=0, position=3).next_batch()
    assert torch.equal(batch.latents, shapes.fetch(range(3, 8)).latents)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"caption_dropout": 0.1}, "caption_dropout"),
        ({"size": 8}, "dataset_size"),
    ],
)
def test_another_run_is_refused(options, field):
    with pytest.raises(UserError, match=rf"^{field}: the loader has .*, the saved run has .*; \w+"):
        loader(**options).load_state_dict(loader().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 holds no sample; use at least 1"),
        ({"caption_dropout": 1.5}, "caption_dropout: 1.5 is no share"),
        ({"position": -1}, "position: -1 lies before"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UserError, match=message):
        loader(**options)


def test_random_bits_are_splitmix64():
    """The first outputs for seed 0, as published with the reference implementation."""
    bits = random_bits(0, np.arange(3, dtype=np.uint64))
    assert [hex(value) for value in bits.tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
