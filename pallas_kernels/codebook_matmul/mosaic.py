"""The product with a 4-bit codebook as one Mosaic GPU kernel for Hopper: few rows, where the weights are the traffic.

Weights are the first operand, `[n, k]`: only that one may come from registers. The accumulator is a transposed tile of `y`.

    memory warpgroup                        compute warpgroups 0 and 1, 64 weight rows each
    ring of `stages` slots                  for each step of 128 columns:
      codes 128 x 128 (8 kB, contiguous)      16 bytes of codes a row and thread -> 64 values of F, looked up in registers
      absmax 2 x 128                          two products of 64 columns, each from zero, float32
      activations m x 128                     total += absmax * product, for both
                                            bias, cast, stores of the rows and columns that there are

A look-up takes bytes out of two registers by the codes themselves (`prmt`): four codes at once, low bytes and high bytes apart.

    low, high = T[0..7] by three bits of four codes; T[8..15] by the same; which of the two, by the fourth bit      6 prmt
    low and high bytes interleaved to two registers of two 16-bit values                                           2 prmt

with the three and the fourth bits of eight codes taken in five more instructions: 21 for eight weights. The codebook is data, so
one program serves every data type, and quantiles of one tensor.

There are too few tiles along `n` to keep every multiprocessor streaming, so a cluster of `splits` thread blocks shares one tile
and takes the steps in turns; the others' sums travel into the leader's shared memory, which adds them in their order: always the
same bits.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from quikjax.pallas_kernels import hopper
from quikjax.pallas_kernels.codebook_matmul.layout import BLOCK, DTYPES, TILE, CodebookTiles

COMPUTE = 2  # compute warpgroups
MOST_ROWS = 64
_ROWS = 64  # of weights, to a compute warpgroup
_MEMORY_REGISTERS = 40
_COMPUTE_REGISTERS = 232


@dataclasses.dataclass(frozen=True)
class CodebookMatmulTiles:
    """A thread block holds 128 rows of weights and `m` of activations, in a ring of `stages` slots; `splits` of them share it."""

    m: int = 8
    stages: int = 8
    splits: int = 1


def default_tiles(rows: int, outputs: int, inputs: int, cores: int) -> CodebookMatmulTiles:
    """Tiles reasoned from the machine's sizes and not measured. `outputs` and `inputs` are padded."""
    m = next(m for m in (8, 16, 32, 64) if rows <= m)
    blocks, steps = outputs // TILE, inputs // TILE
    # Each part keeps two steps, and the others' sums fit beside the ring.
    possible = [s for s in range(1, 9) if s == 1 or (steps >= 2 * s and (s - 1) * m <= 192)]
    splits = min(possible, key=lambda s: (math.ceil(blocks * s / cores) / s, s))
    tiles = CodebookMatmulTiles(m, 8, splits)
    while tiles.stages > 2 and shared_memory(tiles) > hopper.SHARED_MEMORY:
        tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
    return tiles


def shared_memory(tiles: CodebookMatmulTiles) -> int:
    """Bytes of shared memory that the kernel allocates, at most."""
    slot = TILE * TILE // 2 + tiles.m * TILE * 2 + (TILE // BLOCK) * TILE * 4
    return tiles.stages * slot + COMPUTE * tiles.m * _ROWS * 4 * (tiles.splits - 1)


