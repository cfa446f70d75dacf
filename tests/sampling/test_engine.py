"""The engine's evaluation is the model's, whatever the plan; and what it does where it cannot."""

import json

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import SamplingConfig, accelerated, generate
from mvsplit.sampling.engine import Engine

pytest.importorskip("triton")

from mvsplit.kernels.fused.stream_attention import Blocks
from mvsplit.kernels.fused.stream_gemm import Tile
from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.kernels.hopper import driver
from mvsplit.kernels.hopper.attention import Heads
from mvsplit.kernels.hopper.product import Cut
from mvsplit.sampling import engine, engine_tune
from mvsplit.sampling.engine_plan import ORDINARY, STAGES, Network, Ordinary, Plan, Writing
from mvsplit.sampling.engine_tune import Tuner, load_plan, save_plan

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"  # of the kernels: through the interpreter on a CPU
WRITE = Writing(Tile(rows=64, columns=32, depth=32), Rows(rows=16))
OWN = Plan(
    qkv=Tile(rows=64, columns=128, depth=32),
    attention=Blocks(queries=64, keys=64),
    proj=WRITE,
    w13=Tile(rows=128, columns=128, depth=32),
    w2=Writing(Tile(rows=64, columns=64, depth=16, split=2), Rows(rows=8)),
)
# Two blocks of fp32 with sums in another order; values of order one.
FP32_ERROR = 2e-5


def make(rule="mvsplit", dtype=torch.float32, device=DEVICE, **changes):
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
    return model.to(device, dtype)


def draw(model, batch=2, side=(4, 6), text=5, valid=None, seed=3):
    generator = torch.Generator().manual_seed(seed)
    c = model.config
    latents = torch.randn(batch, c.channels, *side, generator=generator)
    states = torch.randn(batch, text, c.text_width, generator=generator)
    like = model.head.weight
    counts = None if valid is None else torch.tensor(valid, device=like.device)
    return latents.to(like), states.to(like), counts


def evaluate(model, plan, latents, text, valid):
    network = Network(model, latents, text, padded=valid is not None)
    return network(latents, text, valid, plan)


@pytest.mark.parametrize(
    ("rule", "valid"),
    [
        ("mvsplit", None), ("mvsplit", [5, 2]), ("mvsplit", [0, 1]), ("plain", [5, 2]),
        ("layerscale", None), ("rezero", [3, 5]), ("hard-center", None),
        ("mvsplit-attention-only", [5, 2]), ("deepnorm", None),
    ],
    ids=str,
)  # fmt: skip
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


@pytest.mark.parametrize("valid", [None, [4, 1]], ids=str)
def test_the_ordinary_product_with_our_merge(valid):
    model = make()
    inputs = draw(model, valid=valid)
    own = Writing(None, Rows(rows=4))
    plan = OWN.with_choice("proj", own).with_choice("w2", own)
    assert (evaluate(model, plan, *inputs) - model(*inputs)).abs().max() < FP32_ERROR


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


def test_half_precision_is_as_near_to_the_truth_as_the_models_own_ops():
    exact, model = make(), make(dtype=torch.float16)
    exact.load_state_dict(model.state_dict())
    inputs = draw(model, valid=[5, 2])
    truth = exact(inputs[0].float(), inputs[1].float(), inputs[2])
    plain = (model(*inputs) - truth).norm()
    assert (evaluate(model, OWN, *inputs) - truth).norm() < 1.1 * plain


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


class Replayed:
    """Stands for a CUDA graph where there is none: runs the evaluation every time."""

    def __init__(self, evaluation, choice, *inputs):
        self.evaluation, self.choice, self.calls = evaluation, choice, 0

    def __call__(self, *inputs):
        self.calls += 1
        return self.evaluation(*inputs)


