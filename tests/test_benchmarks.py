"""What the scripts in benchmarks/ share."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deadband.ops import kernels


@pytest.fixture(scope="module")
def common():
    path = Path(__file__).parent.parent / "benchmarks" / "common.py"
    spec = importlib.util.spec_from_file_location("common", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_measured_anew_takes_the_place_of_what_was(common):
    about = {"processor": "One", "torch": "2", "threads": 1}
    before = {"machine": about, "rows": [{"a": 1, "b": 1, "s": 0.1}, {"a": 1, "b": 2, "s": 0.2}, {"a": 2, "s": 0.3}]}
    now = {"machine": {**about, "threads": 2}, "rows": [{"a": 1, "b": 2, "s": 0.4}, {"a": 3, "b": 1, "s": 0.5}]}
    rows = common.merged(before, now, ("a", "b"))
    assert rows == [before["rows"][0], before["rows"][2], *now["rows"]]
    now["machine"]["torch"] = "3"
    assert common.merged(before, now, ("a", "b")) == now["rows"]


@pytest.mark.skipif("x86-64-v3" not in kernels.available_isas(), reason="another processor")
def test_an_instruction_set_starts_the_script_anew_once(common, monkeypatch):
    started = []
    monkeypatch.delenv("DEADBAND_ISA", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    options = common.parser("What it does.").parse_args(["--threads", "3"])
    assert options.threads == [3]
    assert not started
    assert common.kept_to() is None
    common.parser("What it does.").parse_args(["--isa", "x86-64-v3"])
    ((program, arguments, environment),) = started
    assert [program, *arguments[1:]] == [sys.executable, *sys.orig_argv[1:]]
    assert environment["PYTHONPATH"] == f"{common.llama_folder('x86-64-v3')}{os.pathsep}/mine"
    for name in ("DEADBAND_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.setenv(name, environment[name])
    common.parser("What it does.").parse_args(["--isa", "x86-64-v3"])
    assert len(started) == 1
    assert common.kept_to() == "x86-64-v3"


def test_results_of_an_instruction_set_have_a_folder_of_their_own(common, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    about = {"processor": "AMD EPYC (family 25 model 17)", "cores": 2, "kept_to": None}
    assert common.results_folder(about).name == "amd-epyc-family-25-model-17-2-cores"
    assert common.results_folder({**about, "kept_to": "x86-64-v3"}).name.endswith("-2-cores-x86-64-v3")


def test_the_script_for_gpus_goes_through_without_one(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    script = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    done = subprocess.run(
        [sys.executable, script, "--dry-run", "--out", tmp_path / "some folder"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "some folder" / "gpu.json").read_text())
    assert found["problems"] == []
    assert {row["weights"] for row in found["layers"]} == {"fp16", "int4-g64-zp"}
    assert found["decode"]["sparse"] > 0


@pytest.mark.parametrize("rows", [1, 5])
def test_the_baseline_with_atomics_is_right(rows):
    pytest.importorskip("triton", reason="triton is not installed")
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        from gpu_atomics import atomics_linear
    finally:
        sys.path.pop(0)
    x, weight = torch.randn(1, 70 * rows).half(), torch.randn(70 * rows, 150).half()
    y = atomics_linear(x, weight, torch.tensor(0.5))
    expected = torch.where(x.float().abs() > 0.5, x, 0).double() @ weight.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
