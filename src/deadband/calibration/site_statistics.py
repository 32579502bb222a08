"""What a site sees: statistics of its input, gathered by hooks, and masks on it, put there by hooks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadband.calibration.drift import Spread
from deadband.calibration.watcher import InputWatcher, require_reached, split_rules
from deadband.layers.experts import module_at
from deadband.layers.rule import Rule
from deadband.layers.sites import shape_of, weight_bytes, weight_sample
from deadband.ops.observe import FIRST_NONFINITE, Statistics, observe, observe_on_device
from deadband.ops.skipping import fill

EDGES = (np.arange(FIRST_NONFINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
EDGES[-1] = 2.0**128


@dataclasses.dataclass
class SiteStatistics:
    """What one site's input looked like. Everything adds up, so statistics of the same site merge with `+`.

    Attributes:
        histogram: counts of finite scores, [32640]. A bin holds the scores whose float32 bit patterns share the upper
            16 bits: 128 bins for each power of two, a width of 0.8 % or less, without any range to choose beforehand.
        rows, sum, sum_of_squares: of the finite entries x (not scores) by channel, [in_features], int64 and float64.
        nonfinite: entries that were NaN or infinite; they are in no other figure.
        discrete: every bin holds a single value (scores that are bfloat16 magnitudes), so nothing lies between edges.
        weight_bytes: bytes of the site's weight.
        out_features: of the site's layer.
        sample: some of its weights, to tell a model of the same shapes from the one that was calibrated.
    """

    histogram: np.ndarray
    rows: np.ndarray
    sum: np.ndarray
    sum_of_squares: np.ndarray
    nonfinite: int
    discrete: bool
    weight_bytes: int
    out_features: int
    sample: tuple[float, ...] = ()

    @classmethod
    def empty(cls, module: nn.Module, gate: bool = False) -> SiteStatistics:
        """Statistics of a site before any data; of its gate if asked to."""
        return cls.of_features(shape_of(module)[0 if gate else 1]).of_layer(module)

    @classmethod
    def of_features(cls, in_features: int) -> SiteStatistics:
        """Statistics before any data of an input whose layer is not known yet."""
        return cls(
            histogram=np.zeros(FIRST_NONFINITE, np.int64),
            rows=np.zeros(in_features, np.int64),
            sum=np.zeros(in_features),
            sum_of_squares=np.zeros(in_features),
            nonfinite=0,
            discrete=True,
            weight_bytes=0,
            out_features=0,
        )

    def of_layer(self, module: nn.Module) -> SiteStatistics:
        """The same, as the statistics of the input of `module`."""
        return dataclasses.replace(
            self,
            weight_bytes=weight_bytes(module),
            out_features=shape_of(module)[0],
            sample=weight_sample(module),
        )

    def observe(self, x: Tensor, scale: Tensor | None = None) -> None:
        """Add an input [rows, in_features]; scores are abs(x), times `scale` [in_features] if there is one."""
        self.add(observe(x, scale), scale is None and x.dtype == torch.bfloat16)

    def add(self, delta: Statistics, discrete: bool) -> None:
        """Add what `deadband.ops.observe` returned."""
        histogram, rows, total, squares = delta
        self.histogram += histogram[:FIRST_NONFINITE]
        self.nonfinite += int(histogram[FIRST_NONFINITE:].sum())
        self.rows += rows
        self.sum += total
        self.sum_of_squares += squares
        self.discrete &= discrete

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the site's layer."""
        return self.out_features, self.in_features

    @property
    def in_features(self) -> int:
        """Channels of the site's input."""
        return len(self.sum)

    @property
    def entries(self) -> int:
        """Finite entries counted."""
        return int(self.histogram.sum())

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel, [in_features]."""
        return self.sum / np.maximum(self.rows, 1)

    @property
    def variance(self) -> np.ndarray:
        """Variance of each channel, [in_features]."""
        return np.maximum(self.sum_of_squares / np.maximum(self.rows, 1) - self.mean**2, 0)

    def sparsity(self, threshold: float) -> float:
        """The fraction of entries with a score at or below `threshold`.

        Right to 0.5 % unless many entries share one score and others lie within 0.8 % of it.
        """
        if not self.entries or threshold < 0:
            return 0.0
        position = min(int(np.searchsorted(EDGES, threshold, side="right")) - 1, FIRST_NONFINITE - 1)
        below = int(self.histogram[:position].sum())
        width = EDGES[position + 1] - EDGES[position]
        # bin 0 holds exact zeros and what is smaller than any normal number: all of it is at or below zero
        share = 1.0 if self.discrete or position == 0 else (threshold - EDGES[position]) / width
        return float(below + share * self.histogram[position]) / self.entries

    def threshold(self, sparsity: float) -> float:
        """The threshold that skips `sparsity` of the entries, as nearly as the data allow; 0 if zeros are more."""
        if not self.entries or sparsity <= 0:
            return 0.0
        target = sparsity * self.entries
        cumulative = np.cumsum(self.histogram)
        position = int(np.searchsorted(cumulative, target))  # the bin in which the target is reached
        if position == 0:
            return 0.0
        before, after = cumulative[position - 1], cumulative[position]
        if self.discrete:
            if target - before < after - target:  # stopping short is nearer; before may be reached by an earlier bin
                position = int(np.searchsorted(cumulative, before)) if before else 0
            return float(EDGES[position])
        share = (target - before) / (after - before)
        return float(EDGES[position] + share * (EDGES[position + 1] - EDGES[position]))

    def energy_below(self, fraction: float) -> float:
        """The share of the sum of squared scores that the smallest `fraction` (0 to 1) of the entries carry.

        Right to 0.005, and to 1.6 % of itself, as a bin is 0.8 % wide; exact if `discrete`. NaN without any energy.
        """
        low, high = EDGES[:-1], EDGES[1:]
        square = low**2 if self.discrete else (low**2 + low * high + high**2) / 3  # the mean over a bin
        square[0] = 0.0  # zeros, and what is smaller than any normal number
        energy = np.concatenate([[0.0], np.cumsum(self.histogram * square)])
        if not energy[-1]:
            return math.nan
        count = np.concatenate([[0], np.cumsum(self.histogram)])
        position = int(np.searchsorted(count[1:], fraction * count[-1]))  # the bin in which the fraction is reached
        position = min(position, FIRST_NONFINITE - 1)
        within = fraction * count[-1] - count[position]
        return min(float((energy[position] + within * square[position]) / energy[-1]), 1.0)

    def __add__(self, other: SiteStatistics) -> SiteStatistics:
        if (self.in_features, self.out_features) != (other.in_features, other.out_features):
            raise ValueError(
                f"cannot add statistics of a {self.out_features}x{self.in_features} layer and of a "
                f"{other.out_features}x{other.in_features} one"
            )
        return SiteStatistics(
            self.histogram + other.histogram,
            self.rows + other.rows,
            self.sum + other.sum,
            self.sum_of_squares + other.sum_of_squares,
            self.nonfinite + other.nonfinite,
            self.discrete and other.discrete,
            self.weight_bytes,
            self.out_features,
            self.sample,
        )


def observe_model(
    model: nn.Module,
    batches: Iterable[Any],
    rules: Mapping[str, Rule],
    what: str,
    progress: bool,
    *,
    masked: bool,
    unreached: str = "error",
) -> dict[str, SiteStatistics]:
    """Statistics of the sites that `rules` names: histograms of the scores that each rule compares with its threshold.

    With `masked`, of what the sites see when all of them are sparse by these rules. The moments are of the inputs as
    they are compared: less the center, divided by the norm of a relative rule.

    Raises:
        ValueError: no batch, or a site that saw no number; with `unreached="dense"`, one that was never reached is left
            out instead.
    """
    sites = {name: SiteStatistics.empty(module_at(model, name), rule.gate) for name, rule in rules.items()}
    inputs, gates = split_rules(model, rules)
    _Observer(rules, sites, masked).watch(model, batches, inputs, what, progress, gates)
    return require_numbers(sites, unreached)


def observe_sparse(
    model: nn.Module, batches: Iterable[Any], rules: Mapping[str, Rule], what: str, progress: bool
) -> tuple[dict[str, SiteStatistics], dict[str, list[float]]]:
    """As `observe_model` with `masked`, and what each site skipped of every `JUDGED_ROWS` rows in turn."""
    sites = {name: SiteStatistics.empty(module_at(model, name), rule.gate) for name, rule in rules.items()}
    observer = _Observer(rules, sites, True)
    inputs, gates = split_rules(model, rules)
    observer.watch(model, batches, inputs, what, progress, gates)
    require_numbers(sites)
    return sites, {name: spread.skipped for name, spread in observer.spreads.items()}


def skipped_means(
    model: nn.Module, batches: Iterable[Any], rules: Mapping[str, Rule], what: str, progress: bool
) -> dict[str, Tensor]:
    """Float32 means of the entries of each channel that the rules skip, [in_features] by site, on the sparse model."""
    watcher = _SkippedMeans(rules)
    inputs, gates = split_rules(model, rules)
    watcher.watch(model, batches, inputs, what, progress, gates)
    require_reached(rules, watcher.sums)
    return {name: (total / count.clamp(min=1)).float() for name, (total, count) in watcher.sums.items()}


def require_numbers(sites: Mapping[str, SiteStatistics], unreached: str = "error") -> dict[str, SiteStatistics]:
    """The sites that saw a number. An error names all that were never reached, unless they may be left out, or the
    first that saw nothing but what is not finite."""
    reached = {name: site for name, site in sites.items() if site.entries or site.nonfinite}
    if unreached == "error" or not reached:
        require_reached(sites, reached)
    for name, site in reached.items():
        if not site.entries:
            raise ValueError(
                f"site {name!r} saw {site.nonfinite} NaN or infinite entries and no number; leave it out with "
                "exclude=, or look for broken weights or inputs"
            )
    return reached


class _Observer(InputWatcher):
    """Accumulates statistics, and with `masked` also applies the rules to what it has seen."""

    def __init__(self, rules: Mapping[str, Rule], sites: dict[str, SiteStatistics], masked: bool) -> None:
        super().__init__()
        self.rules, self.sites, self.masked = rules, sites, masked
        self.spreads = {name: Spread() for name in rules}
        self.gathered = dict[str, tuple[list[Tensor], bool]]()  # of sites whose input is on a GPU

    def watch(self, *args: Any, **kwargs: Any) -> None:
        super().watch(*args, **kwargs)
        for name, (sums, discrete) in self.gathered.items():
            histogram, rows, total, squares = (each.cpu().numpy() for each in sums)
            self.sites[name].add((histogram, rows, total, squares), discrete)
        self.gathered.clear()

    def see(self, name: str, x: Tensor) -> Tensor | None:
        rule = self.rules[name]
        plain = rule.scale is None and rule.center is None and not rule.relative
        discrete = plain and x.dtype == torch.bfloat16
        if _stays(x.device):
            found = self.look(name, x, lambda rows: observe_on_device(rule.compared(rows), rule.scale), shared=plain)
            sums, same = self.gathered.get(name) or ([torch.zeros_like(each) for each in found], True)
            for total, own in zip(sums, found, strict=True):
                total += own
            self.gathered[name] = sums, same and discrete
        else:
            delta = self.look(name, x, lambda rows: observe(rule.compared(rows), rule.scale), shared=plain)
            self.sites[name].add(delta, discrete)
        if not self.masked:
            return None
        keep = rule.keep(x)
        self.spreads[name].add(1 - self.rows(name, keep).float().mean(-1))
        return fill(x, keep, rule.center)


def _stays(device: torch.device) -> bool:
    """Whether sums are kept there until all batches were seen. A copy for each call would have the GPU wait."""
    return device.type == "cuda"


class _SkippedMeans(InputWatcher):
    """Accumulates sum and number of the skipped entries of each channel, and applies the rules."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.rules, self.sums = rules, dict[str, tuple[Tensor, Tensor]]()

    def see(self, name: str, x: Tensor) -> Tensor | None:
        rule = self.rules[name]

        def skipped(rows: Tensor) -> tuple[Tensor, Tensor]:
            skip = ~rule.keep(rows)
            return torch.where(skip, rows, 0).sum(0, dtype=torch.float64), skip.sum(0)

        total, count = self.look(name, x, skipped, shared=False)
        before = self.sums.get(name, (0, 0))
        self.sums[name] = (before[0] + total, before[1] + count)
        return rule.apply(x)
