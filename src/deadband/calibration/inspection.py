"""inspect(): the natural sparsity of a model, before anything is done to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from deadband.calibration.site_statistics import SiteStatistics, require_numbers
from deadband.calibration.watcher import InputWatcher, check_unreached
from deadband.files import finite
from deadband.layers.experts import module_at
from deadband.layers.gated import closing_mlps
from deadband.layers.sites import Patterns, find_sites
from deadband.ops.observe import Statistics, observe

NEARLY_DEAD = 1e-3
"""A channel is nearly dead if its root mean square is below so many times the median of the site's live channels."""
MASSIVE = 20.0
"""And massive if it is above so many times that."""
WORTHWHILE = 0.05
"""From this exact sparsity on, `exact=True` is what a model's summary advises."""
_CHUNK = 1 << 16  # entries that are float64 at a time: they stay in a core's cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteInspection:
    """What one site's input looks like. Values are taken as float32, in which the library compares them.

    Attributes:
        rows: rows (tokens) seen.
        in_features, out_features, weight_bytes: of the site's layer.
        zeros: fraction of all entries that are exactly zero.
        kurtosis: of all finite entries, fourth central moment over squared variance: 3 for a normal distribution, more
            for heavier tails; NaN if all are the same.
        top_energy: share of the sum of squares that the largest 1 % of the magnitudes carry, right to 0.005.
        bottom_energy: share of the sum of squares that is lost if the smallest 50 % are dropped, right to 0.005 and to
            1.6 % of itself. Both are NaN if all entries are zero.
        dead: channels that were zero in every row.
        nearly_dead: others whose root mean square is below `NEARLY_DEAD` times the median of the channels not dead.
        always_on: channels that were never exactly zero.
        massive: channels whose root mean square is above `MASSIVE` times that median.
        nonfinite: entries that were NaN or infinite. They count as not zero, and in no moment.
        closed: fraction of the layer's outputs that meet a gate that is exactly zero, so that they need not be
            computed: of the up-projections of gated MLPs whose gates close by nature.

    Example:
        >>> site = inspect(nn.Linear(2, 1), [torch.tensor([[0.0, 2.0], [0.0, -1.0]])], progress=False).sites[""]
        >>> site.rows, site.zeros, site.dead, site.always_on
        (2, 0.5, 1, 1)
    """

    rows: int
    in_features: int
    out_features: int
    weight_bytes: int
    zeros: float
    kurtosis: float
    top_energy: float
    bottom_energy: float
    dead: int
    nearly_dead: int
    always_on: int
    massive: int
    nonfinite: int
    closed: float = 0.0

    @property
    def exact_sparsity(self) -> float:
        """The fraction of the layer's weight bytes that `sparsify_(exact=True)` does not read for such data."""
        return self.closed or self.zeros


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found: `sites` by name, and what follows for the model. Prints as a table, with a summary first.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> inspection = inspect(model, [torch.randn(8, 4)], progress=False)
        >>> list(inspection.sites), inspection.sites["0"].zeros
        (['0', '2'], 0.0)
    """

    sites: dict[str, SiteInspection]

    @property
    def exact_sparsity(self) -> float:
        """The fraction of the sites' weight bytes that `sparsify_(exact=True)` skips on such data, without loss."""
        return self.skipped_bytes / self.weight_bytes if self.weight_bytes else math.nan

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a token reads at the sites, all of them but those of experts that it is not sent to."""
        return sum(site.weight_bytes for site in self.sites.values())

    @property
    def skipped_bytes(self) -> float:
        """Those that `sparsify_(exact=True)` does not read for such data."""
        return sum(site.exact_sparsity * site.weight_bytes for site in self.sites.values())

    @property
    def advice(self) -> str:
        """What to do with the model, in one line."""
        exact = self.exact_sparsity
        if exact >= WORTHWHILE:
            return f"ReLU-type: sparsify_(model, exact=True) skips {exact:.0%} of the weight bytes for free"
        if exact >= 0.001:
            return f"few natural zeros: exact=True skips only {exact:.1%}; calibrate and allocate"
        return "no natural zeros: calibrate and allocate"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `exact_sparsity`, `advice` and the figures of each of `sites`; None for NaN."""
        sites = {name: dataclasses.asdict(site) for name, site in self.sites.items()}
        totals = {"exact_sparsity": self.exact_sparsity, "weight_bytes": self.weight_bytes}
        return finite({**totals, "skipped_bytes": self.skipped_bytes, "advice": self.advice, "sites": sites})

    def __str__(self) -> str:
        sites = self.sites.values()
        lines = [
            f"{self.exact_sparsity:.1%} of the weight bytes of {len(self.sites)} sites meet exact zeros: "
            f"{self.skipped_bytes / 1e6:,.1f} MB of the {self.weight_bytes / 1e6:,.1f} MB that a token reads there",
            self.advice,
        ]
        closed = [site.closed for site in sites if site.closed]
        if closed:
            lines.append(
                f"{len(closed)} up-projections meet gates of which {sum(closed) / len(closed):.0%} are closed: there "
                "neither up nor down has to be read"
            )
        for what, counts in (
            ("channels were zero in every row", [site.dead for site in sites]),
            (f"channels are massive (above {MASSIVE:g} times the median)", [site.massive for site in sites]),
            ("entries were NaN or infinite", [site.nonfinite for site in sites]),
        ):
            if any(counts):
                lines.append(f"{sum(counts):,} {what}, at {sum(map(bool, counts))} sites")
        lines += [
            "",
            "zeros: of all entries; kurtosis: 3 if normal; energy (sum of squares) in the largest 1 % and the smallest",
            "50 % of the entries; channels: in all, dead, nearly dead, always on (never zero), massive",
            "",
            f"{'zeros':>7} {'kurtosis':>9} {'top 1%':>7} {'low 50%':>7} {'in':>6} {'dead':>6} {'nearly':>6} {'on':>6} "
            f"{'massive':>7} {'nonfinite':>9} {'rows':>9}  site",
        ]
        for name, site in self.sites.items():
            lines.append(
                f"{site.zeros:7.1%} {site.kurtosis:9.4g} {site.top_energy:7.1%} {site.bottom_energy:7.2%} "
                f"{site.in_features:6} {site.dead:6} {site.nearly_dead:6} {site.always_on:6} {site.massive:7} "
                f"{site.nonfinite:9} {site.rows:9}  {name}"
            )
        return "\n".join(lines)

    __repr__ = __str__


