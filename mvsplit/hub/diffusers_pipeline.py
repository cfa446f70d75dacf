"""Sampling as a pipeline of diffusers; needs the extra `hub`.

Shapes: B pictures, C, h, w of the latents, T text tokens, Dc text width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvsplit.data.text_encoder import Padding, QwenEncoder
from mvsplit.data.vae import Flux2Autoencoder
from mvsplit.errors import UserError, needs_extra
from mvsplit.hub.diffusers_model import MVSplitDiTTransformer2DModel
from mvsplit.hub.model_card import write_card
from mvsplit.models import DiT
from mvsplit.sampling import Velocity, classifier_free

with needs_extra("hub"):
    from diffusers import (
        AutoencoderKLFlux2,
        DiffusionPipeline,
        FlowMatchEulerDiscreteScheduler,
        ImagePipelineOutput,
    )
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils.torch_utils import randn_tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIFT = 4.0  # paper §5
RELEASED_CHANNELS, RELEASED_SIDE = 128, 16  # latents of 256² pictures
OUTPUTS = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text states [B, T, Dc] and how many of each count, [B]; None: all."""

    states: Tensor
    valid: Tensor | None


class MVSplitPipeline(DiffusionPipeline):
    """Prompts to pictures by Euler's method and classifier-free guidance (paper §5).

    Its latents are those of `mvsplit.sampling.euler` from the same noise: the transformer's output
    has the sign that the scheduler expects, and the scheduler shifts the times i/N.

    Args:
        transformer: the network.
        scheduler: of the times; its `shift` is that of training.
        vae: None for a network that draws pixels.
        text_encoder, tokenizer: None if text is only ever given as states.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: MVSplitDiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLFlux2 | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=self._multiple())
        self._interrupt = False

    @classmethod
    def from_dit(cls, dit: DiT, *, shift: float = SHIFT, **components: Any) -> MVSplitPipeline:
        """A pipeline around `dit` itself. `components`: vae, text_encoder, tokenizer."""
        side = RELEASED_SIDE if dit.config.channels == RELEASED_CHANNELS else None
        transformer = MVSplitDiTTransformer2DModel.from_dit(dit, sample_size=side)
        return cls(transformer, FlowMatchEulerDiscreteScheduler(shift=shift), **components)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop; what is done by then is returned."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 35,
        guidance_scale: float = 2.0,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_valid: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_valid: Tensor | None = None,
        padding: Padding = "mask",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws `num_images_per_prompt` pictures for every prompt.

        Args:
            prompt: what to draw; "" is no condition.
            height, width: in pixels; from the transformer's `sample_size` if None.
            num_inference_steps: Euler steps.
            guidance_scale: w; 1 is no guidance and half the work.
            negative_prompt: the unconditional prompt.
            num_images_per_prompt: pictures in a row for the same prompt.
            generator: of the noise; or one for each picture.
            latents: the noise itself, [B, C, h, w].
            prompt_embeds, prompt_valid: instead of a prompt: text [B, T, Dc] and the number of
                its tokens that count, [B]; None: all.
            negative_prompt_embeds, negative_prompt_valid: the same for the unconditional prompt,
                [1 or B, T', Dc].
            padding: "mask", or "attend" as in the released code.
            output_type: pil, np ([B, H, W, 3] in [0, 1]), pt ([B, 3, H, W] in [0, 1]), latent.
            return_dict: an object with `images`, or a tuple.
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": …}) after each
                step; may return {"latents": …} in place of them, or set `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs: which tensors it gets; there is only "latents".

        Raises:
            UserError: no text, or two; a size that does not divide; an unknown option.
        """
        self._check(output_type, callback_on_step_end_tensor_inputs)
        self._interrupt = False
        given = (
            _given(prompt_embeds, prompt_valid),
            _given(negative_prompt_embeds, negative_prompt_valid),
        )
        text, null = self._text(prompt, negative_prompt, given, padding, guidance_scale)
        text = _repeat(text, num_images_per_prompt)
        shape = (len(text.states), self.transformer.config.channels, *self._side(height, width))
        latents = self._noise(latents, shape, generator)
        velocity = self._velocity(text, null, guidance_scale)
        latents = self._denoise(velocity, latents, num_inference_steps, callback_on_step_end)
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, and with a model card. Raises UserError for the path of a file."""
        if Path(save_directory).is_file():
            raise UserError(f"save_directory={save_directory}: is a file; give a folder")
        encoder = self.text_encoder is not None
        write_card(Path(save_directory), self.transformer.dit, pipeline=True, encoder=encoder)
        super().save_pretrained(str(save_directory), *args, **kwargs)

    def _velocity(self, text: Text, null: Text | None, guidance: float) -> Velocity:
        """The transformer's, guided where there is an unconditional text."""
        return classifier_free(
            lambda z, states, valid: self.transformer(z, states, valid, return_dict=False)[0],
            text.states,
            text.states[:1] if null is None else null.states,
            guidance,
            text_valid=text.valid,
            null_valid=None if null is None else null.valid,
        )

    def _denoise(
        self,
        velocity: Callable[[Tensor, float], Tensor],
        latents: Tensor,
        steps: int,
        callback: Callable[..., dict[str, Tensor] | None] | None,
    ) -> Tensor:
        times = [i / steps for i in range(steps, 0, -1)]  # which the scheduler shifts, once
        self.scheduler.set_timesteps(sigmas=times, device=latents.device)
        with self.progress_bar(total=steps) as bar:
            for step, t in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    break
                v = velocity(latents, float(t)).float()  # so that the scheduler stays in fp32
                latents = self.scheduler.step(v, t, latents, return_dict=False)[0]
                if callback is not None:
                    changed = callback(self, step, t, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                bar.update()
        return latents

    def _text(
        self,
        prompt: str | Sequence[str] | None,
        negative: str,
        given: tuple[Text | None, Text | None],
        padding: Padding,
        guidance: float,
    ) -> tuple[Text, Text | None]:
        """The prompts and the unconditional one, on the device and in the network's dtype."""
        text, null = given
        if (prompt is None) == (text is None):
            raise UserError("prompt: give either a prompt or prompt_embeds")
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            both = self._encode([*prompts, negative], padding)
            text = Text(states=both.states[:-1], valid=_sliced(both.valid, slice(-1)))
            null = Text(states=both.states[-1:], valid=_sliced(both.valid, slice(-1, None)))
        if null is None and guidance != 1:
            raise UserError(
                f"guidance_scale={guidance}: prompt_embeds need negative_prompt_embeds beside them"
            )
        assert text is not None  # one of the two was given
        return self._placed(text), None if null is None else self._placed(null)

    def _encode(self, prompts: list[str], padding: Padding) -> Text:
        if self.text_encoder is None or self.tokenizer is None:
            raise UserError(
                "prompt: this pipeline has no text encoder; load it with text_encoder=… and "
                "tokenizer=…, or give prompt_embeds"
            )
        states, valid = QwenEncoder(self.tokenizer, self.text_encoder, padding=padding).encode(
            prompts
        )
        return Text(states=states, valid=None if padding == "attend" else valid)

    def _placed(self, text: Text) -> Text:
        device, dtype = self._execution_device, self.transformer.dtype
        valid = None if text.valid is None else text.valid.to(device)
        return Text(states=text.states.to(device, dtype), valid=valid)

    def _side(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the latents."""
        multiple = self._multiple()
        default = self.transformer.config.sample_size
        sides = []
        for name, value in (("height", height), ("width", width)):
            if value is None and default is None:
                raise UserError(f"{name}: give it; these weights do not say how large they draw")
            pixels = default * multiple if value is None else value
            step = multiple * self.transformer.config.patch
            if pixels < step or pixels % step:
                raise UserError(f"{name}={pixels}: must be a multiple of {step}")
            sides.append(pixels // multiple)
        return sides[0], sides[1]

    def _noise(
        self,
        latents: Tensor | None,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if len(latents) != shape[0] or latents.shape[1] != shape[1]:
            raise UserError(
                f"latents have shape {list(latents.shape)}; expected {list(shape[:2])} and a size"
            )
        return latents.to(device, torch.float32)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        pixels = latents if self.vae is None else Flux2Autoencoder(self.vae).decode(latents)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _multiple(self) -> int:
        """Pixels a latent."""
        return 1 if self.vae is None else Flux2Autoencoder(self.vae).multiple

    @staticmethod
    def _check(output_type: str, tensors: Sequence[str]) -> None:
        if output_type not in OUTPUTS:
            raise UserError(f"output_type={output_type!r} is unknown: choose {', '.join(OUTPUTS)}")
        if unknown := set(tensors) - set(MVSplitPipeline._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs: {', '.join(sorted(unknown))} is not among "
                f"{', '.join(MVSplitPipeline._callback_tensor_inputs)}"
            )


def _given(states: Tensor | None, valid: Tensor | None) -> Text | None:
    return None if states is None else Text(states=states, valid=valid)


def _sliced(valid: Tensor | None, rows: slice) -> Tensor | None:
    return None if valid is None else valid[rows]


def _repeat(text: Text, times: int) -> Text:
    valid = None if text.valid is None else text.valid.repeat_interleave(times, 0)
    return Text(states=text.states.repeat_interleave(times, 0), valid=valid)
