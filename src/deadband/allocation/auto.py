"""Method `auto`: try what may do best, judge on batches held out, and say why. And budgets found for a quality."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadband.allocation.fit import (
    allocate_sensitivity,
    allocate_shares,
    allocate_uniform,
    check_method,
    prepare,
    uniform_shares,
)
from deadband.allocation.greedy import greedy_shares
from deadband.allocation.sensitivity import SiteSensitivity, measure_sensitivity
from deadband.allocation.thresholds import Thresholds
from deadband.calibration.calibration import Calibration
from deadband.calibration.watcher import NotReachedError, prediction_of, split_rules, thresholding
from deadband.layers.experts import module_at
from deadband.layers.rule import Rule
from deadband.running.batches import Counted, is_two_sided, named, taken
from deadband.running.divergence import compare_logits, kept_places, mean_and_error
from deadband.running.forward import evaluating, progress_bar, run

_HELD_OUT = 4  # one batch in so many judges and is not fitted to
_TRIAL = 4  # batches that candidates are fitted to; the one that is taken is fitted to all
_SMALLEST, _LARGEST = 0.02, 0.95  # budgets between which one is looked for
_PRECISION = 0.005  # of that budget


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a sparse model is from its dense form: sums over the unpadded outputs of each batch, and their numbers.

    Attributes:
        kl, outputs: KL(dense ‖ sparse) in nats. For a model without logits it is half the squared difference of the
            outputs: the same, for normal distributions of variance one.
        growth, targets: of the negative log-likelihood of the next token; no targets where that is not known.
    """

    kl: tuple[float, ...]
    outputs: tuple[int, ...]
    growth: tuple[float, ...]
    targets: tuple[int, ...]

    @property
    def mean(self) -> float:
        """KL of an output; infinite if it is no number, so that what is broken is never best."""
        mean = sum(self.kl) / max(sum(self.outputs), 1)
        return math.inf if math.isnan(mean) else mean

    def bound(self, what: str) -> float:
        """`max_kl`'s or `max_perplexity_increase`'s figure plus one standard error over the batches, if there are two.

        Raises:
            ValueError: a perplexity that is not known.
        """
        sums, counts = (self.kl, self.outputs) if what == "max_kl" else (self.growth, self.targets)
        if not sum(counts):
            raise ValueError(
                f"{what} needs a model that predicts the tokens of its `input_ids`; use max_kl for this one"
            )
        used = [(total / count, float(count)) for total, count in zip(sums, counts, strict=True) if count]
        mean, error = mean_and_error(*map(list, zip(*used, strict=True)))
        value = mean + (error if math.isfinite(error) else 0.0)
        value = value if what == "max_kl" else math.expm1(min(value, 100.0))
        return math.inf if math.isnan(value) else value


class Judge:
    """The dense outputs on some batches, kept to compare sparse models with."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], progress: bool) -> None:
        self.model, self.batches, self.progress = model, batches, progress
        with evaluating(model):
            self.dense = [_output(model, batch) for batch in progress_bar(batches, "dense", progress)]

    def __call__(self, rules: Mapping[str, Rule]) -> Divergence:
        """Run the model with these rules on every site's every token."""
        inputs, gates = split_rules(self.model, rules)
        sites = {name: module_at(self.model, name) for name in inputs}
        figures = []
        with evaluating(self.model), thresholding(sites, rules, gates):
            for batch, before in zip(progress_bar(self.batches, "judge", self.progress), self.dense, strict=True):
                figures.append(_compare(self.model, batch, before, _output(self.model, batch)))
        return Divergence(*zip(*figures, strict=True))


