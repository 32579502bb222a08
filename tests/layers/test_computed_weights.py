"""What computes a weight, or keeps something that was computed from one, never lies."""

import copy
import pickle
import warnings

import pytest
import torch
from conftest import tiny_batches, tiny_model
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import deadband
from deadband.layers.computed import ComputedWeight
from deadband.layers.quantized import QuantizedTable
from deadband.layers.sites import find_sites, sparse_sites
from deadband.layers.sparse import CentredWeight, use_dense_product_
from deadband.sparsify.sparsify import sparsify_

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
CENTER = torch.linspace(-0.3, 0.3, 8)


def layer(weights=None, center=None, threshold=0.4, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    return sparsify_(model, {"0": deadband.Rule(threshold, center=center)}, weights=weights)


def expected_of(model, x=X):
    """What the layer has to compute, from what it shows of its weight."""
    site = model[0]
    weight = site.weight.clone() if isinstance(site.weight, ComputedWeight) else site.weight
    return F.linear(site.rule.apply(x), weight, site.bias)


def tolerance(weights):
    """Of rows of X times weights of the size of these; beside weights of 4 bits x has 8."""
    if not weights:
        return {}
    return {"atol": 0.1 if weights.startswith("int4") else 0.02, "rtol": 0.01}


# Quantised weights


def test_a_quantised_weight_reads_as_a_tensor():
    model = layer("int8")
    weight, plain = model[0].weight, model[0].compute()
    assert isinstance(weight, ComputedWeight)
    assert (weight.shape, weight.dtype, weight.device) == (plain.shape, plain.dtype, plain.device)
    assert (weight.stride(), weight.numel(), weight.requires_grad) == (plain.stride(), plain.numel(), False)
    for read in (
        lambda w: w.double(), lambda w: w @ X.T, lambda w: w.t().clone(), lambda w: w[1:3, ::2] + 0, lambda w: w[2] * 1,
        lambda w: w.unbind(0)[1].clone(), lambda w: w.to(torch.bfloat16), lambda w: w.sum(1), lambda w: F.linear(X, w),
        copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)), lambda w: torch.stack([w, w]), lambda w: w.view(-1) + 0,
        lambda w: torch.from_numpy(w.numpy().copy()), lambda w: torch.tensor(w.tolist()),
        lambda w: w.index_select(0, torch.tensor([5, 0])),
    ):  # fmt: skip
        assert type(read(weight)) is torch.Tensor
        assert torch.equal(read(model[0].weight), read(plain))
    assert str(weight) == str(plain)
    x = X.clone().requires_grad_()
    F.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, plain.sum(0).expand(3, 8))
    with pytest.raises(ValueError, match="read-only"):
        weight.numpy()[0, 0] = 1.0


WRITES = {
    "data +=": lambda w: setattr(w, "data", w.data.__iadd__(torch.full((6, 8), 0.3))),
    "data =": lambda w: setattr(w, "data", torch.full((6, 8), 0.25)),
    "copy_": lambda w: w.copy_(torch.linspace(-1, 1, 48).view(6, 8)),
    "mul_": lambda w: w.mul_(3),
    "item": lambda w: w.__setitem__((slice(None), 2), 5.0),
    "row": lambda w: w[0].fill_(4.0),
    "transposed": lambda w: w.t().add_(1),
    "flat": lambda w: w.view(-1)[3:20].neg_(),
    "parts": lambda w: w.unbind(0)[1].fill_(3),
    "out": lambda w: torch.add(torch.ones(6, 8), 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w.data], 2.0),
    "init": lambda w: nn.init.normal_(w),
    "set_": lambda w: w.set_(torch.full((6, 8), 0.5)),
}


