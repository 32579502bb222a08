"""Line numbers as git, forges and editors count them: a line ends with a line feed, and with nothing else."""

from __future__ import annotations

import dataclasses
import re

from codeindex.facts import Facts

_END = re.compile(rb"\r\n?|\n")


def unified(content: bytes) -> bytes:
    r"""A text whose lines all end with a line feed, as all parsers count them alike then.

    Example:
        >>> unified(b"a\r\nb\rc\n")
        b'a\nb\nc\n'
    """
    return _END.sub(b"\n", content) if b"\r" in content else content


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, without their line feeds. Unlike `str.splitlines`, form feeds and the like end none.

    Example:
        >>> split_lines("a\fb\n\nc\n")
        ['a\x0cb', '', 'c']
    """
    return text.removesuffix("\n").split("\n")


def renumbered(facts: Facts, content: bytes) -> Facts:
    """Facts of `unified(content)` with the lines of `content`: lone carriage returns, which end lines for most parsers,
    end none for git."""
    ends = _END.findall(content) if b"\r" in content else []
    if b"\r" not in ends:
        return facts
    numbers = [0, 1]
    for end in ends:
        numbers.append(numbers[-1] + (end != b"\r"))

    def of(line: int) -> int:
        return numbers[min(line, len(numbers) - 1)]

    replace = dataclasses.replace
    return replace(
        facts,
        definitions=tuple(replace(each, start=of(each.start), end=of(each.end)) for each in facts.definitions),
        imports=tuple(replace(each, line=of(each.line)) for each in facts.imports),
        error=re.sub(r"\bline (\d+)", lambda found: f"line {of(int(found[1]))}", facts.error),
    )
