"""The corpus of recorded runs: which runs there are, what is done to them, and how they are read.

A `Run` is all that decides what is recorded; `corpus()` lists them. Which of them are held out is
those of `_unseen`: other depths, widths, seeds and learning rates, recorded once the detector was
done.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import DataConfig, Experiment, TrainConfig

FOLDER = Path(__file__).parent / "results" / "recorded"
MANIFEST = FOLDER / "manifest.json"

Deed = Literal["lr", "lr-once", "bad-batch", "lose-moments", "new-data"]


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """What is done to a run just before `step`.

    Attributes:
        deed: lr multiplies the learning rate from then on, lr-once for one step; bad-batch
            multiplies the pictures of one batch; lose-moments sets the optimiser's moments to zero,
            as a resume without them does; new-data moves the loader by `amount` samples.
    """

    deed: Deed
    step: int
    amount: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One recorded run, with a head for each 16 of its width."""

    name: str
    rule: RuleConfig
    depth: int
    width: int
    lr: float
    steps: int
    seed: int = 0
    warmup: int = 10
    writers: Literal["rule", "zero", "standard"] = "rule"
    dataset: str = "digits"
    size: int | None = None
    patch: int = 2
    batch_size: int = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    probe_every: int = 5
    dropout: float = 0.0
    interventions: tuple[Intervention, ...] = field(default=())

    @property
    def held_out(self) -> bool:
        """Whether it was recorded after the detector had been fixed."""
        return self.name.startswith("unseen-")

    def experiment(self) -> Experiment:
        """What mvsplit.training makes of it."""
        model = DiTConfig(
            depth=self.depth,
            width=self.width,
            heads=max(self.width // 16, 1),
            ffn_width=3 * self.width,
            channels=1 if self.dataset == "digits" else 3,
            patch=self.patch,
            text_width=self.width,
            rule=self.rule,
            writers=self.writers,
        )
        train = TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=self.warmup,
            ema_decay=0.0,
            precision=self.precision,
            seed=self.seed,
            caption_dropout=self.dropout,
            device="cpu",
        )
        return Experiment(
            model=model, train=train, data=DataConfig(dataset=self.dataset, size=self.size)
        )


PLAIN = RuleConfig(name="plain")
MVSPLIT = RuleConfig(name="mvsplit", beta=1.0)
SMALL_BETA = RuleConfig(name="mvsplit", beta=0.05)
LAYERSCALE = RuleConfig(name="layerscale", gamma=0.01)


def corpus() -> list[Run]:
    """Every run, in a fixed order."""
    return [*_plain(), *_fronts(), *_delayed(), *_stable(), *_disturbed(), *_unseen()]


def _plain() -> Iterator[Run]:
    """Plain networks from calm to fatal: depth, width, learning rate, precision, warm-up, seed."""
    for depth, width in ((32, 32), (64, 16), (64, 32), (64, 64), (128, 32), (200, 32)):
        for lr in (1e-3, 4e-3, 1.2e-2, 3e-2):
            steps = 140 if depth > 64 else 200
            name = f"plain-l{depth}-d{width}-lr{lr:g}"
            yield Run(name=name, rule=PLAIN, depth=depth, width=width, lr=lr, steps=steps)
    base: dict[str, Any] = {"rule": PLAIN, "depth": 64, "width": 32, "steps": 200}
    for seed in (1, 2, 3):
        yield Run(name=f"plain-l64-d32-lr0.016-seed{seed}", lr=1.6e-2, seed=seed, **base)
        yield Run(name=f"plain-l64-d32-lr0.0003-seed{seed}", lr=3e-4, seed=seed, **base)
    for lr in (1e-3, 1.6e-2):
        yield Run(name=f"plain-l64-d32-lr{lr:g}-bf16", lr=lr, precision="bf16", **base)
        yield Run(name=f"plain-l64-d32-lr{lr:g}-warmup100", lr=lr, warmup=100, **base)
        yield Run(name=f"plain-l64-d32-lr{lr:g}-dropout", lr=lr, dropout=0.1, **base)
    shapes = {"rule": PLAIN, "depth": 64, "width": 32, "dataset": "shapes", "size": 32, "patch": 4}
    for lr in (1e-3, 1.2e-2):
        yield Run(name=f"plain-shapes-lr{lr:g}", lr=lr, steps=150, **shapes)
    for lr in (4e-3, 1.6e-2):
        rule = RuleConfig(name="mvsplit-attention-only", beta=1.0)
        yield Run(name=f"attention-only-lr{lr:g}", lr=lr, **{**base, "rule": rule})


