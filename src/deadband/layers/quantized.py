"""Layers whose weight is stored in 8 or 4 bits: sparse sites, the output layer, and the embedding tied to it."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deadband.layers import scope
from deadband.layers.computed import ComputedWeight
from deadband.layers.memory import on_huge_pages
from deadband.layers.pending import PendingOutput
from deadband.layers.sparse import (
    ALL_ROWS,
    SPARSE_CLASSES,
    DenseLinear,
    SparseLinear,
    SparseSite,
    change_class_,
    home_of,
    settle_,
    trains,
)
from deadband.ops.gradients import fill_skipped, quantized_product
from deadband.ops.linear import NIBBLES, dequantize, quantized_linear, transformed, uncounted
from deadband.ops.skipping import apply_mask

if TYPE_CHECKING:
    from deadband.layers.formats import QuantizedWeight

_BUFFERS = ("codes", "scales", "minimum")
_TIED = (
    "the output layer's quantised weight is the embedding's, too, and cannot be parametrised or pruned; dequantise it "
    "with deadband.densify_ first"
)
_TAKES_APART = frozenset(f"torch.nn.utils.{name}" for name in ("parametrize", "prune", "weight_norm", "spectral_norm"))


def _to_take_apart() -> bool:
    """Whether a property of ours is read by torch's code that computes a weight from other parameters."""
    return sys._getframe(2).f_globals.get("__name__") in _TAKES_APART


class _Watched(nn.Module):
    """A module without a weight among its parameters, which learns of it when torch wants to take that apart."""

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        if not torch.compiler.is_compiling() and _to_take_apart():
            self._dequantise_for_torch()
        return cast(dict[str, nn.Parameter | None], self.__dict__["_parameters"])

    @_parameters.setter
    def _parameters(self, value: dict[str, nn.Parameter | None]) -> None:
        self.__dict__["_parameters"] = value

    @property
    def weight(self) -> Tensor:
        """The weight as the dense layer holds it: a tensor that is dequantised when its values are read.

        What is written to it is rounded again, with a warning; a table's is the output layer's.
        """
        if torch.compiler.is_compiling():
            return self.compute()
        if _to_take_apart():
            self._dequantise_for_torch()
            return self.weight
        return ComputedWeight(cast(Any, self), *self._like())

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.weight.data = value

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module; a new weight is quantised."""
        if name != "weight":
            super().register_parameter(name, param)
        elif param is not None:
            self.weight.data = param

    def compute(self) -> Tensor:
        """The weight, dequantised."""
        raise NotImplementedError

    def _like(self) -> tuple[Tensor, torch.device]:
        """A tensor of the weight's shape, strides and dtype, without values, and where they would be."""
        raise NotImplementedError

    def _dequantise_for_torch(self) -> None:
        """Give the layer a parameter, which torch.nn.utils can compute a weight from."""
        raise NotImplementedError


