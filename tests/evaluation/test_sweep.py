"""Methods by budgets: what a sweep holds, that it goes on after anything, and that the model is left as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, mlp, tiny_batches, tiny_model

import deadband
from deadband.allocation.thresholds import Thresholds
from deadband.app import cli
from deadband.calibration.site_statistics import SiteStatistics
from deadband.calibration.watcher import thresholding
from deadband.evaluation import methods, speed
from deadband.evaluation import quality as evaluation
from deadband.evaluation import sweep as module
from deadband.evaluation.page import report_html
from deadband.evaluation.quality import evaluate
from deadband.evaluation.sweep import describe_sites, histogram, sweep, table
from deadband.layers.experts import module_at
from deadband.layers.sites import sparse_sites, weight_bytes
from deadband.running import forward, timing
from deadband.sparsify.report import SparsityReport

BUDGETS = (0.25, 0.5)
TIMES = ("seconds", "fit_seconds", "tokens_per_second", "speedup", "measured")
PROMPT = "the dead band"


REAL_SETUP = methods.Setup


class Setup:
    """As deadband.evaluation.methods has it, without what only its own methods need."""

    def __init__(self, model: Any, batches: Any, *, progress: bool = True) -> None:
        self.model, self.batches, self.progress = model, batches, progress
        self.calibrations: dict[str, Any] = {}

    def calibration(self, criterion: str) -> Any:
        if criterion not in self.calibrations:
            made = deadband.calibrate(self.model, self.batches, criterion=criterion, progress=False)
            self.calibrations[criterion] = made
        return self.calibrations[criterion]


class Uniform:
    """A method that thresholds, and remembers what it was asked for."""

    paper = "arXiv 2408.14690"

    def __init__(self, name: str = "plain", criterion: str = "magnitude", method: str = "uniform") -> None:
        self.name, self.title, self.criterion, self.method = name, f"The {name} one", criterion, method
        self.asked: list[list[float]] = []

    def fit(self, setup: Any, budgets: list[float]) -> list[Any]:
        self.asked.append(list(budgets))
        calibration = setup.calibration(self.criterion)
        return [
            calibration.allocate(each, self.method, model=setup.model, batches=setup.batches, progress=False)
            for each in budgets
        ]


class Simulation:
    """Rules applied by hooks, counted as a method that has no kernel would."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.reset()

    def reset(self) -> None:
        self.counted = {name: [0, 0] for name in self.thresholds.rules}

    @contextlib.contextmanager
    def on(self, model: Any) -> Any:
        sites = {name: model.get_submodule(name) for name in self.counted}

        def count(name: str) -> Any:
            def hook(module: Any, args: Any) -> None:
                skipped = ~self.thresholds.rules[name].keep(args[0])
                self.counted[name][0] += int(skipped.sum())
                self.counted[name][1] += skipped.numel()

            return hook

        handles = [site.register_forward_pre_hook(count(name)) for name, site in sites.items()]
        try:
            with thresholding(sites, self.thresholds.rules):
                yield model
        finally:
            for handle in handles:
                handle.remove()

    @property
    def sparsity(self) -> SparsityReport:
        sites = {name: skipped / seen if seen else math.nan for name, (skipped, seen) in self.counted.items()}
        weights = {name: math.prod(self.thresholds.sites[name].shape) for name in sites}
        total = sum(sites[name] * weights[name] for name in sites) / sum(weights.values())
        return SparsityReport(sites, total, 0)


class Simulated(Uniform):
    def fit(self, setup: Any, budgets: list[float]) -> list[Any]:
        return [Simulation(each) for each in super().fit(setup, budgets)]


class Broken(Uniform):
    """Fails while `broken`, with the model sparse."""

    broken = True

    def fit(self, setup: Any, budgets: list[float]) -> list[Any]:
        if self.broken:
            deadband.sparsify_(setup.model, exact=True)
            raise RuntimeError("no luck\nhere")
        return super().fit(setup, budgets)


class Limited(Uniform):
    """Cannot reach half."""

    def fit(self, setup: Any, budgets: list[float]) -> list[Any]:
        fits = super().fit(setup, budgets)
        return [fitted if budget < 0.5 else None for fitted, budget in zip(fits, budgets, strict=True)]


