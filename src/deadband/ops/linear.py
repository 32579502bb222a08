"""The operators of linear layers: schema, fake and torch reference. A backend (`ops/cpu.py`) only adds registrations.

deadband::sparse_linear(x, weight, bias, threshold, scale, center, offset, relative, sparse_rows, counts) -> y

    x          [..., in_features]
    weight     [out_features, in_features]; fast when laid out with the weights of one input side by side,
               that is with strides (1, out_features)
    bias       [out_features] or None
    threshold  [] float32: an entry is kept unless its score is at or below it; negative keeps everything
    scale      [in_features] float32 or None: what |x| is multiplied by to give the score
    center     [in_features] float32 or None: what a skipped entry counts as; the score is of |x - center| then
    offset     [out_features] float32, the product of weight and center, or None where center is: a kernel adds it
               and then only what kept entries differ from the center by; one that `make_offset` made is made again
               where the weight was written to since
    relative   whether the threshold is multiplied by the norm of each row of x
    sparse_rows  inputs of at most so many rows skip (0: never); with more rows the product is dense
    counts     [3] int64 or None: entries skipped, entries seen and entries of x that are NaN or infinite are added to
               it, all of the sparse path
    y          [..., out_features], contiguous, in the dtype of x

deadband::dense_linear(x, weight, bias) -> y

    the same product with nothing skipped, for layers that decode faster on the kernels than on torch

deadband::quantized_linear(x, codes, scales, minimum, bias, group_size, threshold, scale, center, offset, relative,
                           sparse_rows, counts) -> y

    sparse_linear with a weight of 8 or 4 bits, for x of any floating-point dtype. `deadband.layers.formats` explains
    codes, scales and minimum; group_size inputs share their scales, or with 0 all of them. Without a threshold (None)
    nothing is skipped. The kernels round x, some inputs that are kept at a time, to 16 bits, or beside weights of 4 to
    8 (csrc/kernels.h says how); a row of which such an entry is NaN or infinite gives NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from deadband.ops.skipping import fill, keep_mask

operators = torch.library.Library("deadband", "DEF")
operators.define(
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, Tensor threshold, Tensor? scale, Tensor? center, "
    "Tensor? offset, bool relative, int sparse_rows, Tensor(a!)? counts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operators.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
operators.define(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? minimum, Tensor? bias, int group_size, "
    "Tensor? threshold, Tensor? scale, Tensor? center, Tensor? offset, bool relative, int sparse_rows, "
    "Tensor(a!)? counts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def transformed() -> bool:
    """Under vmap, grad, jvp and other transforms of torch.func, or inside of a level of forward-mode derivatives.

    The operators have no rules for these: layers take torch's own there, and count nothing.
    """
    return forward_ad._current_level >= 0 or _functorch_level() is not None


_functorch_level = torch._C._functorch.maybe_current_level
COUNTS = 3
"""What is counted: entries skipped, seen and not finite."""


def count_(counts: Tensor, x: Tensor, keep: Tensor) -> None:
    """Add the {entries skipped, seen, not finite} of an input and its mask to `counts`, [3] int64."""
    seen = torch.full((), keep.numel(), device=keep.device)  # written there, where torch.tensor would copy
    counts += torch.stack([(~keep).sum(), seen, (~x.isfinite()).sum()])


def uncounted(device: torch.device) -> Tensor | None:
    """What an operator gets in the place of counters: None, or, as torch.compile cannot leave out what an operator
    writes to, some that nobody reads."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return torch.zeros(COUNTS, dtype=torch.int64, device=device) if compiling else None


def sparse_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    scale: Tensor | None,
    center: Tensor | None,
    offset: Tensor | None,
    relative: bool,
    sparse_rows: int,
    counts: Tensor | None,
) -> Tensor:
    """What the operator means, in plain torch; the module's docstring explains the arguments."""
    rows = x.shape[:-1].numel()
    if rows <= sparse_rows:
        keep = keep_mask(x, threshold, scale, center, relative)
        if counts is not None:
            count_(counts, x, keep)
        x = fill(x, keep, center)
    return F.linear(x, weight, bias).contiguous()