def _fronts() -> Iterator[Run]:
    """Writers that start at their standard size: the front of App. B."""
    for depth in (32, 64, 128, 200):
        for lr in (1e-3, 6e-3, 1.2e-2):
            yield Run(
                name=f"front-l{depth}-lr{lr:g}",
                rule=PLAIN,
                writers="standard",
                depth=depth,
                width=32,
                lr=lr,
                steps=120 if depth > 64 else 150,
            )


def _delayed() -> Iterator[Run]:
    """Healthy, then the learning rate jumps: the event of the paper, on demand."""
    for rule, label in ((PLAIN, "plain"), (MVSPLIT, "mvsplit"), (LAYERSCALE, "layerscale")):
        for factor in (10, 30, 80):
            for seed in (0, 1, 2):
                yield Run(
                    name=f"jump-{label}-x{factor}-seed{seed}",
                    rule=rule,
                    depth=64,
                    width=32,
                    lr=4e-4,
                    seed=seed,
                    steps=240,
                    interventions=(Intervention(deed="lr", step=140 + 9 * seed, amount=factor),),
                )
    for factor in (10, 30):
        yield Run(
            name=f"jump-plain-l128-x{factor}",
            rule=PLAIN,
            depth=128,
            width=32,
            lr=4e-4,
            steps=200,
            interventions=(Intervention(deed="lr", step=120, amount=factor),),
        )


def _stable() -> Iterator[Run]:
    """Every rule at learning rates at which it should learn."""
    rules = {
        "mvsplit": (MVSPLIT, 1e-3),
        "mvsplit-b0.05": (SMALL_BETA, 3e-3),
        "layerscale": (LAYERSCALE, 1e-3),
        "rezero": (RuleConfig(name="rezero"), 1e-3),
        "deepnorm": (RuleConfig(name="deepnorm"), 5e-4),
        "keel": (RuleConfig(name="keel"), 1e-3),
        "prenorm": (RuleConfig(name="prenorm"), 1e-3),
        "sandwich": (RuleConfig(name="sandwich"), 1e-3),
    }
    for label, (rule, lr) in rules.items():
        for seed in (0, 1):
            yield Run(
                name=f"stable-{label}-seed{seed}",
                rule=rule,
                depth=48,
                width=32,
                lr=lr,
                seed=seed,
                steps=200,
                warmup=20,
            )
    for rule, label in ((SMALL_BETA, "mvsplit-b0.05"), (LAYERSCALE, "layerscale")):
        yield Run(
            name=f"stable-{label}-long-warmup",
            rule=rule,
            depth=48,
            width=32,
            lr=3e-3,
            steps=200,
            warmup=150,
        )
        yield Run(
            name=f"stable-{label}-bf16",
            rule=rule,
            depth=48,
            width=32,
            lr=1e-3,
            steps=150,
            precision="bf16",
            dropout=0.1,
        )


