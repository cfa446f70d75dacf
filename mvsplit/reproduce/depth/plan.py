"""What the depth bench compares: entries (a rule and where it starts), sizes, and single runs.

L layers, D width.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from mvsplit.errors import UserError, nearest
from mvsplit.models import DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.residuals.mvsplit import written_out
from mvsplit.training import DataConfig, Experiment, TrainConfig

Kind = Literal["mvsplit", "rival", "control", "candidate"]
HEAD_WIDTH = 32
TEXT_WIDTH = 64  # of the word embeddings, at every width
GRID = 2  # learning rates are 10^(k/GRID)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the comparison.

    Attributes:
        name: of its runs; the same name is the same line, whatever its label.
        label: for people.
        kind: mvsplit and candidate are settings of MV-Split, rival what they are compared with; a
            control is shown and compared with nothing.
        rule: the rule at a depth.
        warmup: what the size's warm-up is multiplied by.
        gain_lr: what the learning rate is multiplied by for the gains.
        writers: how W_O and W_2 start; as the rule says, if not given.
    """

    name: str
    label: str
    kind: Kind
    rule: Callable[[int], RuleConfig]
    warmup: float = 1.0
    gain_lr: float = 1.0
    writers: Literal["rule", "zero", "standard"] = "rule"

    def merge(self, depth: int) -> tuple[str, bool, bool, str]:
        """What decides how its merges begin: the rule, whether λ is tied to α, whether α is open,
        and how writers start. The gate of ensembles looks at one entry of each kind."""
        rule = written_out(self.rule(depth), depth)
        return rule.name, rule.tied_leak, bool(rule.alpha), self.writers


def fixed(name: str, **fields: float) -> Callable[[int], RuleConfig]:
    """A rule that starts alike at every depth."""
    config = RuleConfig(name=name, **fields)  # type: ignore[arg-type]
    return lambda depth: config


def root(depth: int) -> float:
    """1/√L, to four digits."""
    return float(f"{depth**-0.5:.4g}")


ENTRIES = (
    Entry(name="plain", label="plain", kind="rival", rule=fixed("plain")),
    Entry(name="mvsplit-1", label="MV-Split β=1", kind="mvsplit", rule=fixed("mvsplit", beta=1.0)),
    Entry(
        name="mvsplit-root",
        label="MV-Split β=1/√L",
        kind="mvsplit",
        rule=lambda depth: RuleConfig(name="mvsplit", beta=root(depth)),
    ),
    Entry(
        name="layerscale-0.01",
        label="LayerScale γ=0.01",
        kind="rival",
        rule=fixed("layerscale", gamma=0.01),
    ),
    Entry(
        name="layerscale-root",
        label="LayerScale γ=1/√L",
        kind="rival",
        rule=lambda depth: RuleConfig(name="layerscale", gamma=root(depth)),
    ),
    Entry(name="rezero", label="ReZero", kind="rival", rule=fixed("rezero")),
    Entry(name="deepnorm", label="DeepNorm", kind="rival", rule=fixed("deepnorm")),
    Entry(name="keel", label="Keel", kind="rival", rule=fixed("keel")),
    Entry(name="prenorm", label="pre-norm", kind="rival", rule=fixed("prenorm")),
    Entry(name="sandwich", label="sandwich", kind="rival", rule=fixed("sandwich")),
    Entry(
        name="attention-only",
        label="MV-Split on attention only",
        kind="control",
        rule=lambda depth: RuleConfig(name="mvsplit-attention-only", beta=root(depth)),
    ),
    Entry(name="hard-center", label="hard centering", kind="control", rule=fixed("hard-center")),
)


def _candidate(name: str, label: str, beta: float = 1.0, **changes: Any) -> Entry:
    """MV-Split with β = beta/√L and one thing else; fields of the rule may be "root" for 1/√L."""
    of_entry = {k: changes.pop(k) for k in ("warmup", "gain_lr", "writers") if k in changes}

    def rule(depth: int) -> RuleConfig:
        fields: dict[str, Any] = {k: root(depth) if v == "root" else v for k, v in changes.items()}
        return RuleConfig(name="mvsplit", beta=float(f"{beta * depth**-0.5:.4g}"), **fields)

    return Entry(name=name, label=f"MV-Split {label}", kind="candidate", rule=rule, **of_entry)


