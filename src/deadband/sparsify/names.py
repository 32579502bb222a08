"""Which layers of a model the names in thresholds mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deadband.layers.experts import with_projections
from deadband.layers.rule import LARGEST, Rule, scale_of
from deadband.layers.sites import how_computed, matrix_of, shape_of, sites_of
from deadband.layers.sparse import tensor_of


def rule_of(name: str, given: float | Rule, module: nn.Module, criterion: str) -> Rule:
    """What a site has to skip, on its device; a ValueError says what does not fit it."""
    if not isinstance(given, Rule):
        if criterion == "sensitivity":
            raise ValueError(
                f"site {name!r}: a threshold on sensitivity scores needs its scale; pass what "
                "Calibration.allocate returned, or a deadband.Rule with a scale"
            )
        given = Rule(given)
    features, device = shape_of(module)[0 if given.gate else 1], tensor_of(module).device
    if given.gate and given.center is not None:
        raise ValueError(f"site {name!r}: a rule of its gate has no center; that of the down-projection can have one")
    if not given.gate and given.scale is None and criterion == "weighted_magnitude":
        given = dataclasses.replace(given, scale=scale_of(criterion, matrix_of(module)))
    parts = {"scale": given.scale, "center": given.center}
    for what, vector in parts.items():
        if vector is None:
            continue
        if vector.shape != (features,) or not vector.isfinite().all() or (what == "scale" and (vector < 0).any()):
            raise ValueError(
                f"site {name!r}: its {what} has to be {features} finite values, not negative for a scale; "
                f"got shape {tuple(vector.shape)}"
            )
        parts[what] = vector.detach().to(device=device, dtype=torch.float32, copy=True)
    return dataclasses.replace(given, scale=parts["scale"], center=parts["center"])


def resolve(model: nn.Module, thresholds: Mapping[str, float | Rule]) -> dict[str, float | Rule]:
    """`thresholds` by full site names, in the order of the model; a ValueError names the first bad entry."""
    every = sites_of(model, every_name=True)
    chosen: dict[str, float | Rule] = {}
    for given, threshold in thresholds.items():
        name = full_name(model, every, given)
        value = float(threshold.threshold if isinstance(threshold, Rule) else threshold)
        if not 0 <= value <= LARGEST:
            raise ValueError(f"site {given!r}: threshold {value} has to be finite and not negative, and fit float32")
        chosen[name] = dataclasses.replace(threshold, threshold=value) if isinstance(threshold, Rule) else value
    if not chosen:
        raise ValueError("thresholds is empty; expected at least one site")
    return {name: chosen[name] for name in every if name in chosen}


def resolve_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`masks` by full site names, on the devices of the sites; a ValueError names the first bad entry."""
    every = sites_of(model, every_name=True)
    chosen = {}
    for given, mask in masks.items():
        name = full_name(model, every, given)
        features = shape_of(every[name])[1]
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.shape != (features,):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"site {given!r}: its mask is {got}, expected torch.bool ({features},)")
        chosen[name] = mask.detach().clone().to(tensor_of(every[name]).device)
    if not chosen:
        raise ValueError("masks is empty; expected at least one site")
    return chosen


def full_name(model: nn.Module, every: Mapping[str, nn.Module], given: str) -> str:
    """The name in the model that a name, or the end of one, means; a ValueError unless there is exactly one."""
    names = [given] if given in every else [name for name in every if name.endswith("." + given)]
    if len(names) != 1:
        module = dict(with_projections(model)).get(given)
        what = (
            f"ends several names: {names[:3]}" if names
            else how_computed(module) or f"is {type(module).__name__}, expected nn.Linear or Conv1D"
            if module is not None
            else f"is not a linear layer of the model, which has for example {list(every)[:3]}"
        )  # fmt: skip
        raise ValueError(f"site {given!r} {what}")
    return names[0]
