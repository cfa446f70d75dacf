"""A cache: what is in it, what survives a kill, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import signal

import numpy as np
import pytest
import torch

from mvsplit.data import Cache, CachedText, Encoders, load_text_encoder
from mvsplit.data.aspect import aspect_buckets, fit, nearest_bucket
from mvsplit.data.encoders import OpenWords, Pixels
from mvsplit.data.sources import ImageFolder
from mvsplit.errors import UserError
from tests.data import photographs
from tests.data.photographs import CONFIG, encode_pixels, files, fill
from tests.training.runs import PROCESSES


class OtherPixels(Pixels):
    """The identity under another name, as weights that were changed."""

    def fingerprint(self):
        return "pixels-2"


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def whole(source, tmp_path_factory):
    """An undisturbed cache. Not to be written to."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    assert encode_pixels(source, out) is not None
    return out


@pytest.fixture
def copy(whole, tmp_path):
    for name, content in files(whole).items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "cache"


def expected(path):
    """The latents of a picture, computed apart: [3, h, w]."""
    picture = next(r for r in ImageFolder(path.parents[1]) if r.name.endswith(path.name)).load()
    shape = nearest_bucket(
        picture.image.height, picture.image.width, aspect_buckets(16, 4, CONFIG.max_aspect)
    )
    values = np.asarray(fit(picture.image, shape)).astype(np.float64) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).float()


def test_every_picture_is_there_with_its_mirror_image_and_its_captions(source, whole):
    cache = Cache(whole)
    assert cache.size == 20
    seen = set()
    for index in range(20):
        name = cache.name(index)
        seen.add(name)
        wanted = expected(source / name)
        captions = (
            {"a red dahlia", "petals in the sun"} if name == "a_flower/001.png" else
            {name.split("/")[0].replace("_", " ")}
        )  # fmt: skip
        found = set()
        for bits in range(4):
            got = cache.fetch([index], np.array([bits], dtype=np.uint64))
            mirrored = wanted.flip(-1) if bits & 1 else wanted
            torch.testing.assert_close(got.latents[0], mirrored, rtol=0, atol=1e-6)
            found |= set(got.captions)
        assert found == captions
    assert len(seen) == 20


def test_text_states_are_those_of_the_encoder_without_padding(whole):
    text = CachedText(Cache(whole), load_text_encoder)
    prompts = ["petals in the sun", "a temple", "", "a red dahlia", "never seen before here"]
    states, valid = text.encode(prompts)
    wanted, wanted_valid = OpenWords(24).encode(prompts)
    assert valid.tolist() == wanted_valid.tolist() == [4, 2, 1, 3, 4]
    assert torch.equal(states, wanted)
    shards = Cache(whole).manifest.shards
    # temple | temple, flower and one of its own | flower; each with the empty caption.
    assert sum(shard.tokens for shard in shards) == sum(
        shard.captions * 2 - 1 for shard in shards
    ) + (3 - 2) + (4 - 2)


def test_statistics_are_those_of_all_latents(whole):
    cache = Cache(whole)
    both = [
        cache.fetch([i], np.array([bit], dtype=np.uint64)).latents[0].double().flatten(1)
        for i in range(20)
        for bit in (0, 1)
    ]
    values = torch.cat(both, dim=1).numpy()
    np.testing.assert_allclose(cache.manifest.latents["mean"], values.mean(1), rtol=1e-9)
    np.testing.assert_allclose(cache.manifest.latents["std"], values.std(1), rtol=1e-9)


def test_kill_9_at_any_change_of_the_disk(source, whole, tmp_path):
    crash_at, codes = 0, []
    while not codes or codes[-1]:
        out = tmp_path / str(crash_at)
        process = PROCESSES.Process(
            target=photographs.encode_until, args=(source, out, crash_at), daemon=True
        )
        process.start()
        process.join(60)
        codes.append(process.exitcode)
        if process.exitcode and not (out / "manifest.json").exists():
            with pytest.raises(UserError, match=r"not finished|make it with"):
                Cache(out)
        else:
            assert files(out) == files(whole)
        crash_at += 3  # a shard has seven changes, so each kind of them is met in some shard
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert crash_at > 20
    # Resumed from early, middle and late kills: the same bytes.
    for number in range(0, crash_at - 3, 3):
        assert encode_pixels(source, tmp_path / str(number)) is not None
        assert files(tmp_path / str(number)) == files(whole)


def test_finished_shards_are_not_encoded_again(source, copy):
    (copy / "manifest.json").unlink()
    (copy / "shards" / "00001.json").unlink()

    class Counting(Pixels):
        pictures = 0

        def encode(self, images):
            self.pictures += len(images)
            return images

    vae = Counting()
    assert encode_pixels(
        source, copy, encoders=Encoders(vae=vae, text=OpenWords(24), text_name="words:24")
    )
    assert vae.pictures == 2 * 8  # with their mirror images


