"""What masks on weights drop, and what that is in FLOPs and time."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """What the masks of a sparsifier drop.

    Attributes:
        zeros: dropped entries and all entries of each tensor, by name.
        flops: of one call on the example, and without the products of dropped weights; 0 without an example.
        seconds: median latency of that call, dense and with the masks squashed: zeros alone make nothing faster.
    """

    zeros: dict[str, tuple[int, int]]
    flops: tuple[int, int] = (0, 0)
    seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def sparsity(self) -> float:
        """The share of dropped entries among all of these tensors."""
        return sum(zeros for zeros, _ in self.zeros.values()) / max(sum(size for _, size in self.zeros.values()), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"sparsity": self.sparsity, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [f"{zeros / size:7.1%}  {zeros:12,} of {size:12,}  {at}" for at, (zeros, size) in self.zeros.items()]
        lines.append(f"{self.sparsity:7.1%}  of all")
        if any(self.flops):
            lines.append(f"FLOPs {self.flops[0]:,}, without dropped weights {self.flops[1]:,}")
            lines.append(f"milliseconds, dense and masked: {self.seconds[0] * 1e3:.3f}, {self.seconds[1] * 1e3:.3f}")
        return "\n".join(lines)
