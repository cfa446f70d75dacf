"""What a verdict is, and the rule that gives it: bounds on figures, written before any run.

A figure has a value for each seed. A condition is met where all seeds keep its bound, refuted where
more than half of them are beyond the opposite bound, and open in between. A claim holds where all
its conditions are met, does not where one is refuted, and cannot be told otherwise. A condition
that is `needed` says whether the runs show what the claim speaks of at all: where it is not met,
nothing can be told, whatever the others say.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mvsplit.errors import UserError

Verdict = Literal["holds", "does not hold", "cannot tell at this scale"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "cannot tell at this scale"


@dataclass(frozen=True)
class Bound:
    """≥ or < a number; no value and NaN keep neither."""

    sign: Literal["≥", "<"]
    number: float

    def __post_init__(self) -> None:
        if self.sign not in ("≥", "<"):
            raise UserError(f"bound.sign={self.sign!r}: choose '≥' or '<'")

    def keeps(self, value: float | None) -> bool:
        if value is None or math.isnan(value):
            return False
        return value >= self.number if self.sign == "≥" else value < self.number

    def __str__(self) -> str:
        return f"{self.sign} {self.number:g}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number that a claim is judged by, or that is shown beside it.

    Attributes:
        name: what conditions and pages call it.
        words: what it is, for the page.
        values: by seed, to four digits; None where a run does not have it, or none that is finite.
        paper: the paper's own, as it prints it.
    """

    name: str
    words: str
    values: Mapping[int, float | None]
    paper: str = ""

    def __post_init__(self) -> None:
        # What is judged is what is stored, so that a verdict can be given again from the file.
        stored = {seed: _finite(value) for seed, value in self.values.items()}
        object.__setattr__(self, "values", stored)

    def as_dict(self) -> dict[str, Any]:
        values = {str(seed): value for seed, value in self.values.items()}
        return {"words": self.words, "values": values, "paper": self.paper}

    @classmethod
    def from_dict(cls, name: str, stored: Mapping[str, Any]) -> Figure:
        """The figure that `as_dict` gave."""
        values = {int(seed): value for seed, value in stored["values"].items()}
        return cls(name=name, words=stored["words"], values=values, paper=stored["paper"])


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One bound of a rule, with its opposite and the reason for both."""

    figure: str
    holds: Bound
    fails: Bound
    why: str
    needed: bool = False

    def __post_init__(self) -> None:
        overlap = self.holds.sign == self.fails.sign or (
            self.holds.number < self.fails.number
            if self.holds.sign == "≥"
            else self.holds.number > self.fails.number
        )
        if overlap:
            raise UserError(
                f"condition {self.figure!r}: a value could keep both {self.holds} and {self.fails};"
                " give bounds that face away from each other"
            )

    def judge(self, values: Sequence[float | None]) -> Verdict:
        if values and all(map(self.holds.keeps, values)):
            return HOLDS
        beyond = sum(map(self.fails.keeps, values))
        return FAILS if 2 * beyond > len(values) else OPEN

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"holds": str(self.holds), "fails": str(self.fails)}


def at_least(
    figure: str, holds: float, fails: float, why: str, *, needed: bool = False
) -> Condition:
    """Met from `holds` upwards, refuted below `fails`."""
    bounds = {"holds": Bound("≥", holds), "fails": Bound("<", fails)}
    return Condition(figure=figure, why=why, needed=needed, **bounds)


def below(figure: str, holds: float, fails: float, why: str, *, needed: bool = False) -> Condition:
    """Met below `holds`, refuted from `fails` upwards."""
    bounds = {"holds": Bound("<", holds), "fails": Bound("≥", fails)}
    return Condition(figure=figure, why=why, needed=needed, **bounds)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict, and what each condition came to."""

    verdict: Verdict
    reasons: tuple[str, ...]


def judge(rule: Sequence[Condition], figures: Sequence[Figure]) -> Judgement:
    """The verdict of `rule` on `figures`.

    Raises:
        UserError: a condition names a figure that there is not.
    """
    by_name = {figure.name: figure for figure in figures}
    verdicts: list[tuple[Condition, Verdict]] = []
    reasons = []
    for condition in rule:
        if condition.figure not in by_name:
            raise UserError(f"rule: no figure {condition.figure!r}; there are {sorted(by_name)}")
        values = list(by_name[condition.figure].values.values())
        found = condition.judge(values)
        verdicts.append((condition, found))
        reasons.append(_reason(condition, found, values))
    if any(found != HOLDS for condition, found in verdicts if condition.needed):
        verdict = OPEN
    elif any(found == FAILS for _, found in verdicts):
        verdict = FAILS
    else:
        verdict = HOLDS if all(found == HOLDS for _, found in verdicts) else OPEN
    return Judgement(verdict=verdict, reasons=tuple(reasons))


def _reason(condition: Condition, found: Verdict, values: Sequence[float | None]) -> str:
    words = {HOLDS: "met", FAILS: "refuted", OPEN: "open"}[found]
    shown = ", ".join("none" if v is None else f"{v:.3g}" for v in values) or "no run"
    needed = " (needed to tell anything)" if condition.needed else ""
    bounds = f"met {condition.holds}, refuted {condition.fails}"
    return f"{words}{needed}: {condition.figure} = {shown} ({bounds})"


def fingerprint(rule: Sequence[Condition]) -> str:
    """SHA-256 of all that a rule says, so that a change after the runs is seen."""
    text = json.dumps([condition.as_dict() for condition in rule], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(value: float | None) -> float | None:
    """What JSON can hold, to four digits."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
