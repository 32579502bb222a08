"""The loops that only read: every byte of the rows, and no other."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import ISAS, before_a_wall, instruction_set

from deadband.ops import kernels

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")


def seen(tensor, kept, way, threads=1, **changed):
    """What a loop saw of the rows of a matrix, and the bytes per second."""
    bits = ctypes.c_uint8(255)
    arguments = {
        "data": tensor.data_ptr(), "stride": tensor.stride(0), "bytes": tensor.shape[1],
        "index": None if kept is None else kept.data_ptr(), "count": tensor.shape[0] if kept is None else len(kept),
        "loop": way, "threads": threads, "seen": ctypes.addressof(bits),
    }  # fmt: skip
    speed = kernels.library.deadband_read_bandwidth(*{**arguments, **changed}.values())
    return bits.value, speed


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.sampled_from([1, 63, 64, 65, 200, 700, 5000]),
    kept=st.sampled_from([None, 0.1, 0.5]),
    count=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_every_loop_reads_these_bytes_and_no_other(isa, rows, width, kept, count, seed):
    generator = torch.Generator().manual_seed(seed)
    index = None
    chosen = torch.ones(rows, dtype=torch.bool)
    if kept is not None:
        chosen = torch.rand(rows, generator=generator) < kept
        chosen[seed % rows] = True
        index = chosen.nonzero()[:, 0].int()
    data = torch.where(chosen, 0, 128).to(torch.uint8).unsqueeze(1).repeat(1, width)
    places = chosen.nonzero()[:, 0]
    for bit in range(3):
        row = places[torch.randint(len(places), (), generator=generator)]
        data[row, torch.randint(width, (), generator=generator)] |= 1 << bit
    expected = 0
    for value in data[chosen].unique().tolist():
        expected |= value
    data = before_a_wall(data)
    with instruction_set(isa):
        for loop in kernels.READ_LOOPS:
            bits, speed = seen(data, index, loop, count)
            assert bits == expected, loop
            assert speed > 0


def test_what_cannot_be_read_gives_zero():
    data = torch.ones(4, 100, dtype=torch.uint8)
    assert seen(data, None, 0)[0] == 1
    refused = [{"data": None}, {"bytes": 0}, {"bytes": -1}, {"count": 0}, {"stride": -100}, {"loop": -1},
               {"loop": len(kernels.READ_LOOPS)}]  # fmt: skip
    for change in refused:
        assert seen(data, None, 0, **change)[1] == 0, change


def test_the_fastest_loop_is_one_of_them():
    weights = [torch.ones(64, 4096, dtype=torch.int8) for _ in range(3)]
    kept = torch.arange(0, 64, 2, dtype=torch.int32)
    assert kernels.fastest_read(weights, kept, repeats=3) in kernels.READ_LOOPS
    assert kernels.read(weights[0], kept) > 0
    assert kernels.read(torch.ones(3)) > 0  # less than a row of what has none
