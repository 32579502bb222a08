"""The portable state of an ActivationSparsifier: plain values and tensors, without code; a safetensors file."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deadband.masks import aggregate, mask, reduce
from deadband.masks.accumulator import as_features
from deadband.masks.layers import FUNCTIONS, same_layer
from deadband.masks.portable_checks import DTYPES, check_form, check_function
from deadband.masks.schedule import Schedule
from deadband.masks.snapshot import LayerSnapshot, Snapshot
from deadband.tensor_files import read_tensors, write_tensors

FORMAT = "deadband.activation_sparsifier"
VERSION = 1
_READY_MADE: dict[str, Any] = {
    **{
        f"deadband.aggregate:{name}": getattr(aggregate, name)
        for name in ("sum", "mean", "mean_abs", "max_abs", "statistics")
    },
    "deadband.aggregate:Ema": aggregate.Ema,
    **{f"deadband.reduce:{name}": getattr(reduce, name) for name in ("mean", "l2_norm", "quantile")},
    **{
        f"deadband.mask:{name}": getattr(mask, name)
        for name in ("magnitude", "threshold", "top_k", "n_m", "block", "random")
    },
}


def portable_state(snapshot: Snapshot) -> dict[str, Any]:
    """`ActivationSparsifier.state_dict(portable=True)`.

    Raises:
        ValueError: a value that JSON cannot hold, or statistics, which have a file of their own.
    """
    tensors: dict[str, Tensor] = {}
    groups = {}
    for name, saved in snapshot.layers.items():
        config, facts = saved.config, saved.facts
        data = config.get("data")
        if data is not None and not isinstance(data, (Tensor, list)):
            raise ValueError(f"layer {name!r} keeps statistics; save sparsifier.calibration() instead")
        groups[name] = {
            **_plain_config(config, f"layer {name!r}"),
            "hook_state": config["hook_state"],
            "rows": config.get("rows"),
            "facts": facts,
            # a mask of ones from before the first step is a shape
            "mask": _pack(tensors, f"{name}.mask", snapshot.state[name].get("mask"), facts["unset"]),
            "data": _pack(tensors, f"{name}.data", data, False),
        }
    return {
        "format": FORMAT,
        "version": VERSION,
        "groups": groups,
        "defaults": _plain_config(snapshot.defaults, "the defaults"),
        "schedule": None if snapshot.schedule is None else _plain_schedule(snapshot.schedule),
        "tensors": tensors,
    }


def from_portable(
    state_dict: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], present: Snapshot
) -> Snapshot:
    """What a portable state says; functions, and a schedule that is one, come from those given and those at hand.

    Args:
        state_dict: the state.
        functions: as for `ActivationSparsifier.load_state_dict`.
        present: the sparsifier that is to take the state over, as it is.

    Raises:
        ValueError: another version, or a function that nobody gave.
    """
    if state_dict.get("version") != VERSION:
        raise ValueError(f"the state has version {state_dict.get('version')!r}; this deadband reads version {VERSION}")
    check_form(state_dict)
    tensors = state_dict["tensors"]

    def configuration(plain: Mapping[str, Any], name: str | None) -> dict[str, Any]:
        config = defaultdict(None, {role: _find(plain[role], role, functions, present, name) for role in FUNCTIONS})
        config.update(
            features=plain["features"], feature_dim=plain["feature_dim"], sparse_config=dict(plain["sparse_config"])
        )
        return config

    layers, state = {}, {}
    for name, group in state_dict["groups"].items():
        config = configuration(group, name)
        config["hook_state"] = group["hook_state"]
        if (data := _unpack(tensors, f"{name}.data", group["data"])) is not None:
            config["data"] = data
        if group["rows"] is not None:
            config["rows"] = group["rows"]
        layers[name] = LayerSnapshot.from_facts(config, group["facts"])
        state[name] = {"mask": _unpack(tensors, f"{name}.mask", group["mask"])}
    schedule = _resumed(state_dict["schedule"], present.schedule)
    return Snapshot(configuration(state_dict["defaults"], None), layers, state, schedule)


def save(snapshot: Snapshot, path: str | os.PathLike) -> None:
    """Write the portable state as a safetensors file."""
    state = portable_state(snapshot)
    tensors = {name: tensor.contiguous() for name, tensor in state.pop("tensors").items()}
    write_tensors(path, tensors, FORMAT, state)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the state of a sparsifier.
    """
    what = "the state of an ActivationSparsifier"
    state, tensors = read_tensors(path, FORMAT, what)
    if state.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)!r} is not {what}")
    return {**state, "tensors": tensors}


def describe(function: Any) -> dict[str, Any] | None:
    """A function by name, with the keywords that a partial of a ready-made one was given."""
    if function is None:
        return None
    if isinstance(function, functools.partial) and not function.args and _is_json(function.keywords):
        inner = describe(function.func)
        assert inner is not None
        return {"name": inner["name"], "keywords": {**inner["keywords"], **function.keywords}}
    if type(function) is aggregate.Ema:
        return {"name": "deadband.aggregate:Ema", "keywords": {"decay": function.decay}}
    for name, ready_made in _READY_MADE.items():
        if ready_made is function:
            return {"name": name, "keywords": {}}
    module = getattr(function, "__module__", None) or type(function).__module__
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return {"name": f"{module}:{name}", "keywords": {}}


