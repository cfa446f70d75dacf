"""Sources: where captions come from, what counts as broken, the same pictures in every form."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from mvsplit.data import hub_sources, open_source
from mvsplit.data.sources import BrokenPicture, read_image
from mvsplit.errors import UserError
from tests.data.photographs import fill, piece

MISSING = "the extra is not installed: pip install 'mvsplit[data]'"


def png(number):
    buffer = io.BytesIO()
    piece(number).save(buffer, format="PNG")
    return buffer.getvalue()


def contents(source):
    """Pixels and captions of every picture."""
    pictures = [record.load() for record in source]
    return [(np.asarray(p.image), p.captions) for p in pictures]


def assert_same(found, wanted):
    for (pixels, captions), (expected, expected_captions) in zip(found, wanted, strict=True):
        assert np.array_equal(pixels, expected)
        assert captions == expected_captions


def test_captions_of_a_folder_in_their_order_of_preference(tmp_path):
    source = fill(tmp_path, 6)
    lines = [
        {"file_name": "001.png", "text": "the text file beside it is preferred"},
        {"file_name": "003.png", "captions": ["one", "two"]},
        {"file_name": "005.png"},
    ]
    metadata = "\n".join(map(json.dumps, lines))
    (source / "a_flower" / "metadata.jsonl").write_text(metadata + "\n\n")
    piece(6).save(source / "top.png")
    (source / ".hidden").mkdir()
    piece(6).save(source / ".hidden" / "no.png")
    captions = {record.name: record.load().captions for record in open_source(str(source))}
    assert captions == {
        "a_flower/001.png": ("a red dahlia", "petals in the sun"),
        "a_flower/003.png": ("one", "two"),
        "a_flower/005.png": (),
        "a_temple/000.png": ("a temple",),
        "a_temple/002.png": ("a temple",),
        "a_temple/004.png": ("a temple",),
        "top.png": (),
    }


def test_a_folder_knows_itself_wherever_it_lies(tmp_path):
    first = open_source(str(fill(tmp_path / "first", 4))).fingerprint()
    second = fill(tmp_path / "elsewhere" / "second", 4)
    assert open_source(str(second)).fingerprint() == first
    (second / "a_flower" / "001.txt").write_text("another caption")
    assert open_source(str(second)).fingerprint() != first


def test_pictures_are_read_upright_and_on_white():
    sideways = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    image = piece(2)
    image.save(sideways, format="PNG", exif=exif)
    turned = np.rot90(np.asarray(image), k=-1)
    assert np.array_equal(np.asarray(read_image(sideways.getvalue())), turned)
    clear = io.BytesIO()
    half = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    half.save(clear, format="PNG")
    assert np.asarray(read_image(clear.getvalue())).tolist() == [[[200, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("content", [b"", b"no picture", png(0)[:300], png(1)[:-2000]])
def test_what_is_no_whole_picture_is_broken(content):
    with pytest.raises(BrokenPicture, match=r"^\w+: \S[^\n]*$"):
        read_image(content)


def test_nothing_to_read_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="holds no picture; known: bmp"):
        open_source(str(tmp_path))
    source = fill(tmp_path, 2)
    with pytest.raises(UserError, match="caption_column: a folder of pictures has none"):
        open_source(str(source), caption_column="text")
    (source / "metadata.jsonl").write_text('{"text": "no name"}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1: is no JSON object with file"):
        open_source(str(source))
    monkeypatch.setattr(hub_sources, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mvsplit\[data\]'"):
        open_source("owner/name")


def test_parquet_and_tars_give_the_pictures_of_the_folder(tmp_path):
    datasets = pytest.importorskip("datasets", reason=MISSING)
    folder = fill(tmp_path / "folder", 6)
    wanted = contents(open_source(str(folder)))
    records = list(open_source(str(folder)))
    encoded = [(folder / record.name).read_bytes() for record in records]

    features = datasets.Features(
        image=datasets.Image(), captions=datasets.List(datasets.Value("string"))
    )
    rows = {
        "image": [{"bytes": content, "path": None} for content in encoded],
        "captions": [list(captions) for _, captions in wanted],
    }
    (tmp_path / "parquet").mkdir()
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(str(tmp_path / "parquet" / "0.parquet"))
    parquet = open_source(str(tmp_path / "parquet"))
    assert_same(contents(parquet), wanted)

    (tmp_path / "tars").mkdir()
    for number in (0, 1):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            for row in range(3 * number, 3 * number + 3):
                text = "\n".join(wanted[row][1]).encode()
                for suffix, content in (("png", encoded[row]), ("txt", text)):
                    info = tarfile.TarInfo(f"{row:03d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    tars = open_source(str(tmp_path / "tars" / "*.tar"))
    assert_same(contents(tars), wanted)
    assert [record.name for record in tars][-1].endswith("005")

    with pytest.raises(UserError, match=r"image_column='picture' is no column; .*image"):
        open_source(str(tmp_path / "parquet"), image_column="picture")
    with pytest.raises(UserError, match=r"nothing at .*none\.parquet"):
        open_source(str(tmp_path / "none.parquet"))


def test_a_data_set_of_classes_has_their_names_as_captions():
    datasets = pytest.importorskip("datasets", reason=MISSING)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a_temple", "a flower"])
    )
    rows = {"image": [{"bytes": png(n), "path": None} for n in (0, 1)], "label": [0, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    source = hub_sources.DatasetSource(data, "two")
    assert [captions for _, captions in contents(source)] == [("a temple",), ("a flower",)]
    assert source.size == 2


def test_one_picture_is_told_to_be_a_folder(tmp_path):
    (tmp_path / "one.JPG").touch()
    with pytest.raises(UserError, match=r"one\.JPG is one picture; give the folder"):
        open_source(str(tmp_path / "one.JPG"))


def test_a_folder_that_is_not_there_is_named_with_no_package_at_fault(tmp_path):
    for place in ("picturez", "./picturez", str(tmp_path / "picturez")):
        with pytest.raises(UserError, match=rf"there is no folder {place}; check the path"):
            open_source(place)
