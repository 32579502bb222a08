import numpy as np
import pytest
import torch
from conftest import mlp, sparse_model, tiny_batches, tiny_model
from torch import nn

import deadband
from deadband.allocation import Thresholds, _greedy_path, allocate
from deadband.observation import masking
from deadband.sites import find_sites, weight_bytes
from deadband.sparsify import sparse_sites


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
    for name, threshold in thresholds.items():
        assert calibration.sites[name].sparsity(threshold) == pytest.approx(0.4, abs=0.005)
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
            thresholds = {each: calibration.sites[each].threshold(value) for each, value in tried.items()}
            with masking(sites, thresholds, dict.fromkeys(sites)):
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
        path = _greedy_path(block, sites, [((x,), {})], calibration, dict.fromkeys(sites), 0.02, 0.5)
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
    several = allocate(calibration, [0.2, 0.45], "greedy", **passes)
    single = calibration.allocate(0.45, "greedy", **passes)
    assert [each.sparsity for each in several] == [0.2, 0.45]
    assert np.allclose(list(several[1].site_sparsity.values()), list(single.site_sparsity.values()), atol=0.1)
    assert all(
        a <= b + 1e-9 for a, b in zip(several[0].site_sparsity.values(), several[1].site_sparsity.values(), strict=True)
    )


def test_zero_budget_and_natural_zeros():
    model = mlp()
    calibration = deadband.calibrate(model, [torch.randn(64, 16)], progress=False)
    assert set(calibration.allocate(0.0).values()) == {0.0}
    assert calibration.allocate(0.3)["2"] == 0.0  # ReLU alone skips more
    assert calibration.allocate(0.3)["0"] > 0.0


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
def test_sparsity_out_of_range(sparsity):
    calibration = deadband.calibrate(mlp(), [torch.randn(4, 16)], progress=False)
    with pytest.raises(ValueError, match="out of range"):
        calibration.allocate(sparsity)


def test_bad_calls():
    calibration = deadband.calibrate(mlp(), [torch.randn(4, 16)], progress=False)
    with pytest.raises(ValueError, match="method 'best' is not known; expected one of 'uniform', 'greedy'"):
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
