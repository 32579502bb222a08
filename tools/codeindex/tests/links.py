"""Reading pages as a Markdown renderer does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt

_READER = MarkdownIt("commonmark", {"html": True})


def links(text: str) -> Iterator[str]:
    """The targets of links and images."""
    for token in _READER.parse(text):
        for inner in token.children or ():
            target = inner.attrGet("href") or inner.attrGet("src")
            if target:
                yield str(target)


def dead(output: Path) -> list[tuple[str, str]]:
    """The relative links in all pages that lead to nothing: page and target."""
    found = []
    for page in output.rglob("*.md"):
        for target in links(page.read_text("utf-8")):
            path = unquote(target.split("#")[0], errors="surrogateescape")
            if "://" not in target and not (page.parent / path).exists() and not (page.parent / path).is_symlink():
                found.append((str(page), target))
    return found


def rendered(text: str) -> str:
    """The text that a reader sees."""
    parts = []
    for token in _READER.parse(text):
        for inner in token.children or ():
            parts.append(" " if inner.type in ("softbreak", "hardbreak") else inner.content)
    return "".join(parts)