CANDIDATES = (
    _candidate("beta-4", "β=4/√L", beta=4.0),
    _candidate("beta-quarter", "β=0.25/√L", beta=0.25),
    _candidate("gain-lr-10", "gains × 10 faster", gain_lr=10.0),
    _candidate("gain-lr-0.1", "gains × 10 slower", gain_lr=0.1),
    _candidate("alpha", "α=β=1/√L", alpha="root"),
    _candidate("alpha-free", "α=β=1/√L, λ free from 0", alpha="root", tied_leak=False),
    _candidate("free", "λ free from 0", tied_leak=False),
    _candidate("standard", "β=1/√L, writers standard", writers="standard"),
    _candidate("alpha-standard", "α=β=1/√L, writers standard", alpha="root", writers="standard"),
    _candidate("warm-3", "warm-up × 3", warmup=3.0),
    _candidate("eps-1e-6", "ε=1e-6", eps=1e-6),
    _candidate("eps-1e-3", "ε=1e-3", eps=1e-3),
)


@dataclass(frozen=True, kw_only=True)
class BenchSize:
    """How large the runs of the bench are.

    Attributes:
        hardware: what it is meant for, in words.
        workers: runs side by side, if nobody says otherwise.
        depths: swept whole, the last of them only around the best rates of the one before it.
        steps, warmup: of every run.
        rates: the coarse sweep; it is carried on where the best lies at an end.
        seeds: the first is that of the sweep.
        shapes: (L, D) with the same number of parameters as the first of them.
        validation: held-out samples of the validation loss.
        pictures: drawn for the task scores, in `drawing` steps.
        probes: looks into every layer.
        room: of L × D of all runs at a time together, for the device's memory.
        like: the size of whose gate and times this one has the networks and the device.
    """

    name: str
    hardware: str
    workers: int
    depths: tuple[int, ...]
    width: int
    steps: int
    warmup: int
    batch_size: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    patch: int
    validation: int
    pictures: int
    drawing: int
    probes: int
    room: int
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "cpu"
    like: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchRun:
    """One run: an entry at a shape, a learning rate and a seed."""

    entry: Entry
    depth: int
    width: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its row."""
        shape = f"{self.depth}x{self.width}"
        return f"{self.entry.name}-{shape}-lr{self.rate:.1e}-seed{self.seed}"

    def experiment(self, size: BenchSize) -> Experiment:
        """What mvsplit.training makes of it."""
        model = DiTConfig(
            depth=self.depth,
            width=self.width,
            heads=max(self.width // HEAD_WIDTH, 1),
            ffn_width=3 * self.width,
            channels=3,
            patch=size.patch,
            text_width=TEXT_WIDTH,
            rule=self.entry.rule(self.depth),
            writers=self.entry.writers,
        )
        train = TrainConfig(
            steps=size.steps,
            batch_size=size.batch_size,
            lr=self.rate,
            warmup=round(size.warmup * self.entry.warmup),
            gain_lr=self.entry.gain_lr,
            ema_decay=0.0,
            precision=size.precision,
            seed=self.seed,
            save_every=size.steps if size.device == "cuda" else max(size.steps // 4, 1),
            keep=1,
            probe_every=max(size.steps // size.probes, 1),
            probe_burst=0,
            device=size.device,
        )
        return Experiment(model=model, train=train, data=DataConfig(dataset="shapes", size=32))


def grid_rate(step: int) -> float:
    """10^(step/GRID), to two digits: 1e-3, 3.2e-3, 1e-2, …"""
    return float(f"{10 ** (step / GRID):.1e}")


def neighbour(rate: float, step: int) -> float:
    """The rate of the grid that lies `step` places above `rate`."""
    return grid_rate(place(rate) + step)


def place(rate: float) -> int:
    """k of the rate 10^(k/GRID) of the grid."""
    return round(GRID * math.log10(rate))


SMALL = BenchSize(
    name="small",
    hardware="two CPU cores; coloured shapes 32×32, fp32",
    workers=2,
    depths=(4, 16, 64),
    width=48,
    steps=150,
    warmup=15,
    batch_size=4,
    rates=(1e-3, 3.2e-3, 1e-2),
    seeds=(0, 1, 2),
    shapes=((16, 48), (4, 96)),
    patch=4,
    validation=48,
    pictures=24,
    drawing=4,
    probes=3,
    room=2 * 64 * 48,
)
GPU = BenchSize(
    name="gpu",
    hardware="H200, each shared by several runs; coloured shapes 32×32, bf16",
    workers=8,
    depths=(100, 400, 1000),
    width=64,
    steps=200,
    warmup=20,
    batch_size=32,
    rates=(1e-3, 3.2e-3, 1e-2),
    seeds=(0, 1, 2),
    shapes=((400, 64), (100, 128), (25, 256)),
    patch=4,
    validation=256,
    pictures=48,
    drawing=6,
    probes=2,
    room=8 * 400 * 64,
    precision="bf16",
    device="cuda",
)
LONG = replace(
    GPU, name="gpu-long", depths=(100, 400), steps=1000, warmup=100, shapes=(), like="gpu"
)
SIZES = {size.name: size for size in (SMALL, GPU, LONG)}


def get_size(name: str) -> BenchSize:
    """Raises UserError for an unknown one."""
    if name not in SIZES:
        raise UserError(f"size={name!r} is unknown: {nearest(name, SIZES)}")
    return SIZES[name]


def get_entries(names: list[str]) -> list[Entry]:
    """Entries by name; "all" and "candidates" stand for several. Raises UserError for an unknown
    one."""
    groups = {"all": [*ENTRIES], "candidates": [*CANDIDATES]}
    known = {entry.name: [entry] for entry in (*ENTRIES, *CANDIDATES)} | groups
    for name in names:
        if name not in known:
            raise UserError(f"entry={name!r} is unknown: {nearest(name, known)}")
    return list({e.name: e for name in names for e in known[name]}.values())


def get_run(name: str) -> BenchRun:
    """The run of a name as rows have it.

    Raises:
        UserError: it is none, and which of its parts is not as it must be.
    """
    found = _RUN.fullmatch(name)
    if found is None:
        raise UserError(
            f"run={name!r}: must be ENTRY-LAYERSxWIDTH-lrRATE-seedSEED, rates as 1.0e-03, {_LIKE}"
        )
    for part, (pattern, form) in _FORMS.items():
        if not re.fullmatch(pattern, found[part]):
            raise UserError(f"run={name!r}: {part}={found[part]!r} must be {form}, {_LIKE}")
    (known,) = get_entries([found["entry"]])
    shape = {"depth": int(found["layers"]), "width": int(found["width"])}
    return BenchRun(entry=known, **shape, rate=float(found["rate"]), seed=int(found["seed"]))


_RUN = re.compile(
    r"(?P<entry>.+)-(?P<layers>[^-]*)x(?P<width>[^-]*)-lr(?P<rate>.*)-seed(?P<seed>.*)"
)
_FORMS = {  # of its parts, for the eye too
    "layers": (r"[1-9]\d*", "a whole number from 1"),
    "width": (r"[1-9]\d*", "a whole number from 1"),
    "rate": (r"\d\.\de-\d\d", "of the form 1.0e-03"),
    "seed": (r"0|[1-9]\d*", "a whole number from 0"),
}
_LIKE = "as in mvsplit-root-400x64-lr1.0e-03-seed0"


def share(entries: list[Entry], part: int, parts: int) -> list[Entry]:
    """The entries that process `part` of `parts` runs: always the same ones for the same names, and
    whole entries, for what is run next depends on what the runs before it gave.

    Raises:
        UserError: there is no such part.
    """
    if not 0 <= part < parts:
        raise UserError(f"part={part}/{parts}: K of K/N must be from 0 to {parts - 1}")
    ordered = sorted(entries, key=lambda entry: zlib.crc32(entry.name.encode()))
    return [entry for entry in entries if ordered.index(entry) % parts == part]
