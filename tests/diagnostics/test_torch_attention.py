"""Models built of PyTorch's own attention, in both of its layouts, and blocks that lack parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvsplit.diagnostics import Monitor
from mvsplit.diagnostics.probe import CHEAP_FIELDS, LayerProbe
from mvsplit.diagnostics.structure import TapNames, find_taps
from mvsplit.diagnostics.taps import gradient_norms
from mvsplit.errors import UserError

BATCH, TOKENS, WIDTH = 3, 5, 8


def encoder(batch_first: bool, ffn: int = 12) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, ffn, dropout=0.0, batch_first=batch_first, norm_first=True
    )
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()


def laid_out(x: Tensor, batch_first: bool) -> Tensor:
    """[B, T, D] as the model wants it."""
    return x if batch_first else x.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_it_reads_is_what_the_hands_find(batch_first: bool) -> None:
    model = encoder(batch_first)
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64)
    block = model.layers[-1]
    seen: dict[str, Tensor] = {}
    block.register_forward_hook(lambda m, a, out: seen.__setitem__("trunk", out.detach()))
    block.linear2.register_forward_hook(lambda m, a, out: seen.__setitem__("y", a[0].detach()))
    block.linear2.register_full_backward_hook(lambda m, i, o: seen.__setitem__("delta", o[0]))
    taps = find_taps(model)
    with LayerProbe(taps, fields=CHEAP_FIELDS) as probe:
        model(laid_out(x, batch_first)).pow(3).mean().backward()
    found = {name: column[-1] for name, column in probe.arrays().items()}
    trunk, y, delta = (laid_out(seen[n], batch_first) for n in ("trunk", "y", "delta"))
    unit = trunk / trunk.norm(dim=-1, keepdim=True)
    cosines = unit @ unit.mT - torch.eye(TOKENS)
    assert found["tcs"] == pytest.approx(float(cosines.sum() / BATCH / TOKENS / (TOKENS - 1)))
    mean = sum(TOKENS * torch.outer(d.mean(0), h.mean(0)) for d, h in zip(delta, y, strict=True))
    assert found["g_mean_ffn"] == pytest.approx(float(mean.norm()))
    rest = delta.flatten(0, 1).mT @ y.flatten(0, 1) - mean
    assert found["g_ctr_ffn"] == pytest.approx(float(rest.norm()))
    assert "g_mean_attn" not in found
    norms, packed = gradient_norms(taps), block.self_attn.in_proj_weight.grad
    assert norms["grad_query"] == pytest.approx(float(packed[:WIDTH].norm()))
    assert norms["grad_key"] == pytest.approx(float(packed[WIDTH : 2 * WIDTH].norm()))
    out = block.self_attn.out_proj.weight.grad
    assert norms["grad_writer_attn"] == pytest.approx(float(out.norm()))
    assert norms["grad_writer_ffn"] == pytest.approx(float(block.linear2.weight.grad.norm()))


def test_queries_and_keys_of_other_widths() -> None:
    block = nn.Module()
    block.attention = nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=6, batch_first=True)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    (tap,) = find_taps(model)
    x, context = torch.randn(2, 4, WIDTH), torch.randn(2, 3, 6)
    block.attention(x, context, context)[0].sum().backward()
    assert tap.query is not None
    assert tap.key is not None
    for rows, weight in (
        (tap.query, block.attention.q_proj_weight),
        (tap.key, block.attention.k_proj_weight),
    ):
        gradient = rows.gradient()
        assert gradient is not None
        assert torch.equal(gradient.local, weight.grad)


def test_the_layout_can_be_said() -> None:
    """A model that hands [T, B, D] to its attention and keeps its trunk as [B, T, D]."""
    taps = find_taps(encoder(False), TapNames(blocks="layers", batch_first=True))
    assert all(tap.batch_first for tap in taps)


def test_an_ffn_narrower_than_the_trunk_has_its_writer() -> None:
    model = encoder(True, ffn=4)
    writers = {b.name: b.writer for b in find_taps(model)[1].branches}
    assert writers["ffn"] is model.layers[1].linear2


class Mixer(nn.Module):
    """Blocks without attention, the last of which drops tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)) for _ in range(2)
        )
        self.layers.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), Halve()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2]


def test_without_attention_it_measures_what_there_is_and_names_what_there_is_not() -> None:
    model = Mixer()
    monitor = Monitor(model, names=TapNames(blocks="layers"))
    assert [words.split(":")[0] for words in monitor.missing] == [
        "no queries and keys",
        "no attention writer",
    ]
    with LayerProbe(monitor.taps, fields=CHEAP_FIELDS) as probe:
        loss = model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean()
        loss.backward()
    report = monitor.step(loss)
    assert set(report.numbers) == {"loss", "grad_norm"}  # the deepest block has no writer
    found = probe.arrays()
    assert None not in (found["tcs"][0], found["g_mean_ffn"][0], found["g_ctr_ffn"][1])
    assert found["tcs"][2] is None


def test_a_block_that_is_given_no_tensor_is_named_as_the_mistake() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    taps = find_taps(model, TapNames(blocks="layers"))
    with pytest.raises(UserError, match="without a tensor"), LayerProbe(taps):
        block(None)
    assert not block._forward_pre_hooks
    assert not block[1]._forward_hooks
