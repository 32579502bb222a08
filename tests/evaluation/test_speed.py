import gc
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import mlp, sparse_model, tiny_model

import deadband
from deadband.evaluation import speed
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.sites import find_sites
from deadband.ops import kernels
from deadband.running import forward, timing
from deadband.running.greedy_decoding import GreedyDecoder


def test_candidates_take_turns():
    order = []
    times = timing.interleave(
        {name: lambda name=name: order.append((name, gc.isenabled())) for name in "abc"},
        rounds=9, warmup=1, progress=False,
    )  # fmt: skip
    rounds = ["".join(name for name, _ in order[start : start + 3]) for start in range(0, 30, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 2  # in another order each time
    assert not any(collecting for _, collecting in order)
    assert gc.isenabled()
    assert {name: len(values) for name, values in times.items()} == {"a": 9, "b": 9, "c": 9}
    assert timing.median([3.0, 1.0, 100.0]) == 3.0


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), forward.threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_machine_is_plain_json():
    about = json.loads(json.dumps(timing.machine()))
    assert about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert about["kernels"] == kernels.isa()


def test_bytes_per_token():
    tied = tiny_model("llama")
    everything = sum(parameter.nbytes for parameter in tied.parameters())
    assert speed.bytes_per_token(tied) == everything  # the output layer reads the embedding's weight
    untied = tiny_model("mistral")
    assert speed.bytes_per_token(untied) == sum(p.nbytes for p in untied.parameters()) - 128 * 64 * 4
    model = deadband.sparsify_(mlp(), {"0": 1.0})
    with torch.no_grad():
        model(torch.tensor([[0.5] * 4 + [2.0] * 12]))
    assert speed.bytes_per_token(model) == sum(p.nbytes for p in model.parameters()) - 16 * 40 * 4 // 4


def test_bytes_of_quantised_models():
    model = deadband.sparsify_(mlp(), {"0": 1.0}, weights="int4-g32-zp")
    with torch.no_grad():
        model(torch.tensor([[0.5] * 4 + [2.0] * 12]))
    codes, scales = 16 * 32, 2 * 40 * 2  # 40 outputs take two blocks of 16 bytes; scales and minimums
    rest = sum(p.nbytes for p in model.parameters())
    assert speed.bytes_per_token(model) == rest + codes * 3 // 4 + scales
    assert speed.model_bytes(model) == rest + codes + scales
    for name in ("llama", "mistral"):  # tied and untied
        lm = tiny_model(name)
        deadband.sparsify_(lm, dict.fromkeys(find_sites(lm), 0.0), weights="int8")
        quantised = [module for module in lm.modules() if isinstance(module, QuantizedMatrix)]
        whole = sum(module.quantized().nbytes for module in quantised) + 5 * 64 * 4
        assert lm.lm_head in quantised
        assert speed.bytes_per_token(lm) == whole
        assert speed.model_bytes(lm) == whole + (128 * 64 * 4 if name == "mistral" else 0)


def test_a_quantised_model_is_compared_with_its_dense_form():
    class Tokenizer:
        def __call__(self, text, return_tensors):
            return SimpleNamespace(input_ids=torch.randint(3, 100, (1, 5)))

    model = tiny_model("llama", torch.bfloat16)
    deadband.sparsify_(model, dict.fromkeys(find_sites(model), 0.2), weights="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = speed.compare_decoding(model, Tokenizer(), tokens=2, progress=False)["models"]
    dense = sum(parameter.nbytes for parameter in tiny_model("llama", torch.bfloat16).parameters())
    assert rows["dense"]["bytes_per_token"] == dense
    assert rows["sparse"]["bytes_per_token"] < 0.6 * dense


def test_decoding_is_what_generate_does():
    model = sparse_model()
    prompt = torch.randint(3, 100, (1, 6))
    decoder = GreedyDecoder(model, prompt)
    for _ in range(9):
        decoder.step()
    assert torch.equal(torch.cat(decoder.tokens, 1), model.generate(prompt, max_new_tokens=10, do_sample=False)[:, 6:])
    times = speed.decode_seconds({"x": model}, prompt, tokens=4, progress=False)
    assert len(times["x"]) == 4
    figures = speed.decoding_figures(model, [0.5, 0.25, 1.0])
    assert figures["tokens_per_second"] == 2.0
    assert figures["bandwidth"] == figures["bytes_per_token"] / 0.5


def test_read_bandwidth_is_plausible():
    assert 1e8 < kernels.read_bandwidth(0.05, repeats=3) < 1e12
