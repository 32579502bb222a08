"""One way to watch what goes into a layer, and to mask it: forward pre-hooks that see every kind of argument."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

BUFFER = "activation_mask"
"""The name of the buffer that holds a layer's mask; a second mask on the same layer gets a number behind it."""

_BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a layer's arguments, in the order in which it declares them."""
    try:
        return tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ()


def take_input(name: str, args: tuple, kwargs: dict, order: tuple[str, ...] = ()) -> Tensor:
    """The tensor that a hook looks at: the first positional argument or, if there is none, the first keyword tensor.

    Args:
        name: of the layer, for messages.
        args, kwargs: of one call.
        order: what comes first among keywords: see `arguments_of`.

    Raises:
        TypeError: it is not a dense tensor.
    """
    given: Any = args[0] if args else kwargs.get(_first_tensor(kwargs, order))
    if not isinstance(given, Tensor):
        what = f"got {type(given).__name__} as its first argument" if args else "was called without a tensor"
        raise TypeError(f"layer {name!r} {what}; expected a tensor. Register the layer inside it that takes the tensor")
    if given.layout is not torch.strided and not given.is_nested:
        raise TypeError(f"layer {name!r} got a {given.layout} tensor; expected a dense one: call .to_dense() before it")
    return given


def with_input(args: tuple, kwargs: dict, x: Tensor, order: tuple[str, ...] = ()) -> tuple[tuple, dict]:
    """The same arguments with `x` in the place of the tensor that `take_input` found."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, _first_tensor(kwargs, order): x}


def _first_tensor(kwargs: dict, order: tuple[str, ...]) -> str:
    for name in (*order, *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return name
    return ""


def attach(module: nn.Module, hook: Any) -> RemovableHandle:
    """Put a hook in front of a layer; code that torch.compile made before this is compiled again, to see it."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    forget_compiled()
    return handle


def detach(handle: RemovableHandle) -> None:
    """Take a hook away again."""
    handle.remove()
    forget_compiled()


def forget_compiled() -> None:
    """Dynamo does not guard on hooks: a model compiled before would go on without those that come later."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where kept and zero elsewhere, whatever stood there (NaN and infinity too), in the dtype of `x`.

    Args:
        x: of any shape and dtype.
        mask: broadcasts to the shape of x; of a nested tensor, to `padded_shape`. Bool, or numbers to multiply with.

    Example:
        >>> apply_mask(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if x.is_nested:
        return _mask_nested(x, mask)
    if mask.dtype is not torch.bool:
        return torch.where(mask != 0, (x * mask).to(x.dtype), torch.zeros((), dtype=x.dtype, device=x.device))
    if not (x.is_floating_point() or x.is_complex()):
        return x * mask  # integers have no NaN that would survive
    plain = x.numel() > 4096 and type(x) is Tensor and x.device.type == "cpu" and x.dtype in _BITS
    if plain and not (x.requires_grad and torch.is_grad_enabled()) and not _traced_or_transformed(x):
        # torch.where takes 3 to 7 times as long as a product on CPUs (a few thousand entries aside); an `and` with all
        # ones or all zeros takes no longer
        integer = _BITS[x.dtype]
        return (x.view(integer) & -mask.to(integer)).view(x.dtype)
    return torch.where(mask, x, 0)


# ------------------------------------------------------------------------------------------------------ nested tensors
#
# torch's TransformerEncoder makes them of padded batches in evaluation: parts that differ in length along one dimension
# or several. Few operators take them, so layers' inputs are looked at part by part.


def padded_shape(x: Tensor) -> torch.Size:
    """The shape of x; of a nested tensor, with the length of its longest part."""
    if not x.is_nested:
        return x.shape
    parts = x.unbind()
    return torch.Size([len(parts), *map(max, zip(*(part.shape for part in parts), strict=True))])


def padded(x: Tensor) -> Tensor:
    """x; of a nested tensor, its parts in one dense tensor, with zeros behind the shorter ones."""
    return torch.nested.to_padded_tensor(x, 0.0) if x.is_nested else x


def rows_of_parts(x: Tensor, dim: int = -1) -> Tensor:
    """x; of a nested tensor, what its parts hold, without padding: [rows, size along `dim`]."""
    if not x.is_nested:
        return x
    dim = dim if dim < 0 else dim - x.dim()
    if dim == -x.dim():
        raise IndexError("features along the first dimension of a nested tensor, which counts its parts")
    parts = [part.movedim(dim, -1) for part in x.unbind()]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def parts_of_rows(rows: Tensor, like: Tensor) -> Tensor:
    """What `rows_of_parts(like)` was turned into, in the shape of `like`."""
    if not like.is_nested:
        return rows
    pieces = iter(rows.split([part.numel() // part.shape[-1] for part in like.unbind()]))
    return map_nested(like, lambda _, part: next(pieces).reshape(part.shape))


def map_nested(x: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The nested tensor of what `function` makes of each part, given its number, without changing its length."""
    parts = [function(number, part) for number, part in enumerate(x.unbind())]
    return _jagged(torch.cat(parts, _ragged(x) - 1), x) if _ragged(x) else torch.nested.as_nested_tensor(parts)


