import copy
import gc
import io
import json
import pickle
import sys
import warnings

import pytest
import torch
import torch._inductor.config
from conftest import VOCABULARY, mlp, tiny_batches, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

import deadband
from deadband.calibration.calibration import second_moments_of
from deadband.decoding.compiler_paths import any_folder
from deadband.layers.formats import DEFAULT_INT4, FORMATS, QuantizedWeight, WeightFormat
from deadband.layers.quantized import QuantizedLinear, QuantizedMatrix, QuantizedSparseLinear, QuantizedTable
from deadband.layers.rounding import quantize
from deadband.layers.rule import Rule
from deadband.layers.sites import find_sites, matrix_of, sparse_sites
from deadband.layers.sparse import SparseLinear, SparseSite
from deadband.sparsify.config import config_of
from deadband.sparsify.scopes import dense, sparse_prefill
from deadband.sparsify.sparsify import densify_, sparsify_

FEW = ("int8", "int4-g32", "int4-g64-zp")
MODELS = ("llama", "mistral", "gemma3", "gpt2", "qwen2")  # tied, untied, scaled embeddings, Conv1D, biases
TIED = ("llama", "gemma3", "gpt2")


def quantised_model(name="llama", form="int8", dtype=torch.float32, threshold=0.1, **options):
    model = tiny_model(name, dtype)
    return sparsify_(model, dict.fromkeys(find_sites(model), threshold), weights=form, **options)


