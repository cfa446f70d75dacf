"""Files of clips: what is written is what was drawn."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvsplit.data import Clips
from mvsplit.errors import UserError
from mvsplit.sampling import ClipFolder, read_record, to_clips
from mvsplit.sampling.clips import contact_sheet, gif_bytes, mp4_bytes

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="extra video")


def clips(count=2, frames=5, size=32):
    return Clips(frames, size, seed=3).fetch(range(count)).latents


def arrays(frames):
    return np.stack([np.asarray(frame.convert("RGB")) for frame in frames]).astype(int)


def decoded(content):
    with Image.open(io.BytesIO(content)) as gif:
        shown = []
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append((gif.convert("RGB"), gif.info["duration"]))
        return shown, gif.info


def test_frames_are_those_of_the_latents():
    latents = clips()
    made = to_clips(latents)
    assert [len(frames) for frames in made] == [5, 5]
    for latent, frames in zip(latents, made, strict=True):
        pixels = ((latent + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        assert (arrays(frames)[:, ::2, ::2] == pixels).all()  # 32 px are shown as 64
    grey = to_clips(latents[:, :1])
    assert (arrays(grey[0])[..., 0] == arrays(made[0])[..., 0]).all()


def test_a_gif_holds_every_frame_its_rate_and_its_record():
    (frames,) = to_clips(clips(1))
    record = {"prompt": "ein Kreis, größer", "seed": 3}
    shown, info = decoded(gif_bytes(frames, 10, record))
    assert [duration for _, duration in shown] == [100] * 5
    assert info["loop"] == 0
    assert json.loads(info["comment"]) == record
    # A clip of two colours and their mixtures at the rims has far fewer than 256 of them.
    assert abs(arrays([f for f, _ in shown]) - arrays(frames)).max() <= 8


def test_a_clip_that_stands_is_shown_as_long():
    (frames,) = to_clips(clips(1)[:, :, :1].expand(-1, -1, 4, -1, -1))
    shown, _ = decoded(gif_bytes(frames, 10, {}))
    assert sum(duration for _, duration in shown) == 400


@needs_av
@pytest.mark.parametrize("side", [(64, 64), (45, 33)])
def test_an_mp4_holds_every_frame_and_its_rate(side):
    import av

    (frames,) = to_clips(clips(1))
    frames = [frame.resize(side) for frame in frames]
    with av.open(io.BytesIO(mp4_bytes(frames, 12.5))) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
        shown = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)]
    assert len(shown) == 5
    for ours, theirs in zip(arrays(frames), shown, strict=True):
        height, width = ours.shape[:2]
        assert (theirs.shape[0] % 2, theirs.shape[1] % 2) == (0, 0)
        # H.264 halves the resolution of colour, so rims differ, but not the picture.
        assert abs(ours - theirs[:height, :width]).mean() < 4


def test_a_contact_sheet_has_a_row_for_each_clip():
    made = to_clips(clips(3, 4))
    sheet = np.asarray(contact_sheet(made))
    assert sheet.shape == (3 * 64 + 2 * 2, 4 * 64 + 3 * 2, 3)
    for row, frames in enumerate(made):
        for column, frame in enumerate(frames):
            part = sheet[66 * row :, 66 * column :][:64, :64]
            assert (part == np.asarray(frame)).all()
    assert (sheet[64:66] == 128).all()


def test_a_folder_is_in_order_whenever_one_looks(tmp_path, monkeypatch):
    folder = ClipFolder(tmp_path / "new", 8, mp4=False)
    made = to_clips(clips())
    folder.add_clip(0, made[0], {"index": 0})
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match=r"cannot write .*00001\.gif: full"):
        folder.add_clip(1, made[1], {"index": 1})
    monkeypatch.undo()
    folder.add_contact_sheet(made, {"prompt": "x"})
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["00000.gif", "contact.png", "metadata.jsonl"]
    lines = (tmp_path / "new" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"file_name": "00000.gif", "index": 0}]
    assert read_record(tmp_path / "new" / "contact.png") == {"prompt": "x"}


def test_without_the_extra_mp4_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "av" else find(name, *a)
    )
    with pytest.raises(UserError, match=r"mvsplit\[video\]"):
        ClipFolder(tmp_path / "new", 8, mp4=True)
    assert not (tmp_path / "new").exists()


def test_latents_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        to_clips(torch.full((1, 3, 2, 8, 8), torch.nan))
