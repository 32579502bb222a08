"""sparsify_ and densify_: the linear layers of a model become sparse, in place, and dense again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deadband.allocation import Thresholds, check_model, check_sparsity
from deadband.criterion import LARGEST, Rule, check_criterion, scale_of
from deadband.linear import (
    ALL_ROWS,
    GRADIENTS,
    DenseLinear,
    SparseSite,
    change_class_,
    make_dense_,
    make_sparse_,
    new_counts,
    require_no_parametrization,
    tensor_of,
    use_dense_product_,
)
from deadband.observation import JUDGED_ROWS
from deadband.quantization import QuantizedWeight, WeightFormat, quantize
from deadband.quantized import (
    QUANTIZED_CLASSES,
    QuantizedMatrix,
    QuantizedTable,
    make_quantized_,
    tie_table_,
    unmake_quantized_,
    untie_table_,
)
from deadband.running import progress_bar, threads
from deadband.scope import scope
from deadband.sites import Patterns, find_sites, how_computed, matrix_of, shape_of, sites_of, weight_bytes

VERSION = 4
READ_VERSIONS = (3, 4)
OUTPUT_FORMAT = "int8-g32"
"""Of the output layer, where `weights` is one format for all: 6 % more bytes than int8, and little of its error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What was done to a model, in plain JSON values. Stored in `config.json`; the thresholds lie beside the weights.

    `sites` are all sparse layers by name; `scaled`, `centered` and `relative` those whose `deadband.criterion.Rule` has
    such a part, `masked` those with a static mask, `gradients` those whose gradient is another than `gradient`.
    `weights` has the formats of quantised layers by name, and `tied_embeddings` the quantised layer that each tied
    embedding reads its rows from. `expected` and `site_range` are those of `deadband.allocation.Thresholds`, where they
    are known.

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
    recipe = next((module.__dict__[_RECIPE] for module in modules.values() if _RECIPE in module.__dict__), None)
    gradient = next((site.gradient for site in sites.values()), "exact")
    return SparsityConfig(
        sites=tuple(sites),
        criterion=recipe.criterion if recipe is not None else "magnitude",
        sparsity=recipe.sparsity if recipe is not None else None,
        method=recipe.method if recipe is not None else None,
        gradient=gradient,
        gradients={name: site.gradient for name, site in sites.items() if site.gradient != gradient},
        output_layer=next((name for name, module in modules.items() if _is_output(module)), None),
        scaled=tuple(name for name, site in sites.items() if site.scale is not None),
        centered=tuple(name for name, site in sites.items() if site.center is not None),
        relative=tuple(name for name, site in sites.items() if site.relative),
        masked=tuple(name for name, site in sites.items() if site.mask is not None),
        weights=weights,
        tied_embeddings={name: names[id(source)] for name, source in tables.items() if id(source) in names},
        expected={name: site.expected for name, site in sites.items() if not math.isnan(site.expected)},
        site_range={name: site.site_range for name, site in sites.items() if site.site_range is not None},
    )


_RECIPE = "_deadband_recipe"


def _is_output(module: nn.Module) -> bool:
    """Whether `sparsify_` made it as an output layer."""
    return type(module) is DenseLinear or (isinstance(module, QuantizedMatrix) and not isinstance(module, SparseSite))


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
    rules = {name: _rule(name, chosen[name], modules[name], criterion or "magnitude") for name in chosen}
    output = find_output_layer(model, chosen) if output_layer else None
    formats = _formats(model, chosen, weights, output, output_layer)
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
    quantised = _quantise(model, formats, second_moments, hessians, progress)  # before anything changes
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
        _remember(model, recipe)
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
    _use_torchs_product_(model)
    if output is not None and output not in formats:
        use_dense_product_(model.get_submodule(output))
    _unprepare(model)
    return model


def _unprepare(model: nn.Module) -> None:
    """Drop the compiled graph of `prepare_decode_`, if there is one: it has the tensors from before."""
    if "_deadband_decoder" in model.__dict__:
        from deadband.decoding import unprepare_decode_

        unprepare_decode_(model)


