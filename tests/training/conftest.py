from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mvsplit.data.digits import NAMES
from mvsplit.data.pairs import write_pairs
from mvsplit.training import train
from tests.training import runs


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in the same order here and in other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps without interruption. Not to be written to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(runs.experiment(), run)
    torch.set_num_threads(threads)
    return run


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs of noise in the size of digits. Not to be written to."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    draws = torch.rand(20, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    write_pairs(path, ((NAMES[k % 10], *pair) for k, pair in enumerate(draws)))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
