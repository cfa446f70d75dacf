"""Processes that end with the one that started them, and as soon as a signal says so: a pool of
workers, workers that stay and are asked by hand, and a command.

A process of the pool gets one job after the other, each when the last is done, so that nothing
waits in a queue that a worker could still go to after a signal.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

GRACE = 20.0  # seconds that workers have to save themselves; clusters kill 30 after their SIGTERM
LOOK = 1.0  # seconds between looks for the parent
LAST = 5.0  # seconds within which what was killed is gone; a GPU's driver may hold it longer
MARK = "MVSPLIT_POOL"  # in the environment of workers, and so of all that they begin
STOPS = (signal.SIGTERM, signal.SIGINT)

Task = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_Handler = Callable[[int, FrameType | None], None]


class Stopped(SystemExit):
    """A signal stopped what went on here. Where nothing catches it the process ends with the status
    that `mvsplit train` has then: 143 after SIGTERM, 130 after Ctrl-C."""

    def __init__(self, number: int) -> None:
        self.signal, self.status = signal.Signals(number), 128 + number
        super().__init__(self.status)

    def words(self, kept: str) -> str:
        """The line about it."""
        return f"stopped by {self.signal.name}: {kept}; give the same command again to go on"


@contextmanager
def stoppable() -> Iterator[None]:
    """The first SIGTERM or Ctrl-C raises `Stopped` here; the next has its usual effect."""
    with _on_signals(_raise_stopped) as restore:
        try:
            yield
        except Stopped:
            restore()
            raise


@contextmanager
def worker_pool(count: int) -> Iterator[Executor]:
    """Worker processes; what has not begun when something fails is not begun.

    The first SIGTERM or Ctrl-C begins nothing more and goes on to the workers as a SIGTERM: those
    that train save themselves and stop, the others end, and what is left after GRACE seconds is
    killed, with all that it began. The futures raise `Stopped` then, and so does this at its end,
    whatever came of them. A second signal kills all of it and this process at once. Where a worker
    dies the others are ended likewise, and the futures raise BrokenProcessPool. Workers whose
    parent was killed end within seconds.
    """
    pool = _Pool(count)
    try:
        with _on_signals(pool.stop):
            try:
                yield pool
            finally:
                pool.shutdown(cancel_futures=True)
    finally:
        if isinstance(pool.over, Stopped):
            raise pool.over


@contextmanager
def standing_workers(count: int) -> Iterator[list[Connection]]:
    """Worker processes that stay, each by a pipe for `ask_each`, and keep what their modules hold.

    After the first SIGTERM or Ctrl-C, which raises `Stopped` here, and after any other failure they
    are ended with all that they began, whatever they are about; so they are after a second signal.
    """
    mark, pipes = _new_mark(), []
    workers: list[SpawnProcess] = []
    try:
        with stoppable():
            for _ in range(count):
                worker, pipe = _begin(mark)
                workers.append(worker)
                pipes.append(pipe)
            yield pipes
    except BaseException:
        for worker in workers:
            worker.kill()
        raise
    finally:
        for pipe in pipes:
            pipe.close()  # which ends those that wait for a question
        for worker in workers:
            worker.join(GRACE)
        _kill_marked(mark)


def ask_each(pipes: Sequence[Connection], tasks: Sequence[Task]) -> list[Any]:
    """The results of tasks that workers do at the same time, the first by the first.

    Raises:
        BrokenProcessPool: a worker has died. An error in one is raised here.
    """
    try:
        for pipe, task in zip(pipes, tasks, strict=True):
            pipe.send(task)
        answers = [pipe.recv() for pipe in pipes]
    except (EOFError, ConnectionError) as lost:
        raise BrokenProcessPool("a worker process has died") from lost
    for _, error in answers:
        if error is not None:
            raise error
    return [result for result, _ in answers]


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command to its end and returns its status.

    The first SIGTERM, Ctrl-C or hang-up goes on to it as a SIGTERM, and to nobody else: it may save
    what it has and end what it began. What is left of all that after GRACE seconds and a few is
    killed, and `Stopped` raised. A second signal kills all of it and this process at once.
    """
    mark, told = _new_mark(), list[int]()
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        if told:
            _kill_command(process, mark)
            os._exit(128 + number)
        told.append(number)
        if process is not None:
            process.terminate()

    heard = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN  # else nohup asks for it to go on
    with _on_signals(stop, (*STOPS, signal.SIGHUP) if heard else STOPS):
        # In a group of its own, for else Ctrl-C in a terminal would reach it as a signal more.
        process = subprocess.Popen(command, env={**environment, MARK: mark}, process_group=0)
        if told:
            process.terminate()
        end = None
        while end is None or time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                process.wait(LOOK)
                break
            if told and end is None:
                end = time.monotonic() + GRACE + LAST  # its own workers may take GRACE
    if told:
        _kill_command(process, mark)
        raise Stopped(told[0])
    return process.returncode


def _kill_command(process: subprocess.Popen[bytes] | None, mark: str) -> None:
    if process is not None:
        process.kill()
    _kill_marked(mark)


@contextmanager
def _on_signals(
    handler: _Handler, numbers: Sequence[signal.Signals] = STOPS
) -> Iterator[Callable[[], None]]:
    """Has signals handled, in a main thread, for others can set no handlers; gives what restores
    those before."""
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, handler) for number in numbers}
    try:
        yield restore
    finally:
        restore()


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


