"""Schedulers: levels that follow the epochs, whatever is saved, resumed or wrong."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from deadband.pruning import (
    BaseDataScheduler,
    BaseScheduler,
    CubicSL,
    DataNormSparsifier,
    LambdaSL,
    NearlyDiagonalSparsifier,
    WeightNormSparsifier,
)


def sparsifier_of(*levels):
    sparsifier = WeightNormSparsifier()
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in levels))
    sparsifier.prepare(
        model, [{"tensor_fqn": f"{i}.weight", "sparsity_level": level} for i, level in enumerate(levels)]
    )
    return sparsifier


class Halving(BaseScheduler):
    """A user's."""

    def get_sl(self):
        if self.last_epoch > 0:
            return [group["sparsity_level"] * 0.5 for group in self.sparsifier.groups]
        return list(self.base_sl)


def test_a_users_scheduler_sets_levels_from_epoch_to_epoch():
    sparsifier = sparsifier_of(0.5)
    scheduler = Halving(sparsifier)
    assert scheduler.base_sl == [0.5]
    assert scheduler._step_count == 1
    assert sparsifier.groups[0]["sparsity_level"] == 0.5
    sparsifier.enable_mask_update = False
    sparsifier.step()
    scheduler.step()
    assert sparsifier.groups[0]["sparsity_level"] == 0.25 == scheduler.get_last_sl()[0]
    assert sparsifier.enable_mask_update


def test_the_order_of_steps_is_looked_at_once(recwarn):
    scheduler = Halving(sparsifier_of(0.5))
    with pytest.warns(UserWarning, match="sparsifier.step"):
        scheduler.step()
    scheduler.step()
    right = Halving(sparsifier_of(0.5))
    right.sparsifier.step()
    right.step()
    assert not recwarn.list


def test_the_cubic_curve_goes_either_way_and_ends_where_it_should():
    up = CubicSL(sparsifier_of(0.8), delta_t=2, total_t=5)
    down = CubicSL(sparsifier_of(0.2), init_sl=0.8, delta_t=2, total_t=5)
    expected = [0, 0.2168, 0.3904, 0.5256, 0.6272, 0.7, 0.7488, 0.7784, 0.7936, 0.7992, 0.8, 0.8]
    for level in expected:
        assert up.get_last_sl() == pytest.approx([level])
        assert down.get_last_sl() == pytest.approx([0.8 - 0.75 * level])
        for scheduler in (up, down):
            scheduler.sparsifier.step()
            scheduler.step()
    assert up.get_last_sl() == [0.8]
    assert down.get_last_sl() == [0.2]


def test_levels_of_a_function_may_go_beyond_one():
    scheduler = LambdaSL(sparsifier_of(0.5), lambda epoch: epoch * 10)
    scheduler.sparsifier.step()
    scheduler.step()
    assert scheduler.get_last_sl() == [5.0]


@pytest.mark.parametrize(
    "make", [lambda s: CubicSL(s, delta_t=1, total_t=4), lambda s: LambdaSL(s, lambda epoch: epoch / 8)]
)
def test_resuming_goes_on_with_the_same_masks(make):
    def run(sparsifier, scheduler, steps):
        masks = []
        for _ in range(steps):
            sparsifier.step()
            masks.append([sparsifier.state[group["tensor_fqn"]]["mask"].clone() for group in sparsifier.groups])
            scheduler.step()
        return masks

    torch.manual_seed(0)
    sparsifier = sparsifier_of(0.8, 0.6)
    scheduler = make(sparsifier)
    weights = {name: value.clone() for name, value in sparsifier.model.state_dict().items()}
    run(sparsifier, scheduler, 2)
    file = io.BytesIO()
    torch.save([sparsifier.state_dict(), scheduler.state_dict()], file)
    expected = run(sparsifier, scheduler, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = sparsifier_of(0.1, 0.1)
    fresh.model.load_state_dict(weights)
    other = make(fresh)
    fresh.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    found = run(fresh, other, 3)
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_what_cannot_be_is_named():
    with pytest.raises(TypeError, match=r"expected a deadband\.pruning\.BaseSparsifier"):
        CubicSL(object())
    with pytest.raises(ValueError, match="not prepared"):
        CubicSL(WeightNormSparsifier())
    with pytest.raises(ValueError, match="product above 0"):
        CubicSL(sparsifier_of(0.5), total_t=0)
    with pytest.raises(ValueError, match="expected 2, one per group"):
        CubicSL(sparsifier_of(0.5, 0.5), init_sl=[0.1])
    with pytest.raises(ValueError, match="expected 2, one per group"):
        LambdaSL(sparsifier_of(0.5, 0.5), [lambda epoch: 1.0])
    banded = NearlyDiagonalSparsifier()
    banded.prepare(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="no sparsity_level"):
        LambdaSL(banded, lambda epoch: 1.0)

    class TooFew(BaseScheduler):
        def get_sl(self):
            return [0.5]

    with pytest.raises(ValueError, match="got 1 levels"):
        TooFew(sparsifier_of(0.5, 0.5))


def test_a_schedule_of_data_and_its_return():
    class Rising(BaseDataScheduler):
        def get_schedule_param(self):
            return {name: min(value + 0.1 * self.last_epoch, 1.0) for name, value in self.base_param.items()}

    def made():
        return DataNormSparsifier([("a.b", torch.randn(8, 8)), ("c", torch.randn(4, 4))], sparsity_level=0.2)

    sparsifier = made()
    scheduler = Rising(sparsifier, "sparsity_level")
    for _ in range(2):
        sparsifier.step()
        scheduler.step()
    assert scheduler.get_last_param() == pytest.approx({"a.b": 0.4, "c": 0.4})
    assert sparsifier.data_groups["c"]["sparsity_level"] == pytest.approx(0.4)
    fresh = made()
    other = Rising(fresh, "sparsity_level")
    other.load_state_dict(scheduler.state_dict())
    assert fresh.data_groups["c"]["sparsity_level"] == pytest.approx(0.4)
    fresh.step()
    other.step()
    assert other.get_last_param() == pytest.approx({"a.b": 0.5, "c": 0.5})
    with pytest.raises(TypeError, match="BaseDataSparsifier"):
        Rising(sparsifier_of(0.5), "sparsity_level")

    class Stranger(BaseDataScheduler):
        def get_schedule_param(self):
            return {"d": 0.5}

    with pytest.raises(ValueError, match=r"names \['d'\]"):
        Stranger(made(), "sparsity_level")


def test_code_written_for_torchs_schedulers_runs(recwarn):
    class Theirs(BaseScheduler):
        def get_sl(self):
            if not self._get_sl_called_within_step:
                warnings.warn("use get_last_sl()", stacklevel=2)
            return [level / 2 for level in self.base_sl]

    scheduler = Theirs(sparsifier_of(0.5))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="get_last_sl"):
        assert scheduler.get_sl() == [0.25]
    saved = Theirs(sparsifier_of(0.5, 0.5)).state_dict()
    with pytest.raises(ValueError, match="expected 1"):
        scheduler.load_state_dict(saved)
    assert scheduler.base_sl == [0.5]
    assert scheduler.get_last_sl() == [0.25]
