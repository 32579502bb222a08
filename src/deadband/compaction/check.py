"""Proof that a change to a model changes nothing: copies of it, run on an example and on random variations."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from deadband.compaction.resize import Example, Resize, apply_, copy_rows_, layout_of, spatial_dims
from deadband.layers.hooks import take_input, with_input
from deadband.ops.nested import padded
from deadband.ops.skipping import apply_mask
from deadband.running.copies import copy_arguments

Masks = Mapping[str, Tensor]  # layer -> bool [features] on the CPU, True = keep


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in what a model returned, dense: in containers and in attributes of objects."""
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(padded(leaf) if leaf.is_nested else leaf.to_dense() if leaf.layout != torch.strided else leaf)
        elif isinstance(leaf, tuple):  # of a class of its own, as PackedSequence
            found += tensors_in(tuple(leaf))
        elif dataclasses.is_dataclass(leaf):
            found += tensors_in(vars(leaf))
    return found


@contextlib.contextmanager
def masking(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, inputs of the layers that `masks` names are zero where their mask is False."""
    handles = []
    try:
        for name, mask in masks.items():
            module = model.get_submodule(name)
            weight: Any = module.weight
            mask_input = _Masking(mask.to(weight.device), spatial_dims(module))
            handles.append(module.register_forward_pre_hook(mask_input, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Masking:
    def __init__(self, mask: Tensor, spatial: int) -> None:
        self.mask = mask.view(-1, *[1] * spatial)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = take_input(type(module).__name__, args, kwargs)
        return with_input(args, kwargs, apply_mask(x, self.mask))


class SkipError(Exception):
    """A variation shows nothing."""


class Check:
    """Runs copies of a model, masked and compacted, on its example and on random variations of both."""

    def __init__(self, model: nn.Module, example: Example, cleared: Masks | None = None) -> None:
        # cleared: by layer, output features (False) that keep their parameters in all variations
        self.model, self.example, self.cleared = model, example, dict(cleared or {})
        if "use_cache" in inspect.signature(model.forward).parameters:  # a cache is not what is compared
            self.example = (example[0], {"use_cache": False, **example[1]})
        self.dtype: torch.dtype | None
        # float64 leaves nothing but mistakes; some models cast to a dtype of their own on the way, which costs digits
        for self.dtype, self.tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-3), (None, 2e-2)):
            fresh = self.fresh()
            self.called: set[str] = set()
            for name, module in fresh.named_modules(remove_duplicate=False):
                module.register_forward_pre_hook(lambda _, args, name=name: self.called.add(name))
            try:
                self.run(fresh, self.arguments())
                break
            except Exception:
                if self.dtype is None:
                    raise

    def fresh(self) -> nn.Module:
        """A copy of the model in eval mode and in the dtype of checks."""
        model = copy.deepcopy(self.model).eval()
        return model if self.dtype is None else model.to(self.dtype)

    def arguments(self, noise: torch.Generator | None = None, discrete: bool = False) -> Example:
        """A copy of the example; with a generator floats move at random, and with `discrete` whole numbers, too."""

        def fresh(value: Any) -> Any:
            if noise is not None and isinstance(value, float):
                return value + float(torch.rand((), generator=noise))
            if not isinstance(value, Tensor):
                return copy.deepcopy(value)
            value = value.detach().clone()
            value = value.to(self.dtype) if value.is_floating_point() else value
            if noise is None or value.is_nested or value.layout is not torch.strided or not value.numel():
                return value
            if value.is_floating_point():
                return value + _random(value, noise) * (_spread(value) + 0.1)
            return _other_numbers(value, noise) if discrete and not value.is_complex() else value

        return tree_map(fresh, self.example)

    def run(self, model: nn.Module, arguments: Example) -> list[Tensor]:
        """The tensors that a call returns."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed GPUs, too
            return tensors_in(model(*arguments[0], **arguments[1]))

    def same(self, masks: Masks, resizes: Callable[[nn.Module, Example], Mapping[str, Resize]]) -> bool:
        """Whether the model cut down so gives what the masked one gives, for its own parameters and for others.

        Features are often masked because they are dead: with these parameters they cannot show that something still
        reads them.

        Args:
            masks: of the inputs of layers, in the model that is compared with.
            resizes: what each layer is cut down to, from the model with its parameters of then and the arguments; it
                may run the model, and raises `SkipError` for parameters that it cannot be told from.
        """
        for seed, discrete in ((None, False), (0, False), (1, True)):
            model, noise = self.variation(seed)
            arguments = self.arguments(noise, discrete)
            try:
                with masking(model, masks):
                    expected = self.run(model, copy_arguments(arguments))
                trains = seed is None and self._runs_in_training(model, arguments)
            except Exception:
                if seed is None:
                    raise
                continue  # the variation is none that this model can take
            try:
                apply_(model, resizes(model, arguments))
                found = self.run(model, copy_arguments(arguments))
                if trains and not self._runs_in_training(model, arguments):
                    return False  # a layer that only training calls
            except SkipError:
                continue
            except Exception:
                return False
            if len(found) != len(expected) or not all(map(self._close, found, expected)):
                return False
        return True

    def _runs_in_training(self, model: nn.Module, arguments: Example) -> bool:
        try:
            self.run(copy.deepcopy(model).train(), copy_arguments(arguments))
        except Exception:
            return False
        return True

    def variation(self, seed: int | None) -> tuple[nn.Module, torch.Generator | None]:
        """A copy of the model, with other parameters if there is a seed, and the generator for other inputs."""
        model, noise = self.fresh(), None
        if seed is not None:
            noise = torch.Generator().manual_seed(seed)
            _vary_(model, noise)
            copy_rows_(model, self.model, self.cleared)
        return model, noise

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        if found.shape != expected.shape:
            return False
        if not expected.is_floating_point():
            return torch.equal(found, expected)
        finite = expected[expected.isfinite()]
        size = finite.square().mean().sqrt().item() if finite.numel() else 0.0
        return torch.allclose(found, expected, rtol=self.tolerance, atol=self.tolerance * size, equal_nan=True)


def _spread(values: Tensor) -> float:
    return torch.nan_to_num(values.std(correction=0), 0.0, 0.0).item() if values.numel() else 0.0


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform between -1 and 1."""
    return torch.rand(like.shape, generator=generator).mul_(2).sub_(1).to(like)


def _other_numbers(values: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers or bools drawn from those that are there, and from 0 and 1 if there are no others."""
    known = values.unique()
    if values.dtype == torch.bool or (int(known[0]) >= 0 and int(known[-1]) <= 1):
        known = torch.tensor([0, 1])
    chosen = torch.randint(len(known), values.shape, generator=generator)
    return known.to("cpu")[chosen].to(values)


@torch.no_grad()
def _vary_(model: nn.Module, generator: torch.Generator) -> None:
    """Other parameters of about the same size and, where that is allowed, of either sign, which wakes dead features."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                noise, size = _random(parameter, generator), 0.3 * _spread(parameter) + 0.03
                if layout_of(module) is not None:
                    parameter.mul_(noise.sign())
                parameter.add_(noise, alpha=size)
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.add_(_random(mean, generator), alpha=_spread(mean) + 0.1)
            variance.mul_(1 + _random(variance, generator).abs())
