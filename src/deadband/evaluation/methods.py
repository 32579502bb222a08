"""Published training-free methods of activation sparsity beside deadband's own, all fitted to the same byte budgets.

Those that keep an entry by its own score (TEAL; WINA with thresholds) are a criterion and an allocation of this
library, and run on its kernels. The others (a number of entries for each token, rotations, low-rank parts, gates) are
`Simulation`s: hooks on a dense model that compute what the method computes, for its quality only.

A budget is the fraction of all sites' weight bytes that is not read, net: bytes that a method reads in addition
(changes of basis on the residual stream, low-rank factors) come off, so that such a method skips more of its inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from deadband.allocation.budget import allocate_budgets
from deadband.allocation.thresholds import Thresholds, check_sparsity
from deadband.calibration.calibration import Calibration, calibrate
from deadband.calibration.row_sums import InputProducts, sample_rows
from deadband.calibration.site_statistics import SiteStatistics
from deadband.calibration.watcher import InputWatcher, SharedInputs, same_input
from deadband.evaluation.simulation import Gate, GatedMLP, LowRank, Part, Simulation, TopK, require_dense
from deadband.layers.experts import ExpertLinear
from deadband.layers.gated import GATED, activation_of
from deadband.layers.rule import scale_of
from deadband.layers.sites import find_sites, identity_of, matrix_of, shape_of, weight_bytes
from deadband.ops.skipping import apply_mask, keep_mask
from deadband.running.batches import taken

MOST = 0.99
"""A method that would have to skip as much of its inputs as this cannot reach its budget."""
SPLITS = tuple(step / 10 for step in range(11))
"""Parts of R-Sparse's bytes that go to columns of the weight; the rest goes to its low-rank part."""
SAMPLE_ROWS = 256
"""Rows of each input on which R-Sparse's split is chosen."""
_TRANSFORMED = ("k_proj", "gate_proj", "w1", "wi_0")  # the matrix of a block that WINA makes column-orthogonal
_RECENT = 8  # outputs of norms among which a site's input is looked for


@dataclasses.dataclass(frozen=True)
class SharedInput:
    """An input that several sites get: of q, k and v, or of gate and up.

    Attributes:
        sites: their names, in the order in which the model calls them.
        normalised: a normalisation layer made it, so that it is the residual stream, whose basis can be changed.
    """

    sites: tuple[str, ...]
    normalised: bool


