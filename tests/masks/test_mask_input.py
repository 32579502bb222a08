"""Masks in force: what becomes of inputs, and of writes into a mask."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsifiers import above, add, batch_mean, identity_mask, only, ready, same, small, small_masked
from torch import nn

from deadband.masks.sparsifier import ActivationSparsifier
from deadband.ops.skipping import apply_mask


@pytest.mark.parametrize("features", [None, [0, 2]])
def test_the_callers_tensor_is_never_written_to(features):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.fc(x)

    model = Residual()
    sparsifier = ActivationSparsifier(
        model, add, batch_mean, lambda data: torch.zeros_like(data), features=features, feature_dim=1
    )
    sparsifier.register_layer(model.fc)
    x = torch.randn(3, 4)
    before = x.clone()
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    y = model(x)
    assert torch.equal(x, before)
    masked = x.clone()
    masked[:, features if features else slice(None)] = 0
    torch.testing.assert_close(y, x + model.fc.forward(masked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_what_is_masked_becomes_zero_whatever_it_was(dtype, bad, needs_grad):
    model, sparsifier = only(nn.Identity(), mask_fn=lambda d, level: torch.tensor([1.0, 0, 1]))
    model(torch.ones(2, 3, dtype=dtype))
    sparsifier.step()
    sparsifier.squash_mask()
    x = torch.tensor([[2, bad, 3], [bad, 1, 1]], dtype=dtype, requires_grad=needs_grad)
    y = model(x)
    assert y.dtype == dtype
    assert torch.equal(y[0], torch.tensor([2, 0, 3], dtype=dtype))
    assert torch.equal(y[1, 0], x[1, 0]) or y[1, 0].isnan()
    assert y[1, 1] == 0
    if needs_grad:
        y[0].sum().backward()
        assert x.grad[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("rows", [1, 2000])
def test_small_and_large_inputs_are_masked_alike(rows):
    x = torch.randn(rows, 8)
    x[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    keep = torch.arange(8) >= 4
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        masked = apply_mask(x.to(dtype), keep)
        assert torch.equal(masked, torch.where(keep, x.to(dtype), 0))
    assert torch.equal(apply_mask(x, torch.rand(rows, 8) > 2), torch.zeros(rows, 8))


@pytest.mark.parametrize("features", [None, [0, 2]])
def test_gradients_flow_through_masks(features):
    model, sparsifier = only(
        nn.Identity(), features=features, feature_dim=1, mask_fn=lambda d, level: torch.zeros_like(d)
    )
    base = torch.randn(1, 4, requires_grad=True)
    model(base)
    sparsifier.step()
    sparsifier.squash_mask()
    y = model(base)  # a leaf
    z = model(torch.sigmoid(base).expand(3, 4))  # saves its output; expanded
    (y.sum() + z.sum()).backward()
    kept = torch.tensor([[features is not None and i not in features for i in range(4)]])
    assert torch.equal(base.grad != 0, kept)


def test_inference_and_training_may_alternate():
    model, sparsifier, x = small_masked(features=[0, 3], feature_dim=1)
    sparsifier.get_mask("0")[0].fill_(0)
    with torch.inference_mode():
        model(x)
    sparsifier.get_mask("0")[1].fill_(1)
    model(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("use", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("features", [None, [0, 3]])
def test_masks_follow_the_models_dtype(use, features):
    model, sparsifier = small(features=features, feature_dim=1)
    model(torch.randn(4, 6))
    sparsifier.step()
    sparsifier.squash_mask()
    keep = model[0].activation_mask.clone()
    model.to(use)
    y = model(torch.randn(4, 6, dtype=use))
    assert y.dtype == use
    assert model[0].activation_mask.dtype == torch.bool
    assert torch.equal(model[0].activation_mask, keep)


def test_masks_are_buffers(tmp_path):
    model, sparsifier = small()
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    assert "0.activation_mask" not in model.state_dict()
    sparsifier.squash_mask()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other, masked = small()
    other(torch.randn(4, 6))
    masked.step()
    masked.squash_mask()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), model(x))
    same(masked.get_mask("0"), sparsifier.get_mask("0"))  # the sparsifier sees what the model loaded
    meta = copy.deepcopy(model).to("meta")
    assert meta[0].activation_mask.device.type == "meta"
    assert meta(x.to("meta")).shape == (4, 5)


def test_masks_share_no_memory():
    shared = torch.tensor([True, False, True, True])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sparsifier = ActivationSparsifier(model, add, batch_mean, lambda data: shared)
    for layer in model:
        sparsifier.register_layer(layer)
    model(torch.randn(2, 4))
    sparsifier.step()
    sparsifier.squash_mask()
    pointers = {model[0].activation_mask.data_ptr(), model[1].activation_mask.data_ptr(), shared.data_ptr()}
    assert len(pointers) == 3


def test_scaling_masks_are_kept_as_they_are():
    model, sparsifier = only(nn.Identity(), mask_fn=lambda d, level: torch.tensor([0.5, 0.0, 2.0]))
    model(torch.ones(2, 3))
    sparsifier.step()
    sparsifier.squash_mask()
    assert model(torch.tensor([[1.0, float("nan"), 1.0]])).tolist() == [[0.5, 0.0, 2.0]]
    assert model[0].activation_mask.dtype == torch.float32
    assert model(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_sparse_masks():
    model, sparsifier, x = small_masked(mask_fn=lambda d, level: above(d, level).to_sparse())
    model(x)
    assert sparsifier.get_mask("0").layout == torch.strided


def test_masks_of_one_shape_and_inputs_of_another():
    model, sparsifier = only(nn.Linear(3, 2), reduce_fn=lambda data: data)  # keeps the batch
    model(torch.randn(4, 3))
    sparsifier.step()
    sparsifier.squash_mask()
    model(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"layer '0': its mask of shape \(4, 3\) does not fit .*\(2, 3\).*reduce_fn"):
        model(torch.randn(2, 3))
    with pytest.raises(ValueError, match="does not fit"):
        model(torch.randn(1, 3))  # would be broadcast to four rows


def test_batchless_inputs_of_masks_that_kept_dimensions():
    model, sparsifier, x = small_masked(reduce_fn=lambda data: data.mean(0, keepdim=True))
    torch.testing.assert_close(model(x[0]), model(x)[0])


def test_images_of_another_size():
    conv = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(conv)
    sparsifier = ready(model, sparsity=1 / 3)
    sparsifier.register_layer(conv)
    for size in (8, 5, 12):
        model(torch.randn(2, 3, size, size) * torch.tensor([1.0, 0.1, 2.0]).view(3, 1, 1))
    sparsifier.step()
    sparsifier.squash_mask()
    assert sparsifier.get_mask("0").tolist() == [True, False, True]
    x = torch.randn(5, 3, 9, 7)
    masked = x.clone()
    masked[:, 1] = 0
    torch.testing.assert_close(model(x), conv.forward(masked))
    torch.testing.assert_close(model(x[0]), conv.forward(masked[0]))


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(0, 3),
        torch.tensor(2.0),
        torch.randn(2, 3, device="meta"),
        torch.randn(2, 3, dtype=torch.complex64),
        torch.tensor([[True, False]]),
        torch.tensor([[1, 2, 3]]),
        torch.randn(4, 3).t(),
        torch.randn(1, 3).expand(4, 3),
    ],
)  # fmt: skip
def test_odd_tensors(x):
    for fn in (identity_mask, lambda d, level: torch.zeros_like(d)):
        model, sparsifier = only(nn.Identity(), reduce_fn=lambda data: data, mask_fn=fn)
        model(x)
        sparsifier.step()
        sparsifier.squash_mask()
        y = model(x)
        assert (y.dtype, y.shape, y.device) == (x.dtype, x.shape, x.device)
        if x.device.type != "meta":
            assert torch.equal(y, x if fn is identity_mask else torch.zeros_like(x))


def test_token_ids_stay_whole_numbers():
    embedding = nn.Embedding(10, 4)
    model, sparsifier = only(
        embedding, mask_fn=lambda d, level: torch.tensor([1.0, 0.0, 1.0]), reduce_fn=lambda d: d.float()
    )
    ids = torch.tensor([[4, 5, 6]])
    model(ids)
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(model(ids), embedding.weight[torch.tensor([[4, 0, 6]])])


def test_the_mask_stays_the_same_object_and_writes_into_it_take_effect():
    model, sparsifier = small()
    x = torch.randn(3, 6)
    model(x)
    held = sparsifier.get_mask("0")
    sparsifier.step()
    sparsifier.squash_mask()
    assert sparsifier.get_mask("0") is held
    held.zero_()
    bias = model[2](torch.relu(model[0].bias))
    torch.testing.assert_close(model(x), bias.expand(3, 5))
    assert not model[0].activation_mask.any()


def test_writes_into_masks_of_features_take_effect():
    model, sparsifier = small(features=[1, 4], feature_dim=-1)
    x = torch.randn(3, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    masks = sparsifier.get_mask("0")
    masks[1].fill_(1)
    masks[0] = torch.zeros(1)
    model(x)
    assert model[0].activation_mask.tolist() == [[True, False, True, True, True, True]]


@pytest.mark.parametrize("write", [lambda m: m.data.mul_(0), lambda m: m.numpy().fill(0), lambda m: m.zero_()])
@pytest.mark.parametrize("features", [None, [0, 3]])
def test_every_kind_of_write_into_a_mask_is_seen(write, features):
    model, sparsifier = small(features=features, feature_dim=1, mask_fn=lambda d, level: torch.ones_like(d))
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    held = sparsifier.get_mask("0")[0] if features else sparsifier.get_mask("0")
    sparsifier.squash_mask()
    model(x)
    write(held)
    model(x)
    assert not model[0].activation_mask.reshape(-1)[0]
    assert (sparsifier.get_mask("0")[0] if features else sparsifier.get_mask("0")) is held
