"""What the kernels take, and how they are launched: outputs, scratch memory, grids. Imported with the first call."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from deadband.ops.cpu import is_vector
from deadband.ops.fused import PARTS, bits_of, out_features_of, quantized_fits
from deadband.ops.gpu import kernels
from deadband.ops.gpu.tiles import DTYPES, Tile, tile_for
from deadband.ops.linear import COUNTS, current_offset

_GROUP_SIZES = {8: (0, 32, 64, 128), 4: (32, 64, 128)}  # what divides a chunk of inputs
_LEAST_ROWS = 16  # that Triton multiplies as a matrix


def linears(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
) -> Tensor | None:
    """`deadband::linears` on 1 to 8 rows of x, or None where the kernels do not take these layers.

    `parts` and what follows are as `deadband.ops.fused` has them; layers whose threshold is None skip nothing.
    """
    given = _layers(x, [x.shape[-1]] * len(group_sizes), parts, group_sizes, relative, counts)
    if not given:
        return None
    x = x.contiguous()
    rows, in_features = x.shape[:-1].numel(), x.shape[-1]
    tile = _tile(given, rows, in_features)
    first = column = 0
    for at, layer in enumerate(given):
        tiles = -(-layer.out_features // tile.outputs)
        given[at] = layer._replace(first_tile=first, tiles=tiles, column=column)
        first, column = first + tiles, column + layer.out_features
    y = x.new_empty((*x.shape[:-1], column))
    _launch(kernels.linears_kernel, x, y, given, tile, first, column, LAYERS=len(given))
    return y


def gated_mlp(
    x: Tensor,
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
    activation: str,
) -> Tensor | None:
    """`deadband::gated_mlp` on 1 to 8 rows of x, or None where the kernels do not take these layers.

    Two launches: down needs all that gate and up give.
    """
    if not ORDERED:
        return None
    between, in_features = out_features_of(parts, 0), x.shape[-1]
    given = _layers(x, [in_features, in_features, between], parts, group_sizes, relative, counts)
    if not given or given[0].out_features != given[1].out_features:
        return None
    x = x.contiguous()
    tile = _tile(given[:2], x.shape[:-1].numel(), in_features)
    tiles = -(-between // tile.outputs)
    pair = [layer._replace(first_tile=0, tiles=tiles, column=0) for layer in given[:2]]
    product = x.new_empty((*x.shape[:-1], between))
    _launch(kernels.gate_and_up_kernel, x, product, pair, tile, 2 * tiles, between, ACTIVATION=activation)
    return linears(product, parts[2 * PARTS :], group_sizes[2:], relative[2:], counts[2:])


def quantized_product(
    x: Tensor, codes: Tensor, scales: Tensor, minimum: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor | None:
    """x [..., in_features] times a quantised weight, for any number of rows; None where the kernel does not take it."""
    given = _layers(x, [x.shape[-1]], (codes, scales, minimum, bias, *[None] * 4), [group_size], [False], [])
    if not given:
        return None
    x = x.contiguous()
    (layer,) = given
    rows, out_features = x.shape[:-1].numel(), layer.out_features
    y = x.new_empty((*x.shape[:-1], out_features))
    block = min(max(_power_of_two(rows), _LEAST_ROWS), 64)
    grid = (-(-rows // block), -(-out_features // 64))
    if y.numel():
        with _on(x.device):
            kernels.product_kernel[grid](
                x, y, layer, rows, x.shape[-1], ROWS=block, OUTPUTS=64, INPUTS=32, num_warps=4
            )  # fmt: skip
    return y


# --------------------------------------------------------------------------------------------------- what kernels take


def _layers(
    x: Tensor,
    inputs: Sequence[int],
    parts: Sequence[Tensor | None],
    group_sizes: Sequence[int],
    relative: Sequence[bool],
    counts: Sequence[Tensor],
) -> list[kernels.Layer]:
    """The layers as the kernels have them; none if they do not take one of them."""
    given = []
    for number, in_features in enumerate(inputs):
        own = parts[PARTS * number : PARTS * (number + 1)]
        counters = counts[number] if counts else None
        layer = _layer(x, in_features, own, group_sizes[number], relative[number], counters)
        if layer is None:
            return []
        given.append(layer)
    return given


def _layer(
    x: Tensor,
    in_features: int,
    parts: Sequence[Tensor | None],
    group_size: int,
    relative: bool,
    counts: Tensor | None,
) -> kernels.Layer | None:
    weight, scales, minimum, bias, threshold, scale, center, offset = parts
    assert weight is not None
    if threshold is None:
        scale = center = offset = counts = None
    if scales is None:
        bits = 16
        out_features, columns = weight.shape
        out_stride, stride = weight.stride()
        fits = weight.dtype is x.dtype and columns == in_features and (out_stride == 1 or out_features == 1)
    else:
        bits, out_features, stride = bits_of(weight), scales.shape[1], weight.shape[1]
        fits = group_size in _GROUP_SIZES[bits] and quantized_fits(
            weight, scales, minimum, bits, group_size, in_features, out_features
        )
    if center is not None and offset is not None and scales is None:
        offset = current_offset(weight, center, offset)
    vectors = (
        (bias, x.dtype, out_features),
        (threshold, torch.float32, 1),
        (scale, torch.float32, in_features),
        (center, torch.float32, in_features),
        (offset, torch.float32, out_features),
        (counts, torch.int64, COUNTS),
    )
    if (
        not fits
        or x.dtype not in DTYPES
        or (center is None) != (offset is None)
        or not all(each is None or is_vector(each, dtype, length) for each, dtype, length in vectors)
        or any(each is not None and each.device != x.device for each in (*parts, counts))
    ):
        return None
    return kernels.Layer(
        weight, scales, minimum, bias, threshold, scale, center, offset, counts, out_features, stride,
        0, 0, 0, tl.constexpr(bits), tl.constexpr(group_size), tl.constexpr(relative),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ launches


def _tile(layers: Sequence[kernels.Layer], rows: int, in_features: int) -> Tile:
    device = layers[0].weight.device
    outputs = sum(layer.out_features for layer in layers)
    return tile_for(_architecture(device), min(layer.bits.value for layer in layers), rows, in_features, outputs)


def _launch(
    kernel: Any, x: Tensor, y: Tensor, layers: Sequence[kernels.Layer], tile: Tile, tiles: int, width: int, **what: Any
) -> None:
    rows, in_features = x.shape[:-1].numel(), x.shape[-1]
    if not y.numel():
        return
    chunks = tile.chunks(in_features, tiles, _processors(x.device) if ORDERED else 0)
    splits = max(-(-in_features // (tile.chunk * chunks)), 1)
    sums = _power_of_two(rows)
    shared = splits > 1 or "ACTIVATION" in what
    scratch = torch.empty(tiles * splits * sums * tile.outputs if shared else 0, device=x.device)
    compact = tile.compact and ORDERED
    listed = tiles * splits * 2 * tile.chunk if compact else 0
    kept_inputs = torch.empty(listed, dtype=torch.int32, device=x.device)
    with _on(x.device):
        kernel[(tiles, splits)](
            x, y, scratch, kept_inputs, _counters(x.device, tiles if shared else 0), tuple(layers), rows, in_features,
            width, ROWS=sums, STEP=tile.step, OUTPUTS=tile.outputs, UNROLL=tile.unroll, CHUNK=tile.chunk,
            CHUNKS=chunks, SPLITS=splits, COMPACT=compact, num_warps=tile.warps, **what,
        )  # fmt: skip


ORDERED = torch.version.hip is None
"""Whether what the threads of a program stored can be read once one of them has passed on that it was.

