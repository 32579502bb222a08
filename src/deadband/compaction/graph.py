"""What has to go together: groups of features from Torch-Pruning's dependency graph."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deadband.compaction.check import Masks, tensors_in
from deadband.compaction.resize import Example, Layout, conv1d_class, layout_of, output_widths

# What may stand between a producer and a consumer, as autograd names it: each feature goes its own way, or comes back
# at an index that Torch-Pruning maps. Whatever it maps wrongly changes the output, which the check sees; what only
# rarely changes it (a maximum over features, a sort) must not be in this list.
_ENTRIES = """
Relu RreluWithNoise LeakyRelu PreluKernel Elu Celu Selu Gelu Silu Mish Sigmoid LogSigmoid Tanh Hardtanh Hardswish
Hardsigmoid Softplus Softshrink Hardshrink Threshold Clamp ClampMin ClampMax Abs Neg Exp Expm1 Log Log1P Sqrt Rsqrt
Pow Reciprocal Sin Cos Erf Add Sub Rsub Mul Div Maximum Minimum Where MaskedFill NativeDropout Clone ToCopy Alias
"""
_POSITIONS = """
MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D
AdaptiveMaxPool3D Mean Sum ConstantPadNd ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D
ReplicationPad2D ReplicationPad3D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D
UpsampleBilinear2D UpsampleTrilinear3D UpsampleBicubic2D
"""
_SHAPES = """
View UnsafeView ReshapeAlias T Transpose Permute Unsqueeze Squeeze Expand Cat Split SplitWithSizes Slice Select Unbind
"""
_INSIDE_LAYERS = "Addmm Mm Linear Convolution MkldnnConvolution"
_PASSES = frozenset(f"{_ENTRIES} {_POSITIONS} {_SHAPES} {_INSIDE_LAYERS}".split())
MOST_PLACES = 1_000_000  # of a producer's features in a graph, before it is given up: 100 MB


@dataclasses.dataclass(frozen=True)
class Group:
    """Features that can only go together: outputs of producers, inputs of consumers, by layer."""

    outputs: dict[str, set[int]]
    inputs: dict[str, set[int]]


def require_torch_pruning() -> None:
    """An error that says what to install, if Torch-Pruning is missing."""
    if importlib.util.find_spec("torch_pruning") is None:
        raise ImportError(
            "compaction needs Torch-Pruning to find the layers that make the masked features: "
            'pip install "deadband[compact]", or pass producers=False to leave those layers whole'
        )


class Graph:
    """Torch-Pruning's dependency graph of a copy of a model, asked for what can go."""

    def __init__(self, model: nn.Module, arguments: Example, masks: Masks, tied: set[str]) -> None:
        import torch_pruning

        def outputs(out: Any) -> list[Tensor]:
            # a product of its own for each output, or the graph would not show that a layer's output is the model's
            leaves = [leaf for leaf in tensors_in(out) if leaf.grad_fn is not None]
            if not leaves:
                raise ValueError("no output comes from parameters in a way that autograd sees")
            return [leaf * 1 for leaf in leaves]

        self.widths = output_widths(model)
        self.limit = sum(sum(parameter.shape) for parameter in model.parameters())  # no layer reads more features
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        _put_stand_ins_(model)
        conv1d = conv1d_class()
        self.graph = torch_pruning.DependencyGraph()
        with torch.enable_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            self.graph.build_dependency(
                model,
                example_inputs=arguments,
                forward_fn=lambda model, given: model(*given[0], **given[1]),
                output_transform=outputs,
                customized_pruners={conv1d: _conv1d_pruner()} if conv1d is not None else None,
                verbose=False,
            )
        # a PReLU with one slope has no features of its own
        self.names = {
            module: name.removesuffix(".units") if isinstance(module, _Units) else name
            for name, module in model.named_modules()
            if getattr(module, "num_parameters", 0) != 1
        }
        self.masks, self.tied = masks, tied
        self.gone: dict[str, set[int]] = {}  # outputs that are in a group already

    def producers(self) -> list[nn.Module]:
        """Layers that reach a masked layer through nothing but what passes features on."""
        found: dict[nn.Module, None] = {}
        seen = set()
        nodes = self.graph.module2node.items()
        waiting = [source for layer, node in nodes if self.names.get(layer) in self.masks for source in node.inputs]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            layout = self._layout(node.module) if node.module in self.names else None
            if layout is not None and not layout.per_feature:
                found[node.module] = None
            elif self._passes(node) and not any(isinstance(source.module, nn.Parameter) for source in node.inputs):
                waiting += node.inputs
        return list(found)

    def group(self, producer: nn.Module, channels: Iterable[int] | None = None) -> Group | None:
        """As many output features of `producer` as can go, of `channels` or of all, with all that has to go along."""
        name = self.names[producer]
        left = set(range(self.widths[name]) if channels is None else channels) - self.gone.get(name, set())
        while left:
            group, blocked = self.members(producer, left)
            if None in blocked or not group.inputs:
                return None  # an index was lost, or nothing reads them
            if not blocked and self._leaves_something(group):
                return group
            left -= blocked or {max(left)}
        return None

    def take(self, group: Group) -> Group:
        """Leave the outputs of `group` out of groups to come."""
        for name, indices in group.outputs.items():
            self.gone.setdefault(name, set()).update(indices)
        return group

    def members(self, producer: nn.Module, channels: set[int]) -> tuple[Group, set[Any]]:
        """What has to go with output features of `producer`, and those that may not go; None: an index is lost."""
        group, blocked = Group({}, {}), set()
        for (node, prune), places in self.places(producer, channels).items():
            blocked |= self._add(group, node, prune, places)
        return group, blocked

    def places(self, producer: nn.Module, channels: set[int]) -> dict[tuple[Any, Any], set[Any]]:
        """Where the graph leads from `channels`: by node and what to prune of it, pairs of an index and its channel.

        Torch-Pruning's own walk remembers one channel for each index, and does not end where a layer that runs twice
        lets indices wander. Here it ends with the channel None.
        """
        from torch_pruning._helpers import _HybridIndex

        start = self.graph.module2node[producer], self.graph.get_pruner_of_module(producer).prune_out_channels
        waiting = [(start, {_HybridIndex(channel, channel) for channel in channels})]
        places: dict[tuple[Any, Any], set[Any]] = {}
        budget = MOST_PLACES
        while waiting:
            place, indices = waiting.pop()
            indices = indices - places.setdefault(place, set())
            places[place] |= indices
            budget -= len(indices)
            if budget < 0 or any(not 0 <= index.idx < self.limit for index in indices):
                return {start: {_HybridIndex(0, None)}}
            for edge in place[0].dependencies if indices else ():
                if edge.is_triggered_by(place[1]):
                    mapped = list(indices)
                    for mapping in filter(None, edge.index_mapping):
                        mapped = mapping(mapped)
                    waiting.append(((edge.target, edge.handler), set(mapped)))
        return {place: indices for place, indices in places.items() if indices}

    def _add(self, group: Group, node: Any, prune: Any, places: set[Any]) -> set[Any]:
        """Put one member into `group`; returns the producer's channels that it does not allow to go."""
        indices, channels = {place.idx for place in places}, {place.root_idx for place in places}
        name = self.names.get(node.module)
        if name is None:
            return set() if self._passes(node) else channels
        layout = self._layout(node.module)
        if layout is None or name in self.tied or getattr(node.module, "max_norm", None) is not None:
            return channels
        if layout.inputs is None or self.graph.is_out_channel_pruning_fn(prune):
            group.outputs.setdefault(name, set()).update(indices)
            return channels if max(indices) >= self.widths[name] else set()
        mask = self.masks.get(name)
        if mask is None or max(indices) >= len(mask):
            return channels
        group.inputs.setdefault(name, set()).update(indices)
        return {place.root_idx for place in places if mask[place.idx]}

    def _layout(self, module: nn.Module) -> Layout | None:
        return module.layout if isinstance(module, _Units) else layout_of(module)

    def _leaves_something(self, group: Group) -> bool:
        """Whether each producer has an output left: torch's layers do not work on nothing."""
        outputs = group.outputs.items()
        return all(len(indices | self.gone.get(name, set())) < self.widths[name] for name, indices in outputs)

    def _passes(self, node: Any) -> bool:
        if node.module in self.names:
            layout = self._layout(node.module)
            return layout is not None and layout.per_feature
        if isinstance(node.module, nn.Parameter) or node.type == self.graph.ops.OPTYPE.OUTPUT:
            return False
        return re.sub(r"Backward\d*$", "", node.grad_fn.name()) in _PASSES


