"""The operator of experts: a linear layer with several weights, of which each row of x names the one it meets.

deadband::expert_linear(x, experts, weight, scales, minimum, bias, group_size, threshold, scale, center, offset, relative,
                        sparse_rows, counts) -> y

    x          [rows, in_features]
    experts    [rows] int64: the weight of each row; a row with a negative number meets none, and gives zeros
    weight     [experts, out_features, in_features], fast with strides (out * in, 1, out), or the codes of a quantised
               one, [experts, in_features, ...]
    scales, minimum, group_size
               None, None and 0, or those of a quantised weight, with a first dimension of experts each
    bias       [experts, out_features] or None
    threshold  [] float32, or None: nothing is skipped
    scale, center
               as in `deadband.ops.linear`, for all experts: [in_features] float32 or None
    offset     [experts, out_features] float32, the products of weights and center, or None where center is
    relative, sparse_rows
               as there; the rows are counted here, so that a token of which several experts are chosen counts as many
    counts     as there, or None; rows without an expert do not count
    y          [rows, out_features], contiguous, in the dtype of x

Weights of experts that no row names are not read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deadband.ops import cpu, kernels
from deadband.ops.fused import LAYER, bits_of, quantized_fits
from deadband.ops.kernels import KERNEL_DTYPES
from deadband.ops.linear import COUNTS, count_, current_offset, dequantize, operators
from deadband.ops.skipping import fill, keep_mask

operators.define(
    "expert_linear(Tensor x, Tensor experts, Tensor weight, Tensor? scales, Tensor? minimum, Tensor? bias, "
    "int group_size, Tensor? threshold, Tensor? scale, Tensor? center, Tensor? offset, bool relative, int sparse_rows, "
    "Tensor(a!)? counts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
FEW_ROWS = 128
"""Rows up to which the kernel takes them together; beyond, experts are multiplied by one after the other."""


def grouped(x: Tensor, experts: Tensor, count: int, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`product(expert, its rows of x)` for each of `count` experts that a row names, in the order of the rows.

    Differentiable, if the product is.
    """
    order = experts.argsort(stable=True)
    numbers = torch.bincount(experts + 1, minlength=count + 1).tolist()  # first, the rows without an expert
    parts = [part for part in x[order].split(numbers)]
    results = {expert: product(expert, part) for expert, part in enumerate(parts[1:]) if len(part)}
    if not results:
        return product(0, x[:0]).new_zeros(len(x), product(0, x[:0]).shape[1])
    some = next(iter(results.values()))
    y = torch.cat([some.new_zeros(numbers[0], some.shape[1]), *results.values()])
    return y[order.argsort()]


