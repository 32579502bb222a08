import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import mlp, sparse_model, tiny_batches, tiny_model
from torch import nn
from torch.nn import functional as F

import deadband
from deadband.allocation.thresholds import Thresholds
from deadband.evaluation import methods
from deadband.evaluation.methods import METHODS, Setup, method_of
from deadband.evaluation.quality import PROTOCOLS, evaluate
from deadband.evaluation.simulation import Gate, GatedMLP, LowRank, Simulation, TopK, largest
from deadband.layers.scope import scope
from deadband.layers.sites import find_sites, matrix_of, weight_bytes
from deadband.sparsify.report import SparsityReport

SIMULATED = ["top-k", "wina", "wina-orthogonal", "cats", "r-sparse", "larosa"]
BUDGETS = {"llama": (0.25, 0.5), "gemma3": (0.25, 0.5), "gpt2": (0.25, 0.5), "opt": (0.5,), "phi3": (0.25, 0.5)}


@pytest.fixture(scope="module")
def setups():
    made = {}

    def setup(name="llama", dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = Setup(tiny_model(name, dtype), tiny_batches(6), progress=False)
        return made[name, dtype]

    return setup


def run_over(setup, simulation):
    simulation.reset()
    with torch.no_grad(), simulation.on(setup.model):
        for batch in setup.batches:
            setup.model(**batch)
    return simulation.sparsity


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=False).logits


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def inputs_of(setup, names):
    """Inputs of sites of the dense model over all batches, float64 [rows, in_features]."""
    seen = {name: [] for name in names}
    handles = [
        setup.sites[name].register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].double().reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    for batch in setup.batches:
        logits(setup.model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", BUDGETS)
def test_net_budgets_are_met_and_the_model_stays(setups, architecture, name):
    setup, budgets = setups(architecture), BUDGETS[architecture]
    before = {key: value.clone() for key, value in setup.model.state_dict().items()}
    dense = logits(setup.model, setup.batches[0])
    results = METHODS[name].fit(setup, budgets)
    assert len(results) == len(budgets)
    for budget, result in zip(budgets, results, strict=True):
        if name == "cats" and (architecture in ("gpt2", "opt") or budget == 0.5):
            assert result is None  # no gate, or up and down are less than half of the bytes
        elif name in SIMULATED:
            report = run_over(setup, result)
            assert isinstance(result, Simulation)
            assert isinstance(report, SparsityReport)
            assert report.total == pytest.approx(budget, abs=0.01)
            assert set(report.sites) == set(setup.sites)
            weighted = sum(report.sites[site] * weight_bytes(module) for site, module in setup.sites.items())
            assert report.total == pytest.approx(weighted / setup.total_bytes)
            assert not torch.equal(simulated(setup, result), dense)
        else:
            assert isinstance(result, Thresholds)
            deadband.sparsify_(setup.model, result)
            with torch.no_grad(), deadband.sparse_prefill(setup.model):
                for batch in setup.batches:
                    setup.model(**batch)
            assert deadband.sparsity(setup.model).total == pytest.approx(budget, abs=0.01)
            deadband.densify_(setup.model)
    assert hooks_of(setup.model) == 0
    assert all(torch.equal(value, before[key]) for key, value in setup.model.state_dict().items())
    assert torch.equal(logits(setup.model, setup.batches[0]), dense)


def simulated(setup, simulation):
    with simulation.on(setup.model):
        return logits(setup.model, setup.batches[0])


@pytest.mark.parametrize("name", SIMULATED)
def test_contexts_can_be_entered_again_and_survive_exceptions(setups, name):
    setup = setups()
    (simulation,) = METHODS[name].fit(setup, [0.25])
    batch = setup.batches[0]
    dense = logits(setup.model, batch)
    context = simulation.on(setup.model)
    with context:
        sparse = logits(setup.model, batch)
        seen = simulation.sparsity.entries
        with context, simulation.on(setup.model):
            assert torch.equal(logits(setup.model, batch), sparse)
        assert simulation.sparsity.entries == 2 * seen  # not hooked twice
        assert torch.equal(logits(setup.model, batch), sparse)
    assert torch.equal(logits(setup.model, batch), dense)
    with pytest.raises(RuntimeError, match="stop"), context:
        setup.sites["model.layers.1.mlp.down_proj"].register_forward_hook(stop)
        logits(setup.model, batch)
    setup.sites["model.layers.1.mlp.down_proj"]._forward_hooks.clear()
    assert hooks_of(setup.model) == 0
    assert torch.equal(logits(setup.model, batch), dense)
    with context:
        assert torch.equal(logits(setup.model, batch), sparse)
    simulation.reset()
    assert math.isnan(simulation.sparsity.total)
    assert simulation.sparsity.entries == 0


def stop(*_):
    raise RuntimeError("stop")


def test_simulations_are_of_one_dense_model(setups):
    setup = setups()
    (simulation,) = METHODS["top-k"].fit(setup, [0.5])
    with pytest.raises(ValueError, match="of another model"), simulation.on(tiny_model("gpt2")):
        pass
    with pytest.raises(ValueError, match="has other weights here"), simulation.on(tiny_model("llama", seed=3)):
        pass
    with pytest.raises(ValueError, match="sparse already; densify_ it"), simulation.on(sparse_model()):
        pass
    twin = tiny_model("llama")
    with simulation.on(setup.model), pytest.raises(ValueError, match="on for another model"):
        simulation.on(twin).__enter__()
    with simulation.on(twin):
        assert hooks_of(twin) == len(setup.sites)
    assert hooks_of(twin) == hooks_of(setup.model) == 0


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="method 'best' is not known; expected one of 'teal-uniform', 'teal-greedy'"):
        method_of("best")
    assert method_of("cats") is METHODS["cats"]
    with pytest.raises(ValueError, match="batches is empty"):
        Setup(mlp(), [])
    with pytest.raises(ValueError, match="sparse already"):
        Setup(sparse_model(), tiny_batches(1))
    setup = Setup(mlp(), [torch.randn(64, 16)], progress=False)
    for name, budget in itertools.product(METHODS, (1.0, -0.1, math.nan)):
        with pytest.raises(ValueError, match="out of range"):
            METHODS[name].fit(setup, [0.3, budget])


