"""Attentions and blocks of models written by hand, whose names no library gives.

`mvsplit.diagnostics.structure` asks here only where the names of the libraries find nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

_TRIPLES = (
    ("query", "key", "value"),
    ("queries", "keys", "values"),
    ("q", "k", "v"),
    ("Q", "K", "V"),
)
_WRITERS = ("o", "O", "out", "output")
_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_NAMED_AT_MOST = 3  # candidates in a message
_MAPS_AT_MOST = 8  # of a block in a message

IsBlock = Callable[[nn.Module], bool]


@dataclass(frozen=True)
class Attention:
    """Maps of an attention; `writer` is None where it is not certain."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    writer: nn.Linear | None

    @property
    def maps(self) -> tuple[nn.Linear | None, ...]:
        """All of them."""
        return self.query, self.key, self.value, self.writer


def read_attention(module: nn.Module) -> Attention | None:
    """The attention whose three maps `module` itself holds, by names that differ in one word only:
    q, k, v; w_q, w_k, w_v; q_lin, k_lin, v_lin. None where there is no such three
    or several."""
    maps = {name: m for name, m in module.named_children() if isinstance(m, nn.Linear)}
    found = {tuple(names): words for names, words in _named_alike(maps)}
    if len(found) != 1:
        return None
    (names, words) = next(iter(found.items()))
    query, key, value = (maps[name] for name in names)
    if key.in_features != value.in_features:
        return None
    # Before the shapes: beside an FFN as wide as the trunk they do not tell.
    alike = [names[0].replace(words[0], word) for word in _WRITERS]
    writer = next((maps[name] for name in alike if name in maps), None)
    return Attention(query, key, value, writer or _only_way_back(module, (query, key, value)))


def _named_alike(maps: dict[str, nn.Linear]) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    for name in maps:
        for words in _TRIPLES:
            names = [name.replace(words[0], word) for word in words]
            if name.count(words[0]) == 1 and all(each in maps for each in names):
                yield names, words


def _only_way_back(module: nn.Module, known: tuple[nn.Linear, ...]) -> nn.Linear | None:
    """The one other map under `module` that leads from the heads back to the trunk."""
    query = known[0]
    others = [m for m in module.modules() if isinstance(m, nn.Linear) and m not in known]
    back = [
        m
        for m in others
        if (m.in_features, m.out_features) == (query.out_features, query.in_features)
    ]
    return back[0] if len(back) == 1 else None


def find_members(
    module: nn.Module, attention: Callable[[nn.Module], nn.Module | None], is_block: IsBlock
) -> Iterator[nn.Module]:
    """Blocks that share a container with an embedding or a head, or are attributes of one class,
    depth first; `attention` finds one in a module, `is_block` says that it is not all there is."""
    holders = [m for m in module.children() if attention(m) is not None]
    alike = len({type(m) for m in holders}) == 1
    listed = isinstance(module, _CONTAINERS)
    if len(holders) > 1 and (listed or alike) and all(map(is_block, holders)):
        yield from holders
        return
    for holder in holders:
        below = list(find_members(holder, attention, is_block))
        yield from below or ([holder] if listed and is_block(holder) else [])


def candidates(model: nn.Module) -> str:
    """Lists that may be the blocks, and what the first of each holds, for a message; "" for none.

    A list counts from two members of one class on that hold linear maps.
    """
    told = []
    for name, module in model.named_modules():
        members = list(module.children())
        if not name or not isinstance(module, _CONTAINERS) or len(members) < 2:
            continue
        maps = linear_maps(members[0])
        if len({type(m) for m in members}) == 1 and maps:
            count = f"{len(members)} × {type(members[0]).__name__}"
            told.append(f"blocks={name!r} ({count} with {maps})")
    return "; ".join(told[:_NAMED_AT_MOST])


def linear_maps(block: nn.Module) -> str:
    """The names of the linear maps in a block, the first of them where they are many."""
    names = [name for name, m in block.named_modules() if name and isinstance(m, nn.Linear)]
    return ", ".join(names[:_MAPS_AT_MOST]) + (", …" if len(names) > _MAPS_AT_MOST else "")


def find_named(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """What `name` can mean within `module`: its module of that name, else those whose dotted names
    end in it."""
    named = dict(module.named_modules())
    if name in named:
        return [(name, named[name])]
    return [(full, found) for full, found in named.items() if full.endswith(f".{name}")]
