import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from conftest import mlp, same_state, sparse_model, state_of, tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F

import deadband
from deadband.calibration.drift import range_of
from deadband.layers.sites import sparse_sites
from deadband.layers.sparse import DECODE_ROWS, DenseLinear, SparseLinear
from deadband.ops.kernels import KERNEL_DTYPES
from deadband.sparsify.config import SparsityConfig
from deadband.sparsify.sparsify import sparsify_

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))


def masked_mlp(model, x, thresholds):
    """The sparse MLP written out: what sparsify_ has to compute."""
    for index in (0, 2, 4):
        x = torch.where(x.abs() > thresholds.get(str(index), -1.0), x, 0)
        x = F.linear(x, model[index].weight, model[index].bias)
        x = x.relu() if index != 4 else x
    return x


def test_plain_mapping_and_names():
    model, thresholds = mlp(), {"0": 0.6, "4": 0.2}
    expected = masked_mlp(model, X, thresholds)
    assert sparsify_(model, thresholds) is model
    assert [type(module) for module in model] == [SparseLinear, nn.ReLU, nn.Linear, nn.ReLU, SparseLinear]
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected)
    assert {*model.state_dict()} == {*mlp().state_dict(), "0.threshold", "4.threshold"}
    llama = sparsify_(tiny_model("llama"), {"layers.0.mlp.down_proj": 0.12})
    assert list(sparse_sites(llama)) == ["model.layers.0.mlp.down_proj"]


def test_prefill_is_dense_and_sparse_when_forced():
    model = mlp()
    thresholds = {"0": 0.8, "2": 0.3, "4": 0.3}
    x = torch.randn(DECODE_ROWS + 1, 16)
    with torch.no_grad():
        dense, sparse = model(x), masked_mlp(model, x, thresholds)
        sparsify_(model, thresholds)
        torch.testing.assert_close(model(x), dense)
        torch.testing.assert_close(model(x[:DECODE_ROWS]), sparse[:DECODE_ROWS])
        with deadband.sparse_prefill(model):
            torch.testing.assert_close(model(x), sparse)
        with deadband.dense(model):
            torch.testing.assert_close(model(x[:1]), dense[:1])
        torch.testing.assert_close(model(x), dense)
    with pytest.raises(KeyError), deadband.sparse_prefill(model):
        raise KeyError
    assert model[0].sparse_rows == DECODE_ROWS


def test_parameters_keep_identity_and_there_is_one_copy():
    model = mlp()
    parameters = dict(model.named_parameters())
    sparsify_(model, exact=True)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert sum(value.nbytes for value in model.parameters()) == sum(value.nbytes for value in mlp().parameters())
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == len(parameters)
    assert model[2].weight.t().is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_densify_is_bit_for_bit(dtype):
    model = mlp(dtype)
    before, modules = state_of(model), list(model.modules())
    deadband.densify_(sparsify_(model, {"0": 0.5, "4": 0.1}))
    assert same_state(model, before)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert all("threshold" not in module.__dict__ and not module._buffers for module in model.modules())
    with pytest.raises(ValueError, match="no layer of this Sequential is sparse"):
        deadband.densify_(model)


def test_exact_is_lossless_on_a_relu_model_and_skips():
    model = mlp()
    with torch.no_grad():
        dense = model(X[:1])
        sparsify_(model, exact=True)
        torch.testing.assert_close(model(X[:1]), dense, rtol=1e-6, atol=1e-6)
    report = deadband.sparsity(model)
    assert report.sites["0"] == 0.0
    assert report.sites["2"] > 0.2
    assert report.sites["4"] > 0.2


