import re

import pytest
import torch
from conftest import mlp, sparse_model, tiny_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

import deadband
from deadband.layers.sites import find_blocks, find_sites, matrix_of, weight_bytes


def test_blocks_are_the_outermost_repeated_modules():
    assert list(find_blocks(tiny_model("llama"))) == ["model.layers.0", "model.layers.1"]
    assert list(find_blocks(tiny_model("gpt2"))) == ["transformer.h.0", "transformer.h.1"]
    assert find_blocks(mlp()) == {}
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))  # noqa: E731
    stacked = nn.Sequential(nn.Linear(3, 4), nn.Sequential(block(), block()), nn.Linear(4, 2))
    assert list(find_blocks(stacked)) == ["1.0", "1.1"]
    assert list(find_sites(stacked)) == ["1.0.0", "1.0.2", "1.1.0", "1.1.2"]


def test_default_sites_leave_out_head_embeddings_and_routers():
    names = list(find_sites(tiny_model("qwen2_moe")))
    assert "lm_head" not in names
    assert not any(re.search(r"(gate|router)$", name) for name in names)
    assert sum(name.endswith("gate_proj") for name in names) == 2
    assert list(find_sites(mlp())) == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.0.mlp.down_proj", 1),
        ("down_proj", 2),
        ("mlp.down_proj", 2),
        ("*.self_attn.[qk]_proj", 4),
        ("re:.*layers\\.1\\..*", 7),
        (re.compile(r".*(gate|up)_proj"), 4),
        (["q_proj", "*.mlp.*"], 8),
        ("lm_head", 1),
        ({"q_proj", "k_proj"}, 4),
    ],
)
def test_patterns(pattern, count):
    assert len(find_sites(tiny_model("llama"), include=pattern)) == count


def test_exclude():
    model = tiny_model("llama")
    assert len(find_sites(model, exclude="down_proj")) == 12
    assert len(find_sites(model, include="*.mlp.*", exclude=["*.0.*"])) == 3
    with pytest.raises(ValueError, match="no site is left"):
        find_sites(model, include="down_proj", exclude="*.mlp.*")


def test_patterns_that_match_nothing_or_are_nonsense():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"include='down_prj' matches no linear layer.*down_proj"):
        find_sites(model, include="down_prj")
    with pytest.raises(ValueError, match="exclude='nothing'"):
        find_sites(model, exclude=["q_proj", "nothing"])
    with pytest.raises(ValueError, match="matches no linear layer"):
        find_sites(model, include="model.norm")
    with pytest.raises(ValueError, match="not a valid regular expression"):
        find_sites(model, include="re:(")
    with pytest.raises(TypeError, match="got int"):
        find_sites(model, include=[3])
    with pytest.raises(ValueError, match="has no layer that can be made sparse"):
        find_sites(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()))


def test_subclasses_of_linear_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert list(find_sites(nn.Sequential(Scaled(4, 4), nn.Linear(4, 4)))) == ["1"]
    attention = nn.TransformerEncoderLayer(8, 2)  # its out_proj's forward is never called
    with pytest.raises(ValueError, match="has no layer that can be made sparse"):
        find_sites(attention)  # in eval mode, torch reads the weights of linear1 and linear2 without calling them
    decoder = nn.TransformerDecoderLayer(8, 2)
    assert set(find_sites(decoder)) == {"linear1", "linear2"}


def test_pruned_and_normed_weights_are_left_alone():
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert list(find_sites(model)) == ["1"]


def test_routers_and_adapters_wherever_they_are():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.ModuleDict({"classifier": nn.Linear(4, 2)})
            self.fc = nn.Linear(4, 4)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 1)})

    assert list(find_sites(nn.ModuleDict({"h": nn.ModuleList([Block(), Block()]), "head": nn.Linear(4, 4)}))) == [
        "h.0.fc",
        "h.1.fc",
    ]


def test_matrix_and_bytes_of_every_storage():
    for name in ("llama", "gpt2"):
        for model in (tiny_model(name), sparse_model(name)):
            block = next(iter(find_blocks(model).values()))
            module = block.mlp.down_proj if name == "llama" else block.mlp.c_proj
            assert matrix_of(module).shape == (64, 112)
            assert weight_bytes(module) == 64 * 112 * 4


