"""Attention of one token against float64, and what its operator takes."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, ISAS, before_a_wall, compiled, instruction_set

from deadband.ops import kernels
from deadband.ops.attention import attend, attend_in_steps, attend_reference
from deadband.running.forward import threads


def exact(query, keys, values, mask, scaling, softcap):
    """By definition, in float64."""
    heads, groups = query.shape[0], keys.shape[0]
    keys, values = (each.double().repeat_interleave(heads // groups, 0) for each in (keys, values))
    scores = (query.double().unsqueeze(1) @ keys).squeeze(1) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores + mask.double(), -1).unsqueeze(1) @ values).squeeze(1)


def operands(groups, heads, size, value_size, tokens, room, dtype, seed):
    """In a cache with room to grow, which holds NaN where nothing belongs to the operands."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(groups * heads, size, generator=generator).to(dtype)
    keys = torch.full((groups, size, tokens + room), math.nan, dtype=dtype)
    values = torch.full((groups, tokens + room, value_size), math.nan, dtype=dtype)
    keys[..., :tokens] = torch.randn(groups, size, tokens, generator=generator)
    values[:, :tokens] = torch.randn(groups, tokens, value_size, generator=generator)
    mask = torch.where(torch.rand(tokens, generator=generator) < 0.3, -math.inf, 0.0)
    mask[seed % tokens] = 0.0
    return query, keys[..., :tokens], values[:, :tokens], mask


def allowed(expected, values, dtype):
    return 2e-5 * float(values.float().abs().max()) + torch.finfo(dtype).eps * expected.abs()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=80, deadline=None)
@given(
    groups=st.integers(1, 5),
    heads=st.integers(1, 9),
    size=st.sampled_from([1, 3, 16, 20, 64, 80, 128]),
    value_size=st.sampled_from([1, 15, 16, 64, 72, 130]),
    tokens=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 128, 200]),
    room=st.sampled_from([0, 1, 40]),
    softcap=st.sampled_from([0.0, 5.0]),
    dtype=st.sampled_from(DTYPES),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
