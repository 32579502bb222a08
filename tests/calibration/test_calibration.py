import json
import math

import numpy as np
import pytest
import safetensors.numpy
import torch
from conftest import CONFIGS, mlp, tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deadband
from deadband.allocation.sensitivity import measure_sensitivity
from deadband.calibration.calibration import Calibration, calibrate
from deadband.calibration.inspection import inspect
from deadband.calibration.site_statistics import SiteStatistics
from deadband.calibration.watcher import NotReachedError
from deadband.layers.experts import module_at
from deadband.layers.sparse import SPARSE_CLASSES
from deadband.ops.observe import FIRST_NONFINITE, observe


def statistics(x: torch.Tensor) -> SiteStatistics:
    site = SiteStatistics.empty(nn.Linear(x.shape[1], 3))
    histogram, site.rows, site.sum, site.sum_of_squares = observe(x)
    site.histogram, site.discrete = histogram[:FIRST_NONFINITE], x.dtype == torch.bfloat16
    return site


def true_sparsity(x: torch.Tensor, threshold: float) -> float:
    return (x.float().abs() <= threshold).double().mean().item()


SHAPES = {
    "normal": lambda g: torch.randn(400, 50, generator=g),
    "uniform": lambda g: torch.rand(400, 50, generator=g),
    "narrow": lambda g: 5 + 0.2 * torch.randn(400, 50, generator=g),
    "heavy": lambda g: torch.randn(400, 50, generator=g) ** 7,
    "tiny": lambda g: 1e-30 * torch.randn(400, 50, generator=g),
    "mixed": lambda g: torch.randn(400, 50, generator=g) * torch.logspace(-9, 9, 50),
    "relu": lambda g: torch.randn(400, 50, generator=g).relu(),
}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(list(SHAPES)),
    sparsity=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**30),
)
def test_threshold_and_sparsity_agree_with_the_data_to_half_a_percent(shape, sparsity, seed):
    x = SHAPES[shape](torch.Generator().manual_seed(seed))
    site = statistics(x)
    threshold = site.threshold(sparsity)
    zeros = true_sparsity(x, 0.0)
    assert true_sparsity(x, threshold) == pytest.approx(max(sparsity, zeros), abs=0.005)
    assert site.sparsity(threshold) == pytest.approx(max(sparsity, zeros), abs=0.005)
    somewhere = x.abs().flatten()[seed % x.numel()].item() * 1.1
    assert site.sparsity(somewhere) == pytest.approx(true_sparsity(x, somewhere), abs=0.005)


@settings(max_examples=30, deadline=None)
@given(sparsity=st.floats(0.01, 0.99), seed=st.integers(0, 2**30), shape=st.sampled_from(["normal", "narrow", "relu"]))
def test_bfloat16_thresholds_are_as_near_as_the_values_allow(sparsity, seed, shape):
    x = SHAPES[shape](torch.Generator().manual_seed(seed)).bfloat16()
    site = statistics(x)
    achieved = true_sparsity(x, site.threshold(sparsity))
    assert site.sparsity(site.threshold(sparsity)) == pytest.approx(achieved, abs=1e-9)
    values = x.float().abs().flatten().unique()
    possible = [true_sparsity(x, value) for value in values.tolist()] + [true_sparsity(x, 0.0)]
    best = min(abs(each - sparsity) for each in possible if each >= true_sparsity(x, 0.0))
    assert abs(achieved - sparsity) <= best + 1e-9 or achieved == pytest.approx(true_sparsity(x, 0.0))


def test_moments_are_those_of_the_data():
    torch.manual_seed(0)
    x = 3 + torch.randn(1000, 20) * torch.arange(1, 21)
    site = statistics(x)
    np.testing.assert_allclose(site.mean, x.double().mean(0).numpy(), rtol=1e-6)
    np.testing.assert_allclose(site.variance, x.double().var(0, unbiased=False).numpy(), rtol=1e-5)


