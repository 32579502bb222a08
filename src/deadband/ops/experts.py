"""The operator of experts: a linear layer with several weights, of which each row of x names the one it meets.

deadband::expert_linear(x, experts, weight, scales, minimum, bias, group_size, threshold, scale, center, offset,
                        relative, sparse_rows, counts) -> y

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

deadband::expert_mlp(x, experts, shares, parts, group_sizes, relative, sparse_rows, counts, activation) -> y

    mixtures of gated MLPs: of each token of x, the sum over its experts of their shares of
    down(activation(gate) * up), where the first projection gives gate and up side by side

    x          [tokens, in_features]
    experts    [tokens, each] int64, as above
    shares     [tokens, each]
    parts      eight for each of the two projections: weight, scales, minimum, bias, threshold, scale, center, offset
    group_sizes, relative
               one for each
    sparse_rows  tokens up to which entries are skipped
    counts     one for each, or none at all
    activation  "silu", or "gelu_tanh": GELU by its approximation with tanh
    y          [tokens, out_features], contiguous, in the dtype of x
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deadband.ops import cpu, kernels
from deadband.ops.fused import ACTIVATIONS, LAYER, PARTS, bits_of, quantized_fits
from deadband.ops.kernels import KERNEL_DTYPES
from deadband.ops.linear import COUNTS, count_, current_offset, dequantize, operators
from deadband.ops.skipping import fill, keep_mask

operators.define(
    "expert_linear(Tensor x, Tensor experts, Tensor weight, Tensor? scales, Tensor? minimum, Tensor? bias, "
    "int group_size, Tensor? threshold, Tensor? scale, Tensor? center, Tensor? offset, bool relative, int sparse_rows, "
    "Tensor(a!)? counts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
ALL_ROWS = sys.maxsize
FEW_ROWS = 128
"""Rows up to which the kernel takes them together; beyond, experts are multiplied by one after the other."""


def grouped(x: Tensor, experts: Tensor, count: int, product: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`product(expert, its rows of x)` for each of `count` experts that a row names, in the order of the rows.

    Differentiable, if the product is.
    """
    experts = experts.clamp_min(-1)
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
    return grouped(
        x, experts, len(weight), lambda e, rows: F.linear(rows, weight[e], None if bias is None else bias[e])
    )


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
    x,
    experts,
    weight,
    scales,
    minimum,
    bias,
    group_size,
    threshold,
    scale,
    center,
    offset,
    relative,
    sparse_rows,
    counts,
):
    inputs, outputs = (weight.shape[2], weight.shape[1]) if scales is None else (weight.shape[1], scales.shape[2])
    torch._check(weight.dim() == 3, lambda: f"weight has {weight.dim()} dimensions, expected one of experts before two")
    torch._check(x.dim() == 2, lambda: f"x has {x.dim()} dimensions, expected [rows, in_features]")
    torch._check(x.shape[1] == inputs, lambda: f"x has {x.shape[1]} features, the weights expect {inputs}")
    torch._check(experts.dim() == 1 and experts.dtype is torch.int64, lambda: "experts has to be [rows] int64")
    torch._check(experts.shape[0] == x.shape[0], lambda: "experts has to name one weight for each row of x")
    return x.new_empty((x.shape[0], outputs))


