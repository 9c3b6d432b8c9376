"""The head of a GGUF file: metadata and where each tensor lies, checked against the file's size.

The `gguf` package's own reader makes one NumPy view per string, 3 s for a vocabulary of 49152 where this takes 0.2 s, and
fails on a short file with whatever index error comes first. Its tables of block sizes and its dequantization are used as
they are.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

from quikjax.errors import QuikError
from quikjax.files import beginning, refuse_lfs_pointer

_MAGIC = b"GGUF"
# What came before it, by the marks as they stand in the file.
_OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# GGUF's value types that are plain numbers, as struct letters.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class _Short(Exception):
    """The file ended inside its header."""


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file: `shape` with the contiguous axis last, `kind` the name of its block format."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """A file's metadata and tensors by GGUF's own names."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Cursor:
    """Reads little-endian values one behind the other, never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _Short
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece

    def unpack(self, letters: str) -> tuple[Any, ...]:
        return struct.unpack("<" + letters, self.take(struct.calcsize("<" + letters)))

    def string(self, errors: str = "strict") -> str:
        (length,) = self.unpack("Q")
        return self.take(length).decode("utf-8", errors)

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string("replace")  # a name, a license, a template: read by people, if at all
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind}")
        inner, count = self.unpack("IQ")
        if count > len(self.data) - self.at:  # every element takes a byte at least: do not loop over a damaged count
            raise _Short
        if inner in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[inner]}"))
        return self.strings(count) if inner == _STRING else [self.value(inner) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """Many strings at once: a vocabulary and its merges are 100000, too many for three calls each."""
        data, at, end = self.data, self.at, len(self.data)
        length_of = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            if end - at < 8:
                raise _Short
            (length,) = length_of(data, at)
            at += 8
            if length > end - at:
                raise _Short
            found.append(data[at : at + length].decode("utf-8", "surrogateescape"))  # distinct tokens stay distinct
            at += length
        self.at = at
        return found


def is_gguf(path: Path) -> bool:
    """Whether a file begins with GGUF's mark, whatever it is called."""
    return beginning(path, len(_MAGIC)) == _MAGIC


def read_header(path: Path) -> GGUFHeader:
    """Read and check the head of a GGUF file.

    Raises:
        QuikError: not a GGUF file, a version or block format that is not known, or shorter than its header says.
    """
    try:
        refuse_lfs_pointer(path)
        with path.open("rb") as stream:
            size = path.stat().st_size
            if size == 0:
                raise QuikError(f"{path} is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data), size)
    except OSError as problem:
        raise QuikError(f"{path} cannot be read ({problem.strerror or problem})") from None
    except _Short:
        raise QuikError(f"{path} is truncated: it ends inside its header; copy or download it again") from None
    except (ValueError, MemoryError) as problem:  # UnicodeDecodeError is a ValueError
        raise QuikError(f"{path} is not a readable GGUF file: {problem}") from None


def _parse(cursor: _Cursor, size: int) -> GGUFHeader:
    mark = cursor.take(4)
    if mark in _OLD_MAGICS:
        raise ValueError("it is in an older format of llama.cpp (GGML); convert it to GGUF with llama.cpp's own scripts")
    if mark != _MAGIC:
        raise ValueError("it does not begin with GGUF's mark")
    version, tensor_count, value_count = cursor.unpack("IQQ")
    if version not in _VERSIONS:
        hint = " (big-endian)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"version {version}{hint} is not supported, only {' and '.join(map(str, _VERSIONS))}")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        (kind,) = cursor.unpack("I")
        if key in metadata:
            raise ValueError(f"metadata {key} stands in it twice")
        metadata[key] = cursor.value(kind)
    listed = [_tensor_entry(cursor) for _ in range(tensor_count)]

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in listed:
        if name in tensors:
            raise ValueError(f"tensor {name} stands in it twice")
        if offset % alignment:
            raise ValueError(f"tensor {name} begins at {offset}, not at a multiple of {alignment}")
        tensors[name] = _locate(name, shape, kind, start + offset)
    _check_places(tensors, size)
    return GGUFHeader(metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    (axes,) = cursor.unpack("I")
    if axes > 8:
        raise ValueError(f"tensor {name} has {axes} axes")
    shape = tuple(reversed(cursor.unpack(f"{axes}Q")))  # GGUF writes the contiguous axis first
    kind, offset = cursor.unpack("IQ")
    return name, shape, kind, offset


def _locate(name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {member.value: member for member in GGML_QUANT_SIZES}
    if kind not in known:
        raise ValueError(f"tensor {name} has the unknown block format {kind}")
    block, block_bytes = GGML_QUANT_SIZES[known[kind]]
    if not shape or shape[-1] % block:
        raise ValueError(f"tensor {name} of shape {list(shape)} does not divide into blocks of {block}")
    return GGUFTensor(shape, GGMLQuantizationType(kind).name, offset, math.prod(shape) // block * block_bytes)


def _check_places(tensors: dict[str, GGUFTensor], size: int) -> None:
    """Every tensor inside the file, none inside another."""
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise ValueError(f"tensors {before} and {name} overlap")
        end, before = tensor.offset + tensor.size, name
    if end > size:
        raise ValueError(f"it is truncated: its header describes {end} bytes, the file has {size}; copy or download it again")
