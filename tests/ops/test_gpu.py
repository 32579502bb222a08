"""The kernels for GPUs against float64: in Triton's interpreter where there is no GPU, which shows logic and indexing.

`pytest -m gpu` runs the same on a GPU, and what only a GPU can show.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import allowed_error, error_against_float64, random_operands, random_weight
from torch.nn import functional as F

from deadband.ops import fused, linear
from deadband.ops.cpu import SPARSE_ROWS
from deadband.ops.gpu import operators as gpu
from deadband.ops.gpu.tiles import DEFAULTS, SEVERAL_ROWS, Tile, table, tile_for
from deadband.ops.skipping import fill, keep_mask
from deadband.quantization import FORMATS

pytest.importorskip("triton", reason="triton is not installed")
from deadband.ops.gpu import launch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 3, 31, 64, 100, 257]
SMALL = Tile(outputs=32, step=4, unroll=2, chunk=128, programs=2)  # many tiles and splits of small layers
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
DEVICES = [pytest.param("interpreted", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
few = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cuda":
        return torch.device("cuda")
    monkeypatch.setattr(gpu, "usable", lambda device: True)
    return torch.device("cpu")


def cut(monkeypatch, **settings):
    tile = dataclasses.replace(SMALL, **settings)
    monkeypatch.setattr(launch, "_tile", lambda layers, rows, in_features: tile)


def on(device, *tensors):
    return [None if each is None else each.to(device) for each in tensors]


def near_no_threshold(x, threshold, scale, center, relative):
    """x without what another order of summing a norm could decide about."""
    if not relative or not x.numel():
        return x
    magnitude = (x.float() if center is None else x.float() - center).abs()
    ratio = (magnitude if scale is None else magnitude * scale) / x.float().norm(dim=-1, keepdim=True) / threshold
    return torch.where((ratio - 1).abs() < 1e-4, 3 * x, x)


@few
@given(
    rows=st.integers(1, 8),
    inputs=st.sampled_from([*WIDTHS, 300]),
    outputs=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    weighted=st.booleans(),
    centered=st.booleans(),
    relative=st.booleans(),
    compact=st.booleans(),
    threshold=st.sampled_from([-1.0, 0.0, 0.7, 100.0]),
    seed=st.integers(0, 2**30),
)
@pytest.mark.parametrize("padded", [0, 5])
def test_values_match_float64(
    device, monkeypatch, rows, inputs, outputs, dtype, bias, weighted, centered, relative, compact, threshold, seed,
    padded,
):  # fmt: skip
    cut(monkeypatch, compact=compact)
    x, own_bias, scale, center = random_operands(
        rows, inputs, outputs, dtype, bias=bias, weighted=weighted, centered=centered, seed=seed
    )
    if relative and threshold > 0:
        threshold *= inputs**-0.5
        x = near_no_threshold(x, threshold, scale, center, relative)
    stored = torch.randn(inputs, outputs + padded, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = stored[:, :outputs].t()
    keep = keep_mask(x, threshold, scale, center, relative)
    offset = None if center is None else weight.float() @ center
    counts = torch.tensor([3, 4, 5]).to(device)
    given = on(device, x, weight, own_bias, torch.tensor(threshold), scale, center, offset)
    operator = linear.sparse_linear if device.type == "cuda" else gpu.sparse_linear
    y = operator(*given, relative, SPARSE_ROWS, counts).cpu()
    masked = fill(x, keep, center)
    assert y.shape == (rows, outputs)
    assert y.dtype is dtype
    assert error_against_float64(y, masked, weight, own_bias) <= allowed_error(masked, weight, own_bias)
    assert counts.tolist() == [3 + int((~keep).sum()), 4 + x.numel(), 5]


@few
@given(
    rows=st.integers(1, 8),
    inputs=st.sampled_from([1, 31, 64, 100, 300]),
    outputs=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    centered=st.booleans(),
    compact=st.booleans(),
    threshold=st.sampled_from([None, 0.0, 0.7, 100.0]),
    seed=st.integers(0, 2**30),
)
@pytest.mark.parametrize("format", FORMATS)
def test_codes_match_float64(
    device, monkeypatch, rows, inputs, outputs, dtype, bias, centered, compact, threshold, seed, format
):
    cut(monkeypatch, compact=compact)
    weight = random_weight(inputs, outputs, format, seed)
    x, own_bias, _, center = random_operands(rows, inputs, outputs, dtype, bias=bias, centered=centered, seed=seed)
    matrix = weight.dequantize(torch.float64)
    if threshold is None:
        center = None
    offset = None if center is None else (matrix @ center.double()).float()
    limit = None if threshold is None else torch.tensor(threshold)
    given = on(device, x, weight.codes, weight.scales, weight.minimum, own_bias)
    rule = on(device, limit, None, center, offset)
    operator = linear.quantized_linear if device.type == "cuda" else gpu.quantized_linear
    y = operator(*given, weight.format.group_size or 0, *rule, False, SPARSE_ROWS, None).cpu()
    masked = x if threshold is None else fill(x, keep_mask(x, threshold, None, center, False), center)
    exact = F.linear(masked.double(), matrix, None if own_bias is None else own_bias.double())
    # sums in float32 of products that are not rounded, and of the parts of a minimum and a center
    size = weight.scales.double().abs().max() * 136 + (0 if weight.minimum is None else weight.minimum.abs().max())
    magnitude = (x.double().abs().sum() + (0 if center is None else center.abs().double().sum())) * size
    error = torch.finfo(dtype).eps * exact.abs() + 8 * torch.finfo(torch.float32).eps * magnitude
    assert y.dtype is dtype
    assert bool(((y.double() - exact).abs() <= error + torch.finfo(dtype).tiny).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(9, 100, 70), (33, 64, 128), (20, 3, 1)])
def test_many_rows_are_multiplied_tile_by_tile(device, dtype, format, rows, inputs, outputs):
    if device.type == "cpu" and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter has no products of matrices in bfloat16")
    weight = random_weight(inputs, outputs, format)
    x, bias, _, _ = random_operands(rows, inputs, outputs, dtype)
    given = on(device, x, weight.codes, weight.scales, weight.minimum, bias)
    operator = linear.quantized_linear if device.type == "cuda" else gpu.quantized_linear
    y = operator(*given, weight.format.group_size or 0, None, None, None, None, False, 0, None).cpu()
    matrix = weight.dequantize(dtype)
    assert error_against_float64(y, x, matrix, bias) <= allowed_error(x, matrix, bias)


def test_many_rows_that_skip_are_filled_first(device):
    weight = random_weight(70, 40, "int4-g32-zp")
    x, bias, _, _ = random_operands(12, 70, 40, torch.float32)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    given = on(device, x, weight.codes, weight.scales, weight.minimum, bias)
    limit = torch.tensor(0.7).to(device)
    operator = linear.quantized_linear if device.type == "cuda" else gpu.quantized_linear
    y = operator(*given, 32, limit, None, None, None, False, 100, counts).cpu()
    masked, matrix = torch.where(x.abs() <= 0.7, 0, x), weight.dequantize()
    assert error_against_float64(y, masked, matrix, bias) <= allowed_error(masked, matrix, bias)
    assert counts.tolist() == [int((x.abs() <= 0.7).sum()), x.numel(), 0]


def several(inputs, outputs, dtype, formats, seed=0):
    """The parts of layers on one x, each of another format and rule, and the sizes of their groups."""
    parts, groups, relative = [], [], []
    for number, (format, width) in enumerate(zip(formats, outputs, strict=True)):
        generator = torch.Generator().manual_seed(seed + number)
        _, bias, scale, center = random_operands(
            1, inputs, width, dtype, bias=number != 1, weighted=number == 2, centered=number == 0, seed=seed + number
        )
        if format is None:
            matrix = (torch.randn(inputs, width, generator=generator) * inputs**-0.5).to(dtype).t()
            stored = (matrix, None, None)
            groups.append(0)
        else:
            quantised = random_weight(inputs, width, format, seed + number)
            low = None if quantised.minimum is None else quantised.minimum / 8
            quantised = dataclasses.replace(quantised, scales=quantised.scales / 8, minimum=low)
            matrix = quantised.dequantize(torch.float32)
            stored = (quantised.codes, quantised.scales, quantised.minimum)
            groups.append(quantised.format.group_size or 0)
        offset = None if center is None else matrix.float() @ center
        parts += [*stored, bias, torch.tensor(0.4 + 0.1 * number), scale, center, offset]
        relative.append(False)
    return parts, groups, relative


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "formats", [(None, None, None), ("int8", "int4-g32", None), ("int4-g64-zp", "int4-g64-zp", "int4-g64-zp")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_layers_in_one_launch(device, monkeypatch, rows, compact, formats, dtype):
    cut(monkeypatch, compact=compact)
    parts, groups, relative = several(200, (70, 32, 33), dtype, formats)
    x = torch.randn(2, rows, 200).to(dtype)[:1]  # [1, rows, in]
    counts = [torch.zeros(3, dtype=torch.int64, device=device) for _ in groups]
    expected_counts = [torch.zeros(3, dtype=torch.int64) for _ in groups]
    expected = torch.cat([in_torch(x, parts, groups, relative, expected_counts, layer) for layer in range(3)], -1)
    operator = fused.linears if device.type == "cuda" else gpu.linears
    y = operator(x.to(device), on(device, *parts), groups, relative, 8, counts).cpu()
    assert y.shape == (1, rows, 135)
    tolerance = max(3 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert [each.tolist() for each in counts] == [each.tolist() for each in expected_counts]


def in_torch(x, parts, groups, relative, counts, layer):
    """A layer of `several`, without the CPU's kernels, which round x beside codes."""
    weight, scales, minimum, bias, *rule = parts[8 * layer : 8 * layer + 8]
    rest = (*rule, relative[layer], 8, counts[layer])
    if scales is None:
        return linear.sparse_linear_reference(x, weight, bias, *rest)
    return linear.quantized_linear_reference(x, weight, scales, minimum, bias, groups[layer], *rest)


