"""Batches that are given once, padding on either side of a model, and what is no batch."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCABULARY, tiny_batches, tiny_model
from torch import nn

import deadband
from deadband.allocation.auto import Judge
from deadband.allocation.greedy import greedy_shares
from deadband.allocation.sensitivity import measure_sensitivity
from deadband.calibration.calibration import Calibration
from deadband.calibration.inspection import inspect
from deadband.evaluation.methods import Setup
from deadband.evaluation.quality import dense_logits, evaluate
from deadband.layers.sites import find_sites
from deadband.quantization.hessians import input_hessians
from deadband.quantization.mixed_precision import choose_formats
from deadband.running.batches import checked, taken

QUIET = {"progress": False}


def calibrated(model) -> Calibration:
    return deadband.calibrate(model, tiny_batches(), **QUIET)


def allocated(method):
    return lambda model, batches: calibrated(model).allocate(0.4, method, model=model, batches=batches, **QUIET)


RUNS = {
    "calibrate": lambda model, batches: deadband.calibrate(model, batches, **QUIET),
    "inspect": lambda model, batches: inspect(model, batches, **QUIET),
    **{f"allocate, {method}": allocated(method) for method in ("auto", "uniform", "greedy", "sensitivity")},
    "allocate, max_kl": lambda model, batches: calibrated(model).allocate(
        max_kl=0.05, method="uniform", model=model, batches=batches, **QUIET
    ),
    "measure_sensitivity": lambda model, batches: measure_sensitivity(model, batches, list(find_sites(model)), **QUIET),
    "input_hessians": lambda model, batches: dict(input_hessians(model, batches, find_sites(model), **QUIET)),
    "choose_formats": lambda model, batches: choose_formats(model, batches, 1e-3, "int4"),
    "evaluate": lambda model, batches: evaluate(model, batches, **QUIET),
    "dense_logits": lambda model, batches: dense_logits(model, batches, **QUIET),
    "Setup": lambda model, batches: Setup(model, batches, **QUIET).calibration(),
}


def reusing(batches):
    """A generator that gives every batch in the same memory."""
    buffer = {name: torch.empty_like(value) for name, value in batches[0].items()}
    for batch in batches:
        for name, value in batch.items():
            buffer[name].copy_(value)
        yield buffer


def plain(value):
    """Something to compare results by."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return repr(value)


@pytest.mark.parametrize("name", RUNS)
def test_an_iterator_gives_what_a_list_gives(name):
    model, batches = tiny_model("llama"), tiny_batches()
    wanted = RUNS[name](model, batches)
    assert plain(RUNS[name](model, reusing(batches))) == plain(wanted)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_no_batch_is_said(name):
    model = tiny_model("llama")
    ids = tiny_batches(1)[0]["input_ids"]
    for wrong in (
        "a text",
        pathlib.Path("text.txt"),
        ["a text", "another"],
        [["a text"]],
        ids.tolist(),
        [{"input_ids": ids.tolist()}],
        [{"text": "a text"}],
        [np.asarray(ids)],
        7,
    ):
        with pytest.raises(TypeError, match=r"tokenizer\(text, return_tensors='pt'\)"):
            RUNS[name](model, wrong)
    for wrong in (ids, {"input_ids": ids}):
        with pytest.raises(TypeError, match=r"put it in a list: \[batch\]"):
            RUNS[name](model, wrong)
    with pytest.raises(ValueError, match=r"expected \[batch, tokens\]"):
        RUNS[name](model, [{"input_ids": ids[0]}])
    used_up = iter(tiny_batches())
    list(used_up)
    with pytest.raises(ValueError, match="is empty; .* an iterator gives its batches once"):
        RUNS[name](model, used_up)
    with pytest.raises(ValueError, match="is empty"):
        RUNS[name](model, [])


