"""FID, Inception Score, precision and recall against computations of their own in fp64, and an
extraction that was cut off. The network is a small stand-in, registered with torch-fidelity as any
extractor is. Skipped without torch-fidelity (extra eval; `make test` installs it)."""

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import mvsplit.cli.evaluate as command
from mvsplit.cli import main
from mvsplit.errors import UserError
from mvsplit.evaluation import inception
from mvsplit.evaluation.drawn import DrawnPictures
from mvsplit.evaluation.inception import (
    Features,
    Reference,
    adm_crop,
    evaluate_pictures,
    load_network,
    scores_of,
)
from mvsplit.evaluation.passport import read_evaluation

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="needs torch-fidelity (extra eval)"
)
STAND_IN, DIMENSIONS, CLASSES, SIDE = "mvsplit-stand-in", 6, 5, 8


@pytest.fixture(scope="module", autouse=True)
def torch_fidelity():
    """torch-fidelity, which imports torchvision for networks and data sets that are not used here.
    Builds of it for CUDA cannot be imported beside a torch for CPUs, so an empty one stands in."""
    if "torch_fidelity" in sys.modules:
        return
    names = ["datasets", "models", "transforms", "transforms.functional"]
    parts = {"torchvision": types.ModuleType("torchvision")}
    parts |= {f"torchvision.{name}": types.ModuleType(f"torchvision.{name}") for name in names}
    for name, part in parts.items():
        if name != "torchvision":
            owner, _, last = name.rpartition(".")
            setattr(parts[owner], last, part)
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(parts["torchvision.datasets"], name, type(name, (), {}))
    with pytest.MonkeyPatch.context() as patch:
        for name, part in parts.items():
            patch.setitem(sys.modules, name, part)
        import torch_fidelity  # noqa: F401


@pytest.fixture(scope="module")
def network(torch_fidelity, tmp_path_factory):
    """Mean colours of the four corners through two small matrices, which are the weights."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import register_feature_extractor

    class StandIn(FeatureExtractorBase):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
            super().__init__(name, features_list)
            weights = torch.load(feature_extractor_weights_path, weights_only=True)
            self.points = torch.nn.Parameter(weights["points"])
            self.logits = torch.nn.Parameter(weights["logits"])

        @staticmethod
        def get_provided_features_list():
            return ("points", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return {"isc": "logits", "fid": "points", "prc": "points"}[metric]

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):
            assert x.dtype == torch.uint8
            x = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)
            found = {"points": x @ self.points, "logits": 4 * x @ self.points @ self.logits}
            return tuple(found[name] for name in self.features_list)

    register_feature_extractor(STAND_IN, StandIn)
    generator = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "stand-in.pt"
    points = torch.randn(12, DIMENSIONS, generator=generator)
    torch.save(
        {"points": points, "logits": torch.randn(DIMENSIONS, CLASSES, generator=generator)}, file
    )
    return load_network(file, torch.device("cpu"), name=STAND_IN, batch_size=7)


def features(count, seed, stretch=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    points = stretch * torch.randn(count, DIMENSIONS, generator=generator) + shift
    return Features(points=points, logits=torch.randn(count, CLASSES, generator=generator) * 2)


def adm_fid(a, b):
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the root by eigenvectors of the product."""
    a, b = a.double().numpy(), b.double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eig(first @ second)
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    np.testing.assert_allclose(root @ root, first @ second, atol=1e-9)
    gap = a.mean(0) - b.mean(0)
    return gap @ gap + np.trace(first) + np.trace(second) - 2 * np.trace(root).real


def adm_inception_score(logits, split):
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return np.mean(scores)


def inside(points, centres, k=3):
    """The share of points within reach of some centre, which is as far as its k-th neighbour."""
    reach = [sorted(np.linalg.norm(centres - c, axis=1))[k] for c in centres]
    hits = [
        any(np.linalg.norm(p - c) <= r for c, r in zip(centres, reach, strict=True)) for p in points
    ]
    return np.mean(hits)


