"""Rules with all their parts: what they keep, how layers with them compute, train, travel, compile and are saved."""

import copy
import io
import itertools
import json
import math
import pickle

import pytest
import torch
from conftest import mlp, tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import deadband
from deadband import Rule
from deadband.allocation.thresholds import Thresholds
from deadband.layers.sites import sparse_sites
from deadband.layers.sparse import SparseLinear, make_dense_, make_sparse_
from deadband.sparsify.config import config_of
from deadband.sparsify.sparsify import sparsify_

FORMS = list(itertools.product([False, True], repeat=3))  # scaled, centered, relative


def random_rule(features, scaled, centered, relative, seed=0, threshold=0.6):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(features, generator=generator) + 0.5 if scaled else None
    center = 0.5 * torch.randn(features, generator=generator) if centered else None
    return Rule(threshold * features**-0.5 if relative else threshold, scale, center, relative)


def scores64(rule, x):
    x = x.double()
    scores = (x if rule.center is None else x - rule.center.double()).abs()
    scores = scores if rule.scale is None else scores * rule.scale.double()
    limit = torch.full((*x.shape[:-1], 1), rule.threshold, dtype=torch.float64)
    return scores, limit * x.square().sum(-1, keepdim=True).sqrt() if rule.relative else limit


def apply64(rule, x):
    """What a rule makes of x, in float64, written out."""
    scores, limit = scores64(rule, x)
    keep = ~(scores <= limit) | ~limit.isfinite()
    return torch.where(keep, x.double(), 0.0 if rule.center is None else rule.center.double())


def away_from_ties(rule, x):
    """x, with entries moved whose score float32 could take for one on the other side of the limit."""
    for _ in range(5):
        scores, limit = scores64(rule, x)
        close = ((scores - limit).abs() <= 1e-4 * limit.abs()) & (limit > 0)
        if not close.any():
            break
        x = torch.where(close, x * 1.01 + 0.01, x)
    return x


