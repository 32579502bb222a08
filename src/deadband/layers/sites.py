"""Find the sites of a model: the linear layers whose inputs may be skipped."""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deadband.layers.experts import ExpertLinear, unknown_experts, with_projections
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.sparse import (
    SPARSE_CLASSES,
    CentredWeight,
    LaidOutWeight,
    SparseSite,
    parameter_of,
    tensor_of,
)

Patterns: TypeAlias = str | re.Pattern | Iterable[str | re.Pattern]
_ROUTER = re.compile(r"(.*_)?(router|switch)(_layer)?", re.IGNORECASE)
_GATE = re.compile(r"(.*_)?gate(_layer)?", re.IGNORECASE)  # a router, or a layer like others that gates a signal
_ADAPTER = re.compile(r"lora_.*")  # a few columns beside the layer that they adapt
_FEW = 64  # outputs of a layer whose input is not worth skipping, if it has eight times as many inputs


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a site as [out_features, in_features]: a view, however the module stores it, or dequantised.

    Of experts, [experts, out_features, in_features].
    """
    own = isinstance(module, (SparseSite, ExpertLinear))
    view: Any = module if own else SPARSE_CLASSES[type(module)]
    return view.matrix_view(module.weight)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a site; of experts, of each of them."""
    if isinstance(module, QuantizedMatrix):
        return module.matrix_shape
    out_features, in_features = matrix_of(module).shape[-2:]
    return out_features, in_features


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a site's weight, or of its codes: what skipping all of a token's input would save.

    Of experts, those of as many as a token is sent to.
    """
    size = tensor_of(module).nbytes
    if isinstance(module, ExpertLinear) and module.chosen is not None:
        return size * min(module.chosen, module.count) // module.count
    return size


def weight_sample(module: nn.Module) -> tuple[float, ...]:
    """Sixteen weights of a site from all over its matrix: they tell one model from another of the same shapes.

    None of a quantised one: its calibration was made with the weights that it was rounded from.
    """
    if isinstance(module, QuantizedMatrix):
        return ()
    matrix = matrix_of(module).detach()
    if matrix.is_meta or not matrix.numel():
        return ()
    index = torch.linspace(0, matrix.numel() - 1, 16, dtype=torch.float64).long()
    places = torch.unravel_index(index.to(matrix.device), matrix.shape)
    return tuple(matrix[places].double().tolist())


class Identity(NamedTuple):
    """What tells a layer from those of other models: (out_features, in_features), and some of its weights."""

    shape: tuple[int, int]
    sample: tuple[float, ...]


def identity_of(module: nn.Module) -> Identity:
    """The `Identity` of a linear layer."""
    return Identity(shape_of(module), weight_sample(module))


def is_site(module: nn.Module) -> bool:
    """Whether `module` is of a class that can be made sparse. Subclasses are not: they may compute something else."""
    known = type(module) in SPARSE_CLASSES or isinstance(module, SparseSite)
    if type(module) is ExpertLinear and parametrize.is_parametrized(module.owner):
        return False
    # pruning, old-style weight_norm and quantised tensors put something else in the parameter's place
    plain = (nn.Parameter, LaidOutWeight, CentredWeight)
    return known and (isinstance(module, QuantizedMatrix) or type(parameter_of(module)) in plain)


def how_computed(module: nn.Module) -> str | None:
    """What torch.nn.utils did to a linear layer that is no site because of it, and how to undo that."""
    if not isinstance(module, (*SPARSE_CLASSES, SparseSite)):
        return None
    utilities = "torch.nn.utils"
    if parametrize.is_parametrized(module):
        name, parametrizations = next(iter(cast(nn.ModuleDict, module.parametrizations).items()))
        if any(hasattr(each, "mask") for each in cast(nn.ModuleList, parametrizations)):
            return f"has a mask on its {name}: make that permanent with squash_mask() of its sparsifier first"
        remedy = f"{utilities}.parametrize.remove_parametrizations(layer, {name!r})"
        return f"has a parametrised {name}: make that permanent with {remedy} first"
    if "weight_mask" in module._buffers:
        remedy = f"{utilities}.prune.remove(layer, 'weight'), which keeps the zeros,"
        return f"has a pruned weight: make that permanent with {remedy} first"
    for norm, name in (("weight_norm", "weight_g"), ("spectral_norm", "weight_orig")):
        if name in module._parameters:
            return f"computes its weight by {norm}: call {utilities}.remove_{norm}(layer) first"
    return None


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by name: the members of its outermost lists of modules that hold linear layers.

    Example:
        >>> list(find_blocks(model))                                    # doctest: +SKIP
        ['model.layers.0', 'model.layers.1']
    """
    return _blocks(model, is_site)


