"""The monitor in a loop of one's own: what it reads, when it looks, what its policies do."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from mvsplit.diagnostics import Cadence, Monitor, Stopped
from mvsplit.diagnostics.monitor import Schedule
from mvsplit.errors import UserError


class Block(nn.Module):
    """A small pre-norm block with the names that Llama has."""

    def __init__(self, width=8):
        super().__init__()
        self.attention = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self.attention, name, nn.Linear(width, width, bias=False))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        a = self.attention
        y = nn.functional.scaled_dot_product_attention(
            *(p(x) for p in (a.q_proj, a.k_proj, a.v_proj))
        )
        x = x + a.o_proj(y)
        return x + self.mlp(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(4)))


@pytest.fixture
def holder(model):
    outer = nn.Module()
    outer.blocks = model
    outer.forward = model.forward
    return outer


def train(holder, monitor, steps, *, lr=1e-2, spoil=None):
    """The five lines of the module's docstring."""
    optimizer = torch.optim.SGD(holder.parameters(), lr=lr)
    reports = []
    for step in range(1, steps + 1):
        x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(step))
        with monitor.look():
            loss = holder.forward(x).square().mean()
            if step == spoil:
                loss = loss * math.nan
            loss.backward()
        reports.append(monitor.step(loss, lr=lr))
        if reports[-1].apply:
            optimizer.step()
        optimizer.zero_grad()
    return reports


def test_it_reads_the_norms_of_the_deepest_quarter(holder, model):
    monitor = Monitor(holder)
    loss = holder.forward(torch.randn(3, 5, 8)).square().mean()
    loss.backward()
    numbers = monitor.step(loss).numbers
    last = model[3]
    expected = {
        "loss": loss.double(),
        "grad_norm": torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm(),
        "grad_writer_attn": last.attention.o_proj.weight.grad.double().norm(),
        "grad_writer_ffn": last.mlp[2].weight.grad.double().norm(),
        "grad_query": last.attention.q_proj.weight.grad.double().norm(),
        "grad_key": last.attention.k_proj.weight.grad.double().norm(),
    }
    assert numbers == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)


def test_a_scaled_loss_gives_the_same_norms(holder):
    found = []
    for scale in (1.0, 1024.0):
        holder.zero_grad()
        loss = holder.forward(torch.ones(3, 5, 8)).square().mean()
        (loss * scale).backward()
        found.append(Monitor(holder).step(loss, scale=scale).numbers)
    assert found[1].pop("loss_scale") == 1024
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_an_overflow_under_a_loss_scale_is_left_to_the_scaler(holder, policy):
    """It has to see the gradients to lower its scale; a loss that is not finite is no overflow."""
    x = torch.randn(3, 5, 8)
    monitor = Monitor(holder, policy=policy)
    loss = holder.forward(x).square().mean()
    (loss * 1e38 * 1e38).backward()
    report = monitor.step(loss, scale=2.0**16)
    assert report.apply
    assert [(e.level, e.verdict) for e in report.events] == [("warning", "non-finite")]
    if policy == "skip":
        assert not monitor.step(loss * math.nan, scale=2.0**16).apply
    else:
        with pytest.raises(Stopped):
            monitor.step(loss * math.nan, scale=2.0**16)


def test_an_embedding_with_sparse_gradients_is_part_of_the_norm(holder):
    holder.table = nn.Embedding(20, 8, sparse=True)
    rows = torch.tensor([[3, 3, 5, 7, 7]])
    loss = holder.forward(holder.table(rows)).square().mean()
    loss.backward()
    squares = [p.grad.to_dense().double().square().sum() for p in holder.parameters()]
    found = Monitor(holder).step(loss).numbers["grad_norm"]
    assert found == pytest.approx(float(sum(squares).sqrt()), rel=1e-6)


