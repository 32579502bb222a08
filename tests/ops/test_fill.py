"""The kernel that fills skipped entries against the rule as torch computes it, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, ISAS, instruction_set

from deadband.ops.fill import filled
from deadband.ops.skipping import fill, keep_mask
from deadband.running.forward import threads


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 3, 40]),
    inputs=st.sampled_from([0, 1, 7, 64, 1025]),
    dtype=st.sampled_from([*DTYPES, torch.float16, torch.float64]),
    form=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    counted=st.booleans(),
    count=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**30),
)
def test_fill_matches_the_reference(isa, rows, inputs, dtype, form, counted, count, seed):
    generator = torch.Generator().manual_seed(seed)
    scaled, centered, relative = form
    x = torch.randn(rows, 2, inputs, generator=generator).to(dtype)[:, 0]
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5], dtype=dtype)
    places = torch.rand(x.shape, generator=generator) < 0.05
    x[places] = special[torch.randint(6, (int(places.sum()),), generator=generator)]
    scale = torch.rand(inputs, generator=generator) if scaled else None
    center = torch.randn(inputs, generator=generator) if centered else None
    threshold = torch.tensor(0.01 if relative else 0.5)
    counts = torch.tensor([5, 6, 7]) if counted else None
    keep = keep_mask(x, threshold, scale, center, relative)
    with instruction_set(isa), threads(count):
        y, found = filled(x, threshold, scale, center, relative, counts)
    # another order of summing a norm may decide about an entry at its limit
    differs = found != keep
    assert not (differs & (found == keep_mask(x, threshold * (1 + 1e-5), scale, center, relative))
                & (found == keep_mask(x, threshold * (1 - 1e-5), scale, center, relative))).any()  # fmt: skip
    assert relative or not differs.any()
    torch.testing.assert_close(y, fill(x, found, center), rtol=0, atol=0, equal_nan=True)
    assert found.dtype is torch.bool
    if counted:
        assert counts.tolist() == [5 + int((~found).sum()), 6 + x.numel(), 7 + int((~x.isfinite()).sum())]


def test_fill_refuses_what_it_cannot_read():
    with pytest.raises(RuntimeError):
        filled(torch.randn(2, 4), torch.tensor(0.5), torch.rand(3), None, False, None)
