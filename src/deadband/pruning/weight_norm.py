"""Sparsifiers whose masks drop the blocks, or the entries within blocks, of least score; and a band of the diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deadband.calibration import Calibration
from deadband.masks.blocks import (
    block_mask,
    block_scores,
    block_sizes,
    check_blocks,
    in_shape_of,
    kept_blocks,
    matrix_of,
)
from deadband.masks.mask_weight import unmasked
from deadband.pruning.names import near
from deadband.pruning.sparsifier import BaseSparsifier


class WeightNormSparsifier(BaseSparsifier):
    """Drops the blocks of weights of least mean magnitude, or the smallest weights of some or all blocks.

    Weights of more than two dimensions are matrices [out, kernel positions x in]; blocks tile them from the first entry
    on, and those at the edges are what is inside. NaN counts as infinite; of equal blocks the last go first. Masks are
    made from the weights below the masks, so that what was dropped comes back once it is large.

    Args:
        sparsity_level: the share of blocks that is chosen: the nearest count, but less than all below 1.
        sparse_block_shape: (rows, columns) of a block, rows being outputs.
        zeros_per_block: how many entries of each chosen block are dropped, the smallest; None: all. So 2:4 is
            `sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2`, and any N:M alike.
        norm: of an entry: 2 (or None) its square, 1 its magnitude, or a function of the tensor.
        scope: within what blocks are compared: the "tensor", each "row" of blocks, or all "global" tensors together.
        by_entries: of a whole tensor, count dropped entries instead of blocks, which differ where blocks do not fit:
            the nearest to `sparsity_level`, up to all.

    All but `norm` can be set for each tensor by `prepare(config=...)`.

    Raises:
        NotImplementedError: another norm.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, 4.0]]))
        >>> sparsifier = WeightNormSparsifier(sparsity_level=1.0, zeros_per_block=2)
        >>> sparsifier.prepare(model)
        >>> sparsifier.step()
        >>> model[0].weight.tolist()
        [[3.0, 0.0, 0.0, 4.0]]

    Source: Zhu & Gupta 2017, arXiv 1710.01878; N:M: Mishra et al. 2021, arXiv 2104.08378.
    """

    def __init__(
        self,
        sparsity_level: float = 0.5,
        sparse_block_shape: tuple[int, int] = (1, 4),
        zeros_per_block: int | None = None,
        norm: Callable[[Tensor], Tensor] | int | None = None,
        *,
        scope: str = "tensor",
        by_entries: bool = False,
    ) -> None:
        if not callable(norm) and norm not in (None, 1, 2):
            raise NotImplementedError(f"norm={norm!r}; expected 1, 2 or a function of the weight")
        self.norm_fn: Callable[[Tensor], Tensor] = norm if callable(norm) else torch.abs if norm == 1 else torch.square
        zeros = math.prod(sparse_block_shape) if zeros_per_block is None else zeros_per_block
        blocks = {"sparse_block_shape": sparse_block_shape, "zeros_per_block": zeros}
        super().__init__({"sparsity_level": sparsity_level, **blocks, "scope": scope, "by_entries": by_entries})
        self._kept: dict[str, Tensor] = {}

    def scores(self, module: nn.Module, tensor_name: str, **group: Any) -> Tensor:
        """The score of each entry, a matrix [outputs, inputs] in float32 or float64; the least go first."""
        weight = unmasked(module, tensor_name)
        return self.norm_fn(matrix_of(weight.float() if weight.itemsize < 4 else weight, module))

    def check_group(self, **group: Any) -> None:
        """A ValueError that names the tensor if its configuration cannot be."""
        blocks = group["sparse_block_shape"], group["zeros_per_block"], group["scope"]
        check_blocks(group["tensor_fqn"], group["sparsity_level"], *blocks)

    def before_step(self) -> None:
        """Choose among the blocks of all tensors whose scope is global, by the shares that they ask for."""
        groups = [group for group in self.groups if group.get("scope") == "global"]
        parts = [block_scores(self.scores(**group), group["sparse_block_shape"]) for group in groups]
        sizes = [part.numel() for part in parts]
        asked = sum(group["sparsity_level"] * size for group, size in zip(groups, sizes, strict=True))
        if parts:
            together = torch.cat([part.flatten().to(parts[0]) for part in parts])
            chosen = kept_blocks(together, asked / len(together)).split(sizes)
            pairs = zip(groups, parts, chosen, strict=True)
            self._kept = {group["tensor_fqn"]: kept.view(part.shape).to(part.device) for group, part, kept in pairs}

    def update_mask(  # type: ignore[override]
        self,
        module: nn.Module,
        tensor_name: str,
        sparsity_level: float,
        sparse_block_shape: tuple[int, int],
        zeros_per_block: int,
        *,
        tensor_fqn: str,
        scope: str = "tensor",
        by_entries: bool = False,
        **kwargs: Any,
    ) -> None:
        """Make the mask of one tensor, in its dtype."""
        tensor, mask = unmasked(module, tensor_name), self.state[tensor_fqn]["mask"]
        if zeros_per_block == 0 or (sparsity_level <= 0 and scope != "global"):
            mask.data = torch.ones_like(tensor)
            return
        scores = self.scores(module, tensor_name, tensor_fqn=tensor_fqn, **kwargs)
        kept = self._kept.pop(tensor_fqn, None)
        if kept is None:
            sizes = block_sizes(scores.shape, sparse_block_shape) if by_entries and scope == "tensor" else None
            kept = kept_blocks(block_scores(scores, sparse_block_shape), sparsity_level, scope=scope, sizes=sizes)
        kept = block_mask(scores, kept, sparse_block_shape, zeros_per_block)
        mask.data = in_shape_of(kept, tensor, module).to(tensor.dtype)


class WandaSparsifier(WeightNormSparsifier):
    """Drops the weights that matter least on real data: score |w_ij| * ||x_j||, compared within each output.

    Args:
        calibration: what `deadband.calibrate` saw of the model's layers; it holds the norm of every input.
        sparsity_level, sparse_block_shape, zeros_per_block, scope: as for `WeightNormSparsifier`.

    Example:
        >>> import deadband
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> calibration = deadband.calibrate(model, [torch.tensor([[0.1, 1.0]])], progress=False)
        >>> sparsifier = WandaSparsifier(calibration)
        >>> sparsifier.prepare(model)
        >>> sparsifier.step()
        >>> model[0].weight.tolist()
        [[0.0, 1.0]]

    Source: Sun et al. 2023, arXiv 2306.11695.
    """

    def __init__(
        self,
        calibration: Calibration,
        sparsity_level: float = 0.5,
        sparse_block_shape: tuple[int, int] = (1, 1),
        zeros_per_block: int | None = None,
        *,
        scope: str = "row",
    ) -> None:
        super().__init__(sparsity_level, sparse_block_shape, zeros_per_block, norm=1, scope=scope)
        self.calibration = calibration

    def check_group(self, **group: Any) -> None:
        """A ValueError that names the tensor if its configuration cannot be, or the calibration did not see it."""
        super().check_group(**group)
        name, sites = group["module_fqn"], self.calibration.sites
        if name not in sites:
            raise ValueError(f"the calibration has nothing of {name!r}; {near(name, sites)}: leave it out of config")
        width = matrix_of(unmasked(group["module"], group["tensor_name"]), group["module"]).shape[1]
        if width % len(sites[name].rows):
            raise ValueError(f"{name!r} has {width} inputs, the calibration {len(sites[name].rows)}; calibrate again")

    def scores(self, module: nn.Module, tensor_name: str, **group: Any) -> Tensor:
        """Magnitudes times the root mean square of the inputs."""
        magnitudes = super().scores(module, tensor_name)
        site = self.calibration.sites[group["tensor_fqn"].rpartition(".")[0]]
        norms = torch.from_numpy((site.sum_of_squares / site.rows.clip(1)) ** 0.5).to(magnitudes)
        return magnitudes * norms.repeat(magnitudes.shape[1] // len(norms))


class NearlyDiagonalSparsifier(BaseSparsifier):
    """Keeps a band around the diagonal: `nearliness` diagonals, an odd number; nothing if it is not positive."""

    def __init__(self, nearliness: int = 1) -> None:
        super().__init__({"nearliness": nearliness})

    def check_group(self, **group: Any) -> None:
        """A ValueError that names the tensor if its configuration cannot be."""
        width, shape = group["nearliness"], list(unmasked(group["module"], group["tensor_name"]).shape)
        if len(shape) != 2 or type(width) is not int or (width > 0 and (width % 2 == 0 or width // 2 >= min(shape))):
            what = f"{group['tensor_fqn']}: nearliness={width!r} for a tensor of shape {shape}"
            raise ValueError(f"{what}; expected a matrix, and an odd number less than twice its shorter side")

    def update_mask(  # type: ignore[override]
        self, module: nn.Module, tensor_name: str, nearliness: int, *, tensor_fqn: str, **kwargs: Any
    ) -> None:
        """Make the mask of one tensor, in its dtype."""
        ones, reach = torch.ones_like(unmasked(module, tensor_name)), nearliness // 2
        self.state[tensor_fqn]["mask"].data = (
            ones.triu(-reach).tril(reach) if nearliness > 0 else torch.zeros_like(ones)
        )
