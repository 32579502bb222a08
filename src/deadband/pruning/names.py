"""Modules and tensors of a model by name, as torch.ao.pruning's helpers find them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from deadband.layers.tensors import matrices, underlying


class ConfigError(AssertionError, ValueError):
    """A configuration that does not fit the model."""


def module_to_fqn(model: nn.Module, module: nn.Module, prefix: str = "") -> str | None:
    """The dotted path of `module` in `model`, the first if it has several: "" for the model itself, None if absent."""
    name = next((name for name, each in model.named_modules() if each is module), None)
    return prefix + name if name else name


def fqn_to_module(model: nn.Module | None, path: str) -> Any:
    """The module or tensor at a dotted path; "" gives the model, a step that is missing None."""
    for name in path.split(".") if path else ():
        model = getattr(model, name, None)
    return model


def get_arg_info_from_tensor_fqn(model: nn.Module, tensor_fqn: str) -> dict[str, Any]:
    """What a name says: `module_fqn`, `module` (None if absent), `tensor_name` and `tensor_fqn`.

    Example:
        >>> get_arg_info_from_tensor_fqn(nn.Sequential(nn.Linear(2, 3)), "0.weight")["module_fqn"]
        '0'
    """
    module_fqn, _, tensor_name = tensor_fqn.rpartition(".")
    module = fqn_to_module(model, module_fqn)
    return {"module_fqn": module_fqn, "module": module, "tensor_name": tensor_name, "tensor_fqn": tensor_fqn}


def near(name: str, names: Iterable[str]) -> str:
    """A part of a message: names that are like one, or some of them."""
    names = list(names)
    return f"there are for example {difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]}"


def tensor_at(model: nn.Module, info: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The tensor that `get_arg_info_from_tensor_fqn` tells of, and a key that is equal for all names of one tensor.

    Raises:
        ConfigError: there is none, or none that can be masked.
    """
    module, name, full = info["module"], info["tensor_name"], info["tensor_fqn"]
    tensor = getattr(module, name, None) if isinstance(module, nn.Module) else None
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"the model has no tensor {full!r}; {near(full, matrices(model))}")
    if hasattr(tensor, "placements") or not tensor.is_floating_point():
        what = f"{type(tensor).__name__} of {tensor.dtype}"
        raise ConfigError(f"{full!r} is a {what}; expected floats: prune before sharding and rounding")
    source = underlying(module, name)
    return tensor, (id(module), name) if source is None else id(source)
