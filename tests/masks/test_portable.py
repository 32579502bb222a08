"""Portable states of an ActivationSparsifier, and their files: whole, damaged, and such that lie."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
import struct
import time

import pytest
import torch
from safetensors.torch import save_file
from sparsifiers import above, add, batch_mean, only, ready, same, small
from torch import nn

from deadband.masks import aggregate, mask, reduce
from deadband.masks.portable import load
from deadband.masks.sparsifier import ActivationSparsifier

STAGES = ("watched", "stepped", "scheduled", "squashed")
SEED = 20240607


def largest(data):
    return data.abs().amax(0)


def above_a_tenth(data, sparsity):
    return data > sparsity / 10


def sparsifier_at(stage, own):
    """A model and its sparsifier; with `own`, one layer has functions of a user, and features."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    sparsifier = ActivationSparsifier(model, aggregate.mean_abs, reduce.mean, mask.magnitude, sparsity=0.5)
    functions = {"features": [1, 3], "feature_dim": 1, "reduce_fn": largest, "mask_fn": above_a_tenth}
    sparsifier.register_layer(model[0], **({"aggregate_fn": torch.add, **functions} if own else {}))
    sparsifier.register_layer(model[2])
    sparsifier.register_layer(model[4], aggregate_fn=aggregate.Ema(0.5))
    if stage == "scheduled":
        sparsifier.schedule(0.75, steps=5)
    for _ in range(2 if stage == "scheduled" else 1):
        model(torch.randn(4, 6))
        if stage != "watched":
            sparsifier.step()
    if stage == "scheduled":
        model(torch.randn(4, 6))
    if stage == "squashed":
        sparsifier.squash_mask()
    return model, sparsifier


def all_of(model, sparsifier):
    """Everything that may not change: the plain values, and the tensors."""
    state = sparsifier.state_dict(portable=True)
    tensors = {**state.pop("tensors"), **{f"model.{name}": value for name, value in model.state_dict().items()}}
    hooks = [(name, list(map(type, module._forward_pre_hooks.values()))) for name, module in model.named_modules()]
    return repr((state, hooks)), {name: value.clone() for name, value in tensors.items()}


def assert_unchanged(before, now):
    assert before[0] == now[0]
    assert before[1].keys() == now[1].keys()
    for name, value in before[1].items():
        assert torch.equal(value, now[1][name]), name


def places(value, path=()):
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def at(value, path):
    for key in path:
        value = value[key]
    return value


LIES = [
    None, 0, -1, 2**63, 10**12, 1.5, float("nan"), "", "x", "deadband.mask:top_k", "layer", [], {}, [1], [[1]],
    {"a": 1}, True, "sparsify", [10**9, 10**9], "float32", "Tensor", "activation_mask", torch.zeros(3), torch.zeros(0),
    torch.ones(5, 12), torch.tensor(float("nan")), torch.zeros(12, dtype=torch.complex64),
]  # fmt: skip


def damage(state, rng):
    """Change one place of a state: cut, replaced, swapped with another, renamed, or of another size."""
    everywhere = places(state)
    path = rng.choice(everywhere)
    parent, key = at(state, path[:-1]), path[-1]
    value, other = parent[key], rng.choice(everywhere)
    how = rng.choice(["cut", "lie", "swap", "rename", "resize"])
    if how == "cut":
        del parent[key]
    elif how == "swap" and path[: len(other)] != other and other[: len(path)] != path:
        parent[key], at(state, other[:-1])[other[-1]] = at(state, other), value
    elif how == "rename" and isinstance(parent, dict):
        parent[rng.choice([f"{key}x", "", "0", "2", "layer", 5])] = parent.pop(key)
    elif how == "resize" and isinstance(value, torch.Tensor):
        flat = value.reshape(-1)
        parent[key] = rng.choice([value[:1], value.float() * 3, torch.cat([flat, flat]), flat[:0]])
    elif how == "resize" and isinstance(value, (int, float)) and not isinstance(value, bool):
        parent[key] = value * rng.choice([-1, 1000, 10**9])
    elif how == "resize" and isinstance(value, (str, list)):
        parent[key] = value[:-1]
    else:
        parent[key] = copy.deepcopy(rng.choice(LIES))
    return how, path


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_state_changes_nothing(stage, own):
    rng = random.Random(f"{SEED} {stage} {own}")
    pristine = sparsifier_at(stage, own)[1].state_dict(portable=True)
    model, sparsifier = sparsifier_at(rng.choice(STAGES), own)
    before = all_of(model, sparsifier)
    refused = 0
    for number in range(60):
        state = copy.deepcopy(pristine)
        done = [damage(state, rng) for _ in range(rng.choice([1, 1, 2]))]
        start = time.perf_counter()
        try:
            sparsifier.load_state_dict(state)
        except (ValueError, KeyError):
            refused += 1
            assert_unchanged(before, all_of(model, sparsifier))
        else:  # what is changed means something else, and works
            assert repr(sparsifier)
            sparsifier.state_dict(portable=True)
            model, sparsifier = sparsifier_at(STAGES[number % 4], own)
            before = all_of(model, sparsifier)
        assert time.perf_counter() - start < 1, done
    assert refused > 40


