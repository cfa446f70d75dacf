"""The probe in steps of every kind: what it changes of them, and what it keeps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from mvsplit.diagnostics import metrics
from mvsplit.diagnostics.probe import CHEAP_FIELDS, FIELDS, LayerProbe, attention_matrix
from mvsplit.diagnostics.taps import LayerTap, taps_for_dit
from mvsplit.models import DiT
from tests.diagnostics.probes import (
    BATCH,
    DEPTH,
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


def test_the_step_is_the_same_bit_for_bit() -> None:
    watched, alone = dit(dtype=torch.float32), dit(dtype=torch.float32)
    step(alone)
    state = torch.get_rng_state()
    probed(watched, taps_for_dit(watched), per_segment=True)
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


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
    gc.collect()
    gc.freeze()  # what tests before this one left, and may lose at any time, is not counted
    try:
        with LayerProbe(taps_for_dit(model)) as probe:
            output = wrapped(latents, text, VALID)
            held = large_tensors()
            output.sum().backward()
        assert probe.arrays()["g_mean_attn"][0] is not None
        del output
        output = wrapped(latents, text, VALID)  # without the probe
        assert held == large_tensors()
        del output  # held until here, as the first one was
    finally:
        gc.unfreeze()


def test_hooks_are_gone_afterwards_also_after_an_error() -> None:
    model = dit()
    with pytest.raises(RuntimeError, match="boom"), LayerProbe(taps_for_dit(model)):
        raise RuntimeError("boom")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
