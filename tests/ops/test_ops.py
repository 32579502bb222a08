"""Every operator against its float64 reference, on every instruction set that this machine runs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import ALL, DTYPES, ISAS, allowed_error, error_against_float64, instruction_set
from torch.nn import functional as F

from deadband.layers.rule import scale_of
from deadband.ops import kernels, linear
from deadband.ops.cpu import SPARSE_ROWS
from deadband.ops.linear import dense_linear, sparse_linear_reference
from deadband.ops.observe import BINS, FIRST_NONFINITE, observe, observe_reference
from deadband.ops.skipping import keep_mask, score
from deadband.running.forward import threads


def sparse_linear(x, weight, bias, threshold, scale, sparse_rows, counts, center=None, relative=False):
    offset = None if center is None else weight.float() @ center
    return linear.sparse_linear(x, weight, bias, threshold, scale, center, offset, relative, sparse_rows, counts)


def operands(rows, inputs, outputs, dtype, *, bias=True, weighted=False, layout="in_out", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weight = random(outputs, inputs)
    if layout == "in_out":
        weight = weight.t().contiguous().t()
    elif layout == "padded":
        weight = random(inputs, outputs + 3)[:, :outputs].t()
    elif layout == "strided":
        weight = random(2 * outputs, 2 * inputs)[::2, ::2]
    scale = scale_of("weighted_magnitude", weight) if weighted else None
    return random(rows, inputs), weight, random(outputs) if bias else None, scale


def check_sparse(x, weight, bias, threshold, scale, sparse_rows=ALL, center=None, relative=False):
    counts = torch.zeros(3, dtype=torch.int64)
    if relative and x.shape[-1]:  # another order of summing a norm must not decide whether an entry is kept
        ratio = score(x, scale, center) / x.float().norm(dim=-1, keepdim=True)
        assume(bool(((ratio / threshold - 1).abs() > 1e-5).all()) or threshold <= 0)
    y = sparse_linear(x, weight, bias, torch.tensor(threshold), scale, sparse_rows, counts, center, relative)
    keep = keep_mask(x, threshold, scale, center, relative)
    masked = torch.where(keep, x, 0 if center is None else center.to(x.dtype))
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert error_against_float64(y, masked, weight, bias) <= allowed_error(masked, weight, bias)
    assert counts.tolist() == [int((~keep).sum()), keep.numel(), int((~x.isfinite()).sum())]
    return y


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    inputs=st.sampled_from([1, 2, 3, 7, 31, 64, 65, 127, 300, 1025]),
    outputs=st.sampled_from([1, 2, 5, 16, 33, 64, 100, 257, 520]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    weighted=st.booleans(),
    layout=st.sampled_from(["in_out", "out_in", "padded", "strided"]),
    centered=st.booleans(),
    relative=st.booleans(),
    threshold=st.sampled_from([-1.0, 0.0, 0.3, 0.7, 2.0, 100.0]),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**30),
)
def test_sparse_linear_matches_float64(
    isa, rows, inputs, outputs, dtype, bias, weighted, layout, centered, relative, threshold, count, seed
):
    x, weight, bias, scale = operands(
        rows, inputs, outputs, dtype, bias=bias, weighted=weighted, layout=layout, seed=seed
    )
    center = (
        torch.randn(inputs, generator=torch.Generator().manual_seed(seed + 1)).to(dtype).float() if centered else None
    )
    if relative and threshold > 0:
        threshold *= inputs**-0.5  # so that a part is kept, not all
    with instruction_set(isa), threads(count):
        check_sparse(x, weight, bias, threshold, scale, center=center, relative=relative)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 8, 13, 14, 15, 16, 29, 64, 129, 200]),
    inputs=st.sampled_from([1, 3, 64, 257, 600]),
    outputs=st.sampled_from([1, 31, 64, 257, 300]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    layout=st.sampled_from(["in_out", "out_in", "padded"]),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**30),
)
def test_dense_linear_matches_float64(isa, rows, inputs, outputs, dtype, bias, layout, count, seed):
    x, weight, bias, _ = operands(rows, inputs, outputs, dtype, bias=bias, layout=layout, seed=seed)
    with instruction_set(isa), threads(count):
        y = dense_linear(x, weight, bias)
    assert y.shape == (rows, outputs)
    assert error_against_float64(y, x, weight, bias) <= allowed_error(x, weight, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (1536, 576), (576, 1536), (300, 9001)])
def test_large_layers_with_several_threads(isa, dtype, shape):
    x, weight, bias, scale = operands(2, *shape, dtype, weighted=True)
    with instruction_set(isa), threads(2):
        check_sparse(x, weight, bias, float(scale.median()) * 0.7, scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, SPARSE_ROWS + 2))
def test_an_entry_at_the_threshold_is_skipped(isa, dtype, rows):
    x = torch.tensor([0.5, -0.5, 0.50390625, -0.25, 0.0, -0.0]).to(dtype).repeat(rows, 1)
    weight = torch.eye(6, dtype=dtype)
    with instruction_set(isa):
        y = check_sparse(x, weight, None, 0.5, None)
    assert (y != 0).sum(1).tolist() == [1] * rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_zero_threshold_is_the_dense_product(isa, dtype, rows):
    x, weight, bias, _ = operands(rows, 200, 90, dtype)
    x = x.relu()
    with instruction_set(isa):
        y = check_sparse(x, weight, bias, 0.0, None)
    assert error_against_float64(y, x, weight, bias) <= allowed_error(x, weight, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weighted", [False, True])
def test_nan_and_infinity_surface(isa, dtype, rows, value, weighted):
    x, weight, bias, scale = operands(rows, 70, 40, dtype, weighted=weighted)
    x[0, 33] = value
    with instruction_set(isa):
        y = sparse_linear(x, weight, bias, torch.tensor(0.8), scale, ALL, None)
    dense = F.linear(x, weight, bias)
    assert torch.equal(y[0].isnan(), dense[0].isnan())
    assert torch.equal(y[0].isinf(), dense[0].isinf())
    assert torch.equal(y[0][y[0].isinf()], dense[0][dense[0].isinf()])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("inputs", [1, 31, 64, 577])
def test_nonfinite_entries_are_counted(isa, dtype, rows, inputs):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    largest = torch.finfo(dtype).max
    special = torch.tensor([math.nan, math.inf, -math.inf, -math.nan, largest, -largest, 0.0], dtype=dtype)
    places = torch.rand(rows, inputs, generator=generator) < 0.3
    x[places] = special[torch.randint(len(special), (int(places.sum()),), generator=generator)]
    weight = torch.randn(inputs, 17, generator=generator).to(dtype).t()
    counts = torch.tensor([5, 6, 7])  # added to, not set
    with instruction_set(isa):
        sparse_linear(x, weight, None, torch.tensor(0.8), None, ALL, counts)
    skipped = int((x.abs().float() <= 0.8).sum())
    assert counts.tolist() == [5 + skipped, 6 + x.numel(), 7 + int((~x.isfinite()).sum())]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_skipped_inputs_are_never_met(isa, dtype):
    x, weight, bias, _ = operands(1, 64, 48, dtype)
    x[0, ::2] = 0.1
    clean = weight.clone()
    weight[:, ::2] = math.nan
    with instruction_set(isa):
        poisoned = sparse_linear(x, weight, bias, torch.tensor(0.2), None, 4, None)
        expected = sparse_linear(x, clean.t().contiguous().t(), bias, torch.tensor(0.2), None, 4, None)
    assert torch.equal(poisoned, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2])
def test_the_same_bits_on_every_run(dtype, count):
    x, weight, bias, _ = operands(3, 2048, 1500, dtype)
    with threads(count):
        results = [sparse_linear(x, weight, bias, torch.tensor(0.6), None, 4, None) for _ in range(10)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_beyond_the_limit_are_dense_and_not_counted():
    x, weight, bias, _ = operands(5, 40, 30, torch.float32)
    counts = torch.zeros(3, dtype=torch.int64)
    y = sparse_linear(x, weight, bias, torch.tensor(100.0), None, 4, counts)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert counts.tolist() == [0, 0, 0]
    assert torch.equal(sparse_linear(x[:1], weight, bias, torch.tensor(100.0), None, 4, counts)[0], bias)
    assert counts.tolist() == [40, 40, 0]


@pytest.mark.parametrize("shape", [(2, 0), (0, 8), (3, 8)])
@pytest.mark.parametrize("outputs", [0, 4])
def test_empty_operands(shape, outputs):
    x = torch.randn(shape)
    weight, bias = torch.randn(shape[1], outputs).t(), torch.randn(outputs)
    y = sparse_linear(x, weight, bias, torch.tensor(0.1), None, 4, None)
    assert y.shape == (shape[0], outputs)
    if shape[1] == 0:
        assert torch.equal(y, bias.expand_as(y))


def test_non_contiguous_and_many_dimensional_x():
    x, weight, bias, _ = operands(12, 30, 20, torch.float32)
    threshold = torch.tensor(0.5)
    folded = x.view(2, 3, 2, 30)
    expected = sparse_linear_reference(x, weight, bias, threshold, None, None, None, False, ALL, None).view(2, 3, 2, 20)
    torch.testing.assert_close(sparse_linear(folded, weight, bias, threshold, None, ALL, None), expected)
    strided = x.t().contiguous().t()[::4]  # 3 rows, served by the kernel
    torch.testing.assert_close(
        sparse_linear(strided, weight, bias, threshold, None, 4, None), expected.view(12, 20)[::4]
    )
    single = sparse_linear(x[0], weight, bias, threshold, None, 4, None)
    torch.testing.assert_close(single, expected.view(12, 20)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_reference(dtype):
    x, weight, bias, scale = operands(2, 50, 20, dtype, weighted=True)
    check_sparse(x, weight, bias, 0.9, scale)


def test_operands_that_do_not_fit_raise():
    x, weight, bias, _ = operands(1, 8, 4, torch.float32)
    threshold = torch.tensor(0.0)
    with pytest.raises(RuntimeError):
        sparse_linear(x[:, :7], weight, bias, threshold, None, 4, None)
    with pytest.raises(RuntimeError):
        sparse_linear(x.bfloat16(), weight, bias, threshold, None, 4, None)
    with pytest.raises(RuntimeError):
        sparse_linear(x, weight, bias.bfloat16(), threshold, None, 4, None)
    weight = weight.t().contiguous().t()
    with pytest.raises(RuntimeError):
        sparse_linear(x, weight, bias[:3], threshold, None, 4, None)
    with pytest.raises(RuntimeError):
        sparse_linear(x, weight, bias, torch.zeros(3), None, 4, None)
    with pytest.raises(RuntimeError):
        sparse_linear(x, weight, bias, threshold, torch.ones(3), 4, None)
    with pytest.raises(RuntimeError):
        sparse_linear(x, weight, bias, threshold, None, 4, torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"counts has to be \[3\] int64" if kernels.library else None):
        sparse_linear(x, weight, bias, threshold, None, 4, torch.zeros(2, dtype=torch.int64))


def test_thresholds_and_scales_of_other_dtypes_mean_the_same():
    x, weight, bias, scale = operands(2, 30, 20, torch.float32, weighted=True)
    expected = sparse_linear(x, weight, bias, torch.tensor(1.0), scale, 4, None)
    actual = sparse_linear(x, weight, bias, torch.tensor(1.0, dtype=torch.float64), scale.double(), 4, None)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("options", [(None, False), (None, True), ("weighted", True)])
def test_opcheck(dtype, rows, options):
    x, weight, bias, scale = operands(rows, 40, 24, dtype, bias=options[1], weighted=options[0] is not None)
    counts = torch.zeros(3, dtype=torch.int64) if options[1] else None
    center = torch.rand(40) if options[1] else None
    offset = None if center is None else weight.float() @ center
    rest = (scale, center, offset, options[1], 4, counts)
    torch.library.opcheck(linear.sparse_linear, (x, weight, bias, torch.tensor(0.5), *rest))
    torch.library.opcheck(dense_linear, (x, weight, bias))


def test_two_threads_of_python_lose_no_count():
    x, weight, bias, _ = operands(1, 512, 512, torch.float32)
    counts = torch.zeros(3, dtype=torch.int64)

    def work():
        for _ in range(200):
            sparse_linear(x, weight, bias, torch.tensor(0.5), None, 4, counts)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counts[1].item() == 800 * 512


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
def test_observe_matches_the_reference(isa, dtype, weighted):
    torch.manual_seed(0)
    x = (torch.randn(130, 77) * torch.logspace(-6, 4, 77)).to(dtype)
    x[3, 5], x[7, 7], x[8, 8], x[9, 9], x[1, :9] = math.nan, math.inf, -math.inf, -0.0, 0.0
    scale = torch.rand(77) + 0.1 if weighted else None
    with instruction_set(isa):
        histogram, rows, total, squares = observe(x, scale)
    expected = observe_reference(x, scale)
    assert np.array_equal(histogram, expected[0])
    assert histogram[FIRST_NONFINITE:].sum() == 3 + (x.isinf().sum().item() - 2)
    assert np.array_equal(rows, x.isfinite().sum(0).numpy())
    np.testing.assert_allclose(total, expected[2], rtol=1e-6, atol=1e-6 * np.abs(expected[2]).max())
    np.testing.assert_allclose(squares, expected[3], rtol=1e-6)
    assert histogram.sum() == x.numel()
    assert len(histogram) == BINS


@pytest.mark.parametrize("variable", ["DEADBAND_KERNELS", "DEADBAND_ISA"])
def test_environment_chooses_what_runs(variable):
    if kernels.library is None:
        pytest.skip("no kernels are built")
    value, expected = {"DEADBAND_KERNELS": ("0", "None"), "DEADBAND_ISA": (ISAS[0], ISAS[0])}[variable]
    code = (
        "from deadband.ops import kernels, sparse_linear; import torch;"
        "rest = (None, torch.tensor(0.), None, None, None, False, 4, None);"
        "y = sparse_linear(torch.ones(1, 2), torch.ones(3, 2), *rest);"
        "print(kernels.isa(), y.sum().item())"
    )
    environment = {**os.environ, variable: value}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.split() == [expected, "6.0"]


def test_another_library_is_loaded_by_its_path(tmp_path):
    if kernels.library is None:
        pytest.skip("no kernels are built")
    copy = tmp_path / "the copy.so"
    shutil.copy(kernels.library._name, copy)
    code = "from deadband.ops import kernels; print(kernels.library and kernels.library._name)"
    for path, expected in ((copy, str(copy)), (tmp_path / "missing.so", "")):  # one that was asked for has to load
        environment = {**os.environ, "DEADBAND_KERNELS": str(path)}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert result.stdout.strip() == expected
        assert (result.returncode == 0) == bool(expected)
        assert ("OSError" in result.stderr) == (not expected)


def test_an_unknown_instruction_set_is_refused_and_nothing_changes():
    before = kernels.isa()
    with pytest.raises(ValueError, match="not available"):
        kernels.set_isa("z80")
    assert kernels.isa() == before
