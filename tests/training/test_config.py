from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from mvsplit.errors import UserError
from mvsplit.presets import PRESETS, get_preset
from mvsplit.residuals import RuleConfig
from mvsplit.training import DataConfig, Experiment, TrainConfig
from mvsplit.training.builders import build_data, check_fit
from mvsplit.training.config import ParallelConfig, differences, from_json, to_json
from mvsplit.training.layout import with_layout
from tests.training import runs


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_fit_their_data(name: str) -> None:
    preset = get_preset(name)
    assert from_json(to_json(preset)) == preset
    if preset.data.dataset != "cache":  # which the user has yet to make
        check_fit(preset.model, build_data(preset.data))


def test_paper_presets_have_the_paper_s_parameters() -> None:
    """13.6 M parameters a block (paper §3); β = 1 and 0.03 (§2)."""
    for name, depth, beta in (("mvsplit-400l", 400, 1.0), ("mvsplit-1000l", 1000, 0.03)):
        preset = get_preset(name)
        rule = preset.model.rule
        assert (preset.model.depth, rule.beta, rule.alpha) == (depth, beta, 0.0)
        assert preset.train.batch_size == 1024
        d, f = preset.model.width, preset.model.ffn_width
        assert 4 * d * d + 3 * d * f + 4 * d == pytest.approx(13.64e6, rel=1e-3)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"preset='tinny' is unknown: did you mean tiny"):
        get_preset("tinny")


def test_every_field_survives_json() -> None:
    """Values that differ from the defaults: a number that is not a short decimal, None, a tuple."""
    train = TrainConfig(
        steps=7, batch_size=6, accumulate=3, lr=math.pi / 1000, betas=(0.1, 0.2), precision="bf16"
    )
    data = DataConfig(dataset="shapes", size=64, series=5)
    model = replace(runs.MODEL, kv_heads=1, rule=replace(runs.MODEL.rule, tied_leak=False))
    experiment = Experiment(model=model, train=train, data=data)
    assert from_json(to_json(experiment)) == experiment


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.stepps", 3, r"c.json: train.stepps is not a known field; did you mean .*steps"),
        ("train.steps", "many", r"c.json: train.steps='many' is not of type int"),
        ("train.steps", True, r"train.steps=True is not of type int"),
        ("train.betas", [0.1], r"train.betas=\[0.1\] is not of type"),
        ("train.precision", "fp8", r"train.precision='fp8' is not of type"),
        ("model.rule.name", "mvspilt", r"c.json: .*'mvspilt' is unknown: did you mean mvsplit"),
        ("model.rule", 3, r"model.rule must hold an object"),
    ],
)
def test_configuration_that_cannot_be_read_is_one_line(path: str, value: Any, message: str) -> None:
    tree = json.loads(to_json(runs.experiment()))
    *folders, name = path.split(".")
    place = tree
    for folder in folders:
        place = place[folder]
    place[name] = value
    with pytest.raises(UserError, match=message) as caught:
        from_json(json.dumps(tree), "c.json")
    assert "\n" not in str(caught.value)


def test_missing_field_and_no_json() -> None:
    tree = json.loads(to_json(runs.experiment()))
    del tree["train"]["steps"]
    with pytest.raises(UserError, match=r"train\.steps is missing"):
        from_json(json.dumps(tree))
    with pytest.raises(UserError, match="is not valid JSON"):
        from_json(to_json(runs.experiment())[:-20])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("accumulate", 9),
        ("lr", -1.0),
        ("lr", math.inf),
        ("weight_decay", math.inf),
        ("lr_factor", math.nan),
        ("warmup", -1),
        ("clip", 0.0),
        ("ema_decay", 1.0),
        ("betas", (0.9, 1.0)),
        ("caption_dropout", 1.5),
        ("time_shift", 0.0),
        ("sample_shift", 0.0),
        ("sample_shift", math.inf),
        ("keep", 0),
        ("precision", "fp16"),
        ("probe", "none"),
    ],
)
def test_impossible_training_names_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        runs.experiment(**{field: value})
    assert f"train.{field}={value}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gains_with_a_rate_of_their_own_cannot_be_put_into_a_running_model() -> None:
    with pytest.raises(UserError, match=r"train\.gain_lr=2\.0: gains that .*'protect' puts into"):
        runs.experiment(gain_lr=2.0, on_alarm="protect")


def test_one_process_ignores_how_shards_are_held() -> None:
    config = runs.experiment(parallel=ParallelConfig(replicas=2)).train
    assert with_layout(config, "replicate").parallel == ParallelConfig(layout="replicate")
    assert with_layout(config, "shard").parallel == ParallelConfig(layout="shard", replicas=2)


def test_differences_are_named_by_path() -> None:
    old = runs.experiment()
    rule = replace(runs.MODEL.rule, beta=0.5)
    new = replace(runs.experiment(seed=4), model=replace(runs.MODEL, rule=rule))
    assert differences(old, new) == {"model.rule.beta": (None, 0.5), "train.seed": (0, 4)}
    assert differences(old, old) == {}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"name": "plain", "alpha": 0.0}, {"name": "plain"}),
        ({"name": "keel", "beta": 1.0, "alpha": 0.0}, {"name": "keel"}),
        ({"beta": 0.05, "alpha": 0.0}, {"beta": 0.05}),
        ({"beta": runs.MODEL.depth**-0.5, "alpha": 0.0}, {"alpha": 0.0}),
    ],
)
def test_gains_given_as_what_the_default_is_are_no_difference(before, now) -> None:
    """Folders written when α was 0 by default go on; a default that became another does not."""
    old, new = (
        replace(runs.experiment(), model=replace(runs.MODEL, rule=RuleConfig(**given)))
        for given in (before, now)
    )
    assert differences(old, new) == differences(new, old) == {}


def test_another_default_than_the_folder_was_begun_with_is_a_difference() -> None:
    old = runs.experiment()
    old = replace(old, model=replace(old.model, rule=RuleConfig(alpha=0.0)))
    assert differences(old, runs.experiment()) == {"model.rule.alpha": (0.0, None)}


def test_gains_given_as_the_default_are_a_difference_where_the_writers_start_otherwise() -> None:
    """The default alone starts with writers of standard size, unless the model says how."""
    root = runs.MODEL.depth**-0.5

    def of(writers: str, **given: float) -> Experiment:
        model = replace(runs.MODEL, rule=RuleConfig(**given), writers=writers)
        return replace(runs.experiment(), model=model)

    given = {"beta": root, "alpha": root}
    expected = {"model.rule.alpha": (root, None), "model.rule.beta": (root, None)}
    assert differences(of("rule", **given), of("rule")) == expected
    for writers in ("zero", "standard"):
        assert differences(of(writers, **given), of(writers)) == {}
