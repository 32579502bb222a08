import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import deadband


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_sparse_layers_do_not_import_triton():
    code = (
        "import sys, torch, deadband; model = torch.nn.Sequential(torch.nn.Linear(4, 4));"
        "deadband.sparsify_(model, {'0': 0.1})(torch.ones(1, 4)); print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_importing_deadband_imports_neither_torch_nor_transformers():
    code = "import sys, deadband; print([n for n in ('torch', 'transformers', 'numpy', 'tqdm') if n in sys.modules])"
    assert python(code) == "[]"


def test_the_command_line_imports_them_only_inside_commands():
    heavy = ("torch", "transformers", "numpy", "rich")
    code = f"import sys, deadband.app.cli; print([n for n in {heavy} if n in sys.modules])"
    assert python(code) == "[]"


def test_public_names_exist_and_are_documented():
    missing = "[n for n in deadband.__all__ if not getattr(deadband, n).__doc__ or n not in dir(deadband)]"
    code = f"import deadband; print({missing})"
    assert python(code) == "[]"


def test_a_calibration_allocates_whatever_was_imported():
    assert (
        python("from deadband.calibration.calibration import Calibration; print(callable(Calibration.allocate))")
        == "True"
    )
    assert python("from deadband.calibration import Calibration; print(callable(Calibration.allocate))") == "True"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'sparsely'"):
        deadband.sparsely  # noqa: B018


SOURCES = Path(deadband.__file__).parent
WITH_EXAMPLES = [
    ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    for path in sorted(SOURCES.rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_run(module, tmp_path, monkeypatch):
    import doctest
    import importlib

    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"deadband.{module}")
    import torch

    result = doctest.testmod(
        module, extraglobs={"torch": torch, "deadband": deadband}, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def build_wheel(folder, environment):
    repository = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder]
    options = ["-C", f"build-dir={folder / 'build'}", str(repository)]
    result = subprocess.run([*command, *options], capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_without_a_compiler_the_package_still_installs_and_runs(tmp_path):
    wheel = build_wheel(tmp_path, {"CXX": "/bin/false", "CC": "/bin/false"})
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        # an editable install would come first
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Redirecting' not in type(f).__name__]; "
        "import deadband, torch; "
        "from deadband.ops import kernels; assert kernels.library is None and 'site' in deadband.__file__; "
        "model = deadband.sparsify_(torch.nn.Sequential(torch.nn.Linear(4, 4)).eval(), {'0': 1.0}); "
        "torch.set_grad_enabled(False); model(torch.tensor([[0.5, 2.0, 3.0, 4.0]])); "
        "print(deadband.sparsity(model).total)"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "0.25", result.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_wheel_serves_every_python_version(tmp_path):
    wheel = build_wheel(tmp_path, {})
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == ["deadband/lib/libdeadband_kernels.so"]


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs a cross compiler")
def test_the_kernels_compile_for_aarch64(tmp_path):
    sources = Path(__file__).parent.parent / "csrc"
    for name in ("kernels_baseline.cpp", "dispatch.cpp", "cpu.cpp", "memory.cpp"):
        command = ["aarch64-linux-gnu-g++", "-std=c++17", "-O3", "-fopenmp", "-c", str(sources / name)]
        subprocess.run([*command, "-o", str(tmp_path / "out.o")], check=True)
