"""The compiled kernels, if the package was installed with a C++ compiler at hand: csrc/kernels.h, through ctypes."""

from __future__ import annotations

import ctypes
import importlib.resources
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Sequence
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KERNEL_DTYPES = {dtype: DTYPES[dtype] for dtype in (torch.float32, torch.bfloat16)}
"""Of the products; `deadband_observe` takes all of DTYPES."""
_SIGNATURES = {
    "deadband_sparse_linear": (
        c_int,
        [c_int, c_void_p, *[c_int64] * 3, c_void_p, *[c_int64] * 2, *[c_void_p] * 5, c_int, c_void_p, c_int, c_void_p],
    ),
    "deadband_fill": (
        c_int,
        [c_int, c_void_p, *[c_int64] * 3, *[c_void_p] * 3, c_int, *[c_void_p] * 2, c_int, c_void_p],
    ),
    "deadband_dense_linear": (
        c_int,
        [c_int, c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int],
    ),
    "deadband_quantized_linear": (
        c_int,
        [
            *[c_int, c_void_p, *[c_int64] * 3, c_int, *[c_void_p] * 3, *[c_int64] * 2, *[c_void_p] * 5, c_int],
            *[c_void_p, c_int, c_void_p],
        ],
    ),
    "deadband_dequantize": (
        c_int,
        [c_int, c_int, *[c_void_p] * 3, *[c_int64] * 3, c_void_p, c_int],
    ),
    "deadband_linears": (c_int, [c_int, c_void_p, *[c_int64] * 3, c_void_p, c_int, c_void_p, c_int]),
    "deadband_gated_mlp": (c_int, [c_int, c_void_p, *[c_int64] * 3, c_void_p, c_int, c_void_p, c_int]),
    "deadband_gated_down": (
        c_int,
        [c_int, c_void_p, *[c_int64] * 3, *[c_void_p] * 2, c_int, c_void_p, c_int],
    ),
    "deadband_expert_linear": (
        c_int,
        [c_int, c_void_p, *[c_int64] * 3, c_void_p, c_int64, *[c_void_p] * 3, c_int],
    ),
    "deadband_expert_mlp": (
        c_int,
        [c_int, c_void_p, *[c_int64] * 3, c_void_p, *[c_int64] * 2, *[c_void_p] * 2, c_int, *[c_void_p] * 2, c_int],
    ),
    "deadband_attend": (
        c_int,
        [c_int, *[c_void_p] * 3, *[c_int64] * 9, c_void_p, c_float, c_float, c_void_p, c_int],
    ),
    "deadband_observe": (
        c_int,
        [c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int],
    ),
    "deadband_read_bandwidth": (c_double, [c_void_p, *[c_int64] * 2, c_void_p, c_int64, c_int, c_int, c_void_p]),
    "deadband_advise_huge": (c_int, [c_void_p, c_int64]),
    "deadband_isa": (c_char_p, []),
    "deadband_isa_list": (c_char_p, []),
    "deadband_set_isa": (c_int, [c_char_p]),
}
MISSING = (
    "none are built or loaded: no C++ compiler was found at install, or DEADBAND_KERNELS=0 is set. Everything runs on "
    "torch alone, without any gain. With a compiler, install again: pip install --force-reinstall --no-deps ."
)


def readable(*tensors: torch.Tensor) -> bool:
    """Whether a kernel may read them; else their class (sharded tensors, fakes) knows more than we do."""
    return all(type(each).__torch_dispatch__ is _NO_DISPATCH for each in tensors)


_NO_DISPATCH = torch.Tensor.__torch_dispatch__


def _path() -> Path | None:
    """DEADBAND_KERNELS, where it is the path of a library (0: none at all); otherwise what was installed."""
    chosen = os.environ.get("DEADBAND_KERNELS", "1")
    if chosen not in ("", "0", "1"):
        return Path(chosen)
    folder = Path(str(importlib.resources.files("deadband") / "lib"))
    found = sorted(folder.glob("libdeadband_kernels.*")) if folder.is_dir() and chosen != "0" else []
    return found[0] if found else None


