"""The QUIK product as one Mosaic GPU kernel for Hopper: many rows, few rows, and weight-only.

Weights are the first operand of every product and activations the second, so the accumulator is `[n, m]`, a transposed tile of
`y`: only the first operand may come from registers, and int4 weights are widened to int8 in registers.

    memory warpgroup                        compute warpgroups 0 and 1, `n` weight rows each
    ring of `stages` slots                  for each of the base's tiles:   widen weights, int8 WGMMA into int32
      base:    weights 2n x 128 codes       epilogue in place, float32:     acc * s * scale + offset * reduced + bias
               activations m x 128 codes    for each of the outliers' tiles: 16-bit WGMMA onto that same float32 tile
      outliers: same bytes, same slots      cast, transpose, shared memory, TMA store

One accumulator tile is alive at a time: the integer sums become the float32 start value of the outlier product. The ring does
not drain between the two products nor between tiles: both walk one sequence of steps, and the memory warpgroup already fetches
the next tile's weights while the epilogue runs. A compute warpgroup widens the weights of its next step while the tensor core
multiplies those of this one, where the registers hold both; otherwise one warpgroup widens while the other multiplies.

Many rows: a persistent grid, a thread block per multiprocessor, walks the tiles along `n` within strips of `m`, so that
neighbouring ones read the same activations out of L2.

Few rows (`m` <= 64): the weights are the traffic, and there are too few tiles along `n` to keep every multiprocessor
streaming. A cluster of `splits` thread blocks then shares one tile and takes the steps along K in turns:

    part 0 (leader)   steps 0, S, 2S, ...   adds the others' int32 sums (exact in any order), epilogue, its outlier steps,
    part p            steps p, p + S, ...   then the others' float32 outlier sums in the order of p: always the same bits

Partial sums travel from registers into the leader's shared memory; nothing goes through global memory.

What is written: `y` of one weight, or of each of several that share their columns and lie one after the other in one array of
tiles (`layout.Joined`): a warpgroup's rows are one member's, because members begin at multiples of 128 rows. Up to `DIRECT_ROWS`
rows go from registers to exactly the elements that there are, `y` rounded to its type and then a residual added to it, which was
read before the first step. More rows are staged in shared memory and stored by the copy engine.

One row need not come split (`unsplit.py`): each thread block then splits it before its first step, and keeps the codes.

Weight-only (`bits = 16`): the same kernel with 16-bit activations: weights widen to the activations' dtype, the first product
accumulates in float32, and its epilogue is `acc * scale + bias`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from quikjax.pallas_kernels import hopper
from quikjax.pallas_kernels.layout import Joined, Tiled, TileSplit
from quikjax.pallas_kernels.quik_matmul import feed
from quikjax.pallas_kernels.quik_matmul.problem import Operands, Problem, Walk, parts_of
from quikjax.pallas_kernels.quik_matmul.tiles import (
    COMPUTE,
    K_STEP,
    MatmulTiles,
    allocated_outputs,
    outlier_step,
    shortened,
)
from quikjax.pallas_kernels.quik_matmul.unsplit import Unsplit, split, stage

DIRECT_ROWS = 64  # up to so many rows are stored from registers
_MEMORY_REGISTERS = 40
_COMPUTE_REGISTERS = 232


def quik_matmul(
    activations: TileSplit | Unsplit,
    weight: Tiled | Joined,
    bias: jax.Array | None,
    *,
    rows: int,
    bits: int,
    out_dtype: Any,
    tiles: MatmulTiles,
    cores: int,
    residual: jax.Array | None = None,
) -> list[jax.Array]:
    """`y [rows, N]` of split activations and a weight, both in tile form (`layout.py`); one for each weight of a joined one.

    Args:
        activations: codes and their scale and zero, or the base columns themselves in 16 bits when `bits` is 16; or a row of
            which the kernel makes codes itself.
        weight: its outliers in the dtype of the activations'.
        bias: float32, padded like `weight.scale`, or None.
        rows: the true number of them; those of a split are a multiple of 8.
        bits: of the activations: 4, 8 or 16.
        cores: multiprocessors of the device.
        residual: `[rows, N]` of `out_dtype`, added to the rounded `y` of a weight that is not joined; at most `DIRECT_ROWS` rows.
    """
    unsplit = activations if isinstance(activations, Unsplit) else None
    tokens, x_scale, x_zero, x_outliers = (None,) * 4 if isinstance(activations, Unsplit) else activations
    qweight, scale = weight.qweight, weight.scale
    reduced = weight.reduced if bits < 16 else None
    w_outliers = weight.outliers if weight.outlier_count else None
    m = 8 if tokens is None else tokens.shape[0]
    n, base = weight.padded
    weight_bits = weight.weight_bits
    base_steps, step = base // K_STEP, outlier_step(weight_bits)
    outlier_steps = 0 if w_outliers is None else w_outliers.shape[1] // step
    # Tiles are chosen for 16-bit outputs and split activations; what takes more room takes it from the ring.
    more = 0 if unsplit is None else unsplit.form.shared_memory(tiles, base_steps, outlier_steps, weight_bits)
    tiles = shortened(tiles, weight_bits, bits, jnp.dtype(out_dtype).itemsize, more)
    direct, members = rows <= DIRECT_ROWS, weight.places if isinstance(weight, Joined) else ((0, weight.outputs, n),)
    assert residual is None or (direct and len(members) == 1), "only few rows of one result have a residual added"
    results = [(rows, count) if direct else (m, allocated_outputs(count)) for _, count, _ in members]
    block_n = COMPUTE * tiles.n
    grid = (math.ceil(m / tiles.m), math.ceil(n / block_n))
    problem = Problem(
        tiles=tiles,
        bits=bits,
        grid=grid,
        base_steps=base_steps,
        outlier_steps=outlier_steps,
        has_bias=bias is not None,
        out_dtype=jnp.dtype(out_dtype),
        members=members,
        direct=direct,
        has_residual=residual is not None,
        fed=weight_bits == 4,
        unsplit=None if unsplit is None else unsplit.form,
    )
    scratch: dict[str, Any] = {
        "weights": plgpu.SMEM((tiles.stages, block_n, feed.WORDS), jnp.int32)
        if weight_bits == 4
        else hopper.swizzled((tiles.stages, block_n, K_STEP), qweight.dtype),
        # A slot is full when weights and activations are there.
        "full": plgpu.Barrier(num_arrivals=2 if unsplit is None else 1, num_barriers=tiles.stages),
        "empty": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tiles.stages),
    }
    if tokens is not None:
        scratch["tokens"] = hopper.swizzled((tiles.stages, tiles.m, K_STEP), tokens.dtype)
    else:
        assert unsplit is not None
        scratch |= unsplit.form.scratch(tiles, base_steps, outlier_steps, weight_bits)
    if not direct:
        scratch["out"] = hopper.swizzled((COMPUTE, tiles.m, min(64, tiles.n)), out_dtype)
    if w_outliers is not None:
        # Same bytes per slot as the ring of codes, so slot i of one ring is slot i of the other.
        scratch["weights"] = plgpu.RefUnion(scratch["weights"], hopper.swizzled((tiles.stages, block_n, step), w_outliers.dtype))
    if w_outliers is not None and tokens is not None:
        assert x_outliers is not None
        pieces = K_STEP * tokens.dtype.itemsize // (2 * step)
        scratch["tokens"] = plgpu.RefUnion(
            scratch["tokens"], hopper.swizzled((tiles.stages, pieces, tiles.m, step), x_outliers.dtype)
        )
    if tiles.splits > 1:
        others = (tiles.splits - 1, COMPUTE, tiles.n, tiles.m)
        scratch["base_sums"] = hopper.swizzled(others, jnp.int32 if bits < 16 else jnp.float32)
        scratch["outlier_sums"] = hopper.swizzled(others, jnp.float32)
        scratch["arrived"] = plgpu.Barrier(num_arrivals=tiles.splits - 1, num_barriers=2 * COMPUTE)
    tile_count = grid[0] * grid[1]
    kernel = plgpu.kernel(
        functools.partial(_kernel, problem),
        out_type=[jax.ShapeDtypeStruct(shape, out_dtype) for shape in results],
        grid=(tile_count if tiles.splits > 1 else min(cores, tile_count),),
        grid_names=("core",),
        cluster=(tiles.splits,) if tiles.splits > 1 else (),
        cluster_names=("part",) if tiles.splits > 1 else (),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=hopper.COMPILER_PARAMS,
    )
    first = [tokens] if unsplit is None else unsplit.operands()
    optional = [x_scale, x_zero, reduced, x_outliers, w_outliers, bias, residual]
    ys = kernel(*first, qweight, scale, *[array for array in optional if array is not None])
    return [y if y.shape == (rows, count) else y[:rows, :count] for y, (_, count, _) in zip(ys, members, strict=True)]


def _kernel(problem: Problem, *refs: Any, **scratch: Any) -> None:
    operands = Operands(problem, refs)
    group = lax.axis_index("warpgroup")

    @pl.when(group == COMPUTE)
    def _memory() -> None:
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
        _fetch(problem, operands, scratch)

    @pl.when(group < COMPUTE)
    def _compute() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _multiply(problem, operands, scratch, group)


def _fetch(problem: Problem, operands: Operands, scratch: dict[str, Any]) -> None:
    """The memory warpgroup: fill the ring, step after step, tile after tile."""
    tiles, full, empty = problem.tiles, scratch["full"], scratch["empty"]
    weights, weights16, tokens, tokens16 = _rings(problem, scratch)
    if problem.unsplit:
        stage(problem.unsplit, operands.unsplit, scratch)

    @plgpu.nd_loop((problem.grid[0] * problem.grid[1],), collective_axes="core")
    def _tile(loop: plgpu.NDLoopInfo) -> None:
        walk = Walk(problem, loop)
        rows, columns = pl.ds(walk.first_m, tiles.m), pl.ds(walk.first_n, COMPUTE * tiles.n)

        def acquire(step: Any) -> Any:
            slot = lax.rem(step, tiles.stages)

            @pl.when(step >= tiles.stages)
            def _() -> None:
                plgpu.barrier_wait(empty.at[slot])

            return slot

        @pl.loop(0, walk.base)
        def _base(k: Any) -> None:
            slot = acquire(walk.before + k)
            span = pl.ds(walk.base_step(k) * K_STEP, K_STEP)
            codes = operands.qweight.at[walk.base_step(k), columns] if problem.fed else operands.qweight.at[columns, span]
            plgpu.copy_gmem_to_smem(codes, weights.at[slot], full.at[slot])
            if not problem.unsplit:
                plgpu.copy_gmem_to_smem(operands.tokens.at[rows, span], tokens.at[slot], full.at[slot])

        if problem.outlier_steps:
            width = weights16.shape[-1]

            @pl.loop(0, walk.outliers)
            def _outliers(k: Any) -> None:
                slot = acquire(walk.before + walk.base + k)
                span = pl.ds(walk.outlier_step(k) * width, width)
                plgpu.copy_gmem_to_smem(operands.w_outliers.at[columns, span], weights16.at[slot], full.at[slot])
                if not problem.unsplit:
                    plgpu.copy_gmem_to_smem(operands.x_outliers.at[rows, span], tokens16.at[slot, 0], full.at[slot])


def _rings(problem: Problem, scratch: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Codes and outliers of weights and activations; those of a row that came unsplit are no ring, but a block's steps."""
    if problem.unsplit:
        weights, weights16 = scratch["weights"] if problem.outlier_steps else (scratch["weights"], None)
        return weights, weights16, scratch["tokens"], scratch.get("tokens16")
    if problem.outlier_steps:
        (weights, weights16), (tokens, tokens16) = scratch["weights"], scratch["tokens"]
        return weights, weights16, tokens, tokens16
    return scratch["weights"], None, scratch["tokens"], None


