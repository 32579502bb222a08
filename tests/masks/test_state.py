"""Saving, loading, copying and pickling a sparsifier."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from sparsifiers import above, add, batch_mean, only, ready, same, small, small_masked
from torch import nn

import deadband
from deadband.masks.snapshot import LayerSnapshot
from deadband.masks.sparsifier import ActivationSparsifier


def test_squashing_without_masking_stays_off_after_a_reload():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    expected = model(x)
    sparsifier.step()
    sparsifier.squash_mask(attach_sparsify_hook=False)
    for portable in (False, True):
        other = small()[0]
        loaded = ActivationSparsifier(other, add, batch_mean, above)
        loaded.load_state_dict(sparsifier.state_dict(portable=portable))
        assert torch.equal(other(x), expected)
        assert not other[0]._forward_pre_hooks
        twice = small()[1]
        twice.load_state_dict(loaded.state_dict(portable=portable))
        assert not twice.model[0]._forward_pre_hooks
    sparsifier.squash_mask()  # and can be put on
    assert not torch.equal(model(x), expected)


def test_loading_twice_or_into_a_used_sparsifier_leaves_one_hook():
    model, sparsifier = small()
    x = torch.ones(4, 6)
    model(x)
    state = sparsifier.state_dict()
    sparsifier.load_state_dict(state)
    sparsifier.load_state_dict(state)
    assert len(model[0]._forward_pre_hooks) == 1
    model(x)
    assert torch.equal(sparsifier.data_groups["0"]["data"], 2 * x)
    used = small()[1]
    used.model(x)
    used.step()
    used.squash_mask()
    used.load_state_dict(state)
    assert len(used.model[0]._forward_pre_hooks) == 1
    assert "0.activation_mask" not in used.model.state_dict()
    used.model(x)
    assert torch.equal(used.data_groups["0"]["data"], 2 * x)


def test_a_state_of_another_layer_is_refused_and_nothing_changes():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    model(x)
    conv = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Linear(8, 5))
    wide = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 5))
    for other in (conv, wide):
        target = ready(other)
        target.register_layer(other[2])
        for portable in (False, True):
            with pytest.raises(ValueError, match=r"layer '0' is a .*; the state was saved for a Linear of 6"):
                target.load_state_dict(
                    sparsifier.state_dict(portable=portable),
                    **(
                        {"functions": {"aggregate_fn": add, "reduce_fn": batch_mean, "mask_fn": above}}
                        if portable
                        else {}
                    ),
                )
            assert list(target.data_groups) == ["2"]
            assert len(other[2]._forward_pre_hooks) == 1


def test_loading_leaves_the_given_dict_alone():
    model, sparsifier = small()
    model(torch.randn(4, 6))
    state = sparsifier.state_dict()
    keys = {name: set(config) for name, config in state["data_groups"].items()}
    first, second = small()[1], small()[1]
    first.load_state_dict(state)
    second.load_state_dict(state)
    assert {name: set(config) for name, config in state["data_groups"].items()} == keys
    assert first.data_groups["0"]["layer"] is first.model[0]
    assert second.data_groups["0"]["layer"] is second.model[0]
    before = sparsifier.data_groups["0"]["data"].clone()
    first.model(torch.randn(4, 6))
    assert torch.equal(sparsifier.data_groups["0"]["data"], before)
    assert torch.equal(second.data_groups["0"]["data"], before)


def test_loading_is_all_or_nothing():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    model(x)
    state = sparsifier.state_dict()
    missing = copy.copy(state)
    missing["data_groups"] = {**state["data_groups"], "nowhere": dict(state["data_groups"]["0"])}
    missing["state"] = {**state["state"], "nowhere": {"mask": None}}
    unknown = copy.copy(state)
    unknown["data_groups"] = {**state["data_groups"], "2": {**state["data_groups"]["2"], "hook_state": "odd"}}
    target_model, target = small(level=9.0)
    target_model(x)
    for bad, message in ((missing, "layer nowhere not found in the model"), (unknown, "hook_state 'odd' is not known")):
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(bad)
        assert target.defaults["sparse_config"] == {"level": 9.0}
        assert len(target_model[0]._forward_pre_hooks) == 1
        target_model(x)
    for key in ("state", "data_groups", "defaults"):
        with pytest.raises(KeyError, match=key):
            target.load_state_dict({k: v for k, v in state.items() if k != key})
    target.load_state_dict({**state, "extra": 1})


def test_a_load_that_fails_late_leaves_a_schedule_going():
    model, sparsifier = only(nn.Identity(), features=[0, 2], feature_dim=1)
    x = torch.ones(3, 4)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    saved = sparsifier.state_dict(portable=True)
    saved["groups"]["0"]["facts"]["shape"] = [3, 1]  # too few features for the masks
    target_model = nn.Sequential(nn.Identity())
    target = ready(target_model)
    target.register_layer(target_model[0])
    target.schedule(0.5, steps=2, curve="linear")
    for _ in range(2):
        target_model(x)
        target.step()
    expected = target_model(x)
    functions = {"aggregate_fn": add, "reduce_fn": batch_mean, "mask_fn": above}
    with pytest.raises(ValueError, match="damaged one .*feature 2 is out of range.*nothing has changed"):
        target.load_state_dict(saved, functions)
    assert torch.equal(target_model(x), expected)
    target.step()
    assert target.get_mask("0").sum() == 2
    assert target.data_groups["0"]["hook_state"] == "sparsify"


@pytest.mark.parametrize("portable", [False, True])
def test_prefixes_of_wrappers_do_not_matter(portable):
    bare, plain = small()
    wrapped = nn.Module()
    wrapped.module = copy.deepcopy(bare)
    other = ActivationSparsifier(wrapped, add, batch_mean, above, level=1.0)
    other.register_layer(wrapped.module[0])
    x = torch.randn(4, 6)
    wrapped.module(x)
    other.step()
    assert list(other.data_groups) == ["module.0"]
    plain.load_state_dict(other.state_dict(portable=portable))
    assert list(plain.data_groups) == ["0"]
    same(plain.get_mask("module.0"), other.get_mask("module.0"))
    other.load_state_dict(plain.state_dict(portable=portable))
    assert list(other.data_groups) == ["module.0"]
    compiled = torch.compile(bare, backend="eager")
    third = ActivationSparsifier(compiled, add, batch_mean, above)
    third.load_state_dict(plain.state_dict(portable=portable))
    assert list(third.data_groups) == ["_orig_mod.0"]


def test_a_state_fits_layers_that_were_changed_since():
    model, sparsifier = small()
    model(torch.randn(4, 6))
    saved = sparsifier.state_dict()
    sparsifier.unregister_layer("2")
    deadband.sparsify_(model, {"2": 0.0})
    torch.nn.utils.parametrizations.weight_norm(model[0])
    sparsifier.load_state_dict(saved)


@pytest.mark.parametrize("features", [None, [0, 3]])
def test_the_facts_of_a_snapshot_are_plain_and_complete(features):
    model, sparsifier = small(features=features, feature_dim=1)
    for change in (lambda: None, lambda: model(torch.randn(4, 6)), sparsifier.step, sparsifier.squash_mask):
        change()
        for saved in sparsifier._snapshot().layers.values():
            assert LayerSnapshot.from_facts(saved.config, json.loads(json.dumps(saved.facts))) == saved


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("stage", ["registered", "forward", "step", "squash", "off"])
@pytest.mark.parametrize("features", [None, [0, 3]])
def test_copies_of_the_sparsifier_are_independent(duplicate, stage, features):
    model, sparsifier = small(features=features, feature_dim=1)
    x = torch.randn(4, 6, requires_grad=True)
    if stage != "registered":
        model(x)
    if stage in ("step", "squash", "off"):
        sparsifier.step()
    if stage in ("squash", "off"):
        sparsifier.squash_mask(stage == "squash")
    other = duplicate(sparsifier)
    assert other.model is not model
    assert repr(other) == repr(sparsifier)
    assert len(other.model[0]._forward_pre_hooks) == len(model[0]._forward_pre_hooks) == (stage != "off")
    assert torch.equal(other.model(x), model(x))
    if stage in ("registered", "forward", "step"):
        other.model(x)
        data = [
            torch.cat(s.data_groups["0"]["data"]) if features else s.data_groups["0"]["data"]
            for s in (other, sparsifier)
        ]
        assert not torch.equal(*data)
        other.step()
        assert "data" in sparsifier.data_groups["0"]
    other.unregister_layer("0")
    assert not other.model[0]._forward_pre_hooks
    assert len(model[0]._forward_pre_hooks) == (stage != "off")


def test_torch_save_of_model_and_sparsifier():
    model, sparsifier, x = small_masked()
    file = io.BytesIO()
    torch.save([model, sparsifier], file)
    file.seek(0)
    loaded, other = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    assert other.model is loaded
    assert len(loaded[0]._forward_pre_hooks) == 1


def test_a_model_may_hold_its_sparsifier():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.sparsifier = ActivationSparsifier(self, add, batch_mean, above, level=1.0)
            self.sparsifier.register_layer(self.fc)

        def forward(self, x):
            return self.fc(x)

    x = torch.randn(3, 4)
    for ran in (False, True):
        model = Holder()
        if ran:
            model(x)
        other = copy.deepcopy(model)
        assert other.sparsifier.model is other
        other(x)
        other.sparsifier.step()
        other.sparsifier.squash_mask()
        assert not torch.equal(other(x), other.fc.forward(x))
        assert "mask" not in "".join(model.state_dict())


def test_shallow_copies_are_refused():
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(small()[1])
