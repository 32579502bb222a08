"""Times of candidates that take turns in one process, and the machine that they were taken on."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from deadband.ops import kernels
from deadband.running.forward import progress_bar


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, rounds: int, warmup: int = 2, what: str = "", progress: bool = True
) -> dict[str, list[float]]:
    """Seconds of every call, candidate by candidate in turn, so that a change of the machine's speed meets all alike.

    Each round has another order, as what one candidate leaves in the caches is what the next one finds. Python's
    garbage collector waits meanwhile, as in timeit: one candidate would pay for what another left.

    Example:
        >>> times = interleave({"a": lambda: sum(range(10)), "b": lambda: None}, rounds=3, progress=False)
        >>> len(times["a"])
        3
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in progress_bar(range(-warmup, rounds), what, progress):
            for name in order.sample(list(candidates), len(candidates)):
                start = time.perf_counter()
                candidates[name]()
                if index >= 0:
                    times[name].append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return times


def replayed(call: Callable[[], Any], device: torch.device, times: int = 32) -> Callable[[], None]:
    """A function that does `call` so many times in one CUDA graph, and waits for it: for timing what a GPU does.

    Raises:
        RuntimeError: something in `call` cannot be captured, such as a copy from the GPU.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is compiled or allocated at the first call
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            for _ in range(times):
                call()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()
            torch.cuda.synchronize()

    return replay


def median(seconds: list[float]) -> float:
    """The median, which a neighbour's burst of work does not move."""
    return statistics.median(seconds)


def machine() -> dict[str, Any]:
    """What a figure has to be read beside: processor, cores, instruction set, versions, threads."""
    versions = {name: _version(name) for name in ("deadband", "torch", "transformers")}
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernels": kernels.isa(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # deadband from a checkout, on a machine with a GPU


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in named:
            family = f"family {named.get('cpu family', '?')} model {named.get('model', '?')}"
            return f"{named['model name']} ({family})"
    return platform.processor() or platform.machine()