@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("formats", [(None, None, None), ("int4-g32", "int8-g64", None)])
def test_a_gated_mlp(device, monkeypatch, activation, rows, compact, formats):
    cut(monkeypatch, compact=compact)
    dtype = torch.float32
    parts, groups, relative = several(150, (100, 100), dtype, formats[:2])
    down, group, last = several(100, (40,), dtype, formats[2:], seed=7)
    down[4] = torch.tensor(0.01)
    parts, groups, relative = parts + down, groups + group, relative + last
    x = torch.randn(rows, 150)
    x = x / 10
    parts[4] = parts[12] = torch.tensor(0.03)
    counts = [torch.zeros(3, dtype=torch.int64, device=device) for _ in groups]
    expected_counts = [torch.zeros(3, dtype=torch.int64) for _ in groups]
    gate, up = (in_torch(x, parts, groups, relative, expected_counts, layer) for layer in (0, 1))
    product = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    expected = in_torch(product, parts, groups, relative, expected_counts, 2)
    operator = fused.gated_mlp if device.type == "cuda" else gpu.gated_mlp
    y = operator(x.to(device), on(device, *parts), groups, relative, 8, counts, activation).cpu()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert [each.tolist() for each in counts] == [each.tolist() for each in expected_counts]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_nan_and_infinity_surface(device, monkeypatch, value, compact, relative):
    cut(monkeypatch, compact=compact)
    x = torch.randn(3, 70)
    x[0, 33] = value
    weight = torch.randn(70, 40).t()
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    given = on(device, x, weight, None, torch.tensor(0.05), None, None, None)
    operator = linear.sparse_linear if device.type == "cuda" else gpu.sparse_linear
    y = operator(*given, relative, 4, counts).cpu()
    expected_counts = torch.zeros(3, dtype=torch.int64)
    expected = linear.sparse_linear_reference(
        x, weight, None, torch.tensor(0.05), None, None, None, relative, 4, expected_counts
    )
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == expected_counts.tolist()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("format", [None, "int8", "int4-g32-zp"])
def test_weights_of_skipped_inputs_are_never_met(device, monkeypatch, compact, format):
    cut(monkeypatch, compact=compact)
    x = torch.randn(2, 96) + 3
    x[:, ::3] = 0.1
    if format is None:
        clean = (torch.randn(96, 40).t(), None, None)
        poisoned = (torch.where(x[0] == x.new_tensor(0.1), math.nan, clean[0]).t().contiguous().t(), None, None)
    else:
        weight = random_weight(96, 40, format)
        other = weight.codes.clone()
        other[::3] = ~other[::3]
        clean, poisoned = ((codes, weight.scales, weight.minimum) for codes in (weight.codes, other))
    group = 32 if format == "int4-g32-zp" else 0
    rule = (None, torch.tensor(0.2), None, None, None)
    first, second = (
        launch.linears(x.to(device), on(device, *stored, *rule), (group,), (False,), []) for stored in (clean, poisoned)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("compact", [False, True])
def test_an_entry_at_the_threshold_is_skipped(device, monkeypatch, compact):
    cut(monkeypatch, compact=compact)
    x = torch.tensor([[0.5, -0.5, 0.50390625, -0.25, 0.0, -0.0]])
    weight = torch.eye(6).to(device)  # equal to itself transposed
    y = gpu.sparse_linear(x.to(device), weight, None, torch.tensor(0.5).to(device), None, None, None, False, 4, None)
    assert (y != 0).tolist() == [[False, False, True, False, False, False]]


@interpreted
def test_how_inputs_are_split_changes_rounding_alone_and_counters_are_zero_again(monkeypatch):
    counters = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(launch, "_counters", lambda device, count: counters)
    x, weight = torch.randn(1, 400), torch.randn(400, 40)
    seen = []
    for programs in (1, 64):
        cut(monkeypatch, programs=programs)
        for _ in range(2):
            y = launch.linears(
                x, (weight.t(), None, None, None, torch.tensor(0.3), None, None, None), (0,), (False,), []
            )
            seen.append(y)
            assert not counters.any()
        assert torch.equal(seen[-1], seen[-2])
    masked = torch.where(x.abs() <= 0.3, 0, x)
    for y in seen:
        assert error_against_float64(y, masked, weight.t(), None) <= allowed_error(masked, weight.t(), None)


def test_what_kernels_do_not_take_runs_on_torch(device, monkeypatch):
    called = []
    monkeypatch.setattr(launch, "_launch", lambda *a, **k: called.append(1))
    x, weight = torch.randn(2, 20), torch.randn(30, 20)  # as torch lays it out
    rule = (torch.tensor(0.5), None, None, None, False)
    operator = linear.sparse_linear if device.type == "cuda" else gpu.sparse_linear
    expected = F.linear(torch.where(x.abs() <= 0.5, 0, x), weight)
    torch.testing.assert_close(
        operator(*on(device, x, weight, None), *on(device, *rule[:4]), False, 4, None).cpu(), expected
    )
    wide = operator(*on(device, x.double(), weight.double().t().contiguous().t(), None, *rule[:4]), False, 4, None)
    torch.testing.assert_close(wide.cpu().float(), expected)
    many = torch.randn(9, 20)
    dense = operator(*on(device, many, weight.t().contiguous().t(), None, *rule[:4]), False, 4, None)
    torch.testing.assert_close(dense.cpu(), F.linear(many, weight))
    assert not called


@interpreted
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({0: torch.randn(21, 30).t()}, "columns"),
        ({3: torch.randn(29)}, "bias"),
        ({3: torch.randn(30).half()}, "dtype of the bias"),
        ({4: torch.zeros(2)}, "threshold"),
        ({4: torch.zeros((), dtype=torch.float64)}, "dtype of the threshold"),
        ({5: torch.randn(40)[::2]}, "stride of the scale"),
        ({6: torch.randn(20)}, "a center without its offset"),
        ({6: torch.randn(19), 7: torch.randn(30)}, "center"),
    ],
)
def test_shapes_and_strides_that_are_no_layer(wrong, what):
    parts = [torch.randn(20, 30).t(), None, None, None, torch.tensor(0.5), None, None, None]
    assert launch.linears(torch.randn(1, 20), parts, (0,), (False,), []) is not None
    for place, tensor in wrong.items():
        parts[place] = tensor
    assert launch.linears(torch.randn(1, 20), parts, (0,), (False,), []) is None, what


