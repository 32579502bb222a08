"""prepare_decode_: the compiled graph of one token gives what the model gives, and steps aside elsewhere."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import warnings

import pytest
import torch
import transformers
from conftest import CONFIGS, sparse_model, tiny_batches, tiny_model

import deadband
from deadband.decoding import decoder as decoding
from deadband.decoding import graph as decode_graph
from deadband.decoding.cache import BLOCK
from deadband.decoding.check import check_step, compare, filled_cache, lengths_of
from deadband.decoding.decoder import DecodeWarning, decode_report, is_prepared, prepare_decode_, unprepare_decode_
from deadband.decoding.graph import NotCapturedError
from deadband.layers.sites import find_sites, sparse_sites
from deadband.running.forward import cache_argument
from deadband.running.greedy_decoding import GreedyDecoder
from deadband.sparsify.scopes import sparse_prefill
from deadband.sparsify.sparsify import sparsify_

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
PROMPT = torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(5))


def decode(model, prompt=PROMPT, tokens=70, **options):
    torch.manual_seed(0)
    return model.generate(prompt, max_new_tokens=tokens, do_sample=False, **options)


def prefill(model, tokens):
    """The cache after these tokens."""
    return model(tokens, use_cache=True)[1]


def step(model, token, cache, **more):
    return model(token, **{cache_argument(model): cache}, **more)


def logits_along(model, tokens, prompt_length):
    """Logits of each token of a given continuation, decoded one by one."""
    with torch.no_grad():
        cache = prefill(model, tokens[:, :prompt_length])
        steps = [step(model, tokens[:, i : i + 1], cache).logits for i in range(prompt_length, tokens.shape[1])]
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
def test_the_graph_is_taken_in_generate_and_skips(sparse, recwarn):
    """With whatever names this transformers' generate gives its arguments, and no word of what it deprecates."""
    model, prepared = sparse
    deadband.sparsity(model, reset=True), deadband.sparsity(prepared, reset=True)
    decode_report(prepared, reset=True)
    assert torch.equal(decode(prepared, tokens=110), decode(model, tokens=110))  # more than two blocks: the store grows
    report = decode_report(prepared, reset=True)
    assert (report.graph, report.model, report.problem) == (109, {}, None)
    assert decode_report(prepared).graph == 0
    assert not [each for each in recwarn if issubclass(each.category, (FutureWarning, DecodeWarning))]
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DecodeWarning)
            assert torch.equal(decode(prepared, batch, 12, **options), expected)
    padded = {"attention_mask": mask[:1]}
    assert torch.equal(decode(prepared, batch[:1], 12, **padded), decode(model, batch[:1], 12, **padded))


@compiled
def test_the_cache_stays_transformers_own(sparse):
    model, prepared = sparse
    outputs = []
    with torch.no_grad():
        for each in (model, prepared):
            cache = prefill(each, PROMPT)
            first = step(each, PROMPT[:, :1], cache).logits
            assert cache.get_seq_length() == 21
            several = step(each, PROMPT[:, 1:4], cache).logits  # a chat that continues
            second = step(each, PROMPT[:, 4:5], cache).logits
            other = copy.deepcopy(cache)
            cache.crop(-3)
            cropped = step(each, PROMPT[:, 5:6], cache).logits
            copied = step(each, PROMPT[:, 5:6], other).logits
            outputs.append((first, several, second, cropped, copied, cache.layers[1].keys, cache.layers[1].values))
    for ours, theirs in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@compiled
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_copies_of_a_cache_stand_alone(name, copied):
    prepared = prepare_decode_(tiny_model(name))
    with torch.no_grad():
        cache = prefill(prepared, torch.cat([PROMPT, PROMPT], 1))
        step(prepared, PROMPT[:, :1], cache)
        other = copied(cache)
        assert all(type(layer).__module__ == "transformers.cache_utils" for layer in other.layers)
        assert sum(layer.keys.untyped_storage().nbytes() for layer in other.layers) == sum(
            layer.keys.nbytes for layer in other.layers
        )  # nothing of the model, and no room to grow
        expected = step(prepared, PROMPT[:, 1:2], cache).logits
        assert cache.get_seq_length() == other.get_seq_length() + 1
        assert torch.equal(step(prepared, PROMPT[:, 1:2], other).logits, expected)