def expert_product(x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product alone, in plain torch, with gradients: weight [experts, out, in]."""
    if x.device.type != "cpu" and len(experts) <= FEW_ROWS:  # sizes of groups would have to come from the device
        chosen = experts.clamp_min(0)
        y = torch.bmm(weight[chosen], x.unsqueeze(2)).squeeze(2)
        y = y if bias is None else y + bias[chosen]
        return torch.where((experts >= 0).unsqueeze(1), y, 0)
    return grouped(x, experts, len(weight), lambda e, rows: F.linear(rows, weight[e], None if bias is None else bias[e]))


def expert_linear_reference(
    x: Tensor,
    experts: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    threshold: Tensor | None,
    scale: Tensor | None,
    center: Tensor | None,
    offset: Tensor | None,
    relative: bool,
    sparse_rows: int,
    counts: Tensor | None,
) -> Tensor:
    """What the operator means, in plain torch; the module's docstring explains the arguments."""
    if threshold is not None and len(x) <= sparse_rows:
        keep = keep_mask(x, threshold, scale, center, relative)
        if counts is not None:
            chosen = experts >= 0
            count_(counts, x[chosen], keep[chosen])
        x = fill(x, keep, center)
    if scales is None:
        return expert_product(x, experts, weight, bias).contiguous()

    def product(expert: int, rows: Tensor) -> Tensor:
        low = None if minimum is None else minimum[expert]
        matrix = dequantize(weight[expert], scales[expert], low, group_size, x.dtype)
        return F.linear(rows, matrix, None if bias is None else bias[expert].to(x.dtype))

    return grouped(x, experts, len(weight), product).contiguous()


operators.impl("expert_linear", expert_linear_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("deadband::expert_linear", lib=operators)
def _expert_linear_fake(
    x, experts, weight, scales, minimum, bias, group_size, threshold, scale, center, offset, relative, sparse_rows, counts
):
    inputs, outputs = (weight.shape[2], weight.shape[1]) if scales is None else (weight.shape[1], scales.shape[2])
    torch._check(weight.dim() == 3, lambda: f"weight has {weight.dim()} dimensions, expected one of experts before two")
    torch._check(x.dim() == 2, lambda: f"x has {x.dim()} dimensions, expected [rows, in_features]")
    torch._check(x.shape[1] == inputs, lambda: f"x has {x.shape[1]} features, the weights expect {inputs}")
    torch._check(experts.dim() == 1 and experts.dtype is torch.int64, lambda: "experts has to be [rows] int64")
    torch._check(experts.shape[0] == x.shape[0], lambda: "experts has to name one weight for each row of x")
    return x.new_empty((x.shape[0], outputs))


expert_linear = torch.ops.deadband.expert_linear.default


# ------------------------------------------------------------------------------------------------------------ on CPUs


_pack_layer, _pack_strides = struct.Struct(f"{LAYER}q").pack, struct.Struct("5q").pack
_get_num_threads = torch.get_num_threads
if kernels.library is not None:
    _kernel = kernels.library.deadband_expert_linear


def _expert_linear_on_cpu(
    x: Tensor,
    experts: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    minimum: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    threshold: Tensor | None,
    scale: Tensor | None,
    center: Tensor | None,
    offset: Tensor | None,
    relative: bool,
    sparse_rows: int,
    counts: Tensor | None,
) -> Tensor:
    rows = x.shape[0]
    if center is not None and offset is not None and scales is None:
        offset = current_offset(weight, center, offset)
    if rows > sparse_rows:
        threshold = None
    if threshold is None:
        scale = center = offset = counts = None
    elif counts is not None and (counts.numel() != COUNTS or counts.dtype is not torch.int64):
        raise RuntimeError(f"counts has to be [{COUNTS}] int64 or None")
    if rows <= FEW_ROWS and not cpu.is_exact():
        vectors = (bias, threshold, scale, center, offset)
        packed = _packed(x, weight, scales, minimum, group_size, vectors, relative, counts)
        if packed is not None:
            layer, strides, out_features = packed
            x, experts = x.contiguous(), experts.contiguous()
            y = x.new_empty((rows, out_features))
            error = _kernel(
                KERNEL_DTYPES[x.dtype], x.data_ptr(), rows, x.shape[1], x.shape[1], experts.data_ptr(), len(weight),
                layer, strides, y.data_ptr(), _get_num_threads(),
            )  # fmt: skip
            return y if not error else cpu.failed(error, x, weight)

    def product(expert: int, rows: Tensor) -> Tensor:
        own = None if bias is None else bias[expert]
        rule = (threshold, scale, center, None if offset is None else offset[expert], relative, len(rows), counts)
        if scales is not None:
            low = None if minimum is None else minimum[expert]
            return cpu.quantized_linear(rows, weight[expert], scales[expert], low, own, group_size, *rule)
        if threshold is None:
            return cpu.dense_linear(rows, weight[expert], own)
        return cpu.sparse_linear(rows, weight[expert], own, *rule)

    return grouped(x, experts, len(weight), product)


def _packed(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    minimum: Tensor | None,
    group_size: int,
    vectors: Sequence[Tensor | None],
    relative: bool,
    counts: Tensor | None,
) -> tuple[bytes, bytes, int] | None:
    """The layer of the first expert, as csrc/kernels.h has it, how far the others' lie, and outputs; None where the
    kernel does not take it."""
    dtype, inputs = x.dtype, x.shape[1]
    bias, threshold, scale, center, offset = vectors
    number = weight.shape[0]
    if dtype not in KERNEL_DTYPES:
        return None
    if scales is None:
        bits, outputs, (apart, first, stride) = 0, weight.shape[1], weight.stride()
        if weight.dtype is not dtype or first != 1 or weight.shape[2] != inputs or stride < outputs:
            return None
    else:
        bits, outputs, apart, stride = bits_of(weight), scales.shape[2], weight[0].numel(), 0
        low = None if minimum is None else minimum[0]
        whole = all(each is None or each.is_contiguous() for each in (weight, scales, minimum))
        if not whole or not quantized_fits(weight[0], scales[0], low, bits, group_size, inputs, outputs):
            return None
    if (
        not (bias is None or cpu.is_vector(bias, dtype, number * outputs))
        or not (threshold is None or cpu.is_vector(threshold, torch.float32, 1))
        or not (scale is None or cpu.is_vector(scale, torch.float32, inputs))
        or (center is None) != (offset is None)
        or not (center is None or cpu.is_vector(center, torch.float32, inputs))
        or not (offset is None or cpu.is_vector(offset, torch.float32, number * outputs))
    ):
        return None
    at = [0 if each is None else each.data_ptr() for each in (scales, minimum, bias, *vectors[1:], counts)]
    layer = _pack_layer(bits, outputs, weight.data_ptr(), stride, *at[:2], group_size, *at[2:7], relative, at[7])
    sizes = (
        apart * weight.element_size(),
        0 if scales is None else scales[0].nbytes,
        0 if minimum is None else minimum[0].nbytes,
        0 if bias is None else outputs * bias.element_size(),
        outputs * 4,
    )
    return layer, _pack_strides(*sizes), outputs


if kernels.library is not None:
    operators.impl("expert_linear", _expert_linear_on_cpu, "CPU")
