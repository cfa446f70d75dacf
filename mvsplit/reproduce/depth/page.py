"""The bench's page in Markdown, with its pictures, from the rows that lie beside it.

FOLDER/depth-bench.md and FOLDER/depth-bench-*.png are drawn from FOLDER/results/depth-bench/*.json
and from nothing else, so that they can be written again without a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvsplit.data.atomic import write_atomically
from mvsplit.errors import UserError
from mvsplit.reproduce.depth.conclusion import OURS, RIVALS, SERVED, in_short
from mvsplit.reproduce.depth.page_parts import (
    best_table,
    both_ways,
    collapse_table,
    dead_words,
    rate_table,
    shape_table,
    timing_table,
)
from mvsplit.reproduce.depth.plan import CANDIDATES, ENTRIES, SIZES, BenchSize, get_entries
from mvsplit.reproduce.depth.plot import save_best, save_rates, save_seconds
from mvsplit.reproduce.depth.table import Cell, cells, for_verdict
from mvsplit.reproduce.depth.understood import understood
from mvsplit.reproduce.depth.verdict import (
    ERRORS,
    RULE,
    SEEDS,
    TIE,
    Losses,
    against_rivals,
    best,
    compare,
    new_defaults,
    rule_sha256,
)

NAME = "depth-bench"
RESULTS = "results/depth-bench"
_DECIDED = (
    "The rule did not set today's default: a decision of 2026-11-30 did, after the rows and with "
    "them in sight ([why, and what speaks against it](#understood-so-far)). What the rule gives "
    "is shown below as before.\n"
)
AGAIN = "-again"  # behind a size's name: other rows of runs of which one counts
_SCALE = ("batch_size", "steps")  # of the sizes, for the page's head
HEAD = """# The depth bench: every rule at its own learning rate

    mvsplit bench depth_bench --size small --out runs/depth-bench

The paper compares three stabilisers at one learning rate, without repeats. Here each rule of the
registry has a sweep of its own, with the same data, steps and network, and what is best is repeated
with other seeds. Settings of MV-Split that are not the paper's stand among them.

