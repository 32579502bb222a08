"""Registering layers, making masks and putting them in force."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import tiny_batches, tiny_model
from sparsifiers import above, add, batch_mean, convnet, ready, same, small
from torch import nn

import deadband
from deadband.masks import aggregate, mask
from deadband.masks.sparsifier import ActivationSparsifier, LayerError

KEYS = {
    "aggregate_fn", "feature_dim", "features", "hook", "hook_state", "layer", "mask_fn", "reduce_fn", "sparse_config",
}  # fmt: skip


def test_constructor():
    sparsifier = ActivationSparsifier(3, features=[1], sparsity=0.5)
    assert set(sparsifier.defaults) == {
        "sparse_config", "aggregate_fn", "reduce_fn", "mask_fn", "features", "feature_dim"
    }  # fmt: skip
    assert sparsifier.defaults["aggregate_fn"] is None
    assert sparsifier.defaults["sparse_config"] == {"sparsity": 0.5}
    assert sparsifier.model == 3
    assert sparsifier.data_groups == {}
    assert sparsifier.state == {}


def test_registering():
    model, sparsifier = small()
    config = sparsifier.data_groups["0"]
    assert set(config) == KEYS
    assert config["hook_state"] == "aggregate"
    assert config["layer"] is model[0]
    assert sparsifier.state["0"] == {"mask": None}
    sparsifier.register_layer(model, level=3.0)  # the root model has the empty name
    assert sparsifier.data_groups[""]["sparse_config"] == {"level": 3.0}
    model(torch.ones(2, 6))
    model(torch.ones(2, 6))
    assert torch.equal(sparsifier.data_groups[""]["data"], torch.full((2, 6), 2.0))
    assert len(model._forward_pre_hooks) == 1
    with pytest.raises(AssertionError, match="layer not found in the model"):
        sparsifier.register_layer(nn.Linear(6, 8))


def test_registering_again_warns_and_takes_the_new_arguments():
    model, sparsifier = small()
    with pytest.warns(UserWarning, match="layer already attached to the sparsifier"):
        sparsifier.register_layer(model[0], level=7.0)
    assert sparsifier.data_groups["0"]["sparse_config"] == {"level": 7.0}
    assert len(model[0]._forward_pre_hooks) == 1


@pytest.mark.parametrize("missing", ["aggregate_fn", "reduce_fn", "mask_fn"])
def test_a_missing_function_is_named(missing):
    model = nn.Sequential(nn.Linear(2, 2))
    functions = {"aggregate_fn": add, "reduce_fn": batch_mean, "mask_fn": above, missing: None}
    with pytest.raises(AssertionError, match=f"must be callable: {missing} of layer '0'"):
        ActivationSparsifier(model, **functions).register_layer(model[0])


def test_features_need_a_dimension():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AssertionError, match="need feature dim"):
        ActivationSparsifier(model, add, batch_mean, above, features=[0]).register_layer(model[0])


@pytest.mark.parametrize("bad", [[1, 1], [1.9], [True, False], [[0, 1]], ["0"]])
def test_bad_features_are_errors_that_leave_the_layer_registered(bad):
    model, sparsifier = small()
    before = sparsifier.data_groups["0"]
    with pytest.raises((TypeError, ValueError), match="layer '0': features"):
        sparsifier.register_layer(model[0], features=bad, feature_dim=1)
    assert sparsifier.data_groups["0"] is before
    assert len(model[0]._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    "features", [range(1, 6, 2), (1, 3, 5), {1, 3, 5}, (i for i in (1, 3, 5)), torch.tensor([1, 3, 5]), [-5, -3, -1]]
)
def test_features_may_come_in_many_forms(features):
    model, sparsifier = small()
    sparsifier.unregister_layer("0")
    sparsifier.register_layer(model[0], features=features, feature_dim=-1, mask_fn=lambda d, level: torch.zeros_like(d))
    model(torch.randn(4, 6))
    sparsifier.step()
    sparsifier.squash_mask()
    assert model[0].activation_mask.tolist() == [[True, False, True, False, True, False]]


def test_a_default_of_features_can_be_switched_off():
    model, sparsifier = small(features=[0], feature_dim=1)
    sparsifier.unregister_layer("0")
    sparsifier.register_layer(model[0], features="all")
    assert sparsifier.data_groups["0"]["features"] is None
    model(torch.randn(2, 6))
    assert sparsifier.get_mask("0").shape == (2, 6)
    assert sparsifier.defaults["features"] == [0]


def test_options_of_the_constructor_are_not_for_layers():
    model, sparsifier = small()
    with pytest.raises(TypeError, match="synchronise is for all layers; pass it to the constructor"):
        sparsifier.register_layer(model[0], synchronise=False)


def test_functions_stay_the_objects_they_are():
    class Owner:
        def __init__(self):
            self.lock = threading.Lock()
            self.seen = 0

        def aggregate(self, a, b):
            with self.lock:
                self.seen += 1
            return a + b

        __call__ = aggregate

    owner = Owner()
    for fn in (owner.aggregate, owner):
        before = owner.seen
        model, sparsifier = small(aggregate_fn=fn)
        model(torch.randn(2, 6))
        assert owner.seen == before + 2
        assert sparsifier.data_groups["0"]["aggregate_fn"] == fn


def test_unregistering_what_is_not_registered():
    model, sparsifier = small()
    with pytest.raises(KeyError, match=r"'zz'; registered are '0', '2'"):
        sparsifier.unregister_layer("zz")
    assert list(sparsifier.data_groups) == ["0", "2"]
    assert "zz" not in sparsifier.state
    sparsifier.unregister_layer("0")
    assert not model[0]._forward_pre_hooks
    assert "0" not in sparsifier.state


def test_layers_of_the_same_bare_name_are_told_apart():
    model = nn.Module()
    model.fc = nn.Linear(3, 3)
    model.module = nn.Module()
    model.module.fc = nn.Linear(3, 3)
    sparsifier = ready(model)
    sparsifier.register_layer(model.module.fc)
    model.module.fc(torch.randn(2, 3))
    for ask in (lambda: sparsifier.get_mask("fc"), lambda: sparsifier.unregister_layer("fc")):
        with pytest.raises(LayerError, match="not found: 'fc'"):
            ask()


def test_get_mask():
    model, sparsifier = small()
    with pytest.raises(AssertionError, match="name or layer"):
        sparsifier.get_mask()
    with pytest.raises(AssertionError, match="not found"):
        sparsifier.get_mask(layer=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="layer with the given name not found"):
        sparsifier.get_mask("1")
    with pytest.raises(ValueError, match=r"shape unknown.*'0'"):
        sparsifier.get_mask("0")
    model(torch.randn(3, 6))
    assert torch.equal(sparsifier.get_mask(layer=model[0]), torch.ones(3, 6))
    assert sparsifier.get_mask("0") is sparsifier.state["0"]["mask"]


def test_update_mask_can_be_overridden():
    class Half(ActivationSparsifier):
        def update_mask(self, name, data, configs):
            self.state[name]["mask"] = torch.arange(data.shape[-1]) % 2 == 0

    model = nn.Sequential(nn.Linear(4, 2))
    sparsifier = Half(model, add, batch_mean, above)
    sparsifier.register_layer(model[0])
    model(torch.ones(2, 4))
    sparsifier.step()
    sparsifier.squash_mask()
    assert model[0].activation_mask.tolist() == [True, False, True, False]


def test_step_names_the_layer_that_has_not_run_and_changes_nothing():
    model, sparsifier = small()
    with pytest.raises(LayerError, match=r"no input has reached '0', '2' since the last step"):
        sparsifier.step()
    model[0](torch.randn(4, 6))
    with pytest.raises(KeyError, match=r"no input has reached '2'"):
        sparsifier.step()
    assert torch.equal(sparsifier.get_mask("0"), torch.ones(4, 6))
    assert "data" in sparsifier.data_groups["0"]
    model[2](torch.randn(4, 8))
    sparsifier.step()
    with pytest.raises(LayerError, match="since the last step"):
        sparsifier.step()
    sparsifier.squash_mask()
    with pytest.raises(LayerError, match=r"step\(\) after squash_mask"):
        sparsifier.step()
    ActivationSparsifier(model).step()  # nothing registered, nothing to do


@pytest.mark.parametrize("bad", [lambda d, level: None, lambda d, level: 1.0, lambda d, level: 1 / 0])
@pytest.mark.parametrize("features", [None, [0, 1]])
def test_a_mask_function_that_fails_changes_no_mask(bad, features):
    model, sparsifier = small(features=features, feature_dim=1)
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    model(x)
    sparsifier.data_groups["2"]["mask_fn"] = bad
    held = copy.deepcopy(sparsifier.get_mask("0"))
    data = sparsifier.data_groups["0"]["data"]
    with pytest.raises((TypeError, ZeroDivisionError)) as caught:
        sparsifier.step()
    if hasattr(caught.value, "__notes__"):
        assert "of layer '2'" in caught.value.__notes__[0]
    same(sparsifier.get_mask("0"), held)
    assert sparsifier.data_groups["0"]["data"] is data


def test_a_mask_function_may_unregister_its_layer():
    model, sparsifier = small()
    model(torch.randn(4, 6))
    original = sparsifier.data_groups["0"]["mask_fn"]

    def drop(data, level):
        sparsifier.unregister_layer("2")
        return original(data, level)

    sparsifier.data_groups["0"]["mask_fn"] = drop
    sparsifier.step()
    assert list(sparsifier.data_groups) == ["0"]


def test_squash_before_any_input_changes_nothing():
    model, sparsifier = small()
    model[0](torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"shape unknown.*'2'"):
        sparsifier.squash_mask()
    assert [config["hook_state"] for config in sparsifier.data_groups.values()] == ["aggregate"] * 2
    model(torch.randn(4, 6))
    sparsifier.step()
    sparsifier.squash_mask()
    sparsifier.squash_mask()
    assert len(model[0]._forward_pre_hooks) == 1
    sparsifier.squash_mask(False)
    sparsifier.unregister_layer("0")
    sparsifier.register_layer(model[0])
    sparsifier.unregister_layer(model[2])
    model(torch.randn(4, 6))
    sparsifier.step()
    sparsifier.squash_mask()


def test_squashing_before_a_step_masks_nothing_at_any_shape():
    model, sparsifier = small()
    model(torch.randn(4, 6))
    sparsifier.squash_mask()
    for rows in (4, 2, 7):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(model(x), small()[0](x))
    assert sparsifier.get_mask("0").shape == (4, 6)


def test_squashing_again_without_masking_takes_the_masks_off():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    expected = model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    sparsifier.squash_mask(False)
    assert torch.equal(model(x), expected)
    assert "0.activation_mask" not in model.state_dict()


def test_squash_is_all_or_nothing():
    model, sparsifier = small()
    sparsifier.register_layer(
        nn.Sequential(model)[0][1], features=[0, 1], feature_dim=1, mask_fn=lambda d, level: torch.ones(3)
    )
    model(torch.randn(4, 6))
    sparsifier.step()
    with pytest.raises(ValueError, match="layer '1': masks of shapes"):
        sparsifier.squash_mask()
    assert {config["hook_state"] for config in sparsifier.data_groups.values()} == {"aggregate"}
    assert not [name for name in model.state_dict() if "mask" in name]
    assert all("hook" in config for config in sparsifier.data_groups.values())


def test_masks_may_be_preset_before_any_step():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    model(x)
    sparsifier.get_mask("0")[:, 2] = 0
    sparsifier.squash_mask()
    assert model[0].activation_mask[:, 2].any().item() is False
    model(x)


def test_two_sparsifiers_on_one_layer_apply_in_order():
    layer = nn.Identity()
    model = nn.Sequential(layer)
    x = torch.ones(2, 3)
    masks = [torch.tensor([1.0, 1, 0]), torch.tensor([0.0, 1, 1])]
    sparsifiers = [ActivationSparsifier(model, add, batch_mean, lambda d, m=m: m) for m in masks]
    for each in sparsifiers:
        each.register_layer(layer)
    model(x)
    for each in sparsifiers:
        each.step()
        each.squash_mask()
    assert model(x)[0].tolist() == [0, 1, 0]
    assert {"0.activation_mask", "0.activation_mask_2"} == set(model.state_dict())
    sparsifiers[0].unregister_layer("0")
    assert model(x)[0].tolist() == [0, 1, 1]


def test_masks_by_feature():
    model = convnet()
    sparsifier = ready(model)
    sparsifier.register_layer(model[4])
    sparsifier.register_layer(model[0], features=[0, 1], mask_fn=mask.top_k, k=1, sparsity=None)
    sparsifier.data_groups["0"]["sparse_config"].pop("sparsity")
    model(torch.randn(2, 3, 8, 8) * torch.tensor([1.0, 3.0, 0.1]).view(3, 1, 1))
    with pytest.raises(LayerError, match="has no mask yet"):
        sparsifier.masks()
    sparsifier.step()
    masks = sparsifier.masks()
    assert masks["0"].tolist() == [False, True, True]
    assert masks["4"].dtype == torch.bool
    assert masks["4"].sum() == 144
    user_model, user = small(features=[1, 2], feature_dim=1)
    user_model(torch.randn(3, 6))
    user.step()
    assert user.masks()["0"].tolist() == [True, False, False, True, True, True]


def test_a_calibration_through_the_same_hooks():
    model = tiny_model("llama")
    batches = tiny_batches(3)
    expected = deadband.calibrate(model, batches, progress=False)
    sparsifier = ActivationSparsifier(model, aggregate.statistics)
    for name in expected.sites:
        sparsifier.register_layer(model.get_submodule(name))
    with pytest.raises(LayerError, match="no input has reached"):
        sparsifier.calibration()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    made = sparsifier.calibration()
    assert made.sites.keys() == expected.sites.keys()
    for name, site in expected.sites.items():
        assert (made.sites[name].histogram == site.histogram).all()
        assert made.sites[name].sample == site.sample
    deadband.sparsify_(model, made.allocate(0.4))
    with pytest.raises(LayerError, match=r"aggregate\.statistics"):
        small()[1].calibration()
