"""What was understood from the rows, in words whose figures are read from the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

# A figure stands as [[FILE RUN FIELD FORMAT]], of a row of FILE.json, or with the lowest and the
# highest of several runs, [[FILE RUN* FIELD FORMAT]]; [[FILE RUN* over RUN* FIELD FORMAT]] is by
# what part the mean of some is above that of others. Where a row is missing, its paragraph is;
# [[FILE RUN]] is no figure, and says only which row a paragraph is about.
_FIGURE = re.compile(r"\[\[(\S+)\s+(\S+)(?:\s+over\s+(\S+))?\s+(\S+)\s+(\S+)\]\]")
_ABOUT = re.compile(r"\s*\[\[(\S+)\s+(\S+)\]\]")

UNDERSTOOD = """## Understood so far

- **Which to use.** α = β = 1/√L with writers of standard size, the default, is ahead of the best
  rival or ties with it at every depth of every size, at the width of that size, with three seeds or
  more, and no other setting is: ahead at 4, 16 and 100 layers and, after 1,000 steps, at 100 and
  400; a tie at 64, and after 200 steps at 400 and 1000, where its mean is [[gpu
  alpha-standard-400x64-lr3.2e-03-seed* over layerscale-0.01-400x64-lr3.2e-03-seed* validation_loss
  .1%]] and [[gpu alpha-standard-1000x64-lr3.2e-03-seed* over
  layerscale-0.01-1000x64-lr3.2e-03-seed* validation_loss .1%]] above that of LayerScale γ = 0.01.
  One setting is ahead of it somewhere: α = 0 with writers of standard size, at 400 layers after 200
  steps, where the default's mean is [[gpu alpha-standard-400x64-lr3.2e-03-seed* over
  standard-400x64-lr3.2e-03-seed* validation_loss .1%]] above its own, ten seeds each, and in wider
  networks (below).

- **After five times the steps and five times the warm-up that turns round.** At 400 layers and
  3.2e-3 the default ends at [[gpu-long alpha-standard-400x64-lr3.2e-03-seed* validation_loss .3f]],
  LayerScale γ = 0.01 at [[gpu-long layerscale-0.01-400x64-lr3.2e-03-seed* validation_loss .3f]],
  ReZero at [[gpu-long rezero-400x64-lr3.2e-03-seed* validation_loss .3f]], and α = 0 with writers
  of standard size, first after 200 steps, last, at
  [[gpu-long standard-400x64-lr3.2e-03-seed* validation_loss .3f]]. So orders after 200 steps are
  what they are called. At 100 layers the two settings of MV-Split tie, the default at
  [[gpu-long alpha-standard-100x64-lr3.2e-03-seed* validation_loss .3f]]. At 400 layers these four
  were run at one rate, at 100 at three; at 1e-2 there, the rate at which the default was best after
  200 steps, all but ReZero die late, one seed each, at steps
  [[gpu-long *-100x64-lr1.0e-02-seed0 collapse_step .0f]], after they had learned. After 200 steps
  at 3.2e-3 the default ends there at
  [[gpu alpha-standard-100x64-lr3.2e-03-seed* validation_loss .3f]].

- **At 400 layers the paper's start, α = 0 with writers of zeros, falls behind.** β = 1/√L lives at
  1e-4 and 3.2e-4 alone, and comes to
  [[gpu mvsplit-root-400x64-lr3.2e-04-seed* validation_loss .2f]]; a quarter of it lives at no rate.
  At 1e-3 they lose nothing that they had learned: they never learn, and the tokens of their deepest
  quarter are alike ([[gpu mvsplit-root-400x64-lr1.0e-03-seed* similarity .2f]] and
  [[gpu beta-quarter-400x64-lr1.0e-03-seed* similarity .2f]]). β = 1, the paper's at this depth, is
  better: [[gpu mvsplit-1-400x64-lr1.0e-03-seed* validation_loss .2f]] at 1e-3 over three seeds, and
  it dies at 3.2e-3, its tokens not alike ([[gpu mvsplit-1-400x64-lr3.2e-03-seed0 similarity .2f]]).
  Below 400 layers it is the other way about: β = 1 is behind 1/√L at 4, 16, 64 and 100.