@pytest.fixture
def engine_of(monkeypatch, tmp_path):
    """An engine that replays on a CPU that passes for CUDA."""
    monkeypatch.setattr(engine, "_Graph", Replayed)
    monkeypatch.setattr(Engine, "_is_elsewhere", lambda self, latents: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")

    def build(model, **options):
        said = []
        path = tmp_path / "engine.json"
        return Engine(model, cache=path, say=said.append, **options), said

    return build


def test_a_model_that_the_kernels_do_not_take_is_replayed_as_it_is(engine_of):
    for model, reason in (
        (make(device="cpu"), "take bf16 and fp16, not torch.float32"),
        (make(dtype=torch.float16, device="cpu", ffn_bias=True), "have biases"),
        (make("keel", torch.float16, "cpu"), "rule keel is more than gains"),
        (make(dtype=torch.float16, device="cpu"), "it is small"),
    ):
        fast, said = engine_of(model)
        latents, text, _ = draw(model)
        assert torch.equal(fast(latents, text), model(latents, text))
        assert fast(latents, text).isfinite().all()
        assert len(said) == 1
        assert reason in said[0]
        assert said[0].startswith("the model's own ops in one CUDA graph")


def test_a_bounded_number_of_shapes_is_kept(engine_of):
    model = make(device="cpu")
    fast, _ = engine_of(model, graphs=2)
    for side in ((2, 2), (4, 2), (2, 2), (4, 4), (2, 2)):
        latents, text, _ = draw(model, side=side)
        assert torch.equal(fast(latents, text), model(latents, text))
    assert len(fast._graphs) == 2
    assert [g.calls for g in fast._graphs.values()] == [1, 3]
    with pytest.raises(UserError, match="graphs=0: must be at least 1"):
        Engine(model, graphs=0)


def test_replaced_parts_are_captured_anew_and_changes_in_place_need_nothing(engine_of):
    model = make(device="cpu")
    fast, said = engine_of(model)
    inputs = draw(model)
    fast(*inputs)
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})
    assert torch.equal(fast(*inputs), model(*inputs))
    assert len(said) == 1
    model.blocks[0].ffn.w2.weight = torch.nn.Parameter(torch.zeros(32, 40), requires_grad=False)
    assert torch.equal(fast(*inputs), model(*inputs))
    assert said[1:] == ["parts of the model were replaced: captured anew"]
    model.blocks[1].ffn.w13 = torch.nn.Linear(32, 80, bias=False).requires_grad_(False)
    assert torch.equal(fast(*inputs), model(*inputs))
    assert len(fast._graphs) == 1


def test_where_a_graph_cannot_be_the_model_runs_itself_and_it_is_said_once(engine_of):
    model = make(device="cpu")
    fast, said = engine_of(model)
    latents, text, _ = draw(model)
    handle = model.blocks[0].ffn.register_forward_hook(lambda *_: None)
    fast(latents, text)
    fast(latents, text)
    handle.remove()
    fast(latents.requires_grad_(), text).sum().backward()
    assert latents.grad.abs().sum() > 0
    assert said == [
        "the model itself, because somebody watches its modules by hooks",
        "the model itself, because gradients are asked for (torch.no_grad() is missing)",
    ]


def test_a_capture_that_fails_leaves_the_model_and_memory_that_ends_the_caller(
    engine_of, monkeypatch
):
    model = make(device="cpu")
    latents, text, _ = draw(model)

    for error in (torch.OutOfMemoryError("full"), RuntimeError("operation not permitted")):
        monkeypatch.setattr(engine, "_Graph", lambda *_, error=error: (_ for _ in ()).throw(error))
        fast, said = engine_of(model)
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError):
                fast(latents, text)
        else:
            assert torch.equal(fast(latents, text), model(latents, text))
            assert said == [
                "the model itself, because a CUDA graph could not be made: operation not permitted"
            ]


def test_a_wait_that_did_not_end_is_an_error_of_the_next_call_and_of_generate(
    engine_of, embedder, model, monkeypatch
):
    word = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(driver, "_faults", [word])
    small = make(device="cpu")
    fast, _ = engine_of(small)
    inputs = draw(small)
    fast(*inputs)
    word.fill_(1)
    with pytest.raises(driver.DriverError, match="did not end within seconds"):
        fast(*inputs)
    assert torch.equal(fast(*inputs), small(*inputs))  # said once
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args: (word.fill_(1), forward(*args))[1])
    with pytest.raises(driver.DriverError):
        next(generate(Engine(model), embedder, ["one"], (1, 4, 4), SamplingConfig(steps=1)))


