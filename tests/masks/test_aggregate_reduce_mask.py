"""The ready-made functions, against float64 references."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deadband.masks import aggregate, mask, reduce
from deadband.masks.sparsifier import ActivationSparsifier

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def over(fn, batches, dim=-1):
    data, rows = None, 0
    for x in batches:
        data = fn(data, rows, x, dim)
        rows += aggregate.rows_of(x, dim)
    return data


def rows_of(batches, dim=-1):
    return torch.cat([x.double().movedim(dim, -1).reshape(-1, x.shape[dim]) for x in batches])


# ---------------------------------------------------------------------------------------------------------- aggregate


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=3), min_size=1, max_size=5),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
def test_aggregates_of_any_shapes(shapes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(*shape, 5, generator=generator).to(dtype) for shape in shapes]
    rows = rows_of(batches)
    expected = {
        aggregate.sum: rows.sum(0),
        aggregate.mean: rows.sum(0) / max(len(rows), 1),
        aggregate.mean_abs: rows.abs().sum(0) / max(len(rows), 1),
        aggregate.max_abs: rows.abs().amax(0) if len(rows) else torch.zeros(5).double(),
    }
    for fn, value in expected.items():
        data = over(fn, batches)
        assert data.dtype == torch.float64
        torch.testing.assert_close(data, value, rtol=1e-5, atol=1e-5)


def test_the_moving_average_starts_from_the_first_batch():
    batches = [torch.randn(n, 3) for n in (4, 1, 6)]
    means = [x.double().mean(0) for x in batches]
    expected = 0.9 * (0.9 * means[0] + 0.1 * means[1]) + 0.1 * means[2]
    torch.testing.assert_close(over(aggregate.ema, batches), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(over(aggregate.Ema(0.0), batches), means[-1], rtol=1e-6, atol=1e-7)
    for bad in (1.0, -0.1, 2):
        with pytest.raises(ValueError, match="decay="):
            aggregate.Ema(bad)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_features_along_any_dimension(dim):
    batches = [torch.randn(4, 4, 4) for _ in range(3)]
    torch.testing.assert_close(over(aggregate.mean, batches, dim), rows_of(batches, dim).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", [torch.tensor([[1, -2], [3, -4]]), torch.tensor([[True, False], [True, True]])])
def test_whole_numbers(x):
    assert over(aggregate.sum, [x, x]).tolist() == (2 * x.double().sum(0)).tolist()
    assert over(aggregate.max_abs, [x]).tolist() == x.double().abs().amax(0).tolist()
    assert over(aggregate.mean_abs, [x]).tolist() == x.double().abs().mean(0).tolist()


def test_nan_stays_visible():
    x = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    for fn in (aggregate.sum, aggregate.mean, aggregate.mean_abs, aggregate.max_abs, aggregate.ema):
        assert over(fn, [x, x]).isnan().tolist() == [False, True]


def test_long_runs_of_half_precision_do_not_stall():
    x = torch.ones(8, 2, dtype=torch.bfloat16)
    assert over(aggregate.sum, [x] * 1000).tolist() == [8000.0, 8000.0]
    assert over(aggregate.mean, [x] * 1000).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("layer", "shape", "features"),
    [
        (nn.Conv1d(3, 2, 1), (2, 3, 7), 3),
        (nn.Conv2d(3, 2, 1), (2, 3, 5, 7), 3),
        (nn.Conv2d(3, 2, 1), (3, 5, 7), 3),
        (nn.Conv3d(3, 2, 1), (2, 3, 4, 5, 6), 3),
        (nn.BatchNorm1d(3), (4, 3), 3),
        (nn.BatchNorm1d(3), (4, 3, 5), 3),
        (nn.BatchNorm2d(3), (4, 3, 5, 5), 3),
        (nn.GroupNorm(1, 3), (4, 3, 5), 3),
        (nn.Linear(3, 2), (4, 6, 3), 3),
        (nn.LSTM(3, 2), (4, 6, 3), 3),
        (nn.LayerNorm(3), (4, 6, 3), 3),
    ],
)
def test_features_lie_where_the_layer_has_them(layer, shape, features):
    model = nn.Sequential(layer)
    sparsifier = ActivationSparsifier(model, aggregate.sum, reduce.mean, mask.top_k, k=1)
    sparsifier.register_layer(layer)
    layer(torch.randn(shape))
    sparsifier.step()
    sparsifier.squash_mask()
    assert sparsifier.get_mask("0").shape == (features,)
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(torch.ones(shape))
    handle.remove()
    assert seen[0].sum() == math.prod(shape) // features


def test_ready_made_functions_choose_among_features_together():
    model = nn.Sequential(nn.Linear(6, 2))
    sparsifier = ActivationSparsifier(model, aggregate.mean_abs, reduce.mean, mask.magnitude, sparsity=0.5)
    sparsifier.register_layer(model[0], features=[0, 1, 2, -1])
    model(torch.tensor([[3.0, 1.0, 2.0, 0.0, 0.0, 4.0]]))
    sparsifier.step()
    assert sparsifier.get_mask("0").tolist() == [True, False, False, True, True, True]


# ------------------------------------------------------------------------------------------------------------- reduce


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (1, 1, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(shape, dtype):
    data = torch.randn(shape).to(dtype)
    rows = data.double().reshape(-1, 5)
    expected = {
        reduce.mean: rows.mean(0),
        reduce.l2_norm: rows.square().sum(0).sqrt(),
        reduce.quantile: torch.from_numpy(np.quantile(rows.numpy(), 0.5, axis=0)),
        functools.partial(reduce.quantile, q=0.9): torch.from_numpy(np.quantile(rows.numpy(), 0.9, axis=0)),
        functools.partial(reduce.quantile, q=1.0): rows.amax(0),
    }
    for fn, value in expected.items():
        result = fn(data)
        assert result.shape == (1,) * (len(shape) - 1) + (5,)
        torch.testing.assert_close(result.double().reshape(-1), value, rtol=1e-5, atol=1e-5)


def test_reductions_along_another_dimension():
    data = torch.randn(2, 3, 4, 5)
    assert reduce.mean(data, dim=1).shape == (1, 3, 1, 1)
    torch.testing.assert_close(
        reduce.quantile(data, 0.5, 1), torch.quantile(data.movedim(1, 0).flatten(1), 0.5, 1).view(1, 3, 1, 1)
    )
    for fn in (reduce.mean, reduce.l2_norm, reduce.quantile):
        with pytest.raises(ValueError, match="dim=7 is out of range"):
            fn(data, dim=7)
    with pytest.raises(ValueError, match="q=1.5"):
        reduce.quantile(data, 1.5)


def test_quantiles_of_nan_are_nan():
    data = torch.tensor([[1.0, math.nan], [2.0, 3.0], [3.0, 4.0]])
    result = reduce.quantile(data)
    assert result[0, 0] == 2
    assert result[0, 1].isnan()


# --------------------------------------------------------------------------------------------------------------- mask

values = st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 0.5, math.inf, math.nan]), min_size=0, max_size=12)


def scores(data):
    return [math.inf if math.isnan(value) else abs(value) for value in data]


@settings(deadline=None)
@given(values, st.floats(0, 1))
def test_magnitude_masks_exactly_so_many_of_the_least(data, sparsity):
    keep = mask.magnitude(torch.tensor(data), sparsity)
    assert keep.dtype == torch.bool
    dropped = [score for score, kept in zip(scores(data), keep.tolist(), strict=True) if not kept]
    kept = [score for score, kept in zip(scores(data), keep.tolist(), strict=True) if kept]
    assert len(dropped) == round(sparsity * len(data))
    assert not dropped or not kept or max(dropped) <= min(kept)
    order = sorted(range(len(data)), key=lambda i: (-scores(data)[i], i))  # of equal scores, the first ones stay
    assert sorted(order[: len(kept)]) == [i for i, flag in enumerate(keep.tolist()) if flag]


@settings(deadline=None)
@given(values, st.integers(0, 14))
def test_top_k(data, k):
    assert int(mask.top_k(torch.tensor(data), k).sum()) == min(k, len(data))


@settings(deadline=None)
@given(values, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_threshold_keeps_what_is_above(data, limit):
    keep = mask.threshold(torch.tensor(data), limit)
    assert keep.tolist() == [score > limit for score in scores(data)]


@settings(deadline=None)
@given(values, st.integers(1, 5), st.data())
def test_n_of_every_m(data, m, draw):
    n = draw.draw(st.integers(0, m))
    keep = mask.n_m(torch.tensor(data), n, m).tolist()
    for start in range(0, len(data), m):
        group, chosen = scores(data)[start : start + m], keep[start : start + m]
        assert sum(chosen) == (n if len(group) == m else math.ceil(len(group) * n / m))
        kept = [score for score, flag in zip(group, chosen, strict=True) if flag]
        dropped = [score for score, flag in zip(group, chosen, strict=True) if not flag]
        assert not kept or not dropped or max(dropped) <= min(kept)


def test_blocks():
    data = torch.tensor([1.0, 1, 5, 5, 2, 2, 9])
    assert mask.block(data, 0.5, size=2).tolist() == [False, False, True, True, False, False, True]
    assert mask.block(data, 0.0, size=3).all()
    assert not mask.block(data, 1.0, size=3).any()
    grid = torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 9]])
    assert mask.block(grid, 0.5, size=2, dim=0).tolist() == [[False, False], [False, False], [True, True], [True, True]]


def test_random_masks():
    data = torch.randn(40, 25)
    keep = mask.random(data, 0.3)
    assert int((~keep).sum()) == 300
    assert torch.equal(keep, mask.random(torch.zeros(40, 25), 0.3))
    assert not torch.equal(keep, mask.random(data, 0.3, seed=1))


def test_masks_keep_shapes_and_take_whole_numbers():
    data = torch.randint(-9, 9, (2, 3, 8))
    for made in (
        mask.magnitude(data, 0.25), mask.threshold(data, 2), mask.top_k(data, 5), mask.n_m(data),
        mask.block(data, 0.5, 4), mask.random(data, 0.5),
    ):  # fmt: skip
        assert made.shape == data.shape
        assert made.dtype == torch.bool


@pytest.mark.parametrize(
    ("fn", "arguments", "message"),
    [
        (mask.magnitude, {"sparsity": 1.1}, "sparsity=1.1"),
        (mask.magnitude, {"sparsity": math.nan}, "sparsity=nan"),
        (mask.threshold, {"threshold": -1}, "threshold=-1"),
        (mask.top_k, {"k": -1}, "k=-1"),
        (mask.top_k, {"k": 0.5}, "k=0.5"),
        (mask.n_m, {"n": 5, "m": 4}, "n=5, m=4"),
        (mask.block, {"sparsity": 0.5, "size": 0}, "size=0"),
        (mask.random, {"sparsity": -0.5}, "sparsity=-0.5"),
    ],
)
def test_bad_arguments(fn, arguments, message):
    with pytest.raises(ValueError, match=message):
        fn(torch.ones(4), **arguments)
