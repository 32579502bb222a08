"""From a budget to one rule per site: shares of the budget by `uniform` or another method, then thresholds for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from deadband.allocation.auto import allocate_auto, allocate_for_quality
from deadband.allocation.fit import (
    allocate_sensitivity,
    allocate_shares,
    allocate_uniform,
    check_method,
    prepare,
    uniform_shares,
)
from deadband.allocation.greedy import greedy_shares
from deadband.allocation.sensitivity import measure_sensitivity
from deadband.allocation.thresholds import Thresholds, check_sparsity
from deadband.calibration.calibration import Calibration
from deadband.running.batches import taken


def allocate(
    calibration: Calibration,
    sparsity: float | None = None,
    method: str = "auto",
    *,
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    relative: bool | None = None,
    center: bool | None = None,
    joint: bool = False,
    step: float = 0.05,
    tokens: int = 512,
    progress: bool = True,
) -> Thresholds:
    """Share a sparsity budget out over the sites; also a method of `Calibration`.

    Activations shrink once earlier sites are sparse, so that thresholds taken from dense activations skip more
    than asked. With `model` and `batches`, one more pass, with the sparse model, corrects that: what is achieved
    on such data is then within 1 % of the budget.

    Args:
        calibration: what each site's input looked like.
        sparsity: fraction of the sites' weight bytes to skip, from 0 up to but not 1. Exactly one of this,
            `max_kl` and `max_perplexity_increase` is given.
        method: `auto`: `sensitivity` in several forms, and `uniform`, are judged by KL on a quarter of `batches`
            held out for that; what was picked and why is in the result's `reason`. Without `model` and `batches`,
            or where no gradient reaches some site, it is `uniform`.
            `uniform`: the same sparsity everywhere.
            `greedy`: TEAL's Algorithm 1 (Liu et al. 2024, arXiv 2408.14690): in each block, step by step, the site
            whose next step harms the block's output least gives; all blocks give the same. Unlike the paper's, no
            step moves a site by more than 0.1, steps of different bytes are compared by harm per byte, and a site
            whose harm was far from the least a step ago is not tried again each time.
            `sensitivity`: water-filling over all sites by the loss that each is expected to cause, from backward
            passes (`deadband.allocation.sensitivity`); its thresholds are on scores of criterion `sensitivity`.
        max_kl: find the largest sparsity whose KL(dense ‖ sparse) on held-out batches, plus its standard error over
            them, is at most this, in nats a token.
        max_perplexity_increase: the same for the relative increase of perplexity, such as 0.01.
        model: the dense model that was calibrated. Nothing in it changes.
        batches: calibration data, as for `calibrate`.
        relative: compare scores with the threshold times the norm of each token's input. None: not, but for
            `sensitivity` and `auto`, which choose for each site.
        center: a skipped entry counts as the mean of what its channel skips, not as zero; costs nothing at run
            time. None: not, but for `sensitivity` (yes) and `auto` (whichever does better).
        joint: let up-projections of gated MLPs skip outputs, by their gate, instead of inputs, where `sensitivity`
            expects that to harm less (`deadband.allocation.joint`). `auto` takes it where it does better.
        step: greedy's step, as a fraction of the block's weight bytes.
        tokens: greedy compares block outputs on the first batches, until they hold so many tokens.
        progress: show progress bars on a terminal.

    Returns:
        `Thresholds`, for `deadband.sparsify_`.

    Raises:
        ValueError: a sparsity out of range, an unknown method, a model that the calibration does not fit or that
            is sparse, a method that needs a model without one, only one of `model` and `batches`, or a quality
            that even the smallest sparsity does not keep.
    """
    options: dict[str, Any] = {"relative": relative, "center": center, "joint": joint, "step": step, "tokens": tokens}
    if [sparsity, max_kl, max_perplexity_increase].count(None) != 2:
        raise ValueError("pass exactly one of sparsity=, max_kl= and max_perplexity_increase=")
    if sparsity is None:
        limits: dict[str, Any] = {"max_kl": max_kl, "max_perplexity_increase": max_perplexity_increase}
        return allocate_for_quality(calibration, method, model, batches, **limits, **options, progress=progress)
    return allocate_budgets(
        calibration, [sparsity], method, model=model, batches=batches, **options, progress=progress
    )[0]


Calibration.allocate = allocate


def allocate_budgets(
    calibration: Calibration,
    budgets: Sequence[float],
    method: str = "auto",
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    relative: bool | None = None,
    center: bool | None = None,
    joint: bool = False,
    step: float = 0.05,
    tokens: int = 512,
    progress: bool = True,
) -> list[Thresholds]:
    """`allocate`, which explains the arguments, for several budgets: what they share is done once."""
    if not (0 < step <= 1 and tokens > 0):
        raise ValueError(f"step={step} and tokens={tokens}; expected a step above 0 and up to 1, and some tokens")
    budgets = [check_sparsity(budget) for budget in budgets]
    check_method(method, joint)
    if (model is None) != (batches is None):
        raise ValueError("model= and batches= go together: pass both or neither")
    if model is None or batches is None:
        if method in ("greedy", "sensitivity"):
            raise ValueError(f"method {method!r} runs the model: pass model= and batches= as well")
        if relative or center:
            raise ValueError("relative= and center= are fitted on the model: pass model= and batches= as well")
        reason = "auto: uniform, as there was neither model= nor batches= to compare with" if method == "auto" else ""
        return [allocate_uniform(calibration, budget, reason) for budget in budgets]
    prepare(calibration, model, method)
    batches = taken(batches)
    if method == "auto":
        return allocate_auto(
            calibration, budgets, model, batches, relative=relative, center=center, joint=joint, progress=progress
        )
    if method == "sensitivity":
        measured = measure_sensitivity(model, batches, list(calibration.sites), joint=joint, progress=progress)
        return [
            allocate_sensitivity(
                calibration,
                measured,
                budget,
                model,
                batches,
                relative=relative,
                center=center,
                joint=joint,
                progress=progress,
            )
            for budget in budgets
        ]
    if method == "greedy":
        shares = greedy_shares(calibration, budgets, model, batches, step, tokens, progress)
    else:
        shares = [uniform_shares(calibration, budget) for budget in budgets]
    form = {"relative": bool(relative), "center": bool(center), "progress": progress}
    return [
        allocate_shares(calibration, budget, share, model, batches, method=method, **form)
        for budget, share in zip(budgets, shares, strict=True)
    ]