def why_not(rows: int) -> str | None:
    """`None` when the kernel takes so many rows, otherwise the reason."""
    if rows > MOST_ROWS:
        return f"{rows} rows: from {MOST_ROWS + 1} on weights are dequantized once and the dense product takes over"
    return None


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The static properties that a kernel is specialized to."""

    tiles: CodebookMatmulTiles
    steps: int
    dtype: Any
    out_dtype: Any
    has_bias: bool


def codebook_matmul(
    x: jax.Array, weight: CodebookTiles, bias: jax.Array | None, *, rows: int, out_dtype: Any, tiles: CodebookMatmulTiles
) -> jax.Array:
    """`y [rows, N]`.

    Args:
        x: bfloat16 or float16 `[M, K up to 128]`, `M` a multiple of 8 and at most `tiles.m`; zeros in columns past `K`.
        weight: in tile form.
        bias: float32, `[N up to 128]`, or None.
        rows: how many of the `M` there are.
    """
    inputs = x.shape[1]
    blocks = weight.codes.shape[0]
    problem = _Problem(tiles, inputs // TILE, jnp.dtype(x.dtype), jnp.dtype(out_dtype), bias is not None)
    scratch: dict[str, Any] = {
        "codes": plgpu.SMEM((tiles.stages, TILE, TILE // 8), jnp.int32),
        "absmax": plgpu.SMEM((tiles.stages, TILE // BLOCK, TILE), weight.absmax.dtype),
        "tokens": hopper.swizzled((tiles.stages, tiles.m, TILE), x.dtype),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=tiles.stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tiles.stages),
    }
    if tiles.splits > 1:
        scratch["sums"] = hopper.swizzled((tiles.splits - 1, COMPUTE, _ROWS, tiles.m), jnp.float32)
        scratch["arrived"] = plgpu.Barrier(num_arrivals=tiles.splits - 1, num_barriers=COMPUTE)
    kernel = plgpu.kernel(
        functools.partial(_kernel, problem),
        out_type=jax.ShapeDtypeStruct((rows, weight.outputs), out_dtype),
        grid=(blocks,),
        grid_names=("tile",),
        cluster=(tiles.splits,) if tiles.splits > 1 else (),
        cluster_names=("part",) if tiles.splits > 1 else (),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=hopper.COMPILER_PARAMS,
    )
    y: jax.Array = kernel(x, weight.codes, weight.absmax, weight.words, *(() if bias is None else (bias,)))
    return y


def _kernel(problem: _Problem, *refs: Any, **scratch: Any) -> None:
    x, codes, absmax, words, *rest = refs
    bias, y = rest if problem.has_bias else (None, rest[0])
    group = lax.axis_index("warpgroup")
    tile = lax.axis_index("tile")
    splits = problem.tiles.splits
    part: Any = lax.axis_index("part") if splits > 1 else 0
    steps = (problem.steps - part + splits - 1) // splits

    @pl.when(group == COMPUTE)
    def _memory() -> None:
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")

        @pl.loop(0, steps)
        def _step(k: Any) -> None:
            slot = lax.rem(k, problem.tiles.stages)

            @pl.when(k >= problem.tiles.stages)
            def _() -> None:
                plgpu.barrier_wait(scratch["empty"].at[slot])

            step, full = part + k * splits, scratch["full"].at[slot]
            plgpu.copy_gmem_to_smem(codes.at[tile, step], scratch["codes"].at[slot], full)
            span = pl.ds(step * (TILE // BLOCK), TILE // BLOCK)
            plgpu.copy_gmem_to_smem(absmax.at[tile, span], scratch["absmax"].at[slot], full)
            plgpu.copy_gmem_to_smem(x.at[pl.ds(0, problem.tiles.m), pl.ds(step * TILE, TILE)], scratch["tokens"].at[slot], full)

    @pl.when(group < COMPUTE)
    def _compute() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        total = _sums(problem, words, steps, group, scratch)
        if splits == 1:
            _store(problem, tile, group, bias, y, total)
        else:
            sums, arrived = scratch["sums"], scratch["arrived"]

            @pl.when(part > 0)
            def _member() -> None:
                plgpu.async_store_smem(
                    total,
                    sums.at[part - 1, group],
                    arrived.at[group],
                    cluster_idx=jnp.int32(0),
                    cluster_dim="part",
                    optimized=False,
                )

            @pl.when(part == 0)
            def _leader() -> None:
                plgpu.barrier_wait(arrived.at[group])
                whole = total
                for other in range(splits - 1):
                    whole = whole + hopper.load(sums.at[other, group], plgpu.Layout.WGMMA)
                _store(problem, tile, group, bias, y, whole)


def _sums(problem: _Problem, words: Any, steps: Any, group: Any, scratch: dict[str, Any]) -> jax.Array:
    """A warpgroup's float32 tile of this part's steps."""
    tiles, full, empty = problem.tiles, scratch["full"], scratch["empty"]
    shape, mine = (_ROWS, tiles.m), pl.ds(group * _ROWS, _ROWS)
    row = [jnp.dtype(dtype) for dtype in DTYPES].index(problem.dtype)
    table = [words[row, i] for i in range(8)]
    zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

    @pl.loop(0, steps, init_carry=zero)
    def total(k: Any, total: jax.Array) -> jax.Array:
        slot = lax.rem(k, tiles.stages)
        plgpu.barrier_wait(full.at[slot])
        values = look_up(scratch["codes"].at[slot, mine], table, problem.dtype)

        def products(*accumulators: Any) -> tuple[jax.Array, ...]:
            for half, (accumulator, left) in enumerate(zip(accumulators, values, strict=True)):
                right = scratch["tokens"].at[slot, :, pl.ds(half * BLOCK, BLOCK)].transpose((1, 0))
                plgpu.wgmma(accumulator, left, right)
            plgpu.wgmma_wait(0)
            return tuple(accumulator[...] for accumulator in accumulators)

        found = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32) for _ in values])
        for half, part in enumerate(found):
            scale = hopper.load(scratch["absmax"].at[slot, half, mine], plgpu.Layout.WGMMA.reduce(1))
            total = total + part * lax.broadcast_in_dim(scale.astype(jnp.float32), shape, (0,))
        plgpu.barrier_arrive(empty.at[slot])
        return total

    return total


def look_up(codes: Any, table: list[jax.Array], dtype: Any) -> list[jax.Array]:
    """`F[code]` of 64 rows of a tile's codes in shared memory, int32 `[64, 16]`: two WGMMA operands `[64, 64]` of 16-bit `dtype`.

    `table`: the eight words of `F` in that dtype, scalars.
    """
    scalar = plgpu.Layout.WG_SPLAT(())
    result = plgpu.ShapeDtypeStruct((_ROWS, BLOCK), dtype, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[scalar] * 8), return_type=[result, result])
    def looked_up(ctx: Any, source: Any, *words: FragmentedArray) -> list[FragmentedArray]:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        kind = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
        pair = ir.VectorType.get((2,), kind)
        low, high = ([word.registers.item() for word in part] for part in (words[:4], words[4:]))
        lane = arith.andi(mosaic_utils.thread_idx(), mosaic_utils.c(31, i32))
        warp = arith.andi(arith.shrui(mosaic_utils.thread_idx(), mosaic_utils.c(5, i32)), mosaic_utils.c(3, i32))
        # Of 64 rows a warp has sixteen, a thread one of the first eight and one of the last; of a row's 16 words, four.
        first = arith.addi(arith.muli(warp, mosaic_utils.c(16 * 16, i32)), arith.muli(lane, mosaic_utils.c(4, i32)))
        pointer = mosaic_utils.memref_ptr(source)
        columns = [np.empty((1, BLOCK // 8, 1, 1, 2, 1, 1, 1, 1), dtype=object) for _ in range(2)]
        for half in range(2):
            place = arith.addi(first, mosaic_utils.c(half * 8 * 16, i32))
            four: Any = llvm.load(ir.VectorType.get((4,), i32), mosaic_utils.getelementptr(pointer, [place], i32))
            for w in range(4):
                word = vector.extract(four, dynamic_position=[], static_position=[w])
                for j, value in enumerate(_values(word, low, high)):
                    octet = 4 * w + j
                    columns[octet // 8][0, octet % 8, 0, 0, half, 0, 0, 0, 0] = mosaic_utils.bitcast(value, pair)
        layout = plgpu.Layout.WGMMA.to_mgpu()
        return [FragmentedArray(_registers=registers, _layout=layout, _is_signed=None) for registers in columns]

    return list(looked_up(codes, *table))


def _values(word: Any, low: list[Any], high: list[Any]) -> list[Any]:
    """Four registers of two 16-bit values each, from eight codes."""
    i32 = ir.IntegerType.get_signless(32)

    def constant(value: int) -> Any:
        return mosaic_utils.c(value, i32)

    three = arith.andi(word, constant(0x77777777))
    # For byte `j` of four: `j` of the lower half of the table, `4 + j` of the upper.
    fourth = arith.ori(arith.andi(arith.shrui(word, constant(1)), constant(0x44444444)), constant(0x32103210))
    found = []
    for shift in (0, 16):
        by = three if not shift else arith.shrui(three, constant(shift))
        which = fourth if not shift else arith.shrui(fourth, constant(shift))
        lows, highs = (_permute(_permute(t[0], t[1], by), _permute(t[2], t[3], by), which) for t in (low, high))
        found += [_permute(lows, highs, constant(0x5140)), _permute(lows, highs, constant(0x7362))]
    return found


def _permute(first: Any, second: Any, selector: Any) -> Any:
    """`prmt.b32`: four of the eight bytes of `first` (0 to 3) and `second` (4 to 7)."""
    result: Any = llvm.inline_asm(first.type, [first, second, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
    return result


def _store(problem: _Problem, tile: Any, group: Any, bias: Any, y: Any, value: jax.Array) -> None:
    """Bias, cast, and a warpgroup's part of the rows and columns that there are."""
    first = tile * TILE + group * _ROWS
    if bias is not None:
        rows = hopper.load(bias.at[pl.ds(first, _ROWS)], plgpu.Layout.WGMMA.reduce(1))
        value = value + lax.broadcast_in_dim(rows, value.shape, (0,))
    hopper.store_transposed(y, value.astype(problem.out_dtype), jnp.int32(0), first)
