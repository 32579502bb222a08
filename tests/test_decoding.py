"""prepare_decode_: the compiled graph of one token gives what the model gives, and steps aside elsewhere."""

from __future__ import annotations

import copy
import pickle
import shutil
import sys
import warnings

import pytest
import torch
from conftest import sparse_model, tiny_batches, tiny_model

import deadband
from deadband import decoding
from deadband.bench import Decoder
from deadband.decoding import DecodeWarning, is_prepared, prepare_decode_, unprepare_decode_
from deadband.sites import find_sites
from deadband.sparsify import sparse_prefill, sparse_sites, sparsify_

compiled = pytest.mark.skipif(
    shutil.which("g++") is None or " " in sys.prefix,
    reason="torch's inductor needs a C++ compiler, and no space in its path",
)
PROMPT = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(5))


def decode(model, prompt=PROMPT, tokens=70, **options):
    torch.manual_seed(0)
    return model.generate(prompt, max_new_tokens=tokens, do_sample=False, **options)


def logits_along(model, tokens, prompt_length):
    """Logits of each token of a given continuation, decoded one by one."""
    with torch.no_grad():
        cache = model(tokens[:, :prompt_length], use_cache=True).past_key_values
        steps = [
            model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(prompt_length, tokens.shape[1])
        ]
    return torch.cat(steps, 1)


@pytest.fixture(scope="module")
def sparse():
    """A sparse Llama and its prepared copy; tests must leave both as they are."""
    model = sparse_model("llama")
    return model, prepare_decode_(copy.deepcopy(model))


@compiled
@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "gpt2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "qwen2", "qwen3", "phi3")),
    ],
)
def test_same_tokens_and_logits(name):
    model = sparse_model(name)
    prepared = prepare_decode_(copy.deepcopy(model))
    assert is_prepared(prepared)
    tokens = decode(model)  # beyond Gemma's window of 32, and past the first two blocks of the cache with the prompt
    assert torch.equal(decode(prepared), tokens)
    torch.testing.assert_close(
        logits_along(prepared, tokens, 20), logits_along(model, tokens, 20), rtol=1e-3, atol=1e-3
    )


@compiled
def test_the_graph_is_taken_in_generate_and_skips(sparse, monkeypatch):
    model, prepared = sparse
    deadband.sparsity(model, reset=True), deadband.sparsity(prepared, reset=True)
    calls = []
    decoder = prepared._deadband_decoder
    run = decoder.run
    monkeypatch.setattr(decoder, "run", lambda *inputs: calls.append(1) or run(*inputs))
    assert torch.equal(decode(prepared, tokens=110), decode(model, tokens=110))  # more than two blocks: the store grows
    assert len(calls) == 109
    ours, theirs = deadband.sparsity(prepared), deadband.sparsity(model)
    assert ours.entries == theirs.entries
    assert ours.total == pytest.approx(theirs.total, abs=0.01)


@compiled
def test_sampling(sparse):
    model, prepared = sparse
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 0.7, "top_k": 20}
    torch.manual_seed(3)
    expected = model.generate(PROMPT, **options)
    torch.manual_seed(3)
    assert torch.equal(prepared.generate(PROMPT, **options), expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_dense_model(dtype):
    model = tiny_model("llama", dtype)
    prepared = prepare_decode_(copy.deepcopy(model))
    assert is_prepared(prepared)
    tokens = decode(model)
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.3}
    torch.testing.assert_close(logits_along(prepared, tokens, 20), logits_along(model, tokens, 20), **close)


@compiled
def test_batches_padding_beams_and_static_caches_run_as_before(sparse):
    model, prepared = sparse
    batch = tiny_batches(1, rows=3, length=12)[0]["input_ids"]
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    for options in (
        {"attention_mask": mask},
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ):
        expected = decode(model, batch, 12, **options)
        assert torch.equal(decode(prepared, batch, 12, **options), expected)
    padded = {"attention_mask": mask[:1]}
    assert torch.equal(decode(prepared, batch[:1], 12, **padded), decode(model, batch[:1], 12, **padded))


