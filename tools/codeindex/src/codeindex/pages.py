"""The pages: one for each file, an index and a keyword index for each folder."""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from codeindex.facts import DOCUMENTS, Definition, Facts
from codeindex.graph import Graph, holds_tests
from codeindex.markdown import PICTURE, Pages, Sources, code, count, lines, link, plain, shown
from codeindex.names import Names, simple
from codeindex.repository import SUBMODULE, Entry
from codeindex.runners import Runner
from codeindex.store import MARK

PAGE_ENTRIES = 1000
"""Entries of a keyword index on one page."""
_PLURALS = {"class": "classes", "local class": "local classes"}
_NOT_IN_ANCHORS = re.compile(r"[^\w.:-]+")
Keyword = tuple[str, str, Definition, str]
"""A simple name, the file that defines it, the definition, and its id on the file's page."""


@dataclasses.dataclass(frozen=True)
class Index:
    """All that pages are made from.

    Attributes:
        title: of the first page.
        entries, facts: of each file by path.
        left_out: generated files.
        pages: where they are.
        runners: the commands that run some tests, by language.
        picture: whether there is a picture of the imports.
    """

    title: str
    entries: Mapping[str, Entry]
    facts: Mapping[str, Facts]
    left_out: Sequence[str]
    pages: Pages
    graph: Graph
    names: Names
    sources: Sources
    runners: Mapping[str, Runner]
    picture: bool


@dataclasses.dataclass(frozen=True)
class Below:
    """What is in a folder and below it.

    Attributes:
        files: how many.
        digest: of their paths and blobs.
        keywords: what they define, sorted.
    """

    files: int
    digest: str
    keywords: Sequence[Keyword]


def anchors(definitions: Iterable[Definition]) -> Iterator[str]:
    """The id of each definition on its file's page."""
    used: Counter[str] = Counter()
    for each in definitions:
        anchor = _NOT_IN_ANCHORS.sub("-", each.name)
        used[anchor] += 1
        yield anchor if used[anchor] == 1 else f"{anchor}~{used[anchor]}"


def file_page(index: Index, path: str) -> str:
    """The page of one file."""
    own, page = index.facts[path], index.pages.of(path)
    folder, tests = posixpath.dirname(path), index.graph.tests_of(path)
    parts = [f"# {code(shown(path))}", _about(index, path, page)]
    if own.doc:
        parts.append(plain(own.doc))
    if own.error:
        parts.append(f"This file {plain(own.error)}.{' What could be read is below.' if own.definitions else ''}")
    parts += _public(index, path, page)
    parts += _imports(index, path, page)
    importers = index.graph.importers.get(path, ())
    documents = {each for each in importers if index.facts[each].language in DOCUMENTS}
    apart = documents.union(tests)
    parts += _files(index, "Imported by", [each for each in importers if each not in apart], page)
    parts += _files(index, "Tests", tests, page)
    parts += _files(index, "Linked from", sorted(documents), page)
    parts += _running(index, path, tests)
    parts += _keywords(index, path, page)
    index_page, keywords = index.pages.folder(folder), index.pages.folder(folder, "keywords.md")
    parts.append(f"{link('Folder', index_page, page)} · {link('its keywords', keywords, page)}")
    return _made(parts, f"blob `{index.entries[path].blob}`")


def _made(parts: Sequence[str], source: str) -> str:
    return "\n\n".join([*parts, f"{MARK} {source}."]) + "\n"


def _made_of(parts: Sequence[str], below: Below) -> str:
    return _made(parts, f"{count(below.files, 'blob')}, digest `{below.digest}`")


def _about(index: Index, path: str, page: str) -> str:
    own, entry = index.facts[path], index.entries[path]
    if entry.mode == SUBMODULE:
        return f"A submodule, at commit `{entry.blob}`."
    words = [plain(own.note or own.language or "A file of a kind that is not known")]
    if own.lines:
        words.append(count(own.lines, "line"))
    words += [count(own.size, "byte"), index.sources.link("source", path, page)]
    return ", ".join(words) + "."


