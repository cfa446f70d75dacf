"""The section of docs/performance.md on the training step (`performance_page.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from performance_parts import Found, markdown


def training(found: Found, reference: Found) -> str:
    """The optimiser step beside torch.compile and the released code."""
    rival = _rival(found)
    real = {stage: "load" in found[stage] for stage in STEPS if _has(found, stage)}
    rows = []
    for stage, each in real.items():
        name = STEPS[stage].format(bytes=found[stage].get("bytes_a_parameter", 7))
        name += "" if all(real.values()) else _MARK[each]
        beside = stage in found.get("beside the rival", STEPS)
        comparable = rival if beside and each == real.get("compiled", each) else None
        ratio = _step(name, found[stage], comparable)
        if stage == "step bf16" and comparable:
            ratio[-1] = _range(_raced(found)) or ratio[-1]
        rows.append([*ratio, _when(found[stage].get("run", "–"))])
    batch, seconds, rate, mfu, peak = reference["released"]["training_step_400_layers"]["rows"][-1]
    own = _step_row("released code, bf16 AdamW", batch, seconds, rate, mfu, f"{peak}", None)
    rows.append([*own, "by hand"])
    head = ("400 layers, 256 + 64 tokens", "samples", "s", "tokens/s", "MFU", "peak GiB")
    head = (*head, "÷ torch.compile", "run")
    return f"""## The training step

AdamW with clipping by the true global norm, on one GPU. MFU: 6N and attention, nothing that is computed
again, of 989 TFLOP/s. The rival under torch.compile has the formula as one writes it, one compiled
block for all layers, every block checkpointed, fp32 weights, our optimiser; what is divided by its figure is of the
same run. Each row is the latest of its kind; their runs are of several days and machines.

{markdown(head, rows)}
{_like_for_like(found)}{_spread(found)}{_races(found)}{_other_cards(found)}{"" if all(real.values()) else _ZEROS}{_gates(found)}"""  # noqa: E501


def _like_for_like(found: Found) -> str:
    """Our fp32 weights against the rival's, of the run nearest in time; the table's ratio is of
    bf16 weights against them."""
    runs = [run for run in found.get("runs", ()) if "load" in (run.get("compiled") or ())]
    ours = found.get("step fp32") or {}
    if not runs or "load" not in ours or "run" not in ours:
        return ""
    near = min(runs, key=lambda run: abs(_minutes(run["date"]) - _minutes(ours["run"])))
    rival = near["compiled"]
    ratio = ours["tokens_per_second"] / rival["tokens_per_second"]
    return f"""That ratio is of bf16 weights against fp32. Like for like, fp32 weights on both sides, it is {ratio:.2f}×:
{ours["tokens_per_second"]:,.0f} tokens/s ({_when(ours["run"])}) against {rival["tokens_per_second"]:,.0f} ({_when(near["date"])}), of two runs, not of one; {ours["samples"]}
samples against {rival["samples"]}. The rival still computes every block again, which ours does only where memory
asks for it.

"""  # noqa: E501


def _minutes(date: str) -> float:
    """Of a run's date, which may be a day alone."""
    return datetime.fromisoformat(date).timestamp() / 60


def _spread(found: Found) -> str:
    """What single steps took, of which the table has the median; no ratio is better than they."""
    both = [found[stage]["all"] for stage in ("step bf16", "compiled") if _has(found, stage)]
    if len(both) < 2:
        return ""
    ours, rival = ([f"{second:.2f}" for second in sorted(each)] for each in both)
    samples = [found[stage]["samples"] for stage in ("step bf16", "compiled")]
    best = min(both[1]) / samples[1] / (min(both[0]) / samples[0])
    return f"""Seconds are medians: of {", ".join(ours)} with bf16 weights and of {", ".join(rival)}
under torch.compile; the best of each give {best:.2f}×.

"""


def _raced(found: Found) -> list[Found]:
    """The runs in which ours and the rival were timed one after the other, with writers that are
    not zero."""
    both = ("step bf16", "compiled")
    return [
        run
        for run in found.get("runs", ())
        if all(_has(run, stage) and "load" in run[stage] for stage in both)
    ]


def _ratio(run: Found) -> float:
    ours, rival = (run[stage]["tokens_per_second"] for stage in ("step bf16", "compiled"))
    return float(ours / rival)


def _range(runs: Sequence[Found]) -> str:
    ends = sorted(f"{_ratio(run):.2f}" for run in runs)
    return f"{'–'.join(dict.fromkeys([ends[0], ends[-1]]))}×" if ends else ""


