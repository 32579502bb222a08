"""torch.optim.swa_utils.AveragedModel of masked models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from deadband.masks import aggregate, mask, reduce
from deadband.masks.sparsifier import ActivationSparsifier

AVERAGES = {
    "plain": {},
    "plain, with buffers": {"use_buffers": True},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.75)},
    "ema, with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.75), "use_buffers": True},
    "ema, one by one, with buffers": {"avg_fn": get_ema_avg_fn(0.75), "use_buffers": True},
}


def linears():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)), ("2", "4")


def normalised():
    """Buffers of the same shape as the masks stand before, between and behind them."""
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(),
        nn.Linear(12, 12), nn.BatchNorm1d(12),
    )  # fmt: skip
    return model, ("3", "6")


def wrapped():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    return Wrapper(normalised()[0]), ("module.3", "module.6")


MODELS = {each.__name__: each for each in (linears, normalised, wrapped)}


class Training:
    """A model that is trained, masked and averaged, and one that never has masks, whose averages are torch's own."""

    def __init__(self, build, how, **options):
        torch.manual_seed(0)
        self.model, self.layers = build()
        self.sparsifier = ActivationSparsifier(
            self.model, options.pop("aggregate_fn", aggregate.mean_abs), reduce.mean, mask.magnitude, sparsity=0.5
        )
        for layer in self.layers:
            self.sparsifier.register_layer(self.model.get_submodule(layer), **options)
        self.how = how

    def begin(self, model=None):
        self.average = AveragedModel(self.model if model is None else model, **self.how)
        self.plain = AveragedModel(self.without_masks(), **self.how)

    def without_masks(self):
        model = copy.deepcopy(self.model)
        for module in model.modules():
            module._forward_pre_hooks.clear()
            module._buffers.pop("activation_mask", None)
        return model

    def step(self):
        for parameter in self.model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        self.model(torch.randn(16, 6))

    def update(self, model=None):
        before = [self.masks_of(self.model), [name for name, _ in self.model.named_buffers()]]
        self.average.update_parameters(self.model if model is None else model)
        self.plain.update_parameters(self.without_masks())
        now = [self.masks_of(self.model), [name for name, _ in self.model.named_buffers()]]
        assert before[1] == now[1]
        assert all(map(torch.equal, before[0], now[0]))

    def masks_of(self, model):
        masks = [model.get_submodule(layer)._buffers.get("activation_mask") for layer in self.layers]
        return [each for each in masks if each is not None]

    def check(self):
        """The average has the model's masks, in force, and otherwise what it has of a model without masks."""
        average, masks = self.average.module, self.masks_of(self.model)
        assert len(masks) == len(self.masks_of(average))
        assert all(map(torch.equal, masks, self.masks_of(average)))
        found, expected = average.state_dict(), self.plain.module.state_dict()
        assert {name for name in found if "mask" not in name} == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
        x = torch.randn(5, 6)
        reference = copy.deepcopy(self.plain.module).eval()
        for layer, each in zip(self.layers, masks, strict=False):
            reference.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, each=each: torch.where(each, args[0], 0)
            )
        with torch.no_grad():
            torch.testing.assert_close(copy.deepcopy(average).eval()(x), reference(x))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("how", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("begin", [0, 3])
def test_an_average_is_masked_as_its_model_is(build, how, begin):
    training = Training(build, how)
    for step in range(6):
        if step == begin:
            training.begin()
        training.step()
        if step == 2:
            training.sparsifier.step()
            training.sparsifier.squash_mask()
        if step == 4:
            with torch.no_grad():
                training.sparsifier.get_mask(training.layers[0])[:3] = False
        if step >= begin:
            training.update()
            training.check()
    names = {name for name in training.average.state_dict() if "mask" in name}
    assert names == {f"module.{layer}.activation_mask" for layer in training.layers}
    update_bn([torch.randn(8, 6) for _ in range(2)], training.average)
    again = AveragedModel(training.model, **how)
    again.load_state_dict(training.average.state_dict())


@pytest.mark.parametrize("how", AVERAGES.values(), ids=AVERAGES)
def test_an_average_follows_a_schedule_and_loses_masks_that_are_taken_off(how):
    training = Training(normalised, how)
    training.sparsifier.schedule(0.75, steps=4, begin=1)
    training.begin()
    kept = []
    for _ in range(7):
        training.step()
        training.sparsifier.step()
        training.update()
        training.check()
        kept += [int(each.sum()) for each in training.masks_of(training.average.module)[:1]]
    assert kept[-1] == 3
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) > 2
    training.sparsifier.unregister_layer("3")
    training.update()
    assert "activation_mask" not in training.average.module[3]._buffers
    assert "activation_mask" in training.average.module[6]._buffers
    assert not any(
        type(hook).__name__ == "MaskInput" for hook in training.average.module[3]._forward_pre_hooks.values()
    )


def test_averages_of_models_in_wrappers_and_of_features():
    training = Training(normalised, {}, aggregate_fn=torch.add, features=[1, 4], feature_dim=1)
    wrapper = nn.DataParallel(training.model)  # calls its module `module`, as DDP does
    training.begin()
    training.step()
    training.sparsifier.step()
    training.sparsifier.squash_mask()
    training.update(wrapper)
    training.check()
    training.begin(wrapper)
    training.update()
    assert all(map(torch.equal, training.masks_of(training.model), training.masks_of(training.average.module.module)))


def test_an_average_of_something_else():
    training = Training(linears, {})
    training.step()
    training.sparsifier.step()
    training.sparsifier.squash_mask()
    other = AveragedModel(nn.Sequential(nn.Linear(6, 12)))
    with pytest.raises(ValueError, match="the average has no layer '2', which the model masks"):
        other.update_parameters(training.model)
    assert other.n_averaged == 0


def test_a_copy_of_the_model_stays_dense():
    training = Training(linears, {})
    dense = copy.deepcopy(training.model)
    training.begin()
    training.step()
    training.sparsifier.step()
    training.sparsifier.squash_mask()
    training.update()
    assert not list(dense.buffers())
