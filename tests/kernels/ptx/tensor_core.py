"""`wgmma`, the product of a warpgroup (PTX ISA 9.7.15): operands in shared memory by descriptor, or the first in registers.

A product is issued, committed into a group, and waited for; in between, its registers are nobody's, and it reads shared memory
whenever it likes. Here it runs at once or at its wait, as `Timing.products` says, and touching its registers before is a fault.
int8 products are exact; those of floats are summed in float64 and rounded once a product, which the device need not do.
Not asked for: `wgmma.fence` before registers are handed over, which ptxas inserts where it is missing (C7519).
"""

import functools
import re
from typing import Any

import numpy as np

from ptx.arithmetic import Operation
from ptx.copies import swizzled
from ptx.parser import Fault, Instruction, Kernel, Unknown, members
from ptx.values import LANES, THREAD, from_bfloat16, reader

_SWIZZLE = {1: 128, 2: 64, 3: 32}
_ROW = 16 * (THREAD // 32) + THREAD % 32 // 4  # the first of a thread's rows (9.7.15.5.1)


def _operand(block: Any, descriptor: int, rows: int, width: int, known: np.ndarray) -> np.ndarray:
    """`rows x width` bytes, K-major, from a matrix descriptor (9.7.15.5.1.2): groups of eight rows, a swizzle's bytes a row."""
    mode = descriptor >> 62 & 3
    if mode not in _SWIZZLE or descriptor >> 49 & 7:
        raise Unknown("a matrix without a swizzle, or with a base offset: not what these kernels use")
    swizzle = _SWIZZLE[mode]
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    if start >> 7 & (swizzle // 16 - 1):
        raise Fault(f"a matrix at {start:#x} does not begin where its swizzle pattern of {swizzle} bytes does")
    if (start & (swizzle - 1)) + width > swizzle:
        raise Fault(f"{width} bytes at {start:#x} reach past the {swizzle} of a row")
    pieces = swizzled(start + _pieces(rows, width, stride, swizzle), swizzle)
    block.shared.check(pieces, known, "a product")
    return block.shared.data.reshape(-1, 16)[pieces >> 4].reshape(rows, width)


@functools.cache
def _pieces(rows: int, width: int, stride: int, swizzle: int) -> np.ndarray:
    row = np.arange(rows)[:, None]
    return row // 8 * stride + row % 8 * swizzle + 16 * np.arange(width // 16)


@functools.cache
def _fragment(registers: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and first bytes of the first operand's registers, `[thread, register]`: the same for 8 and 16 bits."""
    index = np.arange(registers)
    row = _ROW[:, None] + 8 * (index % 2)
    return row, 4 * (THREAD % 4)[:, None] + 16 * (index // 2)


@functools.cache
def _result(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the accumulator's registers, `[thread, register]`."""
    index = np.arange(registers)
    row = _ROW[:, None] + 8 * (index // 2 % 2)
    return row, 8 * (index // 4) + 2 * (THREAD % 4)[:, None] + index % 2


def _values(operand: np.ndarray, kind: str) -> np.ndarray:
    operand = np.ascontiguousarray(operand)
    if kind == "s8":
        return operand.view(np.int8).astype(np.float32)  # 32 products of 2^14: exact in float32
    if kind == "bf16":
        return from_bfloat16(operand.view(np.uint16)).astype(np.float64)
    return operand.view(np.float16).astype(np.float64)


class Product:
    """One `wgmma.mma_async` under way: `registers` may not be touched until it is waited for."""

    def __init__(self, registers: frozenset[int], compute: Any):
        self.registers = registers
        self._compute: Any = compute

    def finish(self) -> None:
        compute, self._compute = self._compute, None
        if compute is not None:
            compute()


def mma_async(instruction: Instruction, kernel: Kernel) -> Operation:
    """`wgmma.mma_async.sp`-less, of s8 into s32 or bf16 and f16 into f32; `D = A B + D`, or `A B` where scale-d is false."""
    parts = instruction.parts
    shape = next((found for part in parts if (found := re.fullmatch(r"m64n(\d+)k(\d+)", part))), None)
    sums, kind, other = parts[-3:]
    if shape is None or kind != other or (sums, kind) not in (("s32", "s8"), ("f32", "bf16"), ("f32", "f16")):
        raise Unknown(f"unknown product: {instruction.text}")
    columns, width = int(shape[1]), int(shape[2]) * (1 if kind == "s8" else 2)
    accumulator, first, second, onto, *rest = instruction.operands
    expected = [] if kind == "s8" else ["1", "1", *["0"] * (1 if first.startswith("{") else 2)]
    if rest != expected:
        raise Unknown(f"a product with negated or transposed operands {rest}: {instruction.text}")
    targets = [kernel.registers[name] for name in members(accumulator)]
    sources = [kernel.registers[name] for name in members(first)] if first.startswith("{") else []
    if len(set(targets)) != columns // 2 or set(targets) & set(sources):
        raise Fault(f"not {columns // 2} registers of its own: {instruction.text}")
    left_at = None if sources else reader(first, "u64", kernel)
    right_at, keeps = reader(second, "u64", kernel), reader(onto, "pred", kernel)
    dtype: Any = np.int32 if sums == "s32" else np.float32
    registers = frozenset(targets + sources)
    rows_of, columns_of = _result(len(targets))

    def run(group: Any, mask: np.ndarray | None) -> None:
        if mask is not None:
            raise Fault(f"a product of part of a warpgroup: {instruction.text}")
        if group.busy.keys() & sources:
            raise Fault(f"a product reads registers that another in flight writes: {instruction.text}")
        left_place = None if left_at is None else int(left_at(group)[0])
        right_place, adds = int(right_at(group)[0]), bool(keeps(group)[0])
        known = group.known(1).min(axis=0)
        block, held = group.block, group.registers
        group.count(f"{shape[0]} {kind}", 1)

        def compute() -> None:
            if left_place is None:
                left = np.empty((64, width), np.uint8)
                row, byte = _fragment(len(sources), width)
                codes = np.stack([held[number] for number in sources], 1).view(np.uint8).reshape(LANES, -1, 4)
                for i in range(4):
                    left[row, byte + i] = codes[:, :, i]
            else:
                left = _operand(block, left_place, 64, width, known)
            right = _operand(block, right_place, columns, width, known)
            product = (_values(left, kind) @ _values(right, kind).T)[rows_of, columns_of]
            for i, number in enumerate(targets):
                if adds:
                    old = held[number]
                    if old is None:
                        raise Fault(f"an accumulator that was never set: {instruction.text}")
                    wide = old.view(dtype).astype(np.int64 if sums == "s32" else np.float64)
                    total = wide + product[:, i].astype(wide.dtype)
                else:
                    total = product[:, i]
                held[number] = np.ascontiguousarray(total.astype(dtype)).view(np.uint32)

        item = Product(registers, compute)
        if group.timing.products == "early":
            item.finish()
        group.issue(item)

    return run


def wgmma(instruction: Instruction, kernel: Kernel) -> Operation:
    """`wgmma.fence`, `.mma_async`, `.commit_group`, `.wait_group`."""
    what = instruction.parts[1]
    if what == "mma_async":
        return mma_async(instruction, kernel)
    if what == "fence":
        return lambda group, mask: None
    if what == "commit_group":
        return lambda group, mask: group.commit()
    if what == "wait_group":
        left = int(instruction.operands[0])
        return lambda group, mask: group.wait(left)
    raise Unknown(f"unknown instruction: {instruction.text}")


BUILDERS = {"wgmma": wgmma}
