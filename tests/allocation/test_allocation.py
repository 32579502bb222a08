import copy
import json
import math
import types

import numpy as np
import pytest
import torch
from conftest import mlp, sparse_model, tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import deadband
from deadband.allocation.auto import Judge, split
from deadband.allocation.budget import allocate_budgets
from deadband.allocation.fit import fit
from deadband.allocation.greedy import _Call, _greedy_path
from deadband.allocation.sensitivity import Curve, _lower_hull, measure_sensitivity, water_fill
from deadband.allocation.thresholds import Thresholds
from deadband.calibration.watcher import thresholding
from deadband.layers.experts import module_at
from deadband.layers.rule import Rule
from deadband.layers.sites import find_sites, sparse_sites, weight_bytes


def achieved(model, batches, thresholds):
    deadband.sparsify_(model, thresholds)
    with torch.no_grad(), deadband.sparse_prefill(model):
        for batch in batches:
            model(**batch)
    report = deadband.sparsity(model)
    deadband.densify_(model)
    return report


def test_uniform_gives_every_site_the_budget():
    model, batches = tiny_model("llama"), tiny_batches()
    calibration = deadband.calibrate(model, batches, progress=False)
    thresholds = calibration.allocate(0.4)
    assert set(thresholds.site_sparsity.values()) == {0.4}
    for name, rule in thresholds.items():
        assert calibration.sites[name].sparsity(rule.threshold) == pytest.approx(0.4, abs=0.005)
    assert not thresholds.corrected


@pytest.mark.parametrize("method", ["uniform", "greedy"])
@pytest.mark.parametrize("criterion", ["magnitude", "weighted_magnitude"])
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.7])
def test_corrected_budgets_are_met_on_the_data(method, criterion, budget):
    model, batches = tiny_model("qwen2"), tiny_batches(6)
    calibration = deadband.calibrate(model, batches, criterion=criterion, progress=False)
    thresholds = calibration.allocate(budget, method, model=model, batches=batches, progress=False)
    assert thresholds.corrected
    assert achieved(model, batches, thresholds).total == pytest.approx(budget, abs=0.01)
    total = sum(weight_bytes(module) for module in find_sites(model).values())
    given = sum(thresholds.site_sparsity[name] * weight_bytes(m) for name, m in find_sites(model).items())
    assert given / total == pytest.approx(budget, abs=1e-6)


def test_allocating_changes_nothing_in_the_model():
    model, batches = tiny_model("llama").train(), tiny_batches()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calibration = deadband.calibrate(model, batches, progress=False)
    calibration.allocate(0.4, "greedy", model=model, batches=batches, progress=False)
    assert model.training
    assert not sparse_sites(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks for module in model.modules())


def naive_algorithm_1(block, sites, x, calibration, step, budget):
    """TEAL's Algorithm 1 as the paper writes it: every candidate is tried at every step."""
    total = sum(calibration.sites[name].weight_bytes for name in sites)
    current = dict.fromkeys(sites, 0.0)
    dense = block(x)
    reached = 0.0
    while reached < budget - 1e-9:
        errors = {}
        for name in sites:
            tried = {**current, name: current[name] + step * total / calibration.sites[name].weight_bytes}
            rules = {each: Rule(calibration.sites[each].threshold(value)) for each, value in tried.items()}
            with thresholding(sites, rules):
                errors[name] = (block(x) - dense).norm().item()
        best = min(errors, key=errors.get)
        current[best] += step * total / calibration.sites[best].weight_bytes
        reached += step
    return current


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_algorithm_1(seed):
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)).eval()
    nn.init.normal_(block[2].weight, 0, 2.0)
    x = torch.randn(200, 24) * torch.linspace(0.1, 3, 24)
    calibration = deadband.calibrate(block, [x], progress=False)
    sites = {name: module for name, module in find_sites(block).items()}
    with torch.no_grad():
        path = _greedy_path(block, sites, [_Call((x,), {}, lambda y: y)], calibration, dict.fromkeys(sites), 0.02, 0.5)
        expected = naive_algorithm_1(block, sites, x, calibration, 0.02, 0.5)
    assert path[-1][0] == pytest.approx(0.5)
    difference = [abs(path[-1][1][name] - expected[name]) for name in sites]
    assert max(difference) < 0.061 + 1e-9  # of steps of 0.06 of a site: at most one taken elsewhere
    assert len(set(expected.values())) > 1


