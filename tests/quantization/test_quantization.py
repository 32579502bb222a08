"""Formats, packing and rounding of weights, against float64 and against plain rounding."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import tiny_batches, tiny_model
from hypothesis import given, settings
from torch import nn

import deadband
from deadband.calibration.calibration import second_moments_of
from deadband.layers.experts import module_at
from deadband.layers.formats import FORMATS, QuantizedWeight, WeightFormat, pack, unpack
from deadband.layers.rounding import quantize
from deadband.quantization.hessians import input_hessians

INT4 = [name for name in FORMATS if name.startswith("int4")]


def random_weight(out: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, size, generator=generator) * 0.02
    return weight * (1 + 3 * torch.rand(out, size, generator=generator) ** 8)  # with some outliers


def moments(size: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) ** 4 + 0.01


def group_errors(weight: torch.Tensor, restored: torch.Tensor, group: int, m: torch.Tensor | None = None):
    """Float64 weighted squared error of each output and group, [out, groups]."""
    error = (weight.double() - restored.double()).square() * (1.0 if m is None else m.double())
    padded = torch.nn.functional.pad(error, (0, -weight.shape[1] % group))
    return padded.view(weight.shape[0], -1, group).sum(-1)


def absmax_rounding(weight: torch.Tensor, format: WeightFormat, divisor: int) -> torch.Tensor:
    """Plain round-to-nearest, written once more with numpy: [out, in]."""
    rows = weight.double().numpy()
    restored = np.empty_like(rows)
    size = format.group_size or rows.shape[1]
    for start in range(0, rows.shape[1], size):
        part = rows[:, start : start + size]
        if format.zero_point:
            low = part.min(1, keepdims=True).astype(np.float16).astype(float)
            scale = ((part.max(1, keepdims=True) - part.min(1, keepdims=True)) / 15).astype(np.float16).astype(float)
            codes = np.clip(np.round((part - low) / np.where(scale == 0, 1, scale)), 0, 15)
            restored[:, start : start + size] = scale * codes + low
        else:
            extreme = np.take_along_axis(part, np.abs(part).argmax(1, keepdims=True), 1)
            scale = (np.abs(extreme) / 7 if divisor == 7 else extreme / -8).astype(np.float16).astype(float)
            codes = np.clip(np.round(part / np.where(scale == 0, 1, scale)), -8, 7)
            restored[:, start : start + size] = scale * codes
    return torch.from_numpy(restored)


def by_hand(quantized: QuantizedWeight) -> torch.Tensor:
    """What the codes stand for, entry by entry in float64, from the layout as it is documented."""
    weight = torch.empty(quantized.out_features, quantized.in_features, dtype=torch.float64)
    size = quantized.format.group_size or quantized.in_features
    for i in range(quantized.in_features):
        for o in range(quantized.out_features):
            if quantized.format.bits == 8:
                code = int(quantized.codes[i, o])
            else:
                byte = int(quantized.codes[i, o // 32 * 16 + o % 16])
                code = byte >> 4 if o % 32 >= 16 else byte & 15
                code -= 0 if quantized.format.zero_point else 8
            low = 0.0 if quantized.minimum is None else float(quantized.minimum[i // size, o])
            weight[o, i] = float(quantized.scales[i // size, o]) * code + low
    return weight


@pytest.mark.parametrize("name", FORMATS)
def test_format_names_go_there_and_back(name):
    format = WeightFormat.parse(name)
    assert str(format) == name
    assert WeightFormat.parse(format) is format
    assert hash(format) == hash(WeightFormat(format.bits, format.group_size, format.zero_point))


def test_int4_is_the_default_form():
    assert WeightFormat.parse("int4") == WeightFormat(4, 64, zero_point=True)


@pytest.mark.parametrize(
    "name", ["int3", "int8-g16", "int8-zp", "int4-zp", "int4-g32-zp-zp", "", "INT8", "int8-g32-zp"]
)
def test_unknown_format_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"int8-g32.*int4-g128-zp"):
        WeightFormat.parse(name)


@pytest.mark.parametrize("fields", [(4, None), (8, 32, True), (4, 48), (2, 32), (8, None, True)])
def test_format_of_impossible_fields(fields):
    with pytest.raises(ValueError, match="int4-g64"):
        WeightFormat(*fields)


def test_bytes_per_weight_is_what_a_matrix_takes():
    for name in FORMATS:
        quantized = quantize(random_weight(64, 4096), name)
        per_channel = 4 / 4096 if quantized.format.group_size is None else 0
        assert quantized.nbytes / (64 * 4096) == pytest.approx(quantized.format.bytes_per_weight + per_channel)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**31), st.integers(0, 15))
def test_pack_and_unpack(rows, out, seed, padding):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 16, (rows, out), dtype=np.uint8))
    packed = pack(codes, padding)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-out // 32) * 16)
    assert torch.equal(unpack(packed, out), codes)
    filled = unpack(packed, packed.shape[1] * 2)
    assert bool((filled[:, out:] == padding).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("out", "size"), [(33, 70), (1, 1), (64, 128), (5, 31)])
def test_storage_means_what_is_documented(name, out, size):
    quantized = quantize(random_weight(out, size), name)
    format = WeightFormat.parse(name)
    assert quantized.codes.shape == (size, out if format.bits == 8 else -(-out // 32) * 16)
    assert quantized.scales.shape == (format.groups(size), out)
    assert quantized.scales.dtype == (torch.float32 if format.group_size is None else torch.float16)
    assert (quantized.minimum is not None) == format.zero_point
    assert quantized.dequantize().shape == (out, size)
    torch.testing.assert_close(quantized.dequantize().double(), by_hand(quantized), rtol=1e-6, atol=1e-9)
    assert torch.equal(quantized.dequantize(torch.bfloat16), quantized.dequantize().bfloat16())
    if format.bits == 4 and out % 32:
        beyond = unpack(quantized.codes, quantized.codes.shape[1] * 2)[:, out:]
        assert bool((beyond == (0 if format.zero_point else 8)).all())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name in FORMATS if name.startswith("int8")]),
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(0, 2**31),
    st.floats(-30, 10),
)
def test_int8_is_within_half_a_step(name, out, size, seed, exponent):
    weight = random_weight(out, size, seed) * 2.0**exponent
    quantized = quantize(weight, name)
    group = quantized.format.group_size or size
    step = quantized.scales.double().repeat_interleave(group, 0)[:size].T
    assert bool(((weight.double() - quantized.dequantize().double()).abs() <= step * (0.5 + 1e-4)).all())
    assert int(quantized.codes.abs().max()) <= 127


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INT4),
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(0, 2**31),
    st.booleans(),
    st.floats(-9, 5),
)
def test_no_group_of_int4_is_worse_than_plain_rounding(name, out, size, seed, weighted, exponent):
    weight = random_weight(out, size, seed) * 2.0**exponent
    m = moments(size, seed) if weighted else None
    quantized = quantize(weight, name, m)
    format = quantized.format
    errors = group_errors(weight, quantized.dequantize(), format.group_size, m)
    for divisor in (7, 8):
        plain = group_errors(weight, absmax_rounding(weight, format, divisor), format.group_size, m)
        assert bool((errors <= plain * (1 + 1e-4) + 1e-30).all())
    own = group_errors(weight, quantize(weight, name, minimise=False).dequantize(), format.group_size, m)
    assert bool((errors <= own * (1 + 1e-4) + 1e-30).all())


@pytest.mark.parametrize("name", INT4)
def test_int4_search_pays(name):
    weight, m = random_weight(128, 512), moments(512)
    group = WeightFormat.parse(name).group_size
    plain = group_errors(weight, quantize(weight, name, minimise=False).dequantize(), group, m).sum()
    searched = group_errors(weight, quantize(weight, name).dequantize(), group, m).sum()
    weighted = group_errors(weight, quantize(weight, name, m).dequantize(), group, m).sum()
    assert searched < 0.92 * plain
    assert weighted < 0.92 * searched


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-zp"])
def test_weights_on_the_grid_stay_as_they_are(name):
    for minimise in (False, True):
        first = quantize(random_weight(64, 128), name, minimise=minimise).dequantize()
        again = quantize(first, name).dequantize()
        # a minimum of float16 need not be one of the weights that came of it
        limit = 1e-3 if name.endswith("zp") else 1e-12
        assert (again - first).square().sum() <= limit * first.square().sum()


def test_one_large_weight_gets_the_code_that_only_one_sign_has():
    weight = torch.tensor([[0.7, -0.1, 0.2, 0.3], [0.1, -0.8, 0.7, 0.2]]) * 2
    weight[0, 0] = 1.6
    quantized = quantize(weight, "int4-g32", minimise=False)
    assert quantized.unpacked()[0, 0] == 0
    assert quantized.scales[0, 0] < 0 < quantized.scales[0, 1]
    torch.testing.assert_close(quantized.dequantize(), weight, rtol=1e-3, atol=1e-3)


def correlated(size: int, rank: int, rows: int = 2000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(rank, size, generator=generator)
    return torch.randn(rows, rank, generator=generator) @ mixing + 0.3 * torch.randn(rows, size, generator=generator)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [160, 77])
def test_gptq_lowers_the_error_of_the_output(name, size):
    weight, x = random_weight(48, size), correlated(size, 20)
    hessian = x.T @ x / len(x)

    def harm(quantized: QuantizedWeight) -> float:
        return float(((weight - quantized.dequantize()).double() @ x.double().T).square().sum())

    plain = harm(quantize(weight, name, hessian.diagonal()))
    assert harm(quantize(weight, name, hessian=hessian)) < 0.6 * plain
    assert harm(quantize(weight, name, hessian=hessian, minimise=False)) < plain


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g32-zp"])
def test_gptq_without_correlations_rounds_to_nearest(name):
    weight = random_weight(40, 96)
    with_hessian = quantize(weight, name, hessian=torch.eye(96))
    assert torch.equal(with_hessian.dequantize(), quantize(weight, name).dequantize())


def test_gptq_with_a_singular_hessian_and_inputs_that_are_never_used():
    weight, x = random_weight(16, 64), correlated(64, 3, rows=10)
    x[:, 5] = 0
    for hessian in (x.T @ x / 10, torch.zeros(64, 64)):
        quantized = quantize(weight, "int4-g32", hessian=hessian)
        assert bool(quantized.dequantize().isfinite().all())
        assert (quantized.dequantize() - weight).norm() < 0.3 * weight.norm()


def test_the_weight_stays_as_it_is():
    weight = random_weight(64, 32).T.contiguous().T  # the layout that is worked in
    before = weight.clone()
    quantize(weight, "int4-g32", hessian=torch.eye(32) + 0.5)
    quantize(weight, "int4-g32", minimise=False)
    assert torch.equal(weight, before)
    assert quantize(nn.Parameter(weight), "int4-g32").scales.requires_grad is False


def test_gptq_in_panels(monkeypatch):
    weight, x = random_weight(100, 64), correlated(64, 8)
    hessian = x.T @ x / len(x)
    whole = quantize(weight, "int4-g32", hessian=hessian)
    monkeypatch.setattr("deadband.layers.rounding._WHOLE_PANEL", 64 * 32)
    parts = quantize(weight, "int4-g32", hessian=hessian)
    # products of other shapes may round otherwise, which moves single codes
    assert (whole.unpacked() != parts.unpacked()).float().mean() < 0.01


@pytest.mark.parametrize("name", FORMATS)
def test_panels_do_not_show(name, monkeypatch):
    weight, m = random_weight(100, 300), moments(300)
    whole = quantize(weight, name, m)
    monkeypatch.setattr("deadband.layers.rounding._PANEL", 1)
    parts = quantize(weight, name, m)
    for field in ("codes", "scales", "minimum"):
        one, other = getattr(whole, field), getattr(parts, field)
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_twice_and_from_other_dtypes(name):
    weight = random_weight(40, 100).bfloat16()
    first = quantize(weight, name)
    for again in (quantize(weight, name), quantize(weight.float(), name), quantize(weight.double(), name)):
        assert torch.equal(first.codes, again.codes)
        assert torch.equal(first.scales, again.scales)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_broken_weights_are_refused(name, broken):
    weight = random_weight(8, 40)
    weight[3, 37] = broken
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight, name)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight, name, hessian=torch.eye(40))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-3, -1e-3, 2.5])
def test_constant_groups(name, value):
    weight = random_weight(6, 64)
    weight[2] = value
    weight[4, :32] = 0
    restored = quantize(weight, name).dequantize()
    torch.testing.assert_close(restored[2], torch.full((64,), value), rtol=1e-3, atol=1e-9)
    assert bool(restored.isfinite().all())
    zeros = quantize(torch.zeros(3, 64), name).dequantize()
    assert bool((zeros == 0).all())


@pytest.mark.parametrize("name", FORMATS)
def test_weights_whose_scale_float16_hardly_holds(name):
    format = WeightFormat.parse(name)
    bound = {8: 0.5, 4: 1.0}[format.bits]  # of a step; clipping may pay for more with 4 bits
    for exponent in (-10, -14, -18, -22, -26, -30):
        weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(3)) * 2.0**exponent
        for minimise in (False, True):
            quantized = quantize(weight, name, minimise=minimise)
            error = (quantized.dequantize() - weight).abs().max()
            step = quantized.scales.float().abs().max()
            assert bool(quantized.dequantize().isfinite().all())
            if not minimise or format.bits == 8:
                assert error <= bound * step + 2.0**-25  # a minimum is no nearer than half of float16's smallest number
    tiny = torch.full((1, 32), 1e-40)
    assert bool(quantize(tiny, name).dequantize().isfinite().all())


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "int8"])
def test_weights_too_large_for_float16(name):
    with pytest.raises(ValueError, match="too large for float16"):
        quantize(torch.full((2, 32), -1e9), name)
    assert torch.allclose(quantize(torch.full((2, 32), -1e9), "int8").dequantize(), torch.tensor(-1e9))


def test_moments_of_zero():
    weight = random_weight(8, 64)
    assert torch.equal(
        quantize(weight, "int4-g32", torch.zeros(64)).dequantize(), quantize(weight, "int4-g32").dequantize()
    )
    m = torch.zeros(64)
    m[3] = 1.0  # all of the second group is never used
    restored = quantize(weight, "int4-g32", m).dequantize()
    assert (restored[:, 32:] - weight[:, 32:]).norm() < 0.15 * weight[:, 32:].norm()


def test_bad_arguments():
    weight = random_weight(4, 8)
    with pytest.raises(ValueError, match="floats"):
        quantize(torch.zeros(4, 8, dtype=torch.int32), "int8")
    with pytest.raises(ValueError, match="floats"):
        quantize(torch.zeros(4), "int8")
    with pytest.raises(ValueError, match="floats"):
        quantize(torch.zeros(0, 4), "int8")
    with pytest.raises(ValueError, match=r"second_moments of shape \[4\]; expected \[8\]"):
        quantize(weight, "int4", torch.ones(4))
    with pytest.raises(ValueError, match="NaN"):
        quantize(weight, "int4", torch.full((8,), float("nan")))
    with pytest.raises(ValueError, match="negative"):
        quantize(weight, "int4", -torch.ones(8))
    with pytest.raises(ValueError, match=r"hessian of shape \[8\]; expected \[8, 8\]"):
        quantize(weight, "int4", hessian=torch.ones(8))


def test_a_quantized_weight_that_does_not_fit_together():
    good = quantize(random_weight(40, 64), "int4-g32-zp")
    bad = {
        "codes": (good.codes[:, :16].contiguous(), good.codes.to(torch.int8), good.codes[:, ::2], good.codes[0]),
        "scales": (good.scales[:1], good.scales.float(), good.scales[:, :8].contiguous()),
        "minimum": (None, good.minimum[:1], good.minimum.float()),
        "format": (WeightFormat(4, 64, True), WeightFormat(4, 32), WeightFormat(8, 32)),
    }
    for field, values in bad.items():
        for value in values:
            with pytest.raises(ValueError):
                dataclasses.replace(good, **{field: value})


def test_second_moments_of_a_calibration():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(50, 6)
    found = second_moments_of(deadband.calibrate(model, [x], progress=False))
    assert list(found) == ["0", "2"]
    torch.testing.assert_close(found["0"], x.square().mean(0))
    torch.testing.assert_close(found["2"], model[:2](x).square().mean(0).detach())


@pytest.mark.parametrize("memory", [2**31, 1])
def test_hessians_of_a_model(memory):
    model, batches = tiny_model("llama"), tiny_batches(3)
    batches[1]["attention_mask"] = torch.ones_like(batches[1]["input_ids"])
    batches[1]["attention_mask"][:, :5] = 0
    names = [
        f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.up_proj")
    ]
    seen = {name: [] for name in names}
    handles = [
        module_at(model, name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    found = dict(input_hessians(model, iter(batches), names, memory=memory, progress=False))
    assert sorted(found) == sorted(names)
    assert found[names[0]] is found[names[1]]
    for name in names:
        rows = torch.cat([seen[name][0].flatten(0, 1), seen[name][1][:, 5:].flatten(0, 1), seen[name][2].flatten(0, 1)])
        torch.testing.assert_close(
            found[name].double(), rows.double().T @ rows.double() / len(rows), rtol=1e-4, atol=1e-5
        )
    moments_found = second_moments_of(deadband.calibrate(model, batches, progress=False))
    torch.testing.assert_close(found[names[2]].diagonal(), moments_found[names[2]], rtol=1e-4, atol=1e-6)


def test_hessians_without_data():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match="never reached"):
        dict(input_hessians(model, [torch.ones(2, 3)], ["used", "unused"], progress=False))
    with pytest.raises(ValueError, match="at least one batch"):
        dict(input_hessians(model, [], ["used"], progress=False))


@pytest.mark.parametrize("format", ["int8", "int4-g32", "int4-g64-zp", "int4-g128-zp"])
@pytest.mark.parametrize("gptq", [False, True])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e3])
def test_zeros_of_a_pruned_weight_stay_zero_and_the_rest_stays_near(format, gptq, size):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(37, 200, generator=generator) * size + 0.3 * size
    dropped = torch.rand(37, 200, generator=generator) < 0.5
    dropped[3] = True
    x = torch.randn(500, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    hessian = {"hessian": x.T @ x / 500} if gptq else {}
    pruned = weight.masked_fill(dropped, 0)
    found = quantize(pruned, format, **hessian).dequantize()
    assert (found[dropped] == 0).all()
    plain = quantize(weight, format, **hessian).dequantize()
    error, usual = ((found - pruned) @ x.T).square().mean(), ((plain - weight) @ x.T).square().mean()
    assert error < usual * (4 if gptq else 1.2)