@compiled
def test_sliding_windows_after_other_writes():
    model = tiny_model("gemma3")
    prepared = prepare_decode_(copy.deepcopy(model))
    tokens = torch.cat([PROMPT, PROMPT.flip(1), PROMPT], 1)
    results = []
    with torch.no_grad():
        for each in (model, prepared):
            cache = prefill(each, tokens[:, :40])
            steps = [step(each, tokens[:, 40:41], cache), step(each, tokens[:, 41:50], cache)]
            steps += [step(each, tokens[:, i : i + 1], cache) for i in range(50, 60)]
            results.append(torch.cat([step.logits for step in steps], 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@compiled
def test_two_sequences_in_turns(sparse):
    model, prepared = sparse
    expected = [GreedyDecoder(model, PROMPT), GreedyDecoder(model, PROMPT[:, :9])]
    got = [GreedyDecoder(prepared, PROMPT), GreedyDecoder(prepared, PROMPT[:, :9])]
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
def test_centred_layers_follow_their_weights():
    model = tiny_model("llama")
    rules = {name: deadband.Rule(0.3, center=0.3 * torch.ones(m.in_features)) for name, m in find_sites(model).items()}
    prepared = prepare_decode_(copy.deepcopy(deadband.sparsify_(model, rules)))
    for each in (model, prepared):
        for site in sparse_sites(each).values():
            site.weight.data.mul_(1.5)
    tokens = decode(model)
    torch.testing.assert_close(
        logits_along(prepared, tokens, 20), logits_along(model, tokens, 20), rtol=1e-3, atol=1e-3
    )
    assert decode_report(prepared).graph == 70


def test_not_inside_of_a_block():
    model = sparse_model("llama")
    with deadband.dense(model), pytest.raises(ValueError, match="outside"):
        prepare_decode_(model)
    assert not is_prepared(model)


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
    decode_report(prepared, reset=True)
    prepared._deadband_decoder.told.clear()
    seen = []
    handle = prepared.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    try:
        with pytest.warns(DecodeWarning, match="model.layers.0 has a hook"):
            decode(prepared, tokens=5)
    finally:
        handle.remove()
    assert len(seen) == 5
    with torch.no_grad():
        cache = prefill(prepared, PROMPT)
        step(prepared, PROMPT[:, :1], cache)
        handle = prepared.lm_head.register_forward_pre_hook(lambda *_: seen.append(1))  # between two tokens
        step(prepared, PROMPT[:, 1:2], cache)
        handle.remove()
        step(prepared, PROMPT[:, 2:3], cache)
    assert len(seen) == 6
    report = decode_report(prepared)
    assert report.graph == 2
    assert sorted(report.model.values()) == [1, 4]


@compiled
def test_what_transformers_leaves_behind_is_no_hook_of_a_user(sparse):
    model, prepared = sparse
    with torch.no_grad():
        prepared(PROMPT, output_hidden_states=True)
    decode_report(prepared, reset=True)
    decode(prepared, tokens=5)
    assert decode_report(prepared).graph == 4


def _gradients(prepared, token, cache):
    with torch.enable_grad():
        return step(prepared, token, cache)


def _mask(prepared, token, cache):
    mask = torch.ones(1, 21, dtype=torch.int64)
    mask[0, 0] = 0
    return step(prepared, token, cache, attention_mask=mask)


def _forward_on_the_instance(prepared, token, cache):
    forward = prepared.forward
    prepared.forward = lambda *args, **kwargs: type(prepared)._deadband_original.forward(prepared, *args, **kwargs)
    try:
        return step(prepared, token, cache)
    finally:
        del prepared.forward
        assert prepared.forward.__func__ is forward.__func__


def _forward_of_a_part(prepared, token, cache):
    part = prepared.model.layers[0].mlp
    part.forward = type(part).forward.__get__(part)
    try:
        return step(prepared, token, cache)
    finally:
        del part.forward


def _other_weights(prepared, token, cache):
    before = prepared.lm_head.weight.data
    prepared.lm_head.weight.data = before.clone()
    try:
        return step(prepared, token, cache)
    finally:
        prepared.lm_head.weight.data = before


REASONS = {
    "gradients are on": _gradients,
    "attention_mask has padding": _mask,
    "position_ids are not": lambda *step_: step(*step_, position_ids=torch.tensor([[7]])),
    "argument 'attentions_wanted'": lambda *step_: step(*step_, attentions_wanted=True),
    "argument 'output_hidden_states'": lambda *step_: step(*step_, output_hidden_states=True),
    "use_cache=False": lambda *step_: step(*step_, use_cache=False),
    "inputs_embeds": lambda prepared, token, cache: step(
        prepared, None, cache, inputs_embeds=prepared.get_input_embeddings()(token)
    ),
    "token ids are torch.int32": lambda prepared, token, cache: step(prepared, token.int(), cache),
    "forward on the instance": _forward_on_the_instance,
    "changed since prepare_decode_ (model.layers.0.mlp)": _forward_of_a_part,
    "changed since prepare_decode_ (": _other_weights,
}


@compiled
@pytest.mark.parametrize("reason", REASONS)
def test_a_step_without_the_graph_says_why_once(sparse, reason):
    model, prepared = sparse
    decode_report(prepared, reset=True)
    prepared._deadband_decoder.told.clear()
    token = PROMPT[:, 3:4]
    with torch.no_grad():
        expected = step(
            model,
            token,
            prefill(model, PROMPT),
            **({"position_ids": torch.tensor([[7]])} if "position" in reason else {}),
        )
        if "mask" in reason:
            expected = _mask(model, token, prefill(model, PROMPT))
        with pytest.warns(DecodeWarning, match=re.escape(reason)) as told:
            found = REASONS[reason](prepared, token, prefill(prepared, PROMPT))
        assert len([each for each in told if each.category is DecodeWarning]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", DecodeWarning)
            REASONS[reason](prepared, token, prefill(prepared, PROMPT))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-3, atol=1e-3)
    report = decode_report(prepared)
    assert report.graph == 0
    assert list(report.model.values()) == [2]
    assert reason in str(report)
    decode(prepared, tokens=3)
    assert decode_report(prepared).graph == 2  # and the next sequence takes it again


@compiled
def test_batches_and_other_caches_say_why(sparse):
    model, prepared = sparse
    decode_report(prepared, reset=True)
    batch = tiny_batches(1, rows=3, length=12)[0]["input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DecodeWarning)
        decode(prepared, batch, 5)
        decode(prepared, PROMPT, 5, cache_implementation="static")
    reasons = decode_report(prepared).model
    assert reasons.pop("there is more than one sequence") == 4
    ((reason, count),) = reasons.items()
    assert (count, "StaticCache" in reason) == (4, True)


@compiled
def test_a_model_inside_of_another_is_prepared():
    class Holder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def generate(self, *args, **kwargs):
            return self.inner.generate(*args, **kwargs)

    holder = Holder(tiny_model("llama"))
    prepare_decode_(holder)
    decode(holder, tokens=5)
    assert decode_report(holder).graph == 4
    assert is_prepared(holder)
    unprepare_decode_(holder)
    assert not is_prepared(holder)


@compiled
def test_adapters_before_and_after():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model("llama"), settings).eval()
    expected = decode(adapted, tokens=8)
    prepare_decode_(adapted)
    assert torch.equal(decode(adapted, tokens=8), expected)
    assert decode_report(adapted).graph == 7

    prepared = prepare_decode_(tiny_model("llama"))
    adapted = peft.get_peft_model(prepared, settings).eval()
    with pytest.warns(DecodeWarning, match="changed since"):
        decode(adapted, tokens=8)


class Counting(transformers.LlamaForCausalLM):
    """A model with state of its own: what it saw last moves its logits."""

    kept = 0.0

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        self.kept = float(input_ids[0, 0] == 99) if self.prompt_only else float(self.kept) + 1
        output.logits = output.logits + self.kept
        return output


def test_state_outside_of_the_cache_is_refused():
    model = tiny_model("llama")
    model.__class__ = Counting
    model.prompt_only = False
    with pytest.warns(DecodeWarning, match="keeps state outside of its cache, in kept"):
        prepare_decode_(model)


@compiled
def test_rope_deltas_of_an_image_are_seen():
    sizes = {**CONFIGS["qwen2"][1], "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    config = transformers.Qwen2VLConfig(text_config=sizes, vision_config=vision, **tokens)
    torch.manual_seed(0)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    prepared = prepare_decode_(copy.deepcopy(model))
    assert is_prepared(prepared), decode_report(prepared).problem
    assert torch.equal(decode(prepared, tokens=9), decode(model, tokens=9))
    assert decode_report(prepared, reset=True).graph == 8
    logits = []
    for each in (model, prepared):
        with torch.no_grad():
            cache = prefill(each, PROMPT)
            each.model.rope_deltas = torch.tensor([[-3]])  # as after an image
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DecodeWarning)
                logits.append(step(each, PROMPT[:, :1], cache).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    ((reason, count),) = decode_report(prepared).model.items()
    assert ("rope_deltas" in reason, count) == (True, 1)


@compiled
@pytest.mark.parametrize("chunk", [48, 70])
def test_chunks_and_windows_are_the_models_own(chunk):
    """The cache's layers are those of sliding windows for chunks as well; the masks tell them apart."""
    sizes = {**CONFIGS["llama"][1], "head_dim": 16, "intermediate_size_mlp": 112, "num_local_experts": 2}
    sizes |= {"num_experts_per_tok": 1, "moe_layers": [], "no_rope_layers": [1, 0], "interleave_moe_layer_step": 0}
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(**sizes, attention_chunk_size=chunk)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    prepared = prepare_decode_(copy.deepcopy(model))
    assert is_prepared(prepared), decode_report(prepared).problem
    tokens = torch.randint(3, 128, (1, 125), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        logits_along(prepared, tokens, 20), logits_along(model, tokens, 20), rtol=1e-3, atol=1e-3
    )
    assert decode_report(prepared).graph == 105


def test_lengths_around_every_boundary_are_compared():
    config = transformers.Gemma3TextConfig(sliding_window=512, max_position_embeddings=4096)
    assert {511, 512, 513, BLOCK, 2 * BLOCK} <= set(lengths_of(config))
    config = transformers.LlamaConfig(
        max_position_embeddings=1000,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 300,
            "rope_theta": 1e4,
        },
    )
    assert {299, 300, 301} <= set(lengths_of(config))
    assert max(lengths_of(transformers.GPT2Config(n_positions=100))) == 64


def _templates(model):
    with torch.no_grad():
        return [(layer.keys, layer.values) for layer in prefill(model, PROMPT).layers]


def test_a_mistake_at_one_length_is_found():
    model = tiny_model("gemma3")
    template = _templates(model)
    config = model.config.get_text_config()

    def decode_wrong_at(wrong):
        def decode_(store):
            cache = filled_cache(config, template, store.length, torch.float32)
            return step(model, torch.ones(1, 1, dtype=torch.int64), cache).logits * (1 + 1e-3 * (store.length == wrong))

        return decode_

    with torch.no_grad():
        compare(model, config, template, torch.float32, decode_wrong_at(None))
        for wrong in (31, 32, 33, 64, 128):
            if wrong in lengths_of(config):
                with pytest.raises(NotCapturedError, match=f"after {wrong} tokens"):
                    compare(model, config, template, torch.float32, decode_wrong_at(wrong))


def test_what_bfloat16_would_hide_is_found(monkeypatch):
    model = sparse_model("llama", torch.bfloat16)
    deadband.sparsify_(model, dict.fromkeys(find_sites(model), 0.02), weights="int8")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    template = _templates(model)
    with torch.no_grad():
        expected = model(PROMPT).logits
        check_step(model, template)
        attend = decode_graph.attend
        monkeypatch.setattr(decode_graph, "attend", lambda *inputs: attend(*inputs) * 1.02)
        with pytest.raises(NotCapturedError, match="logits after 32 tokens differ by 0.0"):
            check_step(model, template)
        assert torch.equal(model(PROMPT).logits, expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("BloomConfig", "its code|its attention"), ("GptOssConfig", "'s_aux'"), ("MambaConfig", "cache is a")],
)
def test_other_attention_is_refused_with_the_reason(kind, reason):
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "n_head": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {
        "vocab_size": 128,
        "intermediate_size": 32,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "head_dim": 16,
    }
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes)).eval()
    with pytest.warns(DecodeWarning, match=reason):
        prepare_decode_(model)
    report = decode_report(model)
    assert report.graph == 0
    assert re.search(reason, report.problem)


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
    model = sparse_model("opt")

    def forward(*args, forward=model.model.decoder.layers[0].self_attn.forward, **kwargs):
        return forward(*args, **{**kwargs, "head_bias": torch.zeros(1)})

    model.model.decoder.layers[0].self_attn.forward = forward
    expected = decode(model, tokens=5)
    with pytest.warns(DecodeWarning, match="without a compiled graph"):
        prepare_decode_(model)
    assert not is_prepared(model)
    assert torch.equal(decode(model, tokens=5), expected)


