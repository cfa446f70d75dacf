"""The detector on logs written by hand, one for each verdict and each way a log can be bad."""

from __future__ import annotations

import math
import random

import pytest

from mvsplit.diagnostics.baseline import Baseline
from mvsplit.diagnostics.detector import Detector


def healthy(steps, *, scale=1.0, seed=0, start=1):
    """A run from zero writers: Q and K begin with no gradient at all, the loss falls, all is noisy.
    `scale` multiplies the loss and every gradient."""
    noise = random.Random(seed)
    for step in range(start, start + steps):
        wobble = math.exp(0.1 * noise.gauss(0, 1))
        grown = min(1.0, (step - 1) / 5)
        yield {
            "step": step,
            "loss": scale * (0.8 + 1.2 * math.exp(-step / 15)) * math.exp(0.03 * noise.gauss(0, 1)),
            "grad_norm": scale * (1 + 5 * math.exp(-step / 3)) * wobble,
            "grad_writer_attn": scale * 0.3 * (1 + 5 * math.exp(-step / 3)) * wobble,
            "grad_writer_ffn": scale * 0.3 * wobble,
            "grad_query": scale * 0.1 * grown * wobble,
            "grad_key": scale * 0.1 * grown * wobble,
            "lr": 1e-3 * min(1, step / 10),
        }


def look(step, similarity=0.1, ratio=1.0, layers=8):
    """A look into the layers, all alike."""
    return {
        "step": step,
        "layer": list(range(layers)),
        "tcs": [similarity] * layers,
        "g_mean_attn": [ratio] * layers,
        "g_ctr_attn": [1.0] * layers,
    }


def events(records):
    detector = Detector()
    return [event for record in records for event in detector.update(record)]


def verdicts(records, level="alarm"):
    return [event.verdict for event in events(records) if event.level == level]


def only(records, *names):
    return [{name: r[name] for name in ("step", *names) if name in r} for r in records]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_gives_nothing_at_any_scale(scale, seed):
    assert events(healthy(300, scale=scale, seed=seed)) == []


def collapse(at, steps=60):
    """The event of the paper: a spike, the loss back at its start, Q and K dead. Scalars only."""
    for i, record in enumerate(healthy(at + steps)):
        after = i + 1 - at
        if after >= 0:
            factor = 60 if after < 2 else 1.0
            record |= {
                "loss": 2.0,
                "grad_norm": factor * 1.0,
                "grad_writer_attn": factor * 0.3,
                "grad_query": 0.1 * 10.0 ** -min(after, 5),
                "grad_key": 0.1 * 10.0 ** -min(after, 5),
            }
        yield record


def test_a_collapse_is_called_one_from_the_scalars_alone():
    alarms = [e for e in events(collapse(100)) if e.level == "alarm"]
    assert [e.verdict for e in alarms] == ["mean-mode"]
    assert 100 <= alarms[0].step <= 102
    assert alarms[0].evidence["attention_share"] < alarms[0].evidence["usual_share"] / 30


def test_a_look_before_the_spike_moves_the_alarm_to_the_spike():
    records = list(collapse(100))
    for step, similarity, ratio in ((40, 0.1, 1), (60, 0.1, 1), (80, 0.2, 2), (98, 0.8, 8)):
        records.insert(next(i for i, r in enumerate(records) if r["step"] > step), look(step))
        records[[r.get("layer") and r["step"] for r in records].index(step)] = look(
            step, similarity, ratio
        )
    alarm = next(e for e in events(records) if e.level == "alarm")
    assert (alarm.step, alarm.verdict) == (100, "mean-mode")


def test_layers_alone_are_enough_and_name_the_front():
    calm = [look(step) for step in range(10, 70, 10)]
    front = look(70)
    front["tcs"] = [0.1, 0.2, 0.3, 0.4, 0.95, 0.97, 0.99, 0.99]
    front["g_mean_attn"] = [1, 1, 1, 1, 20, 50, 80, 90]
    (event,) = events([*calm, front])
    assert (event.level, event.verdict, event.layer, event.step) == ("alarm", "mean-mode", 4, 70)


def test_tokens_that_are_alike_by_nature_give_no_alarm():
    records = [look(step, similarity=0.95, ratio=12) for step in range(10, 200, 10)]
    mixed = sorted([*healthy(200), *records], key=lambda r: r["step"])
    assert verdicts(mixed) == []


