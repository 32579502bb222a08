"""Quantised weights out of GGUF files, code for code: the file's own rounding is the only one.

Blocks of Q8_0, Q4_0 and Q4_1 are 32 consecutive inputs of one output with a float16 scale (and minimum), which is what
the formats int8-g32, int4-g32 and int4-g32-zp hold, in another order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deadband.layers.formats import QuantizedWeight, WeightFormat, pack
from deadband.quantization.gguf_file import Header, TensorInfo, read_header

BLOCK_FORMATS = {"Q8_0": WeightFormat(8, 32), "Q4_0": WeightFormat(4, 32), "Q4_1": WeightFormat(4, 32, True)}
"""The types of GGUF's blocks that can be read, and what they become."""
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
"""GGUF's names of the architectures whose linear layers are known by name; Mistral's and SmolLM2's is `llama`."""


def quantized_weights(path: str | os.PathLike) -> dict[str, QuantizedWeight]:
    """The linear layers and the embedding that a GGUF file holds as Q8_0, Q4_0 or Q4_1, as it holds them.

    Keys are transformers' names of modules, such as `model.layers.0.mlp.down_proj`, `lm_head` and `model.embed_tokens`.
    Tensors of other types are not in the result; `tensor_types` tells which those are. Memory beyond the result does
    not depend on the size of the file.

    Args:
        path: the file, or any of those that the model was split into.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package `gguf` is not installed.
        ValueError: the file is not a GGUF file, is damaged, or is of an unknown architecture.

    Example:
        >>> weights = quantized_weights("model-q4_0.gguf")                        # doctest: +SKIP
        >>> weights["model.layers.0.mlp.down_proj"]                               # doctest: +SKIP
        QuantizedWeight(int4-g32, 1536 inputs, 576 outputs, 497664 bytes)
    """
    header = read_header(path)
    return {
        name: _read(header.tensors[own], row_order(header, own))
        for name, own in _named(header)
        if header.tensors[own].type in BLOCK_FORMATS and len(header.tensors[own].shape) == 2
    }


def tensor_types(path: str | os.PathLike) -> dict[str, str]:
    """The GGUF type (`Q4_K`, `F16`, ...) of each linear layer and the embedding, by transformers' name of the module.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for `quantized_weights`.

    Example:
        >>> tensor_types("model-q4_0.gguf")["model.embed_tokens"]                 # doctest: +SKIP
        'Q6_K'
    """
    header = read_header(path)
    return {name: header.tensors[own].type for name, own in _named(header)}


_LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd.weight": "model.embed_tokens", "output.weight": "lm_head"}
_IN_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ENTRIES = 2**20  # weights that are unpacked at a time


def _named(header: Header) -> Iterator[tuple[str, str]]:
    """Names of modules of transformers, and of the file's tensors."""
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{os.fspath(header.files[0])!r} is of architecture {architecture!r}; expected one of {known}")
    for own in header.tensors:
        if name := module_name(own, architecture):
            yield name, own


def module_name(name: str, architecture: str) -> str | None:
    """transformers' name of the linear layer or embedding whose weight a file's tensor is, or None."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = _IN_BLOCK.fullmatch(name)
    if found is None or found[2] not in _LAYERS:
        return None
    layer = _LAYERS[found[2]]
    if architecture == "phi3" and layer == "mlp.up_proj":
        layer = "mlp.gate_up_proj"
    return f"model.layers.{found[1]}.{layer}"


def row_order(header: Header, name: str) -> np.ndarray | None:
    """Which row of the file is each output of the layer; None if they are in order.

    Llama's rotary embedding turns entries i and i + d/2 of a head together, the file's neighbours.
    """
    found = _IN_BLOCK.fullmatch(name)
    metadata = header.metadata
    if metadata["general.architecture"] != "llama" or found is None or found[2] not in ("attn_q", "attn_k"):
        return None
    heads = metadata.get("llama.attention.head_count")
    if found[2] == "attn_k":
        heads = metadata.get("llama.attention.head_count_kv") or heads
    if isinstance(heads, list):
        heads = heads[int(found[1])]
    out = header.tensors[name].shape[1]
    if not isinstance(heads, int) or heads < 1 or out % (2 * heads):
        raise ValueError(f"tensor {name!r} has {out} rows, which are not {heads} heads of an even size")
    return np.arange(out).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _read(tensor: TensorInfo, order: np.ndarray | None) -> QuantizedWeight:
    format = BLOCK_FORMATS[tensor.type]
    size, out = tensor.shape
    data = tensor.rows()
    width = out if format.bits == 8 else -(-out // 32) * 16
    codes = torch.empty(size, width, dtype=torch.int8 if format.bits == 8 else torch.uint8)
    scales = torch.empty(size // 32, out, dtype=torch.float16)
    minimum = torch.empty_like(scales) if format.zero_point else None
    rows = max(_ENTRIES // size // 32, 1) * 32
    for start in range(0, out, rows):
        stop = min(start + rows, out)
        lines = data[start:stop] if order is None else data[order[start:stop]]
        blocks = torch.from_numpy(np.array(lines)).view(stop - start, size // 32, -1)
        scales[:, start:stop] = _float16(blocks, 0)
        if minimum is not None:
            minimum[:, start:stop] = _float16(blocks, 2)
        if format.bits == 8:
            codes[:, start:stop] = blocks[:, :, 2:].reshape(stop - start, size).T.view(torch.int8)
        else:
            halves = blocks[:, :, 4 if format.zero_point else 2 :]  # inputs 0 to 15 in the low halves of the bytes
            unpacked = torch.cat([halves & 15, halves >> 4], 2).view(stop - start, size)
            part = pack(unpacked.T.contiguous(), 0 if format.zero_point else 8)
            codes[:, start // 2 : start // 2 + part.shape[1]] = part
    return QuantizedWeight(codes, scales, minimum, format)


def _float16(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, [blocks of a row, rows]."""
    return blocks[:, :, at : at + 2].contiguous().view(torch.float16)[:, :, 0].T