def _ragged(x: Any) -> int:
    """The dimension along which the parts of a tensor of torch.jagged differ; 0 for other layouts."""
    return x._ragged_idx if x.layout is torch.jagged else 0


def _jagged(values: Tensor, like: Any) -> Tensor:
    # with the same offsets, without which it could not be added to `like`
    return torch.nested.nested_tensor_from_jagged(values, like.offsets(), jagged_dim=_ragged(like))


def _mask_nested(x: Tensor, mask: Tensor) -> Tensor:
    if x.layout is torch.jagged and mask.dim() < x.dim() - _ragged(x):  # the same for all parts; compilers follow this
        return _jagged(apply_mask(x.values(), mask), x)
    return map_nested(x, lambda number, part: apply_mask(part, _of_part(mask, x.dim(), number, part.shape)))


def _of_part(mask: Tensor, dims: int, number: int, shape: torch.Size) -> Tensor:
    """What of a mask for a nested tensor of `dims` dimensions is for one of its parts, of `shape`."""
    if mask.dim() == dims:
        mask = mask[number if mask.shape[0] > 1 else 0]
    sizes = shape[len(shape) - mask.dim() :]
    return mask[tuple(slice(None) if own == 1 else slice(size) for own, size in zip(mask.shape, sizes, strict=True))]


