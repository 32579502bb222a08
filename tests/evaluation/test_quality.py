import dataclasses
import math
import weakref

import pytest
import torch
from conftest import VOCABULARY, characters, sparse_model, tiny_batches, tiny_model
from torch.nn import functional as F

import deadband
from deadband.evaluation.generation import compare_generation
from deadband.evaluation.quality import PROTOCOLS, compare, dense_logits, evaluate, protocol_name
from deadband.layers.sites import sparse_sites
from deadband.running.divergence import mean_and_error

ARCHITECTURES = ["llama", "mistral", "qwen3", "gemma3", "phi3", "opt", "gpt2", "mixtral", "qwen2_moe"]


def by_hand(dense_model, model, windows):
    """Perplexities, KL and agreement in float64, straight from their definitions."""
    nll, dense_nll, kl, same, count = 0.0, 0.0, 0.0, 0, 0
    with torch.no_grad(), deadband.sparse_prefill(model):
        for window in windows:
            p = F.softmax(dense_model(**window).logits.double(), -1)
            q = F.softmax(model(**window).logits.double(), -1)
            for row in range(p.shape[0]):
                for position in range(p.shape[1] - 1):
                    target = window["input_ids"][row, position + 1]
                    a, b = p[row, position], q[row, position]
                    nll, dense_nll = nll - math.log(b[target]), dense_nll - math.log(a[target])
                    kl += (a * (a / b).log()).sum().item()
                    same += int(a.argmax() == b.argmax())
                    count += 1
    return math.exp(nll / count), math.exp(dense_nll / count), kl / count, same / count, count


def masked_from(model, position):
    """The sparse model's dense form whose sites skip only at and after `position`, all tokens in one call."""
    handles = []

    def masking(site):
        threshold = site.threshold  # of the magnitude, which is the default

        def hook(module, arguments):
            x, *others = arguments
            each = others[1] if others else 1  # rows of a token: its experts
            keep = x.abs() > threshold
            rows = keep.view(-1, masking.tokens * each, x.shape[-1])
            rows[:, : position * each] = True
            return torch.where(rows.view_as(x), x, 0), *others

        return hook

    for site in sparse_sites(model).values():
        handles.append(site.register_forward_pre_hook(masking(site)))

    def run(window):
        masking.tokens = window["input_ids"].shape[1]
        with torch.no_grad(), deadband.dense(model):
            return model(**window, use_cache=False).logits.double()

    return run, handles


def reference_figures(model, windows, position, judged_from):
    """KL and negative log-likelihood of each window in float64, from one call with a mask, for rows of one length."""
    with torch.no_grad(), deadband.dense(model):
        before = [model(**window, use_cache=False).logits.double() for window in windows]
    run, handles = masked_from(model, position)
    after = [run(window) for window in windows]
    for handle in handles:
        handle.remove()
    rows = []
    for window, p, q in zip(windows, before, after, strict=True):
        log_p, log_q = (F.log_softmax(each, -1)[:, judged_from:-1] for each in (p, q))
        targets = window["input_ids"][:, judged_from + 1 :, None]
        rows.append(
            {
                "tokens": targets.numel(),
                "nll": -log_q.gather(-1, targets).mean().item(),
                "dense_nll": -log_p.gather(-1, targets).mean().item(),
                "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
                "agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(),
            }
        )
    return rows


def test_figures_are_those_of_the_definitions():
    windows = tiny_batches(2, rows=2, length=10, seed=5)
    model = sparse_model("llama", sparsity=0.5)
    result = evaluate(model, windows, progress=False)
    perplexity, dense_perplexity, kl, agreement, count = by_hand(tiny_model("llama"), model, windows)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert result.dense_perplexity == pytest.approx(dense_perplexity, rel=1e-4)
    assert result.perplexity_increase == pytest.approx(perplexity / dense_perplexity - 1, rel=1e-3)
    assert result.kl == pytest.approx(kl, rel=1e-3)
    assert result.kl > 0.01
    assert result.agreement == pytest.approx(agreement)
    assert (result.tokens, result.windows) == (count, 2)
    assert result.sparsity == pytest.approx(0.5, abs=0.1)
    assert (result.protocol, result.prompt_tokens) == ("all tokens sparse", 0)


