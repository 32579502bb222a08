"""Tiny random models of every causal architecture that the installed transformers knows."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

VOCABULARY = 128

# Small sizes, and by what names configurations ask for them.
_NAMES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length",
    112: "intermediate_size intermediate_size_mlp ffn_dim d_inner n_inner ffn_hidden_size d_ff decoder_ffn_dim "
    "encoder_ffn_dim feed_forward_size dff",
    64: "hidden_size n_embd d_model emb_dim embed_dim embedding_size dim word_embed_proj_dim expert_hidden_size",
    48: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size",
    32: "q_lora_rank kv_lora_rank",
    16: "head_dim global_head_dim attention_head_size kv_channels d_kv v_head_dim qk_head_dim qk_nope_head_dim "
    "qk_rope_head_dim hidden_size_per_layer_input sliding_window attention_window window_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads multi_query_group_num num_kv_heads num_experts_per_tok moe_k moe_topk "
    "num_experts_per_token moe_top_k eos_token_id",
    1: "n_group topk_group bos_token_id decoder_start_token_id",
    0: "pad_token_id num_kv_shared_layers",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"]}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 16, "mamba_n_groups": 1}
_HYBRID = ["linear_attention", "hybrid"]

_LARGE = ("blt", "dots3_note")  # their parts have sizes of their own

# What some types need beyond sizes: layers of each kind, and parts that fit each other.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _LINEAR_AND_FULL,
    "bamba": {"attn_layer_indices": [1], **_MAMBA2},
    "codegen": {"rotary_dim": 8},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {**_SLIDING_AND_FULL, "intermediate_size": [112, 112], "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": _SLIDING_AND_FULL,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**_LINEAR_AND_FULL, **_MAMBA2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR_AND_FULL,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "state_size": 16, "n_groups": 1},
    "prophetnet": {"num_hidden_layers": None},
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_next": _LINEAR_AND_FULL,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": _HYBRID, "mamba_headdim": 16, "n_mamba_heads": 8, "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_types() -> list[str]:
    """The model types that AutoModelForCausalLM knows, in the order of their names."""
    return sorted(set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(_LARGE))


def _asks_for(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False  # computed from others
    try:
        return hasattr(config, name)
    except Exception:  # one that differs by layer raises, whatever it is asked
        return True


def tiny_config(config_class: Any, **more: Any) -> Any:
    """A configuration of `config_class`, with small sizes wherever it asks for one."""
    default = config_class()
    sizes: dict[str, Any] = {name: size for name, size in _SIZES.items() if _asks_for(default, name)}
    if getattr(default, "kv_lora_rank", None) is not None and "num_attention_heads" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # multi-head latent attention
    for name in getattr(config_class, "sub_configs", None) or {}:
        with contextlib.suppress(Exception):
            sizes[name] = tiny_config(type(getattr(default, name))).to_dict()
    return config_class(**{name: value for name, value in {**sizes, **more}.items() if value is not None})


def build(kind: str, seed: int = 0) -> Any:
    """A tiny random causal language model of that type, in eval mode, with weights so large that each layer matters."""
    config = tiny_config(configuration_auto.CONFIG_MAPPING[kind], **_SPECIAL.get(kind, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model
