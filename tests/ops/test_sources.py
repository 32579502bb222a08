"""The sources of the kernels: each header compiles alone, without C++ headers; instruction sets share no function."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASELINES = {"x86_64_baseline", "aarch64_baseline"}
NATIVE = "aarch64_baseline" if platform.machine() == "aarch64" else "x86_64_baseline"
QUICK = {*BASELINES, "x86_64_v4_bf16"}  # the others are compiled from parts that these have, but for a few lines


def flags_of_isas():
    """The flags of each instruction set, as CMakeLists.txt sets them."""
    found = dict(re.findall(r"^ *set\((v\d|flags_\w+) (.+)\)$", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE))
    flags: dict[str, list[str]] = {name: [] for name in sorted(BASELINES)}
    for name, value in found.items():
        if name.startswith("flags_"):
            flags[name.removeprefix("flags_")] = re.sub(r"\$\{(\w+)\}", lambda match: found[match[1]], value).split()
    return flags


FLAGS = flags_of_isas()


def compile_for(isa, *arguments):
    architecture = "aarch64" if isa.startswith("aarch64") else "x86_64"
    compiler = "g++" if platform.machine() == architecture else f"{architecture}-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"not installed: {compiler}")
    options = ["-std=c++17", "-fopenmp", "-fno-exceptions", "-nostdinc++", *FLAGS[isa]]
    result = subprocess.run([compiler, *options, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_flags_of_every_instruction_set_are_found():
    sources = {path.stem.removeprefix("kernels_") for path in (ROOT / "csrc").glob("kernels_*.cpp")}
    assert set(FLAGS) - BASELINES == sources - {"baseline"}


@pytest.mark.parametrize("isa", [isa if isa in QUICK else pytest.param(isa, marks=pytest.mark.slow) for isa in FLAGS])
def test_each_header_compiles_alone(isa):
    compile_for(isa, "-fsyntax-only", "-x", "c++", *sorted((ROOT / "csrc").glob("*.h")))


def test_headers_are_guarded(tmp_path):
    """Also the headers that include each other: all of them twice, in either order."""
    headers = sorted((ROOT / "csrc").glob("*.h"))
    lines = [f'#include "{path}"\n' for path in (*headers, *reversed(headers))]
    (tmp_path / "all.cpp").write_text("".join(lines))
    compile_for(NATIVE, "-fsyntax-only", tmp_path / "all.cpp")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_a_translation_unit_of_kernels_exports_its_table_alone(tmp_path):
    """A function that two instruction sets both export would be linked once, perhaps the one that this CPU lacks."""
    compile_for(NATIVE, "-c", ROOT / "csrc" / "kernels_baseline.cpp", "-o", tmp_path / "kernels.o")
    command = ["nm", "--demangle", "--defined-only", "--extern-only", tmp_path / "kernels.o"]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[-1] for line in symbols] == ["deadband::kernels_baseline"]