def _pad_attention(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Arguments of an attention without nested tensors; the output becomes one again.

    torch attends over nested tensors only where query, key and value are one tensor, and a masked query is another.
    """
    given = {**dict(zip(arguments_of(module), args, strict=False)), **kwargs}
    query, key = given["query"], given["key"]
    if not (module.batch_first and key.is_nested and given.get("key_padding_mask") is None):
        return args, kwargs
    lengths, lengths_of_keys = ([len(part) for part in each.unbind()] for each in (query, key))
    positions = torch.arange(max(lengths_of_keys), device=key.device)
    given["key_padding_mask"] = positions >= torch.tensor(lengths_of_keys, device=key.device)[:, None]
    given.update((name, padded(given[name])) for name in ("query", "key", "value"))
    thread = threading.get_ident()

    def nest(module: nn.Module, args: tuple, output: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        handle.remove()
        if output is None:  # it failed
            return None
        rows = [row[:length] for row, length in zip(output[0], lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), *output[1:]

    handle = module.register_forward_hook(nest, always_call=True)
    return (), given


def _traced_or_transformed(x: Tensor) -> bool:
    """Under a compiler, vmap, grad or forward-mode AD, which do not see through a change of dtype."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_neg():
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad._current_level >= 0


class MaskInput:
    """A forward pre-hook that masks a layer's input with a buffer of that layer.

    It needs nothing but the module that it is called with, so a masked model can be moved, saved, copied, compiled and
    exported on its own. Where a sparsifier stands behind it, writes into the sparsifier's mask are seen here, too (by
    compiled code, from the next call outside of it on).

    Attributes:
        name: of the layer, for messages.
        order: of the layer's arguments.
        buffer: name of the layer's buffer: bool, unless the mask scales.
        source: what the buffer is made from: one mask, or a list of masks for `features`.
        dim: where a one-dimensional mask lies along the input; None: masks broadcast as they are.
        features: [k] int64, the features of the masks in a list, along `feature_dim`.
        unset: no step was made, so that the mask keeps everything, whatever its shape.
    """

    def __init__(
        self,
        name: str,
        source: Tensor | list[Tensor],
        *,
        order: tuple[str, ...] = (),
        dim: int | None = None,
        features: Tensor | None = None,
        feature_dim: int = 0,
        unset: bool = False,
    ) -> None:
        self.name, self.order, self.source, self.dim = name, order, source, dim
        self.features, self.feature_dim = features, feature_dim
        self.unset = unset
        self.buffer = BUFFER
        self.elements: list[Tensor] = []  # of a list
        self.contents: list[tuple[Tensor, Tensor | int]] = []  # the source, and what it was when the buffer was made
        self.scales = any(_as_bool(mask).dtype is not torch.bool for mask in self._masks())

    def _masks(self) -> list[Tensor]:
        return self.source if isinstance(self.source, list) else [self.source]

    def add_to(self, module: nn.Module, shape: torch.Size | None) -> None:
        """Register the buffer; without the `shape` of an input, masks of features wait for the first one."""
        number = 2
        while hasattr(module, self.buffer):
            self.buffer, number = f"{BUFFER}_{number}", number + 1
        module.register_buffer(self.buffer, None)
        if not isinstance(self.source, list) or shape is not None or self.unset:
            try:
                self.build(module, shape)
            except BaseException:
                self.remove_from(module)
                raise

    def remove_from(self, module: nn.Module) -> None:
        """Take the buffer away."""
        module._buffers.pop(self.buffer, None)

    def follow(self, source: Tensor | list[Tensor], module: nn.Module, shape: torch.Size | None) -> None:
        """Take another mask from now on."""
        self.source = source
        self.build(module, shape)

    def build(self, module: nn.Module, shape: torch.Size | None) -> None:
        """Make the buffer from the source."""
        before = module._buffers.get(self.buffer)
        with torch.inference_mode(False), torch.no_grad():
            mask = self.made(shape)
            device = before.device if before is not None else mask.device
            module._buffers[self.buffer] = mask.clone().to(device)
            self.scales = mask.dtype is not torch.bool
            self._watch_source()

    def made(self, shape: torch.Size | None) -> Tensor:
        """The source as one mask, bool unless it scales, for inputs of `shape`.

        Raises:
            ValueError: masks of features that do not fit such inputs.
        """
        if self.unset:
            return torch.ones((), dtype=torch.bool, device=self._masks()[0].device if self._masks() else None)
        return _as_bool(self._full(shape)).contiguous()

    def _watch_source(self) -> None:
        masks = self._masks()
        self.elements = list(masks)
        if len(masks) > 1 and len({(mask.shape, mask.dtype, mask.device) for mask in masks}) == 1:
            # a thousand masks become parts of one tensor, to be looked at as one
            together = torch.stack([mask.detach() for mask in masks])
            for mask, part in zip(masks, together.unbind(0), strict=True):
                mask.data = part
            masks = [together]
        self.contents = [(mask, _as_it_is(mask)) for mask in masks]

    def _source_changed(self) -> bool:
        masks = self._masks()
        try:
            # a list compares by identity, fast; a mask that took another's place compares by its values, each time
            if isinstance(self.source, list) and self.elements != masks:
                return True
            if len(self.contents) == 1 < len(masks) and not _lies_in(masks[0], self.contents[0][0]):
                return True
            return any(_differs(mask, before) for mask, before in self.contents)
        except RuntimeError:  # masks of several values, or of another shape
            return True

    def pull(self, module: nn.Module) -> None:
        """Bring the source up to date after the model was moved or loaded a state dict, or the buffer after a write."""
        mask = module._buffers.get(self.buffer)
        if mask is None or self.unset or mask.is_meta:
            return
        if self._source_changed():
            if mask.dim() or not isinstance(self.source, list):
                self.build(module, mask.shape)
            return
        masks = self._masks()
        device = masks[0].device if masks else mask.device
        if not mask.dim() or (mask.device == device and torch.equal(self.made(mask.shape), mask)):
            return
        parts = [mask]
        if isinstance(self.source, list):
            assert self.features is not None
            dim = self.feature_dim % mask.dim()
            parts = list(mask.index_select(dim, self.features.to(mask.device)).split(1, dim))
        with torch.inference_mode(False), torch.no_grad():
            for part, target in zip(parts, masks, strict=True):
                part = part.reshape(target.shape) if part.numel() == target.numel() else part
                target.data = part.to(target.dtype).clone()
            self._watch_source()

    def _full(self, shape: torch.Size | None) -> Tensor:
        """The source as one mask that broadcasts to inputs of `shape`."""
        if not isinstance(self.source, list):
            return self.source.detach()
        assert shape is not None
        assert self.features is not None
        if not self.source:
            return torch.ones((), dtype=torch.bool)
        dim = self.feature_dim % len(shape)
        parts = []
        for mask in self.source:  # each broadcasts to a slice of the input that has size 1 along dim
            mask = mask.detach()
            parts.append(mask.reshape((1,) * (len(shape) - mask.dim()) + tuple(mask.shape)))
        try:
            common = torch.broadcast_shapes(*(part.shape for part in parts))
            if common[dim] != 1:
                raise RuntimeError("a mask spans several features")
        except RuntimeError:
            shapes = sorted({tuple(part.shape) for part in parts})[:3]
            raise ValueError(
                f"layer {self.name!r}: masks of shapes {shapes} do not fit slices of an input of shape {tuple(shape)} "
                f"with one feature along dimension {dim}"
            ) from None
        chosen = torch.cat([part.expand(common) for part in parts], dim)
        full = chosen.new_ones([*common[:dim], shape[dim], *common[dim + 1 :]])
        return full.index_copy(dim, self.features.to(full.device), chosen)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with the layer's input masked."""
        x = take_input(self.name, args, kwargs, self.order)
        mask = module._buffers[self.buffer]
        if torch.compiler.is_compiling():
            if mask is None:
                mask = self._full(padded_shape(x)).to(x.device)
                mask = mask if self.scales else mask != 0
        elif mask is None or self._source_changed():
            self.unset = self.unset and mask is None
            self.build(module, padded_shape(x))
            mask = module._buffers[self.buffer]
        assert mask is not None
        if self.dim is not None and mask.dim() == 1:
            after = x.dim() - self.dim - 1 if self.dim >= 0 else -self.dim - 1
            mask = mask.view((-1,) + (1,) * after)
        while mask.dim() > x.dim() and mask.shape[0] == 1:  # made from batches, used without one
            mask = mask[0]
        self._check_shape(x, mask)
        args, kwargs = with_input(args, kwargs, apply_mask(x, mask), self.order)
        if x.is_nested and isinstance(module, nn.MultiheadAttention):
            return _pad_attention(module, args, kwargs)
        return args, kwargs

    def _check_shape(self, x: Tensor, mask: Tensor) -> None:
        if x.is_nested and torch.compiler.is_compiling():
            return
        shape = padded_shape(x)
        sizes = shape[x.dim() - mask.dim() :]
        # of positions that no part of a nested tensor has, nothing is left to mask
        fits = (m in (1, size) or (x.is_nested and m > size) for m, size in zip(mask.shape, sizes, strict=True))
        if mask.dim() > x.dim() or not all(fits):
            raise ValueError(
                f"layer {self.name!r}: its mask of shape {tuple(mask.shape)} does not fit its input of shape "
                f"{tuple(shape)}. Reduce over the dimensions that change (batch, positions) in reduce_fn, or use one "
                "of deadband.aggregate's functions, which keep one number for each feature"
            )


def _as_it_is(mask: Tensor) -> Tensor | int:
    """What tells later whether a mask was written to: on CPUs its contents, as writes through `.data` or numpy leave no
    other trace; elsewhere its version, as comparing would wait for the device on each call."""
    if mask.device.type == "cpu":
        return mask.detach().clone()
    return mask._version


def _differs(mask: Tensor, before: Tensor | int) -> bool:
    if isinstance(before, int):
        return mask._version != before
    return mask.dtype is not before.dtype or not torch.equal(mask, before)


def _lies_in(part: Tensor, whole: Tensor) -> bool:
    return part.data_ptr() == whole.data_ptr() or not part.numel()


def _as_bool(mask: Tensor) -> Tensor:
    """A mask of zeros and ones as bool; one that scales stays as it is."""
    mask = mask.detach()
    if mask.layout is not torch.strided:
        mask = mask.to_dense()
    if mask.dtype is torch.bool or mask.is_meta:
        return mask
    return mask != 0 if bool(((mask == 0) | (mask == 1)).all()) else mask
