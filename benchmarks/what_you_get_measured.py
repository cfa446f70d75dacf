"""The measured figures of docs/what-you-get.md, each with the file it is from
(`what_you_get_page.py`). Units: seconds, GiB."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from performance_parts import markdown

from mvsplit.presets import PRESETS, get_preset
from mvsplit.training.gpus import GIB

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ", shared"  # with programs of others, so that seconds are too many
MACHINES = """
*CPU*: how many cores, of which kind, and what else ran on them, the files do not say. *CPU, {cores} cores*: {processor};
with programs of others, {load} of them running before a measurement, and the median of 3 to 10 steps;
`pictures` on latents of 16×16, as of 256×256 pixels (`mvsplit bench small_presets`); a cache of pixels has many more tokens
and takes longer. *Shared*: with programs of others, by its file, so that such a machine alone takes fewer seconds.
"""  # noqa: E501
HOUR = 3600
Found = dict[str, Any]
Row = list[str]


def newest(pattern: str, *stages: str) -> tuple[Found, str]:
    """The newest result that holds such stages, and a link to its file."""
    found = []
    for path in sorted(RESULTS.glob(pattern)):
        result = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(result.get(stage), dict | list) for stage in stages):
            found.append((result.get("date", ""), path.name, result))
    _, name, result = max(found, key=lambda each: each[:2])
    return result, f"[{name.removesuffix('.json')}](../benchmarks/results/{name})"


def machine(found: Found, file: str) -> str:
    """What a file says of where it was measured, in its name and its notes."""
    if "_h200" not in file:
        return "CPU"
    stages = (value for value in found.values() if isinstance(value, dict))
    places = (found, *found.get("environment", ()), *stages)
    shared = any("shared" in place.get("note", "") for place in places)
    return f"{found.get('processes', 1)} × H200{SHARED if shared else ''}"


def trained() -> str:
    """Steps of training, the narrow networks first."""
    head = ("network", "machine", "samples a step", "s a step", "all steps, at that rate")
    head = (*head, "peak GiB", "file")
    found = [result for result, _ in _small().values()]
    loads = [time["load_before"] for result in found for time in result["times"]]
    note = MACHINES.format(
        cores=found[0]["cores"],
        processor=found[0]["processor"].partition(",")[0],
        load=f"{min(loads):.1f} to {max(loads):.1f}",
    )
    return markdown(head, (*_narrow(), *_wide(), *_on_two())) + note


def on_cpu() -> str:
    """The small presets that were measured on a CPU, by how long all their steps take there."""
    demo = json.loads((ROOT / "docs" / "demo" / "demo.json").read_text(encoding="utf-8"))
    seconds = {f"digits-400l-{way}": t["seconds_per_step"] for way, t in demo["twins"].items()}
    found, _ = newest("video_cpu_*.json", "times")
    seconds |= {r["step_of"]: r["seconds"] for r in found["times"]["runs"] if "step_of" in r}
    for name, (result, _) in _small().items():
        seconds[name] = next(t["seconds"] for t in result["times"] if t["preset"] == name)
    whole = {name: PRESETS[name].train.steps * each for name, each in seconds.items()}
    ordered = sorted(whole, key=lambda name: whole[name])
    quick = ", ".join(f"`{name}`" for name in ordered if whole[name] < HOUR)
    slow = ", ".join(f"`{name}` {_long(whole[name])}" for name in ordered if whole[name] >= HOUR)
    return (
        f"in minutes {quick}; in hours to days {slow}, at the rate of the steps that were measured"
    )


def _small() -> dict[str, tuple[Found, str]]:
    """By preset, the newest result of small_presets.py that has it, and a link to its file."""
    latest: dict[str, tuple[Found, str]] = {}
    paths = RESULTS.glob("small_presets_cpu_*.json")
    results = [(json.loads(path.read_text(encoding="utf-8")), path.name) for path in paths]
    for result, name in sorted(results, key=lambda each: each[0]["date"]):
        link = f"[{name.removesuffix('.json')}](../benchmarks/results/{name})"
        latest |= {time["preset"]: (result, link) for time in result["times"]}
    return latest


def _row(
    what: str, where: str, batch: int | None, seconds: float, file: str, gib: float | None = None
) -> Row:
    """What is called as a preset has its number of steps."""
    preset = PRESETS.get(what.strip("`"))
    whole = "–" if preset is None else _long(preset.train.steps * seconds)
    memory = "–" if gib is None else f"{gib:.0f}"
    return [what, where, str(batch or "–"), f"{seconds:.3g}", whole, memory, file]


def _long(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h")):
        if seconds >= size:
            return f"{seconds / size:.2g} {name}"
    return f"{seconds / 60:.2g} min"


def _narrow() -> Iterator[Row]:
    twin = "digits-400l-mvsplit"
    demo = json.loads((ROOT / "docs" / "demo" / "demo.json").read_text(encoding="utf-8"))
    seconds = demo["twins"]["mvsplit"]["seconds_per_step"]
    batch = get_preset(twin).train.batch_size
    yield _row(f"`{twin}`", machine(demo, "demo"), batch, seconds, "[demo](demo/demo.json)")
    found, file = newest("video_cpu_*.json", "times")
    step = next(run for run in found["times"]["runs"] if "step_of" in run)
    where = machine(found, file)
    yield _row(f"`{step['step_of']}`", where, step["clips"], step["seconds"], file)
    for name, (result, file) in _small().items():
        time = next(t for t in result["times"] if t["preset"] == name)
        where = f"CPU, {result['cores']} cores"
        yield _row(f"`{name}`", where, time["batch"], time["seconds"], file)
    found, file = newest("finetune_cpu*.json", "after")
    seconds = found["base_seconds"] / found["steps"]
    yield _row("8 layers of width 64", machine(found, file), None, seconds, file)
    found, file = newest("video_h200_*.json", "preset")
    run = found["preset"]["runs"][-1]
    batch = get_preset(run["preset"]).train.batch_size
    where = machine(found, file)
    yield _row(f"`{run['preset']}`", where, batch, run["seconds"] / run["step"], file)


def _wide() -> Iterator[Row]:
    for stage, name in (("step bf16", "bf16"), ("step split", "split"), ("step fp32", "fp32")):
        found, file = newest("train_step_h200_*.json", stage)
        name = f"400 layers of width 1024, {name} weights"
        yield _stage(name, machine(found, file), found[stage], file)
    found, file = newest("thousand_layers_h200_*.json", "thousand")
    yield _stage("`mvsplit-1000l-h200`", machine(found, file), found["thousand"], file)


def _on_two() -> Iterator[Row]:
    each = {
        "replicated bf16": "400 layers of width 1024, bf16 weights, a whole network on each",
        "replicated fp32": "the same with fp32 weights",
        "thousand sharded": "1000 layers of width 1024, bf16 weights, sharded",
    }
    for stage, name in each.items():
        found, file = newest("parallel_step_h200x2*.json", stage)
        yield _stage(name, machine(found, file), found[stage], file, found["processes"])


def _stage(name: str, where: str, stage: Found, file: str, processes: int = 1) -> Row:
    name += "" if "load" in stage else "; zero writers"
    batch = stage.get("samples") or processes * stage["samples_on_each"]
    return _row(name, where, batch, stage["seconds"], file, stage["peak_gib"])


def drawn() -> tuple[float, str]:
    """GiB that a picture takes beside the weights, and what was measured in a sentence."""
    found, file = newest("engine_h200_*.json", "pictures_1", "pictures_8")
    one, eight = found["pictures_1"], found["pictures_8"]
    more = (one["memory_gb"] - one["weights_gb"]) * 1e9 / GIB
    return more, (
        f"1000 layers of width 1024 on {machine(found, file)}, 35 Euler steps with guidance: one "
        f"picture {one['seconds']:.2f} s,\neight {eight['seconds']:.2f} s, "
        f"{eight['memory_gb'] * 1e9 / GIB:.1f} GiB ({file})."
    )


def further() -> str:
    """What trained on, and how long that took."""
    rows = (*_finetuned(), *_preferred(), *_grown(), *_operated())
    return markdown(("measured", "network", "machine", "s", "file"), rows)


def _finetuned() -> Iterator[Row]:
    ways = {"full": "everything", "gains": "gains only", "lora": "adapters (LoRA)"}
    for pattern in ("finetune_cpu*.json", "finetune_h200_*.json"):
        found, file = newest(pattern, "after")
        for way, name in ways.items():
            times = [row["seconds"] for row in found["after"] if row["way"] == way]
            what = f"fine-tuning, {name}, {found['tune_steps']} steps"
            yield [what, "8 layers of width 64", machine(found, file), _span(times), file]


def _preferred() -> Iterator[Row]:
    found, file = newest("dpo_digits_cpu_*.json", "rows")
    times = [row["seconds"] for row in found["rows"] if row["way"] == "DPO, β = 100, 200 steps"]
    yield ["preferences, 200 steps", "`tiny`", machine(found, file), _span(times), file]
    found, file = newest("dpo_shapes_h200_*.json", "rows", "model")
    rows = [row for row in found["rows"] if row["way"].startswith("DPO") and "seconds" in row]
    model = found["model"]
    network = f"{model['depth']} layers of width {model['width']}"
    what = f"preferences, {rows[0]['steps']} steps"
    yield [what, network, machine(found, file), _span([row["seconds"] for row in rows]), file]


def _grown() -> Iterator[Row]:
    for pattern in ("growth_thousand_cpu.json", "growth_gpu_h200_*.json"):
        found, file = newest(pattern, "summary")
        times = [row["seconds"] for row in found["summary"] if row["way"] == "grown"]
        first, last = (found["stages"][place][0] for place in (0, -1))
        network = f"{first} to {last} layers of width {found['settings']['width']}"
        where = machine(found, file)
        yield ["growth in depth, the whole run", network, where, _span(times), file]


def _operated() -> Iterator[Row]:
    found, file = newest("surgery_h200_*.json", "rows")
    row = next(row for row in found["rows"] if row["way"].startswith("surgery"))
    what = f"surgery and {len(row['losses'])} steps more"
    seconds = _span([row["seconds"]])
    yield [what, "400 layers of width 128", machine(found, file), seconds, file]


def _span(seconds: Sequence[float]) -> str:
    low, high = (f"{s:.3g}" for s in (min(seconds), max(seconds)))
    return low if low == high else f"{low}–{high}"
