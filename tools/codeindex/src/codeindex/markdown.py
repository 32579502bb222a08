"""Pieces of Markdown that hold any text: code, links, anchors, paths of pages."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from urllib.parse import quote

from codeindex.facts import Definition
from codeindex.markup import CODE_SPAN

PICTURE = "imports.svg"
_RESERVED = re.compile(r"(?:index|readme|keywords(?:-\d+)?|404)_*$", re.I)
_LONGEST = 240  # bytes of a name that file systems take, with the page's ending
_UNSAFE = re.compile(rb'[\x00-\x1f\x7f%#?<>:"|*\\]')


class Pages:
    """Where the pages of files and folders are: a file's has the file's own path and `.md`, such that each can be a
    file on any system and a part of an address, and no two are one, also where upper and lower case are the same.

    Args:
        paths: of all files.

    Example:
        >>> pages = Pages(["a/index", ".github/x.yml", "what?.py", "A.py", "a.py"])
        >>> [pages.of("a/index"), pages.of(".github/x.yml"), pages.of("what?.py"), pages.of("a.py")]
        ['a/index_.md', '%2Egithub/x.yml.md', 'what%3F.py.md', 'a.py~2.md']
        >>> pages.folder("a"), pages.folder("", "keywords.md")
        ('a/index.md', 'keywords.md')
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._places = {"": ""}  # of files and folders
        taken = {PICTURE}
        for path in sorted(paths):
            end = path.find("/")
            while end >= 0:
                self._place(path[:end], _folder_name, "/", taken)
                end = path.find("/", end + 1)
            self._place(path, _page_name, ".md", taken)

    def _place(self, path: str, name_of: Callable[[str], str], ending: str, taken: set[str]) -> None:
        if path in self._places:
            return
        folder, _, name = path.rpartition("/")
        stem = self._places[folder] + name_of(name)
        places = (f"{stem}{'' if number == 1 else f'~{number}'}{ending}" for number in itertools.count(1))
        place = next(place for place in places if _folded(place) not in taken)
        taken.add(_folded(place))
        self._places[path] = place

    def of(self, path: str) -> str:
        """The page of a file."""
        return self._places[path]

    def folder(self, folder: str, name: str = "index.md") -> str:
        """A page of a folder; the root is the empty folder."""
        return self._places[folder] + name


def _page_name(name: str) -> str:
    return _safe(name + "_" if _RESERVED.match(name) else name)


def _folder_name(name: str) -> str:
    safe = _safe(name)
    return safe[:-3] + "%2E" + safe[-2:] if safe.lower().endswith(".md") else safe  # `x` has the page `x.md`


def _folded(place: str) -> str:
    """The same for all that are one file on some systems; a folder is as a file of its name."""
    return unicodedata.normalize("NFD", place.removesuffix("/").casefold())


def _safe(part: str) -> str:
    raw = _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], os.fsencode(part))
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "".join(chr(byte) if byte < 128 else f"%{byte:02X}" for byte in raw)
    if text.startswith("."):
        text = "%2E" + text[1:]
    if len(text.encode()) > _LONGEST:
        text = text.encode()[: _LONGEST - 20].decode(errors="ignore") + "~" + hashlib.sha256(raw).hexdigest()[:16]
    return text


@functools.cache
def shown(path: str) -> str:
    """A path as text: what is not UTF-8 or cannot be printed as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def code(text: str) -> str:
    """Text set as code, whatever it holds.

    Example:
        >>> code("a"), code("`x`")
        ('`a`', '`` `x` ``')
    """
    text = " ".join(text.split())
    if "`" not in text and text:
        return f"`{text}`"
    runs = {len(run) for run in re.findall("`+", text)}
    mark = "`" * next(length for length in range(1, len(runs) + 2) if length not in runs)
    return f"{mark} {text} {mark}" if text.startswith("`") or text.endswith("`") or not text else f"{mark}{text}{mark}"


_ENTITIES = {"&": "&amp;", "<": "&lt;", "~": "&#126;", "$": "&#36;"}


def plain(text: str) -> str:
    r"""Prose of others on one line, such that it stays prose: no links, emphasis, HTML, lists or formulas come of it.
    What it sets as code stays code.

    Example:
        >>> plain("a *b* `*c*` <d>"), plain("1. one")
        ('a \\*b\\* `*c*` &lt;d\\>', '1\\. one')
    """
    text = " ".join(text.split())
    made, at = [], 0
    for found in CODE_SPAN.finditer(text):
        made += [_escaped(text[at : found.start()]), code(found[2])]
        at = found.end()
    made.append(_escaped(text[at:]))
    prose = "".join(made)
    if prose.startswith((":::", "!!!", "???", "===")):  # what begins a block in some renderers
        return f"&#{ord(prose[0])};{prose[1:]}"
    return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", prose)


def _escaped(text: str) -> str:
    text = re.sub(r"[\\`*_\[\]>#]", r"\\\g<0>", text)
    return re.sub("[&<~$]", lambda found: _ENTITIES[found[0]], text)


def link(label: str, target: str, page: str, anchor: str = "") -> str:
    """A link from the page `page` to the page `target`, both paths from the output folder, or to an id there."""
    folder = page[: page.rfind("/") + 1]
    if anchor:
        return f"{link(label, target, page)[:-1]}#{_quoted(anchor)})"
    if target.startswith(folder):
        return f"[{label}]({_quoted(target[len(folder) :])})"
    return f"[{label}]({'../' * page.count('/')}{_quoted(target)})"


@functools.cache
def _quoted(path: str) -> str:
    return quote(os.fsencode(path), safe="/.-_~:")


NO_LINKS = "none"


class Sources:
    """Links to source files.

    Args:
        root: the repository's folder, as seen from the output folder, with forward slashes.
        url: instead, the address of a file on a forge, with `{path}` in it; or `none`, for text without links.
    """

    def __init__(self, root: str, url: str = "") -> None:
        self._root, self._url = _quoted(root), url

    def link(self, label: str, path: str, page: str, fragment: str = "") -> str:
        """A link from a page to a file, or to lines of it."""
        if self._url == NO_LINKS:
            return label
        if self._url:
            return f"[{label}]({self._url.replace('{path}', _quoted(path))}{fragment})"
        return f"[{label}]({'../' * page.count('/')}{self._root}/{_quoted(path)}{fragment})"


def lines(definition: Definition) -> str:
    """The fragment of a forge's address for a definition's lines."""
    return f"#L{definition.start}-L{definition.end}" if definition.end > definition.start else f"#L{definition.start}"


def count(number: int, one: str, many: str = "") -> str:
    """A number with its noun: `1 file`, `1,200 classes`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
