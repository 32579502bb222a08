"""A compiled step as CUDA graphs: one launch a token, instead of one for each kernel."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], None]


class GraphedStep:
    """A function of (token, position, blocks, *memory), replayed from a graph wherever it knows the memory.

    A graph is captured when a memory is met for the second time: the first call compiles what is not compiled, which
    cannot happen while a graph is captured. Graphs of memory that was not met for the longest time are dropped.

    Args:
        run: the function; returns a tensor in a tuple, and writes to its memory.
        capture: what makes a function that does the same again, of one without arguments; `cuda_capture` on a GPU.
        most: graphs that are kept.

    Attributes:
        problem: why nothing is captured any more, or None.
    """

    def __init__(
        self, run: Callable[..., Sequence[Tensor]], capture: Callable[[Callable[[], None]], Replay], most: int = 8
    ) -> None:
        self.run, self.capture, self.most = run, capture, most
        self.graphs: dict[tuple[int, ...], _Graph | None] = {}
        self.problem: str | None = None
        self.lock = threading.Lock()

    def __call__(self, token: Tensor, position: Tensor, blocks: Tensor, *memory: Tensor) -> tuple[Tensor]:
        """What `run` returns; the tensor is the caller's."""
        key = (token.shape[1], blocks.shape[0], *(each.data_ptr() for each in memory))
        with self.lock:
            met = key in self.graphs
            graph = self.graphs.pop(key, None)  # and to the end: the dictionary is in the order of use
            if met and graph is None and self.problem is None:
                graph = self._captured(token, position, blocks, memory)
            self.graphs[key] = graph
            while len(self.graphs) > self.most:
                del self.graphs[next(iter(self.graphs))]
        if graph is None:
            return (self.run(token, position, blocks, *memory)[0],)
        graph.token.copy_(token)
        graph.position.copy_(position)
        graph.replay()
        return (graph.result.clone(),)

    def _captured(self, token: Tensor, position: Tensor, blocks: Tensor, memory: Sequence[Tensor]) -> _Graph | None:
        """The graph of a call; None, and none from then on, if it cannot be captured: nothing was computed then."""
        with torch.inference_mode(False), torch.no_grad():  # later calls write to what is made here in any mode
            try:
                return _Graph(self.run, self.capture, token.clone(), position.clone(), blocks, memory)
            except Exception as error:
                lines = str(error).strip().splitlines()
                self.problem = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
                warnings.warn(f"decoding goes on without CUDA graphs: {self.problem}", stacklevel=2)
                return None


class _Graph:
    """A captured call, with the tensors that it reads and writes."""

    result: Tensor

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor]],
        capture: Callable[[Callable[[], None]], Replay],
        token: Tensor,
        position: Tensor,
        blocks: Tensor,
        memory: Sequence[Tensor],
    ) -> None:
        self.token, self.position, self.memory = token, position, memory  # kept, as the graph has their addresses

        def call() -> None:
            self.result = run(token, position, blocks, *memory)[0]

        self.replay = capture(call)


def cuda_capture(call: Callable[[], None], device: torch.device) -> Replay:
    """Capture what `call` does on a GPU as a CUDA graph, without doing it."""
    from deadband.ops.gpu.launch import own_counters

    graph: Any = torch.cuda.CUDAGraph()
    # a stream of that GPU, as torch's own for captures is of the first that was captured on; and other threads go on
    with torch.cuda.device(device), own_counters(device) as counters:
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()

    def replay(graph: Any = graph, counters: Tensor = counters) -> None:  # the graph has the counters' address
        with torch.cuda.device(device):
            graph.replay()

    return replay
