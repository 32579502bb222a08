"""Operators that do in one call what several layers do: fewer passes over x, fewer calls, threads woken less often.

deadband::linears(x, parts, group_sizes, relative, sparse_rows, counts) -> y

    the outputs of several layers on the one x, side by side

    parts      eight for each layer: weight or codes, scales, minimum, bias, threshold, scale, center, offset; the
               arguments of `sparse_linear` where scales is None, else those of `quantized_linear`
    group_sizes, relative
               one for each layer
    counts     one for each layer, or none at all
    y          [..., sum of the layers' out_features], contiguous

deadband::gated_mlp(x, parts, group_sizes, relative, sparse_rows, counts, activation) -> y

    down(activation(gate(x)) * up(x)), with the parts of gate, up and down. As layer by layer, the outputs of gate and
    up, of the activation and the product are rounded to the dtype of x.

    activation  "silu", or "gelu_tanh": GELU by its approximation with tanh

deadband::packed_linears(x, layers, in_features, out_features, sparse_rows) -> y
deadband::packed_gated_mlp(x, layers, in_features, out_features, sparse_rows, activation) -> y

    the same for 1 to 8 rows of x, with all that is known of the layers in one tensor, which `pack` makes: the addresses
    of their weights, thresholds and counts, as csrc/kernels.h has them. None of that is checked again: whoever packs
    keeps the tensors alive and in place. While a model decodes, its weights push everything else out of the caches, and
    a call costs as much as it has Python objects to look at: some 20 us with the parts of three layers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deadband.ops import kernels
from deadband.ops.cpu import SPARSE_ROWS, failed, is_vector
from deadband.ops.kernels import KERNEL_DTYPES
from deadband.ops.linear import COUNTS, NIBBLES, current_offset, operators, quantized_linear, sparse_linear

PARTS = 8
ACTIVATIONS = ("silu", "gelu_tanh")
"""As csrc/kernels.h numbers them."""
LAYER = 14  # fields of csrc/kernels.h's deadband_layer, 8 bytes each
THRESHOLD = 8  # the place of one of them
operators.define(
    "linears(Tensor x, Tensor?[] parts, int[] group_sizes, bool[] relative, int sparse_rows, Tensor(a!)[] counts) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operators.define(
    "gated_mlp(Tensor x, Tensor?[] parts, int[] group_sizes, bool[] relative, int sparse_rows, Tensor(a!)[] counts, "
    "str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operators.define(
    "packed_linears(Tensor x, Tensor layers, int in_features, int out_features, int sparse_rows) -> Tensor"
)
operators.define(
    "packed_gated_mlp(Tensor x, Tensor layers, int in_features, int out_features, int sparse_rows, int activation) "
    "-> Tensor"
)
linears = torch.ops.deadband.linears.default
gated_mlp = torch.ops.deadband.gated_mlp.default
packed_linears = torch.ops.deadband.packed_linears.default
packed_gated_mlp = torch.ops.deadband.packed_gated_mlp.default


def linears_reference(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
) -> Tensor:
    """What the operator means: the layers one by one."""
    layers = range(len(group_sizes))
    return torch.cat(
        [layer_reference(x, parts, group_sizes, relative, sparse_rows, counts, layer) for layer in layers], -1
    )


def gated_mlp_reference(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """What the operator means: the layers one by one."""
    arguments = (parts, group_sizes, relative, sparse_rows, counts)
    gate, up = (layer_reference(x, *arguments, layer) for layer in (0, 1))
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return layer_reference(gate * up, *arguments, 2)


def layer_reference(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
    layer: int,
) -> Tensor:
    """One of the layers, by its own operator."""
    own: Any = parts[PARTS * layer : PARTS * (layer + 1)]
    weight, scales, minimum, bias, *rule = own
    rest = (*rule, relative[layer], sparse_rows, counts[layer] if counts else None)
    if scales is None:
        return sparse_linear(x, weight, bias, *rest)
    return quantized_linear(x, weight, scales, minimum, bias, group_sizes[layer], *rest)


operators.impl("linears", linears_reference, "CompositeExplicitAutograd")
operators.impl("gated_mlp", gated_mlp_reference, "CompositeExplicitAutograd")


def _check(parts, group_sizes, relative, counts):
    layers = len(group_sizes)
    torch._check(
        len(parts) == PARTS * layers and len(relative) == layers and len(counts) in (0, layers),
        lambda: (
            f"{layers} layers have {PARTS * layers} parts and 0 or {layers} counts; got {len(parts)}, {len(counts)}"
        ),
    )


def out_features_of(parts, layer):
    """How many outputs a layer among these parts has."""
    weight, scales = parts[PARTS * layer], parts[PARTS * layer + 1]
    return weight.shape[0] if scales is None else scales.shape[1]


@torch.library.register_fake("deadband::linears", lib=operators)
def _linears_fake(x, parts, group_sizes, relative, sparse_rows, counts):
    _check(parts, group_sizes, relative, counts)
    return x.new_empty((*x.shape[:-1], sum(out_features_of(parts, layer) for layer in range(len(group_sizes)))))


@torch.library.register_fake("deadband::gated_mlp", lib=operators)
def _gated_mlp_fake(x, parts, group_sizes, relative, sparse_rows, counts, activation):
    _check(parts, group_sizes, relative, counts)
    torch._check(
        len(group_sizes) == 3 and activation in ACTIVATIONS,
        lambda: f"gated_mlp takes 3 layers and one of {ACTIVATIONS}; got {len(group_sizes)} and {activation!r}",
    )
    return x.new_empty((*x.shape[:-1], out_features_of(parts, 2)))


@torch.library.register_fake("deadband::packed_linears", lib=operators)
def _packed_linears_fake(x, layers, in_features, out_features, sparse_rows):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("deadband::packed_gated_mlp", lib=operators)
def _packed_gated_mlp_fake(x, layers, in_features, out_features, sparse_rows, activation):
    return x.new_empty((*x.shape[:-1], out_features))


# ------------------------------------------------------------------------------------------------------------ on CPUs

_get_num_threads = torch.get_num_threads
_packers = [struct.Struct(f"{LAYER * layers}q").pack for layers in range(17)]
if kernels.library is not None:
    _linears_kernel, _mlp_kernel = kernels.library.deadband_linears, kernels.library.deadband_gated_mlp


def _linears_on_cpu(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
) -> Tensor:
    shape = x.shape
    in_features = shape[-1]
    rows = x.numel() // in_features if in_features else shape[:-1].numel()
    dtype = KERNEL_DTYPES.get(x.dtype)
    fields: list[int] = []
    count = len(group_sizes)
    if (
        dtype is None
        or rows > sparse_rows
        or rows > SPARSE_ROWS
        or not 0 < count < len(_packers)
        or not add_layers(fields, x.dtype, (in_features,) * count, parts, group_sizes, relative, counts)
    ):
        return linears_reference(x, parts, group_sizes, relative, sparse_rows, counts)
    x = x.contiguous()
    y = x.new_empty((*shape[:-1], sum(fields[1::LAYER])))
    error = _linears_kernel(
        dtype,
        x.data_ptr(),
        rows,
        in_features,
        in_features,
        _packers[count](*fields),
        count,
        y.data_ptr(),
        _get_num_threads(),
    )
    return y if not error else failed(error, x, y)


def _gated_mlp_on_cpu(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
    activation: str,
) -> Tensor:
    shape = x.shape
    in_features = shape[-1]
    rows = x.numel() // in_features if in_features else shape[:-1].numel()
    dtype = KERNEL_DTYPES.get(x.dtype)
    fields: list[int] = []
    inputs = (in_features, in_features, out_features_of(parts, 0))
    if (
        dtype is None
        or rows > sparse_rows
        or rows > SPARSE_ROWS
        or not add_layers(fields, x.dtype, inputs, parts, group_sizes, relative, counts)
        or fields[1] != fields[1 + LAYER]
    ):
        return gated_mlp_reference(x, parts, group_sizes, relative, sparse_rows, counts, activation)
    x = x.contiguous()
    y = x.new_empty((*shape[:-1], fields[1 + 2 * LAYER]))
    error = _mlp_kernel(
        dtype,
        x.data_ptr(),
        rows,
        in_features,
        in_features,
        _packers[3](*fields),
        ACTIVATIONS.index(activation),
        y.data_ptr(),
        _get_num_threads(),
    )
    return y if not error else failed(error, x, y)


def add_layers(
    fields: list[int],
    dtype: torch.dtype,
    inputs: Sequence[int],
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
    address: Callable[[Tensor], int] = Tensor.data_ptr,
) -> bool:
    """Append the layers as csrc/kernels.h has them; False where the kernels do not take one of them.

    Runs for each layer of each token: attributes are read once, and what is None is not looked at.
    """
    # Long on purpose: a call of a function for each of the checks costs more than they do.
    for layer, in_features in enumerate(inputs):
        at = PARTS * layer
        weight, scales, minimum, bias, threshold, scale, center, offset = parts[at : at + PARTS]
        assert weight is not None
        if scales is None:
            bits, group_size, scales_at, minimum_at = 0, 0, 0, 0
            out_features, columns = weight.shape
            out_stride, stride = weight.stride()
            if weight.dtype is not dtype or columns != in_features or out_stride != 1 or threshold is None:
                return False
        else:
            bits, group_size, stride, out_features = bits_of(weight), group_sizes[layer], 0, scales.shape[1]
            if not quantized_fits(weight, scales, minimum, bits, group_size, in_features, out_features):
                return False
            scales_at, minimum_at = address(scales), 0 if minimum is None else address(minimum)
        bias_at = threshold_at = scale_at = center_at = offset_at = counts_at = 0
        if bias is not None:
            if not is_vector(bias, dtype, out_features):
                return False
            bias_at = address(bias)
        if threshold is not None:
            if threshold.dtype is not torch.float32 or threshold.numel() != 1:
                return False
            threshold_at = address(threshold)
        if scale is not None:
            if not is_vector(scale, torch.float32, in_features):
                return False
            scale_at = address(scale)
        if center is not None or offset is not None:
            if (
                center is None
                or offset is None
                or not is_vector(center, torch.float32, in_features)
                or not is_vector(offset, torch.float32, out_features)
            ):
                return False
            if scales is None:
                offset = current_offset(weight, center, offset)
            center_at, offset_at = address(center), address(offset)
        if counts and threshold_at:
            own = counts[layer]
            if not is_vector(own, torch.int64, COUNTS):
                return False
            counts_at = address(own)
        fields += (
            bits, out_features, address(weight), stride, scales_at, minimum_at, group_size, bias_at,
            threshold_at, scale_at, center_at, offset_at, relative[layer], counts_at,
        )  # fmt: skip
    return True


def bits_of(codes: Tensor) -> int:
    """Of each code of a quantised weight."""
    return 8 if codes.dtype is torch.int8 else 4


def quantized_fits(
    codes: Tensor,
    scales: Tensor,
    minimum: Tensor | None,
    bits: int,
    group_size: int,
    inputs: int,
    outputs: int,
    laid_out: bool = True,
) -> bool:
    """Whether these are a quantised weight of such a shape, as kernels read it; with `laid_out` by input."""
    groups = -(-inputs // group_size) if group_size else 1
    return (
        (bits == 8 or codes.dtype is torch.uint8)
        and codes.shape == (inputs, outputs if bits == 8 else -(-outputs // NIBBLES) * (NIBBLES // 2))
        and scales.dtype is (torch.float16 if group_size else torch.float32)
        and scales.shape[0] == groups
        and (not laid_out or (codes.is_contiguous() and scales.is_contiguous()))
        and (
            minimum is None
            or (
                bits == 4
                and group_size > 0
                and minimum.dtype is torch.float16
                and minimum.shape == scales.shape
                and (not laid_out or minimum.is_contiguous())
            )
        )
    )


def can_pack(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
    mlp: bool = False,
) -> bool:
    """Whether the kernels take these layers for a few rows of x. Looks at no values: the tensors may be fake ones."""
    if kernels.library is None or x.device.type != "cpu" or x.dtype not in KERNEL_DTYPES:
        return False
    inputs = _inputs(x.shape[-1], parts, mlp)
    return add_layers([], x.dtype, inputs, parts, group_sizes, relative, counts, lambda _: 1)


def pack(
    dtype: torch.dtype,
    in_features: int,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
    mlp: bool = False,
) -> Tensor:
    """The `layers` of `packed_linears`, or with `mlp` of `packed_gated_mlp`, for an x of that dtype and width: as they
    are, and then without thresholds, for more rows than they skip entries of.

    Raises:
        ValueError: the kernels do not take such layers, see `can_pack`.
    """
    fields: list[int] = []
    if not add_layers(fields, dtype, _inputs(in_features, parts, mlp), parts, group_sizes, relative, counts):
        raise ValueError("the kernels do not take such layers")
    skipping = torch.tensor(fields, dtype=torch.int64).view(-1, LAYER)
    dense = skipping.clone()
    dense[:, THRESHOLD] = 0
    return torch.stack([skipping, dense])


def _inputs(in_features: int, parts: Sequence[Tensor | None], mlp: bool) -> list[int]:
    return [in_features, in_features, out_features_of(parts, 0)] if mlp else [in_features] * (len(parts) // PARTS)


def _packed_linears_on_cpu(x: Tensor, layers: Tensor, in_features: int, out_features: int, sparse_rows: int) -> Tensor:
    rows = x.numel() // in_features
    if not 0 < rows <= SPARSE_ROWS or x.shape[-1] != in_features:
        raise RuntimeError(f"x is {list(x.shape)}, expected 1 to {SPARSE_ROWS} rows of {in_features}")
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    count = layers.shape[1]
    at = layers.data_ptr() if rows <= sparse_rows else layers.data_ptr() + count * LAYER * 8
    error = _linears_kernel(
        KERNEL_DTYPES[x.dtype], x.data_ptr(), rows, in_features, in_features, at, count, y.data_ptr(),
        _get_num_threads(),
    )  # fmt: skip
    return y if not error else failed(error, x, y)


def _packed_gated_mlp_on_cpu(
    x: Tensor, layers: Tensor, in_features: int, out_features: int, sparse_rows: int, activation: int
) -> Tensor:
    rows = x.numel() // in_features
    if not 0 < rows <= SPARSE_ROWS or x.shape[-1] != in_features:
        raise RuntimeError(f"x is {list(x.shape)}, expected 1 to {SPARSE_ROWS} rows of {in_features}")
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    at = layers.data_ptr() if rows <= sparse_rows else layers.data_ptr() + 3 * LAYER * 8
    error = _mlp_kernel(
        KERNEL_DTYPES[x.dtype], x.data_ptr(), rows, in_features, in_features, at, activation, y.data_ptr(),
        _get_num_threads(),
    )  # fmt: skip
    return y if not error else failed(error, x, y)


if kernels.library is not None:
    operators.impl("packed_linears", _packed_linears_on_cpu, "CPU")
    operators.impl("packed_gated_mlp", _packed_gated_mlp_on_cpu, "CPU")
    operators.impl("linears", _linears_on_cpu, "CPU")
    operators.impl("gated_mlp", _gated_mlp_on_cpu, "CPU")
