"""Claim: the detector catches every recorded collapse with the right verdict, and a healthy run
gives no alarm.

    python benchmarks/detector_quality.py [--json FILE] [--page FILE --live FILE]

Replays the corpus (results/recorded, made by record_runs.py) and compares the alarms with the truth
of its manifest: `mean-mode` for a collapsed run, `divergence` for a diverged one, none for a
healthy one. Runs that collapsed for a while and recovered are reported apart. The lead is the step
of the lock-in (Q and K receive under 1 % of the writers' gradients from there on), and of the first
spike of the writers' gradients, minus the step of the first alarm. Three logs are made of each run:
all fields, metrics alone, and `step, loss, grad_norm`. The page, docs/detector.md, shows the result
of detector_live.py beside it.

Cost: half a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import spike_layers
from corpus import FOLDER, read_manifest, read_records

from mvsplit.diagnostics.detector import Detector
from mvsplit.diagnostics.events import Event
from mvsplit.diagnostics.logs import Record

EXPECTED = {"collapsed": "mean-mode", "diverged": "divergence", "healthy": None}
_PAGE = Path(__file__).with_name("detector_page.md")
_SPIKES = Path(__file__).parent / "results" / "spike_layers_cpu.json"
_BARE = ("step", "loss", "grad_norm")

Log = Callable[[Sequence[Record]], Iterable[Record]]
LOGS: dict[str, Log] = {
    "all fields": lambda records: records,
    "metrics only": lambda records: [r for r in records if "loss" in r],
    "step, loss, grad_norm": lambda records: [
        {name: r[name] for name in _BARE} for r in records if "loss" in r
    ],
}


def judge(row: dict[str, Any], records: Iterable[Record]) -> dict[str, Any]:
    """What the detector says of one run, beside the truth about it."""
    detector = Detector()
    events: list[Event] = [e for record in records for e in detector.update(record)]
    alarms = [e for e in events if e.level == "alarm"]
    first = alarms[0] if alarms else None
    named = next((e for e in alarms if e.verdict == EXPECTED.get(row["truth"]["label"])), None)
    truth = row["truth"]
    return {
        "run": row["name"],
        "held_out": row["held_out"],
        "truth": truth["label"],
        "verdict": first.verdict if first else None,
        "step": first.step if first else None,
        "named_step": named.step if named else None,
        "right": _is_right(truth["label"], [e.verdict for e in alarms]),
        "layer": next((e.layer for e in alarms if e.layer is not None), None),
        "lead_to_lock_in": _lead(first, truth["lock_in_step"]),
        "lead_to_spike": _lead(first, truth["spike_step"]),
        "other_alarms": sorted({e.verdict for e in alarms[1:]} - {first.verdict if first else ""}),
        "warnings": sorted({e.verdict for e in events if e.level == "warning"}),
    }


def _is_right(label: str, alarms: Sequence[str]) -> bool | None:
    """Whether the alarms say of a run what became of it. A collapse may be called something else
    before it shows what it is; a run that diverged is never to be called a collapse."""
    if label not in EXPECTED:
        return None
    expected = EXPECTED[label]
    if expected is None:
        return not alarms
    return expected in alarms and (label == "collapsed" or "mean-mode" not in alarms)


def _lead(alarm: Event | None, step: int | None) -> int | None:
    return None if alarm is None or step is None else step - alarm.step


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of one log over some runs."""
    collapsed, diverged, healthy, recovered = (
        [r for r in rows if r["truth"] == label]
        for label in ("collapsed", "diverged", "healthy", "recovered")
    )
    leads = [r["lead_to_lock_in"] for r in collapsed if r["lead_to_lock_in"] is not None]
    spiked = [r["lead_to_spike"] for r in collapsed if r["lead_to_spike"] is not None]
    return {
        "collapsed": len(collapsed),
        "caught": sum(r["verdict"] is not None for r in collapsed),
        "right_verdict": sum(r["right"] for r in collapsed),
        "only_stalled": sum(r["verdict"] is None and "stalled" in r["warnings"] for r in collapsed),
        "diverged": len(diverged),
        "diverged_caught": sum(r["verdict"] is not None for r in diverged),
        "diverged_right_verdict": sum(r["right"] for r in diverged),
        "healthy": len(healthy),
        "false_alarms": sum(r["verdict"] is not None for r in healthy),
        "false_stalled": sum("stalled" in r["warnings"] for r in healthy),
        "recovered": len(recovered),
        "recovered_alarmed": sum(r["verdict"] is not None for r in recovered),
        "lead_to_lock_in_median": statistics.median(leads) if leads else None,
        "lead_to_lock_in_least": min(leads, default=None),
        "alarm_by_lock_in": sum(lead >= 0 for lead in leads),
        "with_lock_in": len(leads),
        "alarm_by_spike": sum(lead >= 0 for lead in spiked),
        "mean_mode_by_spike": sum(
            r["named_step"] is not None and r["named_step"] - r["step"] <= r["lead_to_spike"]
            for r in collapsed
            if r["lead_to_spike"] is not None
        ),
        "with_spike": len(spiked),
    }


