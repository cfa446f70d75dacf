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
# what part the mean of some is above that of others. Where a row is missing, its paragraph is.
_FIGURE = re.compile(r"\[\[(\S+)\s+(\S+)(?:\s+over\s+(\S+))?\s+(\S+)\s+(\S+)\]\]")

UNDERSTOOD = """## Understood so far

- **At 400 layers MV-Split with α = 0 and writers of zeros, the paper's start, falls behind here.**
  β = 1/√L ends at [[gpu mvsplit-root-400x64-lr1.0e-03-seed* validation_loss .2f]] at 1e-3 and
  [[gpu mvsplit-root-400x64-lr3.2e-03-seed* validation_loss .2f]] at 3.2e-3, a quarter of it at
  [[gpu beta-quarter-400x64-lr1.0e-03-seed* validation_loss .2f]] and
  [[gpu beta-quarter-400x64-lr3.2e-03-seed* validation_loss .2f]], β = 1 at
  [[gpu mvsplit-1-400x64-lr3.2e-03-seed* validation_loss .2f]] (3.2e-3 alone), where LayerScale
  γ = 0.01 and ReZero reach [[gpu layerscale-0.01-400x64-lr3.2e-03-seed* validation_loss .2f]] and
  [[gpu rezero-400x64-lr3.2e-03-seed* validation_loss .2f]]. With β = 1/√L and a quarter of it these
  runs lose nothing that they had learned: they never learn, and the tokens of their deepest quarter
  are alike ([[gpu mvsplit-root-400x64-lr1.0e-03-seed* similarity .2f]] and
  [[gpu beta-quarter-400x64-lr1.0e-03-seed* similarity .2f]] at 1e-3). The one run of β = 1 comes
  just below the floor, loses that again, and its tokens are not alike
  ([[gpu mvsplit-1-400x64-lr3.2e-03-seed0 similarity .2f]]): another way to fail. At 3.2e-4 β =
  1/√L lives and
  comes to [[gpu mvsplit-root-400x64-lr3.2e-04-seed* validation_loss .2f]] in 200 steps.

- **What makes it learn at 400 layers**, with β = 1/√L and all else alike, over five seeds each at
  3.2e-3: α = β, which reaches [[gpu alpha-400x64-lr3.2e-03-seed* validation_loss .2f]]; writers of
  standard size, [[gpu standard-400x64-lr3.2e-03-seed* validation_loss .2f]]; both,
  [[gpu alpha-standard-400x64-lr3.2e-03-seed* validation_loss .2f]]. At 1e-2 the one run of such
  writers with α = 0 dies ([[gpu standard-400x64-lr1.0e-02-seed0 validation_loss .2f]]); with α = β
  three seeds reach [[gpu alpha-standard-400x64-lr1.0e-02-seed* validation_loss .2f]]. A warm-up
  three times as long does less, in one seed each:
  [[gpu warm-3-400x64-lr1.0e-03-seed0 validation_loss .2f]] at 1e-3, and
  [[gpu warm-3-400x64-lr3.2e-03-seed0 validation_loss .2f]] at 3.2e-3. Why has not been looked into;
  all of it is with a warm-up of 20 steps, and longer ones may do without.

- **At 1000 layers α = 0 does not learn at 3.2e-3 or at 1e-3; α = β does, in every seed.** With α =
  0 and writers of standard size, which are ahead of all at 400, three seeds end at [[gpu
  standard-1000x64-lr3.2e-03-seed* validation_loss .2f]], and the one at 1e-3 at [[gpu
  standard-1000x64-lr1.0e-03-seed0 validation_loss .2f]]. That is above the floor of [[gpu
  standard-1000x64-lr3.2e-03-seed0 floor .2f]], and their training losses, means of ten steps, never
  came under it: they lose nothing that they had learned, and the table of collapses has none of
  them. The token similarity of their deepest quarter is [[gpu standard-1000x64-lr*-seed* similarity
  .2f]] at the end. At 3.2e-3, three seeds each, α = β ends at [[gpu alpha-1000x64-lr3.2e-03-seed*
  validation_loss .3f]] with writers of zeros, at [[gpu alpha-standard-1000x64-lr3.2e-03-seed*
  validation_loss .3f]] with those of standard size, the default, LayerScale γ = 0.01 at [[gpu
  layerscale-0.01-1000x64-lr3.2e-03-seed* validation_loss .3f]]. The mean of the first is [[gpu
  alpha-1000x64-lr3.2e-03-seed* over layerscale-0.01-1000x64-lr3.2e-03-seed* validation_loss .1%]]
  above LayerScale's, by which it is behind, and that of the default [[gpu
  alpha-standard-1000x64-lr3.2e-03-seed* over layerscale-0.01-1000x64-lr3.2e-03-seed*
  validation_loss .1%]] above, which is a tie; between these two the seeds do not decide. At 1e-3
  all three live, one seed each, and end higher: [[gpu alpha-1000x64-lr1.0e-03-seed0 validation_loss
  .2f]], [[gpu alpha-standard-1000x64-lr1.0e-03-seed0 validation_loss .2f]] and [[gpu
  layerscale-0.01-1000x64-lr1.0e-03-seed0 validation_loss .2f]]. The one run of ReZero, which stands
  beside LayerScale at 400, ends at [[gpu rezero-1000x64-lr3.2e-03-seed0 validation_loss .2f]] with
  a similarity of [[gpu rezero-1000x64-lr3.2e-03-seed0 similarity .2f]]. They were trained nine and
  eight as one.

- **What this does not say.** Two learning rates, 200 steps with 20 of warm-up, width 64: whether
  α = 0 lives at lower rates is not known, and at 400 layers, with writers of zeros, it does at
  3.2e-4. Whether a rate above 3.2e-3 is better for those that live is not known either. α and
  β are those that the paper starts with at this depth, the writers are not: its are zeros, with
  which α = 0 does not learn at these rates at 400 layers (above) and was not run here. Elsewhere it
  was: three seeds of [the claim on 1000 layers](thousand.md), of width 128 on these shapes at 1e-3
  after 100 steps of warm-up, learn nothing in 200 steps, and of the two networks that
  [growth](../growth.md#to-1000-layers) has from the start, one on digits and one of width 128 on
  these shapes at 1e-3, neither learns, in fewer steps.
  The paper's own run, of width 1024 at a twentieth of the higher rate with
  50 times the warm-up, is another thing. What would tell more: α = 0 at 3.2e-4, with writers of
  zeros as well, and seeds 3 and 4 of the three that live. Nine networks took
  [[gpu alpha-1000x64-lr3.2e-03-seed0 seconds .0f]] s of an H200, beside another process, and eight
  [[gpu alpha-1000x64-lr3.2e-03-seed1 seconds .0f]] s.

- **At 100 layers** three settings with β = 1/√L are ahead of the best rival, three seeds each, and
  tie with each other: α = 0 ([[gpu mvsplit-root-100x64-lr3.2e-03-seed* validation_loss .3f]] at
  3.2e-3), α = 0 with writers of standard size
  ([[gpu standard-100x64-lr1.0e-02-seed* validation_loss .3f]] at 1e-2), and α = β with such writers
  ([[gpu alpha-standard-100x64-lr1.0e-02-seed* validation_loss .3f]] at 1e-2, the highest rate that
  was tried of them; [[gpu alpha-standard-100x64-lr3.2e-03-seed* validation_loss .3f]] at 3.2e-3).
  α = β with writers of zeros ties with the rival, at
  [[gpu alpha-100x64-lr3.2e-03-seed* validation_loss .3f]] at 3.2e-3, to which its best rate moved
  when that had three seeds, too; at 1e-2 it ends at
  [[gpu alpha-100x64-lr1.0e-02-seed* validation_loss .3f]]. α = 0 with writers of standard size is
  as good at 3.2e-3 as at 1e-2 ([[gpu standard-100x64-lr3.2e-03-seed* validation_loss .3f]]).

- **How large β is**, at α = 0. β = 1 is behind 1/√L at 4, 16 and 100 layers. Between 1/√L and a
  quarter of it the seeds show no difference up to 100 layers.

- **The same run twice.** LayerScale γ = 0.01 at 400 layers ends at [[gpu
  layerscale-0.01-400x64-lr3.2e-03-seed0 validation_loss .3f]] alone and at [[gpu-again
  layerscale-0.01-400x64-lr3.2e-03-seed0 validation_loss .3f]] as one of many, more than a tie
  apart, though the two ways differ by rounding alone (above). α = β with writers of zeros at 64
  layers, in fp32, ends at [[small alpha-64x48-lr3.2e-03-seed0 validation_loss .3f]] alone and at
  [[small-again alpha-64x48-lr3.2e-03-seed0 validation_loss .3f]] as one of five. The default, at
  100 layers and 1e-2, ends at [[gpu-again alpha-standard-100x64-lr1.0e-02-seed0 validation_loss
  .3f]] as one of [[gpu-again alpha-standard-100x64-lr1.0e-02-seed0 together .0f]] and at [[gpu
  alpha-standard-100x64-lr1.0e-02-seed0 validation_loss .3f]] as one of [[gpu
  alpha-standard-100x64-lr1.0e-02-seed0 together .0f]], which counts. Of one seed at such depths no
  difference of a few percent says anything.

- **The default is α = β = 1/√L with writers of standard size, by a decision after the rows**, of
  2026-11-30. The rule had set the one before it: α = β with writers of zeros took the place of
  β = 1/√L with α = 0 at both sizes, when each had three seeds at 400 layers. The rule and what it
  gives stand above as they were written, and by them nothing takes the place of that one at both
  sizes. It was moved all the same, because the default is to be at least as good as the best rival
  at every depth that was run, and this setting alone is, with three seeds or more: it is ahead
  at 4, 16 and 100 layers and ties with it at 64, 400 and 1000, which no other setting does. With
  writers of zeros it is behind LayerScale at 1000, by
  [[gpu alpha-1000x64-lr3.2e-03-seed* over layerscale-0.01-1000x64-lr3.2e-03-seed* validation_loss
  .1%]], and dies at 1e-2 in wider networks (below). Against it: the decision was made
  with the rows in sight, and earlier rows chose which were run; at 400 layers
  α = 0 with writers of standard size is ahead of it; at 1000 its mean is
  [[gpu alpha-standard-1000x64-lr3.2e-03-seed* over layerscale-0.01-1000x64-lr3.2e-03-seed*
  validation_loss .1%]] above LayerScale's; it has not been run in the wider shapes, and the watch
  has seen it at the small size alone; all of it is toy data and 200 steps at most. Where β or α is
  given nothing changed: the paper's setting is where β is (α = 0, writers of zeros), as in the
  deep presets; the shallow ones keep β = 1/√L with α = 0, with which their pages were measured. The
  price: no block begins as an identity, for its branches write and each merge leaks 1/√L of the
  trunk's mean. At the start (1 − 1/√L)^2L of what this was comes through the network but for the
  norms, 0.4% at 4 layers and less than 10⁻⁸ at 100.

- **What the rule gives.** By the small size writers of standard size take the place of those of
  zeros with α = β: ahead at 16 layers, and behind nowhere. By 100 and 400 layers α = 0 with such
  writers would: at 400, with five seeds each, it is ahead of α = β with either, and behind nothing
  at 100. At 1000 that very setting does not learn at either rate that was run, and the rule, which
  asks for three seeds that live at every depth, has nothing take that place. By the small size it
  is no candidate either, behind α = β with such writers at 4 and 16 layers. These tie with α = β
  and zeros at 400, with five seeds each, and at 100 and 1000 the seeds do not decide. With α = β
  each network with them lives to 1e-2, the highest rate at which it was run, at these widths; with
  α = 0 one of three dies at 64 layers and 1e-2, the only one at 400 layers and 1e-2, and at 1000
  layers all three at 3.2e-3 and the one at 1e-3. Were the depths of both sizes judged as one,
  nothing would become the default: α = 0 and α = β with such writers are each behind the other
  somewhere.

- **Seeds that chose nothing.** With three seeds α = β with writers of zeros was ahead of LayerScale
  and of α = 0 at 4 layers, of the latter by 2.00 standard errors. Seeds 3 to 5, run when it had
  become the default, ended at [[small alpha-4x48-lr3.2e-03-seed3 validation_loss .3f]],
  [[small alpha-4x48-lr3.2e-03-seed4 validation_loss .3f]] and
  [[small alpha-4x48-lr3.2e-03-seed5 validation_loss .3f]], and neither could be told
  any more.
  LayerScale's own seeds 3 to 5 came later, at
  [[small layerscale-0.01-4x48-lr1.0e-02-seed3 validation_loss .3f]],
  [[small layerscale-0.01-4x48-lr1.0e-02-seed4 validation_loss .3f]] and
  [[small layerscale-0.01-4x48-lr1.0e-02-seed5 validation_loss .3f]]: with six seeds of each
  it is ahead again, by little more than the two standard errors that count. What goes back and
  forth with every three seeds is not settled. Seed 3
  of 64 layers, [[small alpha-64x48-lr3.2e-03-seed3 validation_loss .3f]], is its worst there, and
  it
  stays ahead of α = 0. At 100 layers there are no such seeds.

- **Seeds 3 and 4 at 400 layers**, at 3.2e-3, of the three settings that learn there. α = 0
  with writers of standard size ended at
  [[gpu standard-400x64-lr3.2e-03-seed3 validation_loss .3f]] and
  [[gpu standard-400x64-lr3.2e-03-seed4 validation_loss .3f]], α = β with writers of zeros at
  [[gpu alpha-400x64-lr3.2e-03-seed3 validation_loss .3f]] and
  [[gpu alpha-400x64-lr3.2e-03-seed4 validation_loss .3f]], the default at
  [[gpu alpha-standard-400x64-lr3.2e-03-seed3 validation_loss .3f]] and
  [[gpu alpha-standard-400x64-lr3.2e-03-seed4 validation_loss .3f]]. With three seeds the first was
  ahead of the best rival, with which the size of a GPU had said that MV-Split is at least as good
  as its rivals, and the seeds did not decide between it and the second. With five it is ahead of
  both others.
  LayerScale's own seeds 3 and 4 came later, at
  [[gpu layerscale-0.01-400x64-lr3.2e-03-seed3 validation_loss .3f]] and
  [[gpu layerscale-0.01-400x64-lr3.2e-03-seed4 validation_loss .3f]]: with five of each the first is
  ahead again, LayerScale's mean being
  [[gpu layerscale-0.01-400x64-lr3.2e-03-seed* over standard-400x64-lr3.2e-03-seed*
  validation_loss .1%]] above its own, by little more than the two standard errors that count. What
  goes back and forth with every two seeds is not settled. ReZero and LayerScale γ = 1/√L have three
  seeds still. The default had tied with LayerScale at 1e-2,
  where three end at [[gpu alpha-standard-400x64-lr1.0e-02-seed* validation_loss .3f]]. The two
  seeds were added at 3.2e-3 alone, which moved its rate there, for the rule takes the rate with the
  most; the seeds did not decide there, and with LayerScale's five they tie.

- **By depth**, on these runs: at 4 and 16 layers the default, ahead of the rivals with three seeds;
  at 64 nothing is ahead, and α = β with writers of zeros has the smallest mean; at 100 MV-Split
  with β = 1/√L and writers of standard size, whatever α, or with α = 0 and writers of zeros; at 400
  α = 0 and writers of standard size, ahead of all others with three seeds; at 1000 LayerScale
  γ = 0.01, with which the default ties, while α = 0 does not learn and α = β with writers of zeros
  is behind.

- **Depth against width**, at equally many parameters. At the small size: 4 layers of width 96 are
  ahead of 16 layers of width 48, which have as many parameters, with each of the three rules that
  were run at both. α = β with writers of zeros ends at [[small alpha-4x96-lr3.2e-03-seed*
  validation_loss .2f]] and [[small alpha-16x48-lr3.2e-03-seed* validation_loss .2f]], LayerScale γ
  = 0.01 at [[small layerscale-0.01-4x96-lr3.2e-03-seed* validation_loss .2f]] and [[small
  layerscale-0.01-16x48-lr1.0e-02-seed* validation_loss .2f]]. At the size of a GPU, at 3.2e-3, the
  best rate of each: 400 layers of width 64, 100 of 128 and 25 of 256 end at [[gpu
  alpha-400x64-lr3.2e-03-seed* validation_loss .2f]], [[gpu alpha-100x128-lr3.2e-03-seed0
  validation_loss .3f]] and [[gpu alpha-25x256-lr3.2e-03-seed0 validation_loss .3f]] with it, at
  [[gpu layerscale-0.01-400x64-lr3.2e-03-seed* validation_loss .2f]], [[gpu
  layerscale-0.01-100x128-lr3.2e-03-seed0 validation_loss .3f]] and [[gpu
  layerscale-0.01-25x256-lr3.2e-03-seed0 validation_loss .3f]] with LayerScale γ = 0.01: the
  shallower is ahead at each step, of one seed at the wider two. The default has not been run in the
  wider ones. In so few steps depth is not worth its parameters, whatever the rule.

- **At 1e-2 α = β with writers of zeros dies in wider networks**, one seed each. Of width 256 its
  loss is once a little below the floor and goes up again; of width 128, 100 layers, it learns for
  80 steps and then loses all of it. Both end at [[gpu alpha-25x256-lr1.0e-02-seed0 validation_loss
  .2f]] and [[gpu alpha-100x128-lr1.0e-02-seed0 validation_loss .2f]], above the floor, with all
  tokens alike (similarity [[gpu alpha-25x256-lr1.0e-02-seed0 similarity .2f]] and [[gpu
  alpha-100x128-lr1.0e-02-seed0 similarity .2f]]): the paper's state, entered with MV-Split.
  LayerScale γ = 0.01 lives at that rate in both, at [[gpu layerscale-0.01-25x256-lr1.0e-02-seed0
  validation_loss .2f]] and [[gpu layerscale-0.01-100x128-lr1.0e-02-seed0 validation_loss .2f]]. At
  width 64 α = β lives there with either writers, at 100 layers and at 400; with those of standard
  size, the default, it was not run in wider ones. So α = β widens the range of rates at which deep
  networks learn and is no guard beyond it; 3.2e-3 is within it wherever it was run.

- **Writers of standard size** with α = β end at
  [[small alpha-standard-4x48-lr3.2e-03-seed* validation_loss .2f]] at 4 layers and at
  [[small alpha-standard-16x48-lr1.0e-02-seed* validation_loss .2f]] at 16, three seeds each, ahead
  of the best rival at both and with the smallest mean of all; at 16 their best rate is the highest
  that was tried. At 64 they end at
  [[small alpha-standard-64x48-lr3.2e-03-seed* validation_loss .2f]] and tie with the best rival,
  with which the small size says that MV-Split is at least as good as its rivals: they alone tie or
  are ahead at each of its depths. Such writers with α = 0 had carried that verdict before.
  Three more seeds of Keel at 16 layers,
  [[small keel-16x48-lr1.0e-02-seed3 validation_loss .3f]],
  [[small keel-16x48-lr1.0e-02-seed4 validation_loss .3f]] and
  [[small keel-16x48-lr1.0e-02-seed5 validation_loss .3f]], left its mean where it was and widened
  its spread, and that verdict went until these came. The more settings are
  tried, the sooner one lies within a tie.
  At 100 layers they are ahead of the best rival, with α = 0 and with α = β; at 400 with α = 0, with
  α = β they tie with it; at 1000 they tie with α = β, and with α = 0 they do not learn. At 64
  layers and 1e-2 those with α = 0 end at
  [[small standard-64x48-lr1.0e-02-seed* validation_loss .2f]] over three seeds: one of these dies.

- **Other settings** – free λ, the gains' own rate, ε, 4/√L – are entries of the bench (`--entries
  candidates`) without a run.

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

- The first gate had 6 layers and would have passed an ensemble that gave MV-Split NaN from about 16
  layers on: with a leak, padding had a gradient, which each norm below multiplied by 1/√ε. Found
  before the first run on a GPU; the gate has 20 layers since.
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
