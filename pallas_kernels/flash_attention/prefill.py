"""Attention of a text's tokens over one another's keys, as the block has just made them: `[batch, length, kv_heads, head]`.

A program has a tile of queries, a token's heads that share a key side by side, and walks over the keys in front of them. Where
order matters, keys behind the tile are neither read nor multiplied, and the longest tiles begin first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from quikjax.pallas_kernels.flash_attention import blocks
from quikjax.pallas_kernels.flash_attention.blocks import cells, counted, load, padded
from quikjax.pallas_kernels.flash_attention.choice import Tiles


def prefill(
    query: Float[Array, "batch length heads head"],
    key: Float[Array, "batch length kv_heads head"],
    value: Float[Array, "batch length kv_heads head"],
    positions: Int32[Array, "batch length"],
    *,
    scale: float,
    tiles: Tiles,
    causal: bool = True,
    slopes: Float[Array, " heads"] | None = None,
    interpret: bool = False,
) -> Float[Array, "batch length heads head"]:
    """Softmax attention over the keys at positions in `[0, own position]`; zeros where there is none.

    `positions` are below 0 for padding, on either side; with `causal` they grow along a row elsewhere, and keys behind a query's
    place in the row are not looked at. `slopes` adds ALiBi's `slope * position` of the key to the scores before they are scaled.
    `interpret` runs on a CPU, for tests.
    """
    batch, length, heads, head = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    given = [positions, query.reshape(batch, length, kv_heads, group, head), key, value]
    if slopes is not None:
        given.append(slopes.astype(jnp.bfloat16).astype(jnp.float32).reshape(kv_heads, group))
    mixed = pl.pallas_call(
        functools.partial(_prefill, scale, tiles, causal),
        # The many in front: the other two axes of a grid end at 65535.
        grid=(-(-length * group // tiles.rows), kv_heads, batch),
        out_shape=jax.ShapeDtypeStruct(given[1].shape, query.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="prefill_attention",
    )(*given)
    return mixed.reshape(query.shape)


def _prefill(
    scale: float, tiles: Tiles, causal: bool, positions: Any, queries: Any, keys: Any, values: Any, *slopes_and_out: Any
) -> None:
    """One program: a tile of queries of one text and one key head."""
    *slopes, out = slopes_and_out
    _, length, _, group, head = queries.shape
    kv_head, text = pl.program_id(1), pl.program_id(2)
    tile = pl.num_programs(0) - 1 - pl.program_id(0)

    row = counted(tiles.rows, tile * tiles.rows)
    there = row < length * group
    token, member = lax.div(row, group), lax.rem(row, group)
    position = load(positions.at[text, token], there, -1)
    columns, mask = cells(there, 0, head)
    query = load(queries.at[text, token[:, None], kv_head, member[:, None], columns], mask)
    bias = load(slopes[0].at[kv_head, member], there) if slopes else None

    def block(at: jax.Array) -> Any:
        inside = at < length
        columns, mask = cells(inside, 0, head)
        key, value = (load(ref.at[text, at[:, None], kv_head, columns], mask) for ref in (keys, values))
        where = load(positions.at[text, at], inside, -1)
        return [key], value, None, None, (where >= 0)[None, :] & (where[None, :] <= position[:, None])

    def score(products: jax.Array, at: jax.Array) -> jax.Array:
        where = load(positions.at[text, at], at < length, -1) if slopes else at
        return blocks.scorer(scale, bias)(products, where)

    stop = jnp.minimum(lax.div((tile + 1) * tiles.rows - 1, group) + 1, length) if causal else length
    sums = blocks.nothing_seen(tiles.rows, padded(head))
    sums = blocks.walk(lax.div(stop + tiles.keys - 1, tiles.keys), tiles.keys, 0, [query], block, score, sums)
    place = out.at[text, token[:, None], kv_head, member[:, None], columns]
    pltriton.store(place, blocks.finished(sums).astype(out.dtype), mask=mask)
