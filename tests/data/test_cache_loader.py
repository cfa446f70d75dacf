"""Batches of a cache: one shape each, every picture once, the same after any interruption."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from mvsplit.data import Cache, CachedText, Loader, load_text_encoder
from mvsplit.data.order import BucketOrder
from mvsplit.data.prefetch import Prefetch
from mvsplit.data.types import Batch
from mvsplit.errors import UserError
from tests.data.photographs import CONFIG, encode_pixels, fill


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    encode_pixels(fill(folder / "source", 23), folder / "cache")
    return Cache(folder / "cache")


@pytest.fixture(scope="module")
def text(cache):
    return CachedText(cache, load_text_encoder)


def loader(cache, text, **options):
    return Loader(cache, text, **{"batch_size": 4, "seed": 3, **options})


def same(a: Batch, b: Batch) -> bool:
    valid = (a.text_valid, b.text_valid)
    return (
        torch.equal(a.latents, b.latents)
        and torch.equal(a.text, b.text)
        and torch.equal(a.indices, b.indices)
        and (valid == (None, None) or torch.equal(*valid))
    )


@pytest.mark.parametrize(
    ("sizes", "batch_size"), [((7, 5, 1), 4), ((3, 2), 8), ((64, 1), 1), ((10, 20, 30), 10)]
)
def test_every_sample_once_in_each_pass_and_nothing_left_over(sizes, batch_size):
    ends = np.cumsum(sizes)
    buckets = [np.arange(end - n, end) for end, n in zip(ends, sizes, strict=True)]
    order = BucketOrder(buckets, batch_size, seed=5)
    epochs = 2 * batch_size  # after which every bucket ends with a whole batch
    batches = [order.indices(i) for i in range(epochs * sum(sizes) // batch_size)]
    bucket_of = np.repeat(np.arange(len(sizes)), sizes)
    assert all(len(set(bucket_of[batch].tolist())) == 1 for batch in batches)
    assert Counter(np.concatenate(batches).tolist()) == dict.fromkeys(range(sum(sizes)), epochs)
    # In an epoch each bucket has its share of batches, to within one.
    per_epoch = sum(sizes) / batch_size
    for epoch in range(1, epochs):
        shown = batches[: order._batches_before(epoch)]
        assert abs(len(shown) - epoch * per_epoch) < len(sizes)
        seen = np.bincount(np.concatenate([[], *shown]).astype(int), minlength=sum(sizes))
        for bucket, size in enumerate(sizes):
            of_one = seen[bucket_of == bucket]
            assert of_one.max() - of_one.min() <= 1  # none comes again before all have come
            of_bucket = sum(bucket_of[batch[0]] == bucket for batch in shown)
            assert of_bucket == epoch * size // batch_size


def test_the_order_is_mixed_and_depends_on_the_seed_alone():
    buckets = [np.arange(40), np.arange(40, 100)]
    first, again, other = (BucketOrder(buckets, 5, seed) for seed in (0, 0, 1))
    ahead = [first.indices(i).tolist() for i in range(60)]
    backwards = [again.indices(i).tolist() for i in reversed(range(60))][::-1]
    assert ahead == backwards
    assert ahead != [other.indices(i).tolist() for i in range(60)]
    large = [batch[0] >= 40 for batch in ahead[:20]]
    assert sum(large) == 12
    assert large != sorted(large)
    assert large != sorted(large, reverse=True)
    assert sorted(sample for batch in ahead[:20] for sample in batch) == list(range(100))
    assert ahead[:20] != ahead[20:40]


def test_a_batch_has_one_shape_and_holds_what_its_indices_name(cache, text):
    shapes = set()
    source = loader(cache, text)
    for _ in range(30):
        batch = source.next_batch()
        shapes.add(tuple(batch.latents.shape[2:]))
        valid = batch.text_valid
        lengths = [batch.text.shape[1]] * 4 if valid is None else valid.tolist()
        assert max(lengths) == batch.text.shape[1]
        for row, index in enumerate(batch.indices.tolist()):
            views = [
                cache.fetch([index], np.array([bit], dtype=np.uint64)).latents[0] for bit in (0, 1)
            ]
            assert any(torch.equal(batch.latents[row], view) for view in views)
            assert not batch.text[row, lengths[row] :].any()
    assert shapes == set(cache.shapes)
    assert len(shapes) == 3


def test_mirror_images_and_captions_are_drawn_evenly(cache, text):
    name = "a_flower/001.png"
    index = next(i for i in range(cache.size) if cache.name(i) == name)
    plain = cache.fetch([index]).latents[0]
    counts = Counter()
    source = loader(cache, text)
    captions = {
        caption: text.encode([caption])[0][0] for caption in ("a red dahlia", "petals in the sun")
    }
    for _ in range(600):
        batch = source.next_batch()
        for row in (batch.indices == index).nonzero().flatten().tolist():
            length = batch.text.shape[1] if batch.text_valid is None else batch.text_valid[row]
            states = batch.text[row, :length]
            (caption,) = (c for c, known in captions.items() if torch.equal(states, known))
            counts[torch.equal(batch.latents[row], plain), caption] += 1
    total = sum(counts.values())
    assert total >= 90
    assert len(counts) == 4
    assert all(abs(n - total / 4) < 5 * (total * 3 / 16) ** 0.5 for n in counts.values())


def test_captions_are_dropped_for_guidance(cache, text):
    null = text.encode([""])[0][0, 0]
    source = loader(cache, text, caption_dropout=0.3)
    dropped = 0
    for _ in range(250):
        batch = source.next_batch()
        valid = torch.full((4,), 9) if batch.text_valid is None else batch.text_valid
        one = torch.tensor([torch.equal(row[0], null) for row in batch.text])
        assert (valid[one] == 1).all() or batch.text.shape[1] == 1
        dropped += int(one.sum())
    assert abs(dropped - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5


def test_resumed_runs_and_other_process_counts_see_the_same_batches(cache, text):
    straight = loader(cache, text, caption_dropout=0.2)
    batches = [straight.next_batch() for _ in range(20)]
    saved = loader(cache, text, caption_dropout=0.2, prefetch=3)
    assert all(same(saved.next_batch(), batch) for batch in batches[:7])
    state = json.loads(json.dumps(saved.state_dict()))
    resumed = loader(cache, text, caption_dropout=0.2, prefetch=1)
    resumed.load_state_dict(state)
    assert all(same(resumed.next_batch(), batch) for batch in batches[7:])
    for position, batch in enumerate(batches):
        parts = [straight.batch_at(4 * position, slice(r, r + 2)) for r in (0, 2)]
        assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
        assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)


def test_a_cache_of_another_vae_is_refused_by_name(cache, text, tmp_path):
    state = loader(cache, text).state_dict()
    for name in ("vae", "text_encoder", "source"):
        changed = Cache(cache.path)
        settings = dataclasses.replace(cache.manifest.settings, **{name: "another"})
        changed.manifest = dataclasses.replace(cache.manifest, settings=settings)
        with pytest.raises(UserError, match=f"^{name}: the loader has another, the saved run has"):
            loader(changed, text).load_state_dict(state)
    with pytest.raises(UserError, match="batch_size: the loader has 8, the saved run has 4"):
        loader(cache, text, batch_size=8).load_state_dict(state)


def test_squares_only_may_be_resumed_with_another_batch_size(tmp_path):
    square = dataclasses.replace(CONFIG, max_aspect=1.0)
    encode_pixels(fill(tmp_path / "source", 9), tmp_path / "cache", config=square)
    squares = Cache(tmp_path / "cache")
    assert squares.shapes == [(16, 16)]
    embedder = CachedText(squares, load_text_encoder)
    four, six = (loader(squares, embedder, batch_size=n) for n in (4, 6))
    streams = [torch.cat([x.next_batch().indices for _ in range(36 // n)])
               for x, n in ((four, 4), (six, 6))]  # fmt: skip
    assert torch.equal(*streams)
    assert Counter(streams[0].tolist()) == dict.fromkeys(range(9), 4)
    six.load_state_dict(four.state_dict())


def test_what_cannot_be_fetched(cache, text):
    with pytest.raises(IndexError, match="samples 0 … 22"):
        cache.fetch([23])
    with pytest.raises(ValueError, match="several shapes"):
        cache.fetch(list(range(23)))
    with pytest.raises(ValueError, match="no multiple of 4"):
        loader(cache, text).batch_at(2)
    with pytest.raises(UserError, match=r"data\.path: name the folder"):
        Cache()


def test_a_prompt_needs_the_encoder_that_made_the_cache(cache):
    class Another:
        def fingerprint(self):
            return "words:24:other"

    text = CachedText(cache, lambda name: Another())
    assert text.encode(["a temple"])[1].tolist() == [2]
    with pytest.raises(UserError, match=r"'a dog' is no caption .* words:24 is not the one"):
        text.encode(["a dog"])


def test_prefetch_works_ahead_and_follows_jumps_and_errors():
    made, done = [], threading.Event()

    def make(position):
        made.append(position)
        if position == 50:
            raise UserError("truncated")
        if position == 30:
            done.set()
        return position

    ahead = Prefetch(make, stride=10, depth=3)
    assert ahead.take(0) == 0
    assert done.wait(20)  # nobody has asked for 30 yet
    assert ahead.take(10) == 10
    assert ahead.take(200) == 200
    with pytest.raises(UserError, match="truncated"):
        ahead.take(50)
    assert made[:4] == [0, 10, 20, 30]
    assert made.count(0) == made.count(10) == made.count(200) == 1
