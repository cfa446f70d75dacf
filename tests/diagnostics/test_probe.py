"""The probe against the metrics of tensors that an independent set of hooks kept whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function

from mvsplit.diagnostics import metrics
from mvsplit.diagnostics.probe import CHEAP_FIELDS, FIELDS, LayerProbe, attention_matrix
from mvsplit.diagnostics.taps import BranchTap, LayerTap, ParameterRows, taps_for_dit
from mvsplit.errors import UserError
from mvsplit.kernels import Segments, qk_norm_rope
from mvsplit.kernels.attention import attend
from mvsplit.models import DiT
from mvsplit.models.rope import rope_tables
from tests.diagnostics.probes import (
    SIDE,
    TEXT,
    VALID,
    assert_close,
    dit,
    first_two,
    inputs,
    probed,
    segments_of,
    step,
)


@dataclass
class Kept:
    """What went through one block, whole."""

    x_in: Tensor
    x_out: Tensor
    x_ffn: Tensor
    attention_in: Tensor
    y: dict[str, Tensor] = field(default_factory=dict)
    u: dict[str, Tensor] = field(default_factory=dict)
    delta: dict[str, Tensor] = field(default_factory=dict)


def keep_everything(model: DiT, valid: Tensor | None) -> list[Kept]:
    """One step of a copy of the model with a hook that keeps the input and output of each part."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def remember(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen[module] = (args[0], output)

    handles = [m.register_forward_hook(remember) for b in model.blocks for m in b.modules()]
    step(model, valid)
    for handle in handles:
        handle.remove()
    return [_kept(block, seen) for block in model.blocks]


def _kept(block: nn.Module, seen: dict[nn.Module, tuple[Tensor, Tensor]]) -> Kept:
    kept = Kept(*seen[block], seen[block.ffn][0], seen[block.attention][0])
    for name, writer in (("attn", block.attention.proj), ("ffn", block.ffn.w2)):
        kept.y[name], kept.u[name] = seen[writer]
        kept.delta[name] = kept.u[name].grad
    return kept


def expected_fields(model: DiT, kept: Kept, layer: int, segments: Segments) -> dict[str, float]:
    """Each field from whole tensors, averaged over the samples by a plain mean."""
    block = model.blocks[layer]
    found = {
        "tcs": metrics.token_cosine_similarity(kept.x_out, segments).mean(),
        "rho": metrics.mean_ratio(kept.x_out, segments).mean(),
    }
    for name, trunk in (("attn", kept.x_in), ("ffn", kept.x_ffn)):
        y, u, delta = kept.y[name], kept.u[name], kept.delta[name]
        law = metrics.alignment(y[:2], delta[:2], first_two(segments))
        found |= {
            f"tr_ratio_{name}": metrics.trunk_ratio(u, trunk, segments).mean(),
            f"var_gain_{name}": metrics.variance_gain(u, trunk, segments).mean(),
            f"g_mean_{name}": metrics.mean_gradient_norm(y, delta, segments),
            f"g_ctr_{name}": metrics.centered_gradient_norm(y, delta, segments),
            f"amplification_{name}": law.amplification.mean(),
            f"envelope_{name}": law.envelope.mean(),
        }
    a = explicit_attention(model, block, kept.attention_in, segments)
    few, x = first_two(segments), kept.x_in[:2]
    found |= {
        "mu_eff": metrics.mu_eff(a, few).mean(),
        "row_div": metrics.row_divergence(a, few).mean(),
        "retention": metrics.retention(a, x, few).mean(),
        "leakage": metrics.leakage(a, x, few).mean(),
        "grad_writer_attn": block.attention.proj.weight.grad.norm(),
        "grad_writer_ffn": block.ffn.w2.weight.grad.norm(),
        "grad_query": block.attention.qkv.weight.grad[:16].norm(),  # 4 heads × 4
        "grad_key": block.attention.qkv.weight.grad[16:24].norm(),  # 2 heads × 4
    }
    return {name: value.item() for name, value in found.items()}


