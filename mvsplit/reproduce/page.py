"""A claim's page in Markdown, with its plot, from the results that lie beside it.

`FOLDER/CLAIM.md` and `FOLDER/CLAIM-SIZE.png` are drawn from `FOLDER/results/CLAIM-SIZE.json` and
from nothing else, so that a page can be written again without a run.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvsplit.data.atomic import write_atomically
from mvsplit.errors import UserError
from mvsplit.reproduce.claim import Claim
from mvsplit.reproduce.claims import CLAIMS
from mvsplit.reproduce.plot import save_plot
from mvsplit.reproduce.reruns import (
    beside,
    beyond_spread,
    changed_lines,
    machine,
    other_run_lines,
    other_runs,
    other_verdicts,
    place,
    rerun_lines,
    succeed,
    verdicts_before,
)
from mvsplit.reproduce.rule import FAILS, HOLDS, OPEN
from mvsplit.reproduce.sizes import SIZES
from mvsplit.reproduce.understood import joined

RESULTS = "results"
BENCH = "depth-bench"
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)")  # not of a picture: words, target
# Of `collapse`: at the rate that kills the plain network, β = 1 and 1/√L.
_ENDS = ("MV-Split: end loss", "MV-Split, small beta: end loss")
_COUNTED = (HOLDS, FAILS, OPEN)
INDEX = f"""# The claims of the paper, repeated

    mvsplit reproduce CLAIM --size small --pages docs/experiments

Each claim of arXiv 2605.06169 is a few runs and a rule that was written down before the first of
them; the verdict is what the rule says of the logs, welcome or not. Where a rule has changed since,
its page keeps what it said before, and where other runs were made, what the earlier ones came to.
The sizes:
{"".join(chr(10) + f"- `{size.name}`: {size.hardware}" for size in SIZES.values())}
{{bench}}
All data are toys, the networks narrow and the runs short: a verdict is about these runs and no
others. Some of them make much of rounding: the same runs on another processor end elsewhere; on two
machines of one kind some are the same to the bit and some are not{{modes}}. What was
recorded earlier stays beside a result, and `--again "on another processor"` keeps a rerun there; a
page says by how much its figures move.

{{summary}}

