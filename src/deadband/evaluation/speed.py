"""The timing harness that the command line and benchmarks/ share: candidates interleaved in one process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deadband.layers.experts import ExpertLinear, with_projections
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.sites import sparse_sites
from deadband.layers.sparse import tensor_of
from deadband.ops import kernels
from deadband.running.greedy_decoding import GreedyDecoder
from deadband.running.timing import interleave, machine, median, replayed
from deadband.sparsify.report import sparsity


def bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that decoding one token reads: all parameters, codes and scales but those of embeddings, of
    which it reads a row, and of experts that it is not sent to, less what the sparse layers skipped since they last
    began to count."""
    skipped = sparsity(model, warn=False).sites if sparse_sites(model) else {}
    read, seen = 0.0, set()
    modules = dict(with_projections(model))
    for name, module in sorted(modules.items(), key=lambda item: not isinstance(item[1], ExpertLinear)):
        if isinstance(module, nn.Embedding):
            continue  # one row; the whole of it where an output layer is tied to it, which counts there
        share = 1.0
        own = list(module.parameters(recurse=False))
        if isinstance(module, ExpertLinear):  # those that the token is sent to
            share = min(module.chosen or module.count, module.count) / module.count
            own = [] if isinstance(module, QuantizedMatrix) else [module.weight]
        for tensor in (*own, *_quantised_tensors(module)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            left_out = skipped.get(name, 0.0) if tensor.dim() > 1 and tensor is tensor_of(module) else 0.0
            read += share * tensor.nbytes * (1.0 if math.isnan(left_out) else 1.0 - left_out)
    return int(read)


def expected_speeds(model: nn.Module, skipped_bytes: float) -> dict[str, float]:
    """Tokens per second at most, as memory can be read, of a dense model and of one that leaves out so many bytes.

    Example:
        >>> speeds = expected_speeds(nn.Linear(64, 64), 64 * 64 * 2)
        >>> 1.9 < speeds["exact"] / speeds["dense"] < 2.1
        True
    """
    rate, read = kernels.read_bandwidth(0.5), bytes_per_token(model)
    return {"dense": rate / read, "exact": rate / max(read - skipped_bytes, 1.0)}


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are stored, parameters and quantised ones.

    Example:
        >>> model_bytes(nn.Linear(4, 2))
        40
    """
    tensors = [*model.parameters(), *(tensor for module in model.modules() for tensor in _quantised_tensors(module))]
    return sum(tensor.nbytes for tensor in tensors)


def _quantised_tensors(module: nn.Module) -> list[Tensor]:
    if not isinstance(module, QuantizedMatrix):
        return []
    return [tensor for tensor in (module.codes, module.scales, module.minimum) if tensor is not None]


def decode_seconds(
    models: Mapping[str, Any], prompt: Tensor, *, tokens: int, what: str = "decode", progress: bool = True
) -> dict[str, list[float]]:
    """Seconds per decoded token of each model, taking turns token by token."""
    decoders = {name: GreedyDecoder(model, prompt) for name, model in models.items()}
    steps = {name: _waited(decoder) for name, decoder in decoders.items()}
    return interleave(steps, rounds=tokens, what=what, progress=progress)


def _waited(decoder: GreedyDecoder) -> Callable[[], None]:
    """A step of it that is over when it returns; a GPU works on after what it was asked for."""
    device = decoder.tokens[-1].device
    if device.type != "cuda":
        return decoder.step

    def step() -> None:
        decoder.step()
        torch.cuda.synchronize(device)

    return step


def bandwidth_of(device: torch.device) -> float:
    """Bytes per second that memory gives: of reading it on a CPU, of copying (both ways) on a GPU."""
    if device.type != "cuda":
        return kernels.read_bandwidth()
    free = torch.cuda.mem_get_info(device)[0]
    source = torch.ones(max(min(1 << 28, free // 32), 1 << 20), device=device)
    target = torch.empty_like(source)
    seconds = interleave({"": replayed(lambda: target.copy_(source), device, 4)}, rounds=7, progress=False)[""]
    return 4 * 2 * source.nbytes / median(seconds)


def compare_decoding(
    model: Any, tokenizer: Any, *, tokens: int, compiled: bool = True, progress: bool = True
) -> dict[str, Any]:
    """Decoding speed of a model as it is beside transformers' own on a dense copy of its weights, taking turns.

    With `compiled`, the sparse model is prepared for decoding first (`deadband.prepare_decode_`).
    """
    import copy

    from deadband.decoding.decoder import prepare_decode_
    from deadband.sparsify.sparsify import densify_

    models = {"as it is": model}
    if sparse_sites(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that quantised weights stay rounded: the same ones are compared
            models = {"dense": densify_(copy.deepcopy(model)), "sparse": model}
        sparsity(model, reset=True, warn=False)
        if compiled:
            prepare_decode_(model)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    times = decode_seconds(models, prompt, tokens=tokens, progress=progress)
    rows = {name: decoding_figures(models[name], seconds) for name, seconds in times.items()}
    return {"models": rows, "read_bandwidth": bandwidth_of(model.device), "machine": machine()}


def decoding_figures(model: nn.Module, seconds: list[float]) -> dict[str, float]:
    """Tokens per second, bytes of weights read per token, and both together as bytes per second."""
    one, size = median(seconds), bytes_per_token(model)
    return {"tokens_per_second": 1 / one, "bytes_per_token": size, "bandwidth": size / one}


PROMPT = "A language model reads a prompt and continues it, one token at a time. Most of the time of that goes into"
