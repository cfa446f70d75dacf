"""The same runs again, and other ones before: earlier results and reruns are kept beside a claim's,
and the page says by how much figures moved.

A run in which rounding is amplified ends elsewhere on another version, processor or choice of
kernels, with the same seed. How far, only a rerun shows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mvsplit.errors import UserError

AGAIN = "again"  # of a stored result: what its reruns came to
CHANGED = "changed"  # of a stored result: the records that other rules judged before, oldest first
OTHERS = "other_runs"  # of a stored result: earlier records of other runs, oldest first
RUNS = "runs_then"  # of a record: in words, in what its runs were other ones
_OF_RERUN = ("words", "date", "verdict", "environment", "together", "look_every", "values")
_OF_RECORD = (
    *("date", "verdict", "reasons", "environment"),
    *("rule", "rule_written", "rule_unchanged", "measure_sha256"),
)
# Of a run's row; the rest says which run it is. A look changes no step, but what is seen of them.
_HOW_IT_WENT = ("ended", "seconds", "together", "look_every")
_IN_WORDS = {
    "steps": "{} steps",
    "depth": "{} layers",
    "width": "width {}",
    "lr": "a rate of {}",
    "jump": "a rise after {} steps",
    "factor": "a rise of {} times",
}
Values = Mapping[str, Mapping[str, float | None]]  # by figure and seed


def rerun(result: Mapping[str, Any], words: str) -> dict[str, Any]:
    """What is kept of a result that stands beside another: its verdict and its figures."""
    values = {name: figure["values"] for name, figure in result["figures"].items()}
    together = max((row.get("together") or 1 for row in result["runs"]), default=1)
    fields = {"words": words, "values": values, "together": together}
    fields["look_every"] = looks(result)
    return {name: fields.get(name, result.get(name)) for name in _OF_RERUN}


def looks(result: Mapping[str, Any]) -> list[int]:
    """The steps between looks around the rise of the rate that its runs asked for, 0 for none."""
    return sorted({row.get("look_every", 0) for row in result["runs"]})


def succeed(result: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """`result` in the place of `before`, which becomes a rerun of it, and so do its reruns; where
    other runs have been made since, they become records of other runs. A rule that is the same was
    written when it was first written; of another one the record that it judged is kept apart."""
    whole = dict(result)
    if before is None:
        return whole
    again, changed, others = ([*before.get(key, [])] for key in (AGAIN, CHANGED, OTHERS))
    same_rule, then = _same_rule(result, before), _runs_then(before, result)
    if then:
        others += _of_other_runs(before, then, itself=same_rule)
        again, changed = [], [{RUNS: then} | each for each in changed]
    elif _signature(result) != _signature(before):
        other = "" if looks(result) == looks(before) else ", with other looks"
        again.insert(0, rerun(before, f"an earlier record{other}"))
    if not same_rule:
        figures = {RUNS: then, "values": rerun(before, "")["values"]} if then else {}
        changed.append(record(before) | figures)
    elif before["rule_unchanged"]:
        whole["rule_written"] = min(result["rule_written"], before["rule_written"])
    kept = {AGAIN: again, CHANGED: changed, OTHERS: others}
    return whole | {key: each for key, each in kept.items() if each}


def record(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a result whose rule has been changed since."""
    return {name: result.get(name) for name in _OF_RECORD}


def _of_other_runs(before: Mapping[str, Any], then: str, *, itself: bool) -> list[dict[str, Any]]:
    """What is kept of a result and its reruns where other runs took their place; without the result
    itself where it is kept as what another rule judged."""
    by = {"rule": before["rule"], RUNS: then}
    reruns = [{"reasons": None} | each | by for each in reversed(before.get(AGAIN, []))]
    own = [record(before) | rerun(before, "") | by] if itself else []
    return sorted([*reruns, *own], key=lambda each: str(each["date"]))


