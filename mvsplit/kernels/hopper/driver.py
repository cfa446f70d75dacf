"""Compiles CUDA C++ at run time and launches it: NVRTC and the driver, called through ctypes.

Triton 3.6 has neither clusters that share loads nor tiles of 288 rows on Hopper; NVRTC comes with
every CUDA build of torch, a compiler on the user's machine is not needed. Binaries are kept on
disk, by the hash of what they were made of.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128, _PROMOTE_256 = 3, 3
_CLUSTER, _SERIALIZATION = 4, 6  # CUlaunchAttributeID
_REGISTERS, _MAX_SHARED, _NON_PORTABLE = 4, 8, 14  # CUfunction_attribute
# CUresult of what a kernel did before, which whoever calls next is told: an illegal address, a
# launch that lasted too long, an assertion, and the hardware's exceptions, traps among them.
_FAULTS = (700, 702, 710, *range(714, 720))
# How those begin who may be told in our place.
_OTHERS = ("CUDA error", "CUDA driver error", "cuDNN", "Triton Error [CUDA]")
VAIN_WAIT = (
    "a kernel's wait for other blocks or for a copy did not end within seconds, as may be where "
    "another process draws on the same GPU"
)


class DriverError(RuntimeError):
    """The driver or NVRTC refused, or a kernel failed. The command line says it in one line."""


class FaultError(DriverError):
    """A kernel did what the GPU forbids, or trapped: its process has no use of the GPU any more."""


@cache
def _driver() -> ctypes.CDLL:
    torch.cuda.init()
    return ctypes.CDLL("libcuda.so.1")


_faults: list[Tensor] = []  # one word of the host, once there are kernels


def _fault() -> Tensor:
    """Where kernels of all devices write that a wait did not end."""
    if not _faults:
        _faults.append(torch.zeros(1, dtype=torch.int32).pin_memory())
    return _faults[0]


_found = 0


def vain_waits() -> int:
    """How often it was found, so far, that a wait in a kernel had not ended. Looks, without waiting
    for any device. Whoever shares a process with others compares with an earlier count: one that
    looks must not take the news from another."""
    global _found
    if waits_in_vain():
        _faults[0].zero_()
        _found += 1
    return _found


def check_waits(known: int | None = None) -> None:
    """Looks whether a wait in a kernel has not ended.

    Args:
        known: an earlier `vain_waits()`; None: what was found before now is known.

    Raises:
        DriverError: what the kernels wrote since then is wrong.
    """
    known = _found if known is None else known
    if vain_waits() > known:
        raise DriverError(f"{VAIN_WAIT}; its outputs are wrong")


def ended_by_a_wait(error: BaseException) -> str | None:
    """What to say where a kernel that traps ended the program, for a wait in it did not end; None
    where that is not certain. Whoever calls the GPU next is told of a trap, mostly torch; the
    kernel's own word, which it writes before, tells it from any other fault. Kernels that have no
    such word (the merge's in training) are not told apart."""
    told = isinstance(error, FaultError) or str(error).startswith(_OTHERS)
    return f"{VAIN_WAIT}, and ended the program" if told and waits_in_vain() else None


def waits_in_vain() -> bool:
    """Whether a kernel has written so, and nobody has looked yet (`vain_waits`)."""
    return bool(_faults) and bool(_faults[0].item())


@cache
def _nvrtc() -> ctypes.CDLL:
    name = f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}"
    beside = Path(torch.__file__).parents[1] / "nvidia"  # where pip puts the packages of CUDA
    for path in (name, *map(str, sorted(beside.glob(f"*/lib/{name}")))):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise DriverError(f"{name} is not there (the package nvidia-cuda-nvrtc, or a CUDA toolkit)")


def require_compiler() -> None:
    """Raises DriverError where NVRTC is missing."""
    _nvrtc()


def driver_version() -> int:
    """Of CUDA, that the driver offers: 13000 for 13.0; 0 where there is no device."""
    if not torch.cuda.is_available():
        return 0
    number = ctypes.c_int()
    _check(_driver().cuDriverGetVersion(ctypes.byref(number)), "the driver's version")
    return number.value


def _check(code: int, what: str) -> None:
    if code:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(message))
        text = (message.value or b"unknown error").decode()
        raise (FaultError if code in _FAULTS else DriverError)(f"{what}: {text} ({code})")


@cache
def _primary_context(device: int) -> ctypes.c_void_p:
    """The context of a device that torch uses, too."""
    handle, context, driver = ctypes.c_int(), ctypes.c_void_p(), _driver()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), f"device {device}")
    code = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
    _check(code, f"context of device {device}")
    return context


@contextmanager
def _context(device: int) -> Iterator[None]:
    """The calling thread has a context: that of a device, until the end, where it had none. To a
    thread of autograd torch gives one with the first call of the runtime, and the driver's may come
    before."""
    context, driver = ctypes.c_void_p(), _driver()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "current context")
    if context:
        yield
        return
    _check(driver.cuCtxSetCurrent(_primary_context(device)), f"context of device {device}")
    try:
        yield
    finally:
        _check(driver.cuCtxSetCurrent(None), "no context")


@contextmanager
def _current(device: int) -> Iterator[None]:
    """The device is the current one, of torch and of the driver."""
    with torch.cuda.device(device), _context(device):
        yield


def compiled(source: str, folder: Path | None) -> bytes:
    """The binary of a CUDA C++ source for sm_90a, from `folder` if it was compiled before.

    Raises:
        DriverError: it does not compile; with the compiler's words.
    """
    name = hashlib.sha256(f"{torch.version.cuda}\n{source}".encode()).hexdigest()[:32]
    path = None if folder is None else folder / f"{name}.cubin"
    if path is not None and path.is_file():
        return path.read_bytes()
    binary = _compile(source)
    if path is not None:
        with suppress(OSError):  # a cache that cannot be written costs the next start a second
            _keep(path, binary)
    return binary


