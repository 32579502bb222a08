"""How the tests of a repository are run, by what its own files say."""

from __future__ import annotations

import json
import posixpath
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from codeindex.facts import Facts

Runner = Callable[[Sequence[str]], Sequence[str]]
"""From tests of one language to commands, for the repository's folder."""


def runners(root: Path, facts: Mapping[str, Facts]) -> dict[str, Runner]:
    """The runners of a repository by language; none for a language where nothing tells."""
    made: dict[str, Runner] = {}
    imported = {each.target.split(".")[0] for own in facts.values() if own.language == "Python" for each in own.imports}
    names = {posixpath.basename(path) for path in facts}
    if "pytest" in imported or names & {"pytest.ini", "conftest.py"}:
        made["Python"] = lambda tests: [_command("python -m pytest", tests)]
    elif "unittest" in imported:
        made["Python"] = lambda tests: [_command("python -m unittest", tests)]
    if "go.mod" in facts:
        made["Go"] = lambda tests: [_command("go test", sorted({f"./{posixpath.dirname(each)}" for each in tests}))]
    if "Cargo.toml" in facts:
        made["Rust"] = lambda tests: ["cargo test"]
    if "package.json" in facts and _has_test_script(root / "package.json"):
        made |= dict.fromkeys(("JavaScript", "TypeScript"), lambda tests: ["npm test"])
    if any(path.endswith(".bats") for path in facts):
        made["Shell"] = lambda tests: [_command("bats", tests)]
    return made


def _command(program: str, arguments: Sequence[str]) -> str:
    return " ".join([program, *map(shlex.quote, arguments)])


def _has_test_script(file: Path) -> bool:
    try:
        scripts = json.loads(file.read_text("utf-8")).get("scripts")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(scripts, dict) and "test" in scripts
