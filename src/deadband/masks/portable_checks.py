"""Whether a portable state of an ActivationSparsifier is what it says, before anything is made of it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deadband.masks.accumulator import as_features

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
        torch.float32, torch.float64, torch.complex64, torch.complex128,
    )
}  # fmt: skip
MOST_ENTRIES = 2**31  # of a mask that is a shape alone, and so takes no room in a file
Check = Callable[[Any, str], None]


def damaged(where: str, value: Any, expected: str) -> ValueError:
    """The error for a part of a state that cannot be right."""
    shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    shown = shown if len(shown) < 80 else shown[:75] + " ..."
    return ValueError(f"the state is damaged, or of something else: {where} is {shown}; expected {expected}")


# -------------------------------------------------------------------------------------------------- what a value may be


def _that(fits: Callable[[Any], bool], expected: str) -> Check:
    def check(value: Any, where: str) -> None:
        if not fits(value):
            raise damaged(where, value, expected)

    return check


def _optional(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _entries(**checks: Check) -> Check:
    """A mapping that has these entries; names that end in an underscore may be missing."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise damaged(where, value, "a mapping")
        for name, each in checks.items():
            key = name.removesuffix("_")
            if key in value:
                each(value[key], f"{where}[{key!r}]")
            elif key == name:
                raise ValueError(f"the state is damaged, or of something else: {where} lacks {key!r}")

    return check


def _each(check: Check) -> Check:
    """A list, each entry of which is such a thing."""

    def each(value: Any, where: str) -> None:
        if not isinstance(value, (list, tuple)):
            raise damaged(where, value, "a list")
        for number, item in enumerate(value):
            check(item, f"{where}[{number}]")

    return each