@interpreted
def test_codes_that_do_not_fit():
    weight = random_weight(64, 40, "int4-g32-zp")
    good = [weight.codes, weight.scales, weight.minimum, None, None, None, None, None]
    x = torch.randn(1, 64)
    assert launch.linears(x, good, (32,), (False,), []) is not None
    for place, tensor in (
        (0, weight.codes[:, :-1]),
        (0, weight.codes[:-1]),
        (0, weight.codes.int()),
        (1, weight.scales.float()),
        (1, weight.scales[:1]),
        (2, weight.minimum[:, 1:]),
        (2, weight.minimum.t().contiguous().t()),
    ):
        bad = list(good)
        bad[place] = tensor
        assert launch.linears(x, bad, (32,), (False,), []) is None
    assert launch.linears(x, good, (64,), (False,), []) is None
    assert launch.linears(x, good, (48,), (False,), []) is None


@interpreted
@pytest.mark.parametrize("compact", [False, True])
def test_weights_of_more_than_two_to_the_31_entries(monkeypatch, compact):
    cut(monkeypatch, compact=compact)
    inputs, outputs, stride = 20, 40, 1 << 27  # rows so far apart that a number of 32 bits cannot tell the last
    memory = torch.empty(inputs * stride, dtype=torch.float16)  # 5 GB of which the system gives what is written
    weight = memory.view(inputs, stride)[:, :outputs]
    weight.copy_(torch.randn(inputs, outputs))
    x = torch.randn(1, inputs).half()
    y = launch.linears(x, (weight.t(), None, None, None, torch.tensor(0.2), None, None, None), (0,), (False,), [])
    kept = torch.where(x.abs().float() > 0.2, x, 0)
    small = weight.clone().t()
    assert error_against_float64(y, kept, small, None) <= allowed_error(kept, small, None)


