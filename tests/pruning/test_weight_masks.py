"""What torch.ao.pruning's sparsifiers get wrong, and these get right."""

from __future__ import annotations

import copy
import io
import pickle
import time

import pytest
import torch
from conftest import tiny_batches, tiny_model
from torch import nn
from torch.nn.utils import parametrize

import deadband
from deadband.masks.blocks import block_mask, block_scores, kept_blocks
from deadband.pruning import (
    BaseSparsifier,
    FakeSparsity,
    NearlyDiagonalSparsifier,
    WandaSparsifier,
    WeightNormSparsifier,
)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))).to(dtype)


def prepared(model, config=None, **settings):
    sparsifier = WeightNormSparsifier(**settings)
    sparsifier.prepare(model, config)
    return sparsifier


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Counting(BaseSparsifier):
    """A sparsifier of a user's."""

    def update_mask(self, module, tensor_name, tensor_fqn, **group):
        mask = getattr(module.parametrizations, tensor_name)[0].mask
        mask[0] = 0
        entry = self.state[tensor_fqn]
        entry["count"] = entry.get("count", 0) + 1


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("zeros", [4, 2])
def test_every_dtype_works_and_masks_have_it(dtype, zeros):
    model, wide = mlp(dtype), mlp(dtype).float()
    x = torch.randn(3, 8, dtype=dtype)
    sparsifier, reference = prepared(model, zeros_per_block=zeros), prepared(wide, zeros_per_block=zeros)
    sparsifier.step()
    reference.step()
    mask = sparsifier.state["0.weight"]["mask"]
    assert mask.dtype == dtype
    assert torch.equal(mask.float(), reference.state["0.weight"]["mask"])
    assert model(x).dtype == dtype
    sparsifier.squash_mask()
    assert model[0].weight.dtype == dtype
    assert (model[0].weight == 0).float().mean() == zeros / 4 / 2


def test_masks_follow_the_model_to_another_dtype_and_stay_the_same_object():
    model = mlp()
    sparsifier = prepared(model)
    mask = sparsifier.state["0.weight"]["mask"]
    sparsifier.step()
    model.double()
    assert sparsifier.state["0.weight"]["mask"] is mask is model[0].parametrizations.weight[0].mask
    assert mask.dtype == torch.float64
    assert mask.mean() == 0.5
    assert sparsifier.state_dict()["state"]["0.weight"]["mask"].mean() == 0.5
    sparsifier.step()
    assert mask.dtype == torch.float64


def test_what_was_dropped_comes_back_once_it_is_large():
    model = mlp()
    sparsifier = prepared(model, sparsity_level=0.5)
    sparsifier.step()
    dropped = (sparsifier.state["0.weight"]["mask"] == 0).nonzero()[0]
    model[0].parametrizations.weight.original.data[tuple(dropped)] = 100
    sparsifier.step()
    assert sparsifier.state["0.weight"]["mask"][tuple(dropped)] == 1


@pytest.mark.parametrize("zeros", [4, 2])
def test_a_lower_level_brings_the_largest_back(zeros):
    model = mlp()
    sparsifier = prepared(model, sparsity_level=0.75, zeros_per_block=zeros)
    sparsifier.step()
    for group in sparsifier.groups:
        group["sparsity_level"] = 0.25
    sparsifier.step()
    fresh = prepared(mlp(), sparsity_level=0.25, zeros_per_block=zeros)
    fresh.step()
    assert torch.equal(sparsifier.state["0.weight"]["mask"], fresh.state["0.weight"]["mask"])


def test_infinity_and_nan_below_a_mask_are_zero_and_zeros_are_positive():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([[float("nan"), float("-inf"), -1.0, 2.0]]))
    sparsifier = prepared(model, [{"tensor_fqn": "0.weight", "mask": torch.tensor([[0.0, 0, 0, 1]])}])
    assert model[0].weight.tolist() == [[0, 0, 0, 2]]
    model[0].weight.sum().backward()
    assert model[0].parametrizations.weight.original.grad.tolist() == [[0, 0, 0, 1]]
    sparsifier.squash_mask()
    assert not torch.signbit(model[0].weight).any()


def test_nan_weights_are_kept_as_the_largest():
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    model[0].weight.data.copy_(torch.tensor([[1.0, 5, float("nan"), 0.1, 3, 4, 2, 9]]))
    sparsifier = prepared(model, sparse_block_shape=(1, 1))
    sparsifier.step()
    assert sparsifier.state["0.weight"]["mask"].tolist() == [[0, 1, 1, 0, 0, 1, 0, 1]]


