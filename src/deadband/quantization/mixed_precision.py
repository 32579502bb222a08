"""Mixed precision: which sites can be quantised such that a model hardly changes; the others keep their weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deadband.layers.experts import module_at
from deadband.layers.formats import WeightFormat
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.rounding import quantize
from deadband.layers.sites import Patterns, find_sites, matrix_of
from deadband.running.batches import Counted, taken
from deadband.running.divergence import compare_logits, kept_places, logits_of
from deadband.running.forward import evaluating, progress_bar, run


def choose_formats(
    model: nn.Module,
    batches: Iterable[Any],
    max_kl: float,
    format: str | WeightFormat = "int8-g32",
    *,
    second_moments: Mapping[str, Tensor] | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    progress: bool = False,
) -> dict[str, str]:
    """Formats for `sparsify_(weights=...)`: as many sites as a KL to the model as it is allows, by weights.

    Each site is quantised alone, and the KL that this causes measured, in one forward pass for each batch. Errors of
    different sites are independent, and KL is quadratic in them, so it adds up: sites are taken from the least KL per
    weight on. All taken are then measured together; should that be more than `max_kl`, fewer are taken. Nothing in the
    model changes.

    Args:
        model: a dense language model, in float32 for a small `max_kl`.
        batches: what the model is called with, as for `calibrate`; some 1,000 tokens are enough.
        max_kl: mean KL of a token to the model as it is, in nats.
        format: of the sites that are taken.
        second_moments: of each site's inputs, by name, as for `sparsify_`.
        include, exclude: patterns that choose sites, as for `calibrate`.
        progress: show a progress bar on a terminal.

    Returns:
        The format of each site that is taken, by name; empty if there is none.

    Raises:
        ValueError: `max_kl` is no positive number, there are no batches or only padding in them, a site is quantised
            already, or the model's output is not finite.

    Example:
        >>> weights = choose_formats(model, batches, max_kl=1e-4)  # doctest: +SKIP
        >>> deadband.sparsify_(model, thresholds, weights=weights, output_layer="int8-g32")  # doctest: +SKIP
    """
    if not 0 < max_kl < math.inf:
        raise ValueError(f"max_kl is {max_kl}; expected a positive number of nats, such as 1e-4")
    batches = taken(batches)
    format = WeightFormat.parse(format)
    sites = find_sites(model, include, exclude)
    quantised = next((name for name, module in sites.items() if isinstance(module, QuantizedMatrix)), None)
    if quantised is not None:
        raise ValueError(f"site {quantised!r} is quantised already; expected a dense model, see densify_")
    moments = second_moments or {}
    with evaluating(model):
        alone = _costs(model, batches, {name: (name,) for name in sites}, format, moments, progress)
        order = sorted(sites, key=lambda name: (alone[name] / matrix_of(sites[name]).numel(), name))
        budget = max_kl
        while True:
            chosen = _within(order, alone, budget)
            together = (
                _costs(model, batches, {"together": chosen}, format, moments, False)["together"] if chosen else 0.0
            )
            if together <= max_kl:
                return {name: str(format) for name in sites if name in chosen}
            budget = min(budget * max_kl / together, sum(alone[name] for name in chosen[:-1]))


def _within(order: Sequence[str], costs: Mapping[str, float], budget: float) -> list[str]:
    """The first of `order` whose costs add up to no more than the budget."""
    taken, total = [], 0.0
    for name in order:
        total += max(costs[name], 0.0)
        if total > budget:
            break
        taken.append(name)
    return taken


def _costs(
    model: nn.Module,
    batches: Sequence[Any],
    sets: Mapping[str, Iterable[str]],
    format: WeightFormat,
    moments: Mapping[str, Tensor],
    progress: bool,
) -> dict[str, float]:
    """The mean KL of a token that quantising each set of sites causes. One batch's logits are kept at a time."""
    total, tokens = dict.fromkeys(sets, 0.0), 0
    work = ((batch, name) for batch in batches for name in ("", *sets))
    expected, counted = None, None
    for batch, name in progress_bar(work, "formats", progress, total=len(batches) * (len(sets) + 1)):
        if not name:
            expected = None  # before the next one is made
            expected = logits_of(model, run(model, batch, use_cache=False))
            counted = Counted.of(model, batch).outputs(expected.shape[:-1])
            if not all(bool(expected[at].isfinite().all()) for at in kept_places(counted)):
                raise ValueError("the model's output holds NaN or infinity")
            tokens += int(counted.sum())
            continue
        assert expected is not None
        assert counted is not None
        with _quantised(model, sets[name], format, moments):
            logits = logits_of(model, run(model, batch, use_cache=False))
        total[name] += compare_logits(expected, logits, kept_places(counted)).kl
        if not math.isfinite(total[name]):
            raise ValueError(f"with {name} in {format} the model's output holds NaN or infinity")
    if not tokens:
        raise ValueError("batches hold nothing but padding; expected tokens that attention_mask keeps")
    return {name: each / tokens for name, each in total.items()}


@contextlib.contextmanager
def _quantised(
    model: nn.Module, names: Iterable[str], format: WeightFormat, moments: Mapping[str, Tensor]
) -> Iterator[None]:
    """The named sites' weights rounded, inside the block."""
    before: list[tuple[Any, Tensor]] = []
    try:
        for name in names:
            module: Any = module_at(model, name)
            rounded = quantize(matrix_of(module), format, moments.get(name)).dequantize(module.weight.dtype)
            before.append((module.weight, module.weight.data))
            module.weight.data = torch.empty_like(module.weight)
            matrix_of(module).copy_(rounded)
        yield
    finally:
        for weight, data in before:
            weight.data = data
