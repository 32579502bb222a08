from __future__ import annotations

import json

import pytest

mkdocs = pytest.importorskip("mkdocs", reason="the extra mkdocs is not installed")


def site(repo, plugins: list) -> list[dict]:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    repo.write({
        "a b/box.py": '"""Boxes."""\nclass Box:\n    def shut(self):\n        def inner(): ...\n\n\ndef shut(): ...\n',
        "native/ops.cpp": "struct S { bool operator<(const S& other) const; };\n",
        "README.md": "# Shutting\n\n`shut` and `Box` again, shut.\n",
    })  # fmt: skip
    docs = repo.folder.parent / "docs"
    repo.output = docs / "code"
    repo.build(source_url="none")
    (docs / "index.md").write_text("# Home\n\nHow to shut a Box.\n")
    settings = docs.parent / "mkdocs.yml"
    settings.write_text(json.dumps({"site_name": "x", "plugins": plugins}))
    build(load_config(str(settings), strict=True))
    return json.loads((docs.parent / "site" / "search" / "search_index.json").read_text("utf-8"))["docs"]


def test_search_knows_definitions_by_name_and_files_by_path(repo):
    found = site(repo, ["search", "codeindex"])
    entries = {entry["location"]: (entry["title"], entry["text"]) for entry in found}
    box = "code/a%20b/box.py/"
    assert {location: entry for location, entry in entries.items() if location.startswith(f"{box}#")} == {
        f"{box}#Box": ("Box", "class Box, a b/box.py:2"),
        f"{box}#Box.shut": ("shut", "method Box.shut, a b/box.py:3"),
        f"{box}#Box.shut.inner": ("inner", "local function Box.shut.inner, a b/box.py:4"),
        f"{box}#shut": ("shut", "function shut, a b/box.py:7"),
    }
    assert entries["code/native/ops.cpp/#S::operator-"] == ("operator<", "method S::operator&lt;, native/ops.cpp:1")
    assert entries[box][0] == "a b/box.py"
    assert "How to shut a Box." in entries[""][1]
    assert not any("keywords" in location or location == "code/" for location in entries)
    html = (repo.folder.parent / "site/code/a b/box.py/index.html").read_text()
    assert all(f'id="{name}"' in html for name in ("Box", "Box.shut", "Box.shut.inner", "shut"))


def test_search_has_to_be_there(repo, caplog):
    from mkdocs.exceptions import Abort

    with pytest.raises(Abort):
        site(repo, ["codeindex"])
    assert "codeindex needs the plugin search" in caplog.text
