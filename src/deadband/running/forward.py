"""Run a model over batches without changing it."""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from deadband.ops.products import fast_products
from deadband.running.batches import forward_parameters, misfit


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside the block; each module's own training flag once no thread is in such a block.

    The training flag belongs to the module, for all threads: the first block takes it and the last one gives it back.
    """
    modules = list(model.modules())
    switched: list[nn.Module] = []
    try:
        with _lock:
            for module in modules:
                if module.training or module in _evaluated:
                    _evaluated[module] = _evaluated.get(module, 0) + 1
                    switched.append(module)
                    module.training = False
        with torch.no_grad():
            yield
    finally:
        with _lock:
            for module in switched:
                _evaluated[module] -= 1
                if not _evaluated[module]:
                    del _evaluated[module]
                    module.training = True


_lock = threading.Lock()
_evaluated: dict[nn.Module, int] = {}  # modules that were in training mode, and how many blocks they are in


def run(model: nn.Module, batch: Any, **extra: Any) -> Any:
    """Call a model on a batch: a mapping by keyword, a tuple or list by position, anything else as the one argument.

    Tensors move to the model's device. `extra` is passed where the model's forward takes it, unless the batch has it.
    A bfloat16 model multiplies in float32 where that is faster: see `deadband.ops.products`.

    Raises:
        ValueError: the model failed, as it has fewer positions or fewer tokens than the batch.
    """
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping) and batch.get("labels") is not None:
        extra.pop("logits_to_keep", None)  # the loss needs them all
    extra = taken_by(model, **extra)
    try:
        with fast_products(model):
            if isinstance(batch, Mapping):
                return model(**{**extra, **{name: moved(value) for name, value in batch.items()}})
            if isinstance(batch, (tuple, list)):
                return model(*map(moved, batch), **extra)
            return model(moved(batch), **extra)
    except (IndexError, RuntimeError) as error:
        require_fit(model, batch, error)
        raise


def taken_by(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that a model's forward takes."""
    known = forward_parameters(cast(Hashable, type(model)))
    return {name: value for name, value in arguments.items() if name in known}


def require_fit(model: nn.Module, batch: Any, error: Exception) -> None:
    """A ValueError if a model failed as it has fewer positions or fewer tokens than the batch."""
    if (reason := misfit(model, batch)) is not None:
        raise ValueError(f"{reason} ({error})") from error


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls a key-value cache: since 5.24, before, and before in state-space models."""


def cache_argument(model: nn.Module) -> str:
    """The name under which a model of transformers, or what is wrapped in `model`, takes its key-value cache.

    Raises:
        ValueError: it takes none.

    Example:
        >>> cache_argument(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: Linear takes no key-value cache: its forward has none of cache, past_key_values, cache_params
    """
    for kind in map(type, model.modules()):
        taken = forward_parameters(cast(Hashable, kind))
        for name in CACHE_NAMES:
            if name in taken:
                return name
    raise ValueError(
        f"{type(model).__name__} takes no key-value cache: its forward has none of {', '.join(CACHE_NAMES)}"
    )


def cache_of(output: Any) -> Any:
    """The key-value cache in a model's output, under the name that it has there; None without one.

    Example:
        >>> cache_of({"logits": 1, "past_key_values": "the cache"})
        'the cache'
    """
    fields = dict(output) if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    return next((fields[name] for name in CACHE_NAMES if name in fields), None)


def cached(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A key-value cache that a model returned, under the name by which the next call takes it.

    Raises:
        ValueError: there is none.
    """
    if cache is None:
        raise ValueError(f"{type(model).__name__} returns no key-value cache, which has to hold what was read before")
    return {cache_argument(model): cache}


def progress_bar(items: Iterable[Any], what: str, show: bool, total: int | None = None) -> Iterable[Any]:
    """`items` with a progress bar on a terminal, or a line every ten seconds elsewhere; nothing if `show` is false."""
    if not show or sys.stderr is None:
        return items
    if sys.stderr.isatty():
        return tqdm(items, desc=what, total=total, leave=False)
    return _lines(items, what, total or operator.length_hint(items) or None)


def _lines(items: Iterable[Any], what: str, total: int | None) -> Iterator[Any]:
    start = time.monotonic()
    if start - _progress["seen"] > LINE_EVERY:  # no other loop went on until now, so the wait begins here
        _progress["said"] = start
    for index, item in enumerate(items):
        _progress["seen"] = now = time.monotonic()
        if now - _progress["said"] >= LINE_EVERY:
            of = f" of {total}" if total is not None else ""
            print(f"{what}: {index}{of}, {now - start:.0f} s", file=sys.stderr, flush=True)
            _progress["said"] = now
        yield item
    _progress["seen"] = time.monotonic()


LINE_EVERY = 10.0  # seconds
_progress = {"seen": float("-inf"), "said": 0.0}  # when a loop last went on, and when a line told of one


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's number of threads inside the block."""
    mine = threading.get_ident()
    with _lock:
        # what one thread sets, torch tells every thread that asks for the first time
        told = [number for ident, number in _threads if ident != mine]
        nested = len(told) < len(_threads)
        before = told[0] if told and not nested else torch.get_num_threads()
        _threads.append((mine, before))
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        with _lock:
            _threads.remove((mine, before))


_threads: list[tuple[int, int]] = []  # the open blocks: whose, and the number outside
