"""Named experiments, one row each."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import replace

from mvsplit.errors import UserError, nearest
from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.residuals.mvsplit import written_out
from mvsplit.training import DataConfig, Experiment, TrainConfig

# β = 1/√L, and α = 0 as in the paper: what the pages say of these presets was measured with it.
_SHALLOW = RuleConfig(name="mvsplit", alpha=0.0)
_GAINS = (
    "β and α: where MV-Split's gains start. The deep presets repeat the paper's start, with its "
    "low learning rate. The library's default, taken from the depth bench at higher ones, is "
    "β = α = 1/√L with W_O and W_2 of standard size, not zeros: --model.rule.beta None "
    "--model.rule.alpha None (README, Where β and α start)."
)
_DIGITS = DataConfig(dataset="digits")
_TINY = DiTConfig(
    depth=4,
    width=32,
    heads=2,
    ffn_width=96,
    channels=1,
    patch=2,
    text_width=32,
    rule=_SHALLOW,
)


def _digits_400l(rule: RuleConfig) -> Experiment:
    """400 layers on the real digits, small enough for two CPU cores: 16 image tokens and a word.

    The paper's event in minutes: at this learning rate the plain network is dead by step 40,
    and MV-Split draws digits after 240. A batch of 32 learns more in the same time than one of 16.
    """
    return Experiment(
        model=DiTConfig(
            depth=400,
            width=32,
            heads=2,
            ffn_width=96,
            channels=1,
            patch=2,
            text_width=32,
            rule=rule,
        ),
        data=_DIGITS,
        train=TrainConfig(
            steps=240,
            batch_size=32,
            lr=3e-3,
            warmup=10,
            ema_decay=0.95,
            save_every=50,
            probe_every=10,
        ),
    )


def _paper(depth: int, beta: float) -> Experiment:
    """The paper's network and recipe (§3–4), 13.6 M parameters a layer, on rendered shapes of
    64×64 in patches of 4×4: 256 image tokens, as many as its latents of 256×256 pictures have."""
    return Experiment(
        model=DiTConfig(
            depth=depth,
            width=1024,
            heads=8,
            ffn_width=3072,
            channels=3,
            patch=4,
            text_width=1024,
            rule=RuleConfig(name="mvsplit", beta=beta, alpha=0.0),
        ),
        data=DataConfig(dataset="shapes", size=64),
        train=TrainConfig(
            steps=100_000,
            batch_size=1024,
            accumulate=32,
            warmup=1000,
            precision="bf16",
            sample_shift=4.0,  # paper §5
        ),
    )


def _one_h200(depth: int, beta: float, samples: int, pieces: int) -> Experiment:
    """The paper's network on a single GPU of 141 GB: 6 bytes a parameter, no average of the
    weights. Captions make up to 288 tokens a sample. At 1000 layers pieces of 16 samples cost 6 %
    a token more than those of 29 where nothing is computed again; but more of what they keep has
    room, which pays that back and a little more (benchmarks/step_classes.py, `mvsplit plan`)."""
    paper = _paper(depth, beta)
    return replace(
        paper,
        train=replace(
            paper.train,
            batch_size=samples * pieces,
            accumulate=pieces,
            weights="bf16",
            ema_decay=0.0,
        ),
    )


PRESETS: dict[str, Experiment] = {
    # 40 steps in a few seconds on a laptop; the first thing to run.
    "tiny": Experiment(
        model=_TINY,
        data=_DIGITS,
        train=TrainConfig(
            steps=40,
            batch_size=64,
            lr=1e-2,
            warmup=5,
            ema_decay=0.95,
            save_every=20,
            probe_every=10,
        ),
    ),
    # The demo's twins: the same seed and data, one collapses, the other learns.
    "digits-400l-plain": _digits_400l(RuleConfig(name="plain")),
    "digits-400l-mvsplit": _digits_400l(RuleConfig(name="mvsplit", beta=0.05, alpha=0.0)),
    # Coloured shapes with captions, minutes on a GPU, hours on a CPU.
    "shapes-12l": Experiment(
        model=DiTConfig(
            depth=12,
            width=128,
            heads=4,
            ffn_width=384,
            channels=3,
            patch=4,
            text_width=128,
            rule=_SHALLOW,
        ),
        data=DataConfig(dataset="shapes", size=32),
        train=TrainConfig(
            steps=20_000,
            batch_size=64,
            lr=1e-3,
            warmup=200,
            ema_decay=0.999,
            save_every=1000,
            sample_shift=2.0,  # docs/samplers.md
        ),
    ),
    # One moving shape with its caption, 8 frames of 32×32: a few minutes on two cores.
    "clips-tiny": Experiment(
        model=DiTConfig(
            depth=4,
            width=96,  # as many as a patch has values: the velocity has to pass through it
            heads=4,
            ffn_width=288,
            channels=3,
            patch=4,
            patch_frames=2,
            text_width=64,
            rule=_SHALLOW,
        ),
        data=DataConfig(dataset="clips", size=32, frames=8, motions=("move",)),
        train=TrainConfig(
            steps=1500,
            batch_size=16,
            lr=4e-3,
            warmup=50,
            ema_decay=0.99,
            save_every=500,
            sample_shift=2.0,
        ),
    ),
    # All motions, in patches of 4×4 pixels of one frame: minutes on a GPU.
    "clips-12l": Experiment(
        model=DiTConfig(
            depth=12,
            width=256,
            heads=8,
            ffn_width=768,
            channels=3,
            patch=4,
            text_width=256,
            rule=_SHALLOW,
        ),
        data=DataConfig(dataset="clips", size=32, frames=8),
        train=TrainConfig(
            steps=6_000,
            batch_size=64,
            lr=2e-3,
            warmup=200,
            ema_decay=0.998,
            precision="bf16",
            save_every=1000,
            sample_shift=2.0,
        ),
    ),
    # One's own pictures, from the cache of `mvsplit encode` that data.path names. The widths are
    # those of the FLUX.2 autoencoder and of Qwen3-0.6B.
    "pictures": Experiment(
        model=DiTConfig(
            depth=12,
            width=128,
            heads=4,
            ffn_width=384,
            channels=128,
            text_width=1024,
            rule=_SHALLOW,
        ),
        data=DataConfig(dataset="cache"),
        train=TrainConfig(
            steps=20_000, batch_size=64, lr=1e-3, warmup=200, ema_decay=0.999, save_every=1000
        ),
    ),
    "mvsplit-400l": _paper(400, beta=1.0),
    "mvsplit-1000l": _paper(1000, beta=0.03),
    "mvsplit-400l-h200": _one_h200(400, beta=1.0, samples=24, pieces=11),
    "mvsplit-1000l-h200": _one_h200(1000, beta=0.03, samples=16, pieces=16),
}


def get_preset(name: str) -> Experiment:
    """The experiment called `name`. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"preset={name!r} is unknown: {nearest(name, PRESETS)}")
    return PRESETS[name]


def list_presets() -> str:
    """For each preset its name, its network, and what it is trained on for how long, folded to the
    terminal; then why their gains start where they do."""
    width, indent = shutil.get_terminal_size().columns, " " * 22
    rows = []
    for name, e in PRESETS.items():
        network = f"{e.model.depth} layers of width {e.model.width}, {_rule(e.model)}"
        course = f"{e.train.steps:,} steps of {e.train.batch_size}, {e.data.dataset}"
        row = f"  {name:<20}{network}; {course}"
        rows += textwrap.wrap(row, width, subsequent_indent=indent, break_on_hyphens=False)
    wrapped = textwrap.wrap(_GAINS, width - 2, break_on_hyphens=False)
    gains = textwrap.indent("\n".join(wrapped), "  ")
    return "\n".join((*rows, "", gains))


def _rule(model: DiTConfig) -> str:
    """Its name, and β and α at the start where it has them."""
    rule = written_out(model.rule, model.depth)
    if rule.beta is None or rule.alpha is None:
        return rule.name
    return f"{rule.name} β={rule.beta:.2g} α={rule.alpha:.2g}"