class Other(nn.Module):
    """A linear layer of another library: packed weights under names of its own."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("qweight", torch.zeros(out_features, in_features, dtype=torch.int8))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).T


class Plain(nn.Linear):
    """A subclass that changes nothing."""


def replaced(model, make):
    """The model with every linear layer in its blocks made anew."""
    for block in find_blocks(model).values():
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(block.get_submodule(parent), own, make(module))
    return model


def with_subclass_weight(module):
    class Packed(torch.Tensor):
        pass

    module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed))
    return module


def with_adapter(module):
    wrapper = nn.Module()
    wrapper.base_layer = Other(module.in_features, module.out_features)
    wrapper.lora_A = nn.ModuleDict({"default": nn.Linear(module.in_features, 2)})
    return wrapper


def pruned(module):
    from torch.nn.utils import prune

    return prune.l1_unstructured(module, "weight", 0.5)


@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda module: Other(module.in_features, module.out_features), r"\.Other \(\d+\)"),
        (lambda module: Plain(module.in_features, module.out_features), r"\.Plain \(\d+\)"),
        (with_subclass_weight, r"Linear with a Packed \(\d+\)"),
        (with_adapter, r"\.Other \(\d+\)"),
        (pruned, r"pruned weight: .*prune\.remove"),
    ],
)
def test_blocks_of_other_layers_are_named(name, make, named):
    model = replaced(tiny_model(name), make)
    for choose in (find_sites, lambda model: deadband.sparsify_(model, exact=True)):
        with pytest.raises(ValueError, match=f"no layer that can be made sparse in its blocks.*{named}.*'lm_head'"):
            choose(model)
    assert list(find_sites(model, include="lm_head")) == ["lm_head"]
    if make is not with_adapter:
        with pytest.raises(ValueError, match=f"include='.*_proj' matches no linear layer that.*{named[:-8]}"):
            find_sites(model, include="*_proj")


def test_an_encoder_that_torch_fuses_is_named():
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
    model = nn.ModuleDict({"encoder": layers, "head": nn.Linear(8, 3)})
    with pytest.raises(ValueError, match=r"TransformerEncoderLayer \(2\).*'head'"):
        find_sites(model)


def test_a_gate_is_a_router_only_beside_experts_or_with_few_outputs():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(16, 8)
            self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(8)])

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.output_gate = nn.Linear(16, 16)
            self.head_gate = nn.Linear(16, 2)
            self.proj_up_gate = nn.Linear(16, 40)
            self.router = nn.Linear(16, 16)
            self.mlp = Mixture()

    found = {name.removeprefix("h.0.") for name in find_sites(nn.ModuleDict({"h": nn.ModuleList([Block()])}))}
    assert found == {"output_gate", "proj_up_gate", *(f"mlp.experts.{index}" for index in range(8))}


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba"])
def test_what_a_scan_reads_is_no_site(kind):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "jamba":
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "attn_layer_period": 2, "attn_layer_offset": 1,
                  "expert_layer_period": 4, "expert_layer_offset": 3, "use_mamba_kernels": False}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    batches = [{"input_ids": torch.arange(3, 24)[None]}]
    sites = deadband.calibrate(model, batches, progress=False).sites
    assert sites.keys() == find_sites(model).keys()
    assert any(name.endswith("x_proj") for name in sites)
    assert not any(name.endswith("dt_proj") for name in sites)


COMPUTED = {
    "parametrised weight: .*remove_parametrizations": parametrizations.weight_norm,
    "parametrised weight: .*parametrizations.layer, 'weight'": parametrizations.orthogonal,
    "parametrised bias: .*'bias'": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Identity()),
    "pruned weight: .*prune.remove": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "by weight_norm: .*remove_weight_norm": nn.utils.weight_norm,
    "by spectral_norm: .*remove_spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("message", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 8), lambda: Conv1D(8, 8)])
def test_a_computed_weight_and_how_to_make_it_permanent(layer, message):
    model = nn.Sequential(layer(), nn.Linear(8, 8))
    COMPUTED[message](model[0])
    for refused in (
        lambda: deadband.sparsify_(model, {"0": 0.1}),
        lambda: deadband.sparsify_(model, {"1": 0.1, "0": 0.1}),
        lambda: find_sites(model, include="0"),
        lambda: find_sites(model[:1]),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert list(find_sites(model)) == ["1"]
    assert type(model[1]) is nn.Linear


def test_made_permanent_it_is_a_site():
    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.remove(model[0], "weight")
    deadband.sparsify_(model, {"0": 0.1})
    assert int((model[0].weight == 0).sum()) == 32
