from __future__ import annotations

import doctest

import pytest
from codeindex import facts, markdown, names
from codeindex.languages import parse


@pytest.mark.parametrize("module", [facts, markdown, names], ids=lambda module: module.__name__)
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
    assert parse("a.md", b"| a | b |\n" * 200_000).definitions == ()


def test_shebangs_tell_the_language():
    assert parse("tool", b"#!/usr/bin/env python3.11\ndef f(): ...\n").language == "Python"
    assert parse("tool", b"#!/bin/bash\nf() { :; }\n").language == "Shell"
    assert parse("tool", b"f() {}\n").language == ""


def test_an_unknown_file_has_no_names():
    facts = parse("a.xyz", b"class Thing { }\n")
    assert (facts.definitions, facts.mentions, facts.lines) == ((), (), 1)
