"""The hook that masks a layer's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deadband.layers.hooks import pad_attention, take_input, with_input
from deadband.ops.nested import padded_shape
from deadband.ops.skipping import apply_mask

BUFFER = "activation_mask"
"""The name of the buffer that holds a layer's mask; a second mask on the same layer gets a number behind it."""


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
        return _as_bool(self.full(shape)).contiguous()

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

    def full(self, shape: torch.Size | None) -> Tensor:
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

    def input_shape(self, module: nn.Module) -> torch.Size | None:
        """The shape of inputs, as far as the buffer knows it: one that was made from masks of features."""
        mask = None if self.features is None else module._buffers.get(self.buffer)
        return mask.shape if mask is not None and mask.dim() else None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with the layer's input masked."""
        x = take_input(self.name, args, kwargs, self.order)
        mask = module._buffers[self.buffer]
        if torch.compiler.is_compiling():
            if mask is None:
                mask = self.full(padded_shape(x)).to(x.device)
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
            return pad_attention(module, args, kwargs)
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
