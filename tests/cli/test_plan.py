"""`mvsplit plan`: what it prints, and what its options change."""

from __future__ import annotations

import json
import re

import pytest

from mvsplit import cli
from mvsplit.cli import plan_key
from mvsplit.kernels.block_parts import RECOMPUTE


def planned(capsys, *arguments):
    code = cli.main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_the_parts_add_up_and_fields_of_the_preset_can_be_changed(capsys):
    code, low = planned(capsys, "mvsplit-1000l-h200")
    assert (code, low["fits"], low["remedies"]) == (0, True, [])
    assert sum(low["memory"]["parts"].values()) == pytest.approx(low["memory"]["total"])
    assert sum(low["time"]["parts"].values()) == pytest.approx(low["seconds"])
    assert sum(low["recompute"].values()) == 1000
    code, full = planned(capsys, "mvsplit-1000l-h200", "--weights", "fp32")
    assert (code, full["fits"]) == (1, False)
    assert {"accumulate": 256} not in [r["changes"] for r in full["remedies"]]
    assert full["memory"]["parts"]["weights"] == pytest.approx(
        2 * low["memory"]["parts"]["weights"], rel=1e-3
    )


def test_rates_can_be_given(capsys):
    _, h200 = planned(capsys, "mvsplit-400l-h200", "--tflops", "784")
    given = ("--tflops", "392", "--bandwidth", "2.125", "--memory-gib", "60")
    _, half = planned(capsys, "mvsplit-400l-h200", *given)
    parts, before = half["time"]["parts"], h200["time"]["parts"]
    for name in ("matrix products", "element-wise kernels"):
        assert parts[name] == pytest.approx(2 * before[name])
    assert half["recompute"].get("nothing", 0) < 400
    _, long = planned(capsys, "mvsplit-400l-h200", "--text-tokens", "33")
    assert long["sample"] == {"image": 256, "text": 48, "source": h200["sample"]["source"]}


def test_the_table_says_whether_it_fits(capsys):
    assert cli.main(["plan", "mvsplit-400l-h200"]) == 0
    out = capsys.readouterr().out
    _, plan = planned(capsys, "mvsplit-400l-h200")
    left = (plan["memory"]["available"] - plan["memory"]["total"]) / 2**30
    said = re.search(r"it fits: ([\d.]+) GiB left .* 96% of the GPU's memory", out)
    assert said is not None
    assert float(said[1]) == pytest.approx(left, abs=0.06)
    assert "batch 264 as 1 × 11 pieces of 24" in out
    assert cli.main(["plan", "mvsplit-1000l", "--gpu", "h100"]) == 1
    out = capsys.readouterr().out
    assert "it does not fit; with these changes it does:" in out
    assert "--gpus 16 --accumulate 1:" in out


SMALL = ("mvsplit-400l-h200", "--gpu", "rtx4090", "--memory-gib")


@pytest.mark.parametrize("given", [(), ("--gpus", "8"), ("--gpus", "8", "--accumulate", "1")])
def test_gpus_that_make_it_fit_are_found_where_doubled_ones_do_not_divide_the_batch(capsys, given):
    """And with one piece, which sharded needs no sum of whole gradients."""
    code, plan = planned(capsys, *SMALL, "12", *given)
    (remedy,) = plan["remedies"]
    assert (code, remedy["fits"]) == (1, True)
    options = [word for n, v in remedy["changes"].items() for word in (f"--{n}", str(v))]
    code, changed = planned(capsys, *SMALL, "12", *options)
    assert (code, changed["memory"]["total"]) == (0, remedy["memory"])
    assert plan["batch_size"] % remedy["changes"]["gpus"] == 0


def test_the_nearest_takes_less_or_is_not_named(capsys):
    code, plan = planned(capsys, *SMALL, "2", "--gpus", "8", "--accumulate", "1")
    (remedy,) = plan["remedies"]
    assert (code, remedy["fits"]) == (1, False)
    assert remedy["changes"]
    assert remedy["memory"] < plan["memory"]["total"]
    most = ("--gpus", "24", "--accumulate", "1")
    assert cli.main(["plan", *SMALL, "2", *most]) == 1
    assert "no change that was tried takes less\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "preset: name one first"),
        (["nothing-like-it"], "is unknown"),
        (
            ["tiny", "--gpu", "b300"],
            "gpu='b300' is unknown; known: h200, h100, a100, rtx4090, auto;",
        ),
        (["tiny", "--gpu", "rtx3090"], "name the nearest and give --memory-gib, --tflops and"),
        (["tiny", "--tflops", "0"], "tflops=0.0: must be positive"),
        (["tiny", "--device", "a100"], "device: plan takes --gpu"),
        (["tiny", "--device=cpu"], "device: plan takes --gpu"),
    ],
)
def test_errors_name_the_field(capsys, arguments, message):
    assert cli.main(["plan", *arguments]) == cli.USER_ERROR
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("tiny",),
        ("mvsplit-1000l-h200",),
        ("mvsplit-400l", "--gpus", "2", "--weights", "bf16", "--ema-decay", "0"),
        ("mvsplit-1000l", "--gpus", "2", "--weights", "bf16", "--parallel.layout", "shard"),
    ],
)
def test_the_key_has_every_line_that_a_plan_may_have(capsys, arguments):
    _, plan = planned(capsys, *arguments)
    assert plan["memory"]["parts"].keys() <= plan_key.MEMORY.keys()
    assert plan["time"]["parts"].keys() <= plan_key.TIME.keys()
    assert set(plan_key.LEVELS) == set(RECOMPUTE)
    cli.main(["plan", *arguments])
    assert capsys.readouterr().out.splitlines()[-1] == plan_key.LAST_LINE


def test_help_shows_the_key_with_units_and_which_way_is_better(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    shown = " ".join(capsys.readouterr().out.split())  # lines are as wide as the terminal
    for meanings in (plan_key.MEMORY, plan_key.TIME, plan_key.LEVELS):
        for name, says in meanings.items():
            assert f"{name}: {says}" in shown
    assert "Less is better of memory and time, more of tokens/s and MFU" in shown
    for unit in ("GiB (2^30 bytes)", "time of a step, s:", "GB (10^9 bytes)"):
        assert unit in shown
