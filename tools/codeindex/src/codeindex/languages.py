"""Which parser reads which file."""

from __future__ import annotations

import dataclasses
import io
import os
import posixpath
import re
import tokenize
from pathlib import Path

from codeindex.config import parse_config, parse_go_module
from codeindex.facts import Facts
from codeindex.generated import says_generated
from codeindex.lines import renumbered, unified
from codeindex.markup import parse_markdown, parse_rst
from codeindex.python_tree import parse_any_python
from codeindex.tree import parse_tree

ENDINGS = {
    ".py": "Python", ".pyi": "Python", ".pyw": "Python",
    ".c": "C",
    ".h": "C++", ".hh": "C++", ".hpp": "C++", ".hxx": "C++", ".inl": "C++", ".ipp": "C++", ".tpp": "C++",
    ".cc": "C++", ".cpp": "C++", ".cxx": "C++", ".ino": "C++",
    ".cu": "CUDA", ".cuh": "CUDA",
    ".js": "JavaScript", ".jsx": "JavaScript", ".mjs": "JavaScript", ".cjs": "JavaScript",
    ".ts": "TypeScript", ".mts": "TypeScript", ".cts": "TypeScript", ".tsx": "TSX",
    ".d.ts": "TypeScript declarations", ".d.mts": "TypeScript declarations", ".d.cts": "TypeScript declarations",
    "go.mod": "Go module", ".go": "Go", ".rs": "Rust", ".java": "Java",
    ".sh": "Shell", ".bash": "Shell", ".bats": "Shell",
    ".md": "Markdown", ".markdown": "Markdown", ".rst": "reStructuredText",
    ".toml": "TOML", ".yaml": "YAML", ".yml": "YAML", ".json": "JSON",
}  # fmt: skip
_INTERPRETERS = {
    "python": "Python",
    "sh": "Shell",
    "bash": "Shell",
    "zsh": "Shell",
    "dash": "Shell",
    "node": "JavaScript",
}
_SHEBANG = re.compile(rb"#!\s*(?:\S*/env\s+(?:-\S+\s+)*)?(?:\S*/)?([a-z]+)")
LARGEST = 4_000_000  # bytes; what is larger is data


def ending_of(path: str) -> str:
    """The part of a path that tells the language: `.py`, `.d.ts`, `go.mod`."""
    name = posixpath.basename(path)
    stem, last = posixpath.splitext(name.lower())
    double = posixpath.splitext(stem)[1] + last
    return next((each for each in (name, double) if each in ENDINGS), last)


def language_of(path: str, content: bytes) -> str:
    """The name of a parser, or nothing."""
    found = ENDINGS.get(ending_of(path))
    if found is None and (interpreter := _SHEBANG.match(content[:200])) is not None:
        found = _INTERPRETERS.get(interpreter[1].decode())
    return found or ""


def read_facts(file: Path) -> Facts:
    """The facts of a file in the working tree; of a symbolic link, where it leads."""
    if file.is_symlink():
        return link_facts(os.fsencode(os.readlink(file)))
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        return facts_of(file.name, opened.read(LARGEST + 1), size)


def link_facts(target: bytes) -> Facts:
    """The facts of a symbolic link."""
    return Facts(size=len(target), note=f"A symbolic link to {target.decode('utf-8', 'backslashreplace')}")


def facts_of(name: str, content: bytes, size: int | None = None) -> Facts:
    """The facts of a file's content; of a larger one, `size` tells, and the content can be its beginning."""
    size = len(content) if size is None else size
    if b"\0" in content[:8192]:
        return Facts(size=size, note="A binary file")
    facts = Facts(language_of(name, content), error=f"is not parsed: it has more than {LARGEST // 1_000_000} MB")
    if size <= LARGEST:
        facts = parse(name, content)
    return dataclasses.replace(facts, size=size, generated=says_generated(unified(content), facts.language))


def parse(name: str, content: bytes) -> Facts:
    """The facts of a text by the ending of its file's name, or by its first line."""
    lines = content.count(b"\n") + (bool(content) and not content.endswith(b"\n"))
    language = language_of(name, content)
    if not content:
        return Facts(language, note="An empty file")
    if not language:
        return Facts(lines=lines)
    try:
        facts = renumbered(_parse(language, unified(content)), content)
    except RecursionError:
        facts = Facts(language, error="is not parsed: it is nested too deeply")
    return dataclasses.replace(facts, lines=lines)


def _parse(language: str, content: bytes) -> Facts:
    if language in ("Python", "Markdown", "reStructuredText"):
        try:
            text = _decoded(content) if language == "Python" else content.decode("utf-8-sig")
        except (UnicodeDecodeError, LookupError, SyntaxError) as error:
            return Facts(language, error=f"cannot be read as text: {error}")
        return {"Python": parse_any_python, "Markdown": parse_markdown, "reStructuredText": parse_rst}[language](text)
    if language == "Go module":
        return parse_go_module(content)
    if language in ("TOML", "YAML", "JSON"):
        return parse_config(content, language)
    return parse_tree(content, language)


def _decoded(content: bytes) -> str:
    """Python source by its byte order mark or its coding line."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)
