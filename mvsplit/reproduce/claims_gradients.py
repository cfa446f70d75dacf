"""Claims about what the gradients do in a collapse: Fig. 6, Fig. 4, Q/K extinction, App. F."""

from __future__ import annotations

from functools import partial

import numpy as np

from mvsplit.reproduce.claim import (
    ATTENTION_ONLY,
    HEALTHY,
    PLAIN,
    Claim,
    Line,
    Panel,
    curves,
    grouped,
    healthy,
    loss_panel,
    rounded,
    trial,
)
from mvsplit.reproduce.rule import Condition, Figure, at_least, below
from mvsplit.reproduce.runlog import ALIKE, Array, RunLog, Runs
from mvsplit.reproduce.sizes import Size
from mvsplit.reproduce.trial import Trial

WRITERS = {"W_O": "attn", "W_2": "ffn"}
_COST = {
    "small": "3 runs of about a minute on a core, shared with `delayed`",
    "gpu": "3 runs of some minutes, shared with `delayed`",
}
_ON_DEMAND = (
    "The collapse is called up by a rise of the learning rate, and the baseline is the "
    "steps before it; the paper's came by itself."
)
_COLLAPSED = at_least(
    "plain: collapsed", 1, 1, "Without a collapse there is nothing to look at.", needed=True
)


def _plain_trials(size: Size) -> list[Trial]:
    return [trial(size, "jump", "plain", PLAIN, seed) for seed in size.seeds]


def total_panel(runs: Runs, writer: str, labels: tuple[str, ...] = ("plain",)) -> Panel:
    """G_mean and G_ctr of a writer over all layers (L2), by step."""
    lines: list[Line] = []
    for field, words in (("g_mean", "mean"), ("g_ctr", "centered")):
        name = f"{field}_{WRITERS[writer]}"

        def total(log: RunLog, name: str = name) -> tuple[Array, Array]:
            steps, values = log.looks(name)
            return steps, np.sqrt(np.square(values).sum(1))

        for line in curves(runs, total, labels):
            label = f"{line.label}, {words}" if len(labels) > 1 else words
            lines.append(Line(label=label, x=line.x, y=line.y, faint=line.faint))
    return Panel(
        title=f"gradient of {writer}, all layers", x="step", y="norm", lines=lines, log_y=True
    )


# Mean against centered writer gradients


def _rises(runs: Runs) -> list[Figure]:
    papers = {("W_O", "mean"): "≈155", ("W_2", "mean"): "≈61"}
    found = []
    for writer, end in WRITERS.items():
        for field, words in (("g_mean", "mean"), ("g_ctr", "ctr")):
            found.append(
                runs.figure(
                    f"{writer}: rise of G_{words}",
                    "peak after the rise of the rate over the median before",
                    "plain",
                    partial(RunLog.rise, name=f"{field}_{end}"),
                    papers.get((writer, words), "≈1–3"),
                )
            )
        mean, centered = found[-2:]
        values = {
            seed: a / b if (a := mean.values[seed]) is not None and (b := centered.values[seed])
            else None
            for seed in mean.values
        }  # fmt: skip
        found.append(
            Figure(
                name=f"{writer}: rise of G_mean over that of G_ctr",
                words="of the two above",
                values=values,
                paper="50 or more" if writer == "W_O" else "20 or more",
            )
        )
    return found


def _mode_rule() -> tuple[Condition, ...]:
    rule = [HEALTHY, _COLLAPSED]
    for writer, paper in (("W_O", 155), ("W_2", 61)):
        rule += [
            at_least(
                f"{writer}: rise of G_mean",
                paper // 5,
                5,
                f"A fifth of the paper's {paper} is still a spike; a rise of the rate may do up to "
                "5 by itself.",
            ),
            below(
                f"{writer}: rise of G_ctr",
                6,
                30,
                "The paper's 1–3, doubled; ten times the paper's is a spike of its own.",
            ),
            at_least(
                f"{writer}: rise of G_mean over that of G_ctr",
                10,
                2,
                "The claim is that one rises without the other: an order of magnitude.",
            ),
        ]
    return tuple(rule)


MODES = Claim(
    name="modes",
    title="In the collapse the mean-coherent writer gradient spikes and the centered one does not",
    source="Fig. 6, Eq. 5",
    says="On entry G_mean rises ≈155 times in W_O and ≈61 times in W_2, G_ctr only 1–3 times.",
    expect="G_mean up by one to two orders of magnitude. At width 32 with 17 tokens the ratio of "
    "T to √T is smaller than at the paper's width and 256 tokens.",
    limits=_ON_DEMAND + " Norms over all layers together, at the looks that were taken.",
    cost=_COST,
    trials=_plain_trials,
    measure=lambda runs: [*_rises(runs), healthy(runs), *grouped(runs)],
    rule=_mode_rule(),
    panels=lambda runs: [total_panel(runs, "W_O"), total_panel(runs, "W_2")],
)


