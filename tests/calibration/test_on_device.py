"""Calibration on a GPU: sums stay there until all batches were seen, and are those of the CPU.

On the CPU, the same code with CPU tensors; `pytest -m gpu` takes a GPU.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from deadband.calibration import site_statistics
from deadband.calibration.calibration import calibrate
from deadband.calibration.drift import JUDGED_ROWS, Spread
from deadband.ops.observe import FIRST_NONFINITE, observe, observe_on_device


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    channels=st.sampled_from([1, 3, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scaled=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_the_same_statistics(rows, channels, dtype, scaled, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, channels, generator=generator) * torch.randn(rows, 1, generator=generator).exp()).to(dtype)
    x[torch.rand(rows, channels, generator=generator) < 0.1] = 0
    special = torch.rand(rows, channels, generator=generator) < 0.05
    x[special] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)[torch.arange(int(special.sum())) % 3]
    scale = torch.rand(channels, generator=generator) + 0.1 if scaled else None
    found, expected = observe_on_device(x, scale), observe(x, scale)
    assert [each.dtype for each in found] == [torch.int64, torch.int64, torch.float64, torch.float64]
    histogram, *moments = (each.numpy() for each in found)
    assert np.array_equal(histogram[:FIRST_NONFINITE], expected[0][:FIRST_NONFINITE])
    # in which of the other bins a NaN is, depends on its bits
    assert histogram[FIRST_NONFINITE:].sum() == expected[0][FIRST_NONFINITE:].sum()
    for mine, theirs in zip(moments, expected[1:], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-300)


def test_spread_is_of_every_so_many_rows_across_calls():
    rows = torch.rand(5 * JUDGED_ROWS + 7)
    spread = Spread()
    assert spread.skipped == []
    for part in rows.split([3, JUDGED_ROWS, 2 * JUDGED_ROWS + 50, len(rows) - 3 * JUDGED_ROWS - 53]):
        spread.add(part)
    expected = [float(part.mean()) for part in rows.split(JUDGED_ROWS)][:5]
    assert spread.skipped == pytest.approx(expected, rel=1e-6)


class Read(TorchDispatchMode):
    """Counts the numbers that Python asks a tensor for, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def forward(model, batches):
    """The model alone, which may read something itself for each batch (transformers: whether sequences are packed)."""
    with torch.no_grad():
        for batch in batches:
            model(**{name: each.to(model.device) for name, each in batch.items()}, use_cache=False)


def test_nothing_is_read_batch_by_batch(monkeypatch):
    monkeypatch.setattr(site_statistics, "_stays", lambda device: True)
    model, more = tiny_model("llama"), []
    for count in (2, 6):
        with Read() as own:
            forward(model, tiny_batches(count))
        with Read() as all_of_it:
            calibrate(model, tiny_batches(count), progress=False)
        more.append(all_of_it.count - own.count)
    assert more[0] == more[1]


@pytest.mark.parametrize("options", [{}, {"criterion": "weighted_magnitude"}])
def test_the_same_calibration(monkeypatch, options):
    model, batches = tiny_model("llama"), tiny_batches()
    expected = calibrate(model, batches, progress=False, **options)
    monkeypatch.setattr(site_statistics, "_stays", lambda device: True)
    found = calibrate(model, batches, progress=False, **options)
    assert list(found.sites) == list(expected.sites)
    for name, site in found.sites.items():
        assert np.array_equal(site.histogram, expected.sites[name].histogram)
        assert np.array_equal(site.rows, expected.sites[name].rows)
        assert site.discrete == expected.sites[name].discrete
        np.testing.assert_allclose(site.sum_of_squares, expected.sites[name].sum_of_squares, rtol=1e-12)
    assert found.allocate(0.5).rules == expected.allocate(0.5).rules


def _copies_from_gpu(function):
    """Copies from the GPU while `function` runs, as torch's profiler counts them."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum("DtoH" in event.name for event in profile.events())


@pytest.mark.gpu
def test_no_hidden_copies():
    model = tiny_model("llama").cuda()
    more = []
    for count in (2, 6):
        batches = tiny_batches(count)
        own = _copies_from_gpu(lambda batches=batches: forward(model, batches))
        more.append(_copies_from_gpu(lambda batches=batches: calibrate(model, batches, progress=False)) - own)
    assert more[0] == more[1]


@pytest.mark.gpu
@pytest.mark.model
def test_smollm2_has_the_thresholds_of_the_cpu():
    import deadband
    from deadband.app.models import load_model, load_tokenizer, smollm2

    model, tokenizer = load_model(smollm2()), load_tokenizer(smollm2())
    ids = tokenizer("The history of mathematics is long and full of surprises. " * 40, return_tensors="pt").input_ids
    batches = [{"input_ids": each} for each in ids[:, :256].split(64, 1)]
    thresholds = []
    for device in ("cpu", "cuda"):
        calibration = deadband.calibrate(copy.deepcopy(model).to(device), batches, progress=False)
        thresholds.append({name: site.threshold(0.5) for name, site in calibration.sites.items()})
    for name, threshold in thresholds[0].items():  # a bin is 0.8 % wide at most; rounding moves entries
        assert thresholds[1][name] == pytest.approx(threshold, rel=0.016), name
