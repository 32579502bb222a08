from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from codeindex.build import build
from codeindex.markdown import Pages, code, count, plain
from codeindex.repository import RepositoryError
from codeindex.store import OutputError
from hypothesis import given, settings
from hypothesis import strategies as st
from links import dead, links, rendered

FILES = {
    "README.md": "# Demo\n\nA demo of `open_box`. See [the code](src/box.py).\n\n```python\nopen_box(1)\n```\n",
    "src/box.py": '"""Boxes."""\n\n\ndef open_box(size: int) -> "Box":\n    """Open one. Or more."""\n\n\n'
    "class Box:\n    def shut(self): ...\n",
    "src/use.py": "from box import open_box\n\nopen_box(2)\n",
    "tests/test_box.py": "import pytest\nfrom box import Box\n\n\ndef test_box():\n    Box().shut()\n",
    "native/add.c": "/* Adds. */\nint add(int a, int b) { return a + b; }\n",
    "empty.py": "",
    "broken.py": "def f(:\n",
    "data.bin": b"\0\1\2",
    "notes.xyz": "class NotThis {}\n",
    "config.toml": "[tool]\na = 1\n",
}


BOX = """\
# `src/box.py`

Python, 9 lines, 115 bytes, [source](../../repo/src/box.py).

Boxes.

## Public names

* [`def open_box(size: int) -> 'Box'`](../../repo/src/box.py#L4-L5): Open one.
* [`class Box`](../../repo/src/box.py#L8-L9)
    * [`def shut(self)`](../../repo/src/box.py#L9)

## Imported by

* [`src/use.py`](use.py.md)

## Tests

* [`tests/test_box.py`](../tests/test_box.py.md)

## Linked from

* [`README.md`](../README.md.md)

## How to run the tests

```sh
python -m pytest tests/test_box.py
```

## Keywords

* <a id="Box"></a>`Box` class, [8–9](../../repo/src/box.py#L8-L9); used in \
[`tests/test_box.py`](../tests/test_box.py.md)
* <a id="open_box"></a>`open_box` function, [4–5](../../repo/src/box.py#L4-L5); used in \
[`README.md`](../README.md.md), [`src/use.py`](use.py.md)
* <a id="Box.shut"></a>`Box.shut` method, [9](../../repo/src/box.py#L9); used in \
[`tests/test_box.py`](../tests/test_box.py.md)

[Folder](index.md) · [its keywords](keywords.md)

Made by codeindex from blob `12a1b0eee879c51b7060a5cc735520e55e155977`.
"""


def test_pages(repo):
    changes = repo.write(FILES).build()
    assert changes.files == len(FILES)
    assert repo.page("src/box.py.md") == BOX
    assert repo.git("rev-parse", ":src/box.py").strip() in BOX
    assert "## Links to\n\n* [`src/box.py`](src/box.py.md)" in repo.page("README.md.md")
    test = repo.page("tests/test_box.py.md")
    assert "## Imports\n\n* [`src/box.py`](../src/box.py.md)\n\nFrom outside: `pytest`.\n" in test
    assert "## How to run it\n\n```sh\npython -m pytest tests/test_box.py\n```\n" in test
    assert "This file does not parse: line 1" in repo.page("broken.py.md")
    assert repo.page("data.bin.md").splitlines()[2].startswith("A binary file, 3 bytes, ")
    assert repo.page("empty.py.md").splitlines()[2].startswith("An empty file, 0 bytes, ")
    assert "NotThis" not in repo.page("notes.xyz.md")
    entry = "* [`tool.a`](config.toml.md#tool.a) key, `config.toml` [2](../repo/config.toml#L2)\n"
    assert entry in repo.page("keywords.md")
    assert '<a id="tool.a"></a>' in repo.page("config.toml.md")
    assert "\n* [`box.py`](box.py.md): Boxes.\n* [`use.py`](use.py.md)\n" in repo.page("src/index.md")
    assert "![Imports between folders](imports.svg)" in repo.page("index.md")
    picture = ElementTree.fromstring(repo.page("imports.svg"))
    edges = {element.text for element in picture.iter("{http://www.w3.org/2000/svg}title")}
    assert {"(top) imports src: 1", "tests imports src: 1"} <= edges