def test_of_equal_blocks_the_last_go():
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    nn.init.ones_(model[0].weight)
    sparsifier = prepared(model, sparse_block_shape=(1, 1))
    sparsifier.step()
    assert sparsifier.state["0.weight"]["mask"].tolist() == [[1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize(("height", "width"), [(6, 6), (1, 7), (13, 5), (4, 4)])
@pytest.mark.parametrize("block", [(4, 4), (1, 4), (8, 8), (3, 2)])
@pytest.mark.parametrize("level", [0.25, 0.5, 0.8, 1.0])
def test_blocks_that_do_not_fit(height, width, block, level):
    """Beside a count by hand, block by block."""
    model = nn.Sequential(nn.Linear(width, height))
    weight = model[0].weight.detach().clone()
    for zeros in range(block[0] * block[1] + 1):
        sparsifier = prepared(
            copy.deepcopy(model), sparsity_level=level, sparse_block_shape=block, zeros_per_block=zeros
        )
        sparsifier.step()
        mask = sparsifier.state["0.weight"]["mask"]
        places = [(i, j) for i in range(0, height, block[0]) for j in range(0, width, block[1])]
        parts = [weight[i : i + block[0], j : j + block[1]].square() for i, j in places]
        chosen = len(parts) if level == 1 else min(round(level * len(parts)), len(parts) - 1)
        order = sorted(range(len(parts)), key=lambda index: float(parts[index].mean()))
        for rank, index in enumerate(order):
            (i, j), part = places[index], parts[index]
            found = mask[i : i + block[0], j : j + block[1]]
            goes = min(zeros, part.numel()) if rank < chosen else 0
            assert (found == 0).sum() == goes
            assert goes == 0 or goes == part.numel() or part[found == 0].max() <= part[found == 1].min()


@pytest.mark.parametrize(
    ("shape", "block", "level"), [((6, 6), (4, 4), 0.5), ((4, 4), (8, 8), 0.5), ((1, 40), (1, 4), 0.95)]
)
def test_by_entries_the_share_of_zeros_is_the_nearest(shape, block, level):
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    sparsifier = prepared(model, sparsity_level=level, sparse_block_shape=block, by_entries=True)
    sparsifier.step()
    missed = abs(float((sparsifier.state["0.weight"]["mask"] == 0).float().mean()) - level)
    blocks = block_scores(model[0].parametrizations.weight.original.detach().square(), block)
    shares = [
        float(
            (
                ~block_mask(
                    torch.zeros(shape),
                    kept_blocks(blocks, count / blocks.numel(), all_may_go=True),
                    block,
                    block[0] * block[1],
                )
            )
            .float()
            .mean()
        )
        for count in range(blocks.numel() + 1)
    ]
    assert missed <= min(abs(share - level) for share in shares) + 1e-6


def test_rows_and_all_tensors_together_as_scopes():
    model = mlp()
    by_row = prepared(copy.deepcopy(model), sparse_block_shape=(1, 1), scope="row", sparsity_level=0.25)
    by_row.step()
    for group in by_row.groups:
        mask = by_row.state[group["tensor_fqn"]]["mask"]
        assert ((mask == 0).sum(1) == round(0.25 * mask.shape[1])).all()
    model[0].weight.data *= 10
    together = prepared(model, sparse_block_shape=(1, 1), scope="global", sparsity_level=0.5)
    together.step()
    weights = [group["module"].parametrizations.weight.original.detach().abs() for group in together.groups]
    masks = [together.state[group["tensor_fqn"]]["mask"] for group in together.groups]
    flat, kept = torch.cat([each.flatten() for each in weights]), torch.cat([each.flatten() for each in masks])
    assert (kept == 0).sum() == flat.numel() // 2
    assert flat[kept == 0].max() <= flat[kept == 1].min()
    assert (masks[0] == 0).float().mean() < 0.1 < 0.8 < (masks[1] == 0).float().mean()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
def test_n_of_m_in_every_kind_of_layer(n, m):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, m * 3)
            self.conv = nn.Conv2d(m * 2, 6, 3)
            self.line = nn.Conv1d(m, 5, 2)
            self.fc = nn.Linear(m * 4, 3)

    from transformers.pytorch_utils import Conv1D

    model = Model()
    model.gpt = Conv1D(6, m * 2)
    sparsifier = prepared(
        model, [{"tensor_fqn": "*weight"}], sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n
    )
    sparsifier.step()
    assert len(sparsifier.groups) == 5
    for name, inputs_last in {
        "embed": lambda w: w,
        "conv": lambda w: w.permute(0, 2, 3, 1),
        "line": lambda w: w.permute(0, 2, 1),
        "fc": lambda w: w,
        "gpt": lambda w: w.T,
    }.items():
        mask = sparsifier.state[f"{name}.weight"]["mask"]
        assert mask.shape == getattr(model, name).weight.shape
        groups = inputs_last(mask).reshape(-1, m)
        assert (groups.sum(1) == n).all()
        original = inputs_last(getattr(model, name).parametrizations.weight.original).reshape(-1, m).abs()
        assert (original.masked_fill(groups == 0, 9e9).amin(1) >= original.masked_fill(groups == 1, 0).amax(1)).all()


def test_wanda_is_the_papers():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 6))
    x = torch.randn(64, 12) * torch.linspace(0.1, 3, 12)
    calibration = deadband.calibrate(model, [x], progress=False)
    for settings, share in (
        ({}, 0.5),
        ({"sparsity_level": 1.0, "sparse_block_shape": (1, 4), "zeros_per_block": 2}, 0.5),
    ):
        pruned = copy.deepcopy(model)
        sparsifier = WandaSparsifier(calibration, **settings)
        sparsifier.prepare(pruned, [{"tensor_fqn": "0.weight"}])
        sparsifier.step()
        mask = sparsifier.state["0.weight"]["mask"]
        scores = model[0].weight.detach().abs().double() * x.double().square().mean(0).sqrt()
        for row, kept in zip(scores, mask, strict=True):
            for part, stays in zip(
                row.view(-1, 12 if not settings else 4), kept.view(-1, 12 if not settings else 4), strict=True
            ):
                assert part[stays == 0].max() <= part[stays == 1].min()
                assert (stays == 0).float().mean() == share
    sparsifier = WandaSparsifier(deadband.calibrate(model, [x], include="2", progress=False))
    sparsifier.prepare(model)
    with pytest.raises(ValueError, match="calibration has nothing of '0'"):
        sparsifier.step()
    assert all((state["mask"] == 1).all() for state in sparsifier.state.values())


