"""From a budget to one threshold per site: `uniform`, or `greedy` (TEAL's Algorithm 1), and the corrective pass."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deadband.criterion import check_criterion, scale_of
from deadband.files import write_json
from deadband.linear import SparseSite
from deadband.observation import masking, observe_model
from deadband.running import evaluating, progress_bar, run
from deadband.sites import find_blocks, is_site, matrix_of, weight_sample

if TYPE_CHECKING:
    from deadband.calibration import Calibration

METHODS = ("uniform", "greedy")
VERSION = 1
_MOST_OF_A_SITE = 0.99  # greedy empties no site altogether
_SITE_STEP = 0.1  # the largest step of one site's sparsity in greedy, see _greedy_path
_SLACK = 0.7  # how much lower than when last tried a candidate's figure may be


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds(Mapping[str, float]):
    """One threshold per site, as `Calibration.allocate` gives them: a mapping, with what it was made for.

    Attributes:
        sites: threshold by site name.
        sparsity: model-wide sparsity asked for, weighted by weight bytes.
        site_sparsity: the share of it that each site was given.
        criterion, method: how scores are taken, and how the budget was shared out.
        corrected: whether thresholds come from activations of the sparse model.
        shapes: [out_features, in_features] of each site, and
        samples: some of its weights, to tell a model that these do not belong to.

    Example:
        >>> thresholds = Thresholds(sites={"fc": 0.5}, sparsity=0.4, site_sparsity={"fc": 0.4}, shapes={"fc": (2, 4)})
        >>> dict(thresholds)
        {'fc': 0.5}
    """

    sites: dict[str, float]
    sparsity: float
    site_sparsity: dict[str, float]
    shapes: dict[str, tuple[int, int]]
    samples: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    criterion: str = "magnitude"
    method: str = "uniform"
    corrected: bool = False

    def __getitem__(self, site: str) -> float:
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        pass_ = ", corrected on the sparse model" if self.corrected else ""
        head = f"{self.sparsity:.0%} of the weight bytes over {len(self)} sites, {self.method}, {self.criterion}{pass_}"
        return "\n".join([head] + [f"{self.site_sparsity[name]:7.1%} {self[name]:9.4g}  {name}" for name in self])

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file."""
        write_json(path, {"version": VERSION, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Thresholds:
        """Read what `save` wrote; a ValueError says so if it is something else."""
        try:
            about = json.loads(Path(path).read_text(encoding="utf-8"))
            if about.pop("version") != VERSION:
                raise ValueError("another version")
            for key in ("shapes", "samples"):
                about[key] = {name: tuple(values) for name, values in about[key].items()}
            return cls(**about)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a file of thresholds of version {VERSION}: {error}") from None


def allocate(
    calibration: Calibration,
    budgets: Sequence[float],
    method: str = "uniform",
    *,
    model: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    step: float = 0.05,
    tokens: int = 512,
    progress: bool = True,
) -> list[Thresholds]:
    """`Calibration.allocate`, which explains the arguments, for several budgets; greedy does not cost more for them."""
    if not (0 < step <= 1 and tokens > 0):
        raise ValueError(f"step={step} and tokens={tokens}; expected a step above 0 and up to 1, and some tokens")
    budgets = [check_sparsity(budget) for budget in budgets]
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; expected one of {', '.join(map(repr, METHODS))}")
    if (model is None) != (batches is None):
        raise ValueError("model= and batches= go together: pass both or neither")
    shapes = {name: (site.out_features, site.in_features) for name, site in calibration.sites.items()}
    samples = {name: site.sample for name, site in calibration.sites.items()}
    shares = [dict.fromkeys(calibration.sites, budget) for budget in budgets]
    if model is not None and batches is not None:
        check_model(model, shapes, samples)
        if any(isinstance(module, SparseSite) for module in model.modules()):
            raise ValueError("the model is sparse already; densify_ it, then allocate on the dense model")
        batches = list(batches)
        if method == "greedy":
            shares = _greedy(calibration, budgets, model, batches, step, tokens, progress)
    elif method == "greedy":
        raise ValueError("method 'greedy' compares outputs of the model's blocks: pass model= and batches= as well")
    results = []
    for budget, share in zip(budgets, shares, strict=True):
        sites = {name: site.threshold(share[name]) for name, site in calibration.sites.items()}
        if model is not None and batches is not None and budget > 0:
            seen = observe_model(model, batches, list(sites), calibration.criterion, sites, "correct", progress)
            sites = {name: seen[name].threshold(share[name]) for name in sites}
        results.append(
            Thresholds(
                sites=sites,
                sparsity=budget,
                site_sparsity=share,
                shapes=shapes,
                samples=samples,
                criterion=check_criterion(calibration.criterion),
                method=method,
                corrected=model is not None,
            )
        )
    return results


def check_sparsity(sparsity: float) -> float:
    """Return a sparsity as a float, or raise a ValueError."""
    if not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity {sparsity} is out of range; expected the fraction to skip, from 0 up to but not 1")
    return float(sparsity)


def check_model(
    model: nn.Module, shapes: Mapping[str, tuple[int, int]], samples: Mapping[str, tuple[float, ...]]
) -> None:
    """Raise a ValueError unless `model` has these sites, of these shapes and with about these weights.

    Weights may differ by rounding to another dtype or by a little training, not more.
    """
    modules = dict(model.named_modules())
    for name, shape in shapes.items():
        module = modules.get(name)
        if module is None or not is_site(module):
            raise ValueError(f"the calibration is of another model: this {type(model).__name__} has no site {name!r}")
        if tuple(matrix_of(module).shape) != tuple(shape):
            raise ValueError(
                f"the calibration is of another model: site {name!r} is {tuple(matrix_of(module).shape)} here and was "
                f"{tuple(shape)} there ([out_features, in_features])"
            )
        here, there = torch.tensor(weight_sample(module)), torch.tensor(samples.get(name, ()))
        if len(here) == len(there) and bool((here - there).norm() > 0.1 * there.norm()):
            raise ValueError(f"the calibration is of another model: site {name!r} has other weights here")


def _greedy(
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
    scales = {name: scale_of(calibration.criterion, matrix_of(model.get_submodule(name))) for name in calibration.sites}
    shares: list[dict[str, float]] = [{} for _ in budgets]
    with evaluating(model):
        calls = _block_inputs(model, blocks, batches, tokens)
        for block in progress_bar(blocks, "greedy", progress):
            sites = {name: model.get_submodule(name) for name in members[block]}
            path = _greedy_path(blocks[block], sites, calls.pop(block), calibration, scales, step, max(budgets))
            for share, budget in zip(shares, budgets, strict=True):
                share.update(_along(path, budget))
    return [{name: share[name] for name in calibration.sites} for share in shares]


def _block_inputs(
    model: nn.Module, blocks: dict[str, nn.Module], batches: list[Any], tokens: int
) -> dict[str, list[tuple[tuple, dict]]]:
    """The arguments of every call of every block while the dense model sees the first `tokens` tokens."""
    calls: dict[str, list[tuple[tuple, dict]]] = {name: [] for name in blocks}
    seen = 0

    def recorder(name: str) -> Any:
        return lambda module, args, kwargs: calls[name].append(_cloned(args, kwargs))

    handles = [m.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, m in blocks.items()]
    try:
        for batch in batches:
            run(model, batch, use_cache=False, **({} if "" in blocks else {"logits_to_keep": 1}))
            first = next(iter(calls.values()))[-1:]
            seen += sum(_rows(value) for args, kwargs in first for value in (*args, *kwargs.values())[:1])
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


def _rows(value: Any) -> int:
    return value.numel() // max(value.shape[-1], 1) if isinstance(value, Tensor) and value.dim() else 1


def _greedy_path(
    block: nn.Module,
    sites: dict[str, nn.Module],
    calls: list[tuple[tuple, dict]],
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
            args, kwargs = _cloned(*call)
            yield _first_tensor(block(*args, **kwargs))

    dense = list(outputs())

    def squared_error(sparsities: Mapping[str, float]) -> float:
        thresholds = {name: calibration.sites[name].threshold(value) for name, value in sparsities.items()}
        difference = 0.0
        with masking(sites, thresholds, scales):
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


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output