def test_names_and_order():
    assert list(METHODS) == [
        *("teal-uniform", "teal-greedy", "top-k", "wina", "wina-threshold", "wina-orthogonal"),
        *("cats", "r-sparse", "larosa", "sensitivity", "auto"),
    ]
    assert all(method.name == name and method.title for name, method in METHODS.items())
    assert [name for name, method in METHODS.items() if method.paper is None] == ["top-k", "sensitivity", "auto"]
    assert METHODS["auto"].title == "deadband, auto"


def test_examples_in_docstrings_run():
    torch.manual_seed(0)
    assert doctest.testmod(methods, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_a_plain_model_without_blocks_norms_or_gates():
    model, batch = mlp(torch.float64), torch.randn(200, 16, dtype=torch.float64)
    setup = Setup(model, [batch], progress=False)
    for name in SIMULATED:
        (simulation,) = METHODS[name].fit(setup, [0.6])
        if name == "cats":
            assert simulation is None
            continue
        with torch.no_grad(), simulation.on(model):
            model(batch)
        assert simulation.sparsity.total == pytest.approx(0.6, abs=0.03)  # of 16 entries each is 6 %


def test_a_setup_calibrates_once_for_each_criterion(setups, monkeypatch):
    setup, made = Setup(tiny_model("llama"), tiny_batches(2), progress=False), []
    real = methods.calibrate
    monkeypatch.setattr(methods, "calibrate", lambda *args, **options: made.append(options) or real(*args, **options))
    METHODS["teal-uniform"].fit(setup, [0.3, 0.5])
    METHODS["r-sparse"].fit(setup, [0.3])
    METHODS["wina-threshold"].fit(setup, [0.3])
    METHODS["wina-threshold"].fit(setup, [0.4])
    assert [options["criterion"] for options in made] == ["magnitude", "weighted_magnitude"]
    assert setup.calibration() is setup.calibration("magnitude")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "gpt2", "opt"])
def test_inputs_that_the_residual_stream_makes(setups, architecture):
    found = [
        (tuple(name.rpartition(".")[2] for name in each.sites), each.normalised) for each in setups(architecture).inputs
    ]
    expected = {
        "gpt2": [(("c_attn",), True), (("c_proj",), False), (("c_fc",), True), (("c_proj",), False)],
        "opt": [(("q_proj", "k_proj", "v_proj"), True), (("out_proj",), False), (("fc1",), True), (("fc2",), False)],
    }.get(
        architecture,
        [
            *[(("q_proj", "k_proj", "v_proj"), True), (("o_proj",), False)],
            *[(("gate_proj", "up_proj"), True), (("down_proj",), False)],
        ],
    )
    assert found == expected * 2
    assert hooks_of(setups(architecture).model) == 0


