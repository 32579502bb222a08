"""ActivationSparsifier against torch's own class, and where that class fails, against what is right."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import math
import operator
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from conftest import tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao.pruning._experimental.activation_sparsifier.activation_sparsifier import (
    ActivationSparsifier as TorchSparsifier,
)
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import deadband
from deadband.compaction.compact import compact_
from deadband.masks import aggregate, mask, reduce
from deadband.masks.entrywise import is_entrywise
from deadband.masks.sparsifier import ActivationSparsifier, LayerError
from deadband.ops.skipping import apply_mask

KEYS = {
    "aggregate_fn", "feature_dim", "features", "hook", "hook_state", "layer", "mask_fn", "reduce_fn", "sparse_config",
}  # fmt: skip


def add(a, b):
    return a + b


def batch_mean(data):
    return data.mean(0)


def above(data, level):
    return (data.abs() > data.abs().float().mean() * level).to(data.dtype)


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


# ------------------------------------------------------------------------------------------------------- the contract


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


def test_nothing_of_torch_ao_is_imported():
    found = "print(sorted(m for m in sys.modules if m.startswith('torch.ao')))"
    code = f"import sys, deadband; deadband.ActivationSparsifier; {found}"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "torch.ao.pruning" not in modules


# --------------------------------------------------------------------------------- silently wrong results, made right


def test_an_lstm_keeps_its_state():
    lstm = nn.LSTM(4, 6, batch_first=True)
    model, sparsifier = only(lstm, mask_fn=lambda data, level: torch.ones_like(data))
    x, state = torch.randn(2, 5, 4), (torch.randn(1, 2, 6), torch.randn(1, 2, 6))
    expected = lstm(x, state)[0]
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(lstm(x, state)[0], expected)
    assert torch.equal(lstm(x, hx=state)[0], expected)


def test_attention_keeps_key_and_value():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model, sparsifier = only(attention, mask_fn=lambda data, level: torch.ones_like(data))
    q, k, v = torch.randn(3, 2, 5, 8)
    expected = attention(q, k, v)[0]
    assert torch.equal(attention(query=q, key=k, value=v, need_weights=True)[0], expected)
    sparsifier.step()
    sparsifier.squash_mask()
    torch.testing.assert_close(attention(q, k, v)[0], expected)
    torch.testing.assert_close(attention(query=q, key=k, value=v)[0], expected)


def test_layers_of_transformers_called_by_keyword():
    model = tiny_model("llama")
    sparsifier = ready(model)
    attention = model.model.layers[0].self_attn
    for layer in (attention, model.model.layers[1], model.model.layers[1].mlp.down_proj):
        sparsifier.register_layer(layer)
    batch = tiny_batches(1)[0]
    expected = model(**batch).logits
    assert torch.equal(model(**batch).logits, expected)
    sparsifier.step()
    sparsifier.squash_mask()
    seen = {}
    handle = attention.q_proj.register_forward_pre_hook(lambda _, args: seen.setdefault("x", args[0]))
    assert model(**batch).logits.isfinite().all()
    handle.remove()
    keep = sparsifier.get_mask(layer=attention)
    assert keep.sum() == 32
    assert (seen["x"][..., ~keep] == 0).all()
    assert (seen["x"][..., keep] != 0).all()


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


def test_squashing_again_without_masking_takes_the_masks_off():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    expected = model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    sparsifier.squash_mask(False)
    assert torch.equal(model(x), expected)
    assert "0.activation_mask" not in model.state_dict()


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


def test_each_call_of_a_layer_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x), self.fc(2 * x)

    model = Twice()
    sparsifier = ready(model, aggregate_fn=aggregate.mean)
    sparsifier.register_layer(model.fc)
    model(torch.ones(4, 3))
    torch.testing.assert_close(sparsifier.data_groups["fc"]["data"], torch.full((3,), 1.5).double())
    assert sparsifier.data_groups["fc"]["rows"] == 8


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_batch_once(reentrant):
    model, sparsifier = small()
    x = torch.randn(4, 6, requires_grad=True)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(sparsifier.data_groups["0"]["data"], x)
    assert x.grad is not None


def test_a_short_batch_is_not_broadcast():
    model, sparsifier = only(nn.Linear(3, 2))
    a, b = torch.randn(4, 3), torch.randn(1, 3)
    model(a)
    model(b)
    expected = a.clone()
    expected[:1] += b
    assert torch.equal(sparsifier.data_groups["0"]["data"], expected)


@pytest.mark.parametrize("bad", [[1, 1], [1.9], [True, False], [[0, 1]], ["0"]])
def test_bad_features_are_errors_that_leave_the_layer_registered(bad):
    model, sparsifier = small()
    before = sparsifier.data_groups["0"]
    with pytest.raises((TypeError, ValueError), match="layer '0': features"):
        sparsifier.register_layer(model[0], features=bad, feature_dim=1)
    assert sparsifier.data_groups["0"] is before
    assert len(model[0]._forward_pre_hooks) == 1


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


def test_indices_beyond_float32_are_exact():
    size = 2**24 + 2
    layer = nn.Identity()
    model, sparsifier = only(layer, features=[2**24 + 1], feature_dim=0, reduce_fn=lambda d: d, level=0.0)
    x = torch.zeros(size)
    x[2**24 + 1] = 1
    model(x)
    assert sparsifier.data_groups["0"]["data"][0].tolist() == [1]


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


@pytest.mark.parametrize("options", [{}, {"features": [0, 3], "feature_dim": 1}, {"aggregate_fn": aggregate.mean}])
def test_what_was_aggregated_follows_the_model(options):
    model, sparsifier = small(**options)
    model(torch.randn(4, 6))
    model.to("meta")
    model(torch.randn(4, 6, device="meta"))
    data = sparsifier.data_groups["0"]["data"]
    assert (data[0] if isinstance(data, list) else data).device.type == "meta"


def test_scaling_masks_are_kept_as_they_are():
    model, sparsifier = only(nn.Identity(), mask_fn=lambda d, level: torch.tensor([0.5, 0.0, 2.0]))
    model(torch.ones(2, 3))
    sparsifier.step()
    sparsifier.squash_mask()
    assert model(torch.tensor([[1.0, float("nan"), 1.0]])).tolist() == [[0.5, 0.0, 2.0]]
    assert model[0].activation_mask.dtype == torch.float32
    assert model(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_copies_of_the_model_do_not_feed_the_sparsifier():
    model, sparsifier = small()
    model(torch.ones(4, 6))
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        duplicate(torch.ones(4, 6))
        assert torch.equal(sparsifier.data_groups["0"]["data"], torch.ones(4, 6))


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
    model, sparsifier = small()
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    file = io.BytesIO()
    torch.save([model, sparsifier], file)
    file.seek(0)
    loaded, other = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    assert other.model is loaded
    assert len(loaded[0]._forward_pre_hooks) == 1


def test_threads_lose_nothing():
    model, sparsifier = only(nn.Identity())
    one = torch.ones(2, 3)

    def work():
        for _ in range(400):
            model(one)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(sparsifier.data_groups["0"]["data"], 1600 * one)


def test_what_is_aggregated_is_no_alias_of_an_activation():
    model, sparsifier = only(nn.Identity(), aggregate_fn=lambda a, b: b)
    x = torch.ones(2, 3)
    model(x)
    x.zero_()
    assert torch.equal(sparsifier.data_groups["0"]["data"], torch.ones(2, 3))


def test_hooks_that_aggregate_go_with_the_sparsifier_and_masks_stay():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    del sparsifier
    gc.collect()
    assert not model[0]._forward_pre_hooks
    assert not model._forward_pre_hooks
    model, sparsifier = small()
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    expected = model(x)
    del sparsifier
    gc.collect()
    assert torch.equal(model(x), expected)


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


def test_a_default_of_features_can_be_switched_off():
    model, sparsifier = small(features=[0], feature_dim=1)
    sparsifier.unregister_layer("0")
    sparsifier.register_layer(model[0], features="all")
    assert sparsifier.data_groups["0"]["features"] is None
    model(torch.randn(2, 6))
    assert sparsifier.get_mask("0").shape == (2, 6)
    assert sparsifier.defaults["features"] == [0]


# ------------------------------------------------------------------------------------------------------------ crashes


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


def test_squashing_before_a_step_masks_nothing_at_any_shape():
    model, sparsifier = small()
    model(torch.randn(4, 6))
    sparsifier.squash_mask()
    for rows in (4, 2, 7):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(model(x), small()[0](x))
    assert sparsifier.get_mask("0").shape == (4, 6)


@pytest.mark.parametrize("arguments", [({"a": 1},), ((torch.ones(2),),), (None,), (3,)])
def test_inputs_that_are_no_tensor(arguments):
    class Any(nn.Module):
        def forward(self, x=None):
            return x

    layer = Any()
    only_model, sparsifier = only(layer)
    with pytest.raises(TypeError, match="layer '0' got .* as its first argument; expected a tensor"):
        layer(*arguments)
    with pytest.raises(TypeError, match="layer '0' was called without a tensor"):
        layer()
    with pytest.raises(TypeError, match="expected a dense one"):
        layer(torch.eye(2).to_sparse())
    layer(x=torch.ones(1, 2))
    assert sparsifier.get_mask("0").shape == (1, 2)


def identity_mask(data, level):
    return torch.ones_like(data)


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


def test_calibration_in_inference_mode():
    for make in (small, lambda: (lambda m: (m, ready(m)))(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)))):
        model, sparsifier = make()
        if not sparsifier.data_groups:
            sparsifier.register_layer(model[0])
        with torch.inference_mode():
            model(torch.randn(4, 6))
            model(torch.randn(4, 6))
            sparsifier.step()
            sparsifier.squash_mask()
            model(torch.randn(4, 6))
        repr(sparsifier)
        model(torch.randn(4, 6, requires_grad=True)).sum().backward()
        sparsifier.get_mask("0").zero_()


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


def test_sparse_masks():
    model, sparsifier = small(mask_fn=lambda d, level: above(d, level).to_sparse())
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    model(x)
    assert sparsifier.get_mask("0").layout == torch.strided


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


def test_unregistering_what_is_not_registered():
    model, sparsifier = small()
    with pytest.raises(KeyError, match=r"'zz'; registered are '0', '2'"):
        sparsifier.unregister_layer("zz")
    assert list(sparsifier.data_groups) == ["0", "2"]
    assert "zz" not in sparsifier.state
    sparsifier.unregister_layer("0")
    assert not model[0]._forward_pre_hooks
    assert "0" not in sparsifier.state


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


# ------------------------------------------------------------------------------------------------------ serialisation


@pytest.mark.parametrize("stage", ["registered", "forward", "step", "squash"])
@pytest.mark.parametrize("features", [None, [0, 3], [-1, 2]])
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_portable_states(stage, features, form, tmp_path):
    def make():
        return small(
            aggregate_fn=lambda a, b: a + b, features=features, feature_dim=1
        )  # a function without a module path

    model, sparsifier = make()
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    if stage != "registered":
        model(x)
    if stage in ("step", "squash"):
        sparsifier.step()
    if stage == "squash":
        sparsifier.squash_mask()
    other_model, other = make()
    functions = {"aggregate_fn": add}
    if form == "torch":
        file = io.BytesIO()
        torch.save(sparsifier.state_dict(portable=True), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), functions)
    else:
        sparsifier.save(tmp_path / "s.safetensors")
        other.load(tmp_path / "s.safetensors", functions)
    mask_before = sparsifier.state["0"]["mask"]
    same(other.state["0"]["mask"], mask_before)
    assert torch.equal(model(y), other_model(y))
    if stage != "squash":
        same(other.data_groups["2"]["data"], sparsifier.data_groups["2"]["data"])
        sparsifier.step()
        other.step()
        same(other.get_mask("0"), sparsifier.get_mask("0"))
    assert other.data_groups["0"]["aggregate_fn"] is add


def test_unknown_functions_have_to_be_given(tmp_path):
    model, sparsifier = small(aggregate_fn=lambda a, b: a + b)
    model(torch.randn(4, 6))
    sparsifier.save(tmp_path / "s.safetensors")
    empty = ActivationSparsifier(small()[0])
    with pytest.raises(ValueError, match=r"aggregate_fn of layer '0' was '.*lambda.*functions="):
        empty.load(tmp_path / "s.safetensors")
    assert not empty.data_groups
    empty.load(tmp_path / "s.safetensors", {"aggregate_fn": add, "reduce_fn": batch_mean, "mask_fn": above})
    again = ActivationSparsifier(small()[0])
    again.load(
        tmp_path / "s.safetensors", {f"{__name__}:batch_mean": batch_mean, "aggregate_fn": add, "mask_fn": above}
    )
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        again.load(tmp_path / "nothing.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello")
    for name in ("other.safetensors", "text"):
        with pytest.raises(ValueError, match="is not the state of an ActivationSparsifier"):
            again.load(tmp_path / name)


def test_ready_made_functions_are_looked_up(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    sparsifier = ready(model, aggregate_fn=aggregate.Ema(0.7), reduce_fn=functools.partial(reduce.quantile, q=0.25))
    sparsifier.register_layer(model[2], features=[0, 1, 2, 3], mask_fn=mask.top_k, k=1, sparsity=0.1)
    sparsifier.unregister_layer("2")
    sparsifier.register_layer(model[2])
    model(torch.randn(4, 6))
    model(torch.randn(3, 6))
    sparsifier.save(tmp_path / "s.safetensors")
    other = ActivationSparsifier(copy.deepcopy(model))
    other.load(tmp_path / "s.safetensors")
    assert other.defaults["aggregate_fn"] == aggregate.Ema(0.7)
    assert other.data_groups["2"]["reduce_fn"].keywords == {"q": 0.25}
    x = torch.randn(5, 6)
    for each in (sparsifier, other):
        each.model(x)
        each.step()
    same(other.get_mask("2"), sparsifier.get_mask("2"))


def test_portable_states_hold_only_plain_values():
    model, sparsifier = small(level=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"sparse_config of layer '0' holds level=Tensor, which JSON cannot hold"):
        sparsifier.state_dict(portable=True)


def test_a_portable_mask_takes_a_byte_an_entry():
    model, sparsifier = only(nn.Identity(), reduce_fn=lambda data: data, level=0.0)
    model(torch.randn(256, 1024))
    sparsifier.step()
    tensors = sparsifier.state_dict(portable=True)["tensors"]
    assert sum(tensor.nbytes for tensor in tensors.values()) == 256 * 1024


# --------------------------------------------------------------------------------------------------------------- cost


def test_no_autograd_graph_is_kept():
    model, sparsifier = small()
    for _ in range(3):
        model(torch.randn(4, 6, requires_grad=True)).sum().backward()
    for config in sparsifier.data_groups.values():
        assert not config["data"].requires_grad
        assert config["data"].grad_fn is None


def test_aggregating_sees_the_callers_grad_mode():
    seen = []

    def fn(a, b):
        seen.append(torch.is_grad_enabled())
        return a + b

    model, _ = only(nn.Identity(), aggregate_fn=fn)
    model(torch.ones(1, 2))
    with torch.no_grad():
        model(torch.ones(1, 2))
    with torch.inference_mode():
        model(torch.ones(1, 2))
    assert seen == [True, False, False]


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


def test_writes_into_the_data_of_features_count():
    results = []
    for sparsifier_class in (ActivationSparsifier, TorchSparsifier):
        model, sparsifier = only(nn.Identity(), sparsifier_class, features=[0, 2], feature_dim=1)
        model(torch.ones(3, 4))
        model(torch.ones(3, 4))
        sparsifier.data_groups["0"]["data"][0] = torch.full((3, 1), 7.0)
        model(torch.ones(3, 4))
        results.append(sparsifier.data_groups["0"]["data"])
    same(*results)


# -------------------------------------------------------------------------------------------- compile, export, others


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
    model, sparsifier = small()
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), model(x))


def test_function_transforms():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
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


def test_only_training_inputs_count_when_asked():
    model, sparsifier = small(training_only=True)
    model.eval()
    model(torch.ones(4, 6))
    assert "data" not in sparsifier.data_groups["0"]
    model.train()
    model(torch.ones(4, 6))
    assert "data" in sparsifier.data_groups["0"]


# ----------------------------------------------------------------------------------------------- schedule and bridges


def test_masks_of_a_schedule_are_in_force_while_aggregation_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    sparsifier = ready(model, aggregate_fn=aggregate.max_abs)
    sparsifier.register_layer(model[2])
    sparsifier.schedule(0.5, steps=5, curve="linear")
    kept = []
    for _ in range(8):
        x = torch.randn(16, 4)
        hidden = torch.relu(model[0](x))
        keep = model[2].activation_mask if hasattr(model[2], "activation_mask") else torch.ones(10)
        torch.testing.assert_close(model(x), model[2].forward(hidden * keep))
        if "data" in sparsifier.data_groups["2"]:  # what is aggregated is not masked, so a feature can come back
            torch.testing.assert_close(sparsifier.data_groups["2"]["data"], hidden.abs().amax(0).double())
        sparsifier.step()
        kept.append(int(model[2].activation_mask.sum()))
    assert kept == [10, 9, 8, 7, 6, 5, 5, 5]
    assert sparsifier.data_groups["2"]["hook_state"] == "sparsify"


@pytest.mark.parametrize("way", ["portable", "deepcopy", "pickle"])
def test_a_schedule_goes_on_after_a_reload(way):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
        sparsifier = ready(model)
        sparsifier.register_layer(model[2])
        return model, sparsifier

    model, sparsifier = make()
    sparsifier.schedule(0.8, steps=6, begin=1, every=2)
    batches = [torch.randn(16, 4) for _ in range(9)]
    for x in batches[:4]:
        model(x)
        sparsifier.step()
    if way == "portable":
        other_model, other = make()
        other.load_state_dict(sparsifier.state_dict(portable=True))
    else:
        other = copy.deepcopy(sparsifier) if way == "deepcopy" else pickle.loads(pickle.dumps(sparsifier))
        other_model = other.model
    for x in batches[4:]:
        assert torch.equal(model(x), other_model(x))
        sparsifier.step()
        other.step()
        same(other.get_mask("2"), sparsifier.get_mask("2"))
    assert int(other.get_mask("2").sum()) == 2


def test_a_failing_schedule_leaves_the_configuration():
    model = nn.Sequential(nn.Linear(4, 2))
    sparsifier = ready(model, sparsity=0.25)
    sparsifier.register_layer(model[0])
    sparsifier.schedule(lambda step: 0.5 if step == 0 else 2.0)
    model(torch.randn(3, 4))
    sparsifier.step()
    model(torch.randn(3, 4))
    with pytest.raises(ValueError, match="sparsity at step 1 is 2.0"):
        sparsifier.step()
    assert sparsifier.data_groups["0"]["sparse_config"] == {"sparsity": 0.5}
    assert "data" in sparsifier.data_groups["0"]


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


def test_operator():
    from deadband.ops.watch import issue_ticket

    class Watcher:
        def see(self, x):
            self.x = x

    watcher = Watcher()
    ticket = issue_ticket(watcher)
    torch.ops.deadband.watch(torch.ones(2), ticket)
    assert torch.equal(watcher.x, torch.ones(2))
    torch.library.opcheck(torch.ops.deadband.watch.default, (torch.ones(2), ticket))
    del watcher
    torch.ops.deadband.watch(torch.ones(2), ticket)
    assert operator.index(ticket[1]) >= 2


def compactable(masks_fn=mask.magnitude):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip
    sparsifier = ready(model, mask_fn=masks_fn)
    for index in (3, 7, 9):
        sparsifier.register_layer(model[index])
    return model.train(), sparsifier


@pytest.mark.parametrize("given", ["remembered", "tensor", "tuple", "mapping"])
def test_compacting_gives_the_masked_models_outputs(given):
    model, sparsifier = compactable()
    model(torch.randn(5, 3, 8, 8))
    sparsifier.step()
    with pytest.raises(LayerError, match=r"no mask is in force; call squash_mask"):
        sparsifier.compact_()
    sparsifier.squash_mask()
    model.eval()
    x = torch.randn(7, 3, 12, 9)
    expected = model(x)
    example = {"remembered": None, "tensor": x, "tuple": (x,), "mapping": {"input": x}}[given]
    report = sparsifier.compact_(example)
    torch.testing.assert_close(model(x), expected)
    assert report.removed == {"3": 4, "7": 3, "9": 10}
    assert (model[0].out_channels, model[3].out_channels, model[7].out_features) == (4, 3, 10)
    assert report.parameters[1] < report.parameters[0] / 2
    assert "parameters" in str(report)
    assert not sparsifier.data_groups
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not [name for name in model.state_dict() if "mask" in name]
    torch.export.export(model, (x,))
    fresh = compactable()[0].eval()
    deadband.load_compact_(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_what_cannot_be_compacted_stays_masked():
    model = nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 5))
    sparsifier = ready(model)
    sparsifier.register_layer(model[1])
    sparsifier.register_layer(
        model[0], aggregate_fn=add, reduce_fn=lambda data: data, mask_fn=lambda data, sparsity: data > data.mean()
    )
    x = torch.randn(3, 4)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    expected = model(x)[0]
    report = sparsifier.compact_(x)
    assert set(report.left) == {"0", "1"}
    assert "differs between positions" in report.left["0"]
    assert torch.equal(model(x)[0], expected)
    assert list(sparsifier.data_groups) == ["1", "0"]
    assert sparsifier.get_mask("1").sum() == 3


def test_a_compaction_that_fails_leaves_the_masked_model(monkeypatch):
    model, sparsifier = compactable()
    model(torch.randn(5, 3, 8, 8))
    sparsifier.step()
    sparsifier.squash_mask()
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    with pytest.raises(ValueError, match=r"example, \(nothing=float32 .*unexpected keyword.*Pass example="):
        sparsifier.compact_({"nothing": x})
    monkeypatch.setattr("deadband.compaction.compact._seconds", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sparsifier.compact_()
    assert torch.equal(model(x), expected)
    assert model[3].activation_mask.sum() == 4
    sparsifier.get_mask("3").fill_(True)
    assert not torch.equal(model(x), expected)


def test_compacting_without_an_example():
    model, sparsifier = compactable()
    model[3](torch.randn(2, 8, 5, 5))
    sparsifier.unregister_layer("7")
    sparsifier.unregister_layer("9")
    sparsifier.step()
    sparsifier.squash_mask()
    with pytest.raises(ValueError, match="no call of the model was seen .* Pass example="):
        sparsifier.compact_()


class TwoLayers(nn.Module):
    """Two layers, of which the second is masked, with something before them, between them, or left behind."""

    def __init__(self, before=None, after=None, layers=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = layers() if layers else (nn.Linear(6, 12), nn.Linear(12, 3))
        self.before, self.after, self.seen = before, after, []

    def forward(self, *args, **kwargs):
        x = self.before(*args, **kwargs) if self.before else args[0]
        x = self.second(torch.relu(self.first(x)))
        return self.after(x) if self.after else x


@dataclasses.dataclass
class GraphData:
    x: torch.Tensor
    edges: torch.Tensor


def neighbours(x, edges):
    return x.index_add(0, edges[1], x[edges[0]])


def convolutions(kind):
    return {"layers": lambda: (kind(3, 8, 3, padding=1), kind(8, 4, 3, padding=1))}


def over_time(x):  # [time, batch, features]
    return nn.functional.avg_pool1d(x.permute(1, 2, 0), 5).permute(2, 0, 1)


def integers(high, *shape):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


KINDS_OF_CALLS = {
    "a batch": ({}, (torch.randn(9, 6),), {}, 2),
    "a batch by keyword": ({"before": lambda x, scale: x * scale}, (), {"x": torch.randn(9, 6), "scale": 2.0}, 2),
    "a batch of images": (convolutions(nn.Conv2d), (torch.randn(5, 3, 6, 6),), {}, 2),
    "tokens": ({"before": nn.Embedding(20, 6)}, (integers(20, 4, 7),), {}, 2),
    "one row": ({}, (torch.randn(1, 6),), {}, None),
    "no batch": ({}, (torch.randn(6),), {}, None),
    "no batch, 1d": (convolutions(nn.Conv1d), (torch.randn(3, 9),), {}, None),
    "no batch, 2d": (convolutions(nn.Conv2d), (torch.randn(3, 6, 6),), {}, None),
    "no batch, 3d": (convolutions(nn.Conv3d), (torch.randn(3, 4, 4, 4),), {}, None),
    "features first": ({"before": torch.t}, (torch.randn(6, 9),), {}, None),
    "time first": ({"after": over_time}, (torch.randn(20, 3, 6),), {}, None),
    "time first, recurrent": ({"before": lambda x: x.cumsum(0)}, (torch.randn(20, 3, 6),), {}, 2),
    "time first, mask of the batch": (
        {"before": lambda x, padding: x.masked_fill(padding.T[..., None], 0.0)},
        (torch.randn(9, 3, 6), torch.zeros(3, 9, dtype=torch.bool)), {}, None,
    ),
    "a graph": ({"before": neighbours}, (torch.randn(9, 6), integers(9, 2, 15)), {}, None),
    "a graph of as many edges as nodes": (
        {"before": lambda x, source, target: neighbours(x, (source, target))},
        (torch.randn(9, 6), integers(9, 9), integers(9, 9)), {}, None,
    ),
    "a graph in an object": (
        {"before": lambda data: neighbours(data.x, data.edges)},
        (GraphData(torch.randn(9, 6), integers(9, 2, 15)),), {}, None,
    ),
    "a sparse graph": ({"before": lambda x, a: a @ x}, (torch.randn(9, 6), torch.eye(9).to_sparse()), {}, None),
    "bags": ({"before": nn.EmbeddingBag(20, 6)}, (integers(20, 30), torch.tensor([0, 3, 9])), {}, None),
    "as many bags as words": ({"before": nn.EmbeddingBag(20, 6)}, (integers(20, 4), torch.arange(4)), {}, None),
    "a packed sequence": (
        {"before": lambda packed: packed.data},
        (nn.utils.rnn.pack_sequence([torch.randn(3, 6), torch.randn(2, 6)]),), {}, None,
    ),
    "a list": ({"before": torch.cat}, ([torch.randn(4, 6), torch.randn(2, 6)],), {}, None),
    "rows that belong together": ({"after": lambda x: x[::2] - x[1::2]}, (torch.randn(8, 6),), {}, None),
    "rows that are compared": ({"after": lambda x: (x @ x.T).softmax(1)}, (torch.randn(8, 6),), {}, None),
    "a fixed number of rows": ({"before": lambda x: x.view(8, 6)}, (torch.randn(8, 6),), {}, None),
    "a row by its number": ({"after": lambda x: x[5]}, (torch.randn(8, 6),), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_compacting_on_the_call_that_was_seen(kind, mode, monkeypatch):
    build, args, kwargs, rows = KINDS_OF_CALLS[kind]
    model = TwoLayers(**build).eval()
    sparsifier = ready(model)
    sparsifier.register_layer(model.second)
    used = []
    monkeypatch.setattr(
        "deadband.compaction.compact.compact_", lambda *args, **named: used.append(args[2]) or compact_(*args, **named)
    )
    with mode():
        model(*args, **kwargs)
        sparsifier.step()
        sparsifier.squash_mask()
        expected = model(*args, **kwargs)
    report = sparsifier.compact_()
    assert sum((*report.removed.values(), *report.gathered.values())) in (4, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(*args, **kwargs), expected.clone())
    shapes = [[x.shape for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in (used[0], (args, kwargs))]
    if rows is None:
        assert shapes[0] == shapes[1]
    else:
        assert shapes[0] == [torch.Size([rows, *shape[1:]]) for shape in shapes[1]]


def test_a_call_that_the_model_does_not_take_any_more():
    model = TwoLayers()
    sparsifier = ready(model)
    sparsifier.register_layer(model.second)
    model(torch.randn(4, 6))
    sparsifier.step()
    sparsifier.squash_mask()
    model.before = torch.t
    message = r"does not run on the example, \(float32 \[4, 6\]\): RuntimeError: .*Pass example=: the arguments"
    with pytest.raises(ValueError, match=message):
        sparsifier.compact_()
    assert model.second.activation_mask.sum() == 6
    assert sparsifier.compact_(torch.randn(6, 4)).removed == {"second": 6}


def kept_in_a_hook(model):
    got = {}
    model.first.register_forward_hook(lambda module, args, output: got.update(output=output))


def keeping(what):
    """Leaves tensors of its last call behind."""

    class Keeps(TwoLayers):
        def forward(self, x):
            self.hidden = torch.relu(self.first(x))
            out = self.second(self.hidden)
            keep = {
                "attributes": lambda: setattr(self, "last", out),
                "parts of each other": lambda: setattr(self, "last", (out[0], out.view(-1))),
                "a list": lambda: self.seen.append(out.mean()),
                "a mapping in a list": lambda: self.seen.append({"loss": out.mean(), "all": [self.hidden]}),
                "an object": lambda: setattr(self, "last", GraphData(out, self.hidden)),
                "a submodule": lambda: setattr(self.second, "input", self.hidden),
                "a buffer": lambda: self.register_buffer("last", out),
                "a sparse tensor": lambda: setattr(self, "last", out.to_sparse()),
            }
            keep.get(what, lambda: None)()
            return out

    return Keeps()


KEPT = [
    "attributes", "parts of each other", "a list", "a mapping in a list", "an object", "a submodule", "a buffer",
    "a sparse tensor", "a hook", "weight_norm", "pruning", "a double backward",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:Using backward")
@pytest.mark.parametrize("what", KEPT)
def test_compacting_a_model_that_keeps_tensors_with_gradients(what):
    model = keeping(what)
    prepare = {
        "a hook": kept_in_a_hook,
        "weight_norm": lambda model: nn.utils.weight_norm(model.first),
        "pruning": lambda model: prune.l1_unstructured(model.first, "weight", 0.3),
    }
    prepare.get(what, lambda _: None)(model)
    sparsifier = ready(model)
    sparsifier.register_layer(model.second)
    for _ in range(2):
        model(torch.randn(7, 6)).square().mean().backward(create_graph=what == "a double backward")
    sparsifier.step()
    sparsifier.squash_mask()
    x = torch.randn(5, 6)
    expected = model(x).detach()
    hidden, seen = model.hidden, list(model.seen)
    report = sparsifier.compact_()
    assert {**report.removed, **report.gathered} == {"second": 6}
    assert model.hidden is hidden  # what the model keeps is the user's call's, not ours
    assert hidden.grad_fn is not None
    assert len(model.seen) == len(seen)
    torch.testing.assert_close(model(x).detach(), expected)
    model(x).sum().backward()
    with torch.no_grad():
        vector = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(vector.clone(), model.parameters())
        torch.testing.assert_close(model(x), expected)


def test_compacting_layers_that_are_pruned_and_what_cannot_be_copied():
    model = TwoLayers()
    sparsifier = ready(model)
    sparsifier.register_layer(model.second)
    prune.l1_unstructured(model.second, "weight", 0.5)
    x = torch.randn(5, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    expected = model(x)
    assert sparsifier.compact_().left == {"second": "its weight is not a plain parameter"}
    assert torch.equal(model(x), expected)
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match=r"Two.* cannot be copied by copy.deepcopy \(TypeError: cannot pickle .*lock"):
        sparsifier.compact_()
    del model.lock
    prune.remove(model.second, "weight")
    assert torch.equal(model(x), expected)
    assert sparsifier.compact_().removed == {"second": 6}
    torch.testing.assert_close(model(x), expected)


def test_compacting_a_llama_mlp():
    model = tiny_model("llama")
    sparsifier = ready(model)
    for layer in model.model.layers:
        sparsifier.register_layer(layer.mlp.down_proj)
        sparsifier.register_layer(layer.self_attn.q_proj)
    batch = tiny_batches(1)[0]
    with torch.no_grad():
        model(**batch)
        sparsifier.step()
        sparsifier.squash_mask()
        expected = model(**batch).logits
        report = sparsifier.compact_()
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.model.layers[0].mlp.gate_proj.out_features == 56
    assert report.gathered == {f"model.layers.{index}.self_attn.q_proj": 32 for index in range(2)}
    model.generate(batch["input_ids"][:1], max_new_tokens=3)


# ---------------------------------------------------------------------------------------------------- at odd moments


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


def test_masks_may_be_preset_before_any_step():
    model, sparsifier = small()
    x = torch.randn(4, 6)
    model(x)
    sparsifier.get_mask("0")[:, 2] = 0
    sparsifier.squash_mask()
    assert model[0].activation_mask[:, 2].any().item() is False
    model(x)


def test_squash_then_step_makes_masks_as_in_torch():
    results = []
    for sparsifier_class in (ActivationSparsifier, TorchSparsifier):
        model, sparsifier = only(nn.Identity(), sparsifier_class)
        x = torch.arange(12.0).view(3, 4)
        model(x)
        sparsifier.squash_mask()
        sparsifier.step()
        results.append(model(x))
    same(*results)
    assert (results[0] == 0).any()


def test_masks_made_elsewhere_come_into_force_under_a_schedule():
    class First(ActivationSparsifier):
        def update_mask(self, name, data, configs):
            keep = torch.ones(8)
            keep[: round(8 * configs["sparse_config"]["sparsity"])] = 0
            self.state[name]["mask"] = keep

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    sparsifier = First(model, add, batch_mean, above)
    sparsifier.register_layer(model[2])
    sparsifier.schedule(1.0, steps=4, curve="linear")
    kept = []
    for _ in range(6):
        model(torch.randn(3, 4))
        sparsifier.step()
        kept.append(int(model[2].activation_mask.sum()))
    assert kept == [8, 6, 4, 2, 0, 0]


def test_a_step_that_fails_leaves_the_mask_in_force_connected():
    fail = []

    def fragile(data, sparsity):
        if fail:
            raise ZeroDivisionError
        return torch.full_like(data, float(sparsity < 0.6))

    model = nn.Sequential(nn.Identity())
    sparsifier = ActivationSparsifier(model, add, batch_mean, fragile, features=[0, 1, 2], feature_dim=1)
    sparsifier.register_layer(model[0])
    sparsifier.schedule(1.0, steps=2, curve="linear")
    x = torch.ones(2, 3)
    model(x)
    sparsifier.step()
    model(x)
    fail.append(1)
    with pytest.raises(ZeroDivisionError):
        sparsifier.step()
    fail.clear()
    for _ in range(3):
        model(x)
        sparsifier.step()
    assert not model(x).any()


def test_a_schedule_may_follow_another_and_layers_may_come_late():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    sparsifier = ready(model)
    sparsifier.register_layer(model[2])
    sparsifier.schedule(0.5, steps=1)
    for _ in range(2):
        model(torch.randn(3, 4))
        sparsifier.step()
    assert sparsifier.data_groups["2"]["hook_state"] == "sparsify"
    sparsifier.register_layer(model[0])
    model(torch.randn(3, 4))
    sparsifier.step()
    assert sparsifier.get_mask("0").sum() == 2
    assert sparsifier.data_groups["0"]["hook_state"] == "sparsify"
    with pytest.warns(UserWarning, match="already attached"):
        sparsifier.register_layer(model[2])
    sparsifier.schedule(0.8, steps=1)
    for _ in range(2):
        model(torch.randn(3, 4))
        sparsifier.step()
    assert sparsifier.get_mask("2").sum() == 2


def test_copying_in_the_middle_of_a_schedule_with_a_late_layer():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    sparsifier = ready(model)
    sparsifier.register_layer(model[2])
    sparsifier.schedule(0.5, steps=4)
    for _ in range(3):
        model(torch.randn(3, 4))
        sparsifier.step()
    sparsifier.register_layer(model[0])
    other = copy.deepcopy(sparsifier)
    x = torch.randn(3, 4)
    assert torch.equal(other.model(x), model(x))
    saved = sparsifier.state_dict(portable=True)
    del sparsifier
    gc.collect()
    masked = model(x)  # masks in force stay with the model, as squashed ones do
    assert torch.equal(other.model(x), masked)
    other.load_state_dict(saved)
    assert torch.equal(other.model(x), masked)


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


def test_the_call_that_is_remembered_is_free_of_graphs_and_of_larger_tensors():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, xs, lengths, other=None):
            return self.fc(xs[0]) + lengths[:, None]

    model = Takes()
    sparsifier = ready(model)
    sparsifier.register_layer(model.fc)
    x = (torch.randn(1000, 3, requires_grad=True) * 2)[100:109]
    kept = x.detach().clone()
    model([x], torch.arange(9))
    with torch.no_grad():
        x.zero_()
    (xs, lengths), _ = sparsifier._example
    assert torch.equal(xs[0], kept)
    assert lengths.shape == (9,)
    assert not xs[0].requires_grad
    assert xs[0].untyped_storage().nbytes() == 9 * 3 * 4
    copy.deepcopy(sparsifier)
    other = Takes()
    sparsifier = ready(other)
    sparsifier.register_layer(other.fc)
    other([x], torch.arange(9), threading.Lock())
    assert sparsifier._example is None
    assert not other._forward_pre_hooks
    copy.deepcopy(sparsifier)
    sparsifier.step()
    sparsifier.squash_mask()
    with pytest.raises(ValueError, match=r"cannot be kept: an argument cannot be copied .*lock.* Pass example="):
        sparsifier.compact_()
    sparsifier.compact_(([x], torch.arange(9)))


def test_inference_and_training_may_alternate():
    model, sparsifier = small(features=[0, 3], feature_dim=1)
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    sparsifier.get_mask("0")[0].fill_(0)
    with torch.inference_mode():
        model(x)
    sparsifier.get_mask("0")[1].fill_(1)
    model(x.requires_grad_()).sum().backward()


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


def test_the_input_comes_first_among_keywords_too():
    class Two(nn.Module):
        def forward(self, x, scale=None):
            return x * scale

    layer = Two()
    model = nn.Sequential(layer)
    sparsifier = ready(model)
    sparsifier.register_layer(layer)
    layer(scale=torch.ones(1), x=torch.tensor([[1.0, 2.0]]))
    assert sparsifier.data_groups["0"]["data"].tolist() == [1, 2]


def test_a_changing_number_of_features_is_an_error():
    model = nn.Sequential(nn.Identity())
    sparsifier = ready(model)
    sparsifier.register_layer(model[0])
    model(torch.randn(4, 1))
    with pytest.raises(ValueError, match=r"layer '0': its input of shape \(4, 8\) has 8 features .* before had 1"):
        model(torch.randn(4, 8))
    with pytest.raises(IndexError, match=r"layer '0': its input of shape \(\) has no dimension -1"):
        model(torch.tensor(1.0))


def test_functions_of_one_name_are_told_apart():
    functions = [lambda data, level, k=k: data > k for k in range(2)]
    model, sparsifier = small()
    sparsifier.data_groups["0"]["mask_fn"], sparsifier.data_groups["2"]["mask_fn"] = functions
    saved = sparsifier.state_dict(portable=True)
    sparsifier.load_state_dict(saved)
    assert [config["mask_fn"] for config in sparsifier.data_groups.values()] == functions
    other = small(mask_fn=functions[0])[1]
    with pytest.warns(UserWarning, match="already attached"):
        other.register_layer(other.model[2], mask_fn=functions[1])
    other.unregister_layer("0")
    with pytest.raises(ValueError, match="several functions here have that name"):
        other.load_state_dict(saved)
    other.load_state_dict(saved, {"0": {"mask_fn": functions[0]}, "2": {"mask_fn": functions[1]}})
    assert [config["mask_fn"] for config in other.data_groups.values()] == functions


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


def test_a_state_fits_layers_that_were_changed_since():
    model, sparsifier = small()
    model(torch.randn(4, 6))
    saved = sparsifier.state_dict()
    sparsifier.unregister_layer("2")
    deadband.sparsify_(model, {"2": 0.0})
    torch.nn.utils.parametrizations.weight_norm(model[0])
    sparsifier.load_state_dict(saved)


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


def test_batchless_inputs_of_masks_that_kept_dimensions():
    model, sparsifier = small(reduce_fn=lambda data: data.mean(0, keepdim=True))
    x = torch.randn(4, 6)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    torch.testing.assert_close(model(x[0]), model(x)[0])


def test_options_of_the_constructor_are_not_for_layers():
    model, sparsifier = small()
    with pytest.raises(TypeError, match="synchronise is for all layers; pass it to the constructor"):
        sparsifier.register_layer(model[0], synchronise=False)


def test_a_copy_of_a_watched_model_loses_the_hook():
    model, _ = small()
    other = copy.deepcopy(model)
    other(torch.randn(2, 6))
    assert not other[0]._forward_pre_hooks
    assert not other._forward_pre_hooks


def test_a_mask_replaced_after_squashing_holds_from_the_next_squash():
    results = []
    for sparsifier_class in (ActivationSparsifier, TorchSparsifier):
        model, sparsifier = only(nn.Identity(), sparsifier_class)
        x = torch.arange(12.0).view(3, 4)
        model(x)
        sparsifier.step()
        sparsifier.squash_mask()
        sparsifier.state["0"]["mask"] = torch.zeros(4)
        results.append(model(x))
        sparsifier.squash_mask()
        results.append(model(x))
    same(results[:2], results[2:])


def test_data_that_were_taken_away_do_not_change():
    model, sparsifier = only(nn.Identity(), features=[0, 2], feature_dim=1)
    x = torch.ones(3, 4)
    model(x)
    model(x)
    taken = sparsifier.data_groups["0"].pop("data")
    model(x)
    same(taken, [torch.full((3, 1), 2.0)] * 2)
    same(sparsifier.data_groups["0"]["data"], [torch.full((3, 1), 1.0)] * 2)


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


@pytest.mark.parametrize("rows", [1, 2000])
def test_small_and_large_inputs_are_masked_alike(rows):
    x = torch.randn(rows, 8)
    x[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    keep = torch.arange(8) >= 4
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        masked = apply_mask(x.to(dtype), keep)
        assert torch.equal(masked, torch.where(keep, x.to(dtype), 0))
    assert torch.equal(apply_mask(x, torch.rand(rows, 8) > 2), torch.zeros(rows, 8))