def dense_copy(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return densify_(copy.deepcopy(model))


def matrices(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(batch or tiny_batches(1)[0])).logits


def tolerance_of(form):
    """How close kernels come that round what they multiply to 16 bits or, for weights of 4, mostly to 8."""
    return 2e-2 if form.startswith("int4") else 2e-3


def close(actual, expected, tolerance=2e-3):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


# ---------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_a_layer_computes_the_product_with_the_dequantised_weight(form, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(100, 70).to(dtype).eval()  # neither whole groups nor whole blocks
    before = layer.weight.detach().clone()
    model = sparsify_(nn.Sequential(layer), {"0": 0.4}, weights=form)
    assert model[0] is layer
    assert type(layer) is QuantizedSparseLinear
    weight = quantize(before, form)
    assert torch.equal(layer.weight, weight.dequantize(dtype))
    assert layer.weight_format == form
    assert repr(layer).endswith(f"threshold=0.4, weights={form})")
    assert (layer.quantized().nbytes, layer.quantized().format) == (weight.nbytes, weight.format)
    minimum = {"minimum"} if form.endswith("-zp") else set()
    assert set(layer.state_dict()) == {"bias", "threshold", "codes", "scales"} | minimum
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    tolerance = max(tolerance_of(form), 2e-3 if dtype == torch.float32 else 1e-2)
    x = torch.randn(2, 3, 100).to(dtype)
    with torch.no_grad():
        for rows in (x[0, :1], x[0], x):  # decoding twice; six rows run dense
            masked = torch.where(rows.float().abs() > 0.4, rows, 0) if rows.shape[:-1].numel() <= 4 else rows
            close(layer(rows), F.linear(masked, weight.dequantize(dtype), layer.bias), tolerance)
        with sparse_prefill(model):
            masked = torch.where(x.float().abs() > 0.4, x, 0)
            close(layer(x), F.linear(masked, weight.dequantize(dtype), layer.bias), tolerance)
        with dense(model):
            close(layer(x[0, 0]), F.linear(x[0, 0], weight.dequantize(dtype), layer.bias), tolerance)


@pytest.mark.parametrize("form", FEW)
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_the_dequantised_model_does(name, form):
    model = quantised_model(name, form)
    assert len(sparse_sites(model)) == len(matrices(model)) - 1 == len(find_sites(tiny_model(name)))
    assert model.lm_head.weight_format == "int8-g32"
    expected = dense_copy(model)
    with dense(model):
        close(logits(model), logits(expected), max(1e-2, 2 * tolerance_of(form)))
    thresholds = {name: module.threshold.item() for name, module in sparse_sites(model).items()}
    layer_inputs = {}
    for name, module in sparse_sites(model).items():
        layer_inputs[name] = torch.randn(3, module.matrix_shape[1])
        x = layer_inputs[name]
        with torch.no_grad():
            weight = matrix_of(expected.get_submodule(name))
            masked = torch.where(x.abs() > thresholds[name], x, 0)
            close(module(x), F.linear(masked, weight, module.bias), tolerance_of(form))
    # and the model skips what it should
    deadband.sparsity(model, reset=True)
    with sparse_prefill(model):
        logits(model)
    assert 0.02 < deadband.sparsity(model).total < 0.8


@pytest.mark.parametrize("form", ["int8", "int8-g32", "int4", "int4-g64-zp"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_reads_its_rows_from_the_output_layer(name, form):
    torch.manual_seed(0)
    model = tiny_model(name)
    original = type(model.get_input_embeddings())
    sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights="int8", output_layer=form)
    table = model.get_input_embeddings()
    assert isinstance(table, QuantizedTable)
    assert isinstance(table, original)
    assert not [*table.parameters()]
    assert (table.weight.shape, table.weight.dtype) == (model.lm_head.weight.shape, torch.float32)
    assert not any("embed_tokens" in key or "wte" in key for key in model.state_dict())
    ids = torch.tensor([[0, 1, 77, 127], [5, 5, 31, 32]])
    rows = F.embedding(ids, model.lm_head.weight) * (8.0 if name == "gemma3" else 1.0)
    assert torch.equal(table(ids), rows)
    assert model.config.tie_word_embeddings is True  # a configuration may be shared
    assert "rows of the" in repr(table)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("vocabulary", [1, 17, 33, 95])
def test_rows_of_odd_vocabularies(vocabulary, form):
    torch.manual_seed(vocabulary)

    class Bigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(vocabulary, 72)
            self.hidden = nn.Linear(72, 72)
            self.head = nn.Linear(72, vocabulary, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.hidden(self.table(ids)))

    model = sparsify_(Bigram(), {"hidden": 0.1, "head": 0.0}, weights=form)
    assert isinstance(model.table, QuantizedTable)  # any module's, not only those of transformers
    ids = torch.arange(vocabulary)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        assert torch.equal(model.table(ids), model.head.weight)
        assert model.table(ids.view(-1, 1)).shape == (vocabulary, 1, 72)
        assert model.table(ids[:0]).shape == (0, 72)
        assert model(ids[:1]).dtype == dtype
    with pytest.warns(UserWarning, match="dequantised 2 layers"):
        densify_(model)
    assert model.table.weight is model.head.weight


def test_masks_centers_scales_and_relative_thresholds():
    model = mlp()
    mask, center, scale = torch.rand(16) > 0.3, torch.randn(40) / 4, torch.rand(24) + 0.5
    rules = {"2": Rule(0.3, center=center), "4": Rule(0.05, scale=scale, relative=True)}
    sparsify_(model, rules, masks={"0": mask}, weights="int8")
    x = [torch.randn(2, 16), torch.randn(2, 40), torch.randn(2, 24)]
    with torch.no_grad():
        close(model[0](x[0]), F.linear(torch.where(mask, x[0], 0), model[0].weight, model[0].bias))
        kept = torch.where((x[1] - center).abs() > 0.3, x[1], center)
        close(model[2](x[1]), F.linear(kept, model[2].weight, model[2].bias))
        torch.testing.assert_close(model[2].offset, model[2].weight @ center)
        kept = torch.where(x[2].abs() * scale > 0.05 * x[2].norm(dim=-1, keepdim=True), x[2], 0)
        close(model[4](x[2]), F.linear(kept, model[4].weight, model[4].bias))
        with dense(model):
            close(model[0](x[0]), F.linear(x[0], model[0].weight, model[0].bias))


def test_criteria_use_the_weights_that_there_are():
    model = mlp()
    sparsify_(model, {"0": 0.5}, weights="int8")
    sparsify_(model, {"0": 0.5}, criterion="weighted_magnitude")
    torch.testing.assert_close(model[0].scale, model[0].weight.norm(dim=0))


# ---------------------------------------------------------------------------------------------- what is quantised, how


def test_formats_by_name_and_what_is_given_already():
    model = mlp()
    given = quantize(model[2].weight.detach(), "int4-g64-zp")
    sparsify_(model, {"0": 0.1, "2": 0.1, "4": 0.1}, weights={"0": WeightFormat(8), "2": given})
    assert [type(model[index]) for index in (0, 2, 4)] == [QuantizedSparseLinear, QuantizedSparseLinear, SparseLinear]
    assert torch.equal(model[2].codes, given.codes)
    llama = tiny_model("llama")
    sparsify_(llama, {"0.mlp.down_proj": 0.1}, weights={"0.mlp.down_proj": "int4", "lm_head": "int8-g64"})
    assert {name: each.weight_format for name, each in matrices(llama).items()} == {
        "model.layers.0.mlp.down_proj": DEFAULT_INT4, "lm_head": "int8-g64",
    }  # fmt: skip
    only = sparsify_(tiny_model("llama"), {"0.mlp.down_proj": 0.1}, output_layer="int8")
    assert list(matrices(only)) == ["lm_head"]
    none = sparsify_(tiny_model("llama"), {"0.mlp.down_proj": 0.1}, weights="int8", output_layer=False)
    assert list(matrices(none)) == ["model.layers.0.mlp.down_proj"]
    assert none.lm_head.weight is none.model.embed_tokens.weight


def test_second_moments_and_hessians_reach_the_rounding():
    model = tiny_model("llama")
    calibration = deadband.calibrate(model, tiny_batches(), progress=False)
    moments = second_moments_of(calibration)
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    hessian = torch.diag(moments[name])
    plain = sparsify_(copy.deepcopy(model), {name: 0.1}, weights="int4")
    weighted = sparsify_(copy.deepcopy(model), {name: 0.1}, weights="int4", second_moments=moments)
    gptq = sparsify_(copy.deepcopy(model), {name: 0.1}, weights="int4", hessians={name: hessian})
    streamed = sparsify_(copy.deepcopy(model), {name: 0.1}, weights="int4", hessians=iter([("x", 0), (name, hessian)]))
    codes = [each.get_submodule(name).codes for each in (plain, weighted, gptq, streamed)]
    assert torch.equal(codes[1], quantize(weight, "int4", moments[name]).codes)
    assert torch.equal(codes[2], quantize(weight, "int4", hessian=hessian).codes)
    assert torch.equal(codes[3], codes[2])
    assert not torch.equal(codes[0], codes[1])


def test_the_output_layer_as_a_site():
    model = tiny_model("llama")
    sparsify_(model, {**dict.fromkeys(find_sites(model), 0.1), "lm_head": 0.2}, weights="int4")
    assert isinstance(model.lm_head, QuantizedSparseLinear)
    assert model.lm_head.weight_format == DEFAULT_INT4
    assert isinstance(model.model.embed_tokens, QuantizedTable)
    assert deadband.sparsity(model, warn=False).sites.keys() >= {"lm_head"}
    ids = torch.randint(3, VOCABULARY, (1, 5))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 9)


def test_new_thresholds_keep_the_quantised_weights():
    model = quantised_model(form="int4")
    codes = {name: module.codes for name, module in matrices(model).items()}
    left = {name: 0.2 for name in sparse_sites(model) if "mlp" in name}
    same = model.model.layers[0].mlp.up_proj.quantized()
    for again in ({}, {"weights": "int4"}, {"weights": {"lm_head": "int8-g32", "0.mlp.up_proj": same}}):
        sparsify_(model, left, **again)
        assert {name: id(module.codes) for name, module in matrices(model).items()} == {
            name: id(tensor) for name, tensor in codes.items()
        }
        assert list(sparse_sites(model)) == list(left)
        assert type(model.model.layers[0].self_attn.q_proj) is QuantizedLinear
        assert isinstance(model.model.embed_tokens, QuantizedTable)
        config = config_of(model)
        assert (set(config.weights), config.tied_embeddings) == (set(codes), {"model.embed_tokens": "lm_head"})
    assert model.model.layers[0].mlp.up_proj.threshold == torch.tensor(0.2)
    with torch.no_grad():
        x, layer = torch.randn(1, 64), model.model.layers[0].self_attn.q_proj
        close(layer(x), F.linear(x, layer.weight), tolerance_of("int4"))
    sparsify_(model, dict.fromkeys(find_sites(model), 0.1))  # and sparse again
    assert len(sparse_sites(model)) == 14


@pytest.mark.parametrize(
    "again",
    [
        {"weights": "int8"},
        {"weights": {"lm_head": "int8"}},
        {"weights": {"lm_head": quantize(torch.ones(9, 9), "int8")}},
        {"output_layer": "int8"},
    ],
)
def test_another_format_than_it_is_quantised_to(again):
    model = quantised_model(form="int4")
    with pytest.raises(ValueError, match="is quantised to 'int.*' already.*load the dense model again"):
        sparsify_(model, dict.fromkeys(sparse_sites(model), 0.2), **again)
    assert {float(site.threshold) for site in sparse_sites(model).values()} != {0.2}


def test_the_same_weights_given_again():
    name, thresholds = "model.layers.0.mlp.up_proj", {"model.layers.0.mlp.up_proj": 0.1}
    model = tiny_model("llama")
    given = quantize(model.get_submodule(name).weight.detach(), "int4-g32")
    for threshold in (0.1, 0.3):
        sparsify_(model, {name: threshold}, weights={name: given})
        assert model.get_submodule(name).threshold == torch.tensor(threshold)
    other = QuantizedWeight(given.codes, given.scales * 2, given.minimum, given.format)
    with pytest.raises(ValueError, match=r"other weights \(int4-g32\)"):
        sparsify_(model, thresholds, weights={name: other})


def test_layers_left_out_of_a_conv1d_model_stay_quantised(tmp_path):
    model = quantised_model("gpt2")
    sparsify_(model, {"0.mlp.c_fc": 0.1})
    layer = model.transformer.h[1].mlp.c_fc
    assert isinstance(layer, QuantizedLinear)
    x = torch.randn(2, 64, requires_grad=True)
    y = layer(x)
    close(y, F.linear(x, layer.weight.t(), layer.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(1).expand(2, -1))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]


@pytest.mark.parametrize("form", FEW)
def test_one_copy_of_the_weights(form):
    model = quantised_model(form=form)
    stored = sum(module.quantized().nbytes for module in matrices(model).values())
    assert sum(parameter.numel() for parameter in model.parameters()) == 5 * 64  # the norms
    total = sum(value.nbytes for key, value in model.state_dict().items())
    assert total == stored + 5 * 64 * 4 + 14 * 4


# ------------------------------------------------------------------------------------------------------ all or nothing


def snapshot(model):
    def tensors(module):
        every = {**module._parameters, **module._buffers}
        return {key: (id(value), value.clone(), value.stride()) for key, value in every.items() if value is not None}

    modules = {name: (type(module), tensors(module)) for name, module in model.named_modules()}
    return {**modules, "config": copy.deepcopy(model.config.to_dict())}


def unchanged(model, before):
    now = snapshot(model)
    assert now.keys() == before.keys()
    assert now.pop("config") == before["config"]
    for name, (kind, tensors) in now.items():
        assert kind is before[name][0], name
        assert tensors.keys() == before[name][1].keys()
        for key, (identity, value, stride) in tensors.items():
            assert (identity, stride) == (before[name][1][key][0], before[name][1][key][2]), (name, key)
            assert torch.equal(value, before[name][1][key][1]) or value.isnan().any()


FAILURES = {
    "unknown format": ({"weights": "int3"}, "'int3' is not known"),
    "unknown format of the output layer": ({"weights": "int8", "output_layer": "int5"}, "'int5' is not known"),
    "unknown layer": ({"weights": {"missing": "int8"}}, "'missing'"),
    "neither a site nor the output layer": (
        {"weights": {"model.layers.0.self_attn.q_proj": "int8"}}, "neither a sparse site nor the output layer",
    ),
    "shape": (
        {"weights": {"1.mlp.down_proj": quantize(torch.ones(3, 4), "int8")}}, r"got \[3, 4\], expected \[64, 112\]",
    ),
    "moments": (
        {"weights": "int4", "second_moments": {"model.layers.1.mlp.down_proj": torch.ones(3)}},
        r"'model.layers.1.mlp.down_proj' cannot be quantised: second_moments of shape \[3\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("sparse_before", [False, True])
@pytest.mark.parametrize("what", FAILURES)
def test_a_mistake_leaves_the_model_as_it_was(what, sparse_before):
    model = tiny_model("llama")
    if sparse_before:
        sparsify_(model, {"0.mlp.down_proj": 0.3, "0.mlp.up_proj": 0.3})
    options, message = FAILURES[what]
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        sparsify_(model, {"0.mlp.down_proj": 0.1, "1.mlp.down_proj": 0.1}, **options)
    unchanged(model, before)


def test_an_output_layer_that_several_embeddings_share(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights="int8")
    assert isinstance(model.encoder.embed_tokens, QuantizedTable)
    assert isinstance(model.decoder.embed_tokens, QuantizedTable)
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 90, (1, 6))
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    assert torch.equal(logits(T5ForConditionalGeneration.from_pretrained(tmp_path).eval(), batch), logits(model, batch))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was(value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.down_proj' cannot be quantised: .* NaN or infinity"):
        sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights="int4")
    unchanged(model, before)


def test_an_interrupt_while_quantising_leaves_the_model_as_it_was(monkeypatch):
    model, calls = tiny_model("gemma3"), []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return quantize(*arguments, **options)

    monkeypatch.setattr(sys.modules["deadband.sparsify.weights"], "quantize", interrupted)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights="int8")
    unchanged(model, before)
    monkeypatch.undo()
    sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights="int8")


