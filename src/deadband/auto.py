"""Method `auto`: try what may do best, judge on batches held out, and say why. And budgets found for a quality."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deadband.allocation import Thresholds, allocate, allocate_sensitivity, prepare
from deadband.criterion import Rule
from deadband.observation import NotReachedError, masking
from deadband.running import evaluating, progress_bar, run
from deadband.sensitivity import SiteSensitivity, first_tensor, measure_sensitivity

if TYPE_CHECKING:
    from deadband.calibration import Calibration

_HELD_OUT = 4  # one batch in so many judges and is not fitted to
_SMALLEST, _LARGEST = 0.02, 0.95  # budgets between which one is looked for
_PRECISION = 0.005  # of that budget


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a sparse model is from its dense form on some batches, batch by batch.

    Attributes:
        kl: mean KL(dense ‖ sparse) of the outputs of each batch, in nats. For a model without logits it is half the
            squared difference of the outputs: the same, for normal distributions of variance one.
        loss_increase: mean growth of the negative log-likelihood of the next token; NaN for other models.
    """

    kl: tuple[float, ...]
    loss_increase: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of `kl`."""
        return statistics.fmean(self.kl)

    @property
    def perplexity_increase(self) -> float:
        """exp of the mean growth of the loss, less one."""
        return math.expm1(statistics.fmean(self.loss_increase))


class Judge:
    """The dense outputs on some batches, kept to compare sparse models with."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], progress: bool) -> None:
        self.model, self.batches, self.progress = model, batches, progress
        with evaluating(model):
            self.dense = [_output(model, batch) for batch in progress_bar(batches, "dense", progress)]

    def __call__(self, rules: Mapping[str, Rule]) -> Divergence:
        """Run the model with these rules on every site's every token."""
        sites = {name: self.model.get_submodule(name) for name in rules}
        figures = []
        with evaluating(self.model), masking(sites, rules):
            for batch, before in zip(progress_bar(self.batches, "judge", self.progress), self.dense, strict=True):
                figures.append(_compare(before, _output(self.model, batch), batch))
        kl, loss = zip(*figures, strict=True)
        return Divergence(kl, loss)


def allocate_auto(
    calibration: Calibration,
    budgets: Sequence[float],
    model: nn.Module,
    batches: Sequence[Any],
    *,
    relative: bool | None,
    center: bool | None,
    progress: bool,
) -> list[Thresholds]:
    """For each budget, the candidate with the least KL on held-out batches; `Thresholds.reason` says what and why."""
    return _Auto(calibration, model, batches, relative, center, progress).allocate(budgets)


class _Auto:
    def __init__(
        self,
        calibration: Calibration,
        model: nn.Module,
        batches: Sequence[Any],
        relative: bool | None,
        center: bool | None,
        progress: bool,
    ) -> None:
        self.calibration, self.model, self.progress = calibration, model, progress
        self.relative, self.center, self.batches = relative, center, batches
        self.fitted, self.held = split(batches)
        names = list(calibration.sites)
        self.measured: dict[str, SiteSensitivity]
        try:
            self.measured = measure_sensitivity(model, self.fitted, names, progress=progress)
        except NotReachedError:  # the held-out batches are the ones that reach some expert
            self.fitted = batches
            self.measured = measure_sensitivity(model, self.fitted, names, progress=progress)
        self.judge = Judge(model, self.held, progress)

    def allocate(self, budgets: Sequence[float]) -> list[Thresholds]:
        return [self._best(budget) for budget in budgets]

    def _best(self, budget: float) -> Thresholds:
        if budget == 0:
            return allocate(self.calibration, [0.0], "uniform")[0]
        tried = {name: make() for name, make in self._candidates(budget).items()}
        figures = {name: self.judge(thresholds.rules) for name, thresholds in tried.items()}
        best = min(figures, key=lambda name: figures[name].mean)
        held = f"{len(self.held)} batch{'es' if len(self.held) > 1 else ''}" + (
            ", also fitted to" if len(self.fitted) == len(self.batches) else " held out"
        )
        others = "; ".join(f"{name} {figures[name].mean:.4g}" for name in tried if name != best)
        reason = f"auto: {best}, with KL {figures[best].mean:.4g} on {held}" + (f" ({others})" if others else "")
        return dataclasses.replace(tried[best], reason=reason)

    def _candidates(self, budget: float) -> dict[str, Callable[[], Thresholds]]:
        def sensitivity(relative: bool | None, center: bool) -> Callable[[], Thresholds]:
            return lambda: allocate_sensitivity(
                self.calibration, self.measured, budget, self.model, self.fitted,
                relative=relative, center=center, progress=self.progress,
            )  # fmt: skip

        def uniform() -> Thresholds:
            return allocate(
                self.calibration, [budget], "uniform", model=self.model, batches=self.fitted, progress=self.progress,
                relative=self.relative, center=self.center,
            )[0]  # fmt: skip

        centers = (True, False) if self.center is None else (self.center,)
        words = {True: "centered", False: "not centered"}
        forms = {None: "form by site", True: "relative", False: "absolute"}
        found: dict[str, Callable[[], Thresholds]] = {
            f"sensitivity ({forms[self.relative]}, {words[center]})": sensitivity(self.relative, center)
            for center in centers
        }
        return {**found, "uniform": uniform}


