"""Weights that lie in a mapped checkpoint file: copied without both being in memory."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

from deadband.ops.kernels import advise_huge_pages

_CHUNK = 2**22  # bytes of a file that are in memory beside their copy


def on_huge_pages(tensor: Tensor, files: MappedFiles | None = None) -> Tensor:
    """A copy of a tensor in memory that has huge pages behind it, as far as the system has them.

    Args:
        tensor: of any shape.
        files: give back the memory of what was copied, if it lies in one of them.
    """
    copy = torch.empty_like(tensor)
    advise_huge_pages(copy)
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
