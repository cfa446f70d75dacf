"""Which way of doing each stage is fastest here: measured on the device, and kept on disk.

A stage is timed as the engine runs it: in a CUDA graph, over several layers, whose weights together
do not fit into the L2 cache. What does not agree with the ordinary ops is never chosen.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mvsplit.kernels.fused.stream_attention import Blocks
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.models import Block
from mvsplit.sampling.engine_plan import ORDINARY, STAGES, Choice, Network, Ordinary, Plan, Writing

CACHE_VERSION = 1  # of what is kept; raise it when kernels or candidates change
LAYERS = 16  # that a stage is timed over: about 100 MB of weights at full width
REPLAYS = 7
AGREEMENT = 1e-2  # ‖ours − ordinary‖/‖ordinary‖; either rounds by 2⁻⁹, and once more inside

_logger = logging.getLogger(__name__)


def _tiles(*rows: tuple[int, int, int, int, int]) -> list[Tile]:
    return [Tile(*row) for row in rows]


# rows, columns, depth, warps, stages
_WIDE = _tiles(
    (64, 128, 64, 4, 4), (64, 128, 128, 4, 3), (64, 256, 64, 4, 3), (64, 256, 64, 8, 4),
    (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3),
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
)  # fmt: skip
_WRITERS = _tiles(
    (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 64, 128, 4, 4), (64, 128, 64, 4, 4),
    (64, 128, 128, 4, 3), (128, 64, 64, 4, 4), (128, 64, 128, 4, 3), (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 3), (128, 256, 64, 8, 3),
)  # fmt: skip
_BLOCKS = [
    Blocks(*row)
    for row in (
        (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2),
        (128, 64, 8, 3), (128, 128, 8, 2), (32, 64, 2, 2), (32, 64, 4, 2),
    )
]  # fmt: skip
_MERGES = [Rows(*row) for row in ((1, 4), (2, 4), (4, 4), (4, 8), (8, 8))]


def cache_file() -> Path:
    """Where choices are kept: `engine.json` in $MVSPLIT_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("MVSPLIT_CACHE", Path(home) / "mvsplit")) / "engine.json"


def candidates(stage: str, network: Network) -> list[Choice]:
    """What is tried for a stage on this device, the ordinary ops first."""
    ordinary: list[Choice] = [Ordinary()]
    if stage == "attention":
        return [*map(Ordinary, ("default", "cudnn", "flash")), *_BLOCKS]
    block = cast(Block, network.model.blocks[0])
    weight = {
        "qkv": block.attention.qkv.weight, "w13": block.ffn.w13.weight,
        "proj": block.attention.proj.weight, "w2": block.ffn.w2.weight,
    }[stage]  # fmt: skip
    tiles = _WRITERS if stage in ("proj", "w2") else _WIDE
    tiles = [tile for tile in tiles if _worthwhile(tile, stage, network)]
    if _is_hopper(weight) and tiles[0].fits_tma(weight):
        tiles = tiles + [replace(t, tma=True) for t in tiles if _tma_fits(t, stage, network)]
    if stage not in ("proj", "w2"):
        return [*ordinary, *tiles]
    deep = weight.shape[1] >= 2 * weight.shape[0] and network.stream.rows <= 2048
    splits = (1, 2, 3) if deep else (1,)
    tiles = [replace(tile, split=split) for tile in tiles for split in splits]
    return [*ordinary, *(Writing(tile, Rows()) for tile in tiles)]


def _worthwhile(tile: Tile, stage: str, network: Network) -> bool:
    return tile.rows >= 128 or network.stream.rows <= 2048


