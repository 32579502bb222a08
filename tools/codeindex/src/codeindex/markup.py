"""Facts of Markdown and reStructuredText: headings, links and terms set as code."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from codeindex.facts import Definition, Facts, Import, first_sentence
from codeindex.lines import split_lines

_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+[^)]*)?\)")
_FRONT_MATTER = re.compile(r"(---|\+\+\+)[ \t]*\n(?:.*\n)*?(?:\1|\.\.\.)[ \t]*(?:\n|\Z)")
_NO_PROSE = "<[!|:+"
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


@functools.cache
def _blocks() -> MarkdownIt:
    """A parser of CommonMark and tables that leaves the text of blocks as it is."""
    parser = MarkdownIt("commonmark").enable("table")
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser


def parse_markdown(text: str) -> Facts:
    """Headings, with the lines down to the next of their level; links; identifiers set as code."""
    headings: list[tuple[int, int, str]] = []  # line, level, title
    links: list[tuple[int, str]] = []
    mentions: set[str] = set()
    about = ""  # the first paragraph of prose
    matter = _FRONT_MATTER.match(text)
    shift = matter[0].count("\n") + 1 if matter else 1
    env: dict[str, Any] = {}
    before: Token | None = None
    for each in _blocks().parse(text[matter.end() :] if matter else text, env):
        line = each.map[0] + shift if each.map else 0
        if each.type in ("fence", "code_block"):
            mentions.update(IDENTIFIER.findall(each.content))
        elif each.type == "inline":
            if before is not None and before.type == "heading_open" and before.level == 0:
                headings.append((line, int(before.tag[1:]), _plain(" ".join(each.content.split()))))
            elif before is not None and before.type == "paragraph_open" and before.level == 0 and not about:
                about = each.content if each.content[:1] not in _NO_PROSE else ""
            links += ((line + row, target) for row, target in _inline(each.content, mentions))
        before = each
    definitions = [*env.get("references", {}).values(), *env.get("duplicate_refs", ())]
    links += ((each["map"][0] + shift, each["href"]) for each in definitions)
    return Facts(
        "Markdown", _plain(first_sentence(about)),
        tuple(_sections(headings, len(split_lines(text)))),
        tuple(Import(target, (), line) for line, target in sorted(links, key=lambda link: link[0])),
        tuple(sorted(mentions)),
    )  # fmt: skip


def _inline(text: str, mentions: set[str]) -> Iterator[tuple[int, str]]:
    """The links in a block's text, with the number of lines above each; adds what is set as code to `mentions`."""
    for found in CODE_SPAN.finditer(text):
        mentions.update(IDENTIFIER.findall(found[2]))
    prose = CODE_SPAN.sub("", text)
    row = at = 0
    for found in _LINK.finditer(prose):
        row += prose.count("\n", at, found.start())
        at = found.start()
        yield row, found[1]


def _plain(text: str) -> str:
    """Without marks of links, code and emphasis."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"[`*]|(?<!\w)_|_(?!\w)", "", text).strip()


def _sections(headings: list[tuple[int, int, str]], lines: int) -> list[Definition]:
    """Each heading with the lines down to the next of its level or above."""
    made: list[Definition] = []
    next_at = [lines + 1] * 100  # the line of the next heading of each level
    for line, level, title in reversed(headings):
        end = min(next_at[: level + 1]) - 1
        next_at[level] = line
        if title:
            made.append(Definition(title, "heading", line, max(end, line)))
    return made[::-1]


_DIRECTIVE = re.compile(r"\s*\.\.\s+(?:[\w-]+:)*[\w-]+::")
_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*$")
_NO_TITLE = re.compile(rf"\s|$|\.\. |{_ADORNMENT.pattern}")
_EXTERNAL = re.compile(r"`[^`<]*<([^`>]+)>`__?")
_TARGET = re.compile(r"\s*\.\.\s+_[^:]+:\s*(\S+)")
_INCLUDED = re.compile(r"\s*\.\.\s+(?:include|literalinclude|image|figure)::\s*(\S+)")
_LITERAL = re.compile(r"``(.+?)``|:[\w:+-]+:`~?([^`]+)`")


def parse_rst(text: str) -> Facts:
    """Headings (underlined lines), links and included files, identifiers set as code or named by roles."""
    lines = split_lines(text)
    styles: list[str] = []  # of adornments, in order of their first use: that is their level
    headings: list[tuple[int, int, str]] = []
    imports, mentions = [], set()
    for number, line in enumerate(lines, 1):
        title = lines[number - 2] if number > 1 else ""
        adorned = _ADORNMENT.match(line)
        if adorned and _NO_TITLE.match(title) is None and len(line.rstrip()) >= len(title.rstrip()):
            over = number > 2 and _ADORNMENT.match(lines[number - 3]) is not None
            style = adorned[1] * (2 if over else 1)
            if style not in styles:
                styles.append(style)
            headings.append((number - 1, styles.index(style) + 1, title.strip()))
        for pattern in (_EXTERNAL, _TARGET, _INCLUDED):
            imports += [Import(found[1], (), number) for found in pattern.finditer(line)]
        for found in _LITERAL.finditer(line):
            mentions.update(IDENTIFIER.findall(found[1] or found[2]))
    about = ""
    titles = {line for line, _, _ in headings}
    for number, line in enumerate(lines, 1):
        plain = line.strip() and not line[:1].isspace() and not line.startswith("..") and not _ADORNMENT.match(line)
        if plain and number not in titles and not _DIRECTIVE.match(line) and not line.startswith((":", "|", "=")):
            about = "\n".join(_until_blank(lines[number - 1 :]))
            break
    about = re.sub(r":[\w:+-]+:`~?([^`]+)`|`([^`<]*?)\s*<[^`>]*>`__?", lambda found: found[1] or found[2], about)
    return Facts(
        "reStructuredText",
        first_sentence(about.replace("`", "").replace("*", "")),
        tuple(_sections(headings, len(lines))),
        tuple(imports),
        tuple(sorted(mentions)),
    )


def _until_blank(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.strip():
            return
        yield line
