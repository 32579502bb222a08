"""What compaction can remove of the outputs of layers whose weights a mask clears: what they give is constant."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from deadband.compaction.check import Check, Masks, SkipError
from deadband.compaction.examples import guess_example, outputs_of
from deadband.compaction.graph import Graph, Group
from deadband.compaction.plan import union, without
from deadband.compaction.resize import (
    SCATTERED,
    Example,
    Resize,
    folds_into_bias,
    layout_of,
    output_widths,
    shared_parameters,
    spatial_dims,
)
from deadband.running.copies import copy_model

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RUNS = 4  # on other inputs for each of the variations of parameters: what is constant by accident hardly stays so


@dataclasses.dataclass(frozen=True)
class OutputsPlan:
    """What to do to each layer; how many outputs of each go; what is left, and why."""

    resizes: dict[str, Resize]
    removed: dict[str, int]
    left: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """A group, and for layers that need one the constant input feature that takes over from those that go."""

    group: Group
    into: dict[str, int]


def find_outputs(model: nn.Module, outputs: Masks, example: Example) -> OutputsPlan:
    """Decide which of the outputs that `outputs` drops go; their weights are zero in `model`, which is only copied."""
    outputs = {name: mask for name, mask in outputs.items() if not mask.all()}
    shared = shared_parameters(model)
    reasons = {name: _reason_to_leave(model.get_submodule(name), shared) for name in outputs}
    left = {name: reason for name, reason in reasons.items() if reason}
    masks = {name: mask for name, mask in outputs.items() if name not in left}
    if not masks:
        return OutputsPlan({}, {}, left)
    check = Check(model, example, masks)
    if check.dtype is None:
        failed = "the model runs neither in float64 nor in float32, which checks are made in"
        return OutputsPlan({}, {}, left | dict.fromkeys(masks, failed))
    try:
        constants = _Constants(check, masks)
        tied = {name for name, module in model.named_modules() if module in shared}
        groups = _propose(check, masks, constants, tied)
    except Exception as error:
        failed = f"what reads them cannot be found ({type(error).__name__}: {error})"
        return OutputsPlan({}, {}, left | dict.fromkeys(masks, failed))
    check.cleared |= _per_feature(model, groups)  # as what they make of a constant depends on their parameters
    chosen = _sound(check, groups)
    gone = union(each.group.outputs for each in chosen)
    removed = {name: len(gone[name]) for name in masks if name in gone}
    for name, mask in masks.items():
        dropped, what = int((~mask).sum()), "the example does not call it"
        if name in removed:
            what = "the constant that they all give is not zero, and no bias can take it over"
        elif name in check.called:
            what = "the output shows them, a layer reads them that cannot do without, or they are not constant there"
        if removed.get(name, 0) < dropped:
            left[name] = f"{dropped - removed.get(name, 0)} of {dropped} output features: {what}"
    values = _observe(check, check.fresh(), [check.arguments()])
    return OutputsPlan(_resizes(model, chosen, values), removed, left)


def find_scattered(model: nn.Module, outputs: Masks, example: Example) -> dict[str, Resize]:
    """Which of the layers with dropped outputs that have to stay need not compute them; their weights are zero."""
    shared = shared_parameters(model)
    modules = {name: model.get_submodule(name) for name in outputs}
    chosen = {
        name: Resize(made=mask.nonzero()[:, 0])
        for name, mask in outputs.items()
        if type(modules[name]) in SCATTERED and modules[name] not in shared and _pays(modules[name], mask)
    }
    if not chosen:
        return {}
    check = Check(model, example, {name: outputs[name] for name in chosen})
    chosen = {name: each for name, each in chosen.items() if name in check.called}
    return chosen if check.same({}, lambda *_: chosen) else {}


def _pays(module: nn.Module, mask: Tensor) -> bool:
    """Whether what is saved is worth a copy of the output, by count."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    saved = int((~mask).sum()) * (weight.numel() // len(weight))  # products for each position
    return bool(mask.any()) and saved >= 64 * len(mask) and (weight.dim() > 2 or saved >= 2**18)


