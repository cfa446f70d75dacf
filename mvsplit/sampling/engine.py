"""The fast engine: a DiT's evaluation as one CUDA graph of few, fused kernels.

`Engine(model)` is called as the model is. For each shape it measures once how to do every stage of
a block (`engine_tune.py`), captures the whole evaluation, and replays it. It reads the weights where
they lie: weights that change in place (an optimiser's step, `load_state_dict`) need nothing, and
parameters or modules that are replaced are noticed, and captured anew.

What it cannot do it leaves to the model, and says so once:

| where | what runs |
|---|---|
| CUDA, bf16 or fp16, post-norm rule, no biases | fused kernels in one CUDA graph |
| CUDA otherwise: fp32, biases, Keel, pre-norm, sandwich, clips, no Triton | the model's own ops in one CUDA graph |
| CPU; gradients; autocast; hooks or replaced parts; CUDA graphs fail | the model itself |
"""  # noqa: E501

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from mvsplit.errors import UserError
from mvsplit.kernels.capture import recorded
from mvsplit.kernels.choices import choice_file
from mvsplit.kernels.dispatch import HAS_TRITON
from mvsplit.kernels.hopper.driver import check_waits, vain_waits
from mvsplit.models import Attention, Block, DiT, SwiGLU
from mvsplit.models.block import _is_a_plain_matrix, _is_just_gains, _is_watched

FUSED_DTYPES = (torch.bfloat16, torch.float16)
WORTH_TUNING = 100_000_000  # parameters; to measure takes longer than a few pictures of fewer
_Evaluation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_logger = logging.getLogger(__name__)


