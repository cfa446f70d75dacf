"""What was understood of claims only from their runs; no verdict comes of it.

It comes in passages, each with the results that it speaks of, so that a page has none of runs that
are not there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

LOOKS = "[the looks, by depth](../../benchmarks/results/jump_looks_h200_2026-11-30.json)"


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Some sentences.

    Attributes:
        of: the results that they speak of, or lean on, as a folder of pages names them: CLAIM-SIZE,
            or depth-bench.
        paragraph: whether they begin one.
    """

    text: str
    of: tuple[str, ...]
    paragraph: bool


def joined(passages: Sequence[Passage], kept: Collection[str] | None = None) -> str:
    """The passages that speak of nothing but results that are kept; all of them if None."""
    told = [p for p in passages if kept is None or set(p.of) <= set(kept)]
    return "".join(("\n\n" if p.paragraph else " ") + p.text for p in told).strip()


def _of(text: str, *results: str, paragraph: bool = False) -> Passage:
    return Passage(text=text, of=results, paragraph=paragraph)


_HOW_OFTEN = _of(
    "How often these runs were taken at the GPU size, and how much of where they end is rounding, "
    "stands at [modes](modes.md).",
    "modes-gpu",
)

COLLAPSE = (
    _of(
        "At the small size MV-Split with β = 1 does not enter the paper's state, its tokens stay "
        "apart, but it learns too little to count as alive; with β = 1/√L it learns well at the "
        "same rate. So the plain network's collapse is as claimed, and what fails is β = 1 at a "
        "rate as high as this.",
        "collapse-small",
    ),
    _of(
        "After the rise of the rate in `delayed` it fails at the small size, too; at the GPU size "
        "it lives there.",
        "collapse-small",
        "delayed-small",
        "delayed-gpu",
    ),
    _of(
        "From the start it lives at the GPU size as well, at 1.29 to 1.30 times the loss of β = "
        "1/√L. There two of the three plain networks have all tokens alike by the first look, at "
        "step 50, and to the last. The third has not: its tokens stay apart, its loss is below 0.8 "
        "of the floor by step 60, hardly better 140 steps later, and near 0.55 in the last twenty, "
        "so that it lives, at more than twice the loss of MV-Split. A rate ten times the low one "
        "kills there, but not in every seed, and the rule asks for every one.",
        "collapse-small",
        "collapse-gpu",
        "delayed-gpu",
    ),
)

MODES = (
    _of(
        "The row on looks came after the first GPU runs, which looked at every 20th step and did "
        "not see the steps in which tokens became alike; of them the rule before it said: does not "
        "hold.",
        "modes-gpu",
    ),
    _of(
        "Since then a run at that size looks at every second step around the rise, as the small "
        "size did from the first.",
        "modes-small",
        "modes-gpu",
    ),
    _of(
        "At the GPU size the runs were taken three times on 2026-11-30: with few looks, with looks "
        "at every second step around the rise, both for 240 steps (below), and then for 320. "
        "Tokens are alike for good from step 200, 180 and 176 on in the first, by seed, from 202, "
        "204 and 170 in the second, from 202, 204 and 166 in the third. In the second that was too "
        "late in two seeds for the mean over the last fifth, which left open what needs a "
        "collapse; hence the 80 steps more.",
        "modes-gpu",
        paragraph=True,
    ),
    _of(
        "How much of it is rounding: of the last two, on two machines, seeds 0 and 1 have the same "
        "loss to the bit in all 240 steps that they share, seed 2 in the first five. The first "
        "two, of two versions, agree in losses to four digits for 143 steps in seeds 0 and 1 and "
        "for 50 in seed 2.",
        "modes-gpu",
        paragraph=True,
    ),
    _of(
        "What the third shows, with "
        + LOOKS
        + ": in seeds 0 and 1 the loss is at 0.9 of its floor 5 and 4 steps after the rise, and "
        "the tokens are not alike until 42 and 44 steps after it. For so long both parts of the "
        "gradient go up and down together, in layers whose tokens are apart: in the step in which "
        "G_ctr is largest, 31 and 37 times its median in W_O, 0.91 of its square is in the first "
        "quarter of the layers, at a similarity of 0.21 and 0.14. On entry both fall, G_ctr by "
        "some four orders of magnitude and G_mean by one; there is no spike, and none after the 40 "
        "steps in which the rule looks for one.",
        "modes-gpu",
        paragraph=True,
    ),
    _of(
        "In seed 2 the tokens of the deepest quarter are alike for good from six steps after the "
        "rise on, and five steps later, in a single step, G_mean is 98 and 114 times its median in "
        "W_O and W_2, G_ctr less than a third of its own, and 285 of the 400 layers have their "
        "tokens alike: the paper's spike, in one seed of three, and after the entry.",
        "modes-gpu",
        paragraph=True,
    ),
    _of(
        "So G_mean rises without G_ctr where tokens are alike already, and a network that goes in "
        "by way of forty steps of tokens apart has both.",
        "modes-gpu",
        paragraph=True,
    ),
    _of(
        "It is large to begin with, too: before the rise G_mean of W_O is 7.3 to 9.3 times G_ctr, "
        "where it is 0.8 to 0.9 times at the small size.",
        "modes-small",
        "modes-gpu",
    ),
)