def inspect(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    unreached: str = "error",
    progress: bool = True,
) -> Inspection:
    """Run data through a model and report how sparse the input of each site is by nature.

    One pass, in eval mode and without gradients; nothing in the model changes. Memory does not depend on the number of
    tokens. Without padding, `exact_sparsity` is what `deadband.sparsity` reports for the same batches after
    `sparsify_(model, exact=True)`, in `sparse_prefill`. Padding is left out as in `deadband.calibrate`.

    Args:
        model: any module, on any device.
        batches: each is a tensor, a mapping (keyword arguments, as tokenizers return) or a tuple (positional ones).
        include, exclude: choose sites; see `deadband.layers.sites.find_sites`.
        unreached: "error" names the sites that these batches never reach, "dense" leaves them out.
        progress: show a progress bar on a terminal.

    Returns:
        An `Inspection`.

    Raises:
        ValueError: no batch, no site, a pattern without a match, or a site that was never reached or saw no number.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.eye(2)), model[0].bias.zero_()
        >>> inspect(model, [torch.tensor([[1.0, -1.0], [2.0, -3.0]])], progress=False).exact_sparsity
        0.25
    """
    check_unreached(unreached)
    names = list(find_sites(model, include, exclude))
    inspector = _Inspector({name: _Totals(module_at(model, name)) for name in names})
    inspector.watch(model, batches, names, "inspect", progress)
    reached = require_numbers({name: totals.statistics for name, totals in inspector.totals.items()}, unreached)
    found = {name: inspector.totals[name].result() for name in reached}
    for _, up, down in closing_mlps(model):
        if up in found and down in found:
            found[up] = dataclasses.replace(found[up], closed=found[down].zeros)
    return Inspection(found)


class _Inspector(InputWatcher):
    """Looks at each input once and adds what it saw to the site's totals."""

    def __init__(self, totals: dict[str, _Totals]) -> None:
        super().__init__()
        self.totals = totals

    def see(self, name: str, x: Tensor) -> None:
        self.totals[name].add(self.look(name, x, _look))


