"""Weights that `sparsify_` quantises, and the output layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn

from deadband.layers.experts import module_at, with_projections
from deadband.layers.formats import QuantizedWeight, WeightFormat
from deadband.layers.quantized import (
    QUANTIZED_CLASSES,
    QuantizedMatrix,
    QuantizedTable,
    unmake_quantized_,
    untie_table_,
)
from deadband.layers.rounding import quantize
from deadband.layers.sites import matrix_of, sites_of
from deadband.layers.sparse import DenseLinear, parameter_of
from deadband.running.forward import progress_bar, threads
from deadband.sparsify.names import full_name

OUTPUT_FORMAT = "int8-g32"
"""Of the output layer, where `weights` is one format for all: 6 % more bytes than int8, and little of its error."""


def formats_of(
    model: nn.Module,
    chosen: Collection[str],
    weights: str | Mapping[str, str | QuantizedWeight] | None,
    output: str | None,
    output_layer: bool | str,
) -> dict[str, WeightFormat | QuantizedWeight]:
    """The layers to quantise by name, and to what; a ValueError names the first that cannot be."""
    wanted: dict[str, Any] = {}
    if isinstance(weights, Mapping):
        every = {**sites_of(model, every_name=True)}
        wanted = {full_name(model, every, given): value for given, value in weights.items()}
    elif weights is not None:
        wanted = dict.fromkeys(chosen, weights)
        if output is not None:
            wanted[output] = OUTPUT_FORMAT
    if isinstance(output_layer, str):
        if output is None and isinstance((found := _output_layer(model))[1], QuantizedMatrix):
            output = found[0]
        if output is not None:
            wanted[output] = output_layer
    formats: dict[str, WeightFormat | QuantizedWeight] = {}
    for name, value in wanted.items():
        module = module_at(model, name)
        if isinstance(module, QuantizedMatrix):
            _check_unchanged(name, module, value)
            continue
        if name not in chosen and name != output:
            raise ValueError(f"weights name {name!r}, which is neither a sparse site nor the output layer")
        if type(module) not in QUANTIZED_CLASSES:
            raise ValueError(f"site {name!r} is a {type(module).__name__}, which cannot have quantised weights")
        formats[name] = value if isinstance(value, QuantizedWeight) else WeightFormat.parse(value)
        if isinstance(value, QuantizedWeight):
            expected = tuple(matrix_of(module).shape)
            shape = (*value.codes.shape[:-2], value.out_features, value.in_features)
            if shape != expected:
                raise ValueError(f"weights of {name!r}: got {list(shape)}, expected {list(expected)}")
    return formats


def _check_unchanged(name: str, module: QuantizedMatrix, value: str | QuantizedWeight) -> None:
    """A layer that is quantised already keeps its weight; a ValueError where another one is asked for."""
    if isinstance(value, QuantizedWeight):
        same, what = value.equals(module.quantized()), f"other weights ({value.format})"
    else:
        same, what = str(WeightFormat.parse(value)) == module.weight_format, repr(value)
    if not same:
        raise ValueError(
            f"{name!r} is quantised to {module.weight_format!r} already, got {what}; leave its weights as they are, or "
            "load the dense model again"
        )


def quantise(
    model: nn.Module,
    formats: Mapping[str, WeightFormat | QuantizedWeight],
    second_moments: Mapping[str, Tensor] | None,
    hessians: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None,
    progress: bool,
) -> dict[str, QuantizedWeight]:
    """Round the weights that `formats` names, without changing the model."""
    for what, given in (("second_moments", second_moments), ("hessians", hessians)):
        unknown = (
            sorted(set(given) - {name for name, _ in with_projections(model)}) if isinstance(given, Mapping) else []
        )
        if unknown:
            raise ValueError(f"{what} has {unknown[0]!r}, which is no layer of the model; expected full names of sites")
    quantised = {name: form for name, form in formats.items() if isinstance(form, QuantizedWeight)}

    def jobs() -> Iterator[tuple[str, Tensor | None]]:
        yield from hessians.items() if isinstance(hessians, Mapping) else hessians or ()
        yield from ((name, None) for name in formats)

    remaining = len(formats) - len(quantised)
    todo = ((name, hessian) for name, hessian in jobs() if name in formats and name not in quantised)
    for name, hessian in progress_bar(todo, "quantise", progress, remaining):
        try:
            with threads(1):  # it works on pieces that fit a cache: more threads cost as much as they save
                quantised[name] = quantize(
                    matrix_of(module_at(model, name)).detach(),
                    cast(WeightFormat, formats[name]),
                    (second_moments or {}).get(name),
                    hessian=hessian,
                )
        except ValueError as error:
            raise ValueError(f"site {name!r} cannot be quantised: {error}") from None
    return quantised


def find_tied_embeddings(model: nn.Module, formats: Collection[str]) -> dict[nn.Embedding, Any]:
    """The embeddings whose weight is that of a layer in `formats`, and that layer."""
    layers = {id(parameter_of(layer)): layer for layer in (module_at(model, name) for name in formats)}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    weights = {module: id(module._parameters.get("weight")) for module in embeddings}
    return {module: layers[weight] for module, weight in weights.items() if weight in layers}


def dequantise_(model: nn.Module) -> int:
    """Give quantised layers a weight of their own again; returns how many there were."""
    quantised = [module for _, module in with_projections(model) if isinstance(module, QuantizedMatrix)]
    for module in quantised:
        unmake_quantized_(module)
    for table in [module for module in model.modules() if isinstance(module, QuantizedTable)]:
        weight = table.source.weight  # a dense layer's again, if that is in the model
        untie_table_(table, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))
    return len(quantised)


def find_output_layer(model: nn.Module, sites: Collection[str]) -> str | None:
    """The name of a transformers model's output layer, if it is a plain linear layer and not a site itself."""
    name, layer = _output_layer(model)
    return name if type(layer) in (nn.Linear, DenseLinear) and name not in sites else None


def _output_layer(model: nn.Module) -> tuple[str | None, Any]:
    """The output layer of a transformers model, or of the first one inside a module that holds some."""
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        layer = get() if callable(get) else None
        if layer is not None:
            return next((name for name, each in model.named_modules() if each is layer), None), layer
    return None, None
