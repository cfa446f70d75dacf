"""Every source of chance in training.

Noise and times of step n are functions of (seed, n) alone and are drawn for the whole batch, so
they do not depend on how the batch is cut. The global generators are seeded too, and saved, for
whatever else draws from them. What is left to chance on a GPU is the order of sums in the backward
of attention (`fix_orders`).
"""

from __future__ import annotations

import hashlib
import os
import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream that `names` describe; streams are independent."""
    text = "/".join(str(part) for part in (seed, *names))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator_for(
    seed: int, *names: str | int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator at the start of the stream that `names` describe."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *names))


def seed_globals(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and PyTorch (all devices)."""
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    torch.manual_seed(derive_seed(seed, "torch"))


def fix_orders() -> None:
    """Has PyTorch make every sum in a fixed order, in this process from now on; an operation that
    cannot says so. New tensors are not filled for it, for nobody reads them before they are
    written."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the size that Hopper has anyway
    torch.use_deterministic_algorithms(True)
    cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False


def global_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the global generators: tensors, and values that JSON can hold."""
    states = {"torch": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        states[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    numpy_state = [name, np.asarray(keys).tolist(), position, has_gauss, cached]
    return states, {"python": [version, list(words), gauss], "numpy": numpy_state}


def restore_globals(states: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Sets the global generators to what `global_states` returned.

    The state of a GPU that this machine does not have is not needed here and is left out.
    """
    torch.set_rng_state(states["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
