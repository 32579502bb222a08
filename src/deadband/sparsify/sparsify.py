"""sparsify_ and densify_: the linear layers of a model become sparse, in place, and dense again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from deadband.layers.experts import module_at, owners_of
from deadband.layers.formats import QuantizedWeight
from deadband.layers.gated import arrange_
from deadband.layers.quantized import QuantizedMatrix, QuantizedTable, make_quantized_, tie_table_
from deadband.layers.rule import Rule
from deadband.layers.sites import Patterns
from deadband.layers.sparse import (
    DenseLinear,
    make_dense_,
    make_sparse_,
    require_no_parametrization,
    use_dense_product_,
    use_torchs_product_,
)
from deadband.layers.transaction import all_or_nothing
from deadband.sparsify.config import SparsityConfig
from deadband.sparsify.plan import Plan, Quantization, plan_of, resolve_sites
from deadband.sparsify.report import number_of_layers, require_sparse
from deadband.sparsify.weights import dequantise_

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
    sharded = next((name for name, each in model.named_parameters() if hasattr(each, "device_mesh")), None)
    if sharded is not None:
        raise ValueError(
            f"{sharded!r} is a DTensor: a model under tensor parallelism or FSDP cannot be made sparse; "
            "load it whole on each device, without distributed_config or tp_plan"
        )
    sites, config = resolve_sites(model, thresholds, masks, exact, criterion, gradient, include, exclude)
    quantization = Quantization(
        weights=weights,
        output_layer=output_layer,
        second_moments=second_moments,
        hessians=hessians,
        progress=progress,
    )
    plan = plan_of(model, sites, config, quantization)
    _apply_(model, plan, gradient, count)
    return model


def _apply_(model: nn.Module, plan: Plan, gradient: str, count: bool) -> None:
    """Change the layers as planned."""
    sites = {module_at(model, name): wanted for name, wanted in plan.sites.items()}
    quantised = {module_at(model, name): weight for name, weight in plan.quantised.items()}
    output = () if plan.output is None else (plan.output,)
    owners = owners_of((*sites, *plan.dense, *quantised))  # those of experts
    with all_or_nothing((*sites, *plan.dense, *quantised, *plan.tied, *output, *plan.undone, *owners)):
        for module, wanted in sites.items():
            make_sparse_(
                module,
                wanted.rule,
                mask=wanted.mask,
                gradient=gradient,
                count=count,
                expected=wanted.expected,
                site_range=wanted.range,
            )
        for site in plan.dense:
            make_dense_(site)
        for module, weight in quantised.items():
            make_quantized_(module, weight)
        for embedding, source in plan.tied.items():
            tie_table_(embedding, source)
        for layer in plan.undone:
            use_torchs_product_(layer)
        if plan.output is not None:
            use_dense_product_(plan.output)
        arrange_(model)
        _tell(model, plan.config)
    _unprepare(model)


def _unprepare(model: nn.Module) -> None:
    """Drop the compiled graph of `prepare_decode_`, if there is one: it has the tensors from before."""
    if any("_deadband_decoder" in module.__dict__ for module in model.modules()):
        from deadband.decoding.decoder import unprepare_decode_

        unprepare_decode_(model)


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
    require_no_parametrization(*sites)
    touched = [each for each in model.modules() if isinstance(each, (QuantizedMatrix, QuantizedTable, DenseLinear))]
    with all_or_nothing((*sites, *touched, *owners_of((*sites, *touched)))):
        for site in sites:
            make_dense_(site)
        quantised = dequantise_(model)
        for each in touched:
            if type(each) is DenseLinear:
                use_torchs_product_(each)
        _tell(model, None)
    _unprepare(model)
    if quantised:
        warnings.warn(
            f"densify_ dequantised {number_of_layers(quantised)}: their weights stay rounded, not those from before "
            "sparsify_(weights=...)",
            stacklevel=3,  # densify_ is decorated
        )
    return model


def _tell(model: nn.Module, config: SparsityConfig | None) -> None:
    for follower in FOLLOWERS:
        follower(model, config)