def test_two_processes_make_what_one_makes(source, whole, tmp_path):
    assert encode_pixels(source, tmp_path / "cache", part=(1, 2)) is None
    with pytest.raises(UserError, match="not finished"):
        Cache(tmp_path / "cache")
    assert encode_pixels(source, tmp_path / "cache", part=(0, 2)) is not None
    assert files(tmp_path / "cache") == files(whole)


def test_a_truncated_shard_is_named_and_can_be_made_again(source, whole, copy):
    shard = copy / "shards" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"00001\.safetensors is truncated \(\d+ of \d+ bytes\)"):
        Cache(copy, verify=False)
    encode_pixels(source, copy)
    assert files(copy) == files(whole)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001\.safetensors is missing"):
        Cache(copy)


def test_a_shard_that_becomes_shorter_while_it_is_read_is_named(copy):
    cache = Cache(copy)
    assert cache.fetch([19]).latents.isfinite().all()
    shard = copy / "shards" / cache.manifest.shards[-1].file
    with shard.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=f"{shard.name} is truncated; run mvsplit encode again"):
        cache.fetch([19])


def test_a_full_disk_is_one_line_and_what_is_done_stays(source, whole, tmp_path):
    out = tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file may be larger
    try:
        with pytest.raises(
            UserError, match=r"cannot write .*00000\.safetensors: .*free some space"
        ):
            encode_pixels(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    encode_pixels(source, out)
    assert files(out) == files(whole)


def test_a_changed_byte_is_found(copy):
    shard = copy / "shards" / "00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"00000\.safetensors is damaged \(checksum\); remove"):
        Cache(copy)
    Cache(copy, verify=False)


def test_other_settings_are_refused_by_name(source, copy, tmp_path):
    words = OpenWords(24)
    other = Encoders(vae=OtherPixels(), text=words, text_name="words:24")
    with pytest.raises(UserError, match=r"vae='pixels-2': .* begun with 'pixels' \(the weights"):
        encode_pixels(source, copy, encoders=other)
    elsewhere = Encoders(vae=Pixels(), text=words, vae_name="a/copy", text_name="words:24")
    assert encode_pixels(source, copy, encoders=elsewhere) is not None
    for field, value in (("resolution", 20), ("flips", False), ("dtype", "bfloat16")):
        changed = dataclasses.replace(CONFIG, **{field: value})
        with pytest.raises(UserError, match=f"{field}={value!r}: "):
            encode_pixels(source, copy, config=changed)
    more = fill(tmp_path / "more", 21)
    with pytest.raises(UserError, match=r"source=.*pictures or captions were added"):
        encode_pixels(more, copy)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        encode_pixels(source, tmp_path / "other")


def test_broken_pictures_are_listed_up_to_the_limit(tmp_path):
    source = fill(tmp_path / "source")
    good = (source / "a_temple" / "000.png").read_bytes()
    broken = {"002.png": b"", "004.png": b"no picture", "018.png": good[: len(good) // 2]}
    for name, content in broken.items():
        (source / "a_temple" / name).write_bytes(content)
    few = dataclasses.replace(CONFIG, max_broken=2)
    last = r"max_broken=2: 3 pictures cannot be read, the last is a_temple/018\.png"
    for _ in range(2):  # also when the first two lie in shards that are done
        with pytest.raises(UserError, match=last):
            encode_pixels(source, tmp_path / "cache", config=few)
    enough = dataclasses.replace(CONFIG, max_broken=3)
    manifest = encode_pixels(source, tmp_path / "cache", config=enough)
    assert manifest.pictures == 17
    listed = [name for shard in manifest.shards for name, reason in shard.broken]
    assert listed == [f"a_temple/{name}" for name in broken]
    record = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert record["broken"] == 3


def test_a_picture_without_a_caption_has_the_empty_one(tmp_path):
    source = tmp_path / "flat"
    source.mkdir()
    photographs.piece(0).save(source / "one.png")
    encode_pixels(source, tmp_path / "cache")
    assert Cache(tmp_path / "cache").fetch([0]).captions == [""]


def test_latents_that_are_not_finite_stop_the_encoding(source, tmp_path):
    class Wrong(Pixels):
        def encode(self, images):
            return images / (images - images)

    encoders = Encoders(vae=Wrong(), text=OpenWords(24), text_name="words:24")
    with pytest.raises(UserError, match=r"latents of a_flower/\d+\.png are not finite"):
        encode_pixels(source, tmp_path / "cache", encoders=encoders)


@pytest.mark.parametrize(("resolution", "multiple", "aspect"), [(256, 16, 2.0), (96, 32, 3.0)])
def test_buckets(resolution, multiple, aspect):
    shapes = aspect_buckets(resolution, multiple, aspect)
    assert (resolution, resolution) in shapes
    assert {(w, h) for h, w in shapes} == set(shapes)
    sides = range(multiple, 4 * resolution, multiple)
    for h, w in shapes:
        assert h % multiple == w % multiple == 0
        assert max(h, w) <= aspect * min(h, w)
        # No width that is possible with the shorter side comes nearer to the area.
        short, long = min(h, w), max(h, w)
        best = min(abs(short * side - resolution**2) for side in sides)
        assert abs(short * long - resolution**2) == best


def test_the_nearest_bucket_is_that_of_the_least_distortion():
    shapes = aspect_buckets(64, 8, 4.0)
    for height, width in np.random.default_rng(0).integers(1, 500, (200, 2)).tolist():
        found = nearest_bucket(height, width, shapes)
        factors = [max(a, 1 / a) for a in ((w / h) / (width / height) for h, w in shapes)]
        h, w = found
        assert max((w / h) / (width / height), (width / height) / (w / h)) == pytest.approx(
            min(factors)
        )


def test_fit_cuts_the_centre_without_distortion():
    image = photographs.piece(2)  # 36 × 48
    assert image.size == (48, 36)
    cut = np.asarray(image)[:, 6:42]
    assert np.array_equal(np.asarray(fit(image, (36, 36))), cut)


def test_impossible_values_are_refused():
    with pytest.raises(UserError, match=r"resolution=250 is not a multiple of 16.*use 256"):
        aspect_buckets(250, 16)
    with pytest.raises(UserError, match=r"max_aspect=0\.5"):
        aspect_buckets(256, 16, 0.5)
    with pytest.raises(UserError, match="max_broken=-1"):
        dataclasses.replace(CONFIG, max_broken=-1)


def test_the_real_classes(source, tmp_path):
    """Tiny random instances of the FLUX.2 autoencoder and of Qwen3."""
    tiny = pytest.importorskip("tests.hub.tiny")
    from mvsplit.data.text_encoder import QwenEncoder
    from mvsplit.data.vae import Flux2Autoencoder

    vae = Flux2Autoencoder(tiny.tiny_vae())
    text = QwenEncoder(tiny.tiny_tokenizer(), tiny.tiny_text_encoder())
    config = dataclasses.replace(CONFIG, resolution=32, multiple=None, flips=True)
    encoders = Encoders(vae=vae, text=text, vae_name="tiny", text_name="tiny")
    manifest = encode_pixels(source, tmp_path / "cache", config=config, encoders=encoders)
    assert manifest.settings.vae == vae.fingerprint()
    cache = Cache(tmp_path / "cache")
    assert cache.channels == 128
    picture = photographs.piece(3)
    index = next(i for i in range(20) if cache.name(i) == "a_flower/003.png")
    shape = nearest_bucket(picture.height, picture.width, aspect_buckets(32, 16, 2.0))
    pixels = torch.from_numpy(np.asarray(fit(picture, shape)).copy()).permute(2, 0, 1)
    image = pixels.float()[None] / 127.5 - 1
    for bit, view in ((0, image), (1, image.flip(-1))):
        latents = cache.fetch([index], np.array([bit], dtype=np.uint64)).latents
        torch.testing.assert_close(latents, vae.encode(view), rtol=1e-4, atol=1e-4)
    prompts = ["a flower", "petals in the sun", ""]
    found, valid = CachedText(cache, load_text_encoder).encode(prompts)
    for row, prompt in enumerate(prompts):
        alone, length = text.encode([prompt])
        assert int(valid[row]) == int(length[0])
        torch.testing.assert_close(found[row, : valid[row]], alone[0], rtol=1e-4, atol=1e-4)
        assert not found[row, valid[row] :].any()


def test_open_words_tell_order_and_words_apart():
    text, valid = OpenWords(32).encode(["dog bites man", "man bites dog", ""])
    assert valid.tolist() == [3, 3, 1]
    assert torch.equal(text[0, 1], text[1, 1])
    assert not torch.equal(text[0, 0], text[1, 2])
    assert not text[2, 1:].any()
    assert re.fullmatch(r"words:32:\d+", OpenWords(32).fingerprint())


def test_encoder_names():
    with pytest.raises(UserError, match=r"words:abc.*write words:64"):
        load_text_encoder("words:abc")
    with pytest.raises(UserError, match="too few"):
        load_text_encoder("words:4")
    assert load_text_encoder("words:48").width == 48


def test_a_caption_of_too_many_open_words_says_what_is_cut():
    words = OpenWords(24, max_tokens=3)
    with pytest.warns(UserWarning, match="has 5 words; the last 2 are cut, 3 are read"):
        text, valid = words.encode(["a dog bites a man"])
    assert torch.equal(text, words.encode(["a dog bites"])[0])
    assert valid.tolist() == [3]
