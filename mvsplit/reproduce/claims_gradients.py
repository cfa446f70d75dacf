"""Claims about what the gradients do in a collapse: Fig. 6, Q/K extinction, App. F."""

from __future__ import annotations

from functools import partial

import numpy as np

from mvsplit.reproduce import understood
from mvsplit.reproduce.claim import (
    ATTENTION_ONLY,
    HEALTHY,
    PLAIN,
    Claim,
    Line,
    Panel,
    Values,
    curves,
    grouped,
    healthy,
    loss_panel,
    span,
    trial,
)
from mvsplit.reproduce.rule import Condition, Figure, at_least, below
from mvsplit.reproduce.runlog import Array, RunLog, Runs
from mvsplit.reproduce.sizes import Size
from mvsplit.reproduce.trial import Trial

WRITERS = {"W_O": "attn", "W_2": "ffn"}
COST = {
    "small": "3 runs of 7 minutes on a core, shared with `delayed`",
    "gpu": "3 runs of 3.6 to 3.7 minutes, six at a time, shared with `delayed`",
}
ON_DEMAND = (
    "The collapse is called up by a rise of the learning rate, and the baseline is the "
    "steps before it; the paper's came by itself."
)
COLLAPSED = at_least(
    "plain: collapsed", 1, 1, "Without a collapse there is nothing to look at.", needed=True
)


def plain_trials(size: Size) -> list[Trial]:
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
                paper=f"{'50' if writer == 'W_O' else '20'} or more, from the two above",
            )
        )
    return found


ENTRY_GAP = "plain: steps between looks on entry"
ENTRY_SEEN = below(
    ENTRY_GAP,
    3,
    3,
    "A spike lasts a step or two: of an entry that was not seen, no peak is known.",
    needed=True,
)


def _mode_rule() -> tuple[Condition, ...]:
    rule = [HEALTHY, COLLAPSED, ENTRY_SEEN]
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
    expect="G_mean up by one to two orders of magnitude. At the small size, of width 32 and 17 "
    "tokens, the ratio of T to √T is smaller than at the paper's width and 256 tokens.",
    limits=ON_DEMAND + " Norms over all layers together, at the looks that were taken.",
    passages=understood.MODES,
    cost=COST,
    trials=plain_trials,
    measure=lambda runs: [
        *_rises(runs),
        runs.figure(
            ENTRY_GAP,
            "at most, from the rise of the rate until tokens stay alike",
            "plain",
            lambda log: log.entry_gap,
        ),
        healthy(runs),
        *grouped(runs),
    ],
    rule=_mode_rule(),
    panels=lambda runs: [total_panel(runs, "W_O"), total_panel(runs, "W_2")],
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


def _extinction_remarks(values: Values) -> list[str]:
    return [
        f"The gradient of W_O falls as well, {span(values['fall of W_O'])} times. That of queries "
        f"falls {span(values['fall of queries over fall of W_O'])} times further, and this is what "
        "the rule asks; that the writer learns on as before is not shown."
    ]


EXTINCTION = Claim(
    name="extinction",
    title="Once all values are equal, queries and keys stop learning and the writer does not",
    source="Lemma 1, §1",
    says="The softmax Jacobian kills the constant vector: gradients of W_Q and W_K fall by about "
    "four orders of magnitude, that of W_O does not.",
    expect="Three to four orders of magnitude; it is what locks the collapse in.",
    limits=ON_DEMAND + " Norms of the deepest quarter of the layers.",
    passages=understood.EXTINCTION,
    cost=COST,
    trials=plain_trials,
    remarks=_extinction_remarks,
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
        COLLAPSED,
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
    limits=ON_DEMAND,
    passages=understood.ATTENTION,
    cost={
        "small": "6 runs of 0.5 to 1.2 minutes on a core, 3 of them shared with `delayed`",
        "gpu": "6 runs of 3.6 to 3.7 minutes, six at a time; 3 of them shared with `delayed`",
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