# --------------------------------------------------------------------------------------------------------------- rules


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    shape=st.sampled_from([(16,), (1, 16), (3, 16), (2, 5, 16), (0, 16)]),
    threshold=st.sampled_from([0.0, 0.2, 0.7, 3.0]),
    seed=st.integers(0, 2**30),
)
def test_a_rule_is_its_float64_reference(form, shape, threshold, seed):
    rule = random_rule(16, *form, seed=seed, threshold=threshold)
    x = away_from_ties(rule, torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(rule.apply(x).double(), apply64(rule, x))
    scores, limit = scores64(rule, x)
    assert torch.equal(rule.keep(x), scores > limit)
    if x.numel():  # what calibration compares with the bare threshold is the same question
        compared = rule.compared(x).abs().float() * (1 if rule.scale is None else rule.scale)
        assert torch.equal(compared > rule.threshold, rule.keep(x))


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_not_finite_and_rows_of_zeros(form):
    rule = random_rule(6, *form)
    x = torch.randn(5, 6)
    x[0, 2], x[1, 3], x[2, 4], x[3] = math.nan, math.inf, -math.inf, 0.0
    keep = rule.keep(x)
    assert keep[0, 2]
    assert keep[1, 3]
    assert keep[2, 4]
    if rule.relative:  # their norm says nothing: everything is kept
        assert keep[:3].all()
    applied = rule.apply(x)
    assert torch.equal(applied.isnan(), x.isnan())
    assert torch.equal(applied.isinf(), x.isinf())
    assert torch.equal(keep[3:], scores64(rule, x[3:])[0] > scores64(rule, x[3:])[1])
    if not rule.center is not None:
        assert not keep[3].any()


def test_entries_on_the_limit_are_skipped():
    x = torch.tensor([3.0, -4.0, 0.0, 0.0])
    assert Rule(3.0).apply(x).tolist() == [0, -4, 0, 0]
    assert Rule(0.5, relative=True).apply(torch.tensor([1.0, 1.0, 1.0, 1.0])).tolist() == [0] * 4  # 0.5 of a norm of 2
    assert Rule(6.0, scale=torch.tensor([2.0, 1.0, 1.0, 1.0])).keep(x).tolist() == [False] * 4
    assert Rule(1.0, center=torch.full((4,), 2.0)).apply(x).tolist() == [2, -4, 0, 0]


def test_rules_compare_by_value():
    scale = torch.ones(3)
    assert Rule(0.5, scale) == Rule(0.5, scale.clone())
    assert hash(Rule(0.5, scale)) == hash(Rule(0.5, scale.clone()))
    assert Rule(0.5, scale) != Rule(0.5, center=scale)
    assert Rule(0.5, scale) != Rule(0.5, 2 * scale)
    assert Rule(0.5, scale) != Rule(0.5, torch.ones(4))
    assert Rule(0.5) != Rule(0.5, relative=True)
    assert Rule(0.5) != 0.5
    assert str(Rule(0.5, scale, scale, True)).split() == ["0.5", "x‖x‖", "scaled", "centered"]


# -------------------------------------------------------------------------------------------------------------- layers


def forward64(model, rules, x):
    """An MLP with rules, written out in float64."""
    x = x.double()
    for index, module in enumerate(model):
        if not isinstance(module, nn.Linear):
            x = module(x)
            continue
        x = apply64(rules[str(index)], x) if str(index) in rules else x
        x = F.linear(x, module.weight.detach().double(), module.bias.detach().double())
    return x


def ruled_mlp(form, dtype=torch.float32, **options):
    rules = {"0": random_rule(16, *form, seed=1), "2": random_rule(40, *form, seed=2, threshold=0.2)}
    return sparsify_(mlp(dtype), rules, **options), rules


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_decoding_prefill_and_training_agree(form, rows):
    model, rules = ruled_mlp(form)
    x = away_from_ties(rules["0"], torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)))
    expected = forward64(model, rules, x)
    with torch.no_grad():
        decoded = model(x)
        with deadband.sparse_prefill(model):
            prefilled = model(torch.cat([x] * 9))[:rows]  # beyond the kernel's eight rows
    trained = copy.deepcopy(model).train()(x)
    with_gradient = model(x.clone().requires_grad_())
    for actual in (decoded, prefilled, trained, with_gradient):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    with deadband.dense(model), torch.no_grad():
        torch.testing.assert_close(model(x), mlp()(x))


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_agrees_to_its_rounding(form):
    model, rules = ruled_mlp(form, torch.bfloat16)
    x = away_from_ties(rules["0"], torch.randn(3, 16)).bfloat16()
    with torch.no_grad():
        decoded = sparsify_(mlp(torch.bfloat16), {"0": rules["0"]})(x)
    expected = forward64(mlp(torch.bfloat16), {"0": rules["0"]}, x)
    torch.testing.assert_close(decoded.double(), expected, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
@pytest.mark.parametrize("form", [form for form in FORMS if form[1]])
def test_gradients_with_centers(form, gradient):
    rule = random_rule(8, *form)
    layer = make_sparse_(nn.Linear(8, 5).double(), rule, gradient=gradient).train()
    x = away_from_ties(rule, torch.randn(6, 8)).double().requires_grad_()
    keep, weight, bias = rule.keep(x.detach()), layer.weight, layer.bias
    if gradient == "exact":  # what the layer computes is what is differentiated; no entry is near its limit
        inputs = (x, *(each.detach().as_subclass(torch.Tensor).clone().requires_grad_() for each in (weight, bias)))
        assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, x),
                                        inputs)  # fmt: skip
    upstream = torch.randn(6, 5, dtype=torch.float64)
    found = torch.autograd.grad(layer(x), [x, weight, bias], upstream)
    through = upstream @ weight.detach()
    assert torch.equal(found[0], torch.where(keep, through, 0) if gradient == "exact" else through)
    torch.testing.assert_close(found[1], upstream.T @ apply64(rule, x.detach()))
    torch.testing.assert_close(found[2], upstream.sum(0))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(0.1, scale=torch.ones(15)), r"site '0': its scale has to be 16 finite values.* shape \(15,\)"),
        (Rule(0.1, scale=-torch.ones(16)), "its scale has to be 16 finite values, not negative"),
        (Rule(0.1, scale=torch.full((16,), math.nan)), "its scale"),
        (Rule(0.1, center=torch.full((16,), math.inf)), "its center"),
        (Rule(0.1, center=torch.ones(1)), "its center"),
        (Rule(0.1, center=torch.ones(1, 16)), "its center"),
        (Rule(-0.1, relative=True), "threshold -0.1 has to be finite and not negative"),
        (Rule(math.nan), "threshold nan"),
        (Rule(math.inf), "threshold inf"),
    ],
)
@pytest.mark.parametrize("was_sparse", [False, True])
def test_bad_rules_leave_the_model(rule, message, was_sparse):
    model = mlp()
    if was_sparse:
        sparsify_(model, {"0": random_rule(16, True, True, True)})
    types = [type(module) for module in model]
    before = {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match=message):
        sparsify_(model, {"2": 0.1, "0": rule})
    after = model.state_dict(keep_vars=True)
    assert [type(module) for module in model] == types
    assert after.keys() == before.keys()
    assert all(id(after[key]) == one and torch.equal(after[key], value) for key, (one, value) in before.items())


