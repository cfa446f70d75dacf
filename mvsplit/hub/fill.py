"""Fills a model without weights from tensors that are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.hub.stored import Stored
from mvsplit.models import DiT

Shape = tuple[int, ...]
Layout = Mapping[str, Mapping[str, Shape]]  # for each parameter, the stored tensors it stacks


def fill_in(
    model: DiT,
    tensors: Mapping[str, Stored],
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Gives a model on the meta device its parameters, each straight on `device` in `dtype`.

    At no time is more in memory than the model and one stored tensor.

    Args:
        model: on the meta device.
        tensors: what is stored, with every key and shape that `layout` names.
        layout: where each parameter's rows come from, in order.
        dtype: of all parameters; as stored if None.
        device: of all parameters.

    Raises:
        UserError: a stored tensor with values that are not finite; it is named.
    """
    parameters = {}
    for name, empty in model.named_parameters():
        parts = {key: tensors[key] for key in layout[name]}
        kind = dtype or reduce(torch.promote_types, (part.dtype for part in parts.values()))
        whole = torch.empty(empty.shape, dtype=kind, device=device)
        for (key, part), rows in zip(parts.items(), _rows(whole, parts), strict=True):
            part.copy_to(rows)
            _require_finite(key, rows)
        parameters[name] = whole
    model.load_state_dict(parameters, assign=True)


def _rows(whole: Tensor, parts: Mapping[str, Stored]) -> list[Tensor]:
    """The parts of `whole` that the stored tensors fill; a scalar has no rows to split."""
    if len(parts) == 1:
        return [whole]
    return list(whole.split([part.shape[0] for part in parts.values()]))


def _require_finite(key: str, values: Tensor) -> None:
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():  # NaN is passed on
        bad = int((~values.isfinite()).sum())
        raise UserError(
            f"checkpoint: {key} holds values that are not finite ({bad} of {values.numel()}); the "
            "file is damaged or its training had diverged: fetch it again or take an earlier one"
        )