def _races(found: Found) -> str:
    """What each run makes of the rival, whose steps differ more than ours."""
    each = []
    for run in _raced(found):
        ours, rival = run["step bf16"], run["compiled"]
        best = min(rival["all"]) / rival["samples"] / (min(ours["all"]) / ours["samples"])
        each.append(
            f"- {_when(run['date'])}: {_ratio(run):.2f}× ({best:.2f}×), {ours['samples']} samples "
            f"against {rival['samples']}; the rival was {_held(rival)}"
        )
    if not each:
        return ""
    wide = max(max(run["compiled"]["all"]) / min(run["compiled"]["all"]) for run in _raced(found))
    shares = sorted({run["step bf16"]["load"]["held_by_power"] for run in _raced(found)})
    held = " to ".join(dict.fromkeys(f"{share:.0%}" for share in (shares[0], shares[-1])))
    lines = "\n".join(each)
    return f"""Against torch.compile, run by run, in brackets by the best step of each:

{lines}

The steps of the rival differ by up to {wide - 1:.0%} within a run. Ours were held down by power in
{held} of readings; where the rival was less often it waited, for what was not looked into.

"""


def _held(stage: Found) -> str:
    return f"held down by power in {stage['load']['held_by_power']:.0%} of readings"


def _other_cards(found: Found) -> str:
    """The same step in every other run, each of which had a card of its own."""
    others = [
        f"{run['step bf16']['mfu']:.1%} at {run['step bf16']['load']['sm_mhz']:.0f} MHz "
        f"({_when(run['date'])})"
        for run in found.get("runs", ())
        if _has(run, "step bf16") and "load" in run["step bf16"]
        and run["date"] != found["step bf16"].get("run")
    ]  # fmt: skip
    if not others:
        return ""
    own = found["step bf16"]["load"]["sm_mhz"]
    return f"""With bf16 weights in all other runs, by the kernels of their time:
{", ".join(others)};
that above had {own:.0f} MHz ({_when(found["step bf16"]["run"])}).

"""


def _when(date: str) -> str:
    return date.replace("T", " ")


_MARK = {False: ", zero writers", True: ""}
_ZEROS = """*Zero writers*: as a network has them when training begins, and as all runs before 2026-11-29 had
them, with half of backward's products multiplying zeros, which takes less power and less time
([below](#what-the-cards-power-allows)). Their figures are too good for training.

"""  # noqa: E501


STEPS = {
    "step bf16": "ours, bf16 weights ({bytes} bytes a parameter)",
    "step split": "ours, fp32 weights in two halves (14 bytes)",
    "step fp32": "ours, fp32 weights (16 bytes)",
    "compiled": "torch.compile",
}


def _has(found: Found, stage: str) -> bool:
    return "seconds" in (found.get(stage) or {})


def _rival(found: Found) -> float | None:
    return found["compiled"]["tokens_per_second"] if _has(found, "compiled") else None


def _step(name: str, stage: Found, rival: float | None) -> list[str]:
    keys = ("samples", "seconds", "tokens_per_second", "mfu")
    return _step_row(name, *(stage[key] for key in keys), f"{stage['peak_gib']:.1f}", rival)


def _step_row(
    name: str, samples: int, seconds: float, rate: float, mfu: float, peak: str, rival: float | None
) -> list[str]:
    ratio = f"{rate / rival:.2f}×" if rival else "–"
    return [name, str(samples), f"{seconds:.2f}", f"{rate:,.0f}", f"{mfu:.1%}", peak, ratio]


ONE_BYTE_SINCE = "2026-11-29"  # the second moment of bf16 weights


def _moments_then(run: str) -> str:
    if not "" < run < ONE_BYTE_SINCE:
        return ""
    return f"\nOf {run}: the second moment of bf16 weights had two bytes then, and has one since."


def _gates(found: Found) -> str:
    lines = []
    if "gate" in found:
        errors = found["gate"]["mean_error"]
        lines.append(
            "Gate: gradients of six layers differ from fp32 by "
            + ", ".join(f"{error:.4f} ({name})" for name, error in errors.items())
            + " on average, ‖g − g₃₂‖/‖g₃₂‖."
        )
    if "curves" in found:
        gaps = found["curves"]["gaps"]
        lines.append(
            "Loss of the last 20 of 100 steps against fp32, same seed: "
            + ", ".join(f"{gap:+.2%} ({name})" for name, gap in gaps.items())
            + f"; another seed differs by {found['curves']['between_seeds']:.2%}."
            + _moments_then(found["curves"].get("run", ""))
        )
    return "\n".join(lines) + "\n" if lines else ""