def test_the_model_keeps_its_own_copy_of_a_rule():
    scale, center = torch.ones(16), torch.zeros(16)
    model = sparsify_(mlp(), {"0": Rule(0.5, scale, center, True)})
    scale.zero_(), center.fill_(9.0)
    assert model[0].rule == Rule(0.5, torch.ones(16), torch.zeros(16), True)
    assert "threshold=0.5, relative, scaled, centered" in repr(model[0])
    weighted = sparsify_(mlp(), {"0": Rule(0.5)}, criterion="weighted_magnitude")[0]  # a rule without a scale gets one
    torch.testing.assert_close(weighted.scale, weighted.weight.norm(dim=0))


def test_masks_and_centers_together():
    rule, keep = random_rule(16, True, True, True), torch.arange(16) % 3 != 0
    model = sparsify_(mlp(), {"0": rule}, masks={"0": keep})
    assert (model[0].center[~keep] == 0).all()
    x = away_from_ties(rule, torch.randn(3, 16))
    masked = torch.where(keep, x, 0)
    in_force = Rule(rule.threshold, rule.scale, torch.where(keep, rule.center, 0), True)
    expected = forward64(model, {"0": in_force}, away_from_ties(in_force, masked))
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)
        with deadband.sparse_prefill(model):
            many = model(torch.cat([x] * 5))[:3].double()
        torch.testing.assert_close(many, expected, rtol=1e-4, atol=1e-5)
    x[0, 0] = math.nan  # at a masked place
    with torch.no_grad():
        assert model(x).isfinite().all()
    assert deadband.sparsity(model).nonfinite["0"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_densify_is_bit_for_bit(dtype):
    model, reference = mlp(dtype), mlp(dtype)
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    sparsify_(model, {"0": random_rule(16, True, True, True), "2": random_rule(40, False, True, False)})
    deadband.densify_(model)
    state = model.state_dict(keep_vars=True)
    assert {name: id(value) for name, value in state.items()} == identities
    assert all(torch.equal(state[name], value) for name, value in reference.state_dict().items())
    assert all(state[name].stride() == value.stride() for name, value in reference.state_dict().items())
    plain = nn.Linear(3, 2)
    back = make_dense_(make_sparse_(nn.Linear(3, 2), Rule(0.5, torch.ones(3), torch.ones(3), True)))
    assert back.__dict__.keys() == plain.__dict__.keys()
    assert not back._buffers


# ------------------------------------------------------------------------------------------------- offset of the center


def fresh(layer):
    return layer.matrix_view(layer.weight.detach()).float() @ layer.center


@pytest.mark.parametrize("assign", [False, True])
def test_the_offset_follows_a_state_dict(assign):
    model, rules = ruled_mlp((True, True, True))
    assert "0.offset" not in model.state_dict()
    torch.manual_seed(5)
    state = {key: torch.rand_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    for index in (0, 2):
        assert torch.equal(model[index].offset, fresh(model[index]))
        torch.testing.assert_close(model[index].offset, state[f"{index}.weight"] @ state[f"{index}.center"])
        assert model[index].weight.t().is_contiguous()
    rules = {name: module.rule for name, module in sparse_sites(model).items()}
    x = away_from_ties(rules["0"], torch.randn(2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), forward64(model, rules, x), rtol=1e-4, atol=1e-4)


def test_the_offset_follows_dtypes_training_and_copies():
    model, _ = ruled_mlp((True, True, False))
    layer = model[0]
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        for name in ("threshold", "scale", "center", "offset"):
            assert getattr(layer, name).dtype == torch.float32
        assert torch.equal(layer.offset, fresh(layer))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(6, 16)).square().sum().backward()
    optimizer.step()
    model.eval()
    x = torch.randn(2, 16)
    with torch.no_grad():
        model(x)
    assert torch.equal(layer.offset, fresh(layer))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other[0].offset, layer.offset)
        assert other[0].offset is not layer.offset
        assert other[0].rule == layer.rule
        with torch.no_grad():
            assert torch.equal(other(x), model(x))


