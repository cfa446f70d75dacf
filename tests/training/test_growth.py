"""A run goes on with a deeper network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvsplit.cli import main
from mvsplit.cli.start import starter
from mvsplit.errors import UserError
from mvsplit.hub import load_weights
from mvsplit.models.growth import new_layers, places
from mvsplit.residuals import RuleConfig
from mvsplit.training import Experiment, Origin, train
from mvsplit.training.checkpoint import list_checkpoints, read_checkpoint
from tests.training import runs

OLD, NEW = runs.MODEL.depth, 5
MOVED = places(OLD, NEW, "evenly")


def growing(source: Path, depth: int = NEW, **changes: Any) -> Experiment:
    model = replace(runs.MODEL, depth=depth)
    config = replace(runs.TRAIN, **{"steps": 4, "keep": 9, **changes})
    origin = Origin(source=str(source), ema=False, optimizer="kept", grow="evenly")
    return Experiment(model=model, train=config, origin=origin)


def grow(experiment: Experiment, run: Path) -> None:
    train(experiment, run, start=starter(experiment))


def saved(run: Path, which: int = -1) -> Any:
    return read_checkpoint(list_checkpoints(run / "checkpoints")[which])


def test_the_optimiser_and_the_data_go_on(whole_run: Path, tmp_path: Path) -> None:
    grow(growing(whole_run), tmp_path / "run")
    first, source, last = saved(tmp_path / "run", 0), saved(whole_run), saved(tmp_path / "run")
    assert first.values["data"] == source.values["data"]
    assert first.values["new_layers"] == [1, 3, 4] == new_layers(MOVED, NEW)
    n = source.values["updates"]["decayed"]
    assert first.values["updates"] == {
        "decayed": n, "rest": n, "joined": 0, "joined-decayed": 0
    }  # fmt: skip
    assert last.values["updates"] == {
        "decayed": n + 4, "rest": n + 4, "joined": 4, "joined-decayed": 4
    }  # fmt: skip
    new = tuple(f".blocks.{layer}." for layer in (1, 3, 4))
    for file in ("model", "optimizer"):
        for name, tensor in first.tensors[file].items():
            if any(layer in f".{name}" for layer in new):
                assert file == "model" or not tensor.any()
                continue
            old = name.replace("blocks.2.", "blocks.1.")
            assert torch.equal(tensor, source.tensors[file][old]), name


def test_new_layers_take_the_first_steps_of_a_fresh_adam(whole_run: Path, tmp_path: Path) -> None:
    """At first Adam moves a weight with a gradient by ±lr, whatever that is; with the count of the
    old layers it would be three times as much."""
    grow(growing(whole_run, steps=1, warmup=0, weight_decay=0.0, lr=1e-3), tmp_path / "run")
    first, last = saved(tmp_path / "run", 0), saved(tmp_path / "run")
    for layer in (1, 3, 4):
        name = f"blocks.{layer}.ffn.w2.weight"
        moved = (last.tensors["model"][name] - first.tensors["model"][name]).abs()
        assert moved.median() == pytest.approx(1e-3, rel=1e-2)


def test_a_grown_run_resumes_bit_for_bit(whole_run: Path, tmp_path: Path) -> None:
    grow(growing(whole_run, steps=6), tmp_path / "one")
    grow(growing(whole_run, steps=3), tmp_path / "two")
    train(growing(whole_run, steps=6), tmp_path / "two")
    runs.assert_same_run(tmp_path / "one", tmp_path / "two")


def test_growing_again_keeps_the_corrected_moments(whole_run: Path, tmp_path: Path) -> None:
    grow(growing(whole_run), tmp_path / "five")
    grow(growing(tmp_path / "five", 10, steps=1), tmp_path / "ten")
    five, ten = saved(tmp_path / "five"), saved(tmp_path / "ten", 0)
    for layer, k in ((1, 4), (2, 12)):  # new before, with 4 updates; there from the start
        for moment, decay in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
            name = "ffn.w2.weight"
            before = five.tensors["optimizer"][f"{moment}.blocks.{layer}.{name}"] / (1 - decay**k)
            after = ten.tensors["optimizer"][f"{moment}.blocks.{2 * layer}.{name}"]
            after = after / (1 - decay ** ten.values["updates"]["decayed"])
            assert before.any()
            torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


def test_the_run_begins_with_the_function_of_its_source(whole_run: Path, tmp_path: Path) -> None:
    grow(growing(whole_run, steps=1), tmp_path / "deep")
    deep = load_weights(tmp_path / "deep" / "checkpoints" / "step_00000000", ema=False)
    source = load_weights(whole_run, ema=False)
    x, text = torch.randn(4, 1, 8, 8), torch.randn(4, 3, 16)
    with torch.no_grad():
        assert (deep(x, text) - source(x, text)).norm() / source(x, text).norm() < 4e-5


def test_what_cannot_grow_is_refused(whole_run: Path, tmp_path: Path) -> None:
    for depth in (OLD, 1):
        with pytest.raises(UserError, match=f"depth={depth}: the network has 2 layers already"):
            grow(growing(whole_run, depth), tmp_path / "run")
    wide = growing(whole_run)
    with pytest.raises(UserError, match=r"model.width=32: the weights of .* have 16"):
        grow(replace(wide, model=replace(wide.model, width=32)), tmp_path / "run")
    rule = RuleConfig(name="keel")
    keel = replace(runs.experiment(steps=1), model=replace(runs.MODEL, rule=rule))
    train(keel, tmp_path / "keel")
    deep = growing(tmp_path / "keel")
    deep = replace(deep, model=replace(deep.model, rule=rule))
    with pytest.raises(UserError, match=r"'keel' cannot grow in depth: its trunk weight 2L"):
        grow(deep, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    seed = growing(whole_run, seed=4)
    with pytest.raises(UserError, match="seed: the loader has 4, the saved run has 0"):
        grow(seed, tmp_path / "run")


def test_the_commands(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["grow", str(whole_run), "--depth", "5", "--out"]
    for target in ("deep", "deep.safetensors"):
        assert main([*command, str(tmp_path / target)]) == 0
        assert "(2 layers grown to 5)" in capsys.readouterr().out
    models = [load_weights(whole_run), load_weights(tmp_path / "deep")]
    models.append(load_weights(tmp_path / "deep.safetensors"))
    x, text = torch.randn(4, 1, 8, 8), torch.randn(4, 3, 16)
    outputs = [model(x, text).detach() for model in models]
    assert (outputs[1] - outputs[0]).norm() / outputs[0].norm() < 4e-5
    assert torch.equal(outputs[2], outputs[1])
    assert main([*command, str(tmp_path / "deep")]) == 2
    assert "exists already" in capsys.readouterr().err
    size = ["--model.width", "16", "--model.ffn-width", "24", "--model.patch", "4"]
    size += ["--model.text-width", "16", "--model.depth", "3", "--batch-size", "8", "--steps", "1"]
    run = ["train", "tiny", *size, "--run-dir", str(tmp_path / "run")]
    assert main([*run, "--grow-from", str(whole_run)]) == 0
    assert main([*run, "--grow-from", str(whole_run)]) == 0  # nothing left to do
    assert main([*run, "--grow-from", str(whole_run), "--from", str(whole_run)]) == 2
    assert "--grow-from takes neither --from nor --adapter" in capsys.readouterr().err