def test_a_dense_model_agrees_with_itself():
    for protocol in PROTOCOLS:
        result = evaluate(tiny_model("llama"), tiny_batches(2), protocol=protocol, progress=False)
        assert (result.kl, result.agreement, result.sparsity) == (0.0, 1.0, 0.0)
        assert result.perplexity == result.dense_perplexity
        assert (result.perplexity_increase, result.perplexity_increase_error, result.kl_error) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reference_logits_give_the_same_figures(protocol):
    windows, model = tiny_batches(2), sparse_model()
    reference = dense_logits(tiny_model("llama"), windows, progress=False)
    with_it = evaluate(model, windows, reference=reference, protocol=protocol, progress=False)
    without = evaluate(model, windows, protocol=protocol, progress=False)
    assert with_it.kl == pytest.approx(without.kl, rel=1e-4)
    assert (with_it.tokens, with_it.sparsity) == (without.tokens, without.sparsity)


def test_bad_input():
    windows, model = tiny_batches(2), sparse_model()
    reference = dense_logits(model, windows, progress=False)
    with pytest.raises(ValueError, match="reference has 2 windows, expected 1"):
        evaluate(model, windows[:1], reference=reference)
    with pytest.raises(ValueError, match=r"reference\[0\] has shape \(2, 24, 128\), expected \(1, 24\)"):
        evaluate(model, tiny_batches(2, rows=1), reference=reference)
    with pytest.raises(ValueError, match="windows is empty"):
        evaluate(model, [])
    with pytest.raises(ValueError, match=r"protocol 'some' is not known; expected one of 'all tokens sparse' \('all'"):
        evaluate(model, windows, protocol="some")
    with pytest.raises(ValueError, match="prompt_tokens goes with the protocol 'dense prompt, sparse continuation'"):
        evaluate(model, windows, prompt_tokens=3)
    with pytest.raises(ValueError, match="prompt_tokens=0; expected at least one"):
        evaluate(model, windows, protocol="dense-prompt", prompt_tokens=0)
    with pytest.raises(ValueError, match="window 0 has a row of 24 tokens, 23 of them dense"):
        evaluate(model, windows, protocol="dense-prompt", prompt_tokens=23)
    with pytest.raises(ValueError, match="window 0 has no next token to judge"):
        evaluate(model, tiny_batches(1, length=1))
    ids = windows[0]["input_ids"]
    with pytest.raises(ValueError, match="zeros between the tokens of row 1"):
        mask = torch.ones_like(ids)
        mask[1, 5] = 0
        evaluate(model, [{"input_ids": ids, "attention_mask": mask}])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(24,\), expected \(2, 24\)"):
        evaluate(model, [{"input_ids": ids, "attention_mask": torch.ones(24)}])
    with pytest.raises(ValueError, match="no next token to judge"):
        evaluate(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
    with pytest.raises(ValueError, match="nothing but padding"):
        dense_logits(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])