def test_watching_changes_no_bit_of_the_training(holder):
    other = copy.deepcopy(holder)
    other.forward = other.blocks.forward
    train(holder, Monitor(holder, cadence=Cadence(calm=2, start=1)), 6)
    train(other, Monitor(other, cadence=Cadence(calm=1000, start=1000)), 6)
    for a, b in zip(holder.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_looks_are_rare_in_calm_and_at_once_when_something_stirs():
    schedule = Schedule(Cadence(calm=40, start=5, burst=3))
    calm = [step for step in range(1, 201) if schedule.due(stirred=False)]
    assert calm == [5, 15, 35, 75, 115, 155, 195]
    assert [schedule.due(stirred=True) for _ in range(3)] == [True] * 3
    assert not schedule.due(stirred=True)  # the burst is spent
    assert [step for step in range(2, 20) if schedule.due(stirred=False)] == [5, 15]


def test_a_run_folder_holds_metrics_layers_and_events(holder, tmp_path):
    with pytest.raises(Stopped, match="step 7: Not finite: loss"):
        train(
            holder,
            Monitor(holder, run_dir=tmp_path / "run", policy="stop", cadence=Cadence(start=2)),
            9,
            spoil=7,
        )
    lines = {
        name: [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").open()]
        for name in ("metrics", "layers", "events")
    }
    assert [line["step"] for line in lines["metrics"]] == list(range(1, 8))
    assert [line["step"] for line in lines["layers"]] == [2, 6]
    assert len(lines["layers"][0]["tcs"]) == 4
    started, *verdicts = lines["events"]
    assert (started["event"], started["step"], started["level"]) == ("watching", 0, "info")
    assert "watching 4 layers of" in started["message"]
    assert {line["verdict"] for line in verdicts} == {"non-finite"}


def test_skip_leaves_out_every_update_that_is_not_finite(holder):
    monitor = Monitor(holder, policy="skip")
    applied = []
    for loss in (1.0, math.nan, math.nan, 1.0, math.inf):
        holder.zero_grad()
        (holder.forward(torch.ones(3, 5, 8)).square().mean() * loss).backward()
        applied.append(monitor.step(loss).apply)
    assert applied == [True, False, False, True, False]


def test_skip_leaves_out_the_update_of_the_alarm_and_no_other(holder):
    told = []
    reports = train(holder, Monitor(holder, policy="skip", receive=told.append), 6, spoil=4)
    assert [report.apply for report in reports] == [True, True, True, False, True, True]
    assert [event.step for event in told] == [4]
    assert all(torch.isfinite(p).all() for p in holder.parameters())


def test_record_goes_on(holder):
    reports = train(holder, Monitor(holder), 4, spoil=4)
    assert reports[-1].apply
    assert [event.verdict for event in reports[-1].events] == ["non-finite"]


def test_errors_name_the_remedy(holder):
    with pytest.raises(UserError, match="after backward"):
        Monitor(holder).step(1.0)
    with pytest.raises(UserError, match="did you mean skip"):
        Monitor(holder, policy="skipp")
    with pytest.raises(UserError, match=r"cadence\.calm=0"):
        Cadence(calm=0)


def test_a_model_without_attention_says_what_it_will_not_measure(caplog):
    from mvsplit.diagnostics.structure import TapNames

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(8, 8)

    outer = nn.Module()
    outer.layers = nn.ModuleList(Mixer() for _ in range(2))
    monitor = Monitor(outer, names=TapNames(blocks="layers", writer_ffn="mix"))
    assert [words.split(":")[0] for words in monitor.missing] == [
        "no queries and keys",
        "no attention writer",
    ]
    (record,) = caplog.records  # said once, and not for want of a configured logger
    assert record.levelname == "WARNING"
    assert record.message == (
        "Module: no queries and keys: their gradients are not measured; no "
        "attention writer: its gradients are not measured; where a block has them by other names, "
        "give these: names=TapNames(query='…', key='…', writer_attn='…'); its linear maps: mix"
    )


@pytest.mark.parametrize(("calm", "at"), [(128, 20), (3, 6)])
def test_a_loop_without_looks_is_told_once(holder, tmp_path, caplog, calm, at):
    monitor = Monitor(holder, cadence=Cadence(calm=calm), run_dir=tmp_path)
    loss = holder.forward(torch.randn(3, 5, 8)).square().mean()
    loss.backward()
    for _ in range(45):
        monitor.step(loss)
    words = "monitor.look() was never entered: layers are not looked into"
    assert [r.message for r in caplog.records if "look()" in r.message] == [words]
    lines = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert [(e["step"], e["message"]) for e in lines if e["event"] == "unseen"] == [(at, words)]


def test_a_loop_that_looks_is_not_told_even_where_no_look_was_due(holder, tmp_path, caplog):
    train(holder, Monitor(holder, cadence=Cadence(calm=100, start=100), run_dir=tmp_path), 25)
    assert not caplog.records
    assert "unseen" not in (tmp_path / "events.jsonl").read_text()


def test_in_the_folder_of_a_run_of_train_it_says_so_once(holder, tmp_path, caplog):
    (tmp_path / "config.json").write_text('{"model": {}, "train": {}, "data": {}}')
    monitor = Monitor(holder, run_dir=tmp_path)
    train(holder, monitor, 3)
    (record,) = caplog.records
    for words in (
        f"run_dir='{tmp_path}' holds a run of mvsplit train",
        "metrics.jsonl, layers.jsonl and events.jsonl",
        "choose another folder",
    ):
        assert words in record.message


@pytest.mark.parametrize("config", ['{"architectures": ["Mine"]}', "{", None])
def test_in_any_other_folder_it_says_nothing(holder, tmp_path, caplog, config):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    train(holder, Monitor(holder, run_dir=tmp_path), 3)
    assert not caplog.records
