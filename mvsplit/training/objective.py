"""What a step minimises: flow matching, or a preference between the two samples of a pair.

An objective gives a number for each sample, whose mean is minimised, and may measure more beside
it. The loop, the step and all that watches them do not know which it is.

Shapes: B samples of a piece, or pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from mvsplit.errors import UserError
from mvsplit.flow import (
    DPOConfig,
    flow_losses,
    implicit_rewards,
    interpolate,
    preference_losses,
)
from mvsplit.models import Block, DiT
from mvsplit.training.config import TrainConfig
from mvsplit.training.distributed import world
from mvsplit.training.pieces import Piece


class Objective(Protocol):
    """What is minimised.

    Attributes:
        names: what is measured of each sample, what is minimised first; last what `beside`
            measures, but for what it minimises.
        beside: what is minimised of the batch that comes beside that of the loader.
    """

    names: tuple[str, ...]
    beside: Objective | None

    def __call__(self, model: DiT, piece: Piece, config: TrainConfig) -> Tensor:
        """[B], or [B, len(names)] where there is more than one; in fp32."""

    def begin(self) -> None:
        """The network is now what the run starts from."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint has to hold for it, as groups of tensors by name."""

    def networks(self) -> tuple[nn.Module, ...]:
        """Networks that run beside the one that learns."""


class FlowMatching:
    """The paper's own (Eq. 2)."""

    names: tuple[str, ...] = ("loss",)
    beside: Objective | None = None

    def __call__(self, model: DiT, piece: Piece, config: TrainConfig) -> Tensor:
        return piece_losses(model, piece, config)

    def begin(self) -> None:
        """Nothing depends on the start."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def networks(self) -> tuple[nn.Module, ...]:
        return ()


FLOW = FlowMatching()


class Held(FlowMatching):
    """Flow matching of some weight beside another objective: what is minimised, and the loss."""

    names: tuple[str, ...] = ("minimised", "loss_real")

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, model: DiT, piece: Piece, config: TrainConfig) -> Tensor:
        losses = piece_losses(model, piece, config)
        return torch.stack((self.weight * losses, losses), dim=1)


class Preference:
    """Diffusion-DPO in its flow-matching form (`mvsplit.flow.preference`).

    The two samples of a pair share their time and their noise, as in the code of Diffusion-DPO:
    what both losses owe to these goes out in their difference. With `config.real` the network is
    held to samples of the data set, in passes of their own.

    Args:
        model: the network that learns; it has its adapters, if any, and says what learns.
    """

    names: tuple[str, ...] = (
        *("loss", "margin", "accuracy"),
        *("loss_chosen", "loss_rejected", "reference_chosen", "reference_rejected"),
    )

    def __init__(self, model: DiT, config: DPOConfig) -> None:
        self.config = config
        self.beside: Objective | None = Held(config.real) if config.real else None
        self.names = (*Preference.names, *(Held.names[1:] if self.beside else ()))
        self._model = model
        self.reference, self._copies = frozen_twin(model)

    def __call__(self, model: DiT, piece: Piece, config: TrainConfig) -> Tensor:
        """Of each pair: what is minimised, r_w − r_l, whether it is positive (½ where it is 0), and
        the flow-matching losses of both, of the network and of its reference."""
        self._runs_as(model)
        before_w, before_l = (x.detach() for x in _both_losses(self.reference, piece, config))
        chosen, rejected = _both_losses(model, piece, config)
        beta, anchor = self.config.beta, self.config.anchor
        reward_w = implicit_rewards(chosen, before_w, beta)
        reward_l = implicit_rewards(rejected, before_l, beta)
        margin = reward_w - reward_l
        found = (
            preference_losses(reward_w, reward_l) + anchor * chosen,
            margin,
            (margin.sign() + 1) / 2,
            *(chosen, rejected, before_w, before_l),
        )
        return torch.stack(found, dim=1)

    def _runs_as(self, model: DiT) -> None:
        """Lets the blocks of the reference keep nothing for a backward that never comes."""
        for block, other in zip(self.reference.blocks, model.blocks, strict=True):
            twin = cast(Block, block)
            twin.recompute, twin.recompute_parts = "all", cast(Block, other).recompute_parts

    def begin(self) -> None:
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if name in self._copies:
                    self._copies[name].copy_(parameter)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {"reference": dict(self._copies)} if self._copies else {}

    def networks(self) -> tuple[nn.Module, ...]:
        return (self.reference,)


def build_objective(model: DiT, config: TrainConfig) -> Objective:
    """The objective that `config` names. Raises UserError where the run lies on several processes
    and the objective needs a second network."""
    if config.objective == "flow":
        return FLOW
    if world() > 1:
        raise UserError(
            "train.objective='dpo': only a single process can hold the reference beside the "
            "network; start the command without torchrun"
        )
    return Preference(model, config.dpo)


def piece_losses(model: DiT, piece: Piece, config: TrainConfig) -> Tensor:
    """The flow-matching loss of each sample of a piece (Eq. 2), [B] in fp32. bf16 concerns the
    network only: the path, the loss and the weights are fp32."""
    z = interpolate(piece.data, piece.noise, piece.times)
    low = config.precision == "bf16"
    with torch.autocast(z.device.type, torch.bfloat16, enabled=low):
        # The text in bf16 too, or concatenation would lift the whole trunk to fp32.
        text = piece.text.bfloat16() if low else piece.text
        velocity = model(z, text, piece.text_valid)
    return flow_losses(velocity, piece.data, piece.noise)


def _both_losses(model: DiT, piece: Piece, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The flow-matching losses [B] of the preferred samples of a piece and of the others, by one
    pass over both."""
    assert piece.rejected is not None, "the loader of pairs gives both samples"
    valid = piece.text_valid
    twice = Piece(
        data=torch.cat((piece.data, piece.rejected)),
        noise=torch.cat((piece.noise, piece.noise)),
        times=torch.cat((piece.times, piece.times)),
        text=torch.cat((piece.text, piece.text)),
        text_valid=None if valid is None else torch.cat((valid, valid)),
    )
    chosen, rejected = piece_losses(model, twice, config).chunk(2)
    return chosen, rejected


def frozen_twin(model: DiT) -> tuple[DiT, Mapping[str, Tensor]]:
    """A network that stays as `model` is now while this one learns, and its own tensors by name.

    What does not learn is shared with it, and so takes no memory: with low-rank adapters, all but
    these, which at first do nothing. What learns is copied. The copies require gradients as the
    originals do, though none are asked for: kernels are chosen by it, and rounding that differs
    between both networks would count as a reward.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared)
    copies: dict[str, Tensor] = {}
    for name, parameter in list(twin.named_parameters()):
        if parameter.requires_grad:
            owner, _, last = name.rpartition(".")
            own = nn.Parameter(parameter.detach().clone())
            setattr(twin.get_submodule(owner), last, own)
            copies[name] = own.detach()
    return twin, copies
