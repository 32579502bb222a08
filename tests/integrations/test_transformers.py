import json
import subprocess
import sys

import pytest
import torch
import torch._inductor.config
from conftest import CONFIGS, VOCABULARY, sparse_model, tiny_batches, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import deadband
from deadband.decoding.compiler_paths import any_folder
from deadband.layers.sites import sparse_sites
from deadband.layers.sparse import DenseLinear, SparseSite

EXPECTED_SITES = {  # per block
    "llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gemma3": 7, "phi3": 4, "opt": 6, "gpt2": 4, "mixtral": 6,
    "qwen2_moe": 9,
}  # fmt: skip


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=12, do_sample=False, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_round_trips(name, tmp_path):
    model = sparse_model(name)
    assert len(sparse_sites(model)) == 2 * EXPECTED_SITES[name]
    assert not any("lm_head" in site or "embed" in site for site in sparse_sites(model))
    batch, ids = tiny_batches(1)[0], torch.randint(3, VOCABULARY, (1, 7))
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert sparse_sites(loaded).keys() == sparse_sites(model).keys()
    for prefill in (deadband.sparse_prefill, deadband.dense):
        with torch.no_grad(), prefill(model), prefill(loaded):
            assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert torch.equal(generate(model, ids), generate(loaded, ids))
    with torch.no_grad(), deadband.sparse_prefill(model):  # and sparsity does something
        sparse = model(**batch).logits
    with torch.no_grad(), deadband.dense(model):
        assert not torch.equal(sparse, model(**batch).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_densify_gives_back_the_dense_model_bit_for_bit(name):
    reference, model = tiny_model(name), sparse_model(name)
    deadband.densify_(model)
    assert not any(isinstance(module, (SparseSite, DenseLinear)) for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in reference.modules()]
    state, expected = model.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert all(state[key].stride() == expected[key].stride() for key in expected)
    batch = tiny_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, reference(**batch).logits)
    assert getattr(model.config, "quantization_config", None) is None


def test_mixture_of_experts_leaves_routers_dense():
    sites = sparse_sites(sparse_model("qwen2_moe"))
    assert not any(name.endswith("gate") for name in sites)
    assert {name.split("layers.0.")[1] for name in sites if "layers.0." in name} == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
    }  # fmt: skip


def test_bfloat16_with_tied_weights_keeps_thresholds_exact_and_ties(tmp_path):
    model = sparse_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.is_contiguous()
    for name, module in sparse_sites(model).items():
        other = loaded.get_submodule(name)
        assert other.threshold.dtype == torch.float32
        assert torch.equal(other.threshold, module.threshold)
        assert other.weight.t().is_contiguous()  # laid out again
    ids = torch.randint(3, VOCABULARY, (1, 5))
    assert torch.equal(generate(model, ids), generate(loaded, ids))


def test_weighted_magnitude_round_trips(tmp_path):
    model = sparse_model(criterion="weighted_magnitude")
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = tiny_batches(1)[0]
    with torch.no_grad(), deadband.sparse_prefill(model), deadband.sparse_prefill(loaded):
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches(cache):
    model = sparse_model()
    ids = torch.randint(3, VOCABULARY, (1, 6))
    tokens = generate(model, ids, **({"cache_implementation": "static"} if cache == "static" else {}))
    deadband.sparsity(model, reset=True)
    # decoding by hand: a dense prefill, then one token at a time through the sparse path
    with torch.no_grad():
        output = model(ids, use_cache=True)
        for position in range(6, 18):
            token = output.logits[:, -1:].argmax(-1)
            assert token.item() == tokens[0, position].item()
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
    report = deadband.sparsity(model)
    assert report.entries == 12 * sum(module.weight.shape[1] for module in sparse_sites(model).values())
    assert 0.2 < report.total < 0.6


def test_device_map_and_dispatched_models(tmp_path):
    pytest.importorskip("accelerate")
    from accelerate import dispatch_model

    model = sparse_model()
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu").eval()
    ids = torch.randint(3, VOCABULARY, (1, 5))
    expected = generate(model, ids)
    assert torch.equal(generate(loaded, ids), expected)
    # a dense model with accelerate's hooks on its layers
    hooked = dispatch_model(tiny_model("llama"), {"": "cpu"}, force_hooks=True)
    deadband.sparsify_(hooked, {name: module.threshold.item() for name, module in sparse_sites(model).items()})
    assert torch.equal(generate(hooked, ids), expected)
    assert deadband.sparsity(hooked).entries > 0


