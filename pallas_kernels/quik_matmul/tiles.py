"""Tiles of the Mosaic product: what they ask of a multiprocessor, and which are taken where nothing was tuned."""

import dataclasses
import math

from quikjax.pallas_kernels import hopper

K_STEP = 128  # base columns per step: a swizzle of 128 bytes of int8
LONGEST_ROWS = 256  # a token's scale and zero are allocated up to a multiple of this, so that every tile reads whole vectors
COMPUTE = 2  # compute warpgroups


@dataclasses.dataclass(frozen=True)
class MatmulTiles:
    """A warpgroup's tile is `n x m`; a thread block holds two of them along `n`, and a ring of `stages` slots.

    `strip`: how many tiles along `m` are walked together for each tile along `n`. `splits`: thread blocks that share a tile.
    """

    n: int = 128
    m: int = 128
    stages: int = 5
    strip: int = 8
    splits: int = 1


def default_tiles(rows: int, outputs: int, base: int, weight_bits: int, bits: int, cores: int) -> MatmulTiles:
    """Tiles where nothing was tuned, reasoned from the machine's sizes and not measured."""
    if rows <= 64:
        m = next(m for m in (8, 16, 32, 64) if rows <= m)
        blocks = math.ceil(outputs / (COMPUTE * 64))
        # Each part keeps four steps, and the others' sums fit beside the ring.
        possible = [s for s in (1, 2, 3, 4) if s == 1 or (base // K_STEP >= 4 * s and (s - 1) * m <= 64)]
        # A thread block has its multiprocessor to itself, so what counts is whole waves of them, each 1/s of a tile long.
        splits = min(possible, key=lambda s: (math.ceil(blocks * s / cores) / s, s))
        tiles = MatmulTiles(64, m, 8, 1, splits)
    else:
        sides = [(128, 128, 1), (128, 64, 1), (64, 128, 1), (64, 64, 1), (64, 64, 2)]
        candidates = [MatmulTiles(n, m, 5, 8 if s == 1 else 1, s) for n, m, s in sides if base // K_STEP >= 4 * s]
        tiles = min(candidates, key=lambda tiles: _cycles(tiles, rows, outputs, base, cores))
    return shortened(tiles, weight_bits, bits)


def shortened(tiles: MatmulTiles, weight_bits: int, bits: int, out_bytes: int = 2, more: int = 0) -> MatmulTiles:
    """The tiles with as deep a ring, two slots at least, as shared memory has room for beside `more` bytes."""
    while tiles.stages > 2 and shared_memory(tiles, weight_bits, bits, out_bytes) + more > hopper.SHARED_MEMORY:
        tiles = dataclasses.replace(tiles, stages=tiles.stages - 1)
    return tiles


def _cycles(tiles: MatmulTiles, rows: int, outputs: int, base: int, cores: int) -> float:
    """Rough time of the base product on `cores` multiprocessors: whole waves of tiles."""
    n, m, splits = tiles.n, tiles.m, tiles.splits
    waves = math.ceil(math.ceil(rows / m) * math.ceil(outputs / (COMPUTE * n)) * splits / cores)
    # Per step of 128: the tensor core's 4096 products a cycle, or 128 bytes a cycle of shared memory; then what neither hides.
    step = max(n * m / 16, n * m / 32 + 3 * n + m) + 100
    return waves * (math.ceil(base / K_STEP / splits) * step + n * m / 4 + (3000 if splits > 1 else 0))


def outlier_step(weight_bits: int) -> int:
    """Outlier columns per step: as many as fill exactly the bytes of a slot of weight codes."""
    return K_STEP * weight_bits // 16


def shared_memory(tiles: MatmulTiles, weight_bits: int, bits: int, out_bytes: int = 2) -> int:
    """Bytes of shared memory that the kernel allocates at most; `out_bytes`: of an element of `y`."""
    slot = (COMPUTE * tiles.n * weight_bits + tiles.m * max(8, bits)) * K_STEP // 8
    partial = (tiles.splits - 1) * COMPUTE * tiles.n * tiles.m * 8
    return tiles.stages * slot + COMPUTE * tiles.m * min(64, tiles.n) * out_bytes + partial


def why_not(tiles: MatmulTiles, base: int, weight_bits: int, bits: int) -> str | None:
    """`None` when the kernel compiles with these tiles, otherwise the reason. `base` is padded."""
    if tiles.n % 64 or tiles.m % 8 or not 8 <= tiles.m <= 256:
        return f"tiles of {tiles.n} x {tiles.m} are not multiples of the tensor core's 64 x 8"
    if tiles.n * tiles.m > 128 * 128:
        return f"an accumulator of {tiles.n} x {tiles.m} does not fit into the registers of a warpgroup"
    if base % K_STEP or base == 0:
        return f"{base} base columns are not a positive multiple of {K_STEP}"
    if LONGEST_ROWS % tiles.m:
        return f"tiles of {tiles.m} rows do not divide the {LONGEST_ROWS} that scales are padded to"
    if not 1 <= tiles.splits <= min(8, base // K_STEP):
        return f"{tiles.splits} parts along K do not fit a cluster or {base // K_STEP} steps"
    if tiles.stages < 2:
        return "a ring of one slot: a step's slot is given back when the next one is there"
    if (needed := shared_memory(tiles, weight_bits, bits)) > hopper.SHARED_MEMORY:
        return f"{needed} bytes of slots do not fit into shared memory"
    return None


def allocated_outputs(outputs: int) -> int:
    """Columns that `y` is allocated with: whole pieces of 64, which the copy engine stores, and two at least.

    With one piece JAX drops the axis of pieces from the tensor map, and with it the index that says which one: the store of a
    thread block's second warpgroup would land on the first piece instead of being clipped.
    """
    return max(2, -(-outputs // 64)) * 64