def test_every_link_resolves_and_every_page_is_reachable(repo):
    repo.write(FILES).build()
    assert dead(repo.output) == []
    seen, todo = set(), [repo.output / "index.md"]
    while todo:
        page = todo.pop()
        if page not in seen:
            seen.add(page)
            todo += [
                Path(os.path.normpath(page.parent / each)) for each in links(page.read_text()) if each.endswith(".md")
            ]
    assert {page for page in repo.output.rglob("*.md")} <= seen


ENTRY = re.compile(r"^\* \[(`+ ?.*? ?`+)\]\(.*?\) ([\w ]+), `(.*?)` \[[\d–]+\]\(.*?\)$", re.MULTILINE)


def entries(repo, folder: str) -> list[tuple[str, str, str]]:
    """What a folder's keyword index holds, on all of its pages."""
    first = repo.page(f"{folder}keywords.md")
    parts = sorted((repo.output / folder).glob("keywords-*.md"), key=lambda each: int(each.stem.split("-")[1]))
    found = [each for page in [first, *(part.read_text() for part in parts)] for each in ENTRY.findall(page)]
    assert f"\n{count(len(found), 'entry', 'entries')} in " in first
    return found


def test_a_folders_keywords_are_those_of_its_files(repo, monkeypatch):
    monkeypatch.setattr("codeindex.pages.PAGE_ENTRIES", 3)
    repo.write(FILES | {"src/deep/more.py": "def zeta(): ...\nclass alpha: ...\nclass Alpha: ...\n"}).build()
    for folder, inside in (("src/", "src/"), ("src/deep/", "src/deep/"), ("", "")):
        expected = []
        for page in repo.output.rglob("*.md"):
            name = page.relative_to(repo.output).as_posix()
            if name.startswith(inside) and "## Keywords\n" in page.read_text():
                rows = page.read_text().split("## Keywords\n")[1]
                source = page.read_text().splitlines()[0].strip("# `")
                expected += [(f"`{each}`", kind, source) for each, kind in re.findall(r"</a>`(.*?)` ([\w ]+),", rows)]
        found = entries(repo, folder)
        assert sorted(found) == sorted(expected)
        assert [each[0].strip("`").rpartition(".")[2].lower() for each in found] == sorted(
            each[0].strip("`").rpartition(".")[2].lower() for each in found
        )


def test_counts_equal_their_lists(repo):
    repo.write(FILES).build()
    top = repo.page("index.md")
    found = re.findall(r"\* \[`(\w+)/`\]\(\w+/index\.md\): (\d+) file", top)
    folders = Counter(path.split("/")[0] for path in FILES if "/" in path)
    assert {name: int(number) for name, number in found} == folders


def test_a_second_build_writes_nothing(repo):
    repo.write(FILES).build()
    before = {file: file.stat().st_mtime_ns for file in repo.output.rglob("*") if file.name != "lock"}
    assert not repo.build()
    assert not repo.build(check=True)
    assert {file: file.stat().st_mtime_ns for file in repo.output.rglob("*") if file.name != "lock"} == before


def test_cold_builds_are_equal_to_the_byte_with_any_number_of_processes(repo, monkeypatch):
    many = {
        f"p/m{number}.py": f"from p.m{number // 2} import f{number // 2}\ndef f{number}(): ...\n"
        for number in range(230)
    }
    repo.write(FILES | many).build()
    first = repo.tree()
    shutil.rmtree(repo.output)
    repo.build(jobs=2)
    assert repo.tree() == first
    program = "import sys; from codeindex.cli import main; sys.exit(main(sys.argv[1:]))"
    shutil.rmtree(repo.output)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", program, "build", repo.folder, "-o", repo.output],
        check=True,
        env=environment,
        capture_output=True,
    )
    assert repo.tree() == first