class Engine:
    """Evaluates a DiT as fast as this machine can; called as the model is.

    Its outputs are the model's up to rounding: products are rounded once, after what is fused to
    them, where the model rounds after every op.

    Args:
        model: on the device and in the dtype in which it is to run.
        graphs: how many shapes are kept; the one used longest ago makes room. A graph holds the
            buffers of one evaluation.
        tune: whether to measure, once for each shape and device, how to do each stage; None: where
            the model has 100 million parameters, or an earlier measurement is on disk. Others
            run by their own ops in a graph.
        cache: the file of choices; `engine.json` in $MVSPLIT_CACHE or the user's cache folder if
            None.
        say: told every choice once, in words; logged if None, as a warning where it is a slow one.

    Raises:
        UserError: no graph is to be kept.

    Attributes:
        model: the model.
        choice: in words, what ran last.
    """

    def __init__(
        self, model: DiT, *, graphs: int = 4, tune: bool | None = None, cache: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        if graphs < 1:
            raise UserError(f"graphs={graphs}: must be at least 1")
        self.model = model
        self.choice = "not run yet"
        self._most, self._cache = graphs, cache
        self._tune = sum(p.numel() for p in model.parameters()) >= WORTH_TUNING
        self._tune = self._tune if tune is None else tune
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._parts = _Parts(model)
        self._broken: str | None = None
        self._known: int | None = None  # `vain_waits` when nothing of ours was under way yet
        self._say, self._said = say or _log, set[str]()

    def __call__(self, latents: Tensor, text: Tensor, text_valid: Tensor | None = None) -> Tensor:
        """As `DiT.forward`: velocity [B, C, H, W]. Raises UserError as it does, and DriverError as
        `check`, of earlier calls."""
        self.check()
        obstacle = self._obstacle(latents, text)
        if obstacle is not None:
            self._announce(f"the model itself, because {obstacle}")
            return self.model(latents, text, text_valid)
        self.model._check(latents, text, text_valid)
        key = (latents.shape, latents.dtype, text.shape, text.dtype, text_valid is not None)
        if self._parts.changed():
            self._graphs.clear()
            self._parts = _Parts(self.model)
            self._announce("parts of the model were replaced: captured anew")
        if key not in self._graphs and not self._capture(key, latents, text, text_valid):
            return self.model(latents, text, text_valid)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        self._announce(graph.choice)
        self._known = vain_waits() if self._known is None else self._known
        return graph(latents, text, text_valid)

    def check(self) -> None:
        """Raises DriverError if kernels that have run since the last look waited in vain (a fault,
        or another process on the same GPU): velocities are wrong. It waits for nothing itself: to
        be called once more when the last velocity is there, as `generate` does."""
        known, self._known = self._known, None
        if known is not None:
            check_waits(known)

    def _obstacle(self, latents: Tensor, text: Tensor) -> str | None:
        """Why a graph of the model is not possible, if so."""
        elsewhere = self._is_elsewhere(latents)
        if elsewhere is not None:
            return elsewhere
        if self._broken is not None:
            return self._broken
        if torch.is_grad_enabled() and (
            latents.requires_grad or text.requires_grad or self._parts.learns()
        ):
            return "gradients are asked for (torch.no_grad() is missing)"
        if torch.is_autocast_enabled("cuda"):
            return "autocast is on"
        if _has_any_global_hook() or self._parts.watched():
            return "somebody watches its modules by hooks"
        return None

    def _is_elsewhere(self, latents: Tensor) -> str | None:
        if not latents.is_cuda:
            return f"it runs on a {latents.device.type}"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured around it"
        return None

    def _capture(self, key: tuple, latents: Tensor, text: Tensor, valid: Tensor | None) -> bool:
        """Captures the evaluation at a new shape; False, and said, where graphs do not work."""
        while len(self._graphs) >= self._most:
            self._graphs.popitem(last=False)
        started = time.perf_counter()
        try:
            with torch.no_grad(), _current(latents), _in_turn(latents.device):
                evaluation, choice = self._evaluation(latents, text, valid)
                graph = _Graph(evaluation, choice, latents, text, valid)
        except torch.OutOfMemoryError:  # a smaller batch may fit; the model itself would not
            self._graphs.clear()
            raise
        except RuntimeError as error:  # of the driver, of memory, of an op that cannot be captured
            self._broken = f"a CUDA graph could not be made: {str(error).splitlines()[0]}"
            self._announce(f"the model itself, because {self._broken}")
            return False
        self._graphs[key] = graph
        _logger.info("engine: ready in %.1f s", time.perf_counter() - started)
        return True

    def _evaluation(
        self, latents: Tensor, text: Tensor, valid: Tensor | None
    ) -> tuple[_Evaluation, str]:
        """How to evaluate at this shape, and that in words."""
        obstacle = "it draws clips" if latents.ndim == 5 else fused_obstacle(self.model)
        if obstacle is not None:
            return self.model, f"the model's own ops in one CUDA graph, because {obstacle}"
        from mvsplit.sampling.engine_apart import best_plan, left_out
        from mvsplit.sampling.engine_plan import Network
        from mvsplit.sampling.engine_tune import load_plan, save_plan

        path = self._cache or choice_file("engine")
        network = Network(self.model, latents, text, padded=valid is not None)
        plan = load_plan(network, path)
        if plan is not None and plan.without:
            self._tell(
                f"{left_out(plan.without)} (found before; without {path} they are tried anew)"
            )
        if plan is None and not self._tune:
            return self.model, "the model's own ops in one CUDA graph, because it is small"
        if plan is None:
            self._announce("measuring what is fastest at this shape")
            plan = best_plan(network, self._tell)
            if plan is None:
                return self.model, "the model's own ops in one CUDA graph: values are not finite"
            save_plan(network, plan, path)
        fixed = plan
        return lambda z, t, v: network(z, t, v, fixed), "fused kernels in one CUDA graph"

    def _announce(self, choice: str) -> None:
        """Says a choice, the first time that it is made."""
        self.choice = choice
        self._tell(choice)

    def _tell(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(what)


def _log(choice: str) -> None:
    slow = choice.startswith(("the model", "kernels in CUDA C++ are left out"))
    level = logging.WARNING if slow else logging.INFO
    _logger.log(level, "engine: %s", choice)


def accelerated(
    model: nn.Module | Engine, *, say: Callable[[str], None] | None = None
) -> nn.Module | Engine:
    """An engine for a DiT on CUDA, told to `say` what it chooses; anything else as it is, for which
    an engine gains nothing."""
    if isinstance(model, DiT) and next(model.parameters()).is_cuda:
        return Engine(model, say=say)
    return model


def fused_obstacle(model: DiT) -> str | None:
    """Why the fused kernels cannot do a model's blocks, if so."""
    if not HAS_TRITON:
        return "Triton is not installed (it comes with CUDA builds of torch)"
    if model.config.mean == "sequence":
        return "image and text have one mean together (model.mean)"
    dtype = next(model.parameters()).dtype
    if dtype not in FUSED_DTYPES:
        return f"its fused kernels take bf16 and fp16, not {dtype}"
    if any(p.dtype != dtype for p in model.parameters()):
        return "its parameters have several dtypes"
    for block in model.blocks:
        obstacle = _block_obstacle(block)
        if obstacle is not None:
            return obstacle
    return None


def _block_obstacle(block: nn.Module) -> str | None:
    if type(block) is not Block or not (
        type(block.attention) is Attention and type(block.ffn) is SwiGLU
    ):
        return f"a block is a {type(block).__name__} with parts of its own"
    if not all(map(_is_a_plain_matrix, block._matrices())):
        return "its projections have biases or were replaced"
    for rule in (block.rule_attention, block.rule_ffn):
        if not _is_just_gains(rule):
            return f"the rule {rule.config.name} is more than gains of a post-norm merge"
    return None


class _Parts:
    """The modules, parameters and hooks of a model, as they were, for a quick look at each call."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
        owned = [(m._parameters, name) for m in modules for name in m._parameters]
        self._tensors = [(d, n, d[n], _address(d[n])) for d, n in owned]
        self._modules = modules

    def changed(self) -> bool:
        """Whether a module or the memory of a parameter is another."""
        return any(d[n] is not p or _address(p) != at for d, n, p, at in self._tensors) or any(
            tuple(d.values()) != was for d, was in self._children
        )

    def learns(self) -> bool:
        return any(p is not None and p.requires_grad for _, _, p, _ in self._tensors)

    def watched(self) -> bool:
        return any(map(_is_watched, self._modules))


def _current(x: Tensor) -> AbstractContextManager:
    """Makes the device of a CUDA tensor the current one, on which kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _address(parameter: nn.Parameter | None) -> int:
    return 0 if parameter is None else parameter.data_ptr()


class _Graph:
    """One evaluation at one shape: static inputs and output, and the graph between them."""

    def __init__(
        self, evaluation: _Evaluation, choice: str, latents: Tensor, text: Tensor,
        valid: Tensor | None,
    ) -> None:  # fmt: skip
        self.choice = choice
        latents, text = latents.clone(), text.clone()
        valid = None if valid is None else valid.clone()
        self._inputs = (latents, text, valid)
        self._graph, self._output = recorded(lambda: evaluation(latents, text, valid))
        self._evaluation = evaluation  # holds the buffers that the graph uses

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        with _current(self._output), _in_turn(self._output.device):
            for static, given in zip(self._inputs, inputs, strict=True):
                if static is not None and given is not None:
                    static.copy_(given)
            self._graph.replay()
            return self._output.clone()


_turns: defaultdict[torch.device, threading.Lock] = defaultdict(threading.Lock)
_ends: dict[torch.device, torch.cuda.Event] = {}  # of the last engine's work on each device


@contextmanager
def _in_turn(device: torch.device) -> Iterator[None]:
    """Engines of this process take turns on a device, whatever streams and threads they are called
    from: blocks of a kernel wait for each other, and must all find room."""
    if device.type != "cuda":
        yield
        return
    with _turns[device]:
        stream = torch.cuda.current_stream(device)
        if device in _ends:
            stream.wait_event(_ends[device])
        yield
        _ends[device] = torch.cuda.Event()
        _ends[device].record(stream)
