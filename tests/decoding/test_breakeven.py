"""The break-even: how it is read off, remembered and obeyed. What is faster is a matter of benchmarks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from deadband.decoding import breakeven
from deadband.decoding.breakeven import GRID, ROWS, Kind, break_even, measure, tune_
from deadband.layers.sites import sparse_sites
from deadband.ops import kernels
from deadband.sparsify.sparsify import sparsify_

needs_kernels = pytest.mark.skipif(kernels.library is None, reason="there are no kernels here")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEADBAND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "breakeven.json"


def model(weights=None):
    made = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32)).eval()
    return sparsify_(made, {"0": 0.5, "1": 0.5, "2": 0.5}, weights=weights)


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ([1.1] * len(GRID), 0.0),
        ([0.9] * len(GRID), math.inf),
        ([0.9, 1.1, *[1.2] * (len(GRID) - 2)], (GRID[0] + GRID[1]) / 2),
        ([1.1, 0.8, *[1.2] * (len(GRID) - 2)], (GRID[1] + GRID[2]) / 2),  # the last crossing: noise before it
    ],
)
def test_crossing(gains, expected):
    assert breakeven._crossing(gains) == pytest.approx(expected)


@needs_kernels
@pytest.mark.parametrize("weights", [None, "int8", "int4-g32"])
def test_every_format_is_measured(weights):
    kind = Kind.of(sparse_sites(model(weights))["0"])
    limits = measure(kind)
    assert list(limits) == list(ROWS)
    assert all(0 <= least <= GRID[-1] or least == math.inf for least in limits.values())


@needs_kernels
def test_each_kind_is_measured_once(own_cache, monkeypatch):
    calls = []

    def measured(kind, device):
        calls.append(kind)
        return {1: 0.2, 2: 0.5, 4: math.inf, 8: math.inf}

    monkeypatch.setattr(breakeven, "measure", measured)
    first = break_even(model(), progress=False)
    assert len(calls) == len(first) == 2  # two shapes
    assert break_even(model(), progress=False) == first
    assert len(calls) == 2
    assert len(break_even(model("int8"), progress=False)) == 2
    assert len(calls) == 4
    own_cache.write_text("{broken")
    assert break_even(model(), progress=False) == first
    json.loads(own_cache.read_text())


@needs_kernels
def test_layers_skip_only_where_it_pays(monkeypatch):
    monkeypatch.setattr(breakeven, "measure", lambda kind, device: {1: 0.2, 2: 0.4, 4: 0.6, 8: math.inf})
    tuned = model()
    for site, expected in zip(sparse_sites(tuned).values(), (0.1, 0.5, math.nan), strict=True):
        site.expected = expected
    before = sparse_sites(tuned)["2"].sparse_rows
    tune_(tuned)
    assert [site.sparse_rows for site in sparse_sites(tuned).values()] == [0, 2, before]


def test_without_sparse_layers():
    assert break_even(nn.Linear(2, 2)) == {}
    layer = nn.Linear(2, 2)
    assert tune_(layer) is layer


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [None, "int8", "int4-g64-zp"])
def test_on_a_gpu(weights):
    kind = Kind.of(sparse_sites(model(weights).to(torch.bfloat16))["0"])
    limits = measure(kind, "cuda")
    assert all(0 <= least <= GRID[-1] or least == math.inf for least in limits.values())
    assert len(break_even(model(weights).cuda())) == 2
