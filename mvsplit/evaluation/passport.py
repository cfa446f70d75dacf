"""A passport goes with every score: all that the score depends on, so that two can be compared.

A score's file is JSON: `{"scores": {name: value}, "passport": {…}}`. Passports are compared field
by field; what may differ is what is being compared, the weights, and what says nothing about a
score: when, by which command and from which revision it was made.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mvsplit
from mvsplit.data.atomic import sha256, write_atomically
from mvsplit.errors import UserError, nearest, nearest_run, runs_near
from mvsplit.training.config import flat_fields
from mvsplit.training.environment import describe_environment

FORMAT = 1
# What may differ between scores that are compared.
FREE = (
    *(f"weights.{field}" for field in ("source", "settings", "sha256", "step")),
    *("command", "date", "revision"),
)
# What scores of the same settings, weights and data may have been made with.
TOOLS = ("format", "python", "device", "device_name", "versions", "code_sha256")
_GIVEN, ABSENT = "given", "absent"
_HASH = re.compile(r"[0-9a-f]{64}")
_DIGITS = 12  # of a hash that is shown
# The folders of this package that a score depends on. Their hash is compared instead of the
# revision, which changes with every commit.
_CODE = ("kernels", "residuals", "models", "flow", "data", "sampling", "evaluation")
_ENVIRONMENT = ("python", "device", "device_name", "revision")
# Beside those of a run's environment.json.
_PACKAGES = ["scikit-learn", "pillow", "torch-fidelity", "torchvision", "transformers", "diffusers"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores with their passport, and where they came from.

    Attributes:
        samples: of a score that is a mean, what each sample or picture had, in their order.
    """

    name: str
    scores: dict[str, float]
    passport: dict[str, Any]
    samples: dict[str, list[float]] = field(default_factory=dict)


