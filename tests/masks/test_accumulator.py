"""What a user's functions add up over batches, and over features."""

from __future__ import annotations

import functools
import operator
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsifiers import add, only, ready, same, small
from torch import nn
from torch.ao.pruning._experimental.activation_sparsifier.activation_sparsifier import (
    ActivationSparsifier as TorchSparsifier,
)

from deadband.masks import aggregate
from deadband.masks.entrywise import is_entrywise
from deadband.masks.sparsifier import ActivationSparsifier


def test_maximum_and_product_with_the_first_input_as_start():
    batches = [-torch.rand(4, 3) - 1 for _ in range(3)]
    for fn in (torch.maximum, torch.mul):
        model, sparsifier = only(nn.Identity(), aggregate_fn=fn, zero_start=False)
        for batch in batches:
            model(batch)
        assert torch.equal(sparsifier.data_groups["0"]["data"], functools.reduce(fn, batches))
        model, sparsifier = only(nn.Identity(), aggregate_fn=fn)  # torch's start, for those who count on it
        model(batches[0])
        assert (sparsifier.data_groups["0"]["data"] == 0).all()


def test_concatenation_with_the_first_input_as_start():
    batches = [torch.randn(rows, 3) for rows in (4, 4, 3)]
    model, sparsifier = only(nn.Identity(), aggregate_fn=lambda a, b: torch.cat([a, b]), zero_start=False)
    for batch in batches:
        model(batch)
    assert torch.equal(sparsifier.data_groups["0"]["data"], torch.cat(batches))


def test_a_short_batch_is_not_broadcast():
    model, sparsifier = only(nn.Linear(3, 2))
    a, b = torch.randn(4, 3), torch.randn(1, 3)
    model(a)
    model(b)
    expected = a.clone()
    expected[:1] += b
    assert torch.equal(sparsifier.data_groups["0"]["data"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_in_float32(dtype):
    batch = torch.full((2, 3), 2000.0, dtype=dtype)
    for options in ({"widen": True}, {"aggregate_fn": aggregate.sum}):
        model, sparsifier = only(nn.Identity(), **options)
        for _ in range(400):
            model(batch)
        total = sparsifier.data_groups["0"]["data"]
        assert total.dtype in (torch.float32, torch.float64)
        assert (total == float(batch[0, 0]) * 400 * (2 if total.dim() == 1 else 1)).all()


@pytest.mark.parametrize("bad", [[0, 6], [-7], [3, -3]])
def test_features_out_of_range_or_named_twice(bad):
    model, sparsifier = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier.register_layer(model[0], features=bad, feature_dim=1)
    with pytest.raises((IndexError, ValueError), match="layer '0': feature"):
        model(torch.randn(2, 6))
    assert "data" not in sparsifier.data_groups["0"]
    with pytest.raises(IndexError, match="feature_dim=5 is out of range"):
        sparsifier = small(features=[0], feature_dim=5)[1]
        sparsifier.model(torch.randn(2, 6))


def test_indices_beyond_float32_are_exact():
    size = 2**24 + 2
    layer = nn.Identity()
    model, sparsifier = only(layer, features=[2**24 + 1], feature_dim=0, reduce_fn=lambda d: d, level=0.0)
    x = torch.zeros(size)
    x[2**24 + 1] = 1
    model(x)
    assert sparsifier.data_groups["0"]["data"][0].tolist() == [1]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=6), st.integers(0, 2**31))
def test_batches_of_any_shape_add_up(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(b, t, 3, generator=generator, dtype=torch.float64) for b, t in shapes]
    for compatible in (True, False):
        model, sparsifier = only(nn.Identity(), zero_start=compatible)
        largest, statistic = only(nn.Identity(), aggregate_fn=torch.maximum, zero_start=compatible)
        expected = torch.zeros(max(b for b, _ in shapes), max(t for _, t in shapes), 3, dtype=torch.float64)
        maxima = torch.full_like(expected, 0.0 if compatible else -torch.inf)
        for x in batches:
            model(x)
            largest(x)
            expected[: x.shape[0], : x.shape[1]] += x
            maxima[: x.shape[0], : x.shape[1]] = torch.maximum(maxima[: x.shape[0], : x.shape[1]], x)
        data = sparsifier.data_groups["0"]["data"]
        torch.testing.assert_close(data, expected[: data.shape[0], : data.shape[1]])
        data = statistic.data_groups["0"]["data"]
        finite = torch.where(maxima.isfinite(), maxima, 0)[: data.shape[0], : data.shape[1]]
        assert torch.equal(data, finite)


