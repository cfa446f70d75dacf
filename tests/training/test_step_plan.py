"""The plan of a step: memory against what was measured on an H200 and against counts made
otherwise, what does not fit, several GPUs. Times of one GPU: `test_step_time.py`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig
from mvsplit.presets import PRESETS, get_preset
from mvsplit.residuals import RULES, RuleConfig
from mvsplit.training import TrainConfig
from mvsplit.training.config import TuneConfig
from mvsplit.training.gpus import GIB, GPUS, find_gpu
from mvsplit.training.kernel_times import FIRST
from mvsplit.training.memory_plan import kept_bytes
from mvsplit.training.optimizer import AdamW, flatten_parameters
from mvsplit.training.parallelize import lower_weights
from mvsplit.training.step_memory import (
    count_parameters,
    runs_as_one_node,
    state_parts,
    step_memory,
)
from mvsplit.training.step_plan import Sample, plan_step, sample_of
from mvsplit.training.step_time import Shape, model_flops, step_time
from tests.training.measured import H200, IDLE, RUNS, network, result, train


def sharded(config: TrainConfig, **other) -> TrainConfig:
    return replace(config, parallel=replace(config.parallel, layout="shard", **other))


def as_it_was(memory, model, found, weights, ranks=1):
    """Bytes at the peak with what a run before 2026-11-29 kept: a second moment of two bytes, and
    less of the memory was left free."""
    tokens = found.get("piece", 26) * 320
    kept = sum(n * tokens * kept_bytes(model, level) for level, n in found["recompute"].items())
    if weights == "bf16":
        kept += count_parameters(model).low * (2 - 1 - 2 / 128) / ranks
    return memory.allocated - memory.parts["activations"] + kept


@pytest.mark.parametrize("name", RUNS)
def test_memory_is_within_five_percent_of_the_measured(name):
    found, depth, weights, _ = RUNS[name]
    model, config = network(depth), train(weights)
    memory = step_memory(model, config, found.get("piece", 26) * 320, H200)
    peak = as_it_was(memory, model, found, weights) / GIB
    assert peak == pytest.approx(found["peak_gib"], rel=0.05)
    if depth == 400:
        assert Counter(memory.levels) == found["recompute"]
        assert memory.fits


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("depth", [1, 5])
def test_parameters_are_counted_exactly(rule, depth):
    config = DiTConfig(
        depth=depth, width=24, heads=2, ffn_width=40, channels=3, text_width=16,
        rule=RuleConfig(name=rule), attention_bias=True,
    )  # fmt: skip
    count = count_parameters(config)
    model = DiT(config)
    assert count.all == sum(p.numel() for p in model.parameters())
    blocks = [m for b in model.blocks for part in (b.attention, b.ffn) for m in part.modules()]
    matrices = [m.weight for m in blocks if isinstance(m, torch.nn.Linear)]
    assert count.low == sum(w.numel() for w in matrices)


@pytest.mark.parametrize(("weights", "ema", "each"), [("fp32", 0.0, 16), ("fp32", 0.9, 20)])
def test_state_in_bytes_a_parameter(weights, ema, each):
    model = network(3)
    parts = state_parts(model, train(weights, ema_decay=ema))
    assert sum(parts.values()) == each * count_parameters(model).all
    replicated = state_parts(model, train(weights, ema_decay=ema), ranks=2)
    halved = parts["moments"] / 2 + parts["average (EMA)"] / 2
    assert sum(replicated.values()) == sum(parts.values()) - halved
    halves = state_parts(model, sharded(train(weights, ema_decay=ema)), ranks=2)
    more = parts["weights"] / 2  # the buffers' copy of the shards
    assert sum(halves.values()) == pytest.approx(sum(parts.values()) / 2 + more)


@pytest.mark.parametrize(("weights", "each"), [("split", 14), ("bf16", 6 + 6 / 128)])
def test_state_of_a_real_optimizer_is_what_the_plan_counts(weights, each):
    """Two bytes or more a number of a matrix; what is not a matrix has 16."""
    config = DiTConfig(depth=2, width=128, heads=2, ffn_width=256, channels=3, text_width=128)
    model, count = DiT(config), count_parameters(config)
    lower_weights(model)
    groups = flatten_parameters(model)
    held = [b for g in groups for b in (g.values, g.grads)]
    held += AdamW(groups, train(weights)).moments().values()
    found = sum(t.numel() * t.element_size() for t in held)
    assert found == pytest.approx(each * count.low + 16 * count.rest, rel=1e-3)  # gaps in buffers
    assert sum(state_parts(config, train(weights)).values()) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("name", ["mvsplit-400l-h200", "mvsplit-1000l-h200"])
def test_the_presets_for_one_h200_fit(name):
    experiment = get_preset(name)
    plan = plan_step(experiment, H200, 1, sample_of(experiment))
    assert plan.memory.fits
    assert plan.memory.allocated < 135 * GIB
    assert plan.batch_size >= 256
    assert set(plan.memory.levels) <= {"nothing", "packed", "attention"}
    assert plan.time.mfu >= 0.36  # 0.4 would need products as fast as those of zeros
    assert not plan.remedies


def test_what_does_not_fit_is_told_what_would():
    experiment = get_preset("mvsplit-1000l")
    sample = Sample(image=256, text=32, source="")
    plan = plan_step(experiment, H200, 1, sample)
    assert not plan.memory.fits
    assert {"weights": "bf16", "ema_decay": 0.0} in [r.changes for r in plan.remedies]
    for remedy in plan.remedies:
        changes = dict(remedy.changes)
        gpus = changes.pop("gpus", 1)
        changed = replace(experiment, train=replace(experiment.train, **changes))
        again = plan_step(changed, H200, gpus, sample)
        assert again.memory.fits
        assert again.memory.total == remedy.memory
    small = replace(H200, memory=8 * GIB)
    (nearest,) = plan_step(experiment, small, 1, sample).remedies
    assert not nearest.fits


def test_a_smaller_piece_is_a_remedy_and_the_largest_that_fits():
    experiment = get_preset("mvsplit-400l-h200")
    at_once = replace(experiment, train=replace(experiment.train, accumulate=1, batch_size=512))
    sample = Sample(image=256, text=64, source="")
    (remedy,) = (r for r in plan_step(at_once, H200, 1, sample).remedies if "gpus" not in r.changes)
    assert list(remedy.changes) == ["accumulate"]
    less = replace(at_once.train, accumulate=remedy.changes["accumulate"] // 2)
    assert not plan_step(replace(at_once, train=less), H200, 1, sample).memory.fits


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan(name):
    experiment = get_preset(name)
    plan = plan_step(experiment, GPUS["h100"], 1, sample_of(experiment))
    assert 0 < plan.time.mfu < 1
    assert plan.time.seconds == pytest.approx(sum(plan.time.parts.values()))
    rough = any("order of magnitude" in note for note in plan.notes)
    paper = "h200" in name or name in ("mvsplit-400l", "mvsplit-1000l")
    assert rough is not paper


def test_a_plan_says_what_it_leaves_out_of_pairs():
    flow = get_preset("shapes-12l")
    pairs = replace(flow, train=replace(flow.train, objective="dpo"))
    sample = sample_of(flow)
    more = set(plan_step(pairs, GPUS["h100"], 1, sample).notes)
    more -= set(plan_step(flow, GPUS["h100"], 1, sample).notes)
    assert len(more) == 1
    assert "a forward pass more" in more.pop()


def test_a_plan_says_that_it_is_of_everything_free():
    flow = get_preset("tiny")
    part = replace(flow, train=replace(flow.train, tune=TuneConfig(what="lora")))
    sample = sample_of(flow)
    notes = [set(plan_step(each, GPUS["h100"], 1, sample).notes) for each in (flow, part)]
    assert [note for note in notes[1] - notes[0] if "what is frozen needs no gradients" in note]


def test_several_gpus_send_what_fsdp_sends():
    model, config = network(8), sharded(train(batch_size=16, accumulate=2))
    shape = Shape(samples=2, length=320, pieces=2)
    time = step_time(model, config, shape, ["nothing"] * 8, H200, ranks=4)
    n = count_parameters(model).all
    assert time.bytes_sent["all-gather"] == pytest.approx(0.75 * 2 * n * 4)
    assert time.bytes_sent["reduce-scatter"] == pytest.approx(0.75 * 4 * n)
    slow = replace(H200, link=1e6)
    slower = step_time(model, config, shape, ["nothing"] * 8, slow, ranks=4)
    assert slower.seconds > slower.communication > time.seconds
    assert model_flops(model, 7, 320) == 7 * (6 * n + 12 * 8 * 320 * 1024)


@pytest.mark.parametrize(("weights", "each"), [("fp32", 4), ("bf16", 2)])
def test_several_gpus_that_hold_the_network_run_as_one_and_exchange(weights, each):
    """The parts of a step are those of one GPU, but for the exchange and the update."""
    model, config = network(8), train(weights, batch_size=16, ema_decay=0.9)
    shape, levels = Shape(samples=4, length=320, pieces=1), ["packed"] * 8
    one, four = (step_time(model, config, shape, levels, H200, ranks=n) for n in (1, 4))
    same = one.parts.keys() - {"optimiser"}
    assert {name: four.parts[name] for name in same} == {name: one.parts[name] for name in same}
    count = count_parameters(model)
    low = count.low if weights == "bf16" else 0
    size = each * low + 4 * (count.all - low)
    assert four.bytes_sent == pytest.approx({"all-reduce": 1.5 * size, "all-gather": 0.75 * size})
    assert four.parts["communication not hidden"] == pytest.approx(2.25 * size / H200.link)
    looked_at = 2 * size / H200.copy  # zeroing and the norm are everybody's
    update = one.parts["optimiser"] - looked_at
    assert four.parts["optimiser"] == pytest.approx(looked_at + update / 4)


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
def test_two_gpus_take_what_was_measured(weights):
    step = result("parallel_step_h200x2_2026-11-28.json")[f"replicated {weights}"]
    pieces = step["samples_on_each"] // step["piece"]
    shape = Shape(samples=step["piece"], length=320, pieces=pieces)
    model, config = network(400), train(weights, accumulate=pieces, batch_size=208)
    memory = step_memory(model, config, shape.tokens, H200, ranks=2)
    assert Counter(memory.levels) == step["recompute"]
    assert as_it_was(memory, model, step, weights, 2) / GIB == pytest.approx(
        step["peak_gib"], rel=0.02
    )
    time = step_time(model, config, shape, memory.levels, IDLE, ranks=2, kernels=FIRST)
    assert time.seconds == pytest.approx(step["seconds"], rel=0.05)
    assert time.tokens_per_second == pytest.approx(step["tokens_per_second"], rel=0.05)


def test_the_layout_is_the_fastest_that_fits():
    sample = Sample(image=256, text=64, source="")
    small, deep = (get_preset(name) for name in ("mvsplit-400l", "mvsplit-1000l"))
    assert plan_step(small, H200, 1, sample).layout is None
    plan = plan_step(small, H200, 8, sample)
    assert plan.memory.fits
    assert "layout replicate" in plan.layout
    plan = plan_step(deep, H200, 4, sample)
    assert "layout shard" in plan.layout
    assert "does not fit" in plan.layout
    low = replace(deep.train, weights="bf16", precision="bf16")
    assert "layout replicate" in plan_step(replace(deep, train=low), H200, 4, sample).layout


def test_one_gpu_ignores_what_several_would_do():
    sample, plain = Sample(image=256, text=64, source=""), get_preset("mvsplit-400l-h200")
    parallel = replace(plain, train=sharded(plain.train, replicas=2))
    one, alone = (plan_step(e, H200, 1, sample) for e in (parallel, plain))
    assert (one.memory, one.time, one.layout) == (alone.memory, alone.time, None)


def test_every_replica_updates_the_whole_network():
    model, config = network(8), train(batch_size=16)
    twice = sharded(config, replicas=2)
    shape, levels = Shape(samples=4, length=320, pieces=1), ["nothing"] * 8
    halves = step_time(model, sharded(config), shape, levels, H200, ranks=2).parts["optimiser"]
    assert step_time(model, twice, shape, levels, H200, ranks=4).parts["optimiser"] == halves


def test_gpus_that_wait_are_told_of_larger_pieces():
    experiment = get_preset("mvsplit-400l")
    experiment = replace(experiment, train=sharded(experiment.train))
    sample = Sample(image=256, text=32, source="")
    plan = plan_step(experiment, H200, 8, sample)
    (note,) = (n for n in plan.notes if "wait for launches" in n)
    pieces = int(note.partition("--accumulate ")[2].split()[0])
    fewer = replace(experiment, train=replace(experiment.train, accumulate=pieces))
    faster = plan_step(fewer, H200, 8, sample)
    assert faster.memory.fits
    assert faster.time.seconds < plan.time.seconds / 2
    assert f"{faster.time.seconds:.3g} s" in note


def test_pieces_that_are_too_small_are_told_of_the_best():
    """The paper's batch on eight GPUs: 32 pieces of 4 samples each, where 4 of 32 are faster."""
    experiment = get_preset("mvsplit-400l")
    low = replace(experiment.train, precision="bf16", weights="bf16", ema_decay=0.0)
    sample = Sample(image=256, text=64, source="")
    plan = plan_step(replace(experiment, train=low), H200, 8, sample)
    (note,) = (n for n in plan.notes if "small pieces" in n)
    assert "--accumulate 4 takes" in note
    best = plan_step(replace(experiment, train=replace(low, accumulate=4)), H200, 8, sample)
    assert best.memory.fits
    assert best.time.seconds < 0.8 * plan.time.seconds
    assert not any("small pieces" in n for n in best.notes)


