"""The weight of a quantised layer as a tensor: computed when its values are read, quantised again when written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Source(Protocol):
    """What a `ComputedWeight` stands for."""

    def compute(self) -> Tensor:
        """The whole weight, as a new tensor."""

    def compute_row(self, index: int) -> Tensor:
        """The part of the weight at `index` along its first dimension."""

    def take_(self, weight: Tensor) -> None:
        """Become this weight."""


class ComputedWeight(Tensor):
    """A weight, or a view of one, whose shape, dtype and device are known and whose values are computed on demand.

    Operators that read it give plain tensors. Writes in place, to views too, and assignments to `data` reach the
    source. Values are kept no longer than the object.
    """

    source: Source
    root: ComputedWeight  # the whole that this is a view of, or itself
    place: Callable[[Tensor], Any] | None  # finds this view in the whole
    row: int | None  # set where the source can compute this part alone
    known: Tensor | None  # the values, once computed
    _is_hf_initialized = True  # transformers gives random values to what a checkpoint lacks

    @staticmethod
    def __new__(cls, source: Source, like: Tensor, device: torch.device, *view: Any) -> ComputedWeight:
        """`like` has the shape, the strides and the dtype."""
        return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device)

    def __init__(
        self,
        source: Source,
        like: Tensor,
        device: torch.device,
        root: ComputedWeight | None = None,
        place: Callable[[Tensor], Any] | None = None,
        row: int | None = None,
    ) -> None:
        self.source, self.place, self.row, self.known = source, place, row, None
        self.root = self if root is None else root

    def computed(self) -> Tensor:
        """The values, as a plain tensor."""
        if self.known is None:
            if self.row is not None and self.root.known is None:
                return self.source.compute_row(self.row)
            self.known = self.source.compute() if self.place is None else self.place(self.root.computed())
        return self.known

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What no operator does: to assign `data`, and to reach for the memory."""
        if func == _SET_DATA:  # a new object each time
            return args[0].assign(args[1])
        if func in OF_MEMORY:
            result = func(_plain(args[0]), *args[1:], **(kwargs or {}))
            if func is Tensor.numpy:
                result.setflags(write=False)  # a write would be lost
            return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """An operator, on the values."""
        kwargs = kwargs or {}
        written = [each for each in _written(func, args, kwargs) if isinstance(each, ComputedWeight)]
        if not written:
            if isinstance(args[0], ComputedWeight) and _makes_views(func):
                return args[0].view_by(func, args[1:], kwargs)
            return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        for each in written:
            each.root.computed()  # so that what is computed next is a part of it
        func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        for each in written:
            each.source.take_(each.root.computed())
        return written[0] if func._schema.returns else None

    def view_by(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator that makes views makes of this one."""
        like = func(torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta"), *args, **kwargs)
        before = self.place

        def place(whole: Tensor) -> Any:
            return func(whole if before is None else before(whole), *args, **kwargs)

        if not isinstance(like, Tensor):
            parts = [lambda whole, index=index: place(whole)[index] for index in range(len(like))]
            return [
                ComputedWeight(self.source, each, self.device, self.root, part)
                for each, part in zip(like, parts, strict=True)
            ]
        row = self.row if func is torch.ops.aten.detach.default else None
        if func is torch.ops.aten.select.int and self.root is self and args[0] == 0:
            row = args[1] % self.shape[0]
        return ComputedWeight(self.source, like, self.device, self.root, place, row)

    def assign(self, value: Tensor) -> None:
        """What `weight.data = value` does."""
        if isinstance(value, ComputedWeight) and value.root is self.root:
            return  # `weight.data += x` ends with this
        if value.shape != self.shape:
            raise ValueError(f"the weight of a quantised layer is {list(self.shape)}, got {list(value.shape)}")
        self.detach().copy_(value)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.computed().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return repr(self.computed())


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
OF_MEMORY = {Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.tolist}


def _plain(value: Any) -> Any:
    return value.computed() if isinstance(value, ComputedWeight) else value


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operator writes to."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tree_leaves(args[index] if index < len(args) else kwargs.get(argument.name))
    return written


def _makes_views(func: Any) -> bool:
    return any(each.alias_info is not None for each in func._schema.returns)