def _disturbed() -> Iterator[Run]:
    """Healthy networks that something happens to."""
    deeds = {
        "bad-batch-x10": Intervention(deed="bad-batch", step=120, amount=10),
        "bad-batch-x100": Intervention(deed="bad-batch", step=90, amount=100),
        "lost-moments": Intervention(deed="lose-moments", step=110),
        "new-data": Intervention(deed="new-data", step=100, amount=801),
        "lr-blip-x10": Intervention(deed="lr-once", step=130, amount=10),
        "lr-x2": Intervention(deed="lr", step=120, amount=2),
        "lr-x0.1": Intervention(deed="lr", step=120, amount=0.1),
        "lr-x100": Intervention(deed="lr", step=120, amount=100),
    }
    for rule, lr, label in (
        (PLAIN, 5e-4, "plain"),
        (SMALL_BETA, 2e-3, "mvsplit-b0.05"),
        (LAYERSCALE, 1e-3, "layerscale"),
    ):
        for name, deed in deeds.items():
            yield Run(
                name=f"disturbed-{label}-{name}",
                rule=rule,
                depth=48,
                width=32,
                lr=lr,
                steps=180,
                interventions=(deed,),
            )


def _unseen() -> tuple[Run, ...]:
    """What the detector was not tuned on, small enough for a few minutes on one core."""
    return (*_unseen_plain(), *_unseen_fronts(), *_unseen_jumps(), *_unseen_batches())


def _unseen_plain() -> Iterator[Run]:
    for depth, width, lr, seed in (
        (48, 48, 2e-2, 5),
        (48, 48, 2e-3, 5),
        (80, 32, 1.3e-2, 6),
        (80, 32, 2.5e-2, 7),
        (80, 32, 2e-3, 6),
        (96, 16, 2e-2, 8),
        (96, 16, 5e-4, 8),
        (100, 32, 9e-3, 9),
        (100, 32, 1.4e-2, 10),
    ):
        yield Run(
            name=f"unseen-plain-l{depth}-d{width}-lr{lr:g}",
            rule=PLAIN,
            depth=depth,
            width=width,
            lr=lr,
            seed=seed,
            steps=130,
            warmup=15,
            probe_every=4,
        )


def _unseen_fronts() -> Iterator[Run]:
    for depth, lr in ((80, 4e-3), (100, 2e-3)):
        yield Run(
            name=f"unseen-front-l{depth}-lr{lr:g}",
            rule=PLAIN,
            writers="standard",
            depth=depth,
            width=32,
            lr=lr,
            seed=11,
            steps=100,
        )


def _unseen_jumps() -> Iterator[Run]:
    for rule, label, factor, seed in (
        (PLAIN, "plain", 40, 12),
        (PLAIN, "plain", 60, 13),
        (PLAIN, "plain", 6, 14),
        (LAYERSCALE, "layerscale", 70, 15),
        (LAYERSCALE, "layerscale", 15, 15),
        (MVSPLIT, "mvsplit", 50, 16),
        (MVSPLIT, "mvsplit", 6, 17),
        (SMALL_BETA, "mvsplit-b0.05", 60, 18),
    ):
        yield Run(
            name=f"unseen-jump-{label}-x{factor}",
            rule=rule,
            depth=72,
            width=32,
            lr=4e-4,
            seed=seed,
            steps=190,
            probe_every=8,
            interventions=(Intervention(deed="lr", step=100 + seed, amount=factor),),
        )


def _unseen_batches() -> Iterator[Run]:
    for name, lr, seed in (
        ("mvsplit", 2e-3, 19),
        ("layerscale", 2e-3, 20),
        ("deepnorm", 1e-3, 21),
        ("keel", 2e-3, 22),
        ("prenorm", 2e-3, 23),
        ("sandwich", 5e-4, 24),
        ("rezero", 2e-3, 25),
    ):
        deed = Intervention(deed="bad-batch", step=95, amount=seed)
        yield Run(
            name=f"unseen-{name}-bad-batch",
            rule=RuleConfig(name=name, beta=1.0),
            depth=40,
            width=32,
            lr=lr,
            seed=seed,
            steps=130,
            interventions=(deed,),
        )


def read_manifest(folder: Path = FOLDER) -> dict[str, Any]:
    """What was recorded, with the truth about each run."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def read_records(file: Path) -> list[dict[str, Any]]:
    """The lines of one recorded run, metrics and layers in the order in which they came."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
