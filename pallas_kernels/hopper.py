"""Parts that the Mosaic GPU kernels share: sizes, a column gather, a reduction over several warpgroups.

Mosaic has no gather (`lax.gather`, integer-array indexing and `jnp.take` all stop at lowering, JAX 0.10.2 and 0.11.2), so
`gather_row` emits the loads itself through `plgpu.inline_mgpu`: one shared-memory load per element, each thread with its own
index. `jnp.min` and `jnp.max` over a warpgroup exist, but every warpgroup of a thread block has the same scratch, so
`store_warp_partials` leaves one partial per warp in shared memory instead and the caller puts a barrier behind it.

Everything here is traced inside a kernel body with warpgroup semantics.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

WARPGROUP = 128
WARPS = 4

# A TMA box has at most this many elements along a dimension.
LONGEST_BOX = 256
# Shared memory a thread block of an H100 or H200 can opt in to, less what Mosaic keeps for barriers and its own scratch.
SHARED_MEMORY = 232448 - 2048

COMPILER_PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)

_SCALAR = plgpu.Layout.WG_SPLAT(())
_LOAD_TAKES_INDEX = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty


def load(ref: Any, layout: Any) -> jax.Array:
    """Load `ref` into registers in `layout`, from global or shared memory, however the threads then touch it."""
    # JAX 0.10 requires the index argument that 0.11 deprecates and 0.12 drops.
    position = (None,) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *position, layout=layout, optimized=False)


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the form that the copy engine writes and tensor cores read without conflicts."""
    bits = jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).bits
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    # JAX 0.11 derives these from a Protocol and leaves one of its methods out, which mypy takes for abstract.
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))  # type: ignore[abstract, unused-ignore]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract, unused-ignore]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def load_transposed(ref: Any, shape: tuple[int, int], first_row: Any, first_column: Any) -> jax.Array:
    """The transpose `[n, m]` of rows from `first_row` and columns from `first_column` on of a global `[rows, columns]` array.

    It lies as an accumulator does. What is past the end of `ref` is some element of it.
    """
    rows, columns = ref.shape
    result = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR), return_type=result)
    def gather(ctx: Any, source: Any, row: FragmentedArray, column: FragmentedArray) -> FragmentedArray:
        del ctx
        index = ir.IndexType.get()
        element = ir.MemRefType(source.type).element_type
        layout: Any = plgpu.Layout.WGMMA.to_mgpu()
        registers = []
        for places in _elements(layout, shape, row, column):
            within = [
                [arith.minui(at, mosaic_utils.c(length - 1, at.type)) for at, length in zip(place, (rows, columns), strict=True)]
                for place in places
            ]
            loaded = [memref.load(source, [arith.index_cast(index, at) for at in place]) for place in within]
            registers.append(vector.from_elements(ir.VectorType.get((len(loaded),), element), loaded))
        there = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
        return FragmentedArray(_registers=there, _layout=layout, _is_signed=None)

    return gather(ref, first_row, first_column)


def store_transposed(ref: Any, values: jax.Array, first_row: Any, first_column: Any) -> None:
    """Write `values` `[n, m]`, which lie as an accumulator does, to `ref[first_row + m, first_column + n]` in global memory.

    What is past the end of `ref` is not written. Threads are predicated, no branch parts a warp.
    """
    rows, columns = ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, _SCALAR, _SCALAR))
    def scatter(ctx: Any, target: Any, tile: FragmentedArray, row: FragmentedArray, column: FragmentedArray) -> None:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        kind = ir.MemRefType(target.type)
        bits = mosaic_utils.bitwidth(kind.element_type)
        whole = ir.IntegerType.get_signless(bits)
        base = mosaic_utils.memref_ptr(target)
        # Of an array in global memory the generic address is the global one.
        # The number of rows, plus a special register that is zero. Of one row the compilers would see that half of the elements
        # are never stored, and ptxas, which then takes the registers of a WGMMA apart, serializes every one of them (C7514).
        zero: Any = llvm.inline_asm(i32, [], "mov.u32 $0, %ctaid.z;", "=r", has_side_effects=True)
        last = arith.addi(zero, mosaic_utils.c(rows, i32))
        text = f"{{ .reg .pred there; setp.ne.b32 there, $0, 0; @there st.global.b{bits} [$1], $2; }}"
        for register, places in zip(tile.registers.flat, _elements(tile.layout, tile.shape, row, column), strict=True):
            for lane, (at_row, at_column) in enumerate(places):
                inside = arith.andi(
                    arith.cmpi(arith.CmpIPredicate.ult, at_row, last),
                    arith.cmpi(arith.CmpIPredicate.ult, at_column, mosaic_utils.c(columns, i32)),
                )
                offset = arith.addi(arith.muli(at_row, mosaic_utils.c(columns, i32)), at_column)
                address = mosaic_utils.getelementptr(base, [offset], kind.element_type)
                value = mosaic_utils.bitcast(vector.extract(register, dynamic_position=[], static_position=[lane]), whole)
                operands = [arith.extui(i32, inside), address, value]
                llvm.inline_asm(None, operands, text, f"r,l,{'h' if bits == 16 else 'r'}", has_side_effects=True)

    scatter(ref, values, first_row, first_column)


