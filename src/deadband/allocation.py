"""From a budget to one rule per site: shares of the budget by `uniform` or another method, then thresholds for them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from deadband.batches import taken
from deadband.criterion import LARGEST, Rule, check_criterion, scale_of
from deadband.files import replacing
from deadband.linear import SparseSite
from deadband.observation import SiteStatistics, observe_model, observe_sparse, range_of, skipped_means
from deadband.sites import is_site, matrix_of, shape_of, weight_sample

if TYPE_CHECKING:
    from deadband.calibration import Calibration
    from deadband.sensitivity import SiteSensitivity

METHODS = ("auto", "uniform", "greedy", "sensitivity")
VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds(Mapping[str, Rule]):
    """One rule per site, as `Calibration.allocate` gives them: a mapping to rules, with what it was made for.

    Attributes:
        rules: by site name: the threshold, and what it is compared with.
        sparsity: model-wide sparsity asked for (or found for a quality asked for), weighted by weight bytes.
        site_sparsity: the share of it that each site was given.
        criterion, method: how scores are taken, and how the budget was shared out.
        corrected: whether thresholds come from activations of the sparse model.
        reason: why `auto` picked what it picked, else empty.
        harm: the loss (in nats a token) that each site is estimated to cause; only where a method estimates it.
        shapes: [out_features, in_features] of each site, and
        samples: some of its weights, to tell a model that these do not belong to.
        expected: what each site skipped of the calibration data; more than its share where zeros alone are more.
        site_range: between which sparsities each site stays on data like that, for `deadband.sparsity` to tell when a
            model meets other data; only if `corrected`, by `deadband.observation.range_of`.

    Example:
        >>> from deadband import Rule
        >>> about = {"sparsity": 0.4, "site_sparsity": {"fc": 0.4}, "shapes": {"fc": (2, 4)}}
        >>> thresholds = Thresholds(rules={"fc": Rule(0.5)}, **about)
        >>> thresholds["fc"].threshold
        0.5
    """

    rules: dict[str, Rule]
    sparsity: float
    site_sparsity: dict[str, float]
    shapes: dict[str, tuple[int, int]]
    samples: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    harm: dict[str, float] = dataclasses.field(default_factory=dict)
    expected: dict[str, float] = dataclasses.field(default_factory=dict)
    site_range: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    criterion: str = "magnitude"
    method: str = "uniform"
    corrected: bool = False
    reason: str = ""

    def __getitem__(self, site: str) -> Rule:
        return self.rules[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)

    def __str__(self) -> str:
        pass_ = ", corrected on the sparse model" if self.corrected else ""
        head = f"{self.sparsity:.0%} of the weight bytes over {len(self)} sites, {self.method}, {self.criterion}{pass_}"
        lines = [f"{self.site_sparsity[name]:7.1%} {self.rules[name]}  {name}" for name in self]
        return "\n".join([head, *([self.reason] if self.reason else []), *lines])

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file."""
        about = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rules = about.pop("rules")
        about["rules"] = {
            name: {"threshold": rule.threshold, "relative": rule.relative, "parts": _parts(rule)}
            for name, rule in rules.items()
        }
        tensors = {
            f"{name}.{part}": getattr(rule, part).cpu().clone()  # q, k and v may share one
            for name, rule in rules.items()
            for part in _parts(rule)
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"deadband.thresholds": json.dumps({"version": VERSION, **about})})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Thresholds:
        """Read what `save` wrote; a ValueError says so if it is something else."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file of thresholds {os.fspath(path)!r}")
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["deadband.thresholds"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            if about.pop("version") != VERSION:
                raise ValueError("another version")
            about["rules"] = {name: _rule(name, each, tensors) for name, each in about["rules"].items()}
            for key in ("shapes", "samples", "site_range"):
                about[key] = {name: tuple(values) for name, values in about.get(key, {}).items()}
            made = cls(**about)
            made._check()
            return made
        except (
            ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, safetensors.SafetensorError,
        ) as error:  # fmt: skip
            raise ValueError(f"{os.fspath(path)!r} is not a file of thresholds of version {VERSION}: {error}") from None

    def _check(self) -> None:
        """Raise a ValueError where the parts do not fit each other."""
        for what in ("method", "reason", "criterion"):
            if not isinstance(getattr(self, what), str):
                raise ValueError(f"{what} is {getattr(self, what)!r}, expected text")
        if self.shapes.keys() != self.rules.keys() or self.site_sparsity.keys() != self.rules.keys():
            raise ValueError("rules, shapes and site_sparsity are of different sites")
        for what in ("samples", "harm", "expected", "site_range"):
            if getattr(self, what).keys() - self.rules.keys():
                raise ValueError(f"{what} is of other sites than the rules")
        numbers = (*self.site_sparsity.values(), *self.expected.values(), *self.harm.values())
        if not all(map(_is_number, (self.sparsity, *numbers))):
            raise ValueError("a sparsity or a harm is no number")
        check_sparsity(self.sparsity)
        for values in (*self.shapes.values(), *self.site_range.values(), *self.samples.values()):
            if not all(map(_is_number, values)):
                raise ValueError(f"{values!r} holds what is no number")
        for name, rule in self.rules.items():
            if len(self.shapes[name]) != 2 or len(self.site_range.get(name, (0, 0))) != 2:
                raise ValueError(f"the shape or the range of site {name!r} is not of two numbers")
            for part in _parts(rule):
                if getattr(rule, part).shape != self.shapes[name][1:]:
                    raise ValueError(f"the {part} of site {name!r} is not of {self.shapes[name][1]} channels")


def _rule(name: str, about: Any, tensors: Mapping[str, torch.Tensor]) -> Rule:
    """A rule of a file, looked at before it is believed."""
    if about.keys() != {"threshold", "relative", "parts"} or not {*about["parts"]} <= {"scale", "center"}:
        raise ValueError(f"the rule of site {name!r} is {about}")
    parts = {part: tensors[f"{name}.{part}"] for part in about["parts"]}
    rule = Rule(**parts, threshold=about["threshold"], relative=about["relative"])
    if not _is_number(rule.threshold) or not 0 <= rule.threshold <= LARGEST or type(rule.relative) is not bool:
        raise ValueError(f"site {name!r} has threshold {rule.threshold!r} and relative={rule.relative!r}")
    for part, tensor in parts.items():
        if tensor.dtype != torch.float32 or tensor.dim() != 1 or not bool(tensor.isfinite().all()):
            raise ValueError(f"the {part} of site {name!r} is no vector of finite float32")
    return rule


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _parts(rule: Rule) -> list[str]:
    return [part for part in ("scale", "center") if getattr(rule, part) is not None]


def allocate(
    calibration: Calibration,
    budgets: Sequence[float],
    method: str = "auto",
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    relative: bool | None = None,
    center: bool | None = None,
    step: float = 0.05,
    tokens: int = 512,
    progress: bool = True,
) -> list[Thresholds]:
    """`Calibration.allocate`, which explains the arguments, for several budgets: what they share is done once."""
    if not (0 < step <= 1 and tokens > 0):
        raise ValueError(f"step={step} and tokens={tokens}; expected a step above 0 and up to 1, and some tokens")
    budgets = [check_sparsity(budget) for budget in budgets]
    check_method(method)
    if (model is None) != (batches is None):
        raise ValueError("model= and batches= go together: pass both or neither")
    if model is None or batches is None:
        if method in ("greedy", "sensitivity"):
            raise ValueError(f"method {method!r} runs the model: pass model= and batches= as well")
        if relative or center:
            raise ValueError("relative= and center= are fitted on the model: pass model= and batches= as well")
        reason = "auto: uniform, as there was neither model= nor batches= to compare with" if method == "auto" else ""
        return [
            _thresholds(
                calibration,
                budget,
                _uniform(calibration, budget),
                {name: Rule(site.threshold(budget)) for name, site in calibration.sites.items()},
                {name: round(site.sparsity(site.threshold(budget)), 4) for name, site in calibration.sites.items()},
                reason=reason,
            )
            for budget in budgets
        ]
    prepare(calibration, model, method)
    batches = taken(batches)
    if method == "auto":
        from deadband.auto import allocate_auto

        return allocate_auto(calibration, budgets, model, batches, relative=relative, center=center, progress=progress)
    if method == "sensitivity":
        from deadband.sensitivity import measure_sensitivity

        measured = measure_sensitivity(model, batches, list(calibration.sites), progress=progress)
        return [
            allocate_sensitivity(
                calibration, measured, budget, model, batches, relative=relative, center=center, progress=progress
            )
            for budget in budgets
        ]
    if method == "greedy":
        from deadband.greedy import greedy_shares

        shares = greedy_shares(calibration, budgets, model, batches, step, tokens, progress)
    else:
        shares = [_uniform(calibration, budget) for budget in budgets]
    form = {"relative": bool(relative), "center": bool(center), "progress": progress}
    return [
        allocate_shares(calibration, budget, share, model, batches, method=method, **form)
        for budget, share in zip(budgets, shares, strict=True)
    ]


def allocate_shares(
    calibration: Calibration,
    budget: float,
    share: dict[str, float],
    model: nn.Module,
    batches: Sequence[Any],
    *,
    method: str,
    relative: bool,
    center: bool,
    progress: bool,
) -> Thresholds:
    """Thresholds of the calibration's criterion that give each site its share of a budget."""
    scales = {name: scale_of(calibration.criterion, matrix_of(model.get_submodule(name))) for name in share}
    rules = {
        name: Rule(0.0 if relative else site.threshold(share[name]), scales[name], relative=relative)
        for name, site in calibration.sites.items()
    }
    fitted = Fitted(rules)
    if budget > 0:
        fitted = fit(model, batches, rules, share, center=center, progress=progress)
    return _thresholds(calibration, budget, share, *fitted, method=method, corrected=True)


