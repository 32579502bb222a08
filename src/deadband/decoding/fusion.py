"""Passes for `deadband.decoding.graph`: layers that read the same x, and whole gated MLPs, become one operator each.

They look at dataflow alone, so they work on any model, and leave alone what does not match.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from deadband.ops import fused, gated
from deadband.ops.cpu import SPARSE_ROWS
from deadband.ops.linear import quantized_linear, sparse_linear

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
    """The layer that a node is, if it skips entries of one token, or of a few."""
    layer = _any_layer(node)
    return layer if layer is not None and layer.node.target is not gated.up_linear else None


def _up(node: Any) -> _Layer | None:
    """The up-projection that a node is, if it lies by output."""
    layer = _any_layer(node)
    return layer if layer is not None and layer.node.target is gated.up_linear else None


def _any_layer(node: Any) -> _Layer | None:
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.kwargs:
        return None
    arguments: Any = node.args
    if node.target is sparse_linear:
        x, weight, bias, *rule, relative, sparse_rows, counts = arguments
        parts, group_size = (weight, None, None, bias, *rule), 0
    elif node.target is quantized_linear:
        x, codes, scales, minimum, bias, group_size, *rule, relative, sparse_rows, counts = arguments
        parts = (codes, scales, minimum, bias, *rule)
    elif node.target is gated.up_linear:
        x, weight, scales, minimum, bias, group_size, *rule, relative, sparse_rows, counts = arguments
        parts = (weight, scales, minimum, bias, *rule, None, None)
    else:
        return None
    value = x.meta.get("val")
    few = isinstance(value, Tensor) and statically_known_true(math.prod(value.shape[:-1]) <= SPARSE_ROWS)
    if not few or sparse_rows < 1 or rule[0] is None:
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
    if node.op != "call_function" or _any_layer(node) is not None:
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


def fuse_gated_downs(graph: fx.GraphModule) -> None:
    """down(anything * up(x)), where up lies by output -> `deadband::gated_down`."""
    for node in list(graph.graph.nodes):
        match = _gated_down(node)
        if match is None:
            continue
        up, down, gate, product = match
        x, parts, group_sizes, relative, sparse_rows, counts = _arguments(up.x, [up, down])
        with graph.graph.inserting_before(node):
            result = graph.graph.call_function(
                gated.gated_down, (x, gate, parts, group_sizes, relative, sparse_rows, counts)
            )
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        for each in (node, product, up.node):
            graph.graph.erase_node(each)


def _gated_down(node: fx.Node) -> tuple[_Layer, _Layer, fx.Node, fx.Node] | None:
    """Up and down of the MLP that ends in `node`, what up is multiplied by, and that product."""
    down = _layer(node)
    if down is None or not _is_only(down.x, aten.mul.Tensor):
        return None
    factors: Any = down.x.args
    for gate, other in (factors, factors[::-1]):
        up = _up(other)
        if up is None or len(up.node.users) > 1 or not isinstance(gate, fx.Node) or gate is other:
            continue
        values = [each.meta["val"] for each in (gate, up.node, down.x)]
        alike = len({(value.shape, value.dtype) for value in values}) == 1
        if alike and _go_together([up, down]) and not _written_since({up.node}, node):
            return up, down, gate, down.x
    return None


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
    return _written_since({gate.node, up.node}, last)


def _written_since(missing: set[fx.Node], node: fx.Node) -> bool:
    while missing:
        node = node.prev
        missing.discard(node)
        if _writes(node):
            return True
    return False


# ------------------------------------------------------------------------------------------------------------ packing

_VIEWS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.alias.default, aten.detach.default)
RECIPE = "deadband_layers"


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How to pack the layers of a node, from the inputs of the graph."""

    dtype: torch.dtype
    in_features: int
    parts: list[fx.Node | None]
    group_sizes: list[int]
    relative: list[bool]
    counts: list[fx.Node]
    target: Any  # the operator of these layers, not packed

    def pack(self, inputs: dict[fx.Node, Tensor], keep: list[Tensor]) -> Tensor:
        """The packed layers; adds to `keep` what has to stay alive with them."""
        parts = [None if node is None else _evaluate(node, inputs) for node in self.parts]
        counts = [_evaluate(node, inputs) for node in self.counts]
        keep += [each for each in (*parts, *counts) if each is not None]
        arguments = (self.dtype, self.in_features, parts, self.group_sizes, self.relative, counts)
        if self.target is gated.gated_down:
            return gated.pack(*arguments)
        return fused.pack(*arguments, self.target is fused.gated_mlp)


