"""Greedy allocation (TEAL's Algorithm 1): block by block, what harms the block's output least is skipped next."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deadband.calibration.calibration import Calibration
from deadband.calibration.watcher import first_tensor, thresholding
from deadband.layers.experts import module_at
from deadband.layers.rule import Rule, scale_of
from deadband.layers.scope import for_here, scope
from deadband.layers.sites import find_blocks, matrix_of
from deadband.ops.products import fast_products
from deadband.running.batches import Counted
from deadband.running.forward import evaluating, progress_bar, run

_MOST_OF_A_SITE = 0.99  # no site is emptied altogether
_SITE_STEP = 0.1  # the largest step of one site's sparsity, see _greedy_path
_SLACK = 0.7  # how much lower than when last tried a candidate's figure may be


def greedy_shares(
    calibration: Calibration,
    budgets: list[float],
    model: nn.Module,
    batches: list[Any],
    step: float,
    tokens: int,
    progress: bool,
) -> list[dict[str, float]]:
    """The sparsity of every site at each budget, block by block."""
    blocks: dict[str, nn.Module] = {}
    members: dict[str, list[str]] = {}
    found = find_blocks(model)
    for name in calibration.sites:
        block = next((block for block in found if name.startswith(f"{block}.")), "")
        blocks[block] = found.get(block, model)
        members.setdefault(block, []).append(name)
    scales = {name: scale_of(calibration.criterion, matrix_of(module_at(model, name))) for name in calibration.sites}
    shares: list[dict[str, float]] = [{} for _ in budgets]
    with evaluating(model), fast_products(model):
        calls = _block_inputs(model, blocks, batches, tokens)
        for block in progress_bar(blocks, "greedy", progress):
            sites = {name: module_at(model, name) for name in members[block]}
            path = _greedy_path(blocks[block], sites, calls.pop(block), calibration, scales, step, max(budgets))
            for share, budget in zip(shares, budgets, strict=True):
                share.update(_along(path, budget))
    return [{name: share[name] for name in calibration.sites} for share in shares]


class _Call(NamedTuple):
    """The arguments of one call of a block, and what takes the rows that count out of its input or output."""

    args: tuple
    kwargs: dict
    rows: Callable[[Tensor], Tensor]


def _block_inputs(
    model: nn.Module, blocks: dict[str, nn.Module], batches: list[Any], tokens: int
) -> dict[str, list[_Call]]:
    """Every call of every block while the dense model sees the first `tokens` tokens, without padding."""
    calls: dict[str, list[_Call]] = {name: [] for name in blocks}
    counted = Counted()
    seen = 0

    def recorder(name: str) -> Any:
        return lambda module, args, kwargs: calls[name].append(
            _Call(*_cloned(args, kwargs), functools.partial(counted.rows, name))
        )

    with scope():
        hooks = {name: for_here(recorder(name)) for name in blocks}
        handles = [m.register_forward_pre_hook(hooks[name], with_kwargs=True) for name, m in blocks.items()]
        try:
            for batch in batches:
                counted = Counted.of(model, batch)
                run(model, batch, use_cache=False, **({} if "" in blocks else {"logits_to_keep": 1}))
                seen += sum(map(_rows, next(iter(calls.values()))[-1:]))
                if seen >= tokens:
                    break
        finally:
            for handle in handles:
                handle.remove()
    return calls


def _cloned(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A block's arguments, safe from a block that changes its input in place."""

    def clone(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return tuple(map(clone, args)), {name: clone(value) for name, value in kwargs.items()}


def _rows(call: _Call) -> int:
    value = next(iter((*call.args, *call.kwargs.values())), None)
    return len(call.rows(value)) if isinstance(value, Tensor) and value.dim() else 1


def _greedy_path(
    block: nn.Module,
    sites: dict[str, nn.Module],
    calls: list[_Call],
    calibration: Calibration,
    scales: dict[str, Tensor | None],
    step: float,
    budget: float,
) -> list[tuple[float, dict[str, float]]]:
    """Algorithm 1 for one block: (sparsity of the block, sparsity of each site) after each step, up to `budget`.

    A step skips a fraction `step` of the block's bytes, so a site whose weight is small moves far: in a model with
    grouped-query attention, 5 % of a block is more than a whole key projection. No step therefore moves a site by more
    than 0.1; as that makes steps of different bytes, what is compared is the growth of the squared error per byte.
    A candidate is tried again only while its last figure, taken a few steps ago, lies near the best of this step.
    """
    total = sum(calibration.sites[name].weight_bytes for name in sites)
    part = {name: calibration.sites[name].weight_bytes / total for name in sites}
    current = dict.fromkeys(sites, 0.0)

    def outputs() -> Iterator[Tensor]:
        for call in calls:
            args, kwargs = _cloned(call.args, call.kwargs)
            yield call.rows(first_tensor(block(*args, **kwargs)))

    dense = list(outputs())

    def squared_error(sparsities: Mapping[str, float]) -> float:
        rules = {
            name: Rule(calibration.sites[name].threshold(value), scales[name]) for name, value in sparsities.items()
        }
        difference = 0.0
        with thresholding(sites, rules):
            for before, after in zip(dense, outputs(), strict=True):
                difference += float((after - before).float().square().sum(dtype=torch.float64))
        return difference

    reached, error, path = 0.0, 0.0, [(0.0, dict(current))]
    last = dict.fromkeys(sites, 0.0)  # growth per byte of each site's next step, when it was last tried
    while reached < budget - 1e-9:
        moves = {
            name: min(step / part[name], _SITE_STEP, _MOST_OF_A_SITE - current[name], (budget - reached) / part[name])
            for name in sites
            if current[name] < _MOST_OF_A_SITE - 1e-9
        }
        if not moves:
            break
        tried: dict[str, float] = {}
        for name in sorted(moves, key=last.__getitem__):
            if tried and _SLACK * last[name] > min(last[each] for each in tried):
                break
            tried[name] = squared_error({**current, name: current[name] + moves[name]})
            last[name] = (tried[name] - error) / (moves[name] * part[name])
        name = min(tried, key=last.__getitem__)
        current[name] += moves[name]
        reached += moves[name] * part[name]
        error = tried[name]
        path.append((reached, dict(current)))
    return path


def _along(path: list[tuple[float, dict[str, float]]], budget: float) -> dict[str, float]:
    """The configuration at `budget`: between two steps of a path, the part of the step that reaches it."""
    for (low, before), (high, after) in itertools.pairwise(path):
        if budget <= high:
            share = (budget - low) / (high - low)
            return {name: before[name] + share * (after[name] - before[name]) for name in before}
    return path[-1][1] if budget > 0 else path[0][1]