def check_method(method: str) -> str:
    """Return `method`, or raise a ValueError that lists the known ones."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; expected one of {', '.join(map(repr, METHODS))}")
    return method


def prepare(calibration: Calibration, model: nn.Module, method: str) -> None:
    """Raise a ValueError unless `model` is the dense model that was calibrated, and the method known."""
    check_method(method)
    check_model(model, *identity_of(calibration))
    if any(isinstance(module, SparseSite) for module in model.modules()):
        raise ValueError("the model is sparse already; densify_ it, then allocate on the dense model")


def allocate_sensitivity(
    calibration: Calibration,
    measured: Mapping[str, SiteSensitivity],
    budget: float,
    model: nn.Module,
    batches: Sequence[Any],
    *,
    relative: bool | None,
    center: bool | None,
    progress: bool,
    scaled: bool = True,
) -> Thresholds:
    """One budget of method `sensitivity`, from what `measure_sensitivity` returned.

    Without `scaled`, scores are plain magnitudes: only the shares and the forms come from the sensitivities.
    """
    from deadband.sensitivity import sensitivity_shares

    weights = {name: site.weight_bytes for name, site in calibration.sites.items()}
    share, rules, harm = sensitivity_shares(measured, weights, budget, relative)
    if not scaled:
        rules = {name: Rule(0.0, relative=rule.relative) for name, rule in rules.items()}
    fitted = Fitted(rules)
    if budget > 0:
        fitted = fit(model, batches, rules, share, center=center is not False, progress=progress)
    about = _thresholds(calibration, budget, share, *fitted, method="sensitivity", corrected=True)
    return dataclasses.replace(about, harm=harm, criterion="sensitivity" if scaled else "magnitude")


class Fitted(NamedTuple):
    """What `fit` returns; `expected` and `site_range` as in `Thresholds`."""

    rules: dict[str, Rule]
    expected: dict[str, float] = {}  # noqa: RUF012  (never changed)
    site_range: dict[str, tuple[float, float]] = {}  # noqa: RUF012


def fit(
    model: nn.Module,
    batches: Sequence[Any],
    rules: Mapping[str, Rule],
    shares: Mapping[str, float],
    *,
    center: bool,
    progress: bool,
) -> Fitted:
    """Rules whose thresholds skip `shares` of what the sites see when all of them are sparse.

    Activations shrink once earlier sites are sparse, so that thresholds from dense activations skip more than asked.

    Args:
        model, batches: the dense model, and calibration data.
        rules: with thresholds for dense activations; zero where these are not known yet.
        shares: sparsity by site.
        center: also give each site a center: the mean of what it skips.
        progress: show progress bars.
    """
    current = dict(rules)
    if any(rule.threshold == 0 and shares[name] > 0 for name, rule in current.items()):
        current = _with_thresholds(
            current, observe_model(model, batches, current, "fit", progress, masked=False), shares
        )
    if center:
        means = skipped_means(model, batches, current, "center", progress)
        current = {name: dataclasses.replace(rule, center=means[name]) for name, rule in current.items()}
    seen, skipped = observe_sparse(model, batches, current, "correct", progress)
    current = _with_thresholds(current, seen, shares)
    expected = {name: round(seen[name].sparsity(rule.threshold), 4) for name, rule in current.items()}
    ranges = {name: range_of(skipped[name], expected[name]) for name in current}
    return Fitted(current, expected, {name: found for name, found in ranges.items() if found is not None})


def _with_thresholds(
    rules: Mapping[str, Rule], seen: Mapping[str, SiteStatistics], shares: Mapping[str, float]
) -> dict[str, Rule]:
    return {
        name: dataclasses.replace(rule, threshold=seen[name].threshold(shares[name])) for name, rule in rules.items()
    }


def _uniform(calibration: Calibration, budget: float) -> dict[str, float]:
    return dict.fromkeys(calibration.sites, budget)


def identity_of(calibration: Calibration) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[float, ...]]]:
    """Shapes and samples of the weights that a calibration belongs to, for `check_model`."""
    shapes = {name: (site.out_features, site.in_features) for name, site in calibration.sites.items()}
    return shapes, {name: site.sample for name, site in calibration.sites.items()}


def _thresholds(
    calibration: Calibration,
    budget: float,
    share: dict[str, float],
    rules: dict[str, Rule],
    expected: dict[str, float] | None = None,
    site_range: dict[str, tuple[float, float]] | None = None,
    **about: Any,
) -> Thresholds:
    shapes, samples = identity_of(calibration)
    criterion = check_criterion(calibration.criterion)
    return Thresholds(
        rules=rules, sparsity=budget, site_sparsity=share, shapes=shapes, samples=samples,
        expected=expected or {}, site_range=site_range or {},
        **{"criterion": criterion, "method": "uniform", **about},
    )  # fmt: skip


def check_sparsity(sparsity: float) -> float:
    """Return a sparsity as a float, or raise a ValueError."""
    if not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity {sparsity} is out of range; expected the fraction to skip, from 0 up to but not 1")
    return float(sparsity)


def check_model(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], samples: Mapping[str, tuple[float, ...]]
) -> None:
    """Raise a ValueError unless `model` has these sites, of these shapes and with about these weights.

    Weights may differ by rounding to another dtype or by a little training, not more.
    """
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        module = modules.get(name)
        if module is None or not is_site(module):
            raise ValueError(f"the calibration is of another model: this {type(model).__name__} has no site {name!r}")
        if shape_of(module) != tuple(shape):
            raise ValueError(
                f"the calibration is of another model: site {name!r} is {shape_of(module)} here and was "
                f"{tuple(shape)} there ([out_features, in_features])"
            )
        here, there = torch.tensor(weight_sample(module)), torch.tensor(samples.get(name, ()))
        if len(here) == len(there) and bool((here - there).norm() > 0.1 * there.norm()):
            raise ValueError(f"the calibration is of another model: site {name!r} has other weights here")
