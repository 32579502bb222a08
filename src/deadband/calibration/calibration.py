"""calibrate(): one pass over data, and Calibration: what each site's input looked like."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deadband.calibration.site_statistics import SiteStatistics, observe_model
from deadband.calibration.watcher import check_unreached, warn_of_idle_experts
from deadband.files import replacing
from deadband.layers.rule import Rule, check_criterion, scale_of
from deadband.layers.sites import Patterns, find_sites, matrix_of
from deadband.ops.observe import FIRST_NONFINITE
from deadband.tensor_files import read_tensors, write_tensors

VERSION = 1

_KEY = "deadband.calibration"


@dataclasses.dataclass
class Calibration:
    """Statistics of every site of a model under one criterion. Save, load, merge with `+`, print, plot, allocate.

    Attributes:
        sites: by name.
        criterion: how entries are scored.
        unreached: names of sites that saw nothing of the data and are left dense.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> calibration = calibrate(model, [torch.randn(256, 4)], progress=False)
        >>> round(calibration.sites["0"].sparsity(calibration.sites["0"].threshold(0.4)), 2)
        0.4
    """

    sites: dict[str, SiteStatistics]
    criterion: str = "magnitude"
    unreached: tuple[str, ...] = ()
    allocate: ClassVar[Callable[..., Any]]
    """`deadband.allocate` with this calibration, as a method: `deadband.allocation` puts it here."""

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
        about = {"version": VERSION, "criterion": self.criterion, "sites": facts, "unreached": list(self.unreached)}
        write_tensors(path, tensors, _KEY, about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a calibration, or of another version.
        """
        about, tensors = read_tensors(path, _KEY, "a calibration", VERSION, "numpy")
        try:
            sites = {name: _loaded(name, facts, tensors) for name, facts in about["sites"].items()}
            unreached = tuple(about.get("unreached", ()))
            if not sites or not all(isinstance(name, str) and name not in sites for name in unreached):
                raise ValueError("no sites, or unreached ones among them")
            return cls(sites, check_criterion(about["criterion"]), unreached)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{os.fspath(path)!r} is a damaged calibration: {error!r}") from None

    def __add__(self, other: Calibration) -> Calibration:
        if self.criterion != other.criterion:
            raise ValueError(f"cannot add calibrations of criteria {self.criterion!r} and {other.criterion!r}")
        mine, others = {*self.sites, *self.unreached}, {*other.sites, *other.unreached}
        if mine != others:
            raise ValueError(f"cannot add calibrations of different sites; only one has {sorted(mine ^ others)[:3]}")
        both = {name: each for name, each in {**self.sites, **other.sites}.items()}
        both |= {name: self.sites[name] + other.sites[name] for name in self.sites.keys() & other.sites.keys()}
        return Calibration(both, self.criterion, tuple(name for name in self.unreached if name not in both))

    def __str__(self) -> str:
        head = f"Calibration of {len(self.sites)} sites, criterion {self.criterion}"
        lines = [head, f"{'zeros':>7} {'t(25%)':>9} {'t(50%)':>9} {'nonfinite':>9}  site"]
        for name, site in self.sites.items():
            low, high = site.threshold(0.25), site.threshold(0.5)
            lines.append(f"{site.sparsity(0.0):7.1%} {low:9.3g} {high:9.3g} {site.nonfinite:9}  {name}")
        if self.unreached:
            lines.append(f"never reached, and left dense: {', '.join(self.unreached)}")
        return "\n".join(lines)

    __repr__ = __str__

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Draw the threshold of every site at some sparsities; returns the matplotlib figure, and saves it if asked."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        sparsities = (0.25, 0.4, 0.5, 0.75)
        curves = np.array([[site.threshold(sparsity) for site in self.sites.values()] for sparsity in sparsities])
        for sparsity, curve in zip(sparsities, curves, strict=True):
            axes.plot(curve, ".-", lw=0.5, label=f"{sparsity:.0%}")
        axes.set(xlabel="site", ylabel=f"threshold ({self.criterion})")
        axes.set_yscale("symlog", linthresh=curves[curves > 0].min(initial=1.0))  # zero thresholds have to show too
        axes.legend(title="sparsity")
        if path is not None:
            with replacing(path) as temporary:
                figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")
        return figure


