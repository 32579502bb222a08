"""Llamas of random weights in the shapes of published ones: only their speed means something."""

from __future__ import annotations

from typing import Any

import torch

SHAPES = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
}  # of Llama 3.2; what both have in common stands below


def random_llama(size: str) -> Any:
    """A bfloat16 Llama in the shapes of Llama 3.2 1B ("1b", 2.5 GB) or 3B ("3b", 6.4 GB), tied embeddings."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **SHAPES[size], intermediate_size=8192, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
        max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
            continue
        block = torch.randn(1 << 20, generator=generator, dtype=torch.bfloat16) * 0.02
        for part in parameter.data.view(-1).split(len(block)):  # repeated: drawing billions of numbers takes minutes
            part.copy_(block[: len(part)])
    rotary = (
        model.model.rotary_emb
    )  # its buffers are not parameters: made anew, as the meta device left nothing in them
    theta, width = config.rope_parameters["rope_theta"], config.head_dim
    rotary.inv_freq = 1.0 / theta ** (torch.arange(0, width, 2) / width)
    rotary.original_inv_freq = rotary.inv_freq
    return model.eval()
