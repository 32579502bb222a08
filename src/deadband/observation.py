"""What a site sees: statistics of its input, gathered by hooks, and masks on it, put there by hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from deadband.batches import Counted, checked
from deadband.criterion import Rule, fill
from deadband.hooks import attach, detach, parts_of_rows, rows_of_parts, take_input, with_input
from deadband.ops.observe import FIRST_NONFINITE, Statistics, observe
from deadband.running import evaluating, progress_bar, run
from deadband.scope import for_here, scope
from deadband.sites import shape_of, weight_bytes, weight_sample

EDGES = (np.arange(FIRST_NONFINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
EDGES[-1] = 2.0**128
Result = TypeVar("Result")


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
    def empty(cls, module: nn.Module) -> SiteStatistics:
        """Statistics of a site before any data."""
        return cls.of_features(shape_of(module)[1]).of_layer(module)

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
    sites = {name: SiteStatistics.empty(model.get_submodule(name)) for name in rules}
    _Observer(rules, sites, masked).watch(model, batches, list(rules), what, progress)
    return require_numbers(sites, unreached)


def observe_sparse(
    model: nn.Module, batches: Iterable[Any], rules: Mapping[str, Rule], what: str, progress: bool
) -> tuple[dict[str, SiteStatistics], dict[str, list[float]]]:
    """As `observe_model` with `masked`, and what each site skipped of every `JUDGED_ROWS` rows in turn."""
    sites = {name: SiteStatistics.empty(model.get_submodule(name)) for name in rules}
    observer = _Observer(rules, sites, True)
    observer.watch(model, batches, list(rules), what, progress)
    require_numbers(sites)
    return sites, {name: spread.skipped for name, spread in observer.spreads.items()}


def range_of(skipped: Sequence[float], expected: float) -> tuple[float, float] | None:
    """Between which sparsities a site stays on data like the calibration's; None if there were too few rows to tell.

    The range is four standard deviations of `skipped` to either side, and at least 0.02: less than that matters neither
    to quality nor to speed. Each of `skipped` is of `JUDGED_ROWS` consecutive tokens, so this holds for the shortest
    window that is judged; longer ones vary less. Extremes would not do: the largest and smallest of a few are too close
    together, and of many they depend on how many there were. The deviation is that of a prediction from so few figures
    (Student's t), thus wider where there are fewer.

    Args:
        skipped: fractions, under thresholds about the final ones.
        expected: the mean that the final thresholds give; the range is moved there.
    """
    count = len(skipped)
    if count < _FEWEST_CHUNKS:
        return None
    mean = statistics.fmean(skipped)
    deviation = statistics.stdev(skipped) * math.sqrt((1 + 1 / count) * (count - 1) / (count - 3))
    spread = mean * (1 - mean)
    if spread > 0:  # fractions near 0 and 1 vary less
        deviation *= expected * (1 - expected) / spread
    margin = max(_DEVIATIONS * deviation, _LEAST_MARGIN)
    return round(max(expected - margin, 0.0), 4), round(min(expected + margin, 1.0), 4)


JUDGED_ROWS = 64
"""Rows (tokens) that a site has to have seen before its sparsity is compared with its range."""
_FEWEST_CHUNKS = 4  # of so many rows, for a standard deviation
_DEVIATIONS = 4.0
_LEAST_MARGIN = 0.02


class _Spread:
    """The fraction skipped of every `JUDGED_ROWS` rows in turn, across calls."""

    def __init__(self) -> None:
        self.skipped: list[float] = []
        self.rest = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Add the fraction skipped of each row, [rows]."""
        rows = torch.cat([self.rest, rows.float().cpu()])
        whole = len(rows) // JUDGED_ROWS * JUDGED_ROWS
        self.skipped += rows[:whole].view(-1, JUDGED_ROWS).mean(1).tolist()
        self.rest = rows[whole:]


def skipped_means(
    model: nn.Module, batches: Iterable[Any], rules: Mapping[str, Rule], what: str, progress: bool
) -> dict[str, Tensor]:
    """Float32 means of the entries of each channel that the rules skip, [in_features] by site, on the sparse model."""
    watcher = _SkippedMeans(rules)
    watcher.watch(model, batches, list(rules), what, progress)
    require_reached(rules, watcher.sums)
    return {name: (total / count.clamp(min=1)).float() for name, (total, count) in watcher.sums.items()}


class NotReachedError(ValueError):
    """Sites saw nothing of the data, such as experts that no token was sent to.

    Attributes:
        sites: their names, in the order of the model.
    """

    def __init__(self, message: str, sites: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.sites = tuple(sites)


UNREACHED = ("error", "dense")
"""What becomes of sites that no token reached: an error that names them, or they are left dense."""


def check_unreached(choice: str) -> str:
    """Return a choice of `UNREACHED`, or raise a ValueError."""
    if choice not in UNREACHED:
        raise ValueError(f"unreached={choice!r}; expected one of {', '.join(map(repr, UNREACHED))}")
    return choice


def require_reached(names: Iterable[str], reached: Container[str], what: str = "{} {} never reached") -> None:
    """A NotReachedError names all sites that are missing in `reached`; `what` says so of "site 'a'" or "3 sites"."""
    missing = [name for name in names if name not in reached]
    if not missing:
        return
    alone = len(missing) == 1
    found = what.format(f"site {missing[0]!r}" if alone else f"{len(missing)} sites", "was" if alone else "were")
    it, listed = ("it", "") if alone else ("them", ": " + ", ".join(missing))
    raise NotReachedError(
        f"{found}; leave {it} out with exclude= or unreached='dense' in calibrate, or give data that reaches "
        f"{it}{listed}",
        missing,
    )


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


class InputWatcher:
    """One pass of data through a model that gives each site's input to `see`, from forward pre-hooks."""

    def __init__(self) -> None:
        self.counted = Counted()  # of the batch that is run
        self.encoded: Tensor | None = None  # what the encoder of an encoder-decoder model returned
        # q, k and v (gate and up) get the same tensor: it is looked at once. Holding it keeps its identity from reuse.
        self.last: tuple[Tensor, int | None, Any] | None = None

    def see(self, name: str, x: Tensor) -> Tensor | None:
        """What to do with the input [..., in_features] of one call of a site; returns what the site gets instead."""
        raise NotImplementedError

    def rows(self, name: str, x: Tensor) -> Tensor:
        """The unpadded rows [rows, in_features] of what a site sees, or of anything of that shape."""
        encoded = self.encoded is not None and _same(x, self.encoded)  # keys and values of cross-attention
        return self.counted.rows(name, x, encoded=encoded)

    def step(self, model: nn.Module, batch: Any) -> None:
        """Run one batch, without gradients."""
        run(model, batch, use_cache=False, logits_to_keep=1)  # neither is looked at

    def look(self, name: str, x: Tensor, function: Callable[[Tensor], Result], *, shared: bool = True) -> Result:
        """`function` of the unpadded rows [rows, in_features] of `x`.

        With `shared`, a call with the tensor of the call before gives the result of then.
        """
        version = None if x.is_inference() else x._version  # changed in place: not the same input any more
        if shared and self.last is not None and self.last[0] is x and self.last[1] == version:
            return self.last[2]
        result = function(self.rows(name, x))
        self.last = (x, version, result) if shared and version is not None else None
        return result

    def watch(self, model: nn.Module, batches: Iterable[Any], names: list[str], what: str, progress: bool) -> None:
        """Run all batches in eval mode, without gradients, with hooks on the named sites; `what` labels the progress.

        Raises:
            ValueError: no batch.
        """
        modules = {name: model.get_submodule(name) for name in names}
        given = checked(batches)
        with self._watching(modules, encoders_of(model)), evaluating(model):
            for batch in progress_bar(given, what, progress, total=operator.length_hint(batches) or None):
                self.counted, self.encoded, self.last = Counted.of(model, batch), None, None
                self.step(model, batch)
        self.encoded = self.last = None

    @contextlib.contextmanager
    def _watching(self, modules: Mapping[str, nn.Module], encoders: Iterable[nn.Module]) -> Iterator[None]:
        handles, others = [], []
        with scope():
            try:
                for name, module in modules.items():
                    handles.append(attach(module, for_here(self._hook(name))))
                for encoder in encoders:
                    others.append(encoder.register_forward_hook(for_here(self._remember)))
                yield
            finally:
                for handle in handles:
                    detach(handle)
                for other in others:
                    other.remove()

    def _remember(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.encoded = first_tensor(output)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = take_input(name, args, kwargs)
            instead = self.see(name, rows_of_parts(x))
            return None if instead is None else with_input(args, kwargs, parts_of_rows(instead, x))

        return hook


class _Observer(InputWatcher):
    """Accumulates statistics, and with `masked` also applies the rules to what it has seen."""

    def __init__(self, rules: Mapping[str, Rule], sites: dict[str, SiteStatistics], masked: bool) -> None:
        super().__init__()
        self.rules, self.sites, self.masked = rules, sites, masked
        self.spreads = {name: _Spread() for name in rules}

    def see(self, name: str, x: Tensor) -> Tensor | None:
        rule = self.rules[name]
        plain = rule.scale is None and rule.center is None and not rule.relative
        delta = self.look(name, x, lambda rows: observe(rule.compared(rows), rule.scale), shared=plain)
        self.sites[name].add(delta, plain and x.dtype == torch.bfloat16)
        if not self.masked:
            return None
        keep = rule.keep(x)
        self.spreads[name].add(1 - self.rows(name, keep).float().mean(-1))
        return fill(x, keep, rule.center)


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


def encoders_of(model: nn.Module) -> list[nn.Module]:
    """The encoders whose output a decoder gets: modules of that name outside of any decoder, or of another encoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return []
    paths = {name: name.split(".") for name, _ in model.named_modules()}
    found = [
        name for name, path in paths.items() if path[-1] == "encoder" and not {"encoder", "decoder"} & set(path[:-1])
    ]
    return [model.get_submodule(name) for name in found]


def first_tensor(output: Any) -> Tensor:
    """The first tensor in what a module returned."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def _same(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape)


@contextlib.contextmanager
def masking(sites: Mapping[str, nn.Module], rules: Mapping[str, Rule]) -> Iterator[None]:
    """Inside the block, hooks apply the rules to the input of each site: the sparse model, without changing a layer."""
    handles = []

    def hook(name: str) -> Any:
        def mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = take_input(name, args, kwargs)
            return with_input(args, kwargs, parts_of_rows(rules[name].apply(rows_of_parts(x)), x))

        return mask

    with scope():
        try:
            for name, module in sites.items():
                if rules[name].threshold > 0:
                    handles.append(attach(module, for_here(hook(name))))
            yield
        finally:
            for handle in handles:
                detach(handle)