def measure(folder: Path) -> dict[str, Any]:
    """The results of every log and run, and their counts by split."""
    found: dict[str, Any] = {"logs": {}}
    manifest = read_manifest(folder)["runs"]
    for name, log in LOGS.items():
        rows = [judge(row, log(read_records(folder / row["file"]))) for row in manifest]
        found["logs"][name] = {
            "tuned": summary([r for r in rows if not r["held_out"]]),
            "held out": summary([r for r in rows if r["held_out"]]),
            "runs": rows,
        }
    return found


def page(found: dict[str, Any], live: dict[str, Any]) -> str:
    """docs/detector.md."""
    logs = found["logs"]
    live_counts = "\n".join(
        f"| {split} | {_live_counts(live[split])} |" for split in ("tuned", "held out")
    )
    live_leads = "\n".join(
        f"| {r['run']} | {'yes' if r['held_out'] else ''} | {r['truth']} | {_text(r['spike'])} | "
        f"{_text(r['lock_in'])} | {_alarms(r)} | {r['looks']} of {r['steps']} |"
        for r in live["runs"]
        if r["truth"] != "healthy"
    )
    counts = "\n".join(
        f"| {log} | {split} | {_counts(logs[log][split])} |"
        for log in logs
        for split in ("tuned", "held out")
    )
    leads = "\n".join(
        f"| {r['run']} | {'yes' if r['held_out'] else ''} | {r['verdict']} | "
        + " | ".join(_text(r[n]) for n in ("step", "named_step"))
        + " | "
        + " | ".join(_text(r[n]) for n in ("lead_to_lock_in", "lead_to_spike", "layer"))
        + " |"
        for r in logs["all fields"]["runs"]
        if r["truth"] == "collapsed"
    )
    mistakes = "\n".join(
        f"| {log} | {r['run']} | {r['truth']} | {_text(r['verdict'])} at {_text(r['step'])}"
        f"{''.join(', ' + name for name in r['other_alarms'])} |"
        for log in list(logs)[:2]
        for r in logs[log]["runs"]
        if r["right"] is False
    )
    return _PAGE.read_text(encoding="utf-8").format(
        counts=counts,
        leads=leads,
        mistakes=mistakes or "| none | | | |",
        **_jumps(live["runs"]),
        live_counts=live_counts,
        live_leads=live_leads,
        spike_layers=spike_layers.table(json.loads(_SPIKES.read_text(encoding="utf-8"))),
        collapsed=logs["metrics only"]["tuned"]["right_verdict"],
        bare=_bare(logs["step, loss, grad_norm"]["tuned"]),
        live_looks=f"{max(live[s]['looks_per_step'] for s in ('tuned', 'held out')) * 100:.0f} %",
    )


