"""When the kernels serve, and the operators with them for CUDA devices.

Triton comes with torch's packages for CUDA and ROCm. It is imported with the first call, and what it makes is compared
with torch's result once for each GPU: where that is off, a warning says so and torch computes everything.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deadband.ops import fused, linear
from deadband.ops.cpu import SPARSE_ROWS
from deadband.ops.fill import filled
from deadband.ops.linear import operators


class GpuWarning(UserWarning):
    """The kernels are not used on a GPU."""


def usable(device: torch.device) -> bool:
    """Whether the kernels run on that GPU; tried at the first call, and not again in this process."""
    if _usable.get(device.index) is None:
        if torch.cuda.is_current_stream_capturing():
            return False  # nothing can be compiled or compared while a graph is captured
        _usable[device.index] = False  # what is compared with has to run on torch
        _usable[device.index] = _tried(device)
    return _usable[device.index]


_usable: dict[int | None, bool] = {}


def _tried(device: torch.device) -> bool:
    if os.environ.get("DEADBAND_KERNELS") == "0" or importlib.util.find_spec("triton") is None:
        return False
    try:
        off = _largest_error(device)
    except Exception as error:  # compilers raise anything
        lines = str(error).strip().splitlines()
        problem = f"do not compile ({type(error).__name__}: {lines[0][:300] if lines else ''})"
    else:
        if off < 1e-2:
            return True
        problem = f"are off by {off:.2g} of the largest output"
    _warn(device, problem)
    return False


def _warn(device: torch.device, problem: str) -> None:
    warnings.warn(
        f"deadband's kernels {problem} on {torch.cuda.get_device_name(device)}; it runs on torch alone, without any "
        "gain",
        GpuWarning,
        stacklevel=5,
    )


def _run(function: Callable[..., Tensor | None], x: Tensor, *arguments: Any) -> Tensor | None:
    """What a launch gives; None, now and from then on, where a variant of a kernel does not fit into this GPU."""
    from triton.errors import TritonError

    try:
        return function(x, *arguments)
    except TritonError as error:
        _usable[x.device.index] = False
        _warn(x.device, f"do not fit ({type(error).__name__}: {str(error).strip().splitlines()[-1][:300]})")
        return None


def _largest_error(device: torch.device) -> float:
    """Of a layer with values and one with codes, of the largest output; with several splits of their inputs."""
    from deadband.ops.gpu import launch

    generator = torch.Generator().manual_seed(0)
    inputs, outputs = 2048, 288
    x = torch.randn(1, inputs, generator=generator)
    weight = torch.randn(inputs, outputs, generator=generator)
    codes = torch.randint(256, (inputs, outputs // 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(inputs // 64, outputs, generator=generator).half()
    x, weight = (each.to(device, torch.float16) for each in (x, weight))
    codes, scales = codes.to(device), scales.to(device)
    threshold = torch.full((), 0.5, device=device)
    rule = (None, threshold, None, None, None)
    parts = (weight.t(), None, None, *rule, codes, scales, scales, *rule)
    counts = [torch.zeros(linear.COUNTS, dtype=torch.int64, device=device) for _ in range(2)]
    y = launch.linears(x, parts, (0, 64), (False, True), counts)
    expected = fused.linears_reference(x, parts, (0, 64), (False, True), SPARSE_ROWS, counts)
    if y is None:
        return torch.inf
    error = (y.double() - expected.double()).abs().split(outputs, -1)
    sizes = expected.double().abs().split(outputs, -1)
    return max(float(own.max() / size.max()) for own, size in zip(error, sizes, strict=True))


# ------------------------------------------------------------------------------------------------------- the operators


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
    """The operator; its arguments are explained in `deadband.ops.linear`."""
    if _few(x, sparse_rows) and usable(x.device):
        from deadband.ops.gpu import launch

        parts = (weight, None, None, bias, threshold, scale, center, offset)
        y = _run(launch.linears, x, parts, (0,), (relative,), [] if counts is None else [counts])
        if y is not None:
            return y
    return linear.sparse_linear_reference(
        x, weight, bias, threshold, scale, center, offset, relative, sparse_rows, counts
    )


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
    """The operator; its arguments are explained in `deadband.ops.linear`."""
    weight = (codes, scales, minimum, bias)
    rule = (threshold, scale, center, offset)
    if not usable(x.device):
        return linear.quantized_linear_reference(x, *weight, group_size, *rule, relative, sparse_rows, counts)
    from deadband.ops.gpu import launch

    rows = x.shape[:-1].numel()
    if rows > sparse_rows:
        rule = (None,) * 4
    y = None
    if rows <= SPARSE_ROWS:
        given = [] if counts is None else [counts]
        y = _run(launch.linears, x, (*weight, *rule), (group_size,), (relative,), given)
    if y is None:
        if rule[0] is not None:
            x, _ = filled(x, rule[0], scale, center, relative, counts)
        y = _run(launch.quantized_product, x, *weight, group_size)
    if y is not None:
        return y
    return linear.quantized_linear_reference(x, *weight, group_size, None, None, None, None, False, 0, None)


def linears(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
) -> Tensor:
    """The operator; its arguments are explained in `deadband.ops.fused`."""
    if _few(x, sparse_rows) and usable(x.device):
        from deadband.ops.gpu import launch

        y = _run(launch.linears, x, parts, group_sizes, relative, counts)
        if y is not None:
            return y
    return fused.linears_reference(x, parts, group_sizes, relative, sparse_rows, counts)


def gated_mlp(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    sparse_rows: int,
    counts: Sequence[Tensor],
    activation: str,
) -> Tensor:
    """The operator; its arguments are explained in `deadband.ops.fused`."""
    if _few(x, sparse_rows) and usable(x.device):
        from deadband.ops.gpu import launch

        y = _run(launch.gated_mlp, x, parts, group_sizes, relative, counts, activation)
        if y is not None:
            return y
    return fused.gated_mlp_reference(x, parts, group_sizes, relative, sparse_rows, counts, activation)


def _few(x: Tensor, sparse_rows: int) -> bool:
    return x.shape[:-1].numel() <= min(sparse_rows, SPARSE_ROWS)


for _function in (sparse_linear, quantized_linear, linears, gated_mlp):
    operators.impl(_function.__name__, _function, "CUDA")  # which devices of ROCm are to torch, too
