"""The engine's plan measured in another process: what ends it is left out, and said."""

import dataclasses
import json
import logging
import sys
import textwrap

import pytest
import torch

from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig

pytest.importorskip("triton")

from mvsplit.kernels.hopper.driver import DriverError
from mvsplit.kernels.hopper.product import Cut
from mvsplit.sampling import engine_apart
from mvsplit.sampling.engine_plan import ORDINARY, Network
from mvsplit.sampling.engine_tune import Tuner

CHILD = """
    import json, os, sys, time
    task = json.loads(sys.argv[-1])
    def tell(kind, what): print(kind, what, flush=True)
    def find(**plan): tell("FOUND", json.dumps(
        {"plan": plan, "table": {"qkv": [["a", 1.5, ""]]}, "seconds": {"qkv": 0.5}}))
"""


@pytest.fixture
def network():
    rule = RuleConfig(name="mvsplit", beta=0.7)
    config = DiTConfig(
        depth=20, width=32, heads=2, ffn_width=40, channels=3, patch=2, text_width=24, rule=rule
    )
    model = DiT(config).eval().requires_grad_(False)
    latents, text = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 24)
    return Network(model, latents, text, padded=True)


@pytest.fixture
def with_kernels(monkeypatch):
    """As on a machine where kernels in CUDA C++ are among the candidates."""
    monkeypatch.setattr(engine_apart, "candidates", lambda stage, network: [Cut()])
    monkeypatch.setattr(engine_apart, "require_compiler", lambda: None)


def child(code):
    return (sys.executable, "-c", textwrap.dedent(CHILD) + textwrap.dedent(code))


def test_a_child_measures_random_weights_of_the_same_shapes(network):
    task = json.loads(json.dumps(engine_apart._task(network, [])))
    built = engine_apart._network(task)
    kept = ("width", "heads", "ffn_width", "channels", "patch", "rule", "text_width")
    for name in kept:
        assert getattr(built.config, name) == getattr(network.config, name)
    assert built.config.depth == 16
    assert (built.stream, built.size) == (network.stream, network.size)
    assert torch.equal(built.valid, network.valid)
    shapes = {n: p.shape for n, p in network.model.blocks[0].named_parameters()}
    assert {n: p.shape for n, p in built.model.blocks[0].named_parameters()} == shapes
    assert all(p.isfinite().all() for p in built.model.parameters())
    assert built.model.blocks[3].ffn.w2.weight.abs().sum() > 0  # no branch is idle


def test_what_ends_a_child_is_left_out_and_said(network, caplog):
    plan = json.dumps(ORDINARY.to_json()).replace("false", "False")
    found = engine_apart.measured(
        network,
        child(f"""
        for name in ("first", "second", "third"):
            if name in task["banned"]: continue
            tell("BEGIN", name)
            if name != "third": os._exit(11)
        find(**{plan})
    """),
    )
    assert found.ended == ["first", "second"]
    assert found.plan == ORDINARY
    assert found.table == {"qkv": [("a", 1.5, "")]}
    assert "second is left out: its process ended with 11" in caplog.text


def test_a_child_that_is_silent_is_killed(network, monkeypatch, caplog):
    monkeypatch.setattr(engine_apart, "SILENCE", 1.0)
    plan = json.dumps(ORDINARY.to_json()).replace("false", "False")
    found = engine_apart.measured(
        network,
        child(f"""
        if not task["banned"]:
            tell("BEGIN", "a kernel that waits")
            time.sleep(60)
        find(**{plan})
    """),
    )
    assert found.ended == ["a kernel that waits"]
    assert "was silent for 1 s" in caplog.text


