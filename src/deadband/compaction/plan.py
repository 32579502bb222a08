"""What compaction can remove: proposals from Torch-Pruning's dependency graph, each checked by running the model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from deadband.compaction.resize import Example, Gathered, Resize, apply_, conv1d_class, layout_of, shared_parameters
from deadband.layers.hooks import take_input, with_input
from deadband.ops.nested import padded
from deadband.ops.skipping import apply_mask
from deadband.running.copies import copy_arguments


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in what a model returned, dense: in containers and in attributes of objects."""
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(padded(leaf) if leaf.is_nested else leaf.to_dense() if leaf.layout != torch.strided else leaf)
        elif isinstance(leaf, tuple):  # of a class of its own, as PackedSequence
            found += tensors_in(tuple(leaf))
        elif dataclasses.is_dataclass(leaf):
            found += tensors_in(vars(leaf))
    return found


Masks = Mapping[str, Tensor]  # layer -> bool [features] on the CPU, True = keep
# What may stand between a producer and a consumer, as autograd names it: each feature goes its own way, or comes back
# at an index that Torch-Pruning maps. Whatever it maps wrongly changes the output, which the check sees; what only
# rarely changes it (a maximum over features, a sort) must not be in this list.
_ENTRIES = """
Relu LeakyRelu PreluKernel Elu Celu Selu Gelu Silu Mish Sigmoid LogSigmoid Tanh Hardtanh Hardswish Hardsigmoid Softplus
Softshrink Hardshrink Threshold Clamp ClampMin ClampMax Abs Neg Exp Expm1 Log Log1P Sqrt Rsqrt Pow Reciprocal Sin Cos
Erf Add Sub Rsub Mul Div Maximum Minimum Where MaskedFill NativeDropout Clone ToCopy Alias
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do to each layer; how many inputs of each go for real or by a gather; what is left, and why."""

    resizes: dict[str, Resize]
    removed: dict[str, int]
    gathered: dict[str, int]
    left: dict[str, str]
    note: str


def find_plan(model: nn.Module, masks: Masks, example: Example, producers: bool) -> Plan:
    """Decide what happens to each masked layer; `model` is only copied."""
    masks = {name: mask for name, mask in masks.items() if not mask.all()}
    shared = shared_parameters(model)
    reasons = {name: _reason_to_leave(model, name, shared) for name in masks}
    left = {name: reason for name, reason in reasons.items() if reason}
    masks = {name: mask for name, mask in masks.items() if name not in left}
    if not masks:
        return Plan({}, {}, {}, left, "")
    check = _Check(model, example)
    left |= {name: "the example does not call it" for name in masks if name not in check.called}
    masks = {name: mask for name, mask in masks.items() if name not in left}
    groups, note = [], ""
    if producers and check.dtype is None:
        note = "gathers only: the model runs neither in float64 nor in float32, which checks are made in"
    elif producers:
        try:
            groups = _propose(check, masks, shared)
        except Exception as error:
            note = f"gathers only: Torch-Pruning cannot follow this model ({type(error).__name__}: {error})"
    sound, chosen = _sound(check, masks, groups)
    left |= {name: "the output changed without its masked features" for name in masks if name not in sound}
    if len(chosen) < len(groups):
        failed = f"{len(groups) - len(chosen)} of {len(groups)} groups of producers"
        note = f"{failed} stay whole: the output changed without their masked features"
    masked = {name: int((~mask).sum()) for name, mask in sound.items()}
    gone = _union(group.inputs for group in chosen)
    removed = {name: len(gone[name]) for name in masked if name in gone}
    gathered = {name: count - removed.get(name, 0) for name, count in masked.items() if count > removed.get(name, 0)}
    return Plan(_resizes(model, sound, chosen), removed, gathered, left, note)


def _sound(check: _Check, masks: Masks, groups: list[Group]) -> tuple[Masks, list[Group]]:
    """The masked layers and groups that pass the check: nearly always all of them, at once."""
    if check.same(masks, groups):
        return masks, groups
    if not check.same(masks, []):  # a model may read a weight without calling its layer
        masks = {name: mask for name, mask in masks.items() if check.same({name: mask}, [])}
    chosen: list[Group] = []
    for group in groups:
        if group.inputs.keys() <= masks.keys() and check.same(masks, [*chosen, group]):
            chosen.append(group)
    return masks, chosen


