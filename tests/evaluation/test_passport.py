"""Passports: what must agree, what may differ, and how it is said."""

import copy
import json

import pytest
import torch

from mvsplit.errors import UserError
from mvsplit.evaluation.passport import (
    Evaluation,
    differences,
    files_sha256,
    in_short,
    paired,
    passport_head,
    read_evaluation,
    unpaired,
    weights_sha256,
    write_evaluation,
)

PASSPORT = {
    "weights": {"source": "a", "sha256": "1", "step": 4, "averaged": True},
    "sampling": {"steps": 35, "guidance": 2.0, "guidance_interval": [0.0, 1.0]},
    "versions": {"torch": "2.13", "numpy": "2"},
    "precision": "float32",
    "command": "mvsplit evaluate a",
    "date": "today",
}


def evaluation(name="a", **changes):
    """With fields of the passport set by dotted name, "__" for the dot; None takes one away."""
    passport = copy.deepcopy(PASSPORT)
    for field, value in changes.items():
        *groups, last = field.split("__")
        place = passport
        for group in groups:
            place = place[group]
        place[last] = value
        if value is None:
            del place[last]
    return Evaluation(name=name, scores={"fid": 3.0}, passport=passport)


def test_other_weights_of_another_day_are_compared():
    other = evaluation(
        weights__source="b", weights__sha256="2", weights__step=8, command="x", date="tomorrow"
    )
    assert differences([evaluation(), other]) == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sampling__steps": 25}, {"sampling.steps": [35, 25]}),
        ({"weights__averaged": False}, {"weights.averaged": [True, False]}),
        ({"sampling__guidance": None}, {"sampling.guidance": [2.0, "absent"]}),
        (
            {"sampling__guidance_interval": [0, 0.5]},
            {"sampling.guidance_interval": [[0.0, 1.0], [0, 0.5]]},
        ),
        ({"precision": None}, {"precision": ["float32", "absent"]}),
        ({"sampling": None}, {"sampling": ["given", "absent"]}),
        ({"versions__triton": "3"}, {"versions.triton": ["absent", "3"]}),
        (
            {"versions__torch": "3", "precision": "bfloat16"},
            {"precision": ["float32", "bfloat16"], "versions.torch": ["2.13", "3"]},
        ),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_both_values(changes, expected):
    assert differences([evaluation(), evaluation(**changes)]) == expected
    assert differences([evaluation(), evaluation(), evaluation(**changes)]) == {
        name: [values[0], *values] for name, values in expected.items()
    }


def test_what_is_allowed_may_differ_and_nothing_more():
    two = [evaluation(), evaluation(versions__torch="3", sampling__steps=25)]
    assert differences(two, ["versions.torch"]) == {"sampling.steps": [35, 25]}
    assert differences(two, ["versions", "sampling.steps"]) == {}
    assert differences(two, ["version", "sampling"][1:]) == {"versions.torch": ["2.13", "3"]}
    with pytest.raises(UserError, match=r"allow=version: no passport.*did you mean versions"):
        differences(two, ["version"])


def test_of_a_group_that_one_has_not_the_others_still_differ():
    three = [evaluation(), evaluation(sampling__steps=25), evaluation(sampling=None)]
    expected = {
        "sampling": ["given", "given", "absent"],
        "sampling.steps": [35, 25, "absent"],
    }
    assert differences(three) == expected
    assert differences(three, ["sampling"]) == {}
    assert differences(three, ["sampling.steps"]) == {"sampling": expected["sampling"]}


def test_a_hash_is_shown_by_its_first_digits():
    assert in_short("0123456789abcdef" * 4) == "0123456789ab"
    assert [in_short(value) for value in ("0123456789abcdef", 64 * "g", 2.0, [0, 1])] == [
        "0123456789abcdef",
        64 * "g",
        "2.0",
        "[0, 1]",
    ]


def test_the_hash_of_weights_is_of_names_types_shapes_and_values():
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": base["b"].clone(), "a": base["a"].t().contiguous().t()}
    others = [
        {"a": base["a"], "c": base["b"]},
        {**base, "a": base["a"].view(3, 2)},
        {**base, "b": base["b"].float()},
        {**base, "a": torch.nextafter(base["a"], torch.tensor(9.0))},
    ]
    assert weights_sha256(same) == weights_sha256(base)
    assert len({weights_sha256(tensors) for tensors in (base, *others)}) == 5


def test_the_hash_of_files_is_of_names_and_bytes(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(b"1"), second.write_bytes(b"2")
    whole = files_sha256([first, second])
    second.write_bytes(b"3")
    assert len({whole, files_sha256([first, second]), files_sha256([first])}) == 3


def test_a_difference_is_of_pairs_of_the_same_samples():
    def scored(values, seed=0):
        passport = {"validation": {"seed": seed}}
        return Evaluation(
            name="n", scores={}, passport=passport, samples={"validation_loss": values}
        )

    first, second = scored([1.0, 2.0, 4.0]), scored([1.5, 2.25, 4.75])
    mean, error, pairs = paired(first, second, "validation_loss")
    assert (mean, pairs) == (0.5, 3)
    assert error == pytest.approx(0.25 / 3**0.5)
    dead = scored([1.5, float("nan"), 4.75])
    reasons = {
        "not the same samples and noise (validation.seed)": scored([1.5, 2.25, 4.75], seed=1),
        "3 and 2 samples": scored([1.5, 2.25]),
        "no values of single samples are kept": scored([]),
        "not all values are finite": dead,
    }
    for reason, other in reasons.items():
        assert paired(first, other, "validation_loss") is None
        assert unpaired(first, other, "validation_loss") == reason
    assert unpaired(first, second, "validation_loss") is None
    assert paired(first, second, "fid") is None


def test_a_score_is_read_back_by_file_and_by_run(tmp_path):
    model = torch.nn.Linear(2, 2).double()
    head = passport_head(model, torch.device("cpu"), {"source": "x"}, ["evaluate", "my run"])
    assert head["command"] == "mvsplit evaluate 'my run'"
    assert head["precision"] == "float64"
    assert head["versions"]["torch"] == torch.__version__
    assert "scikit-learn" in head["versions"]
    file = tmp_path / "run" / "evaluations" / "one.json"
    write_evaluation(file, Evaluation(name="n", scores={"fid": 0.1 + 0.2}, passport=head))
    for path in (file, tmp_path / "run"):
        found = read_evaluation(path)
        assert (found.name, found.scores, found.passport) == (str(path), {"fid": 0.1 + 0.2}, head)
    write_evaluation(file.with_name("two.json"), found)
    with pytest.raises(UserError, match="has 2 evaluations"):
        read_evaluation(tmp_path / "run")
    with pytest.raises(UserError, match="elsewhere: there is neither a run nor a file of scores"):
        read_evaluation(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"nor a file of scores; did you mean .*evaluations/one\.json"
    ):
        read_evaluation(file.with_name("ones.json"))
    (tmp_path / "run-without").mkdir()
    with pytest.raises(UserError, match="has no evaluation; make one: mvsplit evaluate"):
        read_evaluation(tmp_path / "run-without")
    file.write_text(json.dumps([1]))
    with pytest.raises(UserError, match="holds no scores"):
        read_evaluation(file)
