"""Finds what to watch in a transformer that is not ours, by its structure.

It reads the module tree alone: lists of blocks that hold an attention, in it the projections by the
names that the common libraries give them (timm, diffusers, transformers), and the FFN by its shape.
Where these names find no blocks, models written by hand are read by `hand_written`. Names given by
the caller come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

from torch import nn

from mvsplit.diagnostics.hand_written import (
    candidates,
    find_members,
    find_named,
    linear_maps,
    read_attention,
)
from mvsplit.diagnostics.taps import BranchTap, LayerTap, ParameterRows, taps_for_dit
from mvsplit.errors import UserError, nearest
from mvsplit.models import DiT

FindAttention = Callable[[nn.Module], nn.Module | None]

QUERIES = ("to_q", "q_proj", "query", "wq", "c_q")
KEYS = ("to_k", "k_proj", "key", "wk", "c_k")
PACKED = ("qkv", "to_qkv", "qkv_proj", "Wqkv", "query_key_value", "c_attn")
ATTENTION_WRITERS = (
    "to_out.0",
    "o_proj",
    "proj",
    "out_proj",
    "wo",
    "dense",
    "c_proj",
    "to_out",
    "out",
)


@dataclass(frozen=True, kw_only=True)
class TapNames:
    """Dotted names that override what is found: `blocks` in the model, the others in each block.

    The end of a name will do where only one module has it: "q" for "attn.q".

    Attributes:
        blocks: a ModuleList or Sequential of blocks, "transformer.layers".
        writer_attn, writer_ffn: W_O and W_2, "attn.out".
        query, key: Q and K projections that are not packed.
        batch_first: whether the trunk is [B, T, D] and not [T, B, D]; None for what PyTorch's own
            attention in a block says, and [B, T, D] where there is none.
    """

    blocks: str | None = None
    writer_attn: str | None = None
    writer_ffn: str | None = None
    query: str | None = None
    key: str | None = None
    batch_first: bool | None = None


def find_taps(model: nn.Module, names: TapNames | None = None) -> list[LayerTap]:
    """The taps of every block of a transformer, in the order in which the model registers them.

    The trunk of a block with two streams is the first that it is given. PyTorch's own
    nn.MultiheadAttention shows the gradients of its parts and nothing else. A block whose attention
    and FFN share one writer (Flux's single-stream blocks) reports it as the FFN's. A block without
    attention is watched where `names.blocks` says that it is one, for what it has.

    Raises:
        UserError: no blocks were found, a given name does not exist or is the end of several, or
            `names` are no TapNames.
    """
    _check_names(names)
    model = unwrapped(model)
    if isinstance(model, DiT) and names is None:
        return taps_for_dit(model)
    names = names or TapNames()
    blocks = list(_named_blocks(model, names.blocks) if names.blocks else _all_blocks(model))
    if not blocks:
        raise UserError(_no_blocks(model))
    return [_tap(layer, unwrapped(block), names) for layer, block in enumerate(blocks)]


def _no_blocks(model: nn.Module) -> str:
    message = (
        f"no transformer blocks were found in {type(model).__name__}; name their list, for "
        f"example names=TapNames(blocks='transformer.layers'), from mvsplit.diagnostics, and in "
        f"each block what has a name of its own: query='q', key='k', writer_attn='o'"
    )
    found = candidates(model)
    return f"{message}; lists that may be it: {found}" if found else message


def _check_names(names: object) -> None:
    """Refuses what is no TapNames, a mapping above all, and says what to write."""
    known = [field.name for field in fields(TapNames)]
    if names is None:
        return
    given = repr(names) if isinstance(names, str) else type(names).__name__
    if isinstance(names, Mapping):
        for key in names:
            if key not in known:
                raise UserError(f"names: TapNames have no {key!r}; {nearest(str(key), known)}")
        given += " of " + ", ".join(map(repr, names))
    if not isinstance(names, TapNames):
        raise UserError(
            f"names={given}: expected TapNames, from mvsplit.diagnostics; write "
            f"names=TapNames({_written(names)})"
        )
    for key in ("blocks", "writer_attn", "writer_ffn", "query", "key"):
        value = getattr(names, key)
        if not isinstance(value, str | None):
            raise UserError(
                f"names.{key} is a {type(value).__name__}: expected the dotted name of a module, "
                f"for example 'attn.out'; model.named_modules() lists them"
            )


def _written(names: object) -> str:
    """The arguments of TapNames that a mapping was meant for; an example for anything else."""
    meant = names if isinstance(names, Mapping) and names else {"blocks": "transformer.layers"}
    return ", ".join(f"{k}={v!r}" for k, v in meant.items() if isinstance(v, str | bool | None))


# Where DistributedDataParallel, torch.compile and PyTorch's checkpoint wrapper keep what they wrap.
_WRAPPED = ("module", "_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that hold nothing else."""
    children = dict(module.named_children())
    if len(children) == 1 and (name := next(iter(children))) in _WRAPPED:
        return unwrapped(children[name])
    return module


def _named_blocks(model: nn.Module, name: str) -> Iterator[nn.Module]:
    yield from _get(model, name, candidates(model)).children()


def _all_blocks(model: nn.Module) -> list[nn.Module]:
    """By what the libraries do; only where that finds nothing by what people do."""
    return (
        list(_find_blocks(model, _find_attention))
        or list(_find_blocks(model, _any_attention))
        or list(find_members(model, _any_attention, _is_block))
    )


def _find_blocks(module: nn.Module, attention: FindAttention) -> Iterator[nn.Module]:
    """Members of the outermost lists that all hold an attention, depth first."""
    for child in module.children():
        members = list(child.children())
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_list and members and all(attention(m) for m in members):
            yield from members
        else:
            yield from _find_blocks(child, attention)


def _is_block(module: nn.Module) -> bool:
    """Whether an attention is not all that it is."""
    module = unwrapped(module)
    if (attention := _any_attention(module)) is not module:
        return True
    width = _find_queries(attention)[2]
    return _find_ffn_writer(module, width, _any_attention) is not None


def _get(module: nn.Module, name: str, told: str = "") -> nn.Module:
    """The module of that dotted name, or the one whose name ends in it; `told` is what an error
    says of others, its linear maps if nothing."""
    found = find_named(module, name)
    if len(found) == 1:
        return found[0][1]
    if found:
        raise UserError(
            f"{type(module).__name__} has {len(found)} modules {name!r}: name one of "
            f"{', '.join(full for full, _ in found)}"
        )
    known = [n for n, _ in module.named_modules() if n]
    near = nearest(name, known[:200], listed=[told or linear_maps(module)])
    raise UserError(f"{type(module).__name__} has no module {name!r}; {near}")


def _first_linear(module: nn.Module, names: tuple[str, ...]) -> nn.Linear | None:
    """The first of `names` that is a linear map under `module`."""
    for name in names:
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)  # type: ignore[assignment]
        if isinstance(found, nn.Linear):
            return found
    return None


