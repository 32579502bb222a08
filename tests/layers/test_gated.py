"""Gated MLPs whose gates close by nature: what lies by output, what waits for the gate, and what that changes."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import _LLAMA, tiny_batches, tiny_model
from torch import nn

import deadband
from deadband.decoding.decoder import decode_report, prepare_decode_
from deadband.layers.gated import closes, closing_mlps
from deadband.layers.pending import PendingOutput
from deadband.ops import kernels
from deadband.ops.gated import up_linear

pytestmark = pytest.mark.skipif(kernels.library is None, reason="no kernels are built")
FORMATS = [None, "int8", "int8-g64", "int4", "int4-g32"]
TOKENS = tiny_batches(1, 1)[0]["input_ids"]


def relu_model(dtype=torch.float32):
    model = tiny_model("llama", dtype)
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.ReLU()
    return model


def gemma3n():
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3nTextConfig(
        **{**_LLAMA, "intermediate_size": [112, 112], "head_dim": 16, "num_key_value_heads": 2},
        activation_sparsity_pattern=[0.9, 0.0], layer_types=["full_attention"] * 2, num_kv_shared_layers=0,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=128, laurel_rank=8,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def ups(model):
    return {name: each for name, each in model.named_modules() if name.endswith("up_proj")}


def without_waiting(monkeypatch):
    monkeypatch.setattr(
        deadband.layers.sparse.SparseSite, "before_gate", lambda self, x, outputs, own, counts: up_linear(x, *own, None)
    )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("weights", FORMATS)
def test_closed_outputs_change_no_bit_of_the_logits(weights, rows, monkeypatch):
    model = deadband.sparsify_(relu_model(), exact=True, weights=weights)
    assert all(up.by_output for up in ups(model).values())
    with torch.no_grad():
        exact = model(TOKENS[:, :rows]).logits
        report = deadband.sparsity(model)
        without_waiting(monkeypatch)
        assert torch.equal(model(TOKENS[:, :rows]).logits, exact)
    for name in ups(model):
        assert report.sites[name] == report.sites[name.replace("up_proj", "down_proj")]
        assert 0.2 < report.sites[name] < 0.8


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_close_to_the_dense_model(weights):
    dense = relu_model()
    model = deadband.sparsify_(copy.deepcopy(dense), exact=True, weights=weights)
    with torch.no_grad():
        for count in (1, 4, 20):
            expected, found = (each(TOKENS[:, :count]).logits for each in (dense, model))
            error = float((found - expected).norm() / expected.norm())
            assert error < {None: 1e-5, "int8": 0.05, "int4": 0.5}[weights]


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_saved_loaded_and_dense_again(weights, tmp_path):
    reference = relu_model()
    model = deadband.sparsify_(copy.deepcopy(reference), exact=True, weights=weights)
    model.config.hidden_act = "relu"
    with torch.no_grad():
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert all(up.by_output for up in ups(loaded).values())
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, expected)
    if weights is None:
        deadband.densify_(model)
        before, now = reference.state_dict(), model.state_dict()
        assert all(torch.equal(before[key], now[key]) and before[key].stride() == now[key].stride() for key in before)


def test_another_rule_lays_up_out_by_input_again():
    model = deadband.sparsify_(relu_model(), exact=True)
    name = "model.layers.0.mlp.up_proj"
    deadband.sparsify_(model, {**dict.fromkeys(deadband.layers.sites.sparse_sites(model), 0.0), name: 0.1})
    up, other = (model.get_submodule(name.replace("0", layer)) for layer in "01")
    assert not up.by_output
    assert up.weight.t().is_contiguous()
    assert other.by_output
    assert other.weight.is_contiguous()
    assert not any(each.by_output for each in ups(deadband.sparsify_(tiny_model("llama"), exact=True)).values())


def test_gemma3n_by_its_own_pattern(monkeypatch):
    model = gemma3n()
    assert [up.split(".")[2] for _, up, _ in closing_mlps(model)] == ["0"]
    with torch.no_grad():
        dense = model(TOKENS[:, :1]).logits
        deadband.sparsify_(model, exact=True)
        exact = model(TOKENS[:, :1]).logits
        shares = [deadband.sparsity(model).sites[f"model.layers.{layer}.mlp.up_proj"] for layer in (0, 1)]
        assert shares[0] > 0.8
        assert shares[1] == 0
        torch.testing.assert_close(exact, dense, rtol=1e-4, atol=1e-5)
        without_waiting(monkeypatch)
        assert torch.equal(model(TOKENS[:, :1]).logits, exact)


class Looks(nn.Module):
    """An MLP whose code does something else with the output of up."""

    def __init__(self, look):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)
        self.act_fn, self.look = nn.ReLU(), look

    def forward(self, x):
        return self.look(self, self.act_fn(self.gate_proj(x)), self.up_proj(x))


@pytest.mark.parametrize("look", [
    lambda mlp, gate, up: mlp.down_proj(gate * up),
    lambda mlp, gate, up: mlp.down_proj(up * gate),
    lambda mlp, gate, up: mlp.down_proj(gate * up + 1),
    lambda mlp, gate, up: mlp.down_proj((gate * up) * 2),
    lambda mlp, gate, up: mlp.down_proj(gate * up.clamp(-0.5, 0.5)),
    lambda mlp, gate, up: mlp.down_proj(gate * up) + up.sum(),
    lambda mlp, gate, up: mlp.down_proj(up * up),
    lambda mlp, gate, up: mlp.down_proj(up),
    lambda mlp, gate, up: mlp.down_proj(up.mul_(gate)),
    lambda mlp, gate, up: mlp.down_proj(torch.stack([gate, up]).prod(0)),
    lambda mlp, gate, up: up.view(-1, 40)[:, :24] + float(up.reshape(-1)[0]),
])  # fmt: skip
def test_whoever_looks_at_the_output_gets_its_values(look):
    torch.manual_seed(0)
    mlp = Looks(look).eval().requires_grad_(False)
    x = torch.randn(2, 24)
    expected = mlp(x)
    deadband.sparsify_(nn.ModuleList([mlp]), exact=True)
    assert mlp.up_proj.by_output
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
    assert type(mlp.up_proj(x)) is PendingOutput
    assert type(mlp(x)) is torch.Tensor
    assert torch.equal(copy.deepcopy(mlp.up_proj(x)), mlp.up_proj(x).computed())


def test_gradients_are_those_of_the_dense_layer():
    torch.manual_seed(0)
    mlp = Looks(lambda mlp, gate, up: mlp.down_proj(gate * up)).eval()
    x = torch.randn(3, 24, requires_grad=True)
    expected = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    deadband.sparsify_(nn.ModuleList([mlp]), exact=True)
    found = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_hooks_on_the_layers_see_plain_values():
    torch.manual_seed(0)
    mlp = Looks(lambda mlp, gate, up: mlp.down_proj(gate * up)).eval().requires_grad_(False)
    deadband.sparsify_(nn.ModuleList([mlp]), exact=True)
    seen = []
    mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    mlp(torch.randn(1, 24))
    assert seen == [torch.Tensor]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_prepared(weights):
    model = deadband.sparsify_(relu_model(), exact=True, weights=weights)
    expected = model.generate(TOKENS[:, :6], max_new_tokens=8, do_sample=False)
    deadband.sparsity(model, reset=True)
    prepared = prepare_decode_(model)
    assert torch.equal(prepared.generate(TOKENS[:, :6], max_new_tokens=8, do_sample=False), expected)
    assert decode_report(prepared).problem is None
    assert decode_report(prepared).graph > 0
    sites = deadband.sparsity(prepared).sites
    assert all(0.2 < sites[name] < 0.8 for name in ups(prepared))


def test_activations_that_close():
    assert closes(nn.ReLU())
    assert closes(lambda x: nn.functional.relu(x) ** 2)
    assert not any(map(closes, (nn.SiLU(), nn.GELU(), nn.Identity(), lambda x: 1 / 0 if x.dim() > 5 else x)))