def test_empty_inputs(device):
    operator = linear.sparse_linear if device.type == "cuda" else gpu.sparse_linear
    rule = on(device, torch.tensor(0.5), None, None, None)
    y = operator(*on(device, torch.ones(0, 20), torch.ones(20, 30).t(), None), *rule, False, 4, None)
    assert y.shape == (0, 30)
    y = operator(*on(device, torch.ones(2, 0), torch.ones(0, 30).t(), torch.ones(30)), *rule, False, 4, None)
    assert torch.equal(y.cpu(), torch.ones(2, 30))


def test_tiles_are_chosen_by_the_nearest_measured_shape(monkeypatch):
    measured = [
        {"bits": 4, "rows": 1, "inputs": 4096, "outputs": 4096, "tile": dataclasses.asdict(Tile(outputs=64))},
        {"bits": 4, "rows": 1, "inputs": 4096, "outputs": 28672, "tile": dataclasses.asdict(Tile(outputs=512))},
    ]
    monkeypatch.setattr("deadband.ops.gpu.tiles.table", lambda: {"sm_1": measured})
    tile_for.cache_clear()
    assert tile_for("sm_1", 4, 1, 4000, 6000).outputs == 64
    assert tile_for("sm_1", 4, 2, 5000, 20000).outputs == 512
    assert tile_for("sm_1", 8, 1, 4000, 6000) == tile_for("sm_2", 8, 1, 4000, 6000) == DEFAULTS[8]
    tile_for.cache_clear()