@dataclasses.dataclass
class Trial:
    """Batches to fit on and batches to judge on, with what backward passes over the former told of each site.

    Attributes:
        measured: None where some site cannot be measured: then only `uniform` is left.
    """

    calibration: Calibration
    model: nn.Module
    fitted: Sequence[Any]
    held: Sequence[Any]
    measured: dict[str, SiteSensitivity] | None
    judge: Judge
    progress: bool
    why: str = ""

    @classmethod
    def of(
        cls,
        calibration: Calibration,
        model: nn.Module,
        batches: Sequence[Any],
        measure: bool,
        joint: bool,
        progress: bool,
    ) -> Trial:
        """Split the batches, and measure sensitivities if asked to, with those of gates if asked to."""
        fitted, held = split(batches)
        names = list(calibration.sites)
        measured, why = None, ""
        if measure:
            try:
                try:
                    measured = measure_sensitivity(model, fitted, names, joint=joint, progress=progress)
                except NotReachedError:  # perhaps the held-out batches are the ones that reach some expert
                    measured = measure_sensitivity(model, batches, names, joint=joint, progress=progress)
                    fitted = batches
            except NotReachedError as error:
                why = str(error)
        return cls(calibration, model, fitted, held, measured, Judge(model, held, progress), progress, why)

    @property
    def judged_on(self) -> str:
        """What was judged on, in words."""
        count = f"{len(self.held)} batch{'es' if len(self.held) > 1 else ''}"
        seen = {id(batch) for batch in self.fitted}
        return count + (", also fitted to" if any(id(batch) in seen for batch in self.held) else " held out")

    def sensitivity(
        self,
        budget: float,
        batches: Sequence[Any],
        relative: bool | None,
        center: bool | None,
        scaled: bool = True,
        joint: bool = False,
    ) -> Thresholds:
        """Method `sensitivity` on some of the batches."""
        assert self.measured is not None
        return allocate_sensitivity(
            self.calibration, self.measured, budget, self.model, batches,
            relative=relative, center=center, scaled=scaled, joint=joint, progress=self.progress,
        )  # fmt: skip

    def uniform(self, budget: float, batches: Sequence[Any], relative: bool | None, center: bool | None) -> Thresholds:
        """Method `uniform` on some of the batches."""
        share = uniform_shares(self.calibration, budget)
        form = {"relative": bool(relative), "center": bool(center), "progress": self.progress}
        return allocate_shares(self.calibration, budget, share, self.model, batches, method="uniform", **form)

    def best(self, budget: float, relative: bool | None, center: bool | None) -> Thresholds:
        """The candidate with the least KL on the held-out batches, fitted to all others."""
        if budget == 0:
            return allocate_uniform(self.calibration, 0.0)
        candidates = self._candidates(budget, relative, center)
        few = self.fitted[:: max(len(self.fitted) // _TRIAL, 1)][:_TRIAL]
        try:
            figures = {name: self.judge(make(few).rules).mean for name, make in candidates.items()}
        except NotReachedError:  # some expert needs them all
            figures = {name: self.judge(make(self.fitted).rules).mean for name, make in candidates.items()}
        best = min(figures, key=figures.__getitem__)
        if math.isinf(figures[best]):
            raise ValueError(f"the KL to the dense model is not a number at sparsity {budget}: its outputs have NaN")
        taken = candidates[best](self.fitted)
        tried = "; ".join(f"{name} {figures[name]:.4g}" for name in sorted(figures, key=figures.__getitem__))
        kl = self.judge(taken.rules).mean
        reason = f"auto: {best}, with KL {kl:.4g} on {self.judged_on} (in trials on {len(few)}: {tried})"
        return dataclasses.replace(taken, reason=f"{reason}; {self.why}" if self.why else reason)

    def _candidates(
        self, budget: float, relative: bool | None, center: bool | None
    ) -> dict[str, Callable[[Sequence[Any]], Thresholds]]:
        found: dict[str, Callable[[Sequence[Any]], Thresholds]] = {}
        words = {None: "form by site", True: "relative", False: "absolute"}

        def add(form: bool | None, centered: bool, scaled: bool = True, joint: bool = False) -> None:
            more = ("" if scaled else ", magnitude") + (", gates" if joint else "")
            name = f"sensitivity ({words[form]}, {'' if centered else 'not '}centered{more})"
            found[name] = lambda batches: self.sensitivity(budget, batches, form, centered, scaled, joint)

        if self.measured is not None:
            for form in (None, True, False) if relative is None else (relative,):
                add(form, center is not False)
            add(relative, center is not False, scaled=False)
            if center is None:
                add(relative, False)
            if any(site.joint is not None for site in self.measured.values()):
                add(relative, center is not False, joint=True)
        found["uniform"] = lambda batches: self.uniform(budget, batches, relative, center)
        return found


def allocate_auto(
    calibration: Calibration,
    budgets: Sequence[float],
    model: nn.Module,
    batches: Sequence[Any],
    *,
    relative: bool | None,
    center: bool | None,
    joint: bool,
    progress: bool,
) -> list[Thresholds]:
    """For each budget, the candidate with the least KL on held-out batches; `Thresholds.reason` says what and why."""
    trial = Trial.of(calibration, model, batches, True, joint, progress)
    return [trial.best(budget, relative, center) for budget in budgets]


def allocate_for_quality(
    calibration: Calibration,
    method: str,
    model: nn.Module | None,
    batches: Iterable[Any] | None,
    *,
    max_kl: float | None,
    max_perplexity_increase: float | None,
    relative: bool | None,
    center: bool | None,
    joint: bool,
    step: float,
    tokens: int,
    progress: bool,
) -> Thresholds:
    """The largest budget that keeps a quality on held-out batches; `allocate` explains the arguments."""
    what, limit = ("max_kl", max_kl) if max_kl is not None else ("max_perplexity_increase", max_perplexity_increase)
    if limit is None or not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"{what}={limit}; expected a number above 0")
    if model is None or batches is None:
        raise ValueError(f"{what}= is judged on the model: pass model= and batches= as well")
    check_method(method, joint)
    prepare(calibration, model, method)
    trial = Trial.of(calibration, model, taken(batches), method in ("auto", "sensitivity"), joint, progress)
    if method == "sensitivity" and trial.measured is None:
        raise NotReachedError(trial.why)
    budgets = [_SMALLEST + index * _PRECISION for index in range(int((_LARGEST - _SMALLEST) / _PRECISION) + 1)]
    shares: list[dict[str, float]] = []
    if method == "greedy":  # one path through all budgets
        shares = greedy_shares(calibration, budgets, model, list(trial.fitted), step, tokens, progress)

    def made(index: int) -> Thresholds:
        if method == "auto":
            return trial.best(budgets[index], relative, center)
        if method == "sensitivity":
            return trial.sensitivity(budgets[index], trial.fitted, relative, center, joint=joint)
        share = shares[index] if shares else dict.fromkeys(calibration.sites, budgets[index])
        form = {"relative": bool(relative), "center": bool(center), "progress": progress}
        return allocate_shares(calibration, budgets[index], share, model, trial.fitted, method=method, **form)

    low, high = 0, len(budgets)
    best = made(low)
    if (least := trial.judge(best.rules).bound(what)) > limit:
        raise ValueError(
            f"{what}={limit} is not kept even at sparsity {budgets[low]}, where it is {least:.4g}; "
            "ask for less quality, or run dense"
        )
    while high - low > 1:
        middle = (low + high) // 2
        candidate = made(middle)
        if trial.judge(candidate.rules).bound(what) <= limit:
            low, best = middle, candidate
        else:
            high = middle
    where = f"with one standard error to spare on {trial.judged_on}"
    found = f"the largest sparsity within {what}={limit} {where} is {best.sparsity:.1%}"
    return dataclasses.replace(best, reason=f"{found}; {best.reason}" if best.reason else found)


def split(batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Batches to fit on, and others, taken from all over, to judge on. A single batch is both."""
    if len(batches) < 2:
        return batches, batches
    held = set(range(len(batches))[_HELD_OUT - 1 :: _HELD_OUT] or [len(batches) - 1])
    return [b for i, b in enumerate(batches) if i not in held], [batches[i] for i in sorted(held)]


def _output(model: nn.Module, batch: Any) -> tuple[Tensor, bool]:
    """What the model returns, and whether it is the logits of a categorical distribution."""
    return prediction_of(run(model, batch, use_cache=False))


def _compare(
    model: nn.Module, batch: Any, dense: tuple[Tensor, bool], sparse: tuple[Tensor, bool]
) -> tuple[float, int, float, int]:
    """Sums of one batch, as `Divergence` has them."""
    (before, categorical), (after, _) = dense, sparse
    keep = Counted.of(model, batch).outputs(before.shape[:-1])
    if not categorical:
        kept = keep.to(before.device)
        return float((after.double() - before.double()).square().sum(-1)[kept].sum() / 2), int(keep.sum()), 0.0, 0
    sums = compare_logits(before, after, kept_places(keep), _targets(model, batch, keep))
    return sums.kl, sums.outputs, sums.nll - sums.dense_nll, sums.targets


def _targets(model: nn.Module, batch: Any, keep: Tensor) -> Tensor | None:
    """The token that each output predicts, [batch, tokens], -1 where there is none; None if the model does not predict.

    A decoder with an encoder is told them as its labels, or reads them one place later.
    """
    given = named(model, batch)
    two_sided = is_two_sided(model, given)
    ids: Any = given.get("decoder_input_ids" if two_sided else "input_ids")
    labels: Any = given.get("labels") if two_sided else None
    if isinstance(labels, Tensor) and labels.shape == keep.shape:
        return labels.cpu().clamp_min(-1)
    if not isinstance(ids, Tensor) or ids.shape != keep.shape or keep.dim() != 2:
        return None
    follow = torch.full(keep.shape, -1, dtype=torch.int64)
    follow[:, :-1] = torch.where(keep[:, 1:], ids[:, 1:].cpu(), -1)
    return follow
