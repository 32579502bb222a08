"""sparsify_ and densify_: the linear layers of a model become sparse, in place, and dense again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deadband.allocation.thresholds import Thresholds, check_model
from deadband.layers.formats import QuantizedWeight
from deadband.layers.quantized import (
    QuantizedMatrix,
    QuantizedTable,
    make_quantized_,
    tie_table_,
    unmake_quantized_,
    untie_table_,
)
from deadband.layers.rule import Rule
from deadband.layers.sites import Patterns, find_sites, sparse_sites
from deadband.layers.sparse import (
    SparseSite,
    make_dense_,
    make_sparse_,
    require_no_parametrization,
    tensor_of,
    use_dense_product_,
)
from deadband.sparsify.config import SparsityConfig
from deadband.sparsify.names import resolve, resolve_masks, rule_of
from deadband.sparsify.report import require_sparse
from deadband.sparsify.weights import (
    dequantise_,
    find_output_layer,
    find_tied_embeddings,
    formats_of,
    quantise,
    use_torchs_product_,
)

FOLLOWERS: list[Callable[[nn.Module, SparsityConfig | None], None]] = []
"""Told each model that became sparse, and how, or with None dense again: transformers' configurations follow."""


@torch.inference_mode(False)  # its tensors would be of no use outside
def sparsify_(
    model: nn.Module,
    thresholds: Mapping[str, float | Rule] | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    exact: bool = False,
    criterion: str | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    gradient: str = "exact",
    count: bool = True,
    output_layer: bool | str = True,
    weights: str | Mapping[str, str | QuantizedWeight] | None = None,
    second_moments: Mapping[str, Tensor] | None = None,
    hessians: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None,
    progress: bool = False,
) -> nn.Module:
    """Make linear layers of `model` skip input entries inside their deadband, in place.

    Decoding (inputs of at most 4 rows) skips; prefill runs dense, see `sparse_prefill`. The weights are laid out so
    that what belongs to one input lies side by side; there is still one copy of them. On any error the model is as
    before.

    Args:
        model: any module. Layers that are sparse already get the new thresholds, or become dense if they get none.
        thresholds: what `Calibration.allocate` returned, or a mapping from site names (or ends of names, where only
            one site ends so) to thresholds, which have to be finite and not negative, or to `deadband.Rule`s.
        masks: static masks by site name, bool [in_features], False where a feature is always skipped, by every token:
            what `ActivationSparsifier.masks` returns. A site without a threshold gets a threshold of zero. Masks of an
            earlier call hold only if they are passed again.
        exact: instead of thresholds, a threshold of zero at every site that `include` and `exclude` choose (as in
            `deadband.calibrate`): only true zeros are skipped, so nothing is lost. For ReLU-type models.
        criterion: `magnitude` (the default) or `weighted_magnitude`, when `thresholds` is a plain mapping.
        gradient: of the masked input while training: `exact` (zero where skipped) or `straight_through`.
        count: count what is skipped and what is NaN or infinite, for `deadband.sparsity`.
        output_layer: a transformers model's output layer (`lm_head`) skips nothing, unless it is a site itself, but
            decodes on deadband's dense product, which is faster than torch's on CPUs. With `weights` it is quantised
            too, to `OUTPUT_FORMAT` or the format given here; an embedding that is tied to it then reads its rows there.
        weights: quantise the sparse layers: `"int8"`, `"int4"` or another of `deadband.quantization.FORMATS`, or a
            mapping from site names to formats or `deadband.quantization.QuantizedWeight`s. There is one copy of the
            weights then, the quantised one. Layers that have the format already stay as they are.
        second_moments: of each site's input by site name (`deadband.quantization.second_moments_of(calibration)`): they
            make the rounding to 4 bits better.
        hessians: `deadband.quantization.input_hessians(model, batches, sites)`, for GPTQ: better still, and slower.
        progress: show a bar while weights are quantised.

    Returns:
        The model, for chaining.

    Raises:
        ValueError: an unknown site, a bad threshold or mask, a calibration that does not fit the model, or another
            format than a layer is quantised to already.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> sparsify_(model, {"0": 0.1, "2": 0.0})
        Sequential(
          (0): SparseLinear(in_features=8, out_features=16, bias=True, threshold=0.1)
          (1): ReLU()
          (2): SparseLinear(in_features=16, out_features=2, bias=True, threshold=0)
        )
    """
    if exact == (thresholds is not None) and (exact or masks is None):
        raise ValueError(
            "pass either thresholds (from Calibration.allocate, or a mapping by site), or masks=, or exact=True"
        )
    sharded = next((name for name, each in model.named_parameters() if hasattr(each, "device_mesh")), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded!r} is a DTensor: a model under tensor parallelism or FSDP cannot be made sparse; "
            "load it whole on each device, without distributed_config or tp_plan"
        )
    if not exact and thresholds is None:
        thresholds = {}
    if thresholds is None:
        thresholds = dict.fromkeys(find_sites(model, include, exclude), 0.0)
    elif include is not None or exclude is not None:
        raise ValueError("include= and exclude= choose sites for exact=True; thresholds name their sites themselves")
    allocated = thresholds if isinstance(thresholds, Thresholds) else None
    if allocated is not None:
        check_model(model, allocated.shapes, allocated.samples)
        if criterion not in (None, allocated.criterion):
            raise ValueError(f"the thresholds are for criterion {allocated.criterion!r}, got criterion={criterion!r}")
        criterion = allocated.criterion
        thresholds = allocated.rules
    kept = resolve_masks(model, masks) if masks is not None else {}
    chosen = resolve(model, {**dict.fromkeys(kept, 0.0), **thresholds}) if kept else resolve(model, thresholds)
    modules = {name: model.get_submodule(name) for name in chosen}
    for name, module in modules.items():
        if tensor_of(module).is_meta:
            raise ValueError(f"site {name!r} is on the meta device or offloaded; load its weight before sparsify_")
    rules = {name: rule_of(name, chosen[name], modules[name], criterion or "magnitude") for name in chosen}
    output = find_output_layer(model, chosen) if output_layer else None
    formats = formats_of(model, chosen, weights, output, output_layer)
    tied = find_tied_embeddings(model, formats)
    recipe = SparsityConfig(
        sites=tuple(chosen),
        criterion=criterion or "magnitude",
        sparsity=allocated.sparsity if allocated is not None else None,
        method=allocated.method if allocated is not None else None,
        gradient=gradient,
    )
    expectations = _expectations(allocated, [name for name in chosen if name not in kept])
    left = {name: module for name, module in sparse_sites(model).items() if name not in chosen}
    touched = (*modules.values(), *left.values())
    require_no_parametrization(*touched)
    settings = {module: module.settings() for module in touched if isinstance(module, SparseSite)}
    quantised = quantise(model, formats, second_moments, hessians, progress)  # before anything changes
    parameters: dict[nn.Module, nn.Parameter] = {}  # what was quantised
    try:
        for name, module in modules.items():
            make_sparse_(
                module,
                rules[name],
                mask=kept.get(name),
                gradient=gradient,
                count=count,
                **expectations.get(name, {}),
            )
        for each in left.values():
            make_dense_(each)
        for name, weight in quantised.items():
            module = model.get_submodule(name)
            parameters[module] = cast(nn.Parameter, module._parameters["weight"])
            make_quantized_(module, weight)
        for embedding, layer in tied.items():
            tie_table_(embedding, layer)
        _tell(model, recipe)
    except BaseException:
        for embedding, layer in tied.items():
            if isinstance(embedding, QuantizedTable):
                untie_table_(embedding, parameters[layer])
        for module, parameter in parameters.items():
            if isinstance(module, QuantizedMatrix):
                unmake_quantized_(module, parameter)
        for module in touched:
            if module in settings:
                make_sparse_(module, Rule(0.0)).restore(settings[module])
            elif isinstance(module, SparseSite):
                make_dense_(module)
        raise
    use_torchs_product_(model)
    if output is not None and output not in formats:
        use_dense_product_(model.get_submodule(output))
    _unprepare(model)
    return model


