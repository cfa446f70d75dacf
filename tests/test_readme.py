"""What the README shows runs, and what it names exists."""

import re
from pathlib import Path

import torch

from mvsplit.cli import COMMANDS
from mvsplit.presets import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_computes_the_rule():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    names = {}
    torch.manual_seed(0)
    exec(example, names)
    x, f, h = names["x"], names["f"], names["h"]
    z = torch.cat(
        [part(h, f, s) for part, s in ((merged, slice(0, 16)), (merged, slice(16, 17)))], 1
    )
    expected = z / z.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(x, expected)


def merged(x, f, tokens):
    """Eq. 7 at β = 1/√400, α = 0."""
    return x[:, tokens] + 0.05 * (f[:, tokens] - f[:, tokens].mean(1, keepdim=True))


def test_every_file_it_links_to_exists():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_and_preset_it_shows_exists():
    shown = re.findall(r"^mvsplit (\w+) ?(\S*)", README, re.MULTILINE)
    assert shown
    for command, argument in shown:
        assert command in COMMANDS
        if command == "train" and not argument.startswith("-"):
            assert argument in PRESETS