def test_exact_on_opt_needs_no_calibration_and_keeps_every_token():
    model, ids = tiny_model("opt"), tiny_batches(1)[0]["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    deadband.sparsify_(model, exact=True)
    assert torch.equal(model.generate(ids, max_new_tokens=10, do_sample=False), expected)
    sites = deadband.sparsity(model).sites
    assert all(value > 0.2 for name, value in sites.items() if name.endswith("fc2"))


def test_achieved_sparsity_is_counted():
    model = sparsify_(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).eval(), {"0": 1.0, "1": 0.0})
    with torch.no_grad():
        model(torch.tensor([[0.0, 0.5, 1.0, 1.5]]))
        model(torch.zeros(9, 4))  # prefill: dense, not counted
    report = deadband.sparsity(model, reset=True)
    assert report.sites == {"0": 0.75, "1": 0.0}
    assert report.total == pytest.approx(0.75 * 32 / 48)
    assert float(report) == report.total
    assert report.entries == 12
    assert "75.0%" in str(report)
    assert deadband.sparsity(model).entries == 0
    assert deadband.sparsity(model).total != deadband.sparsity(model).total  # NaN: nothing ran
    silent = sparsify_(mlp(), exact=True, count=False)
    assert all(module.counts is None for module in sparse_sites(silent).values())
    with pytest.raises(ValueError, match="count=True"):
        deadband.sparsity(silent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"thresholds": {"7": 0.1}}, "site '7' is not a linear layer of the model, which has for example"),
        ({"thresholds": {"1": 0.1}}, "site '1' is ReLU, expected nn.Linear"),
        ({"thresholds": {"0": -0.1}}, "threshold -0.1 has to be finite and not negative"),
        ({"thresholds": {"0": 1e39}}, "fit float32"),
        ({"thresholds": {"0": 10**60}}, "fit float32"),
        ({"thresholds": {"0": float("nan")}}, "threshold nan"),
        ({"thresholds": {"0": float("inf")}}, "threshold inf"),
        ({"thresholds": {}}, "thresholds is empty"),
        ({}, "pass either thresholds"),
        ({"thresholds": {"0": 0.1}, "exact": True}, "pass either thresholds"),
        ({"thresholds": {"0": 0.1}, "include": "0"}, "thresholds name their sites themselves"),
        ({"thresholds": {"0": 0.1}, "criterion": "size"}, "criterion 'size' is not known"),
        ({"thresholds": {"0": 0.1}, "gradient": "none"}, "gradient='none' is not known"),
        ({"exact": True, "include": "nothing"}, "matches no linear layer"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments, message):
    model = mlp()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        sparsify_(model, **arguments)
    assert same_state(model, before)
    assert not sparse_sites(model)


def test_ambiguous_names_are_refused():
    with pytest.raises(ValueError, match="'mlp.down_proj' ends several names"):
        sparsify_(tiny_model("llama"), {"mlp.down_proj": 0.1})


def test_a_failure_midway_leaves_the_model_as_it_was(monkeypatch):
    model = mlp()
    before = state_of(model)
    import deadband.layers.sparse

    lay_out_, calls = deadband.layers.sparse.lay_out_, []

    def failing(module):
        calls.append(module)
        if len(calls) == 3:
            raise MemoryError("no memory left")
        lay_out_(module)

    monkeypatch.setattr(deadband.layers.sparse, "lay_out_", failing)
    with pytest.raises(MemoryError):
        sparsify_(model, exact=True)
    assert same_state(model, before)
    assert [type(module) for module in model] == [type(module) for module in mlp()]


def test_a_failure_while_changing_a_sparse_model_keeps_its_thresholds(monkeypatch):
    model = sparsify_(mlp(), {"0": 0.5, "2": 0.25})
    before = state_of(model)
    import deadband.sparsify.sparsify

    make_sparse_, calls = deadband.sparsify.sparsify.make_sparse_, []

    def failing(module, *arguments, **options):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        return make_sparse_(module, *arguments, **options)

    monkeypatch.setattr(deadband.sparsify.sparsify, "make_sparse_", failing)
    with pytest.raises(MemoryError):
        sparsify_(model, {"0": 0.1, "2": 0.1, "4": 0.1})
    assert same_state(model, before)


def test_sparsifying_again_replaces_what_was():
    model = sparsify_(mlp(), {"0": 0.5, "2": 0.25})
    sparsify_(model, {"2": 0.75, "4": 0.1})
    assert type(model[0]) is nn.Linear
    assert model[0].weight.is_contiguous()
    assert {name: round(module.threshold.item(), 6) for name, module in sparse_sites(model).items()} == {
        "2": 0.75,
        "4": 0.1,
    }