# ---------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("form", FEW)
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_bit_for_bit(name, form, tmp_path):
    model = quantised_model(name, form)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "deadband.safetensors", "generation_config.json",
    ]  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    assert same_state(loaded, model)
    ids = torch.randint(3, VOCABULARY, (1, 7))
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=8, do_sample=False), model.generate(ids, max_new_tokens=8, do_sample=False)
    )
    for prefill in (sparse_prefill, dense):
        with prefill(model), prefill(loaded):
            assert torch.equal(logits(loaded), logits(model))
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    formats = {name: site["weights"] for name, site in written["sites"].items()} | written["quantized"]
    assert formats == {name: each.weight_format for name, each in matrices(model).items()}
    loaded.save_pretrained(tmp_path / "again")
    assert same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)
    stored, before = (load_file(folder / "deadband.safetensors") for folder in (tmp_path / "again", tmp_path))
    assert stored.keys() == before.keys()


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loading_in_another_dtype_keeps_codes_scales_and_thresholds(name, dtype, saved, tmp_path):
    model = quantised_model(name, "int4-g32-zp", saved)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    expected = saved if dtype == "auto" else dtype
    assert loaded.dtype == loaded.lm_head.weight.dtype == loaded.get_input_embeddings().weight.dtype == expected
    stored = loaded.state_dict()
    for key, value in model.state_dict().items():
        if key.endswith(("codes", "scales", "minimum", "threshold")):
            assert stored[key].dtype == value.dtype, key
            assert torch.equal(stored[key], value)
    if expected == saved:
        assert torch.equal(logits(loaded), logits(model))
    else:  # the norms were rounded
        assert (logits(loaded).float() - logits(model).float()).abs().max() < 0.1 * logits(model).float().abs().max()