def inputs_of(model, batches, sites):
    """What calibrate has to have seen, by another way: every site's input, concatenated."""
    seen = {name: [] for name in sites}
    handles = [
        module_at(model, name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
        )
        for name in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture_is_seen_as_it_is(name, dtype):
    model, batches = tiny_model(name, dtype), tiny_batches(3)
    calibration = calibrate(model, batches, progress=False)
    for site, x in inputs_of(model, batches, calibration.sites).items():
        found = calibration.sites[site]
        assert found.entries == x.numel()
        np.testing.assert_allclose(found.sum, x.double().sum(0).numpy(), rtol=1e-5, atol=1e-4)
        assert found.sparsity(found.threshold(0.4)) == pytest.approx(true_sparsity(x, found.threshold(0.4)), abs=0.005)


def test_nothing_in_the_model_changes():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    calibrate(model, tiny_batches(), progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))


def test_hooks_go_and_flags_return_after_an_error():
    model = tiny_model("llama").train()
    with pytest.raises(ValueError, match="take the model's own tokenizer"):
        calibrate(model, [{"input_ids": torch.tensor([[10**6]])}], progress=False)
    assert model.training
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_padding_is_not_counted():
    model = tiny_model("llama")
    ids = torch.randint(3, 100, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    padded = calibrate(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    ragged = calibrate(model, [{"input_ids": ids[:1, :7]}, {"input_ids": ids[1:]}], progress=False)
    for name in padded.sites:
        assert padded.sites[name].entries == ragged.sites[name].entries == 19 * padded.sites[name].in_features
        np.testing.assert_allclose(padded.sites[name].sum, ragged.sites[name].sum, rtol=1e-4, atol=1e-3)


def test_padding_of_an_encoder_is_not_the_decoders():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    ids, mask = torch.randint(1, 50, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[:, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    sites = calibrate(model, [batch], progress=False).sites
    assert sites["encoder.block.0.layer.0.SelfAttention.q"].entries == 8 * 16
    assert sites["decoder.block.0.layer.0.SelfAttention.q"].entries == 16 * 16


def test_batches_with_labels():
    batches = [{**batch, "labels": batch["input_ids"]} for batch in tiny_batches(2)]
    model = tiny_model("llama")
    with_labels = calibrate(model, batches, progress=False)
    with_labels.allocate(0.3, "greedy", model=model, batches=batches, progress=False)
    assert with_labels.sites.keys() == calibrate(model, tiny_batches(2), progress=False).sites.keys()


def test_keyword_inputs_several_calls_and_positional_batches():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x, shift):
            return self.fc(input=self.fc(input=x) + shift)

    model, x = Twice(), torch.randn(5, 6)
    calibration = calibrate(model, [(x, 1.0), [x[:2], 2.0]], progress=False)
    assert calibration.sites["fc"].entries == 2 * 7 * 6
    with torch.no_grad():
        expected = x.sum(0) + x[:2].sum(0) + (model.fc(x) + 1).sum(0) + (model.fc(x[:2]) + 2).sum(0)
    np.testing.assert_allclose(calibration.sites["fc"].sum, expected.double().numpy(), rtol=1e-5, atol=1e-5)


def test_an_input_changed_in_place_between_two_layers_is_looked_at_again():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x.clone()
            y = self.a(x)
            x.mul_(10)
            return y + self.b(x)

    calibration = calibrate(InPlace(), [torch.ones(2, 4)], progress=False)
    assert calibration.sites["a"].sum.tolist() == [2.0] * 4
    assert calibration.sites["b"].sum.tolist() == [20.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_entries_are_reported_and_not_counted(dtype):
    model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    x = torch.tensor([[1.0, math.nan, 2.0, 3.0], [math.inf, 1.0, -math.inf, 1.0]], dtype=dtype)
    site = calibrate(model, [x], progress=False).sites["0"]
    assert (site.nonfinite, site.entries) == (3, 5)
    assert site.sum.tolist() == [1.0, 1.0, 2.0, 4.0]
    assert site.mean.tolist() == [1.0, 1.0, 2.0, 2.0]  # of what was finite in each channel
    assert site.variance.tolist() == [0.0, 0.0, 0.0, 1.0]


def test_half_precision_sums_do_not_stall_or_overflow():
    model = nn.Sequential(nn.Linear(2, 2))
    for dtype, value in ((torch.bfloat16, 1.0), (torch.float16, 60000.0)):
        site = calibrate(model.to(dtype), [torch.full((3000, 2), value, dtype=dtype)], progress=False).sites["0"]
        assert site.sum.tolist() == pytest.approx([3000 * value] * 2)
        assert site.sum_of_squares.tolist() == pytest.approx([3000 * value**2] * 2)


def test_merging_is_calibrating_on_both():
    model, batches = tiny_model("qwen2"), tiny_batches(4)
    merged = calibrate(model, batches[:1], progress=False) + calibrate(model, batches[1:], progress=False)
    together = calibrate(model, iter(batches), progress=False)
    for name, site in together.sites.items():
        assert np.array_equal(site.histogram, merged.sites[name].histogram)
        np.testing.assert_allclose(site.sum_of_squares, merged.sites[name].sum_of_squares)
        assert merged.sites[name].threshold(0.3) == site.threshold(0.3)


def test_merging_different_things_is_refused():
    x = [torch.randn(4, 16)]
    one = calibrate(mlp(), x, progress=False)
    with pytest.raises(ValueError, match="different sites"):
        one + calibrate(mlp(), x, include="0", progress=False)
    with pytest.raises(ValueError, match="criteria"):
        one + calibrate(mlp(), x, criterion="weighted_magnitude", progress=False)
    with pytest.raises(ValueError, match="3x16 layer"):
        calibrate(nn.Sequential(nn.Linear(16, 3)), x, progress=False) + calibrate(mlp(), x, include="0", progress=False)


@pytest.mark.parametrize("criterion", ["magnitude", "weighted_magnitude"])
def test_save_and_load(tmp_path, criterion):
    calibration = calibrate(tiny_model("llama"), tiny_batches(), criterion=criterion, progress=False)
    path = tmp_path / "with space" / "c.safetensors"
    path.parent.mkdir()
    calibration.save(path)
    loaded = Calibration.load(path)
    assert loaded.criterion == criterion
    assert list(loaded.sites) == list(calibration.sites)
    for name, site in calibration.sites.items():
        other = loaded.sites[name]
        assert np.array_equal(site.histogram, other.histogram)
        assert np.array_equal(site.sum, other.sum)
        assert (site.nonfinite, site.discrete, site.weight_bytes) == (
            other.nonfinite,
            other.discrete,
            other.weight_bytes,
        )
    assert str(loaded) == str(calibration)
    assert [child.name for child in path.parent.iterdir()] == ["c.safetensors"]


def test_loading_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="nothing"):
        Calibration.load(tmp_path / "nothing")
    good = calibrate(mlp(), [torch.randn(4, 16)], progress=False)
    good.save(tmp_path / "good")
    with safetensors.safe_open(tmp_path / "good", "np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != "2.sum"}  # noqa: SIM118
        safetensors.numpy.save_file(tensors, tmp_path / "damaged", metadata=file.metadata())
    with pytest.raises(ValueError, match="damaged calibration"):
        Calibration.load(tmp_path / "damaged")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.load(tmp_path / "weights")


def test_weighted_magnitude_scores_by_column_norm():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 0.0, 1.0], [4.0, 1.0, 0.0]])  # norms 5, 1, 1
    x = torch.tensor([[1.0, 2.0, 3.0]])
    site = calibrate(model, [x], criterion="weighted_magnitude", progress=False).sites["0"]
    assert site.sparsity(2.5) == pytest.approx(1 / 3)
    assert site.sparsity(4.0) == pytest.approx(2 / 3, abs=1e-6)
    assert site.sparsity(6.0) == 1.0


def test_unreached_sites_and_empty_batches_are_errors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(model, [], progress=False)
    with pytest.raises(ValueError, match="'0' saw 8 NaN or infinite entries"):
        calibrate(model, [torch.full((2, 4), math.nan)], progress=False)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="'unused' was never reached; leave it out with exclude="):
        calibrate(Unused(), [torch.randn(2, 4)], progress=False)
    with pytest.raises(ValueError, match="criterion 'size' is not known"):
        calibrate(model, [torch.randn(2, 4)], criterion="size", progress=False)


