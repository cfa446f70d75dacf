"""What is asked of the bench on its command line; what cannot be is refused before a run begins."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mvsplit.errors import UserError
from mvsplit.reproduce.check import check_minutes, nearest_existing
from mvsplit.reproduce.depth.plan import BenchRun, BenchSize, get_run

_OF_A_ROW = {"run", "entry", "depth", "width", "rate", "seed", "fingerprint"}


def check_options(options: argparse.Namespace, size: BenchSize) -> None:
    """Raises UserError for numbers, places and a device that cannot be used."""
    _check_numbers(options)
    _check_places(options)
    if options.draw and options.pages is None:
        raise UserError("--draw needs --pages FOLDER, whose results the page is written from")
    if size.device != "cpu" and not options.draw and not torch.cuda.is_available():
        raise UserError(f"size={size.name}: no GPU is there; use --size small, which needs none")


def _check_numbers(options: argparse.Namespace) -> None:
    otherwise = {"workers": "as many as the size says", "together": "each run alone"}
    for name, words in otherwise.items():
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1; without --{name} it is {words}")
    for depth in options.depths or ():
        if depth < 1:
            raise UserError(f"depths={depth}: a network has at least 1 layer; give more than 0")
    check_minutes(options.minutes)


def _check_places(options: argparse.Namespace) -> None:
    for name in ("out", "scratch", "pages"):
        path = getattr(options, name)
        if path is not None:
            _check_folder(name, path, path)
    if options.json is not None:
        if options.json.is_dir():
            raise UserError(f"json={options.json}: is a folder; give the name of a file in it")
        _check_folder("json", options.json, options.json.parent)
    if options.readme is not None and not options.readme.is_file():
        raise UserError(f"readme={options.readme}: is no file; give the README to write in")


def _check_folder(name: str, given: Path, folder: Path) -> None:
    """Refuses what can be no folder, there or not, for it or one above it is a file."""
    there = nearest_existing(folder)
    if not there.is_dir():
        raise UserError(f"{name}={given}: {there} is a file and no folder; give another place")


def read_part(text: str) -> tuple[int, int]:
    """K and N of "K/N". Raises UserError where it is not that; whether there is such a part is seen
    where entries are shared out."""
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", text)
    if found is None:
        raise UserError(f"part={text!r}: must be K/N, process K of N, K from 0, as in 0/2 and 1/2")
    return int(found[1]), int(found[2])


def read_runs(names: Sequence[str], size: BenchSize) -> list[BenchRun]:
    """Runs by their names. Raises UserError for one that is none, or cannot be run."""
    runs = [get_run(name) for name in names]
    for run in runs:
        try:
            run.experiment(size)
        except UserError as error:
            raise UserError(f"run={run.name!r}: {error}") from error
    return runs


def read_result(path: Path, size: BenchSize) -> dict[str, Any]:
    """What --json has written: `rule` and `rows`, of this size.

    Raises:
        UserError: it is not that.
    """
    remedy = "give a file that --json has written"
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"have={path}: cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise UserError(f"have={path}: is no JSON ({error}); {remedy}") from error
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or "rule" not in found:
        raise UserError(f'have={path}: has no "rule" and "rows"; {remedy}')
    if not all(isinstance(row, dict) and row.keys() >= _OF_A_ROW for row in rows):
        raise UserError(f'have={path}: "rows" holds what is no row of the bench; {remedy}')
    if found.get("size") != size.name:
        raise UserError(f"have={path}: is of size {found.get('size')}; give --size with that")
    return found
