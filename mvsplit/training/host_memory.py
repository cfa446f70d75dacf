"""Whether a training on a CPU can fit into the memory of the machine, before any of it is taken.

A GPU that is full raises an error; a machine that is full has the kernel kill the process without a
word. So what surely cannot fit is refused first. Both figures lean to the side of letting a run
begin: the need is a lower bound, and swap counts as memory.

Units: bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mvsplit.errors import UserError
from mvsplit.models import DiTConfig
from mvsplit.training.config import TrainConfig
from mvsplit.training.memory_plan import kept_bytes
from mvsplit.training.step_memory import state_parts

GIB = 2**30
# In units of what a block keeps that runs as one (`kept_bytes`): what autograd saves of its parts,
# which run one by one on a CPU, and what backward holds of the block that it is in. Measured were
# 1.39 to 1.71 and 2.4 to 7, in networks of 4 to 32 layers, 16 to 128 wide.
_SAVED, _WORKING = 1.35, 2.0
_MEMINFO = Path("/proc/meminfo")
_ZFS = Path("/proc/spl/kstat/zfs/arcstats")
_CGROUPS = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Need:
    """The least that a training takes.

    Attributes:
        state: weights by name, and what learning adds to them.
        activations: what is kept between forward and backward of one piece of a batch.
        samples: of that piece.
    """

    state: dict[str, float]
    activations: float
    samples: int

    @property
    def total(self) -> float:
        return sum(self.state.values()) + self.activations


def least_need(model: DiTConfig, config: TrainConfig, samples: int, image_tokens: int) -> Need:
    """A lower bound.

    Args:
        samples: of the largest piece of a batch.
        image_tokens: of the smallest sample, beside which there is at least one token of text.

    With a frozen base, gradients, moments and what is kept for backward are those of a part, and
    only the weights are counted.
    """
    # One process; a number of replicas that it cannot have is refused later.
    state = state_parts(model, config, ranks=max(1, config.parallel.replicas))
    if config.tune.freezes:
        return Need(state={"weights": state["weights"]}, activations=0.0, samples=samples)
    wide = 2 if config.precision == "fp32" else 1  # `kept_bytes` is of half precision
    block = wide * samples * (image_tokens + 1) * kept_bytes(model, "nothing")
    kept = (_SAVED * model.depth + _WORKING) * block
    return Need(state={n: b for n, b in state.items() if b}, activations=kept, samples=samples)


def require_memory(model: DiTConfig, config: TrainConfig, samples: int, image_tokens: int) -> None:
    """Raises UserError where the training surely cannot fit into this machine's memory."""
    there = available_memory()
    need = least_need(model, config, samples, image_tokens)
    if there is None or need.total <= there:
        return
    state = sum(need.state.values())
    divisible = state <= there and need.samples > 1
    pieces = f"raise --accumulate={config.accumulate} or " if divisible else ""
    raise UserError(
        f"train.device=cpu: training these {model.depth} layers of width {model.width} takes at "
        f"least {need.total / GIB:.3g} GiB ({', '.join(need.state)} {state / GIB:.3g}, activations "
        f"of {need.samples} samples at a time {need.activations / GIB:.3g}), and "
        f"{there / GIB:.3g} GiB are available; {pieces}choose a smaller preset, --model.depth or "
        f"--model.width, or a GPU: mvsplit plan PRESET says what fits on which"
    )


def available_memory() -> float | None:
    """What may still be allocated: MemAvailable and what ZFS lets go, or the limit of a control
    group that is smaller, and free swap. None where the system does not say, as macOS does not."""
    try:
        fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        free, swap = (1024 * int(fields[n].split()[0]) for n in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, LookupError):
        return None
    return float(min([free + _zfs_cache(), *_limits()]) + swap)


def _zfs_cache() -> int:
    """Which MemAvailable leaves out."""
    try:
        rows = [line.split() for line in _ZFS.read_text().splitlines()]
        return next(int(row[2]) for row in rows if row and row[0] == "size")
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def _limits() -> Iterator[int]:
    """The limits of the control groups that this process is in, and of those above them."""
    try:
        lines = _CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (
            (_CGROUP_ROOT / "memory", "memory.limit_in_bytes")
            if controllers
            else (_CGROUP_ROOT, "memory.max")
        )
        inner = PurePosixPath(group.lstrip("/"))
        for folder in (inner, *inner.parents):
            try:
                yield int((root / folder / name).read_text())
            except (OSError, ValueError):  # none there, or "max"
                continue
