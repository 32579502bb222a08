"""compact_: input features that a static mask drops are removed for real, from weights and from what made them."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deadband.compaction.examples import call, outputs_of
from deadband.compaction.resize import SCATTERED, Example, Gathered, Resize, apply_, clear_rows_, layout_of
from deadband.layers.transaction import all_or_nothing
from deadband.running.copies import copy_arguments, copy_model
from deadband.running.forward import evaluating
from deadband.running.timing import interleave, median

ROUNDS = 5  # calls that the latency in a report is the median of


# ------------------------------------------------------------------------------------------------------------- the verb


@dataclasses.dataclass(frozen=True)
class CompactionReport:
    """What compaction did: figures before and after, and what happened to each masked layer.

    Attributes:
        parameters: their number.
        flops: of one call on the example, as torch counts them; 0 where it cannot, as with nested tensors.
        seconds: median latency of one call on the example; before is the dense model, without masks.
        removed: masked input features that are gone, along with what made them, by layer.
        outputs: masked output features that are gone, along with what read them, by layer.
        scattered: masked output features that are not computed any more, but are still there, as constants, by layer.
        gathered: masked input features that are still made, but not read, by layer.
        left: why a layer is as it was, by layer.
        note: why producers stay whole that might have shrunk; empty if none do.
    """

    parameters: tuple[int, int]
    flops: tuple[int, int]
    seconds: tuple[float, float]
    removed: dict[str, int]
    gathered: dict[str, int]
    left: dict[str, str]
    note: str = ""
    outputs: dict[str, int] = dataclasses.field(default_factory=dict)
    scattered: dict[str, int] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def __str__(self) -> str:
        before, after = (values[0] * 1e3 for values in (self.seconds, self.seconds[::-1]))
        rows = (("parameters", *self.parameters), ("FLOPs", *self.flops), ("milliseconds", before, after))
        lines = [f"{'':12}  {'before':>18}  {'after':>18}   ratio"]
        for name, old, new in rows:
            shown = (f"{value:18,.3f}" if isinstance(value, float) else f"{value:18,}" for value in (old, new))
            lines.append("  ".join([f"{name:12}", *shown, f"{old / new:5.2f}x" if new else ""]).rstrip())
        for what in ("outputs", "scattered", "removed", "gathered"):
            lines += [f"{what:12}  {count:18,}  {name}" for name, count in getattr(self, what).items()]
        lines += [f"{'left':12}  {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines + [f"{'note':12}  {self.note}"] * bool(self.note))


def compact_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example: Example,
    *,
    outputs: Mapping[str, Tensor] | None = None,
    producers: bool = True,
) -> CompactionReport:
    """Remove the features that masks drop, in place, so that the model gives what the masked one gives.

    The columns of the weight of a layer in `masks` go. Where nothing else reads a feature, what makes it goes, too:
    rows of a linear layer or convolution, columns of an embedding, with the batch normalization in between. Elsewhere,
    as on a residual stream, the layer gathers the features that it keeps (`GatheredLinear`, ...). What can go is found
    through Torch-Pruning and counts only if copies of the model, in float64, give the same output without it, on the
    example and on random variations of it and of the parameters.

    The rows of the weight of a layer in `outputs` become zero, so that what it gives there is constant: its bias, or
    what normalization and activations make of that. Where nothing else reads them they go, with the columns of what
    reads them; a constant that is not zero goes into the bias of the reader, or, if it has none or pads its input with
    zeros, one such feature stays and takes over from all others. Elsewhere they stay, and the report says so; a large
    layer does not compute them, but puts constants in their places (`ScatteredLinear`, ...).

    Outputs are those of the model in eval mode with `torch.where(mask, x, 0)` in front of each masked layer. Modules
    keep their identity, hooks, device and dtype; parameters that shrink are new objects without a gradient, so make
    the optimizer afterwards. On any exception the model is as before.

    Args:
        model: any module, without hooks of its own that mask.
        masks: by layer, a bool tensor [in_features] or [in_channels], True = keep. The layers are nn.Linear,
            nn.Conv1d to nn.Conv3d in one group, and transformers' Conv1D; others are left, and the report says why.
        example: arguments of one call of the model, `(positional, keyword)`. The layers it does not call are left.
        outputs: by layer, a bool tensor [out_features], [out_channels], or [hidden_size] for an LSTM, GRU or RNN in one
            direction (of all of its layers).
        producers: with False, layers that make features stay whole, and Torch-Pruning is not needed.

    Returns:
        A `CompactionReport`.

    Raises:
        ValueError: a layer that the model does not have, a mask of the wrong length, or an example that the model does
            not run on.
        TypeError: a mask that is not a bool tensor, an example that is not such a pair, or a model that cannot be
            copied.
        ImportError: Torch-Pruning is missing: `pip install "deadband[compact]"`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
        >>> report = compact_(model, {"2": torch.arange(16) < 4}, ((torch.ones(1, 8),), {}))
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
        >>> report.parameters, report.removed
        ((178, 46), {'2': 12})
    """
    from deadband.compaction.graph import require_torch_pruning
    from deadband.compaction.outputs import find_outputs, find_scattered
    from deadband.compaction.plan import find_plan

    if producers or outputs:
        require_torch_pruning()
    masks, outputs = _checked(model, masks), _checked(model, outputs or {}, of_outputs=True)
    if not (isinstance(example, tuple) and list(map(type, example)) == [tuple, dict]):
        raise TypeError(f"example is {type(example).__name__}; expected (positional tuple, keyword dict) of one call")
    dense, smaller = copy_model(model), copy_model(model)
    outputs_of(dense, example)
    clear_rows_(smaller, outputs)
    first = find_outputs(smaller, outputs, example)
    apply_(smaller, first.resizes)
    plan = find_plan(
        smaller, {name: mask[_kept(first.resizes, name, mask)] for name, mask in masks.items()}, example, producers
    )
    apply_(smaller, plan.resizes)
    rest = {name: _of_kept(first.resizes, name, mask) for name, mask in outputs.items() if name in first.left}
    scattered = find_scattered(smaller, rest, example)
    resizes = [first.resizes, plan.resizes, scattered]
    changed = [model.get_submodule(name) for name in {*outputs, *(name for each in resizes for name in each)}]
    values = [value for name in outputs for value in model.get_submodule(name).parameters()]
    with all_or_nothing(changed, values=values):
        clear_rows_(model, outputs)
        for each in resizes:
            apply_(model, each)
        compacted = copy_model(model)  # calls may leave something behind in the model, which is not the user's
        left = {name: reason for name, reason in first.left.items() if name not in scattered}
        return CompactionReport(
            parameters=(_count(dense), _count(compacted)),
            flops=(flops_of(dense, example), flops_of(compacted, example)),
            seconds=seconds_of(dense, compacted, example),
            removed=plan.removed,
            gathered=plan.gathered,
            left=left | plan.left,
            note=plan.note,
            outputs=first.removed,
            scattered={name: int((~rest[name]).sum()) for name in scattered},
        )


def _of_kept(resizes: Mapping[str, Resize], name: str, mask: Tensor) -> Tensor:
    """A mask of outputs, of those that are still there."""
    kept = resizes[name].outputs if name in resizes else None
    return mask if kept is None else mask[kept]


def _kept(resizes: Mapping[str, Resize], name: str, mask: Tensor) -> Tensor:
    """The entries of a mask of inputs that are still there once outputs went."""
    inputs = resizes[name].inputs if name in resizes else None
    return torch.arange(len(mask)) if inputs is None else inputs


def _checked(model: nn.Module, masks: Mapping[str, Tensor], of_outputs: bool = False) -> dict[str, Tensor]:
    """The masks on the CPU; an error names the first bad one."""
    what = "outputs" if of_outputs else "masks"
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: dict[nn.Module, str] = {}
    for name, mask in masks.items():
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3) or list(modules)[1:4]
            raise ValueError(f"{what} has {name!r}, which is not a layer of the model; there are for example {near}")
        if modules[name] in seen:
            raise ValueError(f"{seen[modules[name]]!r} and {name!r} are one layer of the model; pass one mask for it")
        seen[modules[name]] = name
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"the mask of {name!r} is {got}; expected a bool tensor, True = keep: pass mask != 0")
        layout = layout_of(modules[name])
        counted = None if layout is None else layout.outputs if of_outputs else layout.inputs
        width = getattr(modules[name], counted) if counted else mask.numel()
        if mask.shape != (width,) and (of_outputs or not isinstance(modules[name], Gathered)):
            each = "output" if of_outputs else "input"
            raise ValueError(f"the mask of {name!r} has shape {list(mask.shape)}; expected [{width}], one per {each}")
    return {name: mask.detach().cpu() for name, mask in masks.items()}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_of(model: nn.Module, example: Example, shares: Mapping[str, float] | None = None) -> int:
    """FLOPs of one call, as torch counts them, of some layers a share; 0 where it cannot, as for nested tensors."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        try:
            call(model, copy_arguments(example))
        except Exception:  # the model runs; what cannot be counted are nested tensors
            return 0
    within = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    left_out = sum(within.get(name, 0) * (1 - share) for name, share in (shares or {}).items())
    return round(counter.get_total_flops() - left_out)


