"""All pages of an index, drawn by several processes; those that differ from what is there are staged."""

from __future__ import annotations

import dataclasses
import hashlib
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from codeindex.facts import Facts
from codeindex.markdown import PICTURE, shown
from codeindex.names import simple
from codeindex.pages import (
    Below,
    Index,
    Keyword,
    above,
    anchors,
    file_page,
    folder_index,
    folders_of,
    keyword_index,
    keyword_pages,
    keyword_part,
)
from codeindex.processes import spread
from codeindex.reading import Progress
from codeindex.repository import Entry
from codeindex.store import Staging, Store


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What came of drawing.

    Attributes:
        pages: each page's hash.
        differing: those that are not as they should be.
        names: lines for `codeindex where`, sorted.
    """

    pages: dict[str, str]
    differing: list[str]
    names: list[bytes]


@dataclasses.dataclass(frozen=True)
class _Shared:
    """What the processes have from the one that started them."""

    index: Index
    below: Mapping[str, Below]
    folders: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    store: Store
    staging: Staging | None


_Page = tuple[str, str, bool, list[bytes]]
"""Its path, the hash of its content, whether that differs from what is there, and lines of names."""
_shared: _Shared | None = None


def draw_all(index: Index, picture: str, store: Store, staging: Staging | None, jobs: int, progress: Progress) -> Drawn:
    """Draw every page; without `staging` only to find out which differ."""
    global _shared
    folders = folders_of(index.facts)
    below = all_below(index.entries, index.facts)
    work: list[tuple] = [("file", path) for path in index.facts]
    for folder in folders:
        work += [("folder", folder), ("keywords", folder)]
        work += [("part", folder, *part) for part in keyword_pages(index, folder, below[folder].keywords)]
    _shared = _Shared(index, below, folders, store, staging)
    try:
        made = [_keep(PICTURE, picture, [])] if picture else []
        for done, page in enumerate(spread(_draw, work, jobs, fork=True), 1):
            made.append(page)
            progress("drawing", done, len(work))
    finally:
        _shared = None
    return Drawn(
        {page: hash for page, hash, _, _ in made},
        [page for page, _, differs, _ in made if differs],
        sorted(line for *_, lines in made for line in lines),
    )


def all_below(entries: Mapping[str, Entry], facts: Mapping[str, Facts]) -> dict[str, Below]:
    """What is in each folder and below it."""
    files: dict[str, int] = {}
    digests: dict[str, Any] = {}
    keywords: dict[str, list[Keyword]] = {}
    found: list[Keyword] = []
    for path, own in facts.items():
        for folder in above(posixpath.dirname(path)):
            files[folder] = files.get(folder, 0) + 1
            digests.setdefault(folder, hashlib.sha256()).update(f"{path!a} {entries[path].blob}\n".encode())
        named = zip(own.definitions, anchors(own.definitions), strict=True)
        found += [(simple(each), path, each, anchor) for each, anchor in named]
    found.sort(key=lambda entry: (entry[0].lower(), entry[0], entry[1], entry[2].start, entry[2].name))
    for entry in found:
        for folder in above(posixpath.dirname(entry[1])):
            keywords.setdefault(folder, []).append(entry)
    digests.setdefault("", hashlib.sha256())
    return {
        folder: Below(files.get(folder, 0), digest.hexdigest()[:40], keywords.get(folder, []))
        for folder, digest in digests.items()
    }


def _draw(what: tuple) -> _Page:
    assert _shared is not None
    index, below = _shared.index, _shared.below
    kind, name, *part = what
    if kind == "file":
        return _keep(index.pages.of(name), file_page(index, name), _name_lines(index, name))
    if kind == "folder":
        return _keep(index.pages.folder(name), folder_index(index, name, *_shared.folders[name], below), [])
    if kind == "keywords":
        return _keep(index.pages.folder(name, "keywords.md"), keyword_index(index, name, below[name]), [])
    page, first, last = part
    return _keep(page, keyword_part(index, name, below[name], page, first, last), [])


def _keep(page: str, text: str, names: list[bytes]) -> _Page:
    """Stage a page if it differs from what is there."""
    assert _shared is not None
    content = text.encode("utf-8", "backslashreplace")
    hash = hashlib.sha256(content).hexdigest()
    differs = _shared.store.differs(page, hash)
    if differs and _shared.staging is not None:
        _shared.staging.write(page, content)
    return page, hash, differs, names


def _name_lines(index: Index, path: str) -> list[bytes]:
    """A line for each definition: simple name, full name, kind, place, and the files that use it."""
    made = []
    for each in index.facts[path].definitions:
        users = "\0".join(shown(user) for user in index.names.users(path, each))
        fields = (simple(each), each.name, each.kind, shown(path), str(each.start), str(each.end), users)
        line = "\t".join(re.sub(r"[\t\n\r]", " ", field) for field in fields) + "\n"
        made.append(line.encode("utf-8", "backslashreplace"))
    return made