def _public(index: Index, path: str, page: str) -> Iterator[str]:
    own = index.facts[path]
    rows: list[str] = []
    open_scopes: list[Definition] = []
    for each in own.definitions:
        if not each.public or each.kind == "key":
            continue
        while open_scopes and not _is_inside(each, open_scopes[-1]):
            open_scopes.pop()
        label = code(each.signature or each.name)
        doc = f": {plain(each.doc)}" if each.doc else ""
        rows.append(f"{'    ' * len(open_scopes)}* {index.sources.link(label, path, page, lines(each))}{doc}")
        open_scopes.append(each)
    if rows:
        yield "## Headings" if own.language in DOCUMENTS else "## Public names"
        yield "\n".join(rows)


def _is_inside(inner: Definition, outer: Definition) -> bool:
    if inner.kind != "heading" and not inner.name.startswith((f"{outer.name}.", f"{outer.name}::")):
        return False
    return outer.start <= inner.start and inner.end <= outer.end


def _imports(index: Index, path: str, page: str) -> Iterator[str]:
    document = index.facts[path].language in DOCUMENTS
    inside, outside = index.graph.imports.get(path, ()), sorted(index.graph.outside(path))
    yield from _files(index, "Links to" if document else "Imports", inside, page)
    if outside and not document:
        if not inside:
            yield "## Imports"
        yield f"From outside: {', '.join(map(code, outside))}."


def _files(index: Index, title: str, paths: Sequence[str], page: str) -> Iterator[str]:
    if paths:
        yield f"## {title}"
        yield "\n".join(f"* {link(code(shown(each)), index.pages.of(each), page)}" for each in paths)


def _running(index: Index, path: str, tests: Sequence[str]) -> Iterator[str]:
    own = holds_tests(path, index.facts[path])
    chosen = [path] if own else [each for each in tests if holds_tests(each, index.facts[each])]
    commands = []
    for language, runner in sorted(index.runners.items()):
        mine = [each for each in chosen if index.facts[each].language == language and each.isprintable()]
        commands += [command for command in runner(mine) if command not in commands] if mine else []
    if commands:
        yield "## How to run it" if own else "## How to run the tests"
        yield "```sh\n" + "\n".join(commands) + "\n```"


def _keywords(index: Index, path: str, page: str) -> Iterator[str]:
    definitions = index.facts[path].definitions
    rows = []
    for each, anchor in zip(definitions, anchors(definitions), strict=True):
        users = ", ".join(link(code(shown(user)), index.pages.of(user), page) for user in index.names.users(path, each))
        place = index.sources.link(_range(each), path, page, lines(each))
        row = f'* <a id="{anchor}"></a>{code(each.name)} {each.kind}, {place}{f"; used in {users}" if users else ""}'
        rows.append((_order(simple(each)), each.name, each.start, row))
    if rows:
        yield "## Keywords"
        yield "\n".join(row for *_, row in sorted(rows))


def _order(name: str) -> tuple[str, str]:
    return name.lower(), name


# folders


def folders_of(paths: Iterable[str]) -> dict[str, tuple[list[str], list[str]]]:
    """The folders that hold files: for each its subfolders and its files, sorted."""
    folders: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}
    for path in paths:
        folder = posixpath.dirname(path)
        for missing in above(folder):
            if missing in folders:
                break
            folders[missing] = ([], [])
        folders[folder][1].append(path)
    for folder in folders:
        if folder:
            folders[posixpath.dirname(folder)][0].append(folder)
    return {folder: (sorted(inside), sorted(files)) for folder, (inside, files) in sorted(folders.items())}


def above(folder: str) -> Iterator[str]:
    """A folder and all that it is in; the last is the root."""
    while folder:
        yield folder
        folder = posixpath.dirname(folder)
    yield ""


