"""The state of an ActivationSparsifier: taken in the form of torch's class, loaded in any form, copied and pickled."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deadband.masks.accumulator import Selection
from deadband.masks.aggregate import Aggregate
from deadband.masks.layers import (
    LayerError,
    check_config,
    facts_of,
    input_features,
    kind_of,
    same_layer,
    saved_hook_state,
    some,
)
from deadband.masks.mask_input import MaskInput
from deadband.masks.portable import FORMAT, from_portable
from deadband.masks.portable_checks import check_group

if TYPE_CHECKING:
    from deadband.masks.sparsifier import ActivationSparsifier


def torch_state(sparsifier: ActivationSparsifier) -> dict[str, Any]:
    """What torch's class returns from `state_dict`; the facts that it lacks go along as the attribute `_metadata`."""
    _release(sparsifier)
    groups: dict[str, Any] = defaultdict()
    for name, config in sparsifier.data_groups.items():
        groups[name] = {key: value for key, value in config.items() if key not in ("hook", "layer")}
        groups[name]["hook_state"] = saved_hook_state(config)
    result: OrderedDict[str, Any] = OrderedDict(state=_converted(sparsifier.state, Tensor.to_sparse_coo))
    result.update(data_groups=groups, defaults=sparsifier.defaults)
    result.__dict__["_metadata"] = {name: facts_of(sparsifier, name) for name in sparsifier.data_groups}
    return result


def load_state(
    sparsifier: ActivationSparsifier, saved: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]
) -> None:
    """`ActivationSparsifier.load_state_dict`."""
    try:
        _load_state(sparsifier, saved, functions)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"this is not the state of an ActivationSparsifier, or a damaged one ({type(error).__name__}: {error}); "
            "nothing has changed"
        ) from error


def _load_state(
    sparsifier: ActivationSparsifier, saved: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]
) -> None:
    schedule, facts = sparsifier._schedule, getattr(saved, "_metadata", {})
    if portable := saved.get("format") == FORMAT:
        saved, facts, schedule = from_portable(sparsifier, saved, functions)
    defaults, given, states = saved["defaults"], saved["data_groups"], _converted(saved["state"], Tensor.to_dense)
    modules = dict(sparsifier.model.named_modules(remove_duplicate=False))
    names = {name: same_layer(name, modules) for name in given}
    for name, config in given.items():
        found = names[name]
        if found is None:
            raise LayerError(f"layer {name} not found in the model")
        if config.get("hook_state") not in ("aggregate", "sparsify", "None"):
            raise ValueError(
                f"layer {name!r}: hook_state {config.get('hook_state')!r} is not known; expected 'aggregate', "
                "'sparsify' or 'None'"
            )
        _check_layer(name, modules[found], facts.get(name, {}))
        if portable:
            try:
                check_config(name, config)
            except AssertionError as error:
                raise ValueError(str(error)) from None
            ready_made = isinstance(config["aggregate_fn"], Aggregate)
            check_group(name, config, states[name]["mask"], input_features(modules[found]), ready_made)
    if len(set(names.values())) < len(names):
        raise ValueError(f"several entries of the state are of one layer of the model: {some(sorted(names))}")
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    state: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, config in given.items():
        layer = modules[names[name] or ""]
        own = {key: value if _may_share(key, value) else copy.deepcopy(value) for key, value in config.items()}
        groups[names[name] or ""] = {**_without(own, "hook", "layer"), "layer": layer}
    for name, entry in states.items():
        target = names.get(name) or name
        layer = groups[target]["layer"] if target in groups else None
        state[target] = {**entry, "mask": _moved(entry["mask"], layer)}
    kept, schedule_before = _everything(sparsifier), sparsifier._schedule
    try:
        _replace(sparsifier, copy.copy(defaults), groups, state, {names[each]: about for each, about in facts.items()})
        sparsifier._schedule = schedule
        _resume_schedule(sparsifier)
    except BaseException:
        _replace(sparsifier, *kept)
        sparsifier._schedule = schedule_before
        _resume_schedule(sparsifier)
        raise


def state_for_copy(sparsifier: ActivationSparsifier) -> dict[str, Any]:
    """What `copy.deepcopy` and `pickle` take: everything but hooks and lock; the model's copy brings its own hooks."""
    _release(sparsifier)
    kept = _without(sparsifier.__dict__, "_lock", "_watches", "_masks", "_handles", "_mask_handles", "_example")
    hooked = [(name, handle.id) for name, handle in sparsifier._handles.items() if name in sparsifier.data_groups]
    hooked += [(name, handle.id) for name, handle in sparsifier._mask_handles.items()]
    return {**kept, "_everything": _everything(sparsifier), "_hooked": hooked}


