"""Where a name is defined and who uses it, from the index alone."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator
from pathlib import Path

from codeindex.names import simple_name, without_parameters
from codeindex.store import NAMES, OutputError


@dataclasses.dataclass(frozen=True)
class Place:
    """A definition, and the files that use it."""

    name: str
    kind: str
    path: str
    start: int
    end: int
    users: tuple[str, ...]


def where(name: str, output: Path) -> list[Place]:
    """Every definition of a name: its last part (`method`), or as much of it as is given (`Class.method`).

    Raises:
        OutputError: there is no index.
    """
    try:
        with open(output / NAMES, "rb") as file:
            try:
                lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:  # an empty file
                return []
            with lines:
                simple = dict.fromkeys((simple_name(name), name))  # a heading's name is not split
                return [each for key in simple for each in _places(lines, key) if _ends(each.name, name)]
    except FileNotFoundError:
        raise OutputError(f"no index in {output}; `codeindex build REPO -o {output}` makes one") from None


def _ends(full: str, name: str) -> bool:
    ends = (f".{name}", f"::{name}", f'."{name}"')
    return any(each == name or each.endswith(ends) for each in (full, without_parameters(full)))


def _places(lines: mmap.mmap, name: str) -> Iterator[Place]:
    """The entries of a simple name, found by halving: lines are sorted."""
    key = name.encode("utf-8", "backslashreplace") + b"\t"
    low, high = 0, len(lines)
    while low < high:
        start = lines.rfind(b"\n", 0, (low + high) // 2) + 1
        end = lines.find(b"\n", start) + 1
        if lines[start : min(end, start + len(key))] < key:
            low = end
        else:
            high = start
    while lines[low : low + len(key)] == key:
        end = lines.find(b"\n", low)
        _, full, kind, path, first, last, users = lines[low:end].decode().split("\t")
        yield Place(full, kind, path, int(first), int(last), tuple(filter(None, users.split("\0"))))
        low = end + 1