def test_a_model_without_a_cache_cannot_keep_a_dense_prompt():
    class Bag(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layers = torch.nn.Embedding(VOCABULARY, 8), torch.nn.ModuleList()
            self.layers.append(torch.nn.Linear(8, VOCABULARY))

        def forward(self, input_ids):
            return type("Output", (), {"logits": self.layers[0](self.embedding(input_ids))})

    model = deadband.sparsify_(Bag().eval(), {"layers.0": 0.1})
    assert evaluate(model, tiny_batches(1), progress=False).tokens == 46
    with pytest.raises(ValueError, match="Bag returns no key-value cache"):
        evaluate(model, tiny_batches(1), protocol="dense-first", progress=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_protocols_mask_what_they_say(name):
    """Two calls with a cache, against one call with a mask by position; gemma3's layers see 32 tokens back."""
    model = sparse_model(name)
    windows = tiny_batches(3, rows=2, length=48, seed=7)
    expected = {"all": (0, 0, 47), "dense-prompt": (24, 24, 23), "dense-first": (1, 0, 47)}
    for protocol, (position, judged_from, judged) in expected.items():
        result = evaluate(model, windows, protocol=protocol, progress=False)
        rows = reference_figures(model, windows, position, judged_from)
        assert result.protocol == PROTOCOLS[protocol]
        assert result.prompt_tokens == position
        assert result.tokens == 3 * 2 * judged
        for actual, row in zip(result.per_window, rows, strict=True):
            assert actual["kl"] == pytest.approx(row["kl"], rel=2e-3, abs=1e-6)
            assert actual["nll"] == pytest.approx(row["nll"], abs=1e-3)
            assert actual["dense_nll"] == pytest.approx(row["dense_nll"], abs=1e-4)
            assert actual["agreement"] == pytest.approx(row["agreement"], abs=0.03)
        assert result.kl > 1e-3
        assert result.sparsity == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_skipped_is_the_dense_model(name, protocol):
    model = tiny_model(name)
    deadband.sparsify_(model, dict.fromkeys(deadband.calibrate(model, tiny_batches(1), progress=False).sites, 1e-30))
    result = evaluate(model, tiny_batches(2, length=40), protocol=protocol, progress=False)
    assert result.kl == pytest.approx(0, abs=1e-7)
    assert result.agreement == 1
    assert result.perplexity_increase == pytest.approx(0, abs=1e-4)


def test_only_sparse_tokens_count():
    model = sparse_model()
    windows = tiny_batches(1, rows=2, length=20)
    entries = {}
    for protocol, sparse_tokens in {"all": 40, "dense-prompt": 20, "dense-first": 38}.items():
        evaluate(model, windows, protocol=protocol, progress=False)
        entries[protocol] = deadband.sparsity(model).entries / sparse_tokens
    assert entries["all"] == entries["dense-prompt"] == entries["dense-first"] > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(name, protocol, side):
    """On either side, for learned positions too, and in the count of what was skipped."""
    model = sparse_model(name)
    long, short = (tiny_batches(1, rows=1, length=length, seed=length)[0]["input_ids"] for length in (13, 9))
    zeros = torch.zeros(1, 4, dtype=short.dtype)
    padded = torch.cat([zeros, short] if side == "left" else [short, zeros], 1)
    batch = {"input_ids": torch.cat([long, padded]), "attention_mask": torch.cat([long, padded]) > 0}
    options = {"protocol": protocol, "progress": False}
    if protocol == "dense-prompt":
        options["prompt_tokens"] = 5
    expected = evaluate(model, [{"input_ids": long}, {"input_ids": short}], **options)
    entries = deadband.sparsity(model).entries
    reference = dense_logits(model, [batch], progress=False)
    for result in (evaluate(model, [batch], **options), evaluate(model, [batch], reference=reference, **options)):
        assert result.tokens == expected.tokens
        assert deadband.sparsity(model).entries == entries
        for figure in ("kl", "perplexity", "dense_perplexity", "agreement", "sparsity"):
            assert getattr(result, figure) == pytest.approx(getattr(expected, figure), rel=1e-5)


def test_rows_of_one_token_are_left_out_and_halves_are_each_rows_own():
    model = sparse_model()
    ids = tiny_batches(1, rows=2, length=12)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 1:] = 0
    assert evaluate(model, [{"input_ids": ids, "attention_mask": mask}], progress=False).tokens == 11
    mask[1, :8] = 1
    result = evaluate(model, [{"input_ids": ids, "attention_mask": mask}], protocol="dense-prompt", progress=False)
    assert (result.tokens, result.prompt_tokens) == (5 + 3, None)


def test_other_inputs_are_cut_like_the_tokens():
    model = sparse_model("llama")
    ids = tiny_batches(1, rows=2, length=12)[0]["input_ids"]
    positions = torch.arange(12)[None]
    for protocol in PROTOCOLS:
        expected = evaluate(model, [{"input_ids": ids}], protocol=protocol, progress=False)
        window = {"input_ids": ids, "position_ids": positions, "labels": ids}
        assert evaluate(model, [window], protocol=protocol, progress=False).kl == pytest.approx(expected.kl, rel=1e-5)


def test_evaluating_leaves_the_model_in_its_mode():
    model = sparse_model().train()
    rows = [module.sparse_rows for module in model.modules() if hasattr(module, "sparse_rows")]
    for protocol in PROTOCOLS:
        evaluate(model, tiny_batches(1), protocol=protocol, progress=False)
    assert model.training
    assert [module.sparse_rows for module in model.modules() if hasattr(module, "sparse_rows")] == rows


def test_a_model_that_does_not_count_has_no_sparsity():
    model = sparse_model()
    deadband.sparsify_(model, {name: 0.1 for name in sparse_sites(model)}, count=False)
    assert math.isnan(evaluate(model, tiny_batches(1), progress=False).sparsity)


@pytest.mark.parametrize("given", [True, False])
def test_one_windows_logits_at_a_time(given):
    model = sparse_model()
    windows = tiny_batches(4)
    reference = dense_logits(model, windows, progress=False) if given else None
    alive, most = weakref.WeakSet(), []
    model.lm_head.register_forward_pre_hook(lambda *_: most.append(len(alive)))
    model.lm_head.register_forward_hook(lambda _, __, logits: alive.add(logits))
    evaluate(model, windows, reference=reference, progress=False)
    assert max(most) == (0 if given else 1)
    assert len(most) == (4 if given else 8)


def test_reference_logits_keep_the_dtype():
    model = sparse_model(dtype=torch.bfloat16)
    reference = dense_logits(model, tiny_batches(1), progress=False)
    assert reference[0].dtype is torch.bfloat16
    result = evaluate(model, tiny_batches(1), reference=reference, protocol="dense-prompt", progress=False)
    assert 0 < result.kl < 1


def test_logits_of_minus_infinity_do_not_spoil_the_kl():
    """Some models switch entries of the vocabulary off so."""
    model = sparse_model()
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([0]), -math.inf))
    assert 0 < evaluate(model, tiny_batches(1), progress=False).kl < 10