def test_a_loader_that_shuffles_is_read_once():
    model = deadband.sparsify_(tiny_model("llama"), dict.fromkeys(find_sites(tiny_model("llama")), 0.3))
    windows = tiny_batches(6, rows=1)
    loader = torch.utils.data.DataLoader(
        windows, batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    wanted = {each["checksum"]: each for each in evaluate(model, windows, **QUIET).per_window}
    found = evaluate(model, loader, **QUIET).per_window
    assert len(found) == len(wanted) == 6
    assert all(dict(each) == dict(wanted[each["checksum"]]) for each in found)
    reference = dense_logits(model, loader, **QUIET)
    with pytest.raises(ValueError, match="made of other tokens than window"):
        evaluate(model, windows, reference=reference, **QUIET)


def test_a_dataset_is_read_to_its_length():
    class Endless(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.full((2, 16), float(index))

    sites = deadband.calibrate(nn.Sequential(nn.Linear(16, 4)), Endless(), **QUIET).sites
    assert sites["0"].rows[0] == 6
    assert [float(each[0, 0]) for each in taken(Endless())] == [0, 1, 2]


def test_batches_of_all_kinds_are_let_through():
    class Own:
        pass

    pair = (torch.ones(1), None, 2.0)
    given = [torch.ones(2), {"x": torch.ones(1), "flag": True}, pair, [torch.ones(1)], Own()]
    assert all(one is other for one, other in zip(checked(given), given, strict=True))
    assert taken(given) == given
    assert [len(each) for each in taken(iter([pair]))] == [3]
    one = nn.Sequential(nn.Linear(3, 2))
    assert deadband.calibrate(one, [torch.ones(3)], **QUIET).sites["0"].rows.tolist() == [1, 1, 1]


def roberta():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.RobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=66, pad_token_id=1, is_decoder=True, **sizes
    )
    return transformers.RobertaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "positions"),
    [(lambda: tiny_model("gpt2"), 128), (lambda: tiny_model("opt"), 128), (roberta, 64)],
)
def test_a_window_that_is_too_long_is_said(make, positions):
    model = make()
    fits, longer = ({"input_ids": torch.full((1, length), 5)} for length in (positions, positions + 1))
    message = f"{positions + 1} tokens are more than the {positions} positions .*; give windows of at most {positions}"
    for name in ("calibrate", "inspect", "evaluate", "dense_logits", "choose_formats", "input_hessians"):
        RUNS[name](model, [fits])
        with pytest.raises(ValueError, match=message):
            RUNS[name](model, [longer])
    with pytest.raises(ValueError, match=message):
        evaluate(deadband.sparsify_(model, exact=True), [longer], protocol="dense-prompt", **QUIET)


def test_a_model_that_reads_on_is_not_stopped():
    """Rotary positions have no end, whatever the configuration says."""
    model = tiny_model("llama")
    assert evaluate(model, [{"input_ids": torch.full((1, 200), 5)}], **QUIET).tokens == 199


def test_tokens_of_another_tokenizer_are_said():
    with pytest.raises(ValueError, match=f"holds token {VOCABULARY}, and this LlamaForCausalLM knows 0 to 127"):
        deadband.calibrate(tiny_model("llama"), [{"input_ids": torch.tensor([[5, VOCABULARY]])}], **QUIET)


def test_an_error_of_the_model_stays_its_own():
    def fail(*_):
        raise RuntimeError("stop")

    model = tiny_model("llama")
    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        deadband.calibrate(model, tiny_batches(1), **QUIET)


# Padding


def test_padding_is_known_where_a_batch_is_given_by_position():
    model = tiny_model("llama")
    ids, mask = together(text_rows([5, 20], 3))
    by_name = deadband.calibrate(model, [{"input_ids": ids, "attention_mask": mask}], **QUIET)
    by_place = deadband.calibrate(model, [(ids, mask)], **QUIET)
    for name, site in by_place.sites.items():
        assert set(site.rows) == {25}
        assert np.array_equal(site.histogram, by_name.sites[name].histogram)


def text_rows(lengths, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=draw) for length in lengths]


def together(rows, side="right", value=0):
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(longest - len(row), None)
        ids[index, at], mask[index, at] = row, 1
    return ids, mask


