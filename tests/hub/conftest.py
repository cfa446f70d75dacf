"""One run on the digits, briefly trained, for all that reads or writes weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mvsplit.training import train
from tests.training import runs


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    run = tmp_path_factory.mktemp("digits") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(runs.experiment(steps=60, save_every=60, probe_every=0), run)
    torch.set_num_threads(threads)
    return run