def explicit_attention(model: DiT, block: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    tables = rope_tables(SIDE, SIDE, TEXT, 4, model.config.rope_theta, x.device)
    q, k, _ = qk_norm_rope(block.attention.qkv(x[:2]), *tables, 4, 2, model.config.qk_eps)
    logits = q @ torch.stack((k[:, 0], k[:, 0], k[:, 1], k[:, 1]), dim=1).mT / 2
    if segments.mask is not None:
        logits = logits.masked_fill(~segments.mask[:2, None, None, :], -torch.inf)
    return logits.softmax(-1).detach()


def attend_as_on_a_gpu(*tensors: Any, **options: Any) -> Tensor:
    """Those who listen are shown a call of `attend`, and none of PyTorch's attention."""
    return handle_torch_function(attend, tensors[:1], *tensors, **options)


@pytest.mark.parametrize("on_a_gpu", [False, True])
@pytest.mark.parametrize("valid", [None, VALID], ids=["no padding", "padding"])
def test_every_field_is_the_metric_of_the_tensors_that_ran(
    valid: Tensor | None, on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dit()
    kept = keep_everything(model, valid)
    segments = segments_of(valid)
    expected = [expected_fields(model, k, n, segments) for n, k in enumerate(kept)]
    model.zero_grad()
    if on_a_gpu:
        monkeypatch.setattr("mvsplit.models.block.attend", attend_as_on_a_gpu)
    with LayerProbe(taps_for_dit(model)) as probe:
        step(model, valid)
    arrays = probe.arrays()
    assert set(arrays) == {"layer", *FIELDS}
    columns = {name: [layer[name] for layer in expected] for name in FIELDS}
    assert_close(arrays, {"layer": [0, 1, 2], **columns})


def test_fields_of_each_segment() -> None:
    model = dit()
    kept = keep_everything(model, VALID)
    arrays = probed(model, taps_for_dit(model), fields=["tcs", "g_mean_ffn"], per_segment=True)
    segments = segments_of(VALID)
    for layer, k in enumerate(kept):
        tcs = metrics.token_cosine_similarity(k.x_out, segments, "segment")
        g_mean = metrics.mean_gradient_norm(k.y["ffn"], k.delta["ffn"], segments, "segment")
        assert arrays["tcs_segment_0"][layer] == pytest.approx(tcs[:, 0].mean().item())
        # Samples 1 and 2 have fewer than two text tokens, and so no pair to compare.
        assert arrays["tcs_segment_1"][layer] == pytest.approx(tcs[[0, 3], 1].mean().item())
        for s in range(2):
            assert arrays[f"g_mean_ffn_segment_{s}"][layer] == pytest.approx(g_mean[s].item())
    assert set(arrays) == {
        "layer",
        *(f"{name}{end}" for name in ("tcs", "g_mean_ffn") for end in ("", *SEGMENT_ENDS)),
    }


SEGMENT_ENDS = ("_segment_0", "_segment_1")


def test_cheap_fields_agree_with_all_fields() -> None:
    model = dit()
    taps = taps_for_dit(model)
    everything = probed(model, taps)
    cheap = probed(model, taps, fields=CHEAP_FIELDS)
    assert_close(cheap, {name: everything[name] for name in ("layer", *CHEAP_FIELDS)})


def test_a_normalised_entry_hides_the_trunk_from_the_ffn() -> None:
    model = dit("prenorm")
    arrays = probed(model, taps_for_dit(model))
    assert set(FIELDS) - set(arrays) == {"tr_ratio_ffn", "var_gain_ffn"}


class Mixer(nn.Module):
    """A block of a stranger's model: keyword arguments, a tuple as output, tokens flattened in the
    FFN, no attention, no segments."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, *, hidden: Tensor) -> tuple[Tensor, None]:
        inner = self.up(hidden).relu().flatten(0, 1)
        return hidden + self.down(inner).view_as(hidden), None


def test_a_model_that_is_no_dit_and_has_no_attention() -> None:
    torch.manual_seed(2)
    block = Mixer().double()
    branch = BranchTap(name="ffn", writer=block.down, trunk_at=block)
    tap = LayerTap(layer=7, block=block, branches=(branch,))
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    with LayerProbe([tap]) as probe:
        out = block(hidden=x)[0]
        out.retain_grad()
        out.pow(3).sum().backward()
    y = block.up(x).relu().detach()
    u = (out - x).detach()
    expected = {
        "layer": 7,
        "tcs": metrics.token_cosine_similarity(out).mean(),
        "rho": metrics.mean_ratio(out).mean(),
        "tr_ratio_ffn": metrics.trunk_ratio(u, x).mean(),
        "var_gain_ffn": metrics.variance_gain(u, x).mean(),
        "g_mean_ffn": metrics.mean_gradient_norm(y, out.grad),
        "g_ctr_ffn": metrics.centered_gradient_norm(y, out.grad),
        "amplification_ffn": metrics.alignment(y[:2], out.grad[:2]).amplification.mean(),
        "envelope_ffn": metrics.alignment(y[:2], out.grad[:2]).envelope.mean(),
        "grad_writer_ffn": block.down.weight.grad.norm(),
    }
    assert_close(
        probe.arrays(), {name: [torch.as_tensor(v).item()] for name, v in expected.items()}
    )


class KeywordAttention(nn.Module):
    """Attention called by keyword, before it a cross-attention that is none of the trunk's."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
        context = functional.scaled_dot_product_attention(heads, heads[:, :, :2], heads[:, :, :2])
        out = functional.scaled_dot_product_attention(query=heads, key=heads, value=context)
        return x + out.transpose(1, 2).flatten(-2)


def test_self_attention_is_told_from_cross_attention() -> None:
    block = KeywordAttention()
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    tap = LayerTap(layer=0, block=block, branches=())
    with LayerProbe([tap], fields=["mu_eff"]) as probe:
        block(x)
    heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
    a = (heads @ heads.mT / 3**0.5).softmax(-1)
    assert probe.arrays()["mu_eff"] == pytest.approx([metrics.mu_eff(a).mean().item()])


def test_a_layer_that_lacks_a_field_says_none() -> None:
    model = dit()
    first, *others = taps_for_dit(model)
    bare = LayerTap(layer=first.layer, block=first.block, branches=())
    arrays = probed(model, [bare, *others])
    assert [value is None for value in arrays["g_mean_attn"]] == [True, False, False]
    assert None not in arrays["tcs"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.7},
        {"attn_mask": torch.randn(6, 6, generator=torch.Generator().manual_seed(4)).double()},
        {"enable_gqa": True},
    ],
    ids=["default", "scale", "causal", "boolean mask", "additive mask", "gqa"],
)
def test_attention_matrix_is_the_one_inside_pytorch(options: dict[str, Any]) -> None:
    if isinstance(mask := options.get("attn_mask"), Tensor) and mask.dtype == torch.bool:
        options = {"attn_mask": mask | torch.eye(6, dtype=torch.bool)}  # no query without a key
    heads = 2 if "enable_gqa" in options else 4
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(5, 4, 6, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(5, heads, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = functional.scaled_dot_product_attention(q, k, v, **options)[:3]
    matrix = attention_matrix(q, k, v, **options, samples=3)
    torch.testing.assert_close(matrix @ v[:3].repeat_interleave(4 // heads, dim=1), expected)


def test_misuse_is_explained() -> None:
    model = dit()
    taps = taps_for_dit(model)
    with pytest.raises(UserError, match="'g_means_attn' is unknown; did you mean g_mean_attn"):
        LayerProbe(taps, fields=["g_means_attn"])
    with pytest.raises(UserError, match="samples=0"):
        LayerProbe(taps, samples=0)
    with LayerProbe(taps) as probe:
        pass
    with pytest.raises(UserError, match="saw no layer run"):
        probe.arrays()
    with LayerProbe(taps) as probe:
        model(*inputs())
    with pytest.raises(UserError, match="saw no backward pass"):
        probe.arrays()


def test_forward_fields_need_no_backward_pass() -> None:
    model = dit()
    with LayerProbe(taps_for_dit(model), fields=["tcs", "mu_eff"]) as probe, torch.no_grad():
        model(*inputs())
    assert set(probe.arrays()) == {"layer", "tcs", "mu_eff"}


def test_parameter_rows_without_bounds_are_the_whole_gradient() -> None:
    linear = nn.Linear(2, 3)
    assert ParameterRows(projection=linear).gradient() is None
    linear.weight.sum().backward()
    assert torch.equal(ParameterRows(projection=linear).gradient().local, torch.ones(3, 2))


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_passes_after_those_that_a_probe_looks_at_are_unwatched() -> None:
    """What the first pass showed stays, later passes meet no hook; gradients come at the end."""
    model = dit()
    taps = taps_for_dit(model)
    once = LayerProbe(taps)
    with once.passes():
        step(model)
    hooks = hooks_on(model)
    step(model)
    once.read_gradients()
    with LayerProbe(taps) as alone:
        step(model)
    ours, theirs = once.arrays(), alone.arrays()
    assert hooks == 0
    for name, values in theirs.items():
        factor = 2 / 3 if name.startswith("grad_") else 1  # gradients of two steps, then of three
        wanted = [v for v in ours[name] if v is not None]
        assert wanted == pytest.approx([factor * v for v in values if v is not None], rel=1e-5)


def test_a_pass_that_fails_leaves_no_hook_and_nothing_to_mistake() -> None:
    model = dit()
    probe = LayerProbe(taps_for_dit(model))

    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    model.blocks[1].register_forward_pre_hook(fails)
    before = hooks_on(model)
    with pytest.raises(ZeroDivisionError), probe.passes():
        model(*inputs())
    assert (hooks_on(model), probe._layer, probe._trunks) == (before, None, {})


def test_what_a_graph_repeats_counts_instead_of_what_was_seen() -> None:
    model = dit()
    taps = taps_for_dit(model)
    with LayerProbe(taps, fields=CHEAP_FIELDS) as first:
        step(model)
    names, values = first.seen()
    wanted = {
        name: [value if name == "layer" or value is None else value + 1 for value in row]
        for name, row in first.arrays().items()
    }
    for probe in (first, LayerProbe(taps, fields=CHEAP_FIELDS)):
        probe.recall(names, values + 1)
        assert_close(probe.arrays(), wanted)


def test_probes_of_other_layers_or_writers_have_other_keys() -> None:
    model = dit()
    taps = taps_for_dit(model)
    assert LayerProbe(taps).key == LayerProbe(taps_for_dit(model)).key
    others = (
        LayerProbe(taps[:1]),
        LayerProbe(taps[1:]),
        LayerProbe(taps, fields=CHEAP_FIELDS),
        LayerProbe(taps, samples=1),
        LayerProbe(taps, per_segment=True),
        LayerProbe(taps_for_dit(dit())),
    )
    assert len({LayerProbe(taps).key, *(probe.key for probe in others)}) == 7
