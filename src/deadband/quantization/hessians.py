"""What rounding weights a column at a time needs to know of the inputs: their second moments, pair by pair."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from deadband.calibration.watcher import InputWatcher, require_reached
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
    shared = _SharedInputs()
    shared.watch(model, batches[:1], names, "look", False)
    followers: dict[str, list[str]] = {}
    for name in names:
        followers.setdefault(shared.leaders.get(name, name), []).append(name)
    asked = names  # the first pass tells of all that are never reached
    for leaders in _passes({name: shape_of(model.get_submodule(name))[1] for name in followers}, memory):
        watcher = _Hessians(leaders)
        watcher.watch(model, batches, asked or leaders, "hessians", progress)
        require_reached(asked, {name for name, rows in watcher.rows_seen.items() if rows})
        asked = []
        for leader in leaders:
            total = watcher.sums.pop(leader).div_(watcher.rows_seen[leader])
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


class _SharedInputs(InputWatcher):
    """Which site was the first to be given the tensor that a site is given."""

    def __init__(self) -> None:
        super().__init__()
        self.leaders: dict[str, str] = {}

    def see(self, name: str, x: Tensor) -> None:
        self.leaders.setdefault(name, self.look(name, x, lambda rows: name))


class _Hessians(InputWatcher):
    """Sums of the products of every two entries of a row; rows with NaN or infinity are left out."""

    def __init__(self, wanted: Sequence[str]) -> None:
        super().__init__()
        self.wanted = frozenset(wanted)
        self.sums: dict[str, Tensor] = {}
        self.rows_seen: dict[str, int] = {}

    def see(self, name: str, x: Tensor) -> None:
        rows = self.rows(name, x).float()
        rows = rows[rows.isfinite().all(-1)]
        self.rows_seen[name] = self.rows_seen.get(name, 0) + len(rows)
        if name not in self.wanted:
            return
        if name not in self.sums:
            self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.sums[name].addmm_(rows.T, rows)