def test_padding_shapes_nothing():
    long, short = (tiny_batches(1, rows=1, length=length, seed=length)[0]["input_ids"] for length in (13, 9))
    padded = torch.cat([long, F.pad(short, (0, 4))])
    model = tiny_model("llama")
    setup = Setup(model, [{"input_ids": padded, "attention_mask": padded > 0}], progress=False)
    alone = Setup(model, [{"input_ids": long}, {"input_ids": short}], progress=False)
    for name in ("cats", "r-sparse"):
        ours, theirs = (METHODS[name].fit(each, [0.2])[0].parts for each in (setup, alone))
        if name == "cats":
            assert [part.threshold for part in ours] == pytest.approx([part.threshold for part in theirs], rel=1e-3)
        assert sum(part.share for part in ours) == pytest.approx(sum(part.share for part in theirs), rel=0.05)
    for name, basis in setup.principal_bases.items():
        leading = (basis.T @ alone.principal_bases[name]).abs()[:3, :3]  # 22 rows do not tell the last from another
        assert torch.allclose(leading, torch.eye(3), atol=0.02)


# -- TEAL --


@pytest.mark.parametrize("seed", range(5))
def test_magnitudes_leave_the_least_of_x_out(seed):
    """TEAL's criterion: of all subsets of n - k entries, the smallest have the least norm."""
    x = torch.randn(7, generator=torch.Generator().manual_seed(seed))
    for k in range(1, 7):
        kept, _ = TopK("", k, 7, None).prune(x)
        norms = [x.double()[list(left_out)].norm() for left_out in itertools.combinations(range(7), 7 - k)]
        assert (x - kept).double().norm().item() == pytest.approx(min(norms).item(), rel=1e-6)


def test_errors_of_a_site_grow_with_the_threshold(setups):
    setup = setups()
    names = ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"]
    for name, x in inputs_of(setup, names).items():
        weight = matrix_of(setup.sites[name]).detach().double()
        dense = x @ weight.T
        errors = []
        for budget in (0.1, 0.3, 0.5, 0.7, 0.9):
            kept = torch.where(x.abs() > setup.calibration("magnitude").sites[name].threshold(budget), x, 0)
            errors.append(((kept @ weight.T - dense).norm() / dense.norm()).item())
        assert errors == sorted(errors)
        assert 0 < errors[0] < 0.1
        assert errors[-1] < 1.1


# -- top-k --


def test_exactly_k_entries_are_kept_whatever_they_are():
    generator = torch.Generator().manual_seed(0)
    for scores in (
        torch.randn(5, 3, 20, generator=generator).abs(),
        torch.randint(0, 3, (50, 20), generator=generator).float(),  # ties
        torch.zeros(4, 20),
        torch.full((2, 20), math.nan),
    ):
        for k in (1, 7, 20):
            keep = largest(scores, k)
            assert keep.dtype == torch.bool
            assert (keep.sum(-1) == k).all()
            least = torch.where(keep, scores, math.inf).amin(-1)
            most = torch.where(keep, -math.inf, scores).amax(-1)
            assert scores.isnan().any() or (least >= most).all()


@pytest.mark.parametrize("name", ["top-k", "wina", "wina-orthogonal", "larosa"])
def test_numbers_that_are_not_surface(setups, name):
    setup = setups()
    (simulation,) = METHODS[name].fit(setup, [0.5])
    part = {part.name: part for part in simulation.parts}["model.layers.1.mlp.down_proj"]
    x = torch.ones(3, 112)
    x[1, 5] = math.nan
    kept, keep = part.prune(x)
    assert kept[1].isnan().any()
    assert keep[1, 5]
    embedding = setup.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _, __, y: y.index_fill(1, torch.tensor([7]), math.nan))
    dense, sparse = logits(setup.model, setup.batches[0]), simulated(setup, simulation)
    handle.remove()
    assert dense.isnan().any()
    assert torch.equal(sparse.isnan(), dense.isnan())


