"""Facts of a Python file, also of one that is newer than the Python that runs, or broken."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import platform
import re
import textwrap
from collections.abc import Iterable, Iterator

import tree_sitter_python
from tree_sitter import Language, Node, Parser

from codeindex.facts import Definition, Facts, first_sentence, leading_comment
from codeindex.python import exported_names, imported, is_public, parse_python
from codeindex.tree import signature

_KINDS = {"class_definition": "class", "function_definition": "function", "class": "class", "def": "function"}
_BLOCKS = ("_statement", "_clause", "block", "decorated_definition")  # what can hold definitions ends so
_BEGINNING = re.compile(r"^[ \t]*(?:async[ \t]+)?(class|def)[ \t]+([^\W\d]\w*)", re.MULTILINE)
_IMPORTS = ("import_statement", "import_from_statement", "future_import_statement")
_NOT_NAMES = {
    *(("function_definition", "name"), ("class_definition", "name"), ("keyword_argument", "name")),
    *(("global_statement", ""), ("nonlocal_statement", "")),
}
_BOUND = {  # the file's own names: parent and field
    *(("assignment", "left"), ("augmented_assignment", "left"), ("named_expression", "name")),
    *(("for_statement", "left"), ("for_in_clause", "left"), ("as_pattern_target", "")),
    *(("parameters", ""), ("lambda_parameters", ""), ("typed_parameter", "")),
    *(("default_parameter", "name"), ("typed_default_parameter", "name")),
    *(("pattern_list", ""), ("tuple_pattern", ""), ("list_pattern", "")),
    *(("list_splat_pattern", ""), ("dictionary_splat_pattern", ""), ("del_statement", "")),
}


@functools.cache
def _parser() -> Parser:
    return Parser(Language(tree_sitter_python.language()))


def parse_any_python(text: str) -> Facts:
    """The facts of a Python source; of one that this Python does not take, the error and what another parser finds."""
    try:
        return parse_python(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
        message = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
        version = ".".join(platform.python_version_tuple()[:2])
        return parse_tree(text, f"does not parse: {line}{message} (Python {version})")


def parse_tree(text: str, error: str = "") -> Facts:
    """The facts of a Python source from a parser that knows all versions and goes on behind what it does not know."""
    root = _parser().parse(text.encode("utf-8", "replace")).root_node
    own = (node for node in root.named_children if _text(node).startswith("__all__"))
    exported = exported_names(_parsed(own))
    imports, mentions = imported(_parsed(_import_nodes(root)))
    top = [root] if root.type == "ERROR" else root.children
    found = _definitions(top, "", exported, within="module", public=True)
    return Facts(
        "Python",
        first_sentence(_docstring(root)) or leading_comment(text),
        tuple(sorted(found, key=lambda each: each.start)),
        tuple(sorted(imports, key=lambda each: each.line)),
        tuple(sorted((mentions | _mentions(root)) - {"*"})),
        error,
    )


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", "replace")


def _parsed(nodes: Iterable[Node]) -> ast.Module:
    """Simple statements as Python's own parser sees them, on their lines; not those that it refuses."""
    body: list[ast.stmt] = []
    for node in nodes:
        with contextlib.suppress(SyntaxError, ValueError):
            for statement in ast.parse(textwrap.dedent(_text(node))).body:
                body.append(ast.increment_lineno(statement, node.start_point.row))
    return ast.Module(body, [])


def _import_nodes(root: Node) -> Iterator[Node]:
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if node.type in _IMPORTS:
            yield node
        elif node.type == "module" or node.type.endswith((*_BLOCKS, "_definition", "ERROR")):
            nodes += reversed(node.named_children)