def _keep(path: Path, binary: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(binary)
    os.replace(file.name, path)


def _compile(source: str) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"mvsplit.cu", 0, None, None)
    options = (ctypes.c_char_p * 2)(b"--gpu-architecture=sm_90a", b"--std=c++17")
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            log = _text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            raise DriverError(f"NVRTC: {log.decode(errors='replace')[:2000]}")
        return _text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, size: str, get: str) -> bytes:
    length = ctypes.c_size_t()
    getattr(_nvrtc(), size)(program, ctypes.byref(length))
    buffer = ctypes.create_string_buffer(length.value)
    getattr(_nvrtc(), get)(program, buffer)
    return buffer.raw


class TensorMap:
    """What the bulk copy engine knows of a tensor: its shape, and the box of one copy.

    Args:
        tensor: of bf16 or fp16, on CUDA; the map holds its address, not the tensor.
        sizes: of the axes, the fastest first.
        strides: in elements, of all axes but the fastest.
        box: of one copy, along the same axes; the fastest is 64 elements, swizzled by 128 bytes.
    """

    def __init__(
        self, tensor: Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> None:
        rank = len(sizes)
        self._memory = ctypes.create_string_buffer(128 + 64)
        self.address = (ctypes.addressof(self._memory) + 63) // 64 * 64
        bytes_ = [s * tensor.element_size() for s in strides]
        with _context(tensor.device.index or 0):
            code = _driver().cuTensorMapEncodeTiled(
                ctypes.c_void_p(self.address), _DATA_TYPES[tensor.dtype], rank,
                ctypes.c_void_p(tensor.data_ptr()), (ctypes.c_uint64 * rank)(*sizes),
                (ctypes.c_uint64 * max(1, rank - 1))(*bytes_), (ctypes.c_uint32 * rank)(*box),
                (ctypes.c_uint32 * rank)(*[1] * rank), 0, _SWIZZLE_128, _PROMOTE_256, 0,
            )  # fmt: skip
        _check(code, f"tensor map of {tuple(sizes)}, strides {tuple(strides)}, box {tuple(box)}")


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class Kernel:
    """A compiled kernel of one name, loaded on a device, which need not be the current one.

    Args:
        binary: of `compiled`.
        name: of the function.
        threads, shared, cluster: of a block: threads, bytes of shared memory; blocks of a cluster.
        device: its index.
    """

    def __init__(
        self, binary: bytes, name: str, *, threads: int, shared: int, cluster: int, device: int
    ) -> None:
        self.threads, self.shared, self.cluster, self.device = threads, shared, cluster, device
        self.module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        driver = _driver()
        with _current(device):
            self._load(driver, binary, name)

    def _load(self, driver: ctypes.CDLL, binary: bytes, name: str) -> None:
        _check(driver.cuModuleLoadData(ctypes.byref(self.module), binary), "load")
        name_ = name.encode()
        found = driver.cuModuleGetFunction(ctypes.byref(self._function), self.module, name_)
        _check(found, name)
        found = driver.cuFuncSetAttribute(self._function, _MAX_SHARED, self.shared)
        _check(found, f"{self.shared} bytes")
        if self.cluster > 8:
            _check(driver.cuFuncSetAttribute(self._function, _NON_PORTABLE, 1), "cluster")

    def _config(self, grid: int, pdl: bool) -> _Config:
        attributes = [_Attribute(_CLUSTER, 0, (ctypes.c_uint * 16)(self.cluster, 1, 1))]
        if pdl:
            attributes.append(_Attribute(_SERIALIZATION, 0, (ctypes.c_uint * 16)(1)))
        array = (_Attribute * len(attributes))(*attributes)
        config = _Config(
            grid, 1, 1, self.threads, 1, 1, self.shared,
            torch.cuda.current_stream(self.device).cuda_stream, ctypes.addressof(array), len(array),
        )  # fmt: skip
        config.keep = array
        return config

    @cached_property
    def registers(self) -> int:
        """Of a thread, as a block begins."""
        count = ctypes.c_int()
        with _current(self.device):
            code = _driver().cuFuncGetAttribute(ctypes.byref(count), _REGISTERS, self._function)
        _check(code, "registers")
        return count.value

    @cached_property
    def most_clusters(self) -> int:
        """Clusters that this device holds at once."""
        count = ctypes.c_int()
        config = self._config(self.cluster, False)
        with _current(self.device):
            code = _driver().cuOccupancyMaxActiveClusters(
                ctypes.byref(count), self._function, ctypes.byref(config)
            )
        _check(code, "occupancy")
        return count.value

    def launch(self, clusters: int, arguments: Sequence[Any], *, pdl: bool) -> None:
        """On its device's current stream. Arguments are TensorMaps, tensors or None (pointers), and
        ctypes numbers; where to tell of a fault comes after them."""
        values = [_value(argument) for argument in (*arguments, _fault())]
        pointers = (ctypes.c_void_p * len(values))(*map(_place, values))
        config = self._config(clusters * self.cluster, pdl)
        with _current(self.device):
            code = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        _check(code, "launch")


def to_fetch(weights: Tensor | None) -> tuple[Tensor | None, ctypes.c_uint64]:
    """The arguments of a kernel that asks the L2 cache for dense weights."""
    return weights, ctypes.c_uint64(0 if weights is None else weights.nbytes // 16 * 16)


def _place(value: Any) -> int:
    """Where an argument lies: a map is its own memory."""
    return value.address if isinstance(value, TensorMap) else ctypes.addressof(value)


def _value(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return argument