def restore_copy(sparsifier: ActivationSparsifier, kept: dict[str, Any]) -> None:
    """Make a copy work: hooks that came with the model's copy are put up anew, so that they feed this sparsifier."""
    defaults, groups, state, facts = kept.pop("_everything")
    hooked = kept.pop("_hooked")
    sparsifier.__dict__.update(kept, _example=None)
    sparsifier._begin()
    for name, number in hooked:
        layer = groups[name]["layer"]
        layer._forward_pre_hooks_with_kwargs.pop(number, None)
        hook = layer._forward_pre_hooks.pop(number, None)
        if isinstance(hook, MaskInput):
            hook.remove_from(layer)
    _replace(sparsifier, defaults, groups, state, facts)
    _resume_schedule(sparsifier)


def _everything(sparsifier: ActivationSparsifier) -> tuple[Any, ...]:
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, config in sparsifier.data_groups.items():
        groups[name] = {**_without(config, "hook"), "hook_state": saved_hook_state(config)}
    facts = {name: facts_of(sparsifier, name) for name in groups}
    return sparsifier.defaults, groups, defaultdict(dict, sparsifier.state), facts


def _replace(
    sparsifier: ActivationSparsifier, defaults: Any, groups: dict, state: dict, facts: Mapping[Any, Mapping[str, Any]]
) -> None:
    for name in list(sparsifier.data_groups):
        sparsifier._take_off(name)
    sparsifier.defaults, sparsifier.data_groups, sparsifier._state = defaults, groups, state
    for name, config in groups.items():
        about = facts.get(name, {})
        shape = None if about.get("shape") is None else torch.Size(about["shape"])
        if config["hook_state"] == "aggregate":
            sparsifier._watch(name)
            sparsifier._watches[name].shape = shape
            sparsifier._watches[name].stepped = not about.get("unset", True)
        elif config["hook_state"] == "sparsify":
            masking = sparsifier._masking(name)
            masking.unset = about.get("unset", False)
            masking.buffer = about.get("buffer") or masking.buffer  # another sparsifier may mask the same layer
            if shape is not None and masking.features is not None and len(masking.features):
                index = Selection(name, masking.features.tolist(), masking.feature_dim).index(shape)
                masking.features = torch.tensor(index)
            sparsifier._mask(name, masking, shape)
        else:
            config["hook_state"] = "sparsify"


def _resume_schedule(sparsifier: ActivationSparsifier) -> None:
    schedule = sparsifier._schedule
    if schedule is not None and sparsifier._watches and schedule.step > schedule.begin:
        sparsifier._put_in_force()


def _release(sparsifier: ActivationSparsifier) -> None:
    for watching in sparsifier._watches.values():
        watching.release()


def _check_layer(name: str, layer: nn.Module, facts: Mapping[str, Any]) -> None:
    for key, value in kind_of(layer).items():
        if None not in (value, facts.get(key)) and facts[key] != value:
            raise ValueError(
                f"layer {name!r} is a {type(layer).__name__} of {input_features(layer)} input features; the state was "
                f"saved for a {facts['layer']} of {facts['features']}"
            )


def _converted(states: Mapping[str, Any], convert: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A deep copy of the state with every mask in another layout."""

    def converted(mask: Tensor) -> Tensor:
        mask = convert(mask.detach())
        if mask.layout is torch.strided and mask.dim() and not any(mask.stride()):  # ones that take no memory
            return mask[(0,) * mask.dim()].clone().expand(mask.shape) if mask.numel() else mask
        return mask.clone()

    result: dict[str, Any] = defaultdict(dict)
    for name, state in states.items():
        if not isinstance(state, Mapping):
            raise TypeError(f"the state of layer {name!r} is {type(state).__name__}, expected a mapping")
        mask = state["mask"]
        if isinstance(mask, list):
            mask = [converted(each) for each in mask]
        elif mask is not None:
            mask = converted(mask)
        result[name] = {**copy.deepcopy(_without(state, "mask")), "mask": mask}
    return result


def _may_share(key: str, value: Any) -> bool:
    return key != "data" or isinstance(value, (Tensor, list))  # statistics are added to in place


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _moved(mask: Any, layer: nn.Module | None) -> Any:
    """The mask on the device of its layer."""
    parameter = None if layer is None else next(layer.parameters(), None)
    if mask is None or parameter is None:
        return mask
    return [each.to(parameter.device) for each in mask] if isinstance(mask, list) else mask.to(parameter.device)
