import gc
import json

import pytest
import torch
from conftest import mlp, sparse_model, tiny_model

import deadband
from deadband import bench
from deadband.ops import kernels


def test_candidates_take_turns():
    order = []
    times = bench.interleave(
        {name: lambda name=name: order.append((name, gc.isenabled())) for name in "abc"},
        rounds=9, warmup=1, progress=False,
    )  # fmt: skip
    rounds = ["".join(name for name, _ in order[start : start + 3]) for start in range(0, 30, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 2  # in another order each time
    assert not any(collecting for _, collecting in order)
    assert gc.isenabled()
    assert {name: len(values) for name, values in times.items()} == {"a": 9, "b": 9, "c": 9}
    assert bench.median([3.0, 1.0, 100.0]) == 3.0


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), bench.threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_machine_is_plain_json():
    about = json.loads(json.dumps(bench.machine()))
    assert about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert about["kernels"] == kernels.isa()


def test_bytes_per_token():
    tied = tiny_model("llama")
    everything = sum(parameter.nbytes for parameter in tied.parameters())
    assert bench.bytes_per_token(tied) == everything  # the output layer reads the embedding's weight
    untied = tiny_model("mistral")
    assert bench.bytes_per_token(untied) == sum(p.nbytes for p in untied.parameters()) - 128 * 64 * 4
    model = deadband.sparsify_(mlp(), {"0": 1.0})
    with torch.no_grad():
        model(torch.tensor([[0.5] * 4 + [2.0] * 12]))
    assert bench.bytes_per_token(model) == sum(p.nbytes for p in model.parameters()) - 16 * 40 * 4 // 4


def test_decoding_is_what_generate_does():
    model = sparse_model()
    prompt = torch.randint(3, 100, (1, 6))
    decoder = bench.Decoder(model, prompt)
    for _ in range(9):
        decoder.step()
    assert torch.equal(torch.cat(decoder.tokens, 1), model.generate(prompt, max_new_tokens=10, do_sample=False)[:, 6:])
    times = bench.decode_seconds({"x": model}, prompt, tokens=4, progress=False)
    assert len(times["x"]) == 4
    figures = bench.decoding_figures(model, [0.5, 0.25, 1.0])
    assert figures["tokens_per_second"] == 2.0
    assert figures["bandwidth"] == figures["bytes_per_token"] / 0.5


def test_read_bandwidth_is_plausible():
    assert 1e8 < kernels.read_bandwidth(0.05, repeats=3) < 1e12