- **What makes β = 1/√L learn there**, all else alike, at 3.2e-3: α = β, which reaches
  [[gpu alpha-400x64-lr3.2e-03-seed* validation_loss .2f]]; writers of standard size,
  [[gpu standard-400x64-lr3.2e-03-seed* validation_loss .2f]]; both,
  [[gpu alpha-standard-400x64-lr3.2e-03-seed* validation_loss .2f]]. A warm-up three times as long
  does less, in one seed each: [[gpu warm-3-400x64-lr1.0e-03-seed0 validation_loss .2f]] at 1e-3,
  and [[gpu warm-3-400x64-lr3.2e-03-seed0 validation_loss .2f]] at 3.2e-3. Why has not been looked
  into.

- **At 1000 layers four of nine entries learn at 3.2e-3**: LayerScale γ = 0.01
  ([[gpu layerscale-0.01-1000x64-lr3.2e-03-seed* validation_loss .3f]]), the default
  ([[gpu alpha-standard-1000x64-lr3.2e-03-seed* validation_loss .3f]]), α = β with writers of zeros
  ([[gpu alpha-1000x64-lr3.2e-03-seed* validation_loss .3f]]), whose mean is [[gpu
  alpha-1000x64-lr3.2e-03-seed* over layerscale-0.01-1000x64-lr3.2e-03-seed* validation_loss .1%]]
  above LayerScale's: behind; and Keel, which lives up to 1e-2, the highest rate that was run, and
  ends there at [[gpu keel-1000x64-lr1.0e-02-seed* validation_loss .2f]]. LayerScale γ = 1/√L and
  ReZero live up to 1e-3, at [[gpu layerscale-root-1000x64-lr1.0e-03-seed* validation_loss .2f]] and
  [[gpu rezero-1000x64-lr1.0e-03-seed* validation_loss .2f]]. α = 0 with writers of standard size
  dies at 1e-3 and 3.2e-3 and lives at 3.2e-4, one seed, at
  [[gpu standard-1000x64-lr3.2e-04-seed0 validation_loss .2f]]; with writers of zeros β = 1 lives at
  3.2e-4, one seed, at [[gpu mvsplit-1-1000x64-lr3.2e-04-seed0 validation_loss .2f]], at 1e-3 in two
  seeds of three, at [[gpu mvsplit-1-1000x64-lr1.0e-03-seed0 validation_loss .2f]] and
  [[gpu mvsplit-1-1000x64-lr1.0e-03-seed1 validation_loss .2f]], and β = 1/√L at no rate from 1e-4
  to 1e-3. Nor do plain and DeepNorm.

- **The controls.** MV-Split on attention alone comes to
  [[gpu attention-only-100x64-lr3.2e-03-seed* validation_loss .2f]],
  [[gpu attention-only-400x64-lr1.0e-03-seed* validation_loss .2f]] and
  [[gpu attention-only-1000x64-lr3.2e-04-seed* validation_loss .2f]] at 100, 400 and 1000 layers (at
  1000 one seed each), hard centering, which takes the mean out for good, to
  [[gpu hard-center-100x64-lr1.0e-03-seed* validation_loss .2f]],
  [[gpu hard-center-400x64-lr3.2e-04-seed* validation_loss .2f]] and
  [[gpu hard-center-1000x64-lr1.0e-04-seed* validation_loss .2f]]: no token is like another
  ([[gpu hard-center-400x64-lr3.2e-04-seed* similarity .2f]] at 400), and of those that live there
  only pre-norm learns less.

- **Rates that live.** The default lives from 1e-3 to 1e-2 at 4 to 400 layers, and dies at 1e-2 at
  1000 layers, in both wider shapes and, after step
  [[gpu-long alpha-standard-100x64-lr1.0e-02-seed0 collapse_step .0f]], at 100 layers when it is run
  for 1,000. Of width 128, 100 layers, it learns for
  [[gpu alpha-standard-100x128-lr1.0e-02-seed0 collapse_step .0f]] steps and loses all of it, with
  all tokens alike in the end (similarity
  [[gpu alpha-standard-100x128-lr1.0e-02-seed0 similarity .2f]]): the paper's state, entered with
  MV-Split. α = β with writers of zeros does the same; LayerScale γ = 0.01 and α = 0 with writers of
  standard size live there at that rate, one seed each. So α = β lets networks of 400 and 1000
  layers learn at rates at which they do not with α = 0, and is no guard beyond them; in the wider
  networks it takes rates away. 3.2e-3 is among those that live wherever it was run.

