"""Layers with fewer inputs or outputs: what of their tensors is cut, and how the rest is gathered."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deadband.layers.sparse import change_class_
from deadband.ops.nested import map_nested

Example = tuple[tuple, dict]


# ------------------------------------------------------------------------------------------------- layers that gather


class Gathered(nn.Module):
    """A layer that picks the features that it kept out of an input that still has them all.

    Made in place from its dense class, and so under the same name, with the same hooks. The state dict has one more
    entry, `kept` (int64 [features kept]). A layer that keeps nothing has one feature left, of zeros, as torch's
    convolutions need one.
    """

    kept: Tensor
    feature_dim: int

    def forward(self, input: Tensor) -> Tensor:
        """The dense layer's forward on the features kept."""
        return super().forward(self._gather(input))

    def _gather(self, x: Tensor) -> Tensor:
        if x.is_nested:
            return map_nested(x, lambda _, part: self._gather(part))
        if not self.kept.numel():
            return torch.zeros_like(x.narrow(self.feature_dim, 0, 1))
        if self.feature_dim == -1 and x.dim() > 2:  # on CPUs ten times as fast as with more dimensions
            return x.flatten(0, -2).index_select(1, self.kept).view(*x.shape[:-1], self.kept.shape[0])
        return x.index_select(self.feature_dim, self.kept)


class GatheredLinear(Gathered, nn.Linear):
    """`nn.Linear` on a part of its input's features; made by `compact_` where the input has to stay whole."""

    feature_dim = -1


class GatheredConv1d(Gathered, nn.Conv1d):
    """`nn.Conv1d` on a part of its input's channels."""

    feature_dim = -2


class GatheredConv2d(Gathered, nn.Conv2d):
    """`nn.Conv2d` on a part of its input's channels."""

    feature_dim = -3


class GatheredConv3d(Gathered, nn.Conv3d):
    """`nn.Conv3d` on a part of its input's channels."""

    feature_dim = -4


# ------------------------------------------------------------------------------------------------ layers that scatter


class Scattered(nn.Module):
    """A layer that makes some of its output features, and puts constants in the places of the others.

    Made in place from its dense class, as `Gathered` is. The state dict has two more entries: `made` (int64 [features
    made]) and `rest` ([all features]), the constants.
    """

    made: Tensor
    rest: Tensor
    feature_dim: int

    def forward(self, input: Tensor) -> Tensor:
        """The dense layer's forward, with all features."""
        return self._scatter(super().forward(input))

    def _scatter(self, y: Tensor) -> Tensor:
        if y.is_nested:
            return map_nested(y, lambda _, part: self._scatter(part))
        shape = list(y.shape)
        shape[self.feature_dim] = len(self.rest)
        rest = self.rest.to(y.dtype).view(-1, *[1] * (-1 - self.feature_dim)).expand(shape)
        return rest.clone(memory_format=torch.contiguous_format).index_copy_(self.feature_dim, self.made, y)


class ScatteredLinear(Scattered, nn.Linear):
    """`nn.Linear` that makes a part of its output; made by `compact_` where the output has to stay whole."""

    feature_dim = -1


class ScatteredConv1d(Scattered, nn.Conv1d):
    """`nn.Conv1d` that makes a part of its channels."""

    feature_dim = -2


class ScatteredConv2d(Scattered, nn.Conv2d):
    """`nn.Conv2d` that makes a part of its channels."""

    feature_dim = -3


class ScatteredConv3d(Scattered, nn.Conv3d):
    """`nn.Conv3d` that makes a part of its channels."""

    feature_dim = -4


SCATTERED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ScatteredLinear,
    nn.Conv1d: ScatteredConv1d,
    nn.Conv2d: ScatteredConv2d,
    nn.Conv3d: ScatteredConv3d,
}


def __getattr__(name: str) -> Any:
    """GatheredConv1D, for transformers' Conv1D: made when it is needed, as importing transformers takes a second."""
    if name != "GatheredConv1D":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in globals():
        return globals()[name]
    from transformers.pytorch_utils import Conv1D

    body = {"__module__": __name__, "__doc__": "`Conv1D` on a part of its input's features.", "feature_dim": -1}
    globals()[name] = made = type(name, (Gathered, Conv1D), {**body, "forward": _forward_x})
    return made


def _forward_x(self: Any, x: Tensor) -> Tensor:  # Conv1D calls its argument x
    return Gathered.forward(self, x)


# ------------------------------------------------------------------------------------------------------------- layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a class of layers keeps its features: the attributes that count them, the dimensions of the weight."""

    outputs: str
    out_dim: int = 0
    inputs: str | None = None
    in_dim: int = 1
    gathered: type[nn.Module] | None = None
    per_feature: bool = False  # each output feature is made from the same input feature alone
    gates: int = 0  # of a recurrent layer, whose weights have the rows of one gate after those of another


