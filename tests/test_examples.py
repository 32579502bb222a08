from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DIGITS = Path(__file__).parent.parent / "examples" / "digits.py"


@pytest.mark.slow
def test_digits(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("torch_pruning")
    command = [sys.executable, DIGITS, "--threads", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    header, *rows = table
    assert header == ["model", "accuracy", "parameters", "ms at batch 1", "ms at batch 64"]
    figures = {row[0]: [float(each.strip("%").replace(",", "")) for each in row[1:]] for row in rows}
    assert list(figures) == ["dense", "masked", "compacted"]
    assert figures["dense"][0] > 95
    assert figures["masked"][0] == figures["compacted"][0] > 90
    assert figures["masked"][1] == figures["dense"][1]
    assert figures["compacted"][1] < figures["dense"][1] / 3
    assert not list(tmp_path.iterdir())


def test_digits_says_what_is_missing(tmp_path):
    code = "import runpy, sys; sys.modules['sklearn'] = None; runpy.run_path(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, DIGITS], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip() == "the digits come with scikit-learn: pip install scikit-learn"
