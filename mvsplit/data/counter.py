"""Random numbers that are a function of (key, counter) alone: no generator, no state, no order.

Number 10⁹ costs as much as number 0, and a batch holds the same numbers however it is cut. Integer
arithmetic only, so the numbers are the same on every machine and with every version of numpy.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, the Weyl step of SplitMix64


def stream_key(*parts: int | str) -> int:
    """A 64-bit key for the stream named by `parts`, e.g. ("order", seed, epoch)."""
    name = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def random_bits(key: int, counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 random bits for each counter: entry `counter` of the SplitMix64 sequence from `key`.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    z = np.uint64(key) + (counters + np.uint64(1)) * _GOLDEN  # wraps modulo 2⁶⁴, as it should
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(key: int, counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each counter, with 53 random bits."""
    return (random_bits(key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
