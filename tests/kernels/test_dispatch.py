"""Which implementation runs, and that a CPU user pays nothing for the other one."""

import logging
import subprocess
import sys
import types

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


def test_packed_rows_wider_than_a_block_do_not_send_tiled_ops_to_the_reference(
    fresh_log, monkeypatch
):
    """QKV at width 4096 and an FFN of 12288: no block of these kernels holds a packed row."""
    for name in ("swiglu", "qk_norm_rope"):
        fused = types.ModuleType(name)
        setattr(fused, name, lambda x, *_: "fused")
        monkeypatch.setitem(sys.modules, f"mvsplit.kernels.fused.{name}", fused)
    assert dispatch.swiglu(OnCuda(width=2 * 12288)) == "fused"
    assert dispatch.qk_norm_rope(OnCuda(width=3 * 4096), None, None, 32, 32) == "fused"
    assert backend(OnCuda(width=3 * 4096)) == "reference"


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