def test_calibration_of_another_model_is_refused():
    thresholds = deadband.calibrate(tiny_model("llama"), tiny_batches(), progress=False).allocate(0.4)
    with pytest.raises(ValueError, match="of another model: this Sequential has no site 'model.layers.0"):
        sparsify_(mlp(), thresholds)
    other = mlp()
    other[0] = nn.Linear(16, 41)
    thresholds = deadband.calibrate(mlp(), [X], progress=False).allocate(0.4)
    with pytest.raises(ValueError, match=r"site '0' is \(41, 16\) here and was \(40, 16\) there"):
        sparsify_(other, thresholds)
    with pytest.raises(ValueError, match="are for criterion 'magnitude'"):
        sparsify_(mlp(), thresholds, criterion="weighted_magnitude")


def test_a_model_of_the_same_shapes_but_other_weights_is_refused():
    thresholds = deadband.calibrate(tiny_model("llama"), tiny_batches(), progress=False).allocate(0.4)
    with pytest.raises(ValueError, match="has other weights here"):
        sparsify_(tiny_model("llama", seed=1), thresholds)
    sparsify_(tiny_model("llama").bfloat16(), thresholds)  # the same model, rounded


def test_failing_to_tell_transformers_undoes_everything(monkeypatch):
    import deadband.sparsify.sparsify

    def failing(model, config):
        raise MemoryError

    model = sparsify_(tiny_model("llama"), {"layers.0.mlp.up_proj": 0.5})
    before = state_of(model)
    monkeypatch.setattr(deadband.sparsify.sparsify, "FOLLOWERS", [*deadband.sparsify.sparsify.FOLLOWERS, failing])
    with pytest.raises(MemoryError):
        sparsify_(model, {"layers.1.mlp.up_proj": 0.5})
    assert same_state(model, before)
    assert list(sparse_sites(model)) == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_densify_is_all_or_nothing(weights, monkeypatch):
    import deadband.sparsify.sparsify

    def failing(model, config):
        raise KeyboardInterrupt

    model = sparsify_(tiny_model("llama"), {"layers.0.mlp.up_proj": 0.5, "layers.1.mlp.up_proj": 0.1}, weights=weights)
    before, kinds = state_of(model), [type(module) for module in model.modules()]
    ids = torch.randint(3, 128, (1, 2))
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(deadband.sparsify.sparsify, "FOLLOWERS", [failing])
        with pytest.raises(KeyboardInterrupt):
            deadband.densify_(model)
        assert same_state(model, before)
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(model(ids).logits, expected)


def test_modules_that_only_look_like_transformers_ones():
    model = mlp()
    model.config, model.save_pretrained = {}, None
    assert sparse_sites(sparsify_(model, {"0": 0.1}))


def test_layers_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="site '0' is on the meta device or offloaded"):
        sparsify_(model, exact=True)


def test_autocast():
    model = sparsify_(mlp(), {"0": 0.6, "2": 0.2})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = model(X)
    with torch.no_grad():
        torch.testing.assert_close(actual.float(), model(X), rtol=0.1, atol=0.1)


def test_tokens_are_counted_with_gradients_on_too():
    model = sparsify_(mlp(), {"0": 0.6})
    with deadband.sparse_prefill(model):
        model(torch.randn(9, 16))
    assert deadband.sparsity(model).entries == 9 * 16


def test_export_without_no_grad_and_with_dynamic_rows():
    model = sparsify_(mlp(), {"0": 0.6, "2": 0.2})
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(model, (torch.randn(3, 16),), dynamic_shapes=({0: rows},))
    assert sum("sparse_linear" in str(node.target) for node in program.graph.nodes) == 2
    for count in (1, 4, 9):
        x = torch.randn(count, 16)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))


