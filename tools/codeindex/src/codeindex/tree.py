"""Facts of the programming languages that tree-sitter parses: C, C++, CUDA, JavaScript, Go, Rust, Java, shell, ..."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterable

from tree_sitter import Language, Node, Parser, Query, QueryCursor

from codeindex.facts import NOT_ABOUT, Definition, Facts, Import, first_sentence
from codeindex.grammars import GRAMMARS, WRAPPERS, Grammar

_SIGNATURE = 240  # characters; longer ones end in an ellipsis
_EXPORT = re.compile(rb"^\s*export\b", re.MULTILINE)
_EXPORTED = re.compile(rb"\bexport\s*(?:\{[^}]*\}|default\s+\w+|=\s*\w+)")
_IDENTIFIER = re.compile(rb"[A-Za-z_$][\w$]*")


_DECLARATIONS = {
    *("variable_declarator", "lexical_declaration", "variable_declaration", "ambient_declaration"),
    *("function_declaration", "generator_function_declaration", "function_signature", "class_declaration"),
    *("abstract_class_declaration", "interface_declaration", "type_alias_declaration", "enum_declaration"),
    *("internal_module", "module"),
}


_SCOPE_KINDS = {
    *("class", "struct", "union", "interface", "trait", "enum", "record", "annotation"),
    *("scope", "namespace", "module", "object", "shape"),
}
_CODE_KINDS = {"function", "method", "constructor", "code"}
_PARTS = ("name", "declarator", "receiver")  # of a definition
_NAMES = {
    *("identifier", "field_identifier", "type_identifier", "qualified_identifier"),
    *("destructor_name", "operator_name", "template_function"),
}
_TEST_MACROS = {"TEST", "TEST_F", "TEST_P", "TYPED_TEST", "TYPED_TEST_P"}
_METHOD_PARENTS = {"class", "struct", "union", "interface", "trait", "record"}


@functools.cache
def _reader(name: str) -> tuple[Parser, Query]:
    grammar = GRAMMARS[name]
    language = Language(getattr(importlib.import_module(grammar.module), grammar.function)())
    return Parser(language), Query(language, grammar.query)


@dataclasses.dataclass
class _Found:
    """A definition or a scope, while the file is read."""

    node: Node
    kind: str
    name: str
    at: Node  # of the name
    public: bool = True


@dataclasses.dataclass
class _Source:
    """What is known of a file beside its definitions.

    Attributes:
        comments: those that begin their line.
        access: C++'s `public:` and the like, where they stand, by the id of what they are in.
        exported: the names that a JavaScript module exports, if any.
        exporting: whether only what a namespace exports is for others, by the id of its block.
    """

    text: bytes
    grammar: Grammar
    comments: list[Node] = dataclasses.field(default_factory=list)
    access: dict[int, list[tuple[int, str]]] = dataclasses.field(default_factory=dict)
    exported: set[str] | None = None
    exporting: dict[int, bool] = dataclasses.field(default_factory=dict)

    def says_public(self, found: _Found, kind: str) -> bool:
        """Whether a definition is meant for other files by what is written before its name."""
        before = self.text[found.node.start_byte : found.at.start_byte].decode("utf-8", "replace")
        return self.grammar.public(found.name, kind, before)

    def export(self, found: Iterable[_Found]) -> None:
        """Learn what a JavaScript module exports; of a file without exports, all is for others, and of one that only
        declares, where no list says what is."""
        if self.grammar.language in ("JavaScript", "TypeScript") and _EXPORT.search(self.text):
            clauses = _EXPORTED.findall(self.text)
            if self.grammar.declares and not clauses:
                return
            self.exported = {word.decode() for clause in clauses for word in _IDENTIFIER.findall(clause)}
            self.exported |= {each.name for each in found if _is_exported(each.node)}

    def exports(self, found: _Found, inside: _Found | None) -> bool:
        """Whether a module or a namespace with exports exports this."""
        if inside is None:
            return self.exported is None or _is_exported(found.node) or found.name.partition(".")[0] in self.exported
        block = inside.node.child_by_field_name("body")
        if block is None or block.type != "statement_block":
            return True
        if block.id not in self.exporting:
            self.exporting[block.id] = not self.grammar.declares and _exports_some(block)
        return not self.exporting[block.id] or _is_exported(found.node)


def parse_tree(text: bytes, name: str) -> Facts:
    """The facts of a source in one of `GRAMMARS`; what cannot be parsed is named, the rest is read."""
    grammar = GRAMMARS[name]
    parser, query = _reader(name)
    root = parser.parse(text).root_node
    if root.has_error and name in ("C", "C++", "CUDA"):
        root = parser.parse(_without_unknown(text)).root_node
    found: dict[tuple[int, int, str], _Found] = {}
    imports: list[Import] = []
    quiet: list[tuple[int, int]] = []
    source = _Source(text, grammar)
    for _, captures in QueryCursor(query).matches(root):
        if "quiet" in captures:
            node = captures["quiet"][0]
            quiet.append((node.start_byte, node.end_byte))
            before = text[text.rfind(b"\n", 0, node.start_byte) + 1 : node.start_byte]
            if "comment" in node.type and not before.strip():  # not behind code: that is about its line
                source.comments.append(node)
        elif "access" in captures:
            node = captures["access"][0]
            if node.parent is not None:
                source.access.setdefault(node.parent.id, []).append((node.start_byte, _text(node)))
        elif "import" in captures:
            node = captures["import"][0]
            imports += [Import(target, (), node.start_point.row + 1) for target in _targets(node, grammar.language)]
        else:
            kind = next(key for key in captures if not key.startswith("_") and key not in _PARTS)
            node = captures[kind][0]
            names = captures["name"] if "name" in captures else map(_declared, captures["declarator"])
            for at in filter(None, names):
                key = (node.start_byte, at.start_byte, _text(at))
                each = found.setdefault(key, _Found(node, kind, _full(at, captures), at))
                each.kind = _more_of(each.kind, kind)
    definitions = _definitions(list(found.values()), source)
    imports.sort(key=lambda each: each.line)
    return Facts(
        grammar.language,
        _leading(source.comments, definitions),
        tuple(definitions),
        tuple(imports),
        tuple(sorted(_mentions(text, quiet))),
        error_of(root),
    )


_SCOPED = {"variable": "object", "type": "shape"}
"""Kinds of definitions that can be scopes, and what they are called while they are."""
_SHOWN = {scoped: kind for kind, scoped in _SCOPED.items()}


def _more_of(kind: str, other: str) -> str:
    """What a definition is that two patterns match."""
    if "scope" in (kind, other) and (plain := kind if other == "scope" else other) in _SCOPED:
        return _SCOPED[plain]
    return other if kind == "variable" else kind


_UNKNOWN = re.compile(
    rb"""
    //[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | ^[ \t]*\#(?:\\\n|[^\n])*  # to be kept
    | (?P<keyword>\b(?:class|struct|union|enum(?:\s+(?:class|struct))?)\s+)
      (?P<of_type>[A-Z][A-Z0-9_]*(?:\([^()\n]*\))?)(?!\s+final\b)(?=\s+[A-Za-z_][\w:<>,\s]*?[:{])
    | (?P<default>=\s*\{[^{}()]*\}(?=\s*[,)]))
    | (?P<message>\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\(\s*(?:"(?:\\.|[^"\\\n])*"\s*)+\)(?=\s+[A-Za-z_]))
    | (?:->|\.)\s*operator(?P<operator>\[\]|\(\)|[-=+*/|&^<>!%~]+)(?=\s*\()
    | \b(?P<of_function>[A-Z][A-Z0-9]*_[A-Z0-9_]+)(?=\s+[A-Za-z_]\w*(?:\s*(?:::|<|[*&])|\s+[A-Za-z_~]))
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)


def _without_unknown(text: bytes) -> bytes:
    """C with spaces for what the grammar does not know: macros for compilers (`class LIBRARY_API Name {`,
    `LIBRARY_INLINE int f()`), braces as defaults (`int f(Options options = {})`) and operators called by name."""

    def blank(found: re.Match[bytes]) -> bytes:
        if found["operator"]:
            return found[0].replace(found["operator"], b"_" * len(found["operator"]))
        unknown = found["of_type"] or found["of_function"] or found["default"] or found["message"]
        return found[0] if unknown is None else (found["keyword"] or b"") + re.sub(rb"[^\n]", b" ", unknown)

    return _UNKNOWN.sub(blank, text)


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", "replace")


def _declared(node: Node) -> Node | None:
    """The name in a C declarator, behind pointers, references, parameters and parentheses: a function's or, in a
    typedef, a type's. None where it is a variable's, also of one that points to a function."""
    typedef, function = node.parent is not None and node.parent.type == "type_definition", False
    inner: Node | None = node
    while inner is not None:
        if inner.type == "operator_cast":
            return inner
        if inner.type in _NAMES:
            return inner if function or typedef else None
        if inner.type == "function_declarator":
            function = True
        points = inner.type == "parenthesized_declarator" and any(
            "pointer" in each.type for each in inner.named_children
        )
        if points and function and not typedef:
            return None
        children = inner.named_children
        inner = inner.child_by_field_name("declarator") or next(
            (each for each in children if "declarator" in each.type or "identifier" in each.type), None
        )
    return None


def _full(at: Node, captures: dict[str, list[Node]]) -> str:
    """A name on one line: the receiver's type before Go's methods, a test's two names for its macro."""
    name = " ".join(_text(at).split())
    if at.type == "operator_cast":
        return name.split("(")[0].strip()
    if "receiver" in captures:
        words = re.findall(r"[A-Za-z_]\w*", _text(captures["receiver"][0]).split("[")[0])
        return f"{words[-1]}.{name}" if words else name
    if "_of" in captures:
        return _from_outside(f"{_text(captures['_of'][0])}.{name[1:-1]}")
    if at.type == "string":  # a key
        return name.strip("\"'")
    if at.parent is not None and at.parent.type in ("assignment_expression", "augmented_assignment_expression"):
        return _assigned(at.parent, name)
    if name in _TEST_MACROS and at.parent is not None:
        given = at.parent.child_by_field_name("parameters")
        words = re.findall(r"\w+", _text(given)) if given is not None else []
        return ".".join(words) or name
    return name


_SUBSCRIPT = re.compile(r"""\[(["'])(.*?)\1\]""")
_CHAIN = re.compile(r"[\w$#.-]+")


def _assigned(node: Node, target: str) -> str:
    """The name that a JavaScript assignment gives a value."""
    value = node.child_by_field_name("right")
    if target in ("exports", "module.exports") and value is not None:
        named = value.child_by_field_name("name")
        return "" if value.type == "object" else _text(named) if named is not None else target
    return _from_outside(target)


def _from_outside(target: str) -> str:
    """What is assigned to, as others name it: `exports.a` -> `a`, `A.prototype["b"]` -> `A.b`."""
    name = _SUBSCRIPT.sub(r".\2", target.replace(" ", ""))
    name = re.sub(r"^(?:(?:module\.)?exports|this)\.|\.prototype\b", "", name)
    return name if _CHAIN.fullmatch(name) else name.rpartition(".")[2]


def _targets(node: Node, language: str) -> list[str]:
    text = " ".join(_text(node).split())
    if language == "Java":
        return [text.removeprefix("import ").removeprefix("static ").rstrip("; ")]
    if language == "Rust":
        return _use_paths(re.sub(r"\s+as\s+\w+", "", text).replace(" ", ""))
    return [text.strip("\"'`<>")]


def _use_paths(text: str) -> list[str]:
    """`a::{b, c::d}` -> `a::b`, `a::c::d`."""
    if "{" not in text:
        return [text.removesuffix("::*")]
    before, _, rest = text.partition("{")
    inside = rest[: rest.rfind("}")]
    parts, depth, start = [], 0, 0
    for at, character in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append(inside[start:at])
            start = at + 1
    parts.append(inside[start:])
    return [
        path
        for part in parts
        if part
        for path in _use_paths(before.rstrip(":") + ("" if part == "self" else f"::{part}"))
    ]


def _definitions(found: list[_Found], source: _Source) -> list[Definition]:
    """In the order of the file, with the names of the scopes around them."""
    found.sort(key=lambda each: (each.node.start_byte, -each.node.end_byte, each.at.start_byte))
    source.export(found)
    private = _private_types(found, source)
    ends = {_last_row(node): node for node in source.comments}
    separator = source.grammar.separator
    outer: list[_Found] = []
    made: list[Definition] = []
    for each in found:
        while outer and outer[-1].node.end_byte <= each.node.start_byte:
            outer.pop()
        around = [other for other in outer if _is_around(other, each)]
        scopes = [other for other in around if other.kind in _SCOPE_KINDS]
        inside = scopes[-1] if scopes else None
        local = any(other.kind in _CODE_KINDS for other in around)
        if each.kind in _SCOPE_KINDS | _CODE_KINDS:
            outer.append(each)
        if each.kind == "scope":
            each.public = source.exports(each, inside) and private.isdisjoint(_implemented(each.node))
        if each.kind in ("scope", "code") or (each.kind == "declaration" and local) or _is_guard(each.node):
            continue
        kind = _kind(each, inside)
        each.public = (
            not local
            and all(scope.public for scope in scopes)
            and (source.says_public(each, kind) or _as_its_trait(each.node))
            and _accessible(each.node, source.access)
            and source.exports(each, inside)
        )
        start = each.node if each.node.type == "type_definition" else each.at
        doc = ends.get(_first_row(each.node) - 1)
        made.append(
            Definition(
                separator.join([*(scope.name for scope in scopes if scope.name), each.name]),
                f"local {kind}" if local else kind,
                start.start_point.row + 1,
                _last_row(each.node) + 1,
                signature(each.node),
                first_sentence(_comment(ends, doc)) if doc is not None else "",
                each.public,
            )
        )
    return made


def _is_around(other: _Found, each: _Found) -> bool:
    """Whether a definition holds another; in JavaScript's `a.b = a.c = function` none does."""
    if other.node.end_byte < each.node.end_byte or other.at is each.at:
        return False
    node = each.node.parent
    while node is not None and node.type == "assignment_expression" and node != other.node:
        node = node.parent
    return node != other.node or node.type != "assignment_expression"


def _is_guard(node: Node) -> bool:
    """Whether it is the macro by which a header is included once: without a value, under an #ifndef of its name."""
    above = node.parent
    if node.type != "preproc_def" or node.child_by_field_name("value") is not None or above is None:
        return False
    name, tested = node.child_by_field_name("name"), above.child_by_field_name("name")
    guarded = above.type == "preproc_ifdef" and above.children[0].type == "#ifndef"
    return guarded and name is not None and tested is not None and name.text == tested.text


def _kind(found: _Found, inside: _Found | None) -> str:
    if found.kind == "method" and inside is not None and not inside.name:
        return "function"  # in what a JavaScript module exports
    if found.kind not in ("function", "declaration"):
        return _SHOWN.get(found.kind, found.kind)
    member = inside is not None and (inside.kind in _METHOD_PARENTS or inside.node.type == "impl_item")
    return "method" if member or "::" in found.name or _MEMBER.search(_text(found.at)) else "function"


_MEMBER = re.compile(r"^this\b|\.prototype\b")


def _is_exported(node: Node) -> bool:
    """Whether a JavaScript declaration is of an `export`, or one that is for all modules."""
    outer: Node | None = node
    while outer is not None and outer.type in _DECLARATIONS:
        if outer.type == "module" and outer.named_children[0].type == "string":
            return True
        outer = outer.parent
    if outer is None or outer.type == "export_statement":
        return outer is not None
    return any(each.type == "global" for each in (outer.parent or outer).children)


def _exports_some(block: Node) -> bool:
    """Whether a namespace exports what it says; all that is only declared is exported."""
    outer: Node | None = block
    while outer is not None and outer.type != "ambient_declaration":
        outer = outer.parent
    return outer is None and any(each.type == "export_statement" for each in block.children)


def _private_types(found: list[_Found], source: _Source) -> set[str]:
    """The types and traits of a Rust file that others cannot name."""
    if source.grammar.language != "Rust":
        return set()
    types = (each for each in found if each.kind in ("struct", "enum", "union", "trait", "type"))
    return {each.name for each in types if not source.says_public(each, each.kind)}


def _implemented(node: Node) -> set[str]:
    """The names of the type, and of the trait if any, that a Rust `impl` is for; none of other nodes."""
    if node.type != "impl_item":
        return set()
    parts = filter(None, map(node.child_by_field_name, ("type", "trait")))
    return {re.split(r"[<(]", _text(part))[0].rpartition("::")[2].strip() for part in parts}


def _as_its_trait(node: Node) -> bool:
    """Whether this is an item of a Rust trait, or of an `impl` of one, which is as public as these are; or an exported
    macro."""
    if node.type == "macro_definition":
        above = node.prev_named_sibling
        while above is not None and above.type in ("attribute_item", "line_comment", "block_comment"):
            if above.type == "attribute_item" and "macro_export" in _text(above):
                return True
            above = above.prev_named_sibling
        return False
    around = node.parent.parent if node.parent is not None else None
    return around is not None and (
        around.type == "trait_item" or (around.type == "impl_item" and around.child_by_field_name("trait") is not None)
    )


def _accessible(node: Node, access: dict[int, list[tuple[int, str]]]) -> bool:
    """Whether a member of a C++ class is public or protected."""
    outer = _outermost(node).parent
    if outer is None or outer.type != "field_declaration_list":
        return True
    said = [word for start, word in access.get(outer.id, ()) if start < node.start_byte]
    if said:
        return said[-1] != "private"
    return outer.parent is None or outer.parent.type != "class_specifier"


def _first_row(node: Node) -> int:
    return _outermost(node).start_point.row


def _outermost(node: Node) -> Node:
    """A definition with what stands before it: template<...>, export."""
    parent = node.parent
    while parent is not None and parent.type in ("template_declaration", "export_statement"):
        node, parent = parent, parent.parent
    return node


def _last_row(node: Node) -> int:
    """Some grammars give a comment the end of its line."""
    return node.end_point.row - (node.end_point.column == 0)


def _comment(ends: dict[int, Node], last: Node) -> str:
    """A comment, with the line comments right above it, without its marks."""
    lines = [last]
    while (above := ends.get(lines[0].start_point.row - 1)) is not None and _text(above).startswith(("//", "#")):
        lines.insert(0, above)
    return "\n".join(_unmarked(_text(each)) for each in lines)


def _unmarked(text: str) -> str:
    text = re.sub(r"^/\*+!?|\*+/$", "", text.strip())
    return "\n".join(
        re.sub(r"^\s*(?:///?<?!?|//!?|\*(?!\w)|#+)\s?", "", line).rstrip() for line in text.split("\n")
    ).strip()


def _leading(comments: list[Node], definitions: list[Definition]) -> str:
    """The first comment of the file that is not about licences or editors, before any definition."""
    first = min((each.start for each in definitions), default=1 << 31)
    ends = {_last_row(node): node for node in comments}
    tops = [node for node in comments if _last_row(node) + 1 < first and not _text(node).startswith("#!")]
    at = 0
    while at < len(tops):
        block = [tops[at]]
        while at + 1 < len(tops) and tops[at + 1].start_point.row == _last_row(block[-1]) + 1:
            at += 1
            block.append(tops[at])
        at += 1
        if _last_row(block[-1]) + 2 == first and len(ends) > 1 and block[0].start_point.row > 0:
            continue  # it is about the definition below
        text = "\n".join(_unmarked(_text(each)) for each in block)
        if text and not NOT_ABOUT.search(text):
            return first_sentence(text)
    return ""


def signature(node: Node) -> str:
    """A definition up to its body, on one line."""
    body = _body(node)
    end = body.start_byte if body is not None else node.end_byte
    raw = (node.text or b"")[: end - node.start_byte].decode("utf-8", "replace")
    if body is None and node.type.startswith("preproc"):
        raw = raw.split("\\\n")[0].split("\n")[0]
    line = " ".join(raw.split()).removesuffix("=>").rstrip("{=:; ")
    return line if len(line) <= _SIGNATURE else line[: _SIGNATURE - 1] + "…"


def _body(node: Node) -> Node | None:
    """What a definition's signature ends before, also of a value with a name."""
    inner: Node | None = node
    while inner is not None:
        if inner.type in ("object", "object_type", "parenthesized_expression"):
            return inner
        if inner.type == "interface_type":  # of Go
            return next((each for each in inner.children if each.type == "{"), None)
        body = inner.child_by_field_name("body")
        if body is not None:
            return body
        if inner.type in WRAPPERS:
            inner = inner.named_children[0]
        else:
            inner = next(
                filter(None, map(inner.child_by_field_name, _VALUES.get(inner.type, ("value", "right")))), None
            )
    return None


_VALUES = {"type_spec": ("type",), "type_alias": ("type",)}
"""The field where a definition has its value, if it is another than usual."""


def _mentions(text: bytes, quiet: list[tuple[int, int]]) -> set[str]:
    parts, at = [], 0
    for start, end in sorted(quiet):
        if start > at:
            parts.append(text[at:start])
        at = max(at, end)
    parts.append(text[at:])
    return {word.decode() for word in _IDENTIFIER.findall(b" ".join(parts))}


def error_of(root: Node) -> str:
    """The first place that does not parse, or nothing."""
    if not root.has_error:
        return ""
    node = root
    while not (node.is_error or node.is_missing):
        inner = next((each for each in node.children if each.has_error or each.is_missing), None)
        if inner is None:
            break
        node = inner
    return f"does not parse whole: line {node.start_point.row + 1}"
