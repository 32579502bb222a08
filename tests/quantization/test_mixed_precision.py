from __future__ import annotations

import pytest
import torch
from conftest import mlp, tiny_batches, tiny_model

import deadband
from deadband.layers.sites import find_sites
from deadband.quantization.mixed_precision import choose_formats


def kl(model, reference, batches) -> float:
    """The mean KL of a token, in float64."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            p, q = (each(**batch).logits.double().log_softmax(-1) for each in (reference, model))
            total += float((p.exp() * (p - q)).sum())
            tokens += batch["input_ids"].numel()
    return total / tokens


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_budget_decides_how_many_sites_are_quantised(name):
    batches = tiny_batches(2)
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sites = list(find_sites(model))
    every = kl(deadband.sparsify_(tiny_model(name), dict.fromkeys(sites, 0.0), weights="int4-g32"), model, batches)
    chosen = [choose_formats(model, batches, budget, "int4-g32") for budget in (every * 2, every / 3, every / 1e6)]
    assert set(chosen[0]) == set(sites)
    assert 0 < len(chosen[1]) < len(sites)
    assert chosen[2] == {}
    assert list(chosen[1]) == [site for site in sites if site in chosen[1]]
    assert set(chosen[1].values()) == {"int4-g32"}
    mixed = deadband.sparsify_(tiny_model(name), dict.fromkeys(sites, 0.0), weights=chosen[1], output_layer=False)
    assert 0 < kl(mixed, model, batches) <= every / 3 * 1.01
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_patterns_and_second_moments():
    batches = tiny_batches(2)
    model = tiny_model("llama")
    calibration = deadband.calibrate(model, batches, progress=False)
    moments = deadband.quantization.second_moments_of(calibration)
    chosen = choose_formats(model, batches, 10.0, "int4", second_moments=moments, include="*.mlp.*", exclude="up_proj")
    assert {site.rpartition(".")[2] for site in chosen} == {"gate_proj", "down_proj"}


def test_output_that_overflows_when_quantised_is_an_error(monkeypatch):
    model, batches = tiny_model("llama"), tiny_batches(1)
    dequantize = deadband.quantization.QuantizedWeight.dequantize
    monkeypatch.setattr(
        deadband.quantization.QuantizedWeight, "dequantize", lambda self, dtype: dequantize(self, dtype) * float("inf")
    )
    with pytest.raises(ValueError, match=r"q_proj in int8-g32 the model's output holds NaN"):
        choose_formats(model, batches, 1.0)


def test_a_failure_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stop")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        choose_formats(model, tiny_batches(1), 1.0)
    handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_bad_input():
    model, batches = tiny_model("llama"), tiny_batches(1)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a positive number"):
            choose_formats(model, batches, value)
    with pytest.raises(ValueError, match="batches is empty"):
        choose_formats(model, [], 1.0)
    with pytest.raises(ValueError, match="int3"):
        choose_formats(model, batches, 1.0, "int3")
    with pytest.raises(ValueError, match="logits"):
        choose_formats(mlp(), [torch.randn(3, 16)], 1.0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        choose_formats(model, batches, 1.0)
    quantised = tiny_model("llama")
    deadband.sparsify_(quantised, dict.fromkeys(find_sites(quantised), 0.0), weights="int8")
    with pytest.raises(ValueError, match="quantised already"):
        choose_formats(quantised, batches, 1.0)
