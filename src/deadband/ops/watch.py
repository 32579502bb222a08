"""deadband::watch(x, ticket) -> (): hand a tensor to a Python object that watches, from inside a compiled graph.

    x       any tensor
    ticket  [2] int64 on the CPU: which watcher, and how often it was called. That it is written to keeps the call in
            the graph, in order.

What a watcher does cannot be traced (locks, functions of users, shapes that change); to the compiler, the operator
is opaque, and nothing is compiled again when the watcher's state changes.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from deadband.ops.linear import operators

_watchers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def issue_ticket(watcher: Any) -> Tensor:
    """A ticket for an object with a method `see(x)`; once the object is gone, the operator does nothing."""
    number = next(_numbers)
    _watchers[number] = watcher
    return torch.tensor([number, 0])


def watch_reference(x: Tensor, ticket: Tensor) -> None:
    """What the operator does."""
    watcher = _watchers.get(int(ticket[0]))
    ticket[1] += 1
    if watcher is not None:
        watcher.see(x)


operators.define("watch(Tensor x, Tensor(a!) ticket) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
operators.impl("watch", watch_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("deadband::watch", lib=operators)
def _watch_fake(x, ticket):
    torch._check(ticket.numel() == 2, lambda: f"ticket has {ticket.numel()} elements, expected 2")


watch = torch.ops.deadband.watch.default