def test_what_was_compiled_is_compared_with_the_model(monkeypatch):
    def wrong(program, passes):
        return lambda *inputs: (torch.randn(1, 1, 128),)

    monkeypatch.setattr(decoding, "compile_graph", wrong)
    with pytest.warns(DecodeWarning, match="logits after .* differ"):
        prepare_decode_(tiny_model("llama"))


def test_refuses_what_is_not_a_language_model():
    with pytest.raises(ValueError, match="no generate"):
        prepare_decode_(torch.nn.Linear(2, 2))


@compiled
@pytest.mark.slow
@pytest.mark.model
def test_smollm2():
    from deadband.app.models import load_model, load_tokenizer, smollm2

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


@compiled
@pytest.mark.parametrize("name", ["gemma3", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_few_tokens_at_once(name):
    """In strides of 1 to 9, past the first block of the cache, and Gemma's window of 32; 9 are too many."""
    model = sparse_model(name)
    prepared = prepare_decode_(copy.deepcopy(model), tokens=8)
    tokens = torch.randint(3, 128, (1, 20 + 2 * 45), generator=torch.Generator().manual_seed(6))
    outputs = []
    with torch.no_grad():
        for each in (model, prepared):
            cache, at, logits = prefill(each, tokens[:, :20]), 20, []
            while at < tokens.shape[1]:
                count = 1 + len(logits) % 9
                logits.append(step(each, tokens[:, at : at + count], cache).logits)
                at += count
            outputs.append(torch.cat(logits, 1))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)
    report = decode_report(prepared)
    assert report.graph == 2 * 36
    assert not report.model


@pytest.fixture(scope="module")
def few():
    """A sparse Llama and its copy that is prepared for 4 tokens."""
    model = sparse_model("llama")
    return model, prepare_decode_(copy.deepcopy(model), tokens=4)


@compiled
def test_drafts_are_verified_by_the_graph_and_cropped_in_place(few):
    model, prepared = few
    ids = torch.tensor([[5, 9, 13, 5, 9, 13, 5, 9]])
    assistant = sparse_model("llama", sparsity=0.6)
    assistant.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule="constant")
    decode_report(prepared, reset=True)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DecodeWarning)
            found = decode(prepared, ids, 60, **options, return_dict_in_generate=True)
        assert torch.equal(found.sequences, decode(model, ids, 60, **options))
    report = decode_report(prepared, reset=True)
    assert report.graph > 100
    assert not report.model
    with torch.no_grad():
        cache = prefill(prepared, PROMPT)
        before = step(prepared, PROMPT[:, :4], cache).logits
        keys = cache.layers[0].keys.data_ptr()
        cache.crop(-3)
        assert cache.get_seq_length() == 21
        assert cache.layers[0].keys.data_ptr() == keys
        again = step(prepared, PROMPT[:, 1:4], cache).logits
    torch.testing.assert_close(again, before[:, 1:], rtol=1e-4, atol=1e-4)


