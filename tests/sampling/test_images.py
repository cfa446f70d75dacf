"""Pictures, their records, and what is left when writing stops half-way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvsplit.errors import UserError
from mvsplit.sampling import PictureFolder, make_grid, read_record, save_png, to_pictures

RECORD = {"prompt": 'a "red" círculo\nleft', "seed": 3, "guidance": 2.0}


def test_values_become_grey_levels():
    row = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    picture = to_pictures(row.expand(1, 1, 64, 6))[0]
    assert picture.mode == "L"
    assert list(np.asarray(picture)[0]) == [0, 0, 128, 191, 255, 255]


def test_colours_keep_their_places():
    latents = torch.full((2, 3, 64, 70), -1.0)
    latents[1, 0, 2, 5] = 1.0  # red, at row 2, column 5
    first, second = to_pictures(latents)
    assert first.getextrema() == ((0, 0),) * 3
    assert second.size == (70, 64)
    assert second.getpixel((5, 2)) == (255, 0, 0)
    assert np.asarray(second).sum() == 255


def test_tiny_pictures_are_enlarged_in_whole_pixels():
    digits = torch.rand(1, 1, 8, 6) * 2 - 1
    enlarged = np.asarray(to_pictures(digits)[0])
    levels = np.rint((digits[0, 0].numpy() + 1) * 127.5)
    assert (enlarged == np.kron(levels, np.ones((8, 8)))).all()


def test_latents_that_are_no_pictures_are_refused():
    with pytest.raises(UserError, match="128 channels are no picture"):
        to_pictures(torch.zeros(1, 128, 4, 4))
    with pytest.raises(UserError, match="not finite"):
        to_pictures(torch.full((1, 1, 4, 4), torch.nan))


def test_a_grid_reads_like_text():
    pictures = [Image.new("L", (64, 40), color) for color in (0, 50, 100, 150, 200)]
    grid = make_grid(pictures)
    assert grid.size == (3 * 64 + 2 * 2, 2 * 40 + 2)
    for i in range(5):
        assert grid.getpixel((i % 3 * 66 + 30, i // 3 * 42 + 20)) == (50 * i,) * 3


def test_the_record_is_in_the_picture_and_in_a_line(tmp_path):
    folder = PictureFolder(tmp_path / "a" / "b")
    pictures = to_pictures(torch.rand(3, 1, 8, 8))
    for index in (0, 1, 12):
        path = folder.add(index, pictures[index % 3], {**RECORD, "index": index})
        assert read_record(path) == {**RECORD, "index": index}
    folder.add_grid(pictures, RECORD)
    lines = [json.loads(line) for line in (folder.path / "metadata.jsonl").open(encoding="utf-8")]
    assert [line["file_name"] for line in lines] == ["00000.png", "00001.png", "00012.png"]
    assert lines[2] == {"file_name": "00012.png", **RECORD, "index": 12}
    assert read_record(folder.path / "grid.png") == RECORD


def test_pictures_are_never_overwritten(tmp_path):
    PictureFolder(tmp_path / "out")
    with pytest.raises(UserError, match=r"out: .*/out is taken already"):
        PictureFolder(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out: .*/file is taken already"):
        PictureFolder(tmp_path / "file")


WRITER = """
import sys, itertools, pathlib, numpy
from PIL import Image
from mvsplit.sampling import PictureFolder
folder = PictureFolder(pathlib.Path(sys.argv[1]))
noise = numpy.random.default_rng(0).integers(0, 255, (200, 200), dtype=numpy.uint8)
for index in itertools.count():
    folder.add(index, Image.fromarray(noise), {"index": index})
    print(index, flush=True)
"""


def test_a_kill_leaves_complete_pictures_with_complete_lines(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        while int(writer.stdout.readline()) < 20:
            pass
        writer.kill()
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").open()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    pictures = sorted(tmp_path.glob("0*.png"))
    assert len(lines) >= 21
    # The last picture may have been in place, and its line not yet.
    assert [path.name for path in pictures][: len(lines)] == [line["file_name"] for line in lines]
    assert len(pictures) - len(lines) in (0, 1)
    for index, path in enumerate(pictures):
        assert read_record(path) == {"index": index}
        Image.open(path).load()


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    old, new = to_pictures(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 8, 8))
    save_png(path, old, RECORD)

    def write_half(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(UserError, match=r"cannot write .*a\.png: No space left on device; free"):
        save_png(path, new, RECORD)
    assert Image.open(path).getextrema() == (0, 0)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_record_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    folder = PictureFolder(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.add(0, Image.new("L", (2, 2)), {"guidance": float("nan")})
    assert os.listdir(tmp_path) == ["metadata.jsonl"]
    assert (tmp_path / "metadata.jsonl").read_text() == ""
