"""The header of a GGUF file, read strictly: nothing in it is believed before it was held against the file's size.

Readers elsewhere follow lying counts and offsets to the wrong data, or into memory that is not there. So this comes
first, wherever deadband reads such a file. A model may lie in several files (`-00001-of-00003.gguf`): they are read
together, whichever of them is named.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import mmap
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_KEPT = 4096  # entries of an array that are kept; longer ones are a vocabulary's
_MOST_DIMENSIONS = 4
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: lengths, the fastest first, as the file has them.
        type: GGML's name of its type (`Q8_0`, `F32`, ...).
        file: in which it lies, from byte `start` on, in `size` bytes.
    """

    shape: tuple[int, ...]
    type: str
    file: Path
    start: int
    size: int

    def rows(self) -> np.ndarray:
        """Its bytes, [rows, bytes of a row], mapped from the file."""
        rows = math.prod(self.shape[1:])
        return np.memmap(self.file, np.uint8, "r", self.start, (rows, self.size // rows))

    def first_rows(self, count: int) -> np.ndarray:
        """Its first rows in float32, [rows, entries of a row]; of a vector, all of it."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = np.ascontiguousarray(self.rows()[:count])
        return dequantize(rows, GGMLQuantizationType[self.type]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Header:
    """The metadata and the tensors of a model.

    Attributes:
        files: in which it lies, the first first.
        metadata: values by key; of arrays with more than 4,096 entries the length alone, as a `Skipped`.
        tensors: of all files, by name.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A long array of which the length alone is known."""

    length: int


def read_header(path: str | os.PathLike) -> Header:
    """The header of the model that lies in this file, or in this file and others.

    Raises:
        FileNotFoundError: there is no such file, or another one of a model in several.
        ImportError: the package `gguf` is not installed.
        ValueError: it is no GGUF file, or is damaged.

    Example:
        >>> read_header("model.gguf").metadata["general.architecture"]            # doctest: +SKIP
        'llama'
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("GGUF files are read with the package gguf; install it with: pip install gguf")
    path = Path(path)
    first = _read(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 < count < 10**5:
        raise ValueError(f"{os.fspath(path)!r} is damaged: split.count is {count!r}")
    if count == 1:
        return first
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise ValueError(
            f"{os.fspath(path)!r} is one part of a model split into {count} files; expected a name that ends in "
            f"-00001-of-{count:05}.gguf, with the other parts beside it"
        )
    metadata: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    files = [path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for number, file in enumerate(files):
        if not file.is_file():
            raise FileNotFoundError(f"part {number + 1} of {count} of a split model is missing: {os.fspath(file)!r}")
        part = _read(file)
        if part.metadata.get("split.no") != number or part.metadata.get("split.count") != count:
            raise ValueError(f"{os.fspath(file)!r} is not part {number + 1} of {count}, as its name says")
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{os.fspath(file)!r} has tensor {min(twice)!r}, which an earlier part has, too")
        metadata = {**part.metadata, **metadata}
        tensors |= part.tensors
    if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise ValueError(
            f"the {count} parts of {os.fspath(path)!r} hold {len(tensors)} tensors, expected "
            f"{metadata['split.tensors.count']}"
        )
    return Header(tuple(files), metadata, tensors)


def _read(path: Path) -> Header:
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file {os.fspath(path)!r}")
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            raise ValueError(f"{os.fspath(path)!r} cannot be read as a GGUF file: it is too short")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                metadata, tensors = _Parser(data, path).header()
            except _DamagedError as error:
                raise ValueError(f"{os.fspath(path)!r} cannot be read as a GGUF file: {error}") from None
    return Header((path,), metadata, tensors)


class _DamagedError(Exception):
    pass


class _Parser:
    """Goes through the bytes of a header; a _DamagedError says what does not fit."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size, self.at = data, path, len(data), 0

    def header(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """Metadata and tensors."""
        if self.take(4) != b"GGUF":
            raise _DamagedError("it does not begin with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            what = "was written for machines of another byte order" if big else f"is of version {version}"
            raise _DamagedError(f"it {what}; versions 2 and 3 are known")
        tensor_count, count = self.number("<Q"), self.number("<Q")
        self.room_for(tensor_count, 24, "tensors")
        self.room_for(count, 13, "metadata")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self.text()
            if key in metadata:
                raise _DamagedError(f"{key!r} stands in it twice")
            metadata[key] = self.value(self.number("<I"))
        return metadata, self.tensors(tensor_count, metadata.get("general.alignment", 32))

    def tensors(self, count: int, alignment: Any) -> dict[str, TensorInfo]:
        """Names, shapes and places of tensors, which have to lie one after the other up to the end of the file."""
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16 or alignment % 8:
            raise _DamagedError(f"general.alignment is {alignment!r}")
        infos = {}
        for _ in range(count):
            name, dimensions = self.text(), self.number("<I")
            if name in infos:
                raise _DamagedError(f"tensor {name!r} stands in it twice")
            if not 0 < dimensions <= _MOST_DIMENSIONS:
                raise _DamagedError(f"tensor {name!r} has {dimensions} dimensions")
            shape = tuple(self.number("<Q") for _ in range(dimensions))
            infos[name] = shape, self.number("<I"), self.number("<Q")
        begin = -(-self.at // alignment) * alignment
        end = begin
        placed = {}
        for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
            if offset % alignment or begin + offset != end:
                raise _DamagedError(f"tensor {name!r} lies at byte {offset} of the data, expected {end - begin}")
            type_name, size = _type_and_size(name, shape, kind)
            if begin + offset + size > self.size:
                raise _DamagedError(f"tensor {name!r} ends beyond the file, which may have been cut off")
            placed[name] = TensorInfo(shape, type_name, self.path, begin + offset, size)
            end = begin + offset + -(-size // alignment) * alignment
        if self.size - end >= alignment:
            raise _DamagedError(f"{self.size - end:,} bytes follow its last tensor; it has more tensors than it says")
        return {name: placed[name] for name in infos}

    def value(self, kind: int, inside: bool = False) -> Any:
        """A value of metadata."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or inside:
            raise _DamagedError(f"metadata has a value of type {kind}")
        kind, count = self.number("<I"), self.number("<Q")
        form = _SCALARS.get(kind)
        self.room_for(count, struct.calcsize(form) if form else 8, "entries of an array")
        if form is not None and count > _KEPT:
            self.take(count * struct.calcsize(form))
            return Skipped(count)
        if kind == _STRING and count > _KEPT:
            for _ in range(count):
                self.take(self.number("<Q"))
            return Skipped(count)
        return [self.value(kind, inside=True) for _ in range(count)]

    def room_for(self, count: int, least: int, what: str) -> None:
        """Whether so many of at least so many bytes can follow."""
        if count > (self.size - self.at) // least:
            raise _DamagedError(f"it says that {count:,} {what} follow, for which it is too short")

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if size > self.size - self.at:
            raise _DamagedError("it ends in the middle of its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        """The next number."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """The next string."""
        try:
            return self.take(self.number("<Q")).decode()
        except UnicodeDecodeError:
            raise _DamagedError("a name or a text is not UTF-8") from None


def _type_and_size(name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise _DamagedError(f"tensor {name!r} is of type {kind}, which is not known") from None
    if not all(shape) or shape[0] % block:
        raise _DamagedError(f"tensor {name!r} has the shape {list(shape)}, whose rows are no whole blocks of {block}")
    return known.name, math.prod(shape) // block * size