@pytest.mark.parametrize(("code", "reason"), [
    ("raise SystemExit('no device')", "a process for them ended with 1: no device"),
    ("tell('ERROR', 'taken'); sys.exit('advice')", "a process for them ended with 1: taken"),
    ("tell('BEGIN', str(len(task['banned']))); os._exit(1)", "6 of them ended their process"),
])  # fmt: skip
def test_without_a_plan_the_kernels_in_cuda_are_left_out(
    network, monkeypatch, with_kernels, code, reason
):
    plan, cuda, said = ORDINARY.with_pdl(False), [], []
    measured = engine_apart.measured
    monkeypatch.setattr(engine_apart, "measured", lambda n: measured(n, child(code)))
    monkeypatch.setattr(Tuner, "best_plan", lambda self: cuda.append(self.cuda) or plan)
    assert engine_apart.best_plan(network, said.append) == dataclasses.replace(plan, without=reason)
    assert cuda == [False]
    assert said == [f"kernels in CUDA C++ are left out, because {reason}"]


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("frozen", True, "this program is no Python"),
    ("executable", None, "this program is no Python"),
    ("executable", "/nowhere/python", "a process for them cannot be started: "),
])  # fmt: skip
def test_where_python_cannot_be_started_again_that_is_said(
    network, monkeypatch, with_kernels, name, value, reason
):
    said = []
    monkeypatch.setattr(sys, name, value, raising=False)
    monkeypatch.setattr(Tuner, "best_plan", lambda self: ORDINARY)
    plan = engine_apart.best_plan(network, said.append)
    assert reason in plan.without
    assert said == [f"kernels in CUDA C++ are left out, because {plan.without}"]


def test_a_child_that_compiles_for_long_is_not_silent(capsys):
    teller = engine_apart._Teller()
    for level, kind in ((logging.DEBUG, "WORKS"), (logging.INFO, "SAY")):
        teller.emit(logging.LogRecord("mvsplit", level, "", 0, "a\nb", None, None))
        assert capsys.readouterr().out == f"{kind} a b\n"


def test_without_nvrtc_no_child_is_begun(network, monkeypatch, with_kernels):
    def missing():
        raise DriverError("libnvrtc.so.13 is not there")

    monkeypatch.setattr(engine_apart, "require_compiler", missing)
    monkeypatch.setattr(engine_apart, "measured", None)
    monkeypatch.setattr(Tuner, "best_plan", lambda self: ORDINARY)
    said = []
    assert engine_apart.best_plan(network, said.append).without == "libnvrtc.so.13 is not there"
    assert len(said) == 1


def test_a_child_that_fails_says_its_error_and_not_the_advice_after_it(network):
    """Errors of CUDA end in lines about debugging."""
    task = {**engine_apart._task(network, []), "dtype": "a type\nthat is unheard of"}
    child = engine_apart._Child(engine_apart._python(), task)
    assert child.running is child.found is None
    assert child.end == "ended with 1"
    assert child.last_words.startswith("AttributeError: module 'torch' has no attribute 'a type")


def test_a_plan_from_elsewhere_is_compared_on_the_models_own_weights(
    network, monkeypatch, with_kernels
):
    found = engine_apart.Measured(ORDINARY, {}, {}, [])
    checked = []
    monkeypatch.setattr(engine_apart, "measured", lambda network: found)
    monkeypatch.setattr(Tuner, "checked", lambda self, plan: checked.append(plan) or plan)
    assert engine_apart.best_plan(network, print) == ORDINARY
    assert checked == [ORDINARY]
    network.model.blocks[0].ffn.w2.weight.fill_(torch.inf)
    assert engine_apart.best_plan(network, print) is None


def test_without_kernels_in_cuda_there_is_no_child(network, monkeypatch):
    monkeypatch.setattr(engine_apart, "measured", None)
    monkeypatch.setattr(Tuner, "best_plan", lambda self: ORDINARY)
    assert engine_apart.best_plan(network, print) == ORDINARY


def test_what_a_tuner_is_about_to_run_is_told_and_what_is_banned_does_not_run(network, monkeypatch):
    told, ran = [], []
    names = [f"qkv {choice}" for choice in (ORDINARY.qkv, Cut(), Cut(144))]
    monkeypatch.setattr(Tuner, "_output", lambda self, stage, plan: torch.ones(1))
    monkeypatch.setattr(Tuner, "_measure", lambda self, stage, plan: ran.append(plan.qkv) or 1.0)
    tuner = Tuner(network, about=told.append, banned=[names[1]])
    best = tuner._fastest("qkv", [ORDINARY.qkv, Cut(), Cut(144)])
    assert told == [names[0], names[2]]
    assert ran == best == [ORDINARY.qkv, Cut(144)]
    assert "ended a process before" in tuner.table["qkv"][1][2]