class NotANumber(Uniform):
    """Everything is skipped, and taken to be 3e38: the model overflows."""

    def fit(self, setup: Any, budgets: list[float]) -> list[Any]:
        fits = super().fit(setup, budgets)
        for fitted in fits:
            for name, site in fitted.sites.items():
                rule = deadband.Rule(3.3e38, None, torch.full((site.shape[1],), 3e38))
                fitted.sites[name] = dataclasses.replace(site, rule=rule)
        return fits


def characters() -> Any:
    """A tokenizer of single characters with the tiny models' vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0} | {chr(code + 160): code for code in range(1, VOCABULARY)}
    vocabulary |= {letter: vocabulary.pop(chr(index + 163)) for index, letter in enumerate("abcdefghijklmnoprstuvwz .")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(autouse=True)
def own_setup(monkeypatch):
    """These tests bring their methods; what they share is the least that the interface asks for."""
    monkeypatch.setattr(methods, "Setup", Setup)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "sweep.json"


def options(output: Path, **more: Any) -> dict[str, Any]:
    return {
        "tokenizer": characters(),
        "methods": [Uniform("plain"), Uniform("weighted", "weighted_magnitude")],
        "budgets": BUDGETS,
        "calibration_windows": tiny_batches(4),
        "windows": tiny_batches(3, rows=1, seed=5),
        "output": output,
        "name": "tiny",
        "calibrated_on": "dice",
        "judged_on": "other dice",
        "prompt": PROMPT,
        "speed": False,
        "sample_tokens": 6,
        "progress": False,
        **more,
    }


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: None if key in TIMES else without_times(item) for key, item in value.items()}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def snapshot(model: Any) -> tuple[Any, ...]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.modules()]
    return state, [type(each) for each in model.modules()], hooks, [each.training for each in model.modules()]


def assert_as_before(model: Any, before: tuple[Any, ...]) -> None:
    state, *rest = snapshot(model)
    assert rest == list(before[1:])
    assert state.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][key]) for key, value in state.items())
    assert not sparse_sites(model)
    assert getattr(model.config, "quantization_config", None) is None


def test_a_sweep_holds_what_evaluate_says(output):
    model = tiny_model("llama").train()
    before, lines = snapshot(model), []
    result = sweep(model, **options(output, speed=True, decode_tokens=3, say=lines.append))
    assert_as_before(model, before)
    assert json.loads(output.read_text()) == result
    assert [(each["method"], each["budget"]) for each in result["runs"]] == [
        ("plain", 0.25), ("plain", 0.5), ("weighted", 0.25), ("weighted", 0.5),
    ]  # fmt: skip
    assert result["judged_on"] == {"name": "other dice", "windows": 3, "window": 24, "also_calibrated_on": 0}
    assert result["calibrated_on"] == {"name": "dice", "tokens": 4 * 2 * 24}
    assert (result["model"], result["dtype"], result["protocol"]) == ("tiny", "float32", "all tokens sparse")
    assert result["failed"] == result["unreachable"] == []
    assert [line[:6] for line in lines] == ["[1/4] ", "[2/4] ", "[3/4] ", "[4/4] "]
    assert "The plain one at 25%: KL " in lines[0]
    model.eval()
    windows = tiny_batches(3, rows=1, seed=5)
    calibration = deadband.calibrate(model, tiny_batches(4), criterion="weighted_magnitude", progress=False)
    thresholds = calibration.allocate(0.5, "uniform", model=model, batches=tiny_batches(4), progress=False)
    plain = speed.bytes_per_token(model)
    text = characters().decode(continued(model, 6))
    sparse = deadband.sparsify_(model, thresholds)
    expected = evaluate(sparse, windows, progress=False)
    run = result["runs"][3]
    for key in ("kl", "kl_error", "perplexity", "perplexity_increase", "perplexity_increase_error", "agreement"):
        assert run[key] == pytest.approx(getattr(expected, key), rel=1e-5)
    achieved = deadband.sparsity(sparse)
    assert run["sparsity"] == pytest.approx(achieved.total)
    assert run["bytes_per_token"] == speed.bytes_per_token(sparse) < plain
    assert run["text"] == characters().decode(continued(sparse, 6))
    assert len(run["per_window"]) == 3
    name = "model.layers.1.mlp.down_proj"
    assert run["sites"][name] == {
        "sparsity": pytest.approx(achieved.sites[name]),
        "threshold": pytest.approx(thresholds[name].threshold),
        "criterion": "weighted_magnitude",
        "centered": False,
        "relative": False,
        "harm": None,
    }
    speeds = [each["measured"]["dense"] for each in result["runs"]]
    assert run["speedup"] == pytest.approx(run["measured"]["sparse"] / run["measured"]["dense"])
    assert run["tokens_per_second"] == pytest.approx(run["speedup"] * result["dense"]["tokens_per_second"])
    dense = result["dense"]
    assert dense["perplexity"] == pytest.approx(expected.dense_perplexity)
    assert dense["tokens_per_second"] == pytest.approx(float(np.median(speeds)))
    assert (dense["bytes_per_token"], dense["text"]) == (plain, text)


def continued(model: Any, count: int) -> list[int]:
    ids = characters()(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return made[0, ids.shape[1] :].tolist()


def test_rules_of_every_form_are_told_apart(output):
    """What decides whether the page draws a threshold."""
    result = sweep(tiny_model("llama"), **options(output, methods=[Uniform("sensitivity", method="sensitivity")]))
    sites = result["runs"][0]["sites"].values()
    assert {each["criterion"] for each in sites} == {"sensitivity"}
    assert all(each["centered"] for each in sites)
    assert all(each["harm"] >= 0 for each in sites)
    assert sum(each["harm"] for each in sites) > 0


def test_auto_says_what_it_picked(output):
    made = sweep(tiny_model("llama"), **options(output, methods=[Uniform("auto", method="auto")], budgets=[0.4]))
    assert made["runs"][0]["picked"].startswith("auto: ")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_sites_are_placed(name):
    model = tiny_model(name)
    calibration = deadband.calibrate(model, tiny_batches(), progress=False)
    sites = describe_sites(model, calibration)
    assert list(sites) == list(calibration.sites)
    assert {site["depth"] for site in sites.values()} == {0, 1}
    for name, site in sites.items():
        assert name.startswith(site["block"] + ".")
        assert name.endswith(site["kind"].split("*")[-1])
        assert sum(site["histogram"]["counts"]) == calibration.sites[name].histogram[1:].sum()
        assert site["histogram"]["criterion"] == "magnitude"
        assert site["weight_bytes"] == weight_bytes(module_at(model, name))
    assert len({site["kind"] for site in sites.values()}) < len(sites)


def test_sites_outside_blocks():
    model = mlp()
    sites = describe_sites(model, deadband.calibrate(model, [torch.randn(64, 16)], progress=False))
    assert [(site["block"], site["depth"], site["kind"]) for site in sites.values()] == [
        (None, None, name) for name in ("0", "2", "4")
    ]


def observed(x: torch.Tensor) -> SiteStatistics:
    site = SiteStatistics.of_features(x.shape[1])
    site.observe(x)
    return site


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_histograms_count_every_entry(dtype):
    torch.manual_seed(0)
    x = torch.randn(400, 64).to(dtype)
    x[:, :8] = 0
    x[0, 8], x[0, 9] = 1e4, 1e-12  # far out: in the bins at the ends
    made = histogram(observed(x))
    edges, counts = made["edges"], made["counts"]
    assert made["zeros"] == pytest.approx((x == 0).float().mean().item())
    assert sum(counts) == int((x != 0).sum())
    assert 40 < len(counts) == len(edges) - 1 <= module.BINS
    assert 1e-4 < edges[0] < edges[-1] < 10
    assert all(low < high for low, high in itertools.pairwise(edges))
    magnitude = x.float().abs().flatten().numpy()
    assert counts[1:-1] == np.histogram(magnitude, edges)[0][1:-1].tolist()
    widths = np.diff(np.log(edges))
    assert widths.max() < 1.3 * widths.mean()


def test_odd_histograms():
    assert histogram(observed(torch.zeros(4, 4))) == {"edges": [], "counts": [], "zeros": 1.0}
    (low, high), counts = (histogram(observed(torch.full((4, 4), 0.5)))[key] for key in ("edges", "counts"))
    assert low <= 0.5 < high
    assert counts == [16]
    assert math.isnan(histogram(SiteStatistics.of_features(3))["zeros"])


def test_a_second_call_goes_on(output):
    """With fewer runs before, it comes to what one call comes to; finished runs are not made again."""
    model = tiny_model("llama")
    whole = sweep(model, **options(output))
    first, second = Uniform("plain"), Uniform("weighted", "weighted_magnitude")
    part = json.loads(output.read_text())
    part["runs"] = part["runs"][:1]
    output.write_text(json.dumps(part))
    lines = []
    again = sweep(model, **options(output, methods=[first, second], say=lines.append))
    assert (first.asked, second.asked) == ([[0.5]], [[0.25, 0.5]])
    assert without_times(again) == without_times(whole)
    assert again["runs"][0] == whole["runs"][0]
    assert lines[0] == "1 of 4 runs are kept from an earlier call"
    assert lines[-1].startswith("[3/3] ")
    nothing = sweep(model, **options(output, methods=[first, second]))
    assert nothing == again == json.loads(output.read_text())
    assert (first.asked, second.asked) == ([[0.5]], [[0.25, 0.5]])


def test_methods_and_budgets_are_added_in_order(output):
    model = tiny_model("llama")
    sweep(model, **options(output, methods=[Uniform("plain")], budgets=[0.5]))
    added = sweep(model, **options(output, methods=[Uniform("weighted", "weighted_magnitude")], budgets=[0.5, 0.25]))
    assert [(each["method"], each["budget"]) for each in added["runs"]] == [
        ("plain", 0.5), ("weighted", 0.25), ("weighted", 0.5),
    ]  # fmt: skip
    assert (added["methods"], added["budgets"]) == (["plain", "weighted"], [0.25, 0.5])


def timed(path: Path, delay: float = 0.0) -> dict[str, Any]:
    class Slow(Uniform):
        """Leaves time to be stopped in the middle, after a fit."""

        def fit(self, setup: Any, budgets: list[float]) -> list[Any]:
            time.sleep(delay)
            return super().fit(setup, budgets)

    both = [Slow("plain"), Slow("slow")]
    with forward.threads(1):
        return sweep(tiny_model("llama"), **options(path, methods=both, speed=True, decode_tokens=2))


def program(path: str) -> None:
    """What the subprocess of the next test runs."""
    methods.Setup = Setup
    timed(Path(path), delay=3)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_in_the_middle(tmp_path, how):
    """The file is whole whenever it is read, and the next call ends where an undisturbed one does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys, test_sweep; test_sweep.program(sys.argv[1])"
    path = tmp_path / "stopped.json"
    process = subprocess.Popen([sys.executable, "-c", code, path], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and len(json.loads(path.read_text())["runs"]) >= 2:
            break
        time.sleep(0.02)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0, err
    stopped = json.loads(path.read_text())
    assert len(stopped["runs"]) == 2
    resumed = timed(path)
    assert [each["measured"] for each in resumed["runs"][:2]] == [each["measured"] for each in stopped["runs"]]
    assert without_times(resumed) == without_times(timed(tmp_path / "whole.json"))
    assert json.loads(path.read_text()) == resumed
    assert all(each["tokens_per_second"] > 0 for each in resumed["runs"])


CHANGES = {
    "another dtype ('float32', now 'bfloat16')": {"model": lambda: tiny_model("llama", torch.bfloat16)},
    "other weights": {"model": lambda: tiny_model("llama", seed=1)},
    "other tokens to judge on": {"windows": tiny_batches(3, rows=1, seed=6)},
    "other tokens to calibrate on": {"calibration_windows": tiny_batches(3)},
    "another protocol ('all tokens sparse', now 'dense first token')": {"protocol": "dense-first"},
    "another prompt ('the dead band', now 'a band')": {"prompt": "a band"},
    "another choice whether to measure speed (False, now True), another number of decoded tokens": {"speed": True},
    "another number of tokens to continue the prompt with (6, now 5)": {"sample_tokens": 5},
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_settings_are_told(output, message):
    sweep(tiny_model("llama"), **options(output, methods=[Uniform()], budgets=[0.25]))
    before = output.read_bytes()
    change = dict(CHANGES[message])
    model = change.pop("model", lambda: tiny_model("llama"))()
    with pytest.raises(ValueError, match=r"choose another output, or overwrite it") as error:
        sweep(model, **options(output, methods=[Uniform()], budgets=[0.25], **change))
    assert message in str(error.value)
    assert output.read_bytes() == before
    sweep(model, **options(output, methods=[Uniform()], budgets=[0.25], **change, overwrite=True))
    assert output.read_bytes() != before


def test_another_machine_is_told(output, monkeypatch):
    sweep(tiny_model("llama"), **options(output, methods=[Uniform()], budgets=[0.25]))
    monkeypatch.setattr(module, "machine", lambda: {**timing.machine(), "processor": "Abacus"})
    with pytest.raises(ValueError, match="another processor .*, now 'Abacus'"):
        sweep(tiny_model("llama"), **options(output))


@pytest.mark.parametrize("content", ["", "precious", "[]", '{"version": 1}'])
def test_something_else_is_never_replaced(output, content):
    output.write_text(content)
    with pytest.raises(ValueError, match="exists and is not a sweep"):
        sweep(tiny_model("llama"), **options(output))
    assert output.read_text() == content
    output.write_text('{"version": 2, "settings": {}, "runs": []}')
    with pytest.raises(ValueError, match="is a sweep of version 2, not 1"):
        sweep(tiny_model("llama"), **options(output))


DAMAGES = {
    "settings": [],
    "methods": None,
    "budgets": "0.25",
    "runs": [3],
    "unreachable": [["uniform"]],
    "failed": [{"method": "uniform"}],
    "dense": [],
    "sites": 7,
}


@pytest.mark.parametrize("key", DAMAGES)
def test_a_damaged_sweep_is_not_gone_on_with(output, key):
    sweep(tiny_model("llama"), **options(output, methods=[Uniform()], budgets=[0.25]))
    whole = json.loads(output.read_text())
    for value in (
        DAMAGES[key],
        *([[{**whole["runs"][0], "method": "other"}], [{"method": 1}]] if key == "runs" else []),
    ):
        output.write_text(json.dumps({**whole, key: value}))
        before = output.read_bytes()
        with pytest.raises(ValueError, match="is a damaged sweep; choose another output, or overwrite it"):
            sweep(tiny_model("llama"), **options(output, methods=[Uniform()], budgets=[0.25]))
        assert output.read_bytes() == before


def test_windows_of_generators_and_their_padding(output):
    given = options(output, methods=[Uniform()], budgets=[0.25])
    wanted = sweep(tiny_model("llama"), **given)
    windows, others = given.pop("windows"), given.pop("calibration_windows")
    again = sweep(
        tiny_model("llama"),
        **given,
        windows=(each for each in windows),
        calibration_windows=(each for each in others),
        overwrite=True,
    )
    assert without_times(again) == without_times(wanted)
    mask = torch.ones_like(others[0]["input_ids"])
    mask[0, 10:] = 0
    padded = [{**others[0], "attention_mask": mask}, *others[1:]]
    found = sweep(tiny_model("llama"), **given, windows=windows, calibration_windows=padded, overwrite=True)
    assert found["calibrated_on"]["tokens"] == wanted["calibrated_on"]["tokens"] - int((mask == 0).sum())


@pytest.mark.parametrize("speed", [True, False])
def test_a_method_that_fails_is_noted_and_tried_again(output, speed):
    model, broken = tiny_model("llama"), Broken("broken")
    before = snapshot(model)
    methods = [broken, Uniform()]
    result = sweep(model, **options(output, methods=methods, speed=speed, decode_tokens=2))
    assert_as_before(model, before)
    assert [each["method"] for each in result["runs"]] == ["plain", "plain"]
    assert result["failed"] == [
        {"method": "broken", "budget": budget, "error": "RuntimeError: no luck here"} for budget in BUDGETS
    ]
    assert "broken at 50% failed: RuntimeError: no luck here" in table(result)
    broken.broken = False
    result = sweep(model, **options(output, methods=methods, speed=speed, decode_tokens=2))
    assert_as_before(model, before)
    assert [each["method"] for each in result["runs"]] == ["broken", "broken", "plain", "plain"]
    assert result["failed"] == []
    assert methods[1].asked == [list(BUDGETS)]


def test_a_run_that_fails_while_the_model_is_sparse(output, monkeypatch):
    """One budget; the next one is measured, and the model is dense."""
    model, real, failed = tiny_model("llama"), evaluation.evaluate, []
    before = snapshot(model)

    def failing(model, *arguments, **more):
        if sparse_sites(model) and not failed:
            failed.append(True)
            raise MemoryError("too big")
        return real(model, *arguments, **more)

    monkeypatch.setattr(module, "evaluate", failing)
    result = sweep(model, **options(output, methods=[Uniform()]))
    assert_as_before(model, before)
    assert [each["budget"] for each in result["runs"]] == [0.5]
    assert result["failed"] == [{"method": "plain", "budget": 0.25, "error": "MemoryError: too big"}]


@pytest.mark.parametrize("where", ["fit", "measure"])
def test_ctrl_c_leaves_a_dense_model_and_a_whole_file(output, monkeypatch, where):
    model, method = tiny_model("llama"), Uniform("weighted")
    before = snapshot(model)
    whole = sweep(model, **options(output.with_name("whole.json"), methods=[Uniform(), Uniform("weighted")]))

    def interrupted(*arguments):
        deadband.sparsify_(model, exact=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((method, "fit") if where == "fit" else (module._Sweep, "speeds")), interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(model, **options(output, methods=[Uniform(), method], speed=where == "measure"))
    assert_as_before(model, before)
    found = json.loads(output.read_text())
    assert len(found["runs"]) == (2 if where == "fit" else 0)
    assert found["failed"] == []
    if where == "fit":
        again = sweep(model, **options(output, methods=[Uniform(), method]))
        assert without_times(again) == without_times(whole)


def test_unreachable_budgets_are_noted_once(output):
    method, lines = Limited("limited"), []
    result = sweep(tiny_model("llama"), **options(output, methods=[method, Uniform()], say=lines.append))
    assert result["unreachable"] == [["limited", 0.5]]
    assert len(result["runs"]) == 3
    assert "[2/4] The limited one cannot reach 50%" in lines
    text = table(result)
    assert "limited cannot reach 50%" in text
    assert next(line.split() for line in text.splitlines() if " unreachable " in line)[:3] == ["The", "limited", "one"]
    sweep(tiny_model("llama"), **options(output, methods=[method, Uniform()]))
    assert method.asked == [list(BUDGETS)]


def test_simulations_have_quality_and_bytes_but_no_speed(output):
    model = tiny_model("llama")
    before = snapshot(model)
    methods = [Simulated("simulated"), Uniform("plain")]
    result = sweep(model, **options(output, methods=methods, speed=True, decode_tokens=2))
    assert_as_before(model, before)
    assert result["failed"] == []
    for simulated, plain in zip(result["runs"][:2], result["runs"][2:], strict=True):
        assert simulated["tokens_per_second"] is simulated["speedup"] is simulated["measured"] is None
        assert (simulated["simulated"], plain["simulated"]) == (True, False)
        assert simulated["kl"] == pytest.approx(plain["kl"], rel=1e-3)
        assert simulated["sparsity"] == pytest.approx(plain["sparsity"], rel=1e-3)
        assert simulated["bytes_per_token"] == pytest.approx(plain["bytes_per_token"], rel=1e-3)
        assert simulated["text"] == plain["text"]
        for name, site in simulated["sites"].items():
            assert site["sparsity"] == pytest.approx(plain["sites"][name]["sparsity"], rel=1e-2, abs=1e-3)
            assert site["threshold"] is site["criterion"] is site["harm"] is None
    assert "no tokens/s: a method that is only simulated" in table(result)


def test_figures_that_are_no_numbers(output):
    model = tiny_model("llama")
    before = snapshot(model)
    result = sweep(model, **options(output, methods=[NotANumber("broken"), Uniform()]))
    assert_as_before(model, before)
    assert result["failed"] == []
    assert [each["kl"] for each in result["runs"][:2]] == [None, None]
    assert json.loads(output.read_text(), parse_constant=pytest.fail) == result
    text = table(result)
    assert "*" not in text  # with one other there is nothing to compare
    assert "nan" not in text
    pytest.importorskip("plotly")
    assert "The broken one" in report_html(result)


def test_one_window_has_no_errors(output):
    result = sweep(tiny_model("llama"), **options(output, windows=tiny_batches(1, rows=1), samples=False))
    assert result["runs"][0]["kl_error"] is None
    assert result["runs"][0]["text"] is result["dense"]["text"] is None
    assert "one window: no standard errors" in table(result)
    assert "±" not in table(result)


def test_the_table(output):
    result = sweep(tiny_model("llama"), **options(output, speed=True, decode_tokens=2, windows=tiny_batches(4)[:2]))
    lines = table(result).splitlines()
    assert " ".join(lines[0].split()) == "method asked achieved KL, nats perplexity top-1 MB/token tokens/s speed"
    assert [line[:11].strip() for line in lines[1:6]] == ["dense", *["The plain o", "The weighte"] * 2]
    starred = [line for line in lines[2:6] if " * " in line]
    assert len(starred) == 2
    for budget in BUDGETS:
        best = min((each for each in result["runs"] if each["budget"] == budget), key=lambda each: each["kl"])
        assert any(line.startswith(best["title"]) and f"{budget:.0%}" in line for line in starred)
        assert any(f"{best['kl']:.4f} ± {best['kl_error']:.4f} *" in line for line in starred)
        assert any(f"{best['agreement']:.1%} ± {best['agreement_error']:.1%}" in line for line in starred)
    assert "2 of the windows judged were also calibrated on" in table(result)
    empty = {**result, "dense": {}, "runs": []}
    assert len(table(empty).splitlines()) < len(lines)


def test_the_methods_of_the_library(output, monkeypatch):
    """Whatever a method is, it gives a run, or says that it cannot; the page shows all."""
    monkeypatch.setattr(methods, "Setup", REAL_SETUP)
    model = tiny_model("llama")
    before = snapshot(model)
    result = sweep(model, **options(output, methods=list(methods.METHODS), budgets=[0.3]))
    assert_as_before(model, before)
    assert result["failed"] == []
    assert {each["method"] for each in result["runs"]} | {name for name, _ in result["unreachable"]} == set(
        methods.METHODS
    )
    for each in result["runs"]:
        assert each["kl"] > 0
        assert each["sparsity"] == pytest.approx(0.3, abs=0.06), each["method"]
        assert 0.6 < each["bytes_per_token"] / result["dense"]["bytes_per_token"] < 1
        assert each["sites"].keys() == result["sites"].keys()
    pytest.importorskip("plotly")
    page = report_html(result)
    assert all(each["title"] in page for each in result["runs"])


BAD = {
    "at least one of each": {"methods": []},
    "at least one": {"budgets": []},
    "out of range": {"budgets": [1.0]},
    "not known": {"protocol": "some"},
    "is not known|unknown|no method": {"methods": ["nonsense"]},
    "prompt is empty": {"prompt": " "},
    "13 tokens and 200 new ones exceed the model's 128 positions": {"sample_tokens": 200},
    "decode_tokens=0": {"decode_tokens": 0},
    "windows is empty": {"windows": []},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(output, message):
    with pytest.raises(ValueError, match=message):
        sweep(tiny_model("llama"), **options(output, **BAD[message]))


def test_sparse_models_and_bad_folders(output):
    model = deadband.sparsify_(tiny_model("llama"), exact=True)
    with pytest.raises(ValueError, match="the model is sparse already"):
        sweep(model, **options(output))
    with pytest.raises(OSError, match="missing"):
        sweep(tiny_model("llama"), **options(output.parent / "missing" / "x.json"))


# The command line

TEXT = "the deadband is the range of input that a control system treats as zero. " * 60
SMALL = ("--windows", 3, "--window", 32, "--tokens", 256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("with space")
    characters().save_pretrained(path / "tiny")
    tiny_model("llama").save_pretrained(path / "tiny")
    (path / "text.txt").write_text(TEXT)
    return path


@pytest.fixture
def command(monkeypatch, capsys, folder):
    """`deadband sweep tiny --data text.txt ...`; returns exit code, stdout and stderr."""
    monkeypatch.chdir(folder)

    def call(*arguments):
        every = ["deadband", "sweep", "tiny", "--data", "text.txt", "--prompt", PROMPT, *SMALL, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, every)))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def known(monkeypatch):
    """The command line knows these methods by their names."""
    known = {each.name: each for each in (Uniform("one"), Uniform("two", "weighted_magnitude"), Broken("broken"))}
    monkeypatch.setattr(methods, "method_of", known.__getitem__)
    return known


def test_command(command, known, folder):
    pytest.importorskip("plotly")
    arguments = ("--methods", "one, two", "--budgets", "0.25,0.5", "--no-speed", "-o", "made.json")
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "[4/4] The two one at 50%: KL " in out
    assert "written to made.json and made.html" in out
    assert "judged on 3 windows of up to 32 tokens of text.txt" in out
    assert "of Python's documentation" in out
    page = (folder / "made.html").read_text()
    assert "The one one" in page
    assert "The two one" in page
    assert "tiny" in page
    (folder / "made.html").unlink()
    code, out, err = command(*arguments, "--json", "--html", "other.html")
    assert code == 0
    assert json.loads(out) == json.loads((folder / "made.json").read_text())
    assert json.loads(out)["model"] == "tiny"
    assert "4 of 4 runs are kept" in err
    assert (folder / "other.html").read_text() == page
    assert len(known["one"].asked) == 1
    code, _, err = command(*arguments, "--dtype", "bfloat16")
    assert code == 2
    assert "another dtype ('float32', now 'bfloat16')" in err
    assert command(*arguments, "--dtype", "bfloat16", "--overwrite")[0] == 0


def test_command_with_speed_and_a_failure(command, known, folder):
    arguments = ("--methods", "broken,one", "--budgets", "0.5", "-o", "failed.json", "--calibration-data", "text.txt")
    code, out, _ = command(*arguments)
    assert code == 1
    assert "broken at 50% failed: RuntimeError: no luck here" in out
    assert "3 of the windows judged were also calibrated on" in out
    assert json.loads((folder / "failed.json").read_text())["runs"][0]["tokens_per_second"] > 0


def test_without_plotly_everything_else_is_there(command, known, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    arguments = ("--methods", "one", "--budgets", "0.5", "--no-speed", "-o", "bare.json")
    code, out, _ = command(*arguments)
    assert code == 0
    assert 'written to bare.json; without the page: a report needs plotly; install it with: pip install "dead' in out
    assert (folder / "bare.json").exists()
    assert not (folder / "bare.html").exists()
    code, out, err = command(*arguments, "--json")
    assert len(json.loads(out)["runs"]) == 1
    assert "without the page" in err


def test_help_names_every_method(command):
    code, out, _ = command("--help")
    assert code == 0
    words = "".join(out.split())  # lines break at hyphens
    assert [name for name in methods.METHODS if name not in words] == []


WRONG = {
    "cannot both be 'x.html'": ("-o", "x.html"),
    "does not exist": ("-o", "missing/x.json"),
    "'text.txt' exists already": ("-o", "x.json", "--html", "text.txt"),
    "'text.txt' exists and is not a sweep": ("-o", "text.txt", "--methods", "one"),
    "expected fractions separated by commas": ("-o", "x.json", "--budgets", "0.4;0.5"),
    "out of range": ("-o", "x.json", "--budgets", "40", "--methods", "one"),
    "is empty; expected at least one of each": ("-o", "x.json", "--methods", ","),
    "there is no text file 'missing.txt'": ("-o", "x.json", "--calibration-data", "missing.txt"),
    "protocol 'some' is not known": ("-o", "x.json", "--protocol", "some"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_one_clear_line(command, known, folder, message):
    before = sorted(os.listdir(folder))
    code, out, err = command(*WRONG[message])
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(os.listdir(folder)) == before
    assert (folder / "text.txt").read_text() == TEXT
