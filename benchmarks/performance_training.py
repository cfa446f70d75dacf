"""The section of docs/performance.md on the training step (`performance_page.py`)."""

from __future__ import annotations

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
        rows.append(_step(name, found[stage], comparable))
    batch, seconds, rate, mfu, peak = reference["released"]["training_step_400_layers"]["rows"][-1]
    rows.append(_step_row("released code, bf16 AdamW", batch, seconds, rate, mfu, f"{peak}", None))
    head = ("400 layers, 256 + 64 tokens", "samples", "s", "tokens/s", "MFU", "peak GiB")
    head = (*head, "÷ torch.compile")
    return f"""## The training step

AdamW with clipping by the true global norm, on one GPU. MFU: 6N and attention, nothing that is computed
again, of 989 TFLOP/s. The rival under torch.compile has the formula as one writes it, one compiled
block for all layers, every block checkpointed, fp32 weights, our optimiser; what is divided by its figure is of the
same run.

{markdown(head, rows)}
{_spread(found)}{_other_cards(found)}{"" if all(real.values()) else _ZEROS}{_gates(found)}"""  # noqa: E501


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


def _other_cards(found: Found) -> str:
    """The same step in runs on other machines, each with a card of its own."""
    others = [
        f"{run['step bf16']['mfu']:.1%} at {run['step bf16']['load']['sm_mhz']:.0f} MHz "
        f"({run['date'].replace('T', ' ')})"
        for run in found.get("elsewhere", ())
    ]
    if not others:
        return ""
    own = found["step bf16"]["load"]["sm_mhz"]
    return f"""With bf16 weights on other machines: {", ".join(others)};
that above had {own:.0f} MHz ({found["date"].replace("T", " ")}).

"""


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
        )
    return "\n".join(lines) + "\n" if lines else ""
