"""Gated MLPs whose gates close by nature: their up-projections lie by output, so that closed outputs are not read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deadband.layers.sparse import SparseSite, lay_out_, tensor_of
from deadband.ops import kernels

GATED = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),  # the gate is the first half of its outputs
    ("w1", "w3", "w2"),
    ("wi_0", "wi_1", "wo"),
)
"""What models call the layers of a gated MLP: gate, up and down."""
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "act_func")


def activation_of(module: nn.Module, names: tuple[str, str, str]) -> Callable[[Tensor], Tensor] | None:
    """What a gated MLP applies to its gate; None where the module is none, or does not say."""
    if any(not isinstance(getattr(module, name, None), nn.Module) for name in names):
        return None
    for attribute in _ACTIVATIONS:
        activation = getattr(module, attribute, None)
        if callable(activation):
            return activation
    return F.silu if names[0] == "w1" else None  # Llama's own code calls it by name


def closes(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation gives zeros for what is negative, as ReLU and its square do.

    Example:
        >>> closes(nn.ReLU()), closes(nn.SiLU())
        (True, False)
    """
    try:
        with torch.no_grad(), torch.device("cpu"):
            return not bool(activation(torch.linspace(-8, -0.5, 16)).any())
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # it has parameters, elsewhere
        return False


def closing_mlps(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """The names of gate, up and down of the gated MLPs in a model, dense or sparse, whose gates close by nature.

    By their activation, or as Gemma 3n's, whose `activation_sparsity` says which part of a gate's entries is zero.

    Example:
        >>> list(closing_mlps(nn.ReLU()))
        []
    """
    for module, (gate, up, down), activation in _gated_mlps(model):
        by_nature = getattr(module, "activation_sparsity", 0.0)
        if closes(activation) or (isinstance(by_nature, float) and by_nature > 0):
            yield gate, up, down


def _gated_mlps(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, str, str], Callable[[Tensor], Tensor]]]:
    """Gated MLPs of three linear layers, the names of these, and the activation."""
    for path, module in model.named_modules():
        for names in GATED:
            layers: Any = [module._modules.get(name) for name in names]
            if len(set(names)) < 3 or not all(isinstance(each, nn.Linear) for each in layers):
                continue
            activation = activation_of(module, names)
            if activation is not None:
                gate, up, down = (f"{path}.{name}".lstrip(".") for name in names)
                yield module, (gate, up, down), activation


def gates_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """By the name of each up-projection of a gated MLP, the activation of its gate and the name of its down-projection.

    The gate's entries are what that module returns, and the outputs of up are multiplied by them. MLPs of which gate
    and up are one layer, and those that apply a function to the gate instead of a module, are none of these.

    Example:
        >>> gates_of(nn.ReLU())
        {}
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    owners: dict[nn.Module, int] = {}
    for _, (_, up, down), activation in _gated_mlps(model):
        if isinstance(activation, nn.Module):
            found[up] = activation, down
            owners[activation] = owners.get(activation, 0) + 1
    return {name: each for name, each in found.items() if owners[each[0]] == 1}


def arrange_(model: nn.Module) -> None:
    """Lay up-projections out by output where that serves: where a gate closes, and up skips none of its own inputs.

    So do those whose rule is of their gate.

    All others lie by input. Layers that lie as they should stay as they are.
    """
    mlps = ([model.get_submodule(name) for name in names] for names in closing_mlps(model))
    ups = {up for gate, up, down in mlps if isinstance(down, SparseSite) and _can_lie_by_output(up)}
    for module in model.modules():
        if isinstance(module, SparseSite) and module.by_output != (module.gate or module in ups):
            module.by_output = not module.by_output
            lay_out_(module)


def _can_lie_by_output(up: nn.Module) -> bool:
    if not isinstance(up, SparseSite):
        return False
    stored = tensor_of(up)
    return (
        kernels.library is not None
        and stored.device.type == "cpu"
        and not up.stored_in_out
        and up.mask is None
        and up.center is None
        and up.threshold.item() == 0
    )
