"""Every save is followed by a load: what is saved comes from the layers, whatever became of the model meanwhile."""

import contextlib
import copy
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import _LLAMA, VOCABULARY, sparse_model, tiny_batches, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import deadband
from deadband.integrations.transformers import DeadbandQuantizer
from deadband.layers.quantized import QuantizedMatrix, QuantizedTable
from deadband.layers.sites import find_sites, sparse_sites
from deadband.layers.sparse import SparseSite
from deadband.sparsify.config import config_of
from deadband.sparsify.sparsify import sparsify_

WEIGHTS = [None, "int8", "int4"]
IDS = torch.arange(3, 20)[None]


def every_site(model, threshold=0.3):
    return dict.fromkeys(find_sites(model), threshold)


def random_(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    return model.eval()


def made(name="llama", weights=None, threshold=0.3):
    model = tiny_model(name)
    return sparsify_(model, every_site(model, threshold), weights=weights)


def output(model, ids=IDS):
    """Of a prefill and, where the model is sparse, of the sparse path."""
    with torch.no_grad():
        found = [model(input_ids=ids), model(input_ids=ids[:, :2])]
    return [each.logits if hasattr(each, "logits") else each.last_hidden_state for each in found]


def assert_same(model, loaded):
    assert config_of(loaded) == config_of(model)
    assert_close(model, loaded)


def assert_close(model, loaded):
    for expected, actual in zip(output(model), output(loaded), strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).norm() < 1e-4 * expected.norm()  # a score beside the threshold may fall differently


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def written(folder):
    return json.loads((folder / "config.json").read_text())


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("wrap", [torch.compile, Holder, nn.DataParallel, lambda model: nn.ModuleList([Holder(model)])])
def test_a_wrapper_was_made_sparse(wrap, weights, tmp_path):
    model = tiny_model("llama")
    wrapper = wrap(model)
    sparsify_(wrapper, every_site(wrapper), weights=weights)
    assert isinstance(model.lm_head, QuantizedMatrix) == bool(weights)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert sparse_sites(loaded).keys() == sparse_sites(model).keys()
    assert_same(model, loaded)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_part_of_the_model_was_made_sparse(weights, tmp_path):
    model = tiny_model("qwen3")
    sparsify_(model.model.layers, every_site(model.model.layers), weights=weights)
    assert_same(model, AutoModelForCausalLM.from_pretrained(saved(model, tmp_path)))


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_inside_a_larger_one(weights, tied, tmp_path):
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=32,
    )  # fmt: skip
    text = transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=tied)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=120, tie_word_embeddings=tied
    )
    for part in ("model.language_model", ""):
        model = random_(transformers.LlavaForConditionalGeneration(config))
        given = model.get_submodule(part)
        sites = {name: 0.3 for name in find_sites(given) if "vision" not in name}
        sparsify_(given, sites, weights=weights)
        for name in ("", "model", "model.language_model"):
            inner = model.get_submodule(name)
            folder = saved(inner, tmp_path / f"{part}-{name}")
            loaded = type(inner).from_pretrained(folder)
            if name and tied and weights and not part:
                assert_close(inner, loaded)  # its embedding reads the output layer, which is no part of it
            else:
                assert_same(inner, loaded)
        outer = type(model).from_pretrained(tmp_path / f"{part}-")
        assert isinstance(outer.model.language_model.embed_tokens, QuantizedTable) == bool(
            tied and weights and not part
        )
    assert not hasattr(text, "quantization_config")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])  # tied and not
