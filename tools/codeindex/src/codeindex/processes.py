"""Work on several cores."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

_FEW = 200  # items that are done before processes have started


def spread(work: Callable, items: Sequence, jobs: int, *, fork: bool = False) -> Iterator:
    """The results in order, from processes where there is much to do. With `fork` they share this one's memory."""
    methods = multiprocessing.get_all_start_methods()
    if jobs == 1 or len(items) < _FEW or (fork and "fork" not in methods):
        yield from map(work, items)
        return
    context = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _begin)
    try:
        yield from pool.map(work, items, chunksize=32)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In each process: Ctrl-C is the parent's affair, and the parent's end is the process's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
