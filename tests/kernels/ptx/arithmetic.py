"""Integer, float and logic instructions, conversions, moves and shuffles (PTX ISA 9.7.1 - 9.7.9). No timing, no memory.

Approximate instructions (`rsqrt.approx`, `ex2.approx`, `div.full`) are computed exactly and rounded once: the device may be a
unit in the last place off, so nothing downstream of them is compared bit for bit.
"""

import ast
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import values
from ptx.parser import Fault, Instruction, Kernel, Unknown, members
from ptx.values import LANES, THREAD, TYPES, UNSIGNED, reader, writer

Operation = Callable[[Any, np.ndarray | None], Any]

_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    # Unordered: true where either is not a number.
    "ltu": lambda a, b: ~np.greater_equal(a, b),
    "leu": lambda a, b: ~np.greater(a, b),
    "gtu": lambda a, b: ~np.less_equal(a, b),
    "geu": lambda a, b: ~np.less(a, b),
    "neu": lambda a, b: ~np.equal(a, b) | np.isnan(a) | np.isnan(b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
_INTEGER: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "div": np.floor_divide,
    "rem": np.remainder,
}
_WIDER: dict[str, Any] = {"s16": np.dtype("i4"), "u16": np.dtype("u4"), "s32": np.dtype("i8"), "u32": np.dtype("u8")}


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    # The product of two float32 is exact in float64; the sum is rounded to 64 bits and then to 24, which differs from one
    # rounding in one case of 2^29 or so.
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def _flushed(x: np.ndarray) -> np.ndarray:
    """Zeros for subnormal values."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _exactly(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: function(a.astype(np.float64)).astype(np.float32)


_FLOAT: dict[str, Callable[..., np.ndarray]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": _fused,
    "neg": np.negative,
    "abs": np.abs,
    "div": lambda a, b: a / b,
    "rcp": lambda a: np.float32(1) / a,
    "sqrt": np.sqrt,
    "rsqrt": _exactly(lambda a: 1 / np.sqrt(a)),
    "ex2": _exactly(np.exp2),
    "lg2": _exactly(np.log2),
}


# Two 16-bit floats in a register: how each is read as float32 and rounded back.
_PAIRS = {"bf16x2": (values.from_bfloat16, values.to_bfloat16), "f16x2": (values.from_float16, values.to_float16)}


def _plain(instruction: Instruction, kernel: Kernel, kind: str, function: Callable[..., np.ndarray]) -> Operation:
    """An operation whose operands all have the type `kind`."""
    store = writer(instruction.operands[0], kernel)
    reads = [reader(operand, kind, kernel) for operand in instruction.operands[1:]]

    def run(group: Any, mask: np.ndarray | None) -> None:
        store(group, function(*[read(group) for read in reads]), mask)

    return run


def arithmetic(instruction: Instruction, kernel: Kernel) -> Operation:
    """`add`, `mul`, `fma`, `min`, `and`, ... of one type, by the last part of the opcode."""
    parts = instruction.parts
    name, kind = parts[0], parts[-1]
    if kind == "pred":
        return _plain(instruction, kernel, kind, _INTEGER[name])
    if kind in _PAIRS:
        function, (read, write) = _FLOAT[name], _PAIRS[kind]
        return _plain(instruction, kernel, kind, lambda *operands: _in_pairs(function, operands, read, write))
    if kind == "f32":
        if "ftz" in parts and name != "ex2":
            raise Fault(f"flushes denormals: {instruction.text}")
        if name in ("min", "max"):
            propagates = "NaN" in parts
            lower = np.minimum if propagates else np.fmin
            upper = np.maximum if propagates else np.fmax
            return _plain(instruction, kernel, kind, lower if name == "min" else upper)
        function = _FLOAT[name]
        if "rm" in parts:
            function = _rounded_down(name)
        if "ftz" in parts:
            return _plain(instruction, kernel, kind, lambda x: _flushed(function(_flushed(x))))
        if "sat" in parts:
            inner = function
            function = lambda *operands: np.clip(np.nan_to_num(inner(*operands), nan=0.0), 0, 1).astype(np.float32)  # noqa: E731
        return _plain(instruction, kernel, kind, function)
    if kind[0] not in "sub":
        raise Fault(f"arithmetic on {kind} is not modelled: {instruction.text}")
    if "wide" in parts:
        return _wide(instruction, kernel, name, kind)
    if name == "mul" and "hi" in parts:
        return _plain(instruction, kernel, kind, _high_half)
    return _plain(instruction, kernel, kind, _INTEGER[name])


def _in_pairs(
    function: Callable[..., np.ndarray],
    operands: tuple[np.ndarray, ...],
    read: Callable[[np.ndarray], np.ndarray],
    write: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Both halves in float32, each rounded once: what these instructions compute of two 16-bit operands."""
    halves = []
    for shift in (0, 16):
        wide = [read(((operand >> np.uint32(shift)) & 0xFFFF).astype(np.uint16)) for operand in operands]
        halves.append(write(function(*wide)).astype(np.uint32) << np.uint32(shift))
    return halves[0] | halves[1]


