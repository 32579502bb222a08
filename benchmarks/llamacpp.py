"""llama.cpp beside our decoders: a model written as GGUF, quantized by llama.cpp itself, decoded token by token.

The name is not `llama_cpp`, as that is the package this is a wrapper of. Token ids are fed, so the files hold no
tokenizer.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from common import kept_to, llama_folder
from torch import Tensor

from deadband.files import cache_folder, replacing

if (isa := kept_to()) is not None and llama_folder(isa) not in Path(llama_cpp.__file__).parents:
    raise ImportError(f"there is no llama-cpp-python built for {isa} in {llama_folder(isa)}")
KINDS = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
}
FOLDER = "benchmarks"


def gguf_path(name: str, kind: str = "BF16") -> Path:
    """Where the GGUF of a model is kept: `benchmarks/<name>-<kind>.gguf` in deadband's cache folder."""
    return cache_folder() / FOLDER / f"{name}-{kind}.gguf"


def write_gguf(model: Any, path: str | os.PathLike) -> Path:
    """Write a Hugging Face Llama, Gemma 3 or Qwen3-MoE as GGUF: matrices in bfloat16, norms and routers in float32.

    It has no tokenizer.

    Raises:
        ValueError: the model is of another kind, its rotary embedding is scaled, or not all of its layers have experts
            whose shares are normed.
    """
    path, config = Path(path), model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"no GGUF for model type {config.model_type!r}; known: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = {}
    for name, tensor in _parts(model.state_dict()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings where there is none
        tensors[name] = (names.get_name(name, try_suffixes=(".weight", ".bias")), tensor)
        if tensors[name][0] is None:
            raise ValueError(f"GGUF has no name for {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
        _write_config(writer, config)
        for target, tensor in tensors.values():
            kind = _kind(target, tensor)
            item = np.dtype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.int16)  # numpy has no bfloat16
            writer.add_tensor_info(target, list(tensor.shape), item, tensor.numel() * item.itemsize, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (target, tensor) in tensors.items():  # one after the other: the file is as large as the model
            writer.write_tensor_data(_array(_as_llama_cpp_wants(name, tensor, config), _kind(target, tensor)))
        writer.close()
    return path


def quantize(source: str | os.PathLike, target: str | os.PathLike, kind: str, threads: int | None = None) -> Path:
    """llama.cpp's own quantization of a BF16 GGUF, with its defaults; `kind` is of `KINDS`, or BF16: `source` itself.

    Nothing is done where `target` is newer than `source`. llama.cpp mixes types: the embeddings, which are the
    output layer too where they are tied, get Q6_K under Q4_0 and Q4_K_M (Q8_0 where rows do not divide by 256), and
    Q4_K_M takes Q6_K for half of the v and down projections.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    source, target = Path(source), Path(target)
    if kind == "BF16":
        return source
    if target.is_file() and target.stat().st_mtime > source.stat().st_mtime:
        return target
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = KINDS[kind]
    parameters.nthread = threads or os.cpu_count() or 1
    with replacing(target) as temporary:
        if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp could not quantize {os.fspath(source)} to {kind}")
    return target


class LlamaCpp:
    """One GGUF on the processor, decoded greedily: `prefill`, then a token per `step`; or the logits of a window.

    llama.cpp's defaults, which are what its own programs use: flash attention where it can, keys and values in
    float16, Q4_0 and Q4_K repacked for the processor as they are loaded, the rest mapped from the file, or with
    `mapped=False` read into memory: that is no faster, but where most of a file is not read for a while, as with
    experts, the system may drop it from memory.

    Example:
        >>> decoder = LlamaCpp("model.gguf", threads=2)  # doctest: +SKIP
        >>> tokens = [decoder.prefill([1, 2, 3])] + [decoder.step() for _ in range(8)]  # doctest: +SKIP

    Raises:
        RuntimeError: llama.cpp cannot load the file.
    """

    def __init__(self, path: str | os.PathLike, threads: int, *, context: int = 2048, mapped: bool = True):
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_mmap = mapped
        self._context = self._batch = None
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {os.fspath(path)}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_threads = options.n_threads_batch = threads
        options.swa_full = False  # as llama.cpp's programs have it: sliding layers keep their window only
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            self.close()
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens for {os.fspath(path)}")
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._capacity = context
        self._position = self._token = 0

    def prefill(self, ids: Sequence[int] | Tensor) -> int:
        """Start a new sequence with this prompt; returns the token that follows it."""
        self._restart()
        self._decode(_token_list(ids))
        self._token = int(self._output(1).argmax())
        return self._token

    def step(self, token: int | None = None) -> int:
        """Decode one token, as `GreedyDecoder` does: feed the last one, or `token`, return the likeliest to follow."""
        self._decode([self._token if token is None else token])
        self._token = int(self._output(1).argmax())
        return self._token

    def logits(self, ids: Sequence[int] | Tensor) -> np.ndarray:
        """float32 [tokens, vocabulary]: the logits at every position of this window, as a sequence of its own."""
        self._restart()
        tokens = _token_list(ids)
        self._decode(tokens, every=True)
        return self._output(len(tokens)).copy()

    def set_threads(self, threads: int) -> None:
        """Decode and prefill on so many threads from now on."""
        llama_cpp.llama_set_n_threads(self._context, threads, threads)

    def close(self) -> None:
        """Free the model; nothing else can be called after."""
        if self._batch is not None:
            llama_cpp.llama_batch_free(self._batch)
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._batch = self._context = self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restart(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._position = 0

    def _decode(self, tokens: list[int], every: bool = False) -> None:
        if self._position + len(tokens) > self._capacity:
            raise ValueError(f"{self._position + len(tokens)} tokens are more than the context of {self._capacity}")
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = self._position + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index == len(tokens) - 1
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp could not decode: status {status}")
        self._position += len(tokens)

    def _output(self, rows: int) -> np.ndarray:
        """The logits of the last batch in llama.cpp's own memory, valid until the next; waits for them."""
        pointer = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (rows, self._vocabulary))


def system_info() -> str:
    """The processor's features that llama.cpp was built for, as it prints them."""
    return llama_cpp.llama_print_system_info().decode().strip()


def tensor_types(path: str | os.PathLike) -> dict[str, int]:
    """Bytes of a GGUF's tensors by their type, as in {"Q4_0": 549453824, "Q6_K": 215470080}."""
    sizes: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return sizes


def _write_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(_rope_theta(config.rope_parameters))
        return
    if config.model_type == "qwen3_moe":
        if not config.norm_topk_prob or config.mlp_only_layers or config.decoder_sparse_step != 1:
            raise ValueError("llama.cpp knows Qwen3-MoE with normed shares and experts in each layer alone")
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_rope_freq_base(_rope_theta(config.rope_parameters))
        return
    if config.query_pre_attn_scalar != config.head_dim:  # llama.cpp knows no other, but for 27 B
        raise ValueError(f"llama.cpp scales Gemma's queries by head_dim, not by {config.query_pre_attn_scalar}")
    writer.add_rope_freq_base(_rope_theta(config.rope_parameters["full_attention"]))
    writer.add_rope_freq_base_swa(_rope_theta(config.rope_parameters["sliding_attention"]))
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _rope_theta(parameters: dict[str, Any]) -> float:
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"no GGUF for rotary embeddings of type {parameters['rope_type']!r}")
    return parameters["rope_theta"]


