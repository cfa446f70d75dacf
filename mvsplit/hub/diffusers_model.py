"""The network as a model of diffusers; needs the extra `hub`."""

from __future__ import annotations

import dataclasses
import warnings
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.errors import UserError, needs_extra
from mvsplit.hub.model_card import write_card
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig, as_recorded

with needs_extra("hub"):
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.loaders import PeftAdapterMixin
    from diffusers.models.modeling_outputs import Transformer2DModelOutput


class MVSplitDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A `mvsplit.models.DiT` that is saved, loaded, adapted and offloaded as diffusers does it.

    Args:
        depth … norm_eps: the fields of `DiTConfig`; `rule` is a dict with those of `RuleConfig`.
        sample_size: side of the latents that a pipeline makes if it is not told.
    """

    _repeated_blocks = ["Block"]  # noqa: RUF012, read by compile_repeated_blocks
    _no_split_modules = ["Block"]  # noqa: RUF012, kept on one device
    _skip_layerwise_casting_patterns = ["rule", "patch_in", "text_in", "head"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        ffn_width: int,
        channels: int,
        text_width: int,
        kv_heads: int | None = None,
        patch: int = 1,
        patch_frames: int = 1,
        mean: str = "clip",
        attention_bias: bool = False,
        ffn_bias: bool = False,
        rule: dict[str, Any] | None = None,
        writers: str = "rule",
        rope_theta: float = 10_000.0,
        qk_eps: float = 1e-6,
        norm_eps: float = 1e-5,
        sample_size: int | None = None,
    ) -> None:
        super().__init__()
        given = {f.name: self.config[f.name] for f in dataclasses.fields(DiTConfig)}
        self.dit = DiT(DiTConfig(**{**given, "rule": _rule(rule or {})}))

    @classmethod
    def from_dit(cls, dit: DiT, *, sample_size: int | None = None) -> MVSplitDiTTransformer2DModel:
        """A model around `dit` itself; the weights are shared, not copied."""
        with torch.device("meta"):
            model = cls(**dataclasses.asdict(dit.config), sample_size=sample_size)
        model.dit = dit
        return model.eval()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        text_valid: Tensor | None = None,
        timestep: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity as the schedulers of diffusers want it: noise − data, the negative of ours.

        Args:
            hidden_states: noisy latents [B, C, H, W].
            encoder_hidden_states: text [B, T, Dc], padded at the end.
            text_valid: real tokens of each text, [B]; None attends to the padding too.
            timestep: every loop of diffusers passes one; the network reads the time from the
                latents and has no use for it.
            return_dict: an output object with `sample`, or a tuple.

        Raises:
            UserError: shapes that do not fit.
        """
        velocity = -self.dit(hidden_states, encoder_hidden_states, text_valid)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @wraps(ModelMixin.save_pretrained)  # a pipeline looks at the signature for what it may pass on
    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, and with a model card. Raises UserError for the path of a file."""
        if Path(save_directory).is_file():
            raise UserError(f"save_directory={save_directory}: is a file; give a folder")
        write_card(Path(save_directory), self.dit, pipeline=False)
        super().save_pretrained(save_directory, *args, **kwargs)


def _rule(given: dict[str, Any]) -> RuleConfig:
    """The rule of a configuration, of a new network or of weights: nothing tells which."""
    kept = as_recorded(given)
    for name in kept:
        if kept[name] != given[name]:
            warnings.warn(
                f"rule.{name}={given[name]}: no network starts with it; {kept[name]:g} is taken, "
                "and weights that are loaded have their own",
                stacklevel=5,
            )
    return RuleConfig(**kept)
