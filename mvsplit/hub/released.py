"""The released checkpoint's layout and ours, in both directions (paper §8).

The layouts differ in names, in our packed query-key-value projection, and in the patch embedding,
which they keep as a convolution [D, C, p, p] and we as a matrix [D, C·p·p] with the same order of
values. Nothing is guessed: every key of a file is either used, or known to be all ones, or refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mvsplit.errors import UserError
from mvsplit.hub.fill import Shape, fill_in
from mvsplit.hub.stored import Stored, in_memory, read_weights, unwrap
from mvsplit.models import DiT, DiTConfig
from mvsplit.residuals import RuleConfig

_RENAMED = (  # ours, released
    ("patch_in.", "patch_embed.patch_proj."),
    ("text_in.", "context_proj."),
    ("head.", "final_proj."),
    (".attention.", ".operator."),
    (".rule_attention.", ".fused_mvsplit_norm1."),
    (".rule_ffn.", ".fused_mvsplit_norm2."),
)
_INPUT_NORMS = ("norm_img_input.weight", "norm_text_input.weight")
_ONES = re.compile(  # weights of norms that training may have left in the file, always one
    r"blocks\.\d+\.(fused_mvsplit_norm[12]|operator\.qk_norm\.(query|key)_norm)\.weight"
)
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_NAMED_AT_MOST = 20  # keys of one kind in an error message
_HEADS = "mvsplit.heads"  # in a safetensors file's metadata: what the shapes do not tell


@dataclass(frozen=True, kw_only=True)
class LikelyHeads:
    """How many query heads a network probably has whose file does not say it.

    Attributes:
        count: the heads.
        whose: of whom this number is, for people.
        option: what sets another one.
    """

    count: int
    whose: str
    option: str


def load_released(
    source: str | Path | Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    likely_heads: LikelyHeads | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DiT:
    """The DiT of a checkpoint in the released layout.

    Width, depth, FFN, channels, patch, text width, key/value heads and biases come from the
    shapes. The model owns its memory. A file is read tensor by tensor, each straight to its dtype
    and device, so that the peak is one model and one tensor.

    Args:
        source: a `.safetensors` file, or the index file of its shards; a `.pt` file with the
            state dict itself or under "model" or "state_dict"; or such a dict.
        num_heads: query heads; if None, those that `released_metadata` left in the file, or
            width / 128, with a warning, for no shape shows whether that is right.
        num_kv_heads: key/value heads; from the rows of `k_proj` if None.
        likely_heads: what `num_heads` is instead of width / 128, with a warning too.
        dtype: of all parameters; as in the source if None.
        device: of all parameters.

    Raises:
        UserError: a file that cannot be read; missing, unknown or wrong-shaped keys, all of them
            named in one message; norm weights that are not one, which this model has not; a
            tensor with values that are not finite.
    """
    if isinstance(source, str | Path):
        file = read_weights(Path(source))
        tensors, metadata = file.tensors, file.metadata
    else:
        tensors, metadata = in_memory(unwrap(source, "source")), {}
    if num_heads is None and _HEADS in metadata:
        num_heads = json.loads(metadata[_HEADS])
    if num_heads is None and likely_heads is not None:
        num_heads = _taken(likely_heads, tensors, num_kv_heads)
    config = _infer_config(tensors, num_heads, num_kv_heads)
    with torch.device("meta"):
        model = DiT(config)
    layout = released_layout(model)
    _check(tensors, {key: shape for parts in layout.values() for key, shape in parts.items()})
    fill_in(model, tensors, layout, dtype=dtype, device=device)
    return model


def released_metadata(model: DiT) -> dict[str, str]:
    """What `load_released` cannot read from the shapes, for the metadata of a safetensors file."""
    return {"format": "pt", _HEADS: json.dumps(model.config.heads)}


def export_released(model: DiT) -> dict[str, Tensor]:
    """The state dict of `model` in the released layout; the inverse of `load_released`.

    Tensors share the model's memory, but for q, k and v, which are copies of the packed rows.

    Raises:
        UserError: the released code has no such model: another rule, or another ε or θ.
    """
    _check_exportable(model.config)
    exported = {}
    layout = released_layout(model)
    for name, parameter in model.named_parameters():
        shapes = layout[name]
        rows = parameter.detach().split([shape[0] for shape in shapes.values()])
        for (key, shape), part in zip(shapes.items(), rows, strict=True):
            exported[key] = part.clone() if len(shapes) > 1 else part.reshape(shape)
    for key in _INPUT_NORMS:
        exported[key] = torch.ones_like(model.patch_in.weight[:, 0])
    return exported


def released_layout(model: DiT) -> dict[str, dict[str, Shape]]:
    """For each of our parameters, the released keys and shapes whose rows it stacks, in order."""
    return {
        name: _parts(name, tuple(parameter.shape), model.config)
        for name, parameter in model.named_parameters()
    }


def _parts(name: str, shape: Shape, config: DiTConfig) -> dict[str, Shape]:
    key = name
    for ours, released in _RENAMED:
        key = key.replace(ours, released)
    if ".qkv." in key:
        kv_rows = config.groups * config.head_width
        rows = {"q_proj": config.width, "k_proj": kv_rows, "v_proj": kv_rows}
        return {key.replace("qkv", part): (n, *shape[1:]) for part, n in rows.items()}
    if name == "patch_in.weight":
        return {key: (config.width, config.channels, config.patch, config.patch)}
    return {key: shape}


# From the tensors to the configuration


def _infer_config(
    tensors: Mapping[str, Stored], num_heads: int | None, num_kv_heads: int | None
) -> DiTConfig:
    width, channels, patch, kv_rows, ffn_width = _sizes(tensors)
    heads = _heads(width, num_heads)
    return DiTConfig(
        depth=_depth(tensors),
        width=width,
        heads=heads,
        kv_heads=_kv_heads(kv_rows, width, heads) if num_kv_heads is None else num_kv_heads,
        ffn_width=ffn_width,
        channels=channels,
        patch=patch,
        text_width=_text_width(tensors, width),
        attention_bias=_any_block(tensors, r"operator\.[qkv]_proj\.bias"),
        ffn_bias=_any_block(tensors, r"ffn\.w(13|2)\.bias"),
        rule=RuleConfig(name="mvsplit"),
    )


def _sizes(tensors: Mapping[str, Stored]) -> tuple[int, int, int, int, int]:
    """Width, channels, patch, rows of k_proj, FFN width: the sizes that three shapes hold."""
    patch = tensors.get("patch_embed.patch_proj.weight")
    k_proj = _usual_shape(tensors, "operator.k_proj.weight")
    w2 = _usual_shape(tensors, "ffn.w2.weight")
    if patch is None or k_proj is None or w2 is None:
        names = _names(max(_depth(tensors), 1))
        _refuse_another_layout(tensors, names)
        raise UserError(_faults(missing=[key for key in names if key not in tensors]))
    if len(patch.shape) != 4 or len(k_proj) != 2 or len(w2) != 2:
        raise UserError(
            f"checkpoint: patch_embed.patch_proj.weight {list(patch.shape)}, operator.k_proj.weight"
            f" {list(k_proj)} and ffn.w2.weight {list(w2)} must have 4, 2 and 2 axes"
        )
    return patch.shape[0], patch.shape[1], patch.shape[2], k_proj[0], w2[1]


def _text_width(tensors: Mapping[str, Stored], width: int) -> int:
    context = tensors.get("context_proj.weight")
    return width if context is None else context.shape[-1]


def released_ends(tensors: Mapping[str, Stored]) -> tuple[int, int]:
    """Channels of the latents and width of the text states. Raises UserError for another layout."""
    width, channels, *_ = _sizes(tensors)
    return channels, _text_width(tensors, width)


def _depth(tensors: Mapping[str, Stored]) -> int:
    return 1 + max((int(m[1]) for m in map(_BLOCK.match, tensors) if m), default=-1)


def _names(depth: int) -> list[str]:
    """The keys that every checkpoint of this depth has, whatever its sizes."""
    with torch.device("meta"):
        model = DiT(DiTConfig(depth=depth, width=4, heads=1, ffn_width=1, channels=1, text_width=4))
    return [*(key for parts in released_layout(model).values() for key in parts), *_INPUT_NORMS]


def _heads(width: int, num_heads: int | None) -> int:
    if num_heads is not None:
        return num_heads
    if width % 128:
        raise UserError(
            f"num_heads: the default, width / 128, is not a whole number at width {width}; "
            "give that of the training, for 2 heads --num-heads 2 (num_heads=2)"
        )
    warnings.warn(
        f"heads guessed as {width // 128} from width / 128, for the file does not hold their "
        "number; give --num-heads (num_heads)",
        stacklevel=4,  # the caller of load_released
    )
    return width // 128


def _taken(likely: LikelyHeads, tensors: Mapping[str, Stored], num_kv_heads: int | None) -> int:
    """The likely number, said aloud; an error where the shapes tell that it cannot be."""
    width, *_, kv_rows, _ = _sizes(tensors)
    if num_kv_heads is None and not _are_heads(width, kv_rows, likely.count):
        raise UserError(
            f"{likely.option} {likely.count} ({likely.whose}): the {width} rows of q_proj and "
            f"{kv_rows} rows of k_proj are not a whole number of heads, and the file does not hold "
            f"their number; give that of the training with {likely.option}"
        )
    warnings.warn(
        f"heads taken as {likely.count}, {likely.whose}, for the file does not hold their number; "
        f"if the network was trained with another, give it with {likely.option}",
        stacklevel=4,  # the caller of load_weights
    )
    return likely.count


def heads_unsaid(config: DiTConfig) -> str | None:
    """What to say where a file without metadata is written whose heads would be guessed wrongly."""
    if config.heads * 128 == config.width:
        return None
    return (
        f"the file does not hold the number of heads ({config.heads}); give --num-heads "
        f"{config.heads} when it is read"
    )


def _kv_heads(rows: int, width: int, heads: int) -> int:
    if not _are_heads(width, rows, heads):
        raise UserError(
            f"num_heads={heads}: the {width} rows of q_proj and {rows} rows of k_proj are not a "
            "whole number of heads; give the num_heads that the model was trained with"
        )
    return rows * heads // width


def _are_heads(width: int, rows: int, heads: int) -> bool:
    """Whether the rows of q_proj and of k_proj are whole heads."""
    return heads >= 1 and width % heads == 0 and rows % (width // heads) == 0


def _usual_shape(tensors: Mapping[str, Stored], suffix: str) -> Shape | None:
    """The commonest shape among the blocks, so that one wrong block is the one that is named."""
    shapes = [tuple(t.shape) for key, t in tensors.items() if _in_block(key) == suffix]
    return Counter(shapes).most_common(1)[0][0] if shapes else None


def _any_block(tensors: Mapping[str, Stored], pattern: str) -> bool:
    return any(re.fullmatch(pattern, _in_block(key)) for key in tensors)


def _in_block(key: str) -> str:
    """`key` without its "blocks.N."; empty if it belongs to no block."""
    match = _BLOCK.match(key)
    return key[match.end() :] if match else ""


# What is refused


def _refuse_another_layout(tensors: Mapping[str, Stored], names: list[str]) -> None:
    if not set(names) & tensors.keys():
        found = ", ".join(list(tensors)[:3]) or "no tensor at all"
        raise UserError(
            f"checkpoint is not in the released layout but in another: it holds {found}, and none "
            f"of {names[0]}, {names[1]}, …; these weights are of another model"
        )


def _check(tensors: Mapping[str, Stored], expected: dict[str, Shape]) -> None:
    width = expected["patch_embed.patch_proj.weight"][:1]
    expected = expected | dict.fromkeys(_INPUT_NORMS, width)
    ones = {key for key in tensors if key in _INPUT_NORMS or _ONES.fullmatch(key)}
    faults = _faults(
        missing=[key for key in expected if key not in tensors],
        unknown=[key for key in tensors if key not in expected and key not in ones],
        wrong_shape=[
            f"{key} {list(tensors[key].shape)} (expected {list(shape)})"
            for key, shape in expected.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ],
        not_all_ones=[
            key for key in tensors if key in ones and not (tensors[key].read() == 1).all()
        ],
    )
    if faults:
        raise UserError(faults)


def _faults(**keys_by_kind: list[str]) -> str:
    """One line that names every fault; empty if there is none."""
    told = []
    for kind, keys in keys_by_kind.items():
        if keys:
            more = f" and {len(keys) - _NAMED_AT_MOST} more" if len(keys) > _NAMED_AT_MOST else ""
            told.append(f"{kind.replace('_', ' ')}: {', '.join(keys[:_NAMED_AT_MOST])}{more}")
    return f"checkpoint is not in the released layout; {'; '.join(told)}" if told else ""


def _check_exportable(config: DiTConfig) -> None:
    rule = config.rule
    fixed = {  # what the released code has built in: the value here, the value there
        "model.rule.name": (rule.name, "mvsplit"),
        "model.rule.tied_leak": (rule.tied_leak, True),
        "model.rule.eps": (rule.eps, 1e-5),
        "model.norm_eps": (config.norm_eps, 1e-5),
        "model.qk_eps": (config.qk_eps, 1e-6),
        "model.rope_theta": (config.rope_theta, 10_000.0),
        "model.patch_frames": (config.patch_frames, 1),
        "model.mean": (config.mean, "clip"),
    }
    for name, (value, needed) in fixed.items():
        if value != needed:
            raise UserError(
                f"{name}={value!r}: the released layout can only hold {needed!r}; use --to "
                "checkpoint or --to diffusers (mvsplit grow: a folder as --out)"
            )