| claim | source | {" | ".join(SIZES)} |
|---|---|{"---|" * len(SIZES)}
"""
_INDEX_OF_BENCH = f"""
[The depth bench]({BENCH}.md) compares the rules beyond the paper, each at its own learning
rate.
"""


def keep_result(result: Mapping[str, Any], folder: Path, again: str | None = None) -> Path:
    """Puts a result where the pages of `folder` are written from. What was there stays beside it,
    as a rerun or as a record of other runs; with `again` the result itself is a rerun, of that
    name.

    Raises:
        UserError: there is no result that it could be a rerun of, or its runs are other ones.
    """
    name, size = result["claim"], result["size"]
    path = folder / RESULTS / f"{name}-{size}.json"
    if again is not None:
        require_earlier(name, size, folder)
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    whole = succeed(result, there) if again is None else beside(result, there or {}, again)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(whole, indent=1) + "\n")
    return path


def require_earlier(claim: str, size: str, folder: Path) -> None:
    """Raises UserError where there is no result of a claim that a rerun could be kept beside."""
    path = folder / RESULTS / f"{claim}-{size}.json"
    if not path.exists():
        raise UserError(
            f"{path} is not there, so that nothing could be run again; keep a result without "
            "--again first"
        )


def stored_results(claim: Claim, folder: Path) -> list[dict[str, Any]]:
    """The results of a claim, small before large."""
    paths = [folder / RESULTS / f"{claim.name}-{size}.json" for size in SIZES]
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def write_pages(claims: Sequence[Claim], folder: Path | str) -> list[Path]:
    """Writes the pages of some claims, the index last.

    Raises:
        UserError: there is no result to write one of them from.
    """
    names = [f"{claim.name}.md" for claim in claims]  # of which one may link to a later one
    pages = [write_page(claim, folder, coming=names) for claim in claims]
    return [*pages, write_index(folder)]


def write_page(claim: Claim, folder: Path | str, *, coming: Collection[str] = ()) -> Path:
    """Writes the page and the plots of a claim, with links to pages that are there or `coming`.

    Raises:
        UserError: there is no result to write it from.
    """
    folder = Path(folder)
    results = stored_results(claim, folder)
    if not results:
        raise UserError(
            f"{folder / RESULTS} holds no result of {claim.name}; run it: "
            f"mvsplit reproduce {claim.name} --pages {folder}"
        )
    for result in results:
        if result["panels"]:
            save_plot(result["panels"], folder / f"{claim.name}-{result['size']}.png")
    page = folder / f"{claim.name}.md"
    text = page_text(claim, results, _kept(folder))
    page.write_text(_with_links(text, folder, coming), encoding="utf-8")
    return page


def _kept(folder: Path) -> set[str]:
    """The results there, by the names that `Passage.of` has."""
    return {path.stem for path in (folder / RESULTS).glob("*")}


def _with_links(text: str, folder: Path, coming: Collection[str] = ()) -> str:
    """Links to what is not there become their words."""

    def checked(link: re.Match[str]) -> str:
        words, target = link.groups()
        return link[0] if target in coming or (folder / target).exists() else words

    return _LINK.sub(checked, text)


def write_index(folder: Path | str) -> Path:
    """Writes FOLDER/README.md, a line for each claim with its verdicts."""
    folder = Path(folder)
    rows = []
    for claim in CLAIMS.values():
        found = {r["size"]: _short(r) for r in stored_results(claim, folder)}
        name = f"[{claim.title}]({claim.name}.md)" if found else claim.title
        verdicts = " | ".join(found.get(size, "not run") for size in SIZES)
        rows.append(f"| {name} | {claim.source} | {verdicts} |")
    results = [result for claim in CLAIMS.values() for result in stored_results(claim, folder)]
    path, bench = folder / "README.md", (folder / f"{BENCH}.md").exists()
    head = INDEX.format(
        bench=_INDEX_OF_BENCH if bench else "",
        modes=" ([modes](modes.md))" if "modes-gpu" in _kept(folder) else "",
        summary=summary(results, bench=bench),
    )
    text = head + "\n".join(rows) + "\n"
    path.write_text(_with_links(text, folder), encoding="utf-8")
    return path


def summary(results: Sequence[Mapping[str, Any]], *, bench: bool = True) -> str:
    """How many claims hold at each size, why the paper's order does not show where it does not, and
    what is to be known of 1000 layers, with what the depth bench says of it."""
    lines = ["**In short.**", ""]
    for size in SIZES:
        here = [result for result in results if result["size"] == size]
        found = Counter(result["verdict"] for result in here)
        counts = [f"{verdict}: {found[verdict]}" for verdict in _COUNTED]
        counts += [f"not run: {len(CLAIMS) - len(here)}"] if len(here) < len(CLAIMS) else []
        lines.append(f"- `{size}`, of {len(CLAIMS)} claims: {'; '.join(counts)}.")
    for result in results:
        lines += [*_order(result, results), *_thousand(result, bench)]
    return "\n".join(lines)


def _order(result: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line on Table 1 where its order was refuted at a size of which `collapse` knows why."""
    if (result["claim"], result["verdict"]) != ("order", FAILS):
        return []
    same = [
        each for each in others if (each["claim"], each["size"]) == ("collapse", result["size"])
    ]
    if not same or same[0]["verdict"] != FAILS:
        return []
    figures = same[0]["figures"]
    paper, small = (spelled(figures[name]["values"]).partition(" (")[0] for name in _ENDS)
    return [
        "- The paper's order (Table 1) at β = 1 and a high rate does not show at "
        f"`{result['size']}`: at the rate that kills the plain network MV-Split with β = 1 "
        f"keeps its tokens apart but learns little (end loss {paper} of the floor), and with "
        f"β = 1/√L it learns well ({small}), [so that the comparison is about β and the "
        "rate](collapse.md)."
    ]


def _thousand(result: Mapping[str, Any], bench: bool) -> list[str]:
    """A line on the paper's start at 1000 layers where it does not train."""
    if (result["claim"], result["verdict"]) != ("thousand", FAILS):
        return []
    figures = result["figures"]
    if any(figures["MV-Split: lives"]["values"].values()):
        return []
    loss, alike = (figures[f"MV-Split: end {name}"]["values"] for name in ("loss", "similarity"))
    size, rate = result["size"], result["runs"][0]["lr"]
    line = (
        f"- The paper's start at 1000 layers (β = 0.03, α = 0) does not learn at `{size}`, at a "
        f"rate of {rate:g}: end loss {spelled(loss)} of the floor, deep tokens at a similarity of "
        f"{spelled(alike)}."
    )
    learning = (
        " [With α = β and writers of standard size, as the library starts, such networks learn in "
        f"the depth bench]({BENCH}.md)."
    )
    return [line + learning * bench]


def _short(result: Mapping[str, Any]) -> str:
    seeds = len({row["seed"] for row in result["runs"]})
    others = "".join(f"; run again: {verdict}" for verdict in other_verdicts(result))
    others += "".join(f"; by the rule before: {verdict}" for verdict in verdicts_before(result))
    others += "".join(f"; {words}" for words in other_runs(result))
    return f"{result['verdict']} ({seeds} seed{'s' if seeds > 1 else ', no spread'}{others})"


