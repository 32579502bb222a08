"""The kernels, in Triton: layers that skip, on a few rows of x; imported at their first call, as that takes a second.

A launch is a grid of (tiles of outputs, splits of the inputs). Each program finds by itself what its part of x keeps,
reads only those weights, and leaves sums in float32 in a scratch buffer. The program that finishes a tile last (a
counter says which) adds the splits up, in their order: the same bits each run, and no second launch.

There is nothing here that only NVIDIA has; what takes an order of memory that barriers lack on AMD, `launch.ORDERED`
leaves out there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Layer(NamedTuple):
    """What the kernels know of a layer: pointers, or None where it has no such part, and numbers.

    Attributes:
        weight: values or codes, with those of one input side by side, `stride` apart from those of the next.
        scales, minimum, bias, threshold, scale, center, offset, counts: as `deadband.ops.linear` has them.
        first_tile, tiles: its tiles among those of the launch.
        column: of y, of the first output.
        bits: of a code, 8 or 4, or 16 where the weight has values (constexpr, as the next two).
        group_size: inputs that share scales, 0: all.
        relative: whether the threshold is one.
    """

    weight: Any
    scales: Any
    minimum: Any
    bias: Any
    threshold: Any
    scale: Any
    center: Any
    offset: Any
    counts: Any
    out_features: Any
    stride: Any
    first_tile: Any
    tiles: Any
    column: Any
    bits: Any
    group_size: Any
    relative: Any


@triton.jit
def _limits(x, layer, rows, in_features, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What the scores of each row are compared with, [ROWS]."""
    limits = tl.zeros([ROWS], tl.float32)
    if layer.threshold is not None:
        threshold = tl.load(layer.threshold)
        if layer.relative:
            row, squares = tl.arange(0, ROWS), tl.zeros([ROWS, BLOCK], tl.float32)
            for start in range(0, in_features, BLOCK):
                column = start + tl.arange(0, BLOCK)
                inside = _inside(column, rows, in_features, ROWS)
                entries = tl.load(x + row[:, None] * in_features + column[None, :], inside, other=0.0).to(tl.float32)
                squares += entries * entries
            limits = threshold * tl.sqrt(tl.sum(squares, 1))
            limits = tl.where(tl.abs(limits) < float("inf"), limits, -1.0)
        else:
            limits += threshold
    return limits


@triton.jit
def _inside(column, rows, in_features, ROWS: tl.constexpr):
    return (tl.arange(0, ROWS) < rows)[:, None] & (column < in_features)[None, :]


@triton.jit
def _entries(x, layer, limits, column, rows, in_features, ROWS: tl.constexpr):
    """What the weights of some inputs are multiplied with, float32 [ROWS, columns], and whether they are kept."""
    row = tl.arange(0, ROWS)
    kept = _inside(column, rows, in_features, ROWS)
    entries = tl.load(x + row[:, None] * in_features + column[None, :], kept, other=0.0).to(tl.float32)
    if layer.threshold is not None:
        if layer.center is not None:
            entries -= tl.load(layer.center + column, column < in_features, other=0.0)[None, :]
        score = tl.abs(entries)
        if layer.scale is not None:
            score *= tl.load(layer.scale + column, column < in_features, other=0.0)[None, :]
        kept = kept & ((score <= limits[:, None]) == 0)  # NaN is kept
        entries = tl.where(kept, entries, 0.0)
    return entries, kept


