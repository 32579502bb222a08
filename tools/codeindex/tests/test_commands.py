from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from codeindex.build import build
from codeindex.cli import main
from codeindex.store import OutputError
from codeindex.where import Place, where

FILES = {
    "a.py": "class Box:\n    def open(self): ...\n\n\ndef open(): ...\n",
    "b c.py": "from a import Box, open\n",
    "n.cpp": "namespace x { struct Box { void open(); }; }\nbool operator==(int, Box);\n",
    "z.py": "def zzz(): ...\n",
}


def test_where_finds_every_definition_and_its_users(repo):
    repo.write(FILES).build()
    assert where("Box", repo.output) == [
        Place("Box", "class", "a.py", 1, 2, ("b c.py",)), Place("x::Box", "struct", "n.cpp", 1, 1, ()),
    ]  # fmt: skip
    assert [each.name for each in where("open", repo.output)] == ["Box.open", "open", "x::Box::open"]
    assert [each.name for each in where("Box.open", repo.output)] == ["Box.open"]
    assert [each.name for each in where("Box::open", repo.output)] == ["x::Box::open"]
    assert [each.start for each in where("zzz", repo.output)] == [1]
    assert where("nothing", repo.output) == where("", repo.output) == where("\udcff", repo.output) == []


def test_where_knows_each_name_of_a_large_index(repo):
    repo.write({f"m{number}.py": f"def f{number}(): ...\nclass C{number % 7}: ...\n" for number in range(150)}).build()
    assert all(len(where(f"f{number}", repo.output)) == 1 for number in range(150))
    assert sum(len(where(f"C{number}", repo.output)) for number in range(7)) == 150


def test_where_needs_an_index(tmp_path):
    with pytest.raises(OutputError, match="codeindex build REPO -o"):
        where("x", tmp_path)


def test_the_commands(repo, capsys):
    repo.write(FILES)
    place = ["-o", str(repo.output)]
    assert main(["check", str(repo.folder), *place]) == 1
    assert capsys.readouterr().out.startswith("stale: ")
    assert main(["build", str(repo.folder), *place]) == 0
    assert capsys.readouterr().out.startswith("4 files, ")
    assert main(["check", str(repo.folder), *place]) == 0
    assert capsys.readouterr().out.endswith("up to date\n")
    assert main(["where", "Box", *place]) == 0
    assert capsys.readouterr().out == "a.py:1-2: class Box\n    used in b c.py\nn.cpp:1: struct x::Box\n"
    assert main(["where", "nothing", *place]) == 1
    assert "no definition of nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["build", "/nowhere"], "/nowhere is not a folder"),
        (["build", ".", "--source-url", "https://x"], "has no {path} in it"),
        (["build", ".", "--jobs", "-1"], "expected 1 or more"),
        (["where", "x", "-o", "/nowhere"], "no index in /nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(arguments, expected, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_output_into_a_closed_pipe_is_no_error(repo):
    repo.write({f"m{number}.py": "def f(): ...\n" * 500 for number in range(20)}).build()
    command = f"'{sys.executable}' -m codeindex where f -o '{repo.output}' | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "m0.py:1: function f\n"
    assert done.stderr == ""


def test_ctrl_c_ends_it_quietly(repo):
    repo.write({f"p/m{number}.py": "def f(): ...\n" * 60 for number in range(600)})
    running = subprocess.Popen(
        [sys.executable, "-m", "codeindex", "build", str(repo.folder), "-o", str(repo.output)],
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    time.sleep(0.7)
    os.killpg(running.pid, signal.SIGINT)
    _, error = running.communicate(timeout=60)
    if running.returncode == 0:
        pytest.skip("it was faster")
    assert running.returncode == 130
    assert b"Traceback" not in error
    build(repo.folder, repo.output)
    assert len(where("f", repo.output)) == 600 * 60