@pytest.mark.parametrize("bad", [2, 4, 17])
def test_a_band_that_cannot_be_leaves_masks_alone(bad):
    model = nn.Sequential(nn.Linear(6, 6))
    sparsifier = NearlyDiagonalSparsifier()
    sparsifier.prepare(model, config=None)
    sparsifier.step()
    before = sparsifier.state["0.weight"]["mask"].clone()
    sparsifier.groups[0]["nearliness"] = bad
    with pytest.raises(ValueError, match="odd number"):
        sparsifier.step()
    assert torch.equal(sparsifier.state["0.weight"]["mask"], before)


@pytest.mark.parametrize(
    "bad", [{"zeros_per_block": 5}, {"zeros_per_block": -1}, {"sparse_block_shape": (0, 4)}, {"scope": "all"}]
)
def test_a_configuration_that_cannot_be_is_an_error_at_the_step_and_changes_nothing(bad):
    model = mlp()
    sparsifier = prepared(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.1.weight", **bad}])
    with pytest.raises(ValueError, match=r"2\.1\.weight"):
        sparsifier.step()
    assert (sparsifier.state["0.weight"]["mask"] == 1).all()


# ------------------------------------------------------------------------------------------------------------ preparing


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([{"tensor_fqn": "0.wieght"}], "has no tensor '0.wieght'.*'0.weight'"),
        ([{"tensor_fqn": "5.weight"}], "has no tensor"),
        ([{"tensor_fqn": "head.*"}], "matches no weight"),
        ([{"tensor_fqn": "*.weight", "exclude": "*"}], "matches no weight"),
        ([{"tensor_fqn": "0.weight", "sparsity_levels": 0.3}], "unknown key 'sparsity_levels'"),
        ([{"module": "x"}], "tensor_fqn"),
        (["0.weight"], "expected mappings"),
        ([{"tensor_fqn": "0.weight", "module_fqn": "2"}], "module_fqn"),
        ([{"tensor_fqn": "0.weight", "mask": torch.ones(3, 3)}], r"shape \[16, 8\]"),
        ([{"tensor_fqn": "2.0.weight"}, {"tensor_fqn": "0.weight", "parametrization": dict}], None),
    ],
)
def test_a_bad_configuration_is_named_and_leaves_the_model_as_it_was(config, message):
    model = mlp()
    before, kinds = state_of(model), [type(module) for module in model.modules()]
    sparsifier = WeightNormSparsifier()
    with pytest.raises((ValueError, AssertionError, TypeError), match=message):
        sparsifier.prepare(model, config)
    assert same(state_of(model), before)
    assert [type(module) for module in model.modules()] == kinds
    sparsifier.prepare(model)
    sparsifier.step()


