"""Which of two entries is ahead, and what follows for the default: a rule that was written down
before the runs that it judges."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from mvsplit.data.atomic import write_atomically

TIE = 0.03
SEEDS = 3
ERRORS = 2.0
RULE = f"""Each entry counts with the validation losses of its seeds at its best learning rate, the
rate with the smallest mean loss among those of which the most seeds were run and every one lives.
Of two entries with {SEEDS} seeds or more each, one is ahead where its mean loss is smaller by more
than {TIE:.0%} and by more than {ERRORS:g} standard errors of the difference; they tie where the
means differ by {TIE:.0%} or less; all else cannot be told. An entry of which no rate lives, all of
the sweep having been run, is behind every entry that lives with {SEEDS} seeds.
MV-Split is at least as good as its rivals where one of its settings is ahead of the best rival, or
ties with it, at every depth; it is not where at some depth every setting is behind the best rival;
all else cannot be told. The best rival of a depth is the one with the smallest mean loss among
those with {SEEDS} seeds.
A setting of MV-Split becomes the default where at every depth no other setting is ahead of it, and
it is ahead of today's default at one depth at least and behind it at none. Where no setting does,
the best setting of each depth is recommended for that depth."""

Standing = Literal["ahead", "tie", "behind", "cannot tell"]


def compare(mine: Sequence[float] | None, theirs: Sequence[float] | None) -> Standing:
    """Where one entry stands against another.

    Args:
        mine, theirs: validation losses of the seeds at the best rate; empty where no rate lives,
            None where the sweep was not run whole.
    """
    if mine is None or theirs is None:
        return "cannot tell"
    if not mine or not theirs:
        if len(mine) >= SEEDS:
            return "ahead"
        return "behind" if len(theirs) >= SEEDS else "cannot tell"
    if min(len(mine), len(theirs)) < SEEDS:
        return "cannot tell"
    a, b = statistics.fmean(mine), statistics.fmean(theirs)
    if abs(a - b) <= TIE * max(a, b):
        return "tie"
    error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (mine, theirs)))
    if abs(a - b) <= ERRORS * error:
        return "cannot tell"
    return "ahead" if a < b else "behind"


Losses = Mapping[str, Sequence[float] | None]  # by entry


def best(losses: Losses) -> str | None:
    """The entry with the smallest mean loss among those with enough seeds."""
    means = {n: statistics.fmean(v) for n, v in losses.items() if v and len(v) >= SEEDS}
    return min(means, key=lambda name: means[name]) if means else None


def against_rivals(
    settings: Mapping[int, Losses], rivals: Mapping[int, Losses]
) -> tuple[str, dict[int, dict[str, Standing]]]:
    """The verdict on MV-Split, and where each setting stands against the best rival of each depth.

    Args:
        settings, rivals: by depth, the losses of each entry.
    """
    standing: dict[int, dict[str, Standing]] = {}
    for depth, mine in settings.items():
        rival = best(rivals[depth])
        theirs = rivals[depth][rival] if rival else None
        standing[depth] = {name: compare(losses, theirs) for name, losses in mine.items()}
    names = {name for found in standing.values() for name in found}
    good = [n for n in names if all(f.get(n) in ("ahead", "tie") for f in standing.values())]
    if good and standing:
        return "at least as good as its rivals", standing
    if any(found and all(s == "behind" for s in found.values()) for found in standing.values()):
        return "not as good as its rivals", standing
    return "cannot tell", standing


def new_defaults(settings: Mapping[int, Losses], today: str) -> list[str]:
    """The settings that may become the default in place of `today`; those that no other is ahead of
    may be several."""
    names = {name for losses in settings.values() for name in losses} - {today}
    return [name for name in sorted(names) if _replaces(name, settings, today)]


def _replaces(name: str, settings: Mapping[int, Losses], today: str) -> bool:
    mine = [losses.get(name) for losses in settings.values()]
    others = [
        compare(losses.get(other), losses.get(name))
        for losses in settings.values()
        for other in losses
        if other != name
    ]
    now = [
        compare(own, losses.get(today)) for own, losses in zip(mine, settings.values(), strict=True)
    ]
    enough = all(own and len(own) >= SEEDS for own in mine)
    return enough and "ahead" not in others and "ahead" in now and "behind" not in now


def note_rule(path: Path) -> dict[str, str]:
    """Writes the rule's hash and the time down, once, and gives what stands there."""
    if not path.exists():
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"sha256": rule_sha256(), "written": now}) + "\n")
    return dict(json.loads(path.read_text("utf-8")))


def rule_sha256() -> str:
    """Of the words of the rule."""
    return hashlib.sha256(RULE.encode()).hexdigest()
