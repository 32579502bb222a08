"""Sensitivity: how much loss skipping entries of each site causes, from backward passes through the dense model.

To second order, KL(dense ‖ sparse) of a token is half of E[(gradient · change)²], where the gradient is that of the
log-probability of a label drawn from the model's own prediction (the Fisher information; Martens 2020, arXiv
1412.1193) and the change is what skipping does to a site's input. One backward pass gives the gradient at every site at
once, and so a curve of expected loss against threshold for each, for thresholds on abs(x) and on abs(x)/‖x‖ alike. A
budget is then shared out by water-filling on the convex hulls of the curves, by loss per byte of weights.

The same gradients give the criterion `sensitivity`: abs(x_i) · the root mean square of the gradient at channel i.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadband.allocation.joint import CAUTION, JointCurve, JointSensitivity, Point, between, choose, joint_sites
from deadband.calibration.row_sums import RowSums, sample_rows
from deadband.calibration.watcher import InputWatcher, prediction_of, require_reached
from deadband.layers.rule import Rule
from deadband.ops.products import fast_products
from deadband.ops.skipping import norm_of
from deadband.running.batches import taken
from deadband.running.forward import run

LEVELS = np.concatenate([np.arange(0.05, 0.951, 0.05), [0.975]])
"""Sparsities at which the curves are taken, about: thresholds come from a sample, what they skip is counted."""
_SAMPLE_ROWS = 64  # rows of each site's input that thresholds are taken from
_FIRST_PART = 4  # one batch in so many serves the first pass, for the scales


@dataclasses.dataclass
class Curve:
    """Expected loss of a site against its threshold, for one form of rule.

    Attributes:
        thresholds: ascending, [levels].
        sparsity: what each skips, [levels].
        harm: the loss it causes in nats a token, [levels], ascending.
    """

    thresholds: np.ndarray
    sparsity: np.ndarray
    harm: np.ndarray

    def points(self) -> list[tuple[float, float]]:
        """Pairs of sparsity and loss."""
        return list(zip(self.sparsity.tolist(), self.harm.tolist(), strict=True))

    def harm_at(self, sparsity: float) -> float:
        """The loss at a sparsity, between levels by interpolation."""
        return float(np.interp(sparsity, np.r_[0, self.sparsity], np.r_[0, self.harm]))

    def threshold_at(self, sparsity: float) -> float:
        """The threshold for a sparsity, between levels by interpolation."""
        return float(np.interp(sparsity, np.r_[0, self.sparsity], np.r_[0, self.thresholds]))


@dataclasses.dataclass
class SiteSensitivity:
    """What backward passes tell of one site.

    Attributes:
        scale: root mean square of the gradient by channel, float32 [in_features].
        curves: by form: False for a threshold on `|x| * scale`, True for one on `|x| * scale / ‖x‖`.
        joint: of the up-projection of a gated MLP, if asked for: what skipping by its gate does.
    """

    scale: Tensor
    curves: dict[bool, Curve]
    joint: JointSensitivity | None = None


def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str],
    *,
    seed: int = 0,
    joint: bool = False,
    progress: bool = True,
) -> dict[str, SiteSensitivity]:
    """Curves of expected loss for the named sites, from a forward and a backward pass over every batch.

    Nothing in the model changes. A quarter of the batches is seen once more, first, for the scales. Memory: one batch's
    activations, as in training, without any gradients of parameters.

    Args:
        model: its output has `logits` (labels are drawn from them), or is a tensor (of which the squared error counts).
        batches: calibration data, as for `deadband.calibrate`.
        names: of sites.
        seed: of the labels.
        joint: also measure what skipping by the gates of gated MLPs does, see `deadband.allocation.joint`.
        progress: show progress bars.

    Raises:
        ValueError: no batch, or gradients that are NaN or infinite.
        NotReachedError: sites that no gradient reaches.
    """
    batches, names = taken(batches), list(names)
    first, rest = batches[::_FIRST_PART], [batch for i, batch in enumerate(batches) if i % _FIRST_PART]
    with _frozen(model):
        gated = joint_sites(model, batches[0], names) if joint else {}
        gates = {gate_of(name): activation for name, (activation, _) in gated.items()}
        scales = _Scales(seed)
        scales.watch(model, first, names, "gradients", progress, gates)
        if rest and not all(map(scales.squares.reached, names)):  # experts that few tokens are sent to
            scales.watch(model, rest, names, "gradients", progress)
        require_reached(names, set(filter(scales.squares.reached, names)), "no gradient reached {}")
        measured = {}
        for name in names:
            scale = scales.squares.mean(name).sqrt().float()
            _require_finite(name, scale)
            measured[name] = SiteSensitivity(scale, _empty_curves(scale, torch.cat(scales.samples[name])))
        for name, (_, down) in gated.items():
            if scales.squares.reached(gate_of(name)):
                measured[name].joint = _empty_joint(scales, name, down, measured)
        curves = _Curves(measured, seed + 1)
        curves.watch(model, batches, names, "sensitivity", progress, gates)
    curves.finish_joint()
    for name, site in measured.items():
        for relative, curve in site.curves.items():
            harm, skipped = (sums.totals[name, relative].cpu() for sums in (curves.harm, curves.skipped))
            _require_finite(name, harm)
            curve.harm = np.maximum.accumulate(harm.numpy() / (2 * max(curves.tokens, 1)))
            curve.sparsity = skipped.numpy() / max(curves.skipped.counts[name, relative], 1)
    return measured


def _require_finite(name: str, figures: Tensor) -> None:
    if not figures.isfinite().all():
        raise ValueError(
            f"the gradients at site {name!r} have NaN or infinity, so the model's outputs do, or nearly; "
            "look for broken weights or inputs, or calibrate in a wider dtype"
        )


def sensitivity_shares(
    measured: Mapping[str, SiteSensitivity],
    weights: Mapping[str, float],
    budget: float,
    relative: bool | None,
    joint: bool = False,
) -> tuple[dict[str, float], dict[str, Rule], dict[str, float]]:
    """Sparsity, rule (for dense activations) and expected loss of each site at a model-wide budget.

    Args:
        measured: what `measure_sensitivity` returned.
        weights: bytes of each site's weight.
        budget: model-wide sparsity.
        relative: the form of all rules; None to choose the one that harms less at each site.
        joint: let up-projections skip by their gate where that is expected to harm less; what both layers of the MLP
            lose is said to be the loss of the up-projection.
    """
    forms = (False, True) if relative is None else (relative,)
    points = {name: [each for form in forms for each in site.curves[form].points()] for name, site in measured.items()}
    pairs, bytes_of = (_pairs(measured, points, weights, budget, forms) if joint else {}), {**weights}
    for name, (down, _, found) in pairs.items():  # one site of the bytes of both
        points[name] = [(point.sparsity, CAUTION * point.harm) for point in found]
        bytes_of[name] += bytes_of.pop(down)
        del points[down]
    shares = water_fill(points, bytes_of, budget)
    at = {name: between(_lower_hull(found), shares[name]) for name, (_, _, found) in pairs.items()}
    for name, point in at.items():
        shares[name], shares[pairs[name][0]] = point.up, point.down
    reached = sum(shares[name] * weights[name] for name in shares) / sum(weights[name] for name in shares)
    if reached < budget - 1e-6:
        raise ValueError(f"sparsity {budget} is out of reach; the curves of method 'sensitivity' end at {reached:.3f}")
    rules, harm = {}, {}
    for name, (down, form, _) in pairs.items():
        own, point = measured[name].joint, at[name]
        assert own is not None
        rules[name] = Rule(point.gate_threshold, own.scale, None, form, gate=True)
        rules[down] = Rule(point.threshold, measured[down].scale, None, form)
        harm[name], harm[down] = point.harm, 0.0
    for name, site in measured.items():
        if name in rules:
            continue
        form = min(forms, key=lambda form: site.curves[form].harm_at(shares[name]))
        rules[name] = Rule(site.curves[form].threshold_at(shares[name]), site.scale, None, form)
        harm[name] = site.curves[form].harm_at(shares[name])
    return shares, {name: rules[name] for name in measured}, {name: harm[name] for name in measured}


def _pairs(
    measured: Mapping[str, SiteSensitivity],
    points: Mapping[str, Sequence[tuple[float, float]]],
    weights: Mapping[str, float],
    budget: float,
    forms: Sequence[bool],
) -> dict[str, tuple[str, bool, list[Point]]]:
    """The up-projections that are to skip by their gate: the down-projection, the form, and what both can do."""
    joints = {
        name: (
            site.joint.down,
            {form: site.joint.curves[form].points(weights[name], weights[site.joint.down]) for form in forms},
        )
        for name, site in measured.items()
        if site.joint is not None
    }
    chosen = choose(points, joints, weights, budget)
    return {name: (joints[name][0], form, joints[name][1][form]) for name, form in chosen.items()}


def water_fill(
    points: Mapping[str, Sequence[tuple[float, float]]], weights: Mapping[str, float], budget: float
) -> dict[str, float]:
    """Water-filling: the sparsity of each site at which one more byte skipped costs the same everywhere.

    Args:
        points: (sparsity, loss) of each site, in any order; their lower convex hull with (0, 0) counts.
        weights: bytes of each site.
        budget: the weighted mean of the sparsities; more than all hulls reach gives their ends.

    Example:
        >>> water_fill({"a": [(0.5, 1.0), (1.0, 4.0)], "b": [(0.5, 10.0), (1.0, 20.0)]}, {"a": 1, "b": 1}, 0.4)
        {'a': 0.8, 'b': 0.0}
    """
    segments = []
    for name, given in points.items():
        hull = _lower_hull(given)
        for (low, before), (high, after) in itertools.pairwise(hull):
            segments.append(((after - before) / ((high - low) * weights[name]), low, high, name))
    shares = dict.fromkeys(points, 0.0)
    left = budget * sum(weights[name] for name in points)
    for _, low, high, name in sorted(segments):
        part = min((high - low) * weights[name], left)
        shares[name] = low + part / weights[name]
        left -= part
        if left <= 0:
            break
    return shares


def _lower_hull(points: Sequence[Any]) -> list[Any]:
    """The lower convex hull of points whose first two coordinates count, from the origin on."""
    hull: list[Any] = [Point(0.0, 0.0)] if points and isinstance(points[0], Point) else [(0.0, 0.0)]
    for point in sorted(points):
        x, y = point[:2]
        if x <= hull[-1][0]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append(point)
    return hull


def _empty_curves(scale: Tensor, sample: Tensor) -> dict[bool, Curve]:
    curves = {}
    for relative in (False, True):
        rule = Rule(0.0, scale, None, relative)
        scores = (rule.compared(sample).abs().float() * scale).flatten().sort().values
        position = torch.as_tensor(LEVELS * (len(scores) - 1), device=scores.device).long()
        thresholds = np.unique(scores[position].double().cpu().numpy())
        curves[relative] = Curve(thresholds, np.zeros_like(thresholds), np.zeros_like(thresholds))
    return curves


def gate_of(name: str) -> str:
    """What the gate of an up-projection is called among the names of what is watched."""
    return f"{name} (gate)"


def _empty_joint(
    scales: _Scales, name: str, down: str, measured: Mapping[str, SiteSensitivity]
) -> JointSensitivity | None:
    scale = scales.squares.mean(gate_of(name)).sqrt().float()
    if not scale.isfinite().all():
        return None
    own = _empty_curves(scale, torch.cat(scales.samples[gate_of(name)]))
    none = np.zeros(0)
    curves = {
        form: JointCurve(own[form].thresholds[1::2], measured[down].curves[form].thresholds[1::2], none, none, none)
        for form in own
    }
    return JointSensitivity(down, scale, curves)


class _Gradients(InputWatcher):
    """Runs batches forward and backward; `take` gets input and gradient of every call of a site, in rows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = 0  # outputs that were predicted

    def take(self, name: str, x: Tensor, gradient: Tensor) -> None:
        raise NotImplementedError

    def see(self, name: str, x: Tensor) -> Tensor | None:
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            own = x.view_as(x)  # q, k and v get the same tensor; each has to see its own gradient
            rows = self.rows(name, x.detach()).clone()  # some blocks change it in place before the gradient comes
            own.register_hook(lambda gradient: self.take(name, rows, self.rows(name, gradient)))
        return own

    def step(self, model: nn.Module, batch: Any) -> None:
        with torch.enable_grad():
            tensor, categorical = prediction_of(run(model, batch, use_cache=False))
        with torch.no_grad():
            gradient = self._draw(tensor, categorical)
        if tensor.requires_grad:
            with fast_products(model):
                tensor.backward(gradient)

    def _draw(self, output: Tensor, categorical: bool) -> Tensor:
        """The gradient of the loss for labels drawn from the model's own prediction, zero where padded."""
        keep = self.counted.outputs(output.shape[:-1])
        self.tokens += int(keep.sum())
        if categorical:
            gradient = output.float().softmax(-1)
            rows = gradient.view(-1, gradient.shape[-1])
            draw = torch.rand(len(rows), 1, generator=self.generator).to(rows.device)
            labels = (rows.cumsum(-1) < draw).sum(-1, keepdim=True).clamp_(max=rows.shape[-1] - 1)
            rows.scatter_add_(1, labels, torch.full_like(draw, -1.0))
        else:  # a normal distribution of variance one around the output: half the squared error is its loss
            gradient = torch.randn(output.shape, generator=self.generator).to(output.device)
        return (gradient * keep.to(output.device)[..., None]).to(output.dtype)