def test_globs_later_entries_and_keys_of_the_users_own():
    model = mlp()
    sparsifier = prepared(
        model,
        [
            {"tensor_fqn": "*.weight", "exclude": "2.1.*", "note": "mine"},
            {"tensor_fqn": "2.?.weight", "sparsity_level": 0.9},
        ],
    )
    assert {g["tensor_fqn"]: (g["sparsity_level"], g.get("note")) for g in sparsifier.groups} == {
        "0.weight": (0.5, "mine"),
        "2.0.weight": (0.9, "mine"),
        "2.1.weight": (0.9, None),
    }


def test_layers_that_no_config_leaves_out_are_named():
    from transformers.pytorch_utils import Conv1D

    class Mine(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Mine(4, 4), Conv1D(4, 4))
    with pytest.warns(UserWarning, match="1, 2|2, 1"):
        prepared(model)
    with pytest.raises(ValueError, match=r"no layer of exactly nn\.Linear"):
        prepared(nn.Sequential(nn.Conv2d(1, 1, 1)))


def test_parametrised_layers_count_and_keep_their_parametrisation():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    weight = model[0].weight.detach().clone()
    sparsifier = prepared(model)
    sparsifier.step()
    mask = sparsifier.state["0.weight"]["mask"]
    assert mask.mean() == 0.5
    assert torch.allclose(model[0].weight, weight * mask)
    model[0].parametrizations.weight.original1.data.mul_(-1)
    sparsifier.step()
    assert torch.equal(sparsifier.state["0.weight"]["mask"], mask)


def test_prepare_twice_is_an_error_and_again_after_squashing_is_fresh():
    model = mlp()
    sparsifier = prepared(model)
    with pytest.raises(ValueError, match="squash_mask"):
        sparsifier.prepare(model)
    sparsifier.step()
    sparsifier.squash_mask()
    with pytest.raises(ValueError, match="prepare"):
        sparsifier.step()
    zeros = state_of(model)
    sparsifier.squash_mask()
    assert same(state_of(model), zeros)
    sparsifier.prepare(model)
    assert len(sparsifier.groups) == 3
    assert all((state["mask"] == 1).all() for state in sparsifier.state.values())
    other = mlp()
    sparsifier.squash_mask()
    sparsifier.prepare(other)
    assert sparsifier.model is other


def test_unprepare_gives_the_weights_back():
    model = mlp()
    before, weight = state_of(model), model[0].weight
    sparsifier = prepared(model)
    sparsifier.step()
    sparsifier.unprepare()
    assert same(state_of(model), before)
    assert model[0].weight is weight
    assert type(model[0]) is nn.Linear


def test_two_sparsifiers_on_one_tensor_have_masks_of_their_own():
    model = nn.Sequential(nn.Linear(8, 8))
    weight = model[0].weight.detach().clone()
    first, second = prepared(model, sparsity_level=0.25), prepared(model, sparsity_level=0.5, sparse_block_shape=(8, 1))
    first.step()
    second.step()
    masks = [each.state["0.weight"]["mask"] for each in (first, second)]
    assert [float(mask.mean()) for mask in masks] == [0.75, 0.5]
    assert torch.equal(model[0].weight, weight * masks[0] * masks[1])
    first.squash_mask()
    second.squash_mask()
    assert torch.equal(model[0].weight, weight * masks[0] * masks[1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_tied_weights_are_masked_once_and_on_both_sides():
    model, ids = Tied(), torch.arange(10)
    weight = model.head.weight
    sparsifier = prepared(model, [{"tensor_fqn": "head.weight"}, {"tensor_fqn": "embed.weight"}])
    assert len(sparsifier.groups) == 1
    sparsifier.step()
    assert torch.equal(model.embed.weight, model.head.weight)
    assert (model.embed.weight == 0).float().mean() == 0.5
    before = model(ids)
    sparsifier.squash_mask()
    assert torch.equal(model(ids), before)
    assert model.head.weight is weight is model.embed.weight


def test_a_module_under_two_parents_counts_once():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(nn.Sequential(layer), nn.Sequential(layer))
    sparsifier = prepared(model)
    assert len(sparsifier.groups) == 1
    sparsifier.step()
    sparsifier.squash_mask()
    assert (layer.weight == 0).float().mean() == 0.5


def test_time_is_linear_in_the_number_of_layers():
    def seconds(count):
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(count)))
        start = time.perf_counter()
        prepared(model)
        return time.perf_counter() - start

    seconds(10)
    times = [min(seconds(count) for _ in range(3)) for count in (100, 800)]
    assert times[1] < 8 * 4 * times[0]