def dense_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the operator means, in plain torch."""
    return F.linear(x, weight, bias).contiguous()


def dequantize(codes: Tensor, scales: Tensor, minimum: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, in_features] that a `deadband.quantization.QuantizedWeight` stands for.

    That of experts has a dimension more in front, as all three tensors do.
    """
    if codes.dim() == 3:
        lows = [None] * len(codes) if minimum is None else minimum
        each = zip(codes, scales, lows, strict=True)
        return torch.stack([dequantize(*expert, group_size, dtype) for expert in each])
    inputs, outputs = codes.shape[0], scales.shape[1]
    group_size = group_size or max(inputs, 1)
    weight = torch.empty(outputs, inputs, dtype=dtype, device=codes.device)
    for group in range(-(-inputs // group_size)):  # a group at a time: no float32 copy of the whole
        at = slice(group * group_size, (group + 1) * group_size)
        values = codes[at].float() if codes.dtype == torch.int8 else unpack_nibbles(codes[at], outputs).float()
        if codes.dtype != torch.int8 and minimum is None:
            values -= 8
        values *= scales[group].float()
        if minimum is not None:
            values += minimum[group].float()
        weight[:, at] = values.T
    return weight


def make_offset(weight: Tensor, center: Tensor, offset: Tensor | None = None) -> Tensor:
    """The product of weight, [out, in] or [experts, out, in], and center, with a note of what it was made of.

    It takes the place of an earlier one.
    """
    with torch.inference_mode(False), torch.no_grad():
        made = torch.stack([each.float() @ center for each in (weight if weight.dim() == 3 else weight[None])])
        made = made.reshape(weight.shape[:-1])
        if offset is None or offset.shape != made.shape or offset.device != made.device:
            offset = made
        else:
            offset.copy_(made)
    offset.made_of = None if weight.is_inference() else (weight._version, weight.data_ptr())  # type: ignore[attr-defined]
    return offset


def current_offset(weight: Tensor, center: Tensor, offset: Tensor) -> Tensor:
    """`offset`, made again where its weight is another one than then or was written to."""
    made_of = getattr(offset, "made_of", None)
    if made_of is None or made_of == (weight._version, weight.data_ptr()):
        return offset
    return make_offset(weight, center, offset)


NIBBLES = 32  # outputs whose 4-bit codes lie together: 16 in the lower halves of as many bytes, 16 in the upper


def unpack_nibbles(packed: Tensor, outputs: int) -> Tensor:
    """uint8 [in, ceil(out / 32) * 16] -> the codes [in, out], from 0 to 15."""
    halves = packed.reshape(packed.shape[0], packed.shape[1] // (NIBBLES // 2), 1, NIBBLES // 2)
    return torch.cat([halves & 15, halves >> 4], 2).flatten(1)[:, :outputs]


def quantized_linear_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
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
    if threshold is not None and x.shape[:-1].numel() <= sparse_rows:
        keep = keep_mask(x, threshold, scale, center, relative)
        if counts is not None:
            count_(counts, x, keep)
        x = fill(x, keep, center)
    return F.linear(x, dequantize(codes, scales, minimum, group_size, x.dtype), bias).contiguous()


operators.impl("sparse_linear", sparse_linear_reference, "CompositeExplicitAutograd")
operators.impl("dense_linear", dense_linear_reference, "CompositeExplicitAutograd")
operators.impl("quantized_linear", quantized_linear_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("deadband::sparse_linear", lib=operators)
def _sparse_linear_fake(x, weight, bias, threshold, scale, center, offset, relative, sparse_rows, counts):
    torch._check(threshold.numel() == 1, lambda: f"threshold has {threshold.numel()} elements, expected one")
    return _dense_linear_fake(x, weight, bias)


@torch.library.register_fake("deadband::dense_linear", lib=operators)
def _dense_linear_fake(x, weight, bias):
    torch._check(
        weight.dim() == 2, lambda: f"weight has {weight.dim()} dimensions, expected [out_features, in_features]"
    )
    torch._check(x.dim() >= 1, lambda: "x has no dimension, expected [..., in_features]")
    torch._check(
        x.shape[-1] == weight.shape[1],
        lambda: f"x has {x.shape[-1]} features, the weight of shape {tuple(weight.shape)} expects {weight.shape[1]}",
    )
    torch._check(x.dtype == weight.dtype, lambda: f"x is {x.dtype} and the weight {weight.dtype}; expected one dtype")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("deadband::quantized_linear", lib=operators)
def _quantized_linear_fake(
    x, codes, scales, minimum, bias, group_size, threshold, scale, center, offset, relative, sparse_rows, counts
):
    torch._check(codes.dim() == 2 and scales.dim() == 2, lambda: "codes and scales have to be matrices")
    torch._check(x.dim() >= 1, lambda: "x has no dimension, expected [..., in_features]")
    torch._check(
        x.shape[-1] == codes.shape[0],
        lambda: f"x has {x.shape[-1]} features, codes of shape {tuple(codes.shape)} expect {codes.shape[0]}",
    )
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


sparse_linear = torch.ops.deadband.sparse_linear.default
dense_linear = torch.ops.deadband.dense_linear.default
quantized_linear = torch.ops.deadband.quantized_linear.default