class QuantizedMatrix(_Watched):
    """What layers with a quantised weight share: `codes`, `scales` and `minimum` in the place of the parameter.

    `deadband.quantization.QuantizedWeight` says what they hold. The weight does not train; gradients reach the input.
    """

    stored_in_out = False
    codes: Tensor
    scales: Tensor
    minimum: Tensor | None
    bias: Any
    group_size: int
    weight_dtype: torch.dtype  # of the weight that was quantised

    def _like(self) -> tuple[Tensor, torch.device]:
        like = torch.empty(self.shape, dtype=self.weight_dtype, device="meta")
        return like.mT if self.stored_in_out else like, self.codes.device

    def _dequantise_for_torch(self) -> None:
        """Give the layer a parameter, which torch.nn.utils can compute a weight from."""
        if self.__dict__.get("tied"):
            raise NotImplementedError(_TIED)
        unmake_quantized_(self)
        warnings.warn(
            "a layer that is quantised was parametrised or pruned, and keeps its dequantised weight from here on; to "
            "keep it quantised, do that before sparsify_(weights=...), and make it permanent (prune.remove, "
            "parametrize.remove_parametrizations)",
            stacklevel=4,
        )

    def compute(self) -> Tensor:
        """The weight, dequantised."""
        matrix = self.matrix(self.weight_dtype)
        return matrix.mT if self.stored_in_out else matrix

    def compute_row(self, index: int) -> Tensor:
        """One row of the weight as the dense layer holds it, dequantised."""
        return self.compute()[index]

    def take_(self, weight: Tensor) -> None:
        """Quantise another weight, as the dense layer holds it, to the same format, in place."""
        from deadband.layers.formats import WeightFormat
        from deadband.layers.rounding import quantize

        matrix = weight.detach().mT if self.stored_in_out else weight.detach()
        taken = quantize(matrix, WeightFormat.parse(self.weight_format))
        with torch.inference_mode(False), torch.no_grad():
            for name in _BUFFERS:
                if getattr(taken, name) is not None:
                    getattr(self, name).copy_(getattr(taken, name))
        if isinstance(self, SparseSite):
            self.refresh_offset_()
        warnings.warn(
            f"the weight of a layer that is quantised was written to and rounded to {self.weight_format} again; to "
            "round once, write to it (merge adapters) before quantising, or dequantise with deadband.densify_ first",
            stacklevel=3,
        )

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight as [out_features, in_features], dequantised; of experts, with a dimension more in front."""
        return dequantize(self.codes, self.scales, self.minimum, self.group_size, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as a matrix; of those of experts, with a dimension more in front."""
        return *self.codes.shape[:-2], *self.matrix_shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.scales.shape[-1], self.codes.shape[-2]

    @property
    def weight_format(self) -> str:
        """The name of the format, one of `deadband.quantization.FORMATS`."""
        bits = 8 if self.codes.dtype == torch.int8 else 4
        group = f"-g{self.group_size}" if self.group_size else ""
        return f"int{bits}{group}{'' if self.minimum is None else '-zp'}"

    def quantized(self) -> QuantizedWeight:
        """The weight as it is stored."""
        from deadband.layers.formats import QuantizedWeight, WeightFormat

        minimum = None if self.minimum is None else self.minimum.contiguous()
        form = WeightFormat.parse(self.weight_format)
        return QuantizedWeight(self.codes.contiguous(), self.scales.contiguous(), minimum, form)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        exact = {name: getattr(self, name) for name in _BUFFERS}
        super()._apply(fn, recurse)
        for name, before in exact.items():  # model.to(bfloat16) must not round a scale
            after = getattr(self, name)
            if after is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, weights={self.weight_format}"


class QuantizedLinear(QuantizedMatrix, nn.Linear):
    """`nn.Linear` with a weight of 8 or 4 bits; skips nothing. `sparsify_(weights=...)` makes the output layer one."""

    def forward(self, x: Tensor) -> Tensor:
        """y = W · x + bias."""
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or trains(self.bias))
        if transformed():
            return F.linear(x, self.matrix(x.dtype), self.bias)
        if needs_gradient and not torch.compiler.is_exporting():
            return quantized_product(x, self.codes, self.scales, self.minimum, self.bias, self.group_size)
        return quantized_linear(
            x, self.codes, self.scales, self.minimum, self.bias, self.group_size,
            None, None, None, None, False, 0, uncounted(x.device),
        )  # fmt: skip