# ------------------------------------------------------------------------------------------------- squashing and saving


def test_parameters_to_keep():
    model = mlp()
    sparsifier = prepared(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "0.bias"}, {"tensor_fqn": "2.0.weight"}])
    before = type(model[0])
    with pytest.raises(KeyError, match="sparsity_lvl"):
        sparsifier.squash_mask(params_to_keep=("sparsity_lvl",))
    assert type(model[0]) is before
    sparsifier.squash_mask(
        params_to_keep_per_layer={"0": ("scope",), "2.0": ("sparsity_level",), "unknown": ("scope",)}
    )
    assert model[2][0].sparse_params == {"sparsity_level": 0.5}
    assert model[0].sparse_params == {"weight": {"scope": "tensor"}, "bias": {"scope": "tensor"}}


def test_generations_of_checkpoints_and_what_they_share():
    model = mlp()
    sparsifier = prepared(model, sparsity_level=0.75)
    sparsifier.step()
    kept = []
    for _ in range(4):
        saved = sparsifier.state_dict()
        model = mlp()
        following = prepared(model)
        following.load_state_dict(saved)
        assert following.state == sparsifier.state
        assert following.state["0.weight"]["mask"] is not saved["state"]["0.weight"]["mask"]
        kept.append(float((model[0].weight != 0).float().mean()))
        saved["state"]["0.weight"]["mask"].zero_()
        sparsifier = following
    assert kept == [0.25] * 4
    assert sparsifier.groups[0]["sparsity_level"] == 0.75


def test_a_state_is_loaded_by_torch_load_with_its_safeguard():
    sparsifier = prepared(mlp(), zeros_per_block=2)
    sparsifier.step()
    file = io.BytesIO()
    torch.save(sparsifier.state_dict(), file)
    file.seek(0)
    fresh = prepared(mlp())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.state == sparsifier.state


def test_masks_of_any_dtype_and_what_a_subclass_keeps_survive():
    model, fresh = mlp(), mlp()
    one, other = Counting({"test": 3}), Counting()
    one.prepare(model, [{"tensor_fqn": "0.weight"}])
    mask = model[0].parametrizations.weight[0].mask
    mask.data = torch.arange(mask.numel()).reshape(mask.shape)
    for _ in range(3):
        one.step()
    other.prepare(fresh, None)
    assert one.state != other.state
    other.load_state_dict(one.state_dict())
    assert one.state == other.state
    assert other.state["0.weight"]["count"] == 3
    assert fresh[0].parametrizations.weight[0].mask.dtype == torch.int64
    assert not parametrize.is_parametrized(fresh[2][0])
    assert [{k: v for k, v in group.items() if k != "module"} for group in one.groups] == [
        {k: v for k, v in group.items() if k != "module"} for group in other.groups
    ]


def test_loading_what_does_not_fit_is_an_error_and_changes_nothing():
    sparsifier = prepared(mlp(), sparsity_level=0.75)
    sparsifier.step()
    saved = sparsifier.state_dict()
    with pytest.raises(ValueError, match="prepare"):
        WeightNormSparsifier().load_state_dict(saved)
    small = nn.Sequential(nn.Linear(8, 16))
    target = prepared(small)
    with pytest.raises(RuntimeError, match=r"2\.0\.weight"):
        target.load_state_dict(saved)
    assert (target.state["0.weight"]["mask"] == 1).all()
    target.load_state_dict(saved, strict=False)
    assert torch.equal(target.state["0.weight"]["mask"], saved["state"]["0.weight"]["mask"])
    saved["state"]["0.weight"]["mask"] = torch.ones(2, 2)
    with pytest.raises(ValueError, match="shape"):
        target.load_state_dict(saved, strict=False)
    assert (target.state["0.weight"]["mask"] == 0).any()


