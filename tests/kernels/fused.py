"""How the fused ops are compared: same inputs, the fp64 reference, every output and gradient."""

import torch

from mvsplit.kernels import forced_backend


def draw(*shape, seed, dtype=torch.float32):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(dtype)


def run(op, inputs, upstream, device, dtype=None):
    """Outputs of `op` on copies of `inputs`, then the gradients of all inputs that float."""
    leaves = [t.to(device, dtype).requires_grad_() for t in inputs]
    outputs = op(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [g.to(device, o.dtype) for g, o in zip(upstream, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return [t.detach().cpu().double() for t in (*outputs, *grads) if t is not None]


def worst_error(op, inputs, upstream, device):
    """The largest ‖fused − truth‖/max(‖truth‖, 1) over outputs and gradients, for values of order
    one; a gradient that is exactly zero counts absolutely, and NaN is infinitely wrong."""
    with forced_backend("reference"):
        truth = run(op, inputs, upstream, "cpu", torch.float64)
    with forced_backend("triton"):
        values = run(op, inputs, upstream, device)
    assert len(values) == len(truth)
    errors = [(v - t).norm() / t.norm().clamp(min=1) for v, t in zip(values, truth, strict=True)]
    return max(float(e.nan_to_num(nan=float("inf"))) for e in errors)


def tolerance(dtype):
    """Rounding: the output once, its gradients twice (from the saved, rounded output)."""
    return {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
