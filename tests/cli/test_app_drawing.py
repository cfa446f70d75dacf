"""What the page does, without the page: the wish, its previews, its files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mvsplit.cli import main
from mvsplit.cli.app_drawing import LARGEST_SEED, MOST_CHARACTERS, STOPPED, Drawing, Wish
from mvsplit.cli.subject import Options, open_subject
from mvsplit.errors import UserError
from mvsplit.sampling import read_record
from mvsplit.training import train
from tests.training import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "digits"
    train(runs.experiment(steps=1, device="cpu"), path)
    return path


@pytest.fixture
def drawing(run, tmp_path) -> Drawing:
    subject = open_subject(Options(source=run, device="cpu"))
    return Drawing(subject, subject.model, tmp_path / "pictures")


def test_the_files_are_those_of_mvsplit_sample(run, drawing, tmp_path):
    wish = Wish(prompt="seven", pictures=3, seed=5, steps=4, guidance=3.0, sampler="heun")
    *_, last = drawing.draw(wish)
    options = ["--seed", "5", "--steps", "4", "--guidance", "3", "--sampler", "heun", "-n", "3"]
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["sample", str(run), "--prompt", "seven", *options, *out]) == 0
    assert len(last.files) == 3
    for index, path in enumerate(last.files):
        other = tmp_path / "out" / f"{index:05d}.png"
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(other))).all()
        record = read_record(path)
        assert {**read_record(other), **record} == read_record(other)
        assert (record["prompt"], record["seed"], record["index"]) == ("seven", 5, index)
    assert last.status.startswith("3 drawn in ")
    assert last.status.endswith(", 14 passes of the network each")


def test_every_wish_has_files_of_its_own(drawing):
    made = [list(drawing.draw(Wish(prompt=p, steps=1)))[-1].files for p in ("one", "one")]
    assert set(made[0]).isdisjoint(made[1])
    assert all(path.exists() for files in made for path in files)


def test_previews_show_the_states_on_the_way(drawing, monkeypatch):
    monkeypatch.setattr("mvsplit.cli.app_drawing.PREVIEW_EVERY", 0.0)
    *previews, last = drawing.draw(Wish(prompt="one", pictures=2, steps=3))
    assert [shown.status for shown in previews] == [f"step {i} of 3" for i in (2, 3)]
    assert last.preview is None
    final = np.asarray(previews[-1].preview)  # two pictures of 64 pixels and the gap
    assert final.shape == (64, 130, 3)
    drawn = np.asarray(Image.open(last.files[1])).astype(int)
    assert abs(final[:, 66:, 0] - drawn).max() <= 1  # one step's rounding
    assert (np.asarray(previews[0].preview) != final).any()


def test_who_leaves_ends_the_drawing(drawing, monkeypatch):
    monkeypatch.setattr("mvsplit.cli.app_drawing.PREVIEW_EVERY", 0.0)
    evaluations = []
    network = drawing._network

    def counting(*inputs):
        evaluations.append(1)
        return network(*inputs)

    counting.parameters = network.parameters
    drawing._network = counting
    looking = drawing.draw(Wish(prompt="one", steps=200))
    next(looking)
    looking.close()
    assert 0 < len(evaluations) < 200
    count = len(evaluations)
    *_, last = drawing.draw(Wish(prompt="one", steps=2))  # the next one's turn has come
    assert len(evaluations) == count + 2
    assert len(last.files) == 4


def test_stop_ends_the_visitors_own_drawing_only(drawing, monkeypatch):
    monkeypatch.setattr("mvsplit.cli.app_drawing.PREVIEW_EVERY", 0.0)
    looking = drawing.draw(Wish(prompt="one", steps=200), "anna")
    next(looking)
    assert not drawing.stop("ben")
    next(looking)
    assert not drawing.stop("anna")  # none waited
    assert list(looking) == [STOPPED]  # and nothing that was on its way


def test_stop_is_for_what_was_wished_before_it(drawing):
    first, others, second = (drawing.enlist(visitor) for visitor in ("anna", "ben", "anna"))
    assert drawing.stop("anna")
    later = drawing.enlist("anna")
    ends = [
        [*drawing.draw(Wish(prompt="one", steps=1), visitor, ticket)][-1]
        for visitor, ticket in (
            ("anna", first),
            ("ben", others),
            ("anna", second),
            ("anna", later),
        )
    ]
    assert [len(end.files) for end in ends] == [0, 4, 0, 4]
    assert ends[0] == ends[2] == STOPPED
    assert [*drawing.draw(Wish(prompt="one", steps=1), "ben", drawing.enlist("anna"))] == [STOPPED]
    assert drawing.stop("anna")  # another's turn is not taken
    drawing.drop(drawing.enlist("anna"))
    assert not drawing.stop("anna")


def test_a_drawing_that_was_left_without_a_word_does_not_keep_the_next_waiting(drawing):
    left = drawing.draw(Wish(prompt="one", steps=200))
    next(left)
    *_, last = drawing.draw(Wish(prompt="two", steps=1))
    assert len(last.files) == 4
    assert all(not shown.files for shown in left)


def test_what_goes_wrong_in_the_thread_is_told(drawing):
    for parameter in drawing._network.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(UserError, match="picture 0 came out with values that are not finite"):
        list(drawing.draw(Wish(prompt="one", steps=1)))
    with pytest.raises(UserError, match="unknown word 'elefant'"):
        list(drawing.draw(Wish(prompt="elefant")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": 17}, "pictures=17: must be from 1 to 16"),
        ({"pictures": None}, "pictures=None: must be from 1 to 16"),
        ({"steps": 0}, "steps=0: must be from 1 to 200"),
        ({"seed": LARGEST_SEED + 1}, "seed=4294967296: must be from 0 to"),
        ({"guidance": float("nan")}, "guidance=nan: must be from 0 to 20"),
        ({"guidance": "2"}, "guidance=2: must be from 0 to 20"),
        ({"prompt": "a" * (MOST_CHARACTERS + 1)}, "prompt: has 1001 characters; 1000 are allowed"),
    ],
)
def test_what_a_page_could_be_made_to_send_is_checked_again(changes, message):
    with pytest.raises(UserError, match=message):
        Wish(**{"prompt": "one", **changes})


def test_an_unknown_sampler_is_refused(drawing):
    with pytest.raises(UserError, match="sampler='oiler' is unknown"):
        next(drawing.draw(Wish(prompt="one", sampler="oiler")))
