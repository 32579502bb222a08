"""The sparsifiers beside torch.ao.pruning's own classes: the same code, the same masks."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.ao import pruning as theirs
from torch.ao.pruning._experimental import data_sparsifier as their_data
from torch.ao.pruning._experimental import pruner as their_pruner

from deadband import pruning as ours


def layer(height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, height, bias=seed % 2 == 0))
    model[0].weight.data.copy_(torch.randn(height, width, generator=generator))
    return model


def mask_of(sparsifier, model, steps=1):
    sparsifier.prepare(model, config=None)
    for _ in range(steps):
        sparsifier.step()
    return model[0].parametrizations.weight[0].mask


def configurations() -> list:
    """Everything that torch supports: a block's zeros less than its entries only where blocks fit."""
    chosen, made = random.Random(0), []
    for seed in range(150):
        block = chosen.choice([(1, 1), (1, 2), (1, 4), (2, 2), (4, 1), (3, 5), (4, 4), (1, 8), (16, 16), (5, 3)])
        size = block[0] * block[1]
        zeros = chosen.choice([None, 0, size, *range(1, size)])
        fits = zeros in (None, 0, size)
        height, width = (chosen.randint(1, 40), chosen.randint(1, 40)) if fits else (0, 0)
        if not fits:
            height, width = block[0] * chosen.randint(1, 9), block[1] * chosen.randint(1, 9)
        level = chosen.choice([-1.0, 0.0, 0.05, 0.15, 0.25, 0.5, 0.75, 0.95, 0.999, 1.0, 2.0, chosen.random()])
        norm = chosen.choice([None, 1, 2, torch.exp])
        name = f"{seed}-{height}x{width}-{block}-{zeros}"
        made.append(pytest.param(height, width, block, zeros, level, norm, seed, id=name))
    return made


@pytest.mark.parametrize(("height", "width", "block", "zeros", "level", "norm", "seed"), configurations())
def test_masks_by_weight_norm_are_torchs_bit_for_bit(height, width, block, zeros, level, norm, seed):
    settings = {"sparsity_level": level, "sparse_block_shape": block, "zeros_per_block": zeros, "norm": norm}
    expected = mask_of(theirs.WeightNormSparsifier(**settings), layer(height, width, seed))
    found = mask_of(ours.WeightNormSparsifier(**settings), layer(height, width, seed))
    assert torch.equal(found, expected.float())
    again = mask_of(ours.WeightNormSparsifier(**settings), layer(height, width, seed), steps=3)
    assert torch.equal(again, found)


