"""The hooks with which an ActivationSparsifier watches its layers, and a call of its model."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deadband.layers.hooks import arguments_of, take_input
from deadband.masks.accumulator import Accumulator, as_features
from deadband.masks.aggregate import Aggregate, rows_of
from deadband.masks.layers import feature_dimension, ones_like
from deadband.ops.nested import padded, padded_shape, rows_of_parts
from deadband.ops.watch import issue_ticket, watch


class WatchInput:
    """A forward pre-hook that hands a layer's input to the sparsifier, and what is aggregated of it.

    Args:
        name: of the layer.
        config: its entry of `data_groups`.
        owner: the sparsifier.
        receive: its method that takes this hook and each input.
        zero_start, widen: as for the sparsifier.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        owner: Any,
        receive: Callable[[Any, WatchInput, Tensor], None],
        *,
        zero_start: bool,
        widen: bool,
    ) -> None:
        self.name = name
        self.owner: Any = weakref.ref(owner)  # the sparsifier goes when its user lets it go
        self.receive = receive
        self.order = arguments_of(config["layer"])
        self.in_force = False  # the last step's mask is: a schedule's
        self.shape: torch.Size | None = None  # of the last input
        self.stepped = False
        self.ready_made: Aggregate | None = None
        self.accumulator: Accumulator | None = None
        if isinstance(config["aggregate_fn"], Aggregate):
            self.ready_made = config["aggregate_fn"]
            self.dim = feature_dimension(config["layer"], config["feature_dim"])
        else:
            features = None if config["features"] is None else as_features(config["features"])
            self.accumulator = Accumulator(
                name, config["aggregate_fn"], features, config["feature_dim"], zero_start=zero_start, widen=widen
            )
        self.ticket: Tensor | None = issue_ticket(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model alone is not watched: its inputs are not those of the model that is."""
        return {"name": self.name, "owner": None, "ticket": None}

    def begin(self) -> None:
        """Start again after a step."""
        if self.accumulator is not None:
            self.accumulator.reset()

    def release(self) -> None:
        """What was aggregated so far is about to be shared."""
        if self.accumulator is not None:
            self.accumulator.release()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at the input."""
        if torch.compiler.is_exporting():
            return
        if self.ticket is None:  # came with a copy of the model
            _remove_hook(module, self)
            return
        x = take_input(self.name, args, kwargs, self.order)
        if torch.compiler.is_compiling():
            watch(x.detach(), self.ticket)
        else:
            self.see(x)

    def see(self, x: Tensor) -> None:
        """Hand on one input, unless it is computed again in the backward pass (activation checkpointing)."""
        owner = self.owner()
        if owner is None or torch._C._current_graph_task_id() != -1 or torch.jit.is_tracing():
            return
        self.receive(owner, self, x)

    def add(self, config: dict[str, Any], x: Tensor) -> Any:
        """Aggregate one input into `config`, the layer's entry of `data_groups`.

        Returns:
            The mask until the next step, if this is the first input since the last one and no mask is in force.
        """
        while torch._C._functorch.is_functorch_wrapped_tensor(x):  # under vmap, the dimension that it hides first
            dim = torch._C._functorch.maybe_get_bdim(x)
            x = torch._C._functorch.get_unwrapped(x)
            x = x.movedim(dim, 0) if dim > 0 else x
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self._add(config, x)
        return self._add(config, x)

    def _add(self, config: dict[str, Any], x: Tensor) -> Any:
        if x.requires_grad:
            x = x.detach()
        before = _on(x.device, config.get("data"))  # the model may have moved since
        shape = padded_shape(x)
        if self.ready_made is not None:
            self._check_features(before, shape)
            x, dim = (rows_of_parts(x, self.dim), -1) if x.is_nested else (x, self.dim)
            rows = config.get("rows", 0)
            with torch.no_grad():
                new = self.ready_made(before, rows, x, dim)
            config["rows"] = rows + rows_of(x, dim)
        else:
            assert self.accumulator is not None
            x = padded(x)
            new = self.accumulator.add(before, x)
        mask = None
        if "data" not in config and not self.in_force:
            mask = self._keep_all(x, shape)
            self.stepped = False
        config["data"] = new
        self.shape = shape
        return mask

    def _keep_all(self, x: Tensor, shape: torch.Size) -> Any:
        """Expanded, ones take no memory."""
        if self.ready_made is not None:
            return torch.ones((), dtype=torch.bool, device=x.device).expand(shape[self.dim])
        assert self.accumulator is not None
        if self.accumulator.selection is None:
            return ones_like(x)
        if not self.accumulator.features:
            return []
        return list(ones_like(self.accumulator.selection.of(x)).split(1, self.accumulator.feature_dim))

    def _check_features(self, before: Any, shape: torch.Size) -> None:
        if not -len(shape) <= self.dim < len(shape):
            raise IndexError(
                f"layer {self.name!r}: its input of shape {tuple(shape)} has no dimension {self.dim} of features"
            )
        if isinstance(before, Tensor) and before.shape != (shape[self.dim],):
            raise ValueError(
                f"layer {self.name!r}: its input of shape {tuple(shape)} has {shape[self.dim]} features along "
                f"dimension {self.dim}; the inputs before had {before.numel()}. Name their dimension with feature_dim="
            )


def _on(device: torch.device, data: Any) -> Any:
    if isinstance(data, list):
        return data if all(each.device == device for each in data[:1]) else [each.to(device) for each in data]
    return data.to(device) if isinstance(data, Tensor) and data.device != device else data


def _remove_hook(module: nn.Module, hook: Any) -> None:
    for number, each in list(module._forward_pre_hooks.items()):
        if each is hook:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


class RememberCall:
    """A forward pre-hook of the model that hands the arguments of one call to the sparsifier, and goes."""

    def __init__(self, receive: Callable[[tuple, dict], None]) -> None:
        self.receive: Any = weakref.WeakMethod(receive)

    def __getstate__(self) -> dict[str, Any]:
        return {"receive": None}

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Hand the arguments on, once."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if traced or torch._C._functorch.peek_interpreter_stack() is not None:  # arguments without values
            return
        receive = self.receive() if self.receive is not None else None
        if receive is not None:
            receive(args, kwargs)
        _remove_hook(module, self)
