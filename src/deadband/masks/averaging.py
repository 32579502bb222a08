"""An average of a masked model (torch.optim.swa_utils.AveragedModel) has the masks of that model, whenever it was made.

torch pairs the buffers of both by their position. A model that got masks since would put them, or what comes behind
them, into other buffers of the average, with an error or without a word; and with `use_buffers=True` masks would be
averaged. So masks are brought over by name, before, and are out of sight while torch does the rest.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from deadband.layers.hooks import attach, forget_compiled
from deadband.masks.layers import bare_name
from deadband.masks.mask_input import MaskInput

Masked = dict[tuple[str, str], tuple[nn.Module, int, MaskInput]]  # (layer, buffer) -> layer, number of the hook, hook


def follow_masks(average: nn.Module, model: nn.Module) -> None:
    """Give `average`, a copy of `model`, its masks, and take those off that it has not."""
    layers = {bare_name(name): module for name, module in average.named_modules()}
    theirs, ours = _masked(average), _masked(model)
    for key in theirs.keys() - ours.keys():
        _remove(*theirs[key])
    for key, (layer, _, hook) in ours.items():
        mask = layer._buffers[hook.buffer]
        if key in theirs:
            before = theirs[key][0]._buffers[hook.buffer]
            if before is not None and mask is not None and (before.shape, before.dtype) == (mask.shape, mask.dtype):
                before.copy_(mask)
                continue
            _remove(*theirs[key])
        target = layers.get(key[0])
        if target is None:
            raise ValueError(f"the average has no layer {key[0]!r}, which the model masks; average a copy of the model")
        device = next((tensor.device for tensor in target.parameters()), None)
        target.register_buffer(hook.buffer, None if mask is None else mask.clone().to(device))
        attach(target, copy.deepcopy(hook))


def _masked(model: nn.Module) -> Masked:
    return {
        (bare_name(name), hook.buffer): (module, number, hook)
        for name, module in model.named_modules()
        for number, hook in module._forward_pre_hooks.items()
        if isinstance(hook, MaskInput)
    }


def _remove(layer: nn.Module, number: int, hook: MaskInput) -> None:
    layer._forward_pre_hooks.pop(number)
    layer._forward_pre_hooks_with_kwargs.pop(number, None)
    hook.remove_from(layer)
    forget_compiled()


@contextlib.contextmanager
def _without_masks(model: nn.Module) -> Iterator[None]:
    """Inside the block, masks are none of the model's buffers."""
    masked = [(layer._buffers, hook.buffer) for layer, _, hook in _masked(model).values()]
    masks = [buffers[name] for buffers, name in masked]
    try:
        for buffers, name in masked:
            buffers[name] = None
        yield
    finally:
        for (buffers, name), mask in zip(masked, masks, strict=True):
            buffers[name] = mask


_update_parameters = AveragedModel.update_parameters


@functools.wraps(_update_parameters)
def _update_masked(self: Any, model: nn.Module) -> None:
    follow_masks(self.module, model)
    with _without_masks(self.module), _without_masks(model):
        _update_parameters(self, model)


AveragedModel.update_parameters = _update_masked  # type: ignore[method-assign]
