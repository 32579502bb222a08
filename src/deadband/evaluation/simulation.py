"""What the published methods do to a model, simulated with hooks, and counted in bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from deadband.allocation.thresholds import check_model
from deadband.layers.experts import module_at
from deadband.layers.hooks import forget_compiled, take_input, with_input
from deadband.layers.scope import Scope, for_here, is_open, scope
from deadband.layers.sites import Identity
from deadband.layers.sparse import SparseSite
from deadband.ops.skipping import apply_mask, keep_mask, score
from deadband.sparsify.report import SparsityReport


@dataclasses.dataclass(frozen=True)
class GatedMLP:
    """A gated MLP: `down(act(gate(x)) * up(x))`.

    Attributes:
        gate, up, down: names of its layers; up is gate where one layer makes both, the gate first.
        activation: what is applied to the gate's output.
    """

    gate: str
    up: str
    down: str
    activation: Callable[[Tensor], Tensor]

    @property
    def up_share(self) -> float:
        """The fraction of the weight of `up` that makes the up-projection."""
        return 0.5 if self.up == self.gate else 1.0


class Simulation:
    """A method as hooks on a dense model: what it computes, and how many weight bytes it would not have read.

    Outputs are those of the method up to rounding; nothing gets faster. Made by a `Method`'s `fit`.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> batch = torch.randn(64, 8)
        >>> setup = deadband.evaluation.Setup(model, [batch], progress=False)
        >>> (simulation,) = deadband.evaluation.METHODS["top-k"].fit(setup, [0.25])
        >>> with torch.no_grad(), simulation.on(model):
        ...     output = model(batch)
        >>> simulation.sparsity.total
        0.25
    """

    def __init__(
        self,
        parts: Sequence[Part],
        weights: Mapping[str, int],
        added: Mapping[str, float],
        sites: Mapping[str, Identity],
    ) -> None:
        self.parts, self.weights, self.added = list(parts), dict(weights), dict(added)
        self._sites = sites
        self._model: nn.Module | None = None
        self._entered = 0
        self._handles: list[RemovableHandle] = []
        self._scope = contextlib.ExitStack()
        self._here: Scope | None = None

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of its weight that each site is to leave unread, before bytes that the method adds."""
        shares = dict.fromkeys(self.weights, 0.0)
        for part in self.parts:
            shares.update({name: part.share * fraction for name, fraction in part.covers.items()})
        return shares

    @property
    def sparsity(self) -> SparsityReport:
        """What was not read for all tokens seen while on since `reset`, net of what the method adds.

        A fraction of each site's weight bytes, and their mean weighted by bytes. A site that the method leaves dense
        counts as 0, and one that it prunes but that never ran as NaN, left out of the total. A site may be below zero.
        """
        gross: dict[str, float] = dict.fromkeys(self.weights, 0.0)
        for part in self.parts:
            for name, fraction in part.covers.items():
                gross[name] = fraction * part.fraction
        net = {name: value - self.added.get(name, 0.0) / self.weights[name] for name, value in gross.items()}
        ran = [name for name in net if not math.isnan(net[name])]
        entries = sum(part.seen * len(part.covers) for part in self.parts)
        total = sum(self.weights[name] for name in ran)
        mean = sum(net[name] * self.weights[name] for name in ran) / total if total and entries else math.nan
        return SparsityReport(net, mean, entries)

    def reset(self) -> None:
        """Start counting anew."""
        for part in self.parts:
            part.reset()

    def on(self, model: nn.Module) -> _On:
        """A context in which `model` computes what the method computes; it can be entered again, also inside itself.

        Args:
            model: the dense model that the method was fitted to. After the context it is as before.

        Raises:
            ValueError: on entering: another model, a sparse one, or the simulation is on for another model.
        """
        return _On(self, model)

    def enter(self, model: nn.Module) -> None:
        """Put the hooks on."""
        if self._entered and model is not self._model:
            raise ValueError("the simulation is on for another model; leave that first")
        if self._here is not None and not is_open(self._here):
            raise ValueError("the simulation is on in another thread, whose tensors it holds; fit another one")
        if not self._entered:
            require_dense(model)
            check_model(model, self._sites)
            self._model = model
            memory = _Memory()
            try:
                self._here = self._scope.enter_context(scope())
                for part in self.parts:
                    part.memory = memory
                    self._handles += part.install(model)
            except BaseException:
                self._remove()
                raise
            forget_compiled()
        self._entered += 1

    def leave(self) -> None:
        """Take the hooks off again, once for each `enter`."""
        self._entered -= 1
        if not self._entered:
            self._remove()
            forget_compiled()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._scope.close()
        self._handles, self._model, self._here = [], None, None
        for part in self.parts:
            part.forget()


class _On:
    def __init__(self, simulation: Simulation, model: nn.Module) -> None:
        self.simulation, self.model = simulation, model

    def __enter__(self) -> Simulation:
        self.simulation.enter(self.model)
        return self.simulation

    def __exit__(self, *exception: object) -> None:
        self.simulation.leave()


