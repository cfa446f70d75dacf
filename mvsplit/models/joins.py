"""Finds where the branches of a block that is not ours join its trunk, and puts rules there.

A block's forward is traced once (`torch.fx`), with its parts as leaves, on arguments that it has
really been given; the trunk is the first of them. A join is a sum of which one term is the trunk as
it is by then and the other, of the same shape, has been through a part that read it; the sum is the
next trunk. That holds for x + F(N x), for gated branches such as adaLN-Zero's x + g·F(N x), where
g·F is what joins, and for N(x + F x). A learned vector that multiplies the branch last
(LayerScale's γ) is recognised by what it does, and becomes the gains of the rule.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mvsplit.errors import UserError
from mvsplit.kernels import Segments
from mvsplit.residuals import Branch, MVSplit, RuleConfig, UnnormedMVSplit

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


class Join(nn.Module):
    """A rule where a sum was.

    Args:
        rule: how the branch joins the trunk.
        prefix: tokens at the start that are a segment of their own.
    """

    def __init__(self, rule: MVSplit, prefix: int) -> None:
        super().__init__()
        self.rule, self.prefix = rule, prefix

    def forward(self, x: Tensor, f: Tensor) -> Tensor:
        """The next trunk from the trunk and the branch, both [B, T, D], in the dtype of a sum.

        Raises:
            UserError: the trunk has fewer tokens than the prefix.
        """
        tokens = x.shape[1]
        if tokens < self.prefix:
            raise UserError(f"prefix={self.prefix}: the trunk has {tokens} tokens; use fewer")
        dtype = torch.promote_types(x.dtype, f.dtype)
        segments = Segments((self.prefix, tokens - self.prefix) if self.prefix else (tokens,))
        return self.rule.merge(x.to(dtype), f.to(dtype), segments)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A join in the graph of a block.

    Attributes:
        node: the sum.
        trunk, branch: its terms; of the branch, what is left once γ is taken out.
        gamma: the name of the vector that scaled the branch, and the vector [D]; None without.
        scale: the node that multiplied by it, and what it multiplied.
        parts: the names of the parts of the block that the branch runs, from the join backwards.
    """

    node: fx.Node
    trunk: fx.Node
    branch: fx.Node
    parts: tuple[str, ...]
    gamma: tuple[str, nn.Parameter] | None = None
    scale: tuple[fx.Node, fx.Node] | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments that a block was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def with_rules(
    block: nn.Module, call: Call, prefix: int, *, absorb: bool = True
) -> tuple[fx.GraphModule, list[Found]]:
    """A block with the same parts and an MV-Split rule with a free leak in each join, at β = α = 1,
    or γ, and λ = 0: it computes what `block` does. The rules are its parts `join0`, `join1`, ….

    Args:
        block: a block whose trunk [B, T, D] is the first tensor that it is given; it is left as
            it is.
        call: arguments of a real call. What is None or a plain value there has to be so later.
        prefix: tokens at the start that are a segment of their own.
        absorb: let the gains take over γ; False leaves it in the branch.

    Raises:
        UserError: the block cannot be traced, it has no join, or its output is not the trunk after
            the last.
    """
    graph = _trace(block, call)
    found = _joins(block, graph, absorb)
    joins: dict[str, Join] = {}
    now: dict[fx.Node, fx.Node] = {}  # what came in the place of a sum
    for number, join in enumerate(found):
        name = f"join{number}"
        joins[name] = _join(join, number, prefix)
        with graph.inserting_after(join.node):
            merged = graph.call_module(name, (now.get(join.trunk, join.trunk), join.branch))
        now[join.node] = merged
        join.node.replace_all_uses_with(merged)
        graph.erase_node(join.node)
        if join.scale is not None:
            scale, scaled = join.scale
            vectors = [n for n in scale.all_input_nodes if n.op == "get_attr"]
            scale.replace_all_uses_with(scaled)
            for unused in (scale, *vectors):
                graph.erase_node(unused)
    return _module(block, graph, joins, [j.gamma[0] for j in found if j.gamma]), found


