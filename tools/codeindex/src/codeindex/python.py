"""Facts of a Python file, from its syntax tree."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator

from codeindex.facts import Definition, Facts, Import, first_sentence, leading_comment

_SCOPES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def parse_python(text: str) -> Facts:
    """The facts of a Python source.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: this Python does not take it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes: they are the author's
        tree = ast.parse(text)
    exported = exported_names(tree)
    found = _definitions(tree.body, "", exported, within="module", public=True)
    definitions = tuple(sorted(found, key=lambda each: each.start))
    imports, mentions = imported(tree)
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            mentions.update({node.id} - own)  # what the file binds itself is not another file's
        elif isinstance(node, ast.Attribute):
            mentions.add(node.attr)
    imports.sort(key=lambda each: each.line)
    return Facts(
        "Python",
        first_sentence(ast.get_docstring(tree) or "") or leading_comment(text),
        definitions,
        tuple(imports),
        tuple(sorted(mentions - {"*"})),
    )


def imported(tree: ast.Module) -> tuple[list[Import], set[str]]:
    """What a module imports, and the names in that."""
    imports: list[Import] = []
    mentions: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [Import(alias.name, (), node.lineno) for alias in node.names]
            mentions.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            imports.append(Import(node.module or "", names, node.lineno, node.level))
            mentions.update(names)
    return imports, mentions


def _definitions(
    body: list[ast.stmt], scope: str, exported: set[str] | None, *, within: str, public: bool
) -> Iterator[Definition]:
    """Of a block, in a module, a class or a function (`within`), that is `public` or not."""
    for node in body:
        if isinstance(node, _SCOPES):
            name, is_class = f"{scope}{node.name}", isinstance(node, ast.ClassDef)
            kind = "class" if is_class else "method" if within == "class" else "function"
            kind = f"local {kind}" if within == "function" else kind
            shown = public and within != "function" and is_public(node.name, exported)
            doc = first_sentence(ast.get_docstring(node) or "")
            yield Definition(name, kind, node.lineno, node.end_lineno or node.lineno, _signature(node), doc, shown)
            inside = "class" if is_class else "function"
            yield from _definitions(node.body, f"{name}.", None, within=inside, public=shown)
        elif within == "module" and isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from _variables(node, exported)
        elif within == "module" and type(node).__name__ == "TypeAlias":  # since Python 3.12
            name = node.name.id  # type: ignore[attr-defined]
            end = node.end_lineno or node.lineno
            yield Definition(name, "type", node.lineno, end, ast.unparse(node), "", is_public(name, exported))
        else:
            for inner in _bodies(node):
                yield from _definitions(inner, scope, exported, within=within, public=public)


def _variables(node: ast.Assign | ast.AnnAssign, exported: set[str] | None) -> Iterator[Definition]:
    note = f": {ast.unparse(node.annotation)}" if isinstance(node, ast.AnnAssign) else ""
    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
        for each in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
            if isinstance(each, ast.Name):
                first, last = node.lineno, node.end_lineno or node.lineno
                yield Definition(each.id, "variable", first, last, each.id + note, "", is_public(each.id, exported))


def _bodies(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The blocks of an if, try, with, for, while or match."""
    for field in ("body", "orelse", "finalbody"):
        inner = getattr(node, field, None)
        if isinstance(inner, list):
            yield inner
    for each in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
        yield each.body


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(each) for each in (*node.bases, *node.keywords))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    result = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{prefix} {node.name}({ast.unparse(node.args)}){result}"


def is_public(name: str, exported: set[str] | None) -> bool:
    """Whether a name is meant for other files: it is in `__all__`, or, without one, begins with no underscore."""
    if exported is not None:
        return name in exported
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def exported_names(tree: ast.Module) -> set[str] | None:
    """The names in `__all__`; None without one, or where it is computed."""
    names: set[str] | None = None
    for node in tree.body:
        target, value = _assigned(node)
        if target != "__all__":
            continue
        if not isinstance(value, (ast.List, ast.Tuple)):
            return None
        found = {each.value for each in value.elts if isinstance(each, ast.Constant) and isinstance(each.value, str)}
        if len(found) < len(value.elts):
            return None
        names = found | (names or set())
    return names


def _assigned(node: ast.stmt) -> tuple[str, ast.expr | None]:
    """The name that a statement gives a value to or extends, and the value."""
    target: ast.expr | None = None
    value: ast.expr | None = None
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target, value = node.targets[0], node.value
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        target, value = node.target, node.value
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
        target = node.value.func.value  # __all__.extend(...), of which literals count
        value = node.value.args[0] if node.value.func.attr == "extend" and node.value.args else None
    return (target.id if isinstance(target, ast.Name) else ""), value
