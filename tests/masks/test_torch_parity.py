"""ActivationSparsifier beside torch's own class: the same workflow, bit for bit."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from sparsifiers import above, add, batch_mean, convnet, only, same, same_as_torchs, small
from torch import nn
from torch.ao.pruning._experimental.activation_sparsifier.activation_sparsifier import (
    ActivationSparsifier as TorchSparsifier,
)

from deadband.masks.sparsifier import ActivationSparsifier


def workflow(sparsifier_class, dtype, features, reload_at=None, squash=True):
    """Every stage of the usual workflow, with what can be seen at each of them."""
    torch.manual_seed(1)
    inputs = [torch.randn(4, 3, 8, 8, dtype=dtype) for _ in range(4)]
    model = convnet(dtype)
    chosen = {"features": [0, 2], "feature_dim": 1} if features else {}
    sparsifier = sparsifier_class(model, add, batch_mean, above, level=0.5)
    seen = []

    def look(stage):
        nonlocal sparsifier, model
        saved = sparsifier.state_dict()
        keys = {name: sorted(config) for name, config in saved["data_groups"].items()}
        if stage == reload_at:
            model = convnet(dtype)
            sparsifier = sparsifier_class(model)
            sparsifier.load_state_dict(saved)
        assert set(saved) == {"state", "data_groups", "defaults"}
        seen.append(dict(sparsifier.defaults))
        seen.append(list(sparsifier.data_groups))
        for name, config in sparsifier.data_groups.items():
            shown = {key: value for key, value in config.items() if key not in ("hook", "layer", "data")}
            seen.append((stage, name, sorted(config), shown))
            seen.append(config.get("data"))
            seen.append(sparsifier.state[name]["mask"])
            seen.append(saved["state"][name]["mask"])
            seen.append(keys[name])
            seen.append(config["layer"] is model.get_submodule(name))
        seen.append(repr(sparsifier))

    look("constructor")
    for index in (0, 2, 4):
        sparsifier.register_layer(model[index], **(chosen if index != 4 else {}), level=index / 4)
    look("register")
    for x in inputs[:2]:
        seen.append(model(x))
    look("forward")
    sparsifier.step()
    look("step")
    seen.append(model(inputs[2]))
    look("forward again")
    sparsifier.step()
    look("step again")
    sparsifier.squash_mask(attach_sparsify_hook=squash)
    look("squash")
    for x in inputs:
        seen.append(model(x.clone()))
    look("masked")
    return seen


STAGES = ["constructor", "register", "forward", "step", "forward again", "step again", "squash", "masked"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [False, True])
def test_the_workflow_is_torchs_bit_for_bit(dtype, features):
    same(workflow(ActivationSparsifier, dtype, features), workflow(TorchSparsifier, dtype, features))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("features", [False, True])
def test_a_reload_at_any_stage_is_torchs(stage, features):
    ours = workflow(ActivationSparsifier, torch.float32, features, reload_at=stage)
    same(ours, workflow(TorchSparsifier, torch.float32, features, reload_at=stage))


def test_squashing_without_masking_is_torchs():
    ours = workflow(ActivationSparsifier, torch.float32, False, squash=False)
    same(ours, workflow(TorchSparsifier, torch.float32, False, squash=False))


def test_state_dicts_go_both_ways():
    model, ours = small()
    model(torch.randn(4, 6))
    ours.step()
    theirs = TorchSparsifier(copy.deepcopy(model))
    theirs.load_state_dict(ours.state_dict())
    same(theirs.get_mask("2"), ours.get_mask("2"))
    back = ActivationSparsifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)))
    back.load_state_dict(theirs.state_dict())
    same(back.get_mask("2"), ours.get_mask("2"))


def test_squash_then_step_makes_masks_as_in_torch():
    def results(model, sparsifier):
        x = torch.arange(12.0).view(3, 4)
        model(x)
        sparsifier.squash_mask()
        sparsifier.step()
        return model(x)

    assert (same_as_torchs(results) == 0).any()


def test_a_mask_replaced_after_squashing_holds_from_the_next_squash():
    def results(model, sparsifier):
        x = torch.arange(12.0).view(3, 4)
        model(x)
        sparsifier.step()
        sparsifier.squash_mask()
        sparsifier.state["0"]["mask"] = torch.zeros(4)
        before = model(x)
        sparsifier.squash_mask()
        return [before, model(x)]

    same_as_torchs(results)


def test_writes_into_the_data_of_features_count():
    def results(model, sparsifier):
        model(torch.ones(3, 4))
        model(torch.ones(3, 4))
        sparsifier.data_groups["0"]["data"][0] = torch.full((3, 1), 7.0)
        model(torch.ones(3, 4))
        return sparsifier.data_groups["0"]["data"]

    same_as_torchs(results, features=[0, 2], feature_dim=1)


def test_torch_states_of_features_compile_before_they_have_run():
    torch_model, theirs = only(nn.Linear(6, 2), TorchSparsifier, features=[0, 3], feature_dim=1)
    torch_model(torch.randn(4, 6))
    theirs.step()
    theirs.squash_mask()
    model = nn.Sequential(nn.Linear(6, 2))
    model.load_state_dict(torch_model.state_dict())
    sparsifier = ActivationSparsifier(model)
    sparsifier.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 6)
    expected = torch_model(x.clone())
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


def test_nothing_of_torch_ao_is_imported():
    found = "print(sorted(m for m in sys.modules if m.startswith('torch.ao')))"
    code = f"import sys, deadband; deadband.ActivationSparsifier; {found}"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch.ao.pruning" not in modules
