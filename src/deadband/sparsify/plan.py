"""What `sparsify_` is going to do: everything is looked up, checked and rounded here, before anything changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from deadband.allocation.thresholds import Thresholds, check_model
from deadband.layers.experts import module_at
from deadband.layers.formats import QuantizedWeight
from deadband.layers.gated import gates_of
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.rule import Rule
from deadband.layers.sites import Patterns, find_sites, sparse_sites
from deadband.layers.sparse import DenseLinear, SparseSite, require_no_parametrization, tensor_of
from deadband.sparsify.config import SiteConfig, SparsityConfig
from deadband.sparsify.names import resolve, resolve_masks, rule_of
from deadband.sparsify.weights import find_output_layer, find_tied_embeddings, formats_of, quantise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """The arguments of `sparsify_` that are about weights."""

    weights: str | Mapping[str, str | QuantizedWeight] | None = None
    output_layer: bool | str = True
    second_moments: Mapping[str, Tensor] | None = None
    hessians: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None
    progress: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a site is to skip, and what is known of how much that is."""

    rule: Rule
    mask: Tensor | None = None
    expected: float = math.nan
    range: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of each layer that changes.

    Attributes:
        sites: by name, in the order of the model.
        dense: sparse layers that are no sites any more.
        quantised: weights by layer.
        tied: the layer that an embedding reads its rows from.
        output: the output layer, if it decodes on deadband's dense product.
        undone: output layers of an earlier call, which go back to torch's product.
        config: what was asked for.
    """

    sites: dict[str, Wanted]
    dense: list[SparseSite]
    quantised: dict[str, QuantizedWeight]
    tied: dict[nn.Embedding, QuantizedMatrix]
    output: nn.Module | None
    undone: list[DenseLinear]
    config: SparsityConfig


def resolve_sites(
    model: nn.Module,
    thresholds: Mapping[str, float | Rule] | None,
    masks: Mapping[str, Tensor] | None,
    exact: bool,
    criterion: str | None,
    gradient: str,
    include: Patterns | None,
    exclude: Patterns | None,
) -> tuple[dict[str, Wanted], SparsityConfig]:
    """The sites of the arguments of `sparsify_` by their full names, and what they were made by."""
    if exact == (thresholds is not None) and (exact or masks is None):
        raise ValueError(
            "pass either thresholds (from Calibration.allocate, or a mapping by site), or masks=, or exact=True"
        )
    if exact:
        thresholds = dict.fromkeys(find_sites(model, include, exclude), 0.0)
    elif include is not None or exclude is not None:
        raise ValueError("include= and exclude= choose sites for exact=True; thresholds name their sites themselves")
    allocated = thresholds if isinstance(thresholds, Thresholds) else None
    if allocated is not None:
        check_model(model, allocated.sites)
        if criterion not in (None, allocated.criterion):
            raise ValueError(f"the thresholds are for criterion {allocated.criterion!r}, got criterion={criterion!r}")
        criterion = allocated.criterion
    criterion = criterion or "magnitude"
    kept = resolve_masks(model, masks) if masks is not None else {}
    chosen = resolve(model, {**dict.fromkeys(kept, 0.0), **(thresholds or {})})
    modules = {name: module_at(model, name) for name in chosen}
    for name, module in modules.items():
        if tensor_of(module).is_meta:
            raise ValueError(f"site {name!r} is on the meta device or offloaded; load its weight before sparsify_")
    gates = gates_of(model)
    for name in chosen:
        rule = chosen[name]
        if isinstance(rule, Rule) and rule.gate and name not in gates:
            raise ValueError(
                f"site {name!r} has no gate: a rule of a gate is for up-projections of gated MLPs whose gate and up "
                "are layers of their own, with a module that activates the gate"
            )
    sites = {
        name: Wanted(rule=rule_of(name, chosen[name], module, criterion), mask=kept.get(name))
        for name, module in modules.items()
    }
    config = dict.fromkeys(sites, SiteConfig(gradient=gradient))  # what each became is read from the layers
    if allocated is None:
        return sites, SparsityConfig(sites=config, criterion=criterion)
    for name in sites.keys() - kept.keys():  # what is masked skips more than was calibrated
        known = allocated.sites[name]
        expected = math.nan if known.expected is None else known.expected
        sites[name] = dataclasses.replace(sites[name], expected=expected, range=known.range)
    method, sparsity = allocated.method, allocated.sparsity
    return sites, SparsityConfig(sites=config, criterion=criterion, sparsity=sparsity, method=method)


def plan_of(model: nn.Module, sites: dict[str, Wanted], config: SparsityConfig, quantization: Quantization) -> Plan:
    """What becomes of the layers of the model, with the weights that are quantised."""
    output = find_output_layer(model, sites) if quantization.output_layer else None
    formats = formats_of(model, sites, quantization.weights, output, quantization.output_layer)
    dense = [module for name, module in sparse_sites(model).items() if name not in sites]
    require_no_parametrization(*(module_at(model, name) for name in sites), *dense)
    weights = quantise(model, formats, quantization.second_moments, quantization.hessians, quantization.progress)
    layer = module_at(model, output) if output is not None and output not in formats else None
    others = {module_at(model, name) for name in (*sites, *weights)} | {layer}
    return Plan(
        sites=sites,
        dense=dense,
        quantised=weights,
        tied=find_tied_embeddings(model, formats),
        output=layer,
        undone=[each for each in model.modules() if type(each) is DenseLinear and each not in others],
        config=config,
    )
