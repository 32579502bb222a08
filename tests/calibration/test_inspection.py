import doctest
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import mlp, tiny_batches, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import deadband
from deadband.calibration import inspection as module
from deadband.calibration.inspection import MASSIVE, NEARLY_DEAD, Inspection, Moments, SiteInspection, inspect
from deadband.layers.experts import module_at

COUNTS = ("rows", "dead", "nearly_dead", "always_on", "massive", "nonfinite")
ENERGIES = ("top_energy", "bottom_energy")


def reference(x):
    """The figures of one site from all of its input [rows, channels], in float64 numpy, by their definitions."""
    x = np.asarray(x, np.float64)
    finite = x[np.isfinite(x)]
    masked = np.ma.masked_invalid(x)
    rms = np.ma.filled(np.sqrt((masked**2).mean(0)), np.nan)
    dead = (x == 0).all(0)
    median = np.median(rms[rms > 0]) if (rms > 0).any() else 0.0
    deviation = finite - finite.mean()
    variance = (deviation**2).mean()
    return {
        "rows": len(x),
        "zeros": (x == 0).mean(),
        "kurtosis": (deviation**4).mean() / variance**2 if variance else math.nan,
        "top_energy": 1 - energy_below(finite, 0.99),
        "bottom_energy": energy_below(finite, 0.5),
        "dead": int(dead.sum()),
        "nearly_dead": int((~dead & (rms < NEARLY_DEAD * median)).sum()),
        "always_on": int((x != 0).all(0).sum()),
        "massive": int((rms > MASSIVE * median).sum()),
        "nonfinite": int((~np.isfinite(x)).sum()),
    }


def energy_below(values, fraction):
    """Share of the sum of squares in the smallest `fraction` of the entries; of an entry in between, its part."""
    energy = np.concatenate([[0.0], np.cumsum(np.sort(values**2))])
    if not energy[-1]:
        return math.nan
    return np.interp(fraction * len(values), np.arange(len(energy)), energy) / energy[-1]


def check(site, x):
    expected = reference(x)
    for key in COUNTS:
        assert getattr(site, key) == expected[key], key
    assert site.zeros == pytest.approx(expected["zeros"], abs=1e-12)
    assert site.kurtosis == pytest.approx(expected["kurtosis"], rel=1e-9, nan_ok=True)
    for key in ENERGIES:
        assert getattr(site, key) == pytest.approx(expected[key], abs=0.005, nan_ok=True), key
    assert site.bottom_energy == pytest.approx(expected["bottom_energy"], rel=0.017, abs=1e-12, nan_ok=True)