ALIGNMENT = (
    _of(
        "The rule counts every look with tokens alike, also those long after the entry.",
    ),
    _of(
        "At the small size the network stands there at the least loss that it can still have, so "
        "that the mean adjoint is noise about zero, and A − 1 with it, while the envelope, of "
        "absolute values, stays high.",
        "alignment-small",
    ),
    _of(
        "At the GPU size the median over such looks is far below the envelope, too, in all runs, "
        "and hides what they show, with "
        + LOOKS
        + ": at the spike of seed 2, the only one that is as the paper has it (`modes`), A − 1 is "
        "66.4 in the layers with tokens alike, and so is the envelope. Of the four looks of the "
        "last fifth, in W_O, seed 0 has −1.0 to −0.99 there, an A of almost nothing, though its "
        "loss stands above that least; seed 1 has 26 to 49, of envelopes of 53 to 58; seed 2 has "
        "0.93 to 2.3, of 22 to 28. Why the three differ is not known.",
        "alignment-gpu",
    ),
    _of(
        "The rule took more than the paper says; `alignment-entry` looks at the entry alone, on "
        "seeds that had not been run when its rule was written.",
    ),
    _of(
        "The first record of the small size is of the version before c1797ed, with which the "
        "envelope of a dead network's shallow layers underflowed in fp32. That version, run where "
        "the runs below were, gives its figures of seed 2 again, with the losses of the runs below "
        "bit for bit: there the rank correlation moved by what was mended, and not by rounding.",
        "alignment-small",
    ),
    _HOW_OFTEN,
)

ENTRY = (
    _of(
        "The small runs were taken twice: at first the envelope of dead shallow layers, long after "
        "the peak, had underflowed in fp32. With that mended the figures that are judged are the "
        "same. In the seed that leaves the verdict open the mean gradient of W_O is largest in "
        "another layer than the last.",
        "alignment-entry-small",
    ),
    _of(
        "At the GPU size A − 1 of W_O is at 0.87 to 0.93 of the envelope at the peak, as claimed; "
        "what fails is that it was far below it: before the rise it is at 0.66 to 0.69, where the "
        "small size has 0.07 to 0.08. There the gradient of W_O is coherent long before anything "
        "happens: in the runs of `modes`, of other seeds, G_mean is 7.3 to 9.3 times G_ctr before "
        "the rise, where it is 0.8 to 0.9 times at the small size, and A − 1 is 9.2 to 14, of an "
        "envelope of 17 to 19 ("
        + LOOKS
        + "). At the spike of seed 2 both are 66: what comes up is the envelope, and A − 1 with "
        "it. Why the gradient is so before is not known.",
        "alignment-entry-small",
        "alignment-entry-gpu",
        "modes-small",
        "modes-gpu",
    ),
)

