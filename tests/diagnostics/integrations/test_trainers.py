"""The callbacks in the trainers themselves, against plain loops over the same model."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvsplit.diagnostics.monitor import Cadence, Monitor, Stopped
from mvsplit.errors import UserError

LR, CLIP = 1e-2, 1e-3  # a bound that every gradient is over: what is read must not be clipped
STEPS = 5


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is missing: pip install 'mvsplit[trainers]'")


def llama() -> nn.Module:
    transformers = library("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def tokens(steps: int = STEPS, passes: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 11, (steps * passes * 2, 6), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def plain_loop(folder: Path, passes: int) -> None:
    """Five steps of SGD with clipping, watched by hand."""
    model = llama()
    monitor = Monitor(model, run_dir=folder, cadence=Cadence(start=1, calm=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for samples in tokens(passes=passes).chunk(STEPS):
        with monitor.look():
            losses = [loss_of(model, ids) / passes for ids in samples.chunk(passes)]
            for loss in losses:
                loss.backward()
        assert monitor.step(torch.stack(losses).sum(), lr=LR).apply
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def assert_same_logs(here: Path, there: Path) -> None:
    for name in ("metrics", "layers"):
        found, expected = read(here, name), read(there, name)
        assert len(found) == len(expected) > 1
        for line, known in zip(found, expected, strict=True):
            assert line.keys() == known.keys()
            for field, value in known.items():
                assert line[field] == pytest.approx(value, rel=1e-4, abs=1e-9), (name, field)


def hf_trainer(folder: Path, model: nn.Module, *, passes: int = 1, steps: int = STEPS) -> Any:
    library("accelerate")
    transformers = library("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=passes,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=CLIP,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(passes=passes)]
    return transformers.Trainer(model=model, args=arguments, train_dataset=data)


@pytest.mark.parametrize("passes", [1, 2])
def test_transformers_trainer_is_watched_as_a_plain_loop(tmp_path, passes):
    model = llama()
    trainer = hf_trainer(tmp_path, model, passes=passes)
    from mvsplit.diagnostics.integrations.transformers import MonitorCallback

    callback = MonitorCallback(trainer, run_dir=tmp_path / "here", cadence=Cadence(start=1, calm=2))
    trainer.add_callback(callback)
    trainer.train()
    plain_loop(tmp_path / "there", passes)
    assert_same_logs(tmp_path / "here", tmp_path / "there")
    assert trainer.training_step.__func__ is type(trainer).training_step


def poisoned(model: nn.Module) -> None:
    """From now on the loss is not a number."""
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_transformers_trainer_skips_and_stops(tmp_path, policy):
    model = llama()
    poisoned(model)
    trainer = hf_trainer(tmp_path, model, steps=1)
    from mvsplit.diagnostics.integrations.transformers import MonitorCallback

    trainer.add_callback(MonitorCallback(trainer, policy=policy))
    before = model.model.norm.weight.clone()
    if policy == "stop":
        with pytest.raises(Stopped):
            trainer.train()
    else:
        trainer.train()
    assert torch.equal(model.model.norm.weight, before)


def lightning_module(base: type) -> Any:
    class Module(base):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    return Module()


def lightning_trainer(package: Any, callback: Any, *, passes: int = 1, steps: int = STEPS) -> Any:
    return package.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=passes,
        gradient_clip_val=CLIP,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("passes", [1, 2])
def test_lightning_is_watched_as_a_plain_loop(tmp_path, name, passes):
    package = library(name)
    from mvsplit.diagnostics.integrations.lightning import MonitorCallback

    callback = MonitorCallback(run_dir=tmp_path / "here", cadence=Cadence(start=1, calm=2))
    data = torch.utils.data.DataLoader(tokens(passes=passes), batch_size=2)
    trainer = lightning_trainer(package, callback, passes=passes)
    trainer.fit(lightning_module(package.LightningModule), data)
    plain_loop(tmp_path / "there", passes)
    assert_same_logs(tmp_path / "here", tmp_path / "there")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_lightning_skips_and_stops(policy):
    package = library("lightning.pytorch")
    from mvsplit.diagnostics.integrations.lightning import MonitorCallback

    module = lightning_module(package.LightningModule)
    poisoned(module.model)
    before = module.model.model.norm.weight.clone()
    trainer = lightning_trainer(package, MonitorCallback(policy=policy), steps=1)
    data = torch.utils.data.DataLoader(tokens(), batch_size=2)
    if policy == "stop":
        with pytest.raises(Stopped):
            trainer.fit(module, data)
    else:
        trainer.fit(module, data)
    assert torch.equal(module.model.model.norm.weight, before)


@pytest.mark.parametrize(
    ("module", "hidden", "extra"),
    [
        ("transformers", ["transformers"], "trainers"),
        ("lightning", ["lightning", "pytorch_lightning"], "trainers"),
        ("tensorboard", ["tensorboard", "torch.utils.tensorboard"], "track"),
        ("wandb", ["wandb"], "track"),
    ],
)
def test_what_is_missing_is_named(monkeypatch, module, hidden, extra):
    ours = f"mvsplit.diagnostics.integrations.{module}"
    for name in list(sys.modules):
        if name == ours or name.split(".")[0] in hidden or name.startswith(tuple(hidden)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Hides(hidden), *sys.meta_path])
    with pytest.raises(UserError, match=rf"pip install 'mvsplit\[{extra}\]'") as caught:
        import_module(ours)
    assert "\n" not in str(caught.value)


class _Hides:
    """A finder for which some packages are not installed."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
