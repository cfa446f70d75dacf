"""docs/your-own-transformer.md: its block computes what the rules ask, and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mvsplit.kernels import Segments
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES
from mvsplit.residuals import RULES, RuleConfig, build_rule

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-transformer.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found: dict = {}
    torch.manual_seed(0)
    exec(example, found)
    return found


def test_the_example_gives_a_trunk_of_unit_rms(names):
    torch.testing.assert_close(names["y"].square().mean(-1), torch.ones(2, 20), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rule", [*sorted(RULES), RuleConfig(beta=0.2)])
def test_every_rule_starts_as_it_asks_and_learns(names, rule):
    torch.manual_seed(0)
    network, segments = names["Network"](32, 4, 2, rule), Segments((16, 4))
    block = network.blocks[0]
    zero, scale = block.join_ffn.zero_writers, block.join_ffn.weight_scale
    spread = (3 * block.down.in_features) ** -0.5
    assert block.down.weight.std().item() == pytest.approx(0 if zero else scale * spread, rel=0.05)
    assert block.up.weight.std().item() == pytest.approx(scale * (3 * 32) ** -0.5, rel=0.05)
    query, _, value = block.qkv.weight.chunk(3)
    assert (value.std() / query.std()).item() == pytest.approx(scale, rel=0.1)
    x, y = torch.randn(2, 8, 20, 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = (network(x, segments) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_what_it_says_of_the_starts_is_what_the_rules_say(names):
    def zeros(rule):
        return bool((names["Block"](32, 4, 2, rule).out.weight == 0).all())

    assert not zeros("mvsplit")
    assert zeros(RuleConfig(beta=0.5, alpha=0.5))
    assert zeros("mvsplit-attention-only")
    block = names["Block"](32, 4, 2, "mvsplit")
    asks = {n: names["Block"](32, 4, 2, n).join_ffn for n in RULES}
    assert {n for n, rule in asks.items() if rule.weight_scale != 1} == {"deepnorm"}
    assert {n for n, rule in asks.items() if not rule.normalised} == {"prenorm", "sandwich"}
    assert block.join_ffn.normalised


def test_padding_is_given_as_it_says(names):
    (words,) = re.findall(r"`(Segments\(\(16, 4\), valid=.*?\))`,", PAGE)
    segments = eval(words, {"Segments": Segments, "torch": torch})
    assert segments.mask.sum(1).tolist() == [20, 18]
    assert not names["network"](torch.randn(2, 20, 64), segments)[1, 18:].any()


def test_starts_by_name_are_those_of_the_bench():
    """Each row of the table gives the gains and the writers of the bench's entry of that name."""
    rows = re.findall(r"^\| ([^|]*?)(?: \(the default\))? \| `(RuleConfig\(.*?\))` \| (.*?) \|$",
                      PAGE, re.MULTILINE)  # fmt: skip
    entries = {entry.label: entry for entry in (*ENTRIES, *CANDIDATES)}
    depth = 400
    assert len(rows) == 9
    for label, code, writers in rows:
        entry = entries[label]
        asked = eval(code, {"RuleConfig": RuleConfig, "depth": depth})
        ours, theirs = (
            build_rule(rule, width=8, depth=depth, branch="ffn")
            for rule in (asked, entry.rule(depth))
        )
        assert type(ours) is type(theirs)
        gains = zip(ours.parameters(), theirs.parameters(), strict=True)
        for one, other in gains:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=0)
        zero = theirs.zero_writers and entry.writers == "rule"
        assert ("zeros" in writers) == zero
        assert ours.zero_writers == (zero or "though" in writers)