class Branches(nn.Module):
    """Two branches, of which a flag beside the input takes the second; a third that nothing takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.other, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.gone = nn.Linear(4, 4)

    def forward(self, x, second=False):
        return self.other(self.used(x)) if second else self.used(x)


def test_what_nothing_reaches_is_named_all_at_once_or_left_dense(tmp_path):
    model, batches = Branches(), [torch.randn(64, 4)]
    with pytest.raises(
        NotReachedError, match="3 sites were never reached.*unreached='dense'.*other, third, gone"
    ) as caught:
        calibrate(model, batches, progress=False)
    assert caught.value.sites == ("other", "third", "gone")
    with pytest.raises(NotReachedError, match="2 sites were never reached.*third, gone"):
        inspect(model, [*batches, {"x": batches[0], "second": True}], progress=False)
    with pytest.raises(NotReachedError, match="3 sites"):
        dict(deadband.quantization.input_hessians(model, batches, ["used", "other", "third", "gone"], memory=1))
    with pytest.raises(NotReachedError, match="no gradient reached 3 sites.*other, third, gone"):
        measure_sensitivity(model, batches, ["used", "other", "third", "gone"], progress=False)
    with pytest.raises(ValueError, match="unreached='skip'; expected one of 'error', 'dense'"):
        calibrate(model, batches, unreached="skip", progress=False)
    assert list(inspect(model, batches, unreached="dense", progress=False).sites) == ["used"]

    calibration = calibrate(model, batches, unreached="dense", progress=False)
    assert list(calibration.sites) == ["used"]
    assert calibration.unreached == ("other", "third", "gone")
    assert "never reached, and left dense: other, third, gone" in str(calibration)
    calibration.save(tmp_path / "part.safetensors")
    second = calibrate(model, [{"x": batches[0], "second": True}], unreached="dense", progress=False)
    both = Calibration.load(tmp_path / "part.safetensors") + second
    assert (set(both.sites), both.unreached) == ({"used", "other"}, ("third", "gone"))
    assert both.sites["used"].entries == 2 * both.sites["other"].entries == 2 * 64 * 4
    sparse = deadband.sparsify_(model, calibration.allocate(0.5, model=model, batches=batches, progress=False))
    assert set(deadband.layers.sites.sparse_sites(sparse)) == {"used"}

    with pytest.raises(NotReachedError, match="never reached"):
        calibrate(model, [torch.zeros(0, 4)], unreached="dense", progress=False)
    with pytest.raises(ValueError, match="saw 8 NaN or infinite entries"):
        calibrate(Branches(), [torch.full((2, 4), math.nan)], unreached="dense", progress=False)


SIZES = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["bart", "mbart", "pegasus", "marian", "blenderbot", "plbart", "mvp", "whisper", "trocr"]
)
def test_a_decoder_alone_keeps_its_cross_attention_dense(kind):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SIZES)).eval()
    batches = [{"input_ids": torch.randint(3, 64, (2, 12))} for _ in range(2)]
    with pytest.raises(NotReachedError) as caught:
        calibrate(model, batches, progress=False)
    assert len(caught.value.sites) == 8  # q, k, v and o of two layers
    assert all("encoder_attn" in name and name in str(caught.value) for name in caught.value.sites)
    calibration = calibrate(model, batches, unreached="dense", progress=False)
    assert calibration.unreached == caught.value.sites
    sparse = deadband.sparsify_(
        model, calibration.allocate(0.4, "uniform", model=model, batches=batches, progress=False)
    )
    assert not {*deadband.layers.sites.sparse_sites(sparse)} & {*calibration.unreached}
    with torch.no_grad():
        assert sparse(**batches[0]).logits.isfinite().all()


def damaged(path, change):
    """The calibration or thresholds in a file, written again with changed tensors or metadata."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        ((kind, text),) = file.metadata().items()
    about = json.loads(text)
    changed = change(tensors, about)
    about = about if changed is None else changed
    save_file(tensors, path, {kind: about if isinstance(about, str) else json.dumps(about)})