class Moments(NamedTuple):
    """Number, mean, and sums of the second to fourth powers of the deviations from it. Adds up with `merged`.

    Deviations, not plain powers: where the mean is far from zero, sums of powers leave no digit of the kurtosis.

    Example:
        >>> Moments.of(torch.tensor([1.0, 2.0])).merged(Moments.of(torch.tensor([6.0]))).mean
        3.0
    """

    number: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of a float64 or float32 tensor of any shape, without NaN."""
        if not x.numel():
            return cls()
        mean = x.mean()
        deviation = x - mean
        square = deviation * deviation
        sums = torch.stack([mean, square.sum(), (square * deviation).sum(), (square * square).sum()])
        return cls(x.numel(), *sums.tolist())

    def merged(self, other: Moments) -> Moments:
        """Of both together (Pébay 2008, SAND2008-6212)."""
        a, b = self.number, other.number
        if not a or not b:
            return other if not a else self
        n, d = a + b, other.mean - self.mean
        return Moments(
            n,
            self.mean + d * b / n,
            self.second + other.second + d**2 * a * b / n,
            self.third
            + other.third
            + d**3 * (a * b * (a - b) / n**2)
            + 3 * d * (a * other.second - b * self.second) / n,
            self.fourth
            + other.fourth
            + d**4 * (a * b * (a * a - a * b + b * b) / n**3)
            + 6 * d**2 * (a * a * other.second + b * b * self.second) / n**2
            + 4 * d * (a * other.third - b * self.third) / n,
        )

    @property
    def kurtosis(self) -> float:
        """Fourth central moment over squared variance; NaN where nothing varies."""
        variance = self.second / max(self.number, 1)
        if math.sqrt(variance) <= 1e-14 * abs(self.mean):  # what the rounding of the mean leaves of a constant
            return math.nan
        return self.fourth / self.number / variance**2


class _Seen(NamedTuple):
    """What one input holds."""

    rows: int
    zeros: np.ndarray  # [in_features] int64: rows in which the channel is zero
    moments: Moments
    statistics: Statistics
    discrete: bool


def _look(x: Tensor) -> _Seen:  # x: [rows, in_features]
    discrete = x.dtype == torch.bfloat16
    if x.dtype == torch.float64:
        x = x.float()  # as scores are: what rounds to zero is skipped
    statistics = observe(x)
    zeros = x.shape[0] - torch.count_nonzero(x, 0).cpu().numpy()
    finite_only = int(statistics[1].sum()) == x.numel()
    chunk = _CHUNK if x.device.type == "cpu" else 64 * _CHUNK
    moments = Moments()
    for part in x.split(max(chunk // max(x.shape[1], 1), 1)):
        part = part if finite_only else part[part.isfinite()]
        moments = moments.merged(Moments.of(part.double() if part.device.type != "mps" else part.cpu().double()))
    return _Seen(x.shape[0], zeros, moments, statistics, discrete)


class _Totals:
    """What a site has seen so far."""

    def __init__(self, module: nn.Module) -> None:
        self.statistics = SiteStatistics.empty(module)
        self.rows = 0
        self.zeros = np.zeros(self.statistics.in_features, np.int64)
        self.moments = Moments()

    def add(self, seen: _Seen) -> None:
        self.statistics.add(seen.statistics, seen.discrete)
        self.rows += seen.rows
        self.zeros += seen.zeros
        self.moments = self.moments.merged(seen.moments)

    def result(self) -> SiteInspection:
        statistics = self.statistics
        rms = np.sqrt(statistics.sum_of_squares / np.maximum(statistics.rows, 1))
        dead = self.zeros == self.rows
        live = rms[rms > 0]
        median = float(np.median(live)) if len(live) else 0.0
        return SiteInspection(
            rows=self.rows,
            in_features=statistics.in_features,
            out_features=statistics.out_features,
            weight_bytes=statistics.weight_bytes,
            zeros=int(self.zeros.sum()) / (self.rows * statistics.in_features),
            kurtosis=self.moments.kurtosis,
            top_energy=1 - statistics.energy_below(0.99),
            bottom_energy=statistics.energy_below(0.5),
            dead=int(dead.sum()),
            nearly_dead=int((~dead & (statistics.rows > 0) & (rms < NEARLY_DEAD * median)).sum()),
            always_on=int((self.zeros == 0).sum()),
            massive=int((rms > MASSIVE * median).sum()),
            nonfinite=statistics.nonfinite,
        )