def _evaluate(node: fx.Node, inputs: dict[fx.Node, Tensor]) -> Tensor:
    """What a placeholder, or a view of one, is for these inputs; shares its memory and keeps it."""
    if node in inputs:
        return inputs[node].detach()
    source: Any = node.args[0]
    target: Any = node.target
    return target(_evaluate(source, inputs), *node.args[1:])


def _is_input(node: Any) -> bool:
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]
    return node.op == "placeholder"


def pack_layers(graph: fx.GraphModule) -> None:
    """Sparse layers, fused or not -> operators that take the addresses of all their tensors in one more input.

    The new inputs come before the others; `supply` gives them.
    """
    for node in list(graph.graph.nodes):
        layer = _layer(node)
        others: tuple[Any, ...] = ()  # what the packed operator takes between x and the layers, or at its end
        if layer is not None:
            arguments: Any = _arguments(layer.x, [layer])
        elif node.target is fused.linears:
            arguments = node.args
        elif node.target is fused.gated_mlp:
            *arguments, activation = node.args
            others = (fused.ACTIVATIONS.index(activation),)
        elif node.target is gated.gated_down:
            first, gate, *rest = node.args
            arguments, others = (first, *rest), (gate,)
        else:
            continue
        x, parts, group_sizes, relative, sparse_rows, counts = arguments
        if any(each.target is aten.zeros.default for each in counts):
            counts = []  # decode_graph.give_counts: nobody reads them
        nodes = [each for each in (*parts, *counts) if each is not None]
        value = x.meta["val"]
        fakes = [None if each is None else each.meta["val"] for each in parts]
        fake_counts = [each.meta["val"] for each in counts]
        known, sizes = all(map(_is_input, nodes)), (group_sizes, relative, fake_counts)
        if node.target is gated.gated_down:
            taken = known and gated.can_pack(value, fakes, *sizes)
        else:
            taken = known and fused.can_pack(value, fakes, *sizes, node.target is fused.gated_mlp)
        if not taken:
            continue
        recipe = _Recipe(value.dtype, value.shape[-1], parts, group_sizes, relative, counts, node.target)
        _replace(graph.graph, node, x, recipe, others, sparse_rows)


def _replace(
    graph: fx.Graph, node: fx.Node, x: fx.Node, recipe: _Recipe, others: tuple[Any, ...], sparse_rows: int
) -> None:
    value = node.meta["val"]
    with graph.inserting_before(next(iter(graph.nodes))):
        layers = graph.placeholder(f"layers_of_{node.name}")
    with value.fake_mode:
        layers.meta["val"] = torch.empty(2, len(recipe.group_sizes), fused.LAYER, dtype=torch.int64)
    layers.meta[RECIPE] = recipe
    sizes = (recipe.in_features, value.shape[-1], sparse_rows)
    with graph.inserting_before(node):
        if recipe.target is gated.gated_down:
            result = graph.call_function(gated.packed_gated_down, (x, *others, layers, *sizes))
        elif recipe.target is fused.gated_mlp:
            result = graph.call_function(fused.packed_gated_mlp, (x, layers, *sizes, *others))
        else:
            result = graph.call_function(fused.packed_linears, (x, layers, *sizes))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def supply(graph: fx.GraphModule, compiled: Callable[[fx.GraphModule], Callable[..., Any]]) -> Callable[..., Any]:
    """What `compiled` makes of a graph, as a function of the inputs that the graph had before `pack_layers`.

    Inputs that only packed layers read are none of the compiled function: models of which other layers have a scale or
    a center are the same to torch's cache of compiled code, and each input costs time in each call.

    The layers are packed for the inputs of the first call. Later calls have to bring the same tensors, in the same
    place; if a tensor's memory is exchanged nevertheless, what it was is what is read.
    """
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    recipes = [node.meta[RECIPE] for node in placeholders if RECIPE in node.meta]
    given = placeholders[len(recipes) :]
    used = [bool(node.users) for node in given]
    for node, needed in zip(given, used, strict=True):
        if not needed:
            graph.graph.erase_node(node)
    graph.recompile()
    run = compiled(graph)
    packed: list[Tensor] = []
    keep: list[Tensor] = []

    def supplied(*inputs: Any) -> Any:
        if recipes and not packed:
            known = dict(zip(given, inputs, strict=True))
            packed.extend([recipe.pack(known, keep) for recipe in recipes])
        return run(*packed, *itertools.compress(inputs, used))

    return supplied
