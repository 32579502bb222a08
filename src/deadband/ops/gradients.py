"""The operators with gradients, and under autocast: what layers call where the operators alone do not serve.

Forward is the operator; backward is made of products like it, so it can be differentiated again. torch's own backward
would multiply by the weight as it lies, [in, out], which takes up to 100 times as long as the usual layout where oneDNN
has no kernels for the dtype: bfloat16 without AVX-512, and float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from deadband.ops import kernels, products
from deadband.ops.dequantize import by_input
from deadband.ops.fill import filled
from deadband.ops.linear import (
    count_,
    dense_linear,
    quantized_linear,
    sparse_linear,
    uncounted,
)
from deadband.ops.skipping import apply_mask, keep_mask

GRADIENTS = ("exact", "straight_through")


def sparse_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    scale: Tensor | None,
    center: Tensor | None,
    offset: Tensor | None,
    relative: bool,
    rows: int,
    counts: Tensor | None,
    gradient: str,
) -> Tensor:
    """`deadband::sparse_linear` with gradients: of x as `gradient` says, and of weight and bias as if x were filled."""
    if _is_plain(x, weight, bias) and not torch.is_autocast_enabled("cpu"):
        return _Sparse.apply(
            x, weight, bias, threshold, scale, center, offset, relative, rows, counts, gradient
        )  # fmt: skip
    return product(fill_skipped(x, threshold, scale, center, relative, rows, counts, gradient), weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, on the kernels where they serve; with gradients of any order, in the dtype that autocast asks for."""
    if x.device.type != "cpu" or not (torch.compiler.is_compiling() or kernels.readable(x, weight)):
        return F.linear(x, weight, bias)
    if not torch.is_autocast_enabled("cpu"):
        same = x.dtype is weight.dtype and (bias is None or bias.dtype is x.dtype)
        return _Dense.apply(x, weight, bias) if same else F.linear(x, weight, bias)  # torch says what is wrong
    dtype = torch.get_autocast_dtype("cpu")
    if weight.dtype is not dtype and (weight.dtype is not torch.float32 or dtype not in products.WITHOUT_ONEDNN):
        return F.linear(x, weight, bias)  # autocast keeps the weight that it rounded for the next call
    y = _Dense.apply(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    return y.to(dtype)


def quantized_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    minimum: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    threshold: Tensor | None = None,
    scale: Tensor | None = None,
    center: Tensor | None = None,
    offset: Tensor | None = None,
    relative: bool = False,
    rows: int = 0,
    counts: Tensor | None = None,
    gradient: str = "exact",
) -> Tensor:
    """`deadband::quantized_linear` with gradients of x, as `gradient` says, and of the bias."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    if threshold is not None and not _is_plain(x, codes, None):
        x = fill_skipped(x, threshold, scale, center, relative, rows, counts, gradient)
        threshold = scale = center = offset = counts = None
    if counts is None:
        counts = uncounted(x.device)
    return _Quantized.apply(
        x, codes, scales, minimum, bias, group_size, threshold, scale, center, offset, relative, rows, counts, gradient
    )  # fmt: skip


def fill_skipped(
    x: Tensor,
    threshold: Tensor,
    scale: Tensor | None,
    center: Tensor | None,
    relative: bool,
    rows: int,
    counts: Tensor | None,
    gradient: str,
) -> Tensor:
    """What the product is of, as a step alone: `x` with skipped entries filled, if it has at most so many rows."""
    if x.shape[:-1].numel() > rows:
        return x
    keep = keep_mask(x.detach(), threshold, scale, center, relative)
    if counts is not None:
        count_(counts, x.detach(), keep)
    return _filled(x, keep, center, gradient)


def _filled(x: Tensor, keep: Tensor, center: Tensor | None, gradient: str) -> Tensor:
    return _StraightThrough.apply(x, keep, center) if gradient == "straight_through" else _masked(x, keep, center)


def _masked(x: Tensor, keep: Tensor, center: Tensor | None) -> Tensor:
    return torch.where(keep, x, 0 if center is None else center.to(x.dtype))


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether forward and backward can be one function. Compilers do better with steps, and x may be of other dtype."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not kernels.readable(x, weight):
        return False
    return not weight.is_floating_point() or (x.dtype is weight.dtype and (bias is None or bias.dtype is x.dtype))


class _StraightThrough(torch.autograd.Function):
    """Masked forward; the gradient passes as if nothing had been masked (Bengio et al. 2013, arXiv 1308.3432)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, keep: Tensor, center: Tensor | None) -> Tensor:
        return _masked(x, keep, center)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0].view_as(tangents[0])


