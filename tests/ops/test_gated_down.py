"""deadband::gated_down and up_linear: what a closed gate leaves unread, against float64."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from operators import ISAS, compiled, instruction_set, random_weight

from deadband.ops.gated import gated_down, up_linear
from deadband.ops.linear import make_offset

FORMATS = [None, "int8", "int8-g32", "int4-g32", "int4-g64-zp"]
SHAPES = [(1, 1, 1, 1), (1, 70, 33, 45), (3, 64, 129, 32), (8, 200, 64, 7), (9, 33, 48, 16), (0, 16, 32, 8)]


def layer(inputs, outputs, name, dtype, seed, *, by_output):
    """Weight, scales and minimum as an operator takes them, the group size, and the numbers as float64."""
    if name is None:
        weight = (torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) / 4).to(dtype)
        return weight if by_output else weight.t().contiguous().t(), None, None, 0, weight.double()
    made = random_weight(inputs, outputs, name, seed)
    tensors = [made.codes, made.scales, made.minimum]
    if by_output:
        tensors = [None if each is None else each.t().contiguous().t() for each in tensors]
    return *tensors, made.format.group_size or 0, made.dequantize(torch.float64)


def operands(rows, inputs, inner, outputs, name, dtype, *, scaled=False, biased=False, threshold=0.0):
    torch.manual_seed(rows + inputs + inner)
    x, gate = torch.randn(rows, inputs).to(dtype), torch.randn(rows, inner).to(dtype)
    gate[gate.abs() < 0.8] = 0
    *up, up_group, wide_up = layer(inputs, inner, name, dtype, 1, by_output=True)
    *down, down_group, wide_down = layer(inner, outputs, name, dtype, 2, by_output=False)
    biases = [torch.randn(size).to(dtype) if biased else None for size in (inner, outputs)]
    scale = torch.rand(inner) + 0.5 if scaled else None
    center = torch.randn(inner).to(dtype).float() if scaled else None
    offset = make_offset(wide_down.float(), center) if scaled else None
    rule = (torch.tensor(threshold), scale, None, None)
    parts = [*up, biases[0], *rule, *down, biases[1], torch.tensor(0.0), None, center, offset]
    return x, gate, parts, [up_group, down_group], wide_up, wide_down, biases, scale, center


def expected(x, gate, wide_up, wide_down, biases, threshold, scale, center, relative=False):
    dtype = x.dtype
    up = x.double() @ wide_up.T + (0 if biases[0] is None else biases[0].double())
    score = gate.float().abs() * (1 if scale is None else scale)
    limit = threshold * (gate.float().norm(dim=1, keepdim=True) if relative else 1)
    keep = ~(score <= limit)
    h = torch.where(keep, gate.double() * up.to(dtype).double(), 0).to(dtype).double()
    if center is not None:
        h = torch.where((h - center).abs() <= 0, center.double(), h)
    y = h @ wide_down.T + (0 if biases[1] is None else biases[1].double())
    size = (h.abs() + (0 if center is None else center.abs())) @ wide_down.abs().T
    return y, size.amax(1, keepdim=True) if size.numel() else size, keep


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_against_float64(isa, name, dtype):
    with instruction_set(isa):
        for shape in SHAPES:
            for threshold, scaled, biased, relative in ((0.0, False, False, False), (1.0, True, True, False),
                                                        (0.1, False, True, True)):  # fmt: skip
                made = operands(*shape, name, dtype, scaled=scaled, biased=biased, threshold=threshold)
                x, gate, parts, groups, wide_up, wide_down, biases, scale, center = made
                counts = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
                y = gated_down(x, gate, parts, groups, [relative, False], 8, counts)
                skips = shape[0] <= 8
                y64, size, keep = expected(
                    x, gate, wide_up, wide_down, biases, threshold if skips else -1.0, scale, center, relative and skips
                )
                step = torch.finfo(dtype).eps * 2 + (0.02 if name and "4" in name[:4] else 1e-4 if name else 2e-6)
                assert bool(((y.double() - y64).abs() <= step * size + 1e-5).all()), (shape, threshold)
                if skips:
                    nonfinite = int((~gate.isfinite()).sum())
                    assert counts[0].tolist() == [int((~keep).sum()), keep.numel(), nonfinite]


@compiled
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_closed_outputs_change_no_bit(name, rows):
    x, gate, parts, groups, *_ = operands(rows, 96, 160, 64, name, torch.float32)
    up = up_linear(x, *parts[:4], groups[0], parts[4], None, False, 8, None)
    closed = gated_down(x, gate, parts, groups, [False, False], 8, [])
    open_gates = [*parts[:4], None, None, None, None, *parts[8:]]
    assert torch.equal(closed, gated_down(x, gate, open_gates, groups, [False, False], 8, []))
    ones = gated_down(x, torch.ones_like(gate), [*parts[:8], torch.eye(160).t(), *[None] * 3, parts[12], *[None] * 3],
                      [groups[0], 0], [False, False], 8, [])  # fmt: skip
    assert torch.equal(ones, up)


@compiled
@pytest.mark.parametrize("name", [None, "int8", "int4-g32"])
def test_weights_of_closed_outputs_are_not_read(name):
    x, gate, parts, groups, *_ = operands(1, 64, 4096, 32, name, torch.float32)
    stored = parts[0] if name is None else parts[0].t()
    gate[:, 2048:] = 0
    expected = gated_down(x, gate, parts, groups, [False, False], 8, [])
    memory = mmap.mmap(-1, stored.nbytes)
    copied = torch.frombuffer(memory, dtype=stored.dtype).view(stored.shape).copy_(stored)
    half = ctypes.c_void_p(copied.data_ptr() + stored.nbytes // 2), ctypes.c_size_t(stored.nbytes // 2)
    protect = ctypes.CDLL(None).mprotect
    assert protect(*half, 0) == 0  # to read it ends the process
    try:
        parts[0] = copied if name is None else copied.t()
        assert torch.equal(gated_down(x, gate, parts, groups, [False, False], 8, []), expected)
    finally:
        protect(*half, mmap.PROT_READ | mmap.PROT_WRITE)


@compiled
def test_what_is_not_finite_surfaces():
    x, gate, parts, groups, *_ = operands(2, 16, 32, 8, None, torch.float32)
    gate[0, 3] = float("nan")
    y = gated_down(x, gate, parts, groups, [False, False], 8, [])
    assert bool(y[0].isnan().all())
    assert bool(y[1].isfinite().all())
    x[1, 0] = float("inf")
    assert not bool(gated_down(x, gate, parts, groups, [False, False], 8, [])[1].isfinite().all())


@pytest.mark.parametrize("name", [None, "int8"])
def test_as_an_operator(name):
    x, gate, parts, groups, *_ = operands(2, 16, 32, 8, name, torch.float32)
    counts = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
    torch.library.opcheck(gated_down, (x, gate, parts, groups, [False, False], 8, counts))
    torch.library.opcheck(up_linear, (x, *parts[:4], groups[0], parts[4], None, False, 8, counts[0]))
    with pytest.raises(RuntimeError, match="gated_down takes 2 layers"):
        gated_down(x.to("meta"), gate.to("meta"), parts[:8], groups, [False, False], 8, [])