def test_changes_after_sparsify(name, weights, tmp_path):
    def fewer(model):
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1

    def head(model):
        model.lm_head = nn.Linear(64, VOCABULARY, bias=False)

    def another_site(model):
        deadband.densify_(model.model.layers[0].mlp)

    def copied(model):
        model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)

    for number, change in enumerate((fewer, head, another_site, copied)):
        model = made(name, weights)
        with (
            pytest.warns(UserWarning, match="rounded")
            if weights and change is another_site
            else contextlib.nullcontext()
        ):
            change(model)
        loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / str(number)))
        assert_close(model, loaded)
        assert config_of(loaded).sites == config_of(model).sites


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])  # tied and not
def test_a_resized_vocabulary(name, weights, tmp_path):
    model = made(name, weights)
    model.resize_token_embeddings(VOCABULARY + 9)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert loaded.get_output_embeddings().out_features == loaded.config.vocab_size == VOCABULARY + 9
    assert_close(model, loaded)
    for each in (model, loaded):
        tied = each.get_output_embeddings().weight is each.get_input_embeddings().weight
        assert tied == each.config.tie_word_embeddings


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_shared_configuration_says_nothing(weights, tied, tmp_path):
    config = transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=tied)
    before = config.to_dict()
    sparse, dense = random_(transformers.LlamaForCausalLM(config)), random_(transformers.LlamaForCausalLM(config))
    sparsify_(sparse, every_site(sparse), weights=weights)
    assert config.to_dict() == before
    saved(sparse, tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert_same(sparse, loaded)
    others = {
        "dense": dense,
        "from the loaded one's": random_(transformers.LlamaForCausalLM(loaded.config)),
        "from the file's": random_(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "sparse"))),
    }
    for what, model in others.items():
        saved(model, tmp_path / what)
        assert not written(tmp_path / what).keys() & {"quantization_config", "transformers_weights"}, what
        assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / what))
        assert model.config.tie_word_embeddings == tied


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_that_is_a_site(weights, tied, tmp_path):
    model = random_(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=tied)))
    sparsify_(model, {**every_site(model), "lm_head": 0.3}, weights=weights)
    saved(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    if not weights:
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert loaded.lm_head.weight.t().is_contiguous()
    assert_close(model.model, AutoModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_base_model_takes_the_rows_of_a_tied_output_layer(weights, tmp_path):
    model = made("llama", weights)
    base = AutoModel.from_pretrained(saved(model, tmp_path))
    assert not hasattr(base, "lm_head")
    assert type(base.embed_tokens) is nn.Embedding
    assert_close(model.model, base)
    assert_same(base, AutoModel.from_pretrained(saved(base, tmp_path / "base")))


@pytest.mark.parametrize("kind", ["BertLMHeadModel", "RobertaForCausalLM", "BertForMaskedLM", "RoFormerForCausalLM"])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_tied_output_bias(kind, weights, tmp_path):
    config_class = getattr(transformers, kind).config_class
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, is_decoder="Causal" in kind or "LMHead" in kind, pad_token_id=0,
    )  # fmt: skip
    config.embedding_size = 64
    model = random_(getattr(transformers, kind)(config))
    sparsify_(model, every_site(model), weights=weights)
    loaded = type(model).from_pretrained(saved(model, tmp_path))
    assert_same(model, loaded)
    head = loaded.get_output_embeddings()
    assert head.bias.abs().sum() > 0
    assert isinstance(head, QuantizedMatrix) == bool(weights)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_falcons_linear_layers(weights, tmp_path):
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=True
    )
    model, dense = random_(transformers.FalconForCausalLM(config)), random_(transformers.FalconForCausalLM(config))
    sites = find_sites(model)
    assert {name.split(".")[-1] for name in sites} == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    sparsify_(model, exact=True)
    assert_close(dense, model)
    sparsify_(model, every_site(model), weights=weights)
    assert_same(model, AutoModelForCausalLM.from_pretrained(saved(model, tmp_path)))
    with pytest.warns(UserWarning, match="rounded") if weights else contextlib.nullcontext():
        deadband.densify_(model)
    assert [type(each) for each in model.modules()] == [type(each) for each in dense.modules()]
    if not weights:
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in dense.state_dict().items())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_shards_devices_and_copies(weights, tmp_path):
    model = copy.deepcopy(made("llama", weights))
    saved(model, tmp_path, max_shard_size="20kB")
    stem = "deadband" if weights else "model"
    assert len(list(tmp_path.glob(f"{stem}-*-of-*.safetensors"))) > 2
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}):
        assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path, **options))
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    saved(model, tmp_path)  # in one file, at the place of the shards
    names = [name for name in os.listdir(tmp_path) if "safetensors" in name]
    assert f"{stem}.safetensors" in names
    assert weights is None or names == ["deadband.safetensors"]
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_dense_again_and_dequantised(tmp_path):
    saved(made("llama", "int8"), tmp_path)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    with pytest.warns(UserWarning, match="rounded"):
        deadband.densify_(first)
    with pytest.warns(UserWarning, match="rounded"):
        second.dequantize()
    saved(first, tmp_path / "dense")
    assert "quantization_config" not in written(tmp_path / "dense")
    for model in (second, AutoModelForCausalLM.from_pretrained(tmp_path / "dense")):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_same(first, model)
    second.tie_weights()


