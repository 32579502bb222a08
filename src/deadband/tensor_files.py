"""Files of tensors and a JSON object that says what they are: safetensors, with one key of deadband's in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from deadband.files import replacing


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Any], key: str, about: Mapping[str, Any]) -> None:
    """Write torch tensors or NumPy arrays and what they are, all or nothing.

    Args:
        path: of the file.
        tensors: by name, contiguous.
        key: what `read_tensors` knows the kind of file by.
        about: JSON values.
    """
    if any(hasattr(tensor, "requires_grad") for tensor in tensors.values()):
        from safetensors.torch import save_file
    else:
        from safetensors.numpy import save_file  # type: ignore[assignment]
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, {key: json.dumps(about)})


def read_tensors(
    path: str | os.PathLike, key: str, what: str, version: int | None = None, framework: str = "pt"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_tensors` wrote: the JSON object, without its version if one is asked for, and the tensors.

    Args:
        path: of the file.
        key: of the kind of file.
        what: the kind in words, for messages.
        version: that the JSON object has to have.
        framework: `pt` or `numpy`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind or version, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}; expected {what}")
    try:
        with safetensors.safe_open(path, framework) as file:
            about = json.loads((file.metadata() or {}).get(key, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not {what}: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{os.fspath(path)!r} is not {what}: its header has no object {key!r}")
    if version is not None and (found := about.pop("version", None)) != version:
        raise ValueError(f"{os.fspath(path)!r} is not {what} of version {version} (found: {found!r})")
    return about, tensors
