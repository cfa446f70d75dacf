"""What of the training step has no result yet, for docs/performance.md (`performance_page.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Found = dict[str, Any]


def not_run(graphs: Found) -> str:
    if "loads_per_layer" in graphs.get("thousand", {}):  # where blocks keep what they keep there
        graphs = {"per layer": graphs["thousand"], **graphs}
    lines = [name for stage, name in UNMEASURED.items() if not _has_result(graphs, stage)]
    if not lines:
        return ""
    text = "\n".join(f"- {line}" for line in lines)
    return f"## Not run\n\n`python benchmarks/step_gpu.py` measures, in fifteen minutes of an H200:\n\n{text}\n"  # noqa: E501


_WHOLE: dict[str, Callable[[Found], bool]] = {  # where a result may be of less than was asked for
    "step fp32": lambda found: "load" in found,
    "step split": lambda found: "load" in found,
    "recipe": lambda found: found["steps"] >= 1000,
    "thousand": lambda found: found["steps"] >= 30,
    "products at 1000 layers": lambda found: found["steps"] >= 30,
    "resume": lambda found: found["same"],
}
IN_CUDA = "CUDA C++"
BACKEND = "unit heads in CUDA C++, gradients by it"  # of `kernels/attention.py`
UNMEASURED = {
    "products": "the products with what follows them, by themselves (`ffn_products`)",
    "products in a block": "a block's kernels by kind with them (`step_classes`)",
    "products at 1000 layers": "30 steps of 1000 layers with them",
    "turned and masked": "a block with masked text whose gradients of attention go on to the "
    "projection",
    "cold start with products": "a cold start of 1000 layers in which they are compared first",
    "step fp32": "400 layers with fp32 weights and writers that are not zero",
    "thousand": "30 steps of 1000 layers in the preset's pieces of today",
    "step split": "the same with fp32 weights in two halves",
    "per layer": "seconds a layer at 1000 layers against 100",
    "recipe": "the loss of bf16 weights, with a second moment of one byte, against fp32 over 1,000 "
    "steps at 400 layers, D = 128",
    "rival gate": "whether the gradients of the rival under torch.compile are ours",
    "resume": "a resumed run that has the same bits, with sums in a fixed order",
    IN_CUDA: "a block whose attention, gradients too, is in CUDA C++ "
    "(`kernels/hopper/unit_heads.py`)",
}


def served(classes: Found, backend: str) -> Found:
    """The rows of step_classes in which an attention served: one that was refused or that lost was
    not run in a block."""
    rows = classes.get("rows", {})
    return {name: row for name, row in rows.items() if backend in row.get("attention_backend", [])}


def served_since(results: Iterable[Found], backend: str) -> str | None:
    """The date of the first of the results of step_classes in which it served."""
    return min((each["date"] for each in results if served(each, backend)), default=None)


def _has_result(graphs: Found, stage: str) -> bool:
    found = graphs.get(stage)
    if not found or not isinstance(found, dict) or "out_of_memory" in found:
        return False
    return _WHOLE.get(stage, lambda _: True)(found)
