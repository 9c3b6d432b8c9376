"""The block formats of GGUF files as float32.

Defined by `gguf.quants`, whose numbers these are to the bit. The formats that small models are published in are written out here,
in pieces that stay in a CPU's cache, which takes a fraction of the time.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from quikjax.weights.host import empty

Blocks = UInt8[np.ndarray, "blocks bytes"]
Values = Float32[np.ndarray, "blocks 32"]

_AT_ONCE = 4096  # blocks: 512 kB of float32


def dequantize(raw: UInt8[np.ndarray, " bytes"], kind: str, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """The tensor `shape` that a file holds as `raw` in the block format `kind`, such as "Q4_1".

    Raises:
        NotImplementedError: `gguf` does not read this format either.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize as by_definition

    known = GGMLQuantizationType[kind]
    size, size_in_bytes = GGML_QUANT_SIZES[known]
    blocks = raw.reshape(-1, size_in_bytes)
    out = empty(shape, np.float32)
    values = out.reshape(-1, size)
    write: Callable[[Any, Any], None] | None = _WRITERS.get(kind)
    for first in range(0, len(blocks), _AT_ONCE):
        some, there = blocks[first : first + _AT_ONCE], values[first : first + _AT_ONCE]
        if write is None:
            there[...] = by_definition(some, known).reshape(there.shape)
        else:
            write(some, there)
    return out


def _halves(blocks: Blocks, first: int) -> Float32[np.ndarray, "blocks 1"]:
    """The float16 number of each block whose bytes begin at `first`."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: Blocks, out: Values) -> None:
    """Codes of 4 bits: the low half of byte i is code i, the high half code 16 + i."""
    out[:, :16] = codes & 15
    out[:, 16:] = codes >> 4


def _fifth_bits(codes: Blocks, bits: UInt8[np.ndarray, "blocks 4"], out: Values) -> None:
    """Codes of 5 bits: `_nibbles`, and the fifth bit of code i is bit i of 32."""
    high = np.unpackbits(bits, axis=1, bitorder="little") << np.uint8(4)
    out[:, :16] = (codes & 15) | high[:, :16]
    out[:, 16:] = (codes >> 4) | high[:, 16:]


def _q4_0(blocks: Blocks, out: Values) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _halves(blocks, 0)


def _q4_1(blocks: Blocks, out: Values) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _halves(blocks, 0)
    out += _halves(blocks, 2)


def _q5_0(blocks: Blocks, out: Values) -> None:
    _fifth_bits(blocks[:, 6:], blocks[:, 2:6], out)
    out -= 16
    out *= _halves(blocks, 0)


def _q5_1(blocks: Blocks, out: Values) -> None:
    _fifth_bits(blocks[:, 8:], blocks[:, 4:8], out)
    out *= _halves(blocks, 0)
    out += _halves(blocks, 2)


def _q8_0(blocks: Blocks, out: Values) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _halves(blocks, 0)


_WRITERS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0}