@compiled
def test_a_few_tokens_with_every_argument(few):
    model, prepared = few
    token = PROMPT[:, :3]
    there = torch.arange(20, 23)
    for options in (
        {"logits_to_keep": 1}, {"logits_to_keep": 0}, {"logits_to_keep": 2, "attention_mask": torch.ones(1, 23)},
        {"position_ids": there.view(1, -1)}, {"position_ids": there.view(1, -1) + 1},
        {"attention_mask": torch.arange(23).view(1, -1).ge(4).long()}, {"logits_to_keep": torch.tensor([0, 2])},
    ):  # fmt: skip
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DecodeWarning)
            expected, found = (step(each, token, prefill(each, PROMPT), **options).logits for each in few)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert sum(decode_report(prepared, reset=True).model.values()) == 3


def test_refuses_another_number_of_tokens():
    for tokens in (0, 9):
        with pytest.raises(ValueError, match="expected 1 to 8"):
            prepare_decode_(tiny_model("llama"), tokens=tokens)


def test_changes_undo_the_preparation():
    model = tiny_model("llama").eval()
    sparsify_(model, dict.fromkeys(find_sites(model), 0.02))
    model.__dict__["_deadband_decoder"] = object()  # what prepare_decode_ leaves
    sparsify_(model, dict.fromkeys(find_sites(model), 0.05))
    assert "_deadband_decoder" not in model.__dict__
