"""Decoding as on a GPU: memory that graphs know by its address is used again, and never while somebody looks at it.

On the CPU, with calls in the place of CUDA graphs; `pytest -m gpu` takes those.
"""

from __future__ import annotations

import copy
import gc
import shutil
import warnings

import pytest
import torch
from conftest import sparse_model
from test_decoding import decode, prefill, step

import deadband
from deadband.decoding import decoder as decoding
from deadband.decoding import graph as decode_graph
from deadband.decoding.cache import Shelf, Store
from deadband.decoding.cuda_graph import GraphedStep
from deadband.decoding.decoder import DecodeWarning, decode_report, is_prepared, prepare_decode_
from deadband.ops import fused
from deadband.ops.attention import attend_in_steps
from deadband.running.greedy_decoding import GreedyDecoder

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
PROMPT = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["calls", pytest.param("cuda", marks=pytest.mark.gpu)])
def graphed(request):
    """A sparse Llama, its prepared copy, a prompt and a list of all that was captured."""
    captured = []
    model = sparse_model("llama")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cuda":
            model, capture = model.cuda(), decoding.cuda_capture
        else:
            patch.setattr(decoding, "_has_graphs", lambda device: True)
            patch.setattr(decode_graph, "attend", attend_in_steps)
            patch.setattr(fused, "can_pack", lambda *args: False)  # addresses are of the CPU's memory

            def capture(call, device):
                return call

        def noted(call, device):
            captured.append(call)
            return capture(call, device)

        patch.setattr(decoding, "cuda_capture", noted)
        yield model, prepare_decode_(copy.deepcopy(model), tokens=3), PROMPT.to(model.device), captured


@compiled
def test_same_tokens_as_the_model(graphed):
    model, prepared, prompt, captured = graphed
    decode_report(prepared, reset=True), deadband.sparsity(prepared, reset=True), deadband.sparsity(model, reset=True)
    for tokens in (150, 30):  # past the first 128 places: the memory grows
        assert torch.equal(decode(prepared, prompt, tokens), decode(model, prompt, tokens))
    assert decode_report(prepared, reset=True).model == {}
    assert captured
    ours, theirs = deadband.sparsity(prepared), deadband.sparsity(model)
    assert ours.entries == theirs.entries
    assert ours.total == pytest.approx(theirs.total, abs=0.01)


@compiled
def test_memory_of_finished_sequences_is_used_again(graphed):
    _, prepared, prompt, captured = graphed
    decode(prepared, prompt, 20), gc.collect()
    decode(prepared, prompt, 20), gc.collect()
    before = len(captured)
    for _ in range(3):
        decode(prepared, prompt, 20)
        gc.collect()
    assert len(captured) == before


@compiled
def test_two_sequences_in_turns(graphed):
    model, prepared, prompt, _ = graphed
    expected = [GreedyDecoder(model, prompt), GreedyDecoder(model, prompt[:, :9])]
    got = [GreedyDecoder(prepared, prompt), GreedyDecoder(prepared, prompt[:, :9])]
    for _ in range(6):
        for each in (*expected, *got):
            each.step()
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(torch.cat(ours.tokens), torch.cat(theirs.tokens))


@compiled
def test_what_somebody_looks_at_is_not_used_again(graphed):
    _, prepared, prompt, _ = graphed
    with torch.no_grad():
        cache = prefill(prepared, prompt)
        for token in (5, 6, 7):
            logits = step(prepared, prompt.new_tensor([[token]]), cache).logits
        keys, kept, logits_before = cache.layers[1].keys, cache.layers[1].keys.clone(), logits.clone()
    del cache
    gc.collect()
    for _ in range(2):
        decode(prepared, prompt[:, 3:], 30)
        gc.collect()
    assert torch.equal(keys, kept)
    assert torch.equal(logits, logits_before)


@compiled
def test_a_few_tokens_at_once(graphed):
    model, prepared, prompt, _ = graphed
    with torch.no_grad():
        caches = prefill(prepared, prompt), prefill(model, prompt)
        for count in (2, 3, 2, 1, 3, 3, 2):
            tokens = torch.arange(3, 3 + count, device=prompt.device).view(1, -1)
            ours, theirs = (step(each, tokens, cache) for each, cache in zip((prepared, model), caches, strict=True))
            torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-3, atol=1e-3)


@compiled
def test_inference_mode_before_and_after(graphed):
    model, prepared, prompt, _ = graphed
    expected = decode(model, prompt, 280)  # more than were decoded before: memory of this size is met here first
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(decode(prepared, prompt, 280), expected)
        gc.collect()