def test_an_incremental_build_equals_a_cold_one(repo):
    repo.write(FILES).build()
    repo.git("mv", "src/box.py", "src/case.py")
    repo.git("rm", "-qf", "native/add.c")
    repo.write({"src/use.py": "from case import open_box\n", "new.go": "package a\nfunc New() {}\n"})
    assert repo.build(check=True)
    changes = repo.build()
    assert {"src/case.py.md", "new.go.md", "src/use.py.md"} <= set(changes.written)
    assert {"src/box.py.md", "native/add.c.md", "native/index.md", "native/keywords.md"} <= set(changes.deleted)
    assert "config.toml.md" not in changes.written
    assert not (repo.output / "native").exists()
    warm = repo.tree()
    shutil.rmtree(repo.output)
    repo.build()
    assert repo.tree() == warm


def test_changes_that_are_not_committed_count(repo):
    repo.write(FILES)
    repo.git("commit", "-qm", "all")
    repo.build()
    (repo.folder / "src/box.py").write_text("def changed(): ...\n")
    (repo.folder / "untracked.py").write_text("def untracked(): ...\n")
    (repo.folder / "empty.py").unlink()
    assert "empty.py.md" in repo.build().deleted
    assert "changed" in repo.page("src/box.py.md")
    assert not (repo.output / "untracked.py.md").exists()
    assert f"blob `{repo.git('hash-object', 'src/box.py').strip()}`" in repo.page("src/box.py.md")


def test_check_finds_altered_missing_and_added_pages_and_writes_nothing(repo):
    repo.write(FILES)
    assert repo.build(check=True)
    assert not repo.output.exists()
    repo.build()
    for spoil in (
        lambda: (repo.output / "index.md").write_text(repo.page("index.md") + "\n"),
        lambda: (repo.output / "empty.py.md").unlink(),
        lambda: (repo.output / "gone.py.md").write_text(repo.page("empty.py.md")),
    ):
        spoil()
        before = repo.tree()
        assert repo.build(check=True)
        assert repo.tree() == before
        assert repo.build()
        assert not repo.build(check=True)


def test_the_state_can_be_lost(repo):
    repo.write(FILES).build()
    before = repo.tree()
    shutil.rmtree(repo.output / ".codeindex")
    assert not repo.build(check=True)
    assert not repo.build()
    assert repo.tree() == before
    whole = (repo.output / ".codeindex/facts.gz").read_bytes()
    damaged = gzip.compress(b"\n".join(line[:-5] for line in gzip.decompress(whole).splitlines()))
    for content in (b"\x1f\x8bnonsense", whole[:40] + b"\0" * 40 + whole[80:], whole[:100], damaged, b""):
        (repo.output / ".codeindex/facts.gz").write_bytes(content)
        (repo.output / ".codeindex/manifest.json").write_text("{}")
        repo.build()
        assert repo.tree() == before
    (repo.output / ".codeindex/names.txt").unlink()
    repo.build()
    assert repo.tree() == before


def test_files_of_others_are_left_alone(repo):
    repo.write(FILES)
    repo.output.mkdir()
    (repo.output / "notes.md").write_text("Of pages: Made by codeindex from files.\n")
    repo.build()
    repo.build()
    assert repo.page("notes.md").startswith("Of pages")
    shutil.rmtree(repo.output / ".codeindex")
    (repo.output / "index.md").write_text("mine too")
    with pytest.raises(OutputError, match=r"index\.md is there and no page of codeindex"):
        repo.build()
    assert repo.page("index.md") == "mine too"


def test_the_output_does_not_document_itself(repo):
    repo.write(FILES)
    repo.output = repo.folder / "docs" / "code"
    repo.build()
    before = repo.tree()
    repo.git("add", "-A")
    assert not repo.build()
    assert repo.tree() == before
    repo.output = repo.folder.parent / "elsewhere"
    repo.build()
    assert not (repo.output / "docs").exists()


