import math

import pytest
import torch
from conftest import sparse_model, tiny_batches, tiny_model
from torch.nn import functional as F

import deadband
from deadband.evaluation import dense_logits, evaluate


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


def test_figures_are_those_of_the_definitions():
    windows = tiny_batches(2, rows=2, length=10, seed=5)
    model = sparse_model("llama", sparsity=0.5)
    result = evaluate(model, windows, progress=False)
    perplexity, dense_perplexity, kl, agreement, count = by_hand(tiny_model("llama"), model, windows)
    assert result.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert result.dense_perplexity == pytest.approx(dense_perplexity, rel=1e-4)
    assert result.kl == pytest.approx(kl, rel=1e-3)
    assert result.kl > 0.01
    assert result.agreement == pytest.approx(agreement)
    assert (result.tokens, result.windows) == (count, 2)
    assert result.sparsity == pytest.approx(0.5, abs=0.1)


def test_a_dense_model_agrees_with_itself():
    result = evaluate(tiny_model("llama"), tiny_batches(1), progress=False)
    assert (result.kl, result.agreement, result.sparsity) == (0.0, 1.0, 0.0)
    assert result.perplexity == result.dense_perplexity


def test_reference_logits_give_the_same_figures():
    windows, model = tiny_batches(2), sparse_model()
    reference = dense_logits(tiny_model("llama"), windows, progress=False)
    assert evaluate(model, windows, reference=reference, progress=False).kl == pytest.approx(
        evaluate(model, windows, progress=False).kl, rel=1e-4
    )
    with pytest.raises(ValueError, match="reference has 2 windows, expected 1"):
        evaluate(model, windows[:1], reference=reference)
    with pytest.raises(ValueError, match="windows is empty"):
        evaluate(model, [])


def test_padding_is_left_out():
    model = sparse_model()
    ids = tiny_batches(1, rows=1, length=9)[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=ids.dtype)], 1)
    mask = torch.tensor([[1] * 9 + [0] * 4])
    expected = evaluate(model, [{"input_ids": ids}], progress=False)
    actual = evaluate(model, [{"input_ids": padded, "attention_mask": mask}], progress=False)
    assert actual.tokens == expected.tokens == 8
    assert actual.kl == pytest.approx(expected.kl, rel=1e-3)


def test_evaluating_leaves_the_model_in_its_mode():
    model = sparse_model().train()
    rows = [module.sparse_rows for module in model.modules() if hasattr(module, "sparse_rows")]
    evaluate(model, tiny_batches(1), progress=False)
    assert model.training
    assert [module.sparse_rows for module in model.modules() if hasattr(module, "sparse_rows")] == rows
