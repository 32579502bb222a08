"""Text to calibrate and to judge on, cut into windows of tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {os.fspath(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)!r} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{os.fspath(path)!r} is empty; expected text to measure with")
    return text


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
