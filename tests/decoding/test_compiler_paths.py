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
