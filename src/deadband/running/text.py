"""Text to calibrate and to judge on, cut into windows of tokens."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, or of a UTF-16 or UTF-32 file that begins with its byte order mark.

    The mark is no part of the text, and every line ends with `\\n`.

    Example:
        >>> import pydoc
        >>> "documentation" in read_text(pydoc.__file__)
        True

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        ValueError: it is empty, or its bytes are not of its encoding.
    """
    path = Path(path)
    name = repr(os.fspath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{name} is a folder; expected a text file")
    if not path.exists():
        raise FileNotFoundError(f"there is no text file {name}")
    content = path.read_bytes()
    mark, encoding = next((each for each in _MARKS if content.startswith(each[0])), (b"", "UTF-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        offset = error.start + len(mark)
        byte = f"0x{content[offset]:02x} at offset {offset}"
        why = f"it begins with the mark of {encoding}, but " if mark else ""
        remedy = "convert it to UTF-8, for example with iconv"
        raise ValueError(f"{name} is not {encoding} text: {why}byte {byte}: {error.reason}; {remedy}") from None
    if not text.strip():
        raise ValueError(f"{name} is empty; expected text to measure with")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def python_documentation() -> tuple[str, str]:
    """English technical prose that every Python carries (`pydoc_data.topics`, 700 KB), in two halves of like content.

    Example:
        >>> calibration, evaluation = python_documentation()
        >>> "class" in calibration and "class" in evaluation
        True
    """
    from pydoc_data.topics import topics

    ordered = [topics[name] for name in sorted(topics)]
    return "\n\n".join(ordered[::2]), "\n\n".join(ordered[1::2])


def token_windows(tokenizer: Any, text: str, *, tokens: int, window: int) -> list[dict[str, Tensor]]:
    """Cut `text` into batches of one window each: `{"input_ids": [1, window], "attention_mask": [1, window]}`.

    Where the tokenizer begins a text with a token of its own (Gemma's and Llama's `<bos>`), every window begins with
    it: such a model has never seen a text without one, and predicts badly there.

    Args:
        tokenizer: a transformers tokenizer.
        text: any text; what does not fill a window is left out.
        tokens: as many whole windows as fit into so many tokens, at least one.
        window: tokens of a window.

    Raises:
        ValueError: the text is shorter than one window.
    """
    if window < 2 or tokens < 1:
        raise ValueError(f"window={window} and tokens={tokens}; expected a window of 2 or more and at least one token")
    first = _beginning(tokenizer)
    length = window - len(first)
    ids: list[int] = []
    for start in range(0, len(text), _CHARACTERS):  # in parts: tokenizers slow down on, and warn of, very long texts
        ids += tokenizer(text[start : start + _CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= max(tokens, window):
            break
    count = min(len(ids) // length, max(tokens // window, 1))
    if count == 0:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than one window of {window}; give more text or a smaller window"
        )
    text_rows = torch.tensor(ids[: count * length]).view(count, 1, length)
    rows = torch.cat([torch.tensor(first, dtype=torch.int64).expand(count, 1, -1), text_rows], -1)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, if it puts one."""
    token = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a", verbose=False)["input_ids"] if token is not None else []
    return [token] if len(ids) > 1 and ids[0] == token else []


_CHARACTERS = 100_000
_MARKS = (  # UTF-16's mark is the beginning of UTF-32's
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