def page_text(
    claim: Claim, results: Sequence[Mapping[str, Any]], kept: Collection[str] | None = None
) -> str:
    """The page of a claim, as Markdown, with what was understood of the results that are `kept`, or
    of all that there are if None."""
    afterwards = joined(claim.passages, kept)
    head = [
        f"# {claim.title}",
        f"    mvsplit reproduce {claim.name} --size {results[0]['size']}",
        "*" + "; ".join(f"{r['size']}: {r['verdict']}" for r in results) + ".*",
        f"**The paper** (arXiv 2605.06169, {claim.source}). {claim.says}",
        f"**Expected here.** {claim.expect}",
        f"**Not covered.** {claim.limits}",
        *([f"**Understood afterwards.** {afterwards}"] if afterwards else []),
        _rule(results[-1]),
    ]
    body = [part for result in results for part in _of_size(claim, result)]
    foot = f"Written by `mvsplit reproduce {claim.name} --draw --pages FOLDER` from `{RESULTS}/`."
    return "\n\n".join([*head, *body, foot]) + "\n"


def _rule(result: Mapping[str, Any]) -> str:
    rows = [
        f"| {c['figure']}{' (needed)' if c['needed'] else ''} | {c['holds']} | {c['fails']} | "
        f"{c['why']} |"
        for c in result["rule"]
    ]
    return "\n".join(
        [
            "## The rule",
            "",
            "The claim holds where every seed meets every row, does not where more than half of "
            "the seeds refute one, and cannot be told otherwise, or where a needed row is not met.",
            "",
            "| figure | met | refuted | why |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _of_size(claim: Claim, result: Mapping[str, Any]) -> list[str]:
    size, runs = result["size"], result["runs"]
    seeds = sorted({row["seed"] for row in runs})
    spread = (
        f"{len(seeds)} seeds" if len(seeds) > 1 else "**one seed: no figure here has a spread**"
    )
    minutes = sum(row["seconds"] for row in runs) / 60
    versions = result["environment"]["versions"]
    parts = [
        f"## {size}: {result['verdict']}",
        f"{result['hardware']}; {len(runs)} runs, {spread}, {minutes:.1f} minutes of them in all; "
        f"torch {versions['torch']}, {machine(result['environment'])}, {result['date']}."
        f"{_other_places(result)} {_written(result)}",
        *changed_lines(result),
        "\n".join(f"- {reason}" for reason in result["reasons"]),
        *_remarks(claim, result),
    ]
    if result["panels"]:
        parts.append(f"![{claim.title}]({claim.name}-{size}.png)")
    before = [*rerun_lines(result), *other_run_lines(result)]
    return [*parts, _figures(result), *beyond_spread(result), _runs(runs), *before]


def _written(result: Mapping[str, Any]) -> str:
    """When the rule was, and by what it is known to be the same."""
    known = "" if result.get("measure_sha256") else " (compared by its bounds only)"
    changed = "" if result["rule_unchanged"] else ", **and changed since**"
    when = f"The rule was written {result['rule_written']}, before the first of the runs"
    return f"{when}{changed}{known}."


def _other_places(result: Mapping[str, Any]) -> str:
    """Where the runs were, if not all in one place and of one version."""
    places = result.get("environments", ())
    if not places:
        return ""
    each = "; ".join(f"{place(e['environment'])} ({', '.join(e['runs'])})" for e in places)
    return f" **The runs are of several places or versions**: {each}."


def _remarks(claim: Claim, result: Mapping[str, Any]) -> list[str]:
    return claim.remarks({name: figure["values"] for name, figure in result["figures"].items()})


def _figures(result: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {spelled(figure['values'])} | {figure['paper'] or '–'} | {figure['words']} |"
        for name, figure in result["figures"].items()
    ]
    return "\n".join(["| figure | mean ± spread (by seed) | paper | |", "|---|---|---|---|", *rows])


def spelled(values: Mapping[str, float | None]) -> str:
    """A figure with its standard deviation over seeds and each seed's value; without a spread where
    there is only one, which is said."""
    each = ", ".join("none" if v is None else f"{v:.3g}" for v in values.values())
    there = [v for v in values.values() if v is not None]
    if len(there) < 2:
        return f"{each} (no spread)"
    return f"{statistics.fmean(there):.3g} ± {statistics.stdev(there):.2g} ({each})"


def _runs(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| {r['label']} | {r['seed']} | {r['depth']} × {r['width']} | {r['lr']:.3g}{_jump(r)} | "
        f"{r['steps']} | {r['seconds']:.0f} | {r.get('together') or 1} | "
        f"{r['ended'].split(':')[0]} |"
        for r in runs
    ]
    head = "| run | seed | layers × width | learning rate | steps | seconds | runs as one | ended |"
    return "\n".join([head, "|---" * 8 + "|", *rows])


def _jump(row: Mapping[str, Any]) -> str:
    return f", × {row['factor']:g} after {row['jump']}" if row["jump"] else ""
