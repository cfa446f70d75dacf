"""Runs claims of the paper here, and judges them.

`mvsplit reproduce --list` names them; `all` stands for every one. The verdict follows a rule that
is written down before the first run. Finished runs are not run again, and claims share them. The
same command a second time, while the first works, shares what is left to train with it. After
Ctrl-C or SIGTERM nothing more begins, the runs under way are saved, for which they have 20 seconds,
and the same command goes on; a second one ends all of it at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from mvsplit.cli.listing import listing
from mvsplit.errors import UserError
from mvsplit.reproduce import CLAIMS, Study, get_claim
from mvsplit.reproduce.check import check_minutes, nearest_existing
from mvsplit.reproduce.claim import Claim
from mvsplit.reproduce.page import RESULTS, keep_result, require_earlier, write_pages
from mvsplit.reproduce.sizes import get_size
from mvsplit.reproduce.workers import Stopped

_OF_RUNS = ("size", "out", "workers", "minutes", "again")
_NO_EFFECT = {"list": (*_OF_RUNS, "pages", "draw"), "draw": _OF_RUNS}
_COLOURS = {"holds": "green", "does not hold": "red"}


@dataclass(frozen=True, kw_only=True)
class _Options:
    # Names of claims, or "all".
    claims: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="CLAIM…", help_behavior_hint=""),
    ] = ()
    list: bool = False  # what all claims say, or those that are named, and what they cost
    size: Literal["small", "gpu"] = "small"  # two CPU cores, or one GPU
    out: Path = Path("runs/reproduce")  # runs and results; the same folder again goes on
    workers: int | None = None  # runs side by side; 2 for small, 4 for gpu
    minutes: float | None = None  # stops after these; the same command goes on
    pages: Path | None = None  # writes each claim's page and its result into this folder
    again: str | None = None  # keeps the results beside those in that folder, as a rerun so named
    draw: bool = False  # only writes the pages again, from the results in that folder


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status: 0, whatever the verdicts are, or 130 and 143
    after Ctrl-C and SIGTERM.

    Raises:
        UserError: an unknown claim, none at all, options that do not go together, a folder that is
            none, no time, or a run that failed.
    """
    options = tyro.cli(
        _Options, args=list(arguments), prog="mvsplit reproduce", description=__doc__
    )
    _refuse_without_effect(options)
    if options.list:
        print(listing(map(_entry, _chosen(options.claims or ("all",)))))
        return 0
    if options.again is not None and options.pages is None:
        raise UserError("--again needs --pages FOLDER, whose results it is kept beside")
    check_minutes(options.minutes)
    claims = _chosen(options.claims)
    if options.pages is not None:
        _require_folder("pages", options.pages, options.pages / RESULTS)
    if options.draw:
        _draw(claims, options.pages)
        return 0
    if options.pages is not None and options.again is not None:
        for claim in claims:
            require_earlier(claim.name, options.size, options.pages)
    study = Study(options.out, get_size(options.size), workers=options.workers)
    _require_folder("out", options.out, study.runs)
    try:
        results = study.run(claims, minutes=options.minutes)
    except Stopped as stop:
        return stop.status
    _keep(results, options)
    print(f"results {study.folder}")
    if len(results) < len(claims):
        print("time is up before all runs were finished: the same command again goes on")
    return 0


def _refuse_without_effect(options: _Options) -> None:
    """What stands beside --list or --draw and would be passed over in silence."""
    for alone, names in _NO_EFFECT.items():
        given = [name for name in names if getattr(options, name) != getattr(_Options(), name)]
        if getattr(options, alone) and given:
            raise UserError(
                f"--{given[0]} has no effect with --{alone}, which only {alone}s; leave one of "
                "them out"
            )


def _require_folder(option: str, given: Path, needed: Path) -> None:
    """Before hours of training: `needed`, in the folder that was given, is one or can be made."""
    there = nearest_existing(needed.absolute())
    if not there.is_dir():
        raise UserError(
            f"--{option} {given}: {there} is a file; name a folder, there or to be made"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--{option} {given}: {there} cannot be written to; name another folder")


def _keep(results: Sequence[dict[str, Any]], options: _Options) -> None:
    """Prints what came out, and puts it where pages are written from."""
    claims = [get_claim(result["claim"]) for result in results]
    for claim, result in zip(claims, results, strict=True):
        _print_result(claim, result)
        if options.pages is not None:
            keep_result(result, options.pages, options.again)
    if options.pages is not None and results:
        for page in write_pages(claims, options.pages)[:-1]:
            print(f"page    {page}")


def _chosen(names: Sequence[str]) -> list[Claim]:
    if not names:
        raise UserError(f"claim: name at least one, or all; known: {', '.join(CLAIMS)}")
    named = [get_claim(name) for name in dict.fromkeys(names) if name != "all"]
    return [*CLAIMS.values()] if "all" in names else named


def _draw(claims: Sequence[Claim], pages: Path | None) -> None:
    if pages is None:
        raise UserError("--draw needs --pages FOLDER, whose results the pages are written from")
    for page in write_pages(claims, pages):
        print(page)


def _entry(claim: Claim) -> tuple[str, list[str]]:
    costs = (f"--size {size}: {cost}" for size, cost in claim.cost.items())
    return f"{claim.name}: {claim.title}", [f"Paper: {claim.source}", *costs]


def _print_result(claim: Claim, result: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    verdict = result["verdict"]
    console.print(f"\n{claim.title}\n[bold {_COLOURS.get(verdict, 'yellow')}]{verdict}[/]")
    for reason in result["reasons"]:
        console.print(f"  {reason}", markup=False)
    if not result["rule_unchanged"]:
        console.print("  the rule has been changed since the first run", markup=False)
