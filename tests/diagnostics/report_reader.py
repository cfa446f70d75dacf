"""Reads a finished page back, in Python, as the page's script does."""

from __future__ import annotations

import json
import re
import zlib
from base64 import b64decode
from pathlib import Path

import numpy as np


def page_data(page: Path) -> dict:
    html = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


def unpack_array(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), dtype="<" + dtype)


def unpack_map(packed: dict) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and levels [L, N]."""
    steps = unpack_array(packed["steps"], "f8")
    differences = np.frombuffer(zlib.decompress(b64decode(packed["data"])), dtype=np.uint8)
    probes = np.cumsum(differences.reshape(len(steps), packed["layers"]), axis=0, dtype=np.uint8)
    return steps, probes.T


def values_of(levels: np.ndarray, scale: dict) -> np.ndarray:
    """The values that levels 0 … 253 stand for."""
    share = levels / 253
    if scale["log"]:
        return scale["low"] * (scale["high"] / scale["low"]) ** share
    return scale["low"] + share * (scale["high"] - scale["low"])


def half_a_level(values: np.ndarray, scale: dict) -> np.ndarray:
    """How far a value may lie from what its level stands for."""
    if scale["log"]:
        return values * ((scale["high"] / scale["low"]) ** (0.5 / 253) - 1) * 1.001
    return np.full_like(values, (scale["high"] - scale["low"]) / 253 / 2 * 1.001)
