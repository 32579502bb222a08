"""Write files so that a reader meets the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes `path`'s place when the block ends without an exception.

    Works for a file and for a folder (make it at the yielded path). On any exception, Ctrl-C included, what was
    written is removed and what stood at `path` before still stands there.

    Example:
        >>> with replacing("figures.json") as temporary:
        ...     _ = temporary.write_text("{}")

    Raises:
        OSError: the folder that holds `path` does not exist or cannot be written.
    """
    path = Path(path)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = holder / path.name
    try:
        yield temporary
        _put(temporary, path, holder / "replaced")
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _put(temporary: Path, path: Path, aside: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        os.replace(temporary, path)
        return
    if not temporary.exists():
        raise FileNotFoundError(f"nothing was written to take the place of {os.fspath(path)!r}")
    try:
        os.replace(path, aside)  # one folder cannot be put over another in one step
        os.replace(temporary, path)
    except BaseException:
        if aside.exists() and not path.exists():
            os.replace(aside, path)
        raise


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, all or nothing; NaN and infinity become null, as JSON has neither."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """`value` with NaN and infinity replaced by None, which is JSON's null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def cache_folder() -> Path:
    """Where converted models are kept: `$DEADBAND_CACHE`, or `deadband` in the user's cache folder."""
    if folder := os.environ.get("DEADBAND_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deadband"