def allocate_for_quality(
    calibration: Calibration,
    method: str,
    model: nn.Module | None,
    batches: Iterable[Any] | None,
    *,
    max_kl: float | None,
    max_perplexity_increase: float | None,
    progress: bool,
    **options: Any,
) -> Thresholds:
    """The largest budget that keeps a quality on held-out batches; `Calibration.allocate` explains the arguments."""
    limit = max_kl if max_kl is not None else max_perplexity_increase
    what = "max_kl" if max_kl is not None else "max_perplexity_increase"
    assert limit is not None
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"{what}={limit}; expected a number above 0")
    if model is None or batches is None:
        raise ValueError(f"{what}= is judged on the model: pass model= and batches= as well")
    batches = list(batches)
    prepare(calibration, model, method)
    fitted, held = split(batches)
    if method == "auto":
        auto = _Auto(calibration, model, batches, options["relative"], options["center"], progress)
        judge, made = auto.judge, lambda budget: auto.allocate([budget])[0]
    elif method == "sensitivity":
        measured = measure_sensitivity(model, fitted, list(calibration.sites), progress=progress)
        form = {"relative": options["relative"], "center": options["center"], "progress": progress}
        judge = Judge(model, held, progress)
        made = lambda budget: allocate_sensitivity(calibration, measured, budget, model, fitted, **form)  # noqa: E731
    else:
        judge = Judge(model, held, progress)
        made = lambda budget: allocate(  # noqa: E731
            calibration, [budget], method, model=model, batches=fitted, progress=progress, **options
        )[0]

    def excess(thresholds: Thresholds) -> float:
        found = judge(thresholds.rules)
        value = found.mean if max_kl is not None else found.perplexity_increase
        if math.isnan(value):
            raise ValueError(f"{what} needs a model that predicts tokens of `input_ids`; this one's loss is not known")
        return value - limit

    low, high = _SMALLEST, _LARGEST
    best = made(low)
    if (least := excess(best)) > 0:
        raise ValueError(
            f"{what}={limit} is not kept even at sparsity {low}, where it is {least + limit:.4g}; "
            "ask for less quality, or run dense"
        )
    while high - low > _PRECISION:
        middle = (low + high) / 2
        candidate = made(middle)
        if excess(candidate) <= 0:
            low, best = middle, candidate
        else:
            high = middle
    found = f"the largest sparsity within {what}={limit} on {len(held)} batches held out is {best.sparsity:.1%}"
    return dataclasses.replace(best, reason=f"{found}; {best.reason}" if best.reason else found)


def split(batches: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Batches to fit on, and others, taken from all over, to judge on. A single batch is both."""
    if len(batches) < 2:
        return batches, batches
    held = list(range(len(batches)))[_HELD_OUT - 1 :: _HELD_OUT] or [len(batches) - 1]
    return [b for i, b in enumerate(batches) if i not in held], [batches[i] for i in held]


def _output(model: nn.Module, batch: Any) -> tuple[Tensor, bool]:
    """What the model returns, and whether it is the logits of a categorical distribution."""
    output = run(model, batch, use_cache=False)
    logits = getattr(output, "logits", None)
    return (first_tensor(output), False) if logits is None else (logits, True)


def _compare(dense: tuple[Tensor, bool], sparse: tuple[Tensor, bool], batch: Any) -> tuple[float, float]:
    """Mean KL and mean growth of the loss of the next token over the unpadded outputs of a batch."""
    (before, categorical), (after, _) = dense, sparse
    if not categorical:
        return float((after.double() - before.double()).square().sum(-1).mean() / 2), math.nan
    ids: Any = batch.get("input_ids") if isinstance(batch, Mapping) else None
    padding: Any = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    keep = torch.ones(before.shape[:-1], dtype=torch.bool)
    if isinstance(padding, Tensor) and padding.shape == keep.shape:
        keep = padding.cpu().bool()
    predicts = isinstance(ids, Tensor) and before.dim() == 3 and ids.shape == before.shape[:2]
    kl, growth, count, targets = 0.0, 0.0, 0, 0
    for index in keep.nonzero().split(_POSITIONS):
        at = tuple(index.T.to(before.device))
        log_p, log_q = (F.log_softmax(logits[at].float(), -1) for logits in (before, after))
        p = log_p.exp()
        kl += float(torch.where(p > 0, p * (log_p - log_q), 0).sum(dtype=torch.float64))  # 0 log 0 is 0
        count += len(index)
        if not predicts:
            continue
        row, position = index.T
        follows = (position + 1 < ids.shape[1]) & keep[row, (position + 1).clamp(max=ids.shape[1] - 1)]
        chosen = ids.cpu()[row[follows], position[follows] + 1][:, None].to(log_p.device)
        follows = follows.to(log_p.device)
        growth += float((log_p[follows].gather(-1, chosen) - log_q[follows].gather(-1, chosen)).double().sum())
        targets += len(chosen)
    return kl / max(count, 1), growth / targets if targets else math.nan


_POSITIONS = 128  # whose log-probabilities are float32 at a time