def test_greedy_spares_the_site_that_hurts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
        model[1].weight[:, 0] = 1.0  # only the first channel of the second site matters: the rest of it is free to skip
        model[0].weight[0] *= 100
    batches = [torch.randn(256, 32)]
    calibration = deadband.calibrate(model, batches, progress=False)
    thresholds = calibration.allocate(0.4, "greedy", model=model, batches=batches, progress=False)
    assert thresholds.site_sparsity["1"] > 0.7 > 0.1 > thresholds.site_sparsity["0"]


def test_blocks_that_change_their_input_in_place():
    class Block(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.inplace = nn.Linear(12, 12), nn.Linear(12, 12), inplace

        def forward(self, x):
            y = self.b(torch.tanh(self.a(x)))
            return x.add_(y) if self.inplace else x + y

    shares = []
    for inplace in (False, True):
        model = nn.Sequential(*[Block(inplace) for _ in range(2)]).eval()
        batches = [torch.randn(64, 12, generator=torch.Generator().manual_seed(1))]
        calibration = deadband.calibrate(model, [batches[0].clone()], progress=False)
        passes = {"model": model, "batches": [batches[0].clone()], "progress": False}
        shares.append(list(calibration.allocate(0.4, "greedy", **passes).site_sparsity.values())[:2])
    assert shares[0] == pytest.approx(shares[1])


def test_several_budgets_are_those_of_single_ones():
    model, batches = tiny_model("llama"), tiny_batches()
    calibration = deadband.calibrate(model, batches, progress=False)
    passes = {"model": model, "batches": batches, "progress": False}
    several = allocate_budgets(calibration, [0.2, 0.45], "greedy", **passes)
    single = calibration.allocate(0.45, "greedy", **passes)
    assert [each.sparsity for each in several] == [0.2, 0.45]
    assert np.allclose(list(several[1].site_sparsity.values()), list(single.site_sparsity.values()), atol=0.1)
    assert all(
        a <= b + 1e-9 for a, b in zip(several[0].site_sparsity.values(), several[1].site_sparsity.values(), strict=True)
    )


def test_zero_budget_and_natural_zeros():
    model = mlp()
    calibration = deadband.calibrate(model, [torch.randn(64, 16)], progress=False)
    assert {rule.threshold for rule in calibration.allocate(0.0).values()} == {0.0}
    assert calibration.allocate(0.3)["2"].threshold == 0.0  # ReLU alone skips more
    assert calibration.allocate(0.3)["0"].threshold > 0.0


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
def test_sparsity_out_of_range(sparsity):
    calibration = deadband.calibrate(mlp(), [torch.randn(4, 16)], progress=False)
    with pytest.raises(ValueError, match="out of range"):
        calibration.allocate(sparsity)


def test_bad_calls():
    calibration = deadband.calibrate(mlp(), [torch.randn(4, 16)], progress=False)
    with pytest.raises(
        ValueError, match="method 'best' is not known; expected one of 'auto', 'uniform', 'greedy', 'sensitivity'"
    ):
        calibration.allocate(0.4, "best")
    with pytest.raises(ValueError, match="pass model= and batches="):
        calibration.allocate(0.4, "greedy")
    for options in ({"step": 0}, {"step": -1}, {"tokens": 0}):
        with pytest.raises(ValueError, match="expected a step above 0"):
            calibration.allocate(0.4, **options)
    with pytest.raises(ValueError, match="go together"):
        calibration.allocate(0.4, model=mlp())
    with pytest.raises(ValueError, match="of another model"):
        calibration.allocate(0.4, model=tiny_model("llama"), batches=tiny_batches())
    model = sparse_model()
    with pytest.raises(ValueError, match="sparse already; densify_ it"):
        deadband.calibrate(model, tiny_batches(), progress=False).allocate(0.4, model=model, batches=tiny_batches())


def test_thresholds_are_a_mapping_that_saves_and_loads(tmp_path):
    calibration = deadband.calibrate(mlp(), [torch.randn(64, 16)], criterion="weighted_magnitude", progress=False)
    thresholds = calibration.allocate(0.4)
    assert list(thresholds) == ["0", "2", "4"]
    assert len(thresholds) == 3
    thresholds.save(tmp_path / "thresholds.json")
    assert Thresholds.load(tmp_path / "thresholds.json") == thresholds
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a file of thresholds"):
        Thresholds.load(tmp_path / "other.json")
    assert "40% of the weight bytes over 3 sites, uniform, weighted_magnitude" in str(thresholds)


def changed(about, path, value):
    *inner, last = path
    for key in inner:
        about = about[key]
    about[last] = value


LIES = {
    "a negative threshold": (("rules", "0", "threshold"), -1.0),
    "a threshold of text": (("rules", "0", "threshold"), "0.1"),
    "a threshold beyond all numbers": (("rules", "0", "threshold"), math.inf),
    "relative to a number": (("rules", "0", "relative"), 1),
    "parts of another kind": (("rules", "0", "parts"), ["weight"]),
    "a rule that says more": (("rules", "0", "more"), 1),
    "a site without a shape": (("shapes",), {}),
    "a shape of text": (("shapes", "0"), "ab"),
    "a shape of three": (("shapes", "0"), [40, 16, 1]),
    "other channels": (("shapes", "0"), [40, 15]),
    "a sparsity beyond one": (("sparsity",), 1.5),
    "a sparsity of text": (("sparsity",), "0.4"),
    "shares of text": (("site_sparsity", "0"), "half"),
    "shares of other sites": (("site_sparsity",), {"1": 0.4}),
    "harm of other sites": (("harm",), {"1": 0.4}),
    "a range of one number": (("site_range",), {"0": [0.1]}),
    "samples of text": (("samples", "0"), ["a"]),
    "a method that is a list": (("method",), ["uniform"]),
    "an unknown field": (("more",), 1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_holds_no_thresholds(lie, tmp_path):
    path = tmp_path / "thresholds.safetensors"
    calibration = deadband.calibrate(mlp(), [torch.randn(64, 16)], criterion="weighted_magnitude", progress=False)
    calibration.allocate(0.4, "uniform", model=mlp(), batches=[torch.randn(64, 16)], progress=False).save(path)
    Thresholds.load(path)
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["deadband.thresholds"])
    changed(about, *LIES[lie])
    save_file(tensors, path, {"deadband.thresholds": json.dumps(about)})
    with pytest.raises(ValueError, match="is not a file of thresholds of version"):
        Thresholds.load(path)


@pytest.mark.parametrize(
    "scale", [torch.ones(15), torch.ones(16, dtype=torch.float64), torch.full((16,), math.nan), torch.ones(4, 4)]
)
def test_scales_that_do_not_fit_are_refused(scale, tmp_path):
    path = tmp_path / "thresholds.safetensors"
    calibration = deadband.calibrate(mlp(), [torch.randn(64, 16)], criterion="weighted_magnitude", progress=False)
    calibration.allocate(0.4, "uniform", model=mlp(), batches=[torch.randn(64, 16)], progress=False).save(path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, "0.scale": scale}, path, metadata)
    with pytest.raises(ValueError, match="is not a file of thresholds of version"):
        Thresholds.load(path)


# ------------------------------------------------------------------------------------------------ fitting rules to data


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("method", ["uniform", "greedy", "sensitivity"])
def test_every_form_of_rule_meets_its_budget(method, relative, center):
    model, batches = tiny_model("llama"), tiny_batches(6)
    calibration = deadband.calibrate(model, batches, progress=False)
    passes = {"model": model, "batches": batches, "progress": False}
    thresholds = calibration.allocate(0.5, method, relative=relative, center=center, **passes)
    assert {rule.relative for rule in thresholds.rules.values()} == {relative}
    assert {rule.center is not None for rule in thresholds.rules.values()} == {center}
    report = achieved(model, batches, thresholds)
    assert report.total == pytest.approx(0.5, abs=0.01)
    for name, value in report.sites.items():
        assert value == pytest.approx(thresholds.site_sparsity[name], abs=0.03)
        assert value == pytest.approx(report.expected[name], abs=0.02)
    assert not report.drifted


def test_centers_are_the_means_of_what_is_skipped():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.tensor([[1.0, 5.0, 0.0], [3.0, 6.0, 0.0], [9.0, 7.0, 0.0]])
    rules, shares = {"0": Rule(4.0)}, {"0": 5 / 9}
    fitted = fit(model, [x[:2], x[2:]], rules, shares, center=True, progress=False)
    assert fitted.rules["0"].center.tolist() == [2.0, 0.0, 0.0]


# ----------------------------------------------------------------------------------------------------- water-filling


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sites=st.integers(1, 4), budget=st.floats(0, 0.95))
def test_filling_is_the_linear_programme(data, sites, budget):
    optimize = pytest.importorskip("scipy.optimize")
    points, weights = {}, {}
    for index in range(sites):
        levels = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=6, unique=True))
        points[str(index)] = [(level / 20, data.draw(st.integers(0, 50)) / 10) for level in levels]
        weights[str(index)] = data.draw(st.integers(1, 5))
    shares = water_fill(points, weights, budget)
    total = sum(weights.values())
    most = sum(weights[name] * max(s for s, _ in points[name]) for name in points)
    wanted = min(budget * total, most)
    assert sum(weights[name] * shares[name] for name in points) == pytest.approx(wanted, abs=1e-9)

    columns = [(name, s, h) for name in points for s, h in [(0.0, 0.0), *points[name]]]
    equal = [[weights[name] * s for name, s, _ in columns]] + [
        [float(name == each) for name, _, _ in columns] for each in points
    ]
    found = optimize.linprog([h for *_, h in columns], A_eq=equal, b_eq=[wanted, *[1.0] * sites], method="highs")

    def harm(name):
        hull = _lower_hull(points[name])
        return float(np.interp(shares[name], *zip(*hull, strict=True)))

    if found.status == 0:  # not where rounding puts the budget just beyond what can be reached
        assert sum(map(harm, points)) == pytest.approx(found.fun, abs=1e-6)


