"""What a `with` block sets holds for the thread (or asyncio task) that is inside the block, and for nobody else.

`dense(model)` leaves the model alone: it opens a scope that tells each of the model's sparse layers up to how many rows
it skips and where it counts, and the layers look there first. Scopes nest, the innermost one holds, and a scope that
was left holds nowhere any more, wherever a generator or a task that was inside may be then.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Setting = tuple[int | None, Tensor | None]
"""Up to how many rows a layer skips and what it counts in; None leaves either as it is outside of the scope."""
Scope = dict[nn.Module, Setting]


class _OfThread(threading.local):
    scopes: tuple[Scope, ...] = ()


_scopes: contextvars.ContextVar[tuple[Scope, ...]] = contextvars.ContextVar("deadband_scopes", default=())
_of_thread = _OfThread()  # torch.compile cannot read context variables, but guards on what is local to a thread
_lock = threading.Lock()
_count = 0
any_open = False
"""Whether any thread is in a scope: all that a layer looks at otherwise."""


@contextlib.contextmanager
def scope(settings: Mapping[nn.Module, Setting] | None = None) -> Iterator[Scope]:
    """A scope with these settings of layers, open inside the block."""
    own: Scope = dict(settings or {})
    _add(1)
    try:
        _enter((*_scopes.get(), own))
        yield own
    finally:
        own.clear()  # a task that began inside may have it still
        _enter(tuple(each for each in _scopes.get() if each is not own))
        _add(-1)


def _enter(scopes: tuple[Scope, ...]) -> None:
    _scopes.set(scopes)
    _of_thread.scopes = scopes


def _add(number: int) -> None:
    global _count, any_open
    with _lock:
        _count += number
        any_open = _count > 0


def open_scopes() -> tuple[Scope, ...]:
    """The scopes of the calling thread or task, from the outermost on."""
    return _of_thread.scopes if torch.compiler.is_dynamo_compiling() else _scopes.get()


def is_open(own: Scope) -> bool:
    """Whether the calling thread or task is in this scope."""
    return any(each is own for each in open_scopes())


def setting_of(module: nn.Module, rows: int, counts: Tensor | None) -> tuple[int, Tensor | None]:
    """Rows and counters of a layer here, given its own."""
    for each in open_scopes():
        if module in each:
            here_rows, here_counts = each[module]
            rows = rows if here_rows is None else here_rows
            counts = counts if here_counts is None else here_counts
    return rows, counts


def in_scope(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the layers has other settings than its own here. Costs next to nothing where no scope is open."""
    if not any_open:
        return False
    scopes = [each for each in open_scopes() if each]
    return bool(scopes) and any(module in each for each in scopes for module in modules)


def for_here(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A forward hook that looks only at the calls of the thread or task in the scope that is the innermost one now."""
    own = open_scopes()[-1]

    def hook_of_scope(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if is_open(own) else None

    return hook_of_scope