def test_a_graph_is_captured_the_second_time_and_the_oldest_is_dropped():
    captured, memories = [], [torch.zeros(1) + index for index in range(4)]

    def run(token, position, blocks, memory):
        memory += 1
        return (token * 10 + position + memory,)

    def capture(call):
        captured.append(call)
        return call

    graphed = GraphedStep(run, capture, most=2)

    def call(index, token=2, position=3):
        before = memories[index].clone()
        (result,) = graphed(torch.tensor([[token]]), torch.tensor([position]), torch.empty(2), memories[index])
        assert torch.equal(memories[index], before + 1)
        assert result.tolist() == [[token * 10 + position + float(before) + 1]]
        return result

    first = call(0)
    assert not captured
    call(0), call(0, 4, 5)
    assert len(captured) == 1
    assert first.tolist() == [[24.0]]  # not written to by later calls
    for index in (1, 1, 2, 2):
        call(index)
    assert len(captured) == 3
    call(2), call(1)
    assert len(captured) == 3
    call(0), call(0)  # dropped since
    assert len(captured) == 4


def captures_nothing(call, device):
    call()
    return lambda: None


def captures_something_else(call, device):
    def replay():
        call()
        (graph,) = (cell.cell_contents for cell in call.__closure__ if hasattr(cell.cell_contents, "result"))
        graph.result = graph.result + 1

    return replay


@compiled
@pytest.mark.parametrize("capture", [captures_nothing, captures_something_else])
def test_a_graph_that_computes_something_else_is_not_taken(monkeypatch, capture):
    monkeypatch.setattr(decoding, "_has_graphs", lambda device: True)
    monkeypatch.setattr(decoding, "cuda_capture", capture)
    model = sparse_model("llama")
    with pytest.warns(DecodeWarning, match="its logits from a CUDA graph differ by"):
        prepare_decode_(model)
    assert not is_prepared(model)
    assert decode(model, PROMPT, 5).shape == (1, 25)


@compiled
def test_what_cannot_be_captured_decodes_as_before(monkeypatch):
    def capture(call, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "_has_graphs", lambda device: True)
    monkeypatch.setattr(decoding, "cuda_capture", capture)
    model = sparse_model("llama")
    expected = decode(model, PROMPT, 5)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prepare_decode_(model)
    assert [each for each in seen if each.category is DecodeWarning and "not permitted" in str(each.message)]
    assert torch.equal(decode(model, PROMPT, 5), expected)


@compiled
def test_what_cannot_be_captured_later_on_is_computed_without(graphed, monkeypatch):
    model, prepared, prompt, _ = graphed
    expected = decode(model, prompt, 600)

    def capture(call):
        raise RuntimeError("out of memory")

    run = prepared.__dict__["_deadband_decoder"].run
    monkeypatch.setattr(run, "capture", capture)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs: RuntimeError: out of memory"):
        assert torch.equal(decode(prepared, prompt, 600), expected)
    run.problem = None  # for the tests that follow


@compiled
def test_preparing_counts_nothing(monkeypatch):
    monkeypatch.setattr(decoding, "_has_graphs", lambda device: True)
    monkeypatch.setattr(decoding, "cuda_capture", lambda call, device: call)
    model = sparse_model("llama")
    decode(model, PROMPT, 5)
    before = deadband.sparsity(model).entries
    prepare_decode_(model)
    assert deadband.sparsity(model).entries == before


def test_a_shelf_gives_what_has_the_capacity_and_is_not_in_use():
    shelf = Shelf(1)
    store = Store([torch.randn(1, 2, 4, 5)], [torch.randn(1, 2, 5, 4)], 5, shelf)
    memory = {each.data_ptr() for each in store.inputs}
    view = store.keys[0][..., :2]
    del store
    other = Store([torch.randn(1, 2, 4, 5)], [torch.randn(1, 2, 5, 4)], 5, shelf)
    assert not memory & {each.data_ptr() for each in other.inputs}
    del view
    again = Store([torch.ones(1, 2, 4, 5)], [torch.ones(1, 2, 5, 4)], 5, shelf)
    assert memory == {each.data_ptr() for each in again.inputs}
    assert float(again.keys[0].sum()) == 40  # and zeros behind
    again.reserve(1000)
    assert float(again.values[0].sum()) == 40
    assert [len(each) for each in shelf.free.values()] == [1]