PLAIN = """
import sys, traceback, transformers
folder = sys.argv[1]
ways = [
    lambda: transformers.AutoModel.from_pretrained(folder),
    lambda: transformers.AutoModelForCausalLM.from_pretrained(folder),
    lambda: transformers.LlamaForCausalLM.from_pretrained(folder, dtype="auto"),
    lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True),
    lambda: transformers.pipeline("text-generation", model=folder),
    lambda: transformers.LlamaForCausalLM.from_pretrained(folder, config=transformers.LlamaConfig()),
]
for way in ways:
    try:
        way()
        print("loaded")
    except Exception as error:
        print("refused" if "import deadband" in str(error) else "no such file" if "no file" in str(error) else error)
assert "deadband" not in sys.modules
"""


@pytest.mark.parametrize("shards", ["20kB", "1GB"])
def test_without_deadband_quantised_weights_are_refused(shards, tmp_path):
    saved(made("llama", "int8"), tmp_path, max_shard_size=shards)
    command = [sys.executable, "-c", PLAIN, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    assert found[:6] == ["refused"] * 5 + ["no such file"]


def to_format(version, folder):
    """As formats 3 and 4 were."""
    config = written(folder)
    ours = config["quantization_config"]
    sites = ours.pop("sites")

    def values(key):
        return {name: site[key] for name, site in sites.items() if key in site}

    ours |= {key: list(values(key)) for key in ("scaled", "centered", "relative", "masked")}
    ours |= {"version": version, "sites": list(sites), "gradient": "exact", "gradients": values("gradient")}
    ours |= {"weights": values("weights") | ours.pop("quantized"), "expected": values("expected")}
    ours["site_range"] = values("range")
    if version == 3:
        tied = ours.pop("tied_embeddings")
        del ours["gradients"]
        ours["tied_embedding"] = next(iter(tied), None)
        config.pop("transformers_weights", None)
        config["tie_word_embeddings"] = config.get("tie_word_embeddings", True) and not tied
        if (folder / "deadband.safetensors").exists():
            (folder / "deadband.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gpt2"])