def _rounded_down(name: str) -> Callable[..., np.ndarray]:
    exact: dict[str, Callable[..., np.ndarray]] = {
        "add": lambda a, b: a + b,
        "mul": lambda a, b: a * b,
        "fma": lambda a, b, c: a * b + c,
    }

    def run(*operands: np.ndarray) -> np.ndarray:
        wide = exact[name](*[operand.astype(np.float64) for operand in operands])
        near = wide.astype(np.float32)
        return np.where(near > wide, np.nextafter(near, np.float32(-np.inf)), near)

    return run


def _wide(instruction: Instruction, kernel: Kernel, name: str, kind: str) -> Operation:
    store, wide = writer(instruction.operands[0], kernel), _WIDER[kind]
    left, right = (reader(operand, kind, kernel) for operand in instruction.operands[1:3])
    added = reader(instruction.operands[3], f"{kind[0]}{8 * wide.itemsize}", kernel) if name == "mad" else None

    def run(group: Any, mask: np.ndarray | None) -> None:
        product = left(group).astype(wide) * right(group).astype(wide)
        store(group, product if added is None else product + added(group), mask)

    return run


def _high_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}8")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    whole = [(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)]
    return np.array([x & (2**64 - 1) for x in whole], np.uint64).view(a.dtype)


def shift(instruction: Instruction, kernel: Kernel) -> Operation:
    """`shl`, `shr`: amounts of the width or more give zeros, or the sign."""
    name, kind = instruction.parts[0], instruction.parts[-1]
    dtype = TYPES[kind]
    store, read = writer(instruction.operands[0], kernel), reader(instruction.operands[1], kind, kernel)
    amount, bits = reader(instruction.operands[2], "u32", kernel), 8 * dtype.itemsize

    def run(group: Any, mask: np.ndarray | None) -> None:
        value, by = read(group), amount(group)
        shorter = np.minimum(by, bits - 1).astype(dtype)
        result = value << shorter if name == "shl" else value >> shorter
        if name == "shl" or dtype.kind == "u":
            result = np.where(by >= bits, dtype.type(0), result)
        store(group, result, mask)

    return run


def bit_field(instruction: Instruction, kernel: Kernel) -> Operation:
    """`bfe`: bits `[position, position + length)` to the low end, sign-extended for signed types."""
    kind = instruction.parts[-1]
    dtype = TYPES[kind]
    bits, unsigned = 8 * dtype.itemsize, UNSIGNED[8 * dtype.itemsize]
    store, read = writer(instruction.operands[0], kernel), reader(instruction.operands[1], f"b{bits}", kernel)
    position, length = (reader(operand, "u32", kernel) for operand in instruction.operands[2:4])

    def run(group: Any, mask: np.ndarray | None) -> None:
        at, count = int(position(group)[0]) & 255, int(length(group)[0]) & 255
        if (position(group) != at).any() or (length(group) != count).any() or count == 0 or at + count > bits:
            raise Fault(f"a bit field that lanes disagree on, or that reaches past the register: {instruction.text}")
        left = unsigned.type(bits - at - count)
        result = (read(group) << left).view(dtype) >> dtype.type(bits - count)
        store(group, result, mask)

    return run