def _definitions(
    nodes: Iterable[Node], scope: str, exported: set[str] | None, *, within: str, public: bool
) -> Iterator[Definition]:
    """Of a block, in a module, a class or a function (`within`), that is `public` or not."""
    for node in nodes:
        kind, at = _KINDS.get(node.type), node.child_by_field_name("name")
        if kind is not None and at is not None:
            name = _text(at)
            shown = public and within != "function" and is_public(name, exported)
            first, last = node.start_point.row + 1, _end(node).end_point.row + 1
            doc = first_sentence(_docstring(node))
            yield Definition(f"{scope}{name}", _label(kind, within), first, last, _signature(node), doc, shown)
            yield from _definitions(_inside(node), f"{scope}{name}.", None, within=kind, public=shown)
        elif node.type == "ERROR":
            found = list(_definitions(node.children, scope, exported, within=within, public=public))
            known = {each.start for each in found}
            broken = _by_line(node, scope, exported, within=within, public=public)
            yield from (*found, *(each for each in broken if each.start not in known))
        elif within == "module" and node.type in ("assignment", "type_alias_statement"):
            yield from _variables(node, exported)
        elif node.type.endswith(_BLOCKS):
            yield from _definitions(node.children, scope, exported, within=within, public=public)


def _label(kind: str, within: str) -> str:
    label = "method" if kind == "function" and within == "class" else kind
    return f"local {label}" if within == "function" else label


def _signature(node: Node) -> str:
    if any(each.type == "ERROR" for each in node.children):
        return _text(node).split("\n")[0].rstrip("(: ")
    return signature(node)


def _by_line(node: Node, scope: str, exported: set[str] | None, *, within: str, public: bool) -> Iterator[Definition]:
    """Of what does not parse at all: what its lines begin."""
    text = _text(node)
    for each in _BEGINNING.finditer(text):
        line = node.start_point.row + text.count("\n", 0, each.start(1)) + 1
        shown = public and within != "function" and is_public(each[2], exported)
        label = _label(_KINDS[each[1]], within)
        yield Definition(f"{scope}{each[2]}", label, line, line, each[0].strip(), "", shown)


def _end(node: Node) -> Node:
    """The last part of a definition that is no comment; blocks take comments behind them in."""
    while (inside := [each for each in node.children if each.type != "comment"]) and node.type != "string":
        node = inside[-1]
    return node


def _inside(node: Node) -> list[Node]:
    """What a definition's body holds, and what was not parsed before it."""
    return [*(each for each in node.children if each.type == "ERROR"), *_body(node)]


def _body(node: Node) -> list[Node]:
    body = node.child_by_field_name("body") if node.type != "module" else node
    return body.children if body is not None else []


def _variables(node: Node, exported: set[str] | None) -> Iterator[Definition]:
    """What an assignment or a `type` statement of a module defines."""
    kind, note, first, last = "type", "", node.start_point.row + 1, node.end_point.row + 1
    left, annotation = node.child_by_field_name("left"), node.child_by_field_name("type")
    names = [left] if left is not None else []
    if node.type == "assignment":
        kind, note = "variable", f": {_text(annotation)}" if annotation is not None else ""
        names = left.named_children if left is not None and left.type.endswith(("_list", "_pattern")) else names
    else:
        while names and names[0].type != "identifier":  # behind the parameters
            names = names[0].named_children[:1]
    for each in names:
        if each.type == "identifier":
            name = _text(each)
            shown = signature(node) if kind == "type" else name + note
            yield Definition(name, kind, first, last, shown, "", is_public(name, exported))
    more = node.child_by_field_name("right")
    if more is not None and more.type == "assignment":
        yield from _variables(more, exported)


def _docstring(node: Node) -> str:
    first = next((each for each in _body(node) if each.is_named and each.type != "comment"), None)
    if first is None or first.type != "expression_statement":
        return ""
    try:
        value = ast.literal_eval(textwrap.dedent(_text(first)))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ""
    return inspect.cleandoc(value) if isinstance(value, str) else ""


def _mentions(root: Node) -> set[str]:
    """Names that the file does not bind itself, and attributes."""
    own, names, attributes = set(), set(), set()
    nodes = [root]
    while nodes:
        node = nodes.pop()
        for number, each in enumerate(node.children):
            if each.type != "identifier":
                nodes += [each] if each.type not in _IMPORTS else []
                continue
            place = (node.type, node.field_name_for_child(number) or "")
            if place == ("attribute", "attribute"):
                attributes.add(_text(each))
            elif place in _BOUND:
                own.add(_text(each))
            elif place not in _NOT_NAMES:
                names.add(_text(each))
    return (names - own) | attributes