def test_filling_evens_out_what_the_next_byte_costs():
    points = {name: [(x / 10, factor * (x / 10) ** 2) for x in range(1, 11)] for name, factor in (("a", 1), ("b", 3))}
    shares = water_fill(points, {"a": 1, "b": 1}, 0.4)
    assert shares["a"] == pytest.approx(0.6, abs=0.1)  # slopes 2a = 6b
    assert shares["b"] == pytest.approx(0.2, abs=0.1)
    assert water_fill(points, {"a": 1, "b": 1}, 0.0) == {"a": 0.0, "b": 0.0}
    assert water_fill(points, {"a": 3, "b": 1}, 1.0) == {"a": 1.0, "b": 1.0}


def test_a_curve_interpolates_from_nothing():
    curve = Curve(np.array([0.1, 0.4]), np.array([0.2, 0.6]), np.array([1.0, 5.0]))
    assert [curve.harm_at(s) for s in (0, 0.1, 0.2, 0.4, 0.6, 0.9)] == pytest.approx([0, 0.5, 1, 3, 5, 5])
    assert [curve.threshold_at(s) for s in (0, 0.1, 0.2, 0.4)] == pytest.approx([0, 0.05, 0.1, 0.25])


# --------------------------------------------------------------------------------------------------------- sensitivity