On AMD, Triton's barrier (3.7) does not wait for the stores of other waves. So there, no two threads share anything
through memory: a program takes all inputs of its outputs, nothing is listed, and gate and up are layers like others.
"""


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _on(device: torch.device) -> Any:
    """Triton launches on torch's current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a small number where the kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def _architecture(device: torch.device) -> str:
    """As in the table of tiles: sm_90, or gfx942 of AMD."""
    if device.type != "cuda":
        return "interpreted"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


_held: dict[torch.device, Tensor] = {}
_captured = threading.local()  # `own`: while this thread captures a graph that has counters of its own


def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros, int32, for a launch; each launch leaves them as zeros.

    Launches that may run at the same time must not share them. Those on the default stream do not. A captured graph may
    be replayed on any stream, and on streams of their own compilers prepare to capture, with memory of a graph's.
    """
    own = getattr(_captured, "own", None)
    if own is not None and own.device == device and count <= len(own):
        return own
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing() or not _on_default_stream(device):
        return torch.zeros(count, dtype=torch.int32, device=device)
    held = _held.get(device)
    if held is None or len(held) < count:
        held = _held[device] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return held


def _on_default_stream(device: torch.device) -> bool:
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


@contextlib.contextmanager
def own_counters(device: torch.device) -> Iterator[Tensor]:
    """While a CUDA graph is captured inside the block, its launches share counters; keep them as long as the graph.

    Otherwise each launch in a graph clears some first, which takes about a microsecond.
    """
    before = getattr(_captured, "own", None)
    _captured.own = torch.zeros(1 << 14, dtype=torch.int32, device=device)
    try:
        yield _captured.own
    finally:
        _captured.own = before