def test_weighted_magnitude():
    model = mlp()
    norms = model[0].weight.detach().norm(dim=0)
    x = X[:1]
    expected = masked_mlp(model, torch.where(x.abs() * norms > 0.7, x, 0), {})
    sparsify_(model, {"0": 0.7}, criterion="weighted_magnitude")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert "0.scale" in model.state_dict()
    with torch.no_grad():
        torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
    assert model[0].scale.dtype == torch.float32


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_training(gradient):
    model = sparsify_(mlp(), {"0": 0.7}, gradient=gradient).train()
    x = torch.randn(9, 16, requires_grad=True)
    masked = torch.where(x.abs() > 0.7, x, 0)
    expected = masked_mlp(model, masked, {})
    actual = model(x)  # nine rows: all of them masked while training
    torch.testing.assert_close(actual, expected)
    wanted_weight, wanted_masked = torch.autograd.grad(expected.square().sum(), [model[0].weight, masked])
    weight, entry = torch.autograd.grad(actual.square().sum(), [model[0].weight, x])
    torch.testing.assert_close(weight, wanted_weight)
    if gradient == "exact":
        wanted_masked = torch.where(x.abs() > 0.7, wanted_masked, 0)
    torch.testing.assert_close(entry, wanted_masked)


def test_gradients_in_eval_mode_follow_the_rows():
    model = sparsify_(mlp(), {"0": 0.7})
    for rows, sparse in ((DECODE_ROWS, True), (DECODE_ROWS + 1, False)):
        x = torch.randn(rows, 16, requires_grad=True)
        with torch.no_grad():
            expected = model(x)
        actual = model(x)
        torch.testing.assert_close(actual, expected)
        (gradient,) = torch.autograd.grad(actual.sum(), x)
        assert bool((gradient[x.abs() <= 0.7] == 0).all()) is sparse


def test_an_optimizer_made_before_still_trains_the_model():
    model = mlp().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsify_(model, {"0": 0.1, "2": 0.1})
    before = model(X).square().sum()
    for _ in range(5):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    assert model(X).square().sum() < before


def test_casting_keeps_thresholds_exact():
    model = sparsify_(mlp(), {"0": 0.1})
    for change in (
        lambda: model.bfloat16(),
        lambda: model.half(),
        lambda: model.to(torch.float64),
        lambda: model.float(),
    ):
        change()
        assert model[0].threshold.dtype == torch.float32
        assert model[0].threshold.item() == torch.tensor(0.1).item()
        assert model[0].weight.t().is_contiguous() == (model[0].weight.dtype in KERNEL_DTYPES)


def test_copies_pickles_and_state_dicts():
    model = sparsify_(mlp(), {"0": 0.6, "2": 0.2})
    with torch.no_grad():
        expected = model(X)
        copied = copy.deepcopy(model)
        pickled = pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = sparsify_(mlp(), {"0": 0.0, "2": 0.0})
        nn.init.zeros_(other[0].weight)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assigned = sparsify_(mlp(), {"0": 0.0, "2": 0.0})
        plain = {key: value.contiguous() for key, value in model.state_dict().items()}
        assigned.load_state_dict(plain, assign=True)
        for each in (copied, pickled, other, assigned):
            assert torch.equal(each(X), expected)
            assert each[0].weight.t().is_contiguous()
    copied[0].counts.zero_()
    assert deadband.sparsity(model).entries > 0


