"""Structured pruning: whole outputs of layers (neurons, channels, units of an LSTM) are masked, then removed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadband.compaction.compact import CompactionReport, compact_
from deadband.compaction.examples import as_call, few_rows, guess_example
from deadband.compaction.outputs import coupled_outputs, norms_behind
from deadband.compaction.resize import Example
from deadband.layers.tensors import holders, underlying
from deadband.layers.transaction import all_or_nothing
from deadband.masks.blocks import is_transposed
from deadband.masks.mask import keep_largest
from deadband.masks.mask_weight import FakeStructuredSparsity, unmasked
from deadband.masks.watch import RememberCall
from deadband.pruning.names import ConfigError, module_to_fqn
from deadband.pruning.sparsifier import BaseSparsifier
from deadband.running.copies import copy_arguments, copy_model

_WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


class BaseStructuredSparsifier(BaseSparsifier):
    """Masks of rows, which are a layer's outputs; `prune()` removes what they drop.

    A subclass has `update_mask(module, tensor_name, tensor_fqn, **group)`, which writes to
    `self.state[tensor_fqn]["mask"]`: bool, one entry per row of the weight, True = keep. The rows of an LSTM, GRU or
    RNN are those of its gates, one gate after the other; a unit goes where all of its rows are dropped, in
    `weight_ih_l*` and `weight_hh_l*` of every layer.

    Args:
        defaults: of the configuration of every tensor. `prune_bias` (True) drops biases along with rows; with
            `coupled` (False) ready-made pruners give layers one mask whose outputs are added or multiplied, as on a
            residual stream, so that these can go.
        patterns: ignored. What can go is found in the model's own graph.
    """

    supported = (nn.Linear, nn.Conv2d, nn.LSTM)
    parametrization = FakeStructuredSparsity

    def __init__(self, defaults: dict[str, Any] | None = None, patterns: Any = None) -> None:
        if patterns is not None:
            warnings.warn("patterns are ignored: what can go is found in the model's own graph", stacklevel=2)
        super().__init__(defaults)
        self.compaction: CompactionReport | None = None
        self._call: Example | None = None

    def prepare(self, model: nn.Module, config: Sequence[Mapping[str, Any]] | None = None, example: Any = None) -> None:
        """Put masks on the rows of weights; see `BaseSparsifier.prepare`.

        Unless `prune_bias` is False, biases are masked with them, and the batch normalization that a layer's output
        goes into, so that a dropped channel is zero behind it. It is found by a call with the example, or with random
        arguments if there are some that the model takes. The arguments of the next call are kept for `prune()`.
        """
        self._given = None if example is None else as_call(example)
        super().prepare(model, config)
        self._call = None
        self._remember = self.model.register_forward_pre_hook(RememberCall(self._remember_call), with_kwargs=True)

    def _take_off(self, groups: Iterable[dict[str, Any]], leave_parametrized: bool) -> None:
        super()._take_off(groups, leave_parametrized)
        if not self._masked():
            self._remember.remove()

    def _remember_call(self, args: tuple, kwargs: dict) -> None:
        try:
            self._call = self._call or copy_arguments((args, kwargs))
        except TypeError:  # it cannot be copied; prune() will ask for an example
            self._call = None

    def tensors_of(self, module: nn.Module) -> list[str]:
        """The tensors of a layer that a configuration of None names."""
        if isinstance(module, nn.RNNBase):
            return [name for name in module._flat_weights_names if name.startswith("weight_")]
        return ["weight"]

    def whole_mask(self, tensor: Tensor, module: nn.Module) -> Tensor:
        """A mask that drops nothing: one entry per row."""
        if tensor.dim() < 2:
            raise ConfigError(f"a tensor of shape {list(tensor.shape)} has no rows; expected two dimensions or more")
        return torch.ones(tensor.shape[int(is_transposed(module))], dtype=torch.bool, device=tensor.device)

    def _find_holders(self) -> None:
        super()._find_holders()
        places = holders(self.model)
        norms = norms_behind(self.model, {group["module"] for group in self.groups}, self._given)
        for group in self.groups:
            module, name = group["module"], group["tensor_name"]
            bias = name.replace("weight", "bias")
            behind = [(norm, each) for norm in norms[module] for each in ("weight", "bias")]
            if bias != name and (isinstance(module, _WITH_BIAS) or is_transposed(module)):
                behind.append((module, bias))
            alone = [place for place in behind if len(places.get(id(underlying(*place)), ())) == 1]  # not tied
            if group.get("prune_bias", True):
                self._holders[group["tensor_fqn"]] = [*self._holders[group["tensor_fqn"]], *alone]

    def settings_of(self, module: nn.Module, name: str) -> tuple[Any, ...]:
        """The dimension that counts rows, where it is not the first."""
        return (1,) if is_transposed(module) and name == "weight" else ()

    def dropped(self, group: Mapping[str, Any], tensor: Tensor) -> Tensor:
        """The rows of a weight, or the entries of a bias, that the mask drops."""
        dim = int(is_transposed(group["module"]) and tensor.dim() > 1)
        gone = self.state[group["tensor_fqn"]]["mask"] == 0
        return gone.view([-1 if each == dim else 1 for each in range(tensor.dim())])

    def prune(self, example: Any = None) -> nn.Module:
        """Squash the masks and remove the rows that they drop, with what reads them, in place: see `compact_`.

        What goes is proved, on an example, to leave the output of the masked model; what cannot go stays, as zeros.
        The report, with parameters, FLOPs, latency and what stayed and why, is `compaction` then. On any exception the
        model is as before.

        Args:
            example: arguments of one call: a tensor, a tuple of positional ones or a mapping. None: those of the first
                call after `prepare`, or else random ones that the model takes.

        Returns:
            The model, the same object.

        Raises:
            ValueError: nothing is masked, or no example is known.
        """
        masked = self._masked()
        if not masked:
            raise ValueError(f"{type(self).__name__}.prune(): nothing is masked; call prepare() and step()")
        call = self._example() if example is None else as_call(example)
        outputs, left = self._outputs(masked)
        touched = [module for group in masked for module in self._touched(group)]
        with all_or_nothing(touched, [value for module in touched for value in module.parameters(recurse=False)]):
            self.squash_mask()
            self.compaction = compact_(self.model, {}, call, outputs=outputs)
        self.compaction.left.update(left)
        self._forget([])
        return self.model

    def _example(self) -> Example:
        model = copy_model(self.model)
        if self._given or self._call:
            return few_rows(model, self._given or self._call)  # type: ignore[arg-type]
        return guess_example(model)

    def _outputs(self, groups: list[dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The masks of outputs by layer, and layers that have none, with the reason."""
        outputs: dict[str, Tensor] = {}
        left: dict[str, str] = {}
        for group in groups:
            module, mask = group["module"], self.state[group["tensor_fqn"]]["mask"] != 0
            name = module_to_fqn(self.model, module) or ""
            if isinstance(module, nn.RNNBase):
                units = mask.view(-1, module.hidden_size).any(0)
                outputs[name] = outputs[name] | units if name in outputs else units
                named = {each["tensor_name"] for each in groups if each["module"] is module}
                if missing := set(self.tensors_of(module)) - named:
                    left[name] = f"a unit goes where all weights drop it, and config does not name {sorted(missing)}"
            elif isinstance(module, nn.Embedding) or group["tensor_name"] != "weight":
                left[name] = f"the rows of {group['tensor_name']} are not its outputs"
            else:
                outputs[name] = mask
        return {name: mask for name, mask in outputs.items() if name not in left}, left


