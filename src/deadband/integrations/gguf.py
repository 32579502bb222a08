"""Models and tokenizers that transformers makes of GGUF files, held against the file before they are trusted.

transformers reads such files without a word about what it leaves out: every form of rope scaling, the way a tokenizer
splits text, experts of a mixture that it takes for a dense model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deadband.quantization.gguf_file import Header, read_header
from deadband.quantization.gguf_weights import ARCHITECTURES, module_name, row_order

_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_FOUR_NORMS = {  # of Gemma 2 and 3
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}
"""What a GGUF file and a configuration of transformers call the same number."""


def load_gguf(path: str | os.PathLike, *, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer, from a GGUF file, by transformers, and checked.

    Args:
        path: a file that holds the whole model.
        dtype: what its weights are unpacked to.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package `gguf` is not installed.
        ValueError: the file is damaged, or transformers does not make of it what it holds; the message says what.

    Example:
        >>> model, tokenizer = load_gguf("model-q8_0.gguf")                       # doctest: +SKIP
    """
    from transformers import AutoModelForCausalLM

    path = Path(path)
    header = read_header(path)
    if len(header.files) > 1:
        raise ValueError(
            f"{os.fspath(path)!r} is split into {len(header.files)} files, and transformers would read one of them "
            "alone; join them first, with llama.cpp's gguf-split --merge"
        )
    _check_metadata(header)
    options: dict[str, Any] = {}
    try:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass  # older versions unpack weights in any case
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options).eval()
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"transformers cannot load {os.fspath(path)!r}: {str(error).strip().splitlines()[0]}"
        ) from error
    check_model(model, path)
    return model, _tokenizer(header)


def check_model(model: Any, path: str | os.PathLike) -> None:
    """Hold a model that transformers made of a GGUF file against that file: for those who called
    `from_pretrained(gguf_file=...)` themselves.

    Sizes, norms' epsilon, rotary embedding and experts have to be the file's; every tensor of the file has to be a
    parameter of the model, every parameter has to be in the file, and the values of each are compared in part.

    Raises:
        FileNotFoundError, ImportError: as for `load_gguf`.
        ValueError: it is of an unknown architecture, or the first thing that differs.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)  # doctest: +SKIP
        >>> check_model(model, f"{folder}/{name}")                                # doctest: +SKIP
    """
    header = read_header(path)
    _check_metadata(header)
    config = model.config.get_text_config()
    for key, expected in _expected_sizes(header):
        found = getattr(config, key, None)
        if found is None or abs(found - expected) > 1e-3 * abs(expected):
            raise ValueError(f"the model's {key} is {found}, and the file's {expected}: {os.fspath(path)!r}")
    if found := _other_rope(config, header):
        raise ValueError(f"{found}: {os.fspath(path)!r}")
    _check_tensors(model, header)


def _check_metadata(header: Header) -> None:
    """A ValueError where transformers is known to leave out what the file says."""
    file, metadata = os.fspath(header.files[0]), header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{file!r} is of architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    remedy = "load the model from its own checkpoint, not from a GGUF file"
    if metadata.get(f"{architecture}.expert_count"):
        raise ValueError(
            f"{file!r} is a mixture of experts, of which transformers makes a dense {architecture}; {remedy}"
        )
    if "rope_freqs.weight" in header.tensors:
        raise ValueError(
            f"{file!r} scales its rotary embedding (rope_freqs.weight), which transformers drops; {remedy}"
        )
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = metadata.get(f"{architecture}.rope.scaling.factor", metadata.get(f"{architecture}.rope.scale_linear", 1.0))
    if scaling != "none" and (scaling != "linear" or factor != 1.0):
        raise ValueError(
            f"{file!r} scales its rotary embedding ({scaling}, factor {factor:g}), which transformers drops; {remedy}"
        )


def _expected_sizes(header: Header) -> Iterator[tuple[str, float]]:
    architecture = header.metadata["general.architecture"]
    for key, name in _SIZES.items():
        value = header.metadata.get(f"{architecture}.{key}")
        if isinstance(value, list):
            value = value[0] if len({*value}) == 1 else None
        if isinstance(value, (int, float)) and (name != "sliding_window" or architecture.startswith("gemma")):
            yield name, value
    if "token_embd.weight" in header.tensors:
        yield "vocab_size", header.tensors["token_embd.weight"].shape[1]


