"""What a site sees: statistics of its input, gathered by hooks, and masks on it, put there by hooks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadband.criterion import keep_mask, scale_of
from deadband.hooks import apply_mask, attach, detach, take_input, with_input
from deadband.ops.observe import FIRST_NONFINITE, Statistics, observe
from deadband.running import evaluating, progress_bar, run
from deadband.sites import matrix_of, weight_bytes, weight_sample

_EDGES = (np.arange(FIRST_NONFINITE + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
_EDGES[-1] = 2.0**128


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
        return cls.of_features(matrix_of(module).shape[1]).of_layer(module)

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
            out_features=matrix_of(module).shape[0],
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
        position = min(int(np.searchsorted(_EDGES, threshold, side="right")) - 1, FIRST_NONFINITE - 1)
        below = int(self.histogram[:position].sum())
        width = _EDGES[position + 1] - _EDGES[position]
        # bin 0 holds exact zeros and what is smaller than any normal number: all of it is at or below zero
        share = 1.0 if self.discrete or position == 0 else (threshold - _EDGES[position]) / width
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
            return float(_EDGES[position])
        share = (target - before) / (after - before)
        return float(_EDGES[position] + share * (_EDGES[position + 1] - _EDGES[position]))

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
    names: list[str],
    criterion: str,
    thresholds: Mapping[str, float] | None,
    what: str,
    progress: bool,
) -> dict[str, SiteStatistics]:
    """Statistics of the named sites over `batches`; with thresholds, of what they see when all of them are sparse.

    Raises:
        ValueError: no batch, or a site that was never reached or saw no number.
    """
    modules = {name: model.get_submodule(name) for name in names}
    sites = {name: SiteStatistics.empty(module) for name, module in modules.items()}
    scales = {name: scale_of(criterion, matrix_of(module)) for name, module in modules.items()}
    observer = _Observer(scales, sites, thresholds)
    count = 0
    with observer.watching(modules), evaluating(model):
        for batch in progress_bar(batches, what, progress):
            count += 1
            observer.begin(batch)
            run(model, batch, use_cache=False, logits_to_keep=1)  # neither is looked at
    if not count:
        raise ValueError("batches is empty; expected at least one batch to calibrate on")
    for name, site in sites.items():
        if not site.entries:
            why = (
                f"saw {site.nonfinite} NaN or infinite entries and no number" if site.nonfinite else "was never reached"
            )
            raise ValueError(f"site {name!r} {why}; leave it out with exclude=, or calibrate on data that reaches it")
    return sites


class _Observer:
    """Accumulates statistics from forward pre-hooks, which with `thresholds` also mask what they have seen."""

    def __init__(
        self,
        scales: dict[str, Tensor | None],
        sites: dict[str, SiteStatistics],
        thresholds: Mapping[str, float] | None,
    ) -> None:
        self.scales, self.sites, self.thresholds = scales, sites, thresholds
        self.keep: Tensor | None = None  # [batch, tokens], False where padded
        self.decoder_keep: Tensor | None = None  # the same for the decoder of an encoder-decoder model
        # q, k and v (gate and up) get the same tensor: it is looked at once. Holding it keeps its identity from reuse.
        self.last: tuple[Tensor, int | None, tuple] | None = None

    def begin(self, batch: Any) -> None:
        self.keep = self.decoder_keep = _padding_mask(batch, "attention_mask")
        if isinstance(batch, Mapping) and "decoder_input_ids" in batch:
            self.decoder_keep = _padding_mask(batch, "decoder_attention_mask")
        self.last = None

    @contextlib.contextmanager
    def watching(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        handles = []
        try:
            for name, module in modules.items():
                handles.append(attach(module, self._hook(name)))
            yield
        finally:
            for handle in handles:
                detach(handle)

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = take_input(name, args, kwargs)
            self._add(name, x)
            if self.thresholds is None:
                return None
            keep = keep_mask(x, self.thresholds[name], self.scales[name])
            return with_input(args, kwargs, apply_mask(x, keep))

        return hook

    def _add(self, name: str, x: Tensor) -> None:
        scale = self.scales[name]
        version = None if x.is_inference() else x._version  # changed in place: not the same input any more
        if scale is None and self.last is not None and self.last[0] is x and self.last[1] == version:
            delta = self.last[2]
        else:
            keep = self.decoder_keep if "decoder" in name.split(".") else self.keep
            delta = observe(_unpadded(x, keep), scale)
            self.last = (x, version, delta) if scale is None and version is not None else None
        self.sites[name].add(delta, scale is None and x.dtype == torch.bfloat16)


def _padding_mask(batch: Any, name: str) -> Tensor | None:
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all() else None


def _unpadded(x: Tensor, keep: Tensor | None) -> Tensor:  # -> [rows, in_features]
    rows = x.reshape(-1, x.shape[-1])
    if keep is not None and (x.shape[:-1] == keep.shape or x.shape[:-1] == (keep.numel(),)):
        return rows[keep.reshape(-1).to(x.device)]
    return rows


@contextlib.contextmanager
def masking(
    sites: Mapping[str, nn.Module], thresholds: Mapping[str, float], scales: Mapping[str, Tensor | None]
) -> Iterator[None]:
    """Inside the block, hooks mask the input of each site: the sparse model, without changing a layer."""
    handles = []

    def hook(name: str) -> Any:
        def mask(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = take_input(name, args, kwargs)
            return with_input(args, kwargs, apply_mask(x, keep_mask(x, thresholds[name], scales[name])))

        return mask

    try:
        for name, module in sites.items():
            if thresholds[name] > 0:
                handles.append(attach(module, hook(name)))
        yield
    finally:
        for handle in handles:
            detach(handle)