class Classifier(nn.Module):
    """An MLP whose output has logits."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return types.SimpleNamespace(logits=self.net(x))


@pytest.mark.parametrize("categorical", [False, True])
def test_sensitivity_is_the_fisher_information(categorical):
    """Against the Jacobian in float64: its expectation over labels is exact, what is measured draws one a token."""
    model = Classifier() if categorical else mlp()
    net = model.net if categorical else model
    batches = [torch.randn(1024, 16, generator=torch.Generator().manual_seed(index)) for index in range(4)]
    prefix = "net." if categorical else ""
    measured = measure_sensitivity(model, batches, [f"{prefix}{index}" for index in (0, 2, 4)], progress=False)
    exact = copy.deepcopy(net).double()
    x = torch.cat(batches).double()
    for index, layer in enumerate(exact):
        if isinstance(layer, nn.Linear):
            site, rest = measured[f"{prefix}{index}"], exact[index:]

            def harm(change, rest=rest, x=x):  # half the expected squared change of the log-probability of a label
                output, moved = torch.func.jvp(rest, (x,), (change,))
                if not categorical:
                    return moved.square().sum(-1).mean() / 2
                p = output.softmax(-1)
                return ((p * moved.square()).sum(-1) - (p * moved).sum(-1).square()).mean() / 2

            for relative, curve in site.curves.items():
                norm = x.norm(dim=-1, keepdim=True) if relative else 1.0
                scores = x.abs() * site.scale.double() / norm
                assert (np.diff(curve.thresholds) > 0).all()
                assert (np.diff(curve.harm) >= 0).all()
                levels = zip(curve.thresholds, curve.sparsity, curve.harm, strict=True)
                for threshold, sparsity, found in list(levels)[::4]:
                    skip = scores <= threshold
                    assert sparsity == pytest.approx(skip.double().mean().item(), abs=1e-3)
                    assert found == pytest.approx(harm(torch.where(skip, -x, 0)).item(), rel=0.2, abs=1e-6)
            first = x[:1024]  # one batch in four gives the scales
            jacobian = torch.func.vmap(torch.func.jacrev(rest))(first)  # [rows, out, in]
            if categorical:
                p = rest(first).softmax(-1)
                jacobian = jacobian - (p[..., None] * jacobian).sum(1, keepdim=True)
                squares = (p[..., None] * jacobian.square()).sum(1).mean(0)
            else:
                squares = jacobian.square().sum(1).mean(0)
            torch.testing.assert_close(site.scale.double(), squares.sqrt(), rtol=0.25, atol=1e-4)
        with torch.no_grad():
            x = layer(x)


def test_measuring_sensitivity_changes_nothing_in_the_model():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    kept = model.model.layers[0].mlp.down_proj.weight
    kept.grad = torch.ones_like(kept)
    names = list(find_sites(model))

    def state():
        return (
            [module.training for module in model.modules()],
            [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
            [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
            {key: value.clone() for key, value in model.state_dict().items()},
            torch.get_rng_state(),
            torch.is_grad_enabled(),
        )

    def same(one, other):
        if isinstance(one, torch.Tensor):
            return torch.equal(one, other)
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(same, one, other))
        return one == other

    before = state()
    first = measure_sensitivity(model, tiny_batches(), names, progress=False)
    assert same(state(), before)
    with torch.no_grad():
        again = measure_sensitivity(model, tiny_batches(), names, progress=False)
    assert all(torch.equal(first[name].scale, again[name].scale) for name in names)
    with pytest.raises(ValueError, match="take the model's own tokenizer"):
        measure_sensitivity(model, [*tiny_batches(), {"input_ids": torch.tensor([[10**6]])}], names, progress=False)
    assert same(state(), before)
    with pytest.raises(ValueError, match="no batch|batches is empty"):
        measure_sensitivity(model, [], names, progress=False)
    assert same(state(), before)


def test_a_site_without_gradient_is_an_error():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(x) + self.a(x).detach()

    with pytest.raises(ValueError, match="no gradient reached site 'a'"):
        measure_sensitivity(Detached(), [torch.randn(8, 4)], ["a", "b"], progress=False)


# ---------------------------------------------------------------------------------------------------------------- auto


@pytest.fixture(scope="module")
def automatic():
    model, batches = tiny_model("llama"), tiny_batches(8)
    calibration = deadband.calibrate(model, batches, progress=False)
    return calibration, {"model": model, "batches": batches, "progress": False}


def test_auto_takes_what_does_best_on_batches_held_out(automatic):
    calibration, passes = automatic
    thresholds = calibration.allocate(0.5, **passes)
    fitted, held = split(passes["batches"])
    assert len(fitted) + len(held) == 8
    assert not {id(batch) for batch in fitted} & {id(batch) for batch in held}
    mean = Judge(passes["model"], held, False)(thresholds.rules).mean
    head, _, trials = thresholds.reason.partition(f" on {len(held)} batches held out (in trials on 4: ")
    assert head.startswith("auto: ")
    assert float(head.rsplit(" ", 1)[1]) == pytest.approx(mean, rel=1e-3)
    tried = [each.rsplit(" ", 1) for each in trials.rstrip(")").split("; ")]
    assert head.startswith(f"auto: {tried[0][0]}, with KL ")
    assert [float(kl) for _, kl in tried] == sorted(float(kl) for _, kl in tried)
    assert {"uniform", "sensitivity (form by site, not centered)"} <= {name for name, _ in tried}
    uniform = calibration.allocate(0.5, "uniform", **{**passes, "batches": fitted})
    assert mean < Judge(passes["model"], held, False)(uniform.rules).mean
    assert thresholds.reason in str(thresholds)
    assert achieved(passes["model"], fitted, thresholds).total == pytest.approx(0.5, abs=0.01)


def test_the_judge_is_the_divergence_of_the_model_with_rules(automatic):
    calibration, passes = automatic
    model, (batch, *_) = passes["model"], passes["batches"]
    rules = calibration.allocate(0.6, "uniform", relative=True, center=True, **passes).rules
    found = Judge(model, [batch], False)(rules)
    with torch.no_grad():
        dense = model(**batch).logits.double().log_softmax(-1)
        deadband.sparsify_(model, rules)
        with deadband.sparse_prefill(model):
            sparse = model(**batch).logits.double().log_softmax(-1)
        deadband.densify_(model)
    assert found.mean == pytest.approx((dense.exp() * (dense - sparse)).sum(-1).mean().item(), rel=1e-3)
    chosen = batch["input_ids"][:, 1:, None]
    increase = (dense - sparse)[:, :-1].gather(-1, chosen).mean().item()
    assert sum(found.growth) / sum(found.targets) == pytest.approx(increase, rel=1e-3)
    assert found.bound("max_perplexity_increase") == pytest.approx(
        math.expm1(increase), rel=1e-3
    )  # one batch: no error


def test_auto_without_a_model_with_one_batch_and_without_a_budget(automatic):
    calibration, passes = automatic
    assert "neither model= nor batches=" in calibration.allocate(0.4).reason
    assert calibration.allocate(0.4).method == "uniform"
    one = calibration.allocate(0.4, **{**passes, "batches": passes["batches"][:1]})
    assert "also fitted to" in one.reason
    assert {rule.threshold for rule in calibration.allocate(0.0, **passes).values()} == {0.0}
    forms = calibration.allocate(0.4, relative=True, center=False, **passes)
    assert all(rule.relative and rule.center is None for rule in forms.rules.values())


@pytest.mark.parametrize("method", ["auto", "sensitivity", "uniform"])
@pytest.mark.parametrize("limit", [{"max_kl": 0.05}, {"max_perplexity_increase": 0.2}])
def test_a_budget_for_a_quality_keeps_it_on_batches_held_out(automatic, method, limit):
    calibration, passes = automatic
    thresholds = calibration.allocate(method=method, **limit, **passes)
    fitted, held = split(passes["batches"])
    judge = Judge(passes["model"], held, False)
    (what, most), = limit.items()  # fmt: skip
    assert judge(thresholds.rules).bound(what) <= most
    more = calibration.allocate(thresholds.sparsity + 0.03, method, **{**passes, "batches": fitted})
    if what == "max_kl":  # perplexity of a random model goes up and down
        assert judge(more.rules).bound(what) > most
    assert f"within {what}={most}" in thresholds.reason


def test_qualities_that_cannot_be_kept_or_judged(automatic):
    calibration, passes = automatic
    with pytest.raises(ValueError, match="max_kl=1e-12 is not kept even at sparsity 0.02"):
        calibration.allocate(method="uniform", max_kl=1e-12, **passes)
    for limit in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a number above 0"):
            calibration.allocate(max_kl=limit, **passes)
    with pytest.raises(ValueError, match="max_kl= is judged on the model: pass model= and batches="):
        calibration.allocate(max_kl=0.1)
    with pytest.raises(ValueError, match="method 'best' is not known"):
        calibration.allocate(method="best", max_kl=0.1, **passes)
    for wrong in ({}, {"sparsity": 0.4, "max_kl": 0.1}, {"max_kl": 0.1, "max_perplexity_increase": 0.1}):
        with pytest.raises(ValueError, match="pass exactly one of"):
            calibration.allocate(**wrong, **passes)
    plain, batches = mlp(), [torch.randn(64, 16) for _ in range(3)]
    other = deadband.calibrate(plain, batches, progress=False)
    with pytest.raises(ValueError, match="needs a model that predicts the tokens"):
        other.allocate(method="uniform", max_perplexity_increase=0.1, model=plain, batches=batches, progress=False)
    kept = other.allocate(max_kl=0.01, model=plain, batches=batches, progress=False)
    assert Judge(plain, split(batches)[1], False)(kept.rules).mean <= 0.01


class Experts(nn.Module):
    """The sign of the first entry chooses a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.left(x) if x[0, 0] < 0 else self.right(x)