def test_each_token_keeps_as_many(setups):
    setup = setups("gpt2")
    (simulation,) = METHODS["top-k"].fit(setup, [0.4])
    seen = {}
    with simulation.on(setup.model):
        for name, module in setup.sites.items():
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
        logits(setup.model, setup.batches[0])
    for name, module in setup.sites.items():
        module._forward_pre_hooks.clear()
        features = matrix_of(module).shape[1]
        assert ((seen[name] != 0).sum(-1) == round(0.6 * features)).all()
        assert simulation.sparsity.sites[name] == 1 - round(0.6 * features) / features
        assert simulation.shares[name] == pytest.approx(simulation.sparsity.sites[name])


# -- WINA --


def squared_errors(weight, x, k):
    """||W x - W x_masked||² of every subset of k entries, in float64."""
    errors = {}
    for subset in itertools.combinations(range(len(x)), k):
        left_out = x.clone()
        left_out[list(subset)] = 0
        errors[subset] = (weight @ left_out).square().sum().item()
    return errors


def chosen_by_wina(weight, x, k):
    norms = torch.linalg.vector_norm(weight, dim=0).float()
    _, keep = TopK("", k, len(x), norms).prune(x)
    return tuple(keep.nonzero().flatten().tolist())


@pytest.mark.parametrize("seed", range(8))
def test_wina_is_optimal_for_orthogonal_columns(seed):
    """Its theorem: no other k entries give a smaller error of the output, and magnitudes do no better."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(9, 6, generator=generator, dtype=torch.float64))
    weight = q * torch.rand(6, generator=generator, dtype=torch.float64).add(0.1)
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    for k in range(1, 6):
        errors = squared_errors(weight, x, k)
        assert errors[chosen_by_wina(weight, x, k)] == pytest.approx(min(errors.values()), rel=1e-6)
        by_magnitude = tuple(x.abs().topk(k).indices.sort().values.tolist())
        assert errors[chosen_by_wina(weight, x, k)] <= errors[by_magnitude] * (1 + 1e-9)


def test_wina_is_not_optimal_without_orthogonal_columns():
    weight = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.1, 0.5]], dtype=torch.float64)
    x = torch.ones(3, dtype=torch.float64)
    errors = squared_errors(weight, x, 1)
    chosen = chosen_by_wina(weight, x, 1)
    assert chosen == (1,)  # the longest column, which the first would have cancelled
    assert errors[chosen] > 2 * min(errors.values())


@pytest.mark.parametrize(("rows", "columns"), [(12, 6), (6, 6), (4, 6)])
def test_the_transformation_makes_columns_orthogonal_and_wina_optimal(rows, columns):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.k_proj = nn.RMSNorm(columns), nn.Linear(columns, rows, bias=False)

        def forward(self, x):
            return self.k_proj(self.norm(x))

    torch.manual_seed(0)
    model = Block().eval()
    setup = Setup(model, [torch.randn(30, columns)], progress=False)
    ((key, basis, norms),) = setup.orthogonalising.values()
    weight, v = model.k_proj.weight.detach().double(), basis.double()
    assert key == "k_proj"
    assert torch.allclose(v.T @ v, torch.eye(columns, dtype=torch.float64), atol=1e-6)
    gram = (weight @ v).T @ (weight @ v)
    assert (gram - gram.diag().diag()).abs().max() < 1e-6
    expected = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert norms[: len(expected)].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert norms[len(expected) :].abs().max() < 1e-3 if rows < columns else len(expected) == columns
    x = torch.randn(40, columns)
    for k in range(1, columns):
        pruned, keep = TopK("k_proj", k, columns, norms, basis).prune(x)
        assert (keep.sum(-1) == k).all()
        for row in range(len(x)):
            error = (weight @ (x - pruned)[row].double()).square().sum().item()
            best = min(squared_errors(weight @ v, v.T @ x[row].double(), k).values())
            assert error == pytest.approx(best, rel=1e-3, abs=1e-9)


def test_wina_weighs_only_the_transformed_matrix_by_its_columns(setups):
    (simulation,) = METHODS["wina-orthogonal"].fit(setups(), [0.4])
    weighed = {part.name.rpartition(".")[2] for part in simulation.parts if part.scale is not None}
    rotated = {part.name.rpartition(".")[2] for part in simulation.parts if part.basis is not None}
    assert weighed == {"k_proj", "gate_proj"}
    assert rotated == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    q, k, v = (
        part
        for part in simulation.parts
        if part.name.startswith("model.layers.0.self_attn.") and part.basis is not None
    )
    assert q.basis is k.basis is v.basis


def test_wina_scores_are_products_with_column_norms(setups):
    setup = setups("gpt2")
    name = "transformer.h.1.mlp.c_fc"
    (simulation,) = METHODS["wina"].fit(setup, [0.5])
    part = {part.name: part for part in simulation.parts}[name]
    x = inputs_of(setup, [name])[name]
    norms = setup.sites[name].weight.detach().double().square().sum(1).sqrt()  # Conv1D is [in, out]
    scores = x.abs() * norms
    kept = x.float() * 0 != 0
    for row, score in enumerate(scores):
        kept[row, score.argsort(descending=True)[:32]] = True
    assert (part.prune(x.float())[1] == kept).double().mean() > 0.999  # but for scores that round alike


@pytest.mark.parametrize("name", ["wina-orthogonal", "larosa"])
def test_changes_of_basis_are_paid_for(setups, name):
    """Four inputs of 64 entries: three changes of basis of the residual stream between them."""
    setup = setups()
    (simulation,) = METHODS[name].fit(setup, [0.3])
    added = 3 * 64 * 64 * 4
    assert sum(simulation.added.values()) == pytest.approx(added)
    skipped = sum(
        (1 - part.k / matrix_of(setup.sites[part.name]).shape[1]) * weight_bytes(setup.sites[part.name])
        for part in simulation.parts
    )
    assert run_over(setup, simulation).total == pytest.approx((skipped - added) / setup.total_bytes)
    assert simulation.sparsity.total == pytest.approx(0.3, abs=0.01)
    assert METHODS[name].fit(setup, [0.0, 0.8, 0.9])[2] is None  # 0.9 and 18 % more than that


# -- CATS --


def reference_cats(model, batch, thresholds):
    """Llama's MLPs by hand: `act(gate)` is cut at the threshold before it meets the outputs of up_proj."""
    handles = []
    for module, threshold in zip([layer.mlp for layer in model.model.layers], thresholds, strict=True):

        def forward(module, args, output, threshold=threshold):
            act = F.silu(module.gate_proj(args[0]))
            act = torch.where(act.abs() > threshold, act, 0)
            return module.down_proj(act * module.up_proj(args[0]))

        handles.append(module.register_forward_hook(forward))
    made = logits(model, batch)
    for handle in handles:
        handle.remove()
    return made