def passport_head(
    model: nn.Module, device: torch.device, weights: Mapping[str, Any], command: Sequence[str]
) -> dict[str, Any]:
    """The part of a passport that is the same for every evaluator.

    Args:
        weights: where they are from: source, step, whether they are averaged.
        command: the words after `mvsplit`.
    """
    environment = describe_environment(device)
    return {
        "format": FORMAT,
        "weights": {**weights, "sha256": weights_sha256(model.state_dict())},
        "precision": str(next(model.parameters()).dtype).removeprefix("torch."),
        **{name: environment[name] for name in _ENVIRONMENT},
        "code_sha256": code_sha256(),
        "versions": {**environment["versions"], **_versions(_PACKAGES)},
        "command": shlex.join(("mvsplit", *command)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: name, dtype, shape and values, in order of the names.

    The same tensors have the same hash in whatever file they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().contiguous().cpu().view(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_sha256() -> str:
    """SHA-256 of the package's own files that a score depends on."""
    root = Path(mvsplit.__file__).parent
    return files_sha256([path for part in _CODE for path in sorted((root / part).rglob("*.py"))])


def values_sha256(values: Tensor) -> str:
    """SHA-256 of a tensor's shape and values."""
    return weights_sha256({"": values})


def text_sha256(lines: Iterable[str]) -> str:
    """SHA-256 of a list of texts."""
    return hashlib.sha256(json.dumps(list(lines)).encode()).hexdigest()


def files_sha256(paths: Sequence[Path]) -> str:
    """SHA-256 of the names and bytes of files, in the order given."""
    return text_sha256(f"{path.name} {sha256(path)}" for path in paths)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Writes scores with their passport; whole or not at all. Raises UserError where it cannot."""
    tree = {
        "scores": evaluation.scores,
        "passport": evaluation.passport,
        "samples": evaluation.samples,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(tree, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; free some space, or choose another place"
        ) from error


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in a file, or the only one of a run.

    Raises:
        UserError: there is none, several, or a file that holds none.
    """
    file = path if path.is_file() else _only_one(path)
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        return Evaluation(
            name=str(path),
            scores=tree["scores"],
            passport=tree["passport"],
            samples=tree.get("samples", {}),  # which scores of earlier versions do not have
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} holds no scores with a passport ({type(error).__name__}: {error}); give a "
            "file that mvsplit evaluate has written"
        ) from error


def _only_one(path: Path) -> Path:
    if not path.exists():
        near = [*runs_near(path), *map(str, path.parent.glob("*.json"))]
        known = nearest(str(path), near) if near else nearest_run(path)
        raise UserError(f"{path}: there is neither a run nor a file of scores; {known}")
    found = sorted((path / "evaluations").glob("*.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"{path} has no evaluation; make one: mvsplit evaluate {path}")
    listed = ", ".join(map(str, found))
    raise UserError(f"{path} has {len(found)} evaluations; name one of {listed}")


def differences(
    evaluations: Sequence[Evaluation], allowed: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """The fields in which passports differ though they must not, with the value of each.

    Args:
        allowed: fields that may differ, by dotted name; that of a group allows all of it.

    Raises:
        UserError: an allowed field that no passport has.
    """
    passports = [evaluation.passport for evaluation in evaluations]
    names = {name for passport in passports for name in flat_fields(passport)}
    groups = {name.partition(".")[0] for name in names}
    for given in allowed:
        if not any(is_within(name, [given]) for name in names):
            known = nearest(given, names | groups, listed=groups)
            raise UserError(f"allow={given}: no passport has such a field; {known}")
    return {
        name: values
        for name, values in differing(passports).items()
        if not is_within(name, (*FREE, *allowed))
    }


def differing(passports: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """All fields in which passports differ, by dotted name, with the value of each. Of a group that
    some do not have, what is in it counts only among those that do."""
    flat = [flat_fields(passport) for passport in passports]
    found: dict[str, list[Any]] = {}
    for group in {group for passport in passports for group in passport}:
        parts = [passport.get(group) for passport in passports]
        if None in parts and any(isinstance(part, Mapping) for part in parts):
            found[group] = [ABSENT if part is None else _GIVEN for part in parts]
    for name in {name for fields in flat for name in fields}:
        group = name.partition(".")[0]
        values = [fields.get(name, ABSENT) for fields in flat]
        asked = [v for v, p in zip(values, passports, strict=True) if group in p or group == name]
        if any(value != asked[0] for value in asked[1:]):
            found[name] = values
    return dict(sorted(found.items()))


def is_within(name: str, fields: Iterable[str]) -> bool:
    """Whether a dotted name is one of `fields` or in one of these groups."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def in_short(value: object) -> str:
    """A value of a passport, of a hash its first digits."""
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value[:_DIGITS]
    return str(value)


# Scores of which each sample is kept, by the part of the passport that makes two of them pairs.
_SAME = {
    "validation_loss": "validation",
    "digit_accuracy": "sampling",
    "caption_exact": "sampling",
    "clip_exact": "sampling",
}


def paired(first: Evaluation, second: Evaluation, score: str) -> tuple[float, float, int] | None:
    """By how much a score of `second` is above that of `first` on the same samples and noise: the
    mean of the differences, its standard error, and of how many pairs. None where `unpaired` says
    why."""
    if unpaired(first, second, score) is not None:
        return None
    pairs = zip(first.samples[score], second.samples[score], strict=True)
    apart = [y - x for x, y in pairs]
    return statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart)), len(apart)


def unpaired(first: Evaluation, second: Evaluation, score: str) -> str | None:
    """Why there are no pairs of a score; None where there are."""
    a, b = (each.samples.get(score, []) for each in (first, second))
    group = _SAME.get(score)
    if group is None or not (a and b):
        return "no values of single samples are kept"
    mine, theirs = ({group: each.passport.get(group)} for each in (first, second))
    if mine != theirs:
        return f"not the same samples and noise ({', '.join(differing([mine, theirs]))})"
    if len(a) != len(b) or len(a) < 2:
        return f"{len(a)} and {len(b)} samples"
    if not all(map(math.isfinite, (*a, *b))):
        return "not all values are finite"
    return None


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