@pytest.mark.parametrize("rare", range(8))
def test_auto_knows_an_expert_that_one_batch_reaches(rare):
    model = Experts()
    batches = [torch.randn(32, 8) for _ in range(8)]
    for index, batch in enumerate(batches):
        batch[0, 0] = -1.0 if index == rare else 1.0
    calibration = deadband.calibrate(model, batches, progress=False)
    thresholds = calibration.allocate(0.5, model=model, batches=batches, progress=False)
    assert ("also fitted to" in thresholds.reason) == (rare % 4 == 3)  # the batches that are held out otherwise
    assert all(rule.threshold > 0 for rule in thresholds.rules.values())


def test_nan_is_never_best(automatic):
    calibration, passes = automatic
    model = copy.deepcopy(passes["model"])
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.nan
    judge = Judge(model, passes["batches"][:2], False)
    assert judge(dict.fromkeys(calibration.sites, deadband.Rule(0.01))).mean == math.inf
    with pytest.raises(ValueError, match="NaN"):
        calibration.allocate(0.4, **{**passes, "model": model})


def test_sites_beside_the_output_leave_uniform():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.main(x), self.other(x)

    torch.manual_seed(0)
    model, batches = Beside(), [torch.randn(32, 8) for _ in range(4)]
    calibration = deadband.calibrate(model, batches, progress=False)
    thresholds = calibration.allocate(0.5, model=model, batches=batches, progress=False)
    assert thresholds.method == "uniform"
    assert "no gradient reached site 'other'" in thresholds.reason
    with pytest.raises(ValueError, match="no gradient reached site 'other'"):
        calibration.allocate(0.5, "sensitivity", model=model, batches=batches, progress=False)