- **Depth against width**, at equally many parameters and 3.2e-3. 400 layers of width 64, 100 of 128
  and 25 of 256 end at [[gpu alpha-standard-400x64-lr3.2e-03-seed* validation_loss .2f]],
  [[gpu alpha-standard-100x128-lr3.2e-03-seed* validation_loss .2f]] and
  [[gpu alpha-standard-25x256-lr3.2e-03-seed* validation_loss .2f]] with the default, at
  [[gpu standard-400x64-lr3.2e-03-seed* validation_loss .2f]],
  [[gpu standard-100x128-lr3.2e-03-seed* validation_loss .2f]] and
  [[gpu standard-25x256-lr3.2e-03-seed* validation_loss .2f]] with α = 0 and writers of standard
  size, at [[gpu layerscale-0.01-400x64-lr3.2e-03-seed* validation_loss .2f]],
  [[gpu layerscale-0.01-100x128-lr3.2e-03-seed* validation_loss .2f]] and
  [[gpu layerscale-0.01-25x256-lr3.2e-03-seed* validation_loss .2f]] with LayerScale γ = 0.01. The
  25 layers are ahead of the 400 with each of them, and equal time says so by far more. In both
  wider shapes α = 0 with such writers is ahead of LayerScale and of the default; the default is
  ahead of LayerScale at 25 layers; at 100 its mean is [[gpu alpha-standard-100x128-lr3.2e-03-seed*
  over layerscale-0.01-100x128-lr3.2e-03-seed* validation_loss .1%]] above LayerScale's, and its
  three seeds lie too far apart to tell. At the small size 4 layers of width 96 are ahead of 16 of
  width 48 with each of the three rules that were run at both. In so few steps depth is not worth
  its parameters, with any rule that was run.

- **The same run twice.** Some runs that were trained again, in other company or alone, came to the
  same loss, most to one that is percents away, for rounding grows, as the table above shows:
  LayerScale γ = 0.01 at 400 layers ends at
  [[gpu layerscale-0.01-400x64-lr3.2e-03-seed0 validation_loss .3f]] alone and at
  [[gpu-again layerscale-0.01-400x64-lr3.2e-03-seed0 validation_loss .3f]] as one of many. A row
  alone counts before one from an ensemble, and of those the later, whatever they say. What is
  called the spread of seeds holds this as well, and of one seed no difference of a few percent says
  anything.

- **Seeds beyond three** were added where entries stood close, to the best rival as to the settings:
  10 at 400 layers of the default, α = 0 with writers of standard size, LayerScale γ = 0.01 and
  ReZero, and 5 of α = β with writers of zeros, 10 at 100 layers of eight entries, 5 at 1000 of the
  default and LayerScale γ = 0.01; each at the one rate that was best before. They were asked for
  with earlier rows in sight, and what was said before them went back and forth: α = 0 with writers
  of standard size was ahead of LayerScale at 400 with three seeds and with five; with ten,
  LayerScale's mean [[gpu layerscale-0.01-400x64-lr3.2e-03-seed* over
  standard-400x64-lr3.2e-03-seed* validation_loss .1%]] above its own, it cannot be told, by a
  little less than two standard errors. More seeds are not all of it: three of the old ones were
  trained again for their task scores, and ended higher, at
  [[gpu standard-400x64-lr3.2e-03-seed0 validation_loss .3f]],
  [[gpu standard-400x64-lr3.2e-03-seed1 validation_loss .3f]] and
  [[gpu standard-400x64-lr3.2e-03-seed2 validation_loss .3f]] in place of
  [[gpu-again standard-400x64-lr3.2e-03-seed0 validation_loss .3f]],
  [[gpu-again standard-400x64-lr3.2e-03-seed1 validation_loss .3f]] and
  [[gpu-again standard-400x64-lr3.2e-03-seed2 validation_loss .3f]]. So what is ahead by 3 or 4%
  over three seeds, as the default after 1,000 steps, is not settled either. Where seeds were added
  the rate stays, for the rule takes that with the most: the tables say where one with fewer has a
  smaller mean.

- [[gpu alpha-standard-400x64-lr3.2e-03-seed0]] **The default was set by a decision after the
  rows**, of 2026-11-30. The rule had set the one before it: α = β with writers of zeros took the
  place of β = 1/√L with α = 0 at both sizes, when each had three seeds at 400 layers. By the rule
  nothing takes the place of that one at both sizes of then. It was moved all the same, because the
  default is to be at least as good as the best rival at every depth that was run at these widths,
  and this setting alone is; with writers of zeros it is behind LayerScale at 400 and 1000. The runs
  of 1,000 steps, more seeds, and those of wider shapes came after the decision. Against it: earlier
  rows chose which were run; α = 0 with writers of standard size is ahead of it at 400 layers after
  200 steps and in both wider shapes, in one of which it cannot be told from LayerScale, with a
  higher mean; the watch has seen it at the small size alone; all of it is toy data and 1,000 steps
  at most. Where β or α is given nothing changed: the paper's setting is where β is (α = 0, writers
  of zeros), as in the deep presets; the shallow ones keep β = 1/√L with α = 0, with which their
  pages were measured. The price: no block begins as an identity, for its branches write and each
  merge leaks 1/√L of the trunk's mean. At the start (1 − 1/√L)^2L of what this was comes through
  the network but for the norms, 0.4% at 4 layers and less than 10⁻⁸ at 100.

