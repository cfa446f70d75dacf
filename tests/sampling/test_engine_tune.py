"""What the engine's tuner chooses, and what it keeps on disk."""

import json

import pytest
import torch

pytest.importorskip("triton")

from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.kernels.hopper import driver
from mvsplit.kernels.hopper.attention import Heads
from mvsplit.kernels.hopper.product import Cut
from mvsplit.sampling import engine_tune
from mvsplit.sampling.engine_plan import ORDINARY, STAGES, Network, Ordinary, Plan, Writing
from mvsplit.sampling.engine_tune import Tuner, load_plan, save_plan
from tests.sampling.engine_cases import OWN, WRITE, draw, make


@pytest.fixture
def ours_is_faster(monkeypatch):
    """Where nothing can be timed: every stage of ours takes a microsecond, an ordinary one two."""

    def block_times(self, plans):
        ordinary = [sum(isinstance(getattr(plan, s), Ordinary) for s in STAGES) for plan in plans]
        return [len(STAGES) + count for count in ordinary]

    def measure(self, stage, plan):
        return 2.0 if isinstance(getattr(plan, stage), Ordinary) else 1.0

    monkeypatch.setattr(Tuner, "block_times", block_times)
    monkeypatch.setattr(Tuner, "_measure", measure)
    monkeypatch.setattr(Tuner, "_compile", lambda self, jobs: list(jobs))
    monkeypatch.setattr(engine_tune, "candidates", few)


def few(stage, network):
    own = {"qkv": OWN.qkv, "attention": OWN.attention, "w13": OWN.w13}
    return [getattr(ORDINARY, stage), own.get(stage, WRITE)]


def test_the_tuner_takes_the_fastest_that_agrees(ours_is_faster):
    model = make()
    latents, text, _ = draw(model)
    tuner = Tuner(Network(model, latents, text, padded=False))
    plan = tuner.best_plan()
    assert plan == Plan(OWN.qkv, OWN.attention, WRITE, OWN.w13, WRITE)
    assert [row[1] for row in tuner.table["qkv"]] == [2.0, 1.0]


def test_what_does_not_agree_is_never_taken(monkeypatch, ours_is_faster, caplog):
    model = make()
    latents, text, _ = draw(model)
    run = Network.run

    def broken(self, stage, block, plan, following=None, compile_only=False):
        run(self, stage, block, plan, following, compile_only)
        if stage == "w13" and isinstance(plan.w13, Tile) and not compile_only:
            self.hidden.mul_(1.1)

    monkeypatch.setattr(Network, "run", broken)
    tuner = Tuner(Network(model, latents, text, padded=False))
    assert tuner.best_plan().w13 == ORDINARY.w13
    assert "w13 Tile" in caplog.text
    assert "off by" in caplog.text


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("stage", ["attention", "w13", "proj", "w2"])
def test_sums_that_are_wrong_are_found_where_outputs_show_nothing_of_them(
    monkeypatch, ours_is_faster, stage, split
):
    """As with gains of a thousand layers: a mean is a few thousandths of what a block adds."""
    model = make(device="cpu")
    for block in model.blocks:
        for rule in (block.rule_attention, block.rule_ffn):
            for gain in rule.parameters():
                gain.mul_(1e-3)
    latents, text, valid = draw(model, valid=[4, 1])
    network = Network(model, latents, text, padded=True)
    network.valid.copy_(valid)
    network.segments = network.stream.segments(network.valid, valid.device)
    run = Network.run
    writer = Writing(Tile(rows=64, columns=32, depth=16, split=split), Rows(rows=16))
    own = {"attention": OWN.attention, "w13": OWN.w13}.get(stage, writer)

    def broken(self, ran, block, plan, following=None, compile_only=False):
        run(self, ran, block, plan, following, compile_only)
        if ran == stage and getattr(plan, stage) == own and wrong:
            left = self._writer_buffers(split)[1] if own == writer else self.sums
            left.mul_(1.1)

    monkeypatch.setattr(Network, "run", broken)
    for wrong in (False, True):
        tuner = Tuner(network)
        best = tuner._fastest(stage, [getattr(ORDINARY, stage), own])[0]
        assert (best == own) != wrong
    assert "off by 1.0e-01" in tuner.table[stage][1][2]