def _unprepare(model: nn.Module) -> None:
    """Drop the compiled graph of `prepare_decode_`, if there is one: it has the tensors from before."""
    if "_deadband_decoder" in model.__dict__:
        from deadband.decoding.decoder import unprepare_decode_

        unprepare_decode_(model)


def _expectations(allocated: Thresholds | None, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """What is known of what the named sites will skip; nothing of masked ones, which skip more than was calibrated."""
    if allocated is None:
        return {}
    return {
        name: {"expected": allocated.expected.get(name, math.nan), "site_range": allocated.site_range.get(name)}
        for name in names
    }


@torch.inference_mode(False)
def densify_(model: nn.Module) -> nn.Module:
    """Turn every sparse layer of `model` back into the dense layer it was, in place and bit for bit.

    Quantised weights are dequantised: the rounding stays, and a warning says so.

    Example:
        >>> model = sparsify_(nn.Sequential(nn.Linear(4, 4)), exact=True)
        >>> densify_(model)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )

    Raises:
        ValueError: no layer of the model is sparse.
    """
    sites = require_sparse(model).values()
    require_no_parametrization(*sites)  # before anything changes
    for site in sites:
        make_dense_(site)
    _unprepare(model)
    dequantise_(model)
    use_torchs_product_(model)
    _tell(model, None)
    return model


def _tell(model: nn.Module, config: SparsityConfig | None) -> None:
    for follower in FOLLOWERS:
        follower(model, config)