def _reason_to_leave(model: nn.Module, name: str, shared: set[nn.Module]) -> str | None:
    module = model.get_submodule(name)
    layout = layout_of(module)
    fused = [outer for outer, each in model.named_modules() if isinstance(each, nn.TransformerEncoderLayer)]
    if isinstance(module, Gathered):
        return "it gathers its input already"
    if getattr(module, "groups", 1) > 1:
        return "a convolution in groups needs all of its channels"
    if layout is None or layout.inputs is None:
        return f"{type(module).__name__} cannot lose input features; nn.Linear, nn.Conv1d to 3d and Conv1D can"
    if type(module._parameters.get("weight")) is not nn.Parameter:
        return "its weight is not a plain parameter"
    if module in shared:
        return "its parameters are shared with another layer"
    if any(name.startswith(f"{outer}." if outer else "") for outer in fused):
        return "torch's TransformerEncoderLayer reads its weight without calling it"
    return None


def _union(parts: Any) -> dict[str, set[int]]:
    together: dict[str, set[int]] = {}
    for part in parts:
        for name, indices in part.items():
            together.setdefault(name, set()).update(indices)
    return together


def _resizes(model: nn.Module, masks: Masks, groups: Sequence[Group]) -> dict[str, Resize]:
    """Removed features, as indices of what every layer keeps."""
    widths = _output_widths(model)
    outputs = _union(group.outputs for group in groups)
    inputs = _union(group.inputs for group in groups)
    plan = {}
    for name in [*masks, *(name for name in outputs if name not in masks)]:
        rows = columns = kept = None
        if name in outputs:
            rows = _without(torch.ones(widths[name], dtype=torch.bool), outputs[name]).nonzero()[:, 0]
        if name in masks:
            columns = masks[name].nonzero()[:, 0]
            arriving = masks[name][_without(torch.ones_like(masks[name]), inputs.get(name, set()))]
            kept = None if arriving.all() else arriving.nonzero()[:, 0]
        plan[name] = Resize(rows, columns, kept)
    return plan


def _output_widths(model: nn.Module) -> dict[str, int]:
    layouts = {name: (module, layout_of(module)) for name, module in model.named_modules()}
    return {name: getattr(module, layout.outputs) for name, (module, layout) in layouts.items() if layout is not None}


def _without(mask: Tensor, gone: set[int]) -> Tensor:
    mask[sorted(gone)] = False
    return mask


# ------------------------------------------------------------------------------------------------------------ checking


