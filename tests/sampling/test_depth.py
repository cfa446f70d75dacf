"""Leaving out blocks: what must not change does not, and idle blocks are found."""

from __future__ import annotations

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import SamplingConfig, generate
from mvsplit.sampling.depth import least, mean_changes, skip_effects, skip_least, without_blocks

IDLE = (2, 3, 6)


def network(rule: str, idle=IDLE, **gains) -> DiT:
    """Eight blocks, those of `idle` with zero writers."""
    config = DiTConfig(
        depth=8, width=32, heads=2, ffn_width=40, channels=1, text_width=24, patch=2,
        rule=RuleConfig(name=rule, **gains), writers="standard",
    )  # fmt: skip
    model = DiT(config, torch.Generator().manual_seed(5)).eval().requires_grad_(False)
    for index in idle:
        model.blocks[index].attention.proj.weight.zero_()
        model.blocks[index].ffn.w2.weight.zero_()
    return model


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(3, 1, 4, 6, generator=generator)
    return latents, torch.randn(3, 2, 24, generator=generator), torch.tensor([2, 1, 2])


@pytest.mark.parametrize("rule", ["prenorm", "mvsplit"])
def test_skipping_nothing_is_the_network_to_the_bit(rule):
    model = network(rule)
    assert torch.equal(without_blocks(model, ())(*inputs()), model(*inputs()))


def test_a_pre_norm_block_that_writes_nothing_can_go_to_the_bit():
    model = network("prenorm")
    assert torch.equal(without_blocks(model, IDLE)(*inputs()), model(*inputs()))
    busy = without_blocks(model, (0,))(*inputs())
    assert (busy - model(*inputs())).abs().max() > 1e-3


def test_an_mvsplit_block_that_writes_nothing_can_go_but_for_its_norm():
    """RMSNorm of what has unit RMS multiplies by 1 − ε/2; ε is 1e-5, in two merges a block."""
    model = network("mvsplit", alpha=0.0).double()
    latents, text, valid = inputs()
    full = model(latents.double(), text.double(), valid)
    less = without_blocks(model, IDLE)(latents.double(), text.double(), valid)
    torch.testing.assert_close(less, full, rtol=0, atol=1e-4 * full.abs().max().item())
    assert not torch.equal(less, full)


def test_it_is_the_blocks_that_are_left_one_after_the_other():
    model = network("mvsplit", alpha=0.3)
    other = DiT(without_blocks(model, (1, 4, 5)).config).eval().requires_grad_(False)
    assert other.config.depth == 5
    other.load_state_dict(without_blocks(model, (1, 4, 5)).state_dict())
    kept = [model.blocks[i] for i in (0, 2, 3, 6, 7)]
    for mine, theirs in zip(kept, other.blocks, strict=True):
        assert torch.equal(mine.ffn.w13.weight, theirs.ffn.w13.weight)
    assert torch.equal(other(*inputs()), without_blocks(model, (1, 4, 5))(*inputs()))
    assert len(model.blocks) == 8
    assert model.config.depth == 8


def changes_of(model, embedder):
    config = SamplingConfig(steps=3, guidance=1.0)
    return mean_changes(
        model, lambda network: list(generate(network, embedder, ["one", "red"], (1, 4, 6), config))
    )


@pytest.mark.parametrize("rule", ["prenorm", "mvsplit"])
def test_both_rankings_find_the_planted_idle_blocks(embedder, rule):
    model = network(rule, alpha=0.0)
    assert least(changes_of(model, embedder), 3) == list(IDLE)
    assert least(skip_effects(model, *inputs()), 3) == list(IDLE)


def test_skip_least_measures_and_skips(embedder):
    model = network("prenorm")
    config = SamplingConfig(steps=1, guidance=1.0)

    def draw(network):
        return list(generate(network, embedder, ["one"], (1, 4, 6), config))

    shallow, skipped = skip_least(model, 3, draw)
    assert skipped == list(IDLE)
    assert torch.equal(shallow(*inputs()), model(*inputs()))
    assert skip_least(model, 0, lambda network: pytest.fail("nothing to measure")) == (model, [])


@pytest.mark.parametrize("rule", ["prenorm", "mvsplit"])
def test_effects_are_those_of_networks_without_one_block(rule):
    model = network(rule, idle=())
    whole = model(*inputs())
    expected = [
        ((without_blocks(model, (i,))(*inputs()) - whole).norm() / whole.norm()).item()
        for i in range(8)
    ]
    assert skip_effects(model, *inputs()).tolist() == pytest.approx(expected, rel=1e-4)


def test_changes_are_those_of_the_trunk(embedder):
    """Every block's input and output, evaluation by evaluation."""
    model = network("prenorm", idle=())
    seen = {}
    handles = [
        block.register_forward_hook(lambda b, x, y, i=i: seen.setdefault(i, []).append((x[0], y)))
        for i, block in enumerate(model.blocks)
    ]
    changes = changes_of(model, embedder)
    for handle in handles:
        handle.remove()
    for i, pairs in seen.items():
        assert len(pairs) == 3
        mean = sum((y - x).norm() / x.norm() for x, y in pairs) / 3
        assert changes[i].item() == pytest.approx(mean.item(), rel=1e-5)
    assert not any(block._forward_hooks for block in model.blocks)


def test_what_cannot_be_skipped_is_refused():
    model = network("mvsplit")
    with pytest.raises(UserError, match="skipped block 8: the network has the blocks 0 … 7"):
        without_blocks(model, (8,))
    with pytest.raises(UserError, match="skipping all 8 blocks leaves no network"):
        without_blocks(model, range(8))
    for count in (-1, 8):
        with pytest.raises(UserError, match=f"skip_blocks={count}: must be at least 0 and less"):
            least(torch.zeros(8), count)
    with pytest.raises(UserError, match="was not evaluated"):
        mean_changes(model, lambda network: None)
