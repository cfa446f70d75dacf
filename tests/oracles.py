"""Slow, obvious fp64 versions of what the package computes, written without its code."""

import torch
from torch import Tensor


def averaging_matrix(lengths: tuple[int, ...], valid: tuple[int, ...] | None = None) -> Tensor:
    """J_seg = blkdiag(J_1, …, J_S) of one sample (paper Eq. 45), zero on padding. [T, T]."""
    blocks = []
    for s, length in enumerate(lengths):
        real = length if valid is None else valid[s]
        block = torch.zeros(length, length, dtype=torch.float64)
        block[:real, :real] = 1 / max(real, 1)
        blocks.append(block)
    return torch.block_diag(*blocks)


def real_tokens(lengths: tuple[int, ...], valid: tuple[int, ...] | None = None) -> Tensor:
    """Ones on the real tokens of one sample. [T, 1]."""
    valid = lengths if valid is None else valid
    runs = [
        torch.cat((torch.ones(n), torch.zeros(length - n)))
        for length, n in zip(lengths, valid, strict=True)
    ]
    return torch.cat(runs).double().unsqueeze(-1)


def normalise(z: Tensor, eps: float) -> Tensor:
    """RMSNorm as written: Z / sqrt(mean(Z²) + ε)."""
    return z / (z.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def split_merge(x, f, beta, alpha, leak, lengths, valid=None, eps=1e-5, norm=True) -> Tensor:
    """Z = X + β⊙PF + α⊙JF − λ⊙JX with explicit matrices, sample by sample, then RMSNorm.

    `valid` is a list with one tuple of counts for each sample. Padding must be finite.
    """
    samples = []
    for b in range(x.shape[0]):
        counts = None if valid is None else valid[b]
        real = real_tokens(lengths, counts)
        j = averaging_matrix(lengths, counts)
        p = torch.diag(real[:, 0]) - j
        z = real * x[b] + beta * (p @ f[b]) + alpha * (j @ f[b]) - leak * (j @ x[b])
        samples.append(normalise(z, eps) if norm else z)
    return torch.stack(samples)


def complex_rotation(x: Tensor, angles: Tensor) -> Tensor:
    """(x₁ + i·x₂)·e^{−iθ} on the halves of the last axis. [..., K] with angles [..., K/2]."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(-1j * angles)
    return torch.cat((turned.real, turned.imag), dim=-1)
