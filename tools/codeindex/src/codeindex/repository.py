"""The files of a git repository: paths, modes and blob ids."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

FILE, LINK, SUBMODULE = "100644", "120000", "160000"


class RepositoryError(Exception):
    """The folder is not a git repository, or git failed."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tracked file as it is in the working tree.

    Attributes:
        path: with forward slashes; bytes that are not UTF-8 are surrogates, as `os.fsdecode` makes them.
        blob: git's id of its content (of a submodule: of its commit).
        mode: git's.
    """

    path: str
    blob: str
    mode: str


class Repository:
    """A working tree.

    Example:
        >>> Repository(Path("/nowhere"))  # doctest: +SKIP
        Traceback (most recent call last):
        codeindex.repository.RepositoryError: /nowhere is not a folder
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise RepositoryError(f"{folder} is not a folder")
        self.root = folder
        try:
            top = os.fsdecode(self._git("rev-parse", "--show-toplevel")).rstrip("\n")
        except RepositoryError as error:
            raise RepositoryError(f"{folder} is not a git repository: {error}") from None
        self.root = Path(top)
        self._algorithm = self._git("rev-parse", "--show-object-format").decode().strip() or "sha1"

    def _git(self, *arguments: str, input: bytes | None = None) -> bytes:
        return _git(self.root, *arguments, input=input)

    def entries(self, ignore: Sequence[str] = ()) -> list[Entry]:
        """All tracked files that are there, sorted by path, less those that git pathspecs in `ignore` match."""
        excluded = [f":(top,exclude,glob){pattern}" for pattern in ignore]
        paths = ["--", ":(top)", *excluded]
        stored: dict[bytes, tuple[str, str]] = {}
        for record in self._git("ls-files", "-s", "-z", *paths).split(b"\0")[:-1]:
            about, path = record.split(b"\t", 1)
            mode, blob, _stage = about.decode().split()
            stored.setdefault(path, (mode, blob))  # of a conflict, the first stage
        for path in self._git("ls-files", "-m", "-d", "-z", *paths).split(b"\0")[:-1]:
            if path not in stored:
                continue
            if stored[path][0] != SUBMODULE:
                now = self._now(os.fsdecode(path), *stored.pop(path))
                stored |= {} if now is None else {path: now}
        return sorted((Entry(os.fsdecode(path), blob, mode) for path, (mode, blob) in stored.items()),
                      key=lambda entry: entry.path)  # fmt: skip

    def _now(self, path: str, mode: str, blob: str) -> tuple[str, str] | None:
        """Mode and blob of what is in the working tree; nothing, if it is not there."""
        file = self.root / path
        try:
            if file.is_symlink():
                target = os.fsencode(os.readlink(file))
                return LINK, hashlib.new(self._algorithm, b"blob %d\0" % len(target) + target).hexdigest()
            if not file.is_file():
                return None
            with open(file, "rb") as opened:
                made = hashlib.new(self._algorithm, b"blob %d\0" % os.fstat(opened.fileno()).st_size)
                while part := opened.read(1 << 20):
                    made.update(part)
            return (FILE if mode == LINK else mode), made.hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:  # it is there, and cannot be read
            return mode, blob

    def said_generated(self, paths: Iterable[str]) -> dict[str, bool]:
        """What `.gitattributes` says of files as `linguist-generated`, where it says something."""
        given = b"".join(os.fsencode(path) + b"\0" for path in paths)
        fields = self._git("check-attr", "--stdin", "-z", "linguist-generated", input=given).split(b"\0")[:-1]
        return {
            os.fsdecode(path): value in (b"set", b"true")
            for path, value in zip(fields[::3], fields[2::3], strict=True)
            if value != b"unspecified"
        }


def stored_content(root: Path, entry: Entry) -> bytes:
    """What git has stored of a file that is not in the working tree."""
    return _git(root, "cat-file", "blob", entry.blob)


def _git(root: Path, *arguments: str, input: bytes | None = None) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], input=input, capture_output=True, check=False)
    except FileNotFoundError:
        raise RepositoryError("git is not installed") from None
    if done.returncode:
        raise RepositoryError(done.stderr.decode(errors="replace").strip() or f"git {arguments[0]} failed")
    return done.stdout