class Setup:
    """A dense model and calibration batches, and what several methods need to know of them, each found out once.

    Args:
        model: the dense model. Nothing in it changes.
        batches: calibration data, as for `deadband.calibrate`.
        progress: show progress bars on a terminal.

    Raises:
        ValueError: no batch, no site, or a model that is sparse already.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> setup = Setup(model, [torch.randn(64, 8)], progress=False)
        >>> METHODS["top-k"].fit(setup, [0.5])[0].shares["0"]
        0.5
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], *, progress: bool = True) -> None:
        self.model, self.batches, self.progress = model, taken(batches), progress
        require_dense(model)
        self.sites = find_sites(model)
        self.weights = {name: weight_bytes(module) for name, module in self.sites.items()}
        self._calibrations: dict[str, Calibration] = {}

    def calibration(self, criterion: str = "magnitude") -> Calibration:
        """What `deadband.calibrate` returns for this criterion."""
        if criterion not in self._calibrations:
            made = calibrate(self.model, self.batches, criterion=criterion, progress=self.progress)
            self._calibrations[criterion] = made
        return self._calibrations[criterion]

    @property
    def total_bytes(self) -> int:
        """Weight bytes of all sites."""
        return sum(self.weights.values())

    @cached_property
    def inputs(self) -> list[SharedInput]:
        """The inputs of the sites, in the order of the model."""
        watcher = _Grouping(self.model)
        try:
            watcher.watch(self.model, self.batches[:1], list(self.sites), "inputs", self.progress)
        finally:
            watcher.close()
        found = [SharedInput(*each) for each in zip(map(tuple, watcher.groups), watcher.normalised, strict=True)]
        reached = {name for each in found for name in each.sites}
        return found + [SharedInput((name,), False) for name in self.sites if name not in reached]

    @cached_property
    def principal_bases(self) -> dict[str, Tensor]:
        """Float32 eigenvectors [in_features, in_features], in columns by falling eigenvalue, of the mean of x xᵀ.

        By the first site of each input that the residual stream makes.
        """
        names = [each.sites[0] for each in self.inputs if each.normalised]
        watcher = InputProducts(names, wide=True)
        if names:
            watcher.watch(self.model, self.batches, names, "covariance", self.progress)
        return {name: self._on_device(name, _eigenbasis(total)[0]) for name, total in watcher.sums.totals.items()}

    @cached_property
    def orthogonalising(self) -> dict[str, tuple[str, Tensor, Tensor]]:
        """What makes a weight column-orthogonal: right singular vectors V, as W V = U S, of one matrix of each input.

        By the first site of each input that the residual stream makes: the site whose matrix it is, V in the columns
        of a float32 [in_features, in_features], and the column norms of W V, the singular values [in_features].
        """
        bases = {}
        for each in self.inputs:
            if not each.normalised:
                continue
            key = next((name for name in each.sites if name.rpartition(".")[2] in _TRANSFORMED), each.sites[0])
            matrix = matrix_of(self.sites[key]).detach().flatten(0, -2).cpu().double()  # of experts, all of them
            basis, values = _eigenbasis(matrix.T @ matrix)
            norms = values.clamp_min(0).sqrt().float()
            bases[each.sites[0]] = (key, self._on_device(key, basis), self._on_device(key, norms))
        return bases

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        """Some rows of each site's input, [rows, in_features], from all batches."""
        watcher = _Rows(math.ceil(SAMPLE_ROWS / len(self.batches)))
        watcher.watch(self.model, self.batches, list(self.sites), "sample", self.progress)
        return {name: torch.cat(rows) for name, rows in watcher.rows_of.items()}

    @cached_property
    def gated_mlps(self) -> list[GatedMLP]:
        """The gated MLPs whose layers are sites."""
        found = []
        for name, module in self.model.named_modules():
            for names in GATED:
                gate, up, down = (f"{name}.{each}" if name else each for each in names)
                activation = activation_of(module, names)
                if activation is not None and {gate, up, down} <= self.sites.keys():
                    found.append(GatedMLP(gate, up, down, activation))
                    break
        return found

    @cached_property
    def gates(self) -> dict[str, SiteStatistics]:
        """Statistics of act(gate) in the dense model, by the name of the MLP's down-projection."""
        open_gates = [Gate(mlp, -1.0, 0.0) for mlp in self.gated_mlps]
        return _observed(self, self.simulation(open_gates, {}), open_gates, "gates")

    def simulation(self, parts: Sequence[Part], added: Mapping[str, float]) -> Simulation:
        """A simulation on this model; `added` are bytes read in addition, by site."""
        return Simulation(parts, self.weights, added, {name: identity_of(each) for name, each in self.sites.items()})

    def _on_device(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(matrix_of(self.sites[name]).device)


Fit: TypeAlias = "Callable[[Setup, Sequence[float]], list[Thresholds | Simulation | None]]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method to compare.

    Attributes:
        name: short, for command lines and files.
        title: for tables and plots.
        paper: authors, year and arXiv number; None for deadband's own.
        fit: thresholds or a simulation for each budget (the net fraction of all sites' weight bytes that is not read,
            from 0 up to but not 1), None where the method cannot reach it. Raises a ValueError for other budgets.

    Example:
        >>> METHODS["cats"].title
        'CATS'
    """

    name: str
    title: str
    paper: str | None
    fit: Fit


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: there is none; the message lists the known ones.

    Example:
        >>> method_of("larosa").paper
        'Liu et al. 2025, arXiv 2507.01299'
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is not known; expected one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def _allocated(
    setup: Setup, budgets: Sequence[float], *, criterion: str = "magnitude", method: str, step: float = 0.05
) -> list[Thresholds | Simulation | None]:
    made = allocate_budgets(
        setup.calibration(criterion), budgets, method,
        model=setup.model, batches=setup.batches, step=step, progress=setup.progress,
    )  # fmt: skip
    return list(made)


def fit_top_k(setup: Setup, budgets: Sequence[float]) -> list[Thresholds | Simulation | None]:
    """Of each token and site, the same share of entries is kept: those of largest magnitude.

    TEAL's criterion without its thresholds: every token skips the same, whatever its norm.
    """
    return [_top_k(setup, budget) for budget in budgets]


def fit_wina(setup: Setup, budgets: Sequence[float]) -> list[Thresholds | Simulation | None]:
    """Of each token, the same share of entries is kept at each site: those of largest `|x_i| * ||W[:, i]||`.

    Chen et al. 2025, arXiv 2505.19427, the gate, with the same share everywhere (the paper also lets k differ by
    layer), and the weights as they are.
    """
    scales = {name: scale_of("weighted_magnitude", matrix_of(module)) for name, module in setup.sites.items()}
    return [_top_k(setup, budget, scales) for budget in budgets]


def fit_wina_orthogonal(setup: Setup, budgets: Sequence[float]) -> list[Thresholds | Simulation | None]:
    """WINA with its transformation: W becomes W V = U S, whose columns are orthogonal, and x becomes Vᵀ x.

    Chen et al. 2025, arXiv 2505.19427, the transformation protocol by SVD and computational invariance. Where the
    columns of W are orthogonal, keeping the k entries with the largest `|x_i| * ||W[:, i]||` is the best of all choices
    of k for `||W x - W x_masked||`: the squared error is the sum of the squares of what is left out.

    As in the paper, one matrix of each block is transformed, k_proj for attention and gate_proj for the MLP, and only
    that one is pruned by the weighted score: the others that read the same input get it in the new basis and keep its
    largest entries, and o_proj and down_proj stay in theirs. A fused projection is transformed as a whole, and so is
    the first of those that share an input where none has such a name. Assumed here: the same number of entries
    everywhere, and a V of the input as the projections get it, after the gain of the norm.

    Bytes added: bases differ between blocks, so the residual stream is taken from each to the next by a matrix
    [hidden, hidden] (as in SliceGPT, Ashkboos et al. 2024, arXiv 2401.15024); all else is absorbed into weights, the
    first and the last change of basis into the embedding and the output layer.
    """
    bases, scales = {}, {}
    for first, (key, basis, norms) in setup.orthogonalising.items():
        bases[first], scales[key] = basis, norms
    return [_top_k(setup, budget, scales, bases) for budget in budgets]


def fit_larosa(setup: Setup, budgets: Sequence[float]) -> list[Thresholds | Simulation | None]:
    """The largest entries of each token in the basis of the principal components of the input, the same share of each.

    Liu et al. 2025, arXiv 2507.01299: the rotation Q of a block's input (of attention and of the MLP, each its own) has
    the eigenvectors of the mean of x xᵀ over calibration data, not centered; o_proj and down_proj stay in theirs. The
    paper searches for coefficients that share a block's sparsity between its inputs (its Algorithm 1); here all have
    the same. Q is of the input as the projections get it, after the gain of the norm.

    Bytes added: Q is absorbed into the weights around it, but the residual stream has to be taken from one block's
    basis to the next one's, by a matrix [hidden, hidden] (the paper's residual adapters); the first and the last are
    absorbed into the embedding and the output layer.
    """
    return [_top_k(setup, budget, {}, setup.principal_bases) for budget in budgets]


def _top_k(
    setup: Setup,
    budget: float,
    scales: Mapping[str, Tensor | None] | None = None,
    bases: Mapping[str, Tensor] | None = None,
) -> Simulation | None:
    """The same share of entries of every input; bases by the first site of each input."""
    check_sparsity(budget)
    added: dict[str, float] = {}
    rotations: dict[str, Tensor] = {}
    if bases:
        rotated = [each for each in setup.inputs if each.sites[0] in bases]
        for index, each in enumerate(rotated):
            basis = bases[each.sites[0]]
            rotations.update(dict.fromkeys(each.sites, basis))
            if index:  # the embedding takes the first
                size = basis.numel() * cast(Tensor, setup.sites[each.sites[0]].weight).element_size()
                together = sum(setup.weights[name] for name in each.sites)
                added.update({name: size * setup.weights[name] / together for name in each.sites})
    share = budget + sum(added.values()) / setup.total_bytes
    if share >= MOST:
        return None
    parts = []
    for name, module in setup.sites.items():
        features = shape_of(module)[1]
        k = max(round((1 - share) * features), 1)
        parts.append(TopK(name, k, features, (scales or {}).get(name), rotations.get(name)))
    return setup.simulation(parts, added)


def fit_cats(setup: Setup, budgets: Sequence[float]) -> list[Thresholds | Simulation | None]:
    """Gated MLPs skip the channels whose `|act(gate)|` is small: outputs of up_proj and inputs of down_proj.

    Lee et al. 2024, arXiv 2404.08763, stage 1 (the cutoff threshold): a quantile of each MLP's `|act(gate)|` over
    calibration data, the same one everywhere. Attention and gate_proj are read whole, so the MLPs skip more than the
    budget, and None comes back for budgets beyond their share of the bytes, or for models without gated MLPs. Unlike
    the paper's, the quantiles are taken once more on the sparse model, as for the other methods.
    """
    covered = sum(setup.weights[mlp.up] * mlp.up_share + setup.weights[mlp.down] for mlp in setup.gated_mlps)
    made: list[Thresholds | Simulation | None] = []
    for budget in budgets:
        check_sparsity(budget)
        if not covered or budget * setup.total_bytes / covered >= MOST:
            made.append(None)
            continue
        share = budget * setup.total_bytes / covered
        parts = [Gate(mlp, setup.gates[mlp.down].threshold(share), share) for mlp in setup.gated_mlps]
        made.append(_corrected(setup, setup.simulation(parts, {}), parts, "CATS"))
    return made


def fit_r_sparse(setup: Setup, budgets: Sequence[float]) -> list[Thresholds | Simulation | None]:
    """Large entries meet the weight, small ones its low-rank approximation: y = W x_kept + (U_r S_r V_rᵀ) x_rest.

    Zhang et al. 2025, arXiv 2504.19449. A budget leaves (1 - budget) m n entries of each weight [m, n] to be read, the
    same share everywhere: columns of W, and r (m + n) of the factors. The paper looks for the part that goes to columns
    by an evolutionary search by the whole model's perplexity (its Algorithm 1); here each site takes the part, of
    `SPLITS`, with the least `||y - W x||` over `SAMPLE_ROWS` rows of its dense input. Thresholds are quantiles of
    `|x|`, taken once more on the sparse model, as for the other methods.
    """
    for budget in budgets:
        check_sparsity(budget)
    if any(isinstance(module, ExpertLinear) for module in setup.sites.values()):
        return [None for _ in budgets]  # it says nothing of experts, each of which would need factors of its own
    calibration = setup.calibration("magnitude")
    parts: list[list[LowRank]] = [[] for _ in budgets]
    added: list[dict[str, float]] = [{} for _ in budgets]
    for name, module in setup.sites.items():
        matrix = matrix_of(module).detach()
        (out_features, in_features), size = matrix.shape, matrix.element_size()
        wide = torch.promote_types(matrix.dtype, torch.float32)
        left, values, right = torch.linalg.svd(matrix.to(wide), full_matrices=False)
        x, seen = setup.samples[name].to(wide), calibration.sites[name]
        splits = [_best_split(x, values, right, seen, out_features, budget) for budget in budgets]
        most = max((rank for _, rank in splits), default=0)
        left = (left[:, :most] * values[:most]).to(matrix.dtype)
        right = right[:most].to(matrix.dtype, copy=True)  # not a view: the rest of it is large
        for index, (share, rank) in enumerate(splits):
            parts[index].append(LowRank(name, seen.threshold(share), share, left[:, :rank], right[:rank]))
            added[index][name] = float(rank * (out_features + in_features) * size)
    simulations = [setup.simulation(each, extra) for each, extra in zip(parts, added, strict=True)]
    return [_corrected(setup, made, each, "R-Sparse") for made, each in zip(simulations, parts, strict=True)]


def _best_split(
    x: Tensor, values: Tensor, right: Tensor, seen: SiteStatistics, out_features: int, budget: float
) -> tuple[float, int]:
    """The share of entries to skip and the rank with the least squared error on the rows of `x`.

    As W = U S Vᵀ, the squared error of rank r is the sum of (s_i v_iᵀ x_rest)² over i > r: one product gives all ranks.
    """
    in_features = x.shape[1]
    entries, of_one_rank = out_features * in_features, out_features + in_features
    best = (math.inf, budget, 0)
    for split in reversed(SPLITS):
        rank = min(int((1 - budget) * (1 - split) * entries / of_one_rank), len(values))
        share = min(budget + rank * of_one_rank / entries, 1.0)  # columns take what a whole rank would not fit
        rest = apply_mask(x, ~keep_mask(x, seen.threshold(share)))
        energy = ((rest @ right.T) * values).double().square().sum(0)
        error = float(energy[rank:].sum())
        if error < best[0]:
            best = (error, share, rank)
    return best[1:]


def _corrected(setup: Setup, simulation: Simulation, parts: Sequence[LowRank | Gate], what: str) -> Simulation:
    """The simulation with thresholds that skip each part's share of what it sees in the sparse model."""
    if any(part.share > 0 for part in parts):
        seen = _observed(setup, simulation, parts, what)
        for part in parts:
            part.threshold = seen[part.name].threshold(part.share)
    simulation.reset()
    return simulation


