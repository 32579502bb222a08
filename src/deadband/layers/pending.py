"""The output of an up-projection that nobody has looked at yet: with the gate known, part of it need not be computed.

Models multiply it by what they made of the gate's output, and hand the product to the down-projection, which then has
all three. Whoever looks at it in another way gets the values, computed then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from deadband.layers.computed import OF_MEMORY


class PendingOutput(Tensor):
    """An output, or its product with a gate, whose shape, dtype and device are known and whose values are computed on
    demand.

    Attributes:
        x: what the up-projection was given.
        layer: the up-projection.
        gate: what its output is multiplied by, if that is known.
    """

    x: Tensor
    layer: Any
    gate: Tensor | None
    compute: Callable[[], Tensor]
    known: Tensor | None

    @staticmethod
    def __new__(
        cls, x: Tensor, layer: Any, shape: Sequence[int], compute: Callable[[], Tensor], gate: Tensor | None = None
    ) -> PendingOutput:
        """`compute` gives the output of the up-projection."""
        return Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=x.dtype, device=x.device)

    def __init__(
        self, x: Tensor, layer: Any, shape: Sequence[int], compute: Callable[[], Tensor], gate: Tensor | None = None
    ) -> None:
        self.x, self.layer, self.gate, self.compute, self.known = x, layer, gate, compute, None

    def computed(self) -> Tensor:
        """The values, as a plain tensor."""
        if self.known is None:
            output = self.compute()
            self.known = output if self.gate is None else self.gate * output
        return self.known

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """A product with a gate stays pending; all else happens to the values."""
        if func is torch.ops.aten.mul.Tensor and not kwargs:
            one, other = args
            up, gate = (one, other) if isinstance(one, PendingOutput) else (other, one)
            if (
                isinstance(up, PendingOutput)
                and up.gate is None
                and up.known is None
                and type(gate) is Tensor
                and gate.shape == up.shape
                and gate.dtype is up.dtype
            ):
                return PendingOutput(up.x, up.layer, up.shape, up.compute, gate)
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What no operator does: to reach for the memory. Results are plain tensors."""
        if func in OF_MEMORY:
            return func(_plain(args[0]), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.computed().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.computed())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)


def _plain(value: Any) -> Any:
    return value.computed() if isinstance(value, PendingOutput) else value