def test_offloaded_layers_are_refused(tmp_path):
    pytest.importorskip("accelerate")
    sparse_model().save_pretrained(tmp_path / "out")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"model.layers.1.* is offloaded by device_map"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=places, offload_folder=tmp_path / "disk")


def test_base_model_and_model_with_a_head_load_each_other(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert len(sparse_sites(base)) == 14
    batch = tiny_batches(1)[0]
    with torch.no_grad(), deadband.sparse_prefill(base), deadband.sparse_prefill(model):
        assert torch.equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert len(sparse_sites(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))) == 14


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile_fullgraph(dtype):
    model = sparse_model(dtype=dtype)
    ids = torch.randint(3, VOCABULARY, (1, 1))
    # otherwise inductor keeps float32 where bfloat16 would round, and scores at the threshold fall on its other side
    with any_folder(), torch.no_grad(), torch._inductor.config.patch(emulate_precision_casts=True):
        expected = model(ids, use_cache=False).logits
        deadband.sparsity(model, reset=True)
        actual = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert deadband.sparsity(model).entries == sum(module.weight.shape[1] for module in sparse_sites(model).values())


@pytest.mark.slow
def test_export():
    model = sparse_model()
    ids = torch.randint(3, VOCABULARY, (1, 3))

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        program = torch.export.export(Logits().eval(), (ids,))
        actual = program.module()(ids)
    torch.testing.assert_close(actual, expected)
    assert any("deadband.sparse_linear" in str(node.target) for node in program.graph.nodes)


def test_config_describes_the_model(tmp_path):
    model = tiny_model("llama")
    calibration = deadband.calibrate(model, tiny_batches(), include="mlp.down_proj", progress=False)
    deadband.sparsify_(model, calibration.allocate(0.3))
    model.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "deadband"
    assert list(written["sites"]) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert (written["sparsity"], written["criterion"], written["version"]) == (0.3, "magnitude", 5)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.1.mlp.down_proj.threshold").dtype == torch.float32
    # dense again, and saved so
    deadband.densify_(model)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_checkpoint_without_a_threshold_is_refused(tmp_path):
    sparse_model().save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.threshold"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model.layers.0.mlp.up_proj.threshold"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_another_version_is_refused(tmp_path):
    sparse_model().save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="version 99"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_trainer_accepts_a_sparse_model(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = sparse_model()
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCABULARY, (4, 8))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data).train()
    after = model.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(after, before)
    assert after.t().is_contiguous()


@pytest.mark.parametrize("first", ["deadband", "transformers", "transformers.quantizers.auto"])
def test_importing_deadband_registers_it_in_either_order(tmp_path, first):
    sparse_model().save_pretrained(tmp_path / "out")
    second = "transformers" if first == "deadband" else "deadband"
    code = (
        f"import {first}\nimport {second}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "SparseLinear"


def test_without_deadband_the_checkpoint_loads_dense(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path / "out")
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, float(model.model.layers[0].mlp.up_proj.weight.sum()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kind, total = result.stdout.split()
    assert kind == "Linear"
    assert float(total) == pytest.approx(float(model.model.layers[0].mlp.up_proj.weight.sum()), rel=1e-4)


def test_masks_round_trip(tmp_path):
    model = tiny_model("llama")
    sparsifier = deadband.ActivationSparsifier(
        model, deadband.aggregate.mean_abs, deadband.reduce.mean, deadband.mask.magnitude, sparsity=0.5
    )
    names = [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    for name in names:
        sparsifier.register_layer(model.get_submodule(name))
    batch = tiny_batches(1)[0]
    with torch.no_grad():
        model(**batch)
        sparsifier.step()
        masks = sparsifier.masks()
        sparsifier.squash_mask()
        expected = model(**batch).logits
    for name in names:
        sparsifier.unregister_layer(name)
    deadband.sparsify_(model, {"0.self_attn.o_proj": 0.1}, masks=masks)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.threshold.fill_(0)
        torch.testing.assert_close(model(**batch).logits, expected)
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name in names:
        assert torch.equal(loaded.get_submodule(name).mask, masks[name])
    ids = torch.randint(3, VOCABULARY, (1, 7))
    assert torch.equal(generate(model, ids), generate(loaded, ids))
    assert torch.equal(generate(deadband.densify_(loaded), ids), generate(tiny_model("llama"), ids))
