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
from mvsplit.errors import UserError
from mvsplit.training.config import flat_fields
from mvsplit.training.environment import describe_environment

FORMAT = 1
# What may differ between scores that are compared.
FREE = (
    *(f"weights.{field}" for field in ("source", "settings", "sha256", "step")),
    *("command", "date", "revision"),
)
_ABSENT = "absent"
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
    flat = [flat_fields(evaluation.passport) for evaluation in evaluations]
    names = sorted({name for fields in flat for name in fields})
    for given in allowed:
        if not any(_within(name, given) for name in names):
            raise UserError(f"allow={given}: no passport has such a field")
    rows = {name: [fields.get(name, _ABSENT) for fields in flat] for name in names}
    return {
        name: values
        for name, values in rows.items()
        if any(value != values[0] for value in values[1:])
        and not any(_within(name, given) for given in (*FREE, *allowed))
    }


# Scores of which each sample is kept, by the part of the passport that makes two of them pairs.
_SAME = {
    "validation_loss": "validation",
    "digit_accuracy": "sampling",
    "caption_exact": "sampling",
    "clip_exact": "sampling",
}


def paired(first: Evaluation, second: Evaluation, score: str) -> tuple[float, float, int] | None:
    """By how much a score of `second` is above that of `first` on the same samples and noise: the
    mean of the differences, its standard error, and of how many pairs. None where these are not
    known, are not finite, or are of other samples."""
    a, b = (each.samples.get(score, []) for each in (first, second))
    group = _SAME.get(score)
    same = group is not None and first.passport.get(group) == second.passport.get(group)
    if not same or len(a) != len(b) or len(a) < 2:
        return None
    apart = [y - x for x, y in zip(a, b, strict=True)]
    if not all(map(math.isfinite, apart)):
        return None
    return statistics.fmean(apart), statistics.stdev(apart) / math.sqrt(len(apart)), len(apart)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _within(name: str, field: str) -> bool:
    return name == field or name.startswith(f"{field}.")
