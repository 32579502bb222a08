"""Examples: the arguments of one call of a model, which what compaction does is checked and measured on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from deadband.compaction.check import tensors_in
from deadband.compaction.resize import Example
from deadband.running.copies import copy_arguments
from deadband.running.forward import evaluating

_SIDES = (32, 28, 64, 96, 128, 224, 256, 16, 8)  # of images that a model may take


def guess_example(model: nn.Module) -> Example:
    """Random arguments that the model takes, by its first layer.

    Raises:
        ValueError: none was found.
    """
    for example in _guesses(model):
        with contextlib.suppress(ValueError):
            outputs_of(model, example)
            return example
    raise ValueError("an example is needed: pass the arguments of one call of the model, or call the model first")


def _guesses(model: nn.Module) -> Iterator[Example]:
    for module in model.modules():
        like: Any = next(iter(module.parameters()), None)
        shapes: list[tuple[int, ...]] = []
        if isinstance(module, nn.Embedding):
            yield ((torch.arange(2 * 8, device=like.device).view(2, 8) % module.num_embeddings,), {})
        elif isinstance(module, nn.RNNBase):
            shapes = [(3, 2, module.input_size)]
        elif isinstance(module, nn.Linear):
            shapes = [(2, module.in_features)]
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            shapes = [(2, module.in_channels, *[side] * len(module.kernel_size)) for side in _SIDES]
        for shape in shapes:
            yield ((torch.randn(shape).to(like),), {})
        if shapes or isinstance(module, nn.Embedding):
            return


def as_call(example: Any) -> Example:
    """The arguments of one call, `(positional, keyword)`, of a tensor, a tuple of positional arguments or a mapping."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example) if isinstance(example, (tuple, list)) else (example,), {}


def few_rows(model: nn.Module, example: Example) -> Example:
    """The first two rows of an example where that changes nothing but the time that calls take; else the example.

    The first dimension need not be a batch's: it may be nodes of a graph, features, channels, or time. So the model is
    run on both, and two rows have to give the first two rows of the output. What may be indices into the first
    dimension is not tried, as kernels may read outside of their memory.

    Raises:
        ValueError: the model does not run on the example.
    """
    whole, rows = outputs_of(model, example), _rows_to_try(example)
    if rows <= 2:
        return example
    short = copy_arguments(tree_map(lambda leaf: leaf[:2] if _has_rows(leaf, rows) else leaf, example))
    try:
        found = outputs_of(model, short)
    except ValueError:
        return example
    wanted = [each[:2] if _has_rows(each, rows) else each for each in whole]
    return short if len(found) == len(wanted) and all(map(_near, found, wanted)) else example


def _rows_to_try(example: Example) -> int:
    """The length of the first dimension that all tensors share; 0 if some may index into it, or have no such thing."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()]
    if any(tensor.layout is not torch.strided or tensor.is_nested for tensor in tensors):
        return 0
    kinds = {tensor.is_floating_point() for tensor in tensors if tensor.dtype != torch.bool}
    indices = len(kinds) > 1 or any(tensor.dim() == 1 and not tensor.is_floating_point() for tensor in tensors)
    sizes = {tensor.shape[0] for tensor in tensors}
    return sizes.pop() if len(sizes) == 1 and not indices else 0


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def _near(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.double(), expected.double()
    scale = expected.abs().nan_to_num(0, 0, 0).mean().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * scale, equal_nan=True)


def outputs_of(model: nn.Module, example: Example) -> list[Tensor]:
    """All tensors that one call in eval mode returns, dense.

    Raises:
        ValueError: the model does not run on the example.
    """
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed GPUs, too
            return tensors_in(call(model, copy_arguments(example)))
    except Exception as error:
        raise ValueError(
            f"the model does not run on the example, {_shown(example)}: {type(error).__name__}: {error}. Pass "
            "example=: the arguments of one call of the model as it is now (a tensor, a tuple of positional arguments, "
            "or a mapping of keyword arguments)"
        ) from error


def _shown(example: Example) -> str:
    def shown(value: Any) -> str:
        if not isinstance(value, Tensor):
            return type(value).__name__
        return f"{str(value.dtype).removeprefix('torch.')} {'nested' if value.is_nested else list(value.shape)}"

    named = [f"{name}={shown(value)}" for name, value in example[1].items()]
    return f"({', '.join([*map(shown, example[0]), *named])})"


def call(model: nn.Module, example: Example) -> Any:
    """One call of a model."""
    return model(*example[0], **example[1])