# The alignment law

SLACK = 1.25  # magnitudes are not all equal, as the envelope assumes
MARGIN = 0.1


def _points(log: RunLog) -> tuple[Array, Array, Array]:
    """A − 1, (T − 1)κ̂ and the similarity of the layer's tokens, of both writers, every layer and
    every look. [N], [N], [N]."""
    parts = []
    for end in WRITERS.values():
        steps, amplification = log.looks(f"amplification_{end}")
        _, envelope = log.looks(f"envelope_{end}")
        _, similarity = log.looks("tcs")
        if len(steps):
            parts.append(np.stack([amplification - 1, envelope, similarity]).reshape(3, -1))
    joined = np.concatenate(parts, axis=1) if parts else np.empty((3, 0))
    excess, envelope, similarity = joined[:, np.isfinite(joined).all(0)]
    return excess, envelope, similarity


def _under(log: RunLog) -> float | None:
    excess, envelope, _ = _points(log)
    return float((excess <= SLACK * envelope + MARGIN).mean()) if len(excess) else None


def _tightness(log: RunLog) -> float | None:
    excess, envelope, similarity = _points(log)
    alike = (similarity >= ALIKE) & (envelope > 0)
    return float(np.median(excess[alike] / envelope[alike])) if alike.any() else None


def rank_correlation(x: Array, y: Array) -> float | None:
    """Spearman's, ties in order of appearance; None for fewer than three points."""
    if len(x) < 3:
        return None
    first, second = (
        np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (x, y)
    )
    return float(np.corrcoef(first, second)[0, 1])


def _alignment_panel(runs: Runs) -> Panel:
    log = runs.of("plain")[0]
    excess, envelope, similarity = _points(log)
    chosen = np.random.default_rng(0).permutation(np.flatnonzero((excess > 0) & (envelope > 0)))
    lines = []
    for label, mask in (
        ("tokens apart", similarity < ALIKE),
        ("tokens alike", similarity >= ALIKE),
    ):
        some = [i for i in chosen if mask[i]][:400]
        lines.append(
            Line(label=label, x=rounded(envelope[some]), y=rounded(excess[some]), points=True)
        )
    ends = [0.01, 20.0]
    lines.append(Line(label="A − 1 = (T − 1)κ̂", x=ends, y=ends))
    return Panel(
        title=f"alignment law, seed {log.seed}, a sample of its points",
        x="(T − 1)κ̂",
        y="A − 1",
        lines=lines,
        log_x=True,
        log_y=True,
    )


ALIGNMENT = Claim(
    name="alignment",
    title="The amplification of a writer gradient follows the alignment of its tokens",
    source="Fig. 4, Eq. 6, C.2",
    says="A − 1 = (T − 1)κ at equal magnitudes, and (T − 1)κ̂ is its upper envelope; on entry into "
    "the collapse A − 1 comes up to the envelope.",
    expect="Points under the envelope up to what unequal magnitudes allow, close to it where "
    "tokens are alike. Eq. 6 itself is an identity; what is tested is its reading.",
    limits=_ON_DEMAND + " Two samples a look.",
    cost=_COST,
    trials=_plain_trials,
    measure=lambda runs: [
        runs.figure(
            "points under the envelope",
            "share of A − 1 ≤ 1.25·(T − 1)κ̂ + 0.1 over writers, layers and looks",
            "plain",
            _under,
            "all",
        ),
        runs.figure(
            "A − 1 over the envelope, tokens alike",
            "median over the points with similarity of 0.95 or more",
            "plain",
            _tightness,
            "≈1",
        ),
        runs.figure(
            "rank correlation",
            "Spearman's, of A − 1 with (T − 1)κ̂ over all points",
            "plain",
            lambda log: rank_correlation(*_points(log)[:2]),
        ),
        healthy(runs),
        *grouped(runs),
    ],
    rule=(
        HEALTHY,
        _COLLAPSED,
        at_least(
            "points under the envelope",
            0.95,
            0.8,
            "An envelope has nearly everything under it; a quarter is left for magnitudes.",
        ),
        at_least(
            "A − 1 over the envelope, tokens alike",
            0.5,
            0.1,
            "Close to the envelope is within a factor of two, far from it is a tenth.",
        ),
        at_least(
            "rank correlation", 0.7, 0.3, "What follows a quantity is ordered as it is, mostly."
        ),
    ),
    panels=lambda runs: [_alignment_panel(runs)],
)


# Q/K extinction


def _fall(log: RunLog, name: str) -> float | None:
    return log.fall(name, log.record["jump"])


def _extinction_ratio(runs: Runs) -> Figure:
    def measure(log: RunLog) -> float | None:
        query, writer = _fall(log, "grad_query"), _fall(log, "grad_writer_attn")
        return query / writer if query is not None and writer else None

    return runs.figure(
        "fall of queries over fall of W_O",
        "the logits' gradient dies, the writer's does not",
        "plain",
        measure,
    )


