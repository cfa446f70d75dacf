"""Weights between formats: bit for bit, in the memory of one model, and every way to refuse."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mvsplit.hub
from mvsplit.cli import main
from mvsplit.data.vae import Flux2Autoencoder
from mvsplit.errors import UserError
from mvsplit.hub import export_released, load_weights, write_weights
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.training import load_run
from tests.hub.tiny import library, tiny_dit

NAMES = {
    "pt": "model.pt",
    "safetensors": "model.safetensors",
    "shards": "shards",
    "checkpoint": "checkpoint",
    "diffusers": "pipeline",
}
HEADS = 2  # which is not width / 128, and which model.pt cannot hold


def assert_same_model(left: DiT, right: DiT) -> None:
    configs = [replace(m.config, kv_heads=m.config.groups) for m in (left, right)]
    assert configs[0] == configs[1]
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


def write(model: DiT, folder: Path, kind: str) -> Path:
    if kind == "diffusers":
        library("diffusers")
    return write_weights(model, folder / NAMES[kind], kind, shard_gb=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_any_format_to_any_other_is_bit_for_bit(tmp_path, first, second, dtype):
    model = tiny_dit(kv_heads=1, attention_bias=True, patch=2, channels=4).to(dtype)
    (tmp_path / "a").mkdir()
    middle = load_weights(write(model, tmp_path / "a", first), num_heads=HEADS)
    assert_same_model(middle, model)
    assert_same_model(load_weights(write(middle, tmp_path, second), num_heads=HEADS), model)


@pytest.mark.parametrize("kind", NAMES)
def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path, kind):
    (tmp_path / "any").touch()
    path = write(tiny_dit(), tmp_path, kind)
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    assert {p.stat().st_mode for p in files} == {(tmp_path / "any").stat().st_mode}
    assert not list(tmp_path.glob("*.mode"))


def test_model_pt_is_the_state_dict_of_the_released_code(tmp_path):
    model = tiny_dit()
    held = torch.load(write(model, tmp_path, "pt"), weights_only=True)
    expected = export_released(model)
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[key], expected[key]) for key in expected)


def test_shards_are_small_and_are_read_by_their_folder_or_index(tmp_path):
    model = tiny_dit()
    folder = write(model, tmp_path, "shards")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 20_000
        assert all(index["weight_map"][key] == file.name for key in held)
    assert_same_model(load_weights(folder / "model.safetensors.index.json"), model)


def test_a_run_gives_its_averaged_weights_or_those_as_trained(digits_run):
    for ema in (True, False):
        expected = load_run(digits_run, ema=ema).model
        assert_same_model(load_weights(digits_run, ema=ema), expected)
        newest = sorted((digits_run / "checkpoints").iterdir())[-1]
        assert_same_model(load_weights(newest, ema=ema), expected)
    assert not torch.equal(load_weights(digits_run).head.weight, expected.head.weight)


def test_the_command_converts_a_run_there_and_back(digits_run, tmp_path, capsys):
    for source, target, *options in (
        (digits_run, tmp_path / "a.safetensors"),
        (tmp_path / "a.safetensors", tmp_path / "b.pt"),
        (tmp_path / "b.pt", tmp_path / "c", "--to", "checkpoint", "--num-heads", "2"),
    ):
        assert main(["convert", str(source), str(target), *options]) == 0
    assert capsys.readouterr().out.endswith(f"(2 layers of width 16) to {tmp_path / 'c'}\n")
    assert_same_model(load_weights(tmp_path / "c"), load_run(digits_run).model)


def test_a_number_of_heads_that_pt_does_not_hold_is_said_where_it_is_lost(tmp_path, capsys):
    """A chain of files goes wrong only with a warning at either end, and right as they advise."""
    model = tiny_dit(width=128, heads=4, text_width=128)
    source = write(model, tmp_path, "checkpoint")

    def convert(start: Path, name: str, *options: str) -> tuple[Path, str]:
        assert main(["convert", str(start), str(tmp_path / name), *options]) == 0
        return tmp_path / name, capsys.readouterr().err

    held, said = convert(source, "held.safetensors")
    assert said == ""
    pt, said = convert(held, "w.pt")
    assert "the file does not hold the number of heads (4); give --num-heads 4 when" in said
    guessed, said = convert(pt, "guessed.safetensors")
    assert "heads guessed as 1 from width / 128" in said
    assert "give --num-heads" in said
    assert load_weights(guessed).config.heads == 1
    back, said = convert(pt, "back.safetensors", "--num-heads", "4")
    assert said == ""
    assert_same_model(load_weights(back), model)


def test_heads_that_would_be_guessed_rightly_are_written_without_a_warning(tmp_path, recwarn):
    write_weights(tiny_dit(width=128, heads=1), tmp_path / "w.pt")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="heads guessed as 1 from width / 128"):
        load_weights(tmp_path / "w.pt")


def test_dtype_is_given_while_reading(tmp_path):
    model = tiny_dit()
    path = write(model, tmp_path, "pt")
    low = load_weights(path, num_heads=HEADS, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert_same_model(low, tiny_dit().to(torch.bfloat16))


def test_tensors_that_are_no_plain_rows_of_their_file_are_read_as_they_are(tmp_path):
    tensors = export_released(tiny_dit())
    key = "blocks.0.ffn.w2.weight"
    transposed = {**tensors, key: tensors[key].t().contiguous().t()}  # strides of its own
    whole = torch.cat(
        [tensors["final_proj.bias"], torch.zeros(3), tensors["patch_embed.patch_proj.bias"]]
    )
    transposed["patch_embed.patch_proj.bias"] = whole[-32:]  # an offset of its own
    torch.save({"state_dict": transposed}, tmp_path / "odd.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("odd.pt", "old.pt"):
        assert_same_model(load_weights(tmp_path / name, num_heads=HEADS), tiny_dit())


# Memory


PEAKS = """
import sys
from pathlib import Path
from mvsplit.hub import load_weights
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
load_weights(sys.argv[1], num_heads=2)  # whatever is set up only once
held = []  # so that no memory is used twice
for path in sys.argv[2:]:
    before = peak()
    held.append(load_weights(path))
    print((peak() - before) / sum(p.nbytes for p in held[-1].parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_needs_the_memory_of_one_model(tmp_path):
    config = DiTConfig(depth=13, width=1024, heads=8, ffn_width=512, channels=8, text_width=1024)
    with torch.device("meta"):
        model = DiT(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    paths = [write_weights(model, tmp_path / NAMES[kind]) for kind in ("pt", "safetensors")]
    assert min(path.stat().st_size for path in paths) > 140e6
    write_weights(tiny_dit(), tmp_path / "small.pt")
    command = [sys.executable, "-c", PEAKS, str(tmp_path / "small.pt"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) == 2
    assert all(0.8 < peak < 1.1 for peak in peaks), peaks


# Refusals


def assert_refused(path: Path, message: str, **options: int) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_weights(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_by_its_tensor(tmp_path, kind, value):
    model = tiny_dit()
    model.blocks[1].ffn.w2.weight.data[3, 5] = value
    path = write(model, tmp_path, kind)
    assert_refused(
        path, r"blocks\.1\.ffn\.w2\.weight holds .* not finite \(1 of 1280\)", num_heads=2
    )


def test_weights_of_another_model_are_one_short_line(tmp_path):
    save_file({f"layers.{i}.norm": torch.ones(2) for i in range(99)}, tmp_path / "m.safetensors")
    assert_refused(
        tmp_path / "m.safetensors", r"in another: it holds layers\.0\.norm, .* of another model$"
    )


def test_a_missing_shard_and_a_missing_tensor_are_named(tmp_path):
    folder = write(tiny_dit(), tmp_path, "shards")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({}, first)
    assert_refused(folder, rf"{first.name} lacks patch_embed\.patch_proj\.weight, ")
    second.unlink()
    assert_refused(folder, f"names the shard {second.name}, which is not beside it")


def test_a_shard_outside_the_folder_is_not_opened(tmp_path):
    folder = write(tiny_dit(), tmp_path, "shards")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert_refused(folder, r"names the shard \.\./other\.safetensors, which is not beside it")


def test_keys_of_our_own_layout_are_strict(tmp_path):
    folder = write(tiny_dit(), tmp_path, "diffusers") / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors.index.json"
    held = {}
    for shard in folder.glob("*.safetensors"):
        held |= load_file(shard)
        shard.unlink()
    file.unlink()
    held["dit.head.bias"] = held["dit.head.bias"][:5].clone()
    held["dit.tail.bias"] = held.pop("dit.head.weight")
    save_file(held, folder / "diffusion_pytorch_model.safetensors")
    expected = r"missing head\.weight, unknown tail\.bias, head\.bias \[5\] \(expected \[128\]\)"
    assert_refused(folder, expected)


def test_another_model_of_diffusers_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    assert_refused(tmp_path, "holds a FluxTransformer2DModel; only MVSplitDiTTransformer2DModel")


def test_a_folder_without_weights_says_what_would_do(tmp_path):
    assert_refused(tmp_path, "is no run, no checkpoint and no diffusers folder, and holds none of")
    assert_refused(tmp_path / "none.pt", r"there is no file .*none\.pt")


def test_integers_and_damaged_checkpoints_are_refused(tmp_path):
    save_file({"ids": torch.ones(2, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    assert_refused(tmp_path / "ids.safetensors", "ids is of dtype I64")
    checkpoint = write(tiny_dit(), tmp_path, "checkpoint")
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert_refused(checkpoint, r"model\.safetensors is damaged \(checksum\)")


def test_a_target_that_exists_or_has_no_format_is_refused(tmp_path, capsys):
    model = tiny_dit()
    path = write(model, tmp_path, "pt")
    before = path.read_bytes()
    for target, options, message in (
        (path, [], f"target: {path} exists already"),
        (tmp_path / "new", [], "does not say in which format"),
        (tmp_path / "new", ["--to", "shards", "--shard-gb", "0"], "shard_gb=0.0: must be greater"),
    ):
        assert main(["convert", str(path), str(target), "--num-heads", "2", *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_what_the_released_layout_cannot_hold_leaves_no_trace(tmp_path):
    model = tiny_dit(rule=RuleConfig(name="plain"))
    with pytest.raises(UserError, match=r"model\.rule\.name='plain'"):
        write_weights(model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())
    assert_same_model(load_weights(write(model, tmp_path, "checkpoint")), model)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": RuleConfig(name="plain")},
        {"rule": RuleConfig(name="keel")},
        {"patch_frames": 2, "mean": "frame"},
        {"norm_eps": 1e-6},
    ],
    ids=["plain", "keel", "clips", "eps"],
)
def test_a_refused_layout_names_those_that_hold_the_network(tmp_path, capsys, changes):
    """The message's remedy is then taken, and holds."""
    model = tiny_dit(**changes)
    source = write(model, tmp_path, "checkpoint")
    assert main(["convert", str(source), str(tmp_path / "a.safetensors")]) == 2
    assert "use --to checkpoint or --to diffusers" in capsys.readouterr().err
    library("diffusers")
    for kind in ("checkpoint", "diffusers"):
        target = tmp_path / f"to_{kind}"
        assert main(["convert", str(source), str(target), "--to", kind]) == 0
        assert_same_model(load_weights(target), model)


def test_the_help_says_which_formats_hold_which_rules(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "released layout, which holds only networks of the rule mvsplit" in said
    assert "checkpoint and diffusers hold every rule" in said


def test_without_the_extra_its_name_is_said(monkeypatch):
    for module in ("diffusers_pipeline", "diffusers_model"):
        monkeypatch.delitem(sys.modules, f"mvsplit.hub.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"the extra 'hub': pip install 'mvsplit\[hub\]'$"):
        _ = mvsplit.hub.MVSplitPipeline
    with pytest.raises(UserError, match="diffusers is not installed"):
        Flux2Autoencoder.load("anywhere")
