"""Thresholds: one rule per site, saved as a file, and whether they fit a model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from deadband.calibration.calibration import Calibration
from deadband.files import replacing
from deadband.layers.rule import LARGEST, Rule
from deadband.layers.sites import is_site, shape_of, weight_sample

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
            model meets other data; only if `corrected`, by `deadband.calibration.drift.range_of`.

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


def identity_of(calibration: Calibration) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[float, ...]]]:
    """Shapes and samples of the weights that a calibration belongs to, for `check_model`."""
    shapes = {name: (site.out_features, site.in_features) for name, site in calibration.sites.items()}
    return shapes, {name: site.sample for name, site in calibration.sites.items()}


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