def test_a_front_from_the_first_steps_is_seen_while_the_run_settles():
    records = list(healthy(5))
    assert verdicts([*records, look(5, similarity=0.999, ratio=1000)]) == ["mean-mode"]


def test_a_divergence_with_live_queries_is_not_mean_mode():
    records = []
    for record in healthy(200):
        record["loss"] *= 2.0 if record["step"] > 100 else 1.0
        records.append(record)
    assert verdicts(records) == ["divergence"]


def test_loss_and_gradient_norm_alone_tell_a_spike_with_return_to_the_start():
    bare = only(collapse(100), "loss", "grad_norm")
    assert verdicts(bare) == ["divergence", "mean-mode"]
    assert next(e.step for e in events(bare) if e.level == "alarm") == 102
    assert verdicts(only(healthy(300), "loss", "grad_norm")) == []
    calm = [r | {"grad_norm": 1.0} for r in bare]
    assert verdicts(calm) == ["divergence"]


def test_one_bad_batch_is_a_warning_and_leaves_no_trace():
    records = list(healthy(200))
    for name in records[119].keys() - {"step", "lr"}:
        records[119][name] *= 40
    (event,) = events(records)
    assert (event.step, event.level, event.verdict) == (120, "warning", "data-outlier")
    assert event.evidence["loss_rise"] == pytest.approx(40, rel=0.2)
    assert "learning rate" not in event.message
    (event,) = events([{n: v for n, v in r.items() if n != "lr"} for r in records])
    assert event.message.endswith("the learning rate, which the log does not have.")


def test_a_jump_of_the_learning_rate_is_named_with_its_size_but_a_warm_up_is_not():
    records = [r | {"lr": r["lr"] * (10 if r["step"] >= 80 else 1)} for r in healthy(150)]
    (event,) = events(records)
    assert (event.step, event.verdict, event.level) == (80, "learning-rate", "warning")
    assert event.evidence["rise"] == pytest.approx(10)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_alarm_from_the_first_line_on(value):
    (event,) = events([{"step": 1, "loss": value}])
    assert (event.level, event.verdict, event.step) == ("alarm", "non-finite", 1)
    assert isinstance(event.as_dict()["evidence"]["loss"], str)


def test_a_layer_that_is_not_finite_is_named():
    broken = look(3)
    broken["g_ctr_attn"][5] = math.nan
    (event,) = events([broken])
    assert (event.verdict, event.layer) == ("non-finite", 5)


def test_attention_logits_that_grow():
    records = [{"step": s, "loss": 1.0, "max_logit": 10.0} for s in range(60)]
    records += [{"step": 60 + s, "loss": 1.0, "max_logit": 20.0 * 1.5**s} for s in range(8)]
    found = [e for e in events(records) if e.verdict == "attention-logits"]
    assert [e.level for e in found] == ["warning", "alarm"]


def broken_by_its_rate(factor, steps=30):
    """From step 100 on the rate is 30 times as high; from 101 on loss and gradients `factor`."""
    for record in healthy(100 + steps):
        if record["step"] > 99:
            record["lr"] *= 30
        if record["step"] > 100:
            record |= {n: factor * v for n, v in record.items() if n not in ("step", "lr")}
        yield record


def test_a_run_that_its_new_rate_breaks_is_an_alarm_at_the_first_step_that_shows_it():
    alarm = next(e for e in events(broken_by_its_rate(5)) if e.level == "alarm")
    assert (alarm.step, alarm.verdict) == (101, "learning-rate")
    assert alarm.evidence["rise"] == pytest.approx(30)
    assert alarm.evidence["loss_rise"] == pytest.approx(5, rel=0.2)


def test_a_run_that_bears_its_new_rate_gives_no_alarm():
    records = list(broken_by_its_rate(1.4))
    assert verdicts(records) == []
    assert verdicts([{n: v for n, v in r.items() if n != "lr"} for r in records]) == []


def test_a_jump_of_the_rate_asks_for_a_look_at_the_next_step():
    detector, asked = Detector(), []
    for record in broken_by_its_rate(1.0):
        detector.update(record)
        asked += [record["step"]] if detector.stirred else []
    assert asked == [100]


def test_a_bare_log_that_jumps_for_one_line_or_without_its_gradient_is_no_divergence():
    def jump(lines, gradient):
        for record in only(healthy(140), "loss", "grad_norm"):
            if 100 <= record["step"] < 100 + lines:
                record["loss"] *= 3
                record["grad_norm"] *= gradient
            yield record

    assert verdicts(jump(2, 10)) == []
    assert verdicts(jump(3, 2)) == []
    assert verdicts(jump(3, 10)) == ["divergence"]


