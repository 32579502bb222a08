from __future__ import annotations

import doctest

import pytest
from codeindex import facts, generated, lines, markdown, names
from codeindex.languages import facts_of, parse


@pytest.mark.parametrize("module", [facts, generated, lines, markdown, names], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings(module):
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


MARKDOWN = """\
---
title: not this
---
# The `title` of *it*

<img src="x.png">

What it is
about. More.

## First

[one](a.md) and ![two](b.png "title") and [three][ref], not `[four](c.md)`.

```python
# not a heading
use(Thing)
```

Second
------

~~~~
``` not the end
~~~~

`code.term` and ``a `b` c``

[ref]: https://example.org/x_(y)

# Last #
"""


def test_markdown():
    facts = parse("a.md", MARKDOWN.encode())
    assert [(each.name, each.kind, each.start, each.end) for each in facts.definitions] == [
        ("The title of it", "heading", 4, 30), ("First", "heading", 11, 19), ("Second", "heading", 20, 30),
        ("Last", "heading", 31, 31),
    ]  # fmt: skip
    assert facts.doc == "What it is about."
    assert [each.target for each in facts.imports] == ["a.md", "b.png", "https://example.org/x_(y)"]
    assert {"use", "Thing", "code", "term", "a", "b", "c", "title"} <= set(facts.mentions)
    assert not {"What", "More", "one", "three", "ref", "Second"} & set(facts.mentions)


RST = """\
=====
Title
=====

.. note:: not this

.. _target: other.rst

What :class:`~a.Thing` is. More.

Part
----

A `link <page.rst>`_ and ``code``.

.. include:: part.rst

Deeper
~~~~~~

Next part
---------
"""


def test_restructuredtext():
    facts = parse("a.rst", RST.encode())
    assert [(each.name, each.start, each.end) for each in facts.definitions] == [
        ("Title", 2, 22), ("Part", 11, 20), ("Deeper", 18, 20), ("Next part", 21, 22),
    ]  # fmt: skip
    assert facts.doc == "What a.Thing is."
    assert [each.target for each in facts.imports] == ["other.rst", "page.rst", "part.rst"]
    assert {"Thing", "a", "code"} <= set(facts.mentions)


def test_keys_and_their_lines():
    toml = b'a = 1\n[tool.x]\nb = {c = 2}\n[[list]]\nd = 1\n"quoted key" = 3\n'
    assert [(each.name, each.start) for each in parse("a.toml", toml).definitions] == [
        ("a", 1), ("tool.x", 2), ("tool.x.b", 3), ("list", 4), ("list.d", 5), ("list.quoted key", 6),
    ]  # fmt: skip
    yaml = b"on:\n  push:\n    branches: [x]\n    deep:\n      deeper: 1\nlist:\n  - name: a\n"
    assert [each.name for each in parse("a.yml", yaml).definitions] == [
        "on",
        "on.push",
        "on.push.branches",
        "on.push.deep",
        "list",
    ]
    found = parse("a.json", b'{"a": {"b": [1, {"c": 2}]},\n "d": null}').definitions
    assert [(each.name, each.kind, each.start) for each in found] == [
        ("a", "key", 1),
        ("a.b", "key", 1),
        ("d", "key", 2),
    ]
    assert parse("a.json", b'{"a": ').error.startswith("does not parse whole")


def test_dots_in_keys():
    found = parse("a.json", b'{"files": {"a.py": 1}}').definitions
    assert [each.name for each in found] == ["files", 'files."a.py"']
    assert [each.name for each in parse("a.toml", b'[tool."a.b".c]\nd = 1\n').definitions] == ['tool."a.b".c']


def test_long_tables_take_no_time():
    assert parse("a.md", b"| a | b |\n" * 50_000).definitions == ()


def test_shebangs_tell_the_language():
    assert parse("tool", b"#!/usr/bin/env python3.11\ndef f(): ...\n").language == "Python"
    assert parse("tool", b"#!/bin/bash\nf() { :; }\n").language == "Shell"
    assert parse("tool", b"f() {}\n").language == ""


def test_an_unknown_file_has_no_names():
    facts = parse("a.xyz", b"class Thing { }\n")
    assert (facts.definitions, facts.mentions, facts.lines) == ((), (), 1)


NO_LINE_ENDS = ["", "\f", "\v", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
LINES = {
    "a.md": "# A\n\n<!-- {0} -->\n```\n{0}\n```\nText{0}x `a{0}b` [c](d{0}.md)\n\n## Target\n\nEnd.\n",
    "b.md": "---\na: {0}\n---\nText{0}x\n\nTarget\n======\n",
    "a.rst": "A\n=\n\n.. x{0}\n\nText{0}x ``a{0}b``\n\nTarget\n======\n\nend\n",
    "a.py": "'''{0}{0}'''  # {0}\n\ndef Target():\n    pass\n",
    "broken.py": "# {0}{0}\nimport os\n\ndef Target(:\n    pass\n",
    "newer.py": "# {0}{0}\n'''{0}'''\nclass Target[T]:\n    pass\n",
    "a.c": "/* {0} */\nint a;\n#define Target 1\n",
    "a.cu": "// {0}\n/* {0} */\n__global__ void Target() {{}}\n",
    "a.js": "// {0}x{0}\n/* {0} */\napp.Target = function () {{}};\n",
    "a.ts": "// {0}x{0}\n/* {0} */\nexport const Target = 1;\n",
    "a.go": "package a\n// {0}\n/* {0} */\ntype Target int\n",
    "go.mod": "// {0}{0}\n\nmodule Target\n",
    "a.rs": "// {0}\n/* {0} */\npub fn Target() {{}}\n",
    "A.java": "// {0}\n/* {0} */\nclass Target {{}}\n",
    "a.sh": "# {0}\n: '{0}'\nTarget() {{ :; }}\n",
    "a.toml": "b = 1\n[Target]\nc = 2\n",
    "a.yaml": "# {0}\na: 1\nTarget: 2\n",
}


def lines_of_target(name: str, text: str) -> tuple[list[int], list[int]]:
    """Where `Target` is, by the parser and by git; no end is behind the last line."""
    found = parse(name, text.encode())
    assert max(each.end for each in found.definitions) <= found.lines
    right = text[: text.index("Target")].count("\n") + 1
    return [each.start for each in found.definitions if each.name.rpartition(".")[2] == "Target"], [right]


@pytest.mark.parametrize("name", LINES)
def test_lines_are_those_of_git(name: str):
    for each in NO_LINE_ENDS:
        found, right = lines_of_target(name, LINES[name].format(each))
        assert found == right, repr(each)
    for text in (LINES[name].format("").replace("\n", "\r\n"), LINES[name].format("").replace("\n", "\r", 1)):
        found, right = lines_of_target(name, text)
        assert found == right, repr(text)


@pytest.mark.parametrize("name", ["a.md", "a.rst", "a.py", "a.c", "a.js", "A.java", "a.rs"])
def test_lone_carriage_returns_shift_nothing(name: str):
    found, right = lines_of_target(name, LINES[name].format("\r"))
    assert found == right
    facts = parse("a.py", b"import os\rimport sys\n\nx = (\r\n")
    assert [(each.target, each.line) for each in facts.imports] == [("os", 1), ("sys", 1)]
    assert facts.error.startswith("does not parse: line 3: ")


def headings(name: str, text: str) -> list[tuple[str, int]]:
    return [(each.name, each.start) for each in parse(name, text.encode()).definitions]


def test_headings_that_are_none():
    markdown = """\
<!--
# no

no
--
-->
# One
text <!-- a --> [a](a.md)

<!-- # no -->
- ```
  # no
  ```
<pre>
# no

# no
</pre>
<script>
# no
</script>

<details>
# no

## Two
</details>

    # no

> # quoted

Three
lines
---
# Four
---
<!-- [b](b.md) `c` -->
"""
    assert headings("a.md", markdown) == [("One", 7), ("Two", 26), ("Three lines", 33), ("Four", 36)]
    assert [(each.target, each.line) for each in parse("a.md", markdown.encode()).imports] == [("a.md", 8)]
    assert headings("a.md", "+++\n# no\n+++\n# One\n") == [("One", 4)]
    assert headings("a.md", "<!-- # no\n\nnever closed\n# no\n") == []
    rst = """\
One
===

..
   no
   ==

.. comment
   no
   --

::

   no
   --

.. also none
============

Two
---
"""
    assert headings("a.rst", rst) == [("One", 1), ("Two", 20)]


GENERATED = [
    ("a.py", "# Made.\n\n# Generated by x.\n# Do not edit.\nimport a\n"),
    ("a.py", '\ufeff#!/usr/bin/env python\n"""Doc."""\n# @generated\r\n'),
    ("a.js", "#!/usr/bin/env node\n'use strict';\n/**\n * @generated\n */\n"),
    ("a.ts", "/* eslint-disable */\n// Generated by x. DO NOT EDIT.\nexport {}"),
    ("a.go", "//go:build x\n\n// Code generated by x. DO NOT EDIT.\n\npackage a\n"),
    ("a.h", "#pragma once\n\n// @generated by x\n"),
    ("a.h", "#ifndef A_H\n#define A_H\n/* generated\n   do not modify */\n"),
    ("a.h", "#if !defined(A) \\\n  && !defined(B)\n#pragma once\n#include <a>\n// @generated by x\n"),
    ("a.rs", "#![allow(x)]\n// @generated\n"),
    ("a.sh", "#!/bin/sh\n# Generated by x; do not edit\n"),
    ("a.yml", "---\n# generated: do not edit\na: 1\n"),
    ("a.md", "---\na: 1\n---\n\n<!-- Generated by x, do not edit -->\n# T\n"),
    ("a.rst", "..\n   Generated by x,\n   do not edit.\n\nT\n=\n"),
    ("a.sql", "-- generated, do not edit\n"),
    ("a.html", "<!DOCTYPE html>\n<!-- @generated -->\n"),
    ("go.mod", "// Code generated, do not edit\nmodule a\n"),
]
WRITTEN = [
    ("a.py", '"""Doc.\n# @generated\n"""\nx = 1\n'),
    ("a.py", "'''\n# Generated by x. Do not edit.\n'''\n"),
    ("a.py", 'import a\nT = """\n# @generated\n"""\n'),
    ("a.py", 'T = """\n# @generated\n"""\n'),
    ("a.py", "import a\n# @generated\n"),
    ("a.py", "# Writes files.\rx = '@generated'\r"),
    ("a.py", '# Writes files that begin with "@generated" or `generated, do not edit`.\n'),
    ("a.js", "const T = `\n// Code generated, do not edit\n`;\n"),
    ("a.go", "package a\nvar T = `\n// Code generated by x. DO NOT EDIT.\n`\n"),
    ("a.h", '#define MARK "@generated"\n'),
    ("a.c", 'const char *t = "\\\n// @generated\\\n";\n'),
    ("a.cpp", 'auto t = R"(\n// @generated\n)";\n'),
    ("a.rs", 'const T: &str = "\n// @generated\n";\n'),
    ("A.java", 'String t = """\n// @generated\n""";\n'),
    ("a.sh", "cat <<EOF\n# Generated by x; do not edit\nEOF\n"),
    ("a.yml", "a: |\n  # generated: do not edit\n"),
    ("a.toml", 'a = """\n# @generated\n"""\n'),
    ("a.md", "# Generated code: do not edit it\n"),
    ("a.md", "```\n# @generated\n```\n\n* @generated files\n"),
    ("a.rst", ".. note:: Generated files: do not edit\n"),
    ("a.json", '{"a": "@generated"}'),
]


@pytest.mark.parametrize(("name", "text"), GENERATED)
def test_marks_of_generated_files(name: str, text: str):
    assert facts_of(name, text.encode()).generated


@pytest.mark.parametrize(("name", "text"), WRITTEN)
def test_a_mark_in_a_string_is_none(name: str, text: str):
    assert not facts_of(name, text.encode()).generated
