"""The watch on two processes: norms of gradients that they hold together, and what it says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable

import pytest
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mvsplit.diagnostics import metrics
from mvsplit.diagnostics.monitor import Cadence, Monitor
from mvsplit.diagnostics.ranks import arrays_over_ranks, mean_over_ranks
from mvsplit.diagnostics.shards import norms, part_of
from mvsplit.diagnostics.taps import FAMILIES, gradient_norms, taps_for_dit
from mvsplit.models import DiT, DiTConfig
from tests.diagnostics.ranks import on_ranks

SHAPES = [(5, 3), (4, 3), (1, 4)]  # of one row each rank gets nothing
ROWS = [(0, None), (0, 2), (1, 4), (3, 5), (2, 2)]


def dit() -> DiT:
    """Its packed projection of 12 + 4 + 4 rows is cut within the rows of Q."""
    config = DiTConfig(
        depth=4, width=12, heads=3, kv_heads=1, ffn_width=7, channels=2, text_width=4
    )
    model = DiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def batch(samples: slice) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 2, 3, 3, generator=generator)
    return latents[samples], torch.randn(4, 3, 4, generator=generator)[samples]


def matrix(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def on_rank(rank: int) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (2,))
    placements = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()]}
    parts = {
        (kind, shape, rows): part_of(distribute_tensor(matrix(shape), mesh, placement), *rows)
        for kind, placement in placements.items()
        for shape in SHAPES
        for rows in ROWS
    }
    local = matrix((4, 3)) * (rank + 1)  # 1 and 2 of it, to be summed
    parts["sum"] = part_of(DTensor.from_local(local, mesh, [Partial()]), 1, 4)
    parts["plain"] = part_of(matrix((4, 3)), 1, 4)
    found = {name: float(n) for name, n in zip(parts, norms(list(parts.values())), strict=True)}
    return {
        "parts": found,
        "large": _large(mesh),
        "fsdp": _fsdp(rank, mesh),
        "arrays": _arrays(rank),
        "shares": _shares(rank),
        "monitored": _monitored_on_rank(rank, mesh),
    }


def _large(mesh) -> float:
    (norm,) = norms([part_of(distribute_tensor(torch.full((2, 2), 1e19), mesh, [Shard(0)]))])
    return float(norm)


def _fsdp(rank: int, mesh) -> dict[str, float]:
    model = dit()
    taps = taps_for_dit(model)  # found before sharding puts other tensors in place
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(*batch(slice(2 * rank, 2 * rank + 2))).square().mean().backward()
    return gradient_norms(taps)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Run once for all workers of pytest-xdist, which share the folder above their own."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with FileLock(shared / "ranks.lock"):
        if not (shared / "ranks.pt").exists():
            torch.save(on_ranks(on_rank), shared / "ranks.pt")
    return torch.load(shared / "ranks.pt", weights_only=False)


def test_rows_of_any_placement(ranks):
    for (kind, shape, rows), found in (
        (key, value) for key, value in ranks[0]["parts"].items() if isinstance(key, tuple)
    ):
        exact = float(matrix(shape)[slice(*rows)].double().norm())
        assert found == pytest.approx(exact, rel=1e-6), (kind, shape, rows)
    exact = float(matrix((4, 3))[1:4].double().norm())
    assert ranks[0]["parts"]["plain"] == pytest.approx(exact, rel=1e-6)
    assert ranks[0]["parts"]["sum"] == pytest.approx(3 * exact, rel=1e-6)


def test_ranks_agree_to_the_last_bit(ranks):
    for name in ("parts", "large", "fsdp"):
        assert ranks[0][name] == ranks[1][name]


def test_the_sum_of_squares_does_not_overflow(ranks):
    assert ranks[0]["large"] == pytest.approx(2e19, rel=1e-6)


def test_fully_sharded_gradients_have_the_norms_of_one_process(ranks):
    model = dit()
    model(*batch(slice(None))).square().mean().backward()
    assert ranks[0]["fsdp"] == pytest.approx(gradient_norms(taps_for_dit(model)), rel=1e-5)
    assert min(ranks[0]["fsdp"].values()) > 0


MODES = ("ddp", "fsdp", "fsdp-checkpoint-accumulate", "fsdp-autocast")
STEPS, BROKEN = 10, 9  # the steps, and the one that meets a NaN


def monitored(mode: str, samples: slice, wrap: Callable[[DiT], nn.Module]) -> dict[str, object]:
    """Some steps, one of which meets a NaN in the last sample; what the monitor saw."""
    model = dit()
    if "checkpoint" in mode:
        model.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in model.blocks)
    wrapped = wrap(model)
    monitor = Monitor(wrapped, cadence=Cadence(calm=2, start=2))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-3)
    pieces = 2 if "accumulate" in mode else 1
    numbers, arrays, events = [], [], []
    monitor._log = lambda name, line: arrays.append(line) if name == "layers" else None
    for step in range(1, STEPS + 1):
        latents, text = batch(slice(None))
        if step == BROKEN:
            latents[-1] = torch.nan
        parts = zip(latents[samples].chunk(pieces), text[samples].chunk(pieces), strict=True)
        total = torch.zeros(())
        with monitor.look():
            for part in parts:
                with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in mode):
                    loss = wrapped(*part).float().square().mean() / pieces
                loss.backward()
                total += loss.detach()
        report = monitor.step(total)
        numbers.append(report.numbers)
        events += [event.as_dict() for event in report.events]
        if step < BROKEN:
            optimizer.step()
        optimizer.zero_grad()
    return {"numbers": numbers, "arrays": arrays, "events": events}


def _monitored_on_rank(rank: int, mesh) -> dict[str, object]:
    def wrap(model: DiT) -> nn.Module:
        if mode == "ddp":
            return DistributedDataParallel(model)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    found = {}
    for mode in MODES:
        found[mode] = monitored(mode, slice(2 * rank, 2 * rank + 2), wrap)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_ranks_see_and_say_the_same(ranks, mode):
    first, second = (json.dumps(rank["monitored"][mode]) for rank in ranks)
    assert first == second
    alarms = [e for e in json.loads(first)["events"] if e["level"] == "alarm"]
    assert [(e["step"], e["verdict"]) for e in alarms][:1] == [(BROKEN, "non-finite")]


@pytest.fixture(scope="module")
def alone():
    """The same training in one process, which sees every sample."""
    return monitored("alone", slice(None), lambda model: model)


@pytest.mark.parametrize("mode", MODES)
def test_the_numbers_are_those_of_one_process(ranks, alone, mode):
    found = ranks[0]["monitored"][mode]
    loose = 3e-2 if "autocast" in mode else 1e-4
    for here, there in zip(found["numbers"][: BROKEN - 1], alone["numbers"], strict=False):
        assert set(here) == {"loss", "grad_norm", *FAMILIES}
        assert here == pytest.approx(there, rel=loose)
    assert all(math.isnan(value) for value in found["numbers"][BROKEN - 1].values())
    assert len(found["arrays"]) >= 4
    for here, there in zip(found["arrays"], alone["arrays"], strict=False):
        assert here["step"] == there["step"]
        if (
            "accumulate" not in mode and here["step"] < BROKEN
        ):  # else a look is at the first pass only
            assert here["tcs"] == pytest.approx(there["tcs"], rel=loose, abs=loose)


def test_arrays_are_averaged_over_the_ranks_that_measured_them(ranks):
    for rank in ranks:
        assert rank["arrays"]["layer"] == [0, 1, 2]
        assert rank["arrays"]["tcs"][:2] == [1.5, 2.0]  # of 1 and 2; of 2 alone
        assert rank["arrays"]["tcs"][2] is None
        assert math.isnan(rank["arrays"]["rho"][0])
        assert rank["arrays"]["mu_eff"] == [0.5, 0.5, 0.5]  # of the rank that has it
        assert "leakage" not in rank["arrays"]


def _arrays(rank: int) -> dict[str, list[float | None]]:
    own = {
        "layer": [0, 1, 2],
        "tcs": [1.0 + rank, None if rank == 0 else 2.0, None],
        "rho": [math.nan if rank else 1.0, 1.0, 1.0],
    }
    if rank:
        own["mu_eff"] = [0.5, 0.5, 0.5]
    fields = ("tcs", "rho", "mu_eff", "leakage")
    return arrays_over_ranks(own, fields, torch.device("cpu"))


def test_norms_of_shares_are_no_smaller_than_that_of_the_whole(ranks):
    """The same where the shares are alike, √2 times where they are orthogonal."""
    found = ranks[0]["shares"]
    assert found["reported"] == pytest.approx([1.0, 1.0], rel=1e-5)
    assert found["whole"] == pytest.approx([1.0, 0.5**0.5], rel=1e-5)


def _shares(rank: int) -> dict[str, list[float]]:
    """G_mean of a writer on two ranks, whose adjoints are alike, or at right angles."""
    y = torch.ones(1, 1, 1)
    alike, apart = torch.ones(1, 1, 1), torch.eye(2)[rank].reshape(1, 1, 2)
    own = [float(metrics.mean_gradient_norm(y, delta)) for delta in (alike, apart)]
    arrays = {"layer": [0, 1], "g_mean_attn": [*own]}
    reported = arrays_over_ranks(arrays, ["g_mean_attn"], torch.device("cpu"))["g_mean_attn"]
    gradients = [delta.reshape(-1, 1) @ y.reshape(1, 1) for delta in (alike, apart)]
    whole = [float(mean_over_ranks(gradient).norm()) for gradient in gradients]
    return {"reported": reported, "whole": whole}