def _blocks(model: nn.Module, counts: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The repeated blocks that hold a module which counts."""
    blocks: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        children = [child for child in module.children() if not is_site(child) and any(map(counts, child.modules()))]
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        repeated = isinstance(module, nn.ModuleList) or (isinstance(module, (nn.Sequential, nn.ModuleDict)) and alike)
        for child_name, child in module.named_children():
            child_name = f"{name}.{child_name}" if name else child_name
            if repeated and child in children:
                blocks[child_name] = child
            else:
                visit(child_name, child)

    visit("", model)
    return blocks


def find_sites(
    model: nn.Module, include: Patterns | None = None, exclude: Patterns | None = None
) -> dict[str, nn.Module]:
    """The sites of a model by fully qualified name, in the order of the model.

    Without `include`, these are the linear layers inside repeated blocks (all linear layers if there are no such
    blocks), less routers and gates of mixtures of experts; so neither `lm_head` nor an embedding.

    Args:
        model: any module.
        include: choose sites instead: one pattern or several. A pattern is a name, the end of a name
            (`"mlp.down_proj"`), a glob (`"*.layers.[0-3].*"`) or a regular expression (`re.compile(...)`, or a string
            that starts with `re:`), which has to match the whole name.
        exclude: patterns of sites to leave dense.

    Raises:
        ValueError: a pattern matches nothing, no site is left, or the blocks hold only linear layers of other classes,
            which are named.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(find_sites(model)), list(find_sites(model, include="2"))
        (['0', '2'], ['2'])
    """
    every = sites_of(model)
    if not every:
        raise _no_sites(model, every)
    if include is not None:
        chosen = _matching(model, every, include, "include")
    else:
        blocks = _blocks(model, lambda module: is_site(module) or _is_other(module))
        inside = tuple(f"{name}." for name in blocks)
        chosen = {name for name in every if not blocks or name.startswith(inside)}
        chosen = {name for name in chosen if not _left_out(model, name, every[name])}
        if not chosen:
            raise _no_sites(model, every)
        unknown = unknown_experts(model)
        if unknown:
            warnings.warn(
                f"experts of a kind that is not known here stay dense: {', '.join(unknown)}. Their weights are neither "
                "linear layers nor in a form of transformers' own classes",
                stacklevel=2,
            )
    if exclude is not None:
        chosen -= _matching(model, every, exclude, "exclude")
    if not chosen:
        raise ValueError("no site is left: `exclude` takes away everything that was found or included")
    return {name: module for name, module in every.items() if name in chosen}


def _is_other(module: nn.Module) -> bool:
    """Whether a module does what a linear layer does, in a class of its own or in torch's fused encoder layer."""
    if is_site(module) or any(map(is_site, module.children())):
        return isinstance(module, nn.TransformerEncoderLayer)
    sized = all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
    return sized or "Linear" in type(module).__name__ or how_computed(module) is not None


def _no_sites(model: nn.Module, every: Iterable[str]) -> ValueError:
    """The error that says why a model has no sites, or none in its blocks, and of which classes its layers are."""
    where = " in its blocks" if every else ""
    message = (
        f"{type(model).__name__} has no layer that can be made sparse{where}; expected nn.Linear (or transformers' "
        "Conv1D) layers with plain weights"
    )
    computed = next(filter(None, map(how_computed, model.modules())), None)
    others = Counter(_class_of(each) for each in model.modules() if _is_other(each))
    if computed is not None:
        message += f": a layer {computed}"
    elif others:
        classes = ", ".join(f"{name} ({count})" for name, count in others.most_common())
        message += f", not {classes}: load it without another library's quantisation, or put nn.Linear in their place"
    if every:
        message += f"; include= chooses other layers, such as {next(reversed(list(every)))!r}"
    return ValueError(message)


def _class_of(module: nn.Module) -> str:
    """The class of a layer that is no site, or of its weight, should that be the reason."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return f"{name} with a {type(module.weight).__name__}" if type(module) in SPARSE_CLASSES else name


def _left_out(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a layer is no site unless asked for: of an adapter, read and never called, or a router.

    A router chooses a path instead of carrying a signal: skipping entries of its input saves nothing (a handful of
    outputs) and changes which expert runs. If it is called a gate, it has few outputs or stands beside experts.
    """
    parts = name.split(".")
    if parts[-1] == "dt_proj" and "A_log" in model.get_submodule(".".join(parts[:-1]))._parameters:
        return True  # Mamba's scan reads its weight and never calls it
    if any(_ADAPTER.fullmatch(part) or _ROUTER.fullmatch(part) for part in parts):
        return True
    out_features, in_features = shape_of(module)
    few = out_features <= min(_FEW, in_features // 8)
    owners = (model.get_submodule(".".join(parts[:depth])) for depth, part in enumerate(parts) if _GATE.fullmatch(part))
    return any(few or _has_experts(owner) for owner in owners)


def _has_experts(module: nn.Module) -> bool:
    names = (*vars(module), *module._modules, *module._parameters)
    return any("expert" in name.lower() for name in names)


def sites_of(model: nn.Module, *, every_name: bool = False) -> dict[str, nn.Module]:
    """All layers that can be made sparse; with `every_name`, a shared one under each of its names.

    The layers inside torch's nn.TransformerEncoderLayer are none: its fast path reads their weights and never calls
    them.
    """
    fused = [name for name, module in model.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    bypassed = tuple(f"{name}." if name else "" for name in fused)
    modules = with_projections(model, every_name=every_name)
    return {name: module for name, module in modules if is_site(module) and not name.startswith(bypassed)}


def _matching(model: nn.Module, names: Iterable[str], patterns: Patterns, argument: str) -> set[str]:
    if isinstance(patterns, (str, re.Pattern)):
        patterns = [patterns]
    names = list(names)
    matched: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if _matches(name, pattern)}
        if not found:
            shown = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
            others = (each for name, each in model.named_modules() if _is_other(each) and _matches(name, pattern))
            if (other := next(others, None)) is not None:
                what = how_computed(other)
                raise ValueError(
                    f"{argument}={shown!r} matches no linear layer that can be made sparse, but one "
                    + (f"that {what}" if what else f"of {_class_of(other)}")
                )
            near = difflib.get_close_matches(shown, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(f"{argument}={shown!r} matches no linear layer of the model; there are for example {near}")
        matched |= found
    return matched


def _matches(name: str, pattern: str | re.Pattern) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern has to be a string or a compiled regular expression, got {type(pattern).__name__}")
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], name) is not None
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a valid regular expression: {error}") from None
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def sparse_sites(model: nn.Module) -> dict[str, SparseSite]:
    """The sparse layers of `model` by the names that they have as sites."""
    return {name: module for name, module in with_projections(model) if isinstance(module, SparseSite)}