def _observed(
    setup: Setup, simulation: Simulation, parts: Sequence[LowRank | Gate], what: str
) -> dict[str, SiteStatistics]:
    watcher = _Scores(simulation, parts)
    watcher.watch(setup.model, setup.batches, list(watcher.parts), what, setup.progress)
    return watcher.seen


class _Scores(InputWatcher):
    """Statistics of what the thresholds of a simulation are compared with, while it is on."""

    def __init__(self, simulation: Simulation, parts: Sequence[LowRank | Gate]) -> None:
        super().__init__()
        self.simulation, self.parts = simulation, {part.name: part for part in parts}
        self.seen: dict[str, SiteStatistics] = {}

    def step(self, model: nn.Module, batch: Any) -> None:
        with self.simulation.on(model):  # its hooks come behind this watcher's own, which see what is not pruned yet
            super().step(model, batch)

    def see(self, name: str, x: Tensor) -> None:
        scored = self.parts[name].scored(x)
        seen = self.seen.setdefault(name, SiteStatistics.of_features(scored.shape[-1]))
        seen.observe(self.rows(name, scored))


class _Grouping(SharedInputs):
    """Which sites get the same tensor, and for each group whether a normalisation layer made it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.normalised: list[bool] = []
        self.recent: deque[Tensor] = deque(maxlen=_RECENT)  # kept alive, so that no other tensor gets its place
        norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
        self.handles = [module.register_forward_hook(self._remember_norm) for module in norms]

    def _remember_norm(self, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            self.recent.append(output)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.recent.clear()

    def begin(self, x: Tensor) -> None:
        self.normalised.append(any(same_input(x, output) for output in self.recent))


class _Rows(InputWatcher):
    """Some rows of each site's input, evenly from each batch."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self.each = each
        self.rows_of: dict[str, list[Tensor]] = {}

    def see(self, name: str, x: Tensor) -> None:
        chosen = self.look(name, x, lambda rows: sample_rows(rows, self.each, self.each))
        self.rows_of.setdefault(name, []).append(chosen)


