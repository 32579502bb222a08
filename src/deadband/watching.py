"""The hook with which an ActivationSparsifier watches a layer, and what it has to know about layers."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deadband.accumulation import Accumulator, as_features
from deadband.aggregate import Aggregate, rows_of
from deadband.copies import copy_arguments
from deadband.hooks import arguments_of, padded, padded_shape, rows_of_parts, take_input
from deadband.ops.watch import issue_ticket, watch

if TYPE_CHECKING:
    from deadband.activation_sparsifier import ActivationSparsifier

FUNCTIONS = ("aggregate_fn", "reduce_fn", "mask_fn")
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


class LayerError(ValueError, KeyError, AssertionError):
    """A layer that is unknown, or that no input has reached.

    torch's class raises AssertionError, ValueError or KeyError for these; code that catches them goes on to work.
    """

    __str__ = Exception.__str__  # KeyError's would show the message in quotes


class WatchInput:
    """A forward pre-hook that hands a layer's input to the sparsifier."""

    def __init__(self, owner: ActivationSparsifier, name: str, config: dict[str, Any]) -> None:
        self.owner: Any = weakref.ref(owner)
        self.name = name
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
                name,
                config["aggregate_fn"],
                features,
                config["feature_dim"],
                zero_start=owner.zero_start,
                widen=owner.widen,
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
        """Aggregate one input, unless it is computed again in the backward pass (activation checkpointing)."""
        owner: ActivationSparsifier | None = self.owner()
        if owner is None or torch._C._current_graph_task_id() != -1 or torch.jit.is_tracing():
            return
        with owner._lock:
            config = owner.data_groups.get(self.name)
            if config is None or owner._watches.get(self.name) is not self:
                return
            if owner.training_only and not config["layer"].training:
                return
            while torch._C._functorch.is_functorch_wrapped_tensor(x):  # under vmap, the dimension that it hides first
                dim = torch._C._functorch.maybe_get_bdim(x)
                x = torch._C._functorch.get_unwrapped(x)
                x = x.movedim(dim, 0) if dim > 0 else x
            if torch.is_inference_mode_enabled():
                with torch.inference_mode(False), torch.no_grad():
                    self._add(owner, config, x)
            else:
                self._add(owner, config, x)

    def _add(self, owner: ActivationSparsifier, config: dict[str, Any], x: Tensor) -> None:
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
        if "data" not in config and not self.in_force:
            owner._state[self.name]["mask"] = self._keep_all(x, shape)
            self.stepped = False
        config["data"] = new
        self.shape = shape

    def _keep_all(self, x: Tensor, shape: torch.Size) -> Any:
        """The mask until the next step; expanded, ones take no memory."""
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
    """A forward pre-hook of the model that keeps the arguments of one call, for `compact_`, and goes."""

    def __init__(self, owner: ActivationSparsifier) -> None:
        self.owner: Any = weakref.ref(owner)

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": None}

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep the arguments, once."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if traced or torch._C._functorch.peek_interpreter_stack() is not None:  # arguments without values
            return
        owner = self.owner() if self.owner is not None else None
        if owner is not None and owner._example is None:
            try:
                owner._example = copy_arguments((args, kwargs))
            except TypeError as error:
                owner._no_example = f"the call of the model that was seen cannot be kept: {error}"
            owner._handles.pop(RememberCall, None)
        _remove_hook(module, self)


def feature_dimension(layer: nn.Module, given: int | None = None) -> int:
    """Where the features of a layer's input lie: `given`, or the channels of a convolution, or the last dimension."""
    if given is not None:
        return given
    if isinstance(layer, nn.modules.conv._ConvNd):
        return -len(layer.kernel_size) - 1
    for kind, dim in ((nn.InstanceNorm1d, -2), (nn.InstanceNorm2d, -3), (nn.InstanceNorm3d, -4)):
        if isinstance(layer, kind):
            return dim
    if isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return 1
    return -1


def input_features(layer: nn.Module) -> int | None:
    """How many features the input of a layer has, where the layer says so."""
    for name in ("in_features", "in_channels", "num_features", "input_size", "embed_dim", "nx"):
        if isinstance(value := getattr(layer, name, None), int):
            return value
    return None


def check_config(name: str, config: dict[str, Any]) -> None:
    """Bring the features of a layer's configuration into order; an error says what cannot be."""
    if isinstance(config["features"], str):
        if config["features"] != "all":
            raise TypeError(f"layer {name!r}: features={config['features']!r}; expected whole numbers, or 'all'")
        config["features"] = None
    for role in FUNCTIONS:
        if not callable(config[role]):
            if role in ("reduce_fn", "mask_fn") and keeps_statistics(config):
                continue
            raise AssertionError(f"{config[role]} must be callable: {role} of layer {name!r}")
    if config["features"] is None:
        return
    if config["feature_dim"] is None and not isinstance(config["aggregate_fn"], Aggregate):
        raise AssertionError(f"need feature dim to select features: layer {name!r} has features but no feature_dim")
    try:
        features = as_features(config["features"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r}: {error}") from None
    if not isinstance(config["features"], (list, tuple, range, Tensor)):
        config["features"] = features


def keeps_statistics(config: Mapping[str, Any]) -> bool:
    """Whether a layer is watched for statistics, from which no mask is made."""
    return bool(getattr(config["aggregate_fn"], "keeps_statistics", False))


def kind_of(layer: nn.Module) -> dict[str, Any]:
    """What a layer has to have in common with the one that a state was saved for."""
    families = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return {
        "layer": next((family.__name__ for family in families if isinstance(layer, family)), None),
        "features": input_features(layer),
    }


def facts_of(sparsifier: ActivationSparsifier, name: str) -> dict[str, Any]:
    """What loading a layer has to know beyond what torch's class saves."""
    watching, masking = sparsifier._watches.get(name), sparsifier._masks.get(name)
    layer = sparsifier.data_groups[name]["layer"]
    shape = watching.shape if watching is not None else None
    if shape is None and masking is not None and masking.features is not None:
        buffer = layer._buffers.get(masking.buffer)
        shape = buffer.shape if buffer is not None and buffer.dim() else None
    return {
        **kind_of(layer),
        "shape": None if shape is None else list(shape),
        "buffer": masking.buffer if masking is not None else None,
        "unset": masking.unset if masking is not None else watching is not None and not watching.stepped,
    }


def saved_hook_state(config: Mapping[str, Any]) -> str:
    """torch's class says `sparsify` of every squashed layer; of one that is not masked, `None` is saved."""
    return config["hook_state"] if "hook" in config else "None"


def same_layer(name: str, names: Mapping[str, Any]) -> str | None:
    """The one of `names` that means the same layer, whatever wrappers stand in between."""
    if name in names:
        return name
    found = [each for each in names if bare_name(each) == bare_name(name)]
    return found[0] if len(found) == 1 else None


def bare_name(name: str) -> str:
    """The name of a layer without the wrappers around it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def ones_like(data: Any) -> Any:
    """Ones in the shape of a tensor, or of each in a list; expanded from a single one, so that they take no memory."""
    if isinstance(data, list):
        return [ones_like(each) for each in data]
    if not data.dim():
        return torch.ones_like(data)
    return data.new_ones(()).expand(data.shape)


def some(names: Any) -> str:
    """The first few of many names, for messages."""
    names = list(names)
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
