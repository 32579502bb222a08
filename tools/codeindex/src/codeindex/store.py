"""The output folder: what is in it, and how pages get there whole."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

STATE = ".codeindex"
"""The folder in the output where a build keeps what the next one needs."""
NAMES = f"{STATE}/names.txt"
MARK = "Made by codeindex from"
"""Begins a page's last line. A file without it is never overwritten or deleted, one with it never documented."""
_LAST_LINE = re.compile(rf"(?:^|\n|<!-- ){MARK} [^\n]*`[0-9a-f]{{12,64}}`\.(?: -->)?\s*\Z".encode())
_MANIFEST, _FACTS, _STAGED, _JOURNAL, _LOCK = (
    f"{STATE}/{name}" for name in ("manifest.json", "facts.gz", "staged", "journal.json", "lock")
)


class OutputError(Exception):
    """The output folder cannot be used."""


def is_page(file: Path) -> bool:
    """Whether codeindex made a file."""
    if file.suffix not in (".md", ".svg") or file.is_symlink() or not file.is_file():
        return False
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - 300))
            return _LAST_LINE.search(opened.read()) is not None
    except OSError:
        return False


class Store:
    """An output folder. Nothing is made there before `staging`.

    Raises:
        OutputError: it is a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file; expected a folder to write to")
        self._own = set(self.manifest().get("pages", ()))  # also those that someone has edited

    def manifest(self) -> dict[str, Any]:
        """What the last build wrote of itself: `key`, `files`, `left_out`, `pages` with their hashes. Empty where that
        build did not come to its end, or a part of the state is lost."""
        try:
            read = json.loads((self.folder / _MANIFEST).read_bytes())
        except (OSError, ValueError):
            return {}
        whole = all((self.folder / name).is_file() for name in (_FACTS, NAMES))
        return read if whole and isinstance(read, dict) and isinstance(read.get("pages"), dict) else {}

    def facts(self) -> Iterator[tuple[str, str]]:
        """The facts of the last build: key and JSON, one by one."""
        broken = (OSError, EOFError, ValueError, zlib.error)
        with contextlib.suppress(*broken), gzip.open(self.folder / _FACTS, "rt", encoding="utf-8") as lines:
            for line in lines:
                key, _, stored = line.rstrip("\n").partition("\t")
                yield key, stored

    def differs(self, page: str, hash: str) -> bool:
        """Whether a page is not there with this content.

        Raises:
            OutputError: something else is there, which would be lost.
        """
        file = self.folder / page
        try:
            known = hashlib.sha256(file.read_bytes()).hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError as error:
            raise OutputError(f"{file} cannot be read: {error.strerror}") from None
        if known != hash and not is_page(file) and page not in self._own:
            raise OutputError(f"{file} is there and no page of codeindex; expected a folder of its own for the output")
        return known != hash

    def orphans(self, pages: Iterable[str]) -> list[str]:
        """Files that codeindex made, and that are none of `pages`; not those of another index further inside."""
        known, found = set(pages), []
        for folder, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if name != STATE and not Path(folder, name, STATE).is_dir()]
            inside = os.path.relpath(folder, self.folder).replace(os.sep, "/")
            for name in files:
                page = name if inside == "." else f"{inside}/{name}"
                if page not in known and is_page(Path(folder, name)):
                    found.append(page)
        return sorted(found)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Staging]:
        """A place to write to, until `Staging.commit`; one process at a time. Completes what a killed build began.

        Raises:
            OutputError: another process writes.
        """
        (self.folder / STATE).mkdir(parents=True, exist_ok=True)
        with open(self.folder / _LOCK, "w") as lock:
            _lock(lock.fileno(), self.folder)
            staging = Staging(self.folder)
            staging.resume()
            try:
                yield staging
            except BaseException:
                staging.clear()
                raise
            staging.clear()


class Staging:
    """Files on their way: until `commit` the output is as it was. From there on, whatever happens, a later build puts
    everything in its place."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._staged = folder, folder / _STAGED

    def resume(self) -> None:
        """Complete a commit that was killed, and make room."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            self._place(json.loads((self._folder / _JOURNAL).read_bytes()))
        self.clear()
        self._staged.mkdir()

    def clear(self) -> None:
        """Forget what is staged, unless it is being committed."""
        if not (self._folder / _JOURNAL).exists():
            shutil.rmtree(self._staged, ignore_errors=True)

    def write(self, page: str, content: bytes) -> None:
        """Keep a page."""
        file = self._staged / page
        try:
            file.write_bytes(content)
        except FileNotFoundError:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)

    def facts(self, lines: Iterable[tuple[str, str]]) -> None:
        """Keep facts: key and JSON, one by one."""
        with open(self._staged / "facts.gz", "wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
            for key, stored in lines:
                packed.write(f"{key}\t{stored}\n".encode())

    def names(self, lines: Iterable[bytes]) -> None:
        """Keep the lines that `codeindex where` looks names up in, sorted."""
        with open(self._staged / "names.txt", "wb") as file:
            file.writelines(lines)

    def commit(self, written: Iterable[str], deleted: Iterable[str], manifest: Mapping[str, Any]) -> None:
        """Put everything in its place."""
        journal = {"written": list(written), "deleted": list(deleted), "manifest": manifest}
        (self._staged / "journal.json").write_text(json.dumps(journal))
        os.replace(self._staged / "journal.json", self._folder / _JOURNAL)
        self._place(journal)

    def _place(self, journal: Mapping[str, Any]) -> None:
        (self._folder / _MANIFEST).unlink(missing_ok=True)  # so that half of it is not taken for whole
        for page in journal["deleted"]:  # first: it can be the old name of one that is written, but for its case
            (self._folder / page).unlink(missing_ok=True)
            self._remove_empty((self._folder / page).parent)
        moves = [(page, page) for page in journal["written"]]
        for name, place in (*moves, ("facts.gz", _FACTS), ("names.txt", NAMES)):
            (self._folder / place).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # moved before a kill
                os.replace(self._staged / name, self._folder / place)
        (self._staged / "manifest.json").write_text(json.dumps(journal["manifest"], indent=0))
        os.replace(self._staged / "manifest.json", self._folder / _MANIFEST)
        (self._folder / _JOURNAL).unlink()

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._folder and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two builds at once are then the user's care
        return
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, no child inherits it
    except OSError:
        raise OutputError(f"another codeindex is writing to {folder}; wait for it") from None
