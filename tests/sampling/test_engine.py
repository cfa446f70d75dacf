"""The engine's evaluation is the model's, whatever the plan; and what it does where it cannot."""

import pytest
import torch

from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig

pytest.importorskip("triton")

from mvsplit.kernels.fused.stream_attention import Blocks
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.sampling import engine_tune
from mvsplit.sampling.engine_plan import ORDINARY, STAGES, Network, Plan, Writing
from mvsplit.sampling.engine_tune import Tuner

ON_GPU = torch.cuda.is_available()
WRITE = Writing(Tile(rows=32, columns=32, depth=32), Rows(rows=4))
OWN = Plan(
    qkv=Tile(rows=32, columns=32, depth=32),
    attention=Blocks(queries=32, keys=32),
    proj=WRITE,
    w13=Tile(rows=64, columns=32, depth=32),
    w2=Writing(Tile(rows=32, columns=32, depth=16, split=2), Rows(rows=2)),
)
# Two blocks of fp32 with sums in another order; values of order one.
FP32_ERROR = 2e-5


def make(rule="mvsplit", dtype=torch.float32, **changes):
    fields = {
        "depth": 2, "width": 32, "heads": 2, "ffn_width": 40, "channels": 3, "patch": 2,
        "text_width": 24, "writers": "standard",
    }  # fmt: skip
    if not isinstance(rule, RuleConfig):
        rule = RuleConfig(name=rule, beta=0.7, gamma=0.5)
    config = DiTConfig(**{**fields, "rule": rule, **changes})
    model = DiT(config, torch.Generator().manual_seed(1)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for block in model.blocks:  # gains that differ between columns
        for rule_of_branch in (block.rule_attention, block.rule_ffn):
            for gain in rule_of_branch.parameters():
                gain.add_(0.2 * torch.randn(gain.shape, generator=generator))
    return model.to(dtype)


def draw(model, batch=2, side=(4, 6), text=5, valid=None, dtype=torch.float32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    c = model.config
    latents = torch.randn(batch, c.channels, *side, generator=generator).to(dtype)
    states = torch.randn(batch, text, c.text_width, generator=generator).to(dtype)
    return latents, states, None if valid is None else torch.tensor(valid)


def evaluate(model, plan, latents, text, valid):
    network = Network(model, latents, text, padded=valid is not None)
    return network(latents, text, valid, plan)


@pytest.mark.parametrize("valid", [None, [5, 2], [0, 1]], ids=str)
@pytest.mark.parametrize("rule", ["mvsplit", "plain", "layerscale", "rezero", "hard-center",
                                  "mvsplit-attention-only", "deepnorm"])  # fmt: skip
def test_every_gain_rule_and_padding_is_the_models_own(rule, valid):
    model = make(rule)
    inputs = draw(model, valid=valid)
    expected = model(*inputs)
    error = (evaluate(model, OWN, *inputs) - expected).abs().max()
    assert error < FP32_ERROR


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_stages_by_the_ordinary_ops_mix_with_ours(stage):
    model = make()
    inputs = draw(model, valid=[4, 1])
    plan = ORDINARY if stage is None else OWN.with_choice(stage, getattr(ORDINARY, stage))
    error = (evaluate(model, plan, *inputs) - model(*inputs)).abs().max()
    assert error < FP32_ERROR


@pytest.mark.parametrize(
    ("changes", "side", "text"),
    [
        ({"heads": 4, "kv_heads": 2, "patch": 1}, (7, 5), 1),
        ({"width": 24, "heads": 2, "ffn_width": 17, "text_width": 24}, (2, 2), 33),
        ({"depth": 1, "rule": RuleConfig(name="mvsplit", tied_leak=False, leak=0.2)}, (2, 4), 0),
    ],
    ids=str,
)
def test_awkward_shapes(changes, side, text):
    model = make(**changes)
    inputs = draw(model, batch=3, side=side, text=text)
    assert (evaluate(model, OWN, *inputs) - model(*inputs)).abs().max() < FP32_ERROR


def test_a_second_call_with_other_inputs_and_changed_weights_is_right():
    model = make()
    inputs = draw(model, valid=[5, 2])
    network = Network(model, *inputs[:2], padded=True)
    network(*inputs, OWN)
    model.blocks[0].ffn.w2.weight.mul_(1.5)
    other = draw(model, valid=[1, 4], seed=9)
    assert (network(*other, OWN) - model(*other)).abs().max() < FP32_ERROR


def test_nan_weights_come_out_as_nan():
    model = make()
    model.blocks[1].attention.proj.weight[0, 0] = torch.nan
    assert evaluate(model, OWN, *draw(model)).isnan().any()


@pytest.fixture
def timed_by_count(monkeypatch):
    """Where there is no CUDA graph to time: runs a chain, and counts instead of measuring."""
    counted = []

    def graph_time(run):
        run()
        counted.append(run)
        return 1.0 / len(counted)  # later is faster

    if not ON_GPU:
        monkeypatch.setattr(engine_tune, "graph_time", graph_time)
    return counted


def few(stage, network):
    own = {"qkv": OWN.qkv, "attention": OWN.attention, "w13": OWN.w13}
    return [getattr(ORDINARY, stage), own.get(stage, WRITE)]


def test_the_tuner_takes_the_fastest_that_agrees(monkeypatch, timed_by_count):
    monkeypatch.setattr(engine_tune, "candidates", few)
    model = make()
    latents, text, _ = draw(model)
    tuner = Tuner(Network(model, latents, text, padded=False))
    plan = tuner.best_plan()
    assert plan.qkv == OWN.qkv
    assert isinstance(plan.w2, Writing)
    assert (evaluate(model, plan, latents, text, None) - model(latents, text)).abs().max() < 2e-5
