"""Kernels become machine code for Hopper, which needs no GPU: one that the interpreter runs may
still not compile. In a process of its own, for this one may be interpreting them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from mvsplit.kernels.fused import low_adamw, qk_norm_rope, split_adamw, unit_attention, zero_keys


def check(kernel, types, constants, warps=4, stages=3):
    names = kernel.arg_names
    kinds = {name: types.get(name, "i32") for name in names}
    kinds |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    pointers = [name for name, kind in kinds.items() if "*" in kind]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=values, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, len(compiled.asm["cubin"]))


half = {name: "*bf16" for name in ("p_out", "p_q", "p_k", "p_v", "p_w", "p_g")}
moments = {"p_first": "*fp32", "p_second": "*fp32", "p_low": "*i16"}
other = {"p_lse": "*fp32", "p_padding": "*fp32", "p_mask": "*u8", "scale": "fp32"}
numbers = ("decay", "rate", "correction", "beta1", "beta2", "rest1", "rest2", "eps")
types = half | moments | other | dict.fromkeys(numbers, "fp32")
types["p_new"] = "*fp32"
sizes = {"H": 8, "K": 128, "BLOCK_K": 128, "ROWS": 32, "LEAST": 1 / 64}
check(zero_keys.zero_keys_kernel, types, sizes)
check(zero_keys.lost_rows_kernel, types, sizes | {"KEYS": 32})
check(split_adamw.split_adamw_kernel, types, {"BLOCK": 2048}, 8)
codes = {"p_code": "*u8", "p_scale": "*fp32", "p_power": "*u8", "p_base": "*i16"}
blocks = {"BLOCK": 128, "ROWS": 16, "LARGEST": 480.0}
blocks |= {"LEAST": 2.0**-126, "SPOILT": 32767, "STEPS": 12, "STEP": 2 ** (1 / 12) - 1}
check(low_adamw.low_adamw_kernel, types | codes, blocks)
for mask in ("*u8", "constexpr"):
    for t in unit_attention.TILES.values():
        sizes = {"H": 8, "K": 128, "BLOCK_K": 128, "ROWS": t.rows, "KEYS": t.keys}
        sizes |= {"p_mask": None} if mask == "constexpr" else {}
        check(unit_attention.unit_attention_kernel, types, sizes, t.warps, t.stages)
types |= {"p_qkv": "*bf16"}
types |= dict.fromkeys(("p_cos", "p_sin", "p_r"), "*fp32") | {"eps": "fp32"}
tile = {"HEADS": 16, "HALF": 64, "BLOCK_T": 8, "BLOCK_H": 8, "BLOCK_HALF": 64}
check(qk_norm_rope.qk_norm_rope_in_place_kernel, types, tile)
"""


def test_kernels_of_the_step_compile() -> None:
    pytest.importorskip("triton.backends.nvidia")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    kernels = ("zero_keys", "lost_rows", "split_adamw", "low_adamw", "qk_norm_rope_in_place")
    kernels = (*kernels[:4], "unit_attention", kernels[4])
    assert tuple(sizes) == tuple(f"{name}_kernel" for name in kernels)
    assert all(int(size) > 1000 for size in sizes.values())
