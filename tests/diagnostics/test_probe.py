"""The probe against the metrics of tensors that an independent set of hooks kept whole."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from mvsplit.diagnostics import metrics
from mvsplit.diagnostics.probe import CHEAP_FIELDS, FIELDS, LayerProbe, attention_matrix
from mvsplit.diagnostics.taps import BranchTap, LayerTap, ParameterRows, taps_for_dit
from mvsplit.errors import UserError
from mvsplit.kernels import Segments, qk_norm_rope
from mvsplit.models import DiT, DiTConfig
from mvsplit.models.rope import rope_tables
from mvsplit.residuals import RuleConfig

DEPTH, BATCH, SIDE, TEXT = 3, 4, 3, 5
VALID = torch.tensor([5, 1, 0, 3])


def dit(rule: str = "mvsplit", dtype: torch.dtype = torch.float64) -> DiT:
    config = DiTConfig(
        depth=DEPTH,
        width=16,
        heads=4,
        kv_heads=2,
        ffn_width=24,
        channels=3,
        text_width=6,
        rule=RuleConfig(name=rule),
        writers="standard",
    )
    return DiT(config, torch.Generator().manual_seed(0)).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    return latents.to(dtype), torch.randn(BATCH, TEXT, 6, generator=generator).to(dtype)


def step(model: nn.Module, valid: Tensor | None = VALID) -> None:
    latents, text = inputs(next(model.parameters()).dtype)
    model(latents, text, valid).square().mean().backward()


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


def first_two(segments: Segments) -> Segments:
    return Segments(segments.lengths, None if segments.valid is None else segments.valid[:2])


def explicit_attention(model: DiT, block: nn.Module, x: Tensor, segments: Segments) -> Tensor:
    tables = rope_tables(SIDE, SIDE, TEXT, 4, model.config.rope_theta, x.device)
    q, k, _ = qk_norm_rope(block.attention.qkv(x[:2]), *tables, 4, 2, model.config.qk_eps)
    logits = q @ torch.stack((k[:, 0], k[:, 0], k[:, 1], k[:, 1]), dim=1).mT / 2
    if segments.mask is not None:
        logits = logits.masked_fill(~segments.mask[:2, None, None, :], -torch.inf)
    return logits.softmax(-1).detach()


def segments_of(valid: Tensor | None) -> Segments:
    lengths = (SIDE * SIDE, TEXT)
    if valid is None:
        return Segments(lengths)
    return Segments(lengths, torch.stack((torch.full_like(valid, lengths[0]), valid), dim=1))


def assert_close(arrays: dict[str, list], other: dict[str, list], rtol: float = 1e-9) -> None:
    assert arrays.keys() == other.keys()
    for name, values in arrays.items():
        assert values == pytest.approx(other[name], rel=rtol, abs=1e-15, nan_ok=True), name


def probed(model: nn.Module, taps: list[LayerTap], **options: Any) -> dict[str, list]:
    model.zero_grad()
    with LayerProbe(taps, **options) as probe:
        step(model)
    return probe.arrays()


@pytest.mark.parametrize("valid", [None, VALID], ids=["no padding", "padding"])
def test_every_field_is_the_metric_of_the_tensors_that_ran(valid: Tensor | None) -> None:
    model = dit()
    kept = keep_everything(model, valid)
    segments = segments_of(valid)
    expected = [expected_fields(model, k, n, segments) for n, k in enumerate(kept)]
    model.zero_grad()
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


def test_the_step_is_the_same_bit_for_bit() -> None:
    watched, alone = dit(dtype=torch.float32), dit(dtype=torch.float32)
    step(alone)
    state = torch.get_rng_state()
    probed(watched, taps_for_dit(watched), per_segment=True)
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_normalised_entry_hides_the_trunk_from_the_ffn() -> None:
    model = dit("prenorm")
    arrays = probed(model, taps_for_dit(model))
    assert set(FIELDS) - set(arrays) == {"tr_ratio_ffn", "var_gain_ffn"}


class Checkpointed(nn.Module):
    """Recomputes its block in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Tensor:
        return checkpoint(self.block, *args, use_reentrant=False)


def checkpointed(model: DiT) -> DiT:
    wrapped = dit(dtype=next(model.parameters()).dtype)
    wrapped.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    return wrapped


def test_activation_checkpointing_changes_no_number() -> None:
    model = dit()
    taps = taps_for_dit(model)
    expected = probed(model, taps)
    assert_close(probed(checkpointed(model), taps), expected)