EXTINCTION = (
    _of(
        "At the GPU size the gradients of queries and keys fall 312 to 705 times within 240 steps, "
        "in two runs of three seeds, and 1535 to 2538 times within 320, of which the first 240 are "
        "the same to the bit in two seeds. What met the bound are the steps that were added: the "
        "fall goes on after the entry, and that of W_O with it.",
        "extinction-gpu",
    ),
    _of(
        "At the small size, in fp32, it is by eight orders of magnitude. That rounding makes the "
        "difference between the sizes, for the exact value is zero where all tokens are one, is "
        "likely, and was not tested.",
        "extinction-small",
        "extinction-gpu",
    ),
    _HOW_OFTEN,
)

DELAYED = (
    _of(
        "At the GPU size MV-Split with β = 1 learns on through the rise that kills the plain "
        "network, to 0.42 to 0.43 of the floor in 240 steps and to 0.31 to 0.32 in 320; at the "
        "small size, where the rate rises 40 times instead of 10, it does not.",
        "delayed-small",
        "delayed-gpu",
    ),
    _of(
        "The steps after which tokens stay alike move with rounding (`modes`): 16 to 40 in the "
        "first runs at the GPU size, 6 to 44 in these.",
        "delayed-gpu",
    ),
)

ORDER = (
    _of(
        "At the small size the rate that kills the plain network is one at which MV-Split with β = "
        "1, the paper's start, learns little, so that the comparison says as much about β and the "
        "rate as about the rules.",
        "order-small",
    ),
    _of(
        "With β = 1/√L (`collapse`) it ends where LayerScale does here.",
        "order-small",
        "collapse-small",
    ),
    _of(
        "At the GPU size MV-Split with β = 1 lives, and two rows say the reverse of Table 1 in "
        "every seed: the best LayerScale ends at 0.81 to 0.82 of its loss, and half way plain at "
        "the low rate, a tenth of the other and not half of it, has 1.12 to 1.15 times its loss. "
        "That the verdict is open and not that the claim does not hold is for the plain network "
        "that survives in one seed.",
        "order-gpu",
    ),
    _of(
        "With β = 1/√L MV-Split is ahead of the best LayerScale, at 0.93 to 0.95 of its loss: "
        "again it is β that decides.",
        "order-small",
        "order-gpu",
        "collapse-gpu",
    ),
)

ATTENTION = (
    _of(
        "At the small size seed 1 leaves the verdict open each time, by another row: in the record "
        "its peak of W_2 over W_O does, in the same run by a later version (below) the rise of "
        "G_mean in W_2. That peak moves by as much between the two as it spreads over seeds.",
        "attention-only-small",
    ),
    _of(
        "At the GPU size seed 0 leaves it open, whose W_O rises 9.2 times without protection, "
        "where a spike is from 10 on.",
        "attention-only-gpu",
    ),
    _of(
        "With protection of attention alone no seed has a spike in W_2 to be moved: the network "
        "lives through the rise of the rate, at 0.303 to 0.332 of the floor in the end, where "
        "MV-Split on both has 0.310 to 0.319 (`delayed`), and G_mean of W_2 rises 2.9 to 6.2 "
        "times. That it is 178 to 242 times that of W_O at the peak says nothing of a spike, and "
        "the row that compares this with the plain network (259 to 393) as little: at α = 0 the "
        "mean of the adjoint does not reach W_O (Eq. 10), and before the rise, when all is well, "
        "G_mean of W_2 is 460 to 513 times that of W_O; at the small size 77 to 93 times, and 3.9 "
        "to 27 at the peak. The two rows are met by how the rule is made. They stay as they were "
        "written; what tells is the rise in W_2.",
        "attention-only-small",
        "attention-only-gpu",
        "delayed-gpu",
    ),
)

TIMESTEP = (
    _of(
        "At the GPU size no layer has it: over the 100 layers R² is 0.732 to 0.815, 0.75 to 0.79 "
        "in the first, and least in the 39th, 25th and 33rd, by seed. The network lives all the "
        "same, at 0.17 of the floor.",
        "timestep-gpu",
    ),
    _of(
        "Mean, spread and mean square of the noisy picture alone give 0.94 on these pictures, 0.72 "
        "on the digits, 0.41 in the paper: here the spread of the input is nearly the time. Tokens "
        "are normed before the first layer, which takes the input's size out of them; that this is "
        "why their mean knows less is likely, and was not tested. A probe of 128 features from "
        "1024 samples fits some noise, as the shuffled times show, −0.10 to −0.13 where 32 "
        "features give −0.02: without it the worst layer would have some 0.03 more.",
        "timestep-small",
        "timestep-gpu",
    ),
)