def _conv1d_pruner() -> Any:
    """Tells Torch-Pruning how wide transformers' Conv1D is; nothing here is pruned by it."""
    from torch_pruning.pruner.function import BasePruningFunc

    class Conv1DPruner(BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            return layer

        def prune_in_channels(self, layer: Any, idxs: Any) -> Any:
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return layer.nf

        def get_in_channels(self, layer: Any) -> int:
            return layer.nx

    return Conv1DPruner()


class _Units(nn.Linear):
    """What an LSTM, GRU or RNN is in the graph, where autograd would show every step and gate of it."""

    layout: Layout | None


class _StandIn(nn.Module):
    """Returns what such a layer returns, by shapes."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.units = _Units(layer.input_size, layer.hidden_size)
        self.units.to(next(layer.parameters()))
        self.units.layout = layout_of(layer)
        self.layers, self.is_lstm, self.batch_first = layer.num_layers, isinstance(layer, nn.LSTM), layer.batch_first

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        y = self.units(input)
        last = y.select(1 if self.batch_first and y.dim() == 3 else 0, -1)[None]
        last = last.expand(self.layers, *last.shape[1:])
        return y, (last, last * 1) if self.is_lstm else last


def _put_stand_ins_(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.RNNBase) and layout_of(child) is not None:
                setattr(module, name, _StandIn(child))
