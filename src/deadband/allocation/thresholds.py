"""Thresholds: one rule per site, saved as a file, and whether they fit a model."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn

from deadband.layers.experts import with_projections
from deadband.layers.rule import LARGEST, Rule
from deadband.layers.sites import is_site, shape_of, weight_sample
from deadband.tensor_files import read_tensors, write_tensors

VERSION = 2
_KEY = "deadband.thresholds"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteAllocation:
    """What one site was given, and the layer that it was given to.

    Attributes:
        rule: the threshold, and what it is compared with.
        share: the sparsity that it was given of the model's budget.
        shape: (out_features, in_features), and
        sample: some of its weights, to tell a model that the rule does not belong to.
        harm: the loss (in nats a token) that it is estimated to cause; None where the method estimates none.
        expected: what it skipped of the calibration data; more than its share where zeros alone are more.
        range: between which sparsities it stays on data like that, by `deadband.calibration.drift.range_of`; only if
            thresholds come from the sparse model.
    """

    rule: Rule
    share: float
    shape: tuple[int, int]
    sample: tuple[float, ...] = ()
    harm: float | None = None
    expected: float | None = None
    range: tuple[float, float] | None = None

    def check(self) -> None:
        """Raise a ValueError where it holds something else than that."""
        numbers = (self.share, *(each for each in (self.harm, self.expected) if each is not None))
        if not all(map(_is_number, (*numbers, *self.shape, *self.sample, *(self.range or ())))):
            raise ValueError("a sparsity, a harm, a shape, a sample or a range holds what is no number")
        if len(self.shape) != 2 or (self.range is not None and len(self.range) != 2):
            raise ValueError("the shape or the range is not of two numbers")
        if not _is_number(self.rule.threshold) or not 0 <= self.rule.threshold <= LARGEST:
            raise ValueError(f"threshold {self.rule.threshold!r} is not finite, negative, or does not fit float32")
        for what in ("relative", "gate"):
            if type(getattr(self.rule, what)) is not bool:
                raise ValueError(f"{what}={getattr(self.rule, what)!r} is no bool")
        entries = self.shape[0 if self.rule.gate else 1]
        for part in _parts(self.rule):
            tensor = getattr(self.rule, part)
            if tensor.dtype != torch.float32 or tensor.shape != (entries,) or not bool(tensor.isfinite().all()):
                raise ValueError(f"the {part} is no vector of {entries} finite float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds(Mapping[str, Rule]):
    """One rule per site, as `deadband.allocate` gives them: a mapping to rules, with what it was made for.

    Attributes:
        sites: a `SiteAllocation` by site name.
        sparsity: model-wide sparsity asked for (or found for a quality asked for), weighted by weight bytes.
        criterion, method: how scores are taken, and how the budget was shared out.
        corrected: whether thresholds come from activations of the sparse model.
        reason: why `auto` picked what it picked, else empty.

    `rules`, `site_sparsity`, `harm`, `expected` and `site_range` are one part of all sites by name, where it is known.

    Example:
        >>> from deadband import Rule
        >>> thresholds = Thresholds(sites={"fc": SiteAllocation(rule=Rule(0.5), share=0.4, shape=(2, 4))}, sparsity=0.4)
        >>> thresholds["fc"].threshold
        0.5
    """

    sites: dict[str, SiteAllocation]
    sparsity: float
    criterion: str = "magnitude"
    method: str = "uniform"
    corrected: bool = False
    reason: str = ""

    def __getitem__(self, site: str) -> Rule:
        return self.sites[site].rule

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def rules(self) -> dict[str, Rule]:
        """The rules by site."""
        return {name: site.rule for name, site in self.sites.items()}

    @property
    def site_sparsity(self) -> dict[str, float]:
        """The share of the budget that each site was given."""
        return {name: site.share for name, site in self.sites.items()}

    @property
    def harm(self) -> dict[str, float]:
        """The loss that each site is estimated to cause, in nats a token."""
        return {name: site.harm for name, site in self.sites.items() if site.harm is not None}

    @property
    def expected(self) -> dict[str, float]:
        """What each site skipped of the calibration data."""
        return {name: site.expected for name, site in self.sites.items() if site.expected is not None}

    @property
    def site_range(self) -> dict[str, tuple[float, float]]:
        """Between which sparsities each site stays on data like the calibration's."""
        return {name: site.range for name, site in self.sites.items() if site.range is not None}

    def __str__(self) -> str:
        pass_ = ", corrected on the sparse model" if self.corrected else ""
        head = f"{self.sparsity:.0%} of the weight bytes over {len(self)} sites, {self.method}, {self.criterion}{pass_}"
        lines = [f"{site.share:7.1%} {site.rule}  {name}" for name, site in self.sites.items()]
        return "\n".join([head, *([self.reason] if self.reason else []), *lines])

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file."""
        about = {
            "version": VERSION,
            "sparsity": self.sparsity,
            "site_sparsity": self.site_sparsity,
            "shapes": {name: site.shape for name, site in self.sites.items()},
            "samples": {name: site.sample for name, site in self.sites.items()},
            "harm": self.harm,
            "expected": self.expected,
            "site_range": self.site_range,
            "criterion": self.criterion,
            "method": self.method,
            "corrected": self.corrected,
            "reason": self.reason,
            "rules": {
                name: {
                    "threshold": rule.threshold,
                    "relative": rule.relative,
                    **({"gate": True} if rule.gate else {}),
                    "parts": _parts(rule),
                }
                for name, rule in self.rules.items()
            },
        }
        tensors = {
            f"{name}.{part}": getattr(rule, part).cpu().clone()  # q, k and v may share one
            for name, rule in self.rules.items()
            for part in _parts(rule)
        }
        write_tensors(path, tensors, _KEY, about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Thresholds:
        """Read what `save` wrote; a ValueError says so if it is something else."""
        what = "a file of thresholds"
        about, tensors = read_tensors(path, _KEY, what, VERSION)
        try:
            return cls._of_file(about, tensors)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not {what} of version {VERSION}: {error}") from None

    @classmethod
    def _of_file(cls, about: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Thresholds:
        """What a file says, looked at before it is believed."""
        rules, shares, shapes = (about.pop(key) for key in ("rules", "site_sparsity", "shapes"))
        if shapes.keys() != rules.keys() or shares.keys() != rules.keys():
            raise ValueError("rules, shapes and site_sparsity are of different sites")
        others = {key: about.pop(key, {}) for key in ("samples", "harm", "expected", "site_range")}
        for what, by_site in others.items():
            if by_site.keys() - rules.keys():
                raise ValueError(f"{what} is of other sites than the rules")
        made = cls(
            sites={
                name: SiteAllocation(
                    rule=_rule(rules[name], name, tensors),
                    share=shares[name],
                    shape=cast(Any, tuple(shapes[name])),
                    sample=tuple(others["samples"].get(name, ())),
                    harm=others["harm"].get(name),
                    expected=others["expected"].get(name),
                    range=cast(Any, tuple(others["site_range"][name])) if name in others["site_range"] else None,
                )
                for name in rules
            },
            **about,
        )
        for what in ("method", "reason", "criterion"):
            if not isinstance(getattr(made, what), str):
                raise ValueError(f"{what} is {getattr(made, what)!r}, expected text")
        if not _is_number(made.sparsity):
            raise ValueError(f"sparsity is {made.sparsity!r}, expected a number")
        check_sparsity(made.sparsity)
        for name, site in made.sites.items():
            try:
                site.check()
            except ValueError as error:
                raise ValueError(f"site {name!r}: {error}") from None
        return made


def _rule(about: Any, name: str, tensors: Mapping[str, torch.Tensor]) -> Rule:
    about = {"gate": False, **about}
    if about.keys() != {"threshold", "relative", "gate", "parts"} or not {*about["parts"]} <= {"scale", "center"}:
        raise ValueError(f"the rule of site {name!r} is {about}")
    parts: dict[str, Any] = {part: tensors[f"{name}.{part}"] for part in about["parts"]}
    return Rule(**parts, **{key: about[key] for key in ("threshold", "relative", "gate")})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _parts(rule: Rule) -> list[str]:
    return [part for part in ("scale", "center") if getattr(rule, part) is not None]


def check_sparsity(sparsity: float) -> float:
    """Return a sparsity as a float, or raise a ValueError."""
    if not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity {sparsity} is out of range; expected the fraction to skip, from 0 up to but not 1")
    return float(sparsity)


class Measured(Protocol):
    """A site that something was measured of: its shape, (out_features, in_features), and a sample of its weights."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    def sample(self) -> tuple[float, ...]:
        """What `deadband.layers.sites.weight_sample` gives."""


def check_model(model: nn.Module, sites: Mapping[str, Measured]) -> None:
    """Raise a ValueError unless `model` has these sites, of their shapes and with about their weights.

    Weights may differ by rounding to another dtype or by a little training, not more.
    """
    modules = dict(with_projections(model))
    for name, site in sites.items():
        module = modules.get(name)
        if module is None or not is_site(module):
            raise ValueError(f"the calibration is of another model: this {type(model).__name__} has no site {name!r}")
        if shape_of(module) != site.shape:
            raise ValueError(
                f"the calibration is of another model: site {name!r} is {shape_of(module)} here and was "
                f"{site.shape} there ([out_features, in_features])"
            )
        here, there = torch.tensor(weight_sample(module)), torch.tensor(site.sample)
        if len(here) == len(there) and bool((here - there).norm() > 0.1 * there.norm()):
            raise ValueError(f"the calibration is of another model: site {name!r} has other weights here")