class QuantizedSite(QuantizedMatrix, SparseSite):
    """What sparse layers with a quantised weight share."""

    def forward(self, x: Tensor) -> Tensor:
        """y = W · (x where kept, else the center, or 0) + bias; skips in training, else up to `sparse_rows` rows."""
        if type(x) is PendingOutput:
            return self.after_gate(x)
        buffers: Any = self._buffers
        bias = self.bias
        threshold, scale, center = buffers["threshold"], buffers["scale"], buffers["center"]
        rows, counts = self.sparse_rows, buffers["counts"]
        if scope.any_open:
            rows, counts = scope.setting_of(self, rows, counts)
        if buffers["mask"] is not None and rows:
            x = apply_mask(x, buffers["mask"])
        if self.training:
            rows, counts = ALL_ROWS if rows else 0, None
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or trains(bias))
        if self.by_output:
            if transformed() or torch.is_autocast_enabled(x.device.type) or needs_gradient:
                return self.without_kernel(
                    x, self.scales.shape[1], rows, lambda: F.linear(x, self.matrix(x.dtype), bias)
                )
            parts = self.parts()[:4]
            return self.before_gate(
                x, self.scales.shape[1], (*parts, self.group_size, threshold, scale, self.relative, rows), counts
            )
        if transformed():
            x = fill_skipped(x, threshold, scale, center, self.relative, rows, None, self.gradient)
            return F.linear(x, self.matrix(x.dtype), bias)
        if needs_gradient and (self.training or not torch.compiler.is_exporting()):
            return quantized_product(
                x, buffers["codes"], buffers["scales"], buffers["minimum"], bias, self.group_size,
                threshold, scale, center, buffers["offset"], self.relative, rows, counts, self.gradient,
            )  # fmt: skip
        if counts is None:
            counts = uncounted(x.device)
        return quantized_linear(
            x, buffers["codes"], buffers["scales"], buffers["minimum"], bias, self.group_size,
            threshold, scale, center, buffers["offset"], self.relative, rows, counts,
        )  # fmt: skip

    def parts(self) -> list[Any]:
        """The layer as `deadband.ops.fused` takes it."""
        names = ("codes", "scales", "minimum", "bias", "threshold", "scale", "center", "offset")
        return [self.bias if name == "bias" else self._buffers[name] for name in names]


class QuantizedSparseLinear(QuantizedSite, nn.Linear):
    """`SparseLinear` with a weight of 8 or 4 bits; made by `deadband.sparsify_(..., weights=...)`.

    Its state dict has `codes`, `scales` and perhaps `minimum` in the place of `weight`.
    """

    dense_class = QuantizedLinear


