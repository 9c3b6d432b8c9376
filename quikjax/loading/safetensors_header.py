"""The head of a safetensors file: where each tensor lies, checked against the file's size.

The `safetensors` package cannot hand bfloat16 to NumPy and maps the whole file, which counts as resident memory; its format is
eight bytes of length, a JSON object, then the tensors one behind the other without gaps.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from quikjax.errors import QuikError
from quikjax.files import refuse_lfs_pointer

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class TensorEntry(NamedTuple):
    """A tensor's dtype, shape and bytes in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    size: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name, in the order of the file.

    Raises:
        QuikError: the file is shorter or longer than its header says, or the header is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            refuse_lfs_pointer(path)
            if size < 8 or length > size - 8:
                raise QuikError(
                    f"{path} is truncated or not a safetensors file: it has {size} bytes, too few for its header; "
                    "copy or download it again"
                )
            text = stream.read(length)
    except OSError as problem:
        raise QuikError(f"{path} cannot be read ({problem.strerror or problem})") from None
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        entries = [(name, _place(name, entry, 8 + length)) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise QuikError(f"the header of {path} is damaged ({problem}); copy or download the file again") from None
    entries.sort(key=lambda item: (item[1].offset, item[1].size))
    end = 8 + length
    for name, entry in entries:
        if entry.offset != end:
            raise QuikError(f"the header of {path} is damaged (tensor {name} does not follow the one before it)")
        end += entry.size
    if end != size:
        state = "truncated" if size < end else "damaged"
        raise QuikError(f"{path} is {state}: its header describes {end} bytes, the file has {size}; copy or download it again")
    return dict(entries)


def _place(name: str, entry: dict[str, Any], start: int) -> TensorEntry:
    kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in _DTYPES:
        raise ValueError(f"tensor {name} has the unknown dtype {kind}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has an impossible shape or place")
    dtype = _DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name} of shape {list(shape)} and dtype {kind} has {end - begin} bytes")
    return TensorEntry(shape, dtype, start + begin, end - begin)
