"""The sparsity from which skipping is faster than the dense product: measured once for each kind of layer, remembered.

Skipping costs the search for what is kept, and several tokens at once keep more of the weights between them: what is
worth it depends on the shape of a layer, the format of its weight, the number of threads and the processor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deadband.files import cache_folder, write_json
from deadband.layers.formats import empty_weight
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.sites import shape_of, sparse_sites
from deadband.layers.sparse import SparseSite, tensor_of
from deadband.ops import gpu, kernels
from deadband.ops.cpu import SPARSE_ROWS
from deadband.ops.linear import dense_linear, quantized_linear, sparse_linear
from deadband.running.forward import progress_bar
from deadband.running.timing import interleave, machine, median, replayed

ROWS = (1, 2, 4, SPARSE_ROWS)
"""Numbers of tokens that are measured; those between behave like the next larger one."""
GRID = (0.0, 0.25, 0.5, 0.75, 0.95)
POOL_BYTES = 96_000_000  # weights take turns, so that they come from memory, or from a shared cache at best
GPU_POOL_BYTES = 400_000_000  # the largest caches have 50 MB to 256 MB


@dataclasses.dataclass(frozen=True)
class Kind:
    """Layers that have the same break-even: shape, dtype of activations, format of the weight."""

    out_features: int
    in_features: int
    dtype: str
    weights: str

    @classmethod
    def of(cls, module: SparseSite) -> Kind:
        """The kind of a sparse layer."""
        out_features, in_features = shape_of(module)
        if isinstance(module, QuantizedMatrix):
            return cls(out_features, in_features, _name(module.weight_dtype), module.weight_format)
        dtype = _name(tensor_of(module).dtype)
        return cls(out_features, in_features, dtype, dtype)

    def __str__(self) -> str:
        return f"{self.in_features}x{self.out_features} {self.weights} {self.dtype}"


def break_even(model: nn.Module, *, progress: bool = True) -> dict[Kind, dict[int, float]]:
    """The break-even sparsity of each kind of sparse layer of a model by number of tokens, with torch's threads.

    Measured where it is not remembered, about a second for each kind, and kept in `deadband/breakeven.json` in the
    user's cache folder, for this processor, instruction set and version.

    Returns:
        For each kind and each of `ROWS`, the sparsity of one token from which skipping is faster; infinity where it
        never is. Empty without kernels, or where layers are neither on the CPU nor on one GPU. On a GPU, times are
        those of a CUDA graph: without one, a token takes as long as its launches.

    Example:
        >>> break_even(nn.Linear(2, 2))
        {}
    """
    return _table(_measurable(sparse_sites(model).values()), progress)


def _measurable(sites: Iterable[SparseSite]) -> list[SparseSite]:
    """Those that kernels skip in; none if they are on several devices."""
    found = [site for site in sites if _has_kernels(tensor_of(site).device)]
    return found if len({tensor_of(site).device for site in found}) == 1 else []


def _has_kernels(device: torch.device) -> bool:
    if device.type == "cuda":
        return gpu.usable(device)
    return device.type == "cpu" and kernels.library is not None


def _table(sites: Sequence[SparseSite], progress: bool) -> dict[Kind, dict[int, float]]:
    if not sites:
        return {}
    device = tensor_of(sites[0]).device
    kinds = sorted({Kind.of(site) for site in sites}, key=str)
    path = cache_folder() / "breakeven.json"
    remembered = _read(path)
    here = remembered.setdefault(_where(device), {})
    missing = [kind for kind in kinds if str(kind) not in here]
    for kind in progress_bar(missing, "break-even", progress and bool(missing)):
        found = measure(kind, device)
        here[str(kind)] = {str(rows): value if math.isfinite(value) else None for rows, value in found.items()}
    if missing:
        with contextlib.suppress(OSError):  # then it is measured again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, remembered)
    return {kind: {int(rows): _number(value) for rows, value in here[str(kind)].items()} for kind in kinds}


def _number(value: float | None) -> float:
    return math.inf if value is None else value  # JSON has no infinity


def tune_(model: nn.Module, *, progress: bool = False) -> nn.Module:
    """Let each sparse layer skip for as many tokens at once as that is faster, in place; see `break_even`.

    A layer whose calibrated sparsity is below its break-even for one token runs dense. Layers of which no sparsity is
    known stay as they are.

    Example:
        >>> _ = tune_(model)                                             # doctest: +SKIP
    """
    sites = [site for site in _measurable(sparse_sites(model).values()) if not math.isnan(site.expected)]
    table = _table(sites, progress)
    for site in sites:
        limits = table[Kind.of(site)]
        paying = itertools.takewhile(lambda rows: site.expected >= limits[rows], limits)  # noqa: B023
        site.sparse_rows = max(paying, default=0)
    return model


def measure(kind: Kind, device: torch.device | str = "cpu") -> dict[int, float]:
    """The break-even sparsity for each of `ROWS`, timed now."""
    device = torch.device(device)
    return {rows: _crossing([_gain(kind, rows, sparsity, device) for sparsity in GRID]) for rows in ROWS}


def _crossing(gains: list[float]) -> float:
    """Where the gain of skipping, known on `GRID`, passes 1 for good."""
    slower = [index for index, gain in enumerate(gains) if gain < 1]
    if not slower:
        return 0.0
    last = slower[-1]
    if last == len(GRID) - 1:
        return math.inf
    share = (1 - gains[last]) / (gains[last + 1] - gains[last])
    return GRID[last] + share * (GRID[last + 1] - GRID[last])


def _gain(kind: Kind, rows: int, sparsity: float, device: torch.device) -> float:
    """Time of the dense product over that of the sparse one."""
    dtype = getattr(torch, kind.dtype)
    x = torch.rand(rows, kind.in_features, dtype=torch.float32).to(dtype)
    threshold = torch.tensor(float(x.float().quantile(sparsity)) if sparsity else -1.0, device=device)
    x = x.to(device)
    if kind.weights.startswith("int"):
        weight = empty_weight(kind.out_features, kind.in_features, kind.weights, device)
        weight.codes.random_(0, 127), weight.scales.fill_(0.01)
        if weight.minimum is not None:
            weight.minimum.fill_(0.01)
        group = weight.format.group_size or 0
        copies = _copies(weight.codes)
        pool = itertools.cycle(copies)

        def run(limit: Tensor | None) -> Any:
            return quantized_linear(
                x, next(pool), weight.scales, weight.minimum, None, group,
                limit, None, None, None, False, SPARSE_ROWS, None,
            )  # fmt: skip
    else:
        stored = torch.rand(kind.in_features, kind.out_features, device=device).to(dtype)
        copies = _copies(stored)
        pool = itertools.cycle(copies)

        def run(limit: Tensor | None) -> Any:
            matrix = next(pool).t()
            if limit is None:
                return dense_linear(x, matrix, None)
            return sparse_linear(x, matrix, None, limit, None, None, None, False, SPARSE_ROWS, None)

    with torch.inference_mode():
        candidates = {"dense": lambda: run(None), "sparse": lambda: run(threshold)}
        if device.type == "cuda":
            candidates = {name: replayed(call, device, len(copies)) for name, call in candidates.items()}
        times = interleave(candidates, rounds=9, progress=False)
    return median(times["dense"]) / median(times["sparse"])


def _copies(tensor: Tensor) -> list[Tensor]:
    pool_bytes, most = (POOL_BYTES, 64) if tensor.device.type == "cpu" else (GPU_POOL_BYTES, 1024)
    copies = [torch.empty_like(tensor) for _ in range(min(max(pool_bytes // max(tensor.nbytes, 1), 2), most))]
    for each in copies:
        kernels.advise_huge_pages(each)
        each.copy_(tensor)
    return copies


def _where(device: torch.device) -> str:
    about = machine()
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {about['torch']}, deadband {about['deadband']}"
    return f"{about['processor']}, {about['kernels']}, {about['threads']} threads, deadband {about['deadband']}"


def _read(path: Path) -> dict[str, Any]:
    """What is remembered; a file that cannot be read counts for nothing, as all of it can be measured again."""
    try:
        remembered = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    known = isinstance(remembered, dict) and all(isinstance(each, dict) for each in remembered.values())
    return remembered if known else {}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