def test_older_formats_are_read(name, weights, version, tmp_path):
    model = made(name, weights)
    to_format(version, saved(model, tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert_same(model, AutoModelForCausalLM.from_pretrained(saved(loaded, tmp_path / "again")))
    assert written(tmp_path / "again")["quantization_config"]["version"] == 5
    assert written(tmp_path / "again").get("tie_word_embeddings", True) == model.config.tie_word_embeddings


UP = "model.layers.0.mlp.up_proj"
LIES = {
    "sites": [
        {"model.layers.0.nowhere": {}},
        {"model.layers.0": {}},
        {"model.embed_tokens": {}},
        *({UP: lie} for lie in ([], 3, {"unknown": 1}, {"gradient": "other"}, {"gradient": []}, {"weights": "int9"})),
        *({UP: lie} for lie in ({"weights": 8}, {"scaled": 1}, {"masked": []}, {"expected": "0.5"}, {"range": [0.1]})),
        *({UP: lie} for lie in ({"expected": float("nan")}, {"range": 0.1}, {"range": [0.1, None]})),
        "model",
        3,
        [3],
        None,
    ],
    "quantized": [
        {"lm_head": "int9"},
        {"lm_head": "int4-g-4"},
        {"model.norm": "int8"},
        {"lm_head": 8},
        ["lm_head"],
        None,
    ],
    "tied_embeddings": [{"model.embed_tokens": "model.norm"}, {"model.norm": "lm_head"}, {"a": "lm_head"}, 1],
    "version": [99, None, "4", [4]],
    "criterion": ["none", 1],
    "sparsity": ["0.5", 2, float("nan"), True],
    "output_layer": [1],
    "unknown": [1],
}
FLAT_LIES = {
    "sites": [["model.layers.0.nowhere"], ["model.layers.0"], ["model.embed_tokens"], "model", 3, [3], None],
    "weights": [{"lm_head": "int9"}, {"model.norm": "int8"}, {"lm_head": 8}, ["lm_head"], None],
    "gradient": ["other", None],
    "gradients": [{"lm_head": "exact"}, []],
    "scaled": [["lm_head"], {}],
    "masked": [["lm_head"]],
    "expected": [{UP: "0.5"}, {UP: float("nan")}, 1],
    "site_range": [{UP: [0.1]}, {UP: 0.1}],
    "unknown": [1],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8")
    return saved(made("llama", "int8"), folder)


@pytest.mark.parametrize(
    ("version", "field", "value"),
    [(5, field, value) for field in LIES for value in LIES[field]]
    + [(4, field, value) for field in FLAT_LIES for value in FLAT_LIES[field]],
)
def test_configurations_that_lie(version, field, value, checkpoint, tmp_path):
    for name in ("config.json", "deadband.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    if version == 4:
        to_format(4, tmp_path)
    config = written(tmp_path)
    config["quantization_config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(word in str(caught.value) for word in ("config.json", field, "names layer", "site", "layer"))


SITE = "model.layers.0.mlp.up_proj"
WRONG = {
    "threshold": [torch.tensor(-1.0), torch.tensor(float("nan")), torch.zeros(2), torch.tensor(1), None],
    "codes": [
        torch.zeros(64, 111, dtype=torch.int8),
        torch.zeros(112, 64, dtype=torch.int8),
        torch.zeros(64, 112),
        None,
    ],
    "scales": [torch.zeros(1, 111), torch.zeros(112), None],
}


@pytest.mark.parametrize(("tensor", "value"), [(tensor, value) for tensor in WRONG for value in WRONG[tensor]])
def test_tensors_that_lie(tensor, value, checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = load_file(checkpoint / "deadband.safetensors")
    del tensors[f"{SITE}.{tensor}"]
    if value is not None:
        tensors[f"{SITE}.{tensor}"] = value
    save_file(tensors, tmp_path / "deadband.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{SITE}.{tensor}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", [0, 5, 100, 0.5, 0.99])
def test_truncated_files(part, checkpoint, tmp_path):
    whole = (checkpoint / "deadband.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (tmp_path / "deadband.safetensors").write_bytes(whole[: int(part * len(whole)) if 0 < part < 1 else part])
    with pytest.raises(ValueError, match=r"no complete safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_scales_of_rules_are_checked(tmp_path):
    model = saved(sparse_model(criterion="weighted_magnitude"), tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors[f"{SITE}.scale"][3] = -1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{SITE}.scale is negative"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = made("llama", "int8")
    model.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="layers.1.*bring the config up to date"):
        model.save_pretrained(tmp_path)
    model.config.num_hidden_layers = 2
    model.config.intermediate_size = 96
    with pytest.raises(ValueError, match=r"gate_proj' is \[112, 64\], but its config makes it \[96, 64\]"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert isinstance(model.hf_quantizer, DeadbandQuantizer)
    model.config.intermediate_size = 112
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="distributed_checkpoint=False"):
        model.save_pretrained(tmp_path, distributed_checkpoint=True)


def test_another_quantizer(tmp_path):
    model = made("mistral")
    model.hf_quantizer = types.SimpleNamespace(quantization_config=types.SimpleNamespace(quant_method="other"))
    with pytest.raises(ValueError, match=r"quantised by 'other' and sparse.*densify_"):
        model.save_pretrained(tmp_path)


def write_gguf(path):
    gguf = pytest.importorskip("gguf")
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(96)
    shapes = {"token_embd": (96, 64), "output": (96, 64), "output_norm": (64,)}
    block = {"attn_norm": (64,), "ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    block |= {f"attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in block.items()}}.items():
        values = random.standard_normal(shape).astype(np.float32) * 0.15
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_from_a_gguf_file_is_not_quantised(tmp_path):
    """transformers unpacks every weight, and marks the model all the same."""
    write_gguf(tmp_path / "model.gguf")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    sparsify_(model, every_site(model, 0.1))
    assert_same(model, AutoModelForCausalLM.from_pretrained(saved(model, tmp_path / "out")))
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[])
    transformers.Trainer(model=model.float(), args=arguments)


def test_tensor_parallelism_is_refused(tmp_path):
    saved(made("llama"), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.distributed_config = transformers.DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match="tensor parallelism"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)


def test_a_sharded_model_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = tiny_model("llama")
        thresholds = every_site(model)
        weight = model.model.layers[0].mlp.up_proj.weight.detach()
        mesh = init_device_mesh("cpu", (2,))
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(distribute_tensor(weight, mesh, [Replicate()]))
        with pytest.raises(ValueError, match="up_proj.weight' is a DTensor.*tensor parallelism"):
            sparsify_(model, thresholds)
        assert not sparse_sites(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("weights", [None, "int8"])
def test_adapters(weights, tmp_path):
    """Merged ones are saved; beside them, layers have names that transformers would not find again."""
    peft = pytest.importorskip("peft")
    model = made("llama", weights)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(made("llama", weights), tmp_path / "adapters").eval()
    assert_close(adapted, again)
    with pytest.raises(ValueError, match="base_layer.*merge adapters first"):
        adapted.get_base_model().save_pretrained(tmp_path / "base")
    if weights is None:
        merged = adapted.merge_and_unload()
        assert_same(merged, AutoModelForCausalLM.from_pretrained(saved(merged, tmp_path / "merged")))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_trainer_saves_and_resumes(weights, tmp_path):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="steps", per_device_train_batch_size=2,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCABULARY, (4, 8))]
    if weights:
        model = AutoModelForCausalLM.from_pretrained(saved(made("llama", weights), tmp_path))
        with pytest.raises(ValueError, match="purely quantized"):
            transformers.Trainer(model=model, args=arguments, train_dataset=data)
        assert not made("llama", weights).hf_quantizer.is_qat_trainable
        return
    transformers.Trainer(model=made("llama"), args=arguments, train_dataset=data).train()
    again = transformers.Trainer(model=made("llama"), args=arguments, train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same(again.model.eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"))


def test_gradients_of_parts_differ(tmp_path):
    model = tiny_model("llama")
    sparsify_(model.model.layers[0], every_site(model.model.layers[0]))
    sparsify_(model.model.layers[1], every_site(model.model.layers[1]), gradient="straight_through")
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path))
    assert {name: site.gradient for name, site in sparse_sites(loaded).items()} == {
        name: site.gradient for name, site in sparse_sites(model).items()
    }
    assert {site.gradient for site in sparse_sites(loaded).values()} == {"exact", "straight_through"}


def test_what_sparsify_was_told_is_written_by_every_part(tmp_path):
    model = tiny_model("llama")
    thresholds = deadband.calibrate(model, tiny_batches(), progress=False).allocate(0.3)
    sparsify_(Holder(model), {f"inner.{name}": value for name, value in every_site(model).items()})
    sparsify_(model, thresholds)
    for number, part in enumerate((model, model.model)):
        ours = written(saved(part, tmp_path / str(number)))["quantization_config"]
        assert (ours["sparsity"], ours["method"]) == (0.3, thresholds.method)
        assert all(isinstance(part.get_submodule(name), SparseSite) for name in ours["sites"])
        assert all("expected" in site for site in ours["sites"].values())