def test_errors_are_those_of_the_formulas():
    model = sparse_model("llama", sparsity=0.5)
    windows = [tiny_batches(1, rows=1, length=length, seed=length)[0] for length in (8, 13, 21, 34, 40)]
    result = evaluate(model, windows, progress=False)
    rows = reference_figures(model, windows, 0, 0)
    assert [row["tokens"] for row in rows] == [each["tokens"] for each in result.per_window] == [7, 12, 20, 33, 39]
    n, nll, dense_nll, kl, agreement = (
        torch.tensor([row[name] for row in rows], dtype=torch.float64)
        for name in ("tokens", "nll", "dense_nll", "kl", "agreement")
    )
    shares = n / n.sum()

    def error(values):
        centred = values - (shares * values).sum()
        return math.sqrt(5 / 4 * (shares**2 * centred**2).sum())

    perplexity, dense_perplexity = ((shares * each).sum().exp().item() for each in (nll, dense_nll))
    assert result.perplexity_error == pytest.approx(perplexity * error(nll), rel=1e-3)
    assert result.dense_perplexity_error == pytest.approx(dense_perplexity * error(dense_nll), rel=1e-3)
    assert result.kl_error == pytest.approx(error(kl), rel=1e-3)
    assert result.agreement_error == pytest.approx(error(agreement), rel=1e-3)
    ratio = perplexity / dense_perplexity
    assert result.perplexity_increase == pytest.approx(ratio - 1, rel=1e-3)
    assert result.perplexity_increase_error == pytest.approx(ratio * error(nll - dense_nll), rel=1e-3)
    text = str(result)
    assert f"± {result.kl_error:.4f} nats" in text
    assert f"{result.perplexity_increase:+.2%} ± {result.perplexity_increase_error:.2%}" in result.table()