@contextlib.contextmanager
def masking(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, inputs of the layers that `masks` names are zero where their mask is False."""
    handles = []
    try:
        for name, mask in masks.items():
            module = model.get_submodule(name)
            weight: Any = module.weight
            spatial = weight.dim() - 2 if hasattr(module, "kernel_size") else 0
            handles.append(
                module.register_forward_pre_hook(_Masking(mask.to(weight.device), spatial), with_kwargs=True)
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Masking:
    def __init__(self, mask: Tensor, spatial: int) -> None:
        self.mask = mask.view(-1, *[1] * spatial)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = take_input(type(module).__name__, args, kwargs)
        return with_input(args, kwargs, apply_mask(x, self.mask))


class _Check:
    """Runs copies of a model, masked and compacted, on its example and on random variations of both."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        self.model, self.example = model, example
        if "use_cache" in inspect.signature(model.forward).parameters:  # a cache is not what is compared
            self.example = (example[0], {"use_cache": False, **example[1]})
        self.dtype: torch.dtype | None
        # float64 leaves nothing but mistakes; some models cast to a dtype of their own on the way, which costs digits
        for self.dtype, self.tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-3), (None, 2e-2)):
            fresh = self.fresh()
            self.called: set[str] = set()
            for name, module in fresh.named_modules(remove_duplicate=False):
                module.register_forward_pre_hook(lambda _, args, name=name: self.called.add(name))
            try:
                self.run(fresh, self.arguments())
                break
            except Exception:
                if self.dtype is None:
                    raise

    def fresh(self) -> nn.Module:
        model = copy.deepcopy(self.model).eval()
        return model if self.dtype is None else model.to(self.dtype)

    def arguments(self, noise: torch.Generator | None = None) -> Example:
        def fresh(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return copy.deepcopy(value)
            value = value.detach().clone()
            if not value.is_floating_point():
                return value
            value = value.to(self.dtype)
            if noise is None or value.is_nested or value.layout is not torch.strided:
                return value
            return value + _random(value, noise) * (_spread(value) + 0.1)

        return tree_map(fresh, self.example)

    def run(self, model: nn.Module, arguments: Example) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed GPUs, too
            return tensors_in(model(*arguments[0], **arguments[1]))

    def same(self, masks: Masks, groups: Sequence[Group]) -> bool:
        """Whether the model compacted so gives what the masked one gives, for its own parameters and for others.

        Features are often masked because they are dead: with these parameters they cannot show that something still
        reads them.
        """
        plan = _resizes(self.model, masks, groups)
        for seed in (None, 0, 1):
            model, noise = self.fresh(), None
            if seed is not None:
                noise = torch.Generator().manual_seed(seed)
                _vary_(model, noise)
            arguments = self.arguments(noise)
            try:
                with masking(model, masks):
                    expected = self.run(model, copy_arguments(arguments))
            except Exception:
                if seed is None:
                    raise
                continue  # the variation is none that this model can take
            try:
                apply_(model, plan)
                found = self.run(model, arguments)
            except Exception:
                return False
            if len(found) != len(expected) or not all(map(self._close, found, expected)):
                return False
        return True

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        if found.shape != expected.shape:
            return False
        if not expected.is_floating_point():
            return torch.equal(found, expected)
        finite = expected[expected.isfinite()]
        size = finite.square().mean().sqrt().item() if finite.numel() else 0.0
        return torch.allclose(found, expected, rtol=self.tolerance, atol=self.tolerance * size, equal_nan=True)


def _spread(values: Tensor) -> float:
    return torch.nan_to_num(values.std(correction=0), 0.0, 0.0).item() if values.numel() else 0.0


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform between -1 and 1."""
    return torch.rand(like.shape, generator=generator).mul_(2).sub_(1).to(like)


@torch.no_grad()
def _vary_(model: nn.Module, generator: torch.Generator) -> None:
    """Other parameters of about the same size and, where that is allowed, of either sign, which wakes dead features."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                noise, size = _random(parameter, generator), 0.3 * _spread(parameter) + 0.03
                if layout_of(module) is not None:
                    parameter.mul_(noise.sign())
                parameter.add_(noise, alpha=size)
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.add_(_random(mean, generator), alpha=_spread(mean) + 0.1)
            variance.mul_(1 + _random(variance, generator).abs())


# ----------------------------------------------------------------------------------------------------------- proposing


def require_torch_pruning() -> None:
    """An error that says what to install, if Torch-Pruning is missing."""
    if importlib.util.find_spec("torch_pruning") is None:
        raise ImportError(
            "compaction needs Torch-Pruning to find the layers that make the masked features: "
            'pip install "deadband[compact]", or pass producers=False to leave those layers whole'
        )


def _propose(check: _Check, masks: Masks, shared: set[nn.Module]) -> list[Group]:
    """The features that nothing but masked layers reads, by the layers that make them."""
    tied = {name for name, module in check.model.named_modules() if module in shared}
    graph = _Graph(check.fresh(), check.arguments(), masks, tied)
    groups = [graph.group(producer) for producer in graph.producers()]
    return [group for group in groups if group is not None]


class _Graph:
    """Torch-Pruning's dependency graph of a copy of a model, asked for what can go."""

    def __init__(self, model: nn.Module, arguments: Example, masks: Masks, tied: set[str]) -> None:
        import torch_pruning

        def outputs(out: Any) -> list[Tensor]:
            # a product of its own for each output, or the graph would not show that a layer's output is the model's
            leaves = [leaf for leaf in tensors_in(out) if leaf.grad_fn is not None]
            if not leaves:
                raise ValueError("no output comes from parameters in a way that autograd sees")
            return [leaf * 1 for leaf in leaves]

        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
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
            module: name for name, module in model.named_modules() if getattr(module, "num_parameters", 0) != 1
        }
        self.widths = _output_widths(model)
        self.limit = sum(sum(parameter.shape) for parameter in model.parameters())  # no layer reads more features
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
            layout = layout_of(node.module) if node.module in self.names else None
            if layout is not None and not layout.per_feature:
                found[node.module] = None
            elif self._passes(node) and not any(isinstance(source.module, nn.Parameter) for source in node.inputs):
                waiting += node.inputs
        return list(found)

    def group(self, producer: nn.Module) -> Group | None:
        """As many output features of `producer` as can go, with all that has to go along."""
        name = self.names[producer]
        channels = set(range(self.widths[name])) - self.gone.get(name, set())
        while channels:
            group, blocked = Group({}, {}), set()
            for (node, prune), places in self._places(producer, channels).items():
                blocked |= self._add(group, node, prune, places)
            if None in blocked or not group.inputs:
                return None  # an index was lost, or nothing reads them
            if not blocked and self._leaves_something(group):
                for each, indices in group.outputs.items():
                    self.gone.setdefault(each, set()).update(indices)
                return group
            channels -= blocked or {max(channels)}
        return None

    def _places(self, producer: nn.Module, channels: set[int]) -> dict[tuple[Any, Any], set[Any]]:
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
        layout = layout_of(node.module)
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

    def _leaves_something(self, group: Group) -> bool:
        """Whether each producer has an output left: torch's layers do not work on nothing."""
        outputs = group.outputs.items()
        return all(len(indices | self.gone.get(name, set())) < self.widths[name] for name, indices in outputs)

    def _passes(self, node: Any) -> bool:
        if node.module in self.names:
            layout = layout_of(node.module)
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