def test_cats_is_the_cut_activation(setups):
    setup = setups()
    (simulation,) = METHODS["cats"].fit(setup, [0.3])
    thresholds = [part.threshold for part in simulation.parts]
    expected = reference_cats(setup.model, setup.batches[1], thresholds)
    with simulation.on(setup.model):
        assert torch.allclose(logits(setup.model, setup.batches[1]), expected, atol=1e-6)


def test_cats_at_zero_changes_nothing_and_its_sparsity_is_the_quantile(setups):
    setup = setups()
    dense = logits(setup.model, setup.batches[0])
    (simulation,) = METHODS["cats"].fit(setup, [0.0])
    assert [part.threshold for part in simulation.parts] == [0.0, 0.0]
    assert torch.equal(simulated(setup, simulation), dense)
    names = [mlp.gate for mlp in setup.gated_mlps]
    for name, x in inputs_of(setup, names).items():
        act = F.silu(x @ setup.sites[name].weight.detach().double().T).abs()
        down = name.replace("gate", "down")
        for quantile in (0.2, 0.5, 0.8):
            threshold = setup.gates[down].threshold(quantile)
            assert (act <= threshold).double().mean().item() == pytest.approx(quantile, abs=0.005)
    (simulation,) = METHODS["cats"].fit(setup, [0.2])
    report = run_over(setup, simulation)
    share = 0.2 * setup.total_bytes / sum(weight_bytes(m) for n, m in setup.sites.items() if "up_" in n or "down_" in n)
    for name, fraction in report.sites.items():
        expected = share if "up_" in name or "down_" in name else 0.0
        assert fraction == pytest.approx(expected, abs=0.01)
        assert simulation.shares[name] == pytest.approx(expected)


def test_cats_ends_where_its_weights_do(setups):
    setup = setups()
    covered = sum(weight_bytes(m) for n, m in setup.sites.items() if "up_" in n or "down_" in n) / setup.total_bytes
    low, high = METHODS["cats"].fit(setup, [covered * 0.95, covered * 0.995])
    assert run_over(setup, low).total == pytest.approx(covered * 0.95, abs=0.01)
    assert high is None


