"""Imports go down the floors of `src/deadband` that CONTRIBUTING.md draws, and functions are short."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "deadband"
FLOORS = [
    {"files"},
    {"ops", "tensor_files"},
    {"layers", "running"},
    {"calibration", "compaction", "decoding"},
    {"allocation", "masks", "quantization"},
    {"pruning", "sparsify"},
    {"evaluation"},
    {"integrations"},
    {"app"},
]
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}


def modules() -> dict[str, Path]:
    found = {path.relative_to(SOURCE.parent).with_suffix("").parts: path for path in SOURCE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in found.items()}


def imports(path: Path, known) -> set[str]:
    """The modules of deadband that one names, at its top, in a function or for a type checker."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "deadband"}


GRAPH = {name: imports(path, modules()) for name, path in modules().items() if name != "deadband"}


def test_every_wing_is_on_a_floor():
    assert {name.split(".")[1] for name in GRAPH} == set(FLOOR)


def test_no_import_runs_up_or_sideways():
    for name, others in GRAPH.items():
        for other in others:
            assert other != "deadband", f"{name} imports the public names, which are above all floors"
            here, there = name.split(".")[1], other.split(".")[1]
            assert here == there or FLOOR[there] < FLOOR[here], f"{name} imports {other}, which is not below it"


def test_no_circle():
    rest = dict(GRAPH)
    while free := {
        name
        for name, others in rest.items()
        if not others & rest.keys() or not any(name in each for each in rest.values())
    }:
        rest = {name: others for name, others in rest.items() if name not in free}
    assert not rest, f"a circle is among {sorted(rest)}"


def test_faces_define_nothing():
    for name, path in modules().items():
        if path.name == "__init__.py" and name != "deadband":
            body = ast.parse(path.read_text("utf-8")).body[1:]
            assert all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)) for node in body), name


BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.match_case)


def within(function):
    """The nodes of a function that are in no function or class inside of it."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from within(node)


def test_long_functions_say_why():
    """More than 60 lines, docstring aside, or 15 branches only where a comment begins with `Long on purpose`."""
    for name, path in modules().items():
        text = path.read_text("utf-8")
        lines = text.splitlines()
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef):
                written = (ast.get_docstring(function, clean=False) or "").count("\n") + 1
                length = function.end_lineno - function.lineno + 1 - written
                branches = sum(isinstance(node, BRANCHES) for node in within(function))
                body = "\n".join(lines[function.lineno - 1 : function.end_lineno])
                short = length <= 60 and branches <= 15
                assert short or "# Long on purpose" in body, (
                    f"{name}.{function.name}: {length} lines, {branches} branches"
                )
