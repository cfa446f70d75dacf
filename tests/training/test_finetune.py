"""Runs that start from trained weights, and what of them learns."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvsplit.cli.start import starter
from mvsplit.diagnostics.taps import gradient_norms, taps_for_dit
from mvsplit.errors import UserError
from mvsplit.hub import load_weights, write_weights
from mvsplit.models import DiT
from mvsplit.models.lora import LoRAConfig, fingerprint
from mvsplit.training import Experiment, Origin, TuneConfig, build_state, load_run, train
from mvsplit.training.checkpoint import list_checkpoints, read_checkpoint
from mvsplit.training.gradient_families import family_norms
from mvsplit.training.step import train_step
from tests.training import runs

LORA = TuneConfig(what="lora", lora=LoRAConfig(rank=2, alpha=4.0))
TUNES = {
    "all": TuneConfig(),
    "layers": TuneConfig(only=("blocks.1.*", "head.weight")),
    "gains": TuneConfig(what="gains"),
    "lora": LORA,
    "lora-layer": replace(LORA, only=("blocks.1.ffn.*",)),
}


def tuning(whole: Path, tune: TuneConfig, **changes: Any) -> Experiment:
    """Four steps from the weights of the run `whole`."""
    origin = {n: changes.pop(n) for n in ("ema", "optimizer") if n in changes}
    train_config = replace(runs.TRAIN, tune=tune, **{"steps": 4, "seed": 1, **changes})
    return Experiment(
        model=runs.MODEL, train=train_config, origin=Origin(source=str(whole), **origin)
    )


def start(experiment: Experiment, run: Path) -> None:
    train(experiment, run, start=starter(experiment))


def saved(run: Path, which: int = -1) -> Any:
    return read_checkpoint(list_checkpoints(run / "checkpoints")[which])


def learns(name: str, tune: str) -> bool:
    """Written out once more, to compare with."""
    return {
        "all": True,
        "layers": name.startswith("blocks.1.") or name == "head.weight",
        "gains": name.endswith((".alpha", ".beta")),
        "lora": ".lora_" in name,
        "lora-layer": ".lora_" in name and name.startswith("blocks.1.ffn."),
    }[tune]


@pytest.mark.parametrize("tune", TUNES)
def test_what_is_chosen_learns_and_the_rest_stays(
    whole_run: Path, tmp_path: Path, tune: str
) -> None:
    start(tuning(whole_run, TUNES[tune], keep=9), tmp_path / "run")
    first, last = saved(tmp_path / "run", 0), saved(tmp_path / "run")
    assert (first.step, last.step) == (0, 4)
    base = saved(whole_run).tensors["ema"]
    for name, tensor in first.tensors["model"].items():
        if ".lora_" not in name:
            assert torch.equal(tensor, base[name])  # the averaged weights of the source
        moved = not torch.equal(last.tensors["model"][name], tensor)
        assert moved == learns(name, tune), name
    names = {name for name in first.tensors["model"] if learns(name, tune)}
    moments = {f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in names}
    assert last.tensors["optimizer"].keys() == moments
    assert last.tensors["ema"].keys() == names
    for name in names:
        assert torch.equal(first.tensors["ema"][name], first.tensors["model"][name])


@pytest.mark.parametrize("tune", ["layers", "lora"])
def test_an_interrupted_run_goes_on_bit_for_bit(whole_run: Path, tmp_path: Path, tune: str) -> None:
    """Without its source, which is read once."""
    start(tuning(whole_run, TUNES[tune], steps=6), tmp_path / "one")
    start(tuning(whole_run, TUNES[tune], steps=3), tmp_path / "two")
    goes_on = tuning(whole_run, TUNES[tune], steps=6)
    train(goes_on, tmp_path / "two", start=None)
    runs.assert_same_run(tmp_path / "one", tmp_path / "two")


def test_the_run_says_where_its_weights_came_from(whole_run: Path, tmp_path: Path) -> None:
    start(tuning(whole_run, LORA, steps=1), tmp_path / "run")
    sha256 = fingerprint(load_weights(whole_run))
    (event,) = (e for e in runs.lines(tmp_path / "run" / "events.jsonl") if e["event"] == "origin")
    assert (event["source"], event["sha256"]) == (str(whole_run), sha256)
    config = (tmp_path / "run" / "config.json").read_text()
    assert sha256 in config
    assert saved(tmp_path / "run").values["base"] == sha256


def test_both_loaders_merge_what_was_learned(whole_run: Path, tmp_path: Path) -> None:
    start(tuning(whole_run, LORA, lr=0.1, warmup=1), tmp_path / "run")
    snapshot = saved(tmp_path / "run")
    for ema in (True, False):
        tensors = snapshot.tensors["model"] | (snapshot.tensors["ema"] if ema else {})
        models = [
            load_run(tmp_path / "run", ema=ema).model,
            load_weights(tmp_path / "run", ema=ema),
        ]
        for model in models:
            for name, weight in model.named_parameters():
                module = name.removesuffix(".weight")
                expected = tensors[name]
                if (a := tensors.get(f"{module}.lora_A.weight")) is not None:
                    product = tensors[f"{module}.lora_B.weight"] @ a
                    assert product.abs().max() > 1e-3
                    expected = expected + 4.0 / 2 * product
                torch.testing.assert_close(weight.detach(), expected)


def test_kept_moments_are_those_of_the_source(whole_run: Path, tmp_path: Path) -> None:
    """And with the raw weights the next update is the one that the source would have made."""
    experiment = tuning(whole_run, TUNES["layers"], optimizer="kept", ema=False, steps=1)
    start(experiment, tmp_path / "run")
    first, source = saved(tmp_path / "run", 0), saved(whole_run)
    assert first.tensors["optimizer"]
    for name, moment in first.tensors["optimizer"].items():
        assert torch.equal(moment, source.tensors["optimizer"][name])
        assert moment.any()
    assert first.values["updates"] == source.values["updates"] == {"decayed": 8, "rest": 8}
    assert torch.equal(first.tensors["model"]["head.bias"], source.tensors["model"]["head.bias"])


def test_kept_moments_of_gains_serve_a_group_of_their_own(whole_run: Path, tmp_path: Path) -> None:
    """The source had them with the rest, and so has their count."""
    experiment = tuning(
        whole_run, TUNES["all"], optimizer="kept", ema=False, steps=1, keep=9, gain_lr=4.0
    )
    start(experiment, tmp_path / "run")
    first, source = saved(tmp_path / "run", 0), saved(whole_run)
    assert first.values["updates"] == {"decayed": 8, "rest": 8, "gains": 8}
    for name, moment in source.tensors["optimizer"].items():
        assert torch.equal(first.tensors["optimizer"][name], moment)


@pytest.mark.parametrize("tune", TUNES)
def test_the_watch_sees_what_learns(tune: str) -> None:
    """Norms by family against the gradients themselves, also where layers between are frozen."""
    pattern = ("blocks.[025].*", "blocks.1.ffn.w2.*") if tune == "layers" else TUNES[tune].only
    experiment = Experiment(
        model=replace(runs.MODEL, depth=6),
        train=replace(runs.TRAIN, tune=replace(TUNES[tune], only=pattern)),
    )
    state = build_state(experiment)
    train_step(state, experiment.train, before_update=lambda gradients: False)
    found = family_norms(state.model, state.optimizer.groups)
    named = {n: p.grad for n, p in state.model.named_parameters() if p.grad is not None}
    for layer in range(6):
        for family, part in (("Attn_WO", "attention.proj"), ("FFN_W2", "ffn.w2")):
            names = (f"blocks.{layer}.{part}.{end}" for end in ("weight", "lora_B.weight"))
            expected = sum(float(named[n].norm()) for n in names if n in named)
            measured = float(found[family][layer]) if family in found else 0.0
            assert measured == pytest.approx(expected, rel=1e-5)
    norms = gradient_norms(taps_for_dit(state.model))
    ends = ("weight", "lora_B.weight")  # of the matrix A nothing is watched
    deep = [named[n] for i in (4, 5) for e in ends if (n := f"blocks.{i}.ffn.w2.{e}") in named]
    assert ("grad_writer_ffn" in norms) == bool(deep) == (tune in ("all", "layers", "lora"))
    if deep:
        expected = float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in deep])))
        assert norms["grad_writer_ffn"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (TuneConfig(only=("block.1.*",)), r"train.tune.only='block.1.\*' matches no.*blocks.1"),
        (TuneConfig(only=("blcks.*",)), r"matches no.*choose one of: blocks\.\*\.attention"),
        (TuneConfig(what="gains", only=("head.*",)), "has no gains that match 'head"),
        (replace(LORA, only=("head.*",)), "matches none of the weights"),
    ],
)
def test_what_matches_nothing_is_refused(tune: TuneConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_state(Experiment(model=runs.MODEL, train=replace(runs.TRAIN, tune=tune)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32}, "model.width=32: the weights of .* have 16; use model.width=16"),
        ({"depth": 3}, "model.depth=3: the weights of .* have 2"),
        ({"rule": {"name": "plain"}}, "model.rule.name=plain: the weights of .* have mvsplit"),
        ({"rule": {"tied_leak": False}}, "model.rule.tied_leak=False: the weights .* have True"),
    ],
)
def test_other_weights_are_refused_by_field(
    whole_run: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "rule" in changes:
        changes = {"rule": replace(runs.MODEL.rule, **changes["rule"])}
    wrong = replace(tuning(whole_run, TuneConfig()), model=replace(runs.MODEL, **changes))
    with pytest.raises(UserError, match=message):
        start(wrong, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()  # an impossible run leaves no trace


def test_heads_that_the_file_does_not_hold_are_said_and_refused_where_they_cannot_be(
    tmp_path: Path,
) -> None:
    """A .pt says nothing of them; the number of the preset is taken, aloud."""
    model = DiT(replace(runs.MODEL, heads=4, kv_heads=1))  # heads of 4 rows each
    with pytest.warns(UserWarning, match="does not hold the number of heads"):
        write_weights(model, tmp_path / "w.pt")
    write_weights(model, tmp_path / "w.safetensors")

    def begin(name: str, heads: int) -> None:
        asked = replace(runs.MODEL, heads=heads, kv_heads=1)
        whole = tuning(tmp_path / name, TuneConfig(), steps=1)
        start(replace(whole, model=asked), tmp_path / f"run-{name}-{heads}")

    said = r"heads taken as 4, the model.heads of this training, .* give it with --model\.heads"
    with pytest.warns(UserWarning, match=said):
        begin("w.pt", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin("w.safetensors", 4)
    with pytest.raises(UserError, match=r"--model\.heads 2 .*16 rows of q_proj and 4 rows of k_p"):
        begin("w.pt", 2)
    assert not (tmp_path / "run-w.pt-2" / "config.json").exists()


def test_what_cannot_be_is_refused(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.tune.what='lora': an adapter belongs to trained"):
        train(runs.experiment(tune=LORA), tmp_path / "no-weights")
    with pytest.raises(UserError, match=r"train\.on_alarm='protect'"):
        runs.experiment(tune=TuneConfig(what="gains"), on_alarm="protect")
    with pytest.raises(UserError, match=r"optimizer=kept: .* has no exp_avg.*lora_A.*fresh"):
        start(tuning(whole_run, LORA, optimizer="kept"), tmp_path / "kept")
    start(tuning(whole_run, TuneConfig(), steps=1), tmp_path / "run")
    other = tuning(whole_run.parent, TuneConfig(), steps=1)
    with pytest.raises(UserError, match=r"another experiment \(origin.source: .* there"):
        train(other, tmp_path / "run")