FRONT = (
    _of(
        "At the small size the share of the run before the deep tokens are alike is met by the "
        "start itself: 0.0125 is step 1 of 80, into which is looked before any update, and there "
        "all tokens are alike from layer 80 of 128 on in seed 0, from layer 65 in seed 1. So what "
        "is shown is that writers of this size begin in that state and training does not leave it, "
        "and not that the first steps bring it about. After some tens of looks rounding decides "
        "where the front stands. In seed 1 the two records of the small size, made on two "
        "processors, go together for so long and then apart. The version of the earlier one, run "
        "on the processor of the later one, gives every loss of the later one in that seed, bit "
        "for bit: no change of the program moved the figure. A spread over two seeds says less of "
        "it than the runs taken again.",
        "front-small",
    ),
    _of(
        "At the GPU size the first look is at step 5 of 100, so that the start was not seen: all "
        "tokens are alike there from layer 66, 60 and 58 on, by seed, and in the last look from "
        "15, 14 and 16 on.",
        "front-gpu",
    ),
    _of(
        "So the front moves towards the first layers, as at the small size, over little more than "
        "the quarter of the depth that the rule asks for, in one seed over exactly that.",
        "front-small",
        "front-gpu",
    ),
)

CONTROL = (
    _of(
        "Attention alone is protected with β = 1, the reference has 1/√L.",
    ),
    _of(
        "Beside MV-Split with β = 1 at the same rate (`collapse`) it is behind at neither size: "
        "0.95 to 0.97 times its loss at the small size, 0.92 to 1.07 times at the GPU size. So its "
        "row says as much of β as of what is protected; what it does where the rate rises at once "
        "is asked by `attention-only`.",
        "controls-small",
        "controls-gpu",
        "collapse-small",
        "collapse-gpu",
    ),
    _of(
        "At the GPU size it learns in every seed and is a quarter behind in one of three, which "
        "leaves the verdict open. The clip dies there as the plain network does, all tokens alike; "
        "hard centering keeps its tokens apart, is at 0.7 of the floor by step 80 and above 1.2 of "
        "it in the end: no remedy, but another death.",
        "controls-gpu",
    ),
)

THOUSAND = (
    _of(
        "At the small size the run is too short to tell: after 60 steps MV-Split has learned no "
        "more than the floor, and in the plain network all tokens are alike.",
        "thousand-small",
    ),
    _of(
        "At the GPU size MV-Split, with the paper's β = 0.03 and α = 0, does not lose what it had "
        "learned: it learns nothing. Its loss comes down to the floor from above and stays, no ten "
        "steps of 200 have a mean below 1.05 of it, and the tokens of its deepest quarter are at a "
        "similarity of 0.95 to 0.97 in the first look, at step 100, where the warm-up ends. In "
        "seed 1 the loss goes up once more, from 1.08 to 1.24 within twenty steps, and they are at "
        "1.00 after it.",
        "thousand-gpu",
    ),
    _of(
        "[The depth bench](depth-bench.md) agrees: at 1000 layers of width 64 β = 1/√L with α = 0 "
        "learns nothing at this rate, with writers of zeros, as they are here, nor at a third or a "
        "tenth of it; with writers of standard size it learns at a third of it. α = β = 1/√L "
        "learns at this rate and at 3.2 times it, in every seed, with such writers, the library's "
        "start, and with zeros, at this rate to losses of 0.34 and 0.38, of a floor of 1.07. Width "
        "and warm-up are other ones there; at 400 layers, with writers of zeros and all else "
        "alike, it is α that decides. So for 1000 layers at rates like these α = β is the start to "
        "take.",
        "thousand-gpu",
        "depth-bench",
    ),
    _of(
        "Of the paper's own run nothing is said: a sixth of this rate, reached after 1,000 steps "
        "of warm-up, width 1024, 100,000 steps.",
        "thousand-gpu",
    ),
)