def _multiply(problem: Problem, operands: Operands, scratch: dict[str, Any], group: Any) -> None:
    """A compute warpgroup: both products and the epilogue of its `n` rows of each tile."""
    tiles, full, empty, out = problem.tiles, scratch["full"], scratch["empty"], scratch.get("out")
    weights, weights16, tokens, tokens16 = _rings(problem, scratch)
    shape = (tiles.n, tiles.m)
    mine = pl.ds(group * tiles.n, tiles.n)
    quantized = problem.bits < 16
    sum_dtype = jnp.int32 if quantized else jnp.float32
    operand_dtype = jnp.int8 if quantized else tokens.dtype
    # The accumulator, this step's weights and what is loaded of the next one's must fit into a thread's registers.
    operand_registers = tiles.n * K_STEP * jnp.dtype(operand_dtype).itemsize // (4 * hopper.WARPGROUP)
    ahead = operand_registers // 2 if problem.fed and quantized else operand_registers
    prefetches = tiles.n * tiles.m // hopper.WARPGROUP + operand_registers + ahead <= _COMPUTE_REGISTERS - 40
    row: tuple[Any, Any] | None = None
    if problem.unsplit:
        part, reverse = parts_of(problem)
        base, outliers = (problem.base_steps, tiles.splits, part), (problem.outlier_steps, tiles.splits, reverse)
        row = split(problem.unsplit, operands.unsplit, scratch, problem.bits, group, base, outliers)

    def token_codes(slot: Any, k: Any) -> Any:
        """The activations of a thread block's base step `k`, whose weights are in `slot`."""
        return tokens.at[k] if problem.unsplit else tokens.at[slot]

    def token_outliers(slot: Any, k: Any) -> Any:
        return tokens16.at[k] if problem.unsplit else tokens16.at[slot, 0]

    @plgpu.nd_loop((problem.grid[0] * problem.grid[1],), collective_axes="core")
    def _tile(loop: plgpu.NDLoopInfo) -> None:
        walk = Walk(problem, loop)

        def filled(step: Any) -> Any:
            slot = lax.rem(walk.before + step, tiles.stages)
            plgpu.barrier_wait(full.at[slot])
            return slot

        def release(step: Any) -> None:
            plgpu.barrier_arrive(empty.at[lax.rem(walk.before + step, tiles.stages)])

        def multiply_shared(accumulator: Any, first: Any, count: Any, left: Any, right: Any) -> None:
            """Both operands in shared memory: a step's slot is given back once the next step's product is queued behind it."""

            @pl.loop(0, count)
            def _(k: Any) -> None:
                slot = filled(first + k)
                plgpu.wgmma(accumulator, left(slot), right(slot, k).transpose((1, 0)))
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _() -> None:
                    release(first + k - 1)

        def base_products(accumulator: Any) -> Any:
            # Eight-bit weights are the tensor core's own: they go to it from shared memory, without passing registers.
            if weights.dtype == operand_dtype:
                multiply_shared(accumulator, 0, walk.base, lambda slot: weights.at[slot, mine], token_codes)
                sums = accumulator[...]
                release(walk.base - 1)
                return sums

            def loaded(step: Any) -> jax.Array:
                """A step's weights in registers: 4-bit ones for an 8-bit product as they lie in memory, others as the operand."""
                slot = filled(step)
                if not problem.fed:
                    return weights[slot, mine].astype(operand_dtype)
                codes = weights.at[slot, mine]
                return feed.load(codes) if quantized else feed.widened_16(codes, operand_dtype)

            def multiply(step: Any, left: jax.Array) -> None:
                slot = lax.rem(walk.before + step, tiles.stages)
                plgpu.wgmma(accumulator, left, token_codes(slot, step).transpose((1, 0)))

            def operand(left: jax.Array) -> jax.Array:
                """`loaded` in registers written after the last product was waited for."""
                return feed.widened(left) if quantized else hopper.redefine(left)

            if not prefetches:

                @pl.loop(0, walk.base)
                def _(k: Any) -> None:
                    left = loaded(k)
                    multiply(k, feed.widened(left) if quantized else left)
                    plgpu.wgmma_wait(0)
                    release(k)

                return accumulator[...]

            # The next step's weights are loaded while the tensor core multiplies this step's.
            @pl.loop(0, walk.base - 1, init_carry=loaded(0))
            def last(k: Any, left: jax.Array) -> jax.Array:
                multiply(k, operand(left))
                following = loaded(k + 1)
                plgpu.wgmma_wait(0)
                release(k)
                return following

            multiply(walk.base - 1, operand(last))
            sums = accumulator[...]
            release(walk.base - 1)
            return sums

        def outlier_products(accumulator: Any) -> None:
            first = walk.base
            multiply_shared(accumulator, first, walk.outliers, lambda slot: weights16.at[slot, mine], token_outliers)
            plgpu.wgmma_wait(0)

            @pl.when(walk.outliers > 0)
            def _() -> None:
                release(first + walk.outliers - 1)

        def outliers_onto(value: jax.Array) -> jax.Array:
            return pl.run_state(outlier_products)(plgpu.ACC.init(value)) if problem.outlier_steps else value

        residual = _residual(problem, walk, group, operands)
        sums = pl.run_scoped(base_products, plgpu.ACC(shape, sum_dtype))
        if tiles.splits == 1:
            value = outliers_onto(_epilogue(problem, operands, walk, group, sums, row))
            _store(problem, walk, group, out, operands, value, residual)
            return
        base_sums, outlier_sums, arrived = scratch["base_sums"], scratch["outlier_sums"], scratch["arrived"]
        send = functools.partial(plgpu.async_store_smem, cluster_idx=jnp.int32(0), cluster_dim="part", optimized=False)

        @pl.when(walk.part > 0)
        def _member() -> None:
            send(sums, base_sums.at[walk.part - 1, group], arrived.at[group])
            if problem.outlier_steps:
                start = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                send(outliers_onto(start), outlier_sums.at[walk.part - 1, group], arrived.at[COMPUTE + group])

        @pl.when(walk.part == 0)
        def _leader() -> None:
            plgpu.barrier_wait(arrived.at[group])
            total = sums
            for other in range(tiles.splits - 1):
                total = total + hopper.load(base_sums.at[other, group], plgpu.Layout.WGMMA)
            value = outliers_onto(_epilogue(problem, operands, walk, group, total, row))
            if problem.outlier_steps:
                plgpu.barrier_wait(arrived.at[COMPUTE + group])
                for other in range(tiles.splits - 1):
                    value = value + hopper.load(outlier_sums.at[other, group], plgpu.Layout.WGMMA)
            _store(problem, walk, group, out, operands, value, residual)

    if not problem.direct:
        plgpu.wait_smem_to_gmem(0)


