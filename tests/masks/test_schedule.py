"""Sparsity over steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadband.masks.schedule import Schedule


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
