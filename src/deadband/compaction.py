"""compact_: input features that a static mask drops are removed for real, from weights and from what made them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deadband.bench import interleave, median
from deadband.linear import change_class_
from deadband.running import evaluating

ROUNDS = 5  # calls that the latency in a report is the median of
Example = tuple[tuple, dict]


# ------------------------------------------------------------------------------------------------- layers that gather


class _Gathered(nn.Module):
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
        if not self.kept.numel():
            return torch.zeros_like(x.narrow(self.feature_dim, 0, 1))
        if self.feature_dim == -1 and x.dim() > 2:  # on CPUs ten times as fast as with more dimensions
            return x.flatten(0, -2).index_select(1, self.kept).view(*x.shape[:-1], -1)
        return x.index_select(self.feature_dim, self.kept)


class GatheredLinear(_Gathered, nn.Linear):
    """`nn.Linear` on a part of its input's features; made by `compact_` where the input has to stay whole."""

    feature_dim = -1


class GatheredConv1d(_Gathered, nn.Conv1d):
    """`nn.Conv1d` on a part of its input's channels."""

    feature_dim = -2


class GatheredConv2d(_Gathered, nn.Conv2d):
    """`nn.Conv2d` on a part of its input's channels."""

    feature_dim = -3


class GatheredConv3d(_Gathered, nn.Conv3d):
    """`nn.Conv3d` on a part of its input's channels."""

    feature_dim = -4


def __getattr__(name: str) -> Any:
    """GatheredConv1D, for transformers' Conv1D: made when it is needed, as importing transformers takes a second."""
    if name != "GatheredConv1D":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers.pytorch_utils import Conv1D

    body = {"__module__": __name__, "__doc__": "`Conv1D` on a part of its input's features.", "feature_dim": -1}
    globals()[name] = made = type(name, (_Gathered, Conv1D), {**body, "forward": _forward_x})
    return made


def _forward_x(self: Any, x: Tensor) -> Tensor:  # Conv1D calls its argument x
    return _Gathered.forward(self, x)


# ------------------------------------------------------------------------------------------------------------- layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a class of layers keeps its features: the attributes that count them, the dimensions of the weight."""

    outputs: str
    out_dim: int
    inputs: str | None = None  # None: what comes out has the features that went in
    in_dim: int = 1
    gathered: type[nn.Module] | None = None

    def out_width(self, module: nn.Module) -> int:
        """The number of output features."""
        return getattr(module, self.outputs)

    def in_width(self, module: nn.Module) -> int:
        """The number of input features that the weight has columns for."""
        return getattr(module, self.inputs or self.outputs)


_PER_CHANNEL = Layout("num_features", 0)
_LAYOUTS: dict[type[nn.Module], Layout] = {
    nn.Linear: Layout("out_features", 0, "in_features", gathered=GatheredLinear),
    nn.Conv1d: Layout("out_channels", 0, "in_channels", gathered=GatheredConv1d),
    nn.Conv2d: Layout("out_channels", 0, "in_channels", gathered=GatheredConv2d),
    nn.Conv3d: Layout("out_channels", 0, "in_channels", gathered=GatheredConv3d),
    nn.Embedding: Layout("embedding_dim", 1, "num_embeddings", 0),
    nn.BatchNorm1d: _PER_CHANNEL,
    nn.BatchNorm2d: _PER_CHANNEL,
    nn.BatchNorm3d: _PER_CHANNEL,
    nn.PReLU: Layout("num_parameters", 0),
}


def conv1d_class() -> type[nn.Module] | None:
    """transformers' Conv1D, if anything has imported it."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def layout_of(module: nn.Module) -> Layout | None:
    """How `module` can be resized; None: not at all. Subclasses cannot: they may compute something else."""
    kind = type(module)
    if issubclass(kind, _Gathered):
        kind = kind.__mro__[2]
    if kind is conv1d_class():
        return Layout("nf", 1, "nx", 0, gathered=getattr(sys.modules[__name__], "GatheredConv1D"))  # noqa: B009
    layout = _LAYOUTS.get(kind)
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return None  # one slope for all
    if layout is not None and getattr(module, "groups", 1) > 1:
        return dataclasses.replace(layout, inputs=None) if is_depthwise(module) else None
    return layout


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution has one filter for each channel."""
    return getattr(module, "groups", None) == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0)


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
    layout = layout_of(module)
    assert layout is not None
    if to.outputs is not None:
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None and value.dim():
                    values[name] = _select(value, layout.out_dim if name == "weight" else 0, to.outputs)
        setattr(module, layout.outputs, len(to.outputs))
        if is_conv_of_channels(module, layout):
            module.in_channels = module.groups = len(to.outputs)  # type: ignore[assignment]
    if to.inputs is not None:
        assert layout.inputs is not None
        nothing = not len(to.inputs)
        index = torch.zeros(1, dtype=torch.int64) if nothing else to.inputs
        module.weight = _select(module.weight, layout.in_dim, index)
        if nothing:
            module.weight.data.zero_()
        setattr(module, layout.inputs, len(index))
    if to.kept is not None:
        if not isinstance(module, _Gathered):
            assert layout.gathered is not None
            change_class_(module, layout.gathered)
        module.register_buffer("kept", to.kept.to(module.weight.device))


def is_conv_of_channels(module: nn.Module, layout: Layout) -> bool:
    """Whether the number of channels is also the number of groups."""
    return layout.inputs is None and hasattr(module, "groups")


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


@contextlib.contextmanager
def _restoring(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On any exception in the block, Ctrl-C included, the modules have their class, attributes and tensors again."""
    before = [
        (module, type(module), dict(vars(module)), dict(module._parameters), dict(module._buffers))
        for module in dict.fromkeys(modules)
    ]
    try:
        yield
    except BaseException:
        for module, kind, attributes, parameters, buffers in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for values, saved in ((module._parameters, parameters), (module._buffers, buffers)):
                values.clear()
                values.update(saved)
        raise