def test_files(tmp_path):
    path = tmp_path / "masks here.safetensors"
    model = mlp(torch.bfloat16)
    sparsifier = prepared(model, [{"tensor_fqn": "*.weight", "note": "mine"}], sparsity_level=0.3, zeros_per_block=3)
    sparsifier.step()
    sparsifier.save(path)
    assert path.stat().st_size < 4000
    fresh_model = mlp(torch.bfloat16)
    fresh = prepared(fresh_model)
    fresh.load(path)
    assert fresh.state == sparsifier.state
    assert fresh.groups[0]["sparse_block_shape"] == (1, 4)
    assert fresh.groups[0]["note"] == "mine"
    assert fresh.defaults == sparsifier.defaults
    assert torch.equal(fresh_model[0].weight, model[0].weight)
    with pytest.raises(FileNotFoundError):
        fresh.load(tmp_path / "none")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="masks of a sparsifier"):
        fresh.load(path)
    assert fresh.state == sparsifier.state
    sparsifier.groups[0]["note"] = object()
    with pytest.raises(ValueError, match="JSON"):
        sparsifier.save(path)


def test_a_prepared_model_needs_no_masks_in_its_own_checkpoint():
    model, other = mlp(), mlp()
    one, two = prepared(model), prepared(other)
    one.step()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(model.state_dict())
    assert not [key for key in model.state_dict() if "mask" in key]
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(model(x), other(x))


def test_copies_and_pickles():
    model = mlp()
    sparsifier = prepared(model, sparsity_level=0.75)
    sparsifier.step()
    copied, its = copy.deepcopy((model, sparsifier))
    assert its.groups[0]["module"] is copied[0]
    assert its.state["0.weight"]["mask"] is copied[0].parametrizations.weight[0].mask
    its.groups[0]["sparsity_level"] = 0.0
    its.step()
    assert (copied[0].weight != 0).all()
    assert (model[0].weight != 0).float().mean() == 0.25
    its.squash_mask()
    assert type(copied[0]) is nn.Linear
    assert (model[0].weight != 0).float().mean() == 0.25
    back = pickle.loads(pickle.dumps(sparsifier))
    assert back.enable_mask_update
    assert back.state == sparsifier.state
    with pytest.raises(ValueError, match="prepare"):
        back.step()
    fresh = prepared(mlp())
    fresh.load_state_dict(back.state_dict())
    assert fresh.state == sparsifier.state
    back.prepare(mlp())
    back.step()


# ------------------------------------------------------------------------------------------------------------- training


def test_zeros_can_be_held_while_training_goes_on():
    model = mlp()
    sparsifier = prepared(model)
    sparsifier.step()
    sparsifier.squash_mask()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    handle = sparsifier.hold_zeros(optimizer)

    def train():
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        train()
    assert (model[0].weight == 0).float().mean() == 0.5
    assert (optimizer.state[model[0].weight]["exp_avg"][model[0].weight == 0] == 0).all()
    assert (model[0].bias != 0).all()
    handle.remove()
    train()
    assert (model[0].weight == 0).float().mean() < 0.4


def test_optimizers_go_on_with_the_same_parameters():
    model = mlp()
    parameters = {id(parameter) for parameter in model.parameters()}
    sparsifier = prepared(model)
    assert {id(parameter) for parameter in model.parameters()} == parameters
    sparsifier.step()
    sparsifier.squash_mask()
    assert {id(parameter) for parameter in model.parameters()} == parameters


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_sees_later_steps():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    sparsifier = prepared(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 8)
    for level in (0.25, 0.75):
        for group in sparsifier.groups:
            group["sparsity_level"] = level
        sparsifier.step()
        torch.testing.assert_close(compiled(x), model(x))
        assert (model[0].weight == 0).float().mean() == level
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_averaged_models_and_wrappers_for_parallel_training():
    model, x = mlp(), torch.randn(3, 8)
    sparsifier = prepared(nn.DataParallel(torch.compile(model, backend="eager")), [{"tensor_fqn": "0.weight"}])
    assert sparsifier.model is model
    sparsifier.step()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    expected = model(x)
    assert torch.equal(averaged(x), expected)
    sparsifier.squash_mask()
    assert torch.equal(model(x), expected)
    assert torch.equal(averaged(x), expected)


