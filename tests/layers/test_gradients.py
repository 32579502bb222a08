"""The gradients of sparse layers against those of float64, entry by entry of what they compute."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, ISAS, instruction_set
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deadband.layers.formats import FORMATS
from deadband.layers.quantized import make_quantized_
from deadband.layers.rounding import quantize
from deadband.layers.rule import Rule
from deadband.layers.sites import find_sites
from deadband.layers.sparse import make_sparse_, use_dense_product_
from deadband.ops import gradients, products
from deadband.sparsify.sparsify import densify_, sparsify_

WHAT = ("x", "weight", "bias")


def random_rule(inputs, scaled, centered, relative, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Rule(
        0.7 / inputs**0.5 if relative else 0.6,
        scale=torch.rand(inputs, generator=generator) + 0.5 if scaled else None,
        center=torch.randn(inputs, generator=generator).bfloat16().float() if centered else None,
        relative=relative,
    )


def exact(rule, x, weight, bias, upstream, fills, gradient="exact"):
    """Output and gradients in float64."""
    x, weight, bias = (each.detach().double().clone().requires_grad_() for each in (x, weight, bias))
    kept = x
    if fills:
        center = torch.zeros(x.shape[-1]).double() if rule.center is None else rule.center.double()
        kept = torch.where(rule.keep(x.detach().float()), x, center)
        if gradient == "straight_through":
            kept = x + (kept - x).detach()
    y = F.linear(kept, weight, bias)
    return y.detach(), torch.autograd.grad(y, (x, weight, bias), upstream.double())


def close(actual, expected, dtype):
    """Within a rounding to dtype, and some of float32, of the largest entry, or of terms that cancel, about 1."""
    assert actual.dtype is dtype
    largest = max(expected.abs().max().item() if expected.numel() else 0.0, 1.0)
    allowed = largest * (2 * torch.finfo(dtype).eps + 30 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=allowed)


@pytest.fixture(params=[False, True], ids=["onednn", "without onednn"])
def slow(request, monkeypatch):
    """As on a CPU whose bfloat16 oneDNN does not multiply."""
    if request.param:
        monkeypatch.setattr(products, "WITHOUT_ONEDNN", {torch.bfloat16, torch.float16})


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 4, 5, 8, 9, 17, 40]),
    inputs=st.sampled_from([1, 3, 33, 64, 130]),
    outputs=st.sampled_from([1, 5, 64, 97]),
    dtype=st.sampled_from(DTYPES),
    form=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    wanted=st.sets(st.sampled_from(WHAT), min_size=1),
    training=st.booleans(),
    gradient=st.sampled_from(gradients.GRADIENTS),
    strided=st.booleans(),
    without=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_gradients_match_float64(
    isa, rows, inputs, outputs, dtype, form, wanted, training, gradient, strided, without, seed
):
    torch.manual_seed(seed)
    rule = random_rule(inputs, *form, seed=seed)
    layer = make_sparse_(nn.Linear(inputs, outputs).to(dtype), rule, gradient=gradient).train(training)
    x = torch.randn(2, inputs, rows).to(dtype).mT if strided else torch.randn(2, rows, inputs).to(dtype)
    near = rule.keep(x.float() * 1.001) != rule.keep(x.float() * 0.999)
    x = torch.where(near, x * 3, x).requires_grad_("x" in wanted)  # no rounding of a norm decides what is kept
    if strided:
        x = x.detach().mT.contiguous().mT.requires_grad_("x" in wanted)
    layer.weight.requires_grad_("weight" in wanted), layer.bias.requires_grad_("bias" in wanted)
    upstream = torch.randn(2, rows, outputs).to(dtype)
    fills = training or 2 * rows <= 4
    expected, derivatives = exact(rule, x, layer.weight, layer.bias, upstream, fills, gradient)
    before = products.WITHOUT_ONEDNN
    products.WITHOUT_ONEDNN = {torch.bfloat16} if without else before
    try:
        with instruction_set(isa):
            y = layer(x)
            y.backward(upstream)
    finally:
        products.WITHOUT_ONEDNN = before
    close(y, expected, dtype)
    for name, each, derivative in zip(WHAT, (x, layer.weight, layer.bias), derivatives, strict=True):
        assert (each.grad is not None) == (name in wanted)
        if name in wanted:
            close(each.grad, derivative, dtype)
            assert name != "weight" or each.grad.t().is_contiguous()  # as the weight, or torch would copy it


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("rows", "training"), [(2, False), (2, True), (9, False), (9, True)])
def test_gradients_through_quantised_weights(form, dtype, rows, training, slow, monkeypatch):
    monkeypatch.setattr(products, "ENTRIES", 70 * 40)  # several parts of the weight, the last one smaller
    torch.manual_seed(rows)
    layer = nn.Linear(100, 70).to(dtype)
    make_quantized_(layer, quantize(layer.weight.detach(), form))
    rule = random_rule(100, True, True, False)
    make_sparse_(layer, rule).train(training)
    x = torch.randn(rows, 100).to(dtype).requires_grad_()
    upstream = torch.randn(rows, 70).to(dtype)
    weight = layer.matrix(torch.float32)
    expected, (of_x, _, of_bias) = exact(rule, x, weight, layer.bias, upstream, training or rows <= 4)
    y = layer(x)
    y.backward(upstream)
    tolerance = (4e-3 if dtype is torch.float32 else 2e-2) * expected.abs().max().item()
    rounded = 2e-2 * expected.abs().max().item() if form.startswith("int4") else tolerance  # x, to 8 bits
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=rounded)
    torch.testing.assert_close(x.grad.double(), of_x, rtol=0, atol=tolerance)
    close(layer.bias.grad, of_bias, dtype)


@pytest.mark.parametrize("gradient", gradients.GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_derivatives(gradient, dtype, slow):
    torch.manual_seed(0)
    rule = random_rule(12, True, True, False)
    layer = make_sparse_(nn.Linear(12, 7).to(dtype), rule, gradient=gradient).train()
    x = torch.randn(5, 12, dtype=dtype, requires_grad=True)

    def penalty(y, *of):
        first = torch.autograd.grad(y.square().sum(), of, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), of)

    found = penalty(layer(x), x, layer.weight, layer.bias)
    twins = [each.detach().double().clone().requires_grad_() for each in (x, layer.weight, layer.bias)]
    kept = torch.where(rule.keep(x.detach().float()), twins[0], rule.center.double())
    if gradient == "straight_through":
        kept = twins[0] + (kept - twins[0]).detach()
    for actual, expected in zip(found, penalty(F.linear(kept, *twins[1:]), *twins), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-3)


def test_graphs_that_are_kept_and_freed():
    layer = make_sparse_(nn.Linear(12, 7), Rule(0.5)).train()
    x = torch.randn(5, 12, requires_grad=True)
    y = layer(x).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype, rows):
    layer = make_sparse_(nn.Linear(6, 4).to(dtype), Rule(0.5)).train()
    x = torch.full((rows, 6), 2.0, dtype=dtype)
    x[:, 1], x[0, 3] = 0.1, math.nan
    x.requires_grad_()
    y = layer(x)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()
    upstream = torch.ones_like(y)
    upstream[2, 0] = math.inf
    y.backward(upstream)
    assert (x.grad[:, 1] == 0).all()  # skipped, whatever comes back
    assert not x.grad[2, 0].isfinite()
    assert x.grad[1].isfinite().all()
    assert layer.weight.grad[1:, 3].isnan().all()
    assert (layer.weight.grad[1:, 1] == 0).all()


def test_what_is_kept_for_backward_is_what_a_dense_layer_keeps():
    layer = make_sparse_(nn.Linear(64, 32), Rule(0.5)).train()
    x = torch.randn(9, 64, requires_grad=True)

    def kept():
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: found.append(each) or each, lambda each: each):
            layer(x * 1)
        return [each for each in found if each.shape == x.shape and each.is_floating_point()]

    assert len(kept()) == 1
    layer.weight.requires_grad_(False)
    assert not kept()
    hidden = x * 1  # which may be written to then
    y = layer(hidden)
    hidden.zero_()
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(x.detach().abs() > 0.5, layer.weight.sum(0), 0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", [None, "int8"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, form, training):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    sparsify_(model, {"0": 0.4, "2": 0.1}, weights=form).train(training)
    x = torch.randn(3, 16, requires_grad=True)
    found = []
    for run in (model, lambda each: checkpoint(model, each, use_reentrant=reentrant)):
        model.zero_grad()
        found.append((*torch.autograd.grad(run(x).square().sum(), x, retain_graph=True),) if not reentrant else ())
        x.grad = None
        run(x).square().sum().backward()
        found[-1] += (x.grad, *(each.grad for each in model.parameters()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", [None, "int8"])
def test_compiled_with_gradients(form, training):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    sparsify_(model, {"0": random_rule(16, True, True, False), "2": 0.1}, weights=form).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (3, 9):
        x = torch.randn(rows, 16, requires_grad=True)
        found = []
        for run in (model, compiled):
            model.zero_grad()
            x.grad = None
            run(x).square().sum().backward()
            found.append((x.grad, *(each.grad for each in model.parameters())))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, rows, training, slow):
    torch.manual_seed(0)
    rule = Rule(0.5)
    layer = make_sparse_(nn.Linear(40, 30), rule).train(training)
    x = torch.randn(rows, 40, requires_grad=True)
    upstream = torch.randn(rows, 30)
    expected, derivatives = exact(rule, x, layer.weight, layer.bias, upstream, training or rows <= 4)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        again = nn.functional.relu(layer(x.to(dtype)))
    assert y.dtype is again.dtype is dtype
    y.backward(upstream.to(dtype))
    for actual, wanted in zip((y, x.grad, layer.weight.grad, layer.bias.grad), (expected, *derivatives), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=0.02 * wanted.abs().max().item())
    with torch.no_grad(), torch.autocast("cpu", dtype):
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_product_trains(dtype, rows, slow):
    torch.manual_seed(rows)
    layer = nn.Linear(40, 30).to(dtype)
    reference = copy.deepcopy(layer)
    use_dense_product_(layer)
    x = torch.randn(rows, 40).to(dtype).requires_grad_()
    upstream = torch.randn(rows, 30).to(dtype)
    expected, derivatives = exact(Rule(-1.0), x, reference.weight, reference.bias, upstream, False)
    y = layer(x)
    y.backward(upstream)
    close(y, expected, dtype)
    for each, derivative in zip((x, layer.weight, layer.bias), derivatives, strict=True):
        close(each.grad, derivative, dtype)
    assert layer.weight.grad.is_contiguous()


def test_layers_without_a_kernel_keep_the_usual_strides():
    layer = make_sparse_(nn.Linear(40, 30).half(), Rule(0.5)).eval()
    assert layer.weight.is_contiguous()
    x = torch.randn(3, 40).half()
    with torch.no_grad():
        expected = F.linear(torch.where(x.abs() > 0.5, x, 0), layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)
        for dtype in (torch.float32, torch.bfloat16):
            assert layer.to(dtype).weight.t().is_contiguous()
        assert layer.half().weight.is_contiguous()
        assert layer.double().weight.is_contiguous()


@pytest.mark.parametrize("form", [None, "int8"])
def test_adapters_of_peft_train_as_on_the_dense_model(form):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = tiny_model("llama")
    sparse = sparsify_(copy.deepcopy(model), dict.fromkeys(find_sites(model), 0.0), weights=form)
    if form:
        model = copy.deepcopy(sparse)
        with pytest.warns(UserWarning, match="dequantised"):
            densify_(model)
    batch = tiny_batches(1)[0]
    losses, found = [], []
    for each in (model, sparse):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(each, config).train()
        loss = adapted(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(loss.detach())
        found.append([p.grad for name, p in adapted.named_parameters() if "lora" in name])
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * one.abs().max().item())