def _epilogue(
    problem: Problem, operands: Operands, walk: Walk, group: Any, sums: jax.Array, row: tuple[Any, Any] | None
) -> jax.Array:
    """The float32 tile of `y` without its outlier product. `row`: scale and zero of the one row that was split here."""
    tiles = problem.tiles
    shape = (tiles.n, tiles.m)
    # The last thread block's second warpgroup may lie past the last row: it reads vectors that exist, its store is clipped.
    last = operands.scale.shape[0] - tiles.n
    ours = pl.ds(jnp.minimum(walk.first_n + group * tiles.n, last), tiles.n)
    theirs = pl.ds(walk.first_m, tiles.m)

    def of_weight(ref: Any) -> jax.Array:
        return lax.broadcast_in_dim(hopper.load(ref.at[ours], plgpu.Layout.WGMMA.reduce(1)), shape, (0,))

    def of_token(vector: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(vector, shape, (1,))

    half = np.float32(2 ** (problem.bits - 1))
    # What the sums are too large by is a power of two: everything is rounded as it were without it.
    unit = np.float32(1 / feed.FACTOR if problem.fed else 1)
    if row is not None:
        s, z = row
        value = sums.astype(jnp.float32) * (s * unit) * of_weight(operands.scale)
        value = value + (z + half * s) * of_weight(operands.reduced)
    elif problem.bits < 16:
        s = hopper.load(operands.x_scale.at[theirs], plgpu.Layout.WGMMA.reduce(0))
        z = hopper.load(operands.x_zero.at[theirs], plgpu.Layout.WGMMA.reduce(0))
        value = sums.astype(jnp.float32) * of_token(s * unit) * of_weight(operands.scale)
        value = value + of_token(z + half * s) * of_weight(operands.reduced)
    else:
        value = sums * of_weight(operands.scale)
    return value if operands.bias is None else value + of_weight(operands.bias)


def _residual(problem: Problem, walk: Walk, group: Any, operands: Operands) -> Any:
    """A warpgroup's tile of what is added to `y`, transposed like its sums; None where there is nothing."""
    if not problem.has_residual:
        return None
    tiles = problem.tiles
    return hopper.load_transposed(operands.residual, (tiles.n, tiles.m), walk.first_m, walk.first_n + group * tiles.n)


def _store(problem: Problem, walk: Walk, group: Any, out: Any, operands: Operands, value: jax.Array, residual: Any) -> None:
    """Cast and store a warpgroup's tile into the result whose rows it has; what lies past the end of a result is clipped."""
    tiles = problem.tiles
    value = value.astype(problem.out_dtype)
    if residual is not None:
        value = (value.astype(jnp.float32) + residual.astype(jnp.float32)).astype(problem.out_dtype)
    ours = walk.first_n + group * tiles.n

    def each(store: Callable[[Any, Any], None]) -> None:
        if len(operands.ys) == 1:
            store(operands.ys[0], ours)
            return
        for y, (start, _, length) in zip(operands.ys, problem.members, strict=True):

            @pl.when((ours >= start) & (ours < start + length))
            def _(y: Any = y, start: int = start) -> None:
                store(y, ours - start)

    if problem.direct:
        each(lambda y, column: hopper.store_transposed(y, value, walk.first_m, column))
        return
    width = out.shape[-1]
    for first in range(0, tiles.n, width):
        # The previous part must have left shared memory before it is overwritten.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        piece = plgpu.layout_cast(value[first : first + width], plgpu.Layout.WGMMA)
        out.at[group].transpose((1, 0))[...] = plgpu.layout_cast(piece, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

        def copy(y: Any, column: Any, first: int = first) -> None:
            plgpu.copy_smem_to_gmem(out.at[group], y.at[pl.ds(walk.first_m, tiles.m), pl.ds(column + first, width)])

        each(copy)
