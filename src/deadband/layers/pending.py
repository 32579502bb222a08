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
        cls,
        x: Tensor,
        layer: Any,
        shape: Sequence[int],
        dtype: torch.dtype,
        compute: Callable[[], Tensor],
        gate: Tensor | None = None,
    ) -> PendingOutput:
        """`compute` gives the output of the up-projection, of that shape and dtype."""
        return Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=x.device)

    def __init__(
        self,
        x: Tensor,
        layer: Any,
        shape: Sequence[int],
        dtype: torch.dtype,
        compute: Callable[[], Tensor],
        gate: Tensor | None = None,
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
        if func is torch.ops.aten.mul.Tensor and not kwargs and (product := _product(*args)) is not None:
            return product
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What no operator does: to reach for the memory, and to remember the gradients of a gate.

        Results are plain tensors otherwise.
        """
        if func in OF_MEMORY:
            return func(_plain(args[0]), *args[1:], **(kwargs or {}))
        if func in _PRODUCTS and not kwargs and (product := _product(*args)) is not None:
            return product
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.computed().clone()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.computed())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)


_PRODUCTS = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)


def _product(one: Any, other: Any) -> PendingOutput | None:
    """An output times what can be its gate, pending; None where it is anything else."""
    up, gate = (one, other) if isinstance(one, PendingOutput) else (other, one)
    if (
        not isinstance(up, PendingOutput)
        or up.gate is not None
        or up.known is not None
        or type(gate) is not Tensor
        or gate.shape != up.shape
        or gate.dtype is not up.dtype
    ):
        return None
    return PendingOutput(up.x, up.layer, up.shape, up.dtype, up.compute, gate)


def _plain(value: Any) -> Any:
    return value.computed() if isinstance(value, PendingOutput) else value
