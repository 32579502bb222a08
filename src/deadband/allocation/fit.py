"""Thresholds that meet a budget: fitted to shares, then corrected on the sparse model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from deadband.allocation.sensitivity import SiteSensitivity, sensitivity_shares
from deadband.allocation.thresholds import SiteAllocation, Thresholds, check_model
from deadband.calibration.calibration import Calibration
from deadband.calibration.drift import range_of
from deadband.calibration.site_statistics import SiteStatistics, observe_model, observe_sparse, skipped_means
from deadband.layers.experts import module_at
from deadband.layers.rule import Rule, check_criterion, scale_of
from deadband.layers.sites import matrix_of
from deadband.layers.sparse import SparseSite

METHODS = ("auto", "uniform", "greedy", "sensitivity")


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
    scales = {name: scale_of(calibration.criterion, matrix_of(module_at(model, name))) for name in share}
    rules = {
        name: Rule(0.0 if relative else site.threshold(share[name]), scales[name], relative=relative)
        for name, site in calibration.sites.items()
    }
    fitted = Fitted(rules)
    if budget > 0:
        fitted = fit(model, batches, rules, share, center=center, progress=progress)
    return thresholds_of(calibration, budget, share, fitted, method=method, corrected=True)


def allocate_uniform(calibration: Calibration, budget: float, reason: str = "") -> Thresholds:
    """The same sparsity everywhere, by the calibration alone: without a model, nothing corrects it."""
    rules = {name: Rule(site.threshold(budget)) for name, site in calibration.sites.items()}
    expected = {name: round(site.sparsity(rules[name].threshold), 4) for name, site in calibration.sites.items()}
    return thresholds_of(
        calibration, budget, uniform_shares(calibration, budget), Fitted(rules, expected), reason=reason
    )


def check_method(method: str, joint: bool = False) -> str:
    """Return `method`, or raise a ValueError that lists the known ones, or those that know joint sites."""
    if joint and method in METHODS and method not in ("auto", "sensitivity"):
        raise ValueError(f"joint= is for the methods 'sensitivity' and 'auto', got method {method!r}")
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; expected one of {', '.join(map(repr, METHODS))}")
    return method


def prepare(calibration: Calibration, model: nn.Module, method: str) -> None:
    """Raise a ValueError unless `model` is the dense model that was calibrated, and the method known."""
    check_method(method)
    check_model(model, calibration.sites)
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
    joint: bool = False,
) -> Thresholds:
    """One budget of method `sensitivity`, from what `measure_sensitivity` returned.

    Without `scaled`, scores are plain magnitudes: only the shares and the forms come from the sensitivities. With
    `joint`, up-projections may skip by their gate.
    """
    weights = {name: site.weight_bytes for name, site in calibration.sites.items()}
    share, rules, harm = sensitivity_shares(measured, weights, budget, relative, joint)
    if not scaled:
        rules = {name: Rule(0.0, relative=rule.relative) for name, rule in rules.items()}
    fitted = Fitted(rules)
    if budget > 0:
        fitted = fit(model, batches, rules, share, center=center is not False, progress=progress)
    criterion = "sensitivity" if scaled else "magnitude"
    return thresholds_of(
        calibration, budget, share, fitted, harm, method="sensitivity", corrected=True, criterion=criterion
    )


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
        current = {
            name: rule if rule.gate else dataclasses.replace(rule, center=means[name]) for name, rule in current.items()
        }
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


def uniform_shares(calibration: Calibration, budget: float) -> dict[str, float]:
    """The same share of the budget for every site."""
    return dict.fromkeys(calibration.sites, budget)


def thresholds_of(
    calibration: Calibration,
    budget: float,
    shares: Mapping[str, float],
    fitted: Fitted,
    harm: Mapping[str, float] | None = None,
    **about: Any,
) -> Thresholds:
    """`Thresholds` of rules that were fitted to a budget."""
    sites = {
        name: SiteAllocation(
            rule=rule,
            share=shares[name],
            shape=calibration.sites[name].shape,
            sample=calibration.sites[name].sample,
            harm=(harm or {}).get(name),
            expected=fitted.expected.get(name),
            range=fitted.site_range.get(name),
        )
        for name, rule in fitted.rules.items()
    }
    check_criterion(calibration.criterion)
    return Thresholds(sites=sites, sparsity=budget, **{"criterion": calibration.criterion, **about})