_PER_CHANNEL = Layout("num_features", per_feature=True)
_LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Linear: Layout("out_features", inputs="in_features", gathered=GatheredLinear),
    nn.Conv1d: Layout("out_channels", inputs="in_channels", gathered=GatheredConv1d),
    nn.Conv2d: Layout("out_channels", inputs="in_channels", gathered=GatheredConv2d),
    nn.Conv3d: Layout("out_channels", inputs="in_channels", gathered=GatheredConv3d),
    nn.Embedding: Layout("embedding_dim", out_dim=1),
    nn.BatchNorm1d: _PER_CHANNEL,
    nn.BatchNorm2d: _PER_CHANNEL,
    nn.BatchNorm3d: _PER_CHANNEL,
    nn.PReLU: Layout("num_parameters", per_feature=True),
    nn.LSTM: Layout("hidden_size", inputs="input_size", gates=4),
    nn.GRU: Layout("hidden_size", inputs="input_size", gates=3),
    nn.RNN: Layout("hidden_size", inputs="input_size", gates=1),
}
_BY_OUTPUT = ("bias", "running_mean", "running_var")  # beside the weight


def conv1d_class() -> type[nn.Module] | None:
    """transformers' Conv1D, if anything has imported it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def layout_of(module: nn.Module) -> Layout | None:
    """How `module` can be resized; None: not at all. Subclasses cannot: they may compute something else."""
    kind = type(module).__bases__[1] if isinstance(module, Gathered) else type(module)
    if kind is conv1d_class():
        return Layout("nf", out_dim=1, inputs="nx", in_dim=0, gathered=__getattr__("GatheredConv1D"))
    layout = _LAYOUTS.get(kind)
    if layout is None or (isinstance(module, nn.PReLU) and module.num_parameters == 1):  # one slope for all
        return None
    if isinstance(module, nn.RNNBase) and (module.bidirectional or module.proj_size):
        return None
    if getattr(module, "groups", 1) == 1:
        return layout
    depthwise = module.groups == module.in_channels == module.out_channels
    return dataclasses.replace(layout, inputs=None, gathered=None, per_feature=True) if depthwise else None


def output_widths(model: nn.Module) -> dict[str, int]:
    """How many output features each layer that can be resized has."""
    layouts = {name: (module, layout_of(module)) for name, module in model.named_modules()}
    return {name: getattr(module, layout.outputs) for name, (module, layout) in layouts.items() if layout is not None}


def spatial_dims(module: nn.Module) -> int:
    """How many dimensions follow that of the features in a layer's input and output: those of a convolution."""
    return len(module.kernel_size) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 0


def shared_parameters(model: nn.Module) -> set[nn.Module]:
    """The modules of `model` that hold a parameter which another of its modules holds, too."""
    held = [(id(value), module) for module in model.modules() for value in module._parameters.values()]
    counts = Counter(key for key, _ in held if key != id(None))
    return {module for key, module in held if counts[key] > 1}


# ------------------------------------------------------------------------------------------------------------ resizing


@dataclasses.dataclass(frozen=True)
class Resize:
    """What one layer is cut down to, as indices: the output and input features of its weight, and what it gathers.

    Input features that go may be constant instead of zero. Their part of the output goes into the bias, or, where there
    is none or padding makes it another one at the borders, into the weights of one constant feature that stays.
    """

    outputs: Tensor | None = None  # [k] int64
    inputs: Tensor | None = None
    kept: Tensor | None = None
    constants: Tensor | None = None  # [inputs before] the values of input features that go
    into: int | None = None  # the constant feature that stays
    made: Tensor | None = None  # [k] int64: what is made of the output features that stay; the others become constants


def resize_(module: nn.Module, to: Resize) -> None:
    """Cut one layer down in place; a layer that keeps no input gets one feature, with a weight of zero."""
    layout, layer = layout_of(module), cast(Any, module)
    assert layout is not None
    if to.constants is not None:
        _fold_(layer, layout, to)
    if to.outputs is not None and layout.gates:
        _resize_units_(layer, layout.gates, to.outputs)
    elif to.outputs is not None:
        values: Any
        for values in (layer._parameters, layer._buffers):
            for name in values.keys() & {"weight", *_BY_OUTPUT}:
                if values[name] is not None:
                    values[name] = _select(values[name], layout.out_dim if name == "weight" else 0, to.outputs)
        setattr(layer, layout.outputs, len(to.outputs))
        if layout.per_feature and hasattr(layer, "groups"):  # depthwise
            layer.in_channels = layer.groups = len(to.outputs)
    if to.inputs is not None:
        assert layout.inputs is not None
        nothing = not len(to.inputs)
        index = torch.zeros(1, dtype=torch.int64) if nothing else to.inputs
        weight = _select(_weight(layer), layout.in_dim, index)
        if nothing:
            weight.data.zero_()
        setattr(layer, "weight_ih_l0" if layout.gates else "weight", weight)
        setattr(layer, layout.inputs, len(index))
    if to.kept is not None:
        if not isinstance(layer, Gathered):
            assert layout.gathered is not None
            change_class_(layer, layout.gathered)
        layer.register_buffer("kept", to.kept.to(layer.weight.device))
    if to.made is not None:
        _scatter_(layer, layout, to.made.to(layer.weight.device))


