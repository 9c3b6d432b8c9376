"""`split_quantize` as one Mosaic GPU kernel for Hopper, with what stands before it (a norm, an activation) fused in.

Schedule. A thread block owns `rows` tokens and has `warpgroups` groups of 128 threads:

    TMA     x[row] ------> shared memory           each byte of x leaves HBM once, in order
    gather  shared memory -> registers             base columns in the weight's order, a chunk per warpgroup in turn
    norm    sum of squares (and of values)         only for the fused norms; one barrier
    min/max registers -> a slot per warp           one barrier, then every thread folds the same slots
    write   codes, outliers, scale, zero           in order, straight from registers

Columns come in tile form (`layout.tile_columns`): base padded to a multiple of `COLUMN_TILE` by repeating the first base column,
which changes neither minimum nor maximum and meets zero codes in the weight; outliers padded likewise.

Bits: codes are those of `reference.py` for the same quantizer input; every operation of the quantizer is one IEEE operation
(`rcp.rn`, `cvt.rni`), none of them contracted or flushed.
"""

import dataclasses
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
from quikjax.pallas_kernels.reference import LevelClip, checked_level_clip, scale_and_zero
from quikjax.pallas_kernels.split_quantize.elementwise import elementwise
from quikjax.pallas_kernels.split_quantize.producers import Identity, LayerNorm, Producer, RmsNorm

# Registers of a multiprocessor, the most a thread can have, and what the kernel needs beside the values it holds: more with a
# norm (with 40 a LayerNorm of 14848 columns spilled eight).
_REGISTERS, _MOST_REGISTERS, _OTHER_REGISTERS, _NORM_REGISTERS = 65536, 255, 40, 16


@dataclasses.dataclass(frozen=True)
class SplitTiles:
    """`rows` tokens and `warpgroups` (which share each row) per thread block. Both small powers of two."""

    rows: int = 1
    warpgroups: int = 1