def test_generated_files_are_left_out_and_listed(repo):
    files = {
        "a.pb.go": "// Code generated by protoc. DO NOT EDIT.\npackage a\nfunc A() {}\n",
        "b.h": "#pragma once\n// @generated by tool.py from b.in\nint b();\n",
        "min.js": "function m() {}\n",
        "kept.py": "# Generated, do not edit.\ndef kept(): ...\n",
        "doc.py": '"""Finds @generated files; code generated so: do not edit."""\ndef doc(): ...\n',
        ".gitattributes": "min.js linguist-generated\nkept.py -linguist-generated\n",
    }
    changes = repo.write(files).build()
    assert (changes.files, changes.left_out) == (3, 3)
    top = repo.page("index.md")
    assert "3 generated files:\n\n* [`a.pb.go`]" in top
    assert "* [`b.h`]" in top
    assert "* [`min.js`]" in top
    assert repo.build(generated=True).left_out == 0
    assert "`b`" in repo.page("keywords.md")


def test_ignore_patterns(repo):
    repo.write(FILES).build(ignore=("src/**", "**/*.toml"))
    assert not (repo.output / "src").exists()
    assert not (repo.output / "config.toml.md").exists()
    assert (repo.output / "native/add.c.md").exists()


ODD = [
    "index",
    "README",
    "keywords",
    "keywords-1",
    "index_",
    "a b/c&d.py",
    "ünï/Straße.py",
    "#hash.py",
    "50%.py",
    "what?.py",
    "back`tick`.md",
    "[x](y).py",
    "pipe|.py",
    "quo\"te'.py",
    "line\nbreak.py",
    "tab\t.py",
    ".hidden/.x",
    "x.md/y",
    "back\\slash",
    "<b>.py",
    "*.py",
    "$a$.py",
    "-o",
    "~/x",
    "a.md",
    "con.py",
    "n" * 255,
]


def test_odd_file_names(repo):
    repo.write({name: f"def f{number}(): ...\n" for number, name in enumerate(ODD)})
    file = os.fsencode(repo.folder) + b"/latin\xe9.py"
    Path(os.fsdecode(file)).write_bytes(b"def latin(): ...\n")
    (repo.folder / "x").write_text("has the page x.md, and there is a folder x.md\n")
    repo.git("add", "-A")
    assert repo.build().files == len(ODD) + 2
    assert dead(repo.output) == []
    assert not repo.build()
    assert "`what?.py`" in repo.page("index.md")


CASES = ["A.py", "a.py", "Lib/x.py", "lib/X.py", "lib/x.py", "lib/Sub/y.py", "x", "x.MD/y.py", "Index", "INDEX",
         "Imports.svg/z.py", "Straße.py", "STRASSE.py", "\u00e9.py", "e\u0301.py", "a.py~2", "use.py"]  # fmt: skip


def test_pages_are_apart_where_case_does_not_count(repo):
    repo.write({name: f"import lib.Sub.y\ndef f{number}(): ...\n" for number, name in enumerate(CASES)})
    assert repo.build().files == len(CASES)
    pages = [path for path in repo.tree() if not path.startswith(".codeindex/")]
    assert len({unicodedata.normalize("NFD", path.casefold()) for path in pages}) == len(pages)
    folders = {path.rpartition("/")[0] for path in pages}
    assert len({folder.casefold() for folder in folders}) == len(folders)
    assert dead(repo.output) == []
    for number, name in enumerate(CASES):
        assert sum(f"# `{name}`\n" in text.decode() for text in map(repo.tree().get, pages)) == 1
        if not name.endswith(".py"):
            continue
        entry = next(line for line in repo.page("keywords.md").splitlines() if f"[`f{number}`]" in line)
        assert f"# `{name}`\n" in repo.page(unquote(re.search(r"\]\(([^)#]+)#", entry)[1]))
    assert not repo.build()
    (repo.folder / "A.py").unlink()
    repo.git("add", "-A")
    repo.build()
    assert "`f1`" in repo.page("a.py.md")