def _find(
    description: Mapping[str, Any] | None,
    role: str,
    functions: Mapping[str, Any],
    present: Snapshot,
    layer: str | None,
) -> Any:
    """The function of a description, for a layer or, without one, for the defaults."""
    if description is None:
        return None
    name, keywords = description["name"], description["keywords"]
    for given, key in ((functions.get(layer or ""), role), (functions, name), (functions, role)):
        if isinstance(given, Mapping) and callable(given.get(key)):
            return given[key]
    if name in _READY_MADE:
        check_function(_READY_MADE[name], name, keywords, role)
    if name == "deadband.aggregate:Ema":
        return aggregate.Ema(**keywords)
    if name in _READY_MADE:
        return functools.partial(_READY_MADE[name], **keywords) if keywords else _READY_MADE[name]
    if layer is not None and (own := same_layer(layer, present.layers)) is not None:
        function = present.layers[own].config.get(role)
        if describe(function) == description:  # the layer's own comes first, if it is registered here
            return function
    known = [present.defaults, *(each.config for each in present.layers.values())]
    found = [config[role] for config in known if describe(config.get(role)) == description]
    if found and all(each is found[0] for each in found[1:]):
        return found[0]
    if layer is None:  # only layers to come need a default
        return present.defaults[role]
    where = f"layer {layer!r}"
    if found:
        raise ValueError(
            f"{role} of {where} was {name!r}, and several functions here have that name; pass "
            f"functions={{{layer!r}: {{{role!r}: ...}}}}"
        )
    # nothing is imported by name: a file of data must not decide what code runs
    raise ValueError(
        f"{role} of {where} was {name!r}, which is not known here; pass functions={{{role!r}: ...}} "
        f"(or by its name, functions={{{name!r}: ...}})"
    )


def _pack(tensors: dict[str, Tensor], key: str, value: Any, only_shape: bool) -> Any:
    if value is None:
        return None
    parts = value if isinstance(value, list) else [value]
    alike = len({(part.shape, part.dtype, part.device) for part in parts}) == 1
    about: dict[str, Any] = {"list": len(value) if isinstance(value, list) else None, "stacked": alike}
    about["dtypes"] = [str(part.dtype).removeprefix("torch.") for part in (parts[:1] if alike else parts)]
    if only_shape:
        about["shapes"] = [list(part.shape) for part in parts]
        return about
    for number, part in enumerate([torch.stack([each.detach() for each in parts])] if alike else parts):
        part = part.detach()
        if key.endswith(".mask") and part.dtype is not torch.bool and bool(((part == 0) | (part == 1)).all()):
            part = part != 0
        tensors[f"{key}.{number}"] = part.clone()
    return about


def _unpack(tensors: Mapping[str, Tensor], key: str, about: Any) -> Any:
    if about is None:
        return None
    dtypes = [DTYPES[name] for name in about["dtypes"]]
    if "shapes" in about:
        shapes = about["shapes"]
        types = dtypes * len(shapes) if about["stacked"] else dtypes
        parts = [torch.ones((), dtype=dtype).expand(shape) for shape, dtype in zip(shapes, types, strict=True)]
    elif about["stacked"]:
        parts = list(tensors[f"{key}.0"].to(dtypes[0]).unbind(0))
    else:
        parts = [tensors[f"{key}.{number}"].to(dtype) for number, dtype in enumerate(dtypes)]
    parts = [part.clone() if "shapes" not in about else part for part in parts]
    return parts if about["list"] is not None else parts[0]


def _plain_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    features = config["features"]
    return {
        **{role: describe(config[role]) for role in FUNCTIONS},
        "features": None if features is None else as_features(features),
        "feature_dim": config["feature_dim"],
        "sparse_config": _plain(config["sparse_config"], where),
    }


def _plain_schedule(schedule: Schedule) -> dict[str, Any]:
    if callable(schedule.sparsity) or callable(schedule.curve):
        return {"step": schedule.step}
    return {name: getattr(schedule, name) for name in Schedule.__dataclass_fields__}


def _resumed(saved: Mapping[str, Any] | None, present: Schedule | None) -> Schedule | None:
    """The schedule that a state was saved under, at its step; the one at hand, if the state has none."""
    if saved is None:
        return present
    settings = {key: value for key, value in saved.items() if key != "step"}
    schedule = Schedule(**settings) if settings else present
    if schedule is None:
        raise ValueError(
            "the state was saved under a schedule that is a function; call schedule(...) again before loading"
        )
    return dataclasses.replace(schedule, step=saved["step"])


def _plain(values: dict[str, Any], where: str) -> dict[str, Any]:
    for key, value in values.items():
        if not _is_json(value) or (isinstance(value, dict) and not all(isinstance(each, str) for each in value)):
            raise ValueError(
                f"sparse_config of {where} holds {key}={type(value).__name__}, which JSON cannot hold; use numbers, "
                "strings, lists and mappings, or state_dict() without portable"
            )
    return json.loads(json.dumps(values))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
