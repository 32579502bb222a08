"""Sparsity over steps, and sparsifiers that follow it."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsifiers import above, add, batch_mean, ready, same
from torch import nn

from deadband.masks import aggregate
from deadband.masks.schedule import Schedule
from deadband.masks.sparsifier import ActivationSparsifier


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 5), st.integers(1, 20), st.sampled_from(["cubic", "linear"]))
def test_from_initial_to_final_and_never_back(initial, final, begin, steps, curve):
    schedule = Schedule(sparsity=final, initial=initial, begin=begin, steps=steps, curve=curve)
    levels = [schedule.at(step) for step in range(begin + steps + 3)]
    assert levels[: begin + 1] == [initial] * (begin + 1)
    assert levels[begin + steps :] == pytest.approx([final] * 3)
    ordered = sorted(levels, reverse=final < initial)
    assert levels == pytest.approx(ordered)


def test_the_cubic_curve_is_the_papers():
    s_i, s_f, t_0, n = 0.1, 0.9, 3, 10
    schedule = Schedule(sparsity=s_f, initial=s_i, begin=t_0, steps=n)
    for t in range(t_0, t_0 + n + 1):
        assert schedule.at(t) == pytest.approx(s_f + (s_i - s_f) * (1 - (t - t_0) / n) ** 3)


def test_due_every_so_many_steps_and_at_the_last():
    schedule = Schedule(sparsity=0.5, steps=5, begin=2, every=3)
    due = []
    for step in range(10):
        schedule.step = step
        due.append(schedule.due() and not schedule.over)
    assert [step for step, flag in enumerate(due) if flag] == [2, 5, 7]


def test_functions():
    schedule = Schedule(sparsity=lambda step: min(step / 10, 1.0))
    assert [schedule.at(step) for step in (0, 5, 20)] == [0.0, 0.5, 1.0]
    assert not schedule.over
    assert Schedule(sparsity=0.5, steps=4, curve=lambda progress: progress**2).at(2) == 0.125
    with pytest.raises(ValueError, match="at step 3 is 3"):
        Schedule(sparsity=lambda step: step).at(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5}, "steps is missing"),
        ({"sparsity": 1.5, "steps": 2}, "sparsity is 1.5"),
        ({"sparsity": 0.5, "steps": 2, "initial": -1}, "initial is -1"),
        ({"sparsity": 0.5, "steps": 0}, "steps=0"),
        ({"sparsity": 0.5, "steps": 2, "every": 0}, "every=0"),
        ({"sparsity": 0.5, "steps": 2, "begin": -1}, "begin=-1"),
        ({"sparsity": 0.5, "steps": 2, "curve": "wavy"}, "curve='wavy'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


def watched_hidden(**keywords):
    """A model whose hidden layer of ten is watched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    sparsifier = ready(model, **keywords)
    sparsifier.register_layer(model[2])
    return model, sparsifier


def train(sparsifier, steps):
    for _ in range(steps):
        sparsifier.model(torch.randn(3, 4))
        sparsifier.step()


def test_masks_of_a_schedule_are_in_force_while_aggregation_goes_on():
    model, sparsifier = watched_hidden(aggregate_fn=aggregate.max_abs)
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


def test_a_schedule_may_follow_another_and_layers_may_come_late():
    model, sparsifier = watched_hidden()
    sparsifier.schedule(0.5, steps=1)
    train(sparsifier, 2)
    assert sparsifier.data_groups["2"]["hook_state"] == "sparsify"
    sparsifier.register_layer(model[0])
    model(torch.randn(3, 4))
    sparsifier.step()
    assert sparsifier.get_mask("0").sum() == 2
    assert sparsifier.data_groups["0"]["hook_state"] == "sparsify"
    with pytest.warns(UserWarning, match="already attached"):
        sparsifier.register_layer(model[2])
    sparsifier.schedule(0.8, steps=1)
    train(sparsifier, 2)
    assert sparsifier.get_mask("2").sum() == 2


@pytest.mark.parametrize("way", ["portable", "deepcopy", "pickle"])
def test_a_schedule_goes_on_after_a_reload(way):
    model, sparsifier = watched_hidden()
    sparsifier.schedule(0.8, steps=6, begin=1, every=2)
    batches = [torch.randn(16, 4) for _ in range(9)]
    for x in batches[:4]:
        model(x)
        sparsifier.step()
    if way == "portable":
        other_model, other = watched_hidden()
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


def test_copying_in_the_middle_of_a_schedule_with_a_late_layer():
    model, sparsifier = watched_hidden()
    sparsifier.schedule(0.5, steps=4)
    train(sparsifier, 3)
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