def _eigenbasis(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of a symmetric float64 matrix in the columns of a float32 one, and eigenvalues, both falling."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(-1).float().contiguous(), values.flip(-1)


_TEAL, _WINA = "Liu et al. 2024, arXiv 2408.14690", "Chen et al. 2025, arXiv 2505.19427"
METHODS: dict[str, Method] = {
    name: Method(name=name, title=title, paper=paper, fit=fit)
    for name, title, paper, fit in (
        ("teal-uniform", "TEAL, uniform", _TEAL, partial(_allocated, method="uniform")),
        ("teal-greedy", "TEAL, greedy", _TEAL, partial(_allocated, method="greedy", step=0.05)),
        ("top-k", "magnitude, top-k", None, fit_top_k),
        ("wina", "WINA, top-k", _WINA, fit_wina),
        (
            "wina-threshold",
            "WINA, thresholds",
            _WINA,
            partial(_allocated, criterion="weighted_magnitude", method="uniform"),
        ),
        ("wina-orthogonal", "WINA, orthogonal", _WINA, fit_wina_orthogonal),
        ("cats", "CATS", "Lee et al. 2024, arXiv 2404.08763", fit_cats),
        ("r-sparse", "R-Sparse", "Zhang et al. 2025, arXiv 2504.19449", fit_r_sparse),
        ("larosa", "LaRoSA", "Liu et al. 2025, arXiv 2507.01299", fit_larosa),
        ("sensitivity", "deadband, sensitivity", None, partial(_allocated, method="sensitivity")),
        ("auto", "deadband, auto", None, partial(_allocated, method="auto")),
    )
}
"""All methods, in the order in which they are shown."""