operators.define(
    "expert_mlp(Tensor x, Tensor experts, Tensor shares, Tensor?[] parts, int[] group_sizes, bool[] relative, "
    "int sparse_rows, Tensor(a!)[] counts, str activation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def expert_mlp_reference(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """What the operator means, projection by projection; the module's docstring explains the arguments."""
    tokens, each = experts.shape
    rows = experts.reshape(-1)
    skipped = min(sparse_rows * each, ALL_ROWS)

    def projection(index: int, x: Tensor) -> Tensor:
        weight, scales, minimum, bias, *rule = parts[PARTS * index : PARTS * (index + 1)]
        own = counts[index] if counts else None
        return torch.ops.deadband.expert_linear(
            x, rows, weight, scales, minimum, bias, group_sizes[index], *rule, relative[index], skipped, own
        )

    gate, up = projection(0, x.repeat_interleave(each, 0)).chunk(2, dim=-1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    y = projection(1, (act * up).contiguous())
    kept = torch.where(rows >= 0, shares.reshape(-1), 0).unsqueeze(-1)
    return (y.float() * kept.float()).view(tokens, each, y.shape[1]).sum(1).to(x.dtype)


operators.impl("expert_mlp", expert_mlp_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("deadband::expert_mlp", lib=operators)
def _expert_mlp_fake(x, experts, shares, parts, group_sizes, relative, sparse_rows, counts, activation):
    torch._check(
        len(parts) == 2 * PARTS and activation in ACTIVATIONS,
        lambda: f"expert_mlp takes 2 projections and one of {ACTIVATIONS}; got {len(parts)} parts and {activation!r}",
    )
    torch._check(x.dim() == 2 and experts.dim() == 2, lambda: "x has to be [tokens, features], experts [tokens, each]")
    torch._check(experts.shape == shares.shape, lambda: "experts and shares have to be of one shape")
    torch._check(experts.shape[0] == x.shape[0], lambda: "experts has to have a row for each token of x")
    weight, scales = parts[PARTS : PARTS + 2]
    return x.new_empty((x.shape[0], weight.shape[1] if scales is None else scales.shape[2]))


expert_linear = torch.ops.deadband.expert_linear.default
expert_mlp = torch.ops.deadband.expert_mlp.default


# ------------------------------------------------------------------------------------------------------------ on CPUs


_pack_layer, _pack_strides = struct.Struct(f"{LAYER}q").pack, struct.Struct("5q").pack
_get_num_threads = torch.get_num_threads
if kernels.library is not None:
    _kernel, _mlp_kernel = kernels.library.deadband_expert_linear, kernels.library.deadband_expert_mlp


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
    if experts.dtype is not torch.int64 or experts.shape != (rows,):
        raise RuntimeError(
            f"experts is {list(experts.shape)} {experts.dtype}, expected [{rows}] int64: one for each row"
        )
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
        rule: Any = (threshold, scale, center, None if offset is None else offset[expert], relative, len(rows), counts)
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
    if counts is not None and not cpu.is_vector(counts, torch.int64, COUNTS):
        raise RuntimeError(f"counts has to be [{COUNTS}] int64 or None")
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


def _expert_mlp_on_cpu(
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
    activation: str,
) -> Tensor:
    tokens, each = experts.shape
    if experts.dtype is not torch.int64 or experts.shape != shares.shape or x.dim() != 2 or x.shape[0] != tokens:
        raise RuntimeError(
            f"experts is {list(experts.shape)} {experts.dtype} and shares {list(shares.shape)} beside x "
            f"{list(x.shape)}; expected both [tokens, each], and experts int64"
        )
    if len({len(parts[index]) for index in (0, PARTS)}) > 1:  # type: ignore[arg-type]
        raise RuntimeError("both projections have to be of as many experts")
    layers, sizes, inner = b"", b"", x
    for index in range(2 if tokens * each <= FEW_ROWS and not cpu.is_exact() else 0):
        weight, scales, minimum, *vectors = parts[PARTS * index : PARTS * (index + 1)]
        assert weight is not None
        _, threshold, _, center, offset = vectors
        if center is not None and offset is not None and scales is None:
            vectors[4] = current_offset(weight, center, offset)
        own = counts[index] if counts and threshold is not None else None
        if tokens > sparse_rows:
            vectors[1:], own = [None] * 4, None
        packed = _packed(inner, weight, scales, minimum, group_sizes[index], vectors, relative[index], own)
        if packed is None or (index == 0 and packed[2] % 2):
            break
        layers, sizes = layers + packed[0], sizes + packed[1]
        if index == 0:
            inner = x.new_empty((0, packed[2] // 2))
            continue
        x, experts, shares = x.contiguous(), experts.contiguous(), shares.float().contiguous()
        y = x.new_empty((tokens, packed[2]))
        error = _mlp_kernel(
            KERNEL_DTYPES[x.dtype], x.data_ptr(), tokens, x.shape[1], x.shape[1], experts.data_ptr(), each, len(weight),
            layers, sizes, ACTIVATIONS.index(activation), shares.data_ptr(), y.data_ptr(), _get_num_threads(),
        )  # fmt: skip
        return y if not error else cpu.failed(error, x, weight)
    return expert_mlp_reference(x, experts, shares, parts, group_sizes, relative, sparse_rows, counts, activation)


if kernels.library is not None:
    operators.impl("expert_linear", _expert_linear_on_cpu, "CPU")
    operators.impl("expert_mlp", _expert_mlp_on_cpu, "CPU")