def coupled_outputs(model: nn.Module, names: Iterable[str], example: Example) -> list[set[str]]:
    """Which of the named layers have outputs that can only go together, as they are added or multiplied.

    Example:
        >>> class Gated(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        ...
        ...     def forward(self, x):
        ...         return self.down(self.gate(x).relu() * self.up(x))
        >>> found = coupled_outputs(Gated(), ["gate", "up", "down"], ((torch.ones(2, 4),), {}))
        >>> sorted(map(sorted, found))
        [['down'], ['gate', 'up']]
    """
    check, names = Check(model, example), list(names)
    graph = Graph(check.fresh(), check.arguments(), {}, set())
    modules = {name: module for module, name in graph.names.items()}
    sets = {name: {name} for name in names}
    for name in names:
        if modules[name] in graph.graph.module2node:
            every = set(range(graph.widths[name]))
            group, _ = graph.members(modules[name], every)
            for other in (other for other in names if group.outputs.get(other) == every != set()):
                sets[name] |= sets[other]
                for each in sets[name]:
                    sets[each] = sets[name]
    return list({id(each): each for each in sets.values()}.values())


def norms_behind(model: nn.Module, layers: set[nn.Module], example: Example | None) -> dict[nn.Module, list[nn.Module]]:
    """The batch normalizations that take what a layer gives as it is, and nothing else, by layer.

    Without an example, arguments are guessed; none are found where that fails.
    """
    found: dict[nn.Module, list[nn.Module]] = {layer: [] for layer in layers}
    if not any(isinstance(module, NORMS) for module in model.modules()):
        return found
    if example is None:
        try:
            example = guess_example(copy_model(model))
        except ValueError:
            return found
    copied = copy_model(model)
    ours = dict(zip(copied.modules(), model.modules(), strict=True))
    outputs: list[tuple[Tensor, int, nn.Module]] = []
    calls: dict[nn.Module, list[nn.Module | None]] = {}

    def give(module: nn.Module, args: tuple, output: object) -> None:
        features = 2 if isinstance(module, nn.Linear) else getattr(getattr(module, "weight", None), "ndim", 0)
        if isinstance(output, Tensor) and output.dim() == features:
            outputs.append((output, output._version, ours[module]))

    def take(module: nn.Module, args: tuple) -> None:
        same = (layer for output, version, layer in outputs if output is args[0] and output._version == version)
        calls.setdefault(ours[module], []).append(next(same, None))

    for module, own in ours.items():
        if own in layers:
            module.register_forward_hook(give)
        elif isinstance(own, NORMS):
            module.register_forward_pre_hook(take)
    outputs_of(copied, example)
    for norm, given in calls.items():
        if len(given) == 1 and given[0] is not None:
            found[given[0]].append(norm)
    return found


def _reason_to_leave(module: nn.Module, shared: set[nn.Module]) -> str | None:
    layout = layout_of(module)
    if layout is None or layout.per_feature:
        return f"{type(module).__name__} cannot lose output features"
    return "its parameters are shared with another layer" if module in shared else None


# --------------------------------------------------------------------------------------------------- constant features


class _Constants:
    """Which input features of layers are the same everywhere, whatever goes into the model and whatever others give.

    Attributes:
        constant: by layer, bool [in]: True where a feature has one value for given parameters.
        zero: where that value is zero for all parameters that were tried.
        value: float64 [in], with the model's own parameters.
    """

    def __init__(self, check: Check, masks: Masks) -> None:
        self.constant: dict[str, Tensor] = {}
        self.zero: dict[str, Tensor] = {}
        self.value = {name: low for name, (low, _) in _observe(check, check.fresh(), [check.arguments()]).items()}
        for seed in (None, 0, 1, 2):
            model, noise = check.variation(seed)
            noise = torch.Generator().manual_seed(99) if noise is None else noise
            inputs = [check.arguments(), *(check.arguments(noise, run % 2 > 0) for run in range(RUNS))]
            inputs += [_shorter(check.arguments(), dim) for dim in (-1, -2)]  # padding may depend on the size
            for name, (low, high) in _observe(check, model, inputs, masks, noise).items():
                size = torch.maximum(low.abs(), high.abs())
                same = (high - low <= (1e-9 if check.dtype == torch.float64 else 1e-5) * size) & (low <= high)
                zero = size == 0
                self.constant[name] = self.constant.get(name, same) & same
                self.zero[name] = self.zero.get(name, zero) & zero
        self.constant = {name: each for name, each in self.constant.items() if name in self.value}


