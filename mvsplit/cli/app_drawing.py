"""What the page of `mvsplit app` does, without the page: checks a wish and draws it, step by step.

It needs no web library, and knows none.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mvsplit.cli.subject import Subject
from mvsplit.errors import UserError
from mvsplit.sampling import (
    PictureFolder,
    Previews,
    SamplingConfig,
    generate,
    make_grid,
    to_pictures,
)

MOST_PICTURES, MOST_STEPS, MOST_GUIDANCE = 16, 200, 20.0
MOST_CHARACTERS = 1000  # of a prompt
LARGEST_SEED = 2**32 - 1
PREVIEW_EVERY = 0.4  # seconds; a preview costs time, and with an autoencoder much


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What somebody asks the page for. Raises UserError for what it does not draw."""

    prompt: str
    pictures: int = 4
    seed: int = 0
    steps: int = 35
    guidance: float = 2.0
    sampler: str = "euler"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("pictures", 1, MOST_PICTURES),
            ("steps", 1, MOST_STEPS),
            ("seed", 0, LARGEST_SEED),
            ("guidance", 0.0, MOST_GUIDANCE),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:
                raise UserError(f"{name}={value}: must be from {low:g} to {high:g}")
        if len(self.prompt) > MOST_CHARACTERS:
            raise UserError(
                f"prompt: has {len(self.prompt)} characters; {MOST_CHARACTERS} are allowed"
            )

    def config(self, shift: float) -> SamplingConfig:
        return SamplingConfig(
            steps=int(self.steps),
            sampler=self.sampler,
            guidance=float(self.guidance),
            shift=shift,
            seed=int(self.seed),
            batch_size=int(self.pictures),
        )


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the page shows from now on.

    Attributes:
        status: one line.
        preview: all pictures of the wish, where the path leads while they are drawn.
        files: the finished pictures; empty until then.
    """

    status: str
    preview: Image.Image | None = None
    files: tuple[Path, ...] = ()


STOPPED = Shown(status="Stopped.")


class _Left(Exception):
    """Nobody looks any more."""


class Drawing:
    """Draws wishes one at a time, into a folder of its own for each.

    A wish ends the drawing before it, if that is still going on: the page's queue lets a wish come
    only when nobody looks at another any more. Wishes may wait long for that, so each has a ticket:
    `stop` is for those that have one, drawn or waiting, and not for what is wished later.

    Args:
        subject: what draws.
        network: the network in the form in which it is to run.
        folder: where the pictures go.
    """

    def __init__(self, subject: Subject, network: nn.Module | Any, folder: Path) -> None:
        self._subject, self._network, self._folder = subject, network, folder
        self._changing = threading.Lock()
        self._work, self._visitor = _Work(0), ""
        self._tickets = itertools.count()
        self._waiting = dict[int, str]()  # by ticket, whose it is

    def enlist(self, visitor: str = "") -> int:
        """A ticket for a wish of the visitor's that is to wait for its turn."""
        with self._changing:
            ticket = next(self._tickets)
            self._waiting[ticket] = visitor
        return ticket

    def drop(self, ticket: int) -> None:
        """The wish waits no more, if it still does."""
        with self._changing:
            self._waiting.pop(ticket, None)

    def waits(self, ticket: int, visitor: str = "") -> bool:
        """Whether the visitor's wish waits for its turn."""
        with self._changing:
            return self._waiting.get(ticket) == visitor

    def draw(self, wish: Wish, visitor: str = "", ticket: int | None = None) -> Iterator[Shown]:
        """Previews and, last, the finished pictures, or `STOPPED`. Where it is closed before, the
        drawing ends too.

        Args:
            visitor: whose `stop` ends it.
            ticket: the visitor's, from `enlist`, of when it was wished; without one that is now.

        Raises:
            UserError: a word or a sampler that is not known, or pictures that are not finite.
        """
        config = wish.config(self._subject.shift)
        self._subject.embedder.encode([wish.prompt])  # an unknown word is said at once
        ticket = self.enlist(visitor) if ticket is None else ticket
        work = self._begin(wish, config, visitor, ticket)
        if work is None:
            yield STOPPED
            return
        with closing(work):
            begun, last = time.monotonic(), 0.0
            for done, latents in work.states():
                now = time.monotonic()
                if now - last < PREVIEW_EVERY or not latents.isfinite().all():
                    continue  # what is not finite is an error at the end, which says why
                last = now
                yield Shown(status=f"step {done} of {config.steps}", preview=self._grid(latents))
            if work.latents is not None:
                folder = self._folder / f"{work.number:04d}"
                yield self._finished(wish, config, work.latents, folder, time.monotonic() - begun)
            else:
                yield STOPPED

    def stop(self, visitor: str = "") -> bool:
        """Ends the visitor's drawing after the step it is at, and lets none begin that waits, of
        which it says whether there was one. Another's go on."""
        with self._changing:
            waiting = [ticket for ticket, whose in self._waiting.items() if whose == visitor]
            for ticket in waiting:
                del self._waiting[ticket]
            if visitor == self._visitor:
                self._work.close()
        return bool(waiting)

    def _begin(self, wish: Wish, config: SamplingConfig, visitor: str, ticket: int) -> _Work | None:
        """The drawing, begun; None where it was stopped while it waited."""
        with self._changing:
            if self._waiting.get(ticket) != visitor:
                return None
            del self._waiting[ticket]
            self._work.close()
            work = self._work = _Work(self._work.number + 1)
            self._visitor = visitor
            work.start(lambda: self._latents(wish, config, work))  # here, or no `close` would wait
        return work

    def _latents(self, wish: Wish, config: SamplingConfig, work: _Work) -> Tensor:
        batches = generate(  # several where one did not fit into memory
            self._network,
            self._subject.embedder,
            [wish.prompt] * int(wish.pictures),
            self._subject.shape,
            config,
            preview=Previews(
                lambda indices, done, z: work.tell(done, z),
                every=1,
                steps=config.steps,
                shift=config.shift,
            ),
        )
        return torch.cat([batch.latents for batch in batches])

    def _grid(self, latents: Tensor) -> Image.Image:
        return make_grid(to_pictures(self._subject.codec.decode(latents)))

    def _finished(
        self, wish: Wish, config: SamplingConfig, latents: Tensor, path: Path, seconds: float
    ) -> Shown:
        folder = PictureFolder(path)
        record = {
            "prompt": wish.prompt,
            "seed": config.seed,
            "steps": config.steps,
            "sampler": config.sampler,
            "guidance": config.guidance,
            "shift": config.shift,
            **self._subject.record,
        }
        pictures = to_pictures(self._subject.codec.decode(latents))
        files = tuple(
            folder.add(index, picture, {**record, "index": index})
            for index, picture in enumerate(pictures)
        )
        passes = config.passes()
        status = f"{len(files)} drawn in {seconds:.1f} s, {passes} passes of the network each"
        return Shown(status=status, files=files)


class _Work:
    """A drawing in a thread of its own, so that its states can be looked at while it goes on."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.latents: Tensor | None = None  # what came out, once `states` has ended
        self._states: queue.Queue[tuple[int, Tensor] | None] = queue.Queue()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, draw: Any) -> None:
        def run() -> None:
            try:
                self.latents = draw()
            except _Left:
                pass
            except BaseException as error:  # told to the one who looks, by `states`
                self._error = error
            finally:
                self._states.put(None)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def tell(self, done: int, latents: Tensor) -> None:
        """Called after each step, in the thread; ends it where nobody looks any more."""
        if self._closed.is_set():
            raise _Left
        self._states.put((done, latents))

    def states(self) -> Iterator[tuple[int, Tensor]]:
        """(steps done, latents) as they come, until it is closed. Raises what it raised."""
        while (state := self._states.get()) is not None:
            if not self._closed.is_set():
                yield state
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the drawing after the step it is at, and waits for that."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