def test_decoders_are_judged_by_their_own_mask():
    import transformers

    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids, mask = torch.randint(2, 64, (1, 12)), torch.ones(1, 12, dtype=torch.long)
    encoder_mask, decoder_mask = mask.clone(), mask.clone()
    encoder_mask[:, 6:], decoder_mask[:, 9:] = 0, 0
    batch = {
        "input_ids": ids, "attention_mask": encoder_mask, "decoder_input_ids": ids.flip(1),
        "decoder_attention_mask": decoder_mask,
    }  # fmt: skip
    calibration = deadband.calibrate(model, [batch], progress=False)
    rules = dict.fromkeys(calibration.sites, deadband.Rule(0.5))
    judged = Judge(model, [batch], False)(rules)
    with torch.no_grad():
        dense = model(**batch).logits[0, :9].double().log_softmax(-1)
        with thresholding({name: module_at(model, name) for name in rules}, rules):
            sparse = model(**batch).logits[0, :9].double().log_softmax(-1)
    assert judged.outputs == (9,)
    assert judged.targets == (8,)
    assert judged.mean == pytest.approx((dense.exp() * (dense - sparse)).sum(-1).mean().item(), rel=1e-3)
    increase = (dense - sparse)[:-1].gather(-1, ids.flip(1)[0, 1:9, None]).mean().item()
    assert judged.growth[0] / 8 == pytest.approx(increase, rel=1e-3)


def test_sensitivity_of_a_block_that_changes_its_input_in_place():
    class Block(nn.Module):
        def __init__(self, in_place):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.in_place = nn.Linear(8, 8), nn.Linear(8, 4), in_place

        def forward(self, x):
            x = x.clone()
            y = self.first(x)
            if self.in_place:
                x += 5 * y
            else:
                x = x + 5 * y
            return self.second(x)

    batches = [torch.randn(64, 8) for _ in range(4)]
    there, here = (measure_sensitivity(Block(each), batches, ["first", "second"], progress=False) for each in (0, 1))
    for name in there:
        np.testing.assert_allclose(there[name].curves[False].harm, here[name].curves[False].harm, rtol=1e-4)