def store_in_every_row(ref: Any, values: jax.Array, layout: Any, start: Any, *, first: Any, apart: int, steps: int) -> None:
    """Write columns `start`, ... of one row to every row of an operand of WGMMA that `swizzled` allocated: `[there, m, width]`.

    The operand holds the steps `first`, `first + apart`, ... of all `steps`, a step being `width` columns; what belongs to other
    steps is not written. Threads are predicated, no branch parts a warp. A vector that a thread holds must lie within a step.
    """
    _, m, width = ref.shape
    transforms = swizzled(ref.shape, ref.dtype).transforms
    line = width * jnp.dtype(ref.dtype).itemsize  # bytes of a step's row: that many are swizzled together

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), layout, _SCALAR, _SCALAR))
    def scatter(ctx: Any, target: Any, row: FragmentedArray, begin: FragmentedArray, own: FragmentedArray) -> None:
        del ctx
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        base = arith.trunci(i32, llvm.ptrtoint(i64, mosaic_utils.memref_ptr(target)))
        size = jnp.dtype(ref.dtype).itemsize

        def number(value: int) -> Any:
            return mosaic_utils.c(value, i32)

        for register, (place,) in zip(row.registers.flat, row.layout.thread_idxs(tuple(row.shape)), strict=True):
            (length,) = ir.VectorType(register.type).shape
            bits = 8 * size * length
            column = arith.addi(begin.registers.item(), arith.index_cast(i32, place))
            step = arith.divui(column, number(width))
            ours = arith.andi(
                arith.cmpi(arith.CmpIPredicate.eq, arith.remui(step, number(apart)), own.registers.item()),
                arith.cmpi(arith.CmpIPredicate.ult, step, number(steps)),
            )
            there = arith.muli(arith.divui(step, number(apart)), number(m * line))
            within = arith.muli(arith.remui(column, number(width)), number(size))
            value = mosaic_utils.bitcast(register, ir.IntegerType.get_signless(bits))
            if bits == 8:
                value = arith.extui(i32, value)
            text = f"{{ .reg .pred there; setp.ne.b32 there, $0, 0; @there st.shared.b{bits} [$1], $2; }}"
            kind = {8: "r", 16: "h", 32: "r", 64: "l"}[bits]
            for i in range(m):
                # Pieces of 16 bytes change places by the bits 7 to 9 of their address, as many of them as a line has pieces.
                turned = arith.xori(within, number((i * line // 128) % (line // 16) * 16))
                address = arith.addi(base, arith.addi(there, arith.addi(turned, number(i * line))))
                llvm.inline_asm(None, [arith.extui(i32, ours), address, value], text, f"r,r,{kind}", has_side_effects=True)

    scatter(ref, values, start, first)


def _elements(layout: Any, shape: Any, row: FragmentedArray, column: FragmentedArray) -> Iterator[list[tuple[Any, Any]]]:
    """For each register of a tile `[n, m]`, the row and the column (int32) of each of its elements in the transposed whole."""
    i32 = ir.IntegerType.get_signless(32)
    first_row, first_column = row.registers.item(), column.registers.item()
    length = layout.vector_length
    for n, m in layout.thread_idxs(tuple(shape)):
        at_column = arith.addi(first_column, arith.index_cast(i32, n))
        at_row = arith.addi(first_row, arith.index_cast(i32, m))
        yield [(arith.addi(at_row, mosaic_utils.c(lane, i32)), at_column) for lane in range(length)]


def row_unit(columns: int) -> int | None:
    """Columns per line of a row staged as `[columns / unit, unit]`; `None` where no TMA box fits (16 bytes is the least)."""
    return next((unit for unit in (64, 32, 16, 8) if columns % unit == 0), None)


def gather_row(row: Any, positions: jax.Array, layout: Any, dtype: Any) -> jax.Array:
    """`row.reshape(-1)[positions]`: `row` is `[columns]` in global memory, or `[lines, unit]` staged in shared memory.

    `unit` is a power of two. `positions` is int32 in `layout`, every value inside the row; the result has its shape and layout.
    """
    staged = len(row.shape) == 2
    shift, mask = row.shape[-1].bit_length() - 1, row.shape[-1] - 1
    result = plgpu.ShapeDtypeStruct(positions.shape, dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=result)
    def gather(ctx: Any, source: Any, indices: FragmentedArray) -> FragmentedArray:
        del ctx
        index = ir.IndexType.get()
        element = ir.MemRefType(source.type).element_type
        registers = []
        for register in indices.registers.flat:
            (length,) = ir.VectorType(register.type).shape
            elements = []
            for lane in range(length):
                position = vector.extract(register, dynamic_position=[], static_position=[lane])
                place = [position]
                if staged:
                    line = arith.shrui(position, mosaic_utils.c(shift, position.type))
                    place = [line, arith.andi(position, mosaic_utils.c(mask, position.type))]
                elements.append(memref.load(source, [arith.index_cast(index, coordinate) for coordinate in place]))
            registers.append(vector.from_elements(ir.VectorType.get((length,), element), elements))
        return FragmentedArray(
            _registers=np.array(registers, dtype=object).reshape(indices.registers.shape),
            _layout=indices.layout,
            _is_signed=None,
        )

    return gather(row, positions)


def store_warp_partials(slots: Any, first: jax.Array, values: jax.Array, layout: Any, operation: str) -> None:
    """Reduce a float32 vector of one warpgroup and leave its four warps' partial results in `slots[first : first + 4]`.

    `operation` is `add`, `min` or `max`. Nothing is synchronized: put a barrier before the slots are read.
    """
    combine = _COMBINE[operation]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), layout))
    def reduce(ctx: Any, target: Any, offset: FragmentedArray, vectors: FragmentedArray) -> None:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        parts = [
            vector.extract(register, dynamic_position=[], static_position=[lane])
            for register in vectors.registers.flat
            for lane in range(ir.VectorType(register.type).shape[0])
        ]
        partial = functools.reduce(combine, parts)
        # A butterfly leaves the warp's result in all its lanes, which then all store the same value.
        for distance in (1, 2, 4, 8, 16):
            partial = combine(partial, mosaic_utils.shfl_bfly(partial, distance))
        warp = arith.remui(mosaic_utils.warp_idx(), mosaic_utils.c(WARPS, i32))
        slot = arith.addi(offset.registers.item(), warp)
        memref.store(partial, target, [arith.index_cast(ir.IndexType.get(), slot)])

    reduce(slots, first, values)