@triton.jit
def _outputs(tile, BITS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The outputs of a tile, in the order of `_values`: byte b of 16 holds outputs b and 16 + b of 32."""
    place = tl.arange(0, OUTPUTS)
    if BITS == 4:
        place = place // 32 * 32 + place // 2 % 16 + place % 2 * 16
    return tile * OUTPUTS + place


@triton.jit
def _values(stored, layer):
    """Weights, or codes, in float32: [..., OUTPUTS] of what is stored for the outputs of a tile."""
    if layer.bits == 4:
        values = tl.interleave((stored & 15).to(tl.float32), (stored >> 4).to(tl.float32))
        if layer.minimum is None:
            values -= 8.0
        return values
    else:
        return stored.to(tl.float32)


@triton.jit
def _of_outputs(vector, layer, tile, inside, OUTPUTS: tl.constexpr):
    """Entries of a vector over the layer's outputs, in float32 and the order of `_values`."""
    if layer.bits == 4:  # half by half, which are loads of 16 entries side by side
        place = tl.arange(0, OUTPUTS // 2)
        low = tile * OUTPUTS + place // 16 * 32 + place % 16
        first = tl.load(vector + low, inside & (low < layer.out_features), other=0.0).to(tl.float32)
        second = tl.load(vector + low + 16, inside & (low + 16 < layer.out_features), other=0.0).to(tl.float32)
        return tl.interleave(first, second)
    else:
        outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        return tl.load(vector + outputs, inside & (outputs < layer.out_features), other=0.0).to(tl.float32)


@triton.jit
def _list_kept(
    x, layer, limits, start, kept_inputs, rows, in_features,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """List those inputs of a chunk that any row keeps, group by group, and behind the lists how long each is."""
    columns = start + tl.arange(0, CHUNK)
    _, kept = _entries(x, layer, limits, columns, rows, in_features, ROWS)
    needed = tl.reshape(tl.max(kept.to(tl.int32), 0), [CHUNK // GROUP, GROUP])
    groups = tl.arange(0, CHUNK // GROUP)
    places = groups[:, None] * GROUP + tl.cumsum(needed, 1) - 1
    tl.debug_barrier()  # all threads have read the last lists
    tl.store(kept_inputs + places, tl.reshape(columns, [CHUNK // GROUP, GROUP]), needed > 0)
    tl.store(kept_inputs + CHUNK + groups, tl.sum(needed, 1))
    tl.debug_barrier()


@triton.jit
def _scaled(own, total, layer, tile, group, inside, OUTPUTS: tl.constexpr):
    """The sums of a group's codes, [ROWS, STEP, OUTPUTS], with its scales, and of its entries with its minimums."""
    at = group * layer.out_features
    scaled = own * _of_outputs(layer.scales + at, layer, tile, inside, OUTPUTS)[None, None, :]
    if layer.minimum is not None:
        scaled += total[:, :, None] * _of_outputs(layer.minimum + at, layer, tile, inside, OUTPUTS)[None, None, :]
    return scaled


@triton.jit
def _sums(
    x, layer, limits, tile, split, kept_inputs, rows, in_features,
    ROWS: tl.constexpr, STEP: tl.constexpr, OUTPUTS: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """Sums over the inputs of a split for the outputs of a tile, float32 [ROWS, OUTPUTS]."""
    WIDTH: tl.constexpr = OUTPUTS // 2 if layer.bits == 4 else OUTPUTS
    GROUP: tl.constexpr = layer.group_size if layer.group_size > 0 else CHUNK
    PARTS: tl.constexpr = UNROLL if UNROLL * STEP < GROUP else GROUP // STEP
    element = tile * WIDTH + tl.arange(0, WIDTH)
    stored = element < (layer.stride if layer.bits == 4 else layer.out_features)
    sums = tl.zeros([ROWS, STEP, OUTPUTS], tl.float32)
    for chunk in range(CHUNKS):
        first = (split * CHUNKS + chunk) * CHUNK
        if COMPACT:
            _list_kept(x, layer, limits, first, kept_inputs, rows, in_features, ROWS, CHUNK, GROUP)
        for group in tl.range(0, CHUNK // GROUP, loop_unroll_factor=UNROLL // PARTS):
            start = first + group * GROUP
            if layer.group_size > 0:
                own = tl.zeros([ROWS, STEP, OUTPUTS], tl.float32)
            else:
                own = sums
            total = tl.zeros([ROWS, STEP], tl.float32)
            count = tl.load(kept_inputs + CHUNK + group) if COMPACT else GROUP
            for base in range(0, count, STEP * PARTS):
                for part in tl.static_range(PARTS):
                    place = base + part * STEP + tl.arange(0, STEP)
                    if COMPACT:
                        column = tl.load(kept_inputs + group * GROUP + place, place < count, other=in_features)
                    else:
                        column = start + place
                    entries, kept = _entries(x, layer, limits, column, rows, in_features, ROWS)
                    needed = tl.max(kept.to(tl.int32), 0) > 0
                    at = layer.weight + column.to(tl.int64)[None, :, None] * layer.stride + element[None, None, :]
                    weights = tl.load(at, needed[None, :, None] & stored[None, None, :], other=0)
                    own += entries[:, :, None] * _values(weights, layer)
                    if layer.minimum is not None:
                        total += entries
            if layer.group_size > 0:
                sums += _scaled(own, total, layer, tile, start // GROUP, start < in_features, OUTPUTS)
            else:
                sums = own
    result = tl.sum(sums, 1)
    if layer.bits == 8 and layer.group_size == 0:
        result *= _of_outputs(layer.scales, layer, tile, True, OUTPUTS)[None, :]
    return result


@triton.jit
def _count(x, layer, limits, split, rows, in_features, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Add the entries of a split to the layer's counts: skipped, seen, not finite. Whole numbers, in any order."""
    skipped, seen, broken = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for start in range(0, SIZE, BLOCK):
        column = split * SIZE + start + tl.arange(0, BLOCK)
        inside = _inside(column, rows, in_features, ROWS)
        entries, kept = _entries(x, layer, limits, column, rows, in_features, ROWS)
        skipped += tl.sum((inside & (kept == 0)).to(tl.int32))
        seen += tl.sum(inside.to(tl.int32))
        broken += tl.sum((inside & ((tl.abs(entries) < float("inf")) == 0)).to(tl.int32))
    tl.atomic_add(layer.counts, skipped.to(tl.int64))
    tl.atomic_add(layer.counts + 1, seen.to(tl.int64))
    tl.atomic_add(layer.counts + 2, broken.to(tl.int64))


@triton.jit
def _split(
    x, layer, tile, split, kept_inputs, rows, in_features,
    ROWS: tl.constexpr, STEP: tl.constexpr, OUTPUTS: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """The sums of a split of a layer's inputs for a tile of its outputs; counts what the first tile sees."""
    limits = _limits(x, layer, rows, in_features, ROWS, CHUNK)
    if layer.counts is not None:
        if tile == 0:
            _count(x, layer, limits, split, rows, in_features, ROWS, CHUNKS * CHUNK, CHUNK)
    return _sums(
        x, layer, limits, tile, split, kept_inputs, rows, in_features, ROWS, STEP, OUTPUTS, UNROLL, CHUNK, CHUNKS,
        COMPACT and layer.threshold is not None,
    )  # fmt: skip


@triton.jit
def _last_of(counter, COUNT: tl.constexpr):
    """Whether this program is the last of so many to come here; what the others stored before can be read then."""
    tl.debug_barrier()  # all threads have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel") == COUNT - 1
    if last:
        tl.store(counter, 0)  # for the next launch
    tl.debug_barrier()
    return last


@triton.jit
def _added(scratch, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr):
    """The sums of all splits, added in their order, of scratch [SPLITS, ROWS, OUTPUTS]."""
    at = scratch + tl.arange(0, ROWS)[:, None] * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    total = tl.load(at, cache_modifier=".cg")  # past the first level, which is each processor's own
    for split in range(1, SPLITS):
        total += tl.load(at + split * ROWS * OUTPUTS, cache_modifier=".cg")
    return total


@triton.jit
def _keep(scratch, sums, BITS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Write sums to scratch [ROWS, OUTPUTS], in the order of outputs."""
    tl.store(scratch + tl.arange(0, ROWS)[:, None] * OUTPUTS + _outputs(0, BITS, OUTPUTS)[None, :], sums)


@triton.jit
def _finished(sums, layer, outputs, y):
    """A layer's outputs, of the sums of all its inputs, rounded as y is and in float32 again."""
    there = outputs < layer.out_features
    if layer.bias is not None:
        sums += tl.load(layer.bias + outputs, there, other=0.0).to(tl.float32)[None, :]
    if layer.offset is not None:
        sums += tl.load(layer.offset + outputs, there, other=0.0)[None, :]
    return sums.to(y.dtype.element_ty).to(tl.float32)


@triton.jit
def _store(y, values, layer, outputs, rows, width, ROWS: tl.constexpr):
    """Write a tile to its place in y [rows, width]."""
    there = (outputs < layer.out_features)[None, :] & (tl.arange(0, ROWS) < rows)[:, None]
    at = tl.arange(0, ROWS)[:, None] * width + (layer.column + outputs)[None, :]
    tl.store(y + at, values.to(y.dtype.element_ty), there)


@triton.jit
def _tile(
    x, y, scratch, kept_inputs, counter, layer, tile, split, rows, in_features, width,
    ROWS: tl.constexpr, STEP: tl.constexpr, OUTPUTS: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, SPLITS: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """A split of a tile of one layer, and if it is the last to come, the tile of y."""
    sums = _split(
        x, layer, tile, split, kept_inputs, rows, in_features, ROWS, STEP, OUTPUTS, UNROLL, CHUNK, CHUNKS, COMPACT
    )
    if SPLITS == 1:
        outputs = _outputs(tile, layer.bits, OUTPUTS)
        _store(y, _finished(sums, layer, outputs, y), layer, outputs, rows, width, ROWS)
    else:
        _keep(scratch + split * ROWS * OUTPUTS, sums, layer.bits, ROWS, OUTPUTS)
        if _last_of(counter, SPLITS):
            outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
            sums = _added(scratch, ROWS, OUTPUTS, SPLITS)
            _store(y, _finished(sums, layer, outputs, y), layer, outputs, rows, width, ROWS)


@triton.jit
def linears_kernel(
    x, y, scratch, kept_inputs, counters, layers, rows, in_features, width,
    LAYERS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, OUTPUTS: tl.constexpr, UNROLL: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """Outputs of several layers on one x, side by side in y [rows, width].

    scratch: float32 [tiles, SPLITS, ROWS, OUTPUTS]. kept_inputs: int32 [programs, 2 * CHUNK]. counters: int32 zeros,
    one for each tile, and zeros again afterwards.
    """
    program, split = tl.program_id(0), tl.program_id(1)
    kept_inputs += (split * tl.num_programs(0) + program).to(tl.int64) * (2 * CHUNK)
    scratch += program.to(tl.int64) * (SPLITS * ROWS * OUTPUTS)
    for number in tl.static_range(LAYERS):
        # `layers[number]` each time: under a name, what is known at compile time would not be (Triton 3.7)
        tile = program - layers[number].first_tile
        if (tile >= 0) & (tile < layers[number].tiles):
            _tile(
                x, y, scratch, kept_inputs, counters + program, layers[number], tile, split, rows, in_features, width,
                ROWS, STEP, OUTPUTS, UNROLL, CHUNK, CHUNKS, SPLITS, COMPACT,
            )  # fmt: skip


@triton.jit
def gate_and_up_kernel(
    x, y, scratch, kept_inputs, counters, layers, rows, in_features, width,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, OUTPUTS: tl.constexpr, UNROLL: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, SPLITS: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """activation(gate(x)) * up(x), with what `linears_kernel` takes; layers are gate and up, of as many outputs.

    scratch: float32 [tiles, 2, SPLITS, ROWS, OUTPUTS].
    """
    program, split = tl.program_id(0), tl.program_id(1)
    kept_inputs += (split * tl.num_programs(0) + program).to(tl.int64) * (2 * CHUNK)
    tile = program // 2
    scratch += tile.to(tl.int64) * (2 * SPLITS * ROWS * OUTPUTS)
    if program % 2 == 0:
        sums = _split(
            x, layers[0], tile, split, kept_inputs, rows, in_features,
            ROWS, STEP, OUTPUTS, UNROLL, CHUNK, CHUNKS, COMPACT,
        )  # fmt: skip
        _keep(scratch + split * ROWS * OUTPUTS, sums, layers[0].bits, ROWS, OUTPUTS)
    else:
        sums = _split(
            x, layers[1], tile, split, kept_inputs, rows, in_features,
            ROWS, STEP, OUTPUTS, UNROLL, CHUNK, CHUNKS, COMPACT,
        )  # fmt: skip
        _keep(scratch + (SPLITS + split) * ROWS * OUTPUTS, sums, layers[1].bits, ROWS, OUTPUTS)
    if _last_of(counters + tile, 2 * SPLITS):
        outputs = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        gate = _finished(_added(scratch, ROWS, OUTPUTS, SPLITS), layers[0], outputs, y)
        up = _finished(_added(scratch + SPLITS * ROWS * OUTPUTS, ROWS, OUTPUTS, SPLITS), layers[1], outputs, y)
        if ACTIVATION == "silu":
            gate *= tl.sigmoid(gate)
        else:  # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
            gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        gate = gate.to(y.dtype.element_ty).to(tl.float32)
        _store(y, gate * up, layers[0], outputs, rows, width, ROWS)


@triton.jit
def product_kernel(
    x, y, layer, rows, in_features, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):  # fmt: skip
    """x [rows, in_features] times a quantised weight, which is dequantised tile by tile, plus bias; skips nothing.

    INPUTS divides the size of groups.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = outputs < layer.out_features
    element = outputs // 32 * 16 + outputs % 16 if layer.bits == 4 else outputs
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    if layer.group_size == 0:
        scales = tl.load(layer.scales + outputs, there, other=0.0).to(tl.float32)
    for start in range(0, in_features, INPUTS):
        column = start + tl.arange(0, INPUTS)
        inside = column < in_features
        entries = tl.load(
            x + row[:, None] * in_features + column[None, :], (row < rows)[:, None] & inside[None, :], other=0.0
        )
        stored = tl.load(
            layer.weight + column.to(tl.int64)[:, None] * layer.stride + element[None, :],
            inside[:, None] & there[None, :],
            other=0,
        )
        if layer.bits == 4:
            stored = (stored >> (outputs // 16 % 2 * 4).to(tl.uint8)[None, :]) & 15
        values = stored.to(tl.float32)
        if layer.bits == 4 and layer.minimum is None:
            values -= 8.0
        if layer.group_size > 0:
            group = start // layer.group_size * layer.out_features
            scales = tl.load(layer.scales + group + outputs, there, other=0.0).to(tl.float32)
        values *= scales[None, :]
        if layer.minimum is not None:
            values += tl.load(layer.minimum + group + outputs, there, other=0.0).to(tl.float32)[None, :]
        sums += tl.dot(entries, values.to(x.dtype.element_ty), input_precision="ieee")
    if layer.bias is not None:
        sums += tl.load(layer.bias + outputs, there, other=0.0).to(tl.float32)[None, :]
    at = y + row[:, None] * layer.out_features + outputs[None, :]
    tl.store(at, sums.to(y.dtype.element_ty), (row < rows)[:, None] & there[None, :])