def inputs_of(model, batches, names):
    """Every site's input by another way: concatenated, float64."""
    seen = {name: [] for name in names}
    handles = [
        module_at(model, name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


def one_layer(channels, dtype=torch.float32):
    return nn.Sequential(nn.Linear(channels, 3)).to(dtype)


def inspect_inputs(parts, **options):
    """The only site of a model of one layer that gets `parts`."""
    return inspect(one_layer(parts[0].shape[-1], parts[0].dtype), parts, progress=False, **options).sites["0"]


SHAPES = {
    "normal": lambda g, r, c: torch.randn(r, c, generator=g),
    "narrow": lambda g, r, c: 5 + 0.2 * torch.randn(r, c, generator=g),
    "far": lambda g, r, c: 3e4 + torch.randn(r, c, generator=g),
    "heavy": lambda g, r, c: torch.randn(r, c, generator=g) ** 7,
    "tiny": lambda g, r, c: 1e-18 * torch.randn(r, c, generator=g),
    "huge": lambda g, r, c: 1e36 * torch.randn(r, c, generator=g),
    "scales": lambda g, r, c: torch.randn(r, c, generator=g) * torch.logspace(-6, 6, c),
    "relu": lambda g, r, c: torch.randn(r, c, generator=g).relu(),
    "sparse": lambda g, r, c: torch.randn(r, c, generator=g) * (torch.rand(r, c, generator=g) > 0.97),
    "dead": lambda g, r, c: torch.randn(r, c, generator=g) * (torch.rand(c, generator=g) > 0.6),
    "few values": lambda g, r, c: torch.randint(-2, 3, (r, c), generator=g).float(),
}


@settings(max_examples=120, deadline=None)
@given(
    shape=st.sampled_from(list(SHAPES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    rows=st.integers(1, 300),
    channels=st.integers(1, 40),
    parts=st.integers(1, 4),
    nonfinite=st.sampled_from([0, 0, 1, 20]),
    seed=st.integers(0, 2**30),
)
def test_figures_are_those_of_the_definitions(shape, dtype, rows, channels, parts, nonfinite, seed):
    generator = torch.Generator().manual_seed(seed)
    x = SHAPES[shape](generator, rows, channels).to(dtype)
    if nonfinite and x.numel() > 1:
        where = torch.randint(0, x.numel(), (min(nonfinite, x.numel() // 2),), generator=generator)
        x.view(-1)[where] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(len(where))[: len(where)].to(dtype)
    check(inspect_inputs(x.chunk(parts)), x.double().numpy())


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
def test_moments_of_parts_are_those_of_the_whole(numbers, cuts):
    x = torch.tensor(numbers, dtype=torch.float64)
    merged = Moments()
    for part in x.tensor_split(sorted(min(cut, len(x)) for cut in cuts)):
        merged = merged.merged(Moments.of(part))
    whole = Moments.of(x)
    assert merged.number == whole.number
    size = max(x.abs().max().item(), 1e-300)
    for power, key in enumerate(("mean", "second", "third", "fourth"), start=1):
        assert getattr(merged, key) == pytest.approx(getattr(whole, key), rel=1e-9, abs=1e-11 * len(x) * size**power)


def test_a_mean_far_from_zero_leaves_the_kurtosis():
    x = 1e4 + torch.randn(5000, 8, generator=torch.Generator().manual_seed(0)).double()
    assert inspect_inputs(x.float().split(700)).kurtosis == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("value", [0.0, 0.1, -60000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_inputs_have_no_kurtosis(value, dtype):
    site = inspect_inputs([torch.full((200, 7), value, dtype=dtype)] * 3)
    assert math.isnan(site.kurtosis)
    assert math.isnan(site.top_energy) == (value == 0)
    if value:
        assert site.bottom_energy == pytest.approx(0.5)
    json.dumps(Inspection({"0": site}).to_dict(), allow_nan=False)
    str(Inspection({"0": site}))


def test_bfloat16_energies_are_exact():
    x = torch.randn(300, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    site, expected = inspect_inputs([x]), reference(x.double().numpy())
    for key in ENERGIES:
        assert getattr(site, key) == pytest.approx(expected[key], rel=1e-9)


def test_relu_mlp_with_known_zeros():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 6)).eval()
    model[0].weight.data = torch.eye(4)
    x = torch.tensor([[1.0, -1.0, 2.0, -3.0], [1.0, 1.0, -2.0, -1.0]])
    result = inspect(model, [x], progress=False)
    assert (result.sites["0"].zeros, result.sites["2"].zeros) == (0.0, 0.5)
    second = result.sites["2"]
    assert (second.dead, second.always_on, second.rows) == (1, 1, 2)
    assert (second.in_features, second.out_features, second.weight_bytes) == (4, 6, 96)
    assert result.exact_sparsity == pytest.approx(0.5 * 96 / (64 + 96))
    assert result.advice == "ReLU-type: sparsify_(model, exact=True) skips 30% of the weight bytes for free"


def test_channels():
    x = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0  # dead
    x[:, 1] *= 1e-5  # nearly dead
    x[:, 2] *= 100  # massive
    x[7, 3] = 0  # not always on
    site = inspect_inputs([x[:100], x[100:]])
    assert (site.dead, site.nearly_dead, site.massive, site.always_on) == (1, 1, 1, 10)
    check(site, x.numpy())


def test_a_majority_of_dead_channels_does_not_move_the_median():
    x = torch.zeros(50, 10)
    x[:, :3] = 1.0
    site = inspect_inputs([x])
    assert (site.dead, site.nearly_dead, site.massive, site.always_on) == (7, 0, 0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nonfinite_entries_are_counted_and_nothing_else(dtype):
    x = torch.tensor([[1.0, math.nan, 2.0, 0.0], [math.inf, math.nan, -math.inf, 0.0]], dtype=dtype)
    site = inspect_inputs([x])
    assert (site.nonfinite, site.zeros, site.dead, site.always_on) == (4, 0.25, 1, 3)
    check(site, x.double().numpy())
    result = Inspection({"0": site})
    assert "4 entries were NaN or infinite, at 1 sites" in str(result)


def test_float64_counts_as_the_float32_that_scores_are():
    site = inspect_inputs([torch.tensor([[1e-60, 1.0, 1e60, 2.0]], dtype=torch.float64)])
    assert (site.zeros, site.nonfinite) == (0.25, 1)
    subnormal = inspect_inputs([torch.tensor([[1e-42, 1.0]])])  # it shares the histogram's first bin with zero
    assert (subnormal.zeros, subnormal.always_on) == (0.0, 2)


@pytest.mark.parametrize("name", ["opt", "llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_are_seen_as_they_are(name, dtype):
    model, batches = tiny_model(name, dtype), tiny_batches(3)
    result = inspect(model, batches, progress=False)
    assert list(result.sites) == list(deadband.calibrate(model, batches, progress=False).sites)
    for site, x in inputs_of(model, batches, result.sites).items():
        check(result.sites[site], x)


def test_opt_has_natural_zeros_and_llama_has_none():
    relu, smooth = (inspect(tiny_model(name), tiny_batches(), progress=False) for name in ("opt", "llama"))
    assert 0.3 < relu.sites["model.decoder.layers.0.fc2"].zeros < 0.7
    assert relu.sites["model.decoder.layers.0.fc1"].zeros == 0
    assert relu.advice.startswith("ReLU-type: sparsify_(model, exact=True) skips ")
    assert smooth.exact_sparsity == 0
    assert smooth.advice == "no natural zeros: calibrate and allocate"
    first, second = str(smooth).splitlines()[:2]
    assert first.startswith("0.0% of the weight bytes of 14 sites meet exact zeros: 0.0 MB of the ")
    assert second == smooth.advice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "mlp", "mixtral", "gated ReLU"])
def test_exact_sparsity_is_what_exact_mode_skips(name, dtype):
    if name == "mlp":
        model, batches = mlp(dtype), [torch.randn(50, 16).relu().to(dtype) for _ in range(3)]
    else:
        model, batches = tiny_model("llama" if name == "gated ReLU" else name, dtype), tiny_batches()
    for each in model.modules() if name == "gated ReLU" else ():
        if hasattr(each, "act_fn"):
            each.act_fn = torch.nn.ReLU()
    result = inspect(model, batches, progress=False)
    assert ("up-projections meet gates" in str(result)) == (name == "gated ReLU")
    deadband.sparsify_(model, exact=True)
    with torch.no_grad(), deadband.sparse_prefill(model):
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    achieved = deadband.sparsity(model)
    assert result.sites.keys() == achieved.sites.keys()
    # the sparse product adds up in another order, which can carry a few entries across zero
    assert result.exact_sparsity == pytest.approx(achieved.total, abs=2e-3)
    for site, fraction in achieved.sites.items():
        assert result.sites[site].exact_sparsity == pytest.approx(fraction, abs=5e-3)
    if name == "gated ReLU":
        assert all(0.3 < site.exact_sparsity < 0.7 for key, site in result.sites.items() if key.endswith("up_proj"))
    else:
        assert sum(each.rows * each.in_features for each in result.sites.values()) == achieved.entries


def test_nonfinite_entries_agree_with_exact_mode():
    x = torch.tensor([[0.0, math.nan, 1.0, math.inf], [0.0, 0.0, 1.0, 2.0]])
    model = one_layer(4).eval()
    result = inspect(model, [x], progress=False)
    deadband.sparsify_(model, exact=True)
    with torch.no_grad():
        model(x)
    assert deadband.sparsity(model).total == result.exact_sparsity == 3 / 8


def test_padding_is_not_counted():
    model = tiny_model("opt")
    ids = torch.randint(3, 100, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    padded = inspect(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    ragged = inspect(model, [{"input_ids": ids[:1, :7]}, {"input_ids": ids[1:]}], progress=False)
    for name, site in padded.sites.items():
        assert site.rows == ragged.sites[name].rows == 19
        for key in ("zeros", "kurtosis", *ENERGIES):
            assert getattr(site, key) == pytest.approx(getattr(ragged.sites[name], key), rel=1e-3, abs=1e-3)


def test_a_shared_input_is_looked_at_once(monkeypatch):
    looks = []
    monkeypatch.setattr(module, "observe", lambda x, observe=module.observe: looks.append(x.shape) or observe(x))
    result = inspect(tiny_model("llama"), tiny_batches(3), progress=False)
    assert len(looks) == 3 * 2 * 4  # batches, blocks, and (q, k, v), o, (gate, up), down
    layer = {name.rsplit(".", 1)[1]: site for name, site in result.sites.items() if ".layers.1." in name}
    figures = ("zeros", "kurtosis", *COUNTS)
    assert len({tuple(getattr(layer[name], key) for key in figures) for name in ("q_proj", "k_proj", "v_proj")}) == 1
    assert layer["gate_proj"].kurtosis != layer["q_proj"].kurtosis


def test_memory_does_not_grow_with_the_data():
    sizes = []
    for count in (1, 40):
        inspector = module._Inspector({"0": module._Totals(one_layer(6)[0])})
        batches = (torch.randn(100, 6) for _ in range(count))
        inspector.watch(one_layer(6), batches, ["0"], "inspect", False)
        totals = inspector.totals["0"]
        sizes.append(totals.statistics.histogram.nbytes + totals.zeros.nbytes + len(totals.moments))
        assert totals.rows == 100 * count
    assert sizes[0] == sizes[1]


def test_nothing_in_the_model_changes():
    model = tiny_model("opt").train()
    model.model.decoder.layers[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [each.training for each in model.modules()]
    random = torch.get_rng_state()
    inspect(model, tiny_batches(), progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [each.training for each in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not each._forward_pre_hooks for each in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_hooks_go_and_flags_return_after_an_error():
    model = tiny_model("opt").train()
    with pytest.raises(ValueError, match="take the model's own tokenizer"):
        inspect(model, [*tiny_batches(1), {"input_ids": torch.tensor([[10**6]])}], progress=False)
    assert all(each.training for each in model.modules())
    assert all(not each._forward_pre_hooks for each in model.modules())


def test_inference_mode_positional_batches_and_a_sparse_model():
    x = torch.randn(9, 16).relu()
    expected = inspect(mlp(), [x], progress=False)
    with torch.inference_mode():
        assert inspect(mlp(), [(x,)], progress=False).sites == expected.sites
    sparse = inspect(deadband.sparsify_(mlp(), exact=True), [[x]], progress=False)
    assert sparse.sites["0"] == expected.sites["0"]


def test_a_call_without_rows():
    x = torch.randn(5, 4)
    assert inspect_inputs([x, x[:0]]) == inspect_inputs([x])


def test_include_and_exclude():
    model, batches = tiny_model("opt"), tiny_batches(1)
    assert list(inspect(model, batches, include="fc2", progress=False).sites) == [
        "model.decoder.layers.0.fc2",
        "model.decoder.layers.1.fc2",
    ]
    assert len(inspect(model, batches, exclude=["fc2", "q_proj"], progress=False).sites) == 12 - 4


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_wrong_arguments():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="batches is empty"):
        inspect(one_layer(4), [], progress=False)
    with pytest.raises(ValueError, match="'unused' was never reached; leave it out with exclude="):
        inspect(Unused(), [x], progress=False)
    assert list(inspect(Unused(), [x], exclude="unused", progress=False).sites) == ["used"]
    with pytest.raises(ValueError, match="'0' saw 8 NaN or infinite entries and no number"):
        inspect(one_layer(4), [torch.full((2, 4), math.nan)], progress=False)
    with pytest.raises(ValueError, match="include='nothing' matches no linear layer"):
        inspect(one_layer(4), [x], include="nothing", progress=False)
    with pytest.raises(ValueError, match="no site is left"):
        inspect(one_layer(4), [x], exclude="0", progress=False)
    with pytest.raises(ValueError, match="no layer that can be made sparse"):
        inspect(nn.ReLU(), [x], progress=False)
    with pytest.raises(TypeError):
        inspect(one_layer(4), [x], "0")


def test_advice():
    def advice(zeros):
        site = inspect_inputs([torch.randn(4, 4)])
        return Inspection({"0": SiteInspection(**{**vars(site), "zeros": zeros})}).advice

    assert advice(0.43).endswith("skips 43% of the weight bytes for free")
    assert advice(0.02) == "few natural zeros: exact=True skips only 2.0%; calibrate and allocate"
    assert advice(0.0) == "no natural zeros: calibrate and allocate"


def test_results_are_frozen_documented_and_lazy():
    result = inspect(mlp(), [torch.randn(4, 16)], progress=False)
    with pytest.raises(AttributeError):
        result.sites = {}
    with pytest.raises(AttributeError):
        result.sites["0"].zeros = 1.0
    assert deadband.inspect is inspect
    assert deadband.Inspection is Inspection
    assert repr(result) == str(result)
    assert doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny OPT with a tokenizer of single characters, in a folder whose name has a space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("with space")
    text = "the deadband is the range of input that a control system treats as zero. " * 20
    vocabulary = {"<unk>": 0} | {character: index + 1 for index, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path / "opt")
    tiny_model("opt").save_pretrained(path / "opt")
    (path / "text.txt").write_text(text)
    return path


def command(folder, *arguments):
    line = [sys.executable, "-m", "deadband.app.cli", "inspect", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def test_json_of_the_command(folder):
    options = ("--tokens", 256, "--window", 32, "--threads", 1, "--dtype", "float32")
    result = command(folder, "opt", "--data", "text.txt", *options, "--exclude", "q_proj", "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["tokens"] == 256
    assert len(figures["sites"]) == 10
    site = figures["sites"]["model.decoder.layers.1.fc2"]
    assert (site["rows"], site["in_features"]) == (256, 112)
    assert set(site) == {field for field in SiteInspection.__dataclass_fields__}
    assert figures["advice"].startswith("ReLU-type")
    assert 0.05 < figures["exact_sparsity"] < 0.3
    from deadband.app.models import load_model, load_tokenizer
    from deadband.running.text import token_windows

    batches = token_windows(
        load_tokenizer(str(folder / "opt")), (folder / "text.txt").read_text(), tokens=256, window=32
    )
    here = inspect(load_model(str(folder / "opt"), dtype="float32"), batches, exclude="q_proj", progress=False)
    assert figures["exact_sparsity"] == pytest.approx(here.exact_sparsity, abs=1e-3)


def test_text_and_mistakes_of_the_command(folder, monkeypatch, capsys):
    from deadband.app import cli

    monkeypatch.chdir(folder)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["deadband", "inspect", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    small = ("--tokens", "64", "--window", "32")
    code, out, _ = call("opt", "--data", "text.txt", *small, "--include", "fc2")
    assert code == 0
    assert out.splitlines()[1].startswith("ReLU-type: ")
    assert out.splitlines()[-1].endswith("model.decoder.layers.1.fc2")
    for arguments, message in (
        (("opt", "--data", "missing.txt"), "there is no text file"),
        (("opt", "--data", "text.txt", "--include", "nothing", *small), "matches no linear layer"),
        (("opt", "--data", "text.txt", "--window", "100000"), "fewer than one window"),
    ):
        code, _, err = call(*arguments)
        assert code == 2
        assert err.startswith("deadband: error: ")
        assert message in err
    assert sorted(each.name for each in Path(folder).iterdir()) == ["opt", "text.txt"]
