"""What rounding weights a column at a time needs to know of the inputs: their second moments, pair by pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from deadband.calibration.row_sums import InputProducts
from deadband.calibration.watcher import SharedInputs, require_reached
from deadband.layers.experts import module_at
from deadband.layers.sites import shape_of
from deadband.running.batches import taken


def input_hessians(
    model: nn.Module, batches: Iterable[Any], sites: Iterable[str], *, memory: int = 2 * 2**30, progress: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """E[x_i x_j] over the tokens that each site sees, float32 [in, in], one site after the other: for `quantize`.

    Sites that are given the same tensor in the first batch (q, k and v; gate and up) get the same result. The model has
    to stay as it is until the last site.

    Args:
        model: any module; the batches run through it in eval mode, once for finding such sites (the first batch only)
            and as often as `memory` makes it necessary.
        batches: as for `deadband.calibrate`.
        sites: names, as `deadband.layers.sites.find_sites` gives them.
        memory: bytes that the results of one pass may take. A site that alone takes more gets a pass of its own.
        progress: show a progress bar on a terminal.

    Yields:
        Pairs of name and matrix.

    Raises:
        ValueError: no batch, or sites that were never reached; all of them are named.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> dict(input_hessians(model, [torch.tensor([[1.0, 2.0]])], ["0"]))
        {'0': tensor([[1., 2.],
                [2., 4.]])}
    """
    batches, names = taken(batches), list(sites)
    shared = SharedInputs()
    shared.watch(model, batches[:1], names, "look", False)
    leader_of = {name: group[0] for group in shared.groups for name in group}
    followers: dict[str, list[str]] = {}
    for name in names:
        followers.setdefault(leader_of.get(name, name), []).append(name)
    asked = names  # the first pass tells of all that are never reached
    for leaders in _passes({name: shape_of(module_at(model, name))[1] for name in followers}, memory):
        watcher = InputProducts(leaders)
        watcher.watch(model, batches, asked or leaders, "hessians", progress)
        require_reached(asked, set(filter(watcher.sums.reached, asked)))
        asked = []
        for leader in leaders:
            total = watcher.sums.totals.pop(leader).div_(watcher.sums.counts[leader])
            for name in followers[leader]:
                yield name, total
            del total


def _passes(sizes: dict[str, int], memory: int) -> Iterator[list[str]]:
    names: list[str] = []
    used = 0
    for name, size in sizes.items():
        needed = 4 * size * size
        if names and used + needed > memory:
            yield names
            names, used = [], 0
        names.append(name)
        used += needed
    if names:
        yield names