def folder_index(
    index: Index, folder: str, inside: Sequence[str], files: Sequence[str], below: Mapping[str, Below]
) -> str:
    """The page of one folder: a line for each subfolder and each file."""
    page = index.pages.folder(folder)
    parts = [f"# {code(shown(folder) + '/')}" if folder else f"# {plain(index.title)}"]
    readmes = (each for each in files if posixpath.basename(each) in ("__init__.py", "README.md", "README.rst"))
    about = next((index.facts[each].doc for each in readmes if index.facts[each].doc), "")
    if about:
        parts.append(plain(about))
    if not folder and index.picture:
        parts.append(f"![Imports between folders]({PICTURE})")
    if inside:
        parts += ["## Folders", "\n".join(
            f"* {link(code(f'{_base(each)}/'), index.pages.folder(each), page)}: {count(below[each].files, 'file')}"
            for each in inside
        )]  # fmt: skip
    if files:
        parts += ["## Files", "\n".join(
            f"* {link(code(_base(each)), index.pages.of(each), page)}{_line(index.facts[each])}" for each in files
        )]  # fmt: skip
    if not folder and index.left_out:
        rows = (f"* {index.sources.link(code(shown(each)), each, page)}" for each in index.left_out)
        parts += ["## Left out", f"{count(len(index.left_out), 'generated file')}:", "\n".join(rows)]
    ends = [link("Keywords of all that is below", index.pages.folder(folder, "keywords.md"), page)]
    if folder:
        ends.insert(0, link("Folder above", index.pages.folder(posixpath.dirname(folder)), page))
    return _made_of([*parts, " · ".join(ends)], below[folder])


def _base(path: str) -> str:
    return shown(posixpath.basename(path))


def _line(own: Facts) -> str:
    if own.doc or own.note:
        return f": {plain(own.doc or own.note)}"
    kinds = Counter(each.kind for each in own.definitions)
    words = [count(number, kind, _PLURALS.get(kind, "")) for kind, number in sorted(kinds.items())]
    return ": " + ", ".join(words) if words else ""


def keyword_pages(index: Index, folder: str, entries: Sequence[Keyword]) -> list[tuple[str, int, int]]:
    """The pages of a folder's keyword index after the first, which lists them: path, and the entries from and to.
    None, where all entries fit on the first."""
    cuts = range(0, len(entries), PAGE_ENTRIES) if len(entries) > PAGE_ENTRIES else ()
    return [
        (index.pages.folder(folder, f"keywords-{number}.md"), cut, min(cut + PAGE_ENTRIES, len(entries)))
        for number, cut in enumerate(cuts, 1)
    ]


def keyword_index(index: Index, folder: str, below: Below) -> str:
    """The first page of the keyword index of a folder and all below it."""
    page, entries = index.pages.folder(folder, "keywords.md"), below.keywords
    here = link("this folder", index.pages.folder(folder), page)
    parts = [
        _keywords_title(index, folder),
        f"{count(len(entries), 'entry', 'entries')} in {here} and below.",
    ]
    rows = []
    for part, first, last in keyword_pages(index, folder, entries):
        label = f"{code(entries[first][0])} to {code(entries[last - 1][0])}"
        rows.append(f"* {link(label, part, page)}: {count(last - first, 'entry', 'entries')}")
    return _made_of([*parts, "\n".join(rows)] if rows else [*parts, *_by_letter(index, entries, page)], below)


def keyword_part(index: Index, folder: str, below: Below, page: str, first: int, last: int) -> str:
    """Another page of the keyword index of a folder, with some of its entries."""
    back = link("All parts", index.pages.folder(folder, "keywords.md"), page)
    entries = below.keywords[first:last]
    return _made_of([_keywords_title(index, folder), back, *_by_letter(index, entries, page)], below)


def _keywords_title(index: Index, folder: str) -> str:
    return f"# Keywords of {code(shown(folder) + '/') if folder else plain(index.title)}"


def _by_letter(index: Index, entries: Sequence[Keyword], page: str) -> Iterator[str]:
    rows: list[str] = []
    letter = ""
    for name, path, each, anchor in entries:
        if name[:1].upper() != letter:
            if rows:
                yield "\n".join(rows)
            letter, rows = name[:1].upper(), []
            yield f"## {plain(letter)}"
        place = index.sources.link(_range(each), path, page, lines(each))
        rows.append(
            f"* {link(code(each.name), index.pages.of(path), page, anchor)} {each.kind}, {code(shown(path))} {place}"
        )
    if rows:
        yield "\n".join(rows)


def _range(each: Definition) -> str:
    return f"{each.start}–{each.end}" if each.end > each.start else f"{each.start}"
