"""Which implementation runs, and that a CPU user pays nothing for the other one."""

import logging
import subprocess
import sys

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.kernels import backend, dispatch, forced_backend


class OnCuda:
    """Stands for a CUDA tensor where there is none."""

    is_cuda = True

    def __init__(self, dtype=torch.bfloat16, width=1024):
        self.dtype, self.shape = dtype, (1, width)


@pytest.fixture
def fresh_log(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="mvsplit.kernels.dispatch")
    dispatch._log.cache_clear()
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    yield caplog
    dispatch._log.cache_clear()


def test_a_cpu_user_never_imports_triton():
    code = (
        "import sys, torch; from mvsplit.kernels import Segments, split_merge;"
        "x = torch.ones(1, 2, 4); split_merge(x, x, 0.5, 0.5, 0, Segments((2,)));"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_half_precision_on_cuda_runs_on_triton_and_says_so_once(fresh_log):
    assert [backend(OnCuda()) for _ in range(3)] == ["triton"] * 3
    assert [r.levelname for r in fresh_log.records] == ["INFO"]


@pytest.mark.parametrize(
    ("x", "reason"),
    [(OnCuda(torch.float64), "torch.float64"), (OnCuda(width=8193), "8193")],
)
def test_what_the_kernels_cannot_take_is_a_warning(fresh_log, x, reason):
    assert [backend(x) for _ in range(3)] == ["reference"] * 3
    assert [r.levelname for r in fresh_log.records] == ["WARNING"]
    assert reason in fresh_log.text


def test_missing_triton_is_a_warning(fresh_log, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert backend(OnCuda()) == "reference"
    assert "not installed" in fresh_log.text


def test_forced_backend_ends_with_its_block():
    x = torch.ones(2, 4)
    with forced_backend("triton"):
        assert backend(x) == "triton"
        with forced_backend("reference"):
            assert backend(OnCuda()) == "reference"
        assert backend(x) == "triton"
    assert backend(x) == "reference"


def test_forced_backend_names_the_choices():
    with pytest.raises(UserError, match='choose "triton" or "reference"'), forced_backend("cuda"):
        pass
