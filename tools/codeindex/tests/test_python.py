from __future__ import annotations

import ast
import asyncio
import dataclasses
import json
from pathlib import Path

import pytest
from codeindex.facts import Facts
from codeindex.languages import parse
from codeindex.python import parse_python
from codeindex.python_tree import parse_tree

SOURCE = '''"""The first sentence of it. More.

A paragraph.
"""
from __future__ import annotations
import os.path as p, sys
from . import sibling
from ..up.more import (
    one,  # a comment
    two as second,
)

LIMIT: int = 3
first, second_ = 1, 2
_hidden = 0


@decorated(
    1
)
class Thing(Base, metaclass=Meta):
    """A thing."""

    field = 1

    @property
    def value(self) -> int:
        """The value, e.g. three. Not more."""
        def inner():
            pass
        return 3

    def _private(self): ...

    class Inner:
        def deep(self): ...


if sys:
    async def run(a, /, b: int = 1, *c, d, **e) -> None: ...
else:
    def run(): ...

try:
    def tried(): ...
except ImportError:
    def caught(): ...

match LIMIT:
    case 3:
        def matched(): ...
'''


def by_name(facts: Facts) -> dict:
    return {each.name: each for each in facts.definitions}


def test_definitions_have_scopes_kinds_lines_and_signatures():
    facts = parse("a.py", SOURCE.encode())
    found = by_name(facts)
    assert facts.doc == "The first sentence of it."
    assert not facts.error
    thing = found["Thing"]
    assert (thing.kind, thing.start, thing.signature) == ("class", 21, "class Thing(Base, metaclass=Meta)")
    assert (found["Thing.value"].kind, found["Thing.value"].signature) == ("method", "def value(self) -> int")
    assert found["Thing.value"].doc == "The value, e.g. three."
    assert found["Thing.value.inner"].kind == "local function"
    assert found["Thing.Inner.deep"].kind == "method"
    assert [each.signature for each in facts.definitions if each.name == "run"] == [
        "async def run(a, /, b: int=1, *c, d, **e) -> None", "def run()",
    ]  # fmt: skip
    assert {"tried", "caught", "matched", "LIMIT", "first", "second_"} <= set(found)
    assert found["LIMIT"].signature == "LIMIT: int"
    assert "Thing.field" not in found


def test_public_is_what_other_files_can_use():
    public = {each.name for each in parse("a.py", SOURCE.encode()).definitions if each.public}
    assert {"Thing", "Thing.value", "Thing.Inner", "Thing.Inner.deep", "LIMIT", "run"} <= public
    assert not {"Thing._private", "Thing.value.inner", "_hidden"} & public


def test_all_decides_what_is_public():
    facts = parse("a.py", b"__all__ = ['_a']\ndef _a(): ...\ndef b():\n    class C: ...\n")
    assert [each.name for each in facts.definitions if each.public] == ["_a"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("__all__ = ['a']\n__all__ += ['b']\n", {"a", "b"}),
        ("__all__: list = ['a']\n__all__.extend(['b'])\n", {"a", "b"}),
        ("__all__ = sorted(names)\n", {"a", "b", "c"}),
        ("__all__ = ['a']\n__all__.append('b')\n", {"a", "b", "c"}),
    ],
)
def test_all_in_parts(source, expected):
    facts = parse("a.py", (source + "def a(): ...\ndef b(): ...\ndef c(): ...\n").encode())
    assert {each.name for each in facts.definitions if each.public and each.kind == "function"} == expected


def test_a_leading_comment_serves_where_there_is_no_docstring():
    assert parse("a.py", b"#!/bin/x\n# Copyright me\n\n# What it\n# is. More.\nx = 1\n").doc == "What it is."
    assert parse("a.yml", b"# Of CI.\non: push\n").doc == "Of CI."
    assert parse("a.py", b"x = 1\n# not about the file\n").doc == ""


def test_imports_keep_names_in_parentheses_and_levels():
    facts = parse("a.py", SOURCE.encode())
    assert [(each.target, each.names, each.level) for each in facts.imports] == [
        ("__future__", ("annotations",), 0), ("os.path", (), 0), ("sys", (), 0), ("", ("sibling",), 1),
        ("up.more", ("one", "two"), 2),
    ]  # fmt: skip


def test_a_comment_or_a_string_is_no_mention():
    assert parse("a.py", b"# alpha\n'beta'\ngamma.delta(epsilon=1)\n").mentions == ("delta", "gamma")


@pytest.mark.parametrize(
    "source", [b"def f(:\n    pass\nclass A:\n    def m(self): ...\n", b"x = 1\x0c\n  y = 2\nclass A: ...\n"]
)
def test_what_does_not_parse_says_so_and_gives_what_its_lines_show(source: bytes):
    facts = parse("a.py", source)
    assert facts.error.startswith("does not parse: line ")
    assert "A" in by_name(facts)


def test_encodings():
    assert by_name(parse("a.py", "# -*- coding: latin-1 -*-\ndef f(): 'é'\n".encode("latin-1")))["f"].doc == "é"
    assert by_name(parse("a.py", b"\xef\xbb\xbfdef f(): ...\n"))["f"].start == 1
    assert "cannot be read as text" in parse("a.py", b"def f(): '\xff'\n").error
    assert "cannot be read as text" in parse("a.py", b"# coding: nonsense\n").error


