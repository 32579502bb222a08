"""What compaction can remove of the inputs that masks drop: proposals from the dependency graph, each checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadband.compaction.check import Check, Masks
from deadband.compaction.graph import Graph, Group
from deadband.compaction.resize import Example, Gathered, Resize, layout_of, output_widths, shared_parameters


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do to each layer; how many inputs of each go for real or by a gather; what is left, and why."""

    resizes: dict[str, Resize]
    removed: dict[str, int]
    gathered: dict[str, int]
    left: dict[str, str]
    note: str


def find_plan(model: nn.Module, masks: Masks, example: Example, producers: bool) -> Plan:
    """Decide what happens to each masked layer; `model` is only copied."""
    masks = {name: mask for name, mask in masks.items() if not mask.all()}
    shared = shared_parameters(model)
    reasons = {name: _reason_to_leave(model, name, shared) for name in masks}
    left = {name: reason for name, reason in reasons.items() if reason}
    masks = {name: mask for name, mask in masks.items() if name not in left}
    if not masks:
        return Plan({}, {}, {}, left, "")
    check = Check(model, example)
    left |= {name: "the example does not call it" for name in masks if name not in check.called}
    masks = {name: mask for name, mask in masks.items() if name not in left}
    groups, note = [], ""
    if producers and check.dtype is None:
        note = "gathers only: the model runs neither in float64 nor in float32, which checks are made in"
    elif producers:
        try:
            groups = _propose(check, masks, shared)
        except Exception as error:
            note = f"gathers only: Torch-Pruning cannot follow this model ({type(error).__name__}: {error})"
    sound, chosen = _sound(check, masks, groups)
    left |= {name: "the output changed without its masked features" for name in masks if name not in sound}
    if len(chosen) < len(groups):
        failed = f"{len(groups) - len(chosen)} of {len(groups)} groups of producers"
        note = f"{failed} stay whole: the output changed without their masked features"
    masked = {name: int((~mask).sum()) for name, mask in sound.items()}
    gone = union(group.inputs for group in chosen)
    removed = {name: len(gone[name]) for name in masked if name in gone}
    gathered = {name: count - removed.get(name, 0) for name, count in masked.items() if count > removed.get(name, 0)}
    return Plan(_resizes(model, sound, chosen), removed, gathered, left, note)


def _sound(check: Check, masks: Masks, groups: list[Group]) -> tuple[Masks, list[Group]]:
    """The masked layers and groups that pass the check: nearly always all of them, at once."""

    def same(masks: Masks, groups: Sequence[Group]) -> bool:
        resizes = _resizes(check.model, masks, groups)
        return check.same(masks, lambda model, arguments: resizes)

    if same(masks, groups):
        return masks, groups
    if not same(masks, []):  # a model may read a weight without calling its layer
        masks = {name: mask for name, mask in masks.items() if same({name: mask}, [])}
    chosen: list[Group] = []
    for group in groups:
        if group.inputs.keys() <= masks.keys() and same(masks, [*chosen, group]):
            chosen.append(group)
    return masks, chosen


def _reason_to_leave(model: nn.Module, name: str, shared: set[nn.Module]) -> str | None:
    module = model.get_submodule(name)
    layout = layout_of(module)
    fused = [outer for outer, each in model.named_modules() if isinstance(each, nn.TransformerEncoderLayer)]
    if isinstance(module, Gathered):
        return "it gathers its input already"
    if getattr(module, "groups", 1) > 1:
        return "a convolution in groups needs all of its channels"
    if layout is None or layout.inputs is None or layout.gates:
        return f"{type(module).__name__} cannot lose input features; nn.Linear, nn.Conv1d to 3d and Conv1D can"
    if type(module._parameters.get("weight")) is not nn.Parameter:
        return "its weight is not a plain parameter"
    if module in shared:
        return "its parameters are shared with another layer"
    if any(name.startswith(f"{outer}." if outer else "") for outer in fused):
        return "torch's TransformerEncoderLayer reads its weight without calling it"
    return None


def union(parts: Any) -> dict[str, set[int]]:
    """Sets of indices by layer, put together."""
    together: dict[str, set[int]] = {}
    for part in parts:
        for name, indices in part.items():
            together.setdefault(name, set()).update(indices)
    return together


def _resizes(model: nn.Module, masks: Masks, groups: Sequence[Group]) -> dict[str, Resize]:
    """Removed features, as indices of what every layer keeps."""
    widths = output_widths(model)
    outputs = union(group.outputs for group in groups)
    inputs = union(group.inputs for group in groups)
    plan = {}
    for name in [*masks, *(name for name in outputs if name not in masks)]:
        rows = columns = kept = None
        if name in outputs:
            rows = without(torch.ones(widths[name], dtype=torch.bool), outputs[name]).nonzero()[:, 0]
        if name in masks:
            columns = masks[name].nonzero()[:, 0]
            arriving = masks[name][without(torch.ones_like(masks[name]), inputs.get(name, set()))]
            kept = None if arriving.all() else arriving.nonzero()[:, 0]
        plan[name] = Resize(rows, columns, kept)
    return plan


def without(mask: Tensor, gone: set[int]) -> Tensor:
    """`mask`, with False at `gone`."""
    mask[sorted(gone)] = False
    return mask


def _propose(check: Check, masks: Masks, shared: set[nn.Module]) -> list[Group]:
    """The features that nothing but masked layers reads, by the layers that make them."""
    tied = {name for name, module in check.model.named_modules() if module in shared}
    graph = Graph(check.fresh(), check.arguments(), masks, tied)
    groups = (graph.group(producer) for producer in graph.producers())
    return [graph.take(group) for group in groups if group is not None]
