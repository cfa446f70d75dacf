"""What docs/parallel.md says is what was measured, and what it names exists."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from mvsplit.training.config import ParallelConfig, TrainConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")


def newest(name: str) -> dict:
    return json.loads(max((ROOT / "benchmarks" / "results").glob(f"{name}_*.json")).read_text())


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_kills_are_those_that_were_measured():
    found = newest("random_kills_cpu")
    assert found["differs_in"] == []
    said = (
        f"{found['kills']} kills, {found['kills_while_saving']} of them during a save, at a save "
        f"every {found['save_every']} steps: {found['steps_lost']} steps were taken again, at most "
        f"{found['most_steps_lost']} at once, and the end was the same bit for bit "
        f"({found['machine']}, {found['date']})"
    )
    assert said in words(PAGE)


def test_the_cost_is_that_which_was_measured():
    found = newest("save_cost_cpu")
    copied, written = found["seconds_of_the_copy"], found["processor_seconds_of_the_writing"]
    said = (
        f"{found['checkpoint_bytes'] / 1e6:.0f} MB every {found['steps_between_saves']} steps of "
        f"the preset `digits-400l-mvsplit`: the steps wait {1e3 * copied:.0f} ms for the copy, and "
        f"the thread takes {1e3 * written:.0f} ms of a processor; together "
        f"{100 * found['cost_at_most']:.1f} % of the time of these steps ({found['device']}, "
        f"{found['date']})"
    )
    assert said in words(PAGE)


def test_the_steps_on_gpus_are_those_that_were_measured():
    found = newest("parallel_step_h200x2")
    rates, shares = {}, {}
    for weights in ("bf16", "fp32"):
        one, two = (
            found[f"{how} {weights}"]["tokens_per_second"] for how in ("alone", "replicated")
        )
        rates[weights], shares[weights] = f"{two:,.0f}", f"{two / one / 2:.1%}".replace("%", " %")
    worst = max(found["gate"]["largest_difference"].values())
    deep = found["thousand sharded"]
    said = (
        f"replicated, {rates['bf16']} tokens/s with bf16 weights, {shares['bf16']} of twice one "
        f"GPU, and {rates['fp32']} tokens/s with fp32 weights, {shares['fp32']}; losses and norms "
        f"of a small network differ from those of one GPU by at most {worst:.1e} in three "
        f"layouts. 1000 layers, {deep['parameters'] / 1e9:.1f} billion parameters, sharded with "
        f"bf16 weights: {deep['seconds']:.2f} s for a step of {2 * deep['samples_on_each']} "
        f"samples, {deep['peak_gib']:.1f} GiB a GPU ({found['device']}, torch {found['torch']}, "
        f"{found['date']})"
    )
    assert said in words(PAGE)
    low, links = found["replicated bf16"], found["links"]
    there = low["parameters"] * 2  # bytes: 2 (R − 1) / R of a gradient, R = 2
    more = low["exchange_seconds"] - there / links["all-reduce bf16"]
    assert (
        f"takes {1e3 * low['exchange_seconds']:.0f} ms of a step of {low['seconds']:.2f} s" in PAGE
    )
    assert f"{1e3 * more:.0f} ms of that" in PAGE
    assert f"{links['all-reduce bf16'] / 1e9:.0f} GB/s" in PAGE


def test_options_and_files_exist():
    options = {f"parallel.{field.name}" for field in fields(ParallelConfig)}
    options |= {field.name.replace("_", "-") for field in fields(TrainConfig)}
    options |= {"parallel.no-reshard", "shutdown-timeout", "nproc-per-node", "max-restarts"}
    options |= {"nnodes", "rdzv-backend", "rdzv-endpoint", "trial", "stages"}  # or a benchmark's
    named = set(re.findall(r"--([a-z][a-z.-]*[a-z])", PAGE))
    assert named <= options
    assert len(named) > 10
    for path in re.findall(r"(?:benchmarks|mvsplit|tests)/[\w/]+\.py", PAGE):
        assert (ROOT / path).is_file(), path