def _formats(
    model: nn.Module,
    chosen: Mapping[str, float | Rule],
    weights: str | Mapping[str, str | QuantizedWeight] | None,
    output: str | None,
    output_layer: bool | str,
) -> dict[str, WeightFormat | QuantizedWeight]:
    """The layers to quantise by name, and to what; a ValueError names the first that cannot be."""
    wanted: dict[str, Any] = {}
    if isinstance(weights, Mapping):
        every = {**sites_of(model, every_name=True)}
        wanted = {_full_name(model, every, given): value for given, value in weights.items()}
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
        module = model.get_submodule(name)
        if isinstance(module, QuantizedMatrix):
            _check_unchanged(name, module, value)
            continue
        if name not in chosen and name != output:
            raise ValueError(f"weights name {name!r}, which is neither a sparse site nor the output layer")
        if type(module) not in QUANTIZED_CLASSES:
            raise ValueError(f"site {name!r} is a {type(module).__name__}, which cannot have quantised weights")
        formats[name] = value if isinstance(value, QuantizedWeight) else WeightFormat.parse(value)
        if isinstance(value, QuantizedWeight) and (value.out_features, value.in_features) != shape_of(module):
            raise ValueError(
                f"weights of {name!r}: got [{value.out_features}, {value.in_features}], "
                f"expected {list(shape_of(module))}"
            )
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


def _quantise(
    model: nn.Module,
    formats: Mapping[str, WeightFormat | QuantizedWeight],
    second_moments: Mapping[str, Tensor] | None,
    hessians: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None,
    progress: bool,
) -> dict[str, QuantizedWeight]:
    for what, given in (("second_moments", second_moments), ("hessians", hessians)):
        unknown = sorted(set(given) - {name for name, _ in model.named_modules()}) if isinstance(given, Mapping) else []
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
                    matrix_of(model.get_submodule(name)).detach(),
                    cast(WeightFormat, formats[name]),
                    (second_moments or {}).get(name),
                    hessian=hessian,
                )
        except ValueError as error:
            raise ValueError(f"site {name!r} cannot be quantised: {error}") from None
    return quantised


def find_tied_embeddings(model: nn.Module, formats: Collection[str]) -> dict[nn.Embedding, Any]:
    """The embeddings whose weight is that of a layer in `formats`, and that layer."""
    layers = {id(layer._parameters["weight"]): layer for layer in map(model.get_submodule, formats)}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    weights = {module: id(module._parameters.get("weight")) for module in embeddings}
    return {module: layers[weight] for module, weight in weights.items() if weight in layers}


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
    sites = _require_sparse(model).values()
    require_no_parametrization(*sites)  # before anything changes
    for site in sites:
        make_dense_(site)
    _unprepare(model)
    _dequantise_(model)
    _use_torchs_product_(model)
    _remember(model, None)
    return model


def _dequantise_(model: nn.Module) -> None:
    quantised = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}
    for module in quantised.values():
        unmake_quantized_(module)
    for table in [module for module in model.modules() if isinstance(module, QuantizedTable)]:
        weight = table.source.weight  # a dense layer's again, if that is in the model
        untie_table_(table, weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight))
    if quantised:
        warnings.warn(
            f"densify_ dequantised {_layers(len(quantised))}: their weights stay rounded, not those from before "
            "sparsify_(weights=...)",
            stacklevel=4,  # densify_ is decorated
        )