def _families(runs: Runs) -> Panel:
    names = {"grad_query": "W_Q", "grad_key": "W_K", "grad_writer_attn": "W_O"}
    lines = [
        Line(label=label, x=line.x, y=line.y, faint=line.faint)
        for name, label in names.items()
        for line in curves(runs, partial(RunLog.column, name=name))
    ]
    return Panel(
        title="gradients of the deepest quarter", x="step", y="L2 norm", lines=lines, log_y=True
    )


EXTINCTION = Claim(
    name="extinction",
    title="Once all values are equal, queries and keys stop learning and the writer does not",
    source="Lemma 1, §1",
    says="The softmax Jacobian kills the constant vector: gradients of W_Q and W_K fall by about "
    "four orders of magnitude, that of W_O does not.",
    expect="Three to four orders of magnitude; it is what locks the collapse in.",
    limits=_ON_DEMAND + " Norms of the deepest quarter of the layers.",
    cost=_COST,
    trials=_plain_trials,
    measure=lambda runs: [
        *(
            runs.figure(
                f"fall of {words}",
                "median before the rise of the rate over that of the last fifth",
                "plain",
                partial(_fall, name=name),
                "≈10⁴" if name != "grad_writer_attn" else "",
            )
            for name, words in (
                ("grad_query", "queries"),
                ("grad_key", "keys"),
                ("grad_writer_attn", "W_O"),
            )
        ),
        _extinction_ratio(runs),
        healthy(runs),
        *grouped(runs),
    ],
    rule=(
        HEALTHY,
        _COLLAPSED,
        *(
            at_least(
                f"fall of {name}",
                1e3,
                10,
                "The paper's four orders of magnitude, less one for the size.",
            )
            for name in ("queries", "keys")
        ),
        at_least(
            "fall of queries over fall of W_O",
            30,
            3,
            "An extinction of all gradients alike would be something else.",
        ),
    ),
    panels=lambda runs: [_families(runs), loss_panel(runs)],
)


# Attention-only protection


def _attention_trials(size: Size) -> list[Trial]:
    return [
        trial(size, "jump", label, rule, seed)
        for seed in size.seeds
        for label, rule in (("plain", PLAIN), ("attention only", ATTENTION_ONLY))
    ]


def _where(log: RunLog) -> float | None:
    ffn, attention = log.peak("g_mean_ffn"), log.peak("g_mean_attn")
    return ffn / attention if ffn is not None and attention else None


def _shift(runs: Runs) -> Figure:
    plain = {log.seed: _where(log) for log in runs.of("plain")}
    values: dict[int, float | None] = {}
    for log in runs.of("attention only"):
        here, there = _where(log), plain.get(log.seed)
        values[log.seed] = here / there if here is not None and there else None
    return Figure(
        name="attention only over plain: peak of W_2 over W_O",
        words="how far the spike has moved",
        values=values,
    )


ATTENTION = Claim(
    name="attention-only",
    title="Protecting attention alone moves the spike to the FFN",
    source="App. F",
    says="With MV-Split after attention only, the spike of the mean-coherent gradient appears in "
    "W_2 instead of W_O.",
    expect="G_mean of W_2 rises as before or more, that of W_O stays small.",
    limits=_ON_DEMAND,
    cost={
        "small": "6 runs of about a minute on a core, 3 of them shared with `delayed`",
        "gpu": "6 runs of some minutes, 3 of them shared with `delayed`",
    },
    trials=_attention_trials,
    measure=lambda runs: [
        runs.figure(
            "plain: rise of G_mean in W_O",
            "peak after the rise of the rate over the median before",
            "plain",
            lambda log: log.rise("g_mean_attn"),
        ),
        runs.figure(
            "attention only: rise of G_mean in W_2",
            "the same",
            "attention only",
            lambda log: log.rise("g_mean_ffn"),
        ),
        runs.figure("attention only: peak of W_2 over W_O", "of G_mean", "attention only", _where),
        _shift(runs),
        healthy(runs),
        *grouped(runs),
    ],
    rule=(
        HEALTHY,
        at_least(
            "plain: rise of G_mean in W_O", 10, 5, "There has to be a spike to move.", needed=True
        ),
        at_least(
            "attention only: rise of G_mean in W_2", 10, 3, "A spike is an order of magnitude."
        ),
        at_least(
            "attention only: peak of W_2 over W_O", 10, 1, "It is in W_2 and no longer in W_O."
        ),
        at_least(
            "attention only over plain: peak of W_2 over W_O",
            5,
            1,
            "It has moved, against where it is without protection.",
        ),
    ),
    panels=lambda runs: [
        total_panel(runs, "W_O", ("plain", "attention only")),
        total_panel(runs, "W_2", ("plain", "attention only")),
    ],
)