def test_only_what_runs_as_one_node_counts_as_measured():
    model = network(2)
    assert runs_as_one_node(model, "bf16")
    assert not runs_as_one_node(model, "fp32")
    assert not runs_as_one_node(replace(model, kv_heads=2), "bf16")
    assert not runs_as_one_node(replace(model, rule=RuleConfig(name="prenorm")), "bf16")


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (0, "gpus=0: must be at least 1"),
        (5, "train.batch_size=264 is not divisible by the 5 GPUs"),
        (33, "train.accumulate=11: each of the 33 GPUs has 8 samples of a batch"),
    ],
)
def test_what_a_run_would_refuse_is_refused(gpus, message):
    experiment = get_preset("mvsplit-400l-h200")
    experiment = replace(experiment, train=sharded(experiment.train))
    with pytest.raises(UserError, match=message):
        plan_step(experiment, H200, gpus, Sample(image=256, text=32, source=""))


def test_gpus_by_name(monkeypatch):
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(UserError, match="gpu='h20' is unknown"):
        find_gpu("h20")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert find_gpu("auto") is GPUS["h200"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    assert find_gpu("auto") is GPUS["rtx4090"]
    for other in ("Radeon", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=other: name)
        with pytest.raises(UserError, match=f"nothing is known of {other}"):
            find_gpu("auto")