def _find_attention(block: nn.Module) -> nn.Module | None:
    """The first module of a block that makes queries: its self-attention."""
    return next(
        (
            m
            for m in block.modules()
            if isinstance(m, nn.MultiheadAttention) or _first_linear(m, QUERIES + PACKED)
        ),
        None,
    )


def _any_attention(block: nn.Module) -> nn.Module | None:
    """`_find_attention`, and where there is none one written by hand."""
    return _find_attention(block) or next((m for m in block.modules() if read_attention(m)), None)


def _tap(layer: int, block: nn.Module, names: TapNames) -> LayerTap:
    finder = _find_attention if _find_attention(block) else _any_attention
    attention = finder(block)
    query, key, width = _find_queries(attention) if attention else (None, None, None)
    writers = {
        "attn": _writer_of(attention) if attention else None,
        "ffn": _find_ffn_writer(block, width or _input_width(block), finder),
    }
    if names.query:
        query = _rows(_get(block, names.query))
    if names.key:
        key = _rows(_get(block, names.key))
    branches = []
    for name, override in (("attn", names.writer_attn), ("ffn", names.writer_ffn)):
        writer = _get(block, override) if override else writers[name]
        if writer is not None:
            # Only the first branch is sure to join the trunk as it entered the block.
            trunk_at = block if name == "attn" else None
            called = not isinstance(attention, nn.MultiheadAttention) or override is not None
            branches.append(
                BranchTap(
                    name=name,  # type: ignore[arg-type]
                    writer=writer,
                    trunk_at=trunk_at,
                    called=called or name == "ffn",
                )
            )
    return LayerTap(
        layer=layer,
        block=block,
        branches=tuple(branches),
        query=query,
        key=key,
        batch_first=_is_batch_first(block) if names.batch_first is None else names.batch_first,
    )