def test_nesting_beyond_the_parser_is_an_error_of_the_file():
    assert parse("a.py", b"(" * 5000 + b")" * 5000).error


def test_facts_survive_storage():
    facts = parse("a.py", SOURCE.encode())
    assert Facts.from_json(facts.to_json()) == facts


@pytest.mark.parametrize("package", [json, asyncio], ids=["json", "asyncio"])
def test_the_standard_library_is_read_whole(package):
    """Each class and function that `ast.walk` finds has exactly one entry, with its line."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(Path(package.__file__).parent.glob("**/*.py")):
        expected = sorted(
            (node.name, node.lineno, node.end_lineno)
            for node in ast.walk(ast.parse(file.read_bytes()))
            if isinstance(node, kinds)
        )
        found = parse(file.name, file.read_bytes()).definitions
        assert (
            sorted((each.name.rpartition(".")[2], each.start, each.end) for each in found if each.kind != "variable")
            == expected
        )


NEWER = '''"""Of newer syntax. More."""
from .part import (
    one as two,
)
__all__ = ["first", "Pair", "Box"]
def first[T](items: list[T]) -> T:
    """The first one."""
    def inner(): ...
class Box[T: int = str, *Ts = *tuple[int], **P = [int]](Base):
    """A box."""
    @property
    async def value[U](self): ...
    class Inner[T]:
        def deep(self): ...
type Pair[T = int] = tuple[T, T]
type _Own = int
if other:
    LIMIT: int = 3
try: ...
except KeyError, ValueError:
    def caught(): ...
text = f"{names["key"]} {"\\n".join(f"{deep!r}")}"
made = t"{names}"
'''


def test_syntax_newer_than_this_python_hides_no_name():
    facts = parse("a.py", NEWER.encode())
    assert facts.doc == "Of newer syntax."
    assert [(each.name, each.kind, each.start, each.end) for each in facts.definitions] == [
        ("__all__", "variable", 5, 5), ("first", "function", 6, 8), ("first.inner", "local function", 8, 8),
        ("Box", "class", 9, 14), ("Box.value", "method", 12, 12), ("Box.Inner", "class", 13, 14),
        ("Box.Inner.deep", "method", 14, 14), ("Pair", "type", 15, 15), ("_Own", "type", 16, 16),
        ("LIMIT", "variable", 18, 18), ("caught", "function", 21, 21), ("text", "variable", 22, 22),
        ("made", "variable", 23, 23),
    ]  # fmt: skip
    assert {each.name for each in facts.definitions if each.public} == {
        *("first", "Pair", "Box", "Box.value", "Box.Inner", "Box.Inner.deep"),
    }
    found = by_name(facts)
    assert found["first"].doc == "The first one."
    assert found["Box"].signature.startswith("class Box[T: int = str, ")
    assert found["Pair"].signature == "type Pair[T = int] = tuple[T, T]"
    assert [(each.target, each.names, each.line, each.level) for each in facts.imports] == [("part", ("one",), 2, 1)]
    assert {"Base", "names", "deep", "one", "join", "KeyError"} <= set(facts.mentions)
    assert not {"items", "text", "key", "self"} & set(facts.mentions)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def a(:\n    pass\nclass B:\n    def c(self): ...\n", ["a", "B", "B.c"]),
        ("class A[T](:\n    def b(self: pass\n\ndef c(): ...\n", ["A", "A.b", "c"]),
        ("x = (\n\ndef a(): ...\n\nclass B:\n    def c(self): ...\n", ["a", "B", "B.c"]),
        ("<<<<<<< ours\ndef a(): ...\n=======\ndef b(): ...\n>>>>>>> theirs\nclass C: ...\n", ["a", "b", "C"]),
        ("print 'two'\ndef a((b, c)): ...\nclass D:\n    def e(self): print self\n", ["a", "D", "D.e"]),
        ("class A:\n\tdef b(self):\n        pass\ndef c(): ...\n", ["A", "A.b", "c"]),
        ("\ndef (x): ...\n  class\nasync def a(): ...\n", ["a"]),
    ],
)
def test_errors_are_local(source: str, expected: list[str]):
    facts = parse("a.py", source.encode())
    assert facts.error.startswith("does not parse: line ")
    assert [each.name for each in facts.definitions if each.kind != "variable"] == expected
    lines = [source[: source.index(f" {name.rpartition('.')[2]}")].count("\n") + 1 for name in expected]
    assert [each.start for each in facts.definitions if each.kind != "variable"] == lines


@pytest.mark.parametrize("package", [json, asyncio], ids=["json", "asyncio"])
def test_both_parsers_of_python_find_the_same(package):
    for text in [SOURCE, *(file.read_text("utf-8") for file in sorted(Path(package.__file__).parent.glob("*.py")))]:
        expected, found = parse_python(text), parse_tree(text)
        for one, other in zip(expected.definitions, found.definitions, strict=True):
            assert dataclasses.replace(one, signature="") == dataclasses.replace(other, signature="")
        assert (expected.doc, expected.imports) == (found.doc, found.imports)