- [[gpu alpha-standard-400x64-lr3.2e-03-seed0]] **What is not known.** The paper's own runs are of
  width 1024 at a twentieth of 3.2e-3 with 10 or 50 times the warm-up: nothing here is near them.
  Why α matters is not understood. Task scores are of 48 pictures, which after 200 steps show hardly
  one thing as it was asked for: GenEval tells nothing apart, and the Fréchet distance, in its
  spread, little. The memory of a network alone was measured at 100 and 400 layers, and what the
  watch says in the runs that were not trained as one.

- [[gpu alpha-standard-400x64-lr3.2e-03-seed0]] **Other settings** – free λ, the gains' own rate, ε,
  4/√L – are entries of the bench (`--entries candidates`) without a run.

## What did not work

- Twenty processes on one H200 and 16 cores: every run of 400 layers ran out of memory, and 100
  layers took [[gpu-300-steps *-100x64-* seconds_a_step .2f]] s a step where six processes took
  [[gpu *-100x64-* seconds_a_step .2f]].

- Six runs of 400 layers at a time, beside other work on the GPU:
  [[gpu *-400x64-* seconds_a_step .2f]] s a step. Eight with the device to themselves took half of
  that (Time, above), so the rest was the other work. What limits a single process is the host: it
  takes a third of the steps that eight take together. Hence the ensembles.

- Ensembles beside ten other processes that kept the GPU busy: 200 steps of 400 layers took
  [[gpu keel-400x64-lr1.0e-03-seed0 seconds_trained .0f]] s with 7 members and
  [[gpu alpha-400x64-lr1.0e-03-seed0 seconds_trained .0f]] s with 15: each kernel waits for its
  turn, so that more members cost nothing there.

- [[gpu mvsplit-root-100x64-lr3.2e-03-seed0]] The first gate had 6 layers and would have passed an
  ensemble that gave MV-Split NaN from about 16 layers on: with a leak, padding had a gradient,
  which each norm below multiplied by 1/√ε. Found before the first run on a GPU; the gate has 20
  layers since.
"""


def understood(folder: Path) -> list[str]:
    """The paragraphs whose rows are all in `folder`, and the headings that have some."""
    rows: dict[str, list[dict[str, Any]]] = {
        path.stem: json.loads(path.read_text("utf-8")).get("rows", [])
        for path in folder.glob("*.json")
    }
    lines: list[str] = []
    heading: str | None = None
    for paragraph in UNDERSTOOD.strip().split("\n\n"):
        if paragraph.startswith("#"):
            heading = paragraph
            continue
        text = _filled(paragraph, rows)
        if text is not None:
            lines += [*([heading, ""] if heading else []), text, ""]
            heading = None
    return lines


def _filled(paragraph: str, rows: dict[str, list[dict[str, Any]]]) -> str | None:
    """The paragraph with its figures; None where a row is missing."""
    text = paragraph
    for match in _ABOUT.finditer(paragraph):
        if not _values(rows.get(match[1], []), match[2], "run"):
            return None
        text = text.replace(match.group(), "", 1)
    for match in _FIGURE.finditer(paragraph):
        file, run, other, field, form = match.groups()
        values = _values(rows.get(file, []), run, field)
        if other:
            others = _values(rows.get(file, []), other, field)
            values = [fmean(values) / fmean(others) - 1] if values and others else []
        if not values:
            return None
        ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
        text = text.replace(match.group(), "–".join(ends), 1)
    text = " ".join(text.split())
    indent = "  " if text.startswith("- ") else ""
    return fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _values(rows: list[dict[str, Any]], run: str, field: str) -> list[float]:
    """Of a field, in the rows of the runs of a name with *."""
    pattern = re.compile(re.escape(run).replace(r"\*", ".*"))
    found = [row.get(field) for row in rows if pattern.fullmatch(row["run"])]
    return [value for value in found if value is not None]