**Names.** Behind MV-Split stands where its gains start. β = 1/√L alone leaves the rest as in the
paper: α = 0, and the last matrices of both branches, W_O and W_2, the *writers*, are zeros. α=β
opens the gain of the mean as well; *writers standard* starts W_O and W_2 as all other matrices
start. γ is LayerScale's, λ = α wherever there is a λ.
[How each is asked for](../your-own-transformer.md#starts-by-name), in your own network and in
`mvsplit train`.

**What is measured.** Captioned shapes of 32×32 pixels. Validation loss: on samples that no
training sees, at fixed noise and times ([evaluation](../evaluation.md)). A run *lives* if it stays
finite and this loss ends below 0.8 of the token floor, the loss of a network that answers all
tokens alike.
Tasks: GenEval's six and the Fréchet distance of [the exact reader](../evaluation.md), guidance 2.
Figures are means ± one standard deviation over seeds; **1 seed** and **2 seeds** mark those that
no verdict counts.

**Not covered.** Toy pictures, narrow networks, batches of {batches} and {steps} steps, where the
paper trains 100,000: who is ahead after so few need not be ahead later, and a collapse that comes
later is not seen. Only the learning rate is swept: warm-up, decay and clipping are the same for
all. The best rate is chosen by the same held-out samples that it is judged by, and the seed that
chose it is one of those that count, for every entry alike. Two standard errors of three seeds are
little: of two entries that do not differ, one is ahead by that much in one comparison of nine (t,
four degrees of freedom), in fewer by 3% as well. Rivals with fewer seeds are not compared with,
whatever their loss.
"""


def keep_rows(
    size: BenchSize, rule: Mapping[str, str], rows: Sequence[Mapping[str, Any]], folder: Path
) -> Path:
    """Adds rows to those that the page of `folder` is drawn from, one row a line; the rule keeps
    its earliest date. Of several rows of a run one counts (`_rank`), and all the others are kept in
    SIZE-again.json, whatever the order in which they come; a row that is there already adds
    nothing."""
    path, beside = (folder / RESULTS / f"{size.name}{end}.json" for end in ("", AGAIN))
    there, again = _there(path, rule), _there(beside, rule)
    by_run: dict[str, list[Mapping[str, Any]]] = {}
    for row in [*there["rows"], *again["rows"], *rows]:
        found = by_run.setdefault(row["run"], [])
        if row not in found:
            found.append(row)
    first = min((there["rule"], rule), key=lambda each: each["written"])
    counts, others = [], []
    for name in sorted(by_run):
        one = max(by_run[name], key=_rank)  # the first of equals, so that what counts stays
        counts.append(one)
        others += [row for row in by_run[name] if row is not one]
    _write_rows(path, size, first, counts)
    if others:
        _write_rows(beside, size, first, others)
    return path


def _there(path: Path, rule: Mapping[str, str]) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {"rule": rule, "rows": []}


def _rank(row: Mapping[str, Any]) -> tuple[bool, str]:
    """Of the rows of a run the greatest counts: one alone before one from an ensemble (and be it of
    a single network), then the later. Rows made before rows had dates are taken to be older than
    those that have one."""
    return "together" not in row, row.get("date", "")


def _write_rows(
    path: Path, size: BenchSize, rule: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    lines = ",\n".join(map(json.dumps, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    head = f'"size": {json.dumps(size.name)},\n"rule": {json.dumps(rule)},\n'
    write_atomically(path, f'{{{head}"rows": [\n{lines}\n]}}\n')


def write_page(folder: Path | str) -> Path:
    """Writes the page and its pictures.

    Raises:
        UserError: there is no result to write them from.
    """
    folder = Path(folder)
    sizes = [size for size in SIZES.values() if (folder / RESULTS / f"{size.name}.json").exists()]
    if not sizes:
        raise UserError(
            f"{folder / RESULTS} holds no rows of the bench; run it: mvsplit bench "
            f"depth_bench --pages {folder}"
        )
    known = {
        name: " or ".join(str(value) for value in dict.fromkeys(getattr(s, name) for s in sizes))
        for name in _SCALE
    }
    head = HEAD.format(batches=known["batch_size"], steps=known["steps"])
    results = [_found(folder, size.name) for size in sizes]
    every = [*ENTRIES, *CANDIDATES]
    together = [(s, cells(s, every, r["rows"])) for s, r in zip(sizes, results, strict=True)]
    parts = [
        head,
        *in_short(together),
        "## The rule of the verdicts\n",
        *_quoted(RULE),
        "",
        _DECIDED,
    ]
    for size, result in zip(sizes, results, strict=True):
        parts += _of_size(size, result, folder)
    parts += understood(folder / RESULTS)
    parts.append(
        f"Written by `python benchmarks/depth_bench.py --draw --pages FOLDER` from `{RESULTS}/`."
    )
    page = folder / f"{NAME}.md"
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return page


def _quoted(text: str) -> list[str]:
    return [f"> {line}" for line in text.splitlines()]


def _of_size(size: BenchSize, result: Mapping[str, Any], folder: Path) -> list[str]:
    measured = size.like or size.name  # where its gate and times are from
    timing = _found(folder, f"timing-{measured}")
    main, other = (cells(size, entries, result["rows"]) for entries in (ENTRIES, CANDIDATES))
    # Of other widths only the table of shapes knows.
    here, tried = ([c for c in found if c.width == size.width] for found in (main, other))
    whole = {cell.entry.name for cell in tried if cell.swept}  # at one depth at least
    save_rates(
        [*here, *(cell for cell in tried if cell.entry.name in whole)],
        size,
        folder / f"{NAME}-{size.name}-rates.png",
    )
    here += tried
    save_best(here, size, folder / f"{NAME}-{size.name}-best.png")
    seeds = len({row["seed"] for row in result["rows"]})
    device = sorted({f"{row['device']}, torch {row['torch']}" for row in result["rows"]})
    parts = [
        f"## {size.name}: {size.hardware}\n",
        f"{len(result['rows'])} runs, {seeds} seed{'s' if seeds > 1 else ''} at most, "
        f"{size.steps} steps of {size.batch_size} samples, {size.warmup} of them warm-up, width "
        f"{size.width}; {'; '.join(device)}.{_together(result['rows'], size)} The rule was noted "
        f"{result['rule']['written']}, before the first of the runs{_changed(result)}.\n",
        *verdict_words(size, [*main, *other]),
        f"![Best losses with their spread]({NAME}-{size.name}-best.png)\n",
        dead_words(size, here) + "\n",
        f"![Loss against learning rate]({NAME}-{size.name}-rates.png)\n",
    ]
    for depth in size.depths:
        parts += best_table(depth, size, here, timing)
    parts += rate_table(size, here)
    parts += collapse_table(result["rows"])
    gate, again = (_found(folder, name) for name in (f"gate-{measured}", f"{size.name}{AGAIN}"))
    parts += both_ways(gate, result["rows"], again.get("rows", []))
    parts += shape_table(size, [*main, *other], timing)
    if timing and size.like is None:
        save_seconds(timing, folder / f"{NAME}-{size.name}-seconds.png")
        parts += timing_table(timing, size, f"{NAME}-{size.name}-seconds.png")
    parts += missing(size, [*main, *other])
    return parts


def _found(folder: Path, name: str) -> dict[str, Any]:
    """What a file beside the rows holds; nothing where it is not there."""
    path = folder / RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def _together(rows: Sequence[Mapping[str, Any]], size: BenchSize) -> str:
    """How many rows come from ensembles."""
    sizes = [row["together"] for row in rows if row.get("together", 1) > 1]
    if not sizes:
        return ""
    return (
        f" {len(sizes)} of them were trained as one network with others, up to {max(sizes)} at a "
        "time: the same data, starts and updates as alone (`mvsplit/reproduce/depth/ensemble.py`), "
        f"without looks.{_shares(rows, size)}{_unscored(rows)}"
    )


def _shares(rows: Sequence[Mapping[str, Any]], size: BenchSize) -> str:
    """What the largest ensembles took of the device for each network. Rows without a date are of
    before, when blocks were computed again."""
    words = []
    for depth in size.depths:
        here = [
            row
            for row in rows
            if (row["depth"], row["width"]) == (depth, size.width)
            and row.get("peak_gib_together")
            and "date" in row
        ]
        if here:
            largest = max(here, key=lambda row: row["together"])
            share = largest["peak_gib_together"] / largest["together"]
            words.append(f"{share:.2g} GiB at {depth} layers, {largest['together']} at a time")
    return f" A network's share of the device's memory: {'; '.join(words)}." if words else ""


def _unscored(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many living rows of ensembles have no task scores, as before they had them."""
    without = [r for r in rows if "together" in r and r["lives"] and r["tasks"] is None]
    return f" {len(without)} of these that live have no task scores." if without else ""


def _changed(result: Mapping[str, Any]) -> str:
    return "" if result["rule"]["sha256"] == rule_sha256() else ", **and changed since**"


def verdict_words(size: BenchSize, found: Sequence[Cell]) -> list[str]:
    """What the rule says, and the numbers that it says it of."""
    settings, rivals = (for_verdict(found, size, kinds) for kinds in (OURS, RIVALS))
    verdict, standing = against_rivals(settings, rivals)
    labels = {cell.entry.name: cell.entry.label for cell in found}
    not_run = [str(depth) for depth in size.depths if depth not in settings]
    where = f" (of {', '.join(not_run)} layers nothing is known)" if not_run else ""
    lines = [f"**MV-Split against its rivals: {verdict}{where}.** By the rule of the verdicts:\n"]
    for depth in settings:
        rival, mine = best(rivals[depth]), best(settings[depth])
        words = ", ".join(
            f"{labels[name]} {place}"
            for name, place in sorted(standing[depth].items())
            if place != "cannot tell"
        )
        if rival is None or mine is None:
            known = "" if rival is None else f"the best rival is {labels[rival]}; "
            lack = {"rival": (RIVALS, rival), "setting of MV-Split": (OURS, mine)}
            none = [(name, kinds) for name, (kinds, top) in lack.items() if top is None]
            lacking = " and ".join(f"no {name}" for name, _ in none)
            dead = [each for _, kinds in none for each in _dead(found, size, depth, kinds)]
            told = f"all that can be told: {words}" if words else "cannot tell"
            few = f"{lacking} has {SEEDS} seeds that live"
            lines.append(f"- {depth} layers: {known}{'; '.join([few, *dead, told])}")
            continue
        lines.append(
            f"- {depth} layers: the best rival is {labels[rival]}, the best setting "
            f"{labels[mine]} ({standing[depth][mine]}; all that can be told: {words or 'nothing'})"
        )
    tail = (
        f"**By this size alone {_default_words(settings, labels)}{where}.** Ties are "
        f"{TIE:.0%} wide, and {ERRORS:g} standard errors count."
    )
    without = _without(size, found, settings, rivals)
    return [*lines, "", _against_default(settings, labels) + "\n", tail + "\n", *without]


def _dead(found: Sequence[Cell], size: BenchSize, depth: int, kinds: Sequence[str]) -> list[str]:
    """The entries that have enough seeds at a rate, but not all of them live: else they would look
    as if their seeds had not been run."""
    words = []
    for cell in found:
        if cell.entry.kind not in kinds or (cell.depth, cell.width) != (depth, size.width):
            continue
        for rate in cell.tried:
            lives = [row["lives"] for row in cell.rows if row["rate"] == rate]
            if len(lives) >= SEEDS and not all(lives):
                living = {0: "none lives", 1: "1 lives"}.get(sum(lives), f"{sum(lives)} live")
                words.append(f"{cell.entry.label} has {len(lives)} at {rate:.2g}, {living}")
    return words


def _without(
    size: BenchSize,
    found: Sequence[Cell],
    settings: Mapping[int, Losses],
    rivals: Mapping[int, Losses],
) -> list[str]:
    """What the rule would say but for the depths at which no setting has enough seeds and nothing
    can be told: a verdict needs every depth, and the first row of a new one takes it away. A depth
    at which a setting is behind stays, for it counts against MV-Split."""
    labels = {cell.entry.name: cell.entry.label for cell in found}
    _, standing = against_rivals(settings, rivals)
    few = [
        depth
        for depth, losses in settings.items()
        if best(losses) is None and "behind" not in standing[depth].values()
    ]
    left = {depth: losses for depth, losses in settings.items() if depth not in few}
    if not left or not few:
        return []
    verdict, _ = against_rivals(left, rivals)
    dead = "; ".join(each for depth in few for each in _dead(found, size, depth, OURS))
    return [
        f"Were it not for {' and '.join(map(str, few))} layers, where no setting of MV-Split has "
        f"{SEEDS} seeds that live{f' ({dead})' if dead else ''}, it would be: against its rivals, "
        f"{verdict}; by this size alone {_default_words(left, labels)}.\n"
    ]


def _default_words(settings: Mapping[int, Losses], labels: Mapping[str, str]) -> str:
    """What the rule makes of the defaults there were."""
    words = []
    for today in SERVED:
        names = [labels[name] for name in new_defaults(settings, today)]
        admitted = " or ".join(names) if names else "nothing"
        words.append(f"{admitted} takes the place of {get_entries([today])[0].label}")
    return f"{', '.join(words[:-1])}, and {words[-1]}"


def _against_default(settings: Mapping[int, Losses], labels: Mapping[str, str]) -> str:
    """Where the other settings stand against today's default, as far as it can be told."""
    today = SERVED[-1]
    parts = []
    for depth, losses in settings.items():
        standing = {name: compare(mine, losses.get(today)) for name, mine in losses.items()}
        words = ", ".join(
            f"{labels[name]} {place}"
            for name, place in sorted(standing.items())
            if name != today and place != "cannot tell"
        )
        parts.append(f"at {depth} layers {words or 'nothing can be told'}")
    return f"Against today's default, {get_entries([today])[0].label}: {'; '.join(parts)}."


def missing(size: BenchSize, found: Sequence[Cell]) -> list[str]:
    """What has not been run yet, for a page that says so; of candidates what was begun."""
    have = {(c.entry.name, c.depth): c for c in found if c.width == size.width}
    lines = []
    for depth in size.depths:
        absent = [e.label for e in ENTRIES if (e.name, depth) not in have]
        every = (*ENTRIES, *CANDIDATES)
        here = [have[e.name, depth] for e in every if (e.name, depth) in have]
        few = [c.entry.label for c in here if c.rate and len(c.best) < len(size.seeds)]
        part = [c.entry.label for c in here if not c.swept]
        ends = [c.entry.label for c in here if c.swept and c.at_end]
        for words, names in (
            ("not run", absent),
            ("the sweep is not whole", part),
            (f"fewer than {len(size.seeds)} seeds", few),
            ("the best rate is at an end of those tried", ends),
        ):
            if names:
                lines.append(f"- {depth} layers, {words}: {', '.join(names)}")
    if not lines:
        return ["### Left to run\n", "Nothing.\n"]
    together = " --together 24" if size.device == "cuda" else ""
    command = (
        f"    python benchmarks/depth_bench.py --size {size.name}{together} "
        f"--have docs/experiments/{RESULTS}/{size.name}.json --pages docs/experiments\n"
    )
    return ["### Left to run\n", *lines, "", "Goes on with it, `--minutes` at a time:\n", command]
