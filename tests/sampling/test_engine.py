"""The engine's evaluation is the model's, whatever the plan; and what it does where it cannot."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.residuals import RuleConfig
from mvsplit.sampling import SamplingConfig, accelerated, generate
from mvsplit.sampling.engine import Engine

pytest.importorskip("triton")

from mvsplit.kernels.fused.stream_merge import Rows
from mvsplit.kernels.hopper import driver
from mvsplit.sampling import engine, engine_apart
from mvsplit.sampling.engine_plan import ORDINARY, STAGES, Network, Writing
from tests.sampling.engine_cases import ON_GPU, OWN, draw, make

# Two blocks of fp32 with sums in another order; values of order one.
FP32_ERROR = 2e-5


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


def test_a_wait_that_did_not_end_is_an_error_of_every_engine_under_way(engine_of, word):
    small = make(device="cpu")
    inputs = draw(small)
    first, second, idle = (engine_of(small)[0] for _ in range(3))
    for fast in (first, second, idle):
        fast(*inputs)
    idle.check()
    word.fill_(1)
    with pytest.raises(driver.DriverError, match="did not end within seconds"):
        first(*inputs)
    with pytest.raises(driver.DriverError):
        second.check()  # whose velocity may be wrong too, though the word was read by then
    for fast in (first, second, idle):
        assert torch.equal(fast(*inputs), small(*inputs))  # said once
        fast.check()


def test_nan_of_a_wait_that_did_not_end_is_not_put_down_to_the_weights(
    embedder, model, monkeypatch, word
):
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args: (word.fill_(1), forward(*args) * torch.nan)[1]
    )
    with pytest.raises(driver.DriverError):
        next(generate(Engine(model), embedder, ["one"], (1, 4, 4), SamplingConfig(steps=1)))


def test_inputs_of_a_graph_change_when_its_turn_has_come(monkeypatch):
    """Or another thread's picture, that is still being drawn, would be of these inputs."""
    graph, static = engine._Graph.__new__(engine._Graph), torch.zeros(2)
    graph._inputs, graph._output = (static, None), torch.ones(1)
    seen = []

    @contextmanager
    def turn(device):
        seen.append(static.clone())
        yield

    class Replay:
        def replay(self):
            seen.append(static.clone())

    graph._graph = Replay()
    monkeypatch.setattr(engine, "_in_turn", turn)
    graph(torch.ones(2), None)
    assert [each.tolist() for each in seen] == [[0, 0], [1, 1]]


def test_why_kernels_were_left_out_is_said_at_every_start(engine_of, monkeypatch, caplog):
    model = make(dtype=torch.float16, device="cpu")
    inputs = draw(model)
    without = replace(ORDINARY, without="the GPU is taken")
    monkeypatch.setattr(engine_apart, "best_plan", lambda network, say: without)
    for times in range(2):
        fast, said = engine_of(model, tune=True)
        fast(*inputs)
        told = [line for line in said if line.startswith("kernels in CUDA C++ are left out")]
        assert len(told) == times  # at first `best_plan` says it
    assert "because the GPU is taken (found before; without " in told[0]
    engine._log(told[0])
    assert caplog.records[-1].levelname == "WARNING"


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
