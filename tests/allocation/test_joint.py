"""Joint sites: what skipping by a gate is expected to harm, and how that is weighed against skipping inputs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import tiny_batches, tiny_model

import deadband
from deadband.allocation.auto import Judge
from deadband.allocation.joint import Point, between, choose, joint_sites
from deadband.allocation.sensitivity import measure_sensitivity, sensitivity_shares
from deadband.allocation.thresholds import Thresholds
from deadband.layers.gated import gates_of
from deadband.layers.rule import Rule
from deadband.layers.sites import find_sites, weight_bytes

UPS = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
BATCHES = tiny_batches(6, 2)


def bytes_of(model):
    return {name: weight_bytes(site) for name, site in find_sites(model).items()}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_gates_that_are_all_there_is_before_the_down_projection(kind):
    model = tiny_model(kind)
    names = list(find_sites(model))
    assert list(joint_sites(model, BATCHES[0], names)) == UPS
    assert (
        list(joint_sites(model, BATCHES[0], [name for name in names if name != "model.layers.0.mlp.down_proj"]))
        == (UPS[1:])
    )
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (mlp.up_proj(x) + 1))
    assert list(joint_sites(model, BATCHES[0], names)) == UPS[1:]


def kept_by(model, up, down, gate_rule, rule):
    """Which entries of the gate of `up` and of the input of `down` the rules keep, over all batches."""
    kept = []
    handles = [
        gates_of(model)[up][0].register_forward_hook(lambda module, args, y: kept.append(gate_rule.keep(y))),
        model.get_submodule(down).register_forward_pre_hook(lambda module, args: kept.append(rule.keep(args[0]))),
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    for handle in handles:
        handle.remove()
    return torch.cat(kept[::2]), torch.cat(kept[1::2])


@pytest.mark.parametrize("relative", [False, True])
def test_curves_are_what_the_hooks_would_skip(relative):
    model = tiny_model("llama")
    measured = measure_sensitivity(model, BATCHES, list(find_sites(model)), joint=True, progress=False)
    assert [name for name, site in measured.items() if site.joint is not None] == UPS
    for name in UPS:
        joint = measured[name].joint
        curve, alone = joint.curves[relative], measured[joint.down].curves[relative]
        i, j = 5, 3
        gate = Rule(curve.gate_thresholds[i - 1], joint.scale, None, relative)
        down = Rule(curve.thresholds[j - 1], measured[joint.down].scale, None, relative)
        gates, downs = kept_by(model, name, joint.down, gate, down)
        assert curve.up[i] == pytest.approx(1 - gates.double().mean().item(), abs=1e-3)
        assert curve.down[i, j] == pytest.approx(1 - (gates & downs).double().mean().item(), abs=1e-3)
        # without the gate, the curve of the down-projection alone
        np.testing.assert_allclose(curve.harm[0, 1:], alone.harm[1::2], rtol=1e-4)
        np.testing.assert_allclose(curve.down[0, 1:], alone.sparsity[1::2], atol=1e-6)
        assert curve.harm[0, 0] == curve.up[0] == curve.down[0, 0] == 0
        assert bool((np.diff(curve.up) > 0).all())


def test_the_harm_is_that_of_first_order_changes():
    """Against gradients that autograd gives for the same labels, entry by entry."""
    model = tiny_model("llama", torch.float64)
    names = list(find_sites(model))
    joint = measure_sensitivity(model, BATCHES[:1], names, joint=True, progress=False)[UPS[0]].joint
    curve = joint.curves[False]
    x, gates = [], []
    down = model.get_submodule(joint.down)
    down.register_forward_pre_hook(lambda module, args: x.append(args[0]))
    gates_of(model)[UPS[0]][0].register_forward_hook(lambda module, args, y: gates.append(y.detach()))
    logits = model(**BATCHES[0]).logits
    x[0].retain_grad()
    generator = torch.Generator().manual_seed(1)  # of the second pass
    probabilities = logits.detach().float().softmax(-1).flatten(0, -2)
    draw = torch.rand(len(probabilities), 1, generator=generator)
    labels = (probabilities.cumsum(-1) < draw).sum(-1)
    torch.nn.functional.nll_loss(logits.log_softmax(-1).flatten(0, -2), labels, reduction="sum").backward()
    product = (x[0].grad * x[0].detach()).flatten(0, -2)
    score = (gates[0].abs().float() * joint.scale).flatten(0, -2)
    for i in (2, 6):
        skipped = score <= curve.gate_thresholds[i - 1]
        expected = (product * skipped).sum(1).square().sum() / (2 * len(labels))
        assert curve.harm[i, 0] == pytest.approx(expected.item(), rel=1e-3)


def test_choosing_is_by_the_price_of_a_byte():
    points = {"up": [(0.5, 1.0)], "down": [(0.5, 1.0)], "other": [(0.5, 0.5)]}
    weights = {"up": 100.0, "down": 100.0, "other": 100.0}
    cheap, dear = ({False: [Point(0.5, harm)], True: [Point(0.5, 9.0)]} for harm in (0.9, 1.9))
    assert choose(points, {"up": ("down", cheap)}, weights, 0.4) == {"up": False}
    assert choose(points, {"up": ("down", dear)}, weights, 0.4) == {}
    assert choose(points, {}, weights, 0.4) == {}
    between_them = between([Point(0.0, 0.0), Point(0.4, 1.0, 0.2, 0.6, 3.0, 5.0)], 0.2)
    assert between_them == pytest.approx(Point(0.2, 0.5, 0.1, 0.3, 1.5, 2.5))


@pytest.mark.parametrize("relative", [None, False, True])
def test_shares_meet_the_budget_and_rules_fit_them(relative):
    model = tiny_model("llama")
    names = list(find_sites(model))
    measured = measure_sensitivity(model, BATCHES, names, joint=True, progress=False)
    weights = bytes_of(model)
    for budget in (0.1, 0.3, 0.5, 0.7):
        shares, rules, harm = sensitivity_shares(measured, weights, budget, relative, joint=True)
        assert set(shares) == set(rules) == set(harm) == set(names)
        reached = sum(shares[name] * weights[name] for name in names) / sum(weights.values())
        assert reached == pytest.approx(budget, abs=1e-6)
        for name, rule in rules.items():
            if rule.gate:
                assert name in UPS
                assert rule.scale is measured[name].joint.scale
                assert shares[measured[name].joint.down] >= shares[name] - 1e-6
            assert relative is None or rule.relative == relative


def favoured(monkeypatch):
    """So that gates are chosen in tiny random models, too."""
    for module in (deadband.allocation.joint, deadband.allocation.sensitivity):
        monkeypatch.setattr(module, "CAUTION", 1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("center", [True, False])
def test_budgets_are_met_by_the_sparse_model(kind, center, monkeypatch, tmp_path):
    favoured(monkeypatch)
    model = tiny_model(kind)
    calibration = deadband.calibrate(model, BATCHES, progress=False)
    options = {"model": model, "batches": BATCHES, "center": center, "progress": False}
    thresholds = calibration.allocate(0.5, "sensitivity", joint=True, **options)
    assert {name for name, rule in thresholds.items() if rule.gate} == set(UPS)
    thresholds.save(tmp_path / "thresholds.safetensors")
    assert Thresholds.load(tmp_path / "thresholds.safetensors").rules == thresholds.rules
    judged = Judge(model, BATCHES[:2], False)(thresholds.rules)
    dense = copy.deepcopy(model)
    deadband.sparsify_(model, Thresholds.load(tmp_path / "thresholds.safetensors"))
    with torch.no_grad(), deadband.sparse_prefill(model):
        for batch in BATCHES:
            model(**batch)
        achieved = deadband.sparsity(model)
        kl = 0.0
        for batch in BATCHES[:2]:
            before, after = (each(**batch).logits.double().log_softmax(-1) for each in (dense, model))
            kl += float((before.exp() * (before - after)).sum())
    assert achieved.total == pytest.approx(0.5, abs=0.02)
    assert sum(judged.kl) == pytest.approx(kl, rel=1e-3)


def test_auto_tries_gates_and_says_so(monkeypatch):
    favoured(monkeypatch)
    model = tiny_model("llama")
    calibration = deadband.calibrate(model, BATCHES, progress=False)
    options = {"model": model, "batches": BATCHES, "progress": False}
    assert "gates" in calibration.allocate(0.4, joint=True, **options).reason
    without = calibration.allocate(0.4, **options)
    assert "gates" not in without.reason
    assert not any(rule.gate for rule in without.values())
    found = calibration.allocate(method="sensitivity", max_kl=0.5, joint=True, **options)
    assert any(rule.gate for rule in found.values())


def test_only_sensitivity_knows_gates():
    model = tiny_model("llama")
    calibration = deadband.calibrate(model, BATCHES, progress=False)
    for method in ("uniform", "greedy"):
        with pytest.raises(ValueError, match="joint= is for the methods"):
            calibration.allocate(0.4, method, model=model, batches=BATCHES, joint=True, progress=False)
        with pytest.raises(ValueError, match="joint= is for the methods"):
            calibration.allocate(method=method, max_kl=1.0, model=model, batches=BATCHES, joint=True, progress=False)
