"""What a compiled graph of a model depends on, and what in the model it does not know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deadband.layers.sparse import SparseSite

State = dict[str, Any]


def state_of(model: nn.Module) -> State:
    """All that the graph depends on, by name: modules and tensors by identity, place and layout, classes, settings."""
    state: State = {}
    for name, module in model.named_modules(remove_duplicate=False):
        forward = module.__dict__.get("forward")  # on the instance, in the place of the class's
        relative = module.relative if isinstance(module, SparseSite) else None
        # the root's class changes when it is prepared
        state[name] = (id(module), None if module is model else type(module), id(forward), relative)
        for kind, tensors in (("", module._parameters), ("", module._buffers)):
            for own, tensor in tensors.items():
                if tensor is not None:
                    layout = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                    state[f"{name}.{own}{kind}"] = layout
    return state


def changed(before: State, now: State) -> str | None:
    """The name of the first part that differs, or None."""
    if before == now:
        return None
    return next(name for name in (*before, *now) if before.get(name) != now.get(name)) or "the model"


def hooked(model: nn.Module) -> str | None:
    """The name of the first module with a hook of a user's, which no graph calls; or None.

    What transformers puts there itself to collect hidden states (and leaves there) is inactive while it decodes.
    """
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith("transformers."):
                return name or type(module).__name__
    return None


_NEVER_KEPT = frozenset(("training", "_parameters", "_buffers", "_modules"))
_SIMPLE = (int, float, str, type(None))


def _attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """The plain attributes of all modules, which a forward may read and write; tensors as copies."""
    return {
        (name, key): value.clone() if isinstance(value, Tensor) else value
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if key not in _NEVER_KEPT and not key.endswith("_hooks") and not key.startswith("_deadband")
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    return a is b or (isinstance(a, _SIMPLE) and isinstance(b, _SIMPLE) and a == b)


class KeptState:
    """What a model keeps in attributes of its modules: state that is in no cache, and constants in a graph.

    Some models write there while they run: the `rope_deltas` of vision-language models say how far an image has moved
    the positions of what follows.

    Attributes:
        output: what `prefill` returned.
        advanced: the names of attributes that decoding one token changes, which no graph can follow.
    """

    def __init__(self, model: nn.Module, prefill: Callable[[], Any], step: Callable[[Any], Any]) -> None:
        """`prefill` runs a prompt of text, and `step` decodes a token after what it returned."""
        self.output = prefill()
        prompted = _attributes(model)
        step(self.output)
        after = _attributes(model)
        self.advanced = [".".join(key).lstrip(".") for key in after if not _same(prompted.get(key), after[key])]
        self._expected = {
            key: value
            for key, value in after.items()
            if isinstance(value, (Tensor, *_SIMPLE)) and not key[1].startswith("_")
        }

    def other(self, model: nn.Module) -> str | None:
        """The name of the first attribute with another value than when the graph was captured, or None."""
        modules = dict(model.named_modules())
        for (name, key), value in self._expected.items():
            if not _same(modules[name].__dict__.get(key), value):
                return f"{name}.{key}".lstrip(".")
        return None