@pytest.mark.parametrize("weights", ["int8", "int8-g32", "int4-g32", "int4"])
@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_is_quantised_again(what, weights):
    model = layer(weights, CENTER)
    site, expected = model[0], model[0].weight.clone()
    torch.manual_seed(1)
    with torch.no_grad():
        WRITES[what](expected)
    torch.manual_seed(1)
    with torch.no_grad(), pytest.warns(UserWarning, match="rounded to int.* again; .*densify_"):
        WRITES[what](site.weight)
    steps = 100 if weights.startswith("int8") else 6
    torch.testing.assert_close(site.weight.clone(), expected, rtol=0, atol=float(expected.abs().max()) / steps)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected_of(model), **tolerance(weights))
    assert site.weight_format == deadband.quantization.WeightFormat.parse(weights).__str__()


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(6, 8)), torch.ones(6, 8)])
def test_assigning_a_weight(value):
    model = layer("int8")
    with pytest.warns(UserWarning, match="rounded"):
        model[0].weight = value
    torch.testing.assert_close(model[0].weight.clone(), torch.ones(6, 8))
    assert "weight" not in dict(model[0].named_parameters())
    before = model[0].codes.clone()
    for wrong in (lambda: setattr(model[0], "weight", torch.ones(8, 6)), lambda: setattr(model[0].weight, "data", X)):
        with pytest.raises(ValueError, match=r"is \[6, 8\], got"):
            wrong()
    with pytest.raises(ValueError, match="NaN"):
        model[0].weight.data.fill_(torch.nan)
    assert torch.equal(model[0].codes, before)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_adapters_merge_as_into_the_dequantised_model(name):
    """What peft's merge does, layer by layer."""
    model = tiny_model(name)
    sparsify_(model, dict.fromkeys(find_sites(model), 0.0), weights="int8")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        dequantised = deadband.densify_(copy.deepcopy(model))
        layers = dict(dequantised.named_modules())
        for index, (site, module) in enumerate(sparse_sites(model).items()):
            delta = 0.1 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(index))
            module.weight.data += delta
            layers[site].weight.data += delta
        ids = tiny_batches(1)[0]["input_ids"]
        logits, expected = model(ids).logits, dequantised(ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("form", ["int8", "int8-g32", "int4"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_tied_table_shows_its_rows(name, form):
    model = tiny_model(name)
    sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights="int8", output_layer=form)
    table, ids = model.get_input_embeddings(), tiny_batches(1)[0]["input_ids"]
    assert isinstance(table, QuantizedTable)
    rows = model.get_output_embeddings().weight.clone()
    assert table.weight.device == ids.device
    for read in (
        lambda w: F.embedding(ids, w),
        lambda w: w[ids],
        lambda w: w[5],
        lambda w: w[-1] * 1,
        lambda w: w[3, 2],
    ):
        assert torch.equal(read(table.weight).clone(), read(rows))
    with torch.no_grad():
        assert torch.equal(model(ids.to(table.weight.device)).logits, model(ids).logits)


def test_looking_at_a_weight_computes_nothing(monkeypatch):
    model = tiny_model("llama")
    sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights="int8")
    monkeypatch.setattr(deadband.layers.quantized, "dequantize", None)
    for module in (model.get_input_embeddings(), *sparse_sites(model).values()):
        weight = module.weight
        assert (weight.device.type, weight.dtype, weight.dim()) == ("cpu", torch.float32, 2)
    assert model.get_input_embeddings().weight[7].clone().shape == (64,)  # one row is looked up
    with torch.no_grad():
        model(tiny_batches(1)[0]["input_ids"])


def test_what_transformers_says_of_quantised_models():
    dense, model = tiny_model("llama"), tiny_model("llama")
    sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights="int8")
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) < 1000
    assert model.get_memory_footprint() < dense.get_memory_footprint() / 2


# Centres


CHANGES = {
    "data +=": lambda w: setattr(w, "data", w.data.__iadd__(0.3)),
    "data.mul_": lambda w: w.data.mul_(2),
    "data[...] =": lambda w: w.data.__setitem__(0, 1.0),
    "data =": lambda w: setattr(w, "data", torch.randn(6, 8)),
    "in place": lambda w: torch.no_grad()(w.mul_)(3),
    "detached": lambda w: w.detach().add_(1),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_offset_follows_the_weight(what, compiled):
    torch.compiler.reset()
    model = layer(center=CENTER)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    weight = model[0].weight
    for change in (lambda w: None, CHANGES[what], CHANGES[what]):
        change(weight)
        with torch.no_grad():
            torch.testing.assert_close(run(X), expected_of(model))
    assert isinstance(weight, CentredWeight)
    assert type(deadband.densify_(model)[0].weight) is nn.Parameter
    torch.compiler.reset()


def test_an_alias_held_from_before_is_seen_too():
    model = layer(center=CENTER)
    alias = model[0].weight.data
    model(X)
    alias.add_(1)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected_of(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_offsets_of_copies_and_replaced_weights(copied):
    model = copied(layer(center=CENTER))
    for change in (
        lambda: CHANGES["in place"](model[0].weight),
        lambda: CHANGES["data +="](model[0].weight),
        lambda: setattr(model[0], "weight", nn.Parameter(torch.randn(6, 8))),
        lambda: model.load_state_dict(layer(center=CENTER * 2, seed=4).state_dict()),
        lambda: model.load_state_dict(layer(center=CENTER, seed=5).state_dict(), assign=True),
        lambda: model.double().float(),
    ):
        change()
        with torch.no_grad():
            torch.testing.assert_close(model(X), expected_of(model))


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_training_in_eval_mode_and_averages(optimiser):
    model = layer(center=CENTER)
    average = torch.optim.swa_utils.AveragedModel(model)
    steps = optimiser(model.parameters(), 0.1)
    for _ in range(3):
        steps.zero_grad()
        model(X).square().sum().backward()
        steps.step()
        average.update_parameters(model)
        with torch.no_grad():
            for each in (model, average.module.eval()):
                torch.testing.assert_close(each(X), expected_of(each))


# Parametrised and pruned layers


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("center", [None, CENTER])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parametrised_after_sparsify(name, center):
    model = layer(center=center)
    with torch.no_grad():
        before = model(X) - (model[0].bias if name == "weight" else 0)
        parametrize.register_parametrization(model[0], name, Half())
        torch.testing.assert_close(model(X), expected_of(model))
        assert not torch.allclose(model(X), before)
        CHANGES["in place"](getattr(model[0].parametrizations, name).original)
        torch.testing.assert_close(model(X), expected_of(model))
    for change in (deadband.densify_, lambda each: sparsify_(each, {"0": 0.1})):
        with pytest.raises(ValueError, match="parametri|site '0'"):
            change(model)
    parametrize.remove_parametrizations(model[0], name)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected_of(model))
    model.train()(X).sum().backward()


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_norms_of_weights(norm):
    model = layer(center=CENTER)
    norm(model[0])
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected_of(model))
    model(X).sum().backward()