def default_tiles(rows: int, columns: int, producer: Producer) -> SplitTiles:
    """Tiles where nothing was tuned: many threads per token when there are few tokens, several tokens per thread block otherwise.

    Several tokens share one reading of the column indices, which are twice the bytes of a 16-bit row.
    """
    if rows <= 256:
        tiles = SplitTiles(1, min(8, max(1, columns // 1024)))
        # Each thread needs registers beside its values, so where values are many, fewer threads hold more of them.
        while tiles.warpgroups > 1 and _values(tiles, columns + 512, producer) > _room(tiles, producer):
            tiles = SplitTiles(1, tiles.warpgroups - 1)
        return tiles
    if columns <= (8192 if producer.parameters else 16384):
        return SplitTiles(2, math.ceil(columns / 4096))
    return SplitTiles(1, math.ceil(columns / 8192))


def _values(tiles: SplitTiles, columns: int, producer: Producer) -> int:
    """Registers a thread spends on values; a norm's weights stay in registers too."""
    held = tiles.rows + producer.parameters
    return math.ceil(held * columns / (tiles.warpgroups * hopper.WARPGROUP))


def _room(tiles: SplitTiles, producer: Producer) -> int:
    """Registers a thread has for values."""
    others = _OTHER_REGISTERS + (_NORM_REGISTERS if producer.parameters else 0)
    return min(_MOST_REGISTERS, _REGISTERS // (tiles.warpgroups * hopper.WARPGROUP)) - others


def staged_lines(columns: int, dtype: Any) -> int:
    """Lines that a row takes in shared memory: the copy engine writes to multiples of 128 bytes only."""
    unit = hopper.row_unit(columns)
    assert unit is not None, "why_not refuses such widths"
    per_128_bytes = max(1, 128 // (unit * jnp.dtype(dtype).itemsize))
    return math.ceil(columns // unit / per_128_bytes) * per_128_bytes


def why_not(columns: int, base: int, outliers: int, dtype: Any, producer: Producer, tiles: SplitTiles) -> str | None:
    """`None` when the kernel can run on these (static) properties, otherwise the reason. `base` and `outliers` are padded."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)):
        return f"activations are {jnp.dtype(dtype)}; the kernel reads bfloat16, float16 and float32"
    if base == 0:
        return "there are no base columns to quantize"
    unit = hopper.row_unit(columns)
    if unit is None:
        return f"{columns} input columns are not a multiple of 8, which the copy engine needs"
    needed = tiles.rows * producer.inputs * staged_lines(columns, dtype) * unit * jnp.dtype(dtype).itemsize
    if needed > hopper.SHARED_MEMORY:
        return f"{needed} bytes of rows do not fit into shared memory"
    if tiles.warpgroups * hopper.WARPGROUP > 1024:
        return f"{tiles.warpgroups} warpgroups are more than the 1024 threads of a thread block"
    if (values := _values(tiles, base + outliers, producer)) > (room := _room(tiles, producer)):
        return f"{values} values per thread do not fit into {room} registers"
    return None


def split_quantize(
    inputs: tuple[jax.Array, ...],
    columns: jax.Array,
    base: int,
    padded_base: int,
    bits: int,
    producer: Producer,
    parameters: tuple[jax.Array, ...],
    tiles: SplitTiles,
    row_padding: int,
    clip: tuple[int, int] | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Split and quantize `inputs`, `[M, K]` each, in tile form.

    Args:
        inputs: what `producer` reads: `(x,)`, or `(gate, up)`.
        columns: int32, tile form: `padded_base` base columns, then the padded outlier columns.
        base: the true number of base columns.
        bits: 4 or 8.
        parameters: the norm's weight (and bias), float, `[K]` each; empty for the others.
        clip: the activations' level clip.
        row_padding: `scale` and `zero` are allocated up to a multiple of this, so that a product's last tile may read them.

    Returns:
        `codes` int8 `[M up to 8, padded_base]`, `outliers` `[M up to 8, padded outliers]` in the inputs' dtype or None, `scale`
        and `zero` float32 `[M up to row_padding]`. Rows past `M` are not written.
    """
    m, k = inputs[0].shape
    dtype = inputs[0].dtype
    padded_outliers = columns.shape[0] - padded_base
    unit = hopper.row_unit(k)
    assert unit is not None, "why_not refuses such widths"
    padded_rows = math.ceil(m / row_padding) * row_padding
    tiled_rows = math.ceil(m / 8) * 8  # a tiled TMA copy wants whole groups of eight rows
    outputs = [jax.ShapeDtypeStruct((tiled_rows, padded_base), jnp.int8)]
    if padded_outliers:
        outputs.append(jax.ShapeDtypeStruct((tiled_rows, padded_outliers), dtype))
    outputs += [jax.ShapeDtypeStruct((padded_rows,), jnp.float32)] * 2
    body = functools.partial(
        _kernel,
        base=base,
        padded_base=padded_base,
        bits=bits,
        clip=checked_level_clip(bits, clip),
        producer=producer,
        tiles=tiles,
        parameters=len(parameters),
    )
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        grid=(math.ceil(m / tiles.rows),),
        grid_names=("rows",),
        num_threads=tiles.warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "staged": plgpu.SMEM((tiles.rows, len(inputs), staged_lines(k, dtype), unit), dtype),
            "slots": plgpu.SMEM((Slots.count(tiles.rows, tiles.warpgroups),), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=tiles.rows * len(inputs) * math.ceil(k // unit / hopper.LONGEST_BOX)),
            "meet": plgpu.Barrier(num_arrivals=tiles.warpgroups),
        },
        compiler_params=hopper.COMPILER_PARAMS,
        interpret=interpret,
    )
    results = kernel(*[x.reshape(m, k // unit, unit) for x in inputs], columns, *parameters)
    codes, scale, zero = results[0], results[-2], results[-1]
    return codes, results[1] if padded_outliers else None, scale, zero


def _kernel(
    *refs: Any,
    base: int,
    padded_base: int,
    bits: int,
    clip: LevelClip,
    producer: Producer,
    tiles: SplitTiles,
    parameters: int,
    **scratch: Any,
) -> None:
    inputs, columns = refs[: producer.inputs], refs[producer.inputs]
    norm = refs[producer.inputs + 1 : producer.inputs + 1 + parameters]
    outputs = refs[producer.inputs + 1 + parameters :]
    codes, scales, zeros = outputs[0], outputs[-2], outputs[-1]
    outliers = outputs[1] if len(outputs) == 4 else None
    staged, slots, arrived, meet = scratch["staged"], scratch["slots"], scratch["arrived"], scratch["meet"]

    m, lines, unit = inputs[0].shape
    group = lax.axis_index("warpgroup")
    block = lax.axis_index("rows")
    # Past the last row the thread block does the last row again: the same values to the same place.
    rows = [jnp.minimum(block * tiles.rows + i, m - 1) for i in range(tiles.rows)]

    @pl.when(group == 0)
    def _stage() -> None:
        for i, row in enumerate(rows):
            for j, x in enumerate(inputs):
                for first in range(0, lines, hopper.LONGEST_BOX):
                    part = pl.ds(first, min(hopper.LONGEST_BOX, lines - first))
                    plgpu.copy_gmem_to_smem(x.at[row, part], staged.at[i, j, part], arrived)

    plgpu.barrier_wait(arrived)

    def meet_all() -> None:
        plgpu.barrier_arrive(meet)
        plgpu.barrier_wait(meet)

    slot = Slots(slots, group, tiles.rows, tiles.warpgroups)
    parts = gather(columns, staged, norm, lines * unit, base, padded_base, producer, slot, meet_all)
    for i, row in enumerate(rows):
        quantizer = Quantizer(i, slot, clip, bits)

        @pl.when(group == 0)
        def _write(row: Any = row, quantizer: Quantizer = quantizer) -> None:
            scales[row] = quantizer.scale
            zeros[row] = quantizer.zero

        for part in parts:
            place = pl.ds(part.start, part.length)
            if part.first >= padded_base:
                assert outliers is not None
                outliers[row, pl.ds(part.start - padded_base, part.length)] = part.values[i]
            else:
                codes[row, place] = quantizer.codes(part.values[i])


def gather(
    columns: Any,
    staged: Any,
    norm: tuple[Any, ...],
    inputs: int,
    base: int,
    padded_base: int,
    producer: Producer,
    slot: "Slots",
    meet_all: Callable[[], None],
) -> list["Part"]:
    """Gather the staged rows and run the producer on them: each warpgroup's share, rounded as a model that does not fuse would.

    The base's minima and maxima are left in `slot`, where all warpgroups find them (`Quantizer`).

    Args:
        columns: int32 in global memory, tile form.
        staged: `[rows, producer.inputs, lines, unit]` in shared memory, rows of `inputs` numbers.
        norm: the norm's weight (and bias), in global memory.
        meet_all: waits until all warpgroups of the thread block have come here.
    """
    dtype = staged.dtype
    padded_outliers = columns.shape[0] - padded_base
    chunk = _chunk(padded_base, padded_outliers)
    section = functools.partial(_gather, columns, staged, dtype, producer, slot, chunk)
    parts = section(0, padded_base, base, norm)
    if padded_outliers:
        parts += section(padded_base, padded_outliers, inputs - base, norm)
    if isinstance(producer, RmsNorm | LayerNorm):
        _normalize(parts, producer, inputs, slot, meet_all)

    # What comes out of the producer is rounded to the activations' dtype, as a model that does not fuse would.
    for part in parts:
        part.values = [v.astype(dtype) for v in part.values]
    base_parts = [part for part in parts if part.first < padded_base]
    for i in range(slot.rows):
        values = [part.values[i].astype(jnp.float32) for part in base_parts]
        slot.store(2, i, functools.reduce(jnp.minimum, values), base_parts[0].layout, "min")
        slot.store(3, i, functools.reduce(jnp.maximum, values), base_parts[0].layout, "max")
    meet_all()
    return parts


class Quantizer:
    """How the values of a row that `gather` has gathered become codes."""

    def __init__(self, row: int, slot: "Slots", clip: LevelClip, bits: int):
        low, high = slot.read(2, row, jnp.minimum), slot.read(3, row, jnp.maximum)
        self._origin, self.scale, self.zero = scale_and_zero(low, high, clip)
        self._inverse = hopper.reciprocal(self.scale)
        self._lowest, self._bits = clip.lowest, bits

    def codes(self, values: jax.Array) -> jax.Array:
        steps = jnp.round((values.astype(jnp.float32) - self._origin) * self._inverse)
        level = jnp.clip(steps, np.float32(self._lowest), np.float32(self._lowest + 2**self._bits - 1))
        return (level - np.float32(self._lowest + 2 ** (self._bits - 1))).astype(jnp.int8)


class Slots:
    """Places in shared memory for four reductions over all warps of the warpgroups that split, one set per row."""

    def __init__(self, slots: Any, group: Any, rows: int, warpgroups: int):
        self._slots, self.group, self.rows, self.warpgroups = slots, group, rows, warpgroups
        self._warps = warpgroups * hopper.WARPS

    @staticmethod
    def count(rows: int, warpgroups: int) -> int:
        """How many there are: two reductions for a norm, two for minimum and maximum, each with a slot per warp and row."""
        return 4 * rows * warpgroups * hopper.WARPS

    def _first(self, reduction: int, row: int) -> int:
        return (reduction * self.rows + row) * self._warps

    def store(self, reduction: int, row: int, values: jax.Array, layout: Any, operation: str) -> None:
        first = self._first(reduction, row) + self.group * hopper.WARPS
        hopper.store_warp_partials(self._slots, first, values, layout, operation)

    def read(self, reduction: int, row: int, combine: Any) -> Any:
        return hopper.read_partials(self._slots, self._first(reduction, row), self._warps, combine)


@dataclasses.dataclass
class Part:
    """One chunk of gathered columns: where it starts, its values per row, and which of them are not padding."""

    first: int  # the section's first column: 0 for base, the padded base for outliers
    start: Any  # the chunk's first column, a traced scalar
    length: int
    layout: Any
    values: list[jax.Array]
    real: jax.Array | None  # 1.0 where the column counts once in a norm, 0.0 for padding and repetition
    weights: list[jax.Array]


def _chunk(base: int, outliers: int) -> tuple[int, Any]:
    """Length and layout of a chunk, equal for both sections: up to four neighbours per thread, so that stores are wide."""
    vector = next(v for v in (4, 2, 1) if base % (hopper.WARPGROUP * v) == outliers % (hopper.WARPGROUP * v) == 0)
    length = hopper.WARPGROUP * vector
    return length, plgpu.Layout.WG_STRIDED((length,), vec_size=vector)


def _gather(
    columns: Any,
    staged: Any,
    dtype: Any,
    producer: Producer,
    slot: Slots,
    shape: tuple[int, Any],
    first: int,
    width: int,
    true_width: int,
    norm: tuple[Any, ...],
) -> list[Part]:
    """This warpgroup's chunks of one section (base or outliers), in turns with the other warpgroups."""
    length, layout = shape
    chunks = width // length
    parts = []
    for turn in range(math.ceil(chunks / slot.warpgroups)):
        wanted = turn * slot.warpgroups + slot.group
        # A warpgroup without a chunk left repeats the last one: harmless to minimum, maximum and what is written.
        chunk = jnp.minimum(wanted, chunks - 1)
        start = first + chunk * length
        positions = hopper.load(columns.at[pl.ds(start, length)], layout)
        values = []
        for i in range(slot.rows):
            raw = [hopper.gather_row(staged.at[i, j], positions, layout, dtype) for j in range(producer.inputs)]
            if isinstance(producer, Identity):
                values.append(raw[0])
            else:
                values.append(elementwise(producer, [value.astype(jnp.float32) for value in raw]))
        real, weights = None, []
        if norm:
            inside = plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout) + chunk * length < true_width
            counts = jnp.where(wanted < chunks, np.float32(1), np.float32(0))
            real = jnp.where(inside, counts, np.float32(0))
            weights = [hopper.gather_row(weight, positions, layout, weight.dtype).astype(jnp.float32) for weight in norm]
        parts.append(Part(first, start, length, layout, values, real, weights))
    return parts


def _normalize(parts: list[Part], producer: RmsNorm | LayerNorm, columns: int, slot: Slots, meet_all: Any) -> None:
    """Replace the parts' values by the normalized ones: every column was gathered exactly once, so sums over parts are sums."""
    share = np.float32(1 / columns)

    def total(reduction: int, term: Any) -> list[Any]:
        for i in range(slot.rows):
            sums = [term(part.values[i]) * part.real for part in parts]
            slot.store(reduction, i, functools.reduce(jnp.add, sums), parts[0].layout, "add")
        meet_all()
        return [slot.read(reduction, i, jnp.add) * share for i in range(slot.rows)]

    if isinstance(producer, LayerNorm):
        means = total(0, lambda v: v)
        for part in parts:
            part.values = [v - means[i] for i, v in enumerate(part.values)]
    squares = total(1, lambda v: v * v)
    for part in parts:
        normal = [v * lax.rsqrt(squares[i] + np.float32(producer.epsilon)) for i, v in enumerate(part.values)]
        part.values = [v * part.weights[0] for v in normal]
        if len(part.weights) == 2:
            part.values = [v + part.weights[1] for v in part.values]