class _Pool(Executor):
    """Processes with a thread each that hands them their jobs, and one that ends them.

    Attributes:
        over: why nothing more begins: `Stopped`, or BrokenProcessPool; None before.
    """

    def __init__(self, count: int) -> None:
        self.over: BaseException | None = None
        self._count, self._mark = count, _new_mark()
        self._signalled = False
        self._lock = threading.Lock()  # no job is handed out while workers are being told to stop
        self._todo: SimpleQueue[tuple[Future[Any], Any] | None] = SimpleQueue()
        self._end: SimpleQueue[None] = SimpleQueue()
        self._workers: list[SpawnProcess] = []
        self._leaders: list[threading.Thread] = []
        # Begun now, for a handler of signals can begin no thread safely.
        self._ender = threading.Thread(target=self._end_workers, daemon=True)
        self._ender.start()

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Raises what `over` is."""
        if self.over is not None:
            raise self.over
        job: Future[Any] = Future()
        self._todo.put((job, (function, args, kwargs)))
        if len(self._workers) < self._count:
            self._start()
        return job

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Waits for what has begun; the rest is cancelled, or done first."""
        while cancel_futures:
            try:
                waiting = self._todo.get_nowait()
            except Empty:
                break
            if waiting is not None:
                waiting[0].cancel()
        for _ in self._leaders:
            self._todo.put(None)
        for leader in self._leaders:
            leader.join()
        self._end.put(None)
        self._ender.join()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """The handler of signals. It takes no lock, which the thread that it interrupts may hold,
        and raises nothing, so that this one is not torn out of what it is about."""
        if self._signalled:
            self._kill()
            os._exit(128 + number)
        self._signalled, self.over = True, Stopped(number)
        self._end.put(None)

    def _start(self) -> None:
        with self._lock:
            worker, mine = _begin(self._mark)
            self._workers.append(worker)
        leader = threading.Thread(target=self._lead, args=(worker, mine), daemon=True)
        self._leaders.append(leader)
        leader.start()

    def _lead(self, worker: SpawnProcess, pipe: Connection) -> None:
        """Gives a worker one job after the other, until there are no more."""
        with pipe:
            for job, task in iter(self._todo.get, None):
                if not job.set_running_or_notify_cancel():
                    continue
                try:
                    result, error = self._ask(worker, pipe, task)
                except BaseException as reason:
                    result, error = None, reason
                if error is None:
                    job.set_result(result)
                else:
                    job.set_exception(error)

    def _ask(self, worker: SpawnProcess, pipe: Connection, task: Any) -> Any:
        try:
            with self._lock:
                if self.over is not None:
                    raise self.over
                pipe.send(task)
            return pipe.recv()
        except (EOFError, ConnectionError):
            worker.join(LOOK)
            if self.over is None:
                self.over = _reason(worker.exitcode)
                self._end.put(None)
            raise self.over from None

    def _end_workers(self) -> None:
        """Once there are no more jobs or it is `over`: has the workers end in time, and with them
        all that they began."""
        self._end.get()
        with self._lock:
            workers = [*self._workers]
        if self.over is not None:
            for worker in workers:
                worker.terminate()
        end = time.monotonic() + GRACE
        while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
            time.sleep(0.02)
        self._kill()

    def _kill(self) -> None:
        for worker in [*self._workers]:
            worker.kill()
        _kill_marked(self._mark)


def _new_mark() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _begin(mark: str) -> tuple[SpawnProcess, Connection]:
    """A worker and the pipe to it."""
    resource_tracker.ensure_running()  # a child of this process that must not have the mark
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs, os.getpid(), mark))
    with _marked(mark), _without_ctrl_c():
        worker.start()
    theirs.close()
    return worker, mine


def _reason(status: int | None) -> BaseException:
    """Why a worker ended that should not have: a cluster may signal all processes, it first."""
    if status is not None and -status in STOPS:
        return Stopped(-status)
    return BrokenProcessPool(f"a worker process ended with status {status}")


@contextmanager
def _marked(mark: str) -> Iterator[None]:
    """What is begun here has the mark."""
    before = os.environ.get(MARK)
    os.environ[MARK] = mark
    try:
        yield
    finally:
        os.environ.pop(MARK)
        if before is not None:  # a worker's own pool
            os.environ[MARK] = before


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """What is begun here does not hear Ctrl-C until it says so, which would show where it was."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_marked(mark: str) -> None:
    """Kills the processes with this mark but for this one, until none is there: workers and all
    that they began, also what has left their group and lost its parent. Only Linux tells."""
    wanted = f"{MARK}={mark}".encode()
    end = time.monotonic() + LAST
    while (found := _processes_with(wanted)) and time.monotonic() < end:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _processes_with(variable: bytes) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # one that has ended, or somebody else's
            if variable in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def _serve(pipe: Connection, parent: int, mark: str) -> None:
    """A worker: does what comes through the pipe, until it is closed."""
    os.setpgid(0, 0)  # Ctrl-C in a terminal is for the parent alone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # forgets one that came before
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow, args=(parent, mark), daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            answer = _answer(*pipe.recv())
            try:
                pipe.send(answer)
            except (TypeError, AttributeError, ValueError) as error:
                pipe.send((None, RuntimeError(f"{error}: a result that cannot be sent")))


def _answer(function: Any, args: Any, kwargs: Any) -> tuple[Any, Exception | None]:
    """The result, or the error with its traceback."""
    try:
        return function(*args, **kwargs), None
    except Exception as error:
        error.add_note("in a worker process:\n" + traceback.format_exc())
        return None, error


def _follow(parent: int, mark: str) -> None:
    """Ends this process and those that it began, whatever it does, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    _kill_marked(mark)
    os._exit(1)