def _loaded(name: str, facts: Any, tensors: Mapping[str, np.ndarray]) -> SiteStatistics:
    """A site of a file, looked at before it is believed."""
    parts: dict[str, Any] = {key: tensors[f"{name}.{key}"] for key in ("histogram", "rows", "sum", "sum_of_squares")}
    for key, part in parts.items():
        kind = np.int64 if key in ("histogram", "rows") else np.float64
        if part.dtype != kind or part.ndim != 1:
            raise ValueError(
                f"{name}.{key} is {part.dtype} of shape {part.shape}, expected {np.dtype(kind)} of one dimension"
            )
        if not np.isfinite(part).all() or (key != "sum" and (part < 0).any()):
            raise ValueError(f"{name}.{key} has negative counts or squares, or no numbers")
    features = {len(parts[key]) for key in ("rows", "sum", "sum_of_squares")}
    if len(features) != 1 or 0 in features:
        raise ValueError(f"the moments of {name} are of {sorted(features)} channels")
    part, first = parts.pop("histogram"), facts["first_bin"]
    counts = {key: facts[key] for key in ("first_bin", "nonfinite", "weight_bytes", "out_features")}
    if any(type(value) is not int or value < 0 for value in counts.values()) or type(facts["discrete"]) is not bool:
        raise ValueError(f"{name} has {counts} and discrete={facts['discrete']!r}, expected counts and a bool")
    if first + len(part) > FIRST_NONFINITE:
        raise ValueError(f"{name}.histogram has {len(part)} bins from {first} on, expected {FIRST_NONFINITE} in all")
    histogram = np.zeros(FIRST_NONFINITE, np.int64)
    histogram[first : first + len(part)] = part
    about: dict[str, Any] = {key: facts[key] for key in ("nonfinite", "weight_bytes", "out_features", "discrete")}
    return SiteStatistics(histogram, **parts, **about, sample=tuple(map(float, facts["sample"])))


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    criterion: str = "magnitude",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    unreached: str = "error",
    progress: bool = True,
) -> Calibration:
    """Run data through a model and record what the input of each site looks like.

    One pass, in eval mode and without gradients; nothing in the model changes. Memory does not depend on the number of
    tokens. Padding is not counted where a batch has an `attention_mask` [batch, tokens] and the site's input begins
    with that shape (or with its product); inside mixtures of experts, which regroup tokens, it is. The decoder of an
    encoder-decoder model has a `decoder_attention_mask`, or `labels` of -100, for its own tokens.

    Args:
        model: any module, on any device.
        batches: each is a tensor, a mapping (keyword arguments, as tokenizers return) or a tuple (positional ones).
        criterion: how entries are scored: `magnitude` or `weighted_magnitude`.
        include, exclude: choose sites; see `deadband.layers.sites.find_sites`.
        unreached: what becomes of sites that these batches never reach (experts that get no token, the cross-attention
            of a decoder alone, a vision tower beside text): "error" names them all; "dense" leaves them out, so that
            they stay dense, and notes them in `Calibration.unreached`. Fused experts are one site: a warning names
            those of them that no token was sent to, which take the rule of the others.
        progress: show a progress bar on a terminal.

    Returns:
        A `Calibration`.

    Raises:
        TypeError: batches that hold no tensor, such as text: tokenise it first.
        ValueError: no batch, no site, a pattern without a match, or a site that saw no number.
        NotReachedError: a ValueError: sites that were never reached, in its attribute `sites`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(calibrate(model, [torch.randn(8, 4)], progress=False).sites)
        ['0', '2']
    """
    check_criterion(criterion)
    check_unreached(unreached)
    sites = find_sites(model, include, exclude)
    rules = {name: Rule(0.0, scale_of(criterion, matrix_of(module))) for name, module in sites.items()}
    with warn_of_idle_experts(sites):
        seen = observe_model(model, batches, rules, "calibrate", progress, masked=False, unreached=unreached)
    return Calibration(seen, criterion, tuple(name for name in sites if name not in seen))


def second_moments_of(calibration: Calibration) -> dict[str, Tensor]:
    """E[x_i^2] of each input, float32 [in], by site: for `quantize`.

    Example:
        >>> from deadband import calibrate
        >>> calibration = calibrate(nn.Sequential(nn.Linear(2, 1)), [torch.tensor([[1.0, 2.0]])], progress=False)
        >>> second_moments_of(calibration)
        {'0': tensor([1., 4.])}
    """
    return {
        name: torch.from_numpy(site.sum_of_squares / site.rows.clip(1)).float()
        for name, site in calibration.sites.items()
    }
