"""The operators on CPUs, float32 and bfloat16: the compiled kernels where they serve, torch elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from deadband.ops import kernels, products
from deadband.ops.fill import filled
from deadband.ops.kernels import KERNEL_DTYPES
from deadband.ops.linear import COUNTS, NIBBLES, current_offset, dequantize, operators

_CODES = (torch.int8, torch.uint8)
SPARSE_ROWS = 8  # what the kernel that skips takes at most
DOT_ROWS = 4  # and the one for a weight in torch's own layout
INPUT_MAJOR, OUTPUT_MAJOR = 0, 1  # [in, out] as SparseLinear lays it out; [out, in] as torch does


def own_rows(dtype: torch.dtype) -> int:
    """Rows up to which our product on a [in, out] weight beats torch's on the same storage (benchmarks/prefill.py).

    torch repacks such a bfloat16 weight on every call, at any number of rows; with AVX2 alone it has no fast path for
    it at all. In float32 it multiplies by it as it lies, as fast as we do from about 32 rows on. Without AVX2 our
    blocked product is slow.
    """
    if kernels.isa() == "baseline":
        return DOT_ROWS
    return 1 << 62 if dtype == torch.bfloat16 else 32


_get_num_threads = torch.get_num_threads
if kernels.library is not None:
    _sparse_kernel, _dense_kernel = kernels.library.deadband_sparse_linear, kernels.library.deadband_dense_linear
    _quantized_kernel = kernels.library.deadband_quantized_linear


def sparse_linear(
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
    """The operator on CPU tensors; its arguments are explained in `deadband.ops.linear`."""
    # Long on purpose: every statement here costs each layer of each token 0.1 us or more, so attributes are read once,
    # and nothing is called that can be compared.
    out_features, in_features = weight.shape
    shape = x.shape
    rows = x.numel() // in_features if in_features else shape[:-1].numel()
    if rows > sparse_rows:
        return dense_linear(x, weight, bias)
    if threshold.numel() != 1 or (counts is not None and (counts.numel() != COUNTS or counts.dtype is not torch.int64)):
        raise RuntimeError(
            f"threshold has {threshold.numel()} elements, expected 1; counts has to be [{COUNTS}] int64 or None"
        )
    x_dtype = x.dtype
    dtype = KERNEL_DTYPES.get(x_dtype)
    out_stride, in_stride = weight.stride()
    if (
        dtype is None
        or rows > SPARSE_ROWS
        or out_stride != 1
        or shape[-1] != in_features
        or weight.dtype is not x_dtype
        or threshold.dtype is not torch.float32
        or (
            bias is not None and (bias.dtype is not x_dtype or bias.numel() != out_features or not bias.is_contiguous())
        )
        or not (scale is None or is_vector(scale, torch.float32, in_features))
        or (center is None) != (offset is None)
        or not (center is None or is_vector(center, torch.float32, in_features))
        or not (offset is None or is_vector(offset, torch.float32, out_features))
    ):
        return dense_linear(filled(x, threshold, scale, center, relative, counts)[0], weight, bias)
    if offset is not None and center is not None:
        offset = current_offset(weight, center, offset)
    x = x.contiguous()
    y = x.new_empty((*shape[:-1], out_features))
    error = _sparse_kernel(
        dtype,
        x.data_ptr(),
        rows,
        in_features,
        in_features,
        weight.data_ptr(),
        in_stride,
        out_features,
        None if bias is None else bias.data_ptr(),
        threshold.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if center is None else center.data_ptr(),
        None if offset is None else offset.data_ptr(),
        relative,
        y.data_ptr(),
        _get_num_threads(),
        None if counts is None else counts.data_ptr(),
    )
    return y if not error else failed(error, x, weight)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The operator on CPU tensors, on the better of the kernels' product and torch's."""
    out_features, in_features = weight.shape
    rows = x.numel() // in_features if in_features else x.shape[:-1].numel()
    dtype = KERNEL_DTYPES.get(x.dtype)
    out_stride, in_stride = weight.stride()
    layout = INPUT_MAJOR if out_stride == 1 else OUTPUT_MAJOR
    most = own_rows(x.dtype) if dtype is not None and layout == INPUT_MAJOR else DOT_ROWS
    if (
        dtype is None
        or rows > most
        or min(out_stride, in_stride) != 1
        or x.shape[-1] != in_features
        or weight.dtype is not x.dtype
        or not (bias is None or is_vector(bias, x.dtype, out_features))
    ):
        return torchs_product(x, weight, bias)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    error = _dense_kernel(
        dtype,
        layout,
        x.data_ptr(),
        rows,
        in_features,
        in_features,
        weight.data_ptr(),
        max(out_stride, in_stride),
        out_features,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        _get_num_threads(),
    )
    return y if not error else failed(error, x, weight)