def compile_outside(model: DiT) -> None:
    for layer, block in enumerate(model.blocks):
        model.blocks[layer] = torch.compile(block, backend="aot_eager")


def compile_in_place(model: DiT) -> None:
    for block in model.blocks:
        block.compile(backend="aot_eager")


@pytest.mark.parametrize("compile_blocks", [compile_outside, compile_in_place])
def test_compiled_blocks_are_seen(compile_blocks: Callable[[DiT], None]) -> None:
    model = dit(dtype=torch.float32)
    taps = taps_for_dit(model)
    expected = probed(model, taps)
    compile_blocks(model)
    step(model)  # compiled before the probe comes, as in a run
    assert_close(probed(model, taps), expected, rtol=1e-3)


def test_the_first_of_several_micro_batches_is_watched() -> None:
    model = dit()
    taps = taps_for_dit(model)
    activations = [name for name in FIELDS if not name.startswith("grad_")]
    expected = probed(model, taps, fields=activations)
    latents, text = inputs()
    with LayerProbe(taps, fields=activations) as probe:
        step(model)
        model(2 * latents, -text, VALID).sum().backward()
    assert_close(probe.arrays(), expected)


class KeepAttention(TorchFunctionMode):
    """Keeps queries, keys and the mask of each call of PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            self.calls.append((args[0].detach(), args[1].detach(), kwargs["attn_mask"]))
        return func(*args, **(kwargs or {}))


def test_autocast_does_not_reach_the_metrics() -> None:
    """What the step computed in bf16 is measured with the error of fp32, forward and backward."""
    model = dit("plain", torch.float32)
    seen: list[tuple[Tensor, Tensor]] = []

    def remember(_: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0].detach(), output))

    handle = model.blocks[-1].ffn.w2.register_forward_hook(remember)
    with (
        KeepAttention() as attention,
        LayerProbe(taps_for_dit(model)) as probe,
        torch.autocast("cpu", torch.bfloat16),
    ):
        step(model)
    handle.remove()
    q, k, mask = attention.calls[-1]
    a = attention_matrix(q.double(), k.double(), None, mask, enable_gqa=True, samples=2)
    segments, (y, update) = segments_of(VALID), seen[0]
    y, delta = y.double(), update.grad.double()
    last = {name: values[-1] for name, values in probe.arrays().items()}
    expected = {
        "mu_eff": metrics.mu_eff(a, first_two(segments)).mean(),
        "g_mean_ffn": metrics.mean_gradient_norm(y, delta, segments),
        "g_ctr_ffn": metrics.centered_gradient_norm(y, delta, segments),
    }
    for name, value in expected.items():
        assert last[name] == pytest.approx(value.item(), rel=2e-5), name


def kept_for_backward(model: DiT, taps: list[LayerTap]) -> tuple[int, int]:
    """How many pieces of memory autograd keeps after the forward pass, and their bytes."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # kept, so that no address is used twice
        return t

    latents, text = inputs(torch.float32)
    with (
        LayerProbe(taps, fields=CHEAP_FIELDS),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        model(latents, text)
    return len(kept), sum(t.untyped_storage().nbytes() for t in kept.values())


def test_nothing_is_kept_for_backward_that_was_not_kept_before() -> None:
    model = dit(dtype=torch.float32)
    expected = kept_for_backward(model, [])
    assert expected[0] > 10 * DEPTH
    assert kept_for_backward(model, taps_for_dit(model)) == expected


def test_no_activation_is_held_under_checkpointing() -> None:
    def large_tensors() -> int:
        gc.collect()
        smallest = BATCH * (SIDE * SIDE + TEXT) * 16
        # type(o), as isinstance asks some objects for their class and wakes deprecation warnings
        return sum(issubclass(type(o), Tensor) and o.numel() >= smallest for o in gc.get_objects())

    model = dit()
    wrapped, (latents, text) = checkpointed(model), inputs()
    before = large_tensors()
    with LayerProbe(taps_for_dit(model)) as probe:
        output = wrapped(latents, text, VALID)
        held = large_tensors() - before
        output.sum().backward()
    assert probe.arrays()["g_mean_attn"][0] is not None
    without = wrapped(latents, text, VALID)
    assert held == large_tensors() - before
    del without


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = dit()
    with pytest.raises(RuntimeError, match="boom"), LayerProbe(taps_for_dit(model)):
        raise RuntimeError("boom")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


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