class GatedBlock(nn.Module):
    def __init__(self, kind, inplace=False):
        super().__init__()
        self.kind = kind
        if kind == "w":
            self.w1, self.w2, self.w3 = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24)
        else:
            self.wi_0, self.wi_1, self.wo = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
            self.act = nn.ELU(inplace=inplace)

    def forward(self, x):
        if self.kind == "w":
            return self.w2(F.silu(self.w1(x)) * self.w3(x))
        return self.wo(self.act(self.wi_0(x)) * self.wi_1(x))


@pytest.mark.parametrize(("kind", "inplace"), [("w", False), ("t5", False), ("t5", True)])
def test_cats_finds_gates_by_other_names(kind, inplace):
    torch.manual_seed(0)
    model, x = nn.Sequential(GatedBlock(kind, inplace)).eval(), torch.randn(400, 16)
    setup = Setup(model, [x], progress=False)
    (found,) = setup.gated_mlps
    assert [each.rpartition(".")[2] for each in (found.gate, found.up, found.down)] == (
        ["w1", "w3", "w2"] if kind == "w" else ["wi_0", "wi_1", "wo"]
    )
    (simulation,) = METHODS["cats"].fit(setup, [0.4])
    block = model[0]
    gate, up, down = (block.w1, block.w3, block.w2) if kind == "w" else (block.wi_0, block.wi_1, block.wo)
    with torch.no_grad():
        act = (F.silu if kind == "w" else F.elu)(gate(x))
        kept = act.abs() > simulation.parts[0].threshold
        with simulation.on(model):
            actual = model(x)
        assert torch.allclose(actual, down(torch.where(kept, act * up(x), 0)), atol=1e-6)
    assert (~kept).double().mean().item() == pytest.approx(0.6, abs=0.002)  # two thirds of the bytes
    assert simulation.sparsity.total == pytest.approx(0.4, abs=0.002)


def test_cats_with_gate_and_up_in_one_layer(setups):
    setup = setups("phi3")
    assert [mlp.up_share for mlp in setup.gated_mlps] == [0.5, 0.5]
    (simulation,) = METHODS["cats"].fit(setup, [0.3])
    report = run_over(setup, simulation)
    for each in setup.gated_mlps:
        assert report.sites[each.up] == pytest.approx(report.sites[each.down] / 2)
    down_inputs = {}
    with simulation.on(setup.model):
        for each in setup.gated_mlps:
            setup.sites[each.down].register_forward_pre_hook(lambda m, args: down_inputs.setdefault(m, args[0]))
        logits(setup.model, setup.batches[0])
    for each in setup.gated_mlps:
        module = setup.sites[each.down]
        module._forward_pre_hooks.clear()
        assert (down_inputs[module] == 0).double().mean().item() == pytest.approx(report.sites[each.down], abs=0.03)


def test_a_gate_keeps_what_is_not_a_number():
    gated = GatedMLP("gate", "up", "down", F.silu)
    part = Gate(gated, 0.5, 0.5)
    part._after_gate(None, (), torch.tensor([[math.nan, 0.1, 3.0]]))
    (x,), _ = part._before_down(None, (torch.ones(1, 3),), {})
    assert x.tolist() == [[1.0, 0.0, 1.0]]


# -- R-Sparse --


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_r_sparse_at_full_rank_is_dense(shape):
    torch.manual_seed(0)
    layer, x = nn.Linear(shape[1], shape[0]).double(), torch.randn(50, shape[1], dtype=torch.float64)
    left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    for rank in (len(values), 3, 0):
        part = LowRank("", 0.8, 0.5, left[:, :rank] * values[:rank], right[:rank])
        with scope(), torch.no_grad():
            handles = part.install(layer)
            made = layer(x)
        for handle in handles:
            handle.remove()
        kept = torch.where(x.abs() > 0.8, x, 0)
        approximation = (left[:, :rank] * values[:rank]) @ right[:rank]
        expected = kept @ layer.weight.T + (x - kept) @ approximation.T + layer.bias
        assert torch.allclose(made, expected, atol=1e-12)
        if rank == len(values):
            assert torch.allclose(made, layer(x), atol=1e-12)


def weights_of_rank(rank, out_features=40, in_features=48):
    torch.manual_seed(0)
    return torch.randn(out_features, rank) @ torch.randn(rank, in_features) / rank