def _join(join: Found, number: int, prefix: int) -> Join:
    """The rule in the place of a sum, which starts where that was."""
    value = join.node.meta["value"]
    config = RuleConfig(name="mvsplit", beta=1.0, alpha=1.0, tied_leak=False, leak=0.0)
    branch: Branch = "ffn" if number else "attention"
    rule = UnnormedMVSplit(config, width=value.shape[-1], depth=1, branch=branch)
    rule.to(value.device, torch.promote_types(value.dtype, torch.float32))
    if join.gamma is not None:
        with torch.no_grad():
            rule.beta.copy_(join.gamma[1]), rule.alpha.copy_(join.gamma[1])
    return Join(rule, prefix)


def _module(
    block: nn.Module, graph: fx.Graph, joins: Mapping[str, Join], gone: Sequence[str]
) -> fx.GraphModule:
    """The parts of `block` in their order, then the joins, run by a copy of `graph` that remembers
    no values. Parameters named in `gone` are left out, with parts that hold nothing else."""
    clean = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    clean.output(clean.graph_copy(graph, nodes))
    for node in clean.nodes:
        node.meta.clear()
    parts = dict(block.named_children()) | dict(joins)
    new = fx.GraphModule(parts | _own_tensors(block), clean, type(block).__name__)
    kept = [name for name in parts if not any(g.split(".")[0] == name for g in gone)]
    for name in kept:
        new.add_module(name, parts[name])  # those too that the graph does not call
    for name, tensor in _own_tensors(block).items():
        if name not in gone and isinstance(tensor, nn.Parameter):
            new.register_parameter(name, tensor)
    new._modules = {name: new._modules[name] for name in kept}
    return new.train(block.training)


def _own_tensors(block: nn.Module) -> dict[str, Any]:
    return {
        **dict(block.named_parameters(recurse=False)),
        **dict(block.named_buffers(recurse=False)),
    }


# Tracing


class _Known(fx.Proxy):
    """A value that is known: its rank may decide what is done, for it is the same at every call."""

    @property
    def ndim(self) -> int:
        return self.node.meta["value"].ndim

    def dim(self) -> int:
        return self.ndim


class _Tracer(fx.Tracer):
    """Traces a block with all of its parts as leaves, and knows the value of every node."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self._values = values
        self._runs = False  # a part, for its value

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Known(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._runs:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._runs else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self._runs = True
        try:
            node.meta["value"] = self._run(node)
        finally:
            self._runs = False
        return node

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            name = str(node.target)
            # fx numbers the placeholders of arguments that are plain values.
            value = self._values[name if name in self._values else name.rpartition("_")[0]]
            return value.clone() if isinstance(value, Tensor) else value  # it may be added to
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda argument: argument.meta["value"]
        )
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


@torch.no_grad()
def _trace(block: nn.Module, call: Call) -> fx.Graph:
    bound = inspect.signature(block.forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    plain = {n: v for n, v in bound.arguments.items() if _is_plain(v)}
    try:
        graph = _Tracer(bound.arguments).trace(block, plain)
    except Exception as error:
        raise UserError(
            f"{type(block).__name__}: its forward cannot be traced ({error}); give the model "
            f"rules by hand (mvsplit.residuals)"
        ) from error
    for node in graph.nodes:
        if node.op == "placeholder" and node.target not in bound.arguments:
            node.target = node.target.rpartition("_")[0]
    return graph


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


# The joins of a graph


def _joins(block: nn.Module, graph: fx.Graph, absorb: bool) -> list[Found]:
    """The joins in the order in which they come."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    trunk = next((n for n in inputs if _shape(n) is not None and len(_shape(n)) == 3), None)
    found = []
    for node in graph.nodes if trunk is not None else ():
        assert trunk is not None
        if _normalises_trunk(node, trunk):
            trunk = node
        elif (branch := _other_term(node, trunk)) is not None:
            found.append(_found(block, node, trunk, branch, absorb))
            trunk = node
    name = type(block).__name__
    if not found:
        raise UserError(
            f"{name}: no sum of its trunk [B, T, D] and a branch was found; give the model rules "
            f"by hand (mvsplit.residuals)"
        )
    output = next(n for n in graph.nodes if n.op == "output").args[0]
    first = output[0] if isinstance(output, tuple) else output
    if first is not trunk:
        raise UserError(
            f"{name}: what it returns is not the trunk after its last join; give the model rules "
            f"by hand (mvsplit.residuals)"
        )
    return found


