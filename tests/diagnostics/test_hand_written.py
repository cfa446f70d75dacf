"""The finder on blocks as people write them, whose names no library gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvsplit.diagnostics import Monitor
from mvsplit.diagnostics.structure import TapNames, find_taps
from mvsplit.errors import UserError

WIDTH = 8


class Attention(nn.Module):
    """One head; the names of its four maps are given."""

    def __init__(self, names: str) -> None:
        super().__init__()
        self.names = names.split()
        for name in self.names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, writer = (getattr(self, name) for name in self.names)
        return writer(nn.functional.scaled_dot_product_attention(q(x), k(x), v(x)))


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Net(nn.Module):
    """`q k v o` at will, in an ordinary list."""

    def __init__(self, names: str = "q k v o", depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(Attention(names)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    "names",
    [
        "q k v o",
        "q k v proj",
        "Q K V O",
        "w_q w_k w_v w_o",
        "W_q W_k W_v fc",
        "q_lin k_lin v_lin out_lin",
        "queries keys values mix",
        "query_map key_map value_map back",
    ],
)
def test_names_of_ones_own_are_found(names: str) -> None:
    model = Net(names)
    q, k, _, writer = names.split()
    for tap, block in zip(find_taps(model), model.blocks, strict=True):
        assert tap.block is block
        assert tap.query.projection is getattr(block.attn, q)
        assert tap.key.projection is getattr(block.attn, k)
        assert [b.writer for b in tap.branches] == [getattr(block.attn, writer), block.mlp[2]]


def test_they_are_watched() -> None:
    torch.manual_seed(0)
    model = Net()
    monitor = Monitor(model)
    assert monitor.missing == ()
    loss = model(torch.randn(2, 5, WIDTH)).square().mean()
    loss.backward()
    norm = model.blocks[-1].attn.q.weight.grad.norm()
    assert monitor.step(loss).numbers["grad_query"] == pytest.approx(float(norm))


class Own(nn.Module):
    """The attention's maps are the block's own, beside those of its FFN."""

    def __init__(self, ffn: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        if ffn:
            self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)


def test_maps_of_the_block_itself_are_told_from_its_ffn() -> None:
    (tap,) = find_taps(nn.ModuleDict({"layers": nn.ModuleList([Own()])}))
    assert [b.writer for b in tap.branches] == [tap.block.proj, tap.block.down]
    (tap,) = find_taps(nn.ModuleDict({"layers": nn.ModuleList([Own(ffn=False)])}))
    assert [b.writer for b in tap.branches] == [tap.block.proj]


def own_block() -> Block:
    return Block(Attention("q k v o"))


def torch_block() -> Block:
    return Block(nn.MultiheadAttention(WIDTH, 2, batch_first=True))


def attributes(blocks: list[nn.Module]) -> nn.Module:
    net = nn.Module()
    net.embed = nn.Linear(3, WIDTH)
    net.first, net.second = blocks
    return net


@pytest.mark.parametrize("block", [own_block, torch_block])
@pytest.mark.parametrize(
    "around",
    [
        lambda blocks: nn.Sequential(*blocks),
        lambda blocks: nn.Sequential(nn.Linear(3, WIDTH), *blocks, nn.Linear(WIDTH, 2)),
        lambda blocks: nn.Sequential(nn.Linear(3, WIDTH), nn.Sequential(*blocks), nn.Identity()),
        lambda blocks: nn.ModuleDict(
            {"embed": nn.Linear(3, WIDTH), "a": blocks[0], "b": blocks[1]}
        ),
        attributes,
    ],
)
def test_blocks_are_found_in_any_container(block, around) -> None:
    blocks = [block(), block()]
    taps = find_taps(around(blocks))
    assert [tap.block for tap in taps] == blocks
    assert [tap.branches[1].writer for tap in taps] == [b.mlp[2] for b in blocks]


def test_one_block_between_other_modules_is_found_and_an_attention_is_no_block() -> None:
    block = own_block()
    (tap,) = find_taps(nn.Sequential(nn.Linear(3, WIDTH), block, nn.Linear(WIDTH, 2)))
    assert tap.block is block
    with pytest.raises(UserError, match="no transformer blocks were found in Sequential"):
        find_taps(nn.Sequential(nn.Linear(3, WIDTH), Attention("q k v o"), nn.Linear(WIDTH, 2)))


def test_what_a_library_names_is_found_as_before() -> None:
    """A text encoder with names of a library beside a trunk of one's own is all that is watched,
    and a second attention by hand is taken for no more than it was."""
    model = nn.Module()
    model.text = nn.ModuleList([Block(Attention("q_proj k_proj v_proj o_proj"))])
    model.trunk = Net()
    (tap,) = find_taps(model)
    assert tap.block is model.text[0]


@pytest.mark.parametrize("names", ["q k v", "a b c d", "q k q2 o"])
def test_what_is_no_attention_is_not_taken_for_one(names: str) -> None:
    attention = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names.split()})
    blocks = nn.ModuleList(nn.ModuleDict({"attn": attention}) for _ in range(2))
    model = nn.ModuleDict({"net": blocks})
    if names == "q k v":  # an attention, whose writer nobody knows
        assert [tap.branches for tap in find_taps(model)] == [(), ()]
        return
    maps = ", ".join(f"attn.{name}" for name in names.split())
    with pytest.raises(UserError) as caught:
        find_taps(model)
    assert f"lists that may be it: blocks='net' (2 × ModuleDict with {maps})" in str(caught.value)


def test_a_given_name_is_looked_for_at_any_level() -> None:
    model = Net("looks seeks says joins")
    names = TapNames(blocks="blocks", query="looks", key="attn.seeks", writer_attn="joins")
    for tap, block in zip(find_taps(model, names), model.blocks, strict=True):
        assert tap.query.projection is block.attn.looks
        assert tap.key.projection is block.attn.seeks
        assert tap.branches[0].writer is block.attn.joins
    outer = nn.ModuleDict({"net": model})
    assert [tap.block for tap in find_taps(outer, names)] == list(model.blocks)


def test_a_name_that_means_several_or_none_says_which_there_are() -> None:
    model = Net()
    for block in model.blocks:
        block.cross = Attention("q k v o")
    with pytest.raises(UserError, match=r"Block has 2 modules 'q': name one of attn\.q, cross\.q"):
        find_taps(model, TapNames(query="q"))
    listed = r"no module 'nothing'; choose one of: attn\.q, attn\.k, .*mlp\.0, mlp\.2"
    with pytest.raises(UserError, match=listed):
        find_taps(Net(), TapNames(query="nothing"))