@pytest.mark.parametrize("budget", [0.3, 0.6])
@pytest.mark.parametrize("noise", [0.02, 1.0, 30.0])
def test_r_sparse_takes_the_split_of_least_error(budget, noise):
    """Against the error of every split, computed from its outputs in float64."""
    torch.manual_seed(1)
    weight = weights_of_rank(4) + noise * torch.randn(40, 48)
    model = nn.Sequential(nn.Linear(48, 40)).eval()
    with torch.no_grad():
        model[0].weight.copy_(weight)
    x = torch.randn(methods.SAMPLE_ROWS, 48) * torch.logspace(-1, 1, 48)
    setup = Setup(model, [x], progress=False)
    (simulation,) = METHODS["r-sparse"].fit(setup, [budget])
    (part,) = simulation.parts
    statistics = setup.calibration("magnitude").sites["0"]
    matrix, rows = model[0].weight.detach().double(), x.double()
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    errors = {}
    for split in methods.SPLITS:
        rank = int((1 - budget) * (1 - split) * 40 * 48 / 88)
        share = budget + rank * 88 / (40 * 48)
        kept = torch.where(rows.abs() > statistics.threshold(share), rows, 0)
        approximation = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank])
        made = kept @ matrix.T + (rows - kept) @ approximation.T
        errors[rank] = (made - rows @ matrix.T).square().sum().item()
    chosen = len(part.right)
    assert errors[chosen] == pytest.approx(min(errors.values()), rel=1e-4, abs=1e-3)
    assert noise > 0.02 or chosen > 0  # nearly of rank 4: the factors pay
    assert simulation.added["0"] == chosen * (40 + 48) * 4
    with torch.no_grad(), simulation.on(model):
        model(x)
    assert simulation.sparsity.total == pytest.approx(budget, abs=0.005)


def test_r_sparse_is_exact_where_the_weight_is_of_low_rank():
    model = nn.Sequential(nn.Linear(48, 40)).eval()
    with torch.no_grad():
        model[0].weight.copy_(weights_of_rank(3))
    x = torch.randn(256, 48)
    (simulation,) = METHODS["r-sparse"].fit(Setup(model, [x], progress=False), [0.7])
    with torch.no_grad(), simulation.on(model):
        made = model(x)
    assert torch.allclose(made, model(x), atol=1e-4)


def test_r_sparse_lets_nan_through(setups):
    part = LowRank("", 1.0, 0.5, torch.ones(2, 1), torch.ones(1, 3))
    kept, keep = part.prune(torch.tensor([[math.nan, 0.5, 2.0]]))
    assert keep.tolist() == [[True, False, True]]
    assert part.rest.tolist() == [[0.0, 0.5, 0.0]]
    assert kept[0, 0].isnan()


# -- LaRoSA --


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", ["larosa", "wina-orthogonal"])
def test_rotations_alone_change_nothing(setups, architecture, name):
    setup = setups(architecture)
    (simulation,) = METHODS[name].fit(setup, [0.3])
    for part in simulation.parts:
        part.k = matrix_of(setup.sites[part.name]).shape[1]
    dense = logits(setup.model, setup.batches[0])
    sparse = simulated(setup, simulation)
    assert (sparse - dense).abs().max() < 1e-4 * dense.abs().max()


def test_larosa_rotates_onto_principal_components(setups):
    setup = setups()
    names = [each.sites[0] for each in setup.inputs if each.normalised]
    assert sorted(setup.principal_bases) == sorted(names)
    for name, x in inputs_of(setup, names).items():
        basis = setup.principal_bases[name].double()
        assert torch.allclose(basis.T @ basis, torch.eye(64, dtype=torch.float64), atol=1e-5)
        values = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
        energy = (x @ basis).square().sum(0)
        assert energy.tolist() == pytest.approx(values.tolist(), rel=1e-3, abs=1e-4 * values[0])


