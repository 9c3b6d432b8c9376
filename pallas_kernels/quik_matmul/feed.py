"""How 4-bit weights get from shared memory into the registers that a tensor core reads: 16 bytes at a time, few instructions.

In tile form (`layout.feed`) a row's 128 codes are four times 16 bytes, one for each of the four threads that hold the row in an
8-bit operand, in the order in which that thread needs them:

    thread t, word w, byte j:   low half   the code of column 32 w + 4 t + j            bytes of one register of the operand
                                high half  that of column 32 w + 16 + 4 t + j           bytes of the next one

A code in the high half of a byte is 16 times the code as an int8, sign included, so a word becomes two registers by a mask, and a
shift and a mask. `FACTOR` is undone in float32, exactly: 16 times as large a sum converts to 16 times the float.

A thread of a 16-bit operand holds, of each 8 columns, the two from `2 t` on. They lie with two of the threads above, so it reads
two pieces of 16 bytes, and makes `136 + code` (float16: `1032 + code`) by setting mantissa bits, from which it subtracts the
constant, exactly.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from quikjax.pallas_kernels import hopper

FACTOR = 16
COLUMNS = 128
WORDS = COLUMNS // 8  # of a row

# Of a row's words a thread has four; as an array in registers they lie as four bytes of an 8-bit operand do.
_WORDS = plgpu.Layout.WGMMA_8BIT


def load(ref: Any) -> jax.Array:
    """Codes of `n` rows in tile form, int32 `[n, 16]` in shared memory, in registers: each thread's 16 bytes of a row at once."""
    return hopper.load(ref, _WORDS)


def widened(words: jax.Array) -> jax.Array:
    """`FACTOR` times the codes as an 8-bit operand `[n, 128]`, from what `load` loaded."""
    n = words.shape[0]
    result = plgpu.ShapeDtypeStruct((n, COLUMNS), np.dtype(np.int8), layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(_WORDS,), return_type=result)
    def unpack(ctx: Any, loaded: FragmentedArray) -> FragmentedArray:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        mask = mosaic_utils.c(_signed(0xF0F0F0F0), i32)
        registers = np.empty((n // 64, 8, 1, 1, 2, 1, 1, 1, 1), dtype=object)
        pieces = loaded.registers.reshape(n // 64, 2)
        for tile, half in np.ndindex(pieces.shape):
            piece: Any = pieces[tile, half]
            for w in range(4):
                word = vector.extract(piece, dynamic_position=[], static_position=[w])
                low = arith.andi(arith.shli(word, mosaic_utils.c(4, i32)), mask)
                for place, value in ((2 * w, low), (2 * w + 1, arith.andi(word, mask))):
                    registers[tile, place, 0, 0, half, 0, 0, 0, 0] = mosaic_utils.bitcast(value, four)
        return FragmentedArray(_registers=registers, _layout=plgpu.Layout.WGMMA_8BIT.to_mgpu(), _is_signed=True)

    return unpack(words)


def widened_16(ref: Any, dtype: Any) -> jax.Array:
    """The codes themselves as an operand `[n, 128]` of bfloat16 or float16, from int32 `[n, 16]` in shared memory."""
    n = ref.shape[0]
    result = plgpu.ShapeDtypeStruct((n, COLUMNS), dtype, layout=plgpu.Layout.WGMMA)
    # A float whose mantissa's last bit is 1: its pattern, with a code's bits and its sign bit turned it is `bias` plus the code.
    pattern, bias = (0x4308, 136) if dtype == jnp.bfloat16 else (0x6408, 1032)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def unpack(ctx: Any, source: Any) -> FragmentedArray:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())

        def number(value: int) -> Any:
            return mosaic_utils.c(_signed(value), i32)

        thread = mosaic_utils.thread_idx()
        lane, warp = arith.andi(thread, number(31)), arith.andi(arith.shrui(thread, number(5)), number(3))
        row, t = arith.shrui(lane, number(2)), arith.andi(lane, number(3))
        # Words of the first of a thread's rows, and of them those with columns 2 t and 2 t + 1 of 16; 8 columns on, 8 words on.
        first = arith.addi(arith.muli(arith.addi(arith.muli(warp, number(16)), row), number(WORDS)), _half(t, number, 4))
        # Bytes 0 and 1 of a word or 2 and 3, as the low bytes of two halves: prmt takes the zeros from its other operand.
        selector = arith.addi(number(0x4140), arith.muli(arith.andi(t, number(1)), number(0x0202)))
        offset: Any = mosaic_utils.bitcast(number(_doubled(dtype, bias)), pair)
        pointer = mosaic_utils.memref_ptr(source)
        registers = np.empty((n // 64, 16, 1, 1, 2, 1, 1, 1, 1), dtype=object)
        for tile, half, eight in np.ndindex(n // 64, 2, 2):
            at = arith.addi(first, number((64 * tile + 8 * half) * WORDS + 8 * eight))
            four: Any = llvm.load(ir.VectorType.get((4,), i32), mosaic_utils.getelementptr(pointer, [at], i32))
            for w in range(4):
                word = vector.extract(four, dynamic_position=[], static_position=[w])
                spread: Any = llvm.inline_asm(i32, [word, number(0), selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
                for sixteen in range(2):
                    code = spread if not sixteen else arith.shrui(spread, number(4))
                    bits = arith.xori(arith.andi(code, number(0x000F000F)), number(pattern << 16 | pattern))
                    value = arith.subf(mosaic_utils.bitcast(bits, pair), offset)
                    registers[tile, 4 * w + 2 * sixteen + eight, 0, 0, half, 0, 0, 0, 0] = value
        return FragmentedArray(_registers=registers, _layout=plgpu.Layout.WGMMA.to_mgpu(), _is_signed=None)

    return unpack(ref)


def _half(t: Any, number: Any, words: int) -> Any:
    """`t // 2` pieces of `words` words."""
    return arith.muli(arith.shrui(t, number(1)), number(words))


def _doubled(dtype: Any, value: int) -> int:
    """The bits of a 16-bit float, twice."""
    bits = int(np.asarray(value, dtype).view(np.uint16))
    return bits << 16 | bits


def _signed(value: int) -> int:
    """The int32 with these bits."""
    return value - (1 << 32) if value >= 1 << 31 else value