LIES_WITH_WORDS = {
    "a mask of another length": (lambda s: s["tensors"].update({"2.mask.0": torch.ones(1, 5)}), r"mask of layer '2'"),
    "a mask that is missing": (lambda s: s["tensors"].pop("2.mask.0"), r"the tensor '2.mask.0' is missing"),
    "a layer twice": (lambda s: s["groups"].update({"module.2": s["groups"]["2"]}) or s["tensors"].update(
        {"module.2.mask.0": s["tensors"]["2.mask.0"]}), r"several entries of the state are of one layer"),
    "a huge shape": (
        lambda s: s["groups"]["2"]["mask"].update(shapes=[[2**40, 2**40]]), r"shapes of 2.mask is .*at most",
    ),
    "a negative number of rows": (lambda s: s["groups"]["2"].update(rows=-3), r"'rows'\] is -3; expected a whole"),
    "a dtype that is none": (lambda s: s["groups"]["2"]["mask"].update(dtypes=["Tensor"]), r"expected the name of a"),
    "a function in another's role": (
        lambda s: s["groups"]["2"].update(aggregate_fn=s["groups"]["2"]["mask_fn"]), r"expected a function of dead",
    ),
    "a keyword of no function": (
        lambda s: s["groups"]["4"]["aggregate_fn"]["keywords"].update(speed=1), r"a keyword of deadband.aggregate:Ema",
    ),
    "no function": (lambda s: s["groups"]["2"].update(mask_fn=None), r"None must be callable: mask_fn of layer '2'"),
    "a mask in force that is none": (lambda s: s["groups"]["2"].update(mask=None), r"mask of layer '2' is None"),
    "no list": (lambda s: s.update(groups=[]), r"the state\['groups'\] is \[\]; expected a mapping"),
    "a buffer of another name": (lambda s: s["groups"]["2"]["facts"].update(buffer="weight"), r"expected a buffer"),
}  # fmt: skip


@pytest.mark.parametrize(("lie", "words"), LIES_WITH_WORDS.values(), ids=LIES_WITH_WORDS)
def test_what_is_wrong_is_named(lie, words):
    model, sparsifier = sparsifier_at("squashed", False)
    state = copy.deepcopy(sparsifier.state_dict(portable=True))
    before = all_of(model, sparsifier)
    lie(state)
    with pytest.raises(ValueError, match=words):
        sparsifier.load_state_dict(state)
    assert_unchanged(before, all_of(model, sparsifier))


def test_a_damaged_file_changes_nothing(tmp_path):
    rng = random.Random(SEED)
    path = tmp_path / "state.safetensors"
    sparsifier_at("squashed", True)[1].save(path)
    pristine = path.read_bytes()
    (size,) = struct.unpack("<Q", pristine[:8])
    model, sparsifier = sparsifier_at("scheduled", True)
    before = all_of(model, sparsifier)

    def mutated():
        data = bytearray(pristine)
        how = rng.choice(["short", "header", "bytes", "size", "swap"])
        if how == "short":
            return bytes(data[: rng.randrange(len(data))])
        if how == "size":
            return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**20, 2**40, 2**64 - 1])) + bytes(data[8:])
        if how == "swap":
            middle = rng.randrange(8, len(data))
            return bytes(data[:8] + data[middle:] + data[8:middle])
        for _ in range(rng.choice([1, 5, 30])):
            data[rng.randrange(8, 8 + size) if how == "header" else rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)

    refused = 0
    for _ in range(80):
        path.write_bytes(mutated())
        try:
            sparsifier.load(path)
        except (ValueError, KeyError):
            refused += 1
            assert_unchanged(before, all_of(model, sparsifier))
        else:
            model, sparsifier = sparsifier_at("scheduled", True)
    assert refused > 40


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1' + "0" * 10_000 + "}", "nonsense", "[]", "null"])
def test_a_file_whose_text_is_hostile(tmp_path, text):
    path = tmp_path / "state.safetensors"
    header = json.dumps({"__metadata__": {"deadband.masks.sparsifier": text}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="is not the state of an ActivationSparsifier"):
        load(path)


@pytest.mark.parametrize("stage", STAGES)
def test_torchs_form_may_be_damaged_too(stage):
    rng = random.Random(f"{SEED} torch {stage}")
    model, sparsifier = sparsifier_at(stage, True)
    before = all_of(model, sparsifier)
    for _ in range(30):
        state = sparsifier_at(stage, True)[1].state_dict()
        parts = state[rng.choice(["state", "data_groups"])]
        name = rng.choice(list(parts))
        key = rng.choice(["mask", "hook_state", "features", "feature_dim", "aggregate_fn"])
        rng.choice(
            [
                lambda parts=parts, name=name: parts.update({name: rng.choice(LIES)}),
                lambda parts=parts, name=name: parts.update({f"{name}x": parts.pop(name)}),
                lambda parts=parts, name=name, key=key: parts[name].update({key: rng.choice(LIES)}),
                lambda parts=parts, name=name, key=key: parts[name].pop(key, None),
                lambda state=state: state.pop(rng.choice(["state", "data_groups", "defaults"])),
            ]
        )()
        try:
            sparsifier.load_state_dict(state)
        except (ValueError, KeyError):
            assert_unchanged(before, all_of(model, sparsifier))
        else:
            model, sparsifier = sparsifier_at(stage, True)
            before = all_of(model, sparsifier)


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
        tmp_path / "s.safetensors",
        {f"{batch_mean.__module__}:batch_mean": batch_mean, "aggregate_fn": add, "mask_fn": above},
    )
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        again.load(tmp_path / "nothing.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello")
    for name in ("other.safetensors", "text"):
        with pytest.raises(ValueError, match="is not the state of an ActivationSparsifier"):
            again.load(tmp_path / name)


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
