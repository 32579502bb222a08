"""Imports go down the floors of `src/deadband` that CONTRIBUTING.md draws, never up, sideways or in a circle."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "deadband"
FLOORS = [
    {"files"},
    {"ops", "tensor_files"},
    {"layers", "running"},
    {"calibration", "compaction", "decoding"},
    {"allocation", "masks", "quantization"},
    {"sparsify"},
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