# ------------------------------------------------------------------------------------------------------------ criteria


class _RowPruner(BaseStructuredSparsifier):
    """Masks from the rows of a weight, or from the units of an LSTM, GRU or RNN with all their rows together."""

    def before_step(self) -> None:
        """Find the layers that share a mask, if asked to."""
        self._sharing = {group["module_fqn"]: [group["module_fqn"]] for group in self.groups}
        asked = [group["module_fqn"] for group in self.groups if group.get("coupled")]
        if asked:
            model, its = self._copied()
            its.unprepare()
            for names in coupled_outputs(model, dict.fromkeys(asked), self._example()):
                self._sharing |= dict.fromkeys(names, sorted(names))

    def update_mask(  # type: ignore[override]
        self, module: nn.Module, tensor_name: str, sparsity_level: float, *, tensor_fqn: str, **kwargs: Any
    ) -> None:
        """Make the mask of one tensor."""
        names = self._sharing[tensor_fqn.rpartition(".")[0]]
        rows = [_rows(group) for group in self.groups if group["module_fqn"] in names]
        together = rows[0] if len(rows) == 1 else torch.cat([each.flatten(1).to(rows[0]) for each in rows], 1)
        kept = self.kept(together, sparsity_level)
        mask = self.state[tensor_fqn]["mask"]
        mask.data = kept.repeat(len(mask) // len(kept)).to(mask.device)

    def kept(self, rows: Tensor, level: float) -> Tensor:
        """Which rows (along the first dimension) stay: bool [rows]."""
        raise NotImplementedError

    def check_group(self, **group: Any) -> None:
        """A ValueError that names the tensor if it has no level."""
        level = group.get("sparsity_level")
        if not isinstance(level, (int, float)) or isinstance(level, bool):
            raise ValueError(
                f"{group['tensor_fqn']}: sparsity_level={level!r}; expected a number, in defaults or config"
            )


def _rows(group: Mapping[str, Any]) -> Tensor:
    """The weight of a group, by outputs or units along the first dimension, in float32 or float64."""
    module, weight = group["module"], unmasked(group["module"], group["tensor_name"])
    weight = weight.float() if weight.itemsize < 4 else weight
    if isinstance(module, nn.RNNBase):
        return weight.unflatten(0, (-1, module.hidden_size)).movedim(1, 0)
    return weight.T if is_transposed(module) else weight


class SaliencyPruner(_RowPruner):
    """Drops the rows of least L1 norm: the whole number below `sparsity_level` times the rows, the last of equal ones.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> pruner = SaliencyPruner({"sparsity_level": 0.5})
        >>> pruner.prepare(model, [{"tensor_fqn": "0.weight"}])
        >>> pruner.step()
        >>> pruner.prune()
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )

    Source: Li et al. 2016, arXiv 1608.08710.
    """

    def kept(self, rows: Tensor, level: float) -> Tensor:
        """Which rows stay."""
        saliency = torch.linalg.vector_norm(rows, 1, dim=tuple(range(1, rows.dim())))
        saliency = saliency.nan_to_num(torch.inf, torch.inf)
        return keep_largest(saliency, len(rows) - int(len(rows) * level))

    def check_group(self, **group: Any) -> None:
        """A ValueError that names the tensor if its level is none."""
        super().check_group(**group)
        if not 0 <= group["sparsity_level"] <= 1:
            raise ValueError(f"{group['tensor_fqn']}: sparsity_level={group['sparsity_level']!r}; expected 0 to 1")


class LSTMSaliencyPruner(SaliencyPruner):
    """`SaliencyPruner` by another name: it drops whole units of an LSTM, by the norm of all their gates together."""


class FPGMPruner(_RowPruner):
    """Drops the rows that are nearest to all others, which can best stand in for them.

    Args:
        sparsity_level: the share of rows, the nearest count; at most 0 drops none, at least 1 all.
        dist: the distance between rows: 2 (or None) Euclidean, 1 of magnitudes, or a function from [rows, n] to
            [rows, rows].

    Raises:
        NotImplementedError: another distance.

    Example:
        >>> FPGMPruner()._compute_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]))
        tensor([ 5., 10.,  5.])

    Source: He et al. 2019, arXiv 1811.00250.
    """

    def __init__(self, sparsity_level: float = 0.5, dist: Callable[[Tensor], Tensor] | int | None = None) -> None:
        if not callable(dist) and dist not in (None, 1, 2):
            raise NotImplementedError(f"dist={dist!r}; expected 1, 2 or a function of the rows")
        super().__init__({"sparsity_level": sparsity_level})
        self.dist = dist

    def _compute_distance(self, rows: Tensor) -> Tensor:
        """The sum of a row's distances to all rows."""
        rows = rows.flatten(1)
        distances = self.dist(rows) if callable(self.dist) else torch.cdist(rows, rows, p=float(self.dist or 2))
        return distances.abs().sum(1)

    def kept(self, rows: Tensor, level: float) -> Tensor:
        """Which rows stay."""
        distance = self._compute_distance(rows).nan_to_num(torch.inf, torch.inf)
        return keep_largest(distance, len(rows) - min(max(round(level * len(rows)), 0), len(rows)))
