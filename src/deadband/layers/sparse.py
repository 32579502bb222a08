"""SparseLinear: an nn.Linear that skips what lies inside the deadband, when decoding, evaluating or training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, parametrize, prune

from deadband.layers import scope
from deadband.layers.memory import empty_on_huge_pages
from deadband.layers.pending import PendingOutput
from deadband.layers.rule import Rule
from deadband.layers.tensors import like
from deadband.ops.gated import gated_down, up_linear
from deadband.ops.gpu import DTYPES as GPU_DTYPES
from deadband.ops.gradients import fill_skipped, product, sparse_product
from deadband.ops.kernels import KERNEL_DTYPES, advise_huge_pages
from deadband.ops.linear import (
    COUNTS,
    current_offset,
    dense_linear,
    make_offset,
    sparse_linear,
    transformed,
    uncounted,
)
from deadband.ops.skipping import apply_mask

DECODE_ROWS = 4
"""Inputs of up to so many rows (tokens) count as decoding and skip. Beyond, nearly every weight is needed by some row:
at sparsity 0.5 the rows of the weight that 4 tokens need together are 94 % of it."""
ALL_ROWS = sys.maxsize


class SparseSite(nn.Module):
    """What the sparse twins of linear layers share: a threshold beside the weight, and the forward that applies it.

    A dense layer becomes its twin by changing class in place (`make_sparse_`), so it keeps its identity, its place in
    the model, its hooks and the names in its state dict; `make_dense_` goes back. The weight stays the one parameter it
    was; only its strides change, so that the weights of one input lie side by side.
    """

    dense_class: type[nn.Module]
    stored_in_out = False  # whether the parameter itself is [in_features, out_features]
    weight: Any  # nn.Parameter, as the dense class declares it
    bias: Any
    threshold: Tensor  # [] float32
    scale: Tensor | None  # [in_features] float32
    center: Tensor | None  # [in_features] float32
    offset: Tensor | None  # [out_features] float32, the product of weight and center; not saved
    relative: bool
    mask: Tensor | None  # [in_features] bool, False where an input feature is always skipped
    counts: Tensor | None  # [3] int64: entries skipped, seen and not finite
    sparse_rows: int
    gradient: str
    gate = False  # whether its rule is of its gate's entries, not of its input's: see `Rule`
    by_output = False  # whether it is an up-projection that lies by output, and waits for its gate: see layers.gated
    # what it skipped of calibration data, and between which sparsities it has to stay on data like that; see
    # deadband.allocation.thresholds.Thresholds
    expected: float = math.nan
    site_range: tuple[float, float] | None = None

    @classmethod
    def matrix_view(cls, weight: Tensor) -> Tensor:
        """The stored weight as [out_features, in_features]."""
        return weight.mT if cls.stored_in_out else weight

    def forward(self, x: Tensor) -> Tensor:
        """y = W · (x where kept, else the center, or 0) + bias; skips in training, else up to `sparse_rows` rows."""
        if type(x) is PendingOutput:
            return self.after_gate(x)
        # attribute access to parameters and buffers goes through nn.Module.__getattr__, 1 us in all
        parameters: Any = self._parameters
        buffers: Any = self._buffers
        try:
            weight, bias, offset = parameters["weight"], parameters["bias"], buffers["offset"]
        except KeyError:  # parametrised or pruned: computed for each call, so that there is no offset
            weight, bias, offset = self.weight, self.bias, None
        if self.stored_in_out:
            weight = weight.t()
        threshold, scale, center = buffers["threshold"], buffers["scale"], buffers["center"]
        rows, counts = self.sparse_rows, buffers["counts"]
        if scope.any_open:
            rows, counts = scope.setting_of(self, rows, counts)
        if buffers["mask"] is not None and rows:
            x = apply_mask(x, buffers["mask"])  # true zeros, which the product skips
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or trains(bias))
        mixed = x.dtype is not weight.dtype  # autocast: torch's own linear knows what to do, or to say
        if self.training:
            rows, counts = ALL_ROWS if rows else 0, None
        if self.by_output:
            if transformed() or mixed or (needs_gradient and not torch.compiler.is_exporting()):
                return self.without_kernel(x, weight.shape[0], rows, lambda: product(x, weight, bias))
            own = (weight, None, None, bias, 0, threshold, scale, self.relative, rows)
            return self.before_gate(x, weight.shape[0], own, counts)
        if transformed():
            x = fill_skipped(x, threshold, scale, center, self.relative, rows, None, self.gradient)
            return F.linear(x, weight, bias)
        if mixed or (needs_gradient and (self.training or not torch.compiler.is_exporting())):
            return sparse_product(
                x, weight, bias, threshold, scale, center, offset, self.relative, rows, counts, self.gradient
            )  # fmt: skip
        if counts is None:
            counts = uncounted(x.device)
        return sparse_linear(x, weight, bias, threshold, scale, center, offset, self.relative, rows, counts)

    def before_gate(self, x: Tensor, outputs: int, own: tuple[Any, ...], counts: Tensor | None) -> Tensor:
        """The output of an up-projection that lies by output: of a few tokens, one that waits for the gate."""

        def compute() -> Tensor:
            return up_linear(x, *own, None)

        if torch.compiler.is_compiling():
            return up_linear(x, *own, uncounted(x.device) if counts is None else counts)
        if self._forward_hooks or not 0 < x.shape[:-1].numel() <= own[-1] or torch.jit.is_tracing():
            return compute()
        return PendingOutput(x, self, (*x.shape[:-1], outputs), x.dtype, compute)

    def without_kernel(self, x: Tensor, outputs: int, rows: int, compute: Callable[[], Tensor]) -> Tensor:
        """The same where something else than the operator computes it, such as what has gradients."""
        few = x.shape[:-1].numel() <= rows
        if not (self.gate and few) or transformed() or self._forward_hooks or torch.compiler.is_compiling():
            return compute()
        mixed = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if mixed else x.dtype
        return PendingOutput(x, self, (*x.shape[:-1], outputs), dtype, compute)

    def after_gate(self, pending: PendingOutput) -> Tensor:
        """The output of a down-projection whose input is the product of a gate and an output that is pending."""
        up = pending.layer
        settings = [(each.sparse_rows, each._buffers["counts"]) for each in (up, self)]
        if scope.any_open:
            settings = [scope.setting_of(each, *own) for each, own in zip((up, self), settings, strict=True)]
        counts = [own for _, own in settings]
        if pending.gate is None or pending.known is not None:
            return self.forward(pending.computed())
        if (
            self.by_output
            or self.training
            or pending.dtype is not pending.x.dtype
            or self._buffers["mask"] is not None
            or settings[0][0] != settings[1][0]
            or (torch.is_grad_enabled() and (pending.gate.requires_grad or self._learns()))
            or transformed()
        ):
            return self.forward(up.gated(pending.gate, *settings[0]) * pending.compute())
        if None in counts:
            counts = []
        layers = (up.parts(), self.parts())
        return gated_down(
            pending.x, pending.gate, [part for each in layers for part in each],
            [getattr(each, "group_size", 0) for each in (up, self)], [up.relative, self.relative], settings[0][0],
            counts,
        )  # fmt: skip

    def gated(self, gate: Tensor, rows: int, counts: Tensor | None) -> Tensor:
        """The entries of its gate, zero where its rule skips them."""
        if not self.gate:
            return gate
        if self.training:
            rows, counts = ALL_ROWS if rows else 0, None
        return fill_skipped(gate, self.threshold, self.scale, None, self.relative, rows, counts, self.gradient)

    def _learns(self) -> bool:
        """Whether its weight or its bias needs a gradient."""
        return any(each is not None and each.requires_grad for each in (self._parameters.get("weight"), self.bias))

    def parts(self) -> list[Any]:
        """The layer as `deadband.ops.fused` takes it."""
        rule = [self._buffers[name] for name in ("threshold", "scale", "center", "offset")]
        return [self.matrix_view(self.weight), None, None, self.bias, *rule]

    def dense_matrix(self) -> Tensor:
        """The weight as [out_features, in_features], detached."""
        return self.matrix_view(self.weight.detach())

    @property
    def rule(self) -> Rule:
        """What the layer skips."""
        return Rule(self.threshold.item(), self.scale, self.center, self.relative, self.gate)

    def refresh_offset_(self) -> None:
        """Compute `offset` again, after the center changed. Writes to the weight are seen without this."""
        stored = tensor_of(self)
        if self.center is None or self.center.is_meta or stored.is_meta:
            return
        if not _keeps_version(stored):  # the operator does without an offset, which costs time
            self._keep("offset", None)
            return
        if type(stored) in (nn.Parameter, LaidOutWeight):
            stored.__class__ = CentredWeight
        self._keep("offset", make_offset(self.dense_matrix(), self.center, self.offset))

    def _keep(self, name: str, value: Tensor | None) -> None:
        """Set a buffer that is not saved. One that is None does not count as such: accelerate looks at its device."""
        self.register_buffer(name, value, persistent=value is None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module; lays out a new weight, and what it is computed from as usual.

        torch.nn.utils registers that (`weight_orig`, `weight_v`) and flattens it.
        """
        super().register_parameter(name, param)
        if name == "weight":
            lay_out_(self)
        elif param is not None and not param.is_contiguous():
            param.data = param.data.contiguous()

    def renew_offset_(self) -> None:
        """Compute `offset` again, in its place, if the weight was written to since."""
        weight, offset = parameter_of(self), self.offset
        if weight is not None and offset is not None and self.center is not None:
            current_offset(self.matrix_view(weight.detach()), self.center, offset)

    def settings(self) -> dict[str, Any]:
        """Everything that `make_sparse_` sets, for `restore`."""
        return {name: getattr(self, name) for name in (*BUFFERS, *_ATTRIBUTES)}

    def restore(self, settings: dict[str, Any]) -> None:
        """Undo a `make_sparse_` on a layer that was sparse before."""
        for name, value in settings.items():
            if name in _NOT_SAVED:
                self._keep(name, value)
            else:
                setattr(self, name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseSite:
        exact = {name: getattr(self, name) for name in ("threshold", "scale", "center", "offset")}
        super()._apply(fn, recurse)
        for name, before in exact.items():  # model.to(bfloat16) must not round a threshold
            after = getattr(self, name)
            if after is not None and after.dtype != torch.float32:
                setattr(self, name, before.to(after.device))
        lay_out_(self)  # another dtype may want other strides
        self.refresh_offset_()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        lay_out_(self)  # load_state_dict(assign=True) brings the strides of the checkpoint
        self.refresh_offset_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if type(parameter_of(self)) is nn.Parameter:  # pickling loses the class
            lay_out_(self)
            self.refresh_offset_()

    def extra_repr(self) -> str:
        """What print(model) shows."""
        threshold = "meta" if self.threshold.is_meta else f"{self.threshold.item():.4g}"
        form = "".join(
            f", {word}"
            for word, used in (
                ("relative", self.relative),
                ("scaled", self.scale is not None),
                ("centered", self.center is not None),
                ("of its gate", self.gate),
            )
            if used
        )
        masked = "" if self.mask is None or self.mask.is_meta else f", masked={int((~self.mask).sum())}"
        return f"{super().extra_repr()}, threshold={threshold}{form}{masked}"


class LaidOutWeight(nn.Parameter):
    """The weight of a sparse layer, whose strides are not the usual ones. Where torch wants those, it gets them.

    A parameter becomes one by changing class, as its layer does.
    """

    def view(self, *shape: Any) -> Tensor:
        """As of every tensor; `parameters_to_vector`, which only reads it, gets the entries in their order.

        Raises:
            RuntimeError: the strides allow no such view; what else to call.
        """
        try:
            return super().view(*shape)
        except RuntimeError as error:
            if _called_from(parameters_to_vector.__module__):
                if _called_from(prune.__name__, above=1):  # its masks have to have the usual strides, too
                    self.data = self.data.contiguous()
                return self.reshape(*shape)
            raise RuntimeError(
                f"{error} The weights of a sparse layer are stored by input: read them with reshape() or flatten(), "
                "which copy, or store them as usual with deadband.densify_"
            ) from None

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        """As of every tensor; what FSDP is about to shard becomes so."""
        if not torch.compiler.is_compiling() and _called_from("torch.distributed.fsdp"):
            self.data = self.data.contiguous()
        return super().is_contiguous(*args, **kwargs)

    def detach(self) -> Tensor:
        """As of every tensor; of this class where `nn.Parameter(weight)` wants it."""
        plain = Tensor.detach(self)
        wanted = not torch.compiler.is_compiling() and _called_from(nn.Parameter.__module__)
        return plain.as_subclass(type(self)) if wanted else plain


class CentredWeight(LaidOutWeight):
    """The weight of a layer that keeps its product with a center: writes through `data` count as writes, too.

    A parameter's own `data` hides them from its version.
    """

    @property
    def data(self) -> Tensor:
        """As of every tensor, but sharing the version that tells of writes."""
        return Tensor.detach(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]
        increment_version(self)


def _called_from(module: str, above: int = 0) -> bool:
    """Whether the code that called the caller of this (or the code so many calls above) is of a module or package."""
    name = sys._getframe(2 + above).f_globals.get("__name__", "")
    return f"{name}.".startswith(f"{module}.")


class SparseLinear(SparseSite, nn.Linear):
    """`nn.Linear` whose input entries inside the deadband are treated as zero; made by `deadband.sparsify_`.

    The state dict has nn.Linear's names, plus `threshold`, and where they are in use `scale` and `center` (see
    `deadband.layers.rule.Rule`) and `mask` (a static mask).

    With a center, the layer keeps its product with the weight, and computes it again once the weight was written to.

    Example:
        >>> layer = make_sparse_(nn.Linear(3, 2, bias=False), Rule(0.5))
        >>> x = torch.tensor([[0.1, 2.0, -0.3]])
        >>> with torch.no_grad():
        ...     torch.equal(layer(x), layer(torch.tensor([[0.0, 2.0, 0.0]])))
        True
    """

    dense_class = nn.Linear


def trains(bias: Tensor | None) -> bool:
    """Whether there is a bias, and it needs a gradient."""
    return bias is not None and bias.requires_grad


class DenseLinear(nn.Linear):
    """`nn.Linear` that decodes on deadband's dense product, which reads weights faster than torch's; skips nothing.

    `sparsify_` puts it in the place of a model's output layer. The weight stays as it is, so it can be tied to an
    embedding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """y = W · x + bias."""
        trained = x.requires_grad or self.weight.requires_grad or trains(self.bias)
        needs_gradient = torch.is_grad_enabled() and trained
        if transformed():
            return F.linear(x, self.weight, self.bias)
        if (needs_gradient and not torch.compiler.is_exporting()) or x.dtype is not self.weight.dtype:
            return product(x, self.weight, self.bias)
        return dense_linear(x, self.weight, self.bias)


SPARSE_CLASSES: dict[type[nn.Module], type[SparseSite]] = {nn.Linear: SparseLinear, DenseLinear: SparseLinear}
"""The sparse twin of each dense class. `deadband.integrations.transformers` adds transformers' Conv1D."""


def make_sparse_(
    module: nn.Module,
    rule: Rule,
    *,
    mask: Tensor | None = None,
    gradient: str = "exact",
    count: bool = True,
    expected: float = math.nan,
    site_range: tuple[float, float] | None = None,
) -> SparseSite:
    """Turn a dense linear layer into its sparse twin, in place, or give a sparse one new settings."""
    device = tensor_of(module).device
    limit = torch.full((), rule.threshold, dtype=torch.float32, device=device)
    center = rule.center
    if center is not None and mask is not None and not center.is_meta:
        center = torch.where(mask, center, 0)  # what a mask skips counts as zero
    counts = new_counts(device) if count else None
    if not isinstance(module, SparseSite):
        change_class_(module, SPARSE_CLASSES[type(module)])
    assert isinstance(module, SparseSite)
    module.register_buffer("threshold", limit)
    module.register_buffer("scale", rule.scale)
    module.register_buffer("center", center)
    module._keep("offset", None)
    module.register_buffer("mask", mask)
    module._keep("counts", counts)
    module.sparse_rows = DECODE_ROWS
    module.gradient = gradient
    module.relative, module.gate = rule.relative, rule.gate
    module.expected, module.site_range = expected, site_range
    lay_out_(module)
    module.refresh_offset_()
    settle_(module)
    return module


def home_of(module: nn.Module) -> tuple[nn.Module, str]:
    """Where the weight of a layer is a parameter, unless that is quantised: the module, and its name there."""
    return getattr(module, "home", (module, "weight"))


def parameter_of(module: nn.Module) -> nn.Parameter | None:
    """The parameter that is the weight of a layer; None if it is quantised, parametrised or pruned."""
    owner, name = home_of(module)
    return owner._parameters.get(name)


def settle_(module: nn.Module) -> None:
    """Tell a layer that is a part of another module that it was changed."""
    settle = getattr(module, "settle_", None)
    if settle is not None:
        settle()


def tensor_of(module: nn.Module) -> Tensor:
    """What a layer stores its weight in: the parameter, or the codes of a quantised one."""
    return cast(Tensor, module.codes if "codes" in module._buffers else module.weight)


def _keeps_version(tensor: Tensor) -> bool:
    """Whether writes show in its version: not those to what was made under inference mode, whatever `data` is now."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


BUFFERS = ("threshold", "scale", "center", "offset", "mask", "counts")
"""What `make_sparse_` adds to a layer."""
_NOT_SAVED = ("offset", "counts")
_ATTRIBUTES = ("relative", "sparse_rows", "gradient", "expected", "site_range", "gate", "by_output")


def new_counts(device: torch.device) -> Tensor:
    """A sparse layer's counters, at zero."""
    return torch.zeros(COUNTS, dtype=torch.int64, device=device)


def make_dense_(module: SparseSite) -> nn.Module:
    """Turn a sparse layer back into its dense class, in place, with the weight's usual strides and the same bits.

    One with a quantised weight keeps that.

    Raises:
        ValueError: its weight or bias is parametrised, which is a class of its own.
    """
    require_no_parametrization(module)
    if module.by_output:
        module.by_output = False
        lay_out_codes_(module)
    for name in BUFFERS:
        delattr(module, name)
    for name in _ATTRIBUTES:
        module.__dict__.pop(name, None)
    change_class_(module, module.dense_class)
    weight = parameter_of(module)
    if weight is not None:
        if isinstance(weight, LaidOutWeight):
            cast(Any, weight).__class__ = nn.Parameter
        with like(weight), torch.no_grad():
            weight.data = weight.data.contiguous()
    settle_(module)
    return module


def require_no_parametrization(*modules: nn.Module) -> None:
    """A ValueError says how to go on if a layer was parametrised since it became sparse."""
    for module in modules:
        if parametrize.is_parametrized(home_of(module)[0]):
            raise ValueError(
                f"{type(module).__name__} has a parametrised weight or bias; take the parametrization off before "
                "sparsify_ or densify_: torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )


def use_dense_product_(module: nn.Module) -> None:
    """Turn an nn.Linear into a DenseLinear, in place."""
    change_class_(module, DenseLinear)
    advise_huge_pages(cast(Tensor, module.weight.data))


def use_torchs_product_(module: DenseLinear) -> None:
    """Turn a DenseLinear back into an nn.Linear, in place."""
    change_class_(module, nn.Linear)


def lay_out_(module: SparseSite) -> None:
    """Store the weights of one input side by side, [in, out], keeping the parameter's identity, shape and values.

    Those of experts, which have a dimension more, [experts, in, out].

    Safetensors, `assign=True` and tying lose strides, so this runs again after loading. Costs a copy, or nothing when
    the weight lies that way already.
    """
    weight = parameter_of(module)
    if weight is None:
        lay_out_codes_(module)
        return
    if type(weight) is nn.Parameter and not module.stored_in_out:
        cast(Any, weight).__class__ = LaidOutWeight
    matrix = module.matrix_view(weight.data)
    if module.by_output or not _read_by_input(matrix):  # torch multiplies best with the usual strides
        if not module.stored_in_out and not matrix.is_meta and not matrix.is_contiguous():
            with like(weight), torch.no_grad():
                weight.data = matrix.contiguous()
        return
    if matrix.is_meta or matrix.mT.is_contiguous():
        return
    out_features, in_features = matrix.shape[-2:]
    strides = (in_features * out_features, 1, out_features)[-matrix.dim() :]
    with like(weight), torch.no_grad():
        stored = empty_on_huge_pages(matrix.shape, strides, matrix.dtype, matrix.device)
        stored.copy_(matrix)
        weight.data = module.matrix_view(stored)


def lay_out_codes_(module: SparseSite) -> None:
    """Store the codes, scales and minimums of a quantised layer by input, or by output if it is `by_output`."""
    for name in ("codes", "scales", "minimum"):
        tensor = module._buffers.get(name)
        if tensor is None or tensor.is_meta or (tensor.mT if module.by_output else tensor).is_contiguous():
            continue
        strides = (1, tensor.shape[0]) if module.by_output else tensor.contiguous().stride()
        module._buffers[name] = empty_on_huge_pages(tensor.shape, strides, tensor.dtype, tensor.device).copy_(tensor)


def _read_by_input(matrix: Tensor) -> bool:
    """Whether there are kernels for its dtype where it is."""
    return matrix.dtype in (GPU_DTYPES if matrix.device.type == "cuda" else KERNEL_DTYPES)


def change_class_(module: nn.Module, new: type[nn.Module]) -> None:
    """Make `module` an instance of another class, under accelerate's hook (device_map, offload) if it has one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        module.__class__ = new
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    module.__dict__.pop("forward", None)  # the old class's forward, which accelerate leaves bound to the instance
    module.__class__ = new
    add_hook_to_module(module, hook)