def test_convert_puts_other_classes_in_place_with_hooks_and_mode():
    class Mine(nn.Linear):
        @classmethod
        def from_float(cls, module):
            made = cls(module.in_features, module.out_features)
            made.weight = nn.Parameter(module.weight.detach())
            return made

    model = mlp().eval()
    calls = []
    model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append(type(module)), with_kwargs=True)
    sparsifier = prepared(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    converted = sparsifier.convert(model, {nn.Linear: Mine})
    assert type(converted[0]) is Mine
    assert type(converted[2][0]) is nn.Linear
    assert not converted[0].training
    converted(torch.randn(1, 8))
    assert calls == [Mine]
    assert type(model[0]) is not Mine
    with pytest.raises(NotImplementedError):
        sparsifier.convert(model)


def test_the_report_counts_and_measures():
    model = mlp()
    sparsifier = prepared(model, sparsity_level=0.75)
    sparsifier.step()
    report = sparsifier.report(torch.randn(2, 8))
    assert report.zeros == {"0.weight": (96, 128), "2.0.weight": (96, 128), "2.1.weight": (24, 32)}
    assert report.sparsity == 0.75
    assert report.flops == (2 * 2 * (128 + 128 + 32), 2 * 2 * (128 + 128 + 32) // 4)
    assert min(report.seconds) > 0
    assert "75.0%" in str(report)
    assert report.to_dict()["sparsity"] == 0.75
    assert sparsifier.report().flops == (0, 0)
    assert (model[0].weight == 0).float().mean() == 0.75
    assert parametrize.is_parametrized(model[0])


# ------------------------------------------------------------------------------------ with sparse activations, and more


@pytest.mark.parametrize("weights", [None, "int8", "int4-g32", "int4"])
def test_weight_masks_survive_sparse_activations_and_rounding(weights):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    sparsifier = prepared(model, sparsity_level=1.0, zeros_per_block=2)
    sparsifier.step()
    sparsifier.squash_mask()
    zero = [(layer.weight == 0) for layer in model]
    calibration = deadband.calibrate(model, [torch.randn(256, 64)], progress=False)
    deadband.sparsify_(model, calibration.allocate(0.3), weights=weights)
    for layer, mask in zip(model, zero, strict=True):
        assert (layer.weight[mask] == 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_prepared_model_is_saved_as_it_is_masked(name, tied, tmp_path):
    model = tiny_model(name)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    sparsifier = prepared(model, [{"tensor_fqn": "*.weight"}], sparsity_level=1.0, zeros_per_block=2)
    sparsifier.step()
    ids = torch.randint(0, 40, (2, 7))
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "saved model")
    loaded, info = type(model).from_pretrained(tmp_path / "saved model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(ids).logits, expected)
    assert parametrize.is_parametrized(model.get_input_embeddings())


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_pruned_by_wanda_then_sparse_in_activations_then_saved(weights, tmp_path):
    model = tiny_model("llama")
    batches = tiny_batches()
    calibration = deadband.calibrate(model, batches, progress=False)
    sparsifier = WandaSparsifier(calibration, 1.0, (1, 4), 2)
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in calibration.sites])
    sparsifier.step()
    sparsifier.squash_mask()
    again = deadband.calibrate(model, batches, progress=False)
    deadband.sparsify_(model, again.allocate(0.3), weights=weights)
    with torch.no_grad():
        expected = model(**batches[0]).logits
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.allclose(loaded(**batches[0]).logits, expected, atol=1e-5)
    for name in calibration.sites:
        weight = loaded.get_submodule(name).weight
        assert (weight == 0).float().mean() >= 0.5
        assert (weight.reshape(-1, 4) == 0).sum(1).min() >= 2


def test_a_mask_that_is_on_is_named_before_activations_become_sparse():
    model = mlp()
    prepared(model)
    with pytest.raises(ValueError, match="squash_mask"):
        deadband.calibrate(model, [torch.randn(4, 8)], progress=False)


def test_fake_sparsity_says_which_shape_it_expects():
    with pytest.raises(AssertionError, match=r"\[2\]"):
        FakeSparsity(torch.ones(3))(torch.ones(2))
    assert FakeSparsity(torch.ones(3)).state_dict() == {}


class Halved(nn.Module):
    """A user's own way to apply a mask, with a buffer of its own."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("kept", mask.bool())

    def forward(self, x):
        return x * self.kept


class Replacing(BaseSparsifier):
    """Puts a new mask in the place of the old one."""

    def update_mask(self, module, tensor_name, **group):
        module.parametrizations[tensor_name][0].mask = torch.zeros_like(getattr(module, tensor_name))


def test_masks_of_the_users_own_are_squashed_too():
    model = mlp()
    sparsifier = prepared(model, [{"tensor_fqn": "0.weight", "parametrization": Halved, "mask": torch.zeros(16, 8)}])
    model.double()
    sparsifier.squash_mask()
    assert type(model[0]) is nn.Linear
    assert not model[0].weight.any()
    sparsifier = Replacing()
    sparsifier.prepare(model, [{"tensor_fqn": "2.0.weight"}])
    sparsifier.step()
    sparsifier.step()
    sparsifier.squash_mask()
    assert not model[2][0].weight.any()
    with torch.device("meta"):
        model = mlp()
    sparsifier = prepared(model)
    sparsifier.step()
    model.to_empty(device="cpu")
    sparsifier.squash_mask()
    assert type(model[0]) is nn.Linear


def test_unprepare_takes_only_its_own_off():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    expected = model(x)
    first, second = prepared(model), prepared(model, sparse_block_shape=(1, 1))
    for sparsifier in (first, second):
        sparsifier.step()
    first.report(x)
    first.unprepare()
    assert len(model[1].parametrizations.weight) == 1
    assert (model[1].weight == 0).float().mean() == 0.5
    second.unprepare()
    assert type(model[1]) is nn.Linear
    assert torch.allclose(model(x), expected)
    assert len(model[0].parametrizations.weight) == 1


def test_a_state_of_fewer_settings_takes_the_defaults():
    from torch.ao.pruning import WeightNormSparsifier as Theirs

    model = mlp()
    theirs = Theirs(sparsity_level=0.25)
    theirs.prepare(model, None)
    sparsifier = prepared(mlp(), sparsity_level=0.9)
    sparsifier.load_state_dict(theirs.state_dict())
    sparsifier.step()
    assert sparsifier.state["0.weight"]["mask"].mean() == 0.75


def test_loading_that_fails_half_way_leaves_the_sparsifier_whole(monkeypatch):
    sparsifier = prepared(mlp(), [{"tensor_fqn": "0.weight"}])
    other = prepared(mlp())
    other.step()
    monkeypatch.setattr(WeightNormSparsifier, "_put", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparsifier.load_state_dict(other.state_dict())
    monkeypatch.undo()
    assert [group["tensor_fqn"] for group in sparsifier.groups] == ["0.weight"]
    sparsifier.step()
    sparsifier.squash_mask()


@pytest.mark.parametrize("level", ["x", None, float("nan"), torch.tensor(0.5)])
def test_a_level_that_is_no_number_is_named_before_masks_change(level):
    sparsifier = prepared(mlp(), [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.0.weight", "sparsity_level": level}])
    with pytest.raises(ValueError, match=r"2\.0\.weight: sparsity_level"):
        sparsifier.step()
    assert (sparsifier.state["0.weight"]["mask"] == 1).all()


def test_nothing_to_prune_is_nothing_to_do():
    sparsifier = prepared(mlp(), [])
    sparsifier.step()
    sparsifier.squash_mask()


def test_lists_of_the_users_own_stay_lists(tmp_path):
    sparsifier = prepared(mlp(), [{"tensor_fqn": "0.weight", "rows": [0, 1]}])
    sparsifier.save(tmp_path / "masks")
    sparsifier.load(tmp_path / "masks")
    assert sparsifier.groups[0]["rows"] == [0, 1]
    assert sparsifier.groups[0]["sparse_block_shape"] == (1, 4)


def test_a_state_that_names_both_sides_of_a_tie_is_one_mask():
    model = Tied()
    sparsifier = prepared(model, [{"tensor_fqn": "head.weight"}])
    sparsifier.step()
    saved = sparsifier.state_dict()
    saved["state"]["embed.weight"] = saved["state"]["head.weight"]
    fresh = prepared(Tied(), [{"tensor_fqn": "head.weight"}])
    fresh.load_state_dict(saved)
    assert len(fresh.groups) == 1
    assert len(fresh.model.head.parametrizations.weight) == 1