@pytest.mark.parametrize(("stretch", "shift"), [(1.0, 0.0), (0.6, 0.3), (1.5, 1.0)])
def test_the_formulas_are_those_of_adm(stretch, shift, monkeypatch):
    monkeypatch.setattr(inception, "SPLIT", 30)
    mine, real = features(90, 1, stretch, shift), features(70, 2)
    found = dict(scores_of(mine, real))
    assert found["fid"] == pytest.approx(adm_fid(mine.points, real.points), rel=1e-6)
    assert found["inception_score"] == pytest.approx(adm_inception_score(mine.logits, 30), rel=1e-6)
    a, b = mine.points.double().numpy(), real.points.double().numpy()
    assert found["precision"] == pytest.approx(inside(a, b), abs=1e-6)
    assert found["recall"] == pytest.approx(inside(b, a), abs=1e-6)


def test_precision_is_of_the_drawn_and_recall_of_the_real():
    narrow = dict(scores_of(features(200, 1, stretch=0.2), features(200, 2)))
    assert narrow["precision"] > 0.95
    assert narrow["recall"] < 0.2


def test_given_moments_replace_those_of_the_reference():
    mine, real, larger = features(50, 1), features(40, 2), features(500, 3, 1.3)
    points = larger.points.double().numpy()
    found = dict(scores_of(mine, real, (points.mean(0), np.cov(points, rowvar=False))))
    assert found["fid"] == pytest.approx(adm_fid(mine.points, larger.points), rel=1e-6)
    assert found["recall"] == dict(scores_of(mine, real))["recall"]


@pytest.fixture
def pictures(tmp_path):
    """23 drawn pictures, and a folder of 19 real ones of several sizes."""
    drawn = DrawnPictures(tmp_path / "drawn", {})
    generator = torch.Generator().manual_seed(3)
    drawn.add(range(23), torch.rand(23, 3, SIDE, SIDE, generator=generator) * 2 - 1)
    chance = np.random.default_rng(0)
    (tmp_path / "real").mkdir()
    for k in range(19):
        pixels = chance.integers(0, 256, (SIDE + k, SIDE + 2 * k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / f"{k:02d}.png")
    return drawn.paths(23), tmp_path / "real"


def by_hand(network, pixels):
    x = torch.nn.functional.adaptive_avg_pool2d(torch.cat(pixels).double() / 255, 2).flatten(1)
    points = x @ network.extractor.points.detach().double()
    return Features(points=points, logits=4 * points @ network.extractor.logits.detach().double())


def test_scores_from_files_to_numbers(network, pictures, tmp_path):
    drawn, folder = pictures
    reference, told = Reference(folder, (SIDE, SIDE)), []
    found = dict(
        evaluate_pictures(drawn, reference, network, tmp_path / "store", on_batch=told.append)
    )
    mine = [
        torch.from_numpy(np.asarray(Image.open(p)).copy()).permute(2, 0, 1)[None] for p in drawn
    ]
    real = [
        torch.from_numpy(adm_crop(p, (SIDE, SIDE)).copy())[None] for p in sorted(folder.glob("*"))
    ]
    expected = dict(scores_of(by_hand(network, mine), by_hand(network, real)))
    assert found == pytest.approx(expected, rel=1e-3)
    assert sum(told) == 23 + 19


def test_an_extraction_goes_on_where_it_was_cut_off(network, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "PART", 4)
    drawn, folder = pictures
    reference = Reference(folder, (SIDE, SIDE))
    whole = dict(evaluate_pictures(drawn, reference, network, tmp_path / "whole"))
    told = []

    def interrupt(pictures):
        told.append(pictures)
        if sum(told) >= 23 + 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dict(evaluate_pictures(drawn, reference, network, tmp_path / "cut", on_batch=interrupt))
    seen, run = [], inception._of_batch
    monkeypatch.setattr(inception, "_of_batch", lambda n, b: (seen.append(len(b)), run(n, b))[1])
    again = dict(evaluate_pictures(drawn, reference, network, tmp_path / "cut"))
    assert again == pytest.approx(whole, rel=1e-5)  # other batches, other rounding
    assert sum(seen) == (23 - 20) + (19 - 4)


def test_a_reference_can_be_an_array_of_adm(network, pictures, tmp_path):
    drawn, folder = pictures
    paths = sorted(folder.glob("*"))
    pixels = np.stack([adm_crop(p, (SIDE, SIDE)) for p in paths]).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "plain.npz", arr_0=pixels)
    moments = {"mu": np.zeros(DIMENSIONS), "sigma": np.eye(DIMENSIONS)}
    np.savez(tmp_path / "moments.npz", arr_0=pixels, **moments)
    found = [
        dict(evaluate_pictures(drawn, Reference(path, (SIDE, SIDE)), network, tmp_path / "store"))
        for path in (folder, tmp_path / "plain.npz", tmp_path / "moments.npz")
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2]["precision"] == found[0]["precision"]
    assert found[2]["fid"] != pytest.approx(found[0]["fid"], rel=0.1)
    with pytest.raises(UserError, match=r"needed is uint8 \[N, 9, 8, 3\]"):
        Reference(tmp_path / "plain.npz", (9, 8))


