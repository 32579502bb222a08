"""Models that are watched, functions of a user, and what is the same: helpers that tests share."""

from __future__ import annotations

import torch
from torch import nn
from torch.ao.pruning._experimental.activation_sparsifier.activation_sparsifier import (
    ActivationSparsifier as TorchSparsifier,
)

from deadband.masks import aggregate, mask, reduce
from deadband.masks.sparsifier import ActivationSparsifier


def add(a, b):
    return a + b


def batch_mean(data):
    return data.mean(0)


def above(data, level):
    return (data.abs() > data.abs().float().mean() * level).to(data.dtype)


def identity_mask(data, level):
    return torch.ones_like(data)


def convnet(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Identity(), nn.Flatten(), nn.Linear(8 * 36, 5), nn.Identity()
    ).to(dtype)


def small(**keywords):
    """A model of two linear layers, watched by functions of a user."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    options = {"aggregate_fn": add, "reduce_fn": batch_mean, "mask_fn": above, "level": 1.0, **keywords}
    sparsifier = ActivationSparsifier(model, **options)
    for layer in (model[0], model[2]):
        sparsifier.register_layer(layer)
    return model, sparsifier


def small_masked(**keywords):
    """The same with its masks in force, and the input that they were made from."""
    model, sparsifier = small(**keywords)
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    return model, sparsifier, x


def ready(model, **keywords):
    options = {"aggregate_fn": aggregate.mean_abs, "reduce_fn": reduce.mean, "mask_fn": mask.magnitude, "sparsity": 0.5}
    return ActivationSparsifier(model, **{**options, **keywords})


def only(layer, sparsifier_class=ActivationSparsifier, **keywords):
    """A sparsifier with a layer as its whole model."""
    options = {"aggregate_fn": add, "reduce_fn": batch_mean, "mask_fn": above, "level": 1.0, **keywords}
    model = nn.Sequential(layer)
    sparsifier = sparsifier_class(model, **options)
    sparsifier.register_layer(layer)
    return model, sparsifier


def same(a, b):
    """Equal bit for bit (zeros may differ in sign), types and dtypes included."""
    assert type(a) is type(b)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.is_sparse) == (b.dtype, b.shape, b.is_sparse)
        assert torch.equal(a.to_dense(), b.to_dense())
    else:
        assert a == b


def same_as_torchs(results, **keywords):
    """What `results` gives for a model and its sparsifier is the same with torch's class, and returned."""
    ours, theirs = (results(*only(nn.Identity(), each, **keywords)) for each in (ActivationSparsifier, TorchSparsifier))
    same(ours, theirs)
    return ours
