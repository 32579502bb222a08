"""Fused experts of transformers as sites, against transformers' own code and against plain torch."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import pickle
import re
import sys
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, same_state, state_of, tiny_batches
from torch import nn
from torch.nn.utils import parametrize, prune

import deadband
from deadband.calibration.calibration import second_moments_of
from deadband.evaluation.methods import METHODS, Setup
from deadband.evaluation.speed import bytes_per_token, model_bytes
from deadband.layers import experts as module_under_test
from deadband.layers.experts import ExpertLinear, experts_of, module_at, path_of, projections_of, unknown_experts
from deadband.layers.formats import FORMATS, QuantizedWeight
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.rounding import quantize
from deadband.layers.rule import Rule
from deadband.layers.sites import find_sites, matrix_of, shape_of, sparse_sites, weight_bytes
from deadband.layers.sparse import LaidOutWeight
from deadband.ops import cpu
from deadband.ops.gradients import GRADIENTS
from deadband.quantization.hessians import input_hessians
from deadband.quantization.mixed_precision import choose_formats
from deadband.running.forward import threads
from deadband.sparsify import sparsify as sparsify_module
from deadband.sparsify.report import counting
from deadband.sparsify.scopes import dense, sparse_prefill
from deadband.sparsify.sparsify import densify_, sparsify_

pytest.importorskip("transformers.integrations.moe", reason="experts are modules of their own in older transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))
try:
    from architectures import _SPECIAL, tiny_config
finally:
    sys.path.pop(0)
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MORE = {"deepseek_v3": {"first_k_dense_replace": 1}, "longcat_flash": {"zero_expert_num": 4}}
ROUTED = [
    *("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe", "nemotron_h"),
    "longcat_flash",
]
KINDS = [*ROUTED, "llama4_text", "jetmoe"]
TRANSPOSED = ("gpt_oss", "llama4_text")
FEW = ["mixtral", "gpt_oss", "llama4_text", "jetmoe"]


@pytest.fixture(autouse=True)
def one_thread():
    """Models are tiny: more threads would wait for each other."""
    with threads(1):
        yield


@functools.cache
def _built(kind, **more):
    special = {**_SPECIAL.get(kind, {}), **MORE.get(kind, {}), **more}
    config = tiny_config(CONFIG_MAPPING[kind], **special)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    return model


def build(kind="mixtral", **more):
    """A tiny model with experts, the same each time."""
    return copy.deepcopy(_built(kind, **more))


def expert_sites(model):
    return {name: site for name, site in find_sites(model).items() if isinstance(site, ExpertLinear)}


def sparse(kind="mixtral", threshold=0.3, **options):
    model = build(kind)
    return sparsify_(model, dict.fromkeys(expert_sites(model), threshold), **options)


def tokens(rows=1, length=3, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens() if ids is None else ids, use_cache=False).logits


def close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * float(expected.abs().max()))


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


# ------------------------------------------------------------------------------------------ what plain torch computes


def call_of(kind, owner, count=3, seed=0):
    """Arguments for experts: so many tokens, of whom some share experts."""
    generator = torch.Generator().manual_seed(seed)
    projections = list(projections_of(owner).values())
    size, experts = shape_of(projections[0])[1], projections[-1].count
    x = torch.randn(count, size, generator=generator)
    if kind == "llama4_text":  # each expert is given each token, zero where it was not chosen
        chosen = torch.rand(experts, count, 1, generator=generator) < 0.5
        return ((x * chosen).reshape(-1, size),)
    if kind == "jetmoe":
        return x, torch.bincount(torch.randint(experts, (count,), generator=generator), minlength=experts).tolist()
    there = experts + (2 if kind == "longcat_flash" else 0)  # those behind the others give back what they get
    chosen = torch.stack([torch.randperm(there, generator=generator)[:2] for _ in range(count)])
    return x, chosen, torch.rand(count, 2, generator=generator)


def plain(kind, owner, call, skip, weights):
    """Experts in float64, one row at a time; `skip` changes the input of the projection of that name."""

    def project(name, expert, x):
        matrix = weights[name][expert]
        y = (matrix.mT if kind in TRANSPOSED else matrix) @ skip(name, x)
        return y + weights[f"{name}_bias"][expert] if f"{name}_bias" in weights else y

    def one(expert, x):
        if kind == "llama4_text" and not x.any():
            return torch.zeros_like(x)  # not chosen
        if kind == "jetmoe":
            return project("weight", expert, x)
        if kind == "nemotron_h":
            return project("down_proj", expert, owner.act_fn(project("up_proj", expert, x)))
        both = project("gate_up_proj", expert, x)
        if kind == "gpt_oss":
            return project("down_proj", expert, owner._apply_gate(both))
        gate, up = both.chunk(2)
        return project("down_proj", expert, owner.act_fn(gate) * up)

    x = call[0] if call[0].requires_grad else call[0].double()
    if kind == "llama4_text":
        each = len(x) // len(weights["down_proj"])
        return torch.stack([one(row // each, entries) for row, entries in enumerate(x)])
    if kind == "jetmoe":
        owners = [expert for expert, size in enumerate(call[1]) for _ in range(size)]
        return torch.stack([one(expert, entries) for expert, entries in zip(owners, x, strict=True)])
    rows = []
    for entries, chosen, shares in zip(x, call[1].tolist(), call[2].double(), strict=True):
        results = [one(expert, entries) if expert < len(weights["down_proj"]) else entries for expert in chosen]
        rows.append(sum(share * result for share, result in zip(shares, results, strict=True)))
    return torch.stack(rows)


def weights_of(owner):
    return {name: each.detach().double() for name, each in owner.named_parameters(recurse=False)}


RULES = {
    "plain": lambda size: Rule(0.3),
    "scaled": lambda size: Rule(0.3, scale=torch.rand(size) + 0.5),
    "relative": lambda size: Rule(0.5 / size**0.5, relative=True),
    "centered": lambda size: Rule(0.3, center=torch.randn(size) * 0.2),
    "all": lambda size: Rule(0.5 / size**0.5, torch.rand(size) + 0.5, torch.randn(size) * 0.1, True),
}


def rules_of(sites, form="plain"):
    torch.manual_seed(3)
    return {name: RULES[form](shape_of(site)[1]) for name, site in sites.items()}


def skipping(rules, owner_name):
    return lambda name, x: rules[f"{owner_name}.{name}"].apply(x)


# ----------------------------------------------------------------------------------------------------- what are sites


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_sites_by_the_names_of_their_parameters(kind):
    model = build(kind)
    sites = expert_sites(model)
    parameters = dict(model.named_parameters())
    assert list(sites) == [name for name, each in parameters.items() if each.dim() == 3 and "conv" not in name]
    for name, site in sites.items():
        experts, *sizes = parameters[name].shape
        assert shape_of(site) == tuple(sizes[::-1] if kind in TRANSPOSED else sizes)
        assert matrix_of(site).shape == (experts, *shape_of(site))
        assert site.weight is parameters[name]
        assert module_at(model, name) is site
        assert (site.count, site.chosen) == (experts, 2)
        assert weight_bytes(site) == parameters[name].nbytes * 2 // experts
        assert path_of(model, name) == ".".join([*name.split(".")[:-1], "projections", name.split(".")[-1]])
    assert unknown_experts(model) == []


def test_patterns_and_ends_of_names_choose_projections():
    model = build()
    every = list(expert_sites(model))
    assert list(find_sites(model, include="experts.down_proj")) == every[1::2]
    assert list(find_sites(model, include="*.layers.0.*.gate_up_proj")) == every[:1]
    assert list(find_sites(model, include="re:.*experts.*")) == every
    assert not any("experts" in name for name in find_sites(model, exclude="*.experts.*"))
    sparsify_(model, {"layers.1.mlp.experts.down_proj": 0.2})
    assert list(sparse_sites(model)) == every[-1:]
    sparsify_(model, exact=True, include="experts.gate_up_proj")
    assert list(sparse_sites(model)) == every[::2]
    with pytest.raises(ValueError, match="ends several names"):
        sparsify_(model, {"experts.down_proj": 0.2})


class OtherExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x, expert):
        return x @ self.first[expert].T @ self.second[expert].T


def test_unknown_experts_are_named_and_stay_dense():
    model = build()
    model.model.layers[0].mlp.others = OtherExperts()
    name = f"{OtherExperts.__module__}.{OtherExperts.__qualname__}"
    assert unknown_experts(model) == [name]
    with pytest.warns(UserWarning, match=f"not known here stay dense: {re.escape(name)}"):
        assert not any("others" in site for site in find_sites(model))
    assert not projections_of(model.model.layers[0].mlp.others)
    assert len(dict(experts_of(model))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_how_many_experts_are_chosen_does_not_depend_on_who_looks_first(kind):
    model = build(kind)
    unknown_experts(model)
    assert {site.chosen for site in expert_sites(model).values()} == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_that_no_token_reached_are_named_once(kind):
    model = build(kind)
    seen = {name: set() for name in expert_sites(model)}

    def look(name):
        return lambda module, args: seen[name].update(args[1][args[1] >= 0].tolist())

    handles = [site.register_forward_pre_hook(look(name)) for name, site in expert_sites(model).items()]
    batch = {"input_ids": torch.tensor([[5]])}
    with pytest.warns(UserWarning, match="no token of these batches") as caught:
        deadband.calibrate(model, [batch], progress=False)
    for handle in handles:
        handle.remove()
    said = {}
    (warning,) = [each for each in caught if "no token" in str(each.message)]
    assert warning.filename == __file__
    for numbers, name in re.findall(r"([\d, ]+) of '([^']+)'", str(warning.message)):
        said[name] = set(map(int, numbers.split(",")))
    assert said == {
        name.rpartition(".")[0]: set(range(site.count)) - seen[name] for name, site in expert_sites(model).items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind == "mixtral":  # in which so many tokens reach all
            deadband.calibrate(model, tiny_batches(8), progress=False)
        deadband.calibrate(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)], progress=False)


@pytest.mark.parametrize("form", [None, "int8"])
def test_bytes_count_the_experts_that_a_token_is_sent_to(form):
    model = build()
    sites = expert_sites(model)
    held = {name: site.weight.nbytes for name, site in sites.items()}
    others = sum(each.nbytes for each in model.parameters()) - sum(held.values())
    calibration = deadband.calibrate(model, tiny_batches(), progress=False)
    assert {name: calibration.sites[name].weight_bytes for name in sites} == {
        name: size // 2 for name, size in held.items()
    }
    read = bytes_per_token(model)
    assert read == sum(held.values()) // 2 + others - model.get_input_embeddings().weight.nbytes
    sparsify_(model, dict.fromkeys(sites, 0.0), weights=form, output_layer=False)
    if form is None:
        assert (bytes_per_token(model), model_bytes(model)) == (read, sum(held.values()) + others)
        return
    codes = {name: site.codes.nbytes for name, site in sites.items()}
    assert codes == {name: size // 4 for name, size in held.items()}
    assert {name: weight_bytes(site) for name, site in sites.items()} == {
        name: size // 2 for name, size in codes.items()
    }
    scales = sum(site.scales.nbytes for site in sites.values())
    assert bytes_per_token(model) == read - sum(held.values()) // 2 + (sum(codes.values()) + scales) // 2


# --------------------------------------------------------------------------------------------- what a model computes


@pytest.mark.parametrize("kind", KINDS)
def test_watching_leaves_a_model_as_it_was(kind):
    model = build(kind)
    before, expected, kinds = state_of(model), logits(model), classes(model)
    calibration = deadband.calibrate(model, tiny_batches(), progress=False)
    assert set(expert_sites(model)) <= set(calibration.sites)
    assert same_state(model, before)
    assert classes(model) == kinds
    assert torch.equal(logits(model), expected)
    seen = []
    handles = [
        site.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
        for site in expert_sites(model).values()
    ]
    close(logits(model), expected)
    assert sorted(seen) == sorted(shape_of(site)[1] for site in expert_sites(model).values())
    assert model.state_dict().keys() == before.keys()
    for handle in handles:
        handle.remove()
        handle.remove()  # as a handle of torch, more than once
    assert classes(model) == kinds
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_sparsity_is_the_model_of_transformers(kind):
    model = build(kind)
    few, many = tokens(), tokens(2, 40)
    expected = [logits(model, ids) for ids in (few, many)]
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.0), output_layer=False)
    for ids, own in zip((few, many), expected, strict=True):
        close(logits(model, ids), own)
        with sparse_prefill(model):
            close(logits(model, ids), own)
        close(model(ids, use_cache=False).logits.detach(), own)  # with gradients


@pytest.mark.parametrize("kind", KINDS)
def test_exact_sparsity_in_bfloat16(kind):
    model = build(kind).to(torch.bfloat16)
    plan = []
    for _, owner in experts_of(model):
        for count in (1, 4, 9):
            x, *rest = call_of(kind, owner, count)
            x = x.bfloat16()
            with torch.no_grad():
                plan.append((owner, (x, *rest), owner(x, *rest)))
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.0))
    for owner, call, expected in plan:
        with torch.no_grad():
            y = owner(*call)
        assert y.dtype is expected.dtype
        close(y, expected, 0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", RULES)
def test_each_projection_skips_by_its_rule(kind, form):
    model = build(kind)
    rules = rules_of(expert_sites(model), form)
    plan = {name: (owner, weights_of(owner)) for name, owner in experts_of(model)}
    sparsify_(model, rules)
    for name, (owner, weights) in plan.items():
        for count in (1, 4, 9):
            call = call_of(kind, owner, count, seed=count)
            with torch.no_grad():
                masked = plain(kind, owner, call, skipping(rules, name), weights)
                whole = plain(kind, owner, call, lambda _, x: x, weights)
                assert (masked - whole).norm() > 0.01 * whole.norm()
                close(owner(*call), masked if count <= 4 else whole)
                with sparse_prefill(model):
                    close(owner(*call), masked)
                with dense(model):
                    close(owner(*call), whole)
            close(owner(*call).detach(), masked if count <= 4 else whole)  # with gradients


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("form", ["int8", "int4-g64-zp"])
def test_quantised_experts_compute_with_their_dequantised_weights(kind, form):
    model = build(kind)
    sites = expert_sites(model)
    before = {name: matrix_of(site).detach().clone() for name, site in sites.items()}
    rules = rules_of(sites, "all")
    sparsify_(model, rules, weights=form, output_layer=False)
    for name, site in sites.items():
        rounded = quantize(before[name], form)
        assert torch.equal(matrix_of(site), rounded.dequantize())
        assert site.quantized().equals(rounded)
        each = [quantize(one, form) for one in before[name]]
        assert all(torch.equal(rounded.codes[index], one.codes) for index, one in enumerate(each))
    for name, owner in experts_of(model):
        weights = {**weights_of(owner), **{own: getattr(owner, own).double() for own in projections_of(owner)}}
        for count in (1, 4):
            call = call_of(kind, owner, count, seed=count)
            with torch.no_grad(), cpu.exact_products():
                close(owner(*call), plain(kind, owner, call, skipping(rules, name), weights))
            with torch.no_grad():  # x is rounded
                y = owner(*call)
            x = call[0].clone().requires_grad_()
            with cpu.exact_products():
                owner(x, *call[1:]).square().sum().backward()
            exact = x.detach().double().requires_grad_()
            expected = plain(kind, owner, (exact, *call[1:]), skipping(rules, name), weights)
            expected.square().sum().backward()
            close(x.grad, exact.grad, 1e-3)
            assert (y - expected).norm() <= (0.06 if form.startswith("int4") else 5e-3) * expected.norm()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_at_every_projection(form):
    model = sparse(weights=form, threshold=0.4)
    for site in sparse_sites(model).values():
        assert site.weight_format == form
        x = torch.randn(5, shape_of(site)[1])
        chosen = torch.tensor([3, 0, -1, 3, 1])
        with torch.no_grad():
            y = site(x, chosen, 2)
        masked = torch.where(x.abs() > 0.4, x, 0).double()
        for row, expert in enumerate(chosen.tolist()):
            expected = masked[row] @ matrix_of(site)[expert].double().T if expert >= 0 else torch.zeros(y.shape[1])
            assert (y[row] - expected).norm() <= (0.03 if form.startswith("int4") else 2e-3) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_another_dtype_keeps_thresholds_and_finds_the_layout(dtype, form):
    model = build()
    sparsify_(model, rules_of(expert_sites(model), "all"), weights=form)
    before = {name: site.rule for name, site in sparse_sites(model).items()}
    strides = [each.stride() for each in model.parameters()]
    (_, owner), *_ = experts_of(model)
    x, *rest = call_of("mixtral", owner)
    with torch.no_grad():
        expected = owner(x, *rest)
        model.to(dtype)
        y = owner(x.to(dtype), *rest)
    assert y.dtype is dtype
    assert {name: site.rule for name, site in sparse_sites(model).items()} == before
    assert (y.float() - expected).norm() <= 0.06 * expected.norm()
    usual = dtype is not torch.bfloat16
    for _, owner in experts_of(model):
        for name, each in owner.named_parameters(recurse=False):
            assert each.is_contiguous() if usual else each.mT.is_contiguous(), name
    model.to(torch.float32)
    assert [each.stride() for each in model.parameters()] == strides
    assert {name: site.rule for name, site in sparse_sites(model).items()} == before


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("form", [None, "int8"])
def test_autocast(kind, form):
    model = build(kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model)
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.0), weights=form, output_layer=False)
    with torch.autocast("cpu", torch.bfloat16):
        close(logits(model), expected, 0.1)


@pytest.mark.parametrize("form", [None, "int4"])
def test_static_masks(form):
    model = build()
    sites = expert_sites(model)
    masks = {name: torch.rand(shape_of(site)[1]) < 0.6 for name, site in sites.items()}
    weights = {name: weights_of(owner) for name, owner in experts_of(model)}
    sparsify_(model, masks=masks, weights=form, output_layer=False)
    for name, owner in experts_of(model):
        own = weights[name] if form is None else {each: getattr(owner, each).double() for each in weights[name]}
        for count in (2, 9):
            call = call_of("mixtral", owner, count)
            with torch.no_grad(), cpu.exact_products():
                y = owner(*call)
            kept = {each: masks[f"{name}.{each}"] for each in own}
            close(y, plain("mixtral", owner, call, lambda each, x, kept=kept: torch.where(kept[each], x, 0), own))
    if form is None:
        assert torch.equal(logits(densify_(model)), logits(build()))


def test_what_was_written_to_weights_is_what_is_multiplied():
    model, other = build(), build()
    rules = rules_of(expert_sites(model), "centered")
    sparsify_(model, rules)
    logits(model)
    for each in (model, other):
        with torch.no_grad():
            for _, owner in experts_of(each):
                owner.down_proj.data.mul_(1.5)
                owner.gate_up_proj.mul_(0.5)
                owner.gate_up_proj[0] = 0
    close(logits(model), logits(sparsify_(other, rules)), 1e-6)
    source = build().state_dict()
    for assign in (False, True):
        missing, unexpected = model.load_state_dict(source, strict=False, assign=assign)
        assert not unexpected
        assert len(missing) == 2 * len(rules)  # thresholds and centers
        assert torch.equal(logits(model), logits(sparsify_(build(), rules)))
        assert all(each.mT.is_contiguous() for _, owner in experts_of(model) for each in owner.parameters())


def test_what_is_written_to_quantised_weights_is_rounded_again():
    model = sparse(weights="int8")
    owner = model.model.layers[0].mlp.experts
    before = owner.down_proj * 1
    assert torch.equal(owner.down_proj[-1] * 1, before[-1])
    with pytest.warns(UserWarning, match="rounded to int8 again"):
        owner.down_proj.data.mul_(2)
    torch.testing.assert_close(owner.down_proj * 1, 2 * before)


def test_a_new_weight_of_quantised_experts_is_quantised():
    model = sparse(weights="int8", output_layer="int8")
    owner = model.model.layers[0].mlp.experts
    before = owner.down_proj * 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)  # as a linear layer's is
        owner.down_proj = nn.Parameter(before * 2)
    torch.testing.assert_close(owner.down_proj * 1, 2 * before)


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("learning", [False, True])
def test_no_tokens(kind, learning):
    model = build(kind)
    (_, owner), *_ = experts_of(model)
    x, chosen, shares = call_of(kind, owner)
    assert owner(x[:0], chosen[:0], shares[:0]).shape == x[:0].shape  # as transformers has it
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.1))
    with torch.set_grad_enabled(learning):
        assert owner(x[:0], chosen[:0], shares[:0]).shape == x[:0].shape


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("learning", [False, True])
def test_entries_are_counted_for_each_expert_of_each_token(kind, learning):
    model = build(kind)
    rules = rules_of(expert_sites(model))
    sparsify_(model, rules)
    for name, owner in experts_of(model):
        for count in (1, 4):
            call = call_of(kind, owner, count)
            seen = {f"{name}.{projection}": [] for projection in projections_of(owner)}

            def skip(projection, entries, name=name, seen=seen):
                kept = rules[f"{name}.{projection}"].keep(entries.float())
                seen[f"{name}.{projection}"].append(~kept)
                return torch.where(kept, entries, 0)

            plain(kind, owner, call, skip, weights_of(owner))
            skipped = {projection: torch.cat(each) for projection, each in seen.items()}
            with torch.set_grad_enabled(learning), counting(model) as achieved:
                owner(*call)
            report = achieved()
            assert report.entries == sum(each.numel() for each in skipped.values())
            for projection, each in skipped.items():
                assert report.sites[projection] == pytest.approx(float(each.float().mean()), abs=2 / each.numel())


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("form", [None, "int8"])
def test_blocks_of_dense_and_sparse_prefill(kind, form):
    model = build(kind)
    original = logits(model, tokens(2, 20))
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.5), weights=form, output_layer=False)
    few, many = tokens(), tokens(2, 20)
    sparse_few, dense_many = logits(model, few), logits(model, many)
    expected_entries = deadband.sparsity(model, reset=True).entries
    assert expected_entries > 0
    with dense(model):
        dense_few = logits(model, few)
        assert torch.equal(logits(model, many), dense_many)
    assert deadband.sparsity(model).entries == 0
    if form is None:
        close(dense_many, original)
    assert not torch.allclose(dense_few, sparse_few, atol=1e-2)
    with sparse_prefill(model):
        assert not torch.allclose(logits(model, many), dense_many, atol=1e-2)
        assert torch.equal(logits(model, few), sparse_few)
    report = deadband.sparsity(model, reset=True)
    assert all(0 < value < 1 for value in report.sites.values())
    assert report.sites.keys() == set(expert_sites(model))
    with dense(model), torch.no_grad():
        torch.testing.assert_close(logits(model, few), dense_few)


# ------------------------------------------------------------------------------------------------ making, and undoing


@pytest.mark.parametrize("kind", KINDS)
def test_densify_to_the_bit(kind):
    model = build(kind)
    before, kinds, expected = state_of(model), classes(model), logits(model)
    sparsify_(model, rules_of(expert_sites(model), "all"))
    for name, owner in experts_of(model):
        assert type(owner) is not kinds[name]
        assert isinstance(owner, kinds[name])
        for own in projections_of(owner):
            assert (type(owner.get_parameter(own)) is LaidOutWeight or kind in TRANSPOSED) or "CentredWeight"
            assert matrix_of(projections_of(owner)[own]).mT.is_contiguous()
        assert not any(each.is_meta for each in owner.state_dict().values())
    densify_(model)
    assert same_state(model, before)
    assert classes(model) == kinds
    assert torch.equal(logits(model), expected)
    assert all(type(each) is nn.Parameter for each in model.parameters())


def test_projections_that_become_dense_again_one_by_one():
    model = build()
    before, kinds = state_of(model), classes(model)
    names = list(expert_sites(model))
    sparsify_(model, dict.fromkeys(names, 0.3))
    sparsify_(model, {names[0]: 0.3})
    assert list(sparse_sites(model)) == names[:1]
    assert classes(model)["model.layers.1.mlp.experts"] is kinds["model.layers.1.mlp.experts"]
    assert model.model.layers[0].mlp.experts.down_proj.is_contiguous()
    other = sparsify_(build(), {names[0]: 0.3})
    assert torch.equal(logits(model), logits(other))
    densify_(model)
    assert same_state(model, before)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_densify_dequantises(form):
    model = sparse(weights=form, output_layer=False)
    expected = {name: site.quantized().dequantize() for name, site in sparse_sites(model).items()}
    kinds = classes(build())
    with pytest.warns(UserWarning, match="dequantised 4 layers"):
        densify_(model)
    assert classes(model) == kinds
    assert model.state_dict().keys() == build().state_dict().keys()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in expected.items())
    assert all(parameters[name].is_contiguous() for name in expected)


@pytest.mark.parametrize("form", [None, "int8"])
@pytest.mark.parametrize("how", ["threshold", "in the middle"])
def test_a_failed_sparsify_leaves_the_model_as_it_was(form, how, monkeypatch):
    for model in (build(), sparse(weights=form)):
        names = list(expert_sites(model))
        before, kinds, expected = state_of(model), classes(model), logits(model)
        thresholds = {**dict.fromkeys(names, 0.1), names[-1]: float("nan") if how == "threshold" else 0.1}
        if how != "threshold":
            monkeypatch.setattr(sparsify_module, "_tell", lambda *_: 1 / 0)
        with pytest.raises((ValueError, ZeroDivisionError)):
            sparsify_(model, thresholds, weights=form)
        monkeypatch.undo()
        assert same_state(model, before)
        assert classes(model) == kinds
        assert torch.equal(logits(model), expected)
        sparsify_(model, dict.fromkeys(names, 0.1), weights=form)  # as if nothing had been


def in_threads(work, count=2):
    failed = []

    def caught():
        try:
            work()
        except Exception as error:
            failed.append(error)

    workers = [threading.Thread(target=caught) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed, failed


def test_threads_that_calibrate_at_the_same_time():
    model = build()
    kinds = classes(model)
    expected = deadband.calibrate(model, tiny_batches(), progress=False)
    found, barrier = [], threading.Barrier(3)

    def work():
        barrier.wait()
        found.append(deadband.calibrate(model, tiny_batches(), progress=False))

    in_threads(work, 3)
    assert len(found) == 3
    for each in found:
        for name, site in expected.sites.items():
            assert (each.sites[name].histogram == site.histogram).all()
    assert classes(model) == kinds


def test_threads_that_find_experts_at_the_same_time(monkeypatch):
    owner = build().model.layers[0].mlp.experts
    probe, barrier, found = module_under_test._activation_of, threading.Barrier(2), []

    def slow(module):  # both threads come as far as here, unless one waits for the other
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(timeout=1)
        return probe(module)

    monkeypatch.setattr(module_under_test, "_activation_of", slow)
    in_threads(lambda: found.append(projections_of(owner)))
    assert all(one is other for one, other in zip(found[0].values(), found[1].values(), strict=True))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", FEW)
def test_copies_of_a_dense_model_that_was_watched(how, kind):
    model = build(kind)
    deadband.calibrate(model, tiny_batches(), progress=False)
    other = COPIES[how](model)
    expected = logits(model)
    assert torch.equal(logits(other), expected)
    sparsify_(other, dict.fromkeys(expert_sites(other), 0.3))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(other), logits(sparse(kind)))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("form", [None, "int4", "centered"])
def test_copies_of_a_sparse_model(how, kind, form):
    model = build(kind)
    rules = rules_of(expert_sites(model), "centered" if form == "centered" else "plain")
    sparsify_(model, rules, weights=form if form != "centered" else None, output_layer=False)
    expected = logits(model)
    other = COPIES[how](model)
    assert [each.stride() for each in other.parameters()] == [each.stride() for each in model.parameters()]
    assert classes(other) == classes(model)
    for one, two in zip(sparse_sites(model).values(), sparse_sites(other).values(), strict=True):
        assert two.owner is not one.owner
        assert (two.offset is None) == (one.offset is None)
    with torch.no_grad():
        for each in (*model.parameters(), *(site.threshold for site in sparse_sites(model).values())):
            each.zero_()
    assert torch.equal(logits(other), expected)
    if form is None:
        assert torch.equal(logits(densify_(other)), logits(build(kind)))


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("form", ["plain", "all"])
def test_gradients_are_those_of_masked_inputs(kind, gradient, form):
    model = build(kind)
    rules = rules_of(expert_sites(model), form)
    sparsify_(model, rules, gradient=gradient).train()
    for name, owner in experts_of(model):
        call = call_of(kind, owner, 9)
        x = call[0].clone().requires_grad_()
        weights = {own: each.requires_grad_() for own, each in weights_of(owner).items()}
        exact = call[0].double().requires_grad_()

        def skip(projection, entries, name=name):
            masked = rules[f"{name}.{projection}"].keep(entries.detach().float())
            center = rules[f"{name}.{projection}"].center
            kept = torch.where(masked, entries, 0 if center is None else center.double())
            return entries + (kept - entries).detach() if gradient == "straight_through" else kept

        expected = plain(kind, owner, (exact, *call[1:]), skip, weights)
        upstream = torch.randn(expected.shape)
        y = owner(x, *call[1:])
        close(y.detach(), expected.detach())
        y.backward(upstream)
        expected.backward(upstream.double())
        close(x.grad, exact.grad, 1e-4)
        for own, weight in weights.items():
            close(owner.get_parameter(own).grad, torch.zeros_like(weight) if weight.grad is None else weight.grad, 1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_training_step_moves_experts_and_router(kind):
    model = sparse(kind, threshold=0.1).train()
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    ids = tokens(2, 12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimiser.step()
    moved = {name for name, each in model.named_parameters() if not torch.equal(each, before[name])}
    assert {name for name in before if "experts" in name or "router" in name or "gate" in name} <= moved
    assert all(matrix_of(site).mT.is_contiguous() for site in sparse_sites(model).values())
    assert deadband.sparsity(model).entries == 0  # training is not counted


# -------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_saved_and_loaded(kind, form, tmp_path):
    model = build(kind)
    sparsify_(model, rules_of(expert_sites(model), "all"), weights=form)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert classes(loaded) == classes(model)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert {name: site.rule for name, site in sparse_sites(loaded).items()} == {
        name: site.rule for name, site in sparse_sites(model).items()
    }
    assert [each.stride() for each in loaded.parameters()] == [each.stride() for each in model.parameters()]
    assert loaded.num_parameters() == model.num_parameters() == build(kind).num_parameters()
    if form is None:
        assert torch.equal(logits(densify_(loaded)), logits(build(kind)))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])  # whose checkpoints hold each expert by itself, or not
def test_parts_of_experts_that_are_quantised_shards_and_base_models(kind, tmp_path):
    model = build(kind)
    names = list(expert_sites(model))
    sparsify_(model, dict.fromkeys(names[:3], 0.3), weights={names[1]: "int8", names[2]: "int4"}, output_layer=False)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert list(sparse_sites(loaded)) == names[:3]
    base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(tokens(), use_cache=False)[0], model.model(tokens(), use_cache=False)[0])
    loaded.save_pretrained(tmp_path)  # over the files that its codes are mapped from
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert torch.equal(logits(loaded), logits(model))


def present(tensor):
    """Which whole pages of a tensor this process has in memory."""
    page = os.sysconf("SC_PAGESIZE")
    first, last = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * first)
        return torch.frombuffer(bytearray(file.read(8 * (last - first))), dtype=torch.int64) < 0  # the highest bit


@pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="no page map")
def test_experts_that_nobody_chooses_are_not_read_from_the_file(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1}  # 2 and 4 MB for each expert
    config = tiny_config(CONFIG_MAPPING["mixtral"], **sizes, num_local_experts=6, num_experts=6)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.0), weights="int8", output_layer=False)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    owner, other = loaded.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts
    sites = projections_of(owner).values()
    before = [[present(codes) for codes in site.codes] for site in sites]
    assert (
        max(float(pages.float().mean()) for codes in before for pages in codes) < 0.6
    )  # beside scales that were checked
    call = torch.randn(2, 1024), torch.tensor([[0, 1], [1, 0]]), torch.rand(2, 2)
    with torch.no_grad():
        assert torch.equal(owner(*call), other(*call))
    for site, seen in zip(sites, before, strict=True):
        come = [int((present(codes) & ~pages).sum()) for codes, pages in zip(site.codes, seen, strict=True)]
        assert min(come[:2]) > 0
        assert come[3:] == [0, 0, 0]  # of the third, Linux may bring what lies beside the second


# ------------------------------------------------------------------------------------- calibration and what follows it


@pytest.mark.parametrize("method", ["uniform", "greedy", "sensitivity", "auto"])
@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
def test_allocated_budgets_are_met(kind, method):
    model, batches = build(kind), tiny_batches()
    kinds, before = classes(model), state_of(model)
    calibration = deadband.calibrate(model, batches, progress=False)
    thresholds = calibration.allocate(0.4, method, model=model, batches=batches, progress=False, tokens=64)
    assert classes(model) == kinds
    assert same_state(model, before)
    sparsify_(model, thresholds)
    with sparse_prefill(model):
        for batch in batches:
            logits(model, batch["input_ids"])
    report = deadband.sparsity(model, warn=False)
    assert report.total == pytest.approx(0.4, abs=0.02)
    assert not report.drifted
    for name in expert_sites(model):
        assert report.sites[name] == pytest.approx(report.expected[name], abs=0.02)


def test_evaluate():
    model = build("qwen3_moe")
    batches = tiny_batches()
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.0))
    same = deadband.evaluate(model, batches, progress=False)
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.4))
    other = deadband.evaluate(model, batches, progress=False)
    assert abs(same.kl) < 1e-5
    assert other.kl > 1e-3
    assert 0.05 < other.sparsity < 0.9


def test_budgets_of_mixtures_with_experts_that_do_nothing():
    model, batches = build("longcat_flash"), tiny_batches()
    calibration = deadband.calibrate(model, batches, progress=False)
    sparsify_(model, calibration.allocate(0.5, "uniform", model=model, batches=batches, progress=False))
    with sparse_prefill(model):
        for batch in batches:
            logits(model, batch["input_ids"])
    report = deadband.sparsity(model, warn=False)
    for name in expert_sites(model):
        assert report.sites[name] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"])
def test_padding_of_batches_whose_tokens_have_one_expert(kind):
    """It is left out, or, where that is not known, counts; but no token is taken for padding."""
    model = build(kind, num_experts_per_tok=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[0].mul_(100)  # what padding looks up
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.int64)
    ids[0, 5:], mask[0, 5:] = 0, 0
    padded = {"input_ids": ids, "attention_mask": mask}
    (name, site), *_ = expert_sites(model).items()
    seen = []
    handle = site.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**padded, use_cache=False)
    handle.remove()
    found = []
    for batches in ([padded], [ids[:1, :5], ids[1:]]):
        statistics = deadband.calibrate(model, batches, include=name, progress=False).sites[name]
        found.append((int(statistics.rows.max()), float(statistics.sum_of_squares.sum())))
    everything = 16, float(seen[0].double().square().sum())
    assert found[0] == pytest.approx(found[1], rel=1e-5) or found[0] == pytest.approx(everything, rel=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_second_moments_and_hessians_make_better_codes(kind):
    model, batches = build(kind), tiny_batches(6)
    sites = expert_sites(model)
    calibration = deadband.calibrate(model, batches, progress=False)
    inputs = {name: [] for name in sites}
    handles = [
        site.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append((args[0], args[1])))
        for name, site in sites.items()
    ]
    for batch in batches:
        logits(model, batch["input_ids"])
    for handle in handles:
        handle.remove()
    hessians = dict(input_hessians(model, batches, list(sites), progress=False))
    for name in sites:
        rows = torch.cat([x for x, _ in inputs[name]]).double()
        torch.testing.assert_close(hessians[name].double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
        moments = second_moments_of(calibration)[name].double()
        torch.testing.assert_close(moments, rows.square().mean(0), rtol=1e-4, atol=1e-6)

    def error(**options):
        other = build(kind)
        sparsify_(other, dict.fromkeys(sites, 0.0), weights="int4", output_layer=False, **options)
        total = 0.0
        for name, site in sparse_sites(other).items():
            change = matrix_of(site).double() - matrix_of(sites[name]).detach().double()
            products = [torch.einsum("ri,roi->ro", x.double(), change[chosen]) for x, chosen in inputs[name]]
            total += sum(float(each.square().sum()) for each in products)
        return total

    alike = error()
    assert error(second_moments=second_moments_of(calibration)) < alike
    assert error(hessians=hessians) < 0.9 * alike
    assert error(hessians=input_hessians(model, batches, list(sites), progress=False)) < 0.9 * alike


def test_given_codes_and_formats_of_single_projections():
    model = build()
    names = list(expert_sites(model))
    own = quantize(matrix_of(expert_sites(model)[names[0]]).detach(), "int8-g32")
    sparsify_(model, dict.fromkeys(names, 0.2), weights={names[0]: own, names[3]: "int4"}, output_layer=False)
    kinds = [isinstance(site, QuantizedMatrix) for site in sparse_sites(model).values()]
    assert kinds == [True, False, False, True]
    assert sparse_sites(model)[names[0]].quantized().equals(own)
    flat = QuantizedWeight(own.codes[0], own.scales[0], None, own.format)
    with pytest.raises(ValueError, match=r"got \[224, 64\], expected \[4, 224, 64\]"):
        sparsify_(build(), dict.fromkeys(names, 0.2), weights={names[0]: flat})


def test_formats_are_chosen_and_the_model_stays_as_it_is():
    model = build()
    before = state_of(model)
    chosen = choose_formats(model, tiny_batches(2), 1e-3, include="re:.*experts.*")
    assert chosen
    assert set(chosen) <= set(expert_sites(model))
    assert same_state(model, before)


def test_weighted_magnitude():
    model, batches = build(), tiny_batches()
    calibration = deadband.calibrate(model, batches, criterion="weighted_magnitude", progress=False)
    sparsify_(model, calibration.allocate(0.4, "uniform", model=model, batches=batches, progress=False))
    for name in expert_sites(model):
        site = module_at(model, name)
        norms = matrix_of(site).detach().norm(dim=1)  # of the columns of each expert
        torch.testing.assert_close(site.scale, norms.square().mean(0).sqrt())
    with sparse_prefill(model):
        for batch in batches:
            logits(model, batch["input_ids"])
    assert deadband.sparsity(model).total == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("method", ["teal-uniform", "top-k", "wina", "wina-threshold", "wina-orthogonal", "larosa"])
def test_published_methods(method):
    model, batches = build("qwen3_moe"), tiny_batches(2)
    before, expected = state_of(model), logits(model)
    (made,) = METHODS[method].fit(Setup(model, batches, progress=False), [0.3])
    assert same_state(model, before)
    if hasattr(made, "on"):
        with made.on(model):
            assert not torch.allclose(logits(model), expected, atol=1e-2)
        assert made.sparsity.total == pytest.approx(0.3, abs=0.05)
        assert torch.equal(logits(model), expected)
    else:
        assert set(expert_sites(model)) <= set(made)


def test_methods_that_say_nothing_of_experts():
    setup = Setup(build("qwen3_moe"), tiny_batches(2), progress=False)
    for method in ("cats", "r-sparse"):
        assert METHODS[method].fit(setup, [0.3]) == [None]


# ------------------------------------------------------------------------------------------------ other people's code


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("form", RULES)
def test_a_sparse_projection_that_is_parametrised(form):
    model, other = build(), build()
    rules = rules_of(expert_sites(model), form)
    sparsify_(model, rules)
    for each in (model, other):
        for _, owner in experts_of(each):
            parametrize.register_parametrization(owner, "down_proj", Doubled())
            if each is other:
                parametrize.remove_parametrizations(owner, "down_proj")
    close(logits(model), logits(sparsify_(other, rules)))
    for _, owner in experts_of(model):
        parametrize.remove_parametrizations(owner, "down_proj")
    close(logits(model), logits(other))


class Scaled(nn.Module):
    """Each weight that it makes lies where the one before lay, as may happen to all that is computed for a call."""

    def __init__(self):
        super().__init__()
        self.by, self.memory = 2.0, {}

    def forward(self, weight):
        entries = weight.detach().numpy()
        memory = self.memory.setdefault(weight.shape, np.empty_like(entries))
        return torch.from_numpy(np.multiply(entries, np.float32(self.by), out=memory))


def test_what_a_weight_is_computed_from_may_change():
    model = build()
    rules = rules_of(expert_sites(model), "centered")
    name, owner = next(experts_of(model))
    call, weights, scaled = call_of("mixtral", owner), weights_of(owner), Scaled()
    sparsify_(model, rules)
    parametrize.register_parametrization(owner, "down_proj", scaled)
    with torch.no_grad():
        for factor in (2, -3, 1):
            scaled.by = factor
            own = {**weights, "down_proj": factor * weights["down_proj"]}
            close(owner(*call), plain("mixtral", owner, call, skipping(rules, name), own))


def test_pruned_experts():
    model, other = build(), build()
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.3))
    for each in (model, other):
        for _, owner in experts_of(each):
            prune.l1_unstructured(owner, "down_proj", 0.5)
            if each is other:
                prune.remove(owner, "down_proj")
    close(logits(model), logits(sparsify_(other, dict.fromkeys(expert_sites(other), 0.3))))
    for _, owner in experts_of(model):
        prune.remove(owner, "down_proj")
    close(logits(model), logits(other))
    assert torch.equal(logits(densify_(model)), logits(densify_(other)))


def test_parametrised_experts_are_no_sites_until_that_is_undone():
    model = build()
    every = expert_sites(model)
    owner = model.model.layers[0].mlp.experts
    kind = type(owner)
    parametrize.register_parametrization(owner, "down_proj", Doubled())
    expected = logits(model)
    sparsify_(model, dict.fromkeys(expert_sites(model), 0.0))
    close(logits(model), expected)
    parametrize.remove_parametrizations(owner, "down_proj")
    close(logits(model), expected)
    densify_(model)
    assert type(owner) is kind
    assert expert_sites(model).keys() == every.keys()


@pytest.mark.parametrize("what", ["calibrate", "sparse"])
def test_adapters_of_expert_parameters(what):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = build() if what == "calibrate" else sparse()
    expected = logits(model)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    adapted = peft.get_peft_model(model, config)
    close(logits(adapted), expected)
    if what == "calibrate":
        deadband.calibrate(adapted, tiny_batches(1), progress=False)
        assert torch.equal(logits(adapted), expected)


def test_functional_call_takes_its_weights():
    model = sparse()
    given = {name: each.detach() * 1.1 for name, each in model.named_parameters()}
    with torch.no_grad():
        y = torch.func.functional_call(model, given, (tokens(),), {"use_cache": False}).logits
        for each in model.parameters():
            each.mul_(1.1)
    close(y, logits(model))


def test_what_print_shows():
    shown = str(sparse(weights="int8").model.layers[0].mlp)
    assert "(gate_up_proj): QuantizedSparseExpertLinear(experts=4, in_features=64, out_features=224" in shown
    assert "threshold=0.3" in shown
    assert "weights=int8" in shown
    model = build()
    assert str(next(iter(expert_sites(model).values()))) == "ExpertLinear(experts=4, in_features=64, out_features=224)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "form"), [("mixtral", None), ("gpt_oss", "int4"), ("llama4_text", None), ("longcat_flash", "int4")]
)
def test_compiled(kind, form):
    model = build(kind)
    sparsify_(model, rules_of(expert_sites(model), "all"), weights=form, output_layer=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in (tokens(), tokens(2, 20)):
        with cpu.exact_products():  # else a row's rounding depends on those that it is multiplied with
            deadband.sparsity(model, reset=True)
            expected, entries = logits(model, ids), deadband.sparsity(model, reset=True).entries
            close(logits(compiled, ids), expected, 1e-4)
            assert deadband.sparsity(model).entries == entries
            with sparse_prefill(model):
                expected = logits(model, ids)
                close(logits(compiled, ids), expected, 1e-4)
    if form is None and kind == "mixtral":
        model.train()
        ids, gradients = tokens(2, 12), []
        for run in (model, torch.compile(model, backend="aot_eager")):
            model.zero_grad()
            run(ids, labels=ids, use_cache=False).loss.backward()
            gradients.append({name: each.grad for name, each in model.named_parameters()})
        for name, each in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], each, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("mixtral", None), ("llama4_text", "int8"), ("longcat_flash", None)])
def test_prepared(kind, form):
    model = build(kind)
    sparsify_(model, rules_of(find_sites(model), "all"), weights=form)
    options = types.SimpleNamespace(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    generate = functools.partial(model.generate, tokens(1, 5), **vars(options))
    with torch.no_grad():
        expected, before = generate(), deadband.sparsity(model, reset=True, warn=False)
        deadband.prepare_decode_(model, tokens=3)
        deadband.sparsity(model, reset=True, warn=False)
        assert torch.equal(generate(), expected)
    after = deadband.sparsity(model, warn=False)
    assert deadband.decode_report(model).graph == 7
    assert after.entries == before.entries
    assert after.total == pytest.approx(before.total, abs=0.01)