@pytest.mark.parametrize("factor", [20.0, torch.nan])
def test_stages_that_agree_alone_but_not_together_are_not_taken(
    monkeypatch, ours_is_faster, caplog, factor
):
    """As a kernel that starts before what it reads is there."""
    model = make()
    latents, text, _ = draw(model)
    run = Network.run

    def early(self, stage, block, plan, following=None, compile_only=False):
        run(self, stage, block, plan, following, compile_only)
        together = isinstance(plan.qkv, Tile) and isinstance(plan.w13, Tile)
        if stage == "w13" and together and not compile_only:
            self.hidden.mul_(factor)

    monkeypatch.setattr(Network, "run", early)
    tuner = Tuner(Network(model, latents, text, padded=False))
    assert tuner.best_plan() == ORDINARY
    assert "blocks by the plan are off by" in caplog.text


def test_weights_that_are_not_finite_are_not_compared(caplog):
    model = make()
    model.blocks[0].ffn.w2.weight.fill_(torch.inf)
    latents, text, _ = draw(model)
    assert Tuner(Network(model, latents, text, padded=False)).best_plan() is None
    assert "not finite" in caplog.text


def test_choices_come_back_from_disk_by_shape(tmp_path, monkeypatch, caplog):
    model = make()
    latents, text, _ = draw(model)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    network = Network(model, latents, text, padded=False)
    path = tmp_path / "deep" / "engine.json"
    assert load_plan(network, path) is None
    plan = OWN.with_pdl(True).with_choice("qkv", Cut(144, 1, 2, 5))
    plan = plan.with_choice("attention", Heads(1))
    plan = plan.with_choice("w2", Writing(Cut(144, 1, 2, 4, 3, pdl=True), Rows()))
    save_plan(network, plan, path)
    assert load_plan(network, path) == plan
    longer = Network(model, latents, draw(model, text=40)[1], padded=False)
    assert load_plan(longer, path) is None
    save_plan(longer, ORDINARY, path)
    assert load_plan(network, path) == plan
    assert load_plan(longer, path) == ORDINARY
    for damaged in ("{", "[1]"):
        caplog.clear()
        path.write_text(damaged)
        assert load_plan(network, path) is None
        assert "is not read" in caplog.text
    for fields in ({}, [], {**plan.to_json(), "qkv": {"kind": "unheard"}}):
        caplog.clear()
        path.write_text(json.dumps({engine_tune._key(network): fields}))
        assert load_plan(network, path) is None
        assert "holds no plan" in caplog.text


def test_a_plan_for_whole_images_is_none_for_padded_ones(tmp_path, monkeypatch):
    """A writer's own kernel counts every row of the image; 30 tokens have 2 rows of padding."""
    model = make()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    whole, padded = (
        Network(model, *draw(model, side=side)[:2], padded=False) for side in ((16, 8), (20, 6))
    )
    assert whole.stream.sample_rows == padded.stream.sample_rows
    save_plan(whole, OWN.with_choice("proj", Cut(64, 1, 2, 4)), tmp_path / "engine.json")
    assert load_plan(padded, tmp_path / "engine.json") is None


def test_a_plan_of_other_kernels_or_another_driver_is_none(tmp_path, monkeypatch):
    model = make()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    network, path = Network(model, *draw(model)[:2], padded=False), tmp_path / "engine.json"
    save_plan(network, OWN, path)
    for name, changed in (("_sources", "others"), ("driver_version", 14000)):
        with monkeypatch.context() as patch:
            patch.setattr(engine_tune, name, lambda changed=changed: changed)
            assert load_plan(network, path) is None
    assert load_plan(network, path) == OWN


def test_a_kernel_that_waited_in_vain_is_blamed_and_not_the_next(monkeypatch, word):
    model = make()
    tuner = Tuner(Network(model, *draw(model)[:2], padded=False))
    choices = [ORDINARY.qkv, Cut(), Cut(144)]

    def output(self, stage, plan):
        if plan.qkv == Cut():
            word.fill_(1)
            return torch.tensor([torch.nan])
        return torch.ones(1)

    monkeypatch.setattr(Tuner, "_output", output)
    monkeypatch.setattr(Tuner, "_measure", lambda self, stage, plan: 1.0)
    assert tuner._fastest("qkv", choices) == [choices[0], choices[2]]
    assert "did not end within seconds" in tuner.table["qkv"][1][2]


def test_a_wait_in_vain_says_nothing_of_a_plan(monkeypatch, word):
    """It is no reason to keep the ordinary ops for all times to come."""
    model = make()
    tuner = Tuner(Network(model, *draw(model)[:2], padded=False))
    monkeypatch.setattr(Tuner, "_off_together", lambda self, plan: word.fill_(1) and float("inf"))
    with pytest.raises(driver.DriverError, match="another process draws on the same GPU"):
        tuner.checked(OWN)
    assert not word.any()