class _Scales(_Gradients):
    """Sums of squared gradients by channel, and some rows of the inputs."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.squares = RowSums()
        self.samples: dict[str, list[Tensor]] = {}

    def take(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self.squares.add(name, gradient.float().square().sum(0).double(), len(x))
        kept = self.samples.setdefault(name, [])
        missing = _SAMPLE_ROWS - sum(map(len, kept))
        if missing > 0:
            kept.append(sample_rows(x, min(missing, _SAMPLE_ROWS // 4), missing))


class _Curves(_Gradients):
    """Sums over tokens of (gradient · change)² at each threshold of each curve, and what the thresholds skip."""

    def __init__(self, sites: Mapping[str, SiteSensitivity], seed: int) -> None:
        super().__init__(seed)
        self.sites = sites
        self.harm, self.skipped = RowSums(), RowSums()  # by site and form
        self.kept = RowSums()  # by up-projection and form; its harm is by the name of its gate
        self.ups = {site.joint.down: name for name, site in sites.items() if site.joint is not None}
        self.gates = {gate_of(name): name for name in self.ups.values()}
        self.waiting: dict[str, list[Tensor]] = {name: [] for name in self.ups.values()}  # gates, until gradients come

    def see(self, name: str, x: Tensor) -> Tensor | None:
        if name not in self.gates:
            return super().see(name, x) if name in self.sites else None
        self.waiting[self.gates[name]].append(self.rows(name, x.detach()).clone())
        return None

    def step(self, model: nn.Module, batch: Any) -> None:
        super().step(model, batch)
        for each in self.waiting.values():  # of calls that no gradient reached
            each.clear()

    def take(self, name: str, x: Tensor, gradient: Tensor) -> None:
        site = self.sites[name]
        up = self.ups.get(name)
        gate = self.waiting[up].pop() if up is not None and self.waiting[up] else None
        product = gradient.float() * x.float()  # [rows, in_features]: what dropping an entry changes, to first order
        scores = x.abs().float() * site.scale
        for relative, curve in site.curves.items():
            if relative:
                scores = scores / norm_of(x).clamp_min(torch.finfo(torch.float32).tiny)
            limits = torch.as_tensor(curve.thresholds, dtype=torch.float32, device=x.device)
            level = torch.bucketize(scores, limits)  # the first threshold that skips the entry
            changes = torch.zeros(len(x), len(limits) + 1, device=x.device).scatter_add_(1, level, product)
            harm = changes.cumsum(1)[:, :-1].double().square().sum(0)
            skipped = torch.bincount(level.flatten(), minlength=len(limits) + 1).cumsum(0)[:-1]
            self.harm.add((name, relative), harm, len(x))
            self.skipped.add((name, relative), skipped, x.numel())
            if up is not None and gate is not None and gate.shape == x.shape:
                self._take_joint(up, relative, gate, scores, product)

    def _take_joint(self, up: str, relative: bool, gate: Tensor, scores: Tensor, product: Tensor) -> None:
        """Sums for a gate: `scores` and `product` are of the input of the down-projection, [rows, inner features]."""
        joint = self.sites[up].joint
        assert joint is not None
        own = gate.abs().float() * joint.scale
        if relative:
            own = own / norm_of(gate).clamp_min(torch.finfo(torch.float32).tiny)
        curve, levels, sizes = joint.curves[relative], [], []
        for values, limits in ((own, curve.gate_thresholds), (scores, curve.thresholds)):
            limit = torch.as_tensor(limits, dtype=torch.float32, device=values.device)
            levels.append(torch.bucketize(values, limit))
            sizes.append(len(limits) + 1)
        level = levels[0] * sizes[1] + levels[1]
        changes = torch.zeros(len(gate), sizes[0] * sizes[1], device=gate.device).scatter_add_(1, level, product)
        kept = _from_here_on(changes.view(-1, *sizes))  # what is left of the sum where both thresholds keep
        harm = (kept[:, :1, :1] - kept).double().square().sum(0)
        counts = torch.bincount(level.flatten(), minlength=sizes[0] * sizes[1]).view(sizes)
        self.harm.add((gate_of(up), relative), harm, len(gate))
        self.kept.add((up, relative), _from_here_on(counts), gate.numel())

    def finish_joint(self) -> None:
        """Fill the curves of the gates in; those that were not reached have none."""
        for name in self.ups.values():
            site = self.sites[name]
            for relative, curve in site.joint.curves.items() if site.joint is not None else ():
                if not self.kept.reached((name, relative)):
                    site.joint = None
                    break
                harm = self.harm.totals[gate_of(name), relative].cpu().numpy() / (2 * max(self.tokens, 1))
                kept = self.kept.totals[name, relative].cpu().numpy() / self.kept.counts[name, relative]
                curve.harm, curve.down, curve.up = harm, 1 - kept, 1 - kept[:, 0]
                if not np.isfinite(harm).all():
                    site.joint = None
                    break


def _from_here_on(values: Tensor) -> Tensor:
    """Sums over the last two dimensions from each place to the ends."""
    return values.flip(-2, -1).cumsum(-2).cumsum(-1).flip(-2, -1)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient inside the block."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
