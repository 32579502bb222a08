"""The facts of all files, of which only those are read that the last build had not."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from codeindex import __version__
from codeindex.facts import Facts
from codeindex.languages import ending_of, facts_of, link_facts, read_facts
from codeindex.processes import spread
from codeindex.repository import LINK, SUBMODULE, Entry, RepositoryError, stored_content

Progress = Callable[[str, int, int], None]
UNREADABLE = "cannot be read: "
"""Begins the error of a file that the system refuses; a later build tries again."""


@functools.cache
def tools() -> str:
    """A hash of what facts and pages depend on beside the files: this package, its parsers, Python's."""
    parsers = [name for name in importlib.metadata.requires("codeindex") or () if "extra ==" not in name]
    versions = (importlib.metadata.version(re.split(r"[^\w-]", name)[0]) for name in parsers)
    made = hashlib.sha256(" ".join([__version__, *platform.python_version_tuple()[:2], *versions]).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        made.update(file.read_bytes())
    return made.hexdigest()[:16]


def facts_key(entry: Entry) -> str:
    """What a file's facts depend on: the same content can be of two languages."""
    ending = hashlib.sha256(os.fsencode(ending_of(entry.path))).hexdigest()[:8]
    return f"{entry.blob} {entry.mode} {ending} {tools()}"


def read_all(
    root: Path, entries: Mapping[str, Entry], known: Iterable[tuple[str, str]], jobs: int, progress: Progress
) -> tuple[dict[str, Facts], dict[str, str]]:
    """The facts of each file by path, and their JSON by `facts_key`, both in the order of `entries`.

    Args:
        root: the repository's folder.
        known: what an earlier call returned second; as much of it as there is.
    """
    wanted = {facts_key(entry): path for path, entry in entries.items()}
    read: dict[str, Facts] = {}
    stored: dict[str, str] = {}

    def keep(key: str, line: str) -> None:
        read[key], stored[key] = Facts.from_json(line), line

    for key, line in known:
        if key in wanted and key not in read:
            try:
                keep(key, line)
            except (ValueError, TypeError, AttributeError):  # damaged
                continue
    missing = [key for key in wanted if key not in read]
    work = [(root, entries[wanted[key]]) for key in missing]
    for done, (key, line) in enumerate(zip(missing, spread(_read, work, jobs), strict=True), 1):
        keep(key, line)
        progress("reading", done, len(missing))
    facts = {path: read[facts_key(entry)] for path, entry in entries.items()}
    return facts, {key: stored[key] for key in wanted if not read[key].error.startswith(UNREADABLE)}


def _read(given: tuple[Path, Entry]) -> str:
    root, entry = given
    if entry.mode == SUBMODULE:
        return Facts(note="A submodule").to_json()
    try:
        return read_facts(root / entry.path).to_json()
    except FileNotFoundError:  # outside of a sparse checkout
        return _read_stored(root, entry).to_json()
    except OSError as error:
        return Facts(error=f"{UNREADABLE}{error.strerror}").to_json()


def _read_stored(root: Path, entry: Entry) -> Facts:
    try:
        content = stored_content(root, entry)
    except RepositoryError as error:
        return Facts(error=f"{UNREADABLE}{error}")
    return link_facts(content) if entry.mode == LINK else facts_of(entry.path, content)
