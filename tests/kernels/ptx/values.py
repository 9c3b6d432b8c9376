"""Registers, operands and number formats (PTX ISA 5.2, 6): everything a warpgroup holds is a vector of 128 values.

A register keeps unsigned bits of its own width; an instruction reads them as the type it names. A register that is narrower
than the type read is an error; a wider one gives its low bits; a value stored into a wider register is extended.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.parser import Fault, Kernel, Unknown

LANES = 128
THREAD = np.arange(LANES)
SHARED_BASE = 1024  # of a thread block's shared memory: swizzle patterns are anchored at multiples of 1024
PARAMETER_BASE, PARAMETER_STEP = 0x10000, 0x1000

TYPES: dict[str, Any] = {
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.uint16),
    "bf16x2": np.dtype(np.uint32),
    "f16x2": np.dtype(np.uint32),
    "pred": np.dtype(bool),
}
UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
SIGNED: dict[int, Any] = {16: np.dtype("i2"), 32: np.dtype("i4"), 64: np.dtype("i8")}

Read = Callable[[Any], np.ndarray]
Write = Callable[[Any, np.ndarray, np.ndarray | None], None]


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of float32 rounded to bfloat16, half to even; a NaN becomes the canonical one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def to_float16(values: np.ndarray) -> np.ndarray:
    """Bits of float32 rounded to float16, half to even."""
    return np.ascontiguousarray(values, np.float32).astype(np.float16).view(np.uint16)


def from_float16(bits: np.ndarray) -> np.ndarray:
    """float32 of float16 bits, exact."""
    return bits.view(np.float16).astype(np.float32)


def literal(text: str) -> int | np.float32 | None:
    """The value of `7`, `-7`, `0x7`, `7U` or `0f3F800000`, or None for anything else."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return None


def _constant(value: int | np.float32, dtype: np.dtype[Any]) -> np.ndarray:
    """A literal in all lanes, its bits taken as `dtype`."""
    if isinstance(value, np.float32):
        value = int(value.view(np.uint32))
    bits = 8 * dtype.itemsize
    result = np.full(LANES, value & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype)
    result.flags.writeable = False
    return result


def reader(operand: str, kind: str, kernel: Kernel) -> Read:
    """A function from a warpgroup to the operand's 128 values, as the named PTX type."""
    dtype = TYPES[kind]
    if operand.startswith("!"):
        plain = reader(operand[1:], kind, kernel)
        return lambda group: ~plain(group)
    if operand in kernel.registers:
        return _register_reader(operand, dtype, kernel)
    if (value := literal(operand)) is not None:
        fixed = _constant(value, dtype)
        return lambda group: fixed
    names = [name for name, _ in kernel.parameters]
    if operand in names:
        fixed = _constant(PARAMETER_BASE + PARAMETER_STEP * names.index(operand), dtype)
        return lambda group: fixed
    if (symbol := re.fullmatch(r"__dynamic_shmem__\w*(?:\+(\d+))?", operand)) is not None:
        fixed = _constant(SHARED_BASE + int(symbol[1] or 0), dtype)
        return lambda group: fixed
    if operand in _SPECIAL:
        special = _SPECIAL[operand]
        return lambda group: np.broadcast_to(special(group), (LANES,)).astype(dtype)
    raise Unknown(f"unknown operand {operand!r}")


_SPECIAL: dict[str, Callable[[Any], Any]] = {
    "%tid.x": lambda group: THREAD + LANES * group.index,
    "%ctaid.x": lambda group: group.block.index,
    "%ctaid.y": lambda group: 0,
    "%ctaid.z": lambda group: 0,
    "%cluster_ctaid.x": lambda group: group.block.rank,
    "%cluster_ctaid.y": lambda group: 0,
    "%cluster_ctaid.z": lambda group: 0,
    "%cluster_ctarank": lambda group: group.block.rank,
}


def _register_reader(name: str, dtype: np.dtype[Any], kernel: Kernel) -> Read:
    number, width = kernel.registers[name], kernel.widths[kernel.registers[name]]
    wanted = 1 if dtype.kind == "b" else 8 * dtype.itemsize
    if wanted > width:
        raise Fault(f"{name} has {width} bits, read as {dtype}")
    narrow = UNSIGNED[wanted] if wanted < width else None

    def read(group: Any) -> np.ndarray:
        if number in group.busy:
            raise Fault(f"{name} is read while a product in flight writes it")
        value = group.registers[number]
        if value is None:
            value = group.undefined(number)
        if narrow is not None:
            value = value.astype(narrow)
        return value.view(dtype)

    return read


def _thrown_away(group: Any, values: np.ndarray, mask: np.ndarray | None = None) -> None:
    pass


def writer(name: str, kernel: Kernel) -> Write:
    """A function that stores 128 values, or those of a mask, into a register. `_` throws them away."""
    if name == "_":
        return _thrown_away
    if name not in kernel.registers:
        raise Unknown(f"unknown register {name!r}")
    number, width = kernel.registers[name], kernel.widths[kernel.registers[name]]
    unsigned = UNSIGNED[width]

    def write(group: Any, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        if number in group.busy:
            raise Fault(f"{name} is written while a product in flight uses it")
        if values.dtype != unsigned:
            if 8 * values.dtype.itemsize < width and unsigned.kind != "b":
                values = values.astype(SIGNED[width]) if values.dtype.kind == "i" else _bits(values).astype(unsigned)
            values = values.view(unsigned)
        if mask is not None:
            old = group.registers[number]
            values = np.where(mask, values, group.undefined(number) if old is None else old)
        group.registers[number] = values

    return write


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(UNSIGNED[8 * values.dtype.itemsize])