def _by_name(check: Check) -> Check:
    """A mapping from strings, each value of which is such a thing."""

    def each(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise damaged(where, value, "a mapping")
        for key, item in value.items():
            if not isinstance(key, str):
                raise damaged(f"a key of {where}", key, "a string")
            check(item, f"{where}[{key!r}]")

    return each


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


_TEXT = _that(lambda value: isinstance(value, str), "a string")
_FLAG = _that(lambda value: isinstance(value, bool), "True or False")
_FEATURES = _that(
    lambda value: isinstance(value, list) and all(map(_whole, value)) and len(set(value)) == len(value),
    "distinct whole numbers",
)
_COUNT = _that(lambda value: _whole(value) and value >= 0, "a whole number, not negative")
_DIMENSION = _that(lambda value: _whole(value) and -64 <= value < 64, "a dimension")
_NAME = _that(lambda value: re.fullmatch(r"activation_mask(_\d{1,6})?", str(value)) is not None, "a buffer's name")
_SHARE = _that(lambda value: isinstance(value, (int, float)) and 0 <= value <= 1, "a fraction from 0 to 1")
_ANY: Check = lambda value, where: None  # noqa: E731
_SETTINGS = _by_name(_ANY)
_FUNCTION = _optional(_entries(name=_TEXT, keywords=_SETTINGS))
_CONFIGURATION = {
    "aggregate_fn": _FUNCTION, "reduce_fn": _FUNCTION, "mask_fn": _FUNCTION, "features": _optional(_FEATURES),
    "feature_dim": _optional(_DIMENSION), "sparse_config": _SETTINGS,
}  # fmt: skip
_PACKED = _optional(
    _entries(
        list=_optional(_COUNT), stacked=_FLAG,
        dtypes=_each(_that(lambda value: isinstance(value, str) and value in DTYPES, "the name of a dtype")),
        shapes_=_each(_each(_COUNT)),
    )
)  # fmt: skip
_FACTS = _entries(
    layer=_optional(_TEXT), features=_optional(_COUNT), shape=_optional(_each(_COUNT)), unset=_FLAG,
    buffer_=_optional(_NAME),
)  # fmt: skip
_STATE = _entries(
    groups=_by_name(
        _entries(
            **_CONFIGURATION, rows=_optional(_COUNT), facts=_FACTS, mask=_PACKED, data=_PACKED,
            hook_state=_that(lambda value: value in ("aggregate", "sparsify", "None"), "a known hook state"),
        )
    ),
    defaults=_entries(**_CONFIGURATION),
    schedule=_optional(
        _entries(
            step=_COUNT, sparsity_=_SHARE, steps_=_optional(_COUNT), initial_=_SHARE, begin_=_COUNT, every_=_COUNT,
            curve_=_TEXT, argument_=_TEXT,
        )
    ),
    tensors=_by_name(_that(lambda value: isinstance(value, Tensor), "a tensor")),
)  # fmt: skip
SCHEDULE = frozenset(("step", "sparsity", "steps", "initial", "begin", "every", "curve", "argument"))


def check_form(state: Mapping[str, Any]) -> None:
    """A ValueError names the first part of a portable state that is missing or of another kind than it should be."""
    _STATE(state, "the state")
    if unknown := (state["schedule"] or {}).keys() - SCHEDULE:
        raise damaged("the schedule", sorted(map(str, unknown))[0], f"no more than {', '.join(sorted(SCHEDULE))}")
    if state["schedule"] and len(state["schedule"]) not in (1, len(SCHEDULE)):
        raise damaged("the schedule", dict(state["schedule"]), f"all of {', '.join(sorted(SCHEDULE))}, or step alone")
    for name, group in state["groups"].items():
        for key in ("mask", "data"):
            if group[key] is not None:
                _check_packed(state["tensors"], f"{name}.{key}", group[key])


def _check_packed(tensors: Mapping[str, Tensor], key: str, about: Mapping[str, Any]) -> None:
    """Whether the tensors for one mask, or for what was aggregated, are there and are as many as it says."""
    count = 1 if about["list"] is None else about["list"]
    dtypes, shapes = about["dtypes"], about.get("shapes")
    if len(dtypes) != (1 if about["stacked"] else count):
        raise damaged(f"the number of dtypes of {key}", len(dtypes), "one for each tensor")
    if shapes is not None:
        if len(shapes) != count or any(math.prod(shape) > MOST_ENTRIES for shape in shapes):
            raise damaged(f"the shapes of {key}", shapes, f"{count} of at most {MOST_ENTRIES} entries")
        return
    needed = [f"{key}.{number}" for number in range(1 if about["stacked"] else count)]
    if missing := [name for name in needed if name not in tensors]:
        raise ValueError(f"the state is damaged, or of something else: the tensor {missing[0]!r} is missing")
    together = tensors[needed[0]] if about["stacked"] else None
    if together is not None and (not together.dim() or together.shape[0] != count):
        raise damaged(f"the tensor {needed[0]!r}", together, f"{count} of a kind, along the first dimension")


# ------------------------------------------------------------------------------------------------ what fits each other


def check_function(function: Callable[..., Any], name: str, keywords: Mapping[str, Any], role: str) -> None:
    """Whether a ready-made function of a state can play its role, with the keywords that it was given."""
    if not name.startswith(f"deadband.{role.removesuffix('_fn')}:"):
        raise damaged(role, name, f"a function of deadband.{role.removesuffix('_fn')}")
    known = inspect.signature(function).parameters
    if unknown := keywords.keys() - known:
        raise damaged(f"a keyword of {name}", sorted(unknown)[0], f"one of {', '.join(known)}")


def check_group(name: str, config: Mapping[str, Any], mask: Any, width: int | None, ready_made: bool) -> None:
    """Whether the mask and what was aggregated for a layer fit what its configuration says.

    Args:
        name: of the layer.
        config: its entry of `data_groups`.
        mask: its mask.
        width: input features of the layer, where it says so.
        ready_made: whether it aggregates by one of deadband's functions.
    """
    features = config["features"]
    count = None if features is None else len(as_features(features))
    if mask is None and config["hook_state"] == "sparsify":
        raise damaged(f"the mask of layer {name!r}", None, "a mask, as it is in force")
    for what, value in (("mask", mask), ("data", config.get("data"))):
        if value is None:
            continue
        where = f"the {what} of layer {name!r}"
        if ready_made or count is None:
            if isinstance(value, list):
                raise damaged(where, f"a list of {len(value)}", "one tensor")
            if ready_made and (value.dim() > 1 or (config["feature_dim"] is None and width and value.numel() != width)):
                raise damaged(where, value, f"[{'features' if width is None else width}]")
        elif not isinstance(value, list) or len(value) != count:
            raise damaged(where, value if isinstance(value, Tensor) else len(value), f"a list of {count} tensors")