def seconds_of(dense: nn.Module, compacted: nn.Module, example: Example) -> tuple[float, float]:
    """The median latency of a call of each, in turns."""
    ours, theirs = copy_arguments(example), copy_arguments(example)  # a cache among the arguments grows with each call
    with evaluating(dense), evaluating(compacted):
        calls = {"dense": lambda: call(dense, theirs), "compacted": lambda: call(compacted, ours)}
        times = interleave(calls, rounds=ROUNDS, progress=False)
    return median(times["dense"]), median(times["compacted"])


# ------------------------------------------------------------------------------------------------------------- loading


def load_compact_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Give a dense model the shapes of a compacted one and load its parameters, in place and all or nothing.

    This is also the way for transformers models, whose `from_pretrained` knows no other shapes than the config's:
    make the dense model from its config, then load the state dict.

    Args:
        model: a fresh model of the architecture that was compacted.
        state_dict: of the compacted model. Of parameters that the model ties, one name is enough, as in safetensors.

    Returns:
        The model, for chaining.

    Raises:
        ValueError: an entry is missing, unknown or of a shape that compaction does not lead to; the model is as before.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
        >>> _ = compact_(model, {"2": torch.arange(16) < 4}, ((torch.ones(1, 8),), {}))
        >>> fresh = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> load_compact_(fresh, model.state_dict())[0]
        Linear(in_features=8, out_features=4, bias=True)
    """
    held: dict[int, list[str]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        held.setdefault(id(value), []).append(key)
    found = dict(state_dict)
    for keys in held.values():
        given = next((key for key in keys if key in found), None)
        found |= {key: found[given] for key in keys if given is not None and key not in found}
    shapes = {name: _shape_of(module, f"{name}." if name else "", found) for name, module in model.named_modules()}
    plan = {name: to for name, to in shapes.items() if to is not None}
    with all_or_nothing(map(model.get_submodule, plan), values=(*model.parameters(), *model.buffers())):
        apply_(model, plan)
        _check_shapes(model, found)
        model.load_state_dict(found)
    return model


def _shape_of(module: nn.Module, prefix: str, found: Mapping[str, Any]) -> Resize | None:
    """What `module` is cut down to, from its entries of a state dict; None: to nothing less than it is."""
    layout = layout_of(module)
    weight = found.get(f"{prefix}weight", found.get(f"{prefix}running_mean"))
    if layout is not None and layout.gates and isinstance(units := found.get(f"{prefix}weight_hh_l0"), Tensor):
        weight = found.get(f"{prefix}weight_ih_l0")
        weight = None if weight is None or units.dim() < 2 else weight[: units.shape[1]]
    if layout is None or not isinstance(weight, Tensor):
        return None

    def narrowed(attribute: str | None, dim: int) -> Tensor | None:
        size = weight.shape[dim] if weight.dim() > dim else sys.maxsize
        return torch.arange(size) if attribute is not None and size < getattr(module, attribute) else None

    kept = found.get(f"{prefix}kept") if layout.gathered is not None else None
    made, rest = (found.get(f"{prefix}{name}") if type(module) in SCATTERED else None for name in ("made", "rest"))
    outputs = narrowed(layout.outputs, layout.out_dim)
    if made is not None and rest is not None:
        outputs = torch.arange(len(rest)) if len(rest) < getattr(module, layout.outputs) else None
        if made.dtype != torch.int64 or made.dim() != 1 or not all(0 <= index < len(rest) for index in made.tolist()):
            raise ValueError(f"{prefix}made is {made}; expected int64 indices below {len(rest)}")
    to = Resize(outputs, narrowed(layout.inputs, layout.in_dim), kept, made=made)
    if kept is not None:
        width = sys.maxsize if isinstance(module, Gathered) else getattr(module, layout.inputs or "")
        if kept.dtype != torch.int64 or kept.dim() != 1 or not all(0 <= index < width for index in kept.tolist()):
            raise ValueError(f"{prefix}kept is {kept}; expected int64 indices below {width}")
        if weight.dim() <= layout.in_dim or weight.shape[layout.in_dim] != max(len(kept), 1):
            raise ValueError(f"{prefix}weight has shape {list(weight.shape)}, but {prefix}kept has {len(kept)} entries")
    return None if to == Resize() else to


def _check_shapes(model: nn.Module, found: Mapping[str, Any]) -> None:
    own = model.state_dict()
    for what, keys in (("lacks", own.keys() - found.keys()), ("has an unknown", found.keys() - own.keys())):
        if keys:
            raise ValueError(f"the state dict {what} {min(keys)!r}; build the model as it was before compact_")
    for key, value in own.items():
        if isinstance(value, Tensor) and value.shape != found[key].shape:
            raise ValueError(
                f"{key!r} has shape {list(found[key].shape)}; expected {list(value.shape)} or, where compact_ removes "
                "features, less of them: build the model as it was before compact_"
            )