def _bare(s: dict[str, Any]) -> str:
    """What becomes of the collapses of a bare log."""
    other = s["caught"] - s["right_verdict"]
    silent = s["collapsed"] - s["caught"] - s["only_stalled"]
    return (
        f"Of the {s['collapsed']} tuned collapses\n  it names {s['right_verdict']}, calls {other} "
        f"something else, {s['only_stalled']} no more than `stalled`, and says nothing of {silent}"
    )


def _jumps(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the learning rate's jumps do at once, in runs that bear them and in those that die."""
    jumped = [r for r in rows if r["jump"] is not None]
    bears = [r["jump"] for r in jumped if r["truth"] == "healthy"]
    dies = [r["jump"] for r in jumped if r["truth"] in ("collapsed", "diverged")]
    spiked = [r for r in jumped if r["truth"] == "collapsed" and r["at_spike"]]

    def median(look: str, field: str) -> str:
        found = statistics.median(r[look][field] for r in spiked if r[look])
        return f"{found:.0f}" if found >= 10 else f"{found:.2g}"

    return {
        "spiked": str(len(spiked)),
        "spike_tcs": median("at_spike", "tcs_deep"),
        "spike_ratio": median("at_spike", "mode_ratio"),
        "after_tcs": median("two_after_spike", "tcs_deep"),
        "after_ratio": median("two_after_spike", "mode_ratio"),
        "bears": str(len(bears)),
        "bears_writer": f"{max(jump['writer'] for jump in bears):.1f}",
        "bears_loss": f"{max(jump['loss'] for jump in bears):.2f}",
        "dies": str(len(dies)),
        "dies_loss": f"{min(jump['loss'] for jump in dies):.2f}",
        "dies_far": str(sum(jump["loss"] > 1.8 for jump in dies)),
    }


def _live_counts(s: dict[str, Any]) -> str:
    return (
        f"{s['caught']}/{s['collapsed']} | {s['as_mean_mode']}/{s['collapsed']} | "
        f"{s['diverged_caught']}/{s['diverged']} | {s['diverged_as_mean_mode']}/{s['diverged']} | "
        f"{s['false_alarms']}/{s['healthy']} | {s['alarm_by_lock_in']}/{s['with_lock_in']} | "
        f"{s['alarm_by_spike']}/{s['with_spike']} | {s['mean_mode_by_spike']}/{s['with_spike']} | "
        f"{s['mean_mode_two_after_spike']}/{s['with_spike']}"
    )


def _alarms(row: dict[str, Any]) -> str:
    """The first alarm of each verdict."""
    first: dict[str, int] = {}
    for alarm in row["alarms"]:
        first.setdefault(alarm["verdict"], alarm["step"])
    return ", ".join(f"{verdict} {step}" for verdict, step in first.items()) or "–"


def _counts(s: dict[str, Any]) -> str:
    return (
        f"{s['caught']}/{s['collapsed']} | {s['right_verdict']}/{s['collapsed']} | "
        f"{s['diverged_right_verdict']}/{s['diverged']} | {s['false_alarms']}/{s['healthy']} | "
        f"{s['recovered_alarmed']}/{s['recovered']} | {s['alarm_by_lock_in']}/{s['with_lock_in']} |"
        f" {s['alarm_by_spike']}/{s['with_spike']} | {s['mean_mode_by_spike']}/{s['with_spike']} | "
        f"{s['only_stalled']}/{s['collapsed']}, {s['false_stalled']}/{s['healthy']}"
    )


def _text(value: object) -> str:
    return "–" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=FOLDER)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--page", type=Path, help="write the page here; needs --live")
    parser.add_argument("--live", type=Path, help="the result of detector_live.py")
    options = parser.parse_args()
    if options.page and not options.live:
        parser.error("--page needs --live")
    found = {"date": datetime.date.today().isoformat(), **measure(options.runs)}
    for name, log in found["logs"].items():
        for split in ("tuned", "held out"):
            print(f"{name}, {split}: {log[split]}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.page:
        live = json.loads(options.live.read_text(encoding="utf-8"))
        options.page.write_text(page(found, live), encoding="utf-8")


if __name__ == "__main__":
    main()