_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: arith.addf(a, b),
    "min": lambda a, b: arith.minimumf(a, b),
    "max": lambda a, b: arith.maximumf(a, b),
}


def reciprocal(x: jax.Array) -> jax.Array:
    """`1 / x` of a float32 scalar, correctly rounded.

    A division in a kernel comes out as `rcp.approx` or `div.full`, a unit in the last place off now and then: enough to move a
    code that lies on the boundary between two.
    """

    scalar = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(scalar,), return_type=plgpu.ShapeDtypeStruct((), np.dtype(np.float32), layout=scalar))
    def exact(ctx: Any, operand: FragmentedArray) -> FragmentedArray:
        del ctx
        value = operand.registers.item()
        result: Any = llvm.inline_asm(value.type, [value], "rcp.rn.f32 $0, $1;", "=f,f")
        return FragmentedArray.splat(result, ())

    return exact(x)


def redefine(values: jax.Array) -> jax.Array:
    """The same WGMMA operand, 8 or 16 bits wide, in registers that the assembler takes for newly written ones.

    ptxas serializes every WGMMA of a loop (C7513) when registers that a later one reads are written while an earlier one is in
    flight, and it looks through moves. An exclusive or with a special register that is zero (a grid of one axis) is not a move.
    """
    layout = plgpu.Layout.WGMMA_8BIT if values.dtype.itemsize == 1 else plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(values.shape, values.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def rewrite(ctx: Any, operand: FragmentedArray) -> FragmentedArray:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        zero: Any = llvm.inline_asm(i32, [], "mov.u32 $0, %ctaid.z;", "=r", has_side_effects=True)
        registers = [
            mosaic_utils.bitcast(arith.xori(mosaic_utils.bitcast(register, i32), zero), register.type)
            for register in operand.registers.flat
        ]
        return FragmentedArray(
            _registers=np.array(registers, dtype=object).reshape(operand.registers.shape),
            _layout=operand.layout,
            _is_signed=operand.is_signed,
        )

    return rewrite(values)


def read_partials(slots: Any, first: int, count: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Fold `count` slots left by `store_warp_partials` into one scalar, in the same order in every thread."""
    result = slots[first]
    for slot in range(first + 1, first + count):
        result = combine(result, slots[slot])
    return result
