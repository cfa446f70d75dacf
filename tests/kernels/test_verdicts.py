"""What serves in a block is found out at once, before its activations are there."""

import json

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels import Segments
from mvsplit.kernels.block_parts import BlockSettings, BlockWeights
from mvsplit.kernels.fused import verdicts
from mvsplit.kernels.hopper import block_product_choice, child, unit_heads_choice
from mvsplit.kernels.hopper.block_product import DOWN, HEADS, UP


def block(tokens=64, masked=True, heads=2, samples=2):
    x = torch.zeros(samples, tokens, 256, dtype=torch.bfloat16)
    weights = BlockWeights(*(x.new_zeros(s) for s in ((768, 256), (256, 256), (512, 256))), None)
    weights = weights._replace(w2=x.new_zeros(256, 256))
    counts = torch.tensor([16, 3]) if masked else None
    segments = Segments.image_and_text(tokens - 16, 16, counts)
    table = torch.zeros(tokens, 64)
    return x, weights, BlockSettings(table, table, segments, heads, 1e-6, (1e-6, 1e-6))


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What other processes were asked at once; a GPU that is none."""
    found, capturing = [], [False]
    monkeypatch.setenv("MVSPLIT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(block_product_choice, "SIZES", ((100, 128),))

    def tell(tasks, patience):
        found.append([json.loads(task)[1:] for _, task in tasks])
        return [(f"slower, {task[1]}", True) for task in found[-1]]

    def forget():
        for module in (block_product_choice, unit_heads_choice):
            monkeypatch.setattr(module, "_verdicts", {})
        monkeypatch.setattr(verdicts, "_asked", set())

    monkeypatch.setattr(child, "verdicts", tell)
    forget()
    return found, capturing, forget


PRODUCTS = [[which, "bfloat16", 256, n, 128, False] for which, n in ((UP, 256), (HEADS, 768))]
W2 = [DOWN, "bfloat16", 256, 256, 128, False]


def test_all_are_asked_at_once_and_once_on_a_machine(asked):
    found, capturing, forget = asked
    for captures in (True, False, False):
        capturing[0] = captures
        verdicts.prepare(*block(), learns=True)
    heads = [[64, True, True, False], [64, False, True, True]]
    assert found == [[*PRODUCTS, W2, *heads]]
    forget()  # another process
    verdicts.prepare(*block(), learns=True)
    assert len(found) == 1
    x, weights, _ = block()
    assert block_product_choice.serving(UP, x.flatten(0, 1), weights.w13) == "slower, bfloat16"
    kind = unit_heads_choice.Class(64, True, True)
    assert "slower" in unit_heads_choice.obstacle(kind, x.device).reason


def test_only_what_can_serve_is_asked_about(asked):
    found, _, forget = asked

    def of(learns=True, **which):
        forget()
        questions = verdicts.questions(*block(**which), learns=learns)
        return [json.loads(q.task)[1:] for q in questions]

    assert of(learns=False) == [*PRODUCTS, [64, True, True, False]]
    assert of(masked=False)[3:] == [[64, False, True, False], [64, False, True, True]]
    assert of(heads=4) == [PRODUCTS[0], W2]  # heads of another width
    assert of(tokens=80) == [*PRODUCTS, W2]  # no whole tiles of attention
    assert of(tokens=32) == [[32, True, True, False], [32, False, True, True]]  # few rows
    assert found == []