def test_features_of_batches_of_other_shapes_add_up():
    a, b = torch.randn(4, 6), torch.randn(2, 6)
    model, sparsifier = small(features=[1, 3], feature_dim=1)
    model(a)
    model(b)
    expected = a.clone()
    expected[:2] += b
    torch.testing.assert_close(torch.cat(sparsifier.data_groups["0"]["data"], 1), expected[:, [1, 3]])


def test_a_function_that_cannot_take_another_shape_says_so():
    model, sparsifier = only(nn.Identity(), aggregate_fn=lambda a, b: torch.stack([a, b]).amax(0))
    model(torch.randn(4, 3))
    before = sparsifier.data_groups["0"]["data"]
    with pytest.raises(
        RuntimeError, match=r"layer '0': aggregate_fn cannot put an input of shape \(2, 3\).*entry by entry"
    ):
        model(torch.randn(2, 3))
    assert sparsifier.data_groups["0"]["data"] is before
    model(torch.randn(4, 3))


def test_what_is_aggregated_is_no_alias_of_an_activation():
    model, sparsifier = only(nn.Identity(), aggregate_fn=lambda a, b: b)
    x = torch.ones(2, 3)
    model(x)
    x.zero_()
    assert torch.equal(sparsifier.data_groups["0"]["data"], torch.ones(2, 3))


@pytest.mark.parametrize("name", ["sum", "mean", "mean_abs", "max_abs", "ema"])
def test_ready_made_aggregates_take_eight_bytes_a_feature(name):
    model = nn.Sequential(nn.Linear(1000, 4))
    sparsifier = ready(model, aggregate_fn=getattr(aggregate, name))
    sparsifier.register_layer(model[0])
    for rows in (64, 7, 0, 300):
        model(torch.randn(rows, 1000))
    data = sparsifier.data_groups["0"]["data"]
    assert data.untyped_storage().nbytes() == 8 * 1000
    assert sparsifier.state["0"]["mask"].untyped_storage().nbytes() == 1
    model, sparsifier = only(nn.Linear(1000, 4))
    model(torch.randn(64, 1000))
    assert sparsifier.state["0"]["mask"].untyped_storage().nbytes() == 4  # ones until the first step cost nothing


def closure(weight):
    return lambda a, b: a * weight + b * (1 - weight)


def counted():
    calls = []

    def fn(a, b):
        calls.append(1)
        return a + b * len(calls)

    return fn


FEATURE_FUNCTIONS = {
    "add": (lambda: add, True),
    "torch.maximum": (lambda: torch.maximum, True),
    "operator.add": (lambda: operator.add, True),
    "moving average": (lambda: closure(0.9), True),
    "squares": (lambda: lambda a, b: torch.add(a, b.square()), True),
    "a warm-up": (counted, False),
    "a norm": (lambda: lambda a, b: a + b / b.norm(), False),
    "a mean": (lambda: lambda a, b: a + b - b.mean(), False),
    "a count": (lambda: lambda a, b: a + b / b.numel(), False),
    "a shape": (lambda: lambda a, b: a + b / b.shape[1], False),
    "numpy": (lambda: lambda a, b: a + float(b.numpy().mean()), False),
    "a branch": (lambda: lambda a, b: a + b if float(b[0, 0]) > 0 else a - b, False),
    "a tensor": (lambda: (lambda w: lambda a, b: a + b * w)(torch.arange(5.0).view(5, 1)), False),
    "in place": (lambda: lambda a, b: b.abs_().add_(a), False),
    "itself": (lambda: lambda a, b: b, True),
}


@pytest.mark.parametrize("name", FEATURE_FUNCTIONS)
@pytest.mark.parametrize("features", [[4, 1, 2], [1, 2, 3]])
def test_features_are_taken_together_only_where_that_changes_nothing(name, features):
    make, together = FEATURE_FUNCTIONS[name]
    assert is_entrywise(make()) == together
    results = []
    for sparsifier_class in (ActivationSparsifier, TorchSparsifier):
        model, sparsifier = only(
            nn.Identity(), sparsifier_class, aggregate_fn=make(), features=features, feature_dim=1,
            reduce_fn=lambda data: data.view(-1),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        for _ in range(4):
            x = torch.randn(5, 6, generator=generator)
            before = x.clone()
            model(x)
            assert torch.equal(x, before)
        results.append(list(sparsifier.data_groups["0"]["data"]))
        sparsifier.step()
        results[-1] += sparsifier.get_mask("0")
    same(*results)


def test_data_that_were_taken_away_do_not_change():
    model, sparsifier = only(nn.Identity(), features=[0, 2], feature_dim=1)
    x = torch.ones(3, 4)
    model(x)
    model(x)
    taken = sparsifier.data_groups["0"].pop("data")
    model(x)
    same(taken, [torch.full((3, 1), 2.0)] * 2)
    same(sparsifier.data_groups["0"]["data"], [torch.full((3, 1), 1.0)] * 2)