def _scatter_(layer: Any, layout: Layout, made: Tensor) -> None:
    """Make of the outputs of a layer those at `made` alone, and constants of the others: their bias."""
    bias = layer.bias
    rest = layer.weight.new_zeros(len(layer.weight)) if bias is None else bias.detach().clone()
    layer.weight = _select(layer.weight, 0, made)
    layer.bias = None if bias is None else _select(bias, 0, made)
    setattr(layer, layout.outputs, len(made))
    change_class_(layer, SCATTERED[type(layer)])
    layer.register_buffer("made", made)
    layer.register_buffer("rest", rest.index_fill(0, made, 0))


def _weight(layer: Any) -> Any:
    return layer.weight_ih_l0 if isinstance(layer, nn.RNNBase) else layer.weight


def _resize_units_(layer: Any, gates: int, units: Tensor) -> None:
    rows = torch.cat([units + gate * layer.hidden_size for gate in range(gates)])
    for name, value in list(layer._parameters.items()):
        part = _select(value, 0, rows)
        if name.startswith("weight_hh") or (name.startswith("weight_ih") and name != "weight_ih_l0"):
            part = _select(part, 1, units)
        setattr(layer, name, part)
    layer.hidden_size = len(units)


def folds_into_bias(layer: nn.Module) -> bool:
    """Whether constant input features of a layer add the same to all positions of an output, and it has a bias."""
    bias = layer.bias_ih_l0 if isinstance(layer, nn.RNNBase) and layer.bias else getattr(layer, "bias", None)
    padding: Any = getattr(layer, "padding", 0)
    padded = padding == "same" or (not isinstance(padding, str) and padding not in (0, (0,), (0, 0), (0, 0, 0)))
    return isinstance(bias, Tensor) and not (padded and getattr(layer, "padding_mode", "") == "zeros")


def _fold_(layer: Any, layout: Layout, to: Resize) -> None:
    """Give what constant input features add to the output to the bias, or to the feature `to.into`."""
    assert to.inputs is not None
    assert to.constants is not None
    weight = _weight(layer)
    constants = to.constants.to(weight.device, torch.float64)
    constants = constants.index_fill(0, to.inputs.to(weight.device), 0.0)
    parts = weight.detach().double().movedim(layout.in_dim, 0)  # [in, out, positions of the kernel...]
    added = torch.tensordot(constants, parts, dims=1)
    if not added.any():
        return
    if folds_into_bias(layer):
        name = "bias_ih_l0" if layout.gates else "bias"
        bias = getattr(layer, name)
        added = added.flatten(1).sum(1) if added.dim() > 1 else added
        setattr(layer, name, nn.Parameter((bias.detach() + added).to(bias.dtype), requires_grad=bias.requires_grad))
        return
    assert to.into is not None
    scaled = added / to.constants[to.into].item()
    changed = parts.clone()
    changed[to.into] += scaled
    changed = changed.movedim(0, layout.in_dim).to(weight.dtype)
    layer.weight = nn.Parameter(changed, requires_grad=weight.requires_grad)


def rows_of(module: nn.Module) -> dict[str, Tensor]:
    """Views of parameters and statistics of a layer, by name; their first dimension counts its output features.

    Example:
        >>> {name: list(rows.shape) for name, rows in rows_of(nn.LSTM(3, 5)).items()}
        {'weight_ih_l0': [5, 4, 3], 'weight_hh_l0': [5, 4, 5], 'bias_ih_l0': [5, 4], 'bias_hh_l0': [5, 4]}
    """
    layout = layout_of(module)
    assert layout is not None
    held = {name: value.data for name, value in module._parameters.items() if value is not None}
    held |= {name: value for name, value in module._buffers.items() if name in _BY_OUTPUT and value is not None}
    if layout.gates:
        return {name: value.unflatten(0, (layout.gates, -1)).movedim(1, 0) for name, value in held.items()}
    return {name: value.movedim(layout.out_dim, 0) if name == "weight" else value for name, value in held.items()}


def clear_rows_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the weights of the output features that `masks` drops to zero, by layer; biases stay."""
    for name, mask in masks.items():
        module = model.get_submodule(name)
        for key, rows in rows_of(module).items() if layout_of(module) is not None else ():
            if key.startswith("weight"):
                rows[~mask.to(rows.device)] = 0


def copy_rows_(model: nn.Module, source: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Give `model` the parameters of `source` for the output features that `masks` drops, by layer."""
    for name, mask in masks.items():
        given = rows_of(source.get_submodule(name))
        for key, rows in rows_of(model.get_submodule(name)).items():
            gone = ~mask.to(rows.device)
            rows[gone] = given[key][gone].to(rows.dtype)


def _select(value: Any, dim: int, index: Tensor) -> Any:
    """The part of a parameter or buffer at `index`, as a new one with the same settings."""
    part = value.detach().index_select(dim, index.to(value.device))
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous():
        part = part.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(part, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else part


def apply_(model: nn.Module, plan: Mapping[str, Resize]) -> None:
    """Resize the layers that `plan` names."""
    for name, to in plan.items():
        resize_(model.get_submodule(name), to)
