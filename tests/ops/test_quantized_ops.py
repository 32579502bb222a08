"""Products with weights of 8 and 4 bits against a float64 reference, on every instruction set that this machine runs.

The bound on errors follows from what the kernels promise: entries of x are rounded, those of a few inputs that are kept
to multiples of one step (`operators.rounding_of`); everything else is float32.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from operators import (
    ALL,
    DTYPES,
    ISAS,
    before_a_wall,
    check_product,
    compiled,
    instruction_set,
    parts_of,
    random_operands,
    random_weight,
    rounding_of,
)
from torch.nn import functional as F

from deadband.layers.formats import FORMATS, QuantizedWeight
from deadband.layers.rounding import quantize
from deadband.ops import cpu, kernels, linear, products
from deadband.ops.cpu import SPARSE_ROWS
from deadband.ops.skipping import fill, keep_mask, score
from deadband.running.forward import threads


def multiply(
    x, weight, bias=None, threshold=None, scale=None, center=None, relative=False, sparse_rows=ALL, counts=None
):
    offset = None if center is None else (center.double() @ sum(parts_of(weight))).float()
    threshold = threshold if threshold is None or isinstance(threshold, torch.Tensor) else torch.tensor(threshold)
    size = weight.format.group_size or 0
    rest = (scale, center, offset, relative, sparse_rows, counts)
    return linear.quantized_linear(x, weight.codes, weight.scales, weight.minimum, bias, size, threshold, *rest)


def check(x, weight, bias=None, threshold=None, scale=None, center=None, relative=False, sparse_rows=ALL):
    counts = torch.tensor([5, 6, 7])  # added to, not set
    if relative and threshold is not None and threshold > 0 and x.numel():
        # another order of summing a norm must not decide whether an entry is kept
        ratio = score(x, scale, center) / x.float().norm(dim=-1, keepdim=True)
        assume(bool(((ratio / threshold - 1).abs() > 1e-5).all()))
    y = multiply(x, weight, bias, threshold, scale, center, relative, sparse_rows, counts)
    assert y.shape == (*x.shape[:-1], weight.out_features)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    constants = [torch.zeros(weight.out_features, dtype=torch.float64) if bias is None else bias.double()]
    rows = x.shape[:-1].numel()
    if threshold is None or rows > sparse_rows:
        multiplied, kept, counted = x.double(), torch.ones(x.shape[-1], dtype=torch.bool), [0, 0, 0]
    else:
        keep = keep_mask(x, threshold, scale, center, relative)
        counted = [int((~keep).sum()), keep.numel(), int((~x.isfinite()).sum())]
        if rows > SPARSE_ROWS:  # then the skipping takes torch, and the product all inputs
            multiplied, kept = fill(x, keep, center).double(), torch.ones(x.shape[-1], dtype=torch.bool)
        else:
            kept = keep.flatten(0, -2).any(0)
            multiplied = torch.where(keep, x.double() - (0 if center is None else center.double()), 0)
            if center is not None:
                constants.append(center.double() @ sum(parts_of(weight)))
    assert counts.tolist() == [5 + counted[0], 6 + counted[1], 7 + counted[2]]
    check_product(y.flatten(0, -2), multiplied.flatten(0, -2), weight, kept, constants)
    return y


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 9),
    inputs=st.sampled_from([1, 2, 3, 5, 31, 32, 33, 64, 127, 129, 300, 576, 640, 1025]),
    outputs=st.sampled_from([1, 2, 5, 16, 31, 32, 33, 63, 65, 100, 128, 129, 257, 520]),
    name=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    weighted=st.booleans(),
    centered=st.booleans(),
    relative=st.booleans(),
    threshold=st.sampled_from([None, -1.0, 0.0, 0.3, 0.7, 2.0, 1e6]),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**30),
)
def test_few_rows_match_float64(
    isa, rows, inputs, outputs, name, dtype, bias, weighted, centered, relative, threshold, count, seed
):
    weight = random_weight(inputs, outputs, name, seed)
    x, own_bias, scale, center = random_operands(
        rows, inputs, outputs, dtype, bias=bias, weighted=weighted, centered=centered, seed=seed
    )
    if relative and threshold is not None and threshold > 0:
        threshold *= inputs**-0.5  # so that a part is kept, not all
    with instruction_set(isa), threads(count):
        check(x, weight, own_bias, threshold, scale, center, relative)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9, 13, 31, 64, 255, 256, 257, 600]),
    inputs=st.sampled_from([1, 3, 31, 32, 33, 64, 257, 576]),
    outputs=st.sampled_from([1, 31, 64, 127, 257, 300]),
    name=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**30),
)
def test_dense_products_match_float64(isa, rows, inputs, outputs, name, dtype, bias, count, seed):
    x, own_bias, scale, center = random_operands(rows, inputs, outputs, dtype, bias=bias, seed=seed)
    weight = random_weight(inputs, outputs, name, seed)
    with instruction_set(isa), threads(count):
        check(x, weight, own_bias)
        check(x, weight, own_bias, 0.5, sparse_rows=rows - 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "int4-g128-zp"])
@pytest.mark.parametrize("shape", [(1536, 576), (100, 9001), (40, 20000)])
def test_large_layers_with_several_threads(isa, name, shape):
    weight = random_weight(*shape, name)
    with instruction_set(isa), threads(2):
        for rows in (1, 2):
            x, bias, scale, center = random_operands(rows, *shape, torch.float32, weighted=True, centered=True)
            check(x, weight, bias, 0.7, scale, center)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_rounded_weight_multiplies_as_its_dequantised_form(isa, name):
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(90, 200, generator=generator), name, minimise=False)
    for rows in (1, 3, 20):
        x = torch.randn(rows, 200, generator=generator)
        with instruction_set(isa):
            check(x, weight)
    torch.testing.assert_close(sum(parts_of(weight)).t().float(), weight.dequantize(), rtol=0, atol=1e-6)
    size = weight.format.group_size or 0
    own = linear.dequantize(weight.codes, weight.scales, weight.minimum, size, torch.float32)
    assert torch.equal(own, weight.dequantize())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["int8", "int4-g64-zp"])
@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_row_with_an_entry_that_is_not_finite_becomes_nan(isa, dtype, name, rows, value):
    weight = random_weight(70, 40, name)
    x, bias, _, _ = random_operands(rows, 70, 40, dtype)
    x[-1, 33] = value
    for threshold in (None, 0.8, 1e30):
        with instruction_set(isa):
            y = multiply(x, weight, bias, threshold)
            if rows > 1:
                check(x[:-1], weight, bias, threshold)
        assert bool(y[-1].isnan().all())
        assert bool(y[:-1].isfinite().all())
    counts = torch.zeros(3, dtype=torch.int64)
    multiply(x, weight, bias, 0.8, counts=counts)
    assert counts.tolist() == [int((x.abs().float() <= 0.8).sum()), x.numel(), 1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", range(1, SPARSE_ROWS + 2))
def test_an_entry_at_the_threshold_is_skipped(isa, dtype, rows):
    x = torch.tensor([0.5, -0.5, 0.50390625, -0.25, 0.0, -0.0]).to(dtype).repeat(rows, 1)
    weight = quantize(torch.eye(6), "int8")
    with instruction_set(isa):
        y = check(x, weight, None, 0.5)
    assert (y != 0).sum(1).tolist() == [1] * rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g32-zp"])
@pytest.mark.parametrize("rows", [1, 5])
def test_tiny_and_large_entries(isa, name, rows):
    weight = random_weight(100, 60, name)
    x = torch.rand(rows, 100, generator=torch.Generator().manual_seed(rows)) * 2 - 1
    with instruction_set(isa):
        for largest in (0.0, 1e-45, 1e-38, 9e-35, 1e-34, 3e-34, 1e-30, 1e30):
            y = check(x * largest, weight, None, None)
            assert largest or not bool(y.any())
            assert torch.equal(check(x * largest, weight, None, -1.0), y)
            check(x * largest, weight, None, 0.0)
            if rows > 1:  # each row has steps of its own
                mixed = torch.cat([x[:-1] * largest, x[-1:]])
                assert torch.equal(multiply(mixed, weight)[:-1], y[:-1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "int4-g32"])
@pytest.mark.parametrize("rows", [1, 2])
def test_entries_as_large_as_float32_goes(isa, name, rows):
    weight = random_weight(70, 40, name)
    ones = torch.ones_like(weight.codes) if name == "int8" else torch.full_like(weight.codes, 0x99)
    weight = QuantizedWeight(ones, torch.full_like(weight.scales, 0.5), None, weight.format)
    x = torch.zeros(rows, 70)
    x[:, 7] = -3.4e38
    with instruction_set(isa):
        check(x, weight, None, None)
        check(x, weight, None, 0.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 7])
def test_the_largest_sums_do_not_overflow(isa, rows):
    """Codes and entries at the ends of their ranges, all of one sign, in whole chunks."""
    for name, code in (("int8", -128), ("int8", 127), ("int4-g128-zp", 0xFF), ("int4-g128", 0)):
        weight = random_weight(512, 130, name)
        weight = QuantizedWeight(torch.full_like(weight.codes, code), weight.scales, weight.minimum, weight.format)
        for sign in (1.0, -1.0):
            with instruction_set(isa):
                check(torch.full((rows, 512), sign), weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FORMATS)
def test_an_outlier_costs_its_own_chunk_only(isa, name):
    weight = random_weight(1024, 50, name)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(3))
    x[0, 500] = 1e6
    lean = QuantizedWeight(weight.codes.clone(), weight.scales, weight.minimum, weight.format)
    with instruction_set(isa):
        for threshold in (None, 0.5):
            check(x, weight, None, threshold)
            check(x[:1], lean, None, threshold)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int4", "int4-g32"])
@pytest.mark.parametrize("rows", [1, 2, 5, 16])
def test_rounding_beside_4_bits_costs_little_whatever_the_values(isa, name, rows):
    weight = random_weight(2048, 96, name)
    exact_weight = sum(parts_of(weight))
    torch.manual_seed(rows)
    heavy = torch.distributions.StudentT(2.0).sample((rows, 2048))
    rare = 0.1 * torch.randn(rows, 2048)
    rare[:, 7::32] = 1 + torch.rand(rows, 64)
    with instruction_set(isa):
        for x in (heavy, rare, torch.randn(rows, 2048)):
            exact = x.double() @ exact_weight
            errors = (multiply(x, weight) - exact).norm(dim=-1) / exact.norm(dim=-1)
            assert float(errors.max()) < 0.0115  # 3.2 / 127 over the root of 12 is 0.0073; few entries make a sum here
            assert float(errors.mean()) < 0.0083


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "int4-g32-zp"])
@pytest.mark.parametrize("rows", [1, 3])
def test_codes_of_skipped_inputs_count_for_nothing(isa, name, rows):
    weight = random_weight(64, 48, name)
    x = random_operands(rows, 64, 48, torch.float32)[0]
    x[:, ::2] = 0.1
    other = QuantizedWeight(weight.codes.clone(), weight.scales, weight.minimum, weight.format)
    other.codes[::2] = 77
    with instruction_set(isa):
        assert torch.equal(multiply(x, weight, None, 0.2), multiply(x, other, None, 0.2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "int4-g32"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_same_bits_on_every_run(isa, name, count, rows):
    weight = random_weight(1100, 900, name)
    x, bias, _, _ = random_operands(rows, 1100, 900, torch.float32)
    with instruction_set(isa), threads(count):
        results = [multiply(x, weight, bias, 0.6) for _ in range(5)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_row_of_a_batch_is_its_own_product(dtype, name):
    weight = random_weight(300, 70, name)
    x, bias, _, _ = random_operands(7, 300, 70, dtype)
    batch = multiply(x, weight, bias, 0.4).double()
    single = torch.cat([check(row[None], weight, bias, 0.4) for row in x]).double()
    steps = sum(0.5 / rounding_of(rows, weight.format.bits)[1] for rows in (1, 7))
    step = x.double().abs().amax(1, keepdim=True) * steps
    product, low = parts_of(weight)
    bound = step * (product.abs() + low.abs()).sum(0) + 2 * torch.finfo(dtype).eps * single.abs() + 1e-4
    assert bool(((batch - single).abs() <= bound).all())


def test_rows_beyond_the_limit_are_dense_and_not_counted():
    weight = random_weight(40, 30, "int8")
    x, bias, _, center = random_operands(5, 40, 30, torch.float32, centered=True)
    counts = torch.zeros(3, dtype=torch.int64)
    dense = multiply(x, weight, bias)
    assert torch.equal(multiply(x, weight, bias, 100.0, None, center, False, 4, counts), dense)
    assert counts.tolist() == [0, 0, 0]
    assert torch.equal(multiply(x[:1], weight, bias, 100.0, None, None, False, 4, counts)[0], bias)
    assert counts.tolist() == [40, 40, 0]


@pytest.mark.parametrize("rows", [1, 3])
def test_without_a_threshold_center_and_scale_mean_nothing(rows):
    weight = random_weight(40, 30, "int8")
    x, bias, scale, center = random_operands(rows, 40, 30, torch.float32, weighted=True, centered=True)
    dense = multiply(x, weight, bias)
    assert torch.equal(multiply(x, weight, bias, None, scale, center), dense)
    arguments = (
        x,
        weight.codes,
        weight.scales,
        None,
        bias,
        0,
        None,
        scale,
        center,
        center.new_ones(30),
        True,
        ALL,
        None,
    )
    torch.testing.assert_close(linear.quantized_linear_reference(*arguments), dense, rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(2, 0), (0, 8), (3, 8), (1, 8), (2, 3, 8), (8,)])
@pytest.mark.parametrize("outputs", [0, 4])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_empty_and_other_shapes(shape, outputs, threshold):
    weight = random_weight(shape[-1], outputs, "int8")
    x, bias = torch.randn(shape), torch.randn(outputs)
    y = multiply(x, weight, bias, threshold)
    assert y.shape == (*shape[:-1], outputs)
    if shape[-1] == 0:
        assert torch.equal(y, bias.expand_as(y))


def test_non_contiguous_x():
    weight = random_weight(30, 20, "int4-g32")
    x, bias, _, _ = random_operands(24, 30, 20, torch.float32)
    for strided in (x.t().contiguous().t(), x[::4], x.view(2, 3, 4, 30).transpose(0, 2), x[:, :1].expand(24, 30)):
        for threshold in (None, 0.5):
            assert torch.equal(
                multiply(strided, weight, bias, threshold), check(strided.contiguous(), weight, bias, threshold)
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 20])
def test_other_dtypes_take_float32_or_torch(dtype, name, rows):
    weight = random_weight(50, 30, name)
    x, bias, scale, center = random_operands(rows, 50, 30, dtype, weighted=True, centered=True)
    counts = torch.zeros(3, dtype=torch.int64)
    y = multiply(x, weight, bias, 0.9, scale, center, counts=counts)
    keep = keep_mask(x, 0.9, scale, center)
    filled = fill(x, keep, center)
    if dtype is torch.float16 and kernels.library is not None:  # by the kernels, in float32
        rounded = multiply(filled.float(), weight, bias.float(), None).half()
        assert torch.equal(y, rounded)
    else:
        assert torch.equal(y, products.linear(filled, weight.dequantize(dtype), bias))
    assert counts.tolist() == [int((~keep).sum()), keep.numel(), 0]


def test_thresholds_scales_and_biases_of_other_dtypes_mean_the_same():
    weight = random_weight(30, 20, "int8-g32")
    x, bias, scale, _ = random_operands(2, 30, 20, torch.float32, weighted=True)
    expected = multiply(x, weight, bias, 1.0, scale)
    actual = multiply(x, weight, bias.double(), torch.tensor([1.0], dtype=torch.float64), scale.double())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 20])
@pytest.mark.parametrize("name", ["int8", "int4-g32-zp"])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(dtype, rows, name, full):
    weight = random_weight(40, 24, name)
    x, bias, scale, center = random_operands(rows, 40, 24, dtype, bias=full, weighted=full, centered=full)
    size = weight.format.group_size or 0
    if full:
        counts, offset = torch.zeros(3, dtype=torch.int64), weight.dequantize() @ center
        rest = (torch.tensor(0.5), scale, center, offset, True, 8, counts)
    else:
        rest = (None, None, None, None, False, 8, None)
    torch.library.opcheck(linear.quantized_linear, (x, weight.codes, weight.scales, weight.minimum, bias, size, *rest))


@pytest.mark.parametrize("rows", [1, 20])
def test_compiles_as_one_graph(rows):
    weight = random_weight(40, 24, "int4-g32-zp")
    x, bias, scale, center = random_operands(rows, 40, 24, torch.float32, weighted=True, centered=True)
    offset, threshold = weight.dequantize() @ center, torch.tensor(0.5)

    def layer(x, counts):
        rest = (threshold, scale, center, offset, False, 8, counts)
        y = linear.quantized_linear(2 * x, weight.codes, weight.scales, weight.minimum, bias, 32, *rest)
        return y.relu() + 1

    counts, expected_counts = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, counts)
    torch.testing.assert_close(y, layer(x, expected_counts))
    assert torch.equal(counts, expected_counts)
    assert bool(counts.any()) == (rows <= 8)


def test_operands_that_do_not_fit_raise():
    x = torch.randn(1, 64)
    weight = random_weight(64, 40, "int4-g32-zp")
    fitting = {"x": x, "codes": weight.codes, "scales": weight.scales, "minimum": weight.minimum, "bias": None}
    fitting |= {"group_size": 32, "threshold": torch.tensor(0.1), "scale": None, "center": None, "offset": None}
    fitting |= {"relative": False, "sparse_rows": 4, "counts": None}
    linear.quantized_linear(**fitting)
    int8 = random_weight(64, 40, "int8")
    kernel_only = [
        {"codes": weight.codes.to(torch.int16)},
        {"codes": weight.codes[:, :-1].contiguous()},
        {"codes": F.pad(weight.codes, (0, 16))},
        {"codes": weight.codes.t().contiguous().t()},
        {"codes": int8.codes},  # with a minimum
        {"scales": weight.scales.float()},
        {"scales": weight.scales[:1]},
        {"scales": weight.scales.t().contiguous().t()},
        {"minimum": weight.minimum.float()},
        {"minimum": weight.minimum[:1]},
        {"minimum": weight.minimum.t().contiguous().t()},
        {"group_size": 16},
        {"group_size": 64},
        {"group_size": -32},
        {"group_size": 0},
        {"group_size": 0, "scales": weight.scales[:1].float()},  # with a minimum
    ]
    for changes in [{"x": x[:, :63]}, {"x": torch.randn(1, 65)}, *(kernel_only if kernels.library else [])]:
        with pytest.raises(RuntimeError, match="do not fit together" if kernels.library else None):
            linear.quantized_linear(**(fitting | changes))
    for changes in [
        {"threshold": torch.zeros(3)},
        {"counts": torch.zeros(2, dtype=torch.int64)},
        {"counts": torch.zeros(3)},
        {"scale": torch.ones(3)},
        {"center": torch.ones(3), "offset": torch.ones(40)},
        {"bias": torch.ones(39)},
        {"bias": torch.ones(39), "x": torch.randn(20, 64)},
        {"bias": torch.ones(39), "threshold": None},
    ]:
        with pytest.raises(RuntimeError):
            linear.quantized_linear(**(fitting | changes))


# ------------------------------------------------------------------------------------------------- the C interface


ARGUMENTS = (
    *("dtype", "x", "rows", "x_stride", "inputs", "bits", "codes", "scales", "minimum", "group_size", "outputs"),
    *("bias", "threshold", "scale", "center", "offset", "relative", "y", "threads", "counts"),
)


class Call:
    """The arguments of deadband_quantized_linear, by name; tensors stay alive as long as this does."""

    def __init__(self, rows, inputs, outputs, name, place=lambda tensor: tensor, dtype=torch.float32):
        weight = random_weight(inputs, outputs, name)
        x, bias, scale, center = random_operands(rows, inputs, outputs, dtype, weighted=True, centered=True)
        self.weight, self.center = weight, center
        self.arguments = {
            "dtype": kernels.DTYPES[dtype],
            "x": place(x),
            "rows": rows,
            "x_stride": inputs,
            "inputs": inputs,
            "bits": weight.format.bits,
            "codes": place(weight.codes),
            "scales": place(weight.scales),
            "minimum": None if weight.minimum is None else place(weight.minimum),
            "group_size": weight.format.group_size or 0,
            "outputs": outputs,
            "bias": place(bias),
            "threshold": place(torch.tensor([0.5])),
            "scale": place(scale),
            "center": place(center),
            "offset": place((center.double() @ sum(parts_of(weight))).float()),
            "relative": 0,
            "y": place(torch.full((rows, outputs), 123.0, dtype=dtype)),
            "threads": 1,
            "counts": place(torch.zeros(3, dtype=torch.int64)),
        }

    def __call__(self, **changes):
        values = [(self.arguments | changes)[name] for name in ARGUMENTS]
        return kernels.library.deadband_quantized_linear(
            *(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values)
        )


@compiled
def test_bad_arguments_are_refused_and_nothing_is_written():
    call = Call(2, 64, 40, "int4-g32-zp")
    bad_dtype, bad_size, bad_pointer = -1, -2, -3
    refused = [
        ({"dtype": 2}, bad_dtype),
        ({"dtype": -1}, bad_dtype),
        ({"bits": 5}, bad_dtype),
        ({"bits": 0}, bad_dtype),
        ({"rows": -1}, bad_size),
        ({"inputs": -1}, bad_size),
        ({"outputs": -1}, bad_size),
        ({"inputs": 1 << 40, "x_stride": 1 << 41}, bad_size),
        ({"outputs": (1 << 63) - 1}, bad_size),
        ({"rows": 1 << 40}, bad_size),
        ({"x_stride": 63}, bad_size),
        ({"group_size": -1}, bad_size),
        ({"rows": 9}, bad_size),
        ({"x": None}, bad_pointer),
        ({"codes": None}, bad_pointer),
        ({"scales": None}, bad_pointer),
        ({"y": None}, bad_pointer),
        ({"center": None}, bad_pointer),
        ({"offset": None}, bad_pointer),
        ({"group_size": 0}, bad_pointer),  # a minimum without groups
        ({"bits": 8}, bad_pointer),  # and with 8 bits
    ]
    for changes, error in refused:
        assert call(**changes) == error, changes
    assert bool((call.arguments["y"] == 123).all())
    assert not call.arguments["counts"].any()
    for changes in ({"rows": 0}, {"outputs": 0}, {"rows": 0, "x": None, "codes": None, "y": None}):
        assert call(**changes) == 0, changes
    assert bool((call.arguments["y"] == 123).all())
    assert call() == 0
    assert not bool((call.arguments["y"] == 123).any())
    assert call.arguments["counts"][1] == 128


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["int8", "int4-g32-zp"])
def test_strides_groups_of_any_size_and_counts_without_a_threshold(isa, name):
    call = Call(2, 70, 40, name)
    expected = torch.empty(2, 40)
    with instruction_set(isa):
        assert call(y=expected) == 0
        wide = torch.cat([call.arguments["x"], torch.full((2, 9), math.nan)], 1)
        assert call(x=wide, x_stride=79) == 0
        assert torch.equal(call.arguments["y"], expected)
        dense, with_center = torch.empty(2, 40), torch.empty(2, 40)
        assert call(y=dense, threshold=None, scale=None, center=None, offset=None, counts=None) == 0
        assert call(y=with_center, threshold=None) == 0
        assert torch.equal(dense, with_center)
        if name == "int8":
            return
        for size in (1, 7, 70, 100, (1 << 63) - 1):
            groups = min(-(-70 // size), 70)
            generator = torch.Generator().manual_seed(size % 1000)
            scales, minimum = torch.randn(2, groups, 40, generator=generator).half()
            assert call(group_size=size, scales=scales, minimum=minimum, center=None, offset=None, threshold=None) == 0
            dequantised = linear.dequantize(call.weight.codes, scales, minimum, min(size, 70), torch.float64)
            x = call.arguments["x"].double()
            exact = x @ dequantised.t() + call.arguments["bias"].double()
            step = x.abs().max() / rounding_of(2, 4)[1]  # of the integers that entries of x become, at most
            error = (call.arguments["y"].double() - exact).abs()
            assert bool((error <= step / 2 * dequantised.abs().sum(1) + 1e-6 * exact.abs()).all())


def run_all(calls):
    for call in calls:
        if call() or call(threshold=None, y=call.dense, counts=None):
            raise SystemExit(1)


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_no_memory_beyond_the_operands_is_touched(isa):
    names = ["int8", "int8-g32", "int4-g32", "int4-g32-zp"]
    kinds = list(itertools.product((1, 3), (1, 70), (1, 33, 63, 130), names, DTYPES))
    calls = [Call(*shape, place=before_a_wall, dtype=dtype) for *shape, dtype in kinds]
    expected = [Call(*shape, dtype=dtype) for *shape, dtype in kinds]
    for call, other in zip(calls, expected, strict=True):
        other.dense = torch.zeros_like(other.arguments["y"])
        call.dense = before_a_wall(other.dense)
    with instruction_set(isa):
        child = multiprocessing.get_context("fork").Process(target=run_all, args=(calls,))
        child.start()
        child.join()
        assert child.exitcode == 0
        run_all(expected)
    for call, other in zip(calls, expected, strict=True):
        assert torch.equal(call.arguments["y"], other.arguments["y"])
        assert torch.equal(call.dense, other.dense)
        assert torch.equal(call.arguments["counts"], other.arguments["counts"])


@pytest.mark.parametrize("name", ["int8", "int4-g32-zp"])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_exact_products_leave_x_as_it_is(name, threshold):
    weight = random_weight(300, 70, name)
    x, bias, _, _ = random_operands(2, 300, 70, torch.float32)
    kept = x if threshold is None else torch.where(x.abs() <= threshold, 0, x)
    expected = F.linear(kept, weight.dequantize(), bias)
    with pytest.raises(KeyError), cpu.exact_products():
        assert torch.equal(multiply(x, weight, bias, threshold), expected)
        raise KeyError
    if kernels.library is not None:
        assert not torch.equal(multiply(x, weight, bias, threshold), expected)  # as before
