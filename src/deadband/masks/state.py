"""The state of an ActivationSparsifier in the form of torch's class, and in either form as it fits a model's layers."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deadband.masks.aggregate import Aggregate
from deadband.masks.layers import LayerError, check_config, family_of, input_features, same_layer, some
from deadband.masks.portable import FORMAT, from_portable
from deadband.masks.portable_checks import check_group
from deadband.masks.schedule import Schedule
from deadband.masks.snapshot import LayerSnapshot, Snapshot, without


def torch_state(snapshot: Snapshot) -> dict[str, Any]:
    """What torch's class returns from `state_dict`; the facts that it lacks go along as the attribute `_metadata`."""
    groups: dict[str, Any] = defaultdict()
    groups.update((name, dict(saved.config)) for name, saved in snapshot.layers.items())
    result: OrderedDict[str, Any] = OrderedDict(state=_converted(snapshot.state, Tensor.to_sparse_coo))
    result.update(data_groups=groups, defaults=snapshot.defaults)
    result.__dict__["_metadata"] = {name: saved.facts for name, saved in snapshot.layers.items()}
    return result


def from_torch_state(state_dict: Mapping[str, Any], schedule: Schedule | None) -> Snapshot:
    """A state of torch's class, or of ours in its form, which knows of no schedule."""
    facts = getattr(state_dict, "_metadata", {})
    defaults, groups = copy.copy(state_dict["defaults"]), state_dict["data_groups"]
    state = _converted(state_dict["state"], Tensor.to_dense)
    layers = {}
    for name, group in groups.items():
        config = {key: value if _may_share(key, value) else copy.deepcopy(value) for key, value in group.items()}
        layers[name] = LayerSnapshot.from_facts(without(config, "hook", "layer"), facts.get(name, {}))
    return Snapshot(defaults, layers, state, schedule)


def read_state(
    state_dict: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], present: Snapshot, model: nn.Module
) -> tuple[Snapshot, dict[str, nn.Module]]:
    """A saved state, in either form, as it fits a model; and the layers that it is of, by name.

    Args:
        state_dict: what `ActivationSparsifier.state_dict` returned.
        functions: as for `ActivationSparsifier.load_state_dict`.
        present: the sparsifier that is to take it over, as it is: its functions are known, its schedule may go on.
        model: whose layers are meant, by the same names or those in other wrappers.

    Raises:
        LayerError: a layer is not in the model.
        ValueError: a layer of another type or size, an unknown function or hook state.
    """
    portable = state_dict.get("format") == FORMAT
    if portable:
        snapshot = from_portable(state_dict, functions, present)
    else:
        snapshot = from_torch_state(state_dict, present.schedule)
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    for name, saved in snapshot.layers.items():
        found = same_layer(name, modules)
        if found is None:
            raise LayerError(f"layer {name} not found in the model")
        names[name] = found
        _check_layer(name, saved, modules[found])
        if portable:
            _check_contents(name, saved.config, snapshot.state[name]["mask"], modules[found])
    if len(set(names.values())) < len(names):
        raise ValueError(f"several entries of the state are of one layer of the model: {some(sorted(names))}")
    layers = {names[name]: saved for name, saved in snapshot.layers.items()}
    state: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, entry in snapshot.state.items():
        target = names.get(name, name)
        state[target] = {**entry, "mask": _moved(entry["mask"], modules[target] if target in layers else None)}
    return dataclasses.replace(snapshot, layers=layers, state=state), {name: modules[name] for name in layers}


@contextlib.contextmanager
def refusing_damage() -> Iterator[None]:
    """What goes wrong inside the block because a state is not what it should be is a ValueError that says so."""
    try:
        yield
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"this is not the state of an ActivationSparsifier, or a damaged one ({type(error).__name__}: {error}); "
            "nothing has changed"
        ) from error


def _check_layer(name: str, saved: LayerSnapshot, layer: nn.Module) -> None:
    hook_state = saved.config.get("hook_state")
    if hook_state not in ("aggregate", "sparsify", "None"):
        raise ValueError(
            f"layer {name!r}: hook_state {hook_state!r} is not known; expected 'aggregate', 'sparsify' or 'None'"
        )
    for here, there in ((family_of(layer), saved.family), (input_features(layer), saved.width)):
        if None not in (here, there) and here != there:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__} of {input_features(layer)} input features; the state was "
                f"saved for a {saved.family} of {saved.width}"
            )


def _check_contents(name: str, config: dict[str, Any], mask: Any, layer: nn.Module) -> None:
    try:
        check_config(name, config)
    except AssertionError as error:
        raise ValueError(str(error)) from None
    check_group(name, config, mask, input_features(layer), isinstance(config["aggregate_fn"], Aggregate))


def _converted(state: Mapping[str, Any], convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A deep copy of the state with every mask in another layout."""

    def converted(mask: Tensor) -> Tensor:
        mask = convert(mask.detach())
        if mask.layout is torch.strided and mask.dim() and not any(mask.stride()):  # ones that take no memory
            return mask[(0,) * mask.dim()].clone().expand(mask.shape) if mask.numel() else mask
        return mask.clone()

    result: dict[str, Any] = defaultdict(dict)
    for name, entry in state.items():
        if not isinstance(entry, Mapping):
            raise TypeError(f"the state of layer {name!r} is {type(entry).__name__}, expected a mapping")
        mask = entry["mask"]
        if isinstance(mask, list):
            mask = [converted(each) for each in mask]
        elif mask is not None:
            mask = converted(mask)
        result[name] = {**copy.deepcopy(without(entry, "mask")), "mask": mask}
    return result


def _may_share(key: str, value: Any) -> bool:
    return key != "data" or isinstance(value, (Tensor, list))  # statistics are added to in place


def _moved(mask: Any, layer: nn.Module | None) -> Any:
    """The mask on the device of its layer."""
    parameter = None if layer is None else next(layer.parameters(), None)
    if mask is None or parameter is None:
        return mask
    return [each.to(parameter.device) for each in mask] if isinstance(mask, list) else mask.to(parameter.device)
