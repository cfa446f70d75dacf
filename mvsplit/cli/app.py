"""`mvsplit app RUN_OR_WEIGHTS`: a page on this machine that draws."""

from __future__ import annotations

import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from mvsplit.cli.app_drawing import Drawing
from mvsplit.cli.app_page import HOST, Served, build_page, load_gradio, serve_page
from mvsplit.cli.subject import Options, open_subject
from mvsplit.errors import UserError
from mvsplit.sampling import accelerated

_HIGHEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Draws in the browser: a page on this machine, for this machine only. Ctrl-C ends it.

    Attributes:
        port: where to serve.
    """

    port: int = 7860

    def __post_init__(self) -> None:
        if not 1 <= self.port <= _HIGHEST_PORT:
            raise UserError(f"port={self.port}: must be from 1 to {_HIGHEST_PORT}")


def main(arguments: Sequence[str]) -> int:
    """Serves until Ctrl-C or SIGTERM, then returns 0.

    Raises:
        UserError: the extra `app` is not installed; no such run or weights; a port that is taken.
    """
    with serving(tyro.cli(Arguments, args=list(arguments), prog="mvsplit app")) as served:
        asked_to_end = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: asked_to_end.set())
        print(f"drawing at {served.url} (Ctrl-C ends it)", flush=True)
        asked_to_end.wait()
    print("\nno longer drawing")
    return 0


@contextmanager
def serving(args: Arguments) -> Iterator[Served]:
    """The page, served inside the block. Its pictures are gone afterwards; the page lets one
    download them."""
    _require_free(args.port)
    with tempfile.TemporaryDirectory(prefix="mvsplit-app-") as name:
        folder = Path(name)
        gradio = load_gradio(folder / "cache")  # what is missing is said before weights are read
        subject = open_subject(args)
        if subject.kind == "clip":
            raise UserError(
                f"{args.source}: draws clips, which the page cannot show; mvsplit sample"
            )
        network = accelerated(subject.model, say=lambda choice: print(f"network: {choice}"))
        drawing = Drawing(subject, network, folder / "pictures")
        served = serve_page(gradio, build_page(gradio, subject, drawing), folder, args.port)
        try:
            yield served
        finally:
            served.close()


def _require_free(port: int) -> None:
    """So that a port that is taken is said before anything is loaded."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port={port}: is taken; choose another with --port") from error