Ranges = dict[str, tuple[Tensor, Tensor]]


def _observe(
    check: Check,
    model: nn.Module,
    inputs: Sequence[Example],
    masks: Masks | None = None,
    noise: torch.Generator | None = None,
) -> Ranges:
    """The least and the largest value of each input feature of each layer that can lose some, float64 [in].

    With `noise`, whatever other features of layers are, they are moved far at random: what is constant then is so by
    the way in which it is computed. Inputs that the model does not take are passed over. Layers whose input is no plain
    tensor are left out, as are NaN, which show nothing.
    """
    seen: Ranges = {}
    other: set[str] = set()  # layers with other inputs than plain tensors
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            layout = layout_of(module)
            if layout is not None and layout.inputs is not None:
                hooks.enter_context(_watching(name, module, seen, other))
            if noise is not None and masks is not None and layout is not None and not layout.per_feature:
                kept = masks.get(name, torch.ones(getattr(module, layout.outputs), dtype=torch.bool))
                hooks.callback(module.register_forward_hook(_Moving(module, kept, noise)).remove)
        for index, arguments in enumerate(inputs):
            try:
                check.run(model, arguments)
            except Exception:
                if not index:
                    raise
    return {name: each for name, each in seen.items() if name not in other}


def _shorter(arguments: Example, dim: int) -> Example:
    """Arguments whose tensors of three and more dimensions are one shorter along one of them."""

    def cut(value: object) -> object:
        if not isinstance(value, Tensor) or value.is_nested or value.layout is not torch.strided or value.dim() < 3:
            return value
        return value.narrow(dim, 0, max(value.shape[dim] - 1, 1))

    return tree_map(cut, arguments)


class _Moving:
    """A forward hook that moves output features of a layer far, in either direction, where a mask keeps them."""

    def __init__(self, module: nn.Module, kept: Tensor, noise: torch.Generator) -> None:
        self.kept, self.noise = kept.view(-1, *[1] * spatial_dims(module)), noise

    def __call__(self, module: nn.Module, args: tuple, output: object) -> object:
        if not isinstance(output, Tensor) or output.is_nested:
            return None  # of a recurrent layer
        far = torch.randn(output.shape, generator=self.noise).to(output) * (10 * output.abs().mean() + 1)
        return output + torch.where(self.kept.to(output.device), far, 0)


@contextlib.contextmanager
def _watching(name: str, module: nn.Module, seen: Ranges, other: set[str]) -> Iterator[None]:
    spatial = spatial_dims(module)

    def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or x.is_nested or not x.numel() or x.layout is not torch.strided:
            other.add(name)
            return
        rows = x.detach().double().movedim(-1 - spatial, -1).reshape(-1, x.shape[-1 - spatial])
        unknown = rows.isnan()
        low = rows.masked_fill(unknown, torch.inf).amin(0).cpu()
        high = rows.masked_fill(unknown, -torch.inf).amax(0).cpu()
        if name in seen:
            low, high = torch.minimum(low, seen[name][0]), torch.maximum(high, seen[name][1])
        seen[name] = low, high

    handle = module.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# --------------------------------------------------------------------------------------------------- groups, and proof