def _parts(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names that GGUF knows: experts' gates and what they gate are two there."""
    for name, tensor in tensors.items():
        if name.endswith(".gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, 1), strict=True):
                yield f"{name.removesuffix('gate_up_proj')}{part}.weight", half
        else:
            yield f"{name}.weight" if name.endswith(".experts.down_proj") else name, tensor


def _as_llama_cpp_wants(name: str, tensor: Tensor, config: Any) -> Tensor:
    if config.model_type == "qwen3_moe":  # which llama.cpp turns as transformers does
        return tensor
    if config.model_type == "gemma3_text":  # Gemma multiplies by 1 + weight, llama.cpp by what is in the file
        return tensor.float() + 1 if name.endswith("norm.weight") else tensor
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if f".{part}." in name:
            # transformers turns feature i with i + head_dim / 2, llama.cpp neighbours: halves become pairs
            return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    return tensor


def _kind(target: str, tensor: Tensor) -> gguf.GGMLQuantizationType:
    whole = tensor.dim() == 1 or target.endswith("ffn_gate_inp.weight")  # routers, too: as llama.cpp's converter has it
    return gguf.GGMLQuantizationType.F32 if whole else gguf.GGMLQuantizationType.BF16


def _array(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if kind == gguf.GGMLQuantizationType.F32:
        return tensor.float().numpy()
    return tensor.bfloat16().view(torch.int16).numpy()


def _token_list(ids: Sequence[int] | Iterable[int] | Tensor) -> list[int]:
    return ids.flatten().tolist() if isinstance(ids, Tensor) else [int(token) for token in ids]


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp tells a page about every model it loads."""


llama_cpp.llama_log_set(_silent, None)