def test_on_a_cpu_the_model_runs_itself(embedder, model):
    fast = Engine(model, say=(said := []).append)
    config = SamplingConfig(steps=2)
    drawn = [next(generate(m, embedder, ["one"], (1, 4, 4), config)) for m in (fast, model)]
    assert torch.equal(drawn[0].latents, drawn[1].latents)
    assert said == ["the model itself, because it runs on a cpu"]
    assert accelerated(model) is model
    assert accelerated(fast) is fast


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]
WIDE = {"depth": 3, "width": 256, "heads": 2, "ffn_width": 512, "text_width": 64}


@pytest.mark.parametrize("valid", [None, [20, 3]], ids=str)
@pytest.mark.parametrize("tune", [pytest.param(t, marks=on_gpu) for t in (False, True)])
def test_replays_are_the_model_at_alternating_shapes(tmp_path, tune, valid):
    model = make(dtype=torch.bfloat16, **WIDE)
    exact = make(**WIDE)
    exact.load_state_dict(model.state_dict())
    fast = Engine(model, tune=tune, cache=tmp_path / "engine.json")
    shapes = [draw(model, side=side, text=20, valid=valid) for side in ((16, 16), (8, 20))]
    with torch.no_grad():
        for inputs in shapes * 3:
            truth = exact(inputs[0].float(), inputs[1].float(), inputs[2])
            plain = (model(*inputs) - truth).norm() / truth.norm()
            first, second = fast(*inputs), fast(*inputs)
            assert torch.equal(first, second)
            # As near as bf16 ops are, to the chance of a rounding; products are rounded less often.
            assert (first - truth).norm() / truth.norm() < 1.1 * plain
    assert len(fast._graphs) == 2
    assert "in one CUDA graph" in fast.choice
    assert fast.choice.startswith("fused" if tune else "the model's own")


class Turns:
    """Stands for the streams and events of a device, and writes down what is asked of them."""

    def __init__(self, name, told):
        self.name, self.told = name, told

    def wait_event(self, event):
        self.told.append(f"{self.name} waits for {event.of}")

    def record(self, stream):
        self.of = stream.name


def test_engines_take_turns_on_a_device_and_one_that_fails_lets_the_next_on(monkeypatch):
    told, device = [], torch.device("cuda", 0)
    streams = iter([Turns(name, told) for name in ("first", "failing", "second", "other")])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: next(streams))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Turns("event", told))
    monkeypatch.setattr(engine, "_ends", {})
    with engine._in_turn(device):
        assert engine._turns[device].locked()
        assert not engine._turns[torch.device("cuda", 1)].locked()
    with pytest.raises(RuntimeError), engine._in_turn(device):
        raise RuntimeError
    for at in (device, torch.device("cuda", 1), torch.device("cpu")):
        with engine._in_turn(at):
            pass
    assert told == ["failing waits for first", "second waits for first"]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_replays_of_one_device_wait_for_each_other_on_any_stream():
    device = torch.device("cuda", torch.cuda.current_device())
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first), engine._in_turn(device):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
    assert not first.query()
    with torch.cuda.stream(second), engine._in_turn(device):
        pass
    second.synchronize()
    assert first.query()


@pytest.mark.parametrize("rule", [pytest.param(r, marks=on_gpu) for r in ("keel", "prenorm")])
def test_other_rules_replay_their_own_ops_to_the_bit(rule):
    model = make(rule, torch.bfloat16, **WIDE)
    inputs = draw(model, side=(8, 8), text=7, valid=[7, 2])
    fast = Engine(model)
    with torch.no_grad():
        assert torch.equal(fast(*inputs), model(*inputs))
        model.head.weight.mul_(2)
        assert torch.equal(fast(*inputs), model(*inputs))
