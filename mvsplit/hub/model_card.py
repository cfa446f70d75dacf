"""The model card that goes with saved weights."""

from __future__ import annotations

from pathlib import Path

from mvsplit.models import DiT

_CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- mvsplit
- rectified-flow
---

# Diffusion transformer of {depth} layers

| | |
|---|---|
| parameters | {parameters:,} |
| layers, width | {depth}, {width} |
| heads, key/value heads | {heads}, {kv_heads} |
| FFN width | {ffn_width} |
| latents | {channels} channels, patches of {patch}×{patch} |
| text states | width {text_width} |
| residual rule | `{rule}` |
| dtype | {dtype} |

A single-stream transformer without timestep input, trained as a rectified flow (arXiv 2605.06169).
`forward` returns noise − data, which `FlowMatchEulerDiscreteScheduler` steps along; the time shift
is the scheduler's `shift`.

## Use

```python
{usage}
```

Needs `pip install 'mvsplit[hub]'`. Text is padded at the end; with `text_valid` the padding has
no influence, without it the network attends to the padding.

## Training data, intended use, limits

Not stated by the program that wrote this card. Whoever publishes the weights should say here what
they were trained on, under which licence they are, and what they should not be used for.
"""
_PIPELINE = """\
from mvsplit.hub import MVSplitPipeline

pipeline = MVSplitPipeline.from_pretrained("THIS FOLDER")
picture = pipeline("a red circle", num_inference_steps=35, guidance_scale=2.0).images[0]"""
_STATES = """\
from mvsplit.hub import MVSplitPipeline

# This folder holds no text encoder. Give that of the training, and its VAE if it had one,
pipeline = MVSplitPipeline.from_pretrained("THIS FOLDER", text_encoder=…, tokenizer=…, vae=…)
picture = pipeline("a prompt", height=…, width=…).images[0]

# or, of a run of ours on words, what its embedder makes of them:
from mvsplit.training import load_run

embedder = load_run("THE RUN").embedder
text, null = embedder.encode(["a prompt"]), embedder.encode([""])
pipeline = MVSplitPipeline.from_pretrained("THIS FOLDER")
picture = pipeline(
    prompt_embeds=text[0], prompt_valid=text[1],
    negative_prompt_embeds=null[0], negative_prompt_valid=null[1],
    height=…, width=…,
).images[0]"""
_MODEL = """\
from mvsplit.hub import MVSplitDiTTransformer2DModel

model = MVSplitDiTTransformer2DModel.from_pretrained("THIS FOLDER")
velocity = model(latents, text, text_valid).sample"""


def write_card(folder: Path, model: DiT, *, pipeline: bool, encoder: bool = False) -> None:
    """Writes README.md for the hub into `folder`, which may be new. One that is there stays, so
    that what was written into it by hand is not lost.

    Args:
        folder: of the weights.
        model: whose facts it states.
        pipeline: whether the folder holds a pipeline, or the network alone.
        encoder: whether the pipeline has a text encoder, so that it takes prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    if not path.exists():
        path.write_text(card(model, pipeline=pipeline, encoder=encoder), encoding="utf-8")


def card(model: DiT, *, pipeline: bool, encoder: bool = False) -> str:
    """The card's text, with the facts of `model`; arguments as of `write_card`."""
    drawn = _PIPELINE if encoder else _STATES
    config = model.config
    return _CARD.format(
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        kv_heads=config.groups,
        ffn_width=config.ffn_width,
        channels=config.channels,
        patch=config.patch,
        text_width=config.text_width,
        rule=config.rule.name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        usage=drawn if pipeline else _MODEL,
    )
