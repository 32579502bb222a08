"""Graph passes for `deadband.decoding`: layers that read the same x, and whole gated MLPs, become one operator each.

They look at dataflow alone, so they work on any model, and leave alone what does not match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deadband import ops
from deadband.ops import fused

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A node that is a sparse layer, plain or quantised, with its arguments as `deadband.ops.fused` has them."""

    node: fx.Node
    x: fx.Node
    parts: tuple[fx.Node | None, ...]
    group_size: int
    relative: bool
    sparse_rows: int
    counts: fx.Node | None


def _layer(node: Any) -> _Layer | None:
    """The layer that a node is, if it skips entries of one token."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.kwargs:
        return None
    arguments: Any = node.args
    if node.target is ops.sparse_linear:
        x, weight, bias, *rule, relative, sparse_rows, counts = arguments
        parts, group_size = (weight, None, None, bias, *rule), 0
    elif node.target is ops.quantized_linear:
        x, codes, scales, minimum, bias, group_size, *rule, relative, sparse_rows, counts = arguments
        parts = (codes, scales, minimum, bias, *rule)
    else:
        return None
    value = x.meta.get("val")
    one_row = isinstance(value, Tensor) and all(size == 1 for size in value.shape[:-1])
    if not one_row or sparse_rows < 1 or rule[0] is None:
        return None
    return _Layer(node, x, parts, group_size, relative, sparse_rows, counts)


def _go_together(layers: Sequence[_Layer]) -> bool:
    return len({(layer.sparse_rows, layer.counts is None) for layer in layers}) == 1


def _arguments(x: fx.Node, layers: Sequence[_Layer]) -> tuple[Any, ...]:
    return (
        x,
        [part for layer in layers for part in layer.parts],
        [layer.group_size for layer in layers],
        [layer.relative for layer in layers],
        layers[0].sparse_rows,
        [layer.counts for layer in layers if layer.counts is not None],
    )


def _writes(node: fx.Node) -> bool:
    """Whether a node may write to a tensor, other than a layer to its counts."""
    if node.op != "call_function" or _layer(node) is not None:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def fuse_linears(graph: fx.GraphModule) -> None:
    """Layers on the same x -> `deadband::linears`."""
    groups: list[list[_Layer]] = []
    open_groups: dict[fx.Node, list[_Layer]] = {}
    seen: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        seen[node] = len(seen)
        if _writes(node):
            open_groups.clear()  # it might be to the x of a layer, which must not be read earlier than it was
        layer = _layer(node)
        if layer is None:
            continue
        group = open_groups.get(layer.x)
        if group and _go_together([group[0], layer]) and _is_ready(layer, seen[group[0].node], seen):
            group.append(layer)
        else:
            open_groups[layer.x] = [layer]
            groups.append(open_groups[layer.x])
    for group in groups:
        if len(group) > 1:
            _fuse_group(graph.graph, group)


def _is_ready(layer: _Layer, place: int, seen: dict[fx.Node, int]) -> bool:
    return all(seen[argument] < place for argument in layer.node.all_input_nodes)


def _fuse_group(graph: fx.Graph, layers: Sequence[_Layer]) -> None:
    nodes = [layer.node for layer in layers]
    widths = [node.meta["val"].shape[-1] for node in nodes]
    value = nodes[0].meta["val"]
    with graph.inserting_before(nodes[0]):
        outputs = graph.call_function(fused.linears, _arguments(layers[0].x, layers))
        outputs.meta = {**nodes[0].meta, "val": value.new_empty((*value.shape[:-1], sum(widths)))}
        first = 0
        for node, width in zip(nodes, widths, strict=True):
            own = graph.call_function(aten.slice.Tensor, (outputs, value.dim() - 1, first, first + width))
            own.meta = {**node.meta, "val": outputs.meta["val"][..., first : first + width]}
            node.replace_all_uses_with(own)
            first += width
    for node in nodes:
        graph.erase_node(node)


def fuse_gated_mlps(graph: fx.GraphModule) -> None:
    """down(activation(gate(x)) * up(x)) -> `deadband::gated_mlp`."""
    for node in list(graph.graph.nodes):
        match = _gated_mlp(node)
        if match is None:
            continue
        layers, between, activation = match
        with graph.graph.inserting_before(node):
            result = graph.graph.call_function(fused.gated_mlp, (*_arguments(layers[0].x, layers), activation))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        for each in (node, *between, layers[0].node, layers[1].node):
            graph.graph.erase_node(each)


def _gated_mlp(node: fx.Node) -> tuple[list[_Layer], list[fx.Node], str] | None:
    """Gate, up and down of the MLP that ends in `node`, what lies between them (last first), and its activation."""
    down = _layer(node)
    if down is None or not _is_only(down.x, aten.mul.Tensor):
        return None
    product = down.x
    factors: Any = product.args
    for activated, other in (factors, factors[::-1]):
        activation = _activation(activated)
        up = _layer(other)
        if activation is None or up is None or len(up.node.users) > 1:
            continue
        gate = _layer(activated.args[0])
        if gate is None or len(gate.node.users) > 1 or gate.x is not up.x or not _go_together([gate, up, down]):
            continue
        if gate.node.meta["val"].shape != up.node.meta["val"].shape or _written_between(gate, up, node):
            continue
        return [gate, up, down], [product, activated], activation
    return None


def _is_only(node: Any, target: Any) -> bool:
    """Whether a node is a call of `target` that one other node looks at."""
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1


def _activation(node: Any) -> str | None:
    if _is_only(node, aten.silu.default):
        return "silu"
    if _is_only(node, aten.gelu.default) and node.kwargs.get("approximate") == "tanh":
        return "gelu_tanh"
    return None


def _written_between(gate: _Layer, up: _Layer, last: fx.Node) -> bool:
    """Whether anything writes to a tensor after the first of the layers, which move to where the last node is."""
    node, missing = last, {gate.node, up.node}
    while missing:
        node = node.prev
        missing.discard(node)
        if _writes(node):
            return True
    return False