def _is_hopper(x: Tensor) -> bool:
    """Whether the device has the bulk copy engine and programmatic dependent launch."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def _tma_fits(tile: Tile, stage: str, network: Network) -> bool:
    """The copy engine takes heads and hidden units as they lie: whole heads of a power of two."""
    if stage == "qkv":
        width = network.config.head_width
        return width & (width - 1) == 0 and tile.columns % width == 0
    return True


class Tuner:
    """Measures the stages of one network at one shape.

    Attributes:
        table: for each stage, (choice as text, microseconds or None, what was wrong).
        seconds: spent compiling and measuring.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        blocks = list(network.model.blocks)[:LAYERS]
        self.blocks = [cast(Block, block) for block in blocks]
        self.table: dict[str, list[tuple[str, float | None, str]]] = {}
        self.seconds: dict[str, float] = {}

    def best_plan(self) -> Plan | None:
        """The fastest choice of every stage, and whether kernels start early; None where weights
        that are not finite leave nothing to compare."""
        generator = torch.Generator(self.network.trunk.device).manual_seed(0)
        start = self.network.trunk.clone().normal_(generator=generator)
        mask = self.network.segments.mask
        self.start = start if mask is None else start * mask.flatten()[:, None]
        started = time.perf_counter()
        self._prepare(ORDINARY)
        if not self.network.x.isfinite().all():
            _logger.warning("engine: values are not finite; nothing is compared or chosen")
            return None
        options = {stage: candidates(stage, self.network) for stage in STAGES}
        self._compile(options)
        self.seconds["compile"] = time.perf_counter() - started
        plan = ORDINARY
        for stage in STAGES:
            started = time.perf_counter()
            plan = plan.with_choice(stage, self._fastest(stage, plan, options[stage]))
            choice = getattr(plan, stage)
            if isinstance(choice, Writing):
                rows = [replace(choice, rows=cut) for cut in _MERGES if cut != choice.rows]
                best = self._fastest(stage, plan, [choice, *rows], note="rows of the merge: ")
                plan = plan.with_choice(stage, best)
            self.seconds[stage] = time.perf_counter() - started
        started = time.perf_counter()
        plan = self._early(plan)
        self.seconds["early"] = time.perf_counter() - started
        return plan

    def _compile(self, options: dict[str, list[Choice]]) -> None:
        """All kernels at once: ptxas and LLVM run beside each other. What cannot be compiled is
        met again, and said, when it is measured."""
        jobs = [(s, c) for s, choices in options.items() for c in choices if s != "early"]
        jobs += [("w2", Writing(Tile(), cut)) for cut in _MERGES]
        device = self.network.trunk.device

        def job(stage: str, choice: Choice) -> None:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            plan = ORDINARY.with_choice(stage, choice)
            if stage in ("qkv", "attention"):  # the sums that an own merge will ask for
                plan = plan.with_choice("proj", Writing(Tile(), Rows()))
            elif stage == "w13":
                plan = plan.with_choice("w2", Writing(Tile(), Rows()))
            try:
                self.network.run(stage, self.blocks[0], plan, compile_only=True)
            except Exception as error:
                _logger.debug("%s %s does not compile: %s", stage, choice, error)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda pair: job(*pair), jobs))

    def _prepare(self, plan: Plan) -> None:
        """A whole block by `plan` from the start, so that every stage has inputs."""
        self.network.trunk.copy_(self.start)
        self.network.x = self.network.trunk
        self.network.run_block(self.blocks[0], plan)

    def _fastest(self, stage: str, plan: Plan, choices: Iterable[Choice], note: str = "") -> Choice:
        """The fastest of `choices` that gives what the ordinary ops give."""
        timed: list[tuple[float, int, Choice]] = []
        truth = self._output(stage, ORDINARY)
        rows = self.table.setdefault(stage, [])
        for i, choice in enumerate(choices):
            one = self._with_sums(stage, plan.with_choice(stage, choice))
            try:
                error = _relative(self._output(stage, one), truth)
                if not error < AGREEMENT:
                    _logger.warning("engine: %s %s is off by %.1e; not used", stage, choice, error)
                    rows.append((note + str(choice), None, f"off by {error:.1e}"))
                    continue
                micro = self._measure(stage, one)
            except Exception as error:  # it does not fit on this device; another choice will
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                rows.append((note + str(choice), None, reason))
                _logger.debug("%s %s: %s", stage, choice, reason)
                continue
            rows.append((note + str(choice), micro, ""))
            timed.append((micro, i, choice))
        micro, _, choice = min(timed)
        _logger.info("engine: %s by %s, %.1f µs", stage, choice, micro)
        return choice

    def _with_sums(self, stage: str, plan: Plan) -> Plan:
        """Attention and w13 are timed with the column sums of an own merge beside them."""
        after = {"attention": "proj", "w13": "w2"}.get(stage)
        return plan if after is None else plan.with_choice(after, Writing(Tile(), Rows()))

    def _output(self, stage: str, plan: Plan) -> Tensor:
        """What a stage makes of the inputs that the ordinary ops left it."""
        self.network.trunk.copy_(self.start)
        self.network.x = self.network.trunk
        for one in STAGES:
            if one == stage:
                break
            self.network.run(one, self.blocks[0], self._only(stage, plan))
        self.network.run(stage, self.blocks[0], plan)
        return self.network.result(stage).float().clone()

    def _only(self, stage: str, plan: Plan) -> Plan:
        """The ordinary ops before `stage`, and the sums that its merge reads."""
        own = isinstance(getattr(plan, stage), Writing)
        return ORDINARY.with_choice(stage, getattr(plan, stage)) if own else ORDINARY

    def _measure(self, stage: str, plan: Plan) -> float:
        def chain() -> None:
            for block in self.blocks:
                self.network.run(stage, block, plan)

        return graph_time(chain) / len(self.blocks) * 1e6

    def block_time(self, plan: Plan) -> float:
        """Microseconds of a whole block."""
        self._prepare(plan)

        def chain() -> None:
            for block in self.blocks:
                self.network.run_block(block, plan)

        return graph_time(chain) / len(self.blocks) * 1e6

    def _early(self, plan: Plan) -> Plan:
        """With or without programmatic dependent launch, whichever makes a block faster."""
        rows = self.table.setdefault("block", [])
        times = {False: self.block_time(plan)}
        rows.append(("one after the other", times[False], ""))
        if _is_hopper(self.network.trunk):
            try:
                times[True] = self.block_time(plan.with_pdl(True))
                rows.append(("kernels start early", times[True], ""))
            except Exception as error:  # this Triton or driver has no such launch
                rows.append(("kernels start early", None, f"{type(error).__name__}: {error}"))
        return plan.with_pdl(min(times, key=lambda pdl: times[pdl]))


