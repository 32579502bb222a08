"""Experts of a mixture whose weights are one tensor, [experts, out, in], as sites: one for each projection.

transformers (from version 5 on) keeps the experts of a layer in a module of a few parameters, `gate_up_proj` (or
`up_proj`) and `down_proj`. Here each of these is an `ExpertLinear`: a linear layer of which every row of its input
names the weight. Its name as a site is that of the parameter. While one of them is sparse, or a hook wants to see its
input, the module is of a class that calls them; the parameters stay where they are. What makes a projection sparse lies
in a module `projections` beside the parameters, and in state dicts under that name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deadband.layers import scope
from deadband.layers.quantized import QUANTIZED_CLASSES, QuantizedMatrix
from deadband.layers.sparse import (
    ALL_ROWS,
    SPARSE_CLASSES,
    SparseSite,
    change_class_,
    lay_out_,
    parameter_of,
)
from deadband.ops.experts import expert_linear, expert_mlp, expert_product, grouped
from deadband.ops.gradients import fill_skipped, quantized_product
from deadband.ops.linear import COUNTS, count_, dequantize, transformed, uncounted
from deadband.ops.skipping import apply_mask, keep_mask

PROJECTIONS = "projections"
"""The module that holds sparse projections, beside the parameters."""
_KEY = "_deadband_projections"
_ACTIVATION = "_deadband_activation"
_CALLED = "_deadband_called"
_ARGUMENTS = "_deadband_arguments"
_THRESHOLD = 4  # its place among the parts
_HOOKS = "_deadband_hooks"
_lock = threading.Lock()


@dataclasses.dataclass
class Operands:
    """What `deadband.ops.experts` takes of a projection.

    Attributes:
        parts: weight, scales, minimum, bias, threshold, scale, center and offset.
        group_size, relative, counts: as there.
        rows: tokens up to which entries are skipped.
    """

    parts: list[Any]
    group_size: int = 0
    relative: bool = False
    rows: int = 0
    counts: Tensor | None = None


class ExpertLinear(nn.Module):
    """One projection of all experts of a layer, y[row] = W[experts[row]] · x[row] + bias[experts[row]].

    Args:
        owner: the module that has the weight, and perhaps the bias, among its parameters.
        name: of the weight there; the bias is called the same and `_bias`.
        transposed: whether the weight is [experts, in, out].
        chosen: experts that a token is sent to, where that is known.
    """

    owner: nn.Module

    def __init__(self, owner: nn.Module, name: str, transposed: bool, chosen: int | None) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a submodule: this will be one of its
        self.name, self.stored_in_out, self.chosen = name, transposed, chosen

    @property
    def home(self) -> tuple[nn.Module, str]:
        """Where the weight is a parameter: the module, and its name there."""
        return self.owner, self.name

    @property
    def weight(self) -> Any:
        """The weight as the module holds it, or computes it if it is parametrised."""
        weight = self.owner._parameters.get(self.name)
        return getattr(self.owner, self.name) if weight is None else weight

    @property
    def bias(self) -> Any:
        """[experts, out_features] or None."""
        return self.owner._parameters.get(f"{self.name}_bias")

    @property
    def count(self) -> int:
        """How many experts there are."""
        return (self.codes if isinstance(self, QuantizedMatrix) else self.weight).shape[0]

    def matrix_view(self, weight: Tensor) -> Tensor:
        """The stored weight as [experts, out_features, in_features]."""
        return weight.mT if self.stored_in_out else weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module; the weight goes to its owner."""
        if name == "weight":
            self.owner.register_parameter(self.name, param)
        else:
            super().register_parameter(name, param)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module; the owner calls this layer until the hook is removed."""
        return _Handle(self, super().register_forward_pre_hook(*args, **kwargs))

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As of every module; the owner calls this layer until the hook is removed."""
        return _Handle(self, super().register_forward_hook(*args, **kwargs))

    def settle_(self) -> None:
        """Have the owner call its projections while one of them is sparse, quantised or watched, and else not."""
        owner = self.owner
        projections: dict[str, ExpertLinear] = owner.__dict__[_KEY]
        changed = any(type(each) is not ExpertLinear for each in projections.values())
        if changed and PROJECTIONS not in owner._modules:
            for each in projections.values():
                each.train(owner.training)
            owner._modules[PROJECTIONS] = nn.ModuleDict(projections)
        elif not changed:
            owner._modules.pop(PROJECTIONS, None)
        called = changed or owner.__dict__.get(_HOOKS, 0) > 0
        if called != isinstance(owner, OpenExperts):
            kind = _open_class(type(owner)) if called else closed_class(type(owner))
            change_class_(owner, kind)

    def operands(self) -> Operands:
        """What the operators take of this projection."""
        weight = self.matrix_view(self.weight)
        return Operands([weight, None, None, self.bias, None, None, None, None])

    def forward(self, x: Tensor, experts: Tensor, each: int = 1) -> Tensor:
        """[rows, in_features] -> [rows, out_features].

        Args:
            x: the input.
            experts: int64 [rows], the expert of each row; negative for none, which gives zeros.
            each: rows that a token has.
        """
        own = self.operands()
        mask = self._buffers.get("mask")
        if mask is not None and own.rows:
            x = apply_mask(x, mask)
        weight, scales, minimum, bias, threshold, scale, center, offset = own.parts
        rows, counts = min(own.rows * each, ALL_ROWS), own.counts
        if isinstance(self, QuantizedMatrix):
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            bias = None if bias is None else bias.to(x.dtype)
        mixed = scales is None and x.dtype is not weight.dtype  # autocast: torch's own product knows what to do
        if self._learns(x) or transformed() or mixed:
            if threshold is not None:
                if counts is not None and not transformed() and len(x) <= rows:
                    chosen = x.detach()[experts >= 0]
                    count_(counts, chosen, keep_mask(chosen, threshold, scale, center, own.relative))
                x = fill_skipped(x, threshold, scale, center, own.relative, rows, None, cast(Any, self).gradient)
            return self._product(x, experts, weight, bias)
        counts = uncounted(x.device) if counts is None else counts
        return expert_linear(
            x, experts, weight, scales, minimum, bias, own.group_size, threshold, scale, center, offset, own.relative,
            rows, counts,
        )  # fmt: skip

    def of_tokens(self, x: Tensor, experts: Tensor, each: int) -> Tensor:
        """As `forward`; hooks see no rows without an expert."""
        hooked = self._forward_pre_hooks or self._forward_hooks
        if not hooked or torch.compiler.is_compiling() or bool((experts >= 0).all()):
            return self(x, experts, each)
        at = (experts >= 0).nonzero().squeeze(1)
        y = self(x[at], experts[at], each)
        return y.new_zeros(len(x), y.shape[1]).index_copy(0, at, y)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # the owner, which may come later, lays its weights out

    @property
    def in_order(self) -> bool:
        """Whether its rows are those of the tokens, in their order."""
        return self.owner.__dict__[_CALLED] == "routed"

    def _product(self, x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product alone, with gradients."""
        return expert_product(x, experts, weight, bias)

    def _learns(self, x: Tensor) -> bool:
        """Whether gradients are wanted."""
        if not torch.is_grad_enabled() or (torch.compiler.is_exporting() and not self.training):
            return False
        trained = (x, None if isinstance(self, QuantizedMatrix) else self.weight, self.bias)
        return any(each is not None and each.requires_grad for each in trained)

    def is_plain(self, x: Tensor) -> bool:
        """Whether nothing but the operator happens to the input: no hook, mask or gradient, and the dtype serves."""
        return not (
            self._forward_pre_hooks
            or self._forward_hooks
            or self._buffers.get("mask") is not None
            or (self.training and isinstance(self, SparseSite))
            or self._learns(x)
            or (not isinstance(self, QuantizedMatrix) and self.weight.dtype is not x.dtype)
            or (self.bias is not None and self.bias.dtype is not x.dtype)
        )

    def extra_repr(self) -> str:
        """What print(model) shows."""
        out_features, in_features = (
            self.matrix_shape if isinstance(self, QuantizedMatrix) else self.matrix_view(self.weight).shape[-2:]
        )
        shapes = f"experts={self.count}, in_features={in_features}, out_features={out_features}"
        rest = super().extra_repr()
        return f"{shapes}{rest if rest.startswith(',') else ''}"


class SparseExpertLinear(ExpertLinear, SparseSite):  # type: ignore[misc]  # it is called with experts, too
    """`ExpertLinear` that skips inputs inside the deadband: in training, else of up to `sparse_rows` tokens.

    All experts have one rule.
    """

    dense_class = ExpertLinear

    def operands(self) -> Operands:
        """What the operators take of this projection."""
        own, buffers = super().operands(), self._buffers
        computed = not isinstance(self, QuantizedMatrix) and parameter_of(self) is None  # then there is no offset
        own.parts[4:] = [buffers[name] for name in ("threshold", "scale", "center", "offset")]
        own.parts[-1] = None if computed else own.parts[-1]
        own.relative, own.rows, own.counts = self.relative, self.sparse_rows, buffers["counts"]
        if scope.any_open:
            own.rows, own.counts = scope.setting_of(self, own.rows, own.counts)
        if self.training:
            own.rows, own.counts = ALL_ROWS if own.rows else 0, None
        return own


class QuantizedExpertLinear(ExpertLinear, QuantizedMatrix):
    """`ExpertLinear` with weights of 8 or 4 bits; skips nothing."""

    weight = QuantizedMatrix.weight

    def operands(self) -> Operands:
        """What the operators take of this projection."""
        parts = [self.codes, self.scales, self.minimum, self.bias, None, None, None, None]
        return Operands(parts, self.group_size)

    def _product(self, x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        codes, scales, minimum = self.codes, self.scales, self.minimum

        def product(expert: int, rows: Tensor) -> Tensor:
            low = None if minimum is None else minimum[expert]
            own = None if bias is None else bias[expert]
            return quantized_product(rows, codes[expert], scales[expert], low, own, self.group_size)

        return grouped(x, experts, len(codes), product)

    def compute_row(self, index: int) -> Tensor:
        """The weight of one expert as the module holds it, dequantised."""
        low = None if self.minimum is None else self.minimum[index]
        one = dequantize(self.codes[index], self.scales[index], low, self.group_size, self.weight_dtype)
        return one.mT if self.stored_in_out else one

    def _dequantise_for_torch(self) -> None:
        raise NotImplementedError(
            "quantised weights of experts cannot be parametrised or pruned; dequantise them first: deadband.densify_"
        )


class QuantizedSparseExpertLinear(SparseExpertLinear, QuantizedExpertLinear):  # type: ignore[misc]
    """`SparseExpertLinear` with weights of 8 or 4 bits."""

    dense_class = QuantizedExpertLinear


SPARSE_CLASSES |= {ExpertLinear: SparseExpertLinear, QuantizedExpertLinear: QuantizedSparseExpertLinear}
QUANTIZED_CLASSES |= {ExpertLinear: QuantizedExpertLinear, SparseExpertLinear: QuantizedSparseExpertLinear}


class _Handle:
    """A hook on a projection, which the owner has to call for it."""

    def __init__(self, projection: ExpertLinear, handle: Any) -> None:
        self.projection, self.handle = projection, handle
        self._add(1)

    def remove(self) -> None:
        """Take the hook off again."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
            self._add(-1)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _add(self, number: int) -> None:
        owner = self.projection.owner
        with _lock:
            owner.__dict__[_HOOKS] = owner.__dict__.get(_HOOKS, 0) + number
            self.projection.settle_()
            if not owner.__dict__[_HOOKS]:
                del owner.__dict__[_HOOKS]


# --------------------------------------------------------------------------------------------------- modules of experts


class OpenExperts(nn.Module):
    """What calls the projections of experts, in the place of the forward of their own class."""

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The mixture of each token's experts, as `batched_mm` of transformers computes it."""
        owner: Any = self
        first, down = owner.__dict__[_KEY].values()
        tokens, each = top_k_index.shape
        mixture = self._mixture(hidden_states, top_k_index, top_k_weights)
        if mixture is not None:
            return mixture
        indices = top_k_index.reshape(-1)
        experts = torch.where(indices < down.count, indices, -1)  # those of other devices, and none
        x = hidden_states.unsqueeze(1).expand(-1, each, -1).reshape(tokens * each, hidden_states.shape[-1])
        y = first.of_tokens(x, experts, each)
        if first.name != "gate_up_proj":
            y = owner.act_fn(y)
        elif hasattr(owner, "_apply_gate"):
            y = owner._apply_gate(y)
        else:
            gate, up = y.chunk(2, dim=-1)
            y = owner.act_fn(gate) * up
        y = down.of_tokens(y.to(hidden_states.dtype), experts, each)
        if getattr(owner, "has_post_expert_norm", False):
            y = owner.post_expert_norm(y)
        if hasattr(owner, "identity_expert"):  # LongCat's: those behind the others return what they are given
            y, experts = torch.where((experts < 0).unsqueeze(-1), x, y), indices
        weights = torch.where(experts >= 0, top_k_weights.reshape(-1), 0).unsqueeze(-1)
        return (y * weights).view(tokens, each, y.shape[1]).sum(dim=1).to(hidden_states.dtype)

    def _mixture(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor | None:
        """`_routed` in one operator; None where that does not serve."""
        first, down = self.__dict__[_KEY].values()
        activation = self.__dict__.get(_ACTIVATION)
        learns = torch.is_grad_enabled() and top_k_weights.requires_grad and not torch.compiler.is_exporting()
        if activation is None or learns or transformed() or torch.is_autocast_enabled(x.device.type):
            return None
        if x.dim() != 2 or not (first.is_plain(x) and down.is_plain(x)):
            return None
        one, two = first.operands(), down.operands()
        rows = {own.rows for own in (one, two) if own.parts[_THRESHOLD] is not None} or {0}
        if len(rows) > 1:
            return None
        counts = [own.counts for own in (one, two)]
        if any(each is not None for each in counts) or torch.compiler.is_compiling():
            counts = [x.new_zeros(COUNTS, dtype=torch.int64) if each is None else each for each in counts]
        else:
            counts = []
        experts = torch.where(top_k_index < down.count, top_k_index, -1)
        return expert_mlp(
            x, experts, top_k_weights, [*one.parts, *two.parts], [one.group_size, two.group_size],
            [one.relative, two.relative], rows.pop(), counts, activation,
        )  # fmt: skip

    def _scattered(self, hidden_states: Tensor) -> Tensor:
        """Llama 4's: every expert is given every token, which is zero where the expert was not chosen."""
        owner: Any = self
        first, down = owner.__dict__[_KEY].values()
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens = x.shape[0] // first.count
        experts = torch.arange(first.count, device=x.device).unsqueeze(1).expand(-1, tokens).reshape(-1)
        chosen = (x != 0).any(-1)
        if torch.compiler.is_compiling():  # sizes may not depend on values
            gate, up = first(x, torch.where(chosen, experts, -1), first.count).chunk(2, dim=-1)
            return down(up * owner.act_fn(gate), torch.where(chosen, experts, -1), first.count)
        at = chosen.nonzero().squeeze(1)
        each = max(first.chosen or 1, -(-len(at) // max(tokens, 1)))
        gate, up = first(x[at], experts[at], each).chunk(2, dim=-1)
        y = down(up * owner.act_fn(gate), experts[at], each)
        return y.new_zeros(len(x), y.shape[1]).index_copy(0, at, y)

    def _sorted(self, inputs: Tensor, expert_size: Any) -> Tensor:
        """JetMoE's: the tokens of each expert one after the other, and how many these are."""
        (only,) = self.__dict__[_KEY].values()
        sizes = torch.as_tensor(expert_size, device=inputs.device)
        experts = torch.arange(only.count, device=inputs.device).repeat_interleave(sizes)
        return only(inputs, experts, only.chosen or 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the experts' own class computes it, through the projections."""
        names = self.__dict__[_ARGUMENTS][len(args) :]
        return _FORWARDS[self.__dict__[_CALLED]](self, *args, *(kwargs[name] for name in names))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        _lay_out_all_(self)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module; lays out a new weight, or quantises it again."""
        projection = self.__dict__[_KEY].get(name)
        if isinstance(projection, QuantizedMatrix) and param is not None and PROJECTIONS in self._modules:
            projection.weight.data = param
            return
        super().register_parameter(name, param)
        if projection is None and param is not None and not param.is_contiguous():  # what torch.nn.utils prunes
            param.data = param.data.contiguous()
        if isinstance(projection, SparseSite) and not isinstance(projection, QuantizedMatrix):
            lay_out_(projection)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        _lay_out_all_(self)

    def __getattr__(self, name: str) -> Any:
        projection = self.__dict__.get(_KEY, {}).get(name)
        if isinstance(projection, QuantizedMatrix):
            return projection.weight
        return super().__getattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _lay_out_all_(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty_open, (closed_class(type(self)),), self.__dict__


def _lay_out_all_(owner: nn.Module) -> None:
    for each in owner.__dict__.get(_KEY, {}).values():
        if isinstance(each, SparseSite) and "threshold" in each._buffers:
            lay_out_(each)
            each.refresh_offset_()


_FORWARDS: dict[str | None, Callable[..., Tensor]] = {
    "routed": OpenExperts._routed,
    "scattered": OpenExperts._scattered,
    "sorted": OpenExperts._sorted,
}
_open_classes: dict[type[nn.Module], type[nn.Module]] = {}
_closed_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _open_class(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _open_classes:
        made = type(f"Sparse{kind.__name__}", (OpenExperts, kind), {"__module__": __name__})
        _open_classes[kind], _closed_classes[made] = made, kind
    return _open_classes[kind]


def closed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that experts had before their projections became sites."""
    opened = (each for each in kind.__mro__ if each in _closed_classes)  # torch's parametrised classes are above it
    return _closed_classes.get(next(opened, kind), kind)


def _empty_open(kind: type[nn.Module]) -> nn.Module:
    return object.__new__(_open_class(kind))


@functools.cache
def _arguments_of(kind: Any) -> tuple[str, ...]:
    """The names of what experts are called with, which transformers' decorator hides."""
    forward = closed_class(kind).forward
    try:
        return tuple(inspect.signature(getattr(forward, "__wrapped__", forward)).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def _called(module: nn.Module) -> str | None:
    """How experts are called, of the ways that are known."""
    names, arguments = _names_of(module), _arguments_of(cast(Hashable, type(module)))
    if not names:
        return None
    if names == ("weight",):
        return "sorted" if arguments == ("inputs", "expert_size") else None
    gated = names[0] == "gate_up_proj"
    gates = hasattr(type(module), "_apply_gate") or hasattr(module, "identity_expert")
    if len(arguments) == 3 and (gates if gated else hasattr(module, "act_fn")):
        return "routed"
    if arguments == ("hidden_states",) and gated and hasattr(module, "act_fn"):
        return "scattered"
    return None


def _names_of(module: nn.Module) -> tuple[str, ...]:
    """The parameters that are projections, in the order in which they are called."""
    if _KEY in module.__dict__:
        return tuple(module.__dict__[_KEY])
    matrices = {
        name
        for name, each in module._parameters.items()
        if each is not None and each.dim() == 3 and type(each) is nn.Parameter
    }
    if matrices == {"weight"}:
        return ("weight",)
    first = next((name for name in ("gate_up_proj", "up_proj") if name in matrices), None)
    return (first, "down_proj") if first is not None and matrices == {first, "down_proj"} else ()


def projections_of(module: nn.Module, chosen: int | None = None) -> dict[str, ExpertLinear]:
    """The projections of a module of experts by the names of their parameters; none of any other module.

    Args:
        module: any module.
        chosen: experts that each token is sent to, if the module's configuration does not tell.
    """
    if isinstance(module, (ExpertLinear, SparseSite)):
        return {}
    if _KEY not in module.__dict__ and _called(module) is not None:
        activation = _activation_of(module)
        with _lock:
            if _KEY not in module.__dict__:  # not made by another thread meanwhile
                own = module.__dict__
                own[_CALLED], own[_ACTIVATION] = _called(module), activation
                own[_ARGUMENTS] = _arguments_of(cast(Hashable, type(module)))
                transposed = bool(getattr(module, "is_transposed", own[_CALLED] == "scattered"))
                number = _chosen(module)
                own[_KEY] = {name: ExpertLinear(module, name, transposed, number) for name in _names_of(module)}
    known: dict[str, ExpertLinear] = module.__dict__.get(_KEY, {})
    for each in known.values() if chosen is not None else ():
        each.chosen = each.chosen or chosen
    return known


def _activation_of(module: Any) -> str | None:
    """What the experts' gates are, of the activations that the operator knows; found by trying.

    Some clamp gates, add one to the other half, or hold the two interleaved.
    """
    plain = _called(module) == "routed" and not getattr(module, "has_post_expert_norm", False)
    if not plain or not hasattr(module, "_apply_gate"):
        return None
    try:
        with torch.no_grad(), torch.device("cpu"):  # models are made under a context of the meta device
            large = torch.tensor([-1e4, -200.0, 200.0, 1e4])
            gate, up = torch.cat([torch.linspace(-20, 20, 253), large]), torch.cat([large, torch.linspace(-3, 3, 253)])
            known = {"silu": F.silu(gate) * up, "gelu_tanh": F.gelu(gate, approximate="tanh") * up}
            found = module._apply_gate(torch.cat([gate, up]).unsqueeze(0)).squeeze(0)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # its activation has parameters elsewhere
        return None
    fits = {name: found.shape == each.shape and torch.allclose(found, each) for name, each in known.items()}
    return next((name for name, fit in fits.items() if fit), None)


_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")


def _chosen(module: nn.Module) -> int | None:
    """Experts of a token, as a module, its configuration or a router among its children says."""
    for source in (module, getattr(module, "config", None), *module.children()):
        for name in _CHOSEN:
            value = getattr(source, name, None)
            value = max(value) if isinstance(value, (list, tuple)) and value else value
            if isinstance(value, int) and value > 0:
                return value
    return None


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of experts of a model whose projections are sites, by name."""
    for name, module in model.named_modules():
        if projections_of(module):
            yield name, module


def with_projections(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules` of a model, but projections of experts have the names of their parameters.

    Args:
        model: any module.
        every_name: a shared module under each of its names.
    """
    above: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=not every_name):
        above[name] = module
        if isinstance(module, ExpertLinear) or (isinstance(module, nn.ModuleDict) and _holds_projections(module)):
            continue
        yield name, module
        if _names_of(module):
            parent = above.get(name.rpartition(".")[0])
            for own, projection in projections_of(module, None if parent is None else _chosen(parent)).items():
                yield f"{name}.{own}" if name else own, projection


def _holds_projections(module: nn.ModuleDict) -> bool:
    return bool(module) and all(isinstance(each, ExpertLinear) for each in module.values())


def module_at(model: nn.Module, name: str) -> Any:
    """The module of that name, or the projection of experts.

    Example:
        >>> module_at(nn.Sequential(nn.Linear(2, 1)), "0")
        Linear(in_features=2, out_features=1, bias=True)
    """
    parent, _, last = name.rpartition(".")
    try:
        projections = projections_of(model.get_submodule(parent))
    except AttributeError:
        projections = {}
    return projections[last] if last in projections else model.get_submodule(name)


def path_of(model: nn.Module, name: str) -> str:
    """Where in the model, and so in its state dict, the site of that name lies."""
    parent, _, last = name.rpartition(".")
    if isinstance(module_at(model, name), ExpertLinear):
        return ".".join(filter(None, (parent, PROJECTIONS, last)))
    return name


def owners_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of experts that projections among `modules` belong to, once each."""
    return list(dict.fromkeys(module.owner for module in modules if isinstance(module, ExpertLinear)))


def unknown_experts(model: nn.Module) -> list[str]:
    """The classes of modules that hold weights of experts in a form that is not known here."""
    return sorted(
        {
            f"{type(module).__module__}.{type(module).__qualname__}"
            for module in model.modules()
            if "expert" in type(module).__name__.lower()
            and sum(each is not None and each.dim() > 1 for each in module._parameters.values()) > 1
            and not projections_of(module)
        }
    )