class _Memory:
    """Results for the input that was seen last: q, k and v get the same tensor."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.version = 0
        self.results: dict[Any, Any] = {}

    def of(self, x: Tensor, key: Any, function: Callable[[], Any]) -> Any:
        if x.is_inference():
            return function()  # no version tells whether it was changed in place
        if self.x is not x or self.version != x._version:
            self.x, self.version, self.results = x, x._version, {}
        if key not in self.results:
            self.results[key] = function()
        return self.results[key]


class Part:
    """The hooks of one site, or of the sites of one MLP, and the count of what they skip.

    Attributes:
        share: the fraction of entries to skip.
        covers: by site, the fraction of its weight whose reading one entry decides on.
    """

    share: float
    covers: dict[str, float]
    memory: _Memory

    def __init__(self, share: float, covers: dict[str, float]) -> None:
        self.share, self.covers = share, covers
        self.memory = _Memory()
        self.reset()

    def reset(self) -> None:
        """Count from zero again."""
        self.skipped: int | Tensor = 0
        self.seen = 0

    def count(self, keep: Tensor) -> None:
        """Count what a mask skips."""
        self.skipped = self.skipped + (keep.numel() - keep.sum(dtype=torch.int64))  # no wait for the device
        self.seen += keep.numel()

    @property
    def fraction(self) -> float:
        """What was skipped of what was seen; NaN before anything was."""
        return int(self.skipped) / self.seen if self.seen else math.nan

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the hooks on."""
        raise NotImplementedError

    def forget(self) -> None:
        """Let go of tensors of a forward pass."""
        self.memory = _Memory()

    def scored(self, x: Tensor) -> Tensor:
        """What has the magnitudes that a threshold is compared with, given the input of the pruned site."""
        return x


class _Site(Part):
    """A part of one site, whose input is changed."""

    def __init__(self, name: str, share: float) -> None:
        super().__init__(share, {name: 1.0})
        self.name = name

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        return [module_at(model, self.name).register_forward_pre_hook(for_here(self._before), with_kwargs=True)]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pruned, keep = self.prune(take_input(self.name, args, kwargs))
        self.count(keep)
        return with_input(args, kwargs, pruned)

    def prune(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the site gets instead of `x` [..., in_features], and a bool mask of what is read, of the same shape."""
        raise NotImplementedError


class TopK(_Site):
    """Exactly `k` entries of each token are kept: those of largest abs(x) * scale, after a rotation if there is one."""

    def __init__(self, name: str, k: int, features: int, scale: Tensor | None, basis: Tensor | None = None) -> None:
        super().__init__(name, 1 - k / features)
        self.k, self.scale, self.basis = k, scale, basis

    def prune(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the input, and what is kept."""
        key = (self.k, id(self.basis), id(self.scale))
        return self.memory.of(x, key, partial(self._pruned, x))

    def _pruned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = None if self.scale is None else self.scale.to(x.device)
        if self.basis is None:
            keep = largest(score(x, scale), self.k)
            return apply_mask(x, keep), keep
        wide = torch.promote_types(x.dtype, torch.float32)
        basis = self.basis.to(x.device, wide)
        rotated = self.memory.of(x, id(self.basis), lambda: x.to(wide) @ basis)
        keep = largest(score(rotated, scale), self.k)
        return (apply_mask(rotated, keep) @ basis.T).to(x.dtype), keep


class LowRank(_Site):
    """Entries above the threshold meet the weight, the rest its low-rank approximation `left @ right`."""

    def __init__(self, name: str, threshold: float, share: float, left: Tensor, right: Tensor) -> None:
        super().__init__(name, share)
        self.threshold, self.left, self.right = threshold, left, right
        self.rest: Tensor | None = None

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the hooks there."""
        module = module_at(model, self.name)
        return [*super().install(model), module.register_forward_hook(for_here(self._after))]

    def prune(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the input, and what is kept; the rest waits for the low-rank part."""
        keep = keep_mask(x, self.threshold)
        self.rest = apply_mask(x, ~keep)
        return apply_mask(x, keep), keep

    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        rest, self.rest = cast(Tensor, self.rest), None
        if not len(self.right):
            return output
        left, right = (factor.to(rest.device, rest.dtype) for factor in (self.left, self.right))
        return output + F.linear(F.linear(rest, right), left)

    def forget(self) -> None:
        """Let go of what was held between hooks."""
        super().forget()
        self.rest = None


class Gate(Part):
    """A gated MLP without the channels whose abs(act(gate)) is at or below the threshold."""

    def __init__(self, mlp: GatedMLP, threshold: float, share: float) -> None:
        super().__init__(share, {mlp.up: mlp.up_share, mlp.down: 1.0})
        self.mlp, self.threshold, self.name = mlp, threshold, mlp.down
        self.gate: Tensor | None = None

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Put the hooks there."""
        gate, down = module_at(model, self.mlp.gate), module_at(model, self.mlp.down)
        return [
            gate.register_forward_hook(for_here(self._after_gate)),
            down.register_forward_pre_hook(for_here(self._before_down), with_kwargs=True),
        ]

    def _after_gate(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        gate = output if self.mlp.up != self.mlp.gate else output.chunk(2, -1)[0]
        self.gate = gate.clone() if getattr(self.mlp.activation, "inplace", False) else gate

    def _before_down(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = take_input(self.name, args, kwargs)
        keep = keep_mask(self.scored(x), self.threshold)
        self.gate = None
        self.count(keep)
        return with_input(args, kwargs, apply_mask(x, keep))

    def scored(self, x: Tensor) -> Tensor:
        """The gate's output."""
        return self.mlp.activation(cast(Tensor, self.gate))

    def forget(self) -> None:
        """Let go of what was held between hooks."""
        super().forget()
        self.gate = None


def largest(scores: Tensor, k: int) -> Tensor:
    """Bool mask of exactly `k` entries of each row [..., features]: the largest; NaN counts as larger than any number.

    Of equal scores, which ones are kept is not defined, only how many.

    Example:
        >>> largest(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]), 1).sum(-1)
        tensor([1, 1])
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    return keep.scatter_(-1, scores.topk(k, dim=-1, sorted=False).indices, True)


def require_dense(model: nn.Module) -> None:
    """A ValueError unless nothing in the model is sparse."""
    if any(isinstance(module, SparseSite) for module in model.modules()):
        raise ValueError("the model is sparse already; densify_ it, and compare methods on the dense model")
