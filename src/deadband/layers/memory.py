"""Where weights lie: on huge pages, and copied from a mapped checkpoint file without both being in memory."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from deadband.ops.kernels import advise_huge_pages

_CHUNK = 2**22  # bytes of a file that are in memory beside their copy
_HUGE = 2**21  # bytes of a huge page
_BLOCK = 32 * _HUGE  # what is larger has memory of its own: few of its pages are small ones


class _Blocks:
    """Memory for tensors that fill few huge pages, or none: one after the other in blocks of many.

    Each has a storage of its own, so that nothing takes them for views of one tensor. A block lives as long as one of
    them; what is not written to takes no memory.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.block: weakref.ref[mmap.mmap] | None = None
        self.used = 0

    def take(self, size: int) -> Tensor:
        """So many bytes, 1 to `_BLOCK`, which begin at a multiple of 64."""
        with self.lock:
            block = None if self.block is None else self.block()
            if block is None or self.used + size > len(block):
                block = mmap.mmap(-1, _BLOCK + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                whole = torch.frombuffer(block, dtype=torch.uint8)
                advise_huge_pages(whole)
                self.block, self.used = weakref.ref(block), -whole.data_ptr() % _HUGE
            start, self.used = self.used, self.used + size + -size % 64
            return torch.frombuffer(block, dtype=torch.uint8, count=size, offset=start)


_blocks = _Blocks()


def empty_on_huge_pages(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor that nothing was written to yet, on huge pages as far as the system has them.

    Layers of a 1B Llama whose weights have memory of their own, with small pages at either end, take up to 12 % longer
    in bfloat16 and up to 7 % in 8 and 4 bits (benchmarks/runs.py, Zen 4).

    Args:
        shape, stride: without gaps.
        dtype, device: as of every tensor; huge pages are for the CPU.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if torch.device(device).type != "cpu" or not 0 < size <= _BLOCK or not hasattr(mmap, "MAP_PRIVATE"):
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        advise_huge_pages(tensor)
        return tensor
    return torch.empty(0, dtype=dtype, device=device).set_(_blocks.take(size).untyped_storage(), 0, shape, stride)


def on_huge_pages(tensor: Tensor, files: MappedFiles | None = None) -> Tensor:
    """A copy of a tensor in memory that has huge pages behind it, as far as the system has them.

    Args:
        tensor: of any shape.
        files: give back the memory of what was copied, if it lies in one of them.
    """
    like = torch.empty_like(tensor, device="meta")  # strides without gaps
    copy = empty_on_huge_pages(like.shape, like.stride(), tensor.dtype, tensor.device)
    if files is None or not tensor.is_contiguous():
        return copy.copy_(tensor)
    count = max(_CHUNK // tensor.element_size(), 1)
    for there, here in zip(copy.view(-1).split(count), tensor.view(-1).split(count), strict=True):
        there.copy_(here)
        files.give_back(here)
    return copy


class MappedFiles:
    """The files that are mapped into this process and of which no page was written to; none where there is no /proc.

    Such a page can leave memory at any time: whoever looks at it again has it read from the file.
    """

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.stops: list[int] = []
        start = stop = inode = 0
        with contextlib.suppress(OSError, AttributeError), open("/proc/self/smaps", encoding="utf-8") as file:
            self.advise = ctypes.CDLL(None).madvise
            for line in file:
                field, value, *others = line.split()
                if not field.endswith(":"):  # the first line of a mapping: addresses, permissions, ..., inode, path
                    start, stop = (int(address, 16) for address in field.split("-"))
                    inode = int(others[2])
                elif field == "Anonymous:" and inode and value == "0":
                    self.starts.append(start)
                    self.stops.append(stop)

    def give_back(self, tensor: Tensor) -> None:
        """Let the pages of a tensor leave memory, if it lies in one of the files; its values stay what they are."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        index = bisect.bisect_right(self.starts, start) - 1
        if index < 0 or stop > self.stops[index]:
            return
        start += -start % mmap.PAGESIZE
        stop -= stop % mmap.PAGESIZE
        if start < stop:
            self.advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