def _load() -> ctypes.CDLL | None:
    path = _path()
    if path is None:
        return None
    try:
        # With the GIL held: a call takes microseconds, and giving the GIL up costs a good part of that
        kernels = ctypes.PyDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(kernels, name)
            function.restype, function.argtypes = result, arguments
        forced = os.environ.get("DEADBAND_ISA")
        if forced and kernels.deadband_isa().decode() != forced:
            choices = kernels.deadband_isa_list().decode()
            warnings.warn(f"DEADBAND_ISA={forced} is not available here, only {choices}; it is ignored", stacklevel=2)
    except (OSError, AttributeError) as error:
        if os.environ.get("DEADBAND_KERNELS") == str(path):
            raise  # it was asked for, and tests under sanitizers must not run without it
        warnings.warn(f"deadband's kernels could not be loaded ({error}); running on torch alone", stacklevel=2)
        return None
    return kernels


library = _load()
"""The loaded library, or None: then everything runs on the torch references."""
_isa = library.deadband_isa().decode() if library else None


def isa() -> str | None:
    """The instruction set in use, one of `available_isas()`, or None without kernels."""
    return _isa


def available_isas() -> list[str]:
    """The instruction sets that this machine can run."""
    return library.deadband_isa_list().decode().split(",") if library else []


def set_isa(name: str) -> None:
    """Use another instruction set from now on; the environment variable DEADBAND_ISA does so from the start.

    Raises:
        ValueError: this machine cannot run it, or there are no kernels.
    """
    if library is None or library.deadband_set_isa(name.encode()) != 0:
        raise ValueError(f"instruction set {name!r} is not available here; expected one of {available_isas()}")
    global _isa
    _isa = name


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages behind a tensor: 3 to 5 % of a kernel's time. A hint: nothing depends on it."""
    if library is not None and tensor.device.type == "cpu":
        library.deadband_advise_huge(tensor.data_ptr(), tensor.numel() * tensor.element_size())


READ_LOOPS = range(12 if library else 1)
"""Ways to read memory; `fastest_read` says which is the best, and so what memory gives at most."""
_RUN = 65600  # bytes of a row of memory that has none: no power of two, so that rows side by side share no cache set


def read(tensor: torch.Tensor, kept: torch.Tensor | None = None, loop: int = 0) -> float:
    """Read a CPU tensor's memory once, with torch's number of threads; returns bytes per second.

    Args:
        tensor: what to read, contiguous; all of it but less than 64 KB at its end.
        kept: int32, the rows of a matrix to read in this order and nothing else, as a kernel that skips has to.
        loop: the way, of `READ_LOOPS`.
    """
    size, count = min(_RUN, tensor.nbytes), max(tensor.nbytes // _RUN, 1)
    if kept is not None:
        size, count = tensor[0].nbytes, len(kept)
    if library is not None:
        index = None if kept is None else kept.data_ptr()
        return library.deadband_read_bandwidth(
            tensor.data_ptr(), size, size, index, count, loop, torch.get_num_threads(), None
        )
    start = time.perf_counter()
    (tensor if kept is None else tensor[kept]).sum()
    return size * count / (time.perf_counter() - start)


def fastest_read(tensors: Sequence[torch.Tensor], kept: torch.Tensor | None = None, repeats: int = 7) -> int:
    """Which of `READ_LOOPS` reads such tensors the fastest; they take turns, lest they come from the caches."""
    turn = itertools.cycle(tensors)
    speeds = {loop: [read(next(turn), kept, loop) for _ in range(repeats)] for loop in READ_LOOPS}
    return max(speeds, key=lambda loop: statistics.median(speeds[loop]))


def read_bandwidth(gigabytes: float = 1.0, repeats: int = 7) -> float:
    """Bytes per second of reading memory with torch's number of threads: the fastest loop's median of some passes."""
    data = torch.empty(int(gigabytes * 1e9) // 8, dtype=torch.int64)
    advise_huge_pages(data)
    data.fill_(1)
    loop = fastest_read(data.chunk(repeats), repeats=repeats)
    return statistics.median(read(data, loop=loop) for _ in range(repeats))