def permute(instruction: Instruction, kernel: Kernel) -> Operation:
    """`prmt.b32`: each byte of the result is one of eight, or that one's sign in all bits."""
    store = writer(instruction.operands[0], kernel)
    low, high, selector = (reader(operand, "b32", kernel) for operand in instruction.operands[1:4])

    def run(group: Any, mask: np.ndarray | None) -> None:
        source = np.stack([low(group), high(group)], 1).view(np.uint8)
        chosen = selector(group)
        result = np.empty((LANES, 4), np.uint8)
        for byte in range(4):
            code = (chosen >> np.uint32(4 * byte)) & np.uint32(15)
            picked = source[THREAD, code & 7]
            result[:, byte] = np.where(code & 8, np.where(picked & 0x80, 255, 0), picked)
        store(group, result.view(np.uint32).reshape(LANES), mask)

    return run


def logic(instruction: Instruction, kernel: Kernel) -> Operation:
    """`lop3.b32`: any function of three bits, given by its table."""
    store = writer(instruction.operands[0], kernel)
    reads = [reader(operand, "b32", kernel) for operand in instruction.operands[1:4]]
    table = _table(instruction.operands[4])

    def run(group: Any, mask: np.ndarray | None) -> None:
        a, b, c = (read(group) for read in reads)
        result = np.zeros(LANES, np.uint32)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        store(group, result, mask)

    return run


