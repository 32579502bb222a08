import subprocess
import sys

import pytest

import deadband


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_deadband_imports_neither_torch_nor_transformers():
    code = "import sys, deadband; print([n for n in ('torch', 'transformers', 'numpy', 'tqdm') if n in sys.modules])"
    assert python(code) == "[]"


def test_the_command_line_imports_them_only_inside_commands():
    code = (
        "import sys, deadband.cli; print([n for n in ('torch', 'transformers', 'numpy', 'rich') if n in sys.modules])"
    )
    assert python(code) == "[]"


def test_public_names_exist_and_are_documented():
    missing = "[n for n in deadband.__all__ if not getattr(deadband, n).__doc__ or n not in dir(deadband)]"
    code = f"import deadband; print({missing})"
    assert python(code) == "[]"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'sparsely'"):
        deadband.sparsely  # noqa: B018


@pytest.mark.parametrize(
    "module",
    ["allocation", "bench", "calibration", "criterion", "evaluation", "files", "linear", "sites", "sparsify", "text"],
)
def test_examples_in_docstrings_run(module, tmp_path, monkeypatch):
    import doctest
    import importlib

    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"deadband.{module}")
    import torch

    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
