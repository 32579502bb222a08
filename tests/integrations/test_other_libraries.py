"""What torch.nn.utils, torch.distributed and accelerate do to sparse and quantised layers works, or says how."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conftest import tiny_batches, tiny_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters

import deadband
from deadband.layers.quantized import QuantizedMatrix
from deadband.layers.sites import find_sites, shape_of, sparse_sites
from deadband.sparsify.sparsify import sparsify_

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*deprecated:FutureWarning",
    "ignore:a layer that is quantised was parametrised:UserWarning",
    "ignore:Some parameters are on the meta device",
)


def sparse(name, weights=None, center=False, **more):
    model = tiny_model(name)
    rules = {
        site: deadband.Rule(0.3, center=torch.full((shape_of(layer)[1],), 0.1) if center else None)
        for site, layer in find_sites(model).items()
    }
    return sparsify_(model, rules, weights=weights, **more)


def sites(model):
    return list(sparse_sites(model).values())


def expected_of(site, x):
    return F.linear(site.rule.apply(x), site.matrix_view(site.weight), site.bias)


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2

    def right_inverse(self, weight):
        return weight / 2


CHANGES = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Double()),
    "two": lambda layer: [parametrize.register_parametrization(layer, "weight", Double()) for _ in range(2)],
    "bias": lambda layer: parametrize.register_parametrization(layer, "bias", Double()),
    "l1": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "random": lambda layer: prune.random_unstructured(layer, "weight", amount=7),
    "structured": lambda layer: prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0),
    "mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.rand(layer.weight.shape) > 0.5),
    "pruned twice": lambda layer: [prune.l1_unstructured(layer, "weight", amount=0.3) for _ in range(2)],
    "pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
    "all pruned": lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weights", [None, "int8", "int4-g32"])
@pytest.mark.parametrize("name", ["opt", "gpt2"])
@pytest.mark.parametrize("what", CHANGES)
def test_parametrised_and_pruned(what, name, weights, center):
    model = sparse(name, weights, center)
    site, (out_features, in_features) = sites(model)[1], shape_of(sites(model)[1])
    before = site.weight.clone()
    x = torch.randn(3, in_features, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    CHANGES[what](site)
    assert not isinstance(site, QuantizedMatrix)
    with torch.no_grad():
        torch.testing.assert_close(site(x), expected_of(site, x))
        weight = site.weight.clone()
        kept = what in ("weight_norm", "old weight_norm", "parametrization", "bias", "pruned bias")
        assert torch.allclose(weight, before, atol=1e-5) == kept
    site(x).square().sum().backward()
    trained = [each for each in site.parameters() if each.grad is not None and each.grad.abs().sum() > 0]
    assert any(each.numel() >= out_features for each in trained)
    torch.optim.SGD(site.parameters(), 0.05).step()
    with torch.no_grad():
        after = site(x)
        torch.testing.assert_close(after, expected_of(site, x))
        assert not torch.equal(site.weight, weight)
        model(tiny_batches(1)[0]["input_ids"])


@pytest.mark.parametrize("name", ["opt", "gpt2"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_made_permanent_again(name, weights):
    model = sparse(name, weights)
    first, second = sites(model)[:2]
    parametrize.register_parametrization(first, "weight", Double())
    prune.l1_unstructured(second, "weight", amount=0.5)
    ids = tiny_batches(1)[0]["input_ids"][:, :3]
    with torch.no_grad():
        logits = model(ids).logits
        parametrize.remove_parametrizations(first, "weight")
        prune.remove(second, "weight")
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-3, rtol=1e-3)
    for site in (first, second):
        assert site.matrix_view(site.weight.data).t().is_contiguous()  # laid out again
    deadband.densify_(model)
    with torch.no_grad():
        model(ids)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("change", ["weight_norm", "old weight_norm", "l1", "parametrization", "bias"])
def test_saved_once_it_is_permanent(name, weights, change, tmp_path):
    model = sparse(name, weights)
    layer = sites(model)[0]
    if layer.bias is None and change == "bias":
        return
    CHANGES[change](layer)
    with pytest.raises(ValueError, match=r"layer '.*' (has|computes).*torch.nn.utils.* first"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    if change == "old weight_norm":
        nn.utils.remove_weight_norm(layer)
    elif change == "l1":
        prune.remove(layer, "weight")
    else:
        parametrize.remove_parametrizations(layer, "bias" if change == "bias" else "weight")
    model.save_pretrained(tmp_path)
    ids = tiny_batches(1)[0]["input_ids"][:, :3]
    with torch.no_grad():
        loaded = type(model).from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(loaded, model(ids).logits, atol=1e-3, rtol=1e-3)


def test_it_is_said_that_a_layer_is_dequantised():
    model = sparse("llama", "int8")
    first, second = sites(model)[:2]
    with pytest.warns(UserWarning, match="keeps its dequantised weight"):
        prune.l1_unstructured(first, "weight", amount=0.5)
    assert isinstance(second, QuantizedMatrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not parametrize.is_parametrized(second)
        assert not prune.is_pruned(second)
        torch.func.functional_call(model, {}, (tiny_batches(1)[0]["input_ids"],))
        copy.deepcopy(second)
    assert isinstance(second, QuantizedMatrix)


@pytest.mark.parametrize("change", ["weight_norm", "old weight_norm", "spectral_norm", "l1", "parametrization"])
def test_a_tied_quantised_table_says_no(change):
    model = sparse("llama", "int8")
    ids = tiny_batches(1)[0]["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            with pytest.raises(NotImplementedError, match="densify_"):
                CHANGES[change](layer)
        assert torch.equal(model(ids).logits, logits)
    deadband.densify_(model)
    CHANGES[change](model.get_output_embeddings())


# Flattened


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_parameters_as_one_vector(name, center):
    model, dense = sparse(name, center=center), tiny_model(name)
    vector = parameters_to_vector(model.parameters())
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(parameters_to_vector(each.parameters()), parameters_to_vector(dense.parameters()))
    assert vector.requires_grad
    ids, other = tiny_batches(1)[0]["input_ids"][:, :3], vector.detach() * 1.1
    vector_to_parameters(other, model.parameters())
    vector_to_parameters(other, dense.parameters())
    for values, expected in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(values, expected)
    rules = {site: layer.rule for site, layer in sparse_sites(model).items()}
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, sparsify_(dense, rules)(ids).logits)


def test_other_views_say_what_to_call():
    weight = sites(sparse("llama"))[0].weight
    with pytest.raises(RuntimeError, match=re.escape("reshape() or flatten()")):
        weight.view(-1)
    assert torch.equal(weight.reshape(-1), weight.flatten())


@pytest.mark.parametrize("weights", [None, "int8"])
def test_pruned_over_all_layers(weights):
    model = sparse("llama", weights)
    prune.global_unstructured([(site, "weight") for site in sites(model)], prune.L1Unstructured, amount=0.5)
    masks = torch.cat([site.weight_mask.flatten() for site in sites(model)])
    magnitudes = torch.cat([site.weight_orig.detach().abs().flatten() for site in sites(model)])
    assert float(masks.mean()) == 0.5
    assert magnitudes[masks == 0].max() <= magnitudes[masks == 1].min()
    with torch.no_grad():
        model(tiny_batches(1)[0]["input_ids"])


# Offloaded


def dispatched(model, folder, **more):
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    dispatch_model(
        model, {**places, "model.layers.1": "disk"}, main_device="cpu", offload_dir=folder, force_hooks=True, **more
    )


OFFLOADS = {
    "cpu": lambda model, folder, **more: cpu_offload(model, torch.device("cpu"), **more),
    "disk": lambda model, folder, **more: disk_offload(model, folder, torch.device("cpu"), **more),
    "dispatch": dispatched,
}


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize(("weights", "center"), [(None, False), (None, True), ("int8", True)])
@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded(how, weights, center, offload_buffers, tmp_path):
    model = sparse("llama", weights, center, output_layer=False)
    ids = tiny_batches(1)[0]["input_ids"][:, :3]
    with torch.no_grad():
        expected = model(ids).logits
        OFFLOADS[how](model, tmp_path, offload_buffers=offload_buffers)
        assert any(each.is_meta for each in model.state_dict().values()) or (weights and not offload_buffers)
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected)


def test_an_offloaded_table_says_how_to_go_on():
    model = cpu_offload(sparse("llama", "int8"), torch.device("cpu"), offload_buffers=True)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="without offload_buffers=True"):
        model(tiny_batches(1)[0]["input_ids"])


# Sharded


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def shard(model, mesh):
    for block in getattr(model, "model", model).layers if hasattr(model, "model") else model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"fully_shard": shard, "ddp": lambda model, mesh: nn.parallel.DistributedDataParallel(model)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("weights", "center"), [(None, False), (None, True), ("int8", True)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sharded(wrapper, name, weights, center, training, mesh):
    model = sparse(name, weights, center).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    ids, short = tiny_batches(1)[0]["input_ids"], torch.tensor([[5, 9]])
    results = []
    for each in (copy.deepcopy(model), WRAPPERS[wrapper](model, mesh)):
        loss = each(ids, labels=ids).loss
        loss.backward()
        torch.optim.SGD(each.parameters(), 0.1).step()
        with torch.no_grad():
            results.append((loss.detach(), each(short).logits))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("center", [False, True])
def test_tensors_of_state_dicts_are_plain(center):
    model = sparse("llama", center=center)
    assert {type(each) for each in model.state_dict().values()} == {torch.Tensor}
    weight = sites(model)[0].weight
    assert {type(weight.detach()), type(weight.data), type(weight + 0)} == {torch.Tensor}
    assert torch.equal(nn.Parameter(weight), weight)
    assert torch.equal(copy.deepcopy(weight), weight)