def torchs_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, in the dtype of autocast if that is fast, and back; where the operands do not fit, it says why."""
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") in products.WITHOUT_ONEDNN:
        with torch.autocast("cpu", enabled=False):
            return products.linear(x, weight, bias).contiguous()
    return products.linear(x, weight, bias).to(x.dtype).contiguous()


def quantized_linear(
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
    """The operator on CPU tensors; its arguments are explained in `deadband.ops.linear`."""
    # Long on purpose, as `sparse_linear`: a call of a function costs each layer of each token more than a comparison.
    in_features, width = codes.shape
    out_features = scales.shape[1]
    shape, x_dtype = x.shape, x.dtype
    rows = x.numel() // in_features if in_features else shape[:-1].numel()
    if threshold is None or rows > sparse_rows:
        threshold = center = offset = counts = None
    dtype = None if _exact else KERNEL_DTYPES.get(x_dtype)
    bits = 8 if codes.dtype is torch.int8 else 4
    groups = -(-in_features // group_size) if group_size else 1
    if (
        codes.dtype not in _CODES
        or width != (out_features if bits == 8 else -(-out_features // NIBBLES) * (NIBBLES // 2))
        or scales.dtype is not (torch.float16 if group_size else torch.float32)
        or scales.shape[0] != groups
        or not (codes.is_contiguous() and scales.is_contiguous())
        or shape[-1] != in_features
        or not (
            minimum is None
            or (minimum.dtype is torch.float16 and minimum.shape == scales.shape and minimum.is_contiguous())
        )
        or (minimum is not None and (bits == 8 or not group_size))
    ):
        raise RuntimeError(
            f"x {list(shape)}, codes {list(codes.shape)} {codes.dtype}, scales {list(scales.shape)} {scales.dtype} and "
            f"groups of {group_size or 'all'} inputs do not fit together; deadband.quantization says what does"
        )
    if threshold is not None and (
        threshold.numel() != 1 or (counts is not None and (counts.numel() != COUNTS or counts.dtype is not torch.int64))
    ):
        raise RuntimeError(
            f"threshold has {threshold.numel()} elements, expected 1; counts has to be [{COUNTS}] int64 or None"
        )
    if (
        dtype is None
        or not (bias is None or is_vector(bias, x_dtype, out_features))
        or (threshold is not None and (rows > SPARSE_ROWS or threshold.dtype is not torch.float32))
        or not (scale is None or is_vector(scale, torch.float32, in_features))
        or (center is None) != (offset is None)
        or not (center is None or is_vector(center, torch.float32, in_features))
        or not (offset is None or is_vector(offset, torch.float32, out_features))
    ):
        if threshold is not None:
            x, _ = filled(x, threshold, scale, center, relative, counts)
        if x_dtype is torch.float16:
            y = quantized_linear(
                x.float(), codes, scales, minimum, None if bias is None else bias.float(), group_size,
                None, None, None, None, False, 0, None,
            )  # fmt: skip
            return y.half()
        if dtype is None:
            return products.linear(x, dequantize(codes, scales, minimum, group_size, x_dtype), bias).contiguous()
        threshold = center = offset = counts = None
        if bias is not None:
            if bias.numel() != out_features:
                raise RuntimeError(f"bias has {bias.numel()} elements, expected {out_features}")
            bias = bias.to(x_dtype).contiguous()
    x = x.contiguous()
    y = x.new_empty((*shape[:-1], out_features))
    error = _quantized_kernel(
        dtype,
        x.data_ptr(),
        rows,
        in_features,
        in_features,
        bits,
        codes.data_ptr(),
        scales.data_ptr(),
        None if minimum is None else minimum.data_ptr(),
        group_size,
        out_features,
        None if bias is None else bias.data_ptr(),
        None if threshold is None else threshold.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if center is None else center.data_ptr(),
        None if offset is None else offset.data_ptr(),
        relative,
        y.data_ptr(),
        _get_num_threads(),
        None if counts is None else counts.data_ptr(),
    )
    return y if not error else failed(error, x, codes)


_exact = False  # whether quantised products leave x as it is


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside the block, torch multiplies x as it is by dequantised weights, which takes several times as long.

    Beside 4 bits the kernels round x to 8. There the last bit of an entry may tip its rounding, and what a layer makes
    of that tips others: of two right ways to compute a model, the logits differ by percents.
    """
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


def is_exact() -> bool:
    """Whether quantised products leave x as it is: inside of `exact_products`."""
    return _exact


def is_vector(vector: Tensor, dtype: torch.dtype, length: int) -> bool:
    """Whether a kernel can read `length` entries of that dtype from it."""
    return vector.dtype is dtype and vector.numel() == length and vector.is_contiguous()


def failed(error: int, x: Tensor, other: Tensor) -> Tensor:
    """Raise what a kernel returned."""
    raise RuntimeError(f"kernel error {error} for x {tuple(x.shape)} and {tuple(other.shape)}, {x.dtype}")


if kernels.library is not None:  # without them the torch references stay in place
    operators.impl("sparse_linear", sparse_linear, "CPU")
    operators.impl("dense_linear", dense_linear, "CPU")
    operators.impl("quantized_linear", quantized_linear, "CPU")