def encoder_decoder(name):
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"d_model": 64, "d_ff": 112, "num_layers": 2, "num_heads": 4, "d_kv": 16}
        config = transformers.T5Config(
            **sizes, vocab_size=VOCABULARY, decoder_start_token_id=1, pad_token_id=0, tie_word_embeddings=False
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        sizes = {f"{side}_{what}": size for side in ("encoder", "decoder")
                 for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 112))}  # fmt: skip
        config = transformers.BartConfig(
            **sizes, vocab_size=VOCABULARY, d_model=64, max_position_embeddings=128, decoder_start_token_id=1,
            pad_token_id=0, bos_token_id=1, eos_token_id=None, forced_eos_token_id=None,
        )  # fmt: skip
        model = transformers.BartForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def padded_and_plain(kind):
    """A model, one padded batch, and its texts one by one. Padding is unlike the texts, and more than half of it."""
    lengths = [12, 20, 9, 60]
    rows = text_rows(lengths, 1)
    if kind in ("llama", "gpt2", "left"):
        model = tiny_model("llama" if kind == "left" else kind)
        with torch.no_grad():
            model.get_input_embeddings().weight[0] *= 8
        ids, mask = together(rows, "left" if kind == "left" else "right")
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind == "left":
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
        return model, [batch], [{"input_ids": row[None]} for row in rows]
    name, told = kind.split(", ")
    model, others = encoder_decoder(name), text_rows(lengths[::-1], 2)  # of the same shape, but with another padding
    with torch.no_grad():
        model.get_input_embeddings().weight[0] *= 8
    (ids, mask), (targets, target_mask) = together(rows), together(others)
    batch = {"input_ids": ids, "attention_mask": mask}
    if told == "labels":
        batch["labels"] = together(others, value=-100)[0]
        parts = [{"input_ids": a[None], "labels": b[None]} for a, b in zip(rows, others, strict=True)]
    else:
        batch |= {"decoder_input_ids": targets, "decoder_attention_mask": target_mask}
        parts = [{"input_ids": a[None], "decoder_input_ids": b[None]} for a, b in zip(rows, others, strict=True)]
    return model, [batch], parts


PADDED = ("llama", "gpt2", "left", "t5, labels", "t5, mask", "bart, labels", "bart, mask")


def farthest(one, other):
    assert one.keys() == other.keys()
    return max(abs(one[name] - other[name]) / (abs(other[name]) + 1e-12) for name in other)


@pytest.mark.parametrize("kind", PADDED)
def test_padding_counts_nowhere(kind):
    model, padded, texts = padded_and_plain(kind)
    both = (padded, texts)
    names = list(find_sites(model))
    calibrations = [deadband.calibrate(model, batches, **QUIET) for batches in both]
    for sparsity in (0.2, 0.6):
        thresholds = [{n: s.threshold(sparsity) for n, s in each.sites.items()} for each in calibrations]
        assert farthest(*thresholds) < 0.02
    assert farthest(*({n: float(s.rows[0]) for n, s in each.sites.items()} for each in calibrations)) == 0
    rows = [{n: s.rows for n, s in inspect(model, batches, **QUIET).sites.items()} for batches in both]
    assert rows[0] == rows[1]
    traces = [{n: float(h.trace()) for n, h in input_hessians(model, b, names, **QUIET)} for b in both]
    assert farthest(*traces) < 1e-3
    rules = {name: deadband.Rule(thresholds[1][name]) for name in names}
    judged = [Judge(model, batches, False)(rules) for batches in both]
    assert sum(judged[0].outputs) == sum(judged[1].outputs)
    assert sum(judged[0].targets) == sum(judged[1].targets) > 0
    assert judged[0].mean == pytest.approx(judged[1].mean, rel=2e-3)
    assert sum(judged[0].growth) == pytest.approx(sum(judged[1].growth), rel=2e-3, abs=1e-2)
    budget = judged[1].mean / 50
    chosen = [choose_formats(model, batches, budget, "int4", include="re:.*[.]0[.].*") for batches in both]
    assert chosen[0] == chosen[1]
    shares = [greedy_shares(calibrations[1], [0.2], model, batches, 0.3, 10**6, False)[0] for batches in both]
    assert max(abs(shares[0][name] - shares[1][name]) for name in names) < 0.02
    corrected = [calibrations[1].allocate(0.4, "uniform", model=model, batches=b, **QUIET) for b in both]
    assert farthest(*({n: each.rules[n].threshold for n in names} for each in corrected)) < 0.02
    sparse = deadband.sparsify_(model, corrected[1])
    found = [evaluate(sparse, batches, **QUIET) for batches in both]
    assert found[0].tokens == found[1].tokens
    for figure in ("perplexity", "dense_perplexity", "kl", "agreement"):
        assert getattr(found[0], figure) == pytest.approx(getattr(found[1], figure), rel=2e-3)
