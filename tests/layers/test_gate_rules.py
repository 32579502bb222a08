"""Up-projections that skip outputs by their gate: the same as a model whose activated gates are masked."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from conftest import tiny_batches, tiny_model
from torch import nn

import deadband
from deadband.decoding.decoder import decode_report, prepare_decode_
from deadband.layers.gated import gates_of
from deadband.layers.rule import Rule
from deadband.layers.sparse import DECODE_ROWS
from deadband.ops.skipping import keep_mask

FORMATS = [None, "int8", "int8-g64", "int4", "int4-g32-zp"]
TOKENS = tiny_batches(1, 1)[0]["input_ids"]
UPS = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
DOWNS = [name.replace("up_proj", "down_proj") for name in UPS]


def rules_of(model, *, relative=False, scaled=True, centered=True, others=0.01):
    torch.manual_seed(1)
    rules = {}
    for up, down in zip(UPS, DOWNS, strict=True):
        inner = model.get_submodule(up).out_features
        scale = torch.rand(inner) + 0.5 if scaled else None
        threshold = 0.05
        rules[up] = Rule(threshold, scale, None, relative, gate=True)
        rules[down] = Rule(others, torch.rand(inner) + 0.5, 0.01 * torch.randn(inner) if centered else None)
    return rules


@contextlib.contextmanager
def masked(model, rules):
    """Hooks on dense layers that do what the rules say, and the entries of gates that were kept, by up-projection."""
    kept, handles = {}, []

    def gate_hook(name, rule):
        def hook(module, args, output):
            kept[name] = keep_mask(output, rule.threshold, rule.scale, None, rule.relative)
            return torch.where(kept[name], output, 0)

        return hook

    for name, rule in rules.items():
        if rule.gate:
            handles.append(gates_of(model)[name][0].register_forward_hook(gate_hook(name, rule)))
        else:
            hook = lambda module, args, rule=rule: (rule.apply(args[0]),)  # noqa: E731
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    yield kept
    for handle in handles:
        handle.remove()


def close(found, expected, tolerance=1e-5):
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error < tolerance, error


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_gates_are_found_with_their_down_projections(kind):
    model = tiny_model(kind)
    found = gates_of(model)
    assert list(found) == UPS
    for name, (activation, down) in found.items():
        assert activation is model.get_submodule(name.rpartition(".")[0]).act_fn
        assert down == name.replace("up_proj", "down_proj")


def test_mlps_that_have_no_gate_of_their_own_are_none():
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = model.model.layers[0].mlp.act_fn  # whose gate it is cannot be told
    assert gates_of(model) == {}
    del model.model.layers[1].mlp.act_fn
    model.model.layers[1].mlp.act_fn = torch.nn.functional.silu
    assert list(gates_of(model)) == UPS[:1]
    del model.model.layers[0].mlp.gate_proj
    assert gates_of(model) == {}


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_same_as_a_model_with_masked_gates(kind, relative, rows):
    dense = tiny_model(kind)
    rules = rules_of(dense, relative=relative)
    model = deadband.sparsify_(copy.deepcopy(dense), rules)
    tokens = TOKENS[:, :rows]
    with torch.no_grad(), masked(dense, rules) as kept, deadband.sparse_prefill(model):
        close(model(tokens).logits, dense(tokens).logits)
        report = deadband.sparsity(model)
        for name in UPS:
            assert report.sites[name] == pytest.approx(1 - kept[name].double().mean().item(), abs=1e-6)
            assert 0.01 < report.sites[name] < 0.95
    with torch.no_grad():
        few = rows <= DECODE_ROWS
        with masked(dense, rules) if few else contextlib.nullcontext():
            close(model(tokens).logits, dense(tokens).logits)


@pytest.mark.parametrize("weights", FORMATS)
def test_formats(weights):
    model = deadband.sparsify_(tiny_model("llama"), rules_of(tiny_model("llama")), weights=weights, output_layer=False)
    assert all(model.get_submodule(name).by_output for name in UPS)
    plain = tiny_model("llama")
    for name in (*UPS, *DOWNS):
        plain.get_submodule(name).weight.data.copy_(model.get_submodule(name).dense_matrix())
    with torch.no_grad(), masked(plain, rules_of(plain)), deadband.sparse_prefill(model):
        for rows in (1, 2, 12):
            expected = plain(TOKENS[:, :rows]).logits
            close(model(TOKENS[:, :rows]).logits, expected, 1e-5 if weights is None else 0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    dense = tiny_model("llama", dtype)
    rules = rules_of(dense, centered=False)
    model = deadband.sparsify_(copy.deepcopy(dense), rules)
    with torch.no_grad(), masked(dense, rules):
        close(model(TOKENS[:, :2]).logits, dense(TOKENS[:, :2]).logits, 1e-12 if dtype is torch.float64 else 0.02)


def test_autocast():
    dense = tiny_model("llama")
    rules = rules_of(dense, centered=False)
    model = deadband.sparsify_(copy.deepcopy(dense), rules)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), masked(dense, rules):
        close(model(TOKENS[:, :2]).logits, dense(TOKENS[:, :2]).logits, 0.02)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_those_of_masked_gates(training):
    dense = tiny_model("llama")
    rules = rules_of(dense, others=0.0, centered=False)
    model = deadband.sparsify_(copy.deepcopy(dense), rules)
    for each in (dense, model):
        each.train(training)
    tokens = TOKENS[:, : 20 if training else 3]
    model(tokens).logits.square().sum().backward()
    with masked(dense, rules):
        dense(tokens).logits.square().sum().backward()
    found = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-4 * parameter.grad.abs().max())


def test_straight_through_gradients_reach_skipped_gates():
    model = deadband.sparsify_(tiny_model("llama"), rules_of(tiny_model("llama")), gradient="straight_through").train()
    dense = tiny_model("llama").train()
    for each in (dense, model):
        each(TOKENS).logits.square().sum().backward()
    gates = [each.model.layers[1].mlp.gate_proj.weight.grad for each in (dense, model)]
    assert ((gates[1] != 0).sum(), bool(gates[1].isfinite().all())) == ((gates[0] != 0).sum(), True)


def test_whoever_looks_at_the_outputs_gets_all_of_them():
    model = deadband.sparsify_(tiny_model("llama"), rules_of(tiny_model("llama")))
    up = model.get_submodule(UPS[0])
    x = torch.randn(2, up.in_features)
    with torch.no_grad():
        close(up(x) + 0, x @ up.weight.T)


@pytest.mark.parametrize("weights", [None, "int8", "int4-g32"])
def test_saved_loaded_and_dense_again(weights, tmp_path):
    reference = tiny_model("llama")
    model = deadband.sparsify_(copy.deepcopy(reference), rules_of(reference), weights=weights)
    with torch.no_grad():
        expected = model(TOKENS[:, :2]).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for name in UPS:
        site = loaded.get_submodule(name)
        assert (site.gate, site.by_output) == (True, True)
        assert site.rule == model.get_submodule(name).rule
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS[:, :2]).logits, expected)
        again = copy.deepcopy(model)
        assert torch.equal(again(TOKENS[:, :2]).logits, expected)
    if weights is None:
        deadband.densify_(model)
        before, now = reference.state_dict(), model.state_dict()
        assert before.keys() == now.keys()
        assert all(torch.equal(before[key], now[key]) and before[key].stride() == now[key].stride() for key in before)


def test_another_rule_takes_its_place():
    model = deadband.sparsify_(tiny_model("llama"), rules_of(tiny_model("llama")))
    deadband.sparsify_(model, dict.fromkeys((*UPS, *DOWNS), 0.1))
    for name in UPS:
        up = model.get_submodule(name)
        assert (up.gate, up.by_output, up.scale) == (False, False, None)
        assert up.weight.T.is_contiguous()


@pytest.mark.parametrize(
    ("name", "rule", "says"),
    [
        ("model.layers.0.self_attn.o_proj", Rule(0.1, gate=True), "has no gate"),
        ("model.layers.0.mlp.gate_proj", Rule(0.1, gate=True), "has no gate"),
        (UPS[0], Rule(0.1, center=torch.zeros(112), gate=True), "has no center"),
        (UPS[0], Rule(0.1, torch.ones(64), gate=True), "has to be 112 finite values"),
    ],
)
def test_rules_that_fit_no_gate(name, rule, says):
    model = tiny_model("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        deadband.sparsify_(model, {DOWNS[1]: 0.1, name: rule})
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(isinstance(each, deadband.layers.sparse.SparseSite) for each in model.modules())


def test_rules_are_told_apart():
    assert Rule(0.1, gate=True) != Rule(0.1)
    assert "gate" in str(Rule(0.1, gate=True))
    model = deadband.sparsify_(tiny_model("llama"), rules_of(tiny_model("llama")))
    assert "of its gate" in str(model.get_submodule(UPS[0]))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8"])
def test_prepared(weights):
    model = deadband.sparsify_(tiny_model("llama"), rules_of(tiny_model("llama")), weights=weights)

    def decoded(each):
        with torch.no_grad():
            cache = each(TOKENS[:, :8], use_cache=True).past_key_values
            return torch.cat([each(TOKENS[:, i : i + 1], past_key_values=cache).logits for i in range(8, 20)], 1)

    expected, before = decoded(model), deadband.sparsity(model)
    prepared = prepare_decode_(copy.deepcopy(model))
    close(decoded(prepared), expected, 1e-3)
    assert decode_report(prepared).graph == 12
    after = deadband.sparsity(prepared)
    for name in UPS:
        assert after.sites[name] == pytest.approx(before.sites[name], abs=0.05)


def test_a_plain_gated_mlp():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)
            self.act = nn.GELU()

        def forward(self, x):
            return self.w2(self.w3(x) * self.act(self.w1(x)))

    torch.manual_seed(0)
    dense = MLP().eval()
    rules = {"w3": Rule(0.05, gate=True), "w2": Rule(0.01)}
    model = deadband.sparsify_(copy.deepcopy(dense), rules)
    x = torch.randn(3, 16)
    with torch.no_grad(), masked(dense, rules) as kept:
        close(model(x), dense(x))
        assert deadband.sparsity(model).sites["w3"] == pytest.approx(1 - kept["w3"].double().mean().item())
