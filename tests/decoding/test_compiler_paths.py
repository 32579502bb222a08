import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deadband.decoding.compiler_paths import any_folder, split

NAMES = st.text(st.sampled_from("ab '\"\\$"), min_size=1, max_size=6)


@settings(deadline=None, derandomize=True)
@given(NAMES, NAMES, st.booleans())
def test_a_folder_is_one_piece_quoted_or_not(torchs, caches, quoted):
    torchs, caches = f"/x/{torchs}/torch", f"/y/{caches}"
    write = shlex.quote if quoted else str
    command = (
        f"g++ -O3 -I{shlex.quote(torchs + '/include')} -L{write(torchs)}/lib -include {write(caches)}/a.h -D 'X=1 2'"
    )
    words = ["g++", "-O3", f"-I{torchs}/include", f"-L{torchs}/lib", "-include", f"{caches}/a.h", "-D", "X=1 2"]
    assert split(command, [torchs, caches]) == words


def test_a_folder_within_another():
    assert split("cc /a b/c d/x /a b/y", ["/a b", "/a b/c d"]) == ["cc", "/a b/c d/x", "/a b/y"]


def test_plain_folders_change_nothing(monkeypatch):
    from torch._inductor import cpp_builder

    monkeypatch.setattr("deadband.decoding.compiler_paths._folders", lambda: ["/usr/lib/torch"])
    before = cpp_builder.run_compile_cmd
    with any_folder():
        assert cpp_builder.run_compile_cmd is before
    monkeypatch.setattr("deadband.decoding.compiler_paths._folders", lambda: ["/my lib/torch"])
    with pytest.raises(KeyError), any_folder(), any_folder():
        assert cpp_builder.run_compile_cmd is not before
        raise KeyError
    assert cpp_builder.run_compile_cmd is before


PROGRAM = """
import torch
from deadband.decoding.graph import compile_graph

class Step(torch.nn.Module):
    def forward(self, x):
        return x.sin() + 1

assert " " in torch.__file__
run = compile_graph(torch.export.export(Step(), (torch.ones(3),)), ())
torch.testing.assert_close(run(torch.ones(3))[0], torch.ones(3).sin() + 1)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
def test_a_graph_compiles_where_every_folder_has_a_space(tmp_path):
    library = tmp_path / "my program's library"
    library.mkdir()
    (library / "torch").symlink_to(torch.__path__[0])
    names = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "HOME")
    folders = {name: tmp_path / f"the {name.lower()}" for name in names}
    for folder in folders.values():
        folder.mkdir()
    environment = {**os.environ, **folders, "PYTHONPATH": os.pathsep.join([str(library), *sys.path[1:]])}
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [*folders["TORCHINDUCTOR_CACHE_DIR"].rglob("*.so")]


MEAN = """
import torch
from deadband.decoding.graph import compile_graph

class Step(torch.nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.float().pow(2).mean() + 1e-6)

x = torch.linspace(-1, 3, 2048, dtype=torch.bfloat16)
run = compile_graph(torch.export.export(Step(), (x,)), ())
torch.testing.assert_close(run(x)[0], Step()(x))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs a C++ compiler")
@pytest.mark.skipif(torch.cpu.get_capabilities().get("avx512_f") is not True, reason="needs AVX-512")
@pytest.mark.parametrize("order", [("avx512", "avx2"), ("avx2", "avx512")])
def test_one_folder_of_compiled_code_serves_several_instruction_sets(order, tmp_path):
    """torch 2.13's key of a compiled graph does not say for which vectors it was made."""
    for isa in order:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": isa}
        result = subprocess.run([sys.executable, "-c", MEAN], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
