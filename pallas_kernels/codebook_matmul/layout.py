"""Tile form of a weight in a codebook of at most 16 values, and the definition of the product with it in plain `jnp`.

With `F` the codebook, `W[r, c] ~ F[code[r, c]] absmax[r, c // 64]`; a larger block repeats its absmax. Kernels take tiles of
128 rows x 128 columns, one after the other in memory:

    codes   int32 [N up to 128 / 128, K up to 128 / 128, 128, 16]   eight codes to a word, in the order of `COLUMN_OF_NIBBLE`
    absmax  float16 or float32 [N / 128, K / 64, 128]               zero where nothing is
    table   float32 [16]                                            `F`, its last value repeated
    words   int32 [2, 8]                                            `F` in bfloat16 and in float16: low bytes, high bytes

A thread of a tensor core's warp holds, of each 8 columns of its row, the two from `2 t` on (`t` its place among four). A row's
64 bytes are four times 16, each what one thread needs of 128 columns, in the order in which it needs them: nothing is exchanged
between threads, and no column of the activations moves.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from quikjax.pallas_kernels.layout import pad_to, round_up

TILE = 128
BLOCK = 64  # columns that share an absmax in tile form
ENTRIES = 16
DTYPES = (jnp.bfloat16, jnp.float16)

Leaf = Any


def _columns() -> np.ndarray:
    thread, word, nibble = np.meshgrid(np.arange(4), np.arange(4), np.arange(8), indexing="ij")
    return ((4 * word + nibble // 2) * 8 + 2 * thread + nibble % 2).reshape(TILE)


# Where in 128 columns the codes of a stored row come from: by thread, word and nibble.
COLUMN_OF_NIBBLE = _columns()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class CodebookTiles:
    """A weight's arrays in tile form, as the table above says. Static: the true numbers of `inputs` (`K`) and `outputs` (`N`)."""

    codes: Leaf
    absmax: Leaf
    table: Leaf
    words: Leaf
    inputs: int = dataclasses.field(metadata={"static": True})
    outputs: int = dataclasses.field(metadata={"static": True})


def to_tiles(
    codes: UInt8[Array, "n k"], absmax: Float[Array, "n blocks"], table: Float32[Array, " entries"], block: int
) -> CodebookTiles:
    """Tile form of codes below 16 with an absmax for every `block` columns of a row; `block` is a multiple of 64."""
    n, k = codes.shape
    rows, columns = round_up(n, TILE), round_up(k, TILE)
    # [rows of tiles, tiles, 128, thread, word, nibble]
    ordered = pad_to(codes, (rows, columns)).reshape(rows // TILE, TILE, columns // TILE, TILE).swapaxes(1, 2)
    nibbles = ordered[..., COLUMN_OF_NIBBLE].reshape(*ordered.shape[:3], 16, 8).astype(jnp.uint32)
    words = jnp.sum(nibbles << (4 * jnp.arange(8, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)
    per_block = jnp.repeat(absmax, block // BLOCK, axis=1)[:, : columns // BLOCK]
    per_block = pad_to(per_block, (rows, columns // BLOCK)).reshape(rows // TILE, TILE, -1).swapaxes(1, 2)
    whole = jnp.pad(table, (0, ENTRIES - table.shape[0]), mode="edge")
    return CodebookTiles(
        codes=jax.lax.bitcast_convert_type(words, jnp.int32),
        absmax=per_block,
        table=whole,
        words=jnp.stack([_bytes(whole.astype(dtype)) for dtype in DTYPES]),
        inputs=k,
        outputs=n,
    )


def _bytes(table: Float[Array, " 16"]) -> Int32[Array, " 8"]:
    """Sixteen 16-bit values as four words of their low bytes and four of their high bytes."""
    values = jax.lax.bitcast_convert_type(table, jnp.uint16).astype(jnp.uint32)
    place = 8 * jnp.arange(4, dtype=jnp.uint32)
    halves = [jnp.sum(((values >> shift) & 255).reshape(4, 4) << place, axis=1, dtype=jnp.uint32) for shift in (0, 8)]
    return jax.lax.bitcast_convert_type(jnp.concatenate(halves), jnp.int32)


def codes_of(tiles: CodebookTiles) -> UInt8[Array, "n k"]:
    """The codes as a matrix, without padding."""
    blocks, steps = tiles.codes.shape[:2]
    words = jax.lax.bitcast_convert_type(tiles.codes, jnp.uint32)
    nibbles = (words[..., None] >> (4 * jnp.arange(8, dtype=jnp.uint32))) & 15
    ordered = nibbles.astype(jnp.uint8).reshape(blocks, steps, TILE, TILE)[..., np.argsort(COLUMN_OF_NIBBLE)]
    return ordered.swapaxes(1, 2).reshape(blocks * TILE, steps * TILE)[: tiles.outputs, : tiles.inputs]


def matrix(tiles: CodebookTiles) -> Float32[Array, "n k"]:
    """`F[code] absmax`."""
    per_block = tiles.absmax.swapaxes(1, 2).reshape(-1, tiles.absmax.shape[1]).astype(jnp.float32)
    spread = jnp.repeat(per_block, BLOCK, axis=1)[: tiles.outputs, : tiles.inputs]
    return tiles.table.at[codes_of(tiles).astype(jnp.int32)].get(mode="promise_in_bounds") * spread


def product(x: Float[Array, "m k"], tiles: CodebookTiles) -> Float32[Array, "m n"]:
    """The definition: `sum over blocks of absmax * (x of the block . F[code])`, `F` in the dtype of `x`, summed in float32.

    Absmax is multiplied with sums, not with weights, so the only rounding of a weight is that of its 16 values.
    """
    m = x.shape[0]
    blocks = tiles.absmax.shape[1]
    F = tiles.table.astype(x.dtype)
    values = F.at[codes_of(tiles).astype(jnp.int32)].get(mode="promise_in_bounds")
    x = pad_to(x, (m, blocks * BLOCK)).reshape(m, blocks, BLOCK)
    values = pad_to(values, (tiles.outputs, blocks * BLOCK)).reshape(-1, blocks, BLOCK)
    sums = jnp.einsum("mbk,nbk->bmn", x, values, preferred_element_type=jnp.float32)
    absmax = tiles.absmax.swapaxes(1, 2).reshape(-1, blocks)[: tiles.outputs].astype(jnp.float32)
    return jnp.einsum("bmn,nb->mn", sums, absmax, precision=jax.lax.Precision.HIGHEST)
