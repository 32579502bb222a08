"""Whether the decoding that `deadband.decoding.graph` makes is what the model itself does.

Both decode one token, or a few at once, after the same keys and values, made up from those of a short prompt, at
several lengths of the cache: among them those around every boundary that the model's configuration names (a window, a
chunk, the length from which rotary embeddings are scaled) and the cache's own blocks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deadband.decoding.cache import BLOCK, Store, attach
from deadband.decoding.graph import NotCapturedError, Step, own_attention
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.sites import sparse_sites
from deadband.ops.cpu import exact_products
from deadband.running.forward import cache_argument

LONGEST = 4160  # a window of 4,096, and a block
LIMITS = {torch.float32: 2e-4, torch.bfloat16: 0.2, torch.float16: 0.02}
"""Largest relative differences of logits. In float32, right graphs are within 2e-5 on all architectures of transformers
and the smallest mistake that was seen is 1e-2; in bfloat16, logits of 1 B parameters differ by 0.02 between two of
transformers' own caches, and those of SmolLM2-135M in int8 by 0.11 of a right graph's."""
QUANTIZED_LIMITS = {8: 2e-3, 4: 0.3}
"""The same by the bits of weights: their kernels round what comes in, and a last bit may tip that. Beside 4 bits x has
8: a right graph of SmolLM2-135M is 0.085 off. So what tells right from wrong there is the check of `Step`, with exact
products; the compiled graph has to be near."""
Template = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [1, heads, tokens, head_dim]
_BOUNDARIES = ("window", "chunk", "original_max_position", "block_size")


def boundaries(config: Any) -> set[int]:
    """The lengths at which a model's attention or positions change, by the names in its configuration."""
    found: set[int] = set()

    def visit(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(value)
            elif type(value) is int and any(part in name for part in _BOUNDARIES):
                found.add(value)

    visit(config.to_dict())
    return found


def lengths_of(config: Any, rows: int = 1) -> list[int]:
    """Lengths of the cache at which to compare so many more tokens, the shortest first."""
    lengths = {BLOCK // 2, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK + 5}
    for boundary in boundaries(config):
        lengths |= {boundary - 1, boundary, boundary + 1}
    longest = min(LONGEST, (getattr(config, "max_position_embeddings", None) or LONGEST) - rows)
    return sorted(length for length in lengths if 2 <= length <= longest)


def filled_cache(config: Any, template: Template, length: int, dtype: torch.dtype) -> Any:
    """A DynamicCache of `length` tokens, drawn from those of the template."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(length)
    cache = DynamicCache(config=config)
    for index, (keys, values) in enumerate(template):
        drawn = torch.randint(keys.shape[2], (2, length), generator=generator).to(keys.device)
        cache.update(keys[:, :, drawn[0]].to(dtype), values[:, :, drawn[1]].to(dtype), index)
    return cache


def tokens_of(config: Any, rows: int, device: torch.device) -> Tensor:
    """So many tokens to decode at once."""
    return (1 + torch.arange(rows, device=device)).view(1, -1) % config.vocab_size


def check_step(model: Any, template: Template, rows: int = 1) -> None:
    """A NotCapturedError where `Step` of `rows` tokens is not what the model does; in float32 if memory allows it."""
    config = model.config.get_text_config()
    step, device = Step(model), template[0][0].device
    exact = exact_products() if _bits(model) == 4 else contextlib.nullcontext()
    with _in_float32(model) as dtype, exact:

        def by_step(store: Store) -> Tensor:
            position = store.length + torch.arange(rows, device=device)
            blocks = torch.empty((store.length + rows - 1) // BLOCK + 1, device=device)
            try:
                with own_attention(model):
                    return step(tokens_of(config, rows, device), position, blocks, store.keys, store.values)
            except NotCapturedError:
                raise
            except Exception as error:  # the model alone can do it: `compare` ran it before
                raise NotCapturedError(
                    f"its code cannot decode after a cache with room to grow ({type(error).__name__}: {error})"
                ) from error

        compare(model, config, template, dtype, by_step, rows, exact=True)


def _bits(model: nn.Module) -> int | None:
    """The fewest bits of the weights of a layer; None where none is quantised."""
    bits = [8 if each.codes.dtype is torch.int8 else 4 for each in model.modules() if isinstance(each, QuantizedMatrix)]
    return min(bits, default=None)


def compare(
    model: Any,
    config: Any,
    template: Template,
    dtype: torch.dtype,
    decode: Callable[[Store], Tensor],
    rows: int = 1,
    *,
    exact: bool = False,
) -> None:
    """A NotCapturedError where the logits of `decode`, given a Store with room for `rows` more tokens, are not the
    model's.

    Nothing is skipped meanwhile. At its thresholds a bfloat16 model amplifies rounding, as entries change sides: on
    random weights of 1 B parameters at 0.5, logits differ by 0.45 between two of transformers' own caches.
    """
    token = tokens_of(config, rows, template[0][0].device)
    name = cache_argument(model)
    limit = LIMITS.get(dtype, 0.1)
    if (bits := _bits(model)) is not None:
        limit = max(limit, QUANTIZED_LIMITS[8 if exact else bits])
    with _nothing_skipped(model):
        for length in lengths_of(config, rows):
            expected = model(token, use_cache=True, **{name: filled_cache(config, template, length, dtype)}).logits
            store = attach(filled_cache(config, template, length, dtype))
            store.reserve(length + rows)
            found = decode(store)
            error = float((found.float() - expected.float()).norm() / expected.float().norm())
            if not error <= limit:
                raise NotCapturedError(
                    f"its logits after {length} tokens differ by {error:.2g} from those of the model"
                )


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[torch.dtype]:
    """The model in float32, where bfloat16 would hide mistakes; as it was afterwards, bit for bit.

    Yields the dtype: the model's own, where float32 does not fit into half of the memory that is left.
    """
    own = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    extra = 4 * sum(each.numel() for each in model.parameters() if each.is_floating_point() and each.dtype == own)
    device = next(model.parameters()).device
    if own == torch.float32 or extra > _free_memory(device) / 2:
        yield own
        return
    data = [(each, each.data) for each in model.parameters()]
    modules = [
        (each, {**each.__dict__, "_parameters": dict(each._parameters), "_buffers": dict(each._buffers)})
        for each in model.modules()
    ]
    try:
        nn.Module._apply(model, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)
        yield torch.float32
    finally:
        for module, attributes in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for parameter, before in data:
            parameter.data = before


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@contextlib.contextmanager
def _nothing_skipped(model: nn.Module) -> Iterator[None]:
    """Thresholds below zero, which keep every entry, and counters as they were afterwards."""
    sites = sparse_sites(model).values()
    buffers = [buffer for site in sites for buffer in (site.threshold, site.counts) if buffer is not None]
    before = [buffer.clone() for buffer in buffers]
    try:
        for site in sites:
            site.threshold.fill_(-1)
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
