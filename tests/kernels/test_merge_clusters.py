"""The merge in clusters (benchmarks/merge_clusters.py): how work is dealt, and what it takes. What
comes out is checked by benchmarks/merge_forms.py, on a Hopper GPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels.fused.merge_parts import merged

FOLDER = Path(__file__).parents[2] / "benchmarks"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def merge():
    sys.path.insert(0, str(FOLDER))
    try:
        import merge_clusters

        yield merge_clusters
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize(
    ("batch", "lengths", "clusters"),
    [(64, (256, 64), 15), (26, (256, 64), 15), (16, (64, 1024), 7), (1, (5, 0, 3), 2)],
)
def test_every_segment_of_every_sample_is_dealt_once_and_evenly(merge, batch, lengths, clusters):
    bounds = merge.shares(batch, lengths, clusters)
    load = [0] * clusters
    for length, ends in zip(lengths, bounds, strict=True):
        assert (ends[0], ends[-1], len(ends)) == (0, batch, clusters + 1)
        for c in range(clusters):
            assert ends[c] <= ends[c + 1]
            load[c] += length * (ends[c + 1] - ends[c])
    assert max(load) - min(load) <= max(lengths)


@pytest.mark.parametrize("name", ["FORWARD", "LONG_FORWARD", "BACKWARD", "LONG_BACKWARD"])
def test_a_cut_fits_into_a_block(merge, name):
    cut = getattr(merge, name)
    assert cut.shared <= 232_448
    assert 32 * cut.warps <= 1024
    assert cut.kept <= cut.slots
    assert cut.appliers % (merge.WIDTH // 256) == 0
    assert cut.f_slots or cut.appliers % cut.rows == 0
    text = merge.source(cut, torch.float16, 3, "int")
    assert "#define SEGMENTS 3\n" in text
    assert f"merge_{'backward' if cut.f_slots else 'forward'}(const u16" in text


def test_long_segments_have_more_blocks(merge):
    assert merge._cut(merge.FORWARD, merge.LONG_FORWARD, [256, 64]).cluster == 8
    assert merge._cut(merge.FORWARD, merge.LONG_FORWARD, [64, 1024]).cluster == 16


class _Hopper:
    """A tensor as far as `obstacle` looks."""

    is_cuda, device, dtype, shape = True, torch.device("cuda", 0), BF16, (3, 8, 1024)

    def __init__(self, step=1024, address=0):
        self._step, self._address = step, address

    def stride(self, axis):
        return (8 * self._step, self._step)[axis]

    def data_ptr(self):
        return self._address


@pytest.fixture
def hopper(merge, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(merge, "_missing", lambda _: None)


def test_what_is_taken_and_what_is_not(merge, hopper):
    x = torch.empty(3, 8, 1024, dtype=BF16)
    whole, bare = merged(x, 2, True, True), merged(x, 2, True, False)
    assert merge.obstacle(_Hopper(), _Hopper(), whole) is None
    assert "norm" in merge.obstacle(_Hopper(), _Hopper(), bare)
    assert "norm" in merge.obstacle(_Hopper(), None, whole)
    assert "16 bytes" in merge.obstacle(_Hopper(), _Hopper(1028), whole)
    assert "16 bytes" in merge.obstacle(_Hopper(), _Hopper(address=8), whole)
    narrow = _Hopper()
    narrow.shape = (3, 8, 768)
    assert "D = 1024" in merge.obstacle(narrow, _Hopper(), whole)
    assert "Hopper" in merge.obstacle(x, x, whole)