def test_safetensors_of_a_plain_module(tmp_path):
    model = sparsify_(mlp(), {"0": 0.6, "2": 0.2})
    save_model(model, tmp_path / "model.safetensors")
    other = sparsify_(mlp(), {"0": 0.0, "2": 0.0})
    load_model(other, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(other(X), model(X))


def test_hooks_and_shared_modules_survive():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    seen = []
    shared.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    sparsify_(model, {"0": 0.1})
    with torch.no_grad():
        model(X)
    assert model[0] is model[2] is shared
    assert seen == [SparseLinear, SparseLinear]
    sparsify_(deadband.densify_(model), {"2": 0.1})  # the other name of the same layer
    assert type(shared) is SparseLinear


def test_output_layer_of_a_tied_model():
    model = sparse_model("llama")
    assert type(model.lm_head) is DenseLinear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = deadband.sparsify_(tiny_model("llama"), exact=True, output_layer=False)
    assert type(plain.lm_head) is nn.Linear
    as_site = deadband.sparsify_(tiny_model("mistral"), {"lm_head": 0.1})
    assert type(as_site.lm_head) is SparseLinear
    again = deadband.sparsify_(model, {"lm_head": 0.1})
    assert type(again.lm_head) is SparseLinear
    assert type(deadband.densify_(again).lm_head) is nn.Linear


def test_config_is_checked():
    with pytest.raises(ValueError, match="sparsity 1.5 is out of range"):
        SparsityConfig(sites=("a",), sparsity=1.5)
    with pytest.raises(TypeError):
        SparsityConfig(("a",))
    config = SparsityConfig(sites=["a"], sparsity=0.4)
    assert SparsityConfig(**config.to_dict()) == config


def test_printing():
    model = sparsify_(mlp(), {"0": 0.25}, criterion="weighted_magnitude")
    assert "SparseLinear(in_features=16, out_features=40, bias=True, threshold=0.25, scaled)" in repr(model)
    assert "SparseConv1D(nf=192, nx=64, threshold=" in repr(sparse_model("gpt2"))


# -------------------------------------------------------------------------------------------------------- static masks


def masked_reference(model, x, masks):
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, keep=keep: (torch.where(keep, args[0], 0),))
        for name, keep in masks.items()
    ]
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_masks_of_a_sparsifier(dtype, rows):
    model = mlp(dtype)
    sparsifier = deadband.ActivationSparsifier(
        model, deadband.aggregate.mean_abs, deadband.reduce.mean, deadband.mask.magnitude, sparsity=0.5
    )
    for name in ("2", "4"):
        sparsifier.register_layer(model.get_submodule(name))
    model(torch.randn(64, 16, dtype=dtype))
    sparsifier.step()
    masks = sparsifier.masks()
    x = torch.randn(rows, 16, dtype=dtype)
    x[0, 3] = 0
    with torch.no_grad():
        expected = masked_reference(model, x, masks)
        dense = model(x)
        deadband.sparsify_(model, masks=masks)
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2) if dtype is torch.bfloat16 else (
            torch.testing.assert_close(model(x), expected)
        )
        with deadband.dense(model):
            torch.testing.assert_close(model(x), dense)
    if rows <= 4:
        assert min(deadband.sparsity(model).sites.values()) >= 0.5
    assert "masked=20" in repr(model)
    deadband.densify_(model)
    assert not [name for name in model.state_dict() if "mask" in name]


def test_masks_and_thresholds_together():
    model = mlp()
    keep = torch.arange(40) % 2 == 0
    deadband.sparsify_(model, {"0": 0.5}, masks={"2": keep})
    assert model[0].threshold.item() == 0.5
    assert model[2].threshold.item() == 0
    assert torch.equal(model[2].mask, keep)
    assert model[0].mask is None
    deadband.sparsify_(model, {"2": 0.25})
    assert model[2].mask is None


