"""SparsityConfig: what `sparsify_` did to a model, as config.json keeps it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import nn

from deadband.allocation.thresholds import check_sparsity
from deadband.layers.formats import WeightFormat
from deadband.layers.quantized import QuantizedMatrix, QuantizedTable
from deadband.layers.rule import check_criterion
from deadband.layers.sparse import GRADIENTS, DenseLinear, SparseSite

VERSION = 4
READ_VERSIONS = (3, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What was done to a model, in plain JSON values. Stored in `config.json`; the thresholds lie beside the weights.

    `sites` are all sparse layers by name; `scaled`, `centered` and `relative` those whose `deadband.Rule` has such a
    part, `masked` those with a static mask, `gradients` those whose gradient is another than `gradient`.
    `weights` has the formats of quantised layers by name, and `tied_embeddings` the quantised layer that each tied
    embedding reads its rows from. `expected` and `site_range` are those of `deadband.Thresholds`, where they are known.

    Raises:
        ValueError: a field that holds anything else than that.

    Example:
        >>> SparsityConfig(sites=("fc",), sparsity=0.4).criterion
        'magnitude'
    """

    sites: tuple[str, ...]
    criterion: str = "magnitude"
    sparsity: float | None = None
    method: str | None = None
    gradient: str = "exact"
    gradients: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    output_layer: str | None = None
    scaled: tuple[str, ...] = ()
    centered: tuple[str, ...] = ()
    relative: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    weights: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    tied_embeddings: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    expected: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)
    site_range: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict, hash=False)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version not in READ_VERSIONS:
            raise ValueError(
                f"the model was written with format version {self.version}, this deadband reads versions "
                f"{READ_VERSIONS}; use the deadband that wrote it, or sparsify the dense model again"
            )
        for name in _NAMES:
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"{name}={value!r}, expected a list of names of layers")
            object.__setattr__(self, name, tuple(value))
        for name, (right, what) in _FIELDS.items():
            value = getattr(self, name)
            if not right(value):
                raise ValueError(f"{name}={value!r}, expected {what}")
        check_criterion(self.criterion)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        for gradient in (self.gradient, *self.gradients.values()):
            if gradient not in GRADIENTS:
                raise ValueError(f"gradient={gradient!r} is not known; expected one of {GRADIENTS}")
        for form in self.weights.values():
            WeightFormat.parse(form)
        for name in ("scaled", "centered", "relative", "masked", "gradients", "expected", "site_range"):
            unknown = sorted(set(getattr(self, name)) - set(self.sites))
            if unknown:
                raise ValueError(f"{name} names {unknown[0]!r}, which is not among the sites")
        ranges = {name: (float(low), float(high)) for name, (low, high) in self.site_range.items()}
        object.__setattr__(self, "site_range", ranges)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        ranges = {name: list(both) for name, both in self.site_range.items()}
        names = {name: list(getattr(self, name)) for name in _NAMES}
        return {**dataclasses.asdict(self), **names, "site_range": ranges}


_NAMES = ("sites", "scaled", "centered", "relative", "masked")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_optional_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_range(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value))


def _by_name(right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(name, str) and right(each) for name, each in value.items())
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "criterion": (_is_text, "the name of a criterion"),
    "sparsity": (lambda value: value is None or _is_number(value), "a number or null"),
    "method": (_is_optional_text, "the name of a method or null"),
    "gradient": (_is_text, "the name of a gradient"),
    "gradients": (_by_name(_is_text), "names of gradients by site"),
    "output_layer": (_is_optional_text, "the name of a layer or null"),
    "weights": (_by_name(_is_text), "names of formats by layer"),
    "tied_embeddings": (_by_name(_is_text), "names of layers by embedding"),
    "expected": (_by_name(_is_number), "numbers by site"),
    "site_range": (_by_name(_is_range), "pairs of numbers by site"),
}


def config_of(model: nn.Module) -> SparsityConfig | None:
    """What is sparse, quantised or tied in `model` now, read from its layers; None where nothing is.

    Criterion, sparsity and method are what the last `sparsify_` was told, where a transformers model remembers it.
    """
    modules = dict(model.named_modules())
    sites = {name: module for name, module in modules.items() if isinstance(module, SparseSite)}
    weights = {name: module.weight_format for name, module in modules.items() if isinstance(module, QuantizedMatrix)}
    if not sites and not weights:
        return None
    names = {id(module): name for name, module in modules.items()}
    tables = {name: module.source for name, module in modules.items() if isinstance(module, QuantizedTable)}
    recipe = next((module.__dict__[RECIPE] for module in modules.values() if RECIPE in module.__dict__), None)
    gradient = next((site.gradient for site in sites.values()), "exact")
    return SparsityConfig(
        sites=tuple(sites),
        criterion=recipe.criterion if recipe is not None else "magnitude",
        sparsity=recipe.sparsity if recipe is not None else None,
        method=recipe.method if recipe is not None else None,
        gradient=gradient,
        gradients={name: site.gradient for name, site in sites.items() if site.gradient != gradient},
        output_layer=next((name for name, module in modules.items() if is_output(module)), None),
        scaled=tuple(name for name, site in sites.items() if site.scale is not None),
        centered=tuple(name for name, site in sites.items() if site.center is not None),
        relative=tuple(name for name, site in sites.items() if site.relative),
        masked=tuple(name for name, site in sites.items() if site.mask is not None),
        weights=weights,
        tied_embeddings={name: names[id(source)] for name, source in tables.items() if id(source) in names},
        expected={name: site.expected for name, site in sites.items() if not math.isnan(site.expected)},
        site_range={name: site.site_range for name, site in sites.items() if site.site_range is not None},
    )


RECIPE = "_deadband_recipe"


def is_output(module: nn.Module) -> bool:
    """Whether `sparsify_` made it as an output layer."""
    return type(module) is DenseLinear or (isinstance(module, QuantizedMatrix) and not isinstance(module, SparseSite))
