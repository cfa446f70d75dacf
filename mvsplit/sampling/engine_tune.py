"""Which way of doing each stage is fastest here: measured on the device, and kept on disk.

A stage is timed as the engine runs it: in a CUDA graph, over several layers, whose weights together
do not fit into the L2 cache. What does not agree with the ordinary ops is never chosen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mvsplit.kernels.capture import recorded, replay_time
from mvsplit.kernels.choices import keep_choice, read_choices
from mvsplit.kernels.fused.stream import TRITON_VERSION
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.kernels.hopper.driver import check_waits, driver_version
from mvsplit.models import Block
from mvsplit.sampling.engine_candidates import MERGES, candidates, cuts, in_cuda, is_hopper
from mvsplit.sampling.engine_plan import ORDINARY, STAGES, Choice, Network, Plan, Writing

LAYERS = 16  # that a stage is timed over: about 100 MB of weights at full width
REPLAYS = 7
ROUNDS, ROUND_REPLAYS = 9, 3  # blocks are compared in turns: a GPU's clock falls as it gets warm
WARM = 0.25  # seconds of work before that; what is measured first would run at a higher clock
NOISE = 0.003  # of a block's time; what is not faster by more does not replace what is there
TOGETHER, AGREEMENT_TOGETHER = 4, 5e-2  # blocks; rounding adds up, what is wrong is off by more
AGREEMENT = 1e-2  # ‖ours − ordinary‖/‖ordinary‖; either rounds by 2⁻⁹, and once more inside

_FINALISTS = 4  # of each stage, that are tried within a whole block

_logger = logging.getLogger(__name__)


class Tuner:
    """Measures the stages of one network at one shape.

    Args:
        network: at that shape.
        cuda: whether kernels in CUDA C++ are among the candidates.
        about: told the name of everything that is about to run for the first time.
        banned: names of what is not to run.

    Attributes:
        table: for each stage, (choice as text, microseconds or None, what was wrong).
        seconds: spent compiling and measuring.
    """

    def __init__(
        self, network: Network, *, cuda: bool = True,
        about: Callable[[str], object] = lambda name: None, banned: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.network, self.cuda, self._about, self._banned = network, cuda, about, banned
        blocks = list(network.model.blocks)[:LAYERS]
        self.blocks = [cast(Block, block) for block in blocks]
        own = cuda and bool(cuts("w2", network, self.blocks[0].ffn.w2.weight))
        self.whole = network.stream.rows > 2048 and own  # a writer finds the means itself
        self.table: dict[str, list[tuple[str, float | None, str]]] = {}
        self.seconds: dict[str, float] = {}

    def best_plan(self) -> Plan | None:
        """The fastest choice of every stage, and whether kernels start early; None where weights
        that are not finite leave nothing to compare."""
        started = time.perf_counter()
        if not self.is_finite():
            return None
        options = {stage: self._candidates(stage) for stage in STAGES}
        self._compile((s, self._alone(s, choice)) for s in STAGES for choice in options[s])
        self.seconds["compile"] = time.perf_counter() - started
        plan, finalists = ORDINARY, {}
        for stage in STAGES:
            started = time.perf_counter()
            finalists[stage] = self._fastest(stage, options[stage])
            plan = plan.with_choice(stage, finalists[stage][0])
            self.seconds[stage] = time.perf_counter() - started
        started = time.perf_counter()
        self._compile((s, p) for p in self._overlaps(plan) for s in STAGES)
        plan = self._best_block(self._overlaps(plan), lambda p: f"pdl={_early(p)} ahead={p.ahead}")
        plan = self._in_a_block(plan, finalists)
        self.seconds["block"] = time.perf_counter() - started
        return self.checked(plan)

    @cached_property
    def start(self) -> Tensor:
        """A trunk of random numbers, zero on padding."""
        generator = torch.Generator(self.network.trunk.device).manual_seed(0)
        start = self.network.trunk.clone().normal_(generator=generator)
        mask = self.network.segments.mask
        return start if mask is None else start * mask.flatten()[:, None]

    def is_finite(self) -> bool:
        """Whether the ordinary ops make finite numbers of this model's weights; if not, it is
        said."""
        self._prepare(ORDINARY)
        finite = bool(self.network.x.isfinite().all())
        if not finite:
            _logger.warning("engine: values are not finite; nothing is compared or chosen")
        return finite

    def _candidates(self, stage: str) -> list[Choice]:
        found = candidates(stage, self.network)
        return [choice for choice in found if self.cuda or not in_cuda(choice)]

    def checked(self, plan: Plan) -> Plan:
        """A plan if some blocks after each other, with whatever starts before its time, give what
        the ordinary ops give; else these, which is said. Stages alone were compared before.

        Raises:
            DriverError: a kernel waited in vain, which says nothing of the plan: another process
                may draw on the GPU.
        """
        error = self._off_together(plan)
        check_waits()
        if error < AGREEMENT_TOGETHER:
            return plan
        _logger.warning("engine: blocks by the plan are off by %.1e; ordinary ops instead", error)
        self._note("block", "together", None, f"off by {error:.1e}")
        return ORDINARY

    def _off_together(self, plan: Plan) -> float:
        found = []
        for each in (plan, ORDINARY):
            self.network.trunk.copy_(self.start)
            self.network.x = self.network.trunk
            self.network.run_blocks(self.blocks[:TOGETHER], each)
            found.append(self.network.x.clone())
        return _relative(*found)

    def _compile(self, jobs: Iterable[tuple[str, Plan]]) -> None:
        """All kernels at once: ptxas and LLVM run beside each other. What cannot be compiled is
        met again, and said, when it is measured."""
        device = self.network.trunk.device

        def compile_one(job: tuple[str, Plan]) -> None:
            stage, plan = job
            if device.type == "cuda":
                torch.cuda.set_device(device)
            try:
                self.network.run(stage, self.blocks[0], plan, self.blocks[-1], compile_only=True)
            except Exception as error:
                _logger.debug("%s %s does not compile: %s", stage, getattr(plan, stage), error)
            else:
                _logger.debug("%s %s is compiled", stage, getattr(plan, stage))

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, jobs))

    def _prepare(self, plan: Plan) -> None:
        """A whole block by `plan` from the start, so that every stage has inputs."""
        self.network.trunk.copy_(self.start)
        self.network.x = self.network.trunk
        self.network.run_blocks(self.blocks[:1], plan)

    def _fastest(self, stage: str, choices: Iterable[Choice]) -> list[Choice]:
        """The fastest few of `choices` that give what the ordinary ops give, the best first."""
        timed: list[tuple[float, int, Choice]] = []
        truth = self._output(stage, ORDINARY)
        for i, choice in enumerate(choices):
            plan = self._alone(stage, choice)
            try:
                self._begin(f"{stage} {choice}")
                error = _relative(self._output(stage, plan), truth)
                error = max(error, self._sums_off(stage, plan))
                check_waits()  # now, or the next choice is blamed for it
                if not error < AGREEMENT:
                    _logger.warning("engine: %s %s is off by %.1e; not used", stage, choice, error)
                    self._note(stage, choice, None, f"off by {error:.1e}")
                    continue
                micro = self._measure(stage, plan)
                check_waits()
            except Exception as error:  # it does not fit on this device; another choice will
                self._note(stage, choice, None, f"{type(error).__name__}: {str(error)[:200]}")
                self._survive()
                continue
            self._note(stage, choice, micro)
            timed.append((micro, i, choice))
        micro, _, choice = min(timed, key=lambda row: row[:2])
        _logger.info("engine: %s by %s, %.1f µs", stage, choice, micro)
        return [choice for _, _, choice in sorted(timed, key=lambda row: row[:2])[:_FINALISTS]]

    def _begin(self, name: str) -> None:
        """Says what is about to run. Raises RuntimeError if it must not."""
        if name in self._banned:
            raise RuntimeError("it ended a process before")
        self._about(name)

    def _survive(self) -> None:
        """Raises what makes the device of no use to this process any more, as a kernel's fault."""
        if self.network.trunk.is_cuda:
            torch.cuda.synchronize()

    def _note(self, stage: str, choice: object, micro: float | None, reason: str = "") -> None:
        self.table.setdefault(stage, []).append((str(choice), micro, reason))
        if reason:
            _logger.debug("%s %s: %s", stage, choice, reason)

    def _alone(self, stage: str, choice: Choice) -> Plan:
        """One own choice among ordinary ones. Attention and w13 are measured with the column sums
        of an own merge beside them, where that would need them."""
        after = {"attention": "proj", "w13": "w2"}.get(stage)
        plan = ORDINARY.with_choice(stage, choice)
        if after is None or self.whole:
            return plan
        return plan.with_choice(after, Writing(Tile(), Rows()))

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

    def _sums_off(self, stage: str, plan: Plan) -> float:
        """How far the column sums are off that a stage left for a merge. With small gains, or with
        α = β, what comes out of a block shows little of them, or nothing."""
        left = self.network.sums_left(stage, self.blocks[0], plan)
        return 0.0 if left is None else _relative(*left)

    def _only(self, stage: str, plan: Plan) -> Plan:
        """The ordinary ops before `stage`, and the sums that its merge reads."""
        own = isinstance(getattr(plan, stage), Writing)
        return ORDINARY.with_choice(stage, getattr(plan, stage)) if own else ORDINARY

    def _measure(self, stage: str, plan: Plan) -> float:
        def chain() -> None:
            for block in self.blocks:
                self.network.run(stage, block, plan)

        return graph_time(chain) / len(self.blocks) * 1e6

    def block_times(self, plans: Sequence[Plan]) -> list[float | Exception]:
        """Microseconds of a whole block by each of several plans, measured in turns; why not, where
        this Triton or driver has no such launch, or what comes out is wrong."""
        graphs: list[torch.cuda.CUDAGraph | Exception] = []
        self._inputs: list[Tensor] = []
        for plan in plans:
            try:
                graphs.append(self._proven_graph(plan))
            except Exception as error:
                graphs.append(error)
                self._survive()
        good = [graph for graph in graphs if not isinstance(graph, Exception)]
        times = iter(times_in_turns(good))
        layers = len(self.blocks)
        return [g if isinstance(g, Exception) else next(times) / layers * 1e6 for g in graphs]

    def _proven_graph(self, plan: Plan) -> torch.cuda.CUDAGraph:
        """All blocks by a plan, that was compared with the ordinary ops and replayed once."""
        self._begin(f"block {plan}")
        error = self._off_together(plan)
        check_waits()
        if not error < AGREEMENT_TOGETHER:
            raise RuntimeError(f"off by {error:.1e}")
        self._prepare(plan)

        def run() -> None:
            self._inputs.append(self.network.x)  # not always in the same place; graphs read it
            self.network.run_blocks(self.blocks, plan)

        graph, _ = recorded(run)
        graph.replay()
        torch.cuda.synchronize()
        check_waits()
        return graph

    def _overlaps(self, plan: Plan) -> list[Plan]:
        """Without and with kernels that start early and weights that are fetched ahead."""
        new = (False, True) if is_hopper(self.network.trunk) else (False,)
        return [replace(plan.with_pdl(pdl), ahead=ahead) for pdl in new for ahead in new]

    def _in_a_block(self, plan: Plan, finalists: dict[str, list[Choice]]) -> Plan:
        """The finalists of each stage, one stage after the other, within a whole block."""
        choices = {stage: [c.with_pdl(_early(plan)) for c in finalists[stage]] for stage in STAGES}
        for stage in STAGES:
            own = getattr(plan, stage)
            if isinstance(own, Writing):
                choices[stage] += [replace(own, rows=cut.with_pdl(_early(plan))) for cut in MERGES]
        self._compile((s, plan.with_choice(s, choice)) for s in STAGES for choice in choices[s])
        for stage in STAGES:
            others = [c for c in choices[stage] if c != getattr(plan, stage)]
            plans = [plan, *(plan.with_choice(stage, choice) for choice in others)]
            plan = self._best_block(plans, lambda p, at=stage: f"{at} {getattr(p, at)}")  # type: ignore[misc]
        return plan

    def _best_block(self, plans: list[Plan], name: Callable[[Plan], str]) -> Plan:
        """The plan with the fastest block; the first, known to run, where it is as fast."""
        timed = []
        for i, (plan, micro) in enumerate(zip(plans, self.block_times(plans), strict=True)):
            if isinstance(micro, Exception):
                self._note("block", name(plan), None, f"{type(micro).__name__}: {micro}"[:200])
                if i == 0:
                    raise micro
                continue
            self._note("block", name(plan), micro)
            timed.append((micro, i, plan))
        micro, _, plan = min(timed, key=lambda row: row[0] * (1 + NOISE * (row[1] > 0)))
        _logger.info("engine: a block in %.1f µs by %s", micro, name(plan))
        return plan