def test_a_network_that_learned_the_mean_of_its_targets_and_no_more_is_stalled_soon():
    noise = random.Random(0)
    records = [
        {"step": s, "loss": (1.55 + 0.5 * math.exp(-s / 4)) * (1 + 0.02 * noise.gauss(0, 1))}
        for s in range(120)
    ]
    (event,) = events(records)
    assert (event.verdict, event.level) == ("stalled", "warning")
    assert event.step == 79
    assert events({**r, "loss": r["loss"] - 0.004 * r["step"]} for r in records) == []


def test_a_loss_that_never_moved_is_stalled():
    noise = random.Random(0)
    records = [
        {"step": s, "loss": 1.6 + 0.05 * noise.gauss(0, 1), "grad_norm": 1.0} for s in range(400)
    ]
    assert verdicts(records, "warning") == ["stalled"]
    assert verdicts(records) == []


def test_a_rollback_settles_anew_and_repeated_steps_raise_nothing():
    again = [r | {"grad_norm": 40.0} for r in healthy(5, start=61, seed=3)]
    records = [*healthy(100), *again, *healthy(60, start=66, seed=4)]
    assert events(records) == []


def test_after_a_rollback_a_collapse_is_seen_again():
    first = list(collapse(100, steps=10))
    assert verdicts([*first, *healthy(30, start=71), *list(collapse(120))[100:]]) == [
        "mean-mode",
        "mean-mode",
    ]


def test_lines_that_come_late_do_not_hide_a_collapse():
    records = list(collapse(100))
    for i in range(0, len(records) - 1, 7):
        records[i], records[i + 1] = records[i + 1], records[i]
    alarms = [e for e in events(records) if e.level == "alarm"]
    assert [e.verdict for e in alarms] == ["mean-mode"]
    assert alarms[0].step <= 103


def test_looks_at_other_cadences_and_fields_of_other_types_do_no_harm():
    records = [r for r in healthy(300) if r["step"] % 3 == 0]
    records += [look(step) for step in range(7, 300, 7)]
    records += [
        {"step": step, "loss": None, "tcs": "none", "note": {}} for step in range(0, 300, 9)
    ]
    assert events(sorted(records, key=lambda r: r["step"])) == []


def test_an_alarm_is_given_once_while_it_lasts():
    assert len([e for e in events(collapse(100, steps=200)) if e.level == "alarm"]) == 1


def test_the_detector_does_not_look_ahead():
    """What it says of the first lines is the same whatever comes after them."""
    records = list(collapse(100))
    whole = [e for e in events(records) if e.step <= 101]
    assert whole == events([r for r in records if r["step"] <= 101])


def test_a_baseline_is_the_median_and_quartile_spread_of_its_window():
    values = [random.Random(0).gauss(3, 2) for _ in range(1)] + list(range(100))
    baseline = Baseline(21)
    for value in values:
        baseline.add(float(value))
    last = sorted(map(float, values[-21:]))
    assert baseline.median == last[10]
    assert baseline.sigma == pytest.approx((last[15] - last[5]) / 1.349)
    assert baseline.times(2 * last[10]) == 2


def overflowing(lines, **fields):
    for record in healthy(120):
        if 60 <= record["step"] < 60 + lines:
            record |= {"grad_norm": math.inf, "loss_scale": 65536.0, **fields}
        yield record


def test_a_gradient_that_overflows_its_loss_scale_is_an_alarm_only_where_it_goes_on():
    (event,) = events(overflowing(10))
    assert (event.step, event.level, event.verdict) == (60, "warning", "non-finite")
    assert "65536" in event.message
    assert verdicts(overflowing(11)) == ["non-finite"]
    assert verdicts(overflowing(1, loss=math.nan)) == ["non-finite"]
    assert verdicts(overflowing(1, loss_scale=1.0)) == ["non-finite"]


def test_the_time_since_a_jump_of_the_rate_is_counted_in_steps():
    """Not in lines, of which a log may have one every ten steps."""
    records = [r | {"step": 10 * r["step"]} for r in healthy(62)]
    for record in records[60:]:
        record["lr"] *= 30
    records[61] |= {name: 30 * records[61][name] for name in ("loss", "grad_norm")}
    (broken,) = [e for e in events(records) if "network does not bear" in e.message]
    assert ", 10 steps after the learning rate rose 30 times" in broken.message