@compiled
def test_the_cache_stays_transformers_own(sparse):
    model, prepared = sparse
    outputs = []
    with torch.no_grad():
        for each in (model, prepared):
            cache = each(PROMPT, use_cache=True).past_key_values
            first = each(PROMPT[:, :1], past_key_values=cache).logits
            assert cache.get_seq_length() == 21
            several = each(PROMPT[:, 1:4], past_key_values=cache).logits  # a chat that continues
            second = each(PROMPT[:, 4:5], past_key_values=cache).logits
            other = copy.deepcopy(cache)
            cache.crop(-3)
            cropped = each(PROMPT[:, 5:6], past_key_values=cache).logits
            copied = each(PROMPT[:, 5:6], past_key_values=other).logits
            outputs.append((first, several, second, cropped, copied, cache.layers[1].keys, cache.layers[1].values))
    for ours, theirs in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@compiled
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_copies_of_a_cache_stand_alone(name, copied):
    prepared = prepare_decode_(tiny_model(name))
    with torch.no_grad():
        cache = prepared(torch.cat([PROMPT, PROMPT], 1), use_cache=True).past_key_values
        prepared(PROMPT[:, :1], past_key_values=cache)
        other = copied(cache)
        assert all(type(layer).__module__ == "transformers.cache_utils" for layer in other.layers)
        assert sum(layer.keys.untyped_storage().nbytes() for layer in other.layers) == sum(
            layer.keys.nbytes for layer in other.layers
        )  # nothing of the model, and no room to grow
        expected = prepared(PROMPT[:, 1:2], past_key_values=cache).logits
        assert cache.get_seq_length() == other.get_seq_length() + 1
        assert torch.equal(prepared(PROMPT[:, 1:2], past_key_values=other).logits, expected)