def test_the_standard_error_is_the_spread_of_the_mean():
    """Over many draws, the mean of error² is the variance of the mean, with weights and without."""
    generator = torch.Generator().manual_seed(0)
    for weights in (None, [1.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 2.0, 1.0, 4.0]):
        draws = torch.randn(4000, 10, generator=generator, dtype=torch.float64)
        if weights is not None:
            draws /= torch.tensor(weights).sqrt()  # each a mean over so many tokens
        means, errors = zip(*(mean_and_error(row, weights) for row in draws.tolist()), strict=True)
        spread = torch.tensor(means).var().item()
        assert torch.tensor(errors).square().mean().item() == pytest.approx(spread, rel=0.15)
    assert mean_and_error([1.0, 3.0], [3, 1])[0] == 1.5
    assert math.isnan(mean_and_error([])[0])


def test_one_window_has_no_errors():
    result = evaluate(sparse_model(), tiny_batches(1), progress=False)
    errors = {name: value for name, value in dataclasses.asdict(result).items() if name.endswith("_error")}
    assert len(errors) == 5
    assert all(math.isnan(value) for value in errors.values())
    assert "±" not in str(result)
    assert "one window: no standard errors" in result.table()
    assert math.isnan(compare(result, result).kl_error)


def test_two_evaluations_compare_paired():
    windows = tiny_batches(6, rows=1, length=30, seed=3)
    low = evaluate(sparse_model(sparsity=0.3), windows, progress=False)
    high = evaluate(sparse_model(sparsity=0.5), windows, progress=False)
    difference = compare(low, high)
    per_window = [a["kl"] - b["kl"] for a, b in zip(low.per_window, high.per_window, strict=True)]
    values = torch.tensor(per_window, dtype=torch.float64)
    assert difference.kl == pytest.approx(low.kl - high.kl)
    assert difference.kl < 0
    assert difference.kl_error == pytest.approx(values.std().item() / math.sqrt(6))
    assert difference.nll == pytest.approx(math.log(low.perplexity / high.perplexity))
    assert difference.agreement == pytest.approx(low.agreement - high.agreement)
    assert (difference.tokens, difference.windows) == (6 * 29, 6)
    assert "paired" in str(difference)
    assert compare(low, low).kl == compare(low, low).kl_error == 0


def test_only_the_same_windows_compare():
    model, windows = sparse_model(), tiny_batches(2)
    result = evaluate(model, windows, progress=False)
    with pytest.raises(ValueError, match="figures of 2 and 1 windows"):
        compare(result, evaluate(model, windows[:1], progress=False))
    with pytest.raises(ValueError, match="judged other tokens in window 0"):
        compare(result, evaluate(model, tiny_batches(2, seed=9), progress=False))
    with pytest.raises(ValueError, match=r"judged other tokens in window 0 \(46 and 22 of them\)"):
        compare(result, evaluate(model, windows, protocol="dense-prompt", progress=False))
    assert compare(result, evaluate(model, windows, protocol="dense-first", progress=False)).tokens == 92


def test_protocols_have_short_and_long_names():
    assert [protocol_name(short) for short in PROTOCOLS] == list(PROTOCOLS.values())
    assert [protocol_name(name) for name in PROTOCOLS.values()] == list(PROTOCOLS.values())