@pytest.mark.parametrize("level", [-1.0, 0.0, 0.25, 0.5, 0.9, 1.0, 2.0])
@pytest.mark.parametrize("block", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_the_share_of_zeros_is_right_where_all_weights_are_equal(level, block):
    for zeros in range(block[0] * block[1] + 1):
        model = nn.Sequential(nn.Linear(12, 12))
        nn.init.ones_(model[0].weight)
        sparsifier = ours.WeightNormSparsifier(level, block, zeros)
        mask = mask_of(sparsifier, model)
        blocks = 144 // (block[0] * block[1])
        chosen = blocks if level >= 1 else min(max(round(level * blocks), 0), blocks - 1)
        assert (mask == 0).sum() == chosen * zeros


@pytest.mark.parametrize("nearliness", [-1, 0, 1, 3, 5])
def test_bands_are_torchs(nearliness):
    for seed, (height, width) in enumerate([(3, 8), (8, 3), (9, 9)]):
        expected = mask_of(theirs.NearlyDiagonalSparsifier(nearliness), layer(height, width, seed))
        assert torch.equal(mask_of(ours.NearlyDiagonalSparsifier(nearliness), layer(height, width, seed)), expected)


@pytest.mark.parametrize("seed", range(40))
def test_masks_of_data_are_torchs_bit_for_bit(seed):
    chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    block = chosen.choice([(1, 2), (1, 4), (2, 2), (4, 1), (3, 5)])
    size = block[0] * block[1]
    zeros = chosen.choice([None, size, *range(1, size)])
    height, width = block[0] * chosen.randint(2, 9), block[1] * chosen.randint(2, 9)
    if zeros in (None, size) and chosen.random() < 0.5:
        height, width = chosen.randint(2, 40), chosen.randint(2, 40)
    settings = {"sparsity_level": chosen.choice([0.05, 0.25, 0.5, 0.95, 1.0, chosen.random()])}
    settings |= {"sparse_block_shape": block, "zeros_per_block": zeros, "norm": chosen.choice(["L1", "L2"])}
    data = torch.randn(height, width, generator=generator)
    masks = []
    for module in (ours, their_data):
        sparsifier = module.DataNormSparsifier([("x", data.clone())], **settings)
        sparsifier.step()
        masks.append(sparsifier.get_mask("x").float())
    assert torch.equal(*masks)


def convnet(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 16, 9)
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0])
def test_rows_that_pruners_choose_are_torchs(seed, level):
    def masks(pruner, model):
        pruner.prepare(model, [{"tensor_fqn": f"{index}.weight"} for index in (0, 2, 5)])
        pruner.step()
        return [group["module"].parametrizations.weight[0].mask for group in pruner.groups]

    for make in (
        lambda module: module.SaliencyPruner({"sparsity_level": level}),
        lambda module: module.FPGMPruner(level),
        lambda module: module.FPGMPruner(level, dist=1),
        lambda module: module.FPGMPruner(level, dist=lambda rows: torch.cdist(rows, rows, p=3)),
    ):
        expected = masks(make(their_pruner), convnet(seed))
        for found, mask in zip(masks(make(ours), convnet(seed)), expected, strict=True):
            assert found.dtype == torch.bool
            assert torch.equal(found, mask)


def workflow(module, model, experiment):
    """What a user of torch.ao.pruning sees, stage by stage."""
    torch.manual_seed(3)
    x, seen = torch.randn(5, 6), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = module.WeightNormSparsifier(sparsity_level=0.7, sparse_block_shape=(1, 2))
    sparsifier.prepare(model, config=experiment)
    scheduler = module.CubicSL(sparsifier, init_sl=0.1, delta_t=1, total_t=4)
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        sparsifier.step()
        scheduler.step()
        seen += [float(loss.detach()), scheduler.get_last_sl(), model(x).detach()]
    seen.append([sorted(group) for group in sparsifier.groups])
    seen.append(sorted(sparsifier.state_dict()))
    seen.append([group["tensor_fqn"] for group in sparsifier.groups])
    sparsifier.squash_mask(params_to_keep=("sparse_block_shape",))
    seen += [model(x).detach(), sorted(model.state_dict()), type(model[0]).__name__, model[0].sparse_params]
    return seen


@pytest.mark.parametrize("config", [None, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": ".2.0.weight"}]])
def test_training_code_of_torchs_gives_what_it_gave(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)))
    results = []
    for module in (ours, theirs):
        try:
            results.append(workflow(module, copy.deepcopy(model), copy.deepcopy(config)))
        except AttributeError:  # torch's class fails on a leading dot
            assert module is theirs
            assert config is not None
            return
    for found, expected in zip(*results, strict=True):
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found, expected)
        elif isinstance(expected, list) and expected and isinstance(expected[0], list):
            assert [set(keys) - set(more) for keys, more in zip(found, expected, strict=True)] == [
                {"scope", "by_entries"} for _ in expected
            ]
        else:
            assert (
                found == pytest.approx(expected)
                if isinstance(expected, float)
                else found == expected or (found == pytest.approx(expected))
            )


