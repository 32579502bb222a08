"""One way to watch what goes into a layer, and to mask it: forward pre-hooks that see every kind of argument."""

from __future__ import annotations

import inspect
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deadband.ops.nested import padded


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


def pad_attention(module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
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
