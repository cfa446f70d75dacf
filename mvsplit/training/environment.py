"""What a run ran on: versions, device, revision of the code."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mvsplit
from mvsplit.training.distributed import world

_CPUINFO = Path("/proc/cpuinfo")  # of Linux


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, the device and the revision, as JSON can hold them."""
    packages = ("mvsplit", "torch", "numpy", "safetensors", "triton")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "cuda": torch.version.cuda,
        "device": str(device),
        "device_name": (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        ),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": world(),
        "revision": git_revision(),
    }


def cpu_threads_in(path: Path) -> int | None:
    """The threads in the environment.json at `path`; None where there is none, or none of a CPU,
    whose kernels alone take sums in an order that depends on them, or the file is damaged: it is
    written anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return None
    on_cpu = isinstance(found, dict) and found.get("device") == "cpu"
    return found.get("threads") if on_cpu else None


def processor() -> str:
    """The CPU and the instructions that PyTorch's kernels use on it. Which they are decides in what
    order sums are taken, and so the last digits of every one."""
    found: dict[str, str] = {}
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    kind = [f"{n} {found[n]}" for n in ("cpu family", "model", "stepping") if n in found]
    return ", ".join([name, *kind, torch.backends.cpu.get_cpu_capability()])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of this package's source, "+changes" if it is modified; None outside of git.

    An installed copy that merely lies inside some other repository has no revision.
    """
    source = Path(mvsplit.__file__).parent
    if _git(source, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    changed = _git(source, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{_git(source, 'rev-parse', 'HEAD')}{'+changes' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
