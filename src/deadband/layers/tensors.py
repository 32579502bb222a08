"""Tensors of modules by name, be they parametrized or tied; and modules that take the place of others."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList


def unwrapped(model: Any) -> nn.Module:
    """The model in what torch.compile, DataParallel or DistributedDataParallel put around it."""
    while True:
        parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = model.module if parallel else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def underlying(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer behind a tensor of a module, be it parametrized; None if that is several, or none.

    Example:
        >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
        >>> underlying(layer, "weight") is layer.parametrizations.weight.original
        True
    """
    lists: Any = getattr(module, "parametrizations", {})
    if name in lists:
        return lists[name].original if lists[name].is_tensor else None
    return module._parameters.get(name, module._buffers.get(name))


def tensor_names(module: nn.Module) -> list[str]:
    """The names of a module's own parameters and buffers, parametrized or not."""
    return [*module._parameters, *module._buffers, *getattr(module, "parametrizations", {})]


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that hold each parameter or buffer, by its id, and its name there: more than one if it is tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name in () if isinstance(module, ParametrizationList) else tensor_names(module):
            if (tensor := underlying(module, name)) is not None:
                found.setdefault(id(tensor), []).append((module, name))
    return found


def remove_parametrizations(module: nn.Module, name: str, leave_parametrized: bool) -> None:
    """As torch's function, but deep copies of the module stay whole.

    Copies share the class that has the property of the tensor, and torch takes the property off the class.
    """
    kind = type(module)
    body = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, body)
    parametrize.remove_parametrizations(module, name, leave_parametrized)


def module_contains_param(module: nn.Module, parametrization: type[nn.Module]) -> bool:
    """Whether a tensor of `module` has a parametrization of that class."""
    lists: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    return any(isinstance(each, parametrization) for every in lists.values() for each in every)


def swap_module(module: nn.Module, mapping: Mapping[type[nn.Module], Any]) -> nn.Module:
    """What `mapping` makes of a module by `from_dense` or `from_float` of a class, with hooks, mode and device."""
    kind: Any = mapping.get(parametrize.type_before_parametrizations(module))
    if kind is None:
        return module
    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    if len(devices) > 1:
        raise ValueError(f"a module's tensors are on {sorted(map(str, devices))}; expected one device")
    made = (kind.from_dense if hasattr(kind, "from_dense") else kind.from_float)(module)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        for hooks in (name, f"{name}_with_kwargs"):
            getattr(made, hooks).update(getattr(module, hooks))
    return made.train(module.training).to(*devices)


def matrices(model: nn.Module, pattern: str = "*", exclude: str | Sequence[str] = ()) -> list[str]:
    """The names of a model's tensors of two or more dimensions that match a glob, and none of those to leave out.

    Example:
        >>> matrices(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), exclude="1.*")
        ['0.weight']
    """
    left_out = [exclude] if isinstance(exclude, str) else exclude
    found = []
    for module_name, module in model.named_modules():
        inside = ".parametrizations." in f".{module_name}."
        for name in () if inside else tensor_names(module):
            full, value = f"{module_name}.{name}".lstrip("."), getattr(module, name)
            if value is not None and value.dim() > 1 and fnmatch.fnmatchcase(full, pattern):
                found += [full] if not any(fnmatch.fnmatchcase(full, each) for each in left_out) else []
    return found


def like(parameter: Tensor) -> Any:
    """A block in which to make a tensor that `parameter.data` is set to.

    What was made under inference mode needs data that was, too: with any other, torch refuses to multiply by it in
    every mode (2.13: "Inference tensors do not track version counter").
    """
    return torch.inference_mode(parameter.is_inference())