def _propose(check: Check, masks: Masks, constants: _Constants, tied: set[str]) -> list[_Chosen]:
    """Groups of outputs that masks drop, with the inputs where these are constant."""
    graph = Graph(check.fresh(), check.arguments(), {}, tied)
    modules = {name: module for module, name in graph.names.items()}
    chosen = []
    for name, mask in masks.items():
        producer = modules[name]
        if producer not in graph.graph.module2node:
            continue
        dropped = set((~mask).nonzero()[:, 0].tolist())
        # state that goes from step to step of a recurrent layer is not shown where there is one step
        known = constants.zero if isinstance(check.model.get_submodule(name), nn.RNNBase) else constants.constant
        graph.masks = {layer: ~constant for layer, constant in known.items()}
        group = graph.group(producer, dropped)
        if group is None:
            continue
        graph.take(group)
        each = _keeping_one(graph, producer, group, constants, check.model)
        if each.group.outputs:
            chosen.append(each)
    return chosen


def _keeping_one(graph: Graph, producer: nn.Module, group: Group, constants: _Constants, model: nn.Module) -> _Chosen:
    """The group without one channel, where layers need a constant feature that takes over from the others."""
    needing = [
        name
        for name, indices in group.inputs.items()
        if not folds_into_bias(model.get_submodule(name)) and constants.value[name][sorted(indices)].any()
    ]
    if not needing:
        return _Chosen(group, {})

    def largest(part: Group, name: str) -> int:
        return max(part.inputs.get(name, {0}), key=lambda index: abs(float(constants.value[name][index])))

    parts = [graph.members(producer, {channel})[0] for channel in sorted(group.outputs[graph.names[producer]])]
    weakest = [min(abs(float(constants.value[name][largest(part, name)])) for name in needing) for part in parts]
    kept = parts[max(range(len(parts)), key=weakest.__getitem__)]
    if not max(weakest):
        return _Chosen(Group({}, {}), {})
    outputs = {name: indices - kept.outputs.get(name, set()) for name, indices in group.outputs.items()}
    inputs = {name: indices - kept.inputs.get(name, set()) for name, indices in group.inputs.items()}
    smaller = Group({n: each for n, each in outputs.items() if each}, {n: each for n, each in inputs.items() if each})
    return _Chosen(smaller, {name: largest(kept, name) for name in needing})


def _per_feature(model: nn.Module, groups: Sequence[_Chosen]) -> dict[str, Tensor]:
    """Masks of the features in groups that go through layers such as batch normalization."""
    widths, masks = output_widths(model), {}
    for name, indices in union(each.group.outputs for each in groups).items():
        layout = layout_of(model.get_submodule(name))
        if layout is not None and layout.per_feature:
            masks[name] = without(torch.ones(widths[name], dtype=torch.bool), indices)
    return masks


def _sound(check: Check, groups: list[_Chosen]) -> list[_Chosen]:
    """The groups that pass the check: nearly always all of them, at once."""

    def same(groups: Sequence[_Chosen]) -> bool:
        def resizes(model: nn.Module, arguments: Example) -> Mapping[str, Resize]:
            return _resizes(model, groups, _observe(check, model, [arguments]))

        return check.same({}, resizes)

    if same(groups):
        return groups
    chosen: list[_Chosen] = []
    for each in groups:
        if same([*chosen, each]):
            chosen.append(each)
    return chosen


def _resizes(
    model: nn.Module, groups: Sequence[_Chosen], values: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Resize]:
    """What is removed, as indices of what every layer keeps, and the constants of what goes."""
    widths = output_widths(model)
    outputs = union(each.group.outputs for each in groups)
    inputs = union(each.group.inputs for each in groups)
    into = {name: index for each in reversed(groups) for name, index in each.into.items()}
    plan = {}
    for name in dict.fromkeys([*outputs, *inputs]):
        rows = columns = value = None
        if name in outputs:
            rows = without(torch.ones(widths[name], dtype=torch.bool), outputs[name]).nonzero()[:, 0]
        if name in inputs:
            value = values[name][0]
            columns = without(torch.ones(len(value), dtype=torch.bool), inputs[name]).nonzero()[:, 0]
            needed = bool(value[sorted(inputs[name])].any()) and not folds_into_bias(model.get_submodule(name))
            if needed and not (name in into and value[into[name]]):
                raise SkipError("with these parameters no feature can take over from those that go")
        plan[name] = Resize(rows, columns, None, value, into.get(name))
    return plan
