"""How a user's `aggregate_fn(data, x)` is applied to input after input: shapes that change, features, aliases."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deadband.masks.entrywise import is_entrywise

AggregateFn = Callable[[Tensor, Tensor], Tensor]


class Accumulator:
    """Applies `fn` to what was accumulated and the next input.

    Args:
        name: of the layer, for messages.
        fn: the user's function.
        features: the features to look at, one by one along `feature_dim`; None: the input as a whole.
        zero_start: the first call gets zeros and the first input, as in torch.ao.pruning. Else the first input is where
            the accumulator starts, and `fn` is not called for it.
        widen: inputs of half precision are given to `fn` in float32.
    """

    def __init__(
        self,
        name: str,
        fn: AggregateFn,
        features: list[int] | None = None,
        feature_dim: int | None = None,
        *,
        zero_start: bool = True,
        widen: bool = False,
    ) -> None:
        self.name, self.fn, self.zero_start, self.widen = name, fn, zero_start, widen
        self.features, self.feature_dim = features, feature_dim
        self.selection = None if features is None else Selection(name, features, feature_dim or 0)
        self.entrywise = features is not None and is_entrywise(fn)
        self.block: Tensor | None = None  # all chosen features in one tensor; `parts` are views of it
        self.parts: list[Tensor] = []
        self.gaps: dict[int, Tensor] = {}  # entries of what was accumulated that no input has had yet

    def reset(self) -> None:
        """Forget what was accumulated."""
        self.block, self.parts, self.gaps = None, [], {}

    def release(self) -> None:
        """Leave the tensors given out so far to whoever has them: they will not change any more."""
        self.block, self.parts = None, []

    def add(self, data: Any, x: Tensor) -> Any:
        """What is accumulated after `x`: a tensor, or a list of one tensor for each feature."""
        if self.widen and x.is_floating_point() and x.dtype.itemsize < 4:
            x = x.float()
        return self._add_one(data, x) if self.features is None else self._add_features(data, x)

    def _add_features(self, data: list[Tensor] | None, x: Tensor) -> list[Tensor]:
        assert self.selection is not None
        assert self.feature_dim is not None
        if not self.features:
            return []
        chosen = self.selection.of(x)
        if self.entrywise:
            block = self._block(data)
            if block is not None or data is None:
                return self._share(self._add_one(block, chosen))
        self.block, self.parts = None, []
        # copies, as each may be written to by the function, or kept by it
        slices = [part.clone(memory_format=torch.contiguous_format) for part in chosen.split(1, self.feature_dim)]
        return [self._add_one(None if data is None else data[i], part, i + 1) for i, part in enumerate(slices)]

    def _block(self, data: list[Tensor] | None) -> Tensor | None:
        if data is None:
            self.release()
            return None
        try:
            if self.block is not None and data == self.parts:  # by identity, fast; see hooks.MaskInput
                return self.block
        except RuntimeError:  # somebody put other tensors into the list
            pass
        assert self.feature_dim is not None
        self.block = None
        alike = len(set(map(_kind, data))) == 1
        alike = alike and data[0].dim() > 0 and data[0].shape[self.feature_dim] == 1
        return torch.cat(data, self.feature_dim) if alike else None

    def _share(self, result: Tensor) -> list[Tensor]:
        block = self.block
        if block is not None and _kind(block) == _kind(result):
            block.copy_(result)  # the views stay: a thousand new ones take longer than all the rest
        else:
            assert self.feature_dim is not None
            self.block = result
            self.parts = list(result.split(1, self.feature_dim))
        return list(self.parts)

    def _add_one(self, data: Tensor | None, x: Tensor, feature: int = 0) -> Tensor:
        if data is None:
            if not self.zero_start:
                return x.clone()
            data = torch.zeros_like(x)
        if data.shape == x.shape and feature not in self.gaps:
            result = self.fn(data, x)
        else:
            result = self._add_other_shape(data, x, feature)
        if not isinstance(result, Tensor):
            raise TypeError(f"layer {self.name!r}: aggregate_fn returned {type(result).__name__}, expected a tensor")
        if result.requires_grad:
            result = result.detach()
        if result is x or result.is_inference() or (result._is_view() and _aliases(result, x)):
            result = result.clone()  # the activation itself may be changed in place later
        return result

    def _add_other_shape(self, data: Tensor, x: Tensor, feature: int) -> Tensor:
        """The input has another shape than what was accumulated: a shorter last batch, a longer sequence.

        A function that works entry by entry is applied where both have entries, and the rest of either stays. Other
        functions (concatenation) get both as they are.
        """
        try:
            result = self._overlap(data, x, feature) if data.dim() == x.dim() else None
            return self.fn(data, x) if result is None else result
        except RuntimeError as error:
            raise RuntimeError(
                f"layer {self.name!r}: aggregate_fn cannot put an input of shape {tuple(x.shape)} to what was "
                f"aggregated, of shape {tuple(data.shape)}: {error}. Inputs of different shapes need a function that "
                "works entry by entry (torch.add, torch.maximum) or one of deadband.aggregate"
            ) from error

    def _overlap(self, data: Tensor, x: Tensor, feature: int) -> Tensor | None:
        union = [max(sizes) for sizes in zip(data.shape, x.shape, strict=True)]
        before, now = (tuple(slice(size) for size in tensor.shape) for tensor in (data, x))
        result = data.new_zeros(union)
        result[before] = data
        overlap = result[now].clone()
        with _PointwiseWitness(x.shape) as witness:
            part = self.fn(overlap, x)
        if not witness.pointwise or not isinstance(part, Tensor) or part.shape != x.shape:
            return None
        if not self.zero_start:  # an entry that no input had before starts from this one
            gaps = torch.ones(union, dtype=torch.bool, device=x.device)
            gaps[before] = self.gaps.get(feature, False)
            part = torch.where(gaps[now], x, part)
            gaps[now] = False
            self.gaps.pop(feature, None)
            if bool(gaps.any()):
                self.gaps[feature] = gaps
        result = result.to(part.dtype)
        result[now] = part
        return result


class _PointwiseWitness(TorchDispatchMode):
    """Sees whether all that runs inside works entry by entry on tensors of one shape."""

    _NEUTRAL = frozenset(
        (
            torch.ops.aten.detach.default,
            torch.ops.aten.alias.default,
            torch.ops.aten._to_copy.default,
            torch.ops.aten.zeros_like.default,
            torch.ops.aten.ones_like.default,
            torch.ops.aten.full_like.default,
            torch.ops.aten.copy_.default,
        )
    )

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.pointwise = shape, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = torch.Tag.pointwise in func.tags or func in self._NEUTRAL
        if not known or any(isinstance(x, Tensor) and x.numel() != 1 and x.shape != self.shape for x in args):
            self.pointwise = False
        return func(*args, **(kwargs or {}))


def as_features(features: Any) -> list[int]:
    """Features given as a list, tuple, range, set, generator, tensor or single number, as a list of whole numbers.

    Raises:
        TypeError: an entry is not a whole number.
        ValueError: an entry comes twice.
    """
    if isinstance(features, Tensor):
        features = features.tolist()
    if isinstance(features, int) or not isinstance(features, Iterable):
        features = [features]
    result = []
    for feature in features:
        try:
            if isinstance(feature, bool) or "bool" in type(feature).__name__:
                raise TypeError
            result.append(operator.index(feature))
        except TypeError:
            raise TypeError(
                f"features holds {feature!r}; expected whole numbers, each a feature along feature_dim"
            ) from None
    if len(set(result)) != len(result):
        twice = next(feature for feature in result if result.count(feature) > 1)
        raise ValueError(f"features names {twice} more than once; expected each feature at most once")
    return result


class Selection:
    """The chosen features of inputs, along one dimension."""

    def __init__(self, name: str, features: list[int], dim: int) -> None:
        self.name, self.features, self.dim = name, features, dim
        self._known: tuple[Any, Any] = (None, None)

    def index(self, shape: torch.Size) -> list[int]:
        """The features as indices into an input of `shape`, negative ones counted from the end.

        Raises:
            IndexError: the dimension or a feature is out of range.
            ValueError: two entries mean the same feature.
        """
        if not -len(shape) <= self.dim < len(shape):
            raise IndexError(
                f"layer {self.name!r}: feature_dim={self.dim} is out of range for its input of shape {tuple(shape)}"
            )
        size = shape[self.dim]
        for feature in (min(self.features, default=0), max(self.features, default=-size)):
            if self.features and not -size <= feature < size:
                raise IndexError(
                    f"layer {self.name!r}: feature {feature} is out of range; its input of shape {tuple(shape)} has "
                    f"{size} features along dimension {self.dim}"
                )
        index = [feature % size for feature in self.features]
        if len(set(index)) != len(index):
            raise ValueError(f"layer {self.name!r}: features {self.features} name one of {size} features twice")
        return index

    def of(self, x: Tensor) -> Tensor:
        """The chosen features of x; a view where they lie at even distances."""
        key = (x.shape[self.dim] if -x.dim() <= self.dim < x.dim() else None, x.dim(), x.device)
        if self._known[0] != key:
            index = self.index(x.shape)
            step = index[1] - index[0] if len(index) > 1 else 1
            even = step > 0 and index == list(range(index[0], index[0] + step * len(index), step))
            self._known = key, slice(index[0], index[-1] + 1, step) if even else torch.tensor(index, device=x.device)
        where = self._known[1]
        if isinstance(where, slice):
            return x[(slice(None),) * (self.dim % x.dim()) + (where,)]
        return x.index_select(self.dim, where)


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _aliases(a: Tensor, b: Tensor) -> bool:
    try:
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.numel() > 0
    except (NotImplementedError, RuntimeError):
        return True  # a tensor without a storage of its own: copy, to be safe