def attention_writer(module: nn.Module) -> nn.Linear | None:
    """W_O of an attention, by the names that the common libraries give it."""
    return _first_linear(module, ATTENTION_WRITERS)


def _writer_of(attention: nn.Module) -> nn.Linear | None:
    """`attention_writer`, and before it what one by hand that no library names says itself."""
    own = None if _find_attention(attention) is attention else read_attention(attention)
    return (own and own.writer) or attention_writer(attention)


def _is_batch_first(block: nn.Module) -> bool:
    attentions = [m for m in block.modules() if isinstance(m, nn.MultiheadAttention)]
    return all(attention.batch_first for attention in attentions)


def _input_width(block: nn.Module) -> int | None:
    """The width of what the first linear map of a block without attention reads."""
    return next((m.in_features for m in block.modules() if isinstance(m, nn.Linear)), None)


def _rows(
    projection: nn.Module, start: int = 0, stop: int | None = None, weight: str = "weight"
) -> ParameterRows:
    return ParameterRows(projection=projection, start=start, stop=stop, weight=weight)


def _find_queries(
    attention: nn.Module,
) -> tuple[ParameterRows, ParameterRows | None, int]:
    """Q and K of an attention, and the width of its input. Of a packed projection Q has as many
    rows as the writer has inputs, K and V share the rest."""
    if isinstance(attention, nn.MultiheadAttention):
        return _find_own_queries(attention)
    packed, query = _first_linear(attention, PACKED), _first_linear(attention, QUERIES)
    if packed is not None:
        writer = attention_writer(attention)
        queries = packed.out_features // 3 if writer is None else writer.in_features
        keys = queries + (packed.out_features - queries) // 2
        return _rows(packed, 0, queries), _rows(packed, queries, keys), packed.in_features
    if query is None:
        own = read_attention(attention)
        assert own is not None  # this module was chosen for its queries
        return _rows(own.query), _rows(own.key), own.query.in_features
    key = _first_linear(attention, KEYS)
    return _rows(query), None if key is None else _rows(key), query.in_features


def _find_own_queries(
    attention: nn.MultiheadAttention,
) -> tuple[ParameterRows, ParameterRows, int]:
    """`_find_queries` of PyTorch's own attention: packed in one parameter, or in one each where
    keys have another width."""
    width = attention.embed_dim
    if attention.in_proj_weight is None:
        query, key = (_rows(attention, weight=f"{name}_proj_weight") for name in "qk")
    else:
        query = _rows(attention, 0, width, weight="in_proj_weight")
        key = _rows(attention, width, 2 * width, weight="in_proj_weight")
    return query, key, width


def _find_ffn_writer(
    block: nn.Module, width: int | None, attention: FindAttention
) -> nn.Linear | None:
    """The last map of the first child that leads from the trunk's width and back to it, and holds
    no attention; or of the block's own maps; or, where attention and FFN run side by side, the
    block's own map from more than its width to it."""
    for child in block.children():
        linears = [m for m in child.modules() if isinstance(m, nn.Linear)]
        if len(linears) >= 2 and not attention(child):
            first, last = linears[0], linears[-1]
            if first.in_features == width == last.out_features:
                return last
    by_hand = read_attention(block) if attention is _any_attention else None
    taken = by_hand.maps if by_hand else ()
    own = [m for m in block.children() if isinstance(m, nn.Linear) and m not in taken]
    if len(own) >= 2 and own[0].in_features == width == own[-1].out_features:
        return own[-1]
    return next((m for m in own if width and m.out_features == width < m.in_features), None)
