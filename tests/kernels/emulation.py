"""The kernels in CUDA C++ on a CPU: their sources are translated to C++, whose threads are fibers.

What is found so: wrong indices, layouts and addresses, values that are never written, waits that
never end, waits for copies and for wgmma that are missing. What is not: waits of threads for each
other that are missing, and what a device refuses.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from mvsplit.kernels.hopper import attention, block_product, product, unit_heads

HEADER = Path(__file__).with_name("emulation.h")
COMPILER = shutil.which("g++")
COMMAND = [COMPILER, "-O1", "-U_FORTIFY_SOURCE", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-w"]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")

MODULES = (product, attention, unit_heads, block_product)
NOTHING = ("setmaxnreg", "griddepcontrol", "wgmma.fence", "fence.", "prefetch", "cvt.f32.f16")
NOTHING += ("cluster.arrive",)  # its wait does it
# What PTX contains → C++ of its operands, by number
CALLS = {
    "mbarrier.init": "barrier_begin({0}, {1})",
    "expect_tx": "barrier_expects({0}, {1})",
    "try_wait": "{0} = barrier_tries({1}, {2})",
    "mbarrier.arrive.shared::cta": "barrier_arrives({0})",
    "mapa.shared::cluster": "barrier_arrives_in({0}, {1})",
    "barrier.cluster.wait": "meet_cluster()",
    "bulk.commit_group": "copies_out_commit()",
    "bulk.wait_group.read": "copies_out_wait({0})",
    "cvt.rn.": "{0} = rounded({2}) | rounded({1}) << 16",
    "globaltimer": "{0} = clock_ticks += 1000000000",
    "ex2.": "{0} = exp2f({1})",
    "lg2.": "{0} = log2f({1})",
    "trap": 'fail("a wait without end")',
    "rcp.": "{0} = 1.f / ({1})",
    "stmatrix.sync.aligned.m8n8.x2.trans": "store_matrices(2, true, {0}, {{{1}, {2}}})",
    "stmatrix.sync.aligned.m8n8.x4.shared": "store_matrices(4, false, {0}, {{{1}, {2}, {3}, {4}}})",
    "ldmatrix.sync.aligned.m8n8.x2.trans": (
        "Word *m = load_matrices(2, true, {2}); {0} = m[0], {1} = m[1]"
    ),
    "ldmatrix.sync.aligned.m8n8.x4.shared": (
        "Word *m = load_matrices(4, false, {4}); {0} = m[0], {1} = m[1], {2} = m[2], {3} = m[3]"
    ),
    "st.relaxed": "*{0} = {1}; ++progress",
    "ld.relaxed": "yield(); {0} = *{1}",
}


def closing(text, start):
    """Behind the parenthesis that closes the one before `start`."""
    depth, quoted = 1, False
    while depth:
        quoted ^= text[start] == '"'
        depth += 0 if quoted else {"(": 1, ")": -1}.get(text[start], 0)
        start += 1
    return start


def operands(text):
    """The expressions of an asm statement, in the order of their numbers."""
    found = []
    for each in re.finditer(r'"[=+]?[rlfhn]"\s*\(', text):
        found.append(f"({text[each.end() : closing(text, each.end()) - 1]})")
    return found


def emulated(statement):
    """C++ for the inside of an asm statement."""
    template = re.match(r'\s*(?:"[^"]*"|TYPE|\s)+', statement).group()
    given = operands(statement[len(template) :])
    if template.strip() == '""' or any(name in template for name in NOTHING):
        return ""
    if "wgmma.commit_group" in template:
        return "products_commit()"
    if "wgmma.wait_group" in template:
        (number,) = given or re.findall(r"aligned (\d);", template)
        return f"products_wait({number})"
    if "cp.async.bulk.tensor" in template:
        places = re.search(r"\{(%\d(?:, %\d)+)\}", template).group(1)
        coordinates = ", ".join(given[int(n)] for n in re.findall(r"%(\d)", places))
        if "global.shared" in template:
            return f"copy_out({given[0]}, {given[1]}, {{{coordinates}}})"
        if "multicast" in template:
            return f"copy({given[0]}, {given[1]}, {given[2]}, {{{coordinates}}}, {given[5]})"
        return f"copy({given[0]}, {given[1]}, {given[2]}, {{{coordinates}}})"
    if "bar.sync" in template:
        numbers = re.search(r"bar\.sync (\S+), (\S+);", template).groups()
        barrier, count = (given[int(n[1:])] if n[0] == "%" else n for n in numbers)
        return f"meet({barrier}, {count})"
    (call,) = [call for name, call in CALLS.items() if name in template]
    return call.format(*given)


def translated(source):
    out, at = [], 0
    around = r"__device__ __forceinline__ void (\w+)\((float \(&d\).*?)\) \{\n.*?\n\}"

    def multiplied(match):
        name, parameters = match.groups()
        size, transposed = re.search(r"m64n(\d+)k16.*, (\d); }", match.group()).groups()
        left = "0, a" if "*a" in parameters else "a, nullptr"
        call = f"multiply_together({size}, {transposed}, d, {left}, b, add)"
        return f"static void {name}({parameters}) {{ {call}; }}"

    source = re.sub(around, multiplied, source, flags=re.S)
    for each in re.finditer(r"\basm(?: volatile)?\(", source):
        end = closing(source, each.end())
        out += [source[at : each.start()], f"{{ {emulated(source[each.end() : end - 1])}; }}"]
        at = source.index(";", end) + 1
    text = "".join([*out, source[at:]])
    memory = "char *memory = memory_of_block();"
    return re.sub(r"extern __shared__ .*? char memory\[\];", memory, text)


def built(text, suffix, folder, *options):
    """What the compiler makes of it, once for all tests and processes that share `folder`."""
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            source, out = Path(own, "source.cpp"), Path(own, "out")
            source.write_text(text)
            subprocess.run([*COMMAND, source, *options, "-o", out], check=True)
            out.replace(path)
    return path


def library(source, name, folder):
    """The emulated kernel `name`, built in `folder`: a file, whose `run` launches it."""
    text = translated(source)
    signature = re.search(rf"\b{name}\((.*?)\) \{{", text, re.S).group(1)
    types = [re.sub(r"\w+$", "", p.replace("__grid_constant__", "")) for p in signature.split(",")]
    given = ", ".join(f"*({kind.strip()} *)given[{i}]" for i, kind in enumerate(types))
    text = f"""#include "{HEADER}"
{text}
#ifndef CLUSTER
#define CLUSTER 1
#endif
static void **given;
static void call() {{ {name}({given}); }}
extern "C" __attribute__((visibility("default")))
int run(int grid, int threads, int shared, void **arguments) {{
  given = arguments;
  return run_all(grid, threads, shared, CLUSTER, call);
}}
"""
    behind = built(f'#include "{HEADER.with_suffix(".cpp")}"\n', ".o", folder, "-c")
    return built(text, ".so", folder, behind, "-shared")


class EmulatedTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("rank", ctypes.c_int), ("sizes", ctypes.c_long * 5),
        ("strides", ctypes.c_long * 5), ("box", ctypes.c_int * 5),
    )  # fmt: skip


class EmulatedMap:
    """Stands for a TensorMap: 128 bytes, of which the first are the address of a tensor."""

    def __init__(self, tensor, sizes, strides, box):
        rank, bytes_ = len(sizes), [2, *(2 * s for s in strides)]
        axes = ctypes.c_long * 5
        self.tensor = EmulatedTensor(
            tensor.data_ptr(), rank, axes(*sizes), axes(*bytes_), (ctypes.c_int * 5)(*box)
        )
        self.memory = ctypes.create_string_buffer(192)
        self.address = (ctypes.addressof(self.memory) + 63) // 64 * 64
        ctypes.c_void_p.from_address(self.address).value = ctypes.addressof(self.tensor)


@pytest.fixture
def emulation(monkeypatch, shared_folder):
    """Kernels of `MODULES` are emulated; returns the class of their launcher, whose `most_clusters`
    is how many blocks the device holds; `missing` of a launch never begin."""

    class Kernel:
        most_clusters, registers, missing = 132, 255, 0

        def __init__(self, source, name, *, threads, shared, cluster, device):
            self.run = ctypes.CDLL(str(library(source, name, shared_folder))).run
            self.threads, self.shared, self.cluster = threads, shared, cluster

        def launch(self, grid, arguments, *, pdl):
            fault = torch.zeros(1, dtype=torch.int32)
            values = []
            for a in (*arguments, fault):
                tensor = a.data_ptr() if isinstance(a, torch.Tensor) else 0
                plain = a is None or isinstance(a, torch.Tensor)
                values.append(ctypes.c_void_p(tensor) if plain else a)
            maps = [v.address if isinstance(v, EmulatedMap) else None for v in values]
            places = [m or ctypes.addressof(v) for m, v in zip(maps, values, strict=True)]
            pointers = (ctypes.c_void_p * len(places))(*places)
            begun = grid * self.cluster - self.missing
            assert self.run(begun, self.threads, self.shared, pointers) == 0, "waits never end"
            assert fault.item() == (self.missing > 0)

    for module in MODULES:
        monkeypatch.setattr(module, "compiled", lambda source, folder: source)
        monkeypatch.setattr(module, "Kernel", Kernel)
        monkeypatch.setattr(module, "TensorMap", EmulatedMap, raising=module is not unit_heads)
        module._kernel.cache_clear()
    yield Kernel
    for module in MODULES:
        module._kernel.cache_clear()