def _runs_then(before: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """In what the runs of `before` are other ones than those of `result`, in words: "runs of 240
    steps"; empty where they are the same."""
    then, now = _runs(before), _runs(result)
    common = [(row, now[name]) for name, row in then.items() if name in now]
    found: dict[str, list[Any]] = {}
    for mine, theirs in common:
        for key in mine.keys() | theirs.keys():
            if mine.get(key) != theirs.get(key):
                found.setdefault(key, []).append(mine.get(key))
    keys = sorted(found, key=lambda key: ([*_IN_WORDS, key].index(key), key))
    parts = [_IN_WORDS.get(key, f"{key} {{}}").format(_distinct(found[key])) for key in keys]
    if then.keys() != now.keys():
        networks = [dict.fromkeys(row["label"] for row in each.values()) for each in (then, now)]
        parts += [f"the networks {_distinct(networks[0])}"] if networks[0] != networks[1] else []
        parts.append(f"seeds {_distinct(sorted({row['seed'] for row in then.values()}))}")
    return f"runs of {', '.join(parts)}" if parts else ""


def _distinct(values: Iterable[Any]) -> str:
    """Each once: "240", "0, 1 and 2"."""
    words = [*dict.fromkeys(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return " and ".join([*([", ".join(words[:-1])] if words[:-1] else []), *words[-1:]])


def _same_rule(result: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """By the bounds, and by what is put to them where both say it."""
    measures = [each.get("measure_sha256") for each in (result, before)]
    return result["rule"] == before["rule"] and (None in measures or measures[0] == measures[1])


def beside(result: Mapping[str, Any], there: Mapping[str, Any], words: str) -> dict[str, Any]:
    """`there` with `result` among its reruns, in the place of one of the same words.

    Raises:
        UserError: its runs are other ones.
    """
    if _runs(result) != _runs(there):
        raise UserError(
            f"again={words!r}: the runs of {result['claim']} are other ones than those of the "
            "result that is kept; keep this one in its place, without --again"
        )
    others = [each for each in there.get(AGAIN, []) if each["words"] != words]
    return dict(there) | {AGAIN: [*others, rerun(result, words)]}


def _runs(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was trained, by its name."""
    return {
        row["run"]: {key: value for key, value in row.items() if key not in _HOW_IT_WENT}
        for row in result["runs"]
    }


def _signature(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes it another rerun: where and of what it was run, and what came out."""
    values = {name: figure["values"] for name, figure in result["figures"].items()}
    return result["date"], result["environment"], values


def changed_lines(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each record that another rule judged: what it said, and what is otherwise."""
    records = result.get(CHANGED, [])
    rules = [each["rule"] for each in (*records, result)][1:]
    return [_changed(each, rule, result) for each, rule in zip(records, rules, strict=True)]


def _changed(
    before: Mapping[str, Any], rule: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> str:
    then, now = ({row["figure"]: row for row in each} for each in (before["rule"], rule))
    parts = {
        "new": [name for name in now if name not in then],
        "gone": [name for name in then if name not in now],
        "with other bounds or another reason": [
            name for name, row in now.items() if name in then and row != then[name]
        ],
    }
    rows = "; ".join(f"{words}: {', '.join(names)}" for words, names in parts.items() if names)
    rows = rows or "as they were, but of figures that were measured otherwise"
    there = before["date"] == result["date"] and before["environment"] == result["environment"]
    same = there and RUNS not in before
    return (
        f"**The rule has changed since the record of {before['date']}**, of which it said: "
        f"*{before['verdict']}*. Rows {rows}."
        + (" The runs are those of that record." if same else "")
        + (f" It was of {before[RUNS]}." if RUNS in before else "")
    )


def other_verdicts(result: Mapping[str, Any]) -> list[str]:
    """The verdicts of reruns that are not that of the result."""
    found = dict.fromkeys(each["verdict"] for each in result.get(AGAIN, []))
    return [verdict for verdict in found if verdict != result["verdict"]]


def verdicts_before(result: Mapping[str, Any]) -> list[str]:
    """What rules before said of their records, where that is not the verdict."""
    found = dict.fromkeys(each["verdict"] for each in result.get(CHANGED, []))
    return [verdict for verdict in found if verdict != result["verdict"]]


def other_runs(result: Mapping[str, Any]) -> list[str]:
    """Earlier records of other runs whose verdict is not that of the result: "runs of 240 steps:
    holds", each once."""
    found = dict.fromkeys(
        f"{each[RUNS]}{_by(each, result)}: {each['verdict']}"
        for each in result.get(OTHERS, [])
        if each["verdict"] != result["verdict"]
    )
    return [*found]


def _by(each: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    return "" if each["rule"] == result["rule"] else ", by the rule before"


def other_run_lines(result: Mapping[str, Any]) -> list[str]:
    """The part of a page about earlier records of other runs: what they said, with their figures.
    Nothing where there are none."""
    others = result.get(OTHERS, [])
    if not others:
        return []
    names = [f"{each[RUNS]}{', ' if each['words'] else ''}{each['words']}" for each in others]
    items = [
        f"- {_name(dict(each) | {'words': name})}: {each['verdict']}{_by(each, result)}"
        for name, each in zip(names, others, strict=True)
    ]
    now = {name: figure["values"] for name, figure in result["figures"].items()}
    columns = [now, *(each["values"] for each in others)]
    rows = [[name, *(_listed(values.get(name, {})) for values in columns)] for name in now]
    head = ["figure (by seed)", "above", *names]
    lines = [head, ["---"] * len(head), *rows]
    return [
        "### Earlier, of other runs",
        "What was on this page before the runs above, oldest first:",
        "\n".join(items),
        "\n".join("| " + " | ".join(cells) + " |" for cells in lines),
    ]


def rerun_lines(result: Mapping[str, Any]) -> list[str]:
    """The part of a page about reruns, nothing where there are none."""
    reruns = result.get(AGAIN, [])
    if not reruns:
        return []
    now = {name: figure["values"] for name, figure in result["figures"].items()}
    items = [f"- {_name(each)}: {each['verdict']}; {_same(now, each['values'])}" for each in reruns]
    moved = [name for name in now if any(_moves(now, each, name) for each in reruns)]
    parts = [
        "### The same runs again",
        "With the same seeds, beside the runs above, which are of revision "
        f"{_revision(result['environment'])}:",
        "\n".join(items),
    ]
    if not moved:
        return parts
    head = ["figure (by seed)", "above", *(each["words"] for each in reruns)]
    head += ["moves by at most", "spread over seeds"]
    rows = [
        [
            name,
            _listed(now[name]),
            *(_listed(each["values"].get(name, {})) for each in reruns),
            _two_digits(_step(now, reruns, name)),
            _two_digits(_stdev(now[name])),
        ]
        for name in moved
    ]
    lines = [head, ["---"] * len(head), *rows]
    return [*parts, "\n".join("| " + " | ".join(cells) + " |" for cells in lines)]


def beyond_spread(result: Mapping[str, Any]) -> list[str]:
    """One sentence, to stand where figures have their ±: which of them move by more, with the same
    seeds, than they spread over seeds. Nothing where nothing was run again, or nothing moved."""
    now = {name: figure["values"] for name, figure in result["figures"].items()}
    # With other looks a figure may move without any noise.
    alike = [e for e in result.get(AGAIN, []) if (e.get("look_every") or [0]) == looks(result)]
    moved = {name: _step(now, alike, name) for name in now}
    known = {
        n: (step, wide)
        for n, step in moved.items()
        if step and (wide := _stdev(now[n])) is not None
    }
    if not any(moved.values()):
        return []
    if not known:
        return [
            "Figures move with the same seed as well (below), and there is no spread over seeds."
        ]
    more = sorted(
        (
            (step / wide if wide else math.inf, name)
            for name, (step, wide) in known.items()
            if step > wide
        ),
        reverse=True,
    )
    if not more:
        return ["With the same seeds no figure moves by more (below) than its spread over seeds."]
    words = ", ".join(f"{name} ({_times(ratio)})" for ratio, name in more)
    return [
        "**The ± understates the noise.** With the same seeds, run again (below), these figures "
        f"move by more than they spread over seeds: {words}."
    ]


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times the spread" if math.isfinite(ratio) else "the spread is 0"


def _name(each: Mapping[str, Any]) -> str:
    return f"{each['words']}, {each['date']}, {place(each['environment'])}{_together(each)}"


def place(environment: Mapping[str, Any]) -> str:
    """The version and the machine."""
    torch = environment["versions"]["torch"]
    return f"revision {_revision(environment)}, torch {torch}, {machine(environment)}"


def _together(each: Mapping[str, Any]) -> str:
    count = each.get("together") or 1
    return f", {count} runs trained as one" if count > 1 else ""


def machine(environment: Mapping[str, Any]) -> str:
    """The GPU, or the processor where it is known. On a GPU the processor decides nothing."""
    device, processor = environment["device_name"], environment.get("processor")
    on_gpu = "NVIDIA" in device
    return str(device if on_gpu or processor is None else processor)


def _revision(environment: Mapping[str, Any]) -> str:
    return str(environment["revision"] or "unknown")[:7]


def _same(now: Values, then: Values) -> str:
    same = sum(now[name] == then.get(name) for name in now)
    return f"{same} of {len(now)} figures are the same to four digits"


def _moves(now: Values, each: Mapping[str, Any], name: str) -> bool:
    """Whether a rerun shows it moving; a figure that came later moves nowhere."""
    then = each["values"].get(name)
    return then is not None and then != now[name]


def _listed(values: Mapping[str, float | None]) -> str:
    return ", ".join("none" if v is None else f"{v:.3g}" for v in values.values()) or "–"


def _step(now: Values, reruns: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """By how much a figure of a seed moves at most."""
    pairs = [
        (value, each["values"].get(name, {}).get(seed))
        for each in reruns
        for seed, value in now[name].items()
    ]
    return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=None)


def _stdev(values: Mapping[str, float | None]) -> float | None:
    there = [value for value in values.values() if value is not None]
    return statistics.stdev(there) if len(there) > 1 else None


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
