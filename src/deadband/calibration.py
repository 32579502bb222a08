"""calibrate(): one pass over data, and Calibration: what each site's input looked like."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from deadband.allocation import masked_arguments
from deadband.criterion import check_criterion, scale_of
from deadband.files import replacing
from deadband.ops.observe import FIRST_NONFINITE, observe
from deadband.running import evaluating, progress_bar, run
from deadband.sites import Patterns, find_sites, matrix_of, weight_bytes, weight_sample

if TYPE_CHECKING:
    from deadband.allocation import Thresholds

VERSION = 1
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
        out_features, in_features = matrix_of(module).shape
        return cls(
            histogram=np.zeros(FIRST_NONFINITE, np.int64),
            rows=np.zeros(in_features, np.int64),
            sum=np.zeros(in_features),
            sum_of_squares=np.zeros(in_features),
            nonfinite=0,
            discrete=True,
            weight_bytes=weight_bytes(module),
            out_features=out_features,
            sample=weight_sample(module),
        )

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


@dataclasses.dataclass
class Calibration:
    """Statistics of every site of a model under one criterion. Save, load, merge with `+`, print, plot, allocate.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> calibration = calibrate(model, [torch.randn(256, 4)], progress=False)
        >>> round(calibration.sites["0"].sparsity(calibration.sites["0"].threshold(0.4)), 2)
        0.4
    """

    sites: dict[str, SiteStatistics]
    criterion: str = "magnitude"

    def allocate(
        self,
        sparsity: float,
        method: str = "uniform",
        *,
        model: nn.Module | None = None,
        batches: Iterable[Any] | None = None,
        step: float = 0.05,
        tokens: int = 512,
        progress: bool = True,
    ) -> Thresholds:
        """Share a sparsity budget out over the sites.

        Activations shrink once earlier sites are sparse, so that thresholds taken from dense activations skip more
        than asked. With `model` and `batches`, one more pass, with the sparse model, corrects that: what is achieved
        on such data is then within 1 % of the budget.

        Args:
            sparsity: fraction of the sites' weight bytes to skip, from 0 up to but not 1.
            method: `uniform`: the same sparsity everywhere. `greedy`: TEAL's Algorithm 1 (Liu et al. 2024, arXiv
                2408.14690): in each block, step by step, the site whose next step harms the block's output least
                gives; all blocks give the same. Needs `model` and `batches`. Unlike the paper's, no step moves a site
                by more than 0.1, steps of different bytes are compared by harm per byte, and a site whose harm was far
                from the least a step ago is not tried again each time.
            model: the dense model that was calibrated. Nothing in it changes.
            batches: calibration data, as for `calibrate`.
            step: greedy's step, as a fraction of the block's weight bytes.
            tokens: greedy compares block outputs on the first batches, until they hold so many tokens.
            progress: show progress bars on a terminal.

        Returns:
            `Thresholds`, for `deadband.sparsify_`.

        Raises:
            ValueError: a sparsity out of range, an unknown method, a model that the calibration does not fit or that
                is sparse, `greedy` without a model, or only one of `model` and `batches`.
        """
        from deadband.allocation import allocate

        options: dict[str, Any] = {"step": step, "tokens": tokens, "progress": progress}
        return allocate(self, [sparsity], method, model=model, batches=batches, **options)[0]

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file; histograms are cut to the bins in use."""
        tensors, facts = {}, {}
        for name, site in self.sites.items():
            used = np.flatnonzero(site.histogram)
            first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
            tensors[f"{name}.histogram"] = site.histogram[first:last].copy()
            for key in ("rows", "sum", "sum_of_squares"):
                tensors[f"{name}.{key}"] = getattr(site, key)
            facts[name] = {
                "first_bin": first,
                "nonfinite": site.nonfinite,
                "discrete": site.discrete,
                "weight_bytes": site.weight_bytes,
                "out_features": site.out_features,
                "sample": list(site.sample),
            }
        about = {"version": VERSION, "criterion": self.criterion, "sites": facts}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"deadband.calibration": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a calibration, or of another version.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no calibration file {os.fspath(path)!r}")
        try:
            with safetensors.safe_open(path, "numpy") as file:
                about = json.loads((file.metadata() or {}).get("deadband.calibration", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a calibration file: {error}") from None
        if not isinstance(about, dict) or about.get("version") != VERSION:
            found = about.get("version") if isinstance(about, dict) else "something else"
            raise ValueError(f"{os.fspath(path)!r} is not a calibration of version {VERSION} (found: {found})")
        sites = {}
        try:
            for name, facts in about["sites"].items():
                histogram = np.zeros(FIRST_NONFINITE, np.int64)
                part, first = tensors[f"{name}.histogram"], facts.pop("first_bin")
                histogram[first : first + len(part)] = part
                moments = {key: tensors[f"{name}.{key}"] for key in ("rows", "sum", "sum_of_squares")}
                facts["sample"] = tuple(facts["sample"])
                sites[name] = SiteStatistics(histogram=histogram, **moments, **facts)
            return cls(sites, check_criterion(about["criterion"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is a damaged calibration: {error!r}") from None

    def __add__(self, other: Calibration) -> Calibration:
        if self.criterion != other.criterion:
            raise ValueError(f"cannot add calibrations of criteria {self.criterion!r} and {other.criterion!r}")
        if self.sites.keys() != other.sites.keys():
            different = sorted(self.sites.keys() ^ other.sites.keys())
            raise ValueError(f"cannot add calibrations of different sites; only one has {different[:3]}")
        return Calibration({name: self.sites[name] + other.sites[name] for name in self.sites}, self.criterion)

    def __str__(self) -> str:
        head = f"Calibration of {len(self.sites)} sites, criterion {self.criterion}"
        lines = [head, f"{'zeros':>7} {'t(25%)':>9} {'t(50%)':>9} {'nonfinite':>9}  site"]
        for name, site in self.sites.items():
            low, high = site.threshold(0.25), site.threshold(0.5)
            lines.append(f"{site.sparsity(0.0):7.1%} {low:9.3g} {high:9.3g} {site.nonfinite:9}  {name}")
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Draw the threshold of every site at some sparsities; returns the matplotlib figure, and saves it if asked."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for sparsity in (0.25, 0.4, 0.5, 0.75):
            axes.plot([site.threshold(sparsity) for site in self.sites.values()], ".-", lw=0.5, label=f"{sparsity:.0%}")
        axes.set(
            yscale="symlog" if not _all_positive(axes) else "log", xlabel="site", ylabel=f"threshold ({self.criterion})"
        )
        axes.legend(title="sparsity")
        if path is not None:
            with replacing(path) as temporary:
                figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")
        return figure


def _all_positive(axes: Any) -> bool:
    return all((line.get_ydata() > 0).all() for line in axes.get_lines() if hasattr(line.get_ydata(), "all"))


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    criterion: str = "magnitude",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    progress: bool = True,
) -> Calibration:
    """Run data through a model and record what the input of each site looks like.

    One pass, in eval mode and without gradients; nothing in the model changes. Memory does not depend on the number of
    tokens. Padding is not counted where a batch has an `attention_mask` [batch, tokens] and the site's input begins
    with that shape (or with its product); inside mixtures of experts, which regroup tokens, it is.

    Args:
        model: any module, on any device.
        batches: each is a tensor, a mapping (keyword arguments, as tokenizers return) or a tuple (positional ones).
        criterion: how entries are scored: `magnitude` or `weighted_magnitude`.
        include, exclude: choose sites; see `deadband.sites.find_sites`.
        progress: show a progress bar on a terminal.

    Returns:
        A `Calibration`.

    Raises:
        ValueError: no batch, no site, a pattern without a match, or a site that was never reached or saw no number.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(calibrate(model, [torch.randn(8, 4)], progress=False).sites)
        ['0', '2']
    """
    return observe_model(
        model, batches, list(find_sites(model, include, exclude)), criterion, None, "calibrate", progress
    )


def observe_model(
    model: nn.Module,
    batches: Iterable[Any],
    names: list[str],
    criterion: str,
    thresholds: Mapping[str, float] | None,
    what: str,
    progress: bool,
) -> Calibration:
    """`calibrate` at given sites; with thresholds, what the sites see when every one of them is sparse."""
    check_criterion(criterion)
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
    return Calibration(sites, criterion)


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
                handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._add(name, x)
            if self.thresholds is None:
                return None
            return masked_arguments(args, kwargs, self.thresholds[name], self.scales[name])

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
        histogram, rows, total, squares = delta
        site = self.sites[name]
        site.histogram += histogram[:FIRST_NONFINITE]
        site.nonfinite += int(histogram[FIRST_NONFINITE:].sum())
        site.rows += rows
        site.sum += total
        site.sum_of_squares += squares
        site.discrete &= scale is None and x.dtype == torch.bfloat16


def _padding_mask(batch: Any, name: str) -> Tensor | None:
    mask = batch.get(name) if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all() else None


def _unpadded(x: Tensor, keep: Tensor | None) -> Tensor:  # -> [rows, in_features]
    rows = x.reshape(-1, x.shape[-1])
    if keep is not None and (x.shape[:-1] == keep.shape or x.shape[:-1] == (keep.numel(),)):
        return rows[keep.reshape(-1).to(x.device)]
    return rows