def test_a_reference_is_known_by_its_files(pictures, tmp_path):
    _, folder = pictures
    before = Reference(folder, (SIDE, SIDE)).sha256
    assert Reference(folder, (SIDE, SIDE)).sha256 == before
    (folder / "07.png").unlink()
    assert Reference(folder, (SIDE, SIDE)).sha256 != before
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 pictures"):
        Reference(tmp_path / "empty", (SIDE, SIDE))
    with pytest.raises(UserError, match=r"neither a folder of pictures nor a \.npz"):
        Reference(tmp_path / "nowhere", (SIDE, SIDE))


def test_the_crop_is_the_centre_after_halving_with_a_box(tmp_path):
    chance = np.random.default_rng(1)
    pixels = chance.integers(0, 256, (16, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    halved = pixels.astype(float).reshape(8, 2, 20, 2, 3).mean((1, 3))
    expected = halved[:, 6:14].transpose(2, 0, 1)
    # Pillow rounds after each of the two directions.
    assert np.abs(adm_crop(tmp_path / "a.png", (8, 8)) - expected).max() <= 1
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"b\.png cannot be read"):
        adm_crop(tmp_path / "b.png", (8, 8))


def test_the_real_network_wants_its_weights(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load_network(tmp_path / "none.pth", torch.device("cpu"))
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no weights of inception-v3-compat"):
        load_network(tmp_path / "other.pth", torch.device("cpu"))


def test_its_layers_are_those_of_adm(tmp_path, monkeypatch):
    """2048 features of pool3 and logits without their bias, from weights of the right shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Real

    monkeypatch.setattr(Real, "load_state_dict", lambda self, weights: None)
    torch.save({}, tmp_path / "any.pth")
    found = load_network(tmp_path / "any.pth", torch.device("cpu"), batch_size=1)
    assert (found.points, found.logits) == ("2048", "logits_unbiased")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.metric_fid", None)
    with pytest.raises(UserError, match=r"pip install 'mvsplit\[eval\]'"):
        inception._fidelity("metric_fid")


def test_the_command_scores_a_run_against_a_folder(network, pictures, tmp_path, monkeypatch):
    _, folder = pictures
    monkeypatch.setattr(command, "load_network", lambda *args, **options: network)
    run, fast = tmp_path / "run", ["--steps", "2", "--device", "cpu"]
    shapes = ["--data.dataset", "shapes", "--data.size", "32", "--model.channels", "3"]
    small = ["--model.patch", "8", "--batch-size", "4", *fast]
    assert main(["train", "tiny", "--run-dir", str(run), *shapes, *small]) == 0
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    files = ["--reference", str(folder), "--inception", "any.pth"]
    options = [*files, "--prompts", str(tmp_path / "prompts.txt"), "--validation-samples", "0"]
    assert main(["evaluate", str(run), "-n", "9", *options, *fast]) == 0
    found = read_evaluation(run)
    assert set(found.scores) == {"fid", "inception_score", "precision", "recall"}
    drawn = sorted(next(p for p in (run / "evaluations").iterdir() if p.is_dir()).glob("*.png"))
    store = tmp_path / "again"
    again = dict(evaluate_pictures(drawn, Reference(folder, (32, 32)), network, store))
    assert found.scores == pytest.approx(again, rel=1e-6)
    assert found.passport["real"] == {
        "sha256": Reference(folder, (32, 32)).sha256,
        "pictures": 19,
        "inception_sha256": network.sha256,
    }