def repeated(tokens):
    seen, again = set(), 0
    for start in range(len(tokens) - 3):
        gram = tuple(tokens[start : start + 4])
        again += gram in seen
        seen.add(gram)
    return again / (len(tokens) - 3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_continuations_are_those_of_generate(name):
    model, tokenizer = sparse_model(name, sparsity=0.5), characters()
    prompts = ["abc abc abc", torch.arange(20, 28), torch.arange(40, 50)[None]]
    report = compare_generation(model, tokenizer, prompts, max_new_tokens=40, progress=False)
    achieved = deadband.sparsity(model).total
    dense_model = tiny_model(name)
    for prompt, each in zip(prompts, report.continuations, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids if isinstance(prompt, str) else prompt.view(1, -1)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
        before, after = (one.generate(ids, **options)[0, ids.shape[1] :].tolist() for one in (dense_model, model))
        assert each.dense_text == tokenizer.decode(before, skip_special_tokens=True)
        assert each.text == tokenizer.decode(after, skip_special_tokens=True)
        assert (each.dense_tokens, each.tokens) == (40, 40)
        differs = [index for index in range(40) if before[index] != after[index]]
        assert each.first_divergence == (differs[0] if differs else None)
        assert each.equal_tokens == pytest.approx(1 - len(differs) / 40)
        assert each.dense_repetition == pytest.approx(repeated(before))
        assert each.repetition == pytest.approx(repeated(after))
    assert report.continuations[0].prompt == "abc abc abc"
    where = [40 if each.first_divergence is None else each.first_divergence for each in report.continuations]
    assert report.median_divergence == sorted(where)[1]
    if name != "gemma3":  # whose random weights write one token for ever
        assert min(where) < 40
    changes = torch.tensor([each.repetition - each.dense_repetition for each in report.continuations])
    assert report.repetition_increase == pytest.approx(changes.mean().item())
    assert report.repetition_increase_error == pytest.approx(changes.std().item() / math.sqrt(3), abs=1e-6)
    assert report.sparsity == achieved
    assert report.sparsity == pytest.approx(0.5, abs=0.15)
    assert "each new token sparse" in str(report)


def test_equal_continuations_and_end_tokens():
    model, tokenizer = tiny_model("llama"), characters()
    deadband.sparsify_(model, exact=True)
    report = compare_generation(model, tokenizer, ["abcdefgh"], max_new_tokens=12, progress=False)
    (same,) = report.continuations
    assert (same.first_divergence, same.equal_tokens, report.identical) == (None, 1.0, 1.0)
    assert report.median_divergence == 12
    assert math.isnan(report.repetition_increase_error)
    assert "never" in str(report)
    ids = tokenizer("abcdefgh", return_tensors="pt").input_ids
    with torch.no_grad(), deadband.dense(model):
        end = model(ids).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = [end, 5]
    (short,) = compare_generation(model, tokenizer, ["abcdefgh"], progress=False, max_new_tokens=12).continuations
    assert (short.tokens, short.dense_tokens, short.first_divergence) == (1, 1, None)
    assert math.isnan(short.repetition)


def test_one_continuation_that_ends_sooner_differs_where_it_ends():
    from deadband.evaluation.generation import _continuation

    made = _continuation(characters(), torch.tensor([[5]]), [7, 8, 9, 10], [7, 8])
    assert (made.first_divergence, made.equal_tokens) == (2, 0.5)
    assert (made.dense_tokens, made.tokens) == (4, 2)


def test_bad_prompts():
    model, tokenizer = sparse_model(), characters()
    with pytest.raises(ValueError, match="prompts is str or empty; expected a list"):
        compare_generation(model, tokenizer, "abc")
    with pytest.raises(TypeError, match=r"a prompt is a list; expected a text or token ids \[tokens\]"):
        compare_generation(model, tokenizer, [[3, 4]])
    with pytest.raises(ValueError, match="prompts is list or empty"):
        compare_generation(model, tokenizer, [])
    with pytest.raises(ValueError, match="the prompt is empty; expected some text to continue"):
        compare_generation(model, tokenizer, [""])
    with pytest.raises(ValueError, match="3 tokens and 200 new ones exceed the model's 128 positions"):
        compare_generation(model, tokenizer, ["abc"], max_new_tokens=200)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        compare_generation(model, tokenizer, ["abc"], max_new_tokens=0)
    with pytest.raises(ValueError, match="no layer of this LlamaForCausalLM is sparse"):
        compare_generation(tiny_model("llama"), tokenizer, ["abc"])