def _table(expression: str) -> int:
    """`(0xF0 & 0xCC) | 0xAA`: a table may be written as the function itself."""

    def value(node: ast.AST) -> int:
        match node:
            case ast.Expression(body):
                return value(body)
            case ast.Constant(int() as number):
                return number
            case ast.UnaryOp(ast.Invert(), operand):
                return ~value(operand)
            case ast.BinOp(left, ast.BitAnd(), right):
                return value(left) & value(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return value(left) | value(right)
            case ast.BinOp(left, ast.BitXor(), right):
                return value(left) ^ value(right)
        raise Unknown(f"unknown table {expression}")

    return value(ast.parse(expression, mode="eval")) & 255


def compare(instruction: Instruction, kernel: Kernel) -> Operation:
    """`setp`: a predicate from two values."""
    return _set_predicate(instruction, kernel, _COMPARE[instruction.parts[1]])


def _set_predicate(instruction: Instruction, kernel: Kernel, function: Callable[..., np.ndarray]) -> Operation:
    kind = instruction.parts[-1]
    store = writer(instruction.operands[0], kernel)
    left, right = (reader(operand, kind, kernel) for operand in instruction.operands[1:3])
    return lambda group, mask: store(group, function(left(group), right(group)), mask)


def select(instruction: Instruction, kernel: Kernel) -> Operation:
    """`selp`: one of two values by a predicate."""
    kind = instruction.parts[-1]
    store = writer(instruction.operands[0], kernel)
    left, right = (reader(operand, kind, kernel) for operand in instruction.operands[1:3])
    which = reader(instruction.operands[3], "pred", kernel)
    return lambda group, mask: store(group, np.where(which(group), left(group), right(group)), mask)


def move(instruction: Instruction, kernel: Kernel) -> Operation:
    """`mov`: a register, a symbol's address, or a pack or unpack of parts."""
    kind = instruction.parts[-1]
    target, source = instruction.operands
    if source.startswith("{"):
        return _pack(members(source), target, kind, kernel)
    if target.startswith("{"):
        return _unpack(source, members(target), kind, kernel)
    kind = f"b{kind[1:]}" if kind != "pred" else kind
    store, read = writer(target, kernel), reader(source, kind, kernel)
    return lambda group, mask: store(group, read(group), mask)


def _pack(parts: list[str], target: str, kind: str, kernel: Kernel) -> Operation:
    each = int(kind[1:]) // len(parts)
    reads, store, dtype = [reader(part, f"b{each}", kernel) for part in parts], writer(target, kernel), TYPES[f"b{kind[1:]}"]

    def run(group: Any, mask: np.ndarray | None) -> None:
        store(group, np.stack([read(group) for read in reads], 1).view(dtype).reshape(LANES), mask)

    return run


def _unpack(source: str, parts: list[str], kind: str, kernel: Kernel) -> Operation:
    each = int(kind[1:]) // len(parts)
    read, stores, dtype = reader(source, f"b{kind[1:]}", kernel), [writer(part, kernel) for part in parts], TYPES[f"b{each}"]

    def run(group: Any, mask: np.ndarray | None) -> None:
        pieces = np.ascontiguousarray(read(group)).view(dtype).reshape(LANES, len(parts))
        for i, store in enumerate(stores):
            store(group, np.ascontiguousarray(pieces[:, i]), mask)

    return run


def same_address(instruction: Instruction, kernel: Kernel) -> Operation:
    """`cvta`: all address spaces but shared memory's share one numbering here."""
    store, read = writer(instruction.operands[0], kernel), reader(instruction.operands[1], instruction.parts[-1], kernel)
    return lambda group, mask: store(group, read(group), mask)


def elect(instruction: Instruction, kernel: Kernel) -> Operation:
    """`elect.sync`: a predicate true in one lane of each warp."""
    leader, predicate = (writer(name.strip(), kernel) for name in instruction.operands[0].split("|"))

    def run(group: Any, mask: np.ndarray | None) -> None:
        leader(group, np.zeros(LANES, np.uint32), mask)
        predicate(group, THREAD % 32 == 0, mask)

    return run


def shuffle(instruction: Instruction, kernel: Kernel) -> Operation:
    """`shfl.sync.bfly` and `.idx` over whole warps."""
    mode = instruction.parts[2]
    store = writer(instruction.operands[0].split("|")[0].strip(), kernel)
    read, distance = reader(instruction.operands[1], "b32", kernel), reader(instruction.operands[2], "u32", kernel)
    if mode not in ("bfly", "idx"):
        raise Unknown(f"unknown shuffle {instruction.text}")

    def run(group: Any, mask: np.ndarray | None) -> None:
        by = distance(group).astype(np.int64)
        lane = (THREAD % 32) ^ by if mode == "bfly" else by
        store(group, read(group)[THREAD // 32 * 32 + lane % 32], mask)

    return run


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FROM = {"bf16": values.from_bfloat16, "f16": values.from_float16}
_TO = {"bf16": values.to_bfloat16, "f16": values.to_float16, "bf16x2": values.to_bfloat16, "f16x2": values.to_float16}


def convert(instruction: Instruction, kernel: Kernel) -> Operation:
    """`cvt`: between integers (extended or cut), from and to floats (rounded as named, saturated at the ends of the type)."""
    parts = instruction.parts
    to, source = [part for part in parts[1:] if part in TYPES][:2]
    store = writer(instruction.operands[0], kernel)
    if to in ("bf16x2", "f16x2"):
        high, low = (reader(operand, "f32", kernel) for operand in instruction.operands[1:3])
        narrow = _TO[to]

        def pair(group: Any, mask: np.ndarray | None) -> None:
            halves = narrow(low(group)).astype(np.uint32) | narrow(high(group)).astype(np.uint32) << np.uint32(16)
            store(group, halves, mask)

        return pair
    read = reader(instruction.operands[1], source, kernel)
    function = _conversion(to, source, parts)
    return lambda group, mask: store(group, function(read(group)), mask)


def _conversion(to: str, source: str, parts: tuple[str, ...]) -> Callable[[np.ndarray], np.ndarray]:
    rounding = next((_ROUND[part] for part in parts if part in _ROUND), None)
    if source in _FROM and to == "f32":
        return _FROM[source]
    if to in _TO:
        return _TO[to]
    if source == "f32" and to == "f32":
        rounded = rounding or np.positive
        if "sat" not in parts:
            return rounded
        return lambda x: np.clip(np.nan_to_num(rounded(x), nan=0.0), 0, 1).astype(np.float32)
    dtype = TYPES[to]
    if source == "f32":
        assert rounding is not None
        limits = np.iinfo(dtype)
        return lambda x: np.clip(np.nan_to_num(rounding(x).astype(np.float64), nan=0.0), limits.min, limits.max).astype(dtype)
    return lambda x: x.astype(dtype)


BUILDERS: dict[str, Callable[[Instruction, Kernel], Operation]] = {
    **dict.fromkeys(("add", "sub", "mul", "mad", "fma", "min", "max", "and", "or", "xor", "not", "neg", "abs"), arithmetic),
    **dict.fromkeys(("div", "rem", "rcp", "rsqrt", "sqrt", "ex2", "lg2"), arithmetic),
    "shl": shift,
    "shr": shift,
    "bfe": bit_field,
    "prmt": permute,
    "lop3": logic,
    "setp": compare,
    "selp": select,
    "mov": move,
    "cvta": same_address,
    "elect": elect,
    "shfl": shuffle,
    "cvt": convert,
}
