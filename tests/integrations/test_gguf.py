"""Models of GGUF files are what the files hold, or refused; damaged headers are told before anything follows them."""

from __future__ import annotations

import random
import struct
import time

import numpy as np
import pytest
import torch
import transformers
from conftest import permuted, tiny_model

gguf = pytest.importorskip("gguf")

from deadband.integrations.gguf import _tokenizer, check_model, load_gguf  # noqa: E402
from deadband.quantization.gguf_file import Skipped, read_header  # noqa: E402

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def own_name(name):
    """GGUF's name of a Llama's parameter."""
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in outside:
        return f"{outside[stem]}.weight"
    _, _, block, rest = stem.split(".", 3)
    return f"blk.{block}.{NAMES[rest]}.weight"


def write(path, model, *, architecture="llama", leave_out=(), more=(), change=lambda writer: None, **options):
    """A tiny Llama as a GGUF file."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    change(writer)
    for name, parameter in model.named_parameters():  # of tied ones, the embedding alone
        weight = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = permuted(weight, heads)
        if name not in leave_out:
            writer.add_tensor(own_name(name), np.ascontiguousarray(weight.numpy()))
    for name, shape in dict(more).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def test_what_the_file_holds_passes(tmp_path, llama):
    model = loaded(write(tmp_path / "a.gguf", llama))
    check_model(model, tmp_path / "a.gguf")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"change": lambda writer: writer.add_expert_count(4)}, "mixture of experts"),
        ({"more": {"rope_freqs.weight": (8,)}}, "rope_freqs.weight"),
        (
            {
                "change": lambda writer: (
                    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
                    writer.add_rope_scaling_factor(4.0),
                )
            },
            "yarn, factor 4",
        ),
        (
            {
                "change": lambda writer: (
                    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
                    writer.add_rope_scaling_factor(8.0),
                )
            },
            "linear, factor 8",
        ),
        ({"architecture": "gpt-oss"}, "architecture 'gpt-oss'"),
        ({"split_max_tensors": 8}, "split into"),
    ],
)
def test_what_transformers_leaves_out_is_refused(tmp_path, llama, options, reason):
    write(tmp_path / "a.gguf", llama, **options)
    path = sorted(tmp_path.glob("a*.gguf"))[0]
    with pytest.raises(ValueError, match=reason):
        load_gguf(path)


def test_every_tensor_and_every_parameter(tmp_path, llama):
    model = loaded(write(tmp_path / "a.gguf", llama))
    write(tmp_path / "more.gguf", llama, more={"blk.0.attn_sinks.weight": (4,)})
    with pytest.raises(ValueError, match=r"tensor 'blk.0.attn_sinks.weight', which the model does not use"):
        check_model(model, tmp_path / "more.gguf")
    write(tmp_path / "less.gguf", llama, leave_out=["model.layers.1.mlp.up_proj.weight"])
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight is in no tensor"):
        check_model(model, tmp_path / "less.gguf")
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter[:8] += 1.0
            with pytest.raises(ValueError, match="the values of the model's"):
                check_model(model, tmp_path / "a.gguf")
            parameter.copy_(before)
        assert name
    check_model(model, tmp_path / "a.gguf")


@pytest.mark.parametrize(("name", "value"), [("rms_norm_eps", 1e-3), ("num_key_value_heads", 4), ("hidden_size", 128)])
def test_sizes_are_those_of_the_file(tmp_path, llama, name, value):
    model = loaded(write(tmp_path / "a.gguf", llama))
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"the model's {name} is"):
        check_model(model, tmp_path / "a.gguf")


def test_rotary_embeddings_are_those_of_the_file(tmp_path, llama):
    model = loaded(write(tmp_path / "a.gguf", llama))
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(ValueError, match="rope_theta"):
        check_model(model, tmp_path / "a.gguf")
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="scales its rotary embedding"):
        check_model(model, tmp_path / "a.gguf")


@pytest.mark.model
def test_digits_of_smollm2_are_split(tmp_path):
    from deadband.app.models import _smollm2_gguf

    tokenizer = _tokenizer(read_header(_smollm2_gguf()))
    pieces = tokenizer.tokenize("a   12  3")
    assert [piece for piece in pieces if piece.strip("Ġ").isdigit()] == ["1", "2", "3"]
    assert "".join(pieces).replace("Ġ", " ") == "a   12  3"
    header = read_header(_smollm2_gguf())
    header.metadata["tokenizer.ggml.pre"] = "of-another-model"
    with pytest.raises(ValueError, match="by the rule 'of-another-model'"):
        _tokenizer(header)


def test_parts_are_read_as_one(tmp_path, llama):
    write(tmp_path / "whole.gguf", llama)
    write(tmp_path / "parts.gguf", llama, split_max_tensors=5)
    files = sorted(tmp_path.glob("parts-*.gguf"))
    whole = read_header(tmp_path / "whole.gguf")
    assert len(files) > 2
    for file in files:
        header = read_header(file)
        assert {name: info.shape for name, info in header.tensors.items()} == {
            name: info.shape for name, info in whole.tensors.items()
        }
        assert header.metadata["general.architecture"] == "llama"
    files[1].rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=f"part 2 of {len(files)}"):
        read_header(files[0])
    (tmp_path / "away").rename(tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match="one part of a model split"):
        read_header(tmp_path / "alone.gguf")


def test_long_arrays_are_skipped(tmp_path, llama):
    write(
        tmp_path / "a.gguf",
        llama,
        change=lambda writer: (writer.add_token_list(["x"] * 5000), writer.add_token_scores([0.5] * 4097)),
    )
    metadata = read_header(tmp_path / "a.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"] == Skipped(5000)
    assert metadata["tokenizer.ggml.scores"] == Skipped(4097)


def numbers_of(data):
    """Places in a header where a 64-bit number stands that says how much follows."""
    return [8, 16, *(at for at in range(24, 1500, 4) if 0 < struct.unpack_from("<Q", data, at)[0] < 5000)]


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_are_told(tmp_path, llama, seed):
    """A clear error within a second, or the header as it was: some bytes mean nothing here (a name, a number)."""
    data = write(tmp_path / "a.gguf", llama).read_bytes()
    rng = random.Random(seed)
    told = []
    for number in range(60):
        damaged = bytearray(data)
        kind = number % 4
        if kind == 0:
            damaged = damaged[: rng.randrange(len(damaged))]
        elif kind == 1:
            struct.pack_into("<Q", damaged, rng.choice(numbers_of(data)), rng.choice([2**60, 2**64 - 1, 2**31, 0]))
        elif kind == 2:
            at = rng.randrange(4, 1500)
            damaged[at] ^= 1 << rng.randrange(8)
        else:
            damaged += bytes(rng.randrange(64, 4096))
        (tmp_path / "b.gguf").write_bytes(damaged)
        start = time.perf_counter()
        try:
            header = read_header(tmp_path / "b.gguf")
        except (ValueError, FileNotFoundError) as error:
            told.append(str(error))
        else:
            assert all(info.start + info.size <= len(damaged) for info in header.tensors.values())
        assert time.perf_counter() - start < 1
    assert len(told) > 30
    assert all("b.gguf" in message or "b-0" in message for message in told)


def test_a_count_that_is_too_small_is_told(tmp_path, llama):
    data = bytearray(write(tmp_path / "a.gguf", llama).read_bytes())
    count = struct.unpack_from("<Q", data, 8)[0]
    struct.pack_into("<Q", data, 8, count - 1)
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="more tensors than it says|lies at byte"):
        read_header(tmp_path / "a.gguf")