def _other_rope(config: Any, header: Header) -> str | None:
    """How the model's rotary embedding differs from the file's, or None."""
    base = header.metadata.get(f"{header.metadata['general.architecture']}.rope.freq_base")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each for each in rope.values() if isinstance(each, Mapping)] or [
        rope
    ]  # Gemma 3: one for each kind of layer
    if base is not None and not any(abs(kind.get("rope_theta", 1e4) - base) <= 1e-3 * base for kind in kinds):
        return f"the model's rope_theta is {[kind.get('rope_theta') for kind in kinds]}, and the file's {base:g}"
    scaled = [kind["rope_type"] for kind in kinds if kind.get("rope_type", "default") != "default"]
    return f"the model scales its rotary embedding ({scaled[0]}), and the file does not" if scaled else None


def _check_tensors(model: nn.Module, header: Header) -> None:
    architecture = header.metadata["general.architecture"]
    parameters = {name: each for name, each in model.named_parameters(remove_duplicate=False) if not each.is_meta}
    file = os.fspath(header.files[0])
    filled: set[int] = set()
    for own, info in header.tensors.items():
        name = _parameter_name(own, architecture)
        parameter = parameters.get(name or "")
        if parameter is None:
            raise ValueError(f"{file!r} has tensor {own!r}, which the model does not use")
        if parameter.numel() != np.prod(info.shape):
            raise ValueError(
                f"{own!r} of {file!r} has {np.prod(info.shape)} entries, and the model's {name} {parameter.numel()}"
            )
        if not _alike(parameter, header, own):
            raise ValueError(f"the values of the model's {name} are not those of {own!r} in {file!r}")
        filled.add(id(parameter))
    left = [name for name, parameter in parameters.items() if id(parameter) not in filled]
    if left:
        raise ValueError(f"the model's {left[0]} is in no tensor of {file!r}; it has random values")


def _parameter_name(own: str, architecture: str) -> str | None:
    stem, _, kind = own.rpartition(".")
    if own == "output_norm.weight":
        return "model.norm.weight"
    if (module := module_name(f"{stem}.weight", architecture)) is not None:
        return f"{module}.{kind}"
    norms = {**_NORMS, **(_FOUR_NORMS if architecture in ("gemma2", "gemma3") else {})}
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in norms:
        return f"model.layers.{parts[1]}.{norms[parts[2]]}.{kind}"
    return None


def _alike(parameter: Tensor, header: Header, own: str) -> bool:
    """Whether a parameter has the values of a tensor of the file, as far as its first 32 rows tell."""
    architecture = header.metadata["general.architecture"]
    order = row_order(header, own)
    rows = 32 if order is None else len(order)
    expected = torch.from_numpy(header.tensors[own].first_rows(rows))
    if order is not None:
        expected = expected[torch.from_numpy(order)][:32]
    if architecture.startswith("gemma") and own.endswith("norm.weight"):
        expected = expected - 1  # the file has them plus one
    found = parameter.detach().reshape(-1, expected.shape[-1])[: len(expected)].float().reshape(expected.shape)
    return bool((found - expected).abs().max() <= 0.02 * expected.abs().max() + 1e-6)


def _digits_apart(tokenizer: Any) -> None:
    """Each digit is a piece of its own, before bytes are looked at: what SmolLM was trained with."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


_PRE: dict[str, Callable[[Any], None] | None] = {"qwen2": None, "smollm": _digits_apart}
"""How text is split before byte pairs are merged, by `tokenizer.ggml.pre`: right in transformers, or mended here."""


def _tokenizer(header: Header) -> Any:
    """transformers' tokenizer of a file; a ValueError where it would split text otherwise than the model knows it."""
    from transformers import AutoTokenizer

    path = header.files[0]
    mend = None
    if header.metadata.get("tokenizer.ggml.model") == "gpt2":
        pre = header.metadata.get("tokenizer.ggml.pre")
        if pre not in _PRE:
            raise ValueError(
                f"{os.fspath(path)!r} splits text by the rule {pre!r}, and transformers' reader of GGUF files looks at "
                f"no such rule (right here: {', '.join(_PRE)}); take the tokenizer from the model's own folder"
            )
        mend = _PRE[pre]
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if mend is not None:
        mend(tokenizer)
    return tokenizer
