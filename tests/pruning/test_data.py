"""Sparsifiers of tensors and embeddings."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from deadband.pruning import DataNormSparsifier


def test_data_stay_where_they_are_until_the_mask_is_squashed():
    tensor, embedding = torch.randn(8, 8), nn.Embedding(6, 8)
    parameter, bag = nn.Parameter(torch.randn(4, 4)), nn.EmbeddingBag(5, 4)
    data = {"a": tensor, "b": embedding, "c": parameter, "d": bag}
    before = {"a": tensor.clone(), "b": embedding.weight.detach().clone()}
    sparsifier = DataNormSparsifier(list(data.items()))
    sparsifier.step()
    assert sparsifier.get_data("a") is tensor
    assert sparsifier.get_data("b") is embedding.weight
    masked = sparsifier.get_data("b", return_original=False)
    assert (masked == 0).float().mean() == 0.5
    assert torch.equal(embedding.weight, before["b"])
    sparsifier.squash_mask(names=["b"])
    assert torch.equal(embedding.weight, masked)
    assert torch.equal(tensor, before["a"])
    with pytest.raises(ValueError, match="squashed"):
        sparsifier.get_data("b")
    sparsifier.step()
    sparsifier.squash_mask(names=["a"], leave_parametrized=False)
    assert torch.equal(sparsifier.get_data("a", False), before["a"])
    sparsifier.squash_mask()
    sparsifier.squash_mask()
    assert (parameter == 0).float().mean() == 0.5


@pytest.mark.parametrize("shape", [(8,), (1, 1), (5, 7), (8, 1), (4, 3, 5), (2, 3, 4, 4), (0, 4), (2, 1, 8)])
@pytest.mark.parametrize("zeros", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_shape_and_dtype_works(shape, zeros, dtype):
    data = torch.randn(shape).to(dtype)
    sparsifier = DataNormSparsifier([("x", data)], zeros_per_block=zeros, sparsity_level=0.5)
    sparsifier.step()
    mask = sparsifier.get_mask("x")
    assert mask.shape == data.shape
    assert mask.dtype == dtype
    assert torch.equal(sparsifier.get_data("x", False), torch.where(mask == 0, 0, data))


@pytest.mark.parametrize("name", ["a.b", "training", "_apply", "", "a b"])
def test_every_name_works(name):
    sparsifier = DataNormSparsifier()
    sparsifier.add_data(name, torch.randn(4, 4), sparsity_level=0.25)
    sparsifier.step()
    assert (sparsifier.get_mask(name) == 0).float().mean() == 0.25
    fresh = DataNormSparsifier()
    fresh.load_state_dict(sparsifier.state_dict())
    assert torch.equal(fresh.get_mask(name), sparsifier.get_mask(name))
    assert fresh.data_groups[name]["sparsity_level"] == 0.25


def test_data_of_a_known_name_take_its_place():
    first, second = torch.randn(4, 4), torch.randn(4, 4)
    sparsifier = DataNormSparsifier([("x", first)])
    sparsifier.data_groups["x"]["sparsity_level"] = 0.75
    sparsifier.step()
    mask = sparsifier.get_mask("x")
    with pytest.warns(UserWarning, match="takes the place"):
        masked = sparsifier.add_data("x", second)
    assert sparsifier.get_mask("x") is mask
    assert sparsifier.data_groups["x"]["sparsity_level"] == 0.75
    assert torch.equal(masked, second * mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AssertionError, match=r"\[2, 2\]"):
            sparsifier.add_data("x", torch.randn(2, 2))
        sparsifier.add_data("x", torch.randn(2, 2), reuse_mask=False)
    assert sparsifier.get_mask("x").shape == (2, 2)
    with pytest.raises(AssertionError, match="expected a Tensor"):
        sparsifier.add_data("y", [1.0])


def test_loading_goes_into_the_live_tensors():
    embedding, other = nn.Embedding(4, 8), nn.Embedding(4, 8)
    one, two = DataNormSparsifier([("e", embedding)]), DataNormSparsifier([("e", other), ("mine", torch.ones(4, 4))])
    one.step()
    saved = one.state_dict()
    two.load_state_dict(saved, strict=False)
    assert torch.equal(other.weight, embedding.weight)
    assert two.get_data("e") is other.weight
    assert set(two.data_groups) == {"e", "mine"}
    two.load_state_dict(saved)
    assert set(two.data_groups) == {"e"}
    two.squash_mask()
    assert (other.weight == 0).float().mean() == 0.5
    assert (embedding.weight != 0).all()
    third = DataNormSparsifier()
    third.load_state_dict(two.state_dict())
    with pytest.raises(ValueError, match="squashed"):
        third.get_data("e")
    del saved["data_groups"]["e"]
    with pytest.raises(RuntimeError, match="'e'"):
        third.load_state_dict(saved)


def test_what_cannot_be_is_named():
    sparsifier = DataNormSparsifier([("x", torch.randn(4, 4))], zeros_per_block=5)
    with pytest.raises(ValueError, match="zeros_per_block"):
        sparsifier.step()
    with pytest.raises(ValueError, match="no data named 'y'"):
        sparsifier.get_mask("y")
    with pytest.raises(ValueError, match="no data named 'y'"):
        sparsifier.squash_mask(names=["x", "y"])
    assert sparsifier.get_data("x") is not None
    for method in (sparsifier.prepare, sparsifier.unprepare, sparsifier.report, sparsifier.hold_zeros):
        with pytest.raises(NotImplementedError, match="add_data"):
            method(nn.Linear(1, 1))
    with pytest.raises(AssertionError, match="norm"):
        DataNormSparsifier(norm="L3")


def test_the_last_block_may_go_and_the_first_of_equal_ones_go_first():
    sparsifier = DataNormSparsifier([("x", torch.ones(1, 40))], sparsity_level=0.95)
    sparsifier.step()
    assert not sparsifier.get_mask("x").any()
    sparsifier.data_groups["x"]["sparsity_level"] = 0.5
    sparsifier.step()
    assert sparsifier.get_mask("x").flatten().tolist() == [0] * 20 + [1] * 20


def test_masks_come_from_what_is_below_them():
    data = torch.randn(4, 8)
    sparsifier = DataNormSparsifier([("x", data)])
    sparsifier.step()
    place = tuple((sparsifier.get_mask("x") == 0).nonzero()[0])
    data[place] = 1e3
    sparsifier.step()
    assert sparsifier.get_mask("x")[place] == 1
    assert "sparsity_level: 0.5" in repr(sparsifier)
