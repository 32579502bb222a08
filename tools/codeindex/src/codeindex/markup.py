"""Facts of Markdown and reStructuredText: headings, links and terms set as code."""

from __future__ import annotations

import re
from collections.abc import Iterator

from codeindex.facts import Definition, Facts, Import, first_sentence

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
_HEADING = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+[^)]*)?\)")
_REFERENCE = re.compile(r" {0,3}\[[^\]]+\]:\s*<?([^\s>]+)>?")
_NO_PROSE = "<[!|>#-*=:+"
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


def parse_markdown(text: str) -> Facts:
    """Headings outside of fences, with the lines down to the next of their level; links; identifiers set as code."""
    headings: list[tuple[int, int, str]] = []  # line, level, title
    imports, mentions = [], set()
    about: list[str] = []  # the first paragraph of prose
    fence, before, complete = "", "", False
    lines = text.splitlines()
    for number, line in enumerate(lines[_front_matter(lines) :], _front_matter(lines) + 1):
        opened = _FENCE.match(line)
        if fence:
            if opened and opened[1].startswith(fence) and not opened[2].strip():
                fence = ""
            else:
                mentions.update(IDENTIFIER.findall(line))
            continue
        heading, underline = _HEADING.match(line), _UNDERLINE.match(line)
        if opened and not (opened[1][0] == "`" and "`" in opened[2]):
            fence = opened[1]
        elif heading:
            headings.append((number, len(heading[1]), _plain(heading[2] or "")))
        elif underline and before.strip() and not before.startswith(("    ", "\t", ">", "-", "*", "|")):
            headings.append((number - 1, 1 if underline[1][0] == "=" else 2, _plain(before)))
            if about == [before]:
                about, complete = [], False
        prose = line.strip() and not (heading or underline or fence) and not line.startswith(("    ", "\t"))
        if prose and not complete and (about or line.strip()[0] not in _NO_PROSE):
            about.append(line)
        elif about:
            complete = True
        if not fence:
            for pattern in (_LINK, _REFERENCE):
                imports += [Import(found[1], (), number) for found in pattern.finditer(CODE_SPAN.sub("", line))]
            for found in CODE_SPAN.finditer(line):
                mentions.update(IDENTIFIER.findall(found[2]))
        before = "" if fence else line
    sections = tuple(_sections(headings, len(lines)))
    return Facts(
        "Markdown", _plain(first_sentence("\n".join(about))), sections, tuple(imports), tuple(sorted(mentions))
    )


def _front_matter(lines: list[str]) -> int:
    """How many lines a YAML block at the top takes."""
    if not lines or lines[0].strip() != "---":
        return 0
    return next((number for number, line in enumerate(lines[1:], 2) if line.strip() in ("---", "...")), 0)


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
_EXTERNAL = re.compile(r"`[^`<]*<([^`>]+)>`__?")
_TARGET = re.compile(r"\s*\.\.\s+_[^:]+:\s*(\S+)")
_INCLUDED = re.compile(r"\s*\.\.\s+(?:include|literalinclude|image|figure)::\s*(\S+)")
_LITERAL = re.compile(r"``(.+?)``|:[\w:+-]+:`~?([^`]+)`")


def parse_rst(text: str) -> Facts:
    """Headings (underlined lines), links and included files, identifiers set as code or named by roles."""
    lines = text.splitlines()
    styles: list[str] = []  # of adornments, in order of their first use: that is their level
    headings: list[tuple[int, int, str]] = []
    imports, mentions = [], set()
    for number, line in enumerate(lines, 1):
        title = lines[number - 2] if number > 1 else ""
        adorned = _ADORNMENT.match(line)
        if adorned and title.strip() and not title[:1].isspace() and len(line.rstrip()) >= len(title.rstrip()) \
                and not _ADORNMENT.match(title):  # fmt: skip
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