def test_the_same_content_is_read_by_each_name(repo):
    text = "export declare let a: 1;\ndeclare const b: 2;\n"
    repo.write({"a.ts": text, "a.d.ts": text, "go.mod": "module m\n", "x.mod": "module m\n"}).build()
    assert "`b: 2`" in repo.page("a.d.ts.md")
    assert "`b: 2`" not in repo.page("a.ts.md")
    assert "`m`" in repo.page("go.mod.md")
    assert "`m`" not in repo.page("x.mod.md")


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=60),
        min_size=1,
        max_size=3,
    )
)
@settings(deadline=None)
def test_pages_of_any_path_have_safe_names_of_their_own(parts):
    path = "/".join(parts)
    pages = Pages([path, path + "_"])
    page = pages.of(path)
    assert pages.of(path + "_") != page
    assert not re.search(r'[\x00-\x1f#?<>:"|*\\]', page)
    assert page.endswith(".md")
    assert all(len(part.encode()) <= 255 and not part.startswith(".") for part in page.split("/"))


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1))
@settings(deadline=None)
def test_text_of_others_stays_text(text):
    expected = " ".join(text.split())
    assert rendered(plain(text.replace("`", "'"))).strip() == expected.replace("`", "'")
    if expected:
        assert rendered(f"* {code(text)} x") == f"{expected} x"


def test_code_in_text_of_others_stays_code():
    assert plain("see `a_b`, ``c`` and d_e`") == "see `a_b`, `c` and d\\_e\\`"


