"""Pairs in parquet files: what is read, and what is refused with its row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from mvsplit.data import Loader, WordEmbedder
from mvsplit.data.pairs import Pairs, write_pairs
from mvsplit.errors import UserError


def png(height: int, width: int, value: int = 0, mode: str = "RGB", **save: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), (value,) * 3 if mode == "RGB" else value).save(
        file, "PNG", **save
    )
    return file.getvalue()


def file_of(folder: Path, **columns: list[Any]) -> Path:
    path = folder / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path: Path, channels: int) -> None:
    draws = torch.rand(5, 2, channels, 6, 10, generator=torch.Generator().manual_seed(2))
    pictures = draws * 2.4 - 1.2  # some outside of [−1, 1]
    names = [f"caption {k}" for k in range(5)]
    path = tmp_path / "new" / "pairs.parquet"
    assert write_pairs(path, zip(names, pictures[:, 0], pictures[:, 1], strict=True)) == 5
    pairs = Pairs(path, channels)
    assert (pairs.size, pairs.shapes, pairs.height, pairs.width) == (5, [(6, 10)], 6, 10)
    read = pairs.fetch([3, 0])
    assert read.captions == ["caption 3", "caption 0"]
    assert read.rejected is not None
    for found, which in ((read.latents, 0), (read.rejected, 1)):
        wanted = pictures[[3, 0], which].clamp(-1, 1)
        assert (found - wanted).abs().max() <= 1 / 255 + 1e-6  # 8 bits over a range of 2
    with pytest.raises(UserError, match=r"out=.*: exists; choose another"):
        write_pairs(path, [])
    with pytest.raises(UserError, match=r"out=.*: there is no pair to write"):
        write_pairs(tmp_path / "none.parquet", [])


def test_images_as_datasets_writes_them_latents_and_several_sizes(tmp_path: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    path = file_of(
        tmp_path,
        caption=["a", " b ", "c"],
        chosen=[{"bytes": png(5, 7, 255), "path": None}] * 2
        + [{"bytes": png(3, 9, 255, exif=turned), "path": None}],
        rejected=[{"bytes": png(5, 7, 0, "L"), "path": None}] * 2
        + [{"bytes": png(9, 3), "path": None}],
    )
    pairs = Pairs(path, 3)
    assert pairs.shapes == [(5, 7), (9, 3)]
    assert [b.tolist() for b in pairs.buckets] == [[0, 1], [2]]
    read = pairs.fetch([1])
    assert read.rejected is not None
    assert (read.captions, read.latents.unique().tolist()) == (["b"], [1.0])
    assert (read.latents.shape, read.rejected.unique().tolist()) == ((1, 3, 5, 7), [-1.0])
    assert pairs.fetch([2]).latents.shape == (1, 3, 9, 3)
    path = file_of(tmp_path, caption=["a"], chosen=[latents.tolist()], rejected=[latents.tolist()])
    assert np.array_equal(Pairs(path, 3).fetch([0]).latents[0], latents)
    encoded = file_of(tmp_path, caption=["a"], chosen=[png(4, 8, 255)], rejected=[png(4, 8)])
    halves = Pairs(encoded, 2, lambda x: x[:, :2, ::2, ::2] / 2).fetch([0])
    assert halves.rejected is not None
    assert torch.equal(halves.latents, torch.full((1, 2, 2, 4), 0.5))
    assert torch.equal(halves.rejected, torch.full((1, 2, 2, 4), -0.5))


def test_the_loader_gives_both_and_knows_the_file_again(tmp_path: Path) -> None:
    def opened(last: int) -> Loader:
        shades = [*range(0, 250, 10), last]
        path = file_of(
            tmp_path,
            caption=["one", "two"] * 13,
            chosen=[png(4, 4, shade) for shade in shades],
            rejected=[png(4, 4, 255 - shade) for shade in shades],
        )
        words = WordEmbedder(["one", "two"], 16)
        return Loader(Pairs(path, 3), words, batch_size=8, seed=0, prefetch=1)

    loader = opened(250)
    batch = loader.next_batch()
    assert batch.rejected is not None
    assert len(batch.latents.unique()) == 8
    torch.testing.assert_close(batch.rejected, -batch.latents)
    saved = loader.state_dict()
    again = opened(250)
    again.load_state_dict(saved)
    assert again.position == 8
    with pytest.raises(UserError, match=r"pairs: the loader has"):
        opened(251).load_state_dict(saved)


GOOD = {"caption": ["a", "b"], "chosen": [png(4, 4)] * 2, "rejected": [png(4, 4)] * 2}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["a", None]}, "row 1 of .* has no caption; give each pair the one"),
        ({"caption": ["a", "  "]}, "row 1 of .* has no caption"),
        ({"rejected": [png(4, 4), None]}, "row 1 of .* has no rejected sample; a pair needs both"),
        ({"chosen": [None, png(4, 4)]}, "row 0 of .* has no chosen sample"),
        (
            {"rejected": [png(4, 4), png(4, 6)]},
            "row 1 of .* chosen is 4×4 in 3 channels, rejected 4×6 in 3; make both of one size",
        ),
        ({"chosen": [png(4, 4), b"no picture"]}, "row 1 of .* a picture that cannot be read"),
        ({"chosen": [[[[0.0]]], [[[0.0]]]]}, r"latents of shape \[1, 1, 1\].* \[3, H, W\]"),
        ({"chosen": [[[[0.0], [0.0, 1.0]]]] * 2}, "row 0 of .* neither a picture nor latents"),
        ({"caption": [], "chosen": [], "rejected": []}, "holds no pair"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = file_of(tmp_path, **{**GOOD, **columns})
    with pytest.raises(UserError, match=f"data.pairs: .*{message}"):
        Pairs(path, 3)


def test_a_picture_cut_off_is_named_when_it_comes(tmp_path: Path) -> None:
    noise = io.BytesIO()
    shades = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(shades).save(noise, "PNG")
    cut = noise.getvalue()[:-200]
    path = file_of(tmp_path, caption=["a"], chosen=[cut], rejected=[png(16, 16)])
    with pytest.raises(UserError, match=r"row 0 of .* cannot be read"):
        Pairs(path, 3).fetch([0])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*none; give one, or make it with"):
        Pairs(tmp_path / "none", 3)
    (tmp_path / "text").write_text("no parquet")
    with pytest.raises(UserError, match=r"text is no parquet file"):
        Pairs(tmp_path / "text", 3)
    path = file_of(tmp_path, caption=["a"], better=[png(4, 4)], rejected=[png(4, 4)])
    with pytest.raises(UserError, match=r"no column 'chosen'; rename one of caption, better"):
        Pairs(path, 3)