def put(key, value):
    return lambda tensors, about: tensors.__setitem__(key, value)


def tell(*path, value):
    def change(tensors, about):
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = value

    return change


LIES = {
    "floats for counts": put("0.histogram", np.zeros(8)),
    "two dimensions": put("0.rows", np.ones((4, 4), np.int64)),
    "negative counts": put("0.histogram", np.array([-1, 5])),
    "negative squares": put("0.sum_of_squares", -np.ones(4)),
    "not a number": put("0.sum", np.full(4, np.nan)),
    "fewer channels": put("0.sum", np.ones(3)),
    "more bins than there are": put("0.histogram", np.ones(40_000, np.int64)),
    "a missing tensor": lambda tensors, about: tensors.clear(),
    "bins from below": tell("sites", "0", "first_bin", value=-3),
    "bins beyond": tell("sites", "0", "first_bin", value=10**9),
    "bins from a text": tell("sites", "0", "first_bin", value="0"),
    "negative bytes": tell("sites", "0", "weight_bytes", value=-1),
    "bytes of a float": tell("sites", "0", "weight_bytes", value=1e300),
    "outputs of a bool": tell("sites", "0", "out_features", value=True),
    "discrete of a text": tell("sites", "0", "discrete", value="no"),
    "samples of a text": tell("sites", "0", "sample", value=["a"]),
    "samples that are none": tell("sites", "0", "sample", value=None),
    "a site that is a list": tell("sites", "0", value=[]),
    "no sites": tell("sites", value={}),
    "sites in a list": tell("sites", value=[]),
    "an unknown criterion": tell("criterion", value="size"),
    "unreached and reached": tell("unreached", value=["0"]),
    "unreached numbers": tell("unreached", value=[3]),
    "another version": tell("version", value=2),
    "a list": lambda tensors, about: [],
    "nothing": lambda tensors, about: "null",
    "no JSON": lambda tensors, about: "{",
    "too deep": lambda tensors, about: "[" * 100_000,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_no_calibration(lie, tmp_path):
    path = tmp_path / "calibration.safetensors"
    calibrate(nn.Sequential(nn.Linear(4, 4)), [torch.randn(64, 4)], progress=False).save(path)
    assert list(Calibration.load(path).sites) == ["0"]
    damaged(path, LIES[lie])
    with pytest.raises(ValueError, match="is not a calibration|is a damaged calibration"):
        Calibration.load(path)


def test_a_sparse_model_can_be_calibrated_too():
    model = deadband.sparsify_(mlp(), {"0": 0.3})
    assert type(model[0]) in SPARSE_CLASSES.values()
    assert calibrate(model, [torch.randn(8, 16)], progress=False).sites["0"].entries == 8 * 16


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    calibration = calibrate(tiny_model("opt"), tiny_batches(), progress=False)
    calibration.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert list(tmp_path.iterdir()) == [tmp_path / "plot.png"]


def test_inference_mode_and_shared_inputs():
    model = tiny_model("llama")
    with torch.inference_mode():
        inside = calibrate(model, tiny_batches(), progress=False)
    outside = calibrate(model, tiny_batches(), progress=False)
    for name in inside.sites:
        assert np.array_equal(inside.sites[name].histogram, outside.sites[name].histogram)
