"""SparsityConfig: what `sparsify_` did to a model, as config.json keeps it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from deadband.allocation.thresholds import check_sparsity
from deadband.layers.experts import with_projections
from deadband.layers.formats import WeightFormat
from deadband.layers.quantized import QuantizedMatrix, QuantizedTable
from deadband.layers.rule import check_criterion
from deadband.layers.sparse import DenseLinear, SparseSite
from deadband.ops.gradients import GRADIENTS

VERSION = 5
READ_VERSIONS = (3, 4, 5)
RECIPE = "_deadband_recipe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """What was done to one site; what is as here by default is left out of config.json.

    Attributes:
        scaled, centered, relative, gate: whether its `deadband.Rule` has such a part.
        masked: whether it has a static mask.
        gradient: of its masked input.
        weights: the format of its weight if that is quantised.
        expected, range: as in `deadband.Thresholds`, where they are known.

    Raises:
        ValueError: a field that holds anything else than that.
    """

    scaled: bool = False
    centered: bool = False
    relative: bool = False
    gate: bool = False
    masked: bool = False
    gradient: str = "exact"
    weights: str | None = None
    expected: float | None = None
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("scaled", "centered", "relative", "gate", "masked"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected true or false")
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient={self.gradient!r} is not known; expected one of {GRADIENTS}")
        if self.weights is not None:
            _check_format(self.weights)
        if self.expected is not None and not _is_number(self.expected):
            raise ValueError(f"expected={self.expected!r}, expected a number")
        if self.range is not None:
            pair = self.range
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(_is_number, pair)):
                raise ValueError(f"range={pair!r}, expected a pair of numbers")
            object.__setattr__(self, "range", (float(pair[0]), float(pair[1])))

    @classmethod
    def of(cls, site: SparseSite) -> SiteConfig:
        """What a layer is now."""
        return cls(
            scaled=site.scale is not None,
            centered=site.center is not None,
            relative=site.relative,
            gate=site.gate,
            masked=site.mask is not None,
            gradient=site.gradient,
            weights=site.weight_format if isinstance(site, QuantizedMatrix) else None,
            expected=None if math.isnan(site.expected) else site.expected,
            range=site.site_range,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the defaults."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in fields.items() if value != getattr(_DEFAULT, name)}
        return {name: list(value) if name == "range" else value for name, value in given.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What was done to a model, in plain JSON values. Stored in `config.json`; the thresholds lie beside the weights.

    Attributes:
        sites: a `SiteConfig` for each sparse layer by name (or names alone).
        criterion, sparsity, method: what the thresholds were made by, where that is known.
        output_layer: the name of the output layer, where that decodes on deadband's kernels without being a site.
        quantized: the formats of quantised layers that are no sites, by name.
        tied_embeddings: the quantised layer that each tied embedding reads its rows from, by the embedding's name.

    Raises:
        ValueError: a field that holds anything else than that.

    Example:
        >>> SparsityConfig(sites=["fc"], sparsity=0.4).sites["fc"].gradient
        'exact'
    """

    sites: Mapping[str, SiteConfig] = dataclasses.field(hash=False)
    criterion: str = "magnitude"
    sparsity: float | None = None
    method: str | None = None
    output_layer: str | None = None
    quantized: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    tied_embeddings: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version not in READ_VERSIONS:
            raise ValueError(
                f"the model was written with format version {self.version}, this deadband reads versions "
                f"{READ_VERSIONS}; use the deadband that wrote it, or sparsify the dense model again"
            )
        object.__setattr__(self, "sites", _sites_of(self.sites))
        if not isinstance(self.criterion, str):
            raise ValueError(f"criterion={self.criterion!r}, expected the name of a criterion")
        check_criterion(self.criterion)
        if self.sparsity is not None:
            if not _is_number(self.sparsity):
                raise ValueError(f"sparsity={self.sparsity!r}, expected a number or null")
            check_sparsity(self.sparsity)
        for name in ("method", "output_layer"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name}={getattr(self, name)!r}, expected a name or null")
        for name in ("quantized", "tied_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(each, str) for each in (*value, *value.values())):
                raise ValueError(f"{name}={value!r}, expected names by layer")
        for form in self.quantized.values():
            _check_format(form)

    @property
    def weights(self) -> dict[str, str]:
        """The formats of all quantised layers by name."""
        return {name: site.weights for name, site in self.sites.items() if site.weights is not None} | self.quantized

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SparsityConfig:
        """What `to_dict` returned, now or in versions 3 and 4; a ValueError where it is something else."""
        flat = fields.get("version") in (3, 4) and isinstance(fields.get("sites"), (list, tuple))
        try:
            return cls(**(_nested(dict(fields)) if flat else fields))
        except TypeError as error:
            raise ValueError(str(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        sites = {name: site.to_dict() for name, site in self.sites.items()}
        return {**fields, "sites": sites, "quantized": {**self.quantized}, "tied_embeddings": {**self.tied_embeddings}}


_DEFAULT = SiteConfig()


def _sites_of(given: Any) -> dict[str, SiteConfig]:
    if isinstance(given, (list, tuple)):
        given = dict.fromkeys(given, _DEFAULT) if all(isinstance(name, str) for name in given) else None
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"sites={given!r}, expected objects by the names of layers")
    sites = {}
    for name, site in given.items():
        try:
            sites[name] = site if isinstance(site, SiteConfig) else SiteConfig(**site)
        except (TypeError, ValueError) as error:
            raise ValueError(f"sites: {name!r}: {error}") from None
    return sites


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Versions 3 and 4 had a list or a mapping of sites for each field of a site."""
    names = {key: flat.pop(key, ()) for key in ("sites", "scaled", "centered", "relative", "masked")}
    by_name = {key: flat.pop(key, {}) for key in ("gradients", "weights", "expected", "site_range")}
    for key, value in names.items():
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{key}={value!r}, expected a list of names of layers")
    for key, value in by_name.items():
        if not isinstance(value, dict):
            raise ValueError(f"{key}={value!r}, expected an object by the names of layers")
    tied = flat.pop("tied_embedding", None)  # version 3: to the output layer, whatever its name
    if tied is not None:
        flat["tied_embeddings"] = {tied: ""}
    gradient, sites = flat.pop("gradient", "exact"), names.pop("sites")
    weights = by_name.pop("weights")
    for key, value in (names | by_name).items():
        if unknown := sorted({*value} - {*sites}):
            raise ValueError(f"{key} names {unknown[0]!r}, which is not among the sites")
    flat["sites"] = {
        name: {
            **{key: name in value for key, value in names.items()},
            "gradient": by_name["gradients"].get(name, gradient),
            "weights": weights.get(name),
            "expected": by_name["expected"].get(name),
            "range": by_name["site_range"].get(name),
        }
        for name in sites
    }
    return {**flat, "quantized": {name: form for name, form in weights.items() if name not in sites}}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_format(name: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(f"weights={name!r}, expected the name of a format")
    WeightFormat.parse(name)


def config_of(model: nn.Module) -> SparsityConfig | None:
    """What is sparse, quantised or tied in `model` now, read from its layers; None where nothing is.

    Criterion, sparsity and method are what the last `sparsify_` was told, where a transformers model remembers it.
    """
    modules = dict(with_projections(model))
    sites = {name: SiteConfig.of(module) for name, module in modules.items() if isinstance(module, SparseSite)}
    quantized = {
        name: module.weight_format
        for name, module in modules.items()
        if isinstance(module, QuantizedMatrix) and name not in sites
    }
    if not sites and not quantized:
        return None
    names = {id(module): name for name, module in modules.items()}
    tables = {name: module.source for name, module in modules.items() if isinstance(module, QuantizedTable)}
    recipe = next((module.__dict__[RECIPE] for module in modules.values() if RECIPE in module.__dict__), None)
    told = {key: getattr(recipe, key) for key in ("criterion", "sparsity", "method")} if recipe is not None else {}
    return SparsityConfig(
        sites=sites,
        output_layer=next((name for name, module in modules.items() if is_output(module)), None),
        quantized=quantized,
        tied_embeddings={name: names[id(source)] for name, source in tables.items() if id(source) in names},
        **told,
    )


def is_output(module: nn.Module) -> bool:
    """Whether `sparsify_` made it as an output layer."""
    return type(module) is DenseLinear or (isinstance(module, QuantizedMatrix) and not isinstance(module, SparseSite))
