"""What a definition is in each of the programming languages that tree-sitter parses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """How to read one language.

    Attributes:
        language: its name.
        module: the Python package of the grammar, and the function in it.
        query: captures. `@KIND` is a definition, with `@name` for its name (else the declarator's); `@scope` surrounds
            others and gives them its `@name`; what is in `@code` is local; `@receiver` is the type of a method;
            `@import` is what is asked for; `@quiet` are comments and strings; `@access` changes the access of what
            follows. Captures that begin with an underscore are for conditions.
        separator: between a scope and a name.
        public: whether a definition is meant for other files, by its name, its kind and the text before its name.
        declares: whether all in a file is only declared.
    """

    language: str
    module: str
    function: str
    query: str
    separator: str = "."
    public: Callable[[str, str, str], bool] = lambda name, kind, before: (
        not _last(name).startswith(("_", "#")) and "private" not in before.split()
    )
    declares: bool = False


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
_FUNCTION = "[(arrow_function) (function_expression) (generator_function)]"
_TARGET = "[(identifier) (member_expression) (subscript_expression index: (string))]"
_KEY = "[(property_identifier) (private_property_identifier) (string)]"
WRAPPERS = ("parenthesized_expression", "as_expression", "satisfies_expression")
"""Expressions around a value of JavaScript or TypeScript that leave it what it is."""
_NAMED = (  # what gives a value a name, up to the value, and what a function there is, and an object
    ('export_statement "default" @name value:', "function", "object"),
    ("variable_declarator name: (identifier) @name value:", "function", "scope"),
    (f"assignment_expression left: {_TARGET} @name right:", "function", "scope"),
    (f"augmented_assignment_expression left: {_TARGET} @name right:", "function", "scope"),
    (f"pair key: {_KEY} @name value:", "method", "scope"),
)


def _named_values(*around: str) -> str:
    """Patterns of functions, classes and objects that have a name, as they are or in one of some expressions."""
    return "\n".join(
        f"({pattern} {f'({outer} . {value})' if outer else value}) @{kind}"
        for pattern, of_function, of_object in _NAMED
        for value, kind in ((_FUNCTION, of_function), ("(class)", "class"), ("(object)", of_object))
        for outer in ("", *around)  # patterns of their own: alternatives inside of alternatives lose matches
    )


_JS = f"""
(comment) @quiet (string) @quiet (template_string) @quiet (regex) @quiet
(import_statement source: (string) @import)
(export_statement source: (string) @import)
(call_expression function: [(import) (identifier) @_require] arguments: (arguments . (string) @import)
  (#any-of? @_require "require"))
(function_declaration name: (_) @name) @function
(generator_function_declaration name: (_) @name) @function
(class_declaration name: (_) @name) @class
(method_definition name: (_) @name) @method
(assignment_expression left: {_TARGET} @name right: (binary_expression right: {_FUNCTION})) @function
(assignment_expression left: {_TARGET} @name right: (assignment_expression right: {_FUNCTION})
  (#not-eq? @name "exports")) @function
(assignment_expression left: {_TARGET} @name right: (assignment_expression right: (assignment_expression
  right: {_FUNCTION})) (#not-eq? @name "exports")) @function
(call_expression function: (member_expression) @_define arguments: (arguments . (_) @_of . (string) @name)
  (#eq? @_define "Object.defineProperty") (#not-match? @name "__esModule")) @object
(assignment_expression left: (member_expression object: (_) @_exports property: (_) @_name) @name right: (_) @_value
  (#any-of? @_exports "exports" "module.exports") (#not-eq? @_name @_value)
  (#not-match? @_value "^(void|exports|module)[^A-Za-z0-9_$]")) @variable
(assignment_expression left: (_) @_exports right: (object (pair key: {_KEY} @name value: (_) @_value) @variable)
  (#any-of? @_exports "exports" "module.exports") (#not-eq? @name @_value))
(program (lexical_declaration (variable_declarator name: (identifier) @name) @variable))
(program (variable_declaration (variable_declarator name: (identifier) @name) @variable))
(export_statement (lexical_declaration (variable_declarator name: (identifier) @name) @variable))
(export_statement (variable_declaration (variable_declarator name: (identifier) @name) @variable))
(export_statement (lexical_declaration (variable_declarator
  name: (object_pattern (shorthand_property_identifier_pattern) @name)) @variable))
"""
_JS_ONLY = f"""
{_named_values(WRAPPERS[0])}
(field_definition property: {_KEY} @name value: {_FUNCTION}) @method
"""
_TS_DECLARATIONS = "\n".join(
    f"({place} ({declaration} (variable_declarator name: (identifier) @name) @variable){')' * place.count('(')})"
    for place in (
        "ambient_declaration",
        "ambient_declaration (statement_block",
        "internal_module body: (statement_block",
        "module body: (statement_block",
    )
    for declaration in ("lexical_declaration", "variable_declaration")
)
_TS = f"""
{_JS}
{_named_values(*WRAPPERS)}
{_TS_DECLARATIONS}
(abstract_class_declaration name: (_) @name) @class
(interface_declaration name: (_) @name) @interface
(type_alias_declaration name: (_) @name) @type
(type_alias_declaration name: (_) @name value: (object_type)) @scope
(variable_declarator name: (identifier) @name type: (type_annotation (object_type))) @scope
(property_signature name: (_) @name type: (type_annotation (object_type))) @scope
(export_statement (import_alias . (identifier) @name)) @variable
(enum_declaration name: (_) @name) @enum
(function_signature name: (_) @name) @function
(method_signature name: (_) @name) @method
(abstract_method_signature name: (_) @name) @method
(property_signature name: (_) @name type: (type_annotation (function_type))) @method
(public_field_definition name: {_KEY} @name value: {_FUNCTION}) @method
(public_field_definition name: {_KEY} @name type: (type_annotation (function_type))) @method
(internal_module name: (_) @name) @namespace
(module name: (string) @name) @module
(module name: [(identifier) (nested_identifier)] @name) @namespace
"""
_GO = """
(comment) @quiet (interpreted_string_literal) @quiet (raw_string_literal) @quiet
(import_spec path: (_) @import)
(function_declaration name: (_) @name) @function
(func_literal "func" @name) @code
(method_declaration receiver: (_) @receiver name: (_) @name) @method
(type_spec name: (_) @name) @type
(type_spec name: (_) @receiver type: (interface_type (method_elem name: (_) @name) @method))
(type_alias name: (_) @receiver type: (interface_type (method_elem name: (_) @name) @method))
(type_alias name: (_) @name) @type
(source_file (const_declaration (const_spec (identifier) @name) @constant))
(source_file (var_declaration (var_spec name: (identifier) @name) @variable))
(source_file (var_declaration (var_spec_list (var_spec name: (identifier) @name) @variable)))
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
(associated_type name: (_) @name) @type
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
(compact_constructor_declaration name: (_) @name) @constructor
(annotation_type_element_declaration name: (_) @name) @method
(constant_declaration declarator: (variable_declarator name: (_) @name)) @constant
(field_declaration (modifiers "static" "final") declarator: (variable_declarator name: (_) @name)) @constant
(field_declaration (modifiers "final" "static") declarator: (variable_declarator name: (_) @name)) @constant
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
    return _last(name)[:1].isupper()


def _pub(name: str, kind: str, before: str) -> bool:
    return "pub" in before.split()


GRAMMARS = {
    "C": Grammar("C", "tree_sitter_c", "language", _C, "::", _not_static),
    "C++": Grammar("C++", "tree_sitter_cpp", "language", _CPP, "::", _not_static),
    "CUDA": Grammar("CUDA", "tree_sitter_cuda", "language", _CPP, "::", _not_static),
    "JavaScript": Grammar("JavaScript", "tree_sitter_javascript", "language", _JS + _JS_ONLY),
    "TypeScript": Grammar("TypeScript", "tree_sitter_typescript", "language_typescript", _TS),
    "TypeScript declarations": Grammar(
        "TypeScript", "tree_sitter_typescript", "language_typescript", _TS, declares=True
    ),
    "TSX": Grammar("TypeScript", "tree_sitter_typescript", "language_tsx", _TS),
    "Go": Grammar("Go", "tree_sitter_go", "language", _GO, public=_capital),
    "Rust": Grammar("Rust", "tree_sitter_rust", "language", _RUST, "::", _pub),
    "Java": Grammar("Java", "tree_sitter_java", "language", _JAVA, public=_not_private),
    "Shell": Grammar("Shell", "tree_sitter_bash", "language", _SHELL),
}
