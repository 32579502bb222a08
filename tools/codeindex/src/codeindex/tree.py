"""Facts of the programming languages that tree-sitter parses: C, C++, CUDA, JavaScript, Go, Rust, Java, shell, ..."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Callable

from tree_sitter import Language, Node, Parser, Query, QueryCursor

from codeindex.facts import NOT_ABOUT, Definition, Facts, Import, first_sentence

_SIGNATURE = 240  # characters; longer ones end in an ellipsis
_EXPORT = re.compile(rb"^\s*export\b", re.MULTILINE)
_EXPORTED = re.compile(rb"\bexport\s*(?:\{[^}]*\}|default\s+\w+)")
_IDENTIFIER = re.compile(rb"[A-Za-z_$][\w$]*")


@dataclasses.dataclass(frozen=True)
class Grammar:
    """How to read one language.

    Attributes:
        language: its name.
        module: the Python package of the grammar, and the function in it.
        query: captures. `@KIND` is a definition, with `@name` for its name (else the declarator's); `@scope` surrounds
            others and gives them its `@name`; `@import` is what is asked for; `@quiet` are comments and strings;
            `@access` changes the access of what follows.
        separator: between a scope and a name.
        public: whether a definition is meant for other files, by its name, its kind and the text before its name.
    """

    language: str
    module: str
    function: str
    query: str
    separator: str = "."
    public: Callable[[str, str, str], bool] = lambda name, kind, before: (
        not name.startswith(("_", "#")) and "private" not in before.split()
    )


_C = """
(comment) @quiet (string_literal) @quiet (system_lib_string) @quiet (char_literal) @quiet
(preproc_include path: (_) @import)
(preproc_def name: (_) @name) @macro
(preproc_function_def name: (_) @name) @macro
(function_definition declarator: (_) @declarator) @function
(struct_specifier name: (_) @name body: (_)) @struct
(union_specifier name: (_) @name body: (_)) @union
(enum_specifier name: (_) @name body: (_)) @enum
(type_definition declarator: (_) @declarator) @type
(declaration declarator: (_) @declarator) @declaration
"""
_CPP = (
    _C
    + """
(raw_string_literal) @quiet (access_specifier) @access
(namespace_definition name: (_) @name) @scope
(class_specifier name: (_) @name body: (_)) @class
(alias_declaration name: (_) @name) @type
(concept_definition name: (_) @name) @concept
(field_declaration declarator: (_) @declarator) @method
"""
)
_JS = """
(comment) @quiet (string) @quiet (template_string) @quiet (regex) @quiet
(import_statement source: (string) @import)
(export_statement source: (string) @import)
(call_expression function: [(import) (identifier) @_require] arguments: (arguments . (string) @import)
  (#any-of? @_require "require"))
(function_declaration name: (_) @name) @function
(generator_function_declaration name: (_) @name) @function
(class_declaration name: (_) @name) @class
(method_definition name: (_) @name) @method
(program (lexical_declaration (variable_declarator name: (identifier) @name) @variable))
(program (variable_declaration (variable_declarator name: (identifier) @name) @variable))
(program (export_statement (lexical_declaration (variable_declarator name: (identifier) @name) @variable)))
"""
_TS = (
    _JS
    + """
(abstract_class_declaration name: (_) @name) @class
(interface_declaration name: (_) @name) @interface
(type_alias_declaration name: (_) @name) @type
(enum_declaration name: (_) @name) @enum
(function_signature name: (_) @name) @function
(method_signature name: (_) @name) @method
(abstract_method_signature name: (_) @name) @method
(internal_module name: (_) @name) @namespace
"""
)
_GO = """
(comment) @quiet (interpreted_string_literal) @quiet (raw_string_literal) @quiet
(import_spec path: (_) @import)
(function_declaration name: (_) @name) @function
(method_declaration receiver: (_) @receiver name: (_) @name) @method
(type_spec name: (_) @name) @type
(type_alias name: (_) @name) @type
(source_file (const_declaration (const_spec name: (identifier) @name) @constant))
(source_file (var_declaration (var_spec name: (identifier) @name) @variable))
"""
_RUST = """
(line_comment) @quiet (block_comment) @quiet (string_literal) @quiet (raw_string_literal) @quiet
(use_declaration argument: (_) @import)
(mod_item name: (_) @import !body)
(mod_item name: (_) @name body: (_)) @module
(function_item name: (_) @name) @function
(function_signature_item name: (_) @name) @function
(struct_item name: (_) @name) @struct
(enum_item name: (_) @name) @enum
(union_item name: (_) @name) @union
(trait_item name: (_) @name) @trait
(type_item name: (_) @name) @type
(const_item name: (_) @name) @constant
(static_item name: (_) @name) @constant
(macro_definition name: (_) @name) @macro
(impl_item type: (_) @name) @scope
"""
_JAVA = """
(line_comment) @quiet (block_comment) @quiet (string_literal) @quiet
(import_declaration) @import
(class_declaration name: (_) @name) @class
(interface_declaration name: (_) @name) @interface
(enum_declaration name: (_) @name) @enum
(record_declaration name: (_) @name) @record
(annotation_type_declaration name: (_) @name) @annotation
(method_declaration name: (_) @name) @method
(constructor_declaration name: (_) @name) @constructor
"""
_SHELL = """
(comment) @quiet (raw_string) @quiet
(function_definition name: (_) @name) @function
(command name: (command_name (word) @_source) . argument: (_) @import (#any-of? @_source "source" "."))
"""


def _not_private(name: str, kind: str, before: str) -> bool:
    return "private" not in before.split()


def _not_static(name: str, kind: str, before: str) -> bool:
    return kind == "method" or "static" not in before.split()


def _capital(name: str, kind: str, before: str) -> bool:
    return name.rpartition(".")[2][:1].isupper()


def _pub(name: str, kind: str, before: str) -> bool:
    return "pub" in before.split()


GRAMMARS = {
    "C": Grammar("C", "tree_sitter_c", "language", _C, "::", _not_static),
    "C++": Grammar("C++", "tree_sitter_cpp", "language", _CPP, "::", _not_static),
    "CUDA": Grammar("CUDA", "tree_sitter_cuda", "language", _CPP, "::", _not_static),
    "JavaScript": Grammar("JavaScript", "tree_sitter_javascript", "language", _JS),
    "TypeScript": Grammar("TypeScript", "tree_sitter_typescript", "language_typescript", _TS),
    "TSX": Grammar("TypeScript", "tree_sitter_typescript", "language_tsx", _TS),
    "Go": Grammar("Go", "tree_sitter_go", "language", _GO, public=_capital),
    "Rust": Grammar("Rust", "tree_sitter_rust", "language", _RUST, "::", _pub),
    "Java": Grammar("Java", "tree_sitter_java", "language", _JAVA, public=_not_private),
    "Shell": Grammar("Shell", "tree_sitter_bash", "language", _SHELL),
}

_SCOPE_KINDS = {
    *("class", "struct", "union", "interface", "trait", "enum", "record", "annotation"),
    *("scope", "namespace", "module"),
}
_CODE_KINDS = {"function", "method", "constructor", "variable"}
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
    """

    text: bytes
    grammar: Grammar
    comments: list[Node] = dataclasses.field(default_factory=list)
    access: dict[int, list[tuple[int, str]]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def exported(self) -> set[str] | None:
        """The names that a JavaScript module exports in a list of its own; None of a file without exports."""
        if self.grammar.language not in ("JavaScript", "TypeScript") or not _EXPORT.search(self.text):
            return None
        clauses = _EXPORTED.findall(self.text)
        return {word.decode() for clause in clauses for word in _IDENTIFIER.findall(clause)}

    def exports(self, found: _Found) -> bool:
        """Whether a module with exports exports this; of another file, all is for others."""
        if self.exported is None:
            return True
        node: Node | None = found.node
        for _ in range(3):
            if node is not None and node.type == "export_statement":
                return True
            node = None if node is None else node.parent
        return found.name in self.exported


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
            kind = next(key for key in captures if key not in ("name", "declarator", "receiver"))
            node = captures[kind][0]
            names = captures["name"] if "name" in captures else map(_declared, captures["declarator"])
            for at in filter(None, names):
                key = (node.start_byte, at.start_byte, _text(at))
                found.setdefault(key, _Found(node, kind, _full(at, captures), at))
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
    if name in _TEST_MACROS and at.parent is not None:
        given = at.parent.child_by_field_name("parameters")
        words = re.findall(r"\w+", _text(given)) if given is not None else []
        return ".".join(words) or name
    return name


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
    ends = {_last_row(node): node for node in source.comments}
    separator = source.grammar.separator
    outer: list[_Found] = []
    made: list[Definition] = []
    for each in found:
        while outer and outer[-1].node.end_byte <= each.node.start_byte:
            outer.pop()
        around = [other for other in outer if other.node.end_byte >= each.node.end_byte and other.at is not each.at]
        scopes = [other for other in around if other.kind in _SCOPE_KINDS]
        local = any(other.kind in _CODE_KINDS for other in around)
        if each.kind in _SCOPE_KINDS | _CODE_KINDS:
            outer.append(each)
        if each.kind == "scope" or (each.kind == "declaration" and local):
            continue
        kind = _kind(each, scopes[-1] if scopes else None)
        before = source.text[each.node.start_byte : each.at.start_byte].decode("utf-8", "replace")
        each.public = (
            not local
            and all(scope.public for scope in scopes)
            and source.grammar.public(each.name, kind, before)
            and _accessible(each.node, source.access)
            and (bool(scopes) or source.exports(each))
        )
        start = each.node if each.node.type == "type_definition" else each.at
        doc = ends.get(_first_row(each.node) - 1)
        made.append(
            Definition(
                separator.join([*(scope.name for scope in scopes), each.name]),
                f"local {kind}" if local else kind,
                start.start_point.row + 1,
                each.node.end_point.row + 1,
                _signature(each.node),
                first_sentence(_comment(ends, doc)) if doc is not None else "",
                each.public,
            )
        )
    return made


def _kind(found: _Found, inside: _Found | None) -> str:
    if found.kind not in ("function", "declaration"):
        return found.kind
    member = inside is not None and (inside.kind in _METHOD_PARENTS or inside.node.type == "impl_item")
    return "method" if member or "::" in found.name else "function"


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


def _signature(node: Node) -> str:
    """A definition up to its body, on one line."""
    body = node.child_by_field_name("body")
    end = body.start_byte if body is not None else node.end_byte
    raw = (node.text or b"")[: end - node.start_byte].decode("utf-8", "replace")
    if body is None and node.type.startswith("preproc"):
        raw = raw.split("\\\n")[0].split("\n")[0]
    line = " ".join(raw.split()).rstrip("{=:; ")
    return line if len(line) <= _SIGNATURE else line[: _SIGNATURE - 1] + "…"


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