def _shape(node: Any) -> Any:
    value = node.meta["value"] if isinstance(node, fx.Node) else None
    return value.shape if isinstance(value, Tensor) else None


def _normalises_trunk(node: fx.Node, trunk: fx.Node) -> bool:
    """Whether a part reads the trunk that nothing else reads: the norm of a post-norm block."""
    return (
        node.op == "call_module"
        and node.args == (trunk,)
        and list(trunk.users) == [node]
        and _shape(node) == _shape(trunk)
    )


def _other_term(node: fx.Node, trunk: fx.Node) -> fx.Node | None:
    """The branch where `node` adds one to the trunk."""
    if node.target not in _SUMS or len(node.args) != 2 or node.kwargs or trunk not in node.args:
        return None
    a, b = node.args
    branch = b if a is trunk else a
    if not isinstance(branch, fx.Node) or _shape(branch) != _shape(trunk):
        return None
    return branch if _parts(branch, trunk) else None


def _parts(branch: fx.Node, trunk: fx.Node) -> tuple[str, ...]:
    """What a branch runs between the trunk and the join, nearest to this first; nothing if it does
    not read the trunk."""
    seen: dict[fx.Node, None] = {}
    todo = [branch]
    for node in todo:
        if node not in seen:
            seen[node] = None
            todo += () if node is trunk else node.all_input_nodes
    names = (str(node.target) for node in seen if node.op == "call_module" and node is not trunk)
    return tuple(names) if trunk in seen else ()


def _found(block: nn.Module, node: fx.Node, trunk: fx.Node, branch: fx.Node, absorb: bool) -> Found:
    """A join, with γ taken out of the branch. Between γ and the sum may stand parts without
    parameters: dropout of all kinds, which a gain commutes with."""
    scale = branch
    while scale.op == "call_module" and len(scale.args) == 1 and not scale.kwargs:
        part = block.get_submodule(str(scale.target))
        if any(True for _ in part.parameters()) or not isinstance(scale.args[0], fx.Node):
            break
        scale = scale.args[0]
    parts = _parts(branch, trunk)
    gamma = _gamma(block, scale) if absorb else None
    if gamma is None:
        return Found(node=node, trunk=trunk, branch=branch, parts=parts)
    name, vector, scaled = gamma
    return Found(
        node=node,
        trunk=trunk,
        branch=scaled if branch is scale else branch,
        parts=parts,
        gamma=(name, vector),
        scale=(scale, scaled),
    )


def _gamma(block: nn.Module, node: fx.Node) -> tuple[str, nn.Parameter, fx.Node] | None:
    """The name and the values of a learned vector [D] by which `node` multiplies, and what it
    multiplies; None if it does something else."""
    if node.op == "call_module" and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
        own = list(block.get_submodule(str(node.target)).named_parameters())
        if (
            len(own) == 1
            and "." not in str(node.target)
            and _is_product(node, node.args[0].meta["value"], own[0][1])
        ):
            return f"{node.target}.{own[0][0]}", own[0][1], node.args[0]
    if node.target in _PRODUCTS and len(node.args) == 2:
        for vector, other in (node.args, node.args[::-1]):
            if isinstance(vector, fx.Node) and vector.op == "get_attr":
                values = vector.meta["value"]
                if isinstance(other, fx.Node) and _is_product(node, other.meta["value"], values):
                    return str(vector.target), values, other
    return None


def _is_product(node: fx.Node, x: Any, vector: Any) -> bool:
    """Whether the node's value is x ⊙ vector [D], to the bit."""
    if not isinstance(vector, nn.Parameter) or not isinstance(x, Tensor) or vector.ndim != 1:
        return False
    return vector.shape == x.shape[-1:] and torch.equal(node.meta["value"], x * vector)
