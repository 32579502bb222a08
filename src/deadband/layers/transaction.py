"""All or nothing: what changes the layers of a model leaves it as it was if it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from deadband.layers.tensors import like


@contextlib.contextmanager
def all_or_nothing(modules: Iterable[nn.Module], values: Iterable[Tensor] = ()) -> Iterator[None]:
    """On any exception in the block, Ctrl-C included, the modules have their class, attributes and tensors again.

    Parameters are the same objects as before, and where the block stored their values in another order, in the order
    of before. Values that the block overwrites come back only for the tensors in `values`, of which it keeps copies.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> try:
        ...     with all_or_nothing([layer]):
        ...         layer.out_features = 3
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     print(layer.out_features)
        2
    """
    before = [_Before(module) for module in dict.fromkeys(modules)]
    copies = [(value, value.detach().clone()) for value in values]
    try:
        yield
    except BaseException:
        for each in before:
            each.restore()
        with torch.no_grad():
            for value, copied in copies:
                value.copy_(copied)
        raise


class _Before:
    """What a module was."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        held = [module._parameters, module._buffers, module._modules, module._non_persistent_buffers_set]
        contents: list[Any] = [vars(module), *held]
        self.contents = [(each, each.copy()) for each in contents]
        parameters = [each for each in module._parameters.values() if each is not None]
        self.parameters = [(each, type(each), each.shape, each.stride()) for each in parameters]

    def restore(self) -> None:
        self.module.__class__ = self.kind
        for values, copied in self.contents:
            values.clear()
            values.update(copied)
        for parameter, kind, shape, strides in self.parameters:
            cast(Any, parameter).__class__ = kind
            if parameter.shape == shape and parameter.stride() != strides:
                with like(parameter), torch.no_grad():
                    data = torch.empty_strided(shape, strides, dtype=parameter.dtype, device=parameter.device)
                    parameter.data = data.copy_(parameter.data)