def test_links_submodules_and_nested_repositories(repo, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(
        "git init -q && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m x",
        shell=True,
        cwd=other,
        check=True,
    )
    repo.write(FILES)
    repo.git("submodule", "--quiet", "add", str(other), "third/other")
    shutil.copytree(other, repo.folder / "nested")
    (repo.folder / "link.py").symlink_to("src/box.py")
    (repo.folder / "loop").symlink_to("loop")
    (repo.folder / "nowhere").symlink_to("/does/not/exist")
    (repo.folder / "folder").symlink_to("src")
    repo.git("add", "link.py", "loop", "nowhere", "folder")
    repo.build()
    assert "A symbolic link to src/box.py" in repo.page("link.py.md")
    assert "A submodule, at commit `" in repo.page("third/other.md")
    assert not (repo.output / "nested").exists()
    assert dead(repo.output) == []
    assert repo.page("keywords.md").count("`open_box`") == 1


def test_huge_files_are_not_read_whole(repo, monkeypatch):
    monkeypatch.setattr("codeindex.languages.LARGEST", 4_000)
    repo.write({"big.py": "def f(): ...\n" * 1000, "small.py": "def g(): ...\n"}).build()
    assert "This file is not parsed" in repo.page("big.py.md")
    assert "13,000 bytes" in repo.page("big.py.md")


def test_a_repository_without_commits_or_files(repo):
    assert repo.build().files == 0
    assert repo.page("index.md").startswith("# Code index\n")
    assert dead(repo.output) == []


def test_a_shallow_and_a_sparse_clone(repo, tmp_path):
    repo.write(FILES)
    repo.git("commit", "-qm", "one")
    repo.build()
    for name, arguments in (("shallow", ["--depth=1"]), ("sparse", ["--sparse"])):
        subprocess.run(
            ["git", "clone", "-q", *arguments, f"file://{repo.folder}", tmp_path / name / "repo"], check=True
        )
        build(tmp_path / name / "repo", tmp_path / name / "out")
        ours = {path: content for path, content in repo.tree().items() if path.endswith((".md", ".svg"))}
        theirs = {
            file.relative_to(tmp_path / name / "out").as_posix(): file.read_bytes()
            for file in (tmp_path / name / "out").rglob("*")
            if file.suffix in (".md", ".svg")
        }
        assert theirs == ours


def test_what_is_no_repository(tmp_path):
    with pytest.raises(RepositoryError, match="is not a folder"):
        build(tmp_path / "none", tmp_path / "out")
    with pytest.raises(RepositoryError, match="is not a git repository"):
        build(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_cannot_be_the_repository_or_a_file(repo):
    repo.write(FILES)
    with pytest.raises(OutputError, match="holds the repository"):
        build(repo.folder, repo.folder)
    with pytest.raises(OutputError, match="is a file"):
        build(repo.folder, repo.folder / "README.md")


@pytest.mark.parametrize("moment", [0.05, 0.3, 0.6, 1.0])
def test_a_kill_leaves_old_pages_or_new_ones(repo, moment):
    many = {f"p/m{number}.py": f"def f{number}(): ...\n" for number in range(800)}
    repo.write(many).build(jobs=2)
    old = {path: content for path, content in repo.tree().items() if not path.startswith(".codeindex")}
    repo.write({path: source + "def more(): ...\n" for path, source in many.items()})
    program = "from codeindex.cli import main; import sys; main(sys.argv[1:])"
    running = subprocess.Popen(
        [sys.executable, "-c", program, "build", repo.folder, "-o", repo.output],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(moment)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    left = {path: content for path, content in repo.tree().items() if not path.startswith(".codeindex")}
    repo.build(jobs=2)
    new = {path: content for path, content in repo.tree().items() if not path.startswith(".codeindex")}
    assert set(old) & set(new) <= set(left) <= set(old) | set(new)
    assert all(content in (old.get(path), new.get(path)) for path, content in left.items())
    assert not repo.build(check=True)
    assert not list(repo.output.glob(".codeindex/staged"))


@pytest.mark.parametrize(
    "at", ["codeindex.drawing.file_page", "codeindex.reading.read_facts", "codeindex.store.Staging.commit"]
)
def test_until_all_pages_are_drawn_nothing_changes(repo, monkeypatch, at):
    repo.write(FILES).build()
    before = repo.tree()
    repo.write({"src/box.py": "def other(): ...\n", "new.py": "", "src/use.py": "import other\n"})

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(at, stop)
        with pytest.raises(KeyboardInterrupt):
            repo.build()
    assert repo.tree() == before
    assert repo.build()


def test_two_at_once_are_refused(repo):
    repo.write(FILES)
    program = "import sys; from pathlib import Path; from codeindex.store import Store\n" \
        "with Store(Path(sys.argv[1])).staging(): print('ready', flush=True); sys.stdin.read()"  # fmt: skip
    command = [sys.executable, "-c", program, repo.output]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(OutputError, match="another codeindex is writing"):
            repo.build()
        other.stdin.close()
    assert repo.build()


def test_processes_end_with_the_one_that_started_them(repo):
    many = {f"p/m{number}.py": "def f(): ...\n" * 400 for number in range(600)}
    repo.write(many)
    program = "from codeindex.cli import main; import sys; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "build", repo.folder, "-o", repo.output, "--jobs", "2"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    children: list[str] = []
    end = time.monotonic() + 30
    while len(children) < 2 and time.monotonic() < end and running.poll() is None:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    running.kill()
    running.wait()
    assert len(children) == 2
    while any(Path(f"/proc/{child}/exe").exists() for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert repo.build(jobs=2)


@pytest.mark.parametrize("moves", [0, 1, 5, 14])
def test_a_kill_between_renames_is_made_good_by_the_next_build(repo, monkeypatch, moves):
    repo.write(FILES).build()
    repo.git("rm", "-qf", "native/add.c")
    repo.write({"src/box.py": "def other(): ...\n", "new.py": "", "src/use.py": "import other\n"})
    made, replace = [], os.replace

    def stop(*places):
        if len(made) == moves + 1:  # the first is the journal
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(places)
        replace(*places)

    if os.fork() == 0:
        monkeypatch.setattr(os, "replace", stop)
        repo.build()
        os._exit(0)
    os.wait()
    repo.git("rm", "-qf", "new.py")  # what the killed build had is not what the next one wants
    assert repo.build(check=True)
    repo.build()
    after = repo.tree()
    shutil.rmtree(repo.output)
    repo.build()
    assert repo.tree() == after


def test_links_to_a_forge_or_to_none(repo):
    repo.write(FILES).build(source_url="https://example.org/blob/main/{path}")
    assert "(https://example.org/blob/main/src/box.py#L4-L5)" in repo.page("src/box.py.md")
    repo.build(source_url="none")
    assert "repo/src/box.py" not in repo.page("src/box.py.md")
    assert "`open_box` function, 4–5" in repo.page("src/box.py.md")


def test_the_manifest_names_all_pages(repo):
    repo.write(FILES).build()
    manifest = json.loads((repo.output / ".codeindex/manifest.json").read_text())
    pages = {
        file.relative_to(repo.output).as_posix() for file in repo.output.rglob("*") if file.suffix in (".md", ".svg")
    }
    assert set(manifest["pages"]) == pages
