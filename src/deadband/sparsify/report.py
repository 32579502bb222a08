"""What a sparse model skipped, and whether its inputs are still those of the calibration."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import cast

from torch import Tensor, nn

from deadband.calibration.drift import JUDGED_ROWS
from deadband.layers.scope import scope
from deadband.layers.sites import shape_of, sparse_sites, weight_bytes
from deadband.layers.sparse import SparseSite, new_counts


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Callable[[], SparsityReport]]:
    """What the thread or task in the block skips, counted apart; the model's own counters get it in the end.

    Yields:
        A function that returns the `SparsityReport` of the block so far.

    Raises:
        ValueError: the model is not sparse, or was made so with `count=False`.

    Example:
        >>> model = deadband.sparsify_(nn.Sequential(nn.Linear(4, 4)).eval(), {"0": 1.0})
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
            like the calibration's (`deadband.calibration.drift.range_of` tells how wide it is). A site is judged once
            it has seen 64 rows, and if its thresholds come from activations of the sparse model
            (`Thresholds.corrected`).
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
        >>> model = deadband.sparsify_(nn.Sequential(nn.Linear(4, 4)).eval(), {"0": 1.0})
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
    modules = require_sparse(model)
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


def number_of_layers(count: int) -> str:
    """In words."""
    return f"{count} layer{'s' if count > 1 else ''}"


def _sites(count: int) -> str:
    return f"{count} site{'s' if count > 1 else ''}"


def require_sparse(model: nn.Module) -> dict[str, SparseSite]:
    """The sparse layers by name; a ValueError if there is none."""
    modules = sparse_sites(model)
    if not modules:
        raise ValueError(f"no layer of this {type(model).__name__} is sparse; make it sparse with deadband.sparsify_")
    return modules
