"""Operators of the second half of gated MLPs: where the gate is closed, neither up nor down is read.

deadband::up_linear(x, weight, scales, minimum, bias, group_size, threshold, scale, relative, sparse_rows, counts) -> y

    up(x), all of it: a layer that stands alone does not know its gate. The weight lies by output, as below; the rule is
    that of the gate's entries and comes to use once the layer is a part of `gated_down`.

deadband::gated_down(x, gate, parts, group_sizes, relative, sparse_rows, counts) -> y

    down(gate * up(x)), where `gate` was made of another layer's outputs, by whatever activation

    x          [..., in_features]
    gate       [..., inner features], in the dtype of x
    parts      eight for each of up and down, as in `deadband.ops.fused`. Up lies by output: its weight has strides
               (in_features, 1), its codes, scales and minimum are laid out transposed. Its threshold and scale are
               those of the gate's entries: an output whose entry is skipped counts as zero, and its weights are not
               read. It has no center.
    group_sizes, relative
               one for each
    sparse_rows  inputs of at most so many rows skip
    counts     one for each, or none at all; those of up are of the gate's entries
    y          [..., out_features], contiguous

With a threshold of zero nothing is lost, unless up gives infinity or NaN where the gate is closed.

deadband::packed_gated_down(x, gate, layers, in_features, out_features, sparse_rows) -> y

    the same with all that is known of the layers in one tensor, as `deadband.ops.fused.packed_linears` has it
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from deadband.ops import kernels, products
from deadband.ops.cpu import SPARSE_ROWS, failed, is_exact, is_vector
from deadband.ops.fused import (
    LAYER,
    PARTS,
    THRESHOLD,
    add_layers,
    bits_of,
    layer_reference,
    out_features_of,
    quantized_fits,
)
from deadband.ops.kernels import KERNEL_DTYPES
from deadband.ops.linear import COUNTS, count_, dequantize, operators
from deadband.ops.skipping import fill, keep_mask

operators.define(
    "up_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? minimum, Tensor? bias, int group_size, "
    "Tensor threshold, Tensor? scale, bool relative, int sparse_rows, Tensor(a!)? counts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operators.define(
    "gated_down(Tensor x, Tensor gate, Tensor?[] parts, int[] group_sizes, bool[] relative, int sparse_rows, "
    "Tensor(a!)[] counts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operators.define(
    "packed_gated_down(Tensor x, Tensor gate, Tensor layers, int in_features, int out_features, int sparse_rows) "
    "-> Tensor"
)
up_linear = torch.ops.deadband.up_linear.default
gated_down = torch.ops.deadband.gated_down.default
packed_gated_down = torch.ops.deadband.packed_gated_down.default


def up_linear_reference(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    threshold: Tensor,
    scale: Tensor | None,
    relative: bool,
    sparse_rows: int,
    counts: Tensor | None,
) -> Tensor:
    """What the operator means, in plain torch."""
    if scales is not None:
        weight = dequantize(weight, scales, minimum, group_size, x.dtype)
    return products.linear(x, weight, bias).contiguous()


operators.impl("up_linear", up_linear_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("deadband::up_linear", lib=operators)
def _up_linear_fake(x, weight, scales, minimum, bias, group_size, threshold, scale, relative, sparse_rows, counts):
    return x.new_empty((*x.shape[:-1], weight.shape[0] if scales is None else scales.shape[1]))


def gated_down_reference(
    x: Tensor,
    gate: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
) -> Tensor:
    """What the operator means: all of up, and zeros where the gate is closed."""
    weight, scales, minimum, bias, threshold, scale = parts[:6]
    assert weight is not None
    up = torch.ops.deadband.up_linear(
        x, weight, scales, minimum, bias, group_sizes[0], torch.zeros(()), None, False, 0, None
    )
    if threshold is not None and gate.shape[:-1].numel() <= sparse_rows:
        keep = keep_mask(gate, threshold, scale, None, relative[0])
        if counts:
            count_(counts[0], gate, keep)
        h = fill(fill(gate, keep, None) * up, keep, None)
    else:
        h = gate * up
    return layer_reference(h, parts, group_sizes, relative, sparse_rows, counts, 1)


operators.impl("gated_down", gated_down_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("deadband::gated_down", lib=operators)
def _gated_down_fake(x, gate, parts, group_sizes, relative, sparse_rows, counts):
    torch._check(
        len(parts) == 2 * PARTS and len(group_sizes) == len(relative) == 2 and len(counts) in (0, 2),
        lambda: f"gated_down takes 2 layers; got {len(parts)} parts and {len(counts)} counts",
    )
    torch._check(
        gate.shape[-1] == out_features_of(parts, 0),
        lambda: f"gate has {gate.shape[-1]} features, up has {out_features_of(parts, 0)} outputs",
    )
    return x.new_empty((*x.shape[:-1], out_features_of(parts, 1)))


@torch.library.register_fake("deadband::packed_gated_down", lib=operators)
def _packed_gated_down_fake(x, gate, layers, in_features, out_features, sparse_rows):
    return x.new_empty((*x.shape[:-1], out_features))


# ------------------------------------------------------------------------------------------------------------ on CPUs

_get_num_threads = torch.get_num_threads
_packers = [struct.Struct(f"{LAYER * layers}q").pack for layers in range(3)]
if kernels.library is not None:
    _kernel = kernels.library.deadband_gated_down


def _add_up(
    fields: list[int],
    dtype: torch.dtype,
    in_features: int,
    parts: Sequence[Tensor | None],
    group_size: int,
    relative: bool,
    counts: Tensor | None,
    address=Tensor.data_ptr,
) -> bool:
    """Append the up-projection as csrc/kernels.h has it; False where the kernel does not take it."""
    weight, scales, minimum, bias, threshold, scale, center, offset = parts[:PARTS]
    if weight is None or center is not None or offset is not None:
        return False
    if scales is None:
        bits, outputs, stride, group_size = 0, weight.shape[0], weight.shape[1], 0
        if weight.dtype is not dtype or weight.shape[1] != in_features or not weight.is_contiguous():
            return False
    else:
        bits, outputs, stride = bits_of(weight), scales.shape[1], 0
        views = [None if each is None else each.t() for each in (weight, scales, minimum)]
        if not all(each is None or each.is_contiguous() for each in views):
            return False
        if not quantized_fits(weight, scales, minimum, bits, group_size, in_features, outputs, laid_out=False):
            return False
    if (
        not (bias is None or is_vector(bias, dtype, outputs))
        or not (threshold is None or is_vector(threshold, torch.float32, 1))
        or not (scale is None or is_vector(scale, torch.float32, outputs))
        or not (counts is None or is_vector(counts, torch.int64, COUNTS))
    ):
        return False
    at = [0 if each is None else address(each) for each in (scales, minimum, bias, threshold, scale, counts)]
    counted = at[5] if threshold is not None else 0
    fields += (bits, outputs, address(weight), stride, *at[:2], group_size, *at[2:5], 0, 0, relative, counted)
    return True


def _add_both(
    fields: list[int],
    dtype: torch.dtype,
    in_features: int,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
    address=Tensor.data_ptr,
) -> bool:
    own = counts[0] if counts else None
    inner = (out_features_of(parts, 0),)
    return _add_up(fields, dtype, in_features, parts, group_sizes[0], relative[0], own, address) and add_layers(
        fields, dtype, inner, parts[PARTS:], group_sizes[1:], relative[1:], counts[1:], address
    )


def _gated_down_on_cpu(
    x: Tensor,
    gate: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
) -> Tensor:
    in_features = x.shape[-1]
    rows = x.numel() // in_features if in_features else x.shape[:-1].numel()
    fields: list[int] = []
    if (
        x.dtype not in KERNEL_DTYPES
        or gate.dtype is not x.dtype
        or rows > min(sparse_rows, SPARSE_ROWS)
        or is_exact()
        or not _add_both(fields, x.dtype, in_features, parts, group_sizes, relative, counts)
    ):
        return gated_down_reference(x, gate, parts, group_sizes, relative, sparse_rows, counts)
    return _call(x, gate, _packers[2](*fields), rows, in_features, fields[1 + LAYER])


def _call(x: Tensor, gate: Tensor, layers: bytes | int, rows: int, in_features: int, out_features: int) -> Tensor:
    x, gate = x.contiguous(), gate.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    error = _kernel(
        KERNEL_DTYPES[x.dtype], x.data_ptr(), rows, in_features, in_features, gate.data_ptr(), layers, 2, y.data_ptr(),
        _get_num_threads(),
    )  # fmt: skip
    return y if not error else failed(error, x, y)


def can_pack(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
) -> bool:
    """Whether the kernel takes these layers for a few rows of x. Looks at no values: the tensors may be fake ones."""
    if kernels.library is None or x.device.type != "cpu" or x.dtype not in KERNEL_DTYPES:
        return False
    return _add_both([], x.dtype, x.shape[-1], parts, group_sizes, relative, counts, lambda _: 1)


def pack(
    dtype: torch.dtype,
    in_features: int,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
) -> Tensor:
    """The `layers` of `packed_gated_down`: as they are, and then without thresholds.

    Raises:
        ValueError: the kernel does not take such layers, see `can_pack`.
    """
    fields: list[int] = []
    if not _add_both(fields, dtype, in_features, parts, group_sizes, relative, counts):
        raise ValueError("the kernel does not take such layers")
    skipping = torch.tensor(fields, dtype=torch.int64).view(-1, LAYER)
    dense = skipping.clone()
    dense[:, THRESHOLD] = 0
    return torch.stack([skipping, dense])


def _packed_gated_down_on_cpu(
    x: Tensor, gate: Tensor, layers: Tensor, in_features: int, out_features: int, sparse_rows: int
) -> Tensor:
    rows = x.numel() // in_features
    if not 0 < rows <= SPARSE_ROWS or x.shape[-1] != in_features:
        raise RuntimeError(f"x is {list(x.shape)}, expected 1 to {SPARSE_ROWS} rows of {in_features}")
    at = layers.data_ptr() if rows <= sparse_rows else layers.data_ptr() + 2 * LAYER * 8
    return _call(x, gate, at, rows, in_features, out_features)


def _up_linear_on_cpu(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    threshold: Tensor,
    scale: Tensor | None,
    relative: bool,
    sparse_rows: int,
    counts: Tensor | None,
) -> Tensor:
    in_features = x.shape[-1]
    rows = x.numel() // in_features if in_features else x.shape[:-1].numel()
    fields: list[int] = []
    parts = (weight, scales, minimum, bias, None, None, None, None)
    few = 0 < rows <= SPARSE_ROWS and x.dtype in KERNEL_DTYPES and not is_exact()
    if not few or not _add_up(fields, x.dtype, in_features, parts, group_size, False, None):
        return up_linear_reference(
            x, weight, scales, minimum, bias, group_size, threshold, scale, relative, sparse_rows, counts
        )
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], fields[1]))
    error = _kernel(
        KERNEL_DTYPES[x.dtype], x.data_ptr(), rows, in_features, in_features, None, _packers[1](*fields), 1,
        y.data_ptr(), _get_num_threads(),
    )  # fmt: skip
    return y if not error else failed(error, x, y)


if kernels.library is not None:
    operators.impl("up_linear", _up_linear_on_cpu, "CPU")
    operators.impl("gated_down", _gated_down_on_cpu, "CPU")
    operators.impl("packed_gated_down", _packed_gated_down_on_cpu, "CPU")
