"""Adapters on the disk: peft reads ours, we read peft's, and none is given to other weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mvsplit.cli import main
from mvsplit.errors import UserError
from mvsplit.hub import load_weights
from mvsplit.hub.adapter import CONFIG, TENSORS, export_adapter, merge_adapter, read_adapter

LORA = ["--tune.what", "lora", "--tune.lora.rank", "3", "--tune.lora.targets", "qkv", "w2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs `base` and `lora` that starts from it, and the adapter of the latter."""
    folder = tmp_path_factory.mktemp("trained")
    size = ["--model.depth", "2", "--model.width", "16", "--batch-size", "8"]
    base = ["train", "tiny", *size, "--steps", "2", "--run-dir", str(folder / "base")]
    lora = ["train", "tiny", *size, "--steps", "3", "--run-dir", str(folder / "lora")]
    assert main(base) == 0
    assert main([*lora, "--from", str(folder / "base"), "--lr", "0.1", *LORA]) == 0
    export_adapter(folder / "lora", folder / "adapter")
    return folder


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 6, 4, generator=generator), torch.randn(3, 2, 32, generator=generator)


def test_the_adapter_on_its_base_is_the_run(trained: Path) -> None:
    model = load_weights(trained / "base")
    before = model(*inputs())
    merge_adapter(model, read_adapter(trained / "adapter"), weights="base")
    torch.testing.assert_close(model(*inputs()), load_weights(trained / "lora")(*inputs()))
    assert (model(*inputs()) - before).abs().max() > 1e-2


def test_peft_loads_it_and_computes_the_same(trained: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load_weights(trained / "base")
    wrapped = peft.PeftModel.from_pretrained(model, str(trained / "adapter"))
    names = [n for n, _ in wrapped.named_parameters() if "lora_A" in n]
    assert len(names) == 2 * 2  # layers, targets
    torch.testing.assert_close(wrapped(*inputs()), load_weights(trained / "lora")(*inputs()))


def test_what_peft_writes_is_read(trained: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["proj", "w13"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(load_weights(trained / "base"), config)
    wrapped.save_pretrained(tmp_path / "peft")
    expected = wrapped(*inputs())
    model = load_weights(trained / "base")
    merge_adapter(model, read_adapter(tmp_path / "peft"), weights="base")
    torch.testing.assert_close(model(*inputs()), expected, rtol=1e-4, atol=1e-5)


def test_training_goes_on_with_an_adapter_through_the_released_layout(
    trained: Path, tmp_path: Path
) -> None:
    """The same weights in another file are the same weights."""
    file = tmp_path / "base.pt"
    assert main(["convert", str(trained / "base"), str(file)]) == 0
    command = ["train", "tiny", "--model.depth", "2", "--model.width", "16", "--steps", "1"]
    command += ["--from", str(file), "--adapter", str(trained / "adapter"), *LORA]
    assert main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    first = load_weights(tmp_path / "run" / "checkpoints" / "step_00000000")
    torch.testing.assert_close(first(*inputs()), load_weights(trained / "lora")(*inputs()))


def test_a_lora_for_other_weights_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everywhere that it could be given."""
    other, adapter = str(trained / "lora"), str(trained / "adapter")
    size = ["--model.depth", "2", "--model.width", "16", "--run-dir", str(tmp_path / "run")]
    for command in (
        ["convert", other, str(tmp_path / "merged.pt"), "--adapter", adapter],
        ["train", "tiny", *size, "--from", other, "--adapter", adapter],
        ["train", "tiny", *size, "--from", other, "--adapter", adapter, *LORA],
    ):
        assert main(command) == 2
        assert "was trained for weights with sha256" in capsys.readouterr().err
    assert not (tmp_path / "merged.pt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True; only False can be read"),
        ({"r": None}, "r is missing or no number"),
        ({"peft_type": "IA3"}, "peft_type='IA3'; only 'LORA' can be read"),
    ],
)
def test_other_kinds_of_adapters_are_refused(
    trained: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a")


def test_damaged_or_missing_adapters_are_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "a")
    content = (tmp_path / "a" / TENSORS).read_bytes()
    (tmp_path / "a" / TENSORS).write_bytes(content[: len(content) // 2])
    for folder in (tmp_path / "a", tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"holds no whole adapter_model.safetensors"):
            read_adapter(folder)
    size = ["--model.depth", "2", "--model.width", "16", "--run-dir", str(tmp_path / "run")]
    base = ["--from", str(trained / "base")]
    for options, message in (
        (["--adapter", "x"], "--adapter belongs to weights to start from"),
        (["--optimizer", "kept"], "--optimizer kept belongs to weights to start from"),
        ([*base, "--adapter", str(trained / "adapter"), *LORA, "--tune.lora.rank", "4"],
         "train.tune.lora.rank=4: the adapter"),
        (["--from", str(tmp_path / "none.pt")], "there is no file"),
    ):  # fmt: skip
        assert main(["train", "tiny", *size, *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["convert", str(trained / "base"), str(tmp_path / "b"), "--to", "adapter"]) == 2
    assert "train.tune.what='all', not lora" in capsys.readouterr().err
