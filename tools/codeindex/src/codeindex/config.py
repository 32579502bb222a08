"""Facts of TOML, YAML and JSON: their keys, and where they stand."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Iterator

from tree_sitter import Language, Node, Parser

from codeindex.facts import Definition, Facts, leading_comment
from codeindex.tree import error_of

DEPTH = 3
"""Keys further inside are data more often than names."""
_MODULES = {"TOML": "tree_sitter_toml", "YAML": "tree_sitter_yaml", "JSON": "tree_sitter_json"}
_PAIRS = ("pair", "block_mapping_pair", "flow_pair", "table", "table_array_element")
_PARTS = re.compile(r"'[^']*'|\"[^\"]*\"|[^.\s]+")  # of a dotted key
_LISTS = ("array", "block_sequence", "flow_sequence")


@functools.cache
def _parser(language: str) -> Parser:
    return Parser(Language(importlib.import_module(_MODULES[language]).language()))


def parse_config(text: bytes, language: str) -> Facts:
    """The keys down to `DEPTH`, joined by dots, with the lines of what they hold; not those inside of lists."""
    root = _parser(language).parse(text).root_node
    doc = leading_comment(text.decode("utf-8", "replace"))
    return Facts(language, doc, tuple(_keys(root.named_children, "", 1)), error=error_of(root))


def _keys(nodes: Iterable[Node], scope: str, depth: int) -> Iterator[Definition]:
    for node in nodes:
        if node.type in _LISTS:
            continue
        if node.type not in _PAIRS:
            yield from _keys(node.named_children, scope, depth)
            continue
        if not node.named_children:
            continue
        key, *inside = node.named_children
        name = " ".join((key.text or b"").decode("utf-8", "replace").split())
        if key.type == "dotted_key":
            level = depth + len(_PARTS.findall(name)) - 1
        else:
            name, level = name.strip("\"'"), depth
            name = f'"{name}"' if "." in name else name  # as TOML writes it
        if not name or level > DEPTH:
            continue
        full = f"{scope}.{name}" if scope else name
        first, last = node.start_point.row + 1, node.end_point.row + (node.end_point.column > 0)
        yield Definition(full, "key", first, max(first, last))
        yield from _keys(inside, full, level + 1)


def parse_go_module(text: bytes) -> Facts:
    """A go.mod: the path that the packages in its folder are imported by."""
    lines = text.decode("utf-8", "replace").split("\n")
    found = ((line.split(), number) for number, line in enumerate(lines, 1))
    modules = (
        Definition(words[1].strip('"'), "module", number, number)
        for words, number in found if words[:1] == ["module"] and len(words) > 1
    )  # fmt: skip
    return Facts("Go module", definitions=tuple(modules))
