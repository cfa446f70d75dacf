"""How large the runs of a claim are: two CPU cores, or one GPU.

Both sizes lie where earlier runs had shown a plain network to live or to die
(`benchmarks/results/recorded/`), so that a claim about a collapse meets one. The thresholds of the
rules come from the paper and not from these runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mvsplit.errors import UserError, nearest
from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import DataConfig, Experiment, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Regime:
    """A network without its rule, and a learning rate that is raised `factor` times after `jump`.

    Attributes:
        low: what the learning rate is multiplied by in the trials at a lower one.
        probe: the fields of a look, as `TrainConfig.probe` names them.
        look_every: steps between looks around the rise of the rate, from 20 before it to 40 after;
            0: those of `probe_every` are near enough.
    """

    depth: int
    width: int
    lr: float
    steps: int
    heads: int = 2
    batch_size: int = 16
    warmup: int = 10
    low: float = 0.25
    jump: int = 0
    factor: float = 1.0
    probe_every: int = 4
    probe: Literal["cheap", "writers", "all"] = "cheap"
    look_every: int = 0


@dataclass(frozen=True, kw_only=True)
class Size:
    """The regimes at one scale.

    Attributes:
        hardware: what it is meant for, in words.
        workers: runs side by side, if nobody says otherwise.
        seeds: of the claims of many short runs.
        few: of the claims whose runs are long.
        regimes: start: fatal to a plain network from the start; jump: calm until the rate rises;
            front: as deep as the paper's own (App. B); calm: a network that learns; thousand.
    """

    name: str
    hardware: str
    workers: int
    seeds: tuple[int, ...]
    few: tuple[int, ...]
    regimes: Mapping[str, Regime]
    dataset: str = "digits"
    picture: int | None = None
    channels: int = 1
    patch: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"

    def regime(self, name: str) -> Regime:
        """Raises UserError where this size has no such regime."""
        if name not in self.regimes:
            raise UserError(f"size {self.name!r} has no regime {name!r}")
        return self.regimes[name]

    def experiment(
        self,
        regime: Regime,
        rule: RuleConfig,
        seed: int,
        *,
        lr_factor: float = 1.0,
        clip: float = 1.0,
        writers: Literal["rule", "zero", "standard"] = "rule",
    ) -> Experiment:
        """What mvsplit.training makes of a trial."""
        model = DiTConfig(
            depth=regime.depth,
            width=regime.width,
            heads=regime.heads,
            ffn_width=3 * regime.width,
            channels=self.channels,
            patch=self.patch,
            text_width=regime.width,
            rule=rule,
            writers=writers,
        )
        train = TrainConfig(
            steps=regime.steps,
            batch_size=regime.batch_size,
            lr=regime.lr,
            lr_factor=lr_factor,
            warmup=regime.warmup,
            ema_decay=0.0,
            precision=self.precision,
            clip=clip,
            seed=seed,
            # On a GPU a run is over sooner than a save of its gigabytes is worth.
            save_every=max(regime.steps // (3 if self.device == "cpu" else 1), 1),
            keep=1,
            probe_every=regime.probe_every,
            probe=regime.probe,
            device=self.device,
        )
        data = DataConfig(dataset=self.dataset, size=self.picture)
        return Experiment(model=model, train=train, data=data)


_SMALL_START = Regime(depth=200, width=32, lr=4e-3, steps=100)
_GPU_START = Regime(
    depth=400, width=128, lr=1e-3, steps=300, batch_size=32, warmup=100, low=0.1, probe_every=50
)

SMALL = Size(
    name="small",
    hardware="two CPU cores; digits 8×8",
    workers=2,
    seeds=(0, 1, 2),
    few=(0, 1),
    regimes={
        "start": _SMALL_START,
        "jump": Regime(
            depth=64, width=32, lr=4e-4, steps=180, jump=100, factor=40, probe_every=2, probe="all"
        ),
        "front": Regime(depth=128, width=32, lr=1e-3, steps=80, probe_every=1),
        "calm": Regime(depth=48, width=32, lr=3e-3, steps=300, probe_every=50),
        "thousand": Regime(
            depth=1000, width=16, heads=1, lr=2e-3, steps=60, batch_size=8, probe_every=10
        ),
    },
)
GPU = Size(
    name="gpu",
    hardware="one H100 or H200, shared by several runs; coloured shapes 32×32, bf16",
    workers=4,
    seeds=(0, 1, 2),
    few=(0, 1, 2),
    dataset="shapes",
    picture=32,
    channels=3,
    patch=4,
    precision="bf16",
    device="cuda",
    regimes={
        "start": _GPU_START,
        "jump": replace(
            _GPU_START,
            lr=1e-4,
            steps=320,
            jump=160,
            factor=10,
            probe_every=20,
            probe="writers",
            look_every=2,
        ),
        "front": replace(_GPU_START, depth=128, steps=100, probe_every=5),
        "calm": replace(_GPU_START, depth=100, steps=600, probe_every=100),
        "thousand": replace(_GPU_START, depth=1000, steps=200, probe_every=100),
    },
)
SIZES = {size.name: size for size in (SMALL, GPU)}


def get_size(name: str) -> Size:
    """Raises UserError for an unknown one."""
    if name not in SIZES:
        raise UserError(f"size={name!r} is unknown: {nearest(name, SIZES)}")
    return SIZES[name]
