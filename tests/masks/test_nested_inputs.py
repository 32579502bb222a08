"""Watching and masking nested tensors."""

from __future__ import annotations

import math

import pytest
import torch
from sparsifiers import above, add, identity_mask, only, ready
from torch import nn

import deadband
from deadband.masks import aggregate, reduce


def test_nested_tensors():
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)])
    model, sparsifier = only(nn.Identity(), reduce_fn=lambda data: data, mask_fn=identity_mask)
    model(nested)
    sparsifier.step()
    sparsifier.squash_mask()
    for a, b in zip(model(nested).unbind(), nested.unbind(), strict=True):
        assert torch.equal(a, b)


def padded_encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))


LENGTHS = (7, 4, 2)
PADDING = torch.arange(8) >= torch.tensor(LENGTHS)[:, None]
ENCODER_SITES = [
    "",
    "layers.0",
    "layers.0.self_attn",
    "layers.1.self_attn",
    "layers.0.linear1",
    "layers.1.norm2",
    "norm",
]
NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@NESTED
@pytest.mark.parametrize("kind", ["ready-made", "of one's own", "features", "ready-made, features", "positions"])
@pytest.mark.parametrize("site", ENCODER_SITES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_with_padding_is_masked_in_evaluation_as_in_training(kind, site, activation):
    model = padded_encoder(activation=activation)
    own = {"aggregate_fn": add, "reduce_fn": lambda data: data.abs().mean(tuple(range(data.dim() - 1)))}
    chosen = {"features": [1, 4, 5], "feature_dim": 2}
    options = {
        "ready-made": {},
        "of one's own": own,
        "features": {**own, "reduce_fn": lambda data: data.abs().mean((0, 1)), "mask_fn": above, **chosen},
        "ready-made, features": chosen,
        "positions": {**own, "reduce_fn": lambda data: data.abs().mean(0)},
    }[kind]
    sparsifier = ready(model, **{"level": 1.0, "sparsity": None} if kind == "features" else {})
    if kind == "features":
        sparsifier.defaults["sparse_config"] = {"level": 1.0}
    sparsifier.register_layer(model.get_submodule(site), **options)
    x = torch.randn(3, 8, 16)
    dense = model(x, src_key_padding_mask=PADDING)
    sparsifier.step()
    sparsifier.squash_mask()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        model.eval()
        found = model(x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(found[~PADDING], expected[~PADDING])
    assert kind == "features" or not torch.allclose(found[~PADDING], dense[~PADDING], rtol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


@NESTED
def test_padding_of_nested_tensors_is_not_counted():
    model = padded_encoder().eval()
    sparsifier = ready(model, aggregate_fn=aggregate.mean)
    sparsifier.register_layer(model.layers[0])
    x = torch.randn(3, 8, 16)
    with torch.no_grad():
        model(x, src_key_padding_mask=PADDING)
        model(x)  # and dense ones may follow
    config = sparsifier.data_groups["layers.0"]
    assert config["rows"] == sum(LENGTHS) + 3 * 8
    rows = torch.cat([x[~PADDING], x.flatten(0, 1)])
    torch.testing.assert_close(config["data"], rows.mean(0).double(), rtol=1e-5, atol=1e-6)


@NESTED
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("grad", [False, True])
def test_nested_inputs_of_any_layer(layout, grad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5))
    sparsifier = ready(model)
    sparsifier.register_layer(model[2])
    parts = [torch.randn(length, 6) for length in (3, 0, 5, 1)]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=grad)
    model(nested)
    sparsifier.step()
    sparsifier.squash_mask()
    with torch.no_grad():
        model[0].bias[:2] = math.nan
        sparsifier.get_mask("2")[:2] = False
    found = model(nested)
    for part, alone in zip(found.unbind(), parts, strict=True):
        torch.testing.assert_close(part, model(alone))
        assert part.isfinite().all()
    _ = found + found * 2  # it can go on being used with its like
    if grad:
        torch.nested.to_padded_tensor(found, 0.0).sum().backward()
        assert [len(part) for part in nested.grad.unbind()] == [3, 0, 5, 1]
    if layout is torch.jagged:
        compiled = torch.compile(model, backend="eager", fullgraph=True)(nested)
        torch.testing.assert_close(compiled.values(), found.values())
    expected = [model(part) for part in parts]
    report = sparsifier.compact_()
    assert {**report.gathered, **report.removed}["2"] > 0
    with torch.no_grad():
        for part, wanted in zip(model(nested).unbind(), expected, strict=True):
            torch.testing.assert_close(part, wanted)


@NESTED
def test_attention_on_nested_tensors():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    sparsifier = ready(attention)
    sparsifier.register_layer(attention)
    parts = [torch.randn(length, 8) for length in (4, 1, 3)]
    x = torch.nested.nested_tensor(parts)
    with torch.no_grad():
        attention(x, x, x, need_weights=False)
        sparsifier.step()
        sparsifier.squash_mask()
        for found in (attention(x, x, x, need_weights=False)[0], attention(query=x, key=x, value=x)[0]):
            for part, row in zip(found.unbind(), parts, strict=True):
                torch.testing.assert_close(part, attention(row[None], row[None], row[None])[0][0])
        with pytest.raises(AttributeError):
            attention(x, x, 3)
        assert not attention._forward_hooks


@NESTED
def test_masks_that_do_not_fit_nested_inputs():
    model, sparsifier = only(nn.Identity(), reduce_fn=lambda data: data.mean(0), mask_fn=identity_mask)
    model(torch.randn(2, 3, 4))
    sparsifier.step()
    sparsifier.squash_mask()
    model(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)]))
    with pytest.raises(ValueError, match=r"mask of shape \(3, 4\) does not fit its input of shape \(2, 5, 4\)"):
        model(torch.nested.nested_tensor([torch.randn(5, 4), torch.randn(2, 4)]))
    model, sparsifier = only(nn.Linear(4, 4), aggregate_fn=aggregate.mean, feature_dim=0, reduce_fn=reduce.mean)
    with pytest.raises(IndexError, match="first dimension of a nested tensor"):
        model(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)]))


@NESTED
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_calibration_on_nested_inputs(layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    parts = [torch.randn(length, 64) for length in (3, 5, 1)]
    nested = torch.nested.nested_tensor(parts, layout=layout)
    found, expected = (
        deadband.calibrate(model, [batch], include=["*"], progress=False) for batch in (nested, torch.cat(parts))
    )
    for name, site in expected.sites.items():
        assert (found.sites[name].histogram == site.histogram).all()
        assert found.sites[name].rows[0] == 9
