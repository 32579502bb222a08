"""Keys and values of one sequence with room to grow, behind transformers' own DynamicCache.

While the compiled graph of `deadband.decoding.decoder` writes there, the cache's layers are of a twin class that looks
into a `Store`; they turn into plain ones as soon as anything else writes to them.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 64
"""Attention looks at a whole number of so many tokens, the last of them masked: tails of vectors cost more. Two blocks
at least, as torch.export takes a size of 1 for a constant."""


class Store:
    """Keys and values of all layers of one sequence, with room to grow: what the compiled graph reads and writes.

    Keys lie as [1, heads, head_dim, capacity], so that the scores of many tokens are computed side by side.

    Args:
        keys, values: of each layer, for so many tokens.
        length: of the sequence.
        shelf: where memory comes from, and goes back to; without one it is new.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: int, shelf: Shelf | None = None) -> None:
        self.length = length
        self.shelf = shelf
        self.capacity = 0
        self.owner: Any = None  # the decoder that reads and writes here
        self.intact = True  # whether every layer of the cache still has its keys and values here
        self.sliding = False  # whether a layer of the cache forgets what is outside of its window
        self.keys, self.values = keys, values
        self.inputs: list[Tensor] = []
        self._returned: Any = None  # what gives memory back to the shelf once this is gone
        self.reserve(length + BLOCK)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all."""
        if length <= self.capacity:
            return
        capacity = max(2 * BLOCK, 1 << (length - 1).bit_length())
        held = self.inputs
        place = (capacity, _stream(self.keys[0].device))
        shelved = self.shelf.take(place) if self.shelf is not None else [None] * (2 * len(self.keys))
        places = iter(shelved)
        with torch.inference_mode(False), torch.no_grad():  # memory that later sequences may write to as well
            self.keys = [grown(each, 3, capacity, next(places)) for each in self.keys]
            self.values = [grown(each, 2, capacity, next(places)) for each in self.values]
        self.inputs = [*self.keys, *self.values]
        if self.shelf is not None:
            if held:
                self._returned()
            self._returned = weakref.finalize(self, self.shelf.give, place, self.inputs)
        self.capacity = capacity


_SHELVED = 2  # sequences of a capacity


class Shelf:
    """Memory of finished sequences for the next ones: a CUDA graph knows its tensors by their addresses."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.free: dict[tuple[int, int], list[list[Tensor]]] = {}

    def take(self, place: tuple[int, int]) -> Sequence[Tensor | None]:
        """Tensors of a sequence whose memory nobody else looks at, or as many times None.

        Args:
            place: how many tokens they have room for, and the stream on which they are used.
        """
        free = self.free.get(place, ())
        for index, tensors in enumerate(free):
            if not any(_shared(each) for each in tensors):
                return self.free[place].pop(index)
        return [None] * (2 * self.layers)

    def give(self, place: tuple[int, int], tensors: list[Tensor]) -> None:
        """Take back what a sequence no longer needs; of each place, the last few stay."""
        free = self.free.setdefault(place, [])
        free.append(tensors)
        del free[:-_SHELVED]


def _stream(device: torch.device) -> int:
    """The stream whose work is done in its order; memory may be used again behind what is queued there, alone."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _shared(tensor: Tensor) -> bool:
    """Whether there are views of it, or other tensors in its memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2  # its own, and the one asked


def grown(tensor: Tensor, dim: int, size: int, place: Tensor | None = None) -> Tensor:
    """The tensor, longer by zeros along `dim`; in `place`, if given."""
    shape = list(tensor.shape)
    shape[dim] = size
    # zeros, as what is masked is still multiplied by a weight of zero
    grown = tensor.new_zeros(shape) if place is None else place.zero_()
    grown.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return grown


def _window(layer: Any) -> int:
    """How many of the last tokens the plain layer would hold."""
    length = layer.__dict__["store"].length
    return min(length, layer.sliding_window - 1) if layer.is_sliding else length


def _keys(layer: Any) -> Tensor:
    store, window = layer.__dict__["store"], _window(layer)
    return store.keys[layer.__dict__["index"]].narrow(3, store.length - window, window).transpose(2, 3)


def _values(layer: Any) -> Tensor:
    store, window = layer.__dict__["store"], _window(layer)
    return store.values[layer.__dict__["index"]].narrow(2, store.length - window, window)


def _length(layer: Any) -> int:
    return layer.__dict__["store"].length


def _states(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in _STATES[: 3 if layer.is_sliding else 2]}


def _crop(layer: Any, tokens_to_remove: int) -> None:
    """Forget the last tokens in place: cropping goes from layer to layer, and the first one does it for all."""
    store = layer.__dict__["store"]
    if tokens_to_remove >= 0 or store.sliding or not store.intact:
        type(layer).__base__.crop(layer, tokens_to_remove)  # type: ignore[union-attr]
    elif layer.__dict__["index"] == 0:
        store.length = max(store.length + tokens_to_remove, 0)


def _reduce_layer(layer: Any, protocol: Any) -> Any:
    """Copies and pickles are plain layers with states of their own."""
    state = {name: value for name, value in layer.__dict__.items() if name not in ("store", "index")}
    state |= {name: value.clone() if isinstance(value, Tensor) else value for name, value in _states(layer).items()}
    return copyreg._reconstructor, (type(layer).__base__, object, None), state  # type: ignore[attr-defined]


def _detach(layer: Any) -> None:
    """Make the plain layer of a stored one again, with the same states."""
    state = _states(layer)
    layer.__dict__.pop("store").intact = False
    del layer.__dict__["index"]
    layer.__class__ = type(layer).__base__
    layer.__dict__.update(state)


def _stored(name: str, view: Callable[[Any], Any]) -> property:
    """An attribute that lies in the Store, until it is assigned to: then the layer is a plain one again."""

    def assign(layer: Any, value: Any) -> None:
        _detach(layer)
        setattr(layer, name, value)

    return property(view, assign)


_STATES = ("keys", "values", "cumulative_length")


@functools.cache
def layer_classes() -> dict[type, type]:
    """transformers' cache layers that can keep their states in a Store, and their twins that do."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    body = {
        "keys": _stored("keys", _keys),
        "values": _stored("values", _values),
        "crop": _crop,
        "__reduce_ex__": _reduce_layer,
    }
    sliding = {**body, "cumulative_length": _stored("cumulative_length", _length)}
    return {
        DynamicLayer: type("StoredLayer", (DynamicLayer,), body),
        DynamicSlidingWindowLayer: type("StoredSlidingWindowLayer", (DynamicSlidingWindowLayer,), sliding),
    }


def attach(cache: Any, owner: Any = None, shelf: Shelf | None = None) -> Store:
    """Move the states of a DynamicCache into a new Store, in place."""
    length = cache.get_seq_length()
    keys, values = [], []
    for layer in cache.layers:
        if "store" in layer.__dict__:
            _detach(layer)
        key, value = layer.keys, layer.values
        missing = length - key.shape[2]  # what a sliding window has forgotten; masked in every case
        keys.append(nn.functional.pad(key.transpose(2, 3), (missing, 0)))
        values.append(nn.functional.pad(value, (0, 0, missing, 0)))
    store = Store(keys, values, length, shelf)
    store.owner = owner
    store.sliding = any(layer.is_sliding for layer in cache.layers)
    twins = layer_classes()
    for index, layer in enumerate(cache.layers):
        for name in _STATES:
            layer.__dict__.pop(name, None)
        layer.__dict__.update(store=store, index=index)
        layer.__class__ = twins[type(layer)]
    return store
