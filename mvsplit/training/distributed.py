"""The processes of a run, as torchrun starts them, and the few words they exchange.

Alone, a process is the first of one: nothing is imported, sent or waited for. Ranks talk about the
course of the run by gloo, on the CPU, so that a word never waits for a device; FSDP2 moves weights
and gradients by NCCL where there are GPUs.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from mvsplit.diagnostics.ranks import is_distributed
from mvsplit.errors import UserError
from mvsplit.training.stall import StallWatch

T = TypeVar("T")

# The watch for stalls ends a run that hangs; this is for what it cannot see.
_COLLECTIVE_TIMEOUT = timedelta(hours=24)

_store: Any = None  # shared by the ranks, while this process is one of several
_watch: StallWatch | None = None


class LostRank(UserError):
    """Another process of the run has ended while this one waited for it."""


def launched_world() -> int:
    """The processes that torchrun has started; 1 without it, whatever a cluster has set."""
    complete = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    return int(os.environ.get("WORLD_SIZE", "1")) if complete else 1


def launched_rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))


def launched_device(name: str) -> str:
    """The device that `name` means here: under torchrun each process of a machine has its own."""
    if launched_world() > 1 and name == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def rank() -> int:
    """0 for the process that writes."""
    return distributed.get_rank() if is_distributed() else 0


def world() -> int:
    """Processes that share the run."""
    return distributed.get_world_size() if is_distributed() else 1


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Joins the other processes of the run, if there are any, until the end of the block.

    Args:
        timeout: seconds without a move of one rank after which every rank ends, with its name.

    Raises:
        LostRank: another process has ended.
    """
    global _store, _watch
    if launched_world() == 1 or is_distributed():
        yield
        return
    with _explained():
        store = _join()
    _store = store.clone()
    _watch = StallWatch(store.clone(), rank(), world(), timeout)
    with _explained():
        yield
    _watch.close()
    _watch = None
    distributed.destroy_process_group()


def _join() -> Any:
    """Initialises torch.distributed; returns the ranks' store."""
    from torch.distributed.rendezvous import rendezvous  # which takes a while

    store, number, count = next(rendezvous("env://"))
    # The store may outlive the processes; those of a restart must not meet the dead.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"attempt {attempt}", store)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launched_device("cuda"))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(
        backend,
        store=distributed.PrefixStore("ranks", store),
        rank=number,
        world_size=count,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    return store


@contextmanager
def _explained() -> Iterator[None]:
    """Makes one line of what a process meets whose peer is gone."""
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostRank(
            "another process of the run has ended, and so do all; the reason stands above or in "
            "the report of torchrun; give the same command again to go on"
        ) from error


def _is_lost_connection(error: BaseException) -> bool:
    if isinstance(error, distributed.DistError):
        return True
    return "gloo" in str(error) or "Connection closed by peer" in str(error)


def at(place: str) -> None:
    """Notes where this process is; a rank that stays at one place for too long has stalled."""
    if _watch is not None:
        _watch.at(place)


def on_stall(tell: Callable[[str], object]) -> None:
    """Has the first rank call `tell` with the message, where a rank has stalled."""
    if _watch is not None and rank() == 0:
        _watch.tell = tell


def either(bits: int) -> int:
    """The bits that are set on any rank."""
    if not is_distributed():
        return bits
    word = torch.tensor([bits])
    distributed.all_reduce(word, op=distributed.ReduceOp.BOR)
    return int(word)


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, on every rank; or its UserError, on every rank."""
    if not is_distributed():
        return make()
    word: list[Any] = [None, None]
    if rank() == 0:
        try:
            word[0] = make()
        except UserError as error:
            word[1] = error
    distributed.broadcast_object_list(word, device=torch.device("cpu"))
    if word[1] is not None:
        raise word[1]
    return word[0]


def together(make: Callable[[], T]) -> T:
    """What `make` returns on this rank, once it has returned on every rank; or the UserError of any
    rank, on every rank."""
    if not is_distributed():
        return make()
    made, failure = [], None
    try:
        made.append(make())
    except UserError as error:
        failure = str(error)
    for message in filter(None, from_each(failure)):
        raise UserError(message)
    return made[0]


def is_first_of_machine() -> bool:
    """Whether this process is the one that does what a machine has to do once."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or launched_world() == 1


def group_of_saves() -> Any:
    """A group of all ranks whose words do not mix with those of the steps; None for one process."""
    if not is_distributed():
        return None
    return distributed.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)


def from_each(value: T) -> list[T]:
    """The values of all ranks, in their order, on every rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world()
    distributed.all_gather_object(values, value)
    return values


def rows_of_each(rows: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other: [B, …] of each becomes [N·B, …]."""
    if not is_distributed():
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world())]
    distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)


def share(values: Sequence[T]) -> Sequence[T]:
    """Every N-th of some pieces of work, beginning at this rank's number."""
    return values[rank() :: world()]


def first_to_say(text: str) -> bool:
    """Whether no other rank has said `text` yet, so that a message for all appears once."""
    if launched_world() == 1:
        return True
    if _store is None:
        return launched_rank() == 0
    try:
        return _store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError as error:  # whoever kept the store has ended
        print(f"mvsplit: rank {launched_rank()}: {str(error).splitlines()[0]}", file=sys.stderr)
        return True