def test_larosa_is_exact_for_inputs_of_low_rank():
    """Of inputs in a subspace of 6 dimensions, 6 rotated entries hold everything, and 6 plain ones do not."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.RMSNorm(32, elementwise_affine=False), nn.Linear(32, 20)

        def forward(self, x):
            return self.fc(self.norm(x))

    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(300, 6) @ torch.randn(6, 32)
    setup = Setup(model, [x], progress=False)
    budget = 1 - 6 / 32
    with torch.no_grad():
        dense = model(x)
        errors = {}
        for name in ("larosa", "top-k"):
            (simulation,) = METHODS[name].fit(setup, [budget])
            assert {part.k for part in simulation.parts} == {6}
            with simulation.on(model):
                errors[name] = ((model(x) - dense).norm() / dense.norm()).item()
            assert simulation.sparsity.total == budget  # the one change of basis is absorbed
    assert errors["larosa"] < 1e-5
    assert errors["top-k"] > 0.1


# -- evaluation --


def masked_by_hand(model, window, position, share):
    """Logits of one call where tokens from `position` on keep the largest entries of every site's input."""
    handles = []

    def hook(module, args):
        x = args[0]
        k = round((1 - share) * x.shape[-1])
        order = x.abs().argsort(-1, descending=True)
        keep = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order[..., :k], True)
        keep.view(*window["input_ids"].shape, -1)[:, :position] = True
        return (x * keep,)

    for module in find_sites(model).values():
        handles.append(module.register_forward_pre_hook(hook))
    made = logits(model, window)
    for handle in handles:
        handle.remove()
    return made


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_evaluations_of_simulations(setups, protocol, architecture):
    setup, windows = setups(architecture), tiny_batches(2, length=20, seed=9)
    (simulation,) = METHODS["top-k"].fit(setup, [0.5])
    run_over(setup, simulation)  # does not count
    result = evaluate(setup.model, windows, protocol=protocol, simulation=simulation, progress=False)
    position, first = {"all": (0, 0), "dense-first": (1, 0), "dense-prompt": (10, 10)}[protocol]
    kl = nll = count = 0.0
    for window in windows:
        log_p = logits(setup.model, window).double().log_softmax(-1)[:, first:-1]
        log_q = masked_by_hand(setup.model, window, position, 0.5).double().log_softmax(-1)[:, first:-1]
        targets = window["input_ids"][:, first + 1 :, None]
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        nll -= log_q.gather(-1, targets).sum().item()
        count += targets.numel()
    assert result.tokens == count
    assert result.kl == pytest.approx(kl / count, rel=1e-3)
    assert math.log(result.perplexity) == pytest.approx(nll / count, rel=1e-4)
    assert result.sparsity == pytest.approx(0.5, abs=1e-9)
    assert result.protocol == PROTOCOLS[protocol]
    assert hooks_of(setup.model) == 0


def test_evaluations_of_simulations_count_anew_and_want_the_dense_model(setups):
    setup, windows = setups(), tiny_batches(2, rows=1, length=12)
    (simulation,) = METHODS["larosa"].fit(setup, [0.3])
    first = evaluate(setup.model, windows, simulation=simulation, progress=False)
    entries = simulation.sparsity.entries
    second = evaluate(setup.model, windows, simulation=simulation, progress=False)
    assert first == second
    assert simulation.sparsity.entries == entries
    assert evaluate(setup.model, windows, progress=False).kl == 0
    with pytest.raises(ValueError, match="sparse already"):
        evaluate(sparse_model(), windows, simulation=simulation, progress=False)
    with pytest.raises(ValueError, match="of another model"):
        evaluate(tiny_model("gpt2"), windows, simulation=simulation, progress=False)


@pytest.mark.parametrize("name", SIMULATED)
def test_half_precision(setups, name):
    setup = setups("llama", torch.bfloat16)
    (simulation,) = METHODS[name].fit(setup, [0.3])
    result = evaluate(setup.model, setup.batches, simulation=simulation, progress=False)
    assert result.sparsity == pytest.approx(0.3, abs=0.01)
    assert 0 < result.kl < 1
    (float32,) = METHODS[name].fit(setups(), [0.3])
    expected = evaluate(setups().model, setup.batches, simulation=float32, progress=False)
    assert result.kl == pytest.approx(expected.kl, rel=0.3)


def test_inference_mode_and_training_mode(setups):
    setup = setups()
    for name in SIMULATED:
        (simulation,) = METHODS[name].fit(setup, [0.3])
        expected = simulated(setup, simulation)
        with torch.inference_mode(), simulation.on(setup.model):
            assert torch.equal(setup.model(**setup.batches[0], use_cache=False).logits, expected)
        setup.model.train()
        result = evaluate(setup.model, setup.batches[:2], simulation=simulation, progress=False)
        assert setup.model.training
        setup.model.eval()
        assert result == evaluate(setup.model, setup.batches[:2], simulation=simulation, progress=False)