@pytest.mark.parametrize("places", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(places, tmp_path):
    pytest.importorskip("accelerate")
    model = quantised_model(form="int4")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places).eval()
    assert same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_offloaded_layers(tmp_path):
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = quantised_model("mistral")  # codes are buffers, which accelerate leaves where they are
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=places, offload_folder=tmp_path / "disk")
    assert torch.equal(logits(loaded.eval()), logits(model))
    quantised_model("qwen2").save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"model.layers.1.* is offloaded by device_map"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=places, offload_folder=tmp_path / "disk")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "model.layers.0.mlp.up_proj.codes"),
        ("llama", "model.layers.0.mlp.up_proj.scales"),
        ("llama", "model.layers.1.mlp.up_proj.minimum"),
        ("llama", "lm_head.codes"),
        ("llama", "lm_head.scales"),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(name, key, tmp_path):
    quantised_model(name, "int4-g32-zp").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "deadband.safetensors")
    del tensors[key]
    save_file(tensors, tmp_path / "deadband.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"the checkpoint has no {key}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_base_models(tmp_path):
    untied = quantised_model("mistral")
    untied.save_pretrained(tmp_path / "untied")
    base = AutoModel.from_pretrained(tmp_path / "untied").eval()
    assert len(matrices(base)) == 14
    batch = tiny_batches(1)[0]
    with torch.no_grad(), sparse_prefill(base), sparse_prefill(untied):
        assert torch.equal(base(**batch).last_hidden_state, untied.model(**batch).last_hidden_state)
    tied = quantised_model("llama")
    tied.save_pretrained(tmp_path / "tied")
    base = AutoModel.from_pretrained(tmp_path / "tied").eval()  # its embedding gets the rows of the output layer
    assert type(base.embed_tokens) is nn.Embedding
    with torch.no_grad():
        assert torch.equal(base.embed_tokens.weight, tied.lm_head.weight)


def test_loading_dequantises_nothing(tmp_path, monkeypatch):
    quantised_model().save_pretrained(tmp_path)
    monkeypatch.setattr(QuantizedMatrix, "matrix", None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.undo()
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_copies_and_pickles(name):
    model = quantised_model(name, "int4")
    expected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for module in matrices(model).values():
            module.scales.zero_()
    for each in copies:
        assert [type(module) for module in each.modules()] == [type(module) for module in model.modules()]
        assert each.get_input_embeddings().source is each.lm_head
        assert torch.equal(logits(each), expected)
    del model, copies
    gc.collect()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(assign, tmp_path):
    model, other = quantised_model(form="int4-g64-zp"), quantised_model(form="int4-g64-zp", threshold=0.5)
    with torch.no_grad():
        for module in matrices(other).values():
            module.codes.zero_()
            module.minimum.zero_() if module.minimum is not None else None
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert not other.load_state_dict(state, assign=assign).missing_keys
    assert same_state(other, model)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match="codes"):
        other.load_state_dict(tiny_model("llama").state_dict())


def test_a_center_survives_loading():
    model, other = mlp(), mlp()
    center = torch.randn(16)
    for each, middle in ((model, center), (other, torch.zeros(16))):
        sparsify_(each, {"0": Rule(0.4, center=middle)}, weights="int8")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].offset, model[0].offset)