def test_pruned_after_sparsify():
    model = layer(center=CENTER)
    prune.ln_structured(model[0], "weight", amount=0.5, n=2, dim=1)
    prune.random_unstructured(model[0], "bias", amount=0.5)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected_of(model))
    prune.remove(model[0], "weight"), prune.remove(model[0], "bias")
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected_of(model))
    assert float((model[0].weight == 0).float().mean()) == 0.5


# Inference mode and derivatives


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("center", [None, CENTER])
def test_made_sparse_under_inference_mode(weights, center):
    with torch.inference_mode():
        model = layer(weights, center)
        model(X)
    model = sparsify_(nn.Sequential(nn.Linear(8, 6)).eval(), {"0": 0.3})
    with torch.inference_mode():
        sparsify_(model, {"0": deadband.Rule(0.4, center=center)}, weights=weights)
        model(X)
    assert not any(each.is_inference() for each in (*model.parameters(), *model.buffers()))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    model.train()(x).sum().backward()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deadband.densify_(model)
    model(X).sum().backward()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "centred", "straight_through", "int8", "int8 centred", "dense product"])
def test_every_kind_of_derivative(kind, grad):
    if kind == "dense product":
        model = nn.Sequential(nn.Linear(8, 6)).eval()
        use_dense_product_(model[0])
        reference = nn.Sequential(nn.Linear(8, 6))
        reference.load_state_dict(model.state_dict())
    else:
        model = layer("int8" if "int8" in kind else None, CENTER if "centred" in kind else None)
        rule, weight, bias = model[0].rule, model[0].weight.detach().clone(), model[0].bias.detach()
        if kind == "straight_through":
            model[0].gradient = kind

        def reference(x):
            return F.linear(
                rule.apply(x) if kind != "straight_through" else x + (rule.apply(x) - x).detach(), weight, bias
            )

    tangent = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))

    def dual(function):
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(X, tangent))))

    with torch.set_grad_enabled(grad):
        for derive in (
            lambda f: jvp(f, (X,), (tangent,)),
            dual,
            lambda f: vmap(f)(X[:, None]),
            lambda f: jacrev(f)(X[0]),
            lambda f: jacfwd(f)(X[0]),
            lambda f: hessian(lambda x: f(x).square().sum())(X[0]),
        ):
            near = tolerance("int8" if "int8" in kind else None)
            torch.testing.assert_close(derive(model), derive(reference), **near)


def test_derivatives_by_parameters_and_ensembles():
    model = layer(center=CENTER)
    parameters = dict(model.named_parameters())
    tangents = {name: torch.randn_like(value) for name, value in parameters.items()}
    kept = model[0].rule.apply(X)
    with torch.no_grad():
        _, tangent = jvp(lambda each: functional_call(model, each, (X,)), (parameters,), (tangents,))
        torch.testing.assert_close(tangent, F.linear(kept, tangents["0.weight"], tangents["0.bias"]))
        twice = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}
        both = vmap(lambda each: functional_call(model, each, (X,)))(twice)
        torch.testing.assert_close(both[1], 2 * model(X))
        doubled = functional_call(model, {name: 2 * value for name, value in parameters.items()}, (X,))
        torch.testing.assert_close(doubled, 2 * model(X))


@pytest.mark.parametrize("made_in", [True, False])
@pytest.mark.parametrize("sparsified_in", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torchs_own_product_takes_the_weight_of_a_model_made_in_any_mode(made_in, sparsified_in, dtype):
    """As on a machine without kernels; torch 2.13 refuses data of another mode than the parameter's."""
    x = torch.randn(2, 6).to(dtype)
    with torch.inference_mode(made_in):
        model = nn.Sequential(nn.Linear(6, 4)).to(dtype)
        expected = F.linear(x, model[0].weight.detach().clone(), model[0].bias.detach().clone())
    with torch.inference_mode(sparsified_in):
        sparsify_(model, {"0": 0.0})
    for step in (lambda: None, lambda: deadband.densify_(model)):
        step()
        for used_in in (True, False):
            with torch.inference_mode(used_in), torch.no_grad():
                torch.testing.assert_close(F.linear(x, model[0].weight, model[0].bias), expected)
                torch.testing.assert_close(model(x), expected)