def _relative(actual: Tensor, truth: Tensor) -> float:
    error = ((actual - truth).norm() / truth.norm().clamp(min=1e-30)).item()
    return float("inf") if error != error else error


def graph_time(run: Callable[[], None]) -> float:
    """Median seconds of `run` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()  # not torch.cuda.graph, which collects Python's garbage every time
        try:
            run()
        finally:
            graph.capture_end()
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times)


# The choices of earlier runs


def _key(network: Network) -> str:
    import triton

    from mvsplit.kernels.fused import stream

    c = network.config
    rows = network.stream  # prompts of 1 to 32 tokens share a choice
    shape = (rows.batch, rows.image_rows, rows.sample_rows, network.segments.mask is None)
    model = (c.width, c.heads, c.groups, c.ffn_width, c.rule.name, min(c.depth, LAYERS))
    device = network.trunk.device
    version = (CACHE_VERSION, stream.CHUNK, torch.__version__, triton.__version__)
    name = torch.cuda.get_device_name(device)
    return json.dumps([name, version, str(network.trunk.dtype), model, shape])


def load_plan(network: Network, path: Path) -> Plan | None:
    """The choice of an earlier run at this shape on such a device; None if there is none."""
    fields = _read(path).get(_key(network))
    return None if fields is None else Plan.from_json(fields)


def save_plan(network: Network, plan: Plan, path: Path) -> None:
    """Adds a choice to the file; it is written whole or not at all. A folder that cannot be
    written is said, and costs the next start its measurements."""
    choices = {**_read(path), _key(network): plan.to_json()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(choices, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        _logger.warning("engine: choices are not kept, %s: %s", path, error.strerror)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _logger.warning("engine: %s is not read (%s); choices are measured anew", path, error)
        return {}
