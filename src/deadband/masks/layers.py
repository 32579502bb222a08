"""What an ActivationSparsifier has to know about the layers that it watches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deadband.masks.accumulator import as_features
from deadband.masks.aggregate import Aggregate

FUNCTIONS = ("aggregate_fn", "reduce_fn", "mask_fn")
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


class LayerError(ValueError, KeyError, AssertionError):
    """A layer that is unknown, or that no input has reached.

    torch's class raises AssertionError, ValueError or KeyError for these; code that catches them goes on to work.
    """

    __str__ = Exception.__str__  # KeyError's would show the message in quotes


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


def family_of(layer: nn.Module) -> str | None:
    """The class of torch that a layer is of, where a state may not go from one class to another."""
    families = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    return next((family.__name__ for family in families if isinstance(layer, family)), None)


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
