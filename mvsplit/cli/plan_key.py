"""What each line of `mvsplit plan` says, for its `--help`."""

from __future__ import annotations

import textwrap

MEMORY = {
    "weights": "of the network, as it is trained",
    "gradients": "as many as weights",
    "moments": "of AdamW, two for each weight",
    "average (EMA)": "of the weights, in fp32",
    "CUDA context": "what CUDA itself takes",
    "exchange": "room for what several GPUs send each other",
    "activations": "what the blocks keep for backward",
    "working memory": "of the one block that runs",
    "graph": "of the CUDA graph by which a piece is run",
}
TIME = {
    "matrix products": "of the blocks, forward and backward",
    "attention": "scores and values, forward and backward",
    "element-wise kernels": "merges, norms, rotation, SwiGLU, in products too",
    "casts of weights": "fp32 weights to bf16 and back",
    "recompute": "what backward computes again to save memory",
    "graph nodes": "between one kernel and the next",
    "waiting for launches": "the GPU waits for the CPU",
    "communication not hidden": "between GPUs, beyond what goes on beside other work",
    "optimiser": "AdamW and zeroing",
}
LEVELS = {
    "nothing": "all that backward needs is kept, which is fastest",
    "packed": "the product of w13",
    "attention": "that, queries, keys, values, attention and W_O",
    "trunk": "that, and a merge",
    "all": "the whole block, of which only the input is kept",
}
LAST_LINE = "what each line says, and which way is better: mvsplit plan --help"


def key() -> str:
    """The key, for people, at most 80 columns wide."""
    return "\n".join(
        _within(line)
        for line in (
            "What the lines say. Less is better of memory and time, more of tokens/s and MFU.",
            "",
            "  N × P pieces of S: N GPUs, each of which takes P times S samples before one update",
            "  memory of a GPU, GiB (2^30 bytes), at its peak:",
            *_rows(MEMORY),
            "    may be used: what the step may take; above it, it does not fit (exit status 1); "
            "with --recompute auto little is left, since what is free is kept, not computed again",
            "  time of a step, s: one update of a warm GPU, of the whole batch; share: of the step",
            *_rows(TIME),
            "  tokens/s: image and text tokens, padding too, of all GPUs together",
            "  MFU: share of the data sheet's FLOP/s that goes into the network's own arithmetic, "
            "6 for each parameter and token, and attention; nothing computed again counts",
            "  computed again in backward: how many blocks, and what of each:",
            *_rows(LEVELS),
            "  sent by each GPU: GB (10^9 bytes) a step; the seconds that takes, hidden or not",
            "  rates: where this GPU's figures are from, measured or of the data sheet",
            "  --json: the same in bytes and seconds",
        )
    )


def _within(line: str) -> str:
    depth = len(line) - len(line.lstrip())
    return textwrap.fill(line, 80, subsequent_indent=" " * (depth + 2), break_on_hyphens=False)


def _rows(meanings: dict[str, str]) -> list[str]:
    return [f"    {name}: {says}" for name, says in meanings.items()]