@compiled
def test_sliding_windows_after_other_writes():
    model = tiny_model("gemma3")
    prepared = prepare_decode_(copy.deepcopy(model))
    tokens = torch.cat([PROMPT, PROMPT.flip(1), PROMPT], 1)
    results = []
    with torch.no_grad():
        for each in (model, prepared):
            cache = each(tokens[:, :40], use_cache=True).past_key_values
            steps = [each(tokens[:, 40:41], past_key_values=cache), each(tokens[:, 41:50], past_key_values=cache)]
            steps += [each(tokens[:, i : i + 1], past_key_values=cache) for i in range(50, 60)]
            results.append(torch.cat([step.logits for step in steps], 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@compiled
def test_two_sequences_in_turns(sparse):
    model, prepared = sparse
    expected = [Decoder(model, PROMPT), Decoder(model, PROMPT[:, :9])]
    got = [Decoder(prepared, PROMPT), Decoder(prepared, PROMPT[:, :9])]
    for _ in range(5):
        for decoder in (*expected, *got):
            decoder.step()
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(torch.cat(ours.tokens), torch.cat(theirs.tokens))


@compiled
def test_dense_and_sparse_prefill_blocks_are_heeded(sparse):
    model, prepared = sparse
    for block in (deadband.dense, deadband.sparse_prefill):
        with block(model), block(prepared):
            assert torch.equal(decode(prepared, tokens=10), decode(model, tokens=10))


@compiled
def test_leaves_the_model_usable(tmp_path):
    model = sparse_model("llama")
    expected = decode(model)
    original = type(model)
    prepare_decode_(model)
    assert prepare_decode_(model)._deadband_decoder is model._deadband_decoder  # idempotent
    decode(model)

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(decode(prepare_decode_(loaded)), expected)
    assert is_prepared(loaded)
    assert '"LlamaForCausalLM"' in (tmp_path / "config.json").read_text()

    copied = copy.deepcopy(model)
    assert type(copied) is original
    assert type(pickle.loads(pickle.dumps(model))) is original
    assert torch.equal(decode(copied), expected)

    model.train()
    model(**tiny_batches(1)[0], labels=tiny_batches(1)[0]["input_ids"]).loss.backward()
    assert all(site.weight.grad is not None for site in sparse_sites(model).values())
    model.zero_grad(set_to_none=True)
    model.eval()
    assert torch.equal(decode(model), expected)

    with torch.no_grad():  # a weight written to in place is seen
        model.lm_head.weight.neg_()
    assert not torch.equal(decode(model), expected)
    with torch.no_grad():
        model.lm_head.weight.neg_()

    deadband.densify_(model)
    dense = decode(deadband.densify_(copied))
    assert not is_prepared(model)
    assert type(model) is original
    assert torch.equal(decode(model), dense)
    assert type(unprepare_decode_(model)) is original
    assert torch.equal(decode(model), dense)


@compiled
def test_hooks_see_every_token(sparse):
    model, prepared = sparse
    seen = []
    handle = prepared.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DecodeWarning)
            decode(prepared, tokens=5)
    finally:
        handle.remove()
    assert len(seen) == 5


@compiled
def test_graph_passes_see_the_operators():
    targets = []

    def look(graph):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")

    prepare_decode_(sparse_model("llama"), passes=[look])
    assert targets.count("deadband.sparse_linear.default") == 14
    assert targets.count("aten.silu.default") == 2


def test_falls_back_where_it_cannot_compile(monkeypatch):
    def broken(*_):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(decoding, "compile_graph", broken)
    model = tiny_model("llama")
    expected = decode(model, tokens=5)
    with pytest.warns(DecodeWarning, match="without a compiled graph: RuntimeError: No working C"):
        prepare_decode_(model)
    assert not is_prepared(model)
    assert torch.equal(decode(model, tokens=5), expected)


def test_models_that_cannot_be_captured_decode_as_before():
    model = sparse_model("opt")  # makes its mask from the cache's length as a number
    expected = decode(model, tokens=5)
    with pytest.warns(DecodeWarning, match="without a compiled graph"):
        prepare_decode_(model)
    assert not is_prepared(model)
    assert torch.equal(decode(model, tokens=5), expected)


def test_what_was_compiled_is_compared_with_the_model(monkeypatch):
    def wrong(program, passes):
        return lambda *inputs: (torch.randn(1, 1, 128),)

    monkeypatch.setattr(decoding, "compile_graph", wrong)
    with pytest.warns(DecodeWarning, match="logits differ"):
        prepare_decode_(tiny_model("llama"))


def test_refuses_what_is_not_a_language_model():
    with pytest.raises(ValueError, match="no generate"):
        prepare_decode_(torch.nn.Linear(2, 2))


@compiled
@pytest.mark.slow
@pytest.mark.model
def test_smollm2():
    from deadband.models import load_model, load_tokenizer, smollm2

    model = load_model(smollm2(), dtype="float32")
    deadband.sparsify_(model, {name: 0.05 for name in deadband.calibrate(model, tiny_batches(1), progress=False).sites})
    prompt = load_tokenizer(smollm2())("The capital of France is", return_tensors="pt").input_ids
    expected = decode(model, prompt, 24)
    prepare_decode_(model)
    assert is_prepared(model)
    assert torch.equal(decode(model, prompt, 24), expected)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_speculative_decoding_gives_the_same_tokens(weights):
    model = tiny_model("llama").eval()
    sparsify_(model, dict.fromkeys(find_sites(model), 0.02), weights=weights)
    assistant = tiny_model("llama").eval()
    sparsify_(assistant, dict.fromkeys(find_sites(assistant), 0.1), weights=weights)
    ids = torch.tensor([[5, 9, 13, 5, 9, 13, 5, 9]])
    settings = {"max_new_tokens": 24, "do_sample": False}
    with sparse_prefill(model):  # several drafted tokens at once skip as one alone does
        expected = model.generate(ids, **settings)
        assert torch.equal(model.generate(ids, **settings, assistant_model=assistant), expected)
        assert torch.equal(model.generate(ids, **settings, prompt_lookup_num_tokens=3), expected)


def test_changes_undo_the_preparation():
    model = tiny_model("llama").eval()
    sparsify_(model, dict.fromkeys(find_sites(model), 0.02))
    model.__dict__["_deadband_decoder"] = object()  # what prepare_decode_ leaves
    sparsify_(model, dict.fromkeys(find_sites(model), 0.05))
    assert "_deadband_decoder" not in model.__dict__