def test_what_a_mask_skips_may_be_infinite():
    layer = deadband.sparsify_(nn.Sequential(nn.Linear(3, 2)), masks={"0": torch.tensor([True, False, True])})
    x = torch.tensor([[1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
    with torch.no_grad():
        assert layer.eval()(x).isfinite().all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (
            {"2": torch.ones(3, dtype=torch.bool)},
            r"site '2': its mask is torch.bool \(3,\), expected torch.bool \(40,\)",
        ),
        ({"2": torch.ones(40)}, "its mask is torch.float32"),
        ({"2": [True] * 40}, "its mask is list"),
        ({"nowhere": torch.ones(40, dtype=torch.bool)}, "site 'nowhere' is not a linear layer"),
        ({}, "masks is empty"),
    ],
)
def test_bad_masks_leave_the_model(masks, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        deadband.sparsify_(model, masks=masks)
    assert not any(isinstance(module, deadband.SparseLinear) for module in model.modules())


def test_masks_train_and_compile():
    model = deadband.sparsify_(mlp(), masks={"2": torch.arange(40) < 10})
    x = torch.randn(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    model.train()
    model(x).sum().backward()
    assert (model[2].weight.grad[:, 10:] == 0).all()
    assert (model[2].weight.grad[:, :10] != 0).any()


# --------------------------------------------------------------------------------------------------------------- drift


def calibrated_mlp(sparsity=0.5, **options):
    """A sparse MLP that knows its ranges, and data like the calibration's."""
    model, generator = mlp(), torch.Generator().manual_seed(5)
    batches = [torch.randn(128, 16, generator=generator) for _ in range(8)]
    passes = {"model": model, "batches": batches, "progress": False}
    thresholds = deadband.calibrate(model, batches, progress=False).allocate(sparsity, "uniform", **passes, **options)
    return model, thresholds, lambda rows: torch.randn(rows, 16, generator=generator)


def run_sparse(model, x):
    with torch.no_grad(), deadband.sparse_prefill(model):
        model(x)


@pytest.mark.parametrize("options", [{}, {"relative": True, "center": True}])
def test_data_like_the_calibrations_stays_in_range(options):
    model, thresholds, draw = calibrated_mlp(**options)
    assert thresholds.corrected
    assert thresholds.expected["0"] == pytest.approx(0.5, abs=0.01)
    assert all(low <= thresholds.expected[name] <= high for name, (low, high) in thresholds.site_range.items())
    sparsify_(model, thresholds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (64, 65, 200, 1000, 64, 64):
            run_sparse(model, draw(rows))
            report = deadband.sparsity(model, reset=True)
            assert not report.drifted
            assert report.expected == thresholds.expected
            assert "range" not in str(report)
            assert "NaN" not in str(report)


def test_other_data_warn_once_and_name_sites_figures_and_remedy():
    model, thresholds, draw = calibrated_mlp()
    sparsify_(model, thresholds)
    run_sparse(model, 0.2 * draw(100))
    with pytest.warns(deadband.DriftWarning) as caught:
        report = deadband.sparsity(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    low, high = thresholds.site_range["0"]
    assert f"0 skips {report.sites['0']:.1%}, calibrated to {thresholds.expected['0']:.1%}" in message
    assert f"({low:.1%} to {high:.1%})" in message
    assert "Calibrate on data like these, or run the model dense with deadband.densify_" in message
    assert report.drifted["0"] == (report.sites["0"], thresholds.expected["0"])
    assert f"{len(report.drifted)} sites left the calibrated range" in str(report)
    assert f"0, calibrated to {thresholds.expected['0']:.1%}" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert deadband.sparsity(model, reset=True, warn=False).drifted == report.drifted
        assert not deadband.sparsity(model).drifted  # nothing seen since


def test_few_rows_are_not_judged():
    model, thresholds, draw = calibrated_mlp()
    sparsify_(model, thresholds)
    run_sparse(model, 0.1 * draw(63))
    assert not deadband.sparsity(model).drifted
    run_sparse(model, 0.1 * draw(1))
    assert deadband.sparsity(model, warn=False).drifted


def test_no_range_without_activations_of_the_sparse_model_or_with_few_of_them():
    model, batches = mlp(), [torch.randn(200, 16)]
    calibration = deadband.calibrate(model, batches, progress=False)
    plain = calibration.allocate(0.5)
    assert plain.site_range == {}
    assert plain.expected["0"] == pytest.approx(0.5, abs=0.01)
    few = calibration.allocate(0.5, "uniform", model=model, batches=batches, progress=False)
    assert few.site_range == {}  # three times 64 rows
    for thresholds, expected in ((plain, plain.expected["0"]), ({"0": 0.5}, math.nan), (None, math.nan)):
        other = sparsify_(mlp(), thresholds, exact=thresholds is None)
        run_sparse(other, torch.zeros(100, 16))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = deadband.sparsity(other)
        assert report.expected["0"] == pytest.approx(expected, nan_ok=True)
        assert not report.drifted


def test_a_masked_site_has_no_range():
    model, thresholds, draw = calibrated_mlp()
    sparsify_(model, thresholds, masks={"2": torch.arange(40) < 4})
    assert model[2].site_range is None
    assert math.isnan(model[2].expected)
    assert model[0].site_range == thresholds.site_range["0"]
    run_sparse(model, draw(100))
    assert "2" not in deadband.sparsity(model, warn=False).drifted


@pytest.mark.parametrize("path", ["kernel", "reference", "gradient", "half"])
def test_nonfinite_entries_are_reported(path):
    model = sparsify_(mlp(), {"0": 0.5, "4": 0.1})
    x = torch.randn(12 if path == "reference" else 2, 16)
    x[0, 3], x[1, 4], x[1, 5] = math.nan, math.inf, -math.inf
    if path == "half":
        model, x = model.half(), x.half()
    if path == "gradient":
        model(x.requires_grad_())
    else:
        run_sparse(model, x)
    with pytest.warns(deadband.DriftWarning, match=r"saw NaN or infinite entries, which are never skipped.* 0 3"):
        report = deadband.sparsity(model, reset=True)
    assert report.nonfinite == {"0": 3, "4": 48}
    assert not report.drifted
    assert "51 entries were NaN or infinite, at 2 sites" in str(report)
    assert "0, 3 NaN or infinite" in str(report)
    assert deadband.sparsity(model).nonfinite == {"0": 0, "4": 0}


def test_ranges_go_with_copies_settings_and_away_with_densify(monkeypatch):
    model, thresholds, _ = calibrated_mlp()
    before = set(model[0].__dict__)
    sparsify_(model, thresholds)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each[0].site_range == thresholds.site_range["0"]
        assert each[0].expected == thresholds.expected["0"]
    import deadband.sparsify.sparsify

    def failing(module, config):
        raise MemoryError

    monkeypatch.setattr(deadband.sparsify.sparsify, "FOLLOWERS", [failing])
    with pytest.raises(MemoryError):
        sparsify_(model, {"0": 0.1})
    assert model[0].site_range == thresholds.site_range["0"]
    monkeypatch.undo()
    sparsify_(model, {"0": 0.1})
    assert model[0].site_range is None
    deadband.densify_(model)
    assert set(model[0].__dict__) == before


def test_measuring_does_not_warn():
    model, batches = tiny_model("llama"), tiny_batches(8, rows=4)
    passes = {"model": model, "batches": batches, "progress": False}
    thresholds = deadband.calibrate(model, batches, progress=False).allocate(0.5, "uniform", **passes)
    assert thresholds.site_range
    sparsify_(model, thresholds)
    same = [{"input_ids": torch.full((4, 24), 7)}]
    with warnings.catch_warnings():
        warnings.simplefilter("error", deadband.DriftWarning)
        deadband.evaluate(model, same, progress=False)
        deadband.evaluate(model, same, progress=False)  # counts anew
    assert deadband.sparsity(model, warn=False).drifted


@settings(max_examples=100, deadline=None)
@given(
    mean=st.floats(0.0, 1.0),
    deviation=st.sampled_from([0.0, 0.001, 0.02, 0.2]),
    count=st.integers(0, 40),
    expected=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**20),
)
def test_range_of(mean, deviation, count, expected, seed):
    generator = torch.Generator().manual_seed(seed)
    skipped = (mean + deviation * torch.randn(count, generator=generator)).clamp(0, 1).tolist()
    found = range_of(skipped, expected)
    if count < 4:
        assert found is None
        return
    low, high = found
    assert 0 <= low <= high <= 1
    assert low <= max(expected - 0.0199, 0)
    assert high >= min(expected + 0.0199, 1)
    average = sum(skipped) / count
    if range_of(skipped, average)[0] > 0 and range_of(skipped, average)[1] < 1:  # not cut off
        low, high = range_of(skipped, average)
        margin = max(4 * torch.tensor(skipped, dtype=torch.float64).std().item(), 0.02)
        assert margin - 1e-4 <= (high - low) / 2
        assert (high - low) / 2 <= 2 * margin + 1e-4
    # fewer of the same figures are trusted less
    assert range_of(skipped * 3, average)[0] >= range_of(skipped, average)[0]
