"""Watching and masking in compiled, exported and traced models, and under function transforms."""

from __future__ import annotations

import warnings

import pytest
import torch
from sparsifiers import ready, same, small, small_masked
from torch import nn

from deadband.masks import aggregate, mask, reduce


@pytest.mark.parametrize("ready_made", [False, True])
@pytest.mark.parametrize("features", [None, [0, 2, 3]])
def test_compile_fullgraph_in_both_phases(ready_made, features):
    def make():
        keywords = {"features": features, "feature_dim": 1}
        if ready_made:
            keywords |= {
                "aggregate_fn": aggregate.mean_abs,
                "reduce_fn": reduce.mean,
                "mask_fn": lambda d, level: mask.magnitude(d, 0.5),
            }
        return small(**keywords)

    model, sparsifier = make()
    reference, eager = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batches = [torch.randn(rows, 6) for rows in (4, 4, 3)]
    for x in batches:
        torch.testing.assert_close(compiled(x), reference(x))
    same(sparsifier.data_groups["2"]["data"], eager.data_groups["2"]["data"])
    compiled(batches[0].requires_grad_()).sum().backward()
    reference(batches[0])
    for each in (sparsifier, eager):
        each.step()
        each.squash_mask()
    torch.testing.assert_close(compiled(batches[1]), reference(batches[1]))
    same(sparsifier.get_mask("2"), eager.get_mask("2"))


def test_hooks_that_come_after_compiling_take_effect():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 6)
    expected = compiled(x)
    sparsifier = ready(model)
    sparsifier.register_layer(model[0])
    torch.testing.assert_close(compiled(x), expected)
    assert "data" in sparsifier.data_groups["0"]
    sparsifier.step()
    sparsifier.squash_mask()
    masked = compiled(x)
    assert not torch.allclose(masked, expected)
    sparsifier.unregister_layer("0")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("features", [None, [0, 2, 3]])
def test_export_in_both_phases(features):
    model, sparsifier = small(features=features, feature_dim=1)
    x = torch.randn(4, 6)
    program = torch.export.export(model, (x,)).module()
    assert "data" not in sparsifier.data_groups["0"]  # tracing is no data
    torch.testing.assert_close(program(x), model(x))
    sparsifier.step()
    sparsifier.squash_mask()
    masked = torch.export.export(model, (x,))
    torch.testing.assert_close(masked.module()(x), model(x))
    assert any("activation_mask" in name for name, _ in masked.named_buffers())


def test_jit_trace():
    model, sparsifier, x = small_masked()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), model(x))


def test_function_transforms():
    model, sparsifier, x = small_masked()
    torch.testing.assert_close(torch.vmap(model)(x), model(x))
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (x,)), model(x))
    jacobian = torch.func.jacrev(model)(x[0])
    assert (jacobian[:, ~model[0].activation_mask] == 0).all()
    torch.testing.assert_close(torch.func.jacfwd(model)(x[0]), jacobian)


def test_aggregating_under_function_transforms():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    torch.vmap(model)(x)
    assert torch.equal(sparsifier.data_groups["0"]["data"], x)
    torch.func.jacrev(lambda x: model(x).sum())(x)
    assert torch.equal(sparsifier.data_groups["0"]["data"], 2 * x)


def test_parametrized_layers():
    model, sparsifier = small()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    assert model(x).shape == (4, 5)
