"""What a caption says of a scene, as data and in plain English.

caption    := body [place] [background]
body       := count plural | thing | thing relation thing | thing {", " thing} " and " thing
thing      := article [size] [colour] shape
count      := "two" | "three" | "four", then [colour]
relation   := "left of" | "right of" | "above" | "below"
place      := "in the center" | "in the top left" | …
background := "on a" colour "background"
"""

from __future__ import annotations

from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLURALS = ("circles", "squares", "triangles", "diamonds", "crosses", "rings")
SIZES = ("small", "medium", "large")  # "medium" is never said
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("black", "gray", "white", "brown")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("center", "top left", "top right", "bottom left", "bottom right")
_COUNTS = {2: "two", 3: "three", 4: "four"}
_PLURAL = dict(zip(SHAPES, PLURALS, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """`count` objects of one shape; colour and size are None where the caption is silent."""

    shape: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """All that a caption says, in the order in which it says it."""

    claims: tuple[Claim, ...]
    relation: str | None = None  # where the first claim's object lies, seen from the second's
    place: str | None = None  # where the only object lies
    background: str | None = None

    def text(self) -> str:
        """The caption."""
        parts = [_body(self)]
        if self.place:
            parts.append(f"in the {self.place}")
        if self.background:
            parts.append(f"on a {self.background} background")
        return " ".join(parts)


def _body(statement: Statement) -> str:
    phrases = [_noun_phrase(claim) for claim in statement.claims]
    if statement.relation:
        return f"{phrases[0]} {statement.relation} {phrases[1]}"
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _noun_phrase(claim: Claim) -> str:
    noun = claim.shape if claim.count == 1 else _PLURAL[claim.shape]
    words = " ".join(word for word in (claim.size, claim.colour, noun) if word)
    if claim.count > 1:
        return f"{_COUNTS[claim.count]} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _vocabulary() -> tuple[str, ...]:
    phrases = [*SHAPES, *PLURALS, *COLOURS, *BACKGROUNDS, *RELATIONS, *PLACES, *_COUNTS.values()]
    phrases += ["a an", "and", "small large", "in the", "on a background"]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


VOCABULARY = _vocabulary()
# Four times "a large red circle", once "and" and "on a gray background".
CAPTION_WORDS = 4 * 4 + 5