def test_against_float64(isa, groups, heads, size, value_size, tokens, room, softcap, dtype, count, seed):
    given_ = operands(groups, heads, size, value_size, tokens, room, dtype, seed)
    scaling = size**-0.5
    with instruction_set(isa), threads(count):
        y = attend(*given_, scaling, softcap)
    expected = exact(*given_, scaling, softcap)
    assert (y.shape, y.dtype, y.is_contiguous()) == (expected.shape, dtype, True)
    assert bool(((y.double() - expected).abs() <= allowed(expected, given_[2], dtype)).all())
    reference = attend_reference(*given_, scaling, softcap).double()
    assert bool(((reference - expected).abs() <= allowed(expected, given_[2], dtype)).all())
    steps = attend_in_steps(*given_, scaling, softcap).double()
    # beside the result, the query that was scaled, scores and their softmax are rounded
    rounded = 0 if dtype is torch.float32 else 8 * torch.finfo(dtype).eps * float(given_[2].float().abs().max())
    assert bool(((steps - expected).abs() <= allowed(expected, given_[2], dtype) + rounded).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_threads_give_the_bits_of_one(isa, dtype):
    given_ = operands(8, 4, 64, 64, 1024, 7, dtype, 3)
    with instruction_set(isa):
        with threads(1):
            one = attend(*given_, 0.125, 0.0)
        with threads(2):
            assert torch.equal(attend(*given_, 0.125, 0.0), one)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_several_tokens_are_each_of_them(dtype):
    _, keys, values, _ = operands(2, 3, 20, 24, 70, 10, dtype, 3)
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(5, 6, 20, generator=generator).to(dtype)
    mask = torch.full((5, 70), -math.inf).triu(66)
    for softcap in (0.0, 5.0):
        y = attend(query, keys, values, mask, 0.25, softcap)
        for row in range(5):
            alone = attend(query[row], keys, values, mask[row], 0.25, softcap)
            torch.testing.assert_close(y[row], alone, rtol=1e-3, atol=1e-3)
    reference = attend_reference(query, keys, values, mask, 0.25, 0.0)
    expected = torch.stack([exact(query[row], keys, values, mask[row], 0.25, 0.0) for row in range(5)])
    torch.testing.assert_close(reference.double(), expected, rtol=1e-2, atol=1e-2)
    assert attend(query[:0], keys, values, mask[:0], 0.25, 0.0).shape == (0, 6, 24)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_masks_and_nan(isa, dtype):
    query, keys, values, mask = operands(2, 3, 32, 32, 70, 0, dtype, 1)
    with instruction_set(isa):
        sharp = attend(query * 1000, keys, values, mask, 1.0, 0.0).double()  # one token has all the weight
        chosen = exact(query * 1000, keys, values, mask, 1.0, 0.0)
        assert bool(((sharp - chosen).abs() <= 2e-3 + torch.finfo(dtype).eps * chosen.abs()).all())
        assert attend(query, keys, values, torch.full_like(mask, -math.inf), 1.0, 0.0).isnan().all()
        broken = keys.clone()
        broken[1, 5, 3] = math.nan
        y = attend(query, broken, values, torch.zeros_like(mask), 1.0, 0.0)
        assert y[3:].isnan().all()
        assert torch.equal(y[:3], attend(query, keys, values, torch.zeros_like(mask), 1.0, 0.0)[:3])
        infinite = values.clone()
        infinite[0, 3] = math.inf
        shown = torch.zeros_like(mask)
        assert attend(query, keys, infinite, shown, 0.1, 0.0)[:3].isposinf().all()


@pytest.mark.parametrize("what", ["dtype", "tokens apart", "float16", "no tokens"])
def test_operands_that_the_kernel_does_not_take(what):
    query, keys, values, mask = operands(2, 2, 16, 16, 20, 0, torch.float32, 2)
    if what == "dtype":
        values = values.bfloat16()
    elif what == "tokens apart":
        keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    elif what == "float16":
        query, keys, values = query.half(), keys.half(), values.half()
    else:
        keys, values, mask = keys[..., :0], values[:, :0], mask[:0]
        assert torch.equal(attend(query, keys, values, mask, 1.0, 0.0), torch.zeros(4, 16))
        return
    y, expected = attend(query, keys, values, mask, 0.25, 0.0), exact(query, keys, values, mask, 0.25, 0.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_the_operator_passes_torchs_own_check():
    arguments = (*operands(2, 2, 16, 24, 20, 12, torch.float32, 2), 0.25, 0.0)
    torch.library.opcheck(attend, arguments)
    few = (torch.stack([arguments[0]] * 3), *arguments[1:3], torch.stack([arguments[3]] * 3), 0.25, 0.0)
    torch.library.opcheck(attend, few)
    with pytest.raises(RuntimeError, match=r"keys and values of 3 dimensions.*\[16\]"):
        attend(torch.empty(16, device="meta"), *(each.to("meta") for each in arguments[1:4]), 0.25, 0.0)


@compiled
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_or_written_outside(isa, dtype):
    for tokens, size in ((1, 1), (17, 5), (64, 64), (70, 33)):
        query, keys, values, mask = operands(1, 3, size, size, tokens, 0, dtype, 4)
        walled = [before_a_wall(each.contiguous()) for each in (query, keys, values, mask, torch.zeros_like(query))]
        *given_, y = walled
        with instruction_set(isa):
            expected = attend(query, keys, values, mask, 0.5, 0.0)
            error = kernels.library.deadband_attend(
                kernels.DTYPES[dtype], *(each.data_ptr() for each in given_[:3]), 1, 3, size, size, tokens,
                size * tokens, tokens, tokens * size, size, given_[3].data_ptr(), 0.5, 0.0, y.data_ptr(), 1,
            )  # fmt: skip
        assert error == 0
        assert torch.equal(y, expected)


@compiled
def test_arguments_that_the_kernel_refuses():
    query, keys, values, mask = operands(2, 2, 16, 16, 20, 0, torch.float32, 2)
    y = torch.full_like(query, 7.0)
    good = {
        "dtype": 0, "query": query.data_ptr(), "keys": keys.data_ptr(), "values": values.data_ptr(), "groups": 2,
        "heads": 2, "size": 16, "value_size": 16, "tokens": 20, "key_group": 320, "key_stride": 20, "value_group": 320,
        "value_stride": 16, "mask": mask.data_ptr(), "scaling": ctypes.c_float(0.25), "softcap": ctypes.c_float(0),
        "y": y.data_ptr(), "threads": 1,
    }  # fmt: skip
    for change, error in (
        ({"dtype": 2}, -1), ({"groups": -1}, -2), ({"tokens": -1}, -2), ({"key_stride": 19}, -2),
        ({"value_stride": 15}, -2), ({"keys": None}, -3), ({"y": None}, -3), ({"mask": None}, -3), ({"groups": 0}, 0),
        ({"value_size": 0}, 0),
    ):  # fmt: skip
        assert kernels.library.deadband_attend(*{**good, **change}.values()) == error, change
        assert y.eq(7).all()
    assert kernels.library.deadband_attend(*{**good, "threads": -3}.values()) == 0
    torch.testing.assert_close(y.double(), exact(query, keys, values, mask, 0.25, 0.0), rtol=1e-5, atol=1e-5)
