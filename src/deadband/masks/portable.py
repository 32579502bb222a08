"""The portable state of an ActivationSparsifier: plain values and tensors, without code; a safetensors file."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from deadband.files import replacing
from deadband.masks import aggregate, mask, reduce
from deadband.masks.layers import facts_of, same_layer, saved_hook_state
from deadband.masks.portable_checks import DTYPES, check_form, check_function
from deadband.masks.schedule import Schedule

if TYPE_CHECKING:
    from deadband.masks.sparsifier import ActivationSparsifier

FORMAT = "deadband.activation_sparsifier"
VERSION = 1
_ROLES = ("aggregate_fn", "reduce_fn", "mask_fn")
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


def portable_state(sparsifier: ActivationSparsifier) -> dict[str, Any]:
    """`ActivationSparsifier.state_dict(portable=True)`.

    Raises:
        ValueError: a value that JSON cannot hold, or statistics, which have a file of their own.
    """
    tensors: dict[str, Tensor] = {}
    groups = {}
    for name, config in sparsifier.data_groups.items():
        facts = facts_of(sparsifier, name)
        data = config.get("data")
        if data is not None and not isinstance(data, (Tensor, list)):
            raise ValueError(f"layer {name!r} keeps statistics; save sparsifier.calibration() instead")
        groups[name] = {
            **{role: describe(config[role]) for role in _ROLES},
            "features": _plain_features(config["features"]),
            "feature_dim": config["feature_dim"],
            "sparse_config": _plain(config["sparse_config"], f"layer {name!r}"),
            "hook_state": saved_hook_state(config),
            "rows": config.get("rows"),
            "facts": facts,
            # a mask of ones from before the first step is a shape
            "mask": _pack(tensors, f"{name}.mask", sparsifier.state[name].get("mask"), facts["unset"]),
            "data": _pack(tensors, f"{name}.data", data, False),
        }
    defaults = sparsifier.defaults
    schedule = sparsifier._schedule
    return {
        "format": FORMAT,
        "version": VERSION,
        "groups": groups,
        "defaults": {
            **{role: describe(defaults[role]) for role in _ROLES},
            "features": _plain_features(defaults["features"]),
            "feature_dim": defaults["feature_dim"],
            "sparse_config": _plain(defaults["sparse_config"], "the defaults"),
        },
        "schedule": None if schedule is None else _plain_schedule(schedule),
        "tensors": tensors,
    }


def from_portable(
    sparsifier: ActivationSparsifier, state: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]
) -> tuple[dict[str, Any], dict[str, Any], Schedule | None]:
    """A portable state as torch's class would have it, what else is known of each layer, and the schedule.

    Raises:
        ValueError: another version, or a function that nobody gave.
    """
    if state.get("version") != VERSION:
        raise ValueError(f"the state has version {state.get('version')!r}; this deadband reads version {VERSION}")
    check_form(state)
    tensors = state["tensors"]

    def configuration(saved: Mapping[str, Any], layer: str | None) -> dict[str, Any]:
        own = None if layer is None else same_layer(layer, sparsifier.data_groups)
        known = [sparsifier.data_groups[own]] if own is not None else []
        known += [sparsifier.defaults, *sparsifier.data_groups.values()]
        config = defaultdict(None, {role: _find(saved[role], role, functions, known, layer) for role in _ROLES})
        config.update(
            features=saved["features"], feature_dim=saved["feature_dim"], sparse_config=dict(saved["sparse_config"])
        )
        return config

    groups, states, facts = {}, {}, {}
    for name, saved in state["groups"].items():
        groups[name] = configuration(saved, name)
        groups[name]["hook_state"] = saved["hook_state"]
        if (data := _unpack(tensors, f"{name}.data", saved["data"])) is not None:
            groups[name]["data"] = data
        if saved["rows"] is not None:
            groups[name]["rows"] = saved["rows"]
        states[name] = {"mask": _unpack(tensors, f"{name}.mask", saved["mask"])}
        facts[name] = saved["facts"]
    schedule = sparsifier._schedule
    if state["schedule"] is not None:
        saved = dict(state["schedule"])
        step = saved.pop("step")
        if saved:
            schedule = Schedule(**saved)
        elif schedule is None:
            raise ValueError(
                "the state was saved under a schedule that is a function; call schedule(...) again before loading"
            )
        schedule = dataclasses.replace(schedule, step=step)
    result = {"state": states, "data_groups": groups, "defaults": configuration(state["defaults"], None)}
    return result, facts, schedule


def save(sparsifier: ActivationSparsifier, path: str | os.PathLike) -> None:
    """Write the portable state as a safetensors file."""
    state = portable_state(sparsifier)
    tensors = {name: tensor.contiguous() for name, tensor in state.pop("tensors").items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(state)})


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the state of a sparsifier.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not the state of an ActivationSparsifier: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)!r} is not the state of an ActivationSparsifier")
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
    known: list[Any],
    layer: str | None,
) -> Any:
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
    found = [config[role] for config in known if describe(config.get(role)) == description]
    if found and all(each is found[0] for each in found[1:]):
        return found[0]
    if layer is None:  # only layers to come need a default
        return known[0][role]
    where = f"layer {layer!r}"
    if found:  # the layer's own comes first, if it is registered here
        if known and known[0].get("layer") is not None and describe(known[0].get(role)) == description:
            return found[0]
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


def _plain_features(features: Any) -> list[int] | None:
    from deadband.masks.accumulator import as_features

    return None if features is None else as_features(features)


def _plain_schedule(schedule: Schedule) -> dict[str, Any]:
    if callable(schedule.sparsity) or callable(schedule.curve):
        return {"step": schedule.step}
    return {name: getattr(schedule, name) for name in Schedule.__dataclass_fields__}


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