def test_layers_on_the_meta_device_wait_with_the_offset():
    with torch.device("meta"):
        layer = nn.Linear(4, 3)
    make_sparse_(layer, Rule(0.5, center=torch.ones(4, device="meta")))
    assert layer.offset is None
    layer.train().eval()
    state = {"weight": torch.randn(3, 4), "bias": torch.zeros(3), "threshold": torch.tensor(0.5)}
    layer.load_state_dict({**state, "center": torch.ones(4)}, assign=True)
    torch.testing.assert_close(layer.offset, state["weight"].sum(1))


# -------------------------------------------------------------------------------------------------- compile and export


@pytest.mark.parametrize("form", [(False, True, True), (True, True, False), (True, False, True)])
def test_compile_and_export(form):
    torch._dynamo.reset()  # what other tests compiled counts towards its limit of recompilations
    model, rules = ruled_mlp(form)
    x = away_from_ties(rules["0"], torch.randn(3, 16))
    with torch.no_grad():
        expected = model(x)
        deadband.sparsity(model, reset=True)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        assert deadband.sparsity(model).entries == 3 * (16 + 40)
    program = torch.export.export(model, (x,))
    assert sum("sparse_linear" in str(node.target) for node in program.graph.nodes) == 2
    torch.testing.assert_close(program.module()(x), expected)
    training = torch.compile(copy.deepcopy(model).train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(training(x), expected, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- saving


def calibrated(name, dtype=torch.float32):
    """A model with every part in its rules, and some of its sites without some of them."""
    model, batches = tiny_model(name, dtype), tiny_batches(8, rows=4)
    passes = {"model": model, "batches": batches, "progress": False}
    calibration = deadband.calibrate(model, batches, progress=False, criterion="weighted_magnitude")
    fitted = calibration.allocate(0.5, "uniform", relative=True, center=True, **passes)
    rules = dict(fitted.rules)
    for index, site in enumerate(list(rules)):
        rule = rules[site]
        rules[site] = [rule, Rule(rule.threshold, None, rule.center, True), Rule(0.1, rule.scale), Rule(0.1)][index % 4]
    return model, fitted, rules, batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_save_pretrained_brings_everything_back(name, dtype, tmp_path):
    model, fitted, rules, batches = calibrated(name, dtype)
    for thresholds in (fitted, rules):
        sparsify_(model, thresholds)
        model.save_pretrained(tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
        for site, module in sparse_sites(model).items():
            other = loaded.get_submodule(site)
            assert type(other) is type(module)
            assert other.rule == module.rule
            assert (other.site_range, math.isnan(other.expected)) == (module.site_range, math.isnan(module.expected))
            assert other.offset is None or torch.equal(other.offset, module.offset)
            assert other.counts.shape == (3,)
        one = {"input_ids": batches[0]["input_ids"][:1, :1]}
        with torch.no_grad():
            assert torch.equal(model(**one).logits, loaded(**one).logits)
            for prefill in (deadband.sparse_prefill, deadband.dense):
                with prefill(model), prefill(loaded):
                    assert torch.equal(model(**batches[0]).logits, loaded(**batches[0]).logits)
        again = tmp_path / "again"
        loaded.save_pretrained(again)
        assert (
            json.loads((again / "config.json").read_text())["quantization_config"]
            == json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        )
    assert all(site.range is None for site in config_of(model).sites.values())  # rules of one's own have none


def test_the_range_is_in_config_json_and_judges_a_loaded_model(tmp_path):
    model, fitted, _, batches = calibrated("llama")
    sparsify_(model, fitted).save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {name: tuple(site["range"]) for name, site in written["sites"].items()} == fitted.site_range
    assert {name: site["expected"] for name, site in written["sites"].items()} == fitted.expected
    assert len(fitted.site_range) == 14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad(), deadband.sparse_prefill(loaded):
        loaded(**batches[0])
        assert not deadband.sparsity(loaded, reset=True).drifted
        loaded(torch.full((3, 32), 7))
    with pytest.warns(deadband.DriftWarning, match="left the calibrated range"):
        deadband.sparsity(loaded)


@pytest.mark.parametrize("part", ["scale", "center", "threshold"])
def test_a_checkpoint_without_a_part_is_refused(part, tmp_path):
    model, fitted, _, _ = calibrated("llama")
    sparsify_(model, fitted).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{part}"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"has no model.layers.1.mlp.up_proj.{part}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_thresholds_save_and_load(tmp_path):
    model, fitted, rules, _ = calibrated("llama")
    fitted.save(tmp_path / "t")
    loaded = Thresholds.load(tmp_path / "t")
    assert loaded == fitted
    assert loaded.site_range == fitted.site_range
    assert str(loaded) == str(fitted)
    assert list(loaded) == list(fitted)
    sparsify_(model, loaded)
    site = "model.layers.0.mlp.up_proj"
    found, rule = model.get_submodule(site).rule, fitted.rules[site]
    assert found == Rule(torch.tensor(rule.threshold).item(), rule.scale, rule.center, True)


def test_damaged_files_of_thresholds(tmp_path):
    fitted = calibrated("llama")[1]
    fitted.save(tmp_path / "good")
    with safe_open(tmp_path / "good", "pt") as file:
        about = json.loads(file.metadata()["deadband.thresholds"])
    tensors = load_file(tmp_path / "good")
    site = next(iter(fitted))

    def refused(tensors, about, message="is not a file of thresholds"):
        text = about if isinstance(about, str) else json.dumps(about)
        save_file(tensors, tmp_path / "bad", {"deadband.thresholds": text})
        with pytest.raises(ValueError, match=message):
            Thresholds.load(tmp_path / "bad")

    refused({key: value for key, value in tensors.items() if key != f"{site}.center"}, about)
    refused({key: value for key, value in tensors.items() if key != f"{site}.scale"}, about)
    refused(tensors, {**about, "version": 1}, r"of version 2 \(found: 1\)")
    refused(tensors, {key: value for key, value in about.items() if key != "rules"})
    refused(tensors, {**about, "rules": {site: {"threshold": 0.1, "unknown": 1, "parts": []}}})
    refused(tensors, {**about, "rules": [1]})
    refused(tensors, {**about, "site_range": 3})
    refused(tensors, "[1]")
    refused(tensors, "{")
    save_file(tensors, tmp_path / "bad")
    with pytest.raises(ValueError, match="is not a file of thresholds"):
        Thresholds.load(tmp_path / "bad")
    data = (tmp_path / "good").read_bytes()
    for length in (0, 7, len(data) // 2, len(data) - 1):
        (tmp_path / "bad").write_bytes(data[:length])
        with pytest.raises(ValueError, match="is not a file of thresholds"):
            Thresholds.load(tmp_path / "bad")
    with pytest.raises(FileNotFoundError, match="there is no file .*expected a file of thresholds"):
        Thresholds.load(tmp_path / "missing")


def test_a_plain_linear_layer_is_its_twin():
    layer = sparsify_(nn.Sequential(nn.Linear(4, 3)), {"0": Rule(0.5, center=torch.ones(4))})[0]
    assert type(layer) is SparseLinear
    with torch.no_grad():  # every entry within 0.5 of its center: the output is the constant
        y = layer.eval()(torch.tensor([0.6, 1.4, 1.0, 0.5]))
        torch.testing.assert_close(y, layer.offset + layer.bias)
