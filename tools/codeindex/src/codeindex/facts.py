"""What is known of one file: plain data, made by a parser, stored as JSON, drawn by `pages`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

DOCUMENTS = ("Markdown", "reStructuredText")


@dataclasses.dataclass(frozen=True, slots=True)
class Definition:
    """A name that a file defines.

    Attributes:
        name: with the scopes around it, such as `Class.method` or `ns::Class::method`.
        kind: class, function, method, macro, heading, key, ...
        start, end: lines, the first is 1.
        signature: on one line; empty where the name says all.
        doc: the first sentence or line of its documentation.
        public: whether it is meant for other files.
    """

    name: str
    kind: str
    start: int
    end: int
    signature: str = ""
    doc: str = ""
    public: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
    """What a file asks for: a module, a header, a link target.

    Attributes:
        target: as it is written, such as `a.b`, `ATen/core/Tensor.h`, `./menu`.
        names: what is taken from it, if it says so.
        line: where.
        level: of a relative Python import.
    """

    target: str
    names: tuple[str, ...] = ()
    line: int = 0
    level: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one file.

    Attributes:
        language: such as Python; empty where the file was not parsed.
        doc: the file's own documentation, one sentence or paragraph.
        definitions: in the order of the file.
        imports: in the order of the file.
        mentions: the identifiers in it, sorted, each once; comments and strings do not count.
        error: what keeps the file from being read, or from being read whole.
        lines: how many.
        size: in bytes.
        note: what it is, where there is no language: binary, empty, a link.
        generated: whether it says so at its top.
    """

    language: str = ""
    doc: str = ""
    definitions: tuple[Definition, ...] = ()
    imports: tuple[Import, ...] = ()
    mentions: tuple[str, ...] = ()
    error: str = ""
    lines: int = 0
    size: int = 0
    note: str = ""
    generated: bool = False

    def to_json(self) -> str:
        """A line that `from_json` reads; short, as there are many."""
        definitions = [dataclasses.astuple(each) for each in self.definitions]
        imports = [dataclasses.astuple(each) for each in self.imports]
        rest = (self.error, self.lines, self.size, self.note, self.generated)
        stored = [self.language, self.doc, definitions, imports, " ".join(self.mentions), *rest]
        return json.dumps(stored, separators=(",", ":"))

    @staticmethod
    def from_json(stored: str) -> Facts:
        """What `to_json` was called on."""
        language, doc, definitions, imports, mentions, *rest = json.loads(stored)
        intern = sys.intern  # the same names are in many files
        return Facts(
            intern(language), doc,
            tuple(Definition(intern(name), intern(kind), *about) for name, kind, *about in definitions),
            tuple(Import(intern(target), tuple(map(intern, names)), *about) for target, names, *about in imports),
            tuple(map(intern, mentions.split())), *rest,
        )  # fmt: skip


_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?](?=\s)")


def first_sentence(text: str) -> str:
    """The first sentence of a documentation text, or its first paragraph, on one line.

    Example:
        >>> first_sentence("Reads, e.g. lines,\\nof text. Fast.")
        'Reads, e.g. lines, of text.'
    """
    paragraph = " ".join(text.strip().split("\n\n", 1)[0].split())
    end = _END.search(paragraph)
    return paragraph[: end.end()] if end else paragraph


NOT_ABOUT = re.compile(
    r"copyright|licen[sc]e|@generated|coding[:=]|-\*-|vim:|clang-format|eslint|yaml-language-server|^!", re.I
)
"""In leading comments that are about something else than the file."""


def leading_comment(text: str) -> str:
    """The first sentence of the `#` comment at the top of a file, unless it is about licences or editors."""
    block: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.startswith("#"):
            block.append(line.lstrip("#").strip())
            continue
        comment = "\n".join(each for each in block if not each.startswith("!"))
        if comment and not NOT_ABOUT.search(comment):
            return first_sentence(comment)
        block = []
        if line.strip():
            break
    return ""