@pytest.mark.parametrize("form", ["int8", "int4-g32-zp"])
def test_casting_keeps_scales_exact(form):
    model = quantised_model("gemma3", form)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    model.to(torch.bfloat16)
    assert {model.lm_head.weight.dtype, model.get_input_embeddings().weight.dtype, model.dtype} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    for cast in (model.half, model.double, model.float):
        cast()
        for key, value in model.state_dict().items():
            if key.endswith(("codes", "scales", "minimum", "threshold")):
                assert value.dtype == before[key].dtype
                assert torch.equal(value, before[key])
    close(logits(model), expected, 5e-2)  # its norms went through bfloat16
    assert model.to("cpu") is model


# ---------------------------------------------------------------------------------------------- training and gradients


@pytest.mark.parametrize("gradient", ["exact", "straight_through"])
def test_gradients_reach_the_input(gradient):
    model = sparsify_(mlp(), {"0": 0.4}, weights="int8", gradient=gradient)
    layer = model[0]
    for training in (True, False):
        layer.train(training)
        for rows in (2, 9):
            x = torch.randn(rows, 16, requires_grad=True)
            y = layer(x)
            keep = x.detach().abs() > 0.4
            skips = training or rows <= 4
            masked = torch.where(keep, x.detach(), 0) if skips else x.detach()
            close(y, F.linear(masked, layer.weight, layer.bias))
            y.sum().backward()
            whole = layer.weight.sum(0).expand(rows, -1)
            expected = torch.where(keep, whole, 0) if skips and gradient == "exact" else whole
            torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(layer.bias.grad, torch.full((40,), 22.0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_low_rank_adapters_train(name):
    model = quantised_model(name, "int4").requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = next(iter(sparse_sites(model).values()))
    out_features, in_features = first.matrix_shape
    down, up = nn.Linear(in_features, 2, bias=False), nn.Linear(2, out_features, bias=False)
    nn.init.zeros_(up.weight)
    first.register_forward_hook(lambda module, arguments, output: output + up(down(arguments[0])))
    model.train()
    optimiser = torch.optim.Adam([*down.parameters(), *up.parameters()], lr=0.05)
    batch, losses = tiny_batches(1)[0], []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_gradient_is_the_dense_models():
    model = quantised_model("mistral", "int8", threshold=0.0)
    other = dense_copy(model)
    batch = tiny_batches(1)[0]
    for each in (model, other):
        each.train()
        each(**batch, labels=batch["input_ids"]).loss.backward()
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, other.get_parameter(name).grad, rtol=1e-3, atol=2e-4)


# --------------------------------------------------------------------------------------------------------- dense again


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_densify_gives_the_dequantised_model(name, form, tmp_path):
    reference, model = tiny_model(name), quantised_model(name, form)
    weights = {name: module.weight.clone() for name, module in matrices(model).items()}
    with dense(model):
        expected = logits(model)
    with pytest.warns(UserWarning, match=f"densify_ dequantised {len(weights)} layers") as caught:
        assert densify_(model) is model
    assert caught[0].filename == __file__
    assert [type(module) for module in model.modules()] == [type(module) for module in reference.modules()]
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name in TIED)
    assert model.config.tie_word_embeddings == reference.config.tie_word_embeddings
    assert getattr(model.config, "quantization_config", None) is None
    assert all(parameter.requires_grad and parameter.is_contiguous() for parameter in model.parameters())
    close(logits(model), expected, max(1e-2, 2 * tolerance_of(form)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    batch = tiny_batches(1)[0]
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(isinstance(module, (SparseSite, QuantizedMatrix)) for module in model.modules())
    sparsify_(model, dict.fromkeys(find_sites(model), 0.1), weights=form)  # and back


def test_densify_without_quantised_weights_does_not_warn():
    model = sparsify_(mlp(), {"0": 0.1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        densify_(model)


# ------------------------------------------------------------------------------------------------ counting, generating


def test_sparsity_is_counted():
    model = sparsify_(mlp(), {"0": 1.0}, weights="int4")
    with torch.no_grad():
        model(torch.tensor([[0.5] * 4 + [2.0] * 12]))
    report = deadband.sparsity(model)
    assert (report.total, report.entries) == (0.25, 16)
    silent = sparsify_(mlp(), {"0": 1.0}, weights="int4", count=False)
    with torch.no_grad():
        silent(torch.randn(1, 16))
    with pytest.raises(ValueError, match="does not count"):
        deadband.sparsity(silent)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate(dtype, options):
    model = quantised_model("llama", "int8", dtype)
    ids = torch.randint(3, VOCABULARY, (1, 6))
    written = model.generate(ids, max_new_tokens=6, do_sample=False, **options)
    assert written.shape == (1, 12)
    assert deadband.sparsity(model, warn=False).entries > 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [True, False])
@pytest.mark.parametrize("form", ["int8", "int4-g32-zp", None])
def test_compile_fullgraph(form, count):
    model = sparsify_(mlp(), {"0": 0.4, "4": 0.2}, weights=form, count=count)
    x = torch.randn(1, 16)
    with torch.no_grad(), any_folder():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)
    if form is None or not count:
        return
    llama = quantised_model("gemma3", "int8", output_layer=form)
    for module in (llama.get_input_embeddings(), llama.lm_head):
        given = torch.tensor([[3, 99, 31]]) if module is not llama.lm_head else torch.randn(1, 64)
        with torch.no_grad(), any_folder():
            expected = module(given)
            actual = torch.compile(module, fullgraph=True)(given)
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_compile_a_whole_model_and_export_a_layer():
    model = quantised_model("llama", "int4", threshold=0.0)
    ids = torch.randint(3, VOCABULARY, (1, 1))
    with torch.no_grad(), any_folder():
        expected = model(ids, use_cache=False).logits
        actual = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        close(actual, expected, 1e-2)
        layer = model.model.layers[0].mlp.up_proj
        x = torch.randn(1, 64)
        program = torch.export.export(nn.Sequential(layer).eval(), (x,))
        torch.testing.assert_close(program.module()(x), layer(x))
    assert any("quantized_linear" in str(node.target) for node in program.graph.nodes)


def test_export_with_gradients_on_keeps_the_codes():
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 8)).eval()
    sparsify_(model, {"1": 0.1, "2": 0.1}, weights="int8")  # their inputs have gradients: the first layer's weight does
    x = torch.randn(2, 16)
    program = torch.export.export(model, (x,))
    assert sum("quantized_linear" in str(node.target) for node in program.graph.nodes) == 2
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_given_weights_stay_the_callers():
    model = mlp()
    given = quantize(model[0].weight.detach(), "int8")
    codes = given.codes.clone()
    sparsify_(model, {"0": 0.1}, weights={"0": given})
    model[0].codes.zero_()
    assert torch.equal(given.codes, codes)
    assert isinstance(given, QuantizedWeight)
