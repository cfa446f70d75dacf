"""Choices that outlive a process."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mvsplit.kernels.choices import cache_folder, recall, remember


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_comes_back_beside_others(folder: Path) -> None:
    assert recall("attention", "a") is None
    remember("attention", "a", "cudnn")
    remember("attention", "b", "flash")
    assert (recall("attention", "a"), recall("attention", "b")) == ("cudnn", "flash")
    assert recall("other", "a") is None
    assert [path.name for path in folder.iterdir()] == ["attention.json"]


@pytest.mark.parametrize("text", ['{"a": "cud', "null", '{"a": ["cudnn"]}'])
def test_a_damaged_file_is_said_and_written_anew(
    folder: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    folder.mkdir()
    (folder / "attention.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert recall("attention", "a") is None
    assert "attention.json cannot be read" in caplog.text
    remember("attention", "a", "flash")
    assert recall("attention", "a") == "flash"


def test_a_folder_that_cannot_be_written_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file")
    remember("attention", "a", "flash")
    assert "not kept" in caplog.text


def test_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MVSPLIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mvsplit"