def _use_torchs_product_(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is DenseLinear:
            change_class_(module, nn.Linear)


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


def sparse_sites(model: nn.Module) -> dict[str, SparseSite]:
    """The sparse layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseSite)}


@contextlib.contextmanager
def sparse_prefill(model: nn.Module) -> Iterator[nn.Module]:
    """Every token through the sparse path, however many come at once, for the thread or task in the block: to evaluate.

    Example:
        >>> model = sparsify_(nn.Sequential(nn.Linear(2, 1)), {"0": 1.0})
        >>> with torch.no_grad(), sparse_prefill(model):
        ...     torch.equal(model(torch.full((9, 2), 0.5)), model[0].bias.expand(9, 1))
        True
    """
    with _sparse_rows(model, ALL_ROWS):
        yield model


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[nn.Module]:
    """Nothing is skipped by the thread or task in the block: the dense model, on the same weights, to compare with."""
    with _sparse_rows(model, 0):
        yield model


def _sparse_rows(model: nn.Module, rows: int) -> contextlib.AbstractContextManager[Any]:
    return scope({module: (rows, None) for module in _require_sparse(model).values()})


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[], SparsityReport]]:
    """What the thread or task in the block skips, counted apart; the model's own counters get it in the end.

    Yields:
        A function that returns the `SparsityReport` of the block so far.

    Raises:
        ValueError: the model is not sparse, or was made so with `count=False`.

    Example:
        >>> model = sparsify_(nn.Sequential(nn.Linear(4, 4)).eval(), {"0": 1.0})
        >>> with torch.no_grad(), counting(model) as achieved:
        ...     _ = model(torch.tensor([[0.0, 0.5, 1.5, 2.5]]))
        >>> achieved().total
        0.5
    """
    modules = _require_counting(model)
    counts = {name: new_counts(module.threshold.device) for name, module in modules.items()}
    try:
        with scope({module: (None, counts[name]) for name, module in modules.items()}):
            yield lambda: _report(modules, {name: own.tolist() for name, own in counts.items()})
    finally:
        for name, module in modules.items():
            if module.counts is not None:
                module.counts += counts[name]


class DriftWarning(UserWarning):
    """A sparse model meets data unlike those that it was calibrated on, or input that is NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """What was skipped, and whether that is what the model was calibrated to skip.

    Attributes:
        sites: the fraction skipped at each site; NaN where nothing ran.
        total: their mean, weighted by weight bytes.
        entries: input entries that were seen, of all sites together.
        nonfinite: those of each site that were NaN or infinite.
        expected: what each site skipped of the calibration data; NaN where that is not known (thresholds of one's own,
            `exact=True`, masked sites).
        drifted: what was skipped and what was expected, of the sites that left the range in which they stay on data
            like the calibration's (`deadband.observation.range_of` tells how wide it is). A site is judged once it has
            seen 64 rows, and if its thresholds come from activations of the sparse model: `Thresholds.corrected`.
    """

    sites: dict[str, float]
    total: float
    entries: int
    nonfinite: dict[str, int] = dataclasses.field(default_factory=dict)
    expected: dict[str, float] = dataclasses.field(default_factory=dict)
    drifted: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def __float__(self) -> float:
        return self.total

    def __str__(self) -> str:
        lines = [f"{self.total:7.1%}  of the weight bytes, over {self.entries:,} input entries"]
        broken = {name: count for name, count in self.nonfinite.items() if count}
        if broken:
            lines.append(f"{sum(broken.values()):,} entries were NaN or infinite, at {_sites(len(broken))}")
        if self.drifted:
            lines.append(f"{_sites(len(self.drifted))} left the calibrated range")
        for name, value in self.sites.items():
            left = f", calibrated to {self.drifted[name][1]:.1%}" if name in self.drifted else ""
            bad = f", {broken[name]:,} NaN or infinite" if name in broken else ""
            lines.append(f"{value:7.1%}  {name}{left}{bad}")
        return "\n".join(lines)


def sparsity(model: nn.Module, *, reset: bool = False, warn: bool = True) -> SparsityReport:
    """The sparsity achieved by the tokens that took the sparse path since the model was made sparse (or last reset).

    Dense prefill and training are not counted.

    In production, call it with `reset=True` once in a while: each report is then of the window since the last call, and
    a `DriftWarning` tells when the model meets data that it was not calibrated for. Where sites skip more than they
    were calibrated to, quality may suffer; where they skip less, speed does.

    Args:
        model: a sparse model.
        reset: start the counters again after reading.
        warn: warn (`DriftWarning`, once for all sites) where sites left their calibrated range or saw entries that are
            NaN or infinite.

    Raises:
        ValueError: the model is not sparse, or was made so with `count=False`.

    Example:
        >>> model = sparsify_(nn.Sequential(nn.Linear(4, 4)).eval(), {"0": 1.0})
        >>> with torch.no_grad():
        ...     _ = model(torch.tensor([[0.0, 0.5, 1.5, 2.5]]))
        >>> sparsity(model).total
        0.5
    """
    modules = _require_counting(model)
    counted = {name: _taken(cast(Tensor, module.counts), reset) for name, module in modules.items()}
    report = _report(modules, counted)
    complaints = _complaints(report, modules) if warn else []
    if complaints:
        warnings.warn(" ".join(complaints), DriftWarning, stacklevel=2)
    return report


def _require_counting(model: nn.Module) -> dict[str, SparseSite]:
    modules = _require_sparse(model)
    for name, module in modules.items():
        if module.counts is None:
            raise ValueError(f"site {name!r} does not count; sparsify_ the model with count=True to measure sparsity")
    return modules


def _taken(counts: Tensor, reset: bool) -> list[int]:
    """Counters as they are; with `reset`, what was read is taken off them: another thread may count on meanwhile."""
    before = counts.clone()
    if reset:
        counts.sub_(before)
    return before.tolist()


def _report(modules: Mapping[str, SparseSite], counted: Mapping[str, list[int]]) -> SparsityReport:
    fractions, weights, nonfinite, drifted, entries = {}, {}, {}, {}, 0
    for name, module in modules.items():
        skipped, seen, nonfinite[name] = counted[name]
        fractions[name] = skipped / seen if seen else math.nan
        weights[name] = weight_bytes(module)
        entries += seen
        if module.site_range is not None and seen >= JUDGED_ROWS * shape_of(module)[1]:
            low, high = module.site_range
            if not low <= fractions[name] <= high:
                drifted[name] = fractions[name], module.expected
    ran = [name for name in modules if not math.isnan(fractions[name])]
    total = sum(weights[name] for name in ran)
    achieved = sum(fractions[name] * weights[name] for name in ran) / total if total else math.nan
    expected = {name: module.expected for name, module in modules.items()}
    return SparsityReport(fractions, achieved, entries, nonfinite, expected, drifted)


_NAMED = 3  # sites that a warning names


def _complaints(report: SparsityReport, modules: Mapping[str, SparseSite]) -> list[str]:
    complaints = []
    if report.drifted:
        farthest = sorted(report.drifted, key=lambda name: -abs(report.sites[name] - report.expected[name]))
        figures = []
        for name in farthest[:_NAMED]:
            low, high = modules[name].site_range or (math.nan, math.nan)
            figures.append(
                f"{name} skips {report.sites[name]:.1%}, calibrated to {report.expected[name]:.1%} "
                f"({low:.1%} to {high:.1%})"
            )
        complaints.append(
            f"{_sites(len(farthest))} of {len(report.sites)} left the calibrated range: {_listed(figures, farthest)}. "
            "Calibrate on data like these, or run the model dense with deadband.densify_."
        )
    broken = sorted((name for name, count in report.nonfinite.items() if count), key=lambda n: -report.nonfinite[n])
    if broken:
        figures = [f"{name} {report.nonfinite[name]:,}" for name in broken[:_NAMED]]
        complaints.append(
            f"{_sites(len(broken))} saw NaN or infinite entries, which are never skipped: {_listed(figures, broken)}. "
            "Look at the data; deadband.densify_ tells whether the dense model has them too."
        )
    return complaints


def _listed(figures: Collection[str], every: Collection[str]) -> str:
    more = len(every) - len(figures)
    return "; ".join(figures) + (f"; and {more} more" if more else "")


def _layers(count: int) -> str:
    return f"{count} layer{'s' if count > 1 else ''}"


def _sites(count: int) -> str:
    return f"{count} site{'s' if count > 1 else ''}"


def _rule(name: str, given: float | Rule, module: nn.Module, criterion: str) -> Rule:
    """What a site has to skip, on its device; a ValueError says what does not fit it."""
    if not isinstance(given, Rule):
        if criterion == "sensitivity":
            raise ValueError(
                f"site {name!r}: a threshold on sensitivity scores needs its scale; pass what "
                "Calibration.allocate returned, or a deadband.Rule with a scale"
            )
        given = Rule(given)
    features, device = shape_of(module)[1], tensor_of(module).device
    if given.scale is None and criterion == "weighted_magnitude":
        given = dataclasses.replace(given, scale=scale_of(criterion, matrix_of(module)))
    parts = {"scale": given.scale, "center": given.center}
    for what, vector in parts.items():
        if vector is None:
            continue
        if vector.shape != (features,) or not vector.isfinite().all() or (what == "scale" and (vector < 0).any()):
            raise ValueError(
                f"site {name!r}: its {what} has to be {features} finite values, not negative for a scale; "
                f"got shape {tuple(vector.shape)}"
            )
        parts[what] = vector.detach().to(device=device, dtype=torch.float32, copy=True)
    return Rule(given.threshold, parts["scale"], parts["center"], given.relative)


def resolve(model: nn.Module, thresholds: Mapping[str, float | Rule]) -> dict[str, float | Rule]:
    """`thresholds` by full site names, in the order of the model; a ValueError names the first bad entry."""
    every = sites_of(model, every_name=True)
    chosen: dict[str, float | Rule] = {}
    for given, threshold in thresholds.items():
        name = _full_name(model, every, given)
        value = float(threshold.threshold if isinstance(threshold, Rule) else threshold)
        if not 0 <= value <= LARGEST:
            raise ValueError(f"site {given!r}: threshold {value} has to be finite and not negative, and fit float32")
        chosen[name] = dataclasses.replace(threshold, threshold=value) if isinstance(threshold, Rule) else value
    if not chosen:
        raise ValueError("thresholds is empty; expected at least one site")
    return {name: chosen[name] for name in every if name in chosen}


def resolve_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`masks` by full site names, on the devices of the sites; a ValueError names the first bad entry."""
    every = sites_of(model, every_name=True)
    chosen = {}
    for given, mask in masks.items():
        name = _full_name(model, every, given)
        features = shape_of(every[name])[1]
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.shape != (features,):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"site {given!r}: its mask is {got}, expected torch.bool ({features},)")
        chosen[name] = mask.detach().clone().to(tensor_of(every[name]).device)
    if not chosen:
        raise ValueError("masks is empty; expected at least one site")
    return chosen


def _full_name(model: nn.Module, every: Mapping[str, nn.Module], given: str) -> str:
    names = [given] if given in every else [name for name in every if name.endswith("." + given)]
    if len(names) != 1:
        module = dict(model.named_modules()).get(given)
        what = (
            f"ends several names: {names[:3]}" if names
            else how_computed(module) or f"is {type(module).__name__}, expected nn.Linear or Conv1D"
            if module is not None
            else f"is not a linear layer of the model, which has for example {list(every)[:3]}"
        )  # fmt: skip
        raise ValueError(f"site {given!r} {what}")
    return names[0]


def _require_sparse(model: nn.Module) -> dict[str, SparseSite]:
    modules = sparse_sites(model)
    if not modules:
        raise ValueError(f"no layer of this {type(model).__name__} is sparse; make it sparse with deadband.sparsify_")
    return modules


def _remember(model: nn.Module, recipe: SparsityConfig | None) -> None:
    """Tell the transformers models in `model` what was done; other modules need nothing."""
    if "transformers.modeling_utils" not in sys.modules:
        return  # then there are none
    from deadband import hf

    hf.set_quantization_config(model, recipe)
