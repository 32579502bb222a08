"""The kernels on aarch64, cross-compiled with CMake and run in an emulator, against a float64 reference."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import test_expert_operators as of_experts
import test_gated_down as of_gates
import torch
from operators import DTYPES, check_product, parts_of, random_operands, random_weight
from torch.nn import functional as F

from deadband.ops.attention import attend_reference
from deadband.ops.observe import observe_reference
from deadband.ops.skipping import keep_mask

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR, "cmake", "make") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
ISAS = ["aarch64", "aarch64-dotprod"]
SPARSE, DENSE, QUANTIZED, OBSERVE, ATTEND, EXPERT_LINEAR, EXPERT_MLP, GATED_DOWN = range(8)
OF_LAYER = ("weight", "scales", "minimum", "bias", "threshold", "scale", "center", "offset")
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BINS = 32768


def run(*command, **variables):
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def emulate(driver, *arguments):
    command = (EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", "max", driver, *arguments)
    return run(*command, OMP_WAIT_POLICY="passive")  # threads that wait would take the emulator's time


@pytest.fixture(scope="module")
def driver():
    """The program that makes calls, linked with the library; a warning of the compiler is an error."""
    build = ROOT / "build" / "aarch64"  # kept: the next run compiles what has changed
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CXX_FLAGS": "-Werror",
    }
    run(
        "cmake",
        "-G",
        "Unix Makefiles",
        "-S",
        ROOT,
        "-B",
        build,
        *(f"-D{key}={value}" for key, value in options.items()),
    )
    run("cmake", "--build", build, "--parallel", "3")
    source, program = ROOT / "tests" / "aarch64_driver.cpp", build / "driver"
    library = ["-L", build, "-l:libdeadband_kernels.so", f"-Wl,-rpath,{build}"]
    run(COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", source, "-o", program, *library)
    return program


def bytes_of(tensor):
    if tensor is None:
        return struct.pack("<q", -1)
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return struct.pack("<q", len(data)) + data


def call(
    kind, x, outputs, *, form=0, group_size=0, relative=False, threads=1, result_bytes=None, inner=0, count=0, each=1,
    down=(None,) * 8, experts=None, shares=None, gate=None, **operands,
):  # fmt: skip
    """One call as the driver reads it, and the bytes of its result; `operands` are those of its (first) layer."""
    rows, inputs = x.shape
    if result_bytes is None:
        result_bytes = rows * outputs * x.element_size()
    numbers = [kind, DTYPE_NUMBERS[x.dtype], rows, inputs, outputs, form, group_size, relative, threads, result_bytes,
               inner, count, each]  # fmt: skip
    given = (x, *map(operands.get, OF_LAYER), *down, experts, shares, gate)
    return struct.pack("<13q", *numbers) + b"".join(map(bytes_of, given)), result_bytes


def make_calls(driver, folder, isa, calls):
    """What each call wrote, and its counts."""
    written, results = folder / "calls", folder / "results"
    written.write_bytes(b"".join(data for data, _ in calls))
    emulate(driver, isa, written, results)
    data = results.read_bytes()
    assert len(data) == sum(size + 24 for _, size in calls)
    for _, size in calls:
        yield data[:size], list(struct.unpack_from("<3q", data, size))
        data = data[size + 24 :]


def tensor_from(data, dtype, rows):
    return torch.frombuffer(bytearray(data), dtype=dtype).view(rows, -1)


def skipped_of(x, threshold, scale, center, relative):
    """What the rule skips, and what is multiplied: float64, less the center."""
    if threshold is None:
        return [0, 0, 0], torch.ones(x.shape, dtype=torch.bool), x.double()
    keep = keep_mask(x, threshold, scale, center, relative)
    counts = [int((~keep).sum()), keep.numel(), int((~x.isfinite()).sum())]
    return counts, keep, torch.where(keep, x.double() - (0 if center is None else center.double()), 0)


def test_both_instruction_sets_can_run(driver):
    assert emulate(driver).strip() == ",".join(ISAS)


@pytest.mark.parametrize("isa", ISAS)
def test_quantized_linear(driver, tmp_path, isa):
    names = ["int8", "int8-g32", "int4-g32", "int4-g32-zp"]
    shapes = [(1, 1), (3, 5), (31, 33), (33, 63), (70, 100), (129, 31), (257, 130), (576, 640)]
    options = [(None, False, False), (0.5, False, False), (0.7, True, True)]
    calls, expected = [], []
    kinds = itertools.product((1, 7), shapes, names, DTYPES, options)
    for seed, (rows, (inputs, outputs), name, dtype, (threshold, full, relative)) in enumerate(kinds):
        weight = random_weight(inputs, outputs, name, seed)
        x, bias, scale, center = random_operands(
            rows, inputs, outputs, dtype, bias=full, weighted=full, centered=full, seed=seed
        )
        if relative:
            threshold = threshold * inputs**-0.5
        constants = [torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.double()]
        if full:
            constants.append(center.double() @ sum(parts_of(weight)))
        limit = None if threshold is None else torch.tensor([threshold])
        operands = {"weight": weight.codes, "scales": weight.scales, "minimum": weight.minimum, "bias": bias}
        rule = {"threshold": limit, "scale": scale, "center": center, "relative": relative}
        offset = constants[1].float() if full else None
        form = {"form": weight.format.bits, "group_size": weight.format.group_size or 0, "threads": 1 + seed % 2}
        calls.append(call(QUANTIZED, x, outputs, **form, **operands, **rule, offset=offset))
        expected.append((weight, constants, dtype, *skipped_of(x, threshold, scale, center, relative)))
    results = make_calls(driver, tmp_path, isa, calls)
    for (data, counts), (weight, constants, dtype, counted, keep, multiplied) in zip(results, expected, strict=True):
        assert counts == counted
        check_product(tensor_from(data, dtype, len(keep)), multiplied, weight, keep.any(0), constants)


@pytest.mark.parametrize("isa", ISAS)
def test_quantized_rows_that_are_not_finite(driver, tmp_path, isa):
    calls, sizes = [], []
    for name, value, rows in itertools.product(("int8", "int4-g32-zp"), (math.nan, math.inf), (1, 3)):
        weight = random_weight(70, 40, name)
        x = random_operands(rows, 70, 40, torch.float32)[0]
        x[-1, 66] = value
        operands = {"weight": weight.codes, "scales": weight.scales, "minimum": weight.minimum}
        form = {"form": weight.format.bits, "group_size": weight.format.group_size or 0}
        calls.append(call(QUANTIZED, x, 40, **form, **operands, threshold=torch.tensor([0.5])))
        sizes.append(rows)
    for (data, counts), rows in zip(make_calls(driver, tmp_path, isa, calls), sizes, strict=True):
        y = tensor_from(data, torch.float32, rows)
        assert bool(y[-1].isnan().all())
        assert bool(y[:-1].isfinite().all())
        assert counts[1:] == [70 * rows, 1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [SPARSE, DENSE])
def test_plain_linear(driver, tmp_path, isa, kind):
    shapes = [(1, 1), (7, 5), (33, 63), (129, 100), (300, 257)]
    calls, expected = [], []
    forms = (0,) if kind == SPARSE else (0, 1)
    kinds = itertools.product((1, 3, 8, 20), shapes, DTYPES, forms, (False, True))
    for seed, (rows, (inputs, outputs), dtype, form, full) in enumerate(kinds):
        if rows > (8 if kind == SPARSE else 4 if form else 20):
            continue
        torch.manual_seed(seed)
        stored = torch.randn((outputs, inputs) if form else (inputs, outputs)).to(dtype)
        x, bias, scale, center = random_operands(
            rows, inputs, outputs, dtype, bias=full, weighted=full, centered=full, seed=seed
        )
        matrix = (stored.t() if form else stored).double()
        constant = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.double()
        operands = {"weight": stored, "bias": bias, "form": form, "threads": 1 + seed % 2}
        threshold = None
        if kind == SPARSE:
            threshold = 0.6
            operands |= {"threshold": torch.tensor([threshold]), "scale": scale, "center": center}
            if full:
                operands["offset"] = (center.double() @ matrix).float()
                constant += center.double() @ matrix
        else:
            scale = center = None
        counts, _, multiplied = skipped_of(x, threshold, scale, center, False)
        error = 1e-6 * (F.linear(multiplied.abs(), matrix.abs().t()) + constant.abs()) * (4 + inputs**0.5)
        exact = multiplied @ matrix + constant
        calls.append(call(kind, x, outputs, **operands))
        expected.append((exact, error + torch.finfo(dtype).eps / 2 * (exact.abs() + error), dtype, counts))
    for (data, counts), (exact, error, dtype, counted) in zip(
        make_calls(driver, tmp_path, isa, calls), expected, strict=True
    ):
        assert counts == counted
        assert bool(((tensor_from(data, dtype, len(exact)).double() - exact).abs() <= error).all())


@pytest.mark.parametrize("isa", ISAS)
def test_observe(driver, tmp_path, isa):
    calls, expected = [], []
    for dtype, columns, weighted in itertools.product(DTYPE_NUMBERS, (1, 33, 77), (False, True)):
        torch.manual_seed(columns)
        x = (torch.randn(21, columns) * torch.logspace(-6, 4, columns)).to(dtype)
        x[3, 0], x[7, -1], x[8, 0] = math.nan, -math.inf, -0.0
        scale = torch.rand(columns) + 0.1 if weighted else None
        calls.append(call(OBSERVE, x, 0, scale=scale, result_bytes=8 * (BINS + 2 * columns)))
        expected.append((columns, observe_reference(x, scale)))
    for (data, _), (columns, reference) in zip(make_calls(driver, tmp_path, isa, calls), expected, strict=True):
        histogram, sums = np.frombuffer(data[: 8 * BINS], "<i8"), np.frombuffer(data[8 * BINS :], "<f8")
        assert np.array_equal(histogram, reference[0])
        np.testing.assert_allclose(sums[:columns], reference[2], rtol=1e-6, atol=1e-6 * np.abs(reference[2]).max())
        np.testing.assert_allclose(sums[columns:], reference[3], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_attend(driver, tmp_path, isa):
    calls, expected = [], []
    for dtype, heads, (size, tokens) in itertools.product(
        (torch.float32, torch.bfloat16), (1, 3, 4), ((1, 1), (16, 64), (21, 67))
    ):
        torch.manual_seed(tokens)
        query, keys = torch.randn(2 * heads, size).to(dtype), torch.randn(2, size, tokens).to(dtype)
        values, mask = torch.randn(2, tokens, size + 1).to(dtype), torch.zeros(tokens)
        mask[: tokens // 3] = -math.inf
        operands = {"weight": keys, "scales": values, "threshold": mask}
        bytes_written = 2 * heads * (size + 1) * query.element_size()
        calls.append(call(ATTEND, query, size + 1, form=tokens, group_size=2, threads=2, result_bytes=bytes_written,
                          **operands))  # fmt: skip
        expected.append(attend_reference(query, keys, values, mask, 0.5, 0.0))
    for (data, _), reference in zip(make_calls(driver, tmp_path, isa, calls), expected, strict=True):
        y = tensor_from(data, reference.dtype, len(reference))
        torch.testing.assert_close(y, reference, rtol=2 * torch.finfo(y.dtype).eps, atol=1e-4)


def bits_of(name):
    return 0 if name is None else int(name[3])


@pytest.mark.parametrize("isa", ISAS)
def test_expert_linear(driver, tmp_path, isa):
    calls, expected = [], []
    kinds = itertools.product((1, 5, 12), ((33, 63), (130, 70)), (None, "int8", "int4-g32-zp"), DTYPES, (False, True))
    for seed, (rows, (inputs, outputs), name, dtype, full) in enumerate(kinds):
        rule = {"threshold": 0.5 if full else None, "scaled": full, "centered": full}
        own = of_experts.projection(inputs, outputs, name, dtype, **rule, seed=seed)
        x, experts = of_experts.inputs_of(rows, inputs, 3, dtype, seed=seed)
        operands = dict(zip(OF_LAYER, own.parts, strict=True))
        if name is None:
            operands["weight"] = own.weight.mT
        calls.append(call(EXPERT_LINEAR, x, outputs, form=bits_of(name), group_size=own.group_size, experts=experts,
                          count=3, threads=1 + seed % 2, **operands))  # fmt: skip
        expected.append((x, experts, own))
    for (data, counts), (x, experts, own) in zip(make_calls(driver, tmp_path, isa, calls), expected, strict=True):
        y = tensor_from(data, x.dtype, len(x))
        of_experts.check_result(y, counts, x, experts, own, own.threshold is not None)


@pytest.mark.parametrize("isa", ISAS)
def test_expert_mlp(driver, tmp_path, isa):
    calls, expected = [], []
    kinds = itertools.product((1, 6), (None, "int8", "int4-g32-zp"), DTYPES)
    for seed, (tokens, name, dtype) in enumerate(kinds):
        up, down = of_experts.mlp_of(70, 33, 65, name, dtype, seed=seed)
        up.threshold, up.scale = torch.tensor(0.5), torch.rand(70) + 0.5  # what the activation gives is rounded anew
        x, _ = of_experts.inputs_of(tokens, 70, 3, dtype, seed=seed)
        chosen, shares = of_experts.routed(tokens, 2, 3, seed)
        parts = [*up.parts, *down.parts]
        if name is None:
            parts[0], parts[8] = up.weight.mT, down.weight.mT
        calls.append(call(EXPERT_MLP, x, 65, form=bits_of(name), group_size=up.group_size, inner=33, count=3, each=2,
                          experts=chosen, shares=shares, threads=2, down=parts[8:],
                          **dict(zip(OF_LAYER, parts[:8], strict=True))))  # fmt: skip
        wanted = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
        y, _ = of_experts.composed(x, chosen, shares, up, down, "silu", tokens, wanted)
        expected.append((y, dtype, name, wanted[0].tolist()))
    for (data, counts), (exact, dtype, name, counted) in zip(
        make_calls(driver, tmp_path, isa, calls), expected, strict=True
    ):
        assert counts == counted
        step = (3e-2 if name and "4" in name[:4] else 3e-3 if name else 1e-5) + 4 * torch.finfo(dtype).eps
        y = tensor_from(data, dtype, len(exact)).double()
        torch.testing.assert_close(y, exact, rtol=0, atol=step * float(exact.abs().max()) + 1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_gated_down(driver, tmp_path, isa):
    calls, expected = [], []
    names = (None, "int8", "int8-g32", "int4-g64-zp")
    kinds = itertools.product(((1, 70, 33, 45), (8, 200, 64, 7)), names, DTYPES, (0.0, 1.0))
    for seed, (shape, name, dtype, threshold) in enumerate(kinds):
        full = threshold > 0
        made = of_gates.operands(*shape, name, dtype, scaled=full, biased=full, threshold=threshold)
        x, gate, parts, groups, wide_up, wide_down, biases, scale, center = made
        stored = [each if each is None or each.dim() < 2 or name is None else each.t() for each in parts[:8]]
        down = parts[8:]
        if name is None:
            down[0] = down[0].t()
        calls.append(call(GATED_DOWN, x, shape[3], form=bits_of(name), group_size=groups[0], inner=shape[2], gate=gate,
                          threads=1 + seed % 2, down=down, **dict(zip(OF_LAYER, stored, strict=True))))  # fmt: skip
        exact, size, keep = of_gates.expected(x, gate, wide_up, wide_down, biases, threshold, scale, center)
        coarse = 0.02 if name and "4" in name[:4] else 1e-3 if name else 2e-6
        error = (torch.finfo(dtype).eps * 2 + coarse) * size + 1e-5
        expected.append((exact, error, dtype, [int((~keep).sum()), keep.numel(), 0]))
    for (data, counts), (exact, error, dtype, counted) in zip(
        make_calls(driver, tmp_path, isa, calls), expected, strict=True
    ):
        assert counts == counted
        assert bool(((tensor_from(data, dtype, len(exact)).double() - exact).abs() <= error).all())
