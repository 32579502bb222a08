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
    if getattr(module, "groups", 1) == 1:
        return layout
    depthwise = module.groups == module.in_channels == module.out_channels
    return dataclasses.replace(layout, inputs=None, gathered=None, per_feature=True) if depthwise else None


def shared_parameters(model: nn.Module) -> set[nn.Module]:
    """The modules of `model` that hold a parameter which another of its modules holds, too."""
    held = [(id(value), module) for module in model.modules() for value in module._parameters.values()]
    counts = Counter(key for key, _ in held if key != id(None))
    return {module for key, module in held if counts[key] > 1}


# ------------------------------------------------------------------------------------------------------------ resizing


@dataclasses.dataclass(frozen=True)
class Resize:
    """What one layer is cut down to, as indices: the output and input features of its weight, and what it gathers."""

    outputs: Tensor | None = None  # [k] int64
    inputs: Tensor | None = None
    kept: Tensor | None = None


def resize_(module: nn.Module, to: Resize) -> None:
    """Cut one layer down in place; a layer that keeps no input gets one feature, with a weight of zero."""
    layout, layer = layout_of(module), cast(Any, module)
    assert layout is not None
    if to.outputs is not None:
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
        layer.weight = _select(layer.weight, layout.in_dim, index)
        if nothing:
            layer.weight.data.zero_()
        setattr(layer, layout.inputs, len(index))
    if to.kept is not None:
        if not isinstance(layer, Gathered):
            assert layout.gathered is not None
            change_class_(layer, layout.gathered)
        layer.register_buffer("kept", to.kept.to(layer.weight.device))


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
