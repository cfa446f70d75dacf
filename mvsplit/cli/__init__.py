"""The command line: a table of commands, each in a thin file of its own.

A command's module has `main(arguments) -> int`, which gives the exit status. It is imported only
when it is asked for, so that `mvsplit --help` does not wait for torch.
"""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TextIO

from mvsplit import __version__
from mvsplit.errors import UserError, nearest

COMMANDS: dict[str, tuple[str, str]] = {  # name: (module, what it does)
    "demo": ("mvsplit.cli.demo", "train two 400-layer twins on digits and see one collapse"),
    "train": ("mvsplit.cli.train", "train a preset, or go on with a run"),
    "monitor": ("mvsplit.cli.monitor", "say what goes wrong in a run, live or from its logs"),
    "report": ("mvsplit.cli.report", "draw one or more runs as one HTML page"),
    "explain": ("mvsplit.cli.explain", "say what made the gradient of a step spike"),
    "encode": ("mvsplit.cli.encode", "encode pictures and captions for training"),
    "sample": ("mvsplit.cli.sample", "draw pictures with a trained run or released weights"),
    "evaluate": ("mvsplit.cli.evaluate", "score a run or weights; compare scores"),
    "pairs": ("mvsplit.cli.pairs", "draw captions twice and keep which picture was better"),
    "app": ("mvsplit.cli.app", "draw in the browser (extra app)"),
    "grow": ("mvsplit.cli.grow", "deeper weights that compute the same"),
    "convert": ("mvsplit.cli.convert", "weights between released files, checkpoints, diffusers"),
    "reproduce": ("mvsplit.cli.reproduce", "run a claim of the paper and judge it"),
    "plan": ("mvsplit.cli.plan", "memory and time of a training step, before it is taken"),
    "bench": ("mvsplit.cli.bench", "measure speed: the scripts of benchmarks/, their tables"),
}

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
UNREAD = 141  # 128 + SIGPIPE
_WITHOUT_KERNELS = (  # of a GPU's fault, Python's traceback shows nothing
    "give the command again when nothing else uses the GPU, or take another one "
    "(CUDA_VISIBLE_DEVICES=1); on the CPU (CUDA_VISIBLE_DEVICES= before the command) none of these "
    "kernels run"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status (`status_of`), or the command's own."""
    warnings.showwarning = _show_warning
    given = list(sys.argv[1:] if arguments is None else arguments)
    return status_of(lambda: _dispatch(given))


def status_of(action: Callable[[], int | None]) -> int:
    """Does what a command or a script does and returns its exit status: 0 or what `action` gives, 2
    after an error that the user can put right, which is one line on stderr, 130 after Ctrl-C, 141
    where nobody reads the rest (| head)."""
    try:
        status = action() or 0
        sys.stdout.flush()  # here, for at Python's end a closed pipe has a traceback
        return status
    except UserError as error:
        return _refuse(str(error))
    except RuntimeError as error:
        if (reason := _of_our_kernels(error)) is None:
            raise
        return _refuse(f"{reason}; {_WITHOUT_KERNELS}")
    except KeyboardInterrupt:
        print("mvsplit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return UNREAD


def _is_closed(stream: TextIO) -> bool:
    """Whether it is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _refuse(message: str) -> int:
    if _speaks(message):
        print(f"mvsplit: {message}", file=sys.stderr)
    return USER_ERROR


def _of_our_kernels(error: RuntimeError) -> str | None:
    """What to say where it is certain that our CUDA C++ kernels or their driver failed. Their
    module, which imports torch, is looked for and not imported: what never ran has not failed."""
    driver = sys.modules.get("mvsplit.kernels.hopper.driver")
    if driver is None:
        return None
    waited: str | None = driver.ended_by_a_wait(error)
    return waited or (str(error) if isinstance(error, driver.DriverError) else None)


def _speaks(message: str) -> bool:
    """Whether this process is the one to say it: of those of torchrun, the first that comes."""
    if "RANK" not in os.environ:
        return True
    from mvsplit.training.distributed import first_to_say

    return first_to_say(message)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"mvsplit {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    try:
        return import_module(COMMANDS[name][0]).main(rest)
    except SystemExit:  # the end of a --help, of which a part may not be written yet
        sys.stdout.flush()
        raise


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:{width}}{summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: mvsplit COMMAND [OPTIONS]\n\n"
        "Train, watch and sample diffusion transformers of hundreds to a thousand layers.\n\n"
        f"commands:\n{rows}\n\n"
        "mvsplit COMMAND --help shows the options of a command."
    )


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"mvsplit: warning: {message}", file=sys.stderr)
