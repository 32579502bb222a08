"""Deep copies of models, and of the arguments of their calls, where tensors are part of a graph."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Value = TypeVar("Value")


class _Copying(TorchFunctionMode):
    """Sees the tensors that `copy.deepcopy` comes to, wherever they are kept.

    torch refuses to copy a tensor that was computed with gradients, such as activations or a loss that a module leaves
    behind; here, the copy has its values.

    Args:
        views: with False, a tensor that is a part of another is copied alone.
    """

    def __init__(self, *, views: bool) -> None:
        super().__init__()
        self.views = views

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            x, memo = args
            if x.grad_fn is not None or not self.views:
                return memo.setdefault(id(x), x.detach().clone())
            if x.grad is not None and x.grad.grad_fn is not None:
                memo[id(x.grad)] = x.grad.detach().clone()
        return func(*args, **(kwargs or {}))


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy of a model, without the graphs of tensors that it keeps.

    Raises:
        TypeError: it keeps something that cannot be copied, such as a lock or an open file.
    """
    return _copy(model, views=True)


def copy_arguments(arguments: Value) -> Value:
    """A deep copy of what a model is called with, without graphs, and without the rest of a larger tensor.

    Raises:
        TypeError: there is something among them that cannot be copied.
    """
    return _copy(arguments, views=False)


def _copy(value: Value, *, views: bool) -> Value:
    with torch.inference_mode(False), torch.no_grad(), _Copying(views=views):
        try:
            return copy.deepcopy(value)
        except Exception as error:
            what = type(value).__name__ if isinstance(value, nn.Module) else "an argument"
            raise TypeError(f"{what} cannot be copied by copy.deepcopy ({type(error).__name__}: {error})") from error
