"""Masks on weights, as parametrizations: what a module reads as its weight is masked, the original stays beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn


class _Mask(nn.Module):
    """A mask that stays one object, whatever becomes of the model, and is in no state dict."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        moved = fn(self.mask)
        if torch._has_compatible_shallow_copy_type(self.mask, moved):
            self.mask.data = moved
        else:
            self.mask = moved
        return self


class FakeSparsity(_Mask):
    """A mask of the tensor's shape: entries where it is zero are zero, whatever they were, others are multiplied by it.

    Example:
        >>> FakeSparsity(torch.tensor([1.0, 0.0]))(torch.tensor([-2.0, float("nan")]))
        tensor([-2.,  0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` masked, in its own dtype."""
        if self.mask.shape != x.shape:
            raise AssertionError(f"the mask has shape {list(self.mask.shape)}; expected the tensor's, {list(x.shape)}")
        return torch.where(self.mask == 0, 0, self.mask * x).to(x.dtype)


class FakeStructuredSparsity(_Mask):
    """A bool mask of rows, True = keep: the others are zero. `dim` is the dimension that counts rows."""

    def __init__(self, mask: Tensor, dim: int = 0) -> None:
        super().__init__(mask)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """`x` with masked rows set to zero."""
        if self.mask.shape != x.shape[self.dim : self.dim + 1]:
            raise AssertionError(f"the mask has shape {list(self.mask.shape)}; expected one per row of {list(x.shape)}")
        return torch.where((self.mask != 0).view([-1 if dim == self.dim else 1 for dim in range(x.dim())]), x, 0)


def unmasked(module: nn.Module, tensor_name: str) -> Tensor:
    """A tensor as it is without masks: what masks are made from, so that what one drops can come back."""
    lists: Any = getattr(module, "parametrizations", {})
    if tensor_name not in lists:
        return cast(Tensor, getattr(module, tensor_name))
    parametrizations = lists[tensor_name]
    steps = [each for each in parametrizations if not isinstance(each, _Mask)]
    if parametrizations.is_tensor:
        value = parametrizations.original
    else:  # of several tensors, as of weight_norm, which then is the first
        value = steps.pop(0)(*(getattr(parametrizations, f"original{i}") for i in range(parametrizations.ntensors)))
    for step in steps:
        value = step(value)
    return cast(Tensor, value)


def masked_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict that squashing all masks of weights would give; None if there is none."""
    state: dict[str, Tensor] = {}
    gone: set[str] = set()
    shared: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        lists: Any = getattr(module, "parametrizations", {})
        for name in lists:
            if any(isinstance(each, _Mask) for each in lists[name]):
                full = f"{prefix}.{name}".lstrip(".")
                value = getattr(module, name).detach()
                state[full] = shared.setdefault(id(lists[name]._parameters.get("original", lists[name])), value)
                gone.add(f"{prefix}.parametrizations.{name}.".lstrip("."))
    if not state:
        return None
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith(tuple(gone))}
    return kept | state
