"""What the rows of all sizes say together: which rule at which depth, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mvsplit.reproduce.depth.page_parts import figure, table
from mvsplit.reproduce.depth.plan import BenchSize
from mvsplit.reproduce.depth.table import Cell, for_verdict
from mvsplit.reproduce.depth.verdict import SEEDS, Losses, best, compare

OURS, RIVALS = ("mvsplit", "candidate"), ("rival",)  # kinds of entries, as the rule takes them
# What `RuleConfig` had by default when the rule was written, and since; the last is today's, which
# was set by a decision after the rows (`understood`), not by the rule.
SERVED = ("mvsplit-1", "mvsplit-root", "alpha", "alpha-standard")
TODAY = SERVED[-1]
Found = Sequence[tuple[BenchSize, Sequence[Cell]]]


@dataclass(frozen=True, kw_only=True)
class Depth:
    """What was run at a depth of a size, by entry: losses of seeds at the best rate.

    Attributes:
        name: how sentences call it: its layers, and its steps where one before has as many layers.
    """

    size: str
    layers: int
    name: str
    all: Losses
    rivals: Losses

    @property
    def enough(self) -> list[str]:
        """Entries of which a verdict counts."""
        return [name for name, losses in self.all.items() if len(losses or ()) >= SEEDS]

    @property
    def top(self) -> str | None:
        """The smallest mean among them."""
        return best(self.all)

    @property
    def level(self) -> list[str]:
        """Those that the smallest mean is not ahead of."""
        first = self.all[self.top] if self.top else None
        others = [name for name in self.enough if name != self.top]
        return [name for name in others if compare(first, self.all[name]) != "ahead"]

    @property
    def default(self) -> str:
        """Where today's default stands against the best rival."""
        rival, mine = best(self.rivals), self.all.get(TODAY)
        if rival is None or mine is None or 0 < len(mine) < SEEDS:  # [] is dead at every rate
            return f"cannot tell ({len(mine or ())} seed{'s' * (len(mine or ()) != 1)})"
        return compare(mine, self.rivals[rival])


def by_depth(found: Found) -> list[Depth]:
    """The depths of all sizes, shallow before deep within each."""
    result: list[Depth] = []
    for size, cells in found:
        whole, rivals = (for_verdict(cells, size, kinds) for kinds in ((*OURS, *RIVALS), RIVALS))
        before = {at.layers for at in result}
        for layers, losses in whole.items():
            name = f"{layers} after {size.steps} steps" if layers in before else str(layers)
            has = {"all": losses, "rivals": rivals[layers]}
            result.append(Depth(size=size.name, layers=layers, name=name, **has))
    return result


def in_short(found: Found) -> list[str]:
    """A table of what is best at each depth and what is as good, and what all of it says."""
    labels = {cell.entry.name: cell.entry.label for _, cells in found for cell in cells}
    depths = by_depth(found)
    rows = [
        [
            f"{at.layers} ({at.size})",
            *_top(at, labels),
            "; ".join(f"{labels[name]} ({len(at.all[name] or ())})" for name in at.level)
            or _alone(at),
            at.default,
        ]
        for at in depths
    ]
    head = ("layers (size)", "to use: the smallest mean loss", "seeds", "those it is not ahead of")
    return [
        "## In short\n",
        "Which rule to use at which depth, as far as these rows say it: of entries with "
        f"{SEEDS} seeds or more the one with the smallest mean loss, and those that it is not "
        "ahead of, with their seeds: these tie with it, or the seeds do not tell them apart. The "
        "data are toys and the runs of few steps, so for other widths and longer runs it is a "
        "guess. Between two of these depths nothing was run; what fails here fails from some depth "
        "on, so that the deeper of the two is the safer guide.\n",
        *table((*head, "the default against the best rival"), rows),
        *[f"- {sentence}" for sentence in joint(depths, labels)],
        *(f"- `{size.name}` is {size.hardware}, {size.steps} steps." for size, _ in found),
        "",
    ]


def _alone(at: Depth) -> str:
    return "none" if len(at.enough) > 1 else f"nothing else has {SEEDS} seeds that live"


def _top(at: Depth, labels: dict[str, str]) -> tuple[str, str]:
    if at.top is None:
        return f"nothing has {SEEDS} seeds that live", "–"
    losses = at.all[at.top] or []
    return f"{labels[at.top]}, {figure(losses)}", str(len(losses))


def joint(depths: Sequence[Depth], labels: dict[str, str]) -> list[str]:
    """What holds over all depths, a sentence each."""
    places: dict[str, list[str]] = {}
    for at in depths:
        places.setdefault(at.default.partition(" (")[0], []).append(at.name)
    default = ", ".join(
        f"{_PLACES[word]} at {_listed(places[word])}" for word in _PLACES if word in places
    )
    never = "" if "behind" in places else ", behind it nowhere that can be told"
    sure = [
        f"{at.name} {labels[at.top]}"
        for at in depths
        if at.top and len(at.enough) > 1 and not at.level
    ]
    tops = [at.top for at in depths if at.top]
    best_here = set(tops)
    none = "No rule is best at every depth" if len(best_here) > 1 else "One rule is best everywhere"
    if len(tops) < 2:
        none = "Too few depths were run to tell which rule is best at all of them"
    where = f"ahead of all others with {SEEDS} seeds: at {_listed(sure)}"
    if not sure:
        where = f"at none is one ahead of all others with {SEEDS} seeds"
    return [
        f"{none}, and {where}.",
        f"The default, {labels.get(TODAY, TODAY)}, against the best rival of each depth: "
        f"{default}{never}.",
        *_steady(depths, labels),
        *_lone(depths, labels),
    ]


def _steady(depths: Sequence[Depth], labels: dict[str, str]) -> list[str]:
    """The entries with enough seeds that live at every depth, and where these are level with the
    best."""
    everywhere = [n for n in labels if all(n in at.enough for at in depths)]
    words = []
    for name in everywhere:
        level = [at.name for at in depths if name == at.top or name in at.level]
        words.append(f"{labels[name]} (none is ahead of it at {_listed(level) or 'none'})")
    return [f"Learned at every depth with {SEEDS} seeds or more: {', '.join(words) or 'none'}."]


def _lone(depths: Sequence[Depth], labels: dict[str, str]) -> list[str]:
    """Depths at which there is nothing to compare."""
    return [
        f"At {at.name} (layers) {labels[at.top]} alone has {SEEDS} seeds that live: which rule is "
        "best there cannot be told."
        for at in depths
        if at.top and len(at.enough) == 1
    ]


_PLACES = {"ahead": "ahead", "tie": "a tie", "behind": "behind", "cannot tell": "cannot tell"}


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