def test_names_are_found_as_torch_finds_them():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 2))
    for module in (*model.modules(), nn.Linear(1, 1)):
        assert ours.module_to_fqn(model, module) == theirs.module_to_fqn(model, module)
    for path in ("", "0", "0.0", "0.0.weight", "0.5", "1.bias", "2.3.4"):
        assert ours.fqn_to_module(model, path) is theirs.fqn_to_module(model, path)
    for name in ("0.0.weight", "1.bias", "weight", "7.weight"):
        assert ours.get_arg_info_from_tensor_fqn(model, name) == theirs.get_arg_info_from_tensor_fqn(model, name)


@pytest.mark.parametrize(
    "make",
    [
        lambda module, sparsifier: module.LambdaSL(sparsifier, lambda epoch: 10 * epoch),
        lambda module, sparsifier: module.LambdaSL(sparsifier, [lambda epoch: 0.5, lambda epoch: 0.9**epoch]),
        lambda module, sparsifier: module.CubicSL(sparsifier, 0.1, [0, 3], 2, 5, [False, True]),
        lambda module, sparsifier: module.CubicSL(sparsifier, init_sl=[0.0, 0.2], init_t=2, delta_t=1, total_t=[3, 7]),
    ],
)
def test_levels_of_schedulers_are_torchs(make):
    made = []
    for module in (ours, theirs):
        sparsifier = module.WeightNormSparsifier(sparsity_level=0.8)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        sparsifier.prepare(
            model, config=[{"tensor_fqn": "0.weight"}, {"tensor_fqn": "1.weight", "sparsity_level": 0.4}]
        )
        made.append(make(module, sparsifier))
    for _ in range(14):
        found, expected = made
        assert found.get_last_sl() == pytest.approx(expected.get_last_sl())
        assert [group["sparsity_level"] for group in found.sparsifier.groups] == found.get_last_sl()
        for scheduler in made:
            scheduler.sparsifier.step()
            scheduler.step()


def test_a_state_of_torchs_is_loaded_and_stays_whole():
    models = [layer(8, 8, 1) for _ in range(3)]
    theirs_one = theirs.WeightNormSparsifier(sparsity_level=0.5)
    expected = mask_of(theirs_one, models[0]).clone()
    for model in models[1:]:
        sparsifier = ours.WeightNormSparsifier()
        sparsifier.prepare(model, config=None)
        sparsifier.load_state_dict(theirs_one.state_dict())
        assert torch.equal(model[0].parametrizations.weight[0].mask, expected)
    fresh = layer(8, 8, 1)
    back = theirs.WeightNormSparsifier()
    back.prepare(fresh, config=None)
    back.load_state_dict(sparsifier.state_dict())
    assert torch.equal(fresh[0].parametrizations.weight[0].mask, expected)


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.77])
def test_torch_nn_utils_prune_has_the_same_masks(amount):
    from torch.nn.utils import prune

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 20))

    def masks(sparsifier, kept=model, config=None):
        copied = copy.deepcopy(kept)
        sparsifier.prepare(copied, config)
        sparsifier.step()
        return [state["mask"] for state in sparsifier.state.values()]

    expected = copy.deepcopy(model)
    for layer in expected:
        prune.l1_unstructured(layer, "weight", amount)
    found = masks(ours.WeightNormSparsifier(amount, (1, 1)))
    assert all(torch.equal(mask, layer.weight_mask) for mask, layer in zip(found, expected, strict=True))
    expected = copy.deepcopy(model)
    prune.global_unstructured([(layer, "weight") for layer in expected], prune.L1Unstructured, amount=amount)
    found = masks(ours.WeightNormSparsifier(amount, (1, 1), scope="global"))
    assert all(torch.equal(mask, layer.weight_mask) for mask, layer in zip(found, expected, strict=True))
    expected = copy.deepcopy(model)
    for layer in expected:
        prune.ln_structured(layer, "weight", int(amount * len(layer.weight)), n=1, dim=0)
    found = masks(ours.SaliencyPruner({"sparsity_level": amount}))
    assert all(torch.equal(mask, layer.weight_mask[:, 0].bool()) for mask, layer in zip(found, expected, strict=True))
