"""The layout of a Flax msgpack file: where each array's bytes lie, found without reading them.

Flax writes nested maps whose leaves are extension values, each a small msgpack tuple (shape, dtype, bytes), and cuts arrays
beyond a gigabyte into chunks. `flax.serialization` decodes the whole file at once, which a large model has no memory for.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16")
import numpy as np

from quikjax.errors import QuikError
from quikjax.files import refuse_lfs_pointer

_CHUNKED = "__msgpack_chunked_array__"
_ARRAY_TYPES = (1, 3)  # Flax's extension types of an array and of a NumPy scalar
# First byte: struct letter of a number, or of the length of what follows.
_NUMBERS = {0xCA: "f", 0xCB: "d", 0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
_STRINGS = {0xD9: "B", 0xDA: "H", 0xDB: "I"}
_BYTES = {0xC4: "B", 0xC5: "H", 0xC6: "I"}
_ARRAYS = {0xDC: "H", 0xDD: "I"}
_MAPS = {0xDE: "H", 0xDF: "I"}
_EXTENSIONS = {0xC7: "B", 0xC8: "H", 0xC9: "I"}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class _Short(Exception):
    """The file ended inside a value."""


class Span(NamedTuple):
    """Bytes that were passed over."""

    offset: int
    size: int


class Array(NamedTuple):
    """An array of the file: row-major, its bytes in one or several pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    pieces: tuple[Span, ...]


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def skip(self, size: int) -> Span:
        if size > len(self.data) - self.at:
            raise _Short
        span = Span(self.at, size)
        self.at += size
        return span

    def number(self, letter: str) -> Any:
        span = self.skip(struct.calcsize(">" + letter))
        return struct.unpack_from(">" + letter, self.data, span.offset)[0]

    def value(self) -> Any:
        """The next value: bytes as `Span`, arrays of Flax as `Array`, the rest as Python's own."""
        mark = self.number("B")
        if mark < 0x80:
            return mark
        if mark >= 0xE0:
            return mark - 0x100
        if mark < 0x90:
            return self.map(mark & 0x0F)
        if mark < 0xA0:
            return [self.value() for _ in range(mark & 0x0F)]
        if mark < 0xC0:
            return self.string(mark & 0x1F)
        if mark in _CONSTANTS:
            return _CONSTANTS[mark]
        if mark in _NUMBERS:
            return self.number(_NUMBERS[mark])
        if mark in _STRINGS:
            return self.string(self.number(_STRINGS[mark]))
        if mark in _BYTES:
            return self.skip(self.number(_BYTES[mark]))
        if mark in _ARRAYS:
            return [self.value() for _ in range(self.number(_ARRAYS[mark]))]
        if mark in _MAPS:
            return self.map(self.number(_MAPS[mark]))
        if mark in _FIXED_EXTENSIONS:
            return self.extension(_FIXED_EXTENSIONS[mark])
        if mark in _EXTENSIONS:
            return self.extension(self.number(_EXTENSIONS[mark]))
        raise ValueError(f"byte {self.at - 1} begins no value")

    def string(self, size: int) -> str:
        span = self.skip(size)
        return self.data[span.offset : span.offset + size].decode("utf-8")

    def map(self, count: int) -> dict[str, Any]:
        content = {}
        for _ in range(count):
            key = self.value()
            if not isinstance(key, str | int) or str(key) in content:
                raise ValueError(f"a map has the key {key!r}, twice or of a wrong kind")
            content[str(key)] = self.value()
        return content

    def extension(self, size: int) -> Array:
        kind, end = self.number("b"), self.at + size
        if end > len(self.data):
            raise _Short
        if kind not in _ARRAY_TYPES:
            raise ValueError(f"a value of extension type {kind} is no array")
        content = self.value()
        if self.at != end or not isinstance(content, list) or len(content) != 3 or not isinstance(content[2], Span):
            raise ValueError(f"the array that ends at byte {end} is not (shape, dtype, bytes)")
        shape, name, span = content
        return _array(shape, np.dtype(name), (span,))


def _array(shape: list[Any], dtype: np.dtype[Any], pieces: tuple[Span, ...]) -> Array:
    if not all(isinstance(axis, int) and axis >= 0 for axis in shape):
        raise ValueError(f"an array has the shape {shape}")
    held = sum(piece.size for piece in pieces)
    if held != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} has {held} bytes")
    return Array(tuple(shape), dtype, pieces)


def read_layout(path: Path) -> dict[str, Array]:
    """Every array of a Flax msgpack file by its path, the names joined by dots.

    Raises:
        QuikError: truncated, damaged, or something else than nested maps of arrays.
    """
    try:
        refuse_lfs_pointer(path)
        if path.stat().st_size == 0:
            raise QuikError(f"{path} is empty")
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            tree = cursor.value()
            if cursor.at != len(data):
                raise ValueError(f"{len(data) - cursor.at} bytes follow its end")
            return _flatten(tree, "")
    except OSError as problem:
        raise QuikError(f"{path} cannot be read ({problem.strerror or problem})") from None
    except _Short:
        raise QuikError(f"{path} is truncated; copy or download it again") from None
    except (ValueError, TypeError, KeyError, RecursionError) as problem:
        raise QuikError(f"{path} is not a readable Flax checkpoint: {problem}") from None


def _flatten(tree: Any, prefix: str) -> dict[str, Array]:
    if isinstance(tree, Array):
        return {prefix: tree}
    if not isinstance(tree, dict):
        raise ValueError(f'"{prefix}" is neither an array nor a map')
    if tree.get(_CHUNKED) is True:
        return {prefix: _joined(tree)}
    flat: dict[str, Array] = {}
    for name, child in tree.items():
        flat |= _flatten(child, f"{prefix}.{name}" if prefix else name)
    return flat


def _joined(tree: dict[str, Any]) -> Array:
    chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
    shape = [tree["shape"][str(i)] for i in range(len(tree["shape"]))]
    dtypes = {chunk.dtype for chunk in chunks}
    if len(dtypes) != 1:
        raise ValueError("the pieces of an array differ in dtype")
    return _array(shape, dtypes.pop(), tuple(span for chunk in chunks for span in chunk.pieces))