class QuantizedTable(_Watched, nn.Embedding):
    """An embedding that is tied to a quantised output layer: it reads its rows there, and stores nothing.

    An embedding of another class (Gemma's, which multiplies what it looks up) becomes a subclass of both.
    """

    source: QuantizedMatrix  # the output layer; not a submodule, as it has its own place in the model
    table_dtype: torch.dtype

    def _like(self) -> tuple[Tensor, torch.device]:
        like = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.table_dtype, device="meta")
        return like, self.source.codes.device

    def _dequantise_for_torch(self) -> None:
        raise NotImplementedError(_TIED)

    def compute(self) -> Tensor:
        """The whole table."""
        return self.source.matrix(self.table_dtype)

    def compute_row(self, index: int) -> Tensor:
        """One row of the table."""
        return QuantizedTable.forward(self, torch.tensor(index, device=self.source.codes.device))

    def take_(self, weight: Tensor) -> None:
        """Quantise another table, in the output layer."""
        self.source.take_(weight.t() if self.source.stored_in_out else weight)

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., embedding_dim]."""
        source, flat = self.source, input.reshape(-1)
        if source.codes.is_meta and not input.is_meta:
            raise NotImplementedError(
                "the embedding reads its rows from the quantised output layer, whose codes were offloaded: offload the "
                "model without offload_buffers=True, or untie them (sparsify_(..., output_layer=False))"
            )
        if source.codes.dtype == torch.int8:
            codes = source.codes.index_select(1, flat).float()
        else:
            place = flat % NIBBLES
            packed = source.codes.index_select(1, (flat - place + place % (NIBBLES // 2) * 2) // 2)
            codes = torch.where(place < NIBBLES // 2, packed & 15, packed >> 4).float()
            if source.minimum is None:
                codes = codes - 8
        group = torch.arange(codes.shape[0], device=codes.device) // (source.group_size or codes.shape[0])
        rows = codes * source.scales.index_select(1, flat).float()[group]
        if source.minimum is not None:
            rows = rows + source.minimum.index_select(1, flat).float()[group]
        return rows.t().to(self.table_dtype).reshape(*input.shape, self.embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedTable:
        self.table_dtype = fn(torch.empty(0, dtype=self.table_dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _table, (_other_class(self),), self.__dict__

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{super().extra_repr()}, rows of the {self.source.weight_format} output layer"


_table_classes: dict[type[nn.Embedding], type[QuantizedTable]] = {nn.Embedding: QuantizedTable}


def _table_class(embedding: type[nn.Embedding]) -> type[QuantizedTable]:
    if embedding not in _table_classes:
        # its own forward finds QuantizedTable's where it calls nn.Embedding's
        made = type(f"Quantized{embedding.__name__}", (embedding, QuantizedTable), {"__module__": __name__})
        _table_classes[embedding] = made
    return _table_classes[embedding]


def _table(embedding: type[nn.Embedding]) -> nn.Module:
    return object.__new__(_table_class(embedding))


def _other_class(table: QuantizedTable) -> type[nn.Embedding]:
    return nn.Embedding if type(table) is QuantizedTable else type(table).__bases__[0]


def tie_table_(embedding: nn.Embedding, source: QuantizedMatrix) -> None:
    """Make an embedding read its rows from a quantised output layer, in place."""
    parameter = embedding._parameters.pop("weight")
    assert parameter is not None
    embedding.__dict__["source"] = source
    source.__dict__["tied"] = True
    embedding.__dict__["table_dtype"] = parameter.dtype
    change_class_(embedding, _table_class(type(embedding)))


def untie_table_(table: QuantizedTable, parameter: nn.Parameter) -> None:
    """Give a `QuantizedTable` a weight of its own again."""
    change_class_(table, _other_class(table))
    table.source.__dict__.pop("tied", None)
    del table.__dict__["source"], table.__dict__["table_dtype"]
    table.register_parameter("weight", parameter)


QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantizedMatrix]] = {
    nn.Linear: QuantizedLinear,
    DenseLinear: QuantizedLinear,
    SparseLinear: QuantizedSparseLinear,
}
"""The quantised twin of each class. `deadband.integrations.transformers` adds transformers' Conv1D."""
SPARSE_CLASSES[QuantizedLinear] = QuantizedSparseLinear


def make_quantized_(module: nn.Module, weight: QuantizedWeight) -> nn.Parameter:
    """Put a quantised weight in the place of a layer's, in place; returns the parameter that was there."""
    owner, own_name = home_of(module)
    parameter = owner._parameters.pop(own_name)
    assert parameter is not None
    module.weight_dtype = parameter.dtype  # type: ignore[assignment]
    module.group_size = weight.format.group_size or 0  # type: ignore[assignment]
    for name in _BUFFERS:
        tensor = getattr(weight, name)
        module.register_buffer(name, tensor if tensor is None or tensor.is_meta else on_huge_pages(tensor))
    change_class_(module, QUANTIZED_CLASSES[type(module)])
    if isinstance(module, SparseSite):
        module.refresh_offset_()
    settle_(module)
    return parameter


def unmake_quantized_(module: QuantizedMatrix, parameter: nn.Parameter | None = None) -> None:
    """Give a layer a weight of its own again: `parameter`, or the dequantised one."""
    if parameter is None:
        parameter = nn.Parameter(module.compute().contiguous(), requires_grad=module.weight_dtype.is_floating_point)
    twin = next(dense for dense, quantised in QUANTIZED_CLASSES.items() if quantised is type(module))
    for name in (*_BUFFERS, "weight_dtype", "group_size"):
        delattr(module, name)
    change_class_(module, twin)
    module.register_parameter("weight", parameter)
    settle_(module)
