"""Operands, and how far a result may be from float64's, for the tests of the operators."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import pytest
import torch
from torch.nn import functional as F

from deadband.layers.formats import QuantizedWeight, WeightFormat
from deadband.ops import kernels

ISAS = kernels.available_isas() or [None]

ALL = 1 << 40

DTYPES = [torch.float32, torch.bfloat16]


@contextlib.contextmanager
def instruction_set(name):
    before = kernels.isa()
    if name is not None:
        kernels.set_isa(name)
    try:
        yield
    finally:
        if before is not None:
            kernels.set_isa(before)


def error_against_float64(y, x, weight, bias):
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return (y.double() - exact).abs().max().item() if y.numel() else 0.0


def allowed_error(x, weight, bias):
    """Twice that of torch's own dense kernel on the same numbers, or of a few roundings where torch is lucky."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torchs = error_against_float64(F.linear(x, weight.contiguous(), bias), x, weight, bias)
    if not exact.numel():
        return 0.0
    # one chain of n additions: n roundings of sums about as large as the result, or as the root of the sum of squares
    walk = F.linear(x.double().square(), weight.double().square()).sqrt().max().item()
    largest = max(exact.abs().max().item(), 2 * walk)
    sums = torch.finfo(torch.float32).eps / 2 * max(x.shape[-1], 1) ** 0.5 * largest
    result = torch.finfo(x.dtype).eps * exact.abs().max().item()
    return 2 * max(torchs, sums + result)


def rounding_of(rows, bits):
    """How many kept inputs of a row of x are rounded together, at most, and how many steps the largest has, at least.

    rows: of x. bits: of the weight.
    """
    if bits == 8:
        return 128, 127 * 256
    return (64, 508 / 9) if rows == 1 else (32, 127)


compiled = pytest.mark.skipif(kernels.library is None, reason="no kernels are built")


def random_weight(inputs, outputs, name, seed=0):
    """All codes, the unused ones too; scales of either sign, some zero, some (as float16) subnormal."""
    generator = torch.Generator().manual_seed(seed)
    format = WeightFormat.parse(name)
    shape = (format.groups(inputs), outputs)

    def values(scale):
        random = torch.randn(shape, generator=generator) * scale
        kind = torch.randint(10, shape, generator=generator)
        return torch.where(kind == 0, 0.0, torch.where(kind == 1, random * 1e-4, random)).to(format.scale_dtype)

    if format.bits == 8:
        codes = torch.randint(-128, 128, (inputs, outputs), generator=generator, dtype=torch.int8)
    else:
        codes = torch.randint(256, (inputs, -(-outputs // 32) * 16), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, values(0.1), values(0.5) if format.zero_point else None, format)


def random_operands(rows, inputs, outputs, dtype, *, bias=True, weighted=False, centered=False, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(rows, inputs, generator=generator)
    x = (x * torch.randn(rows, inputs, generator=generator).exp()).to(dtype)  # a few large ones
    own_bias = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    scale = torch.rand(inputs, generator=generator) + 0.5 if weighted else None
    center = torch.randn(inputs, generator=generator).to(dtype).float() if centered else None
    return x, own_bias, scale, center


def parts_of(weight):
    """What a weight is the sum of, scale times code and the minimum, as float64 [in, out]."""
    code = weight.unpacked().double() - (8 if weight.format.bits == 4 and weight.minimum is None else 0)
    group = torch.arange(weight.in_features) // (weight.format.group_size or ALL)
    low = torch.zeros_like(code) if weight.minimum is None else weight.minimum.double()[group]
    return weight.scales.double()[group] * code, low


def check_product(y, multiplied, weight, kept, constants):
    """That y is constants + multiplied @ weight, but for what rounding explains.

    multiplied: float64 [rows, in], zero where skipped. kept: bool [in], the inputs that any row keeps.
    """
    product, low = parts_of(weight)
    size = product.abs() + low.abs()
    exact = multiplied @ (product + low) + sum(constants)
    error, chunks = torch.zeros_like(exact), 0
    together, entry = rounding_of(len(multiplied), weight.format.bits)
    for group in torch.arange(weight.in_features).split(weight.format.group_size or max(weight.in_features, 1)):
        inputs = group[kept[group]]
        if len(inputs) and len(multiplied):
            # wherever the kernel cuts, none further away shares an input's step
            near = F.max_pool1d(multiplied[:, inputs].abs(), 2 * together - 1, 1, together - 1)
            # half a step, and a little as it is found in float32; entries so small that one over their step is infinite
            # count as zero
            each = 0.505 / entry * near + near.clamp_max(entry / 3.4e38)
            error += each @ size[inputs]
            chunks += -(-len(inputs) // 16)
    if weight.minimum is not None:  # kernels take 8 off the codes, and add as much to the minimum
        size = size + 8 * weight.scales.double().abs().repeat_interleave(weight.format.group_size, 0)[: len(size)]
    magnitude = multiplied.abs() @ size + sum(constant.abs() for constant in constants)
    float32, result = torch.finfo(torch.float32), torch.finfo(y.dtype)
    error += (chunks + 10) * (float32.eps / 2 * magnitude + float32.smallest_normal * float32.eps)
    error += result.eps / 2 * (exact.abs() + error) + result.smallest_normal * result.eps
    assert bool(((y.double() - exact).abs() <= error).all())


def before_a_wall(tensor):
    """A copy that ends at the end of a page after which memory may not be touched."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)  # shared: what a child process writes can be seen
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return copy.view(tensor.shape).copy_(tensor)
