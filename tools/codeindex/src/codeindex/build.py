"""From a repository to its pages: only what changed is read, and only pages that differ are written."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from codeindex.drawing import draw_all
from codeindex.facts import Facts
from codeindex.graph import Graph
from codeindex.markdown import Pages, Sources
from codeindex.names import Names
from codeindex.overview import overview_svg
from codeindex.pages import Index
from codeindex.reading import UNREADABLE, Progress, facts_key, read_all, tools
from codeindex.repository import LINK, SUBMODULE, Entry, Repository, RepositoryError
from codeindex.runners import runners
from codeindex.store import STATE, OutputError, Store, is_page

_ATTEMPTS = 5  # to read files while someone changes them


@dataclasses.dataclass(frozen=True)
class Options:
    """What the pages depend on beside the files.

    Attributes:
        ignore: git pathspec patterns of files to leave out.
        generated: whether generated files have pages too.
        source_url: address of a file on a forge with `{path}` in it, or `none`; without it, links are relative.
        title: of the first page.
    """

    ignore: tuple[str, ...] = ()
    generated: bool = False
    source_url: str = ""
    title: str = "Code index"


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a build wrote, or what a check found.

    Attributes:
        files, left_out, pages: how many files have a page, how many have none as they are generated, how many pages are
            made.
        written, deleted: pages, by path in the output folder.
    """

    files: int
    left_out: int
    pages: int
    written: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.written or self.deleted)


def build(
    folder: Path, output: Path, options: Options = Options(), *, check: bool = False, jobs: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Changes:  # fmt: skip
    """Make the pages of a repository, or, with `check`, only find out which would change.

    Args:
        folder: in a git repository; all of the repository is read.
        output: where pages go; nothing else there is touched.
        jobs: processes; as many as there are cores, if 0.
        progress: called with what is done, how much of it, and of how much.

    Raises:
        RepositoryError, OutputError: the one cannot be read, the other not written.

    Example:
        >>> changes = build(Path("."), Path("docs/code"))
        >>> bool(build(Path("."), Path("docs/code"), check=True))
        False
    """
    repository, store = Repository(folder), Store(output.resolve())
    root = repository.root.resolve()
    if root.is_relative_to(store.folder):
        raise OutputError(f"the output folder {output} holds the repository; expected a folder of its own")
    entries = _entries(repository, store, options)
    said = {} if options.generated else repository.said_generated(entries)
    way = os.path.relpath(root, store.folder).replace(os.sep, "/")
    key = _key(options, way, entries.values(), said)
    manifest = store.manifest()
    if manifest.get("key") == key and not _altered(store, manifest["pages"]):
        return Changes(manifest["files"], manifest["left_out"], len(manifest["pages"]))
    jobs = jobs or os.cpu_count() or 1
    with contextlib.nullcontext() if check else store.staging() as staging:
        entries, facts, stored = _read_unchanging(repository, store, entries, options, jobs, progress)
        key = _key(options, way, entries.values(), said)
        if any(each.error.startswith(UNREADABLE) for each in facts.values()):
            key = ""  # perhaps it can be read the next time
        left_out = [path for path in facts if said.get(path, facts[path].generated and not options.generated)]
        for path in left_out:
            del facts[path]
        graph = Graph(facts)
        picture = overview_svg(graph, list(facts))
        index = Index(
            title=options.title, entries=entries, facts=facts, left_out=left_out, pages=Pages(facts), graph=graph,
            names=Names(facts, graph), sources=Sources(way, options.source_url), runners=runners(root, facts),
            picture=bool(picture),
        )  # fmt: skip
        drawn = draw_all(index, picture, store, staging, jobs, progress)
        deleted = store.orphans(drawn.pages)
        if staging is not None:
            staging.facts(stored.items())
            staging.names(drawn.names)
            pages = dict(sorted(drawn.pages.items()))
            about: dict[str, Any] = {"key": key, "files": len(facts), "left_out": len(left_out), "pages": pages}
            staging.commit(drawn.differing, deleted, about)
    return Changes(len(facts), len(left_out), len(drawn.pages), tuple(sorted(drawn.differing)), tuple(deleted))


def _entries(repository: Repository, store: Store, options: Options) -> dict[str, Entry]:
    """The files to document by path: not this output, nor another one that was committed."""
    found = {entry.path: entry for entry in repository.entries(options.ignore)}
    inside = os.path.relpath(store.folder, repository.root.resolve()).replace(os.sep, "/")
    states = (path.partition(f"/{STATE}/")[0] for path in found if f"/{STATE}/" in path)
    outputs = tuple(f"{folder}/" for folder in {inside, *states})
    return {
        path: entry for path, entry in found.items()
        if not path.startswith(outputs) and (entry.mode in (LINK, SUBMODULE) or not is_page(repository.root / path))
    }  # fmt: skip


def _read_unchanging(
    repository: Repository, store: Store, entries: dict[str, Entry], options: Options, jobs: int, progress: Progress
) -> tuple[dict[str, Entry], dict[str, Facts], dict[str, str]]:
    """Entries, their facts, and the facts' JSON, all of the same moment: read again what changed meanwhile."""
    known: Iterable[tuple[str, str]] = store.facts()
    for _ in range(_ATTEMPTS):
        facts, stored = read_all(repository.root.resolve(), entries, known, jobs, progress)
        now = _entries(repository, store, options)
        if now == entries:
            return entries, facts, stored
        for path, entry in entries.items():
            if now.get(path) != entry:
                stored.pop(facts_key(entry), None)
        entries, known = now, stored.items()
    raise RepositoryError(f"files of {repository.root} keep changing; run it again when they are at rest")


def _key(options: Options, way: str, entries: Iterable[Entry], said: Mapping[str, bool]) -> str:
    """Of all that the pages depend on."""
    made = hashlib.sha256(f"{tools()}\0{options}\0{way}\0{sorted(said.items())!a}".encode())
    for entry in entries:
        made.update(os.fsencode(entry.path) + f"\0{entry.blob}\0{entry.mode}\0".encode())
    return made.hexdigest()


def _altered(store: Store, pages: Mapping[str, str]) -> bool:
    """Whether the pages are not as they were written."""
    return any(store.differs(page, known) for page, known in pages.items()) or bool(store.orphans(pages))