def _early(plan: Plan) -> bool:
    return any(getattr(getattr(plan, stage), "pdl", False) for stage in STAGES)


def _relative(actual: Tensor, truth: Tensor) -> float:
    error = ((actual - truth).norm() / truth.norm().clamp(min=1e-30)).item()
    return float("inf") if error != error else error


def times_in_turns(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Median seconds of a replay of each, on a GPU that is warm, in turns."""
    started = time.perf_counter()
    while time.perf_counter() - started < WARM:
        for graph in graphs:
            graph.replay()
        torch.cuda.synchronize()
    rounds = [[replay_time(graph, ROUND_REPLAYS) for graph in graphs] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def graph_time(run: Callable[[], None], replays: int = REPLAYS) -> float:
    """Median seconds of `run` as a CUDA graph."""
    graph, _ = recorded(run)
    graph.replay()
    return statistics.median(replay_time(graph, 1) for _ in range(replays))


# The choices of earlier runs


@cache
def _sources() -> str:
    """A digest of the kernels, the candidates and what is kept of them: a plan of others proves
    nothing of these."""
    folder = Path(__file__).parents[1]
    parts = ("kernels/hopper/*.*", "kernels/fused/stream*.py", "sampling/engine_*.py")
    files = sorted(file for part in parts for file in folder.glob(part))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _key(network: Network) -> str:
    c = network.config
    rows = network.stream  # prompts of 1 to 32 tokens share a choice
    whole = rows.image == rows.image_rows  # without it no own writer fits (`product.suits`)
    shape = (rows.batch, rows.image_rows, whole, rows.sample_rows, network.segments.mask is None)
    model = (c.width, c.heads, c.groups, c.ffn_width, c.rule.name, min(c.depth, LAYERS))
    device = network.trunk.device
    version = (_sources(), torch.__version__, TRITON_VERSION, driver_version())
    name = torch.cuda.get_device_name(device)
    return json.dumps([name, version, str(network.trunk.dtype), model, shape])


def load_plan(network: Network, path: Path) -> Plan | None:
    """The choice of an earlier run at this shape on such a device; None if there is none."""
    fields = read_choices(path).get(_key(network))
    try:
        return None if fields is None else Plan.from_json(fields)
    except (AttributeError, KeyError, TypeError) as error:
        _logger.warning("engine: %s holds no plan (%r); it is measured anew", path, error)
        return None


def save_plan(network: Network, plan: Plan, path: Path) -> None:
    """Keeps a choice; where that cannot be, the next start measures again."""
    keep_choice(path, _key(network), plan.to_json())
