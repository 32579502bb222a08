"""GGUF's blocks, taken over without a second rounding."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import permuted

gguf = pytest.importorskip("gguf")

from deadband.app.models import _smollm2_gguf  # noqa: E402
from deadband.quantization.gguf_weights import BLOCK_FORMATS, quantized_weights, tensor_types  # noqa: E402

HEADS, KV_HEADS, HEAD, INNER, VOCABULARY = 4, 2, 16, 96, 70
HIDDEN = HEADS * HEAD


def write(path, kind: str, architecture: str = "llama", extra=()):
    """A GGUF file of one block; returns the matrices as they are in the file, by GGUF's names, dequantised."""
    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN),
        "output": (VOCABULARY, HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * HEAD, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * HEAD, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
        **dict(extra),
    }
    stored = {}
    for name, shape in shapes.items():
        data = (generator.standard_normal(shape) * 0.1).astype(np.float32)
        data[0, :32] = 0
        blocks = gguf.quants.quantize(data, type_)
        stored[name] = gguf.quants.dequantize(blocks, type_)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=None if kind in ("F32", "F16") else type_)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.from_numpy(values.copy()) for name, values in stored.items()}


NAMES = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("entries", [2**20, 1])
def test_every_weight_is_the_files(tmp_path, kind, architecture, entries, monkeypatch):
    monkeypatch.setattr("deadband.gguf_weights._ENTRIES", entries)
    stored = write(tmp_path / "model.gguf", kind, architecture)
    found = quantized_weights(tmp_path / "model.gguf")
    assert sorted(found) == sorted(NAMES.values())
    for name, ours in NAMES.items():
        weight = found[ours].dequantize()
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        if architecture == "llama" and heads:
            assert not torch.equal(weight, stored[name])
            weight = permuted(weight, heads)
        assert found[ours].format == BLOCK_FORMATS[kind]
        assert torch.equal(weight, stored[name])
    assert tensor_types(tmp_path / "model.gguf") == dict.fromkeys(NAMES.values(), kind)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q5_0"])
def test_other_types_are_left_out(tmp_path, kind):
    write(tmp_path / "model.gguf", kind)
    assert quantized_weights(tmp_path / "model.gguf") == {}
    assert tensor_types(tmp_path / "model.gguf") == dict.fromkeys(NAMES.values(), kind)


def test_fused_layers_of_phi3(tmp_path):
    write(tmp_path / "model.gguf", "Q4_0", "phi3", {"blk.0.attn_qkv": (128, HIDDEN)})
    found = quantized_weights(tmp_path / "model.gguf")
    assert found["model.layers.0.self_attn.qkv_proj"].out_features == 128
    assert found["model.layers.0.mlp.gate_up_proj"].out_features == INNER
    assert "model.layers.0.mlp.up_proj" not in found


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GGUF file"):
        quantized_weights(tmp_path / "missing.gguf")
    (tmp_path / "other.gguf").write_bytes(b"something else, and long enough for a header")
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
        quantized_weights(tmp_path / "other.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
        quantized_weights(tmp_path / "empty.gguf")
    write(tmp_path / "model.gguf", "Q8_0")
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (30, 400, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
            quantized_weights(tmp_path / "cut.gguf")


def test_unknown_architecture(tmp_path):
    write(tmp_path / "model.gguf", "Q8_0", "mamba")
    with pytest.raises(ValueError, match=r"'mamba'; expected one of llama, .*gemma3"):
        quantized_weights(tmp_path / "model.gguf")


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match="pip install gguf"):
        quantized_weights(tmp_path / "model.gguf")


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_is_what_transformers_loads():
    from transformers import AutoModelForCausalLM, GgufConfig

    path = _smollm2_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    found, types = quantized_weights(path), tensor_types(path)
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert {name for name, kind in types.items() if kind == "Q4_1"} == set(linears) - {"lm_head"}
    assert found.keys() == types.keys() == {*linears, "model.embed_tokens"} - {"lm_head"}
    for name, quantized in found.items():
        assert torch.equal(quantized.dequantize(), model.get_submodule(name).weight)