def test_every_tile_of_the_table_is_one_the_kernels_take():
    entries = [each for entries in table().values() for each in entries]
    for tile in (*DEFAULTS.values(), *SEVERAL_ROWS.values(), *(Tile(**each["tile"]) for each in entries)):
        for size in (tile.outputs, tile.step, tile.unroll, tile.chunk, tile.warps):
            assert size > 0
            assert size & (size - 1) == 0
        assert tile.outputs >= 32
        assert tile.chunk >= 128
        assert tile.step <= 32


@pytest.mark.parametrize(("in_features", "tiles", "processors"), [(1, 1, 1), (4096, 32, 132), (28672, 9999, 132)])
def test_splits_cover_all_inputs(in_features, tiles, processors):
    tile = Tile(chunk=256, programs=4)
    chunks = tile.chunks(in_features, tiles, processors)
    splits = -(-in_features // (tile.chunk * chunks))
    assert splits * chunks * tile.chunk >= in_features > (splits - 1) * chunks * tile.chunk
    assert tiles * splits >= min(tile.programs * processors, tiles) or chunks == 1


def test_a_gpu_on_which_the_kernels_are_wrong_runs_on_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    device = torch.device("cuda", 7)
    monkeypatch.setattr(gpu, "_usable", {})
    monkeypatch.setattr(gpu, "_largest_error", lambda device: 0.3)
    with pytest.warns(gpu.GpuWarning, match=r"off by 0\.3 of the largest output on some GPU"):
        assert not gpu.usable(device)
    assert not gpu.usable(device)  # told once
    monkeypatch.setattr(gpu, "_usable", {})
    monkeypatch.setattr(gpu, "_largest_error", lambda device: 1 / 0)
    with pytest.warns(gpu.GpuWarning, match=r"do not compile \(ZeroDivisionError"):
        assert not gpu.usable(device)
    monkeypatch.setattr(gpu, "_usable", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not gpu.usable(device)
    assert gpu._usable == {}  # tried later


@interpreted
def test_what_kernels_are_compared_with_runs_on_torch(monkeypatch):
    """Where the operators are ours, as on a GPU: the comparison must not ask for itself."""
    calls, compare = [], gpu._largest_error
    monkeypatch.setattr(gpu, "_usable", {})
    monkeypatch.setattr(gpu, "_largest_error", lambda device: calls.append(device) or compare(device))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(fused, "sparse_linear", gpu.sparse_linear)
    monkeypatch.setattr(fused, "quantized_linear", gpu.quantized_linear)
    assert gpu.usable(torch.device("cpu"))
    assert len(calls) == 1


@interpreted
def test_a_kernel_that_does_not_fit_leaves_everything_to_torch(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def launched(*args, **kwargs):
        raise OutOfResources(2, 1, "shared memory")

    monkeypatch.setattr(gpu, "_usable", {None: True})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(launch, "_launch", launched)
    x, weight = torch.randn(1, 20), torch.randn(20, 30).t()
    rule = (torch.tensor(0.5), None, None, None, False, 4, None)
    with pytest.warns(gpu.GpuWarning, match="do not fit"):
        y = gpu.sparse_linear(x, weight, None, *rule)
    torch.testing.assert_close(y, F.linear(torch.where(x.abs() <= 0.5, 0, x), weight))
    assert not gpu.usable(torch.device("cpu"))


@interpreted
@pytest.mark.parametrize("format", [None, "int4-g32"])
def test_without_an_order_of_memory_nothing_is_shared(monkeypatch, format):
    """As on AMD: one split, no lists, and gate and up are layers like others."""
    cut(monkeypatch, compact=True, programs=64)
    grids, own = [], launch._launch
    monkeypatch.setattr(launch, "ORDERED", False)
    monkeypatch.setattr(launch, "_counters", lambda device, count: torch.full((1,), 99, dtype=torch.int32))
    monkeypatch.setattr(launch, "_launch", lambda *args, **what: grids.append(args) or own(*args, **what))
    parts, groups, relative = several(300, (40, 40), torch.float32, (format, format))
    down, group, last = several(40, (30,), torch.float32, (format,))
    x = torch.randn(2, 300)
    expected = torch.cat([in_torch(x, parts, groups, relative, [None] * 2, layer) for layer in range(2)], -1)
    y = launch.linears(x, parts, groups, relative, [])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert launch.gated_mlp(x, parts + down, groups + group, relative + last, [], "silu") is None
    assert len(grids) == 1


def test_the_comparison_on_a_new_gpu_passes_where_kernels_are_right(device):
    assert gpu._largest_error(device) < 1e-2