class _Dense(torch.autograd.Function):
    """x · weightᵀ + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # a function of torch.func's form, with setup_context, costs 20 us a call: inspect.signature
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.by_input = weight.stride(0) == 1
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return dense_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _dense(dy, weight.t()) if of_x else None,
            _weight_gradient(dy, x, ctx.by_input) if of_weight else None,
            dy.sum_to_size(dy.shape[-1]) if of_bias else None,
        )


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    """The product in a backward, which may be differentiated again."""
    return _Dense.apply(x, weight, None) if torch.is_grad_enabled() else dense_linear(x, weight, None)


def _weight_gradient(dy: Tensor, x: Tensor, by_input: bool) -> Tensor:
    """dyᵀ · x, [out_features, in_features], in the layout of the weight."""
    x, dy = (each.reshape(each.shape[:-1].numel(), each.shape[-1]) for each in (x, dy))
    one, other = (x, dy) if by_input else (dy, x)
    made = _dense(one.t(), other.t()) if x.dtype in products.WITHOUT_ONEDNN else one.t() @ other
    return made.t() if by_input else made


class _Sparse(torch.autograd.Function):
    """The product of `x` filled. What nn.Linear keeps for its backward is kept: x for the weight's gradient alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, scale: Tensor | None,
        center: Tensor | None, offset: Tensor | None, relative: bool, rows: int, counts: Tensor | None, gradient: str,
    ) -> Tensor:  # fmt: skip
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.by_input, ctx.relative, ctx.gradient = weight.stride(0) == 1, relative, gradient
        ctx.fills = x.shape[:-1].numel() <= rows
        masks = ctx.fills and of_x and gradient == "exact"
        keep = filled(x, threshold, scale, center, relative, None)[1] if masks and not of_weight else None
        rule = (threshold, scale, center) if ctx.fills and of_weight else (None, None, None)
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None, keep, *rule)
        return sparse_linear(x, weight, bias, threshold, scale, center, offset, relative, rows, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, keep, threshold, scale, center = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        if of_weight:
            if ctx.fills:
                entries, keep = filled(x, threshold, scale, center, ctx.relative, None)
                again = torch.is_grad_enabled()  # what follows is to be differentiated, too
                x = _filled(x, keep, center, ctx.gradient) if again else entries
            dw = _weight_gradient(dy, x, ctx.by_input)
        if of_x:
            dx = _dense(dy, weight.t())
            if ctx.fills and ctx.gradient == "exact":
                dx = apply_mask(dx, keep)
        return dx, dw, dy.sum_to_size(dy.shape[-1]) if of_bias else None, *[None] * 8


def _weight_parts(
    codes: Tensor, scales: Tensor, minimum: Tensor | None, group_size: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """A quantised weight as numbers, [inputs, out_features], so many inputs at a time that malloc keeps the memory."""
    inputs, outputs = codes.shape[0], scales.shape[1]
    group = group_size or 1
    step = max(products.ENTRIES // max(outputs, 1) // group, 1) * group
    for start in range(0, max(inputs, 1), step):
        groups = slice(start // group, -(-(start + step) // group)) if group_size else slice(None)
        least = None if minimum is None else minimum[groups]
        yield by_input(codes[start : start + step], scales[groups], least, group_size, dtype)


class _Quantized(torch.autograd.Function):
    """The product of `x` filled with a quantised weight, which has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, minimum: Tensor | None, bias: Tensor | None,
        group_size: int, threshold: Tensor | None, scale: Tensor | None, center: Tensor | None, offset: Tensor | None,
        relative: bool, rows: int, counts: Tensor | None, gradient: str,
    ) -> Tensor:  # fmt: skip
        ctx.group_size = group_size
        masks = threshold is not None and x.shape[:-1].numel() <= rows and gradient == "exact"
        keep = None
        if masks and ctx.needs_input_grad[0]:
            keep = filled(x, cast(Tensor, threshold), scale, center, relative, None)[1]
        ctx.save_for_backward(codes, scales, minimum, keep)
        return quantized_linear(
            x, codes, scales, minimum, bias, group_size, threshold, scale, center, offset, relative, rows, counts
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        codes, scales, minimum, keep = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dtype = torch.float32 if dy.dtype in products.WITHOUT_ONEDNN else dy.dtype
            weights = _weight_parts(codes, scales, minimum, ctx.group_size, dtype)
            parts = [_dense(dy.to(dtype), weight).to(dy.dtype) for weight in weights]
            dx = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
            if keep is not None:
                dx = apply_mask(dx, keep)
        db = dy.sum_to_size(dy.shape[-1]) if ctx.needs_input_grad[4] else None
        return dx, None, None, None, db, *[None] * 9
