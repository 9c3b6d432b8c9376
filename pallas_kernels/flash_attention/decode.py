"""Attention over the keys of a cache of all blocks, `[layers, kv_heads, batch, slots, head]`, where the slot is the position.

A program has a tile of queries (a token's heads that share a key lie side by side) and walks over the keys in front of them:
over all, or over its part, and then a second kernel puts the parts together. It reads the cache of all blocks at a layer's
number: for a kernel that took one layer's keys XLA would copy them out for every token.

For one new token in each text the kernel also rotates queries and the key (RoPE) and writes key and value into the cache, in
place. Only the first part of a text does so, and has the new key in registers; the others read what lies before it.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Float32, Int32

from quikjax.pallas_kernels.flash_attention import blocks
from quikjax.pallas_kernels.flash_attention.blocks import Sums, cells, counted, line, load, padded
from quikjax.pallas_kernels.flash_attention.choice import Tiles


class Cached(NamedTuple):
    """Keys and values of all blocks; of int8 codes, float32 scales `[layers, kv_heads, batch, slots]`, one for each vector.

    Or their shapes, so unchecked.
    """

    keys: Any
    values: Any
    key_scale: Any = None
    value_scale: Any = None


class Token(NamedTuple):
    """One new token in each text: its key, not yet rotated, and its value, `[batch, 1, kv_heads, head]`."""

    key: Array
    value: Array


def decode(
    query: Float[Array, "batch length heads head"],
    cached: Cached,
    layer: Int32[Array, ""],
    positions: Int32[Array, "batch length"],
    *,
    scale: float,
    tiles: Tiles,
    slopes: Float[Array, " heads"] | None = None,
    turns: tuple[Float32[Array, "batch length half"], Float32[Array, "batch length half"]] | None = None,
    token: Token | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "batch length heads head"], Cached]:
    """Softmax attention of queries at `positions` over slots `[0, own position]` of block `layer`, and the cache.

    Args:
        query: rotated already, unless `turns` are given.
        cached: the caches of all blocks; heads that share a key are neighbours among the queries'.
        layer: whose keys.
        positions: of the queries, below 0 for padding, which gets zeros.
        scale: the factor on scores.
        tiles: from `choice.tiles`.
        slopes: ALiBi: `slope * position` of the key joins the scores before they are scaled.
        turns: cosines and sines (times the amplitude) by which queries and the token's key are rotated.
        token: written into slot `positions` of each text and seen by the queries; `length` is 1, and keys are no codes. Without,
            the cache holds all keys already.
        interpret: run on a CPU, for tests.
    """
    batch, length, heads, head = query.shape
    kv_heads = cached.keys.shape[1]
    group = heads // kv_heads
    assert token is None or (length == 1 and cached.key_scale is None)
    assert turns is None or token is not None
    given: dict[str, Any] = {
        "positions": positions,
        "layer": layer,
        "query": query.reshape(batch, length, kv_heads, group, head),
        "keys": cached.keys,
        "values": cached.values,
    }
    if cached.key_scale is not None:
        given |= {"key_scale": cached.key_scale, "value_scale": cached.value_scale}
    if slopes is not None:
        given["slopes"] = slopes.astype(jnp.bfloat16).astype(jnp.float32).reshape(kv_heads, group)
    if turns is not None:
        given |= {"cos": turns[0], "sin": turns[1]}
    if token is not None:
        given |= {"new_key": token.key, "new_value": token.value}

    places = (batch, length, kv_heads, group)
    made: dict[str, Any] = {"mixed": jax.ShapeDtypeStruct((*places, head), query.dtype)}
    if tiles.splits > 1:
        each = jax.ShapeDtypeStruct((tiles.splits, *places), jnp.float32)
        made = {"mixed": jax.ShapeDtypeStruct((*each.shape, head), jnp.float32), "total": each, "top": each}
    aliases = {}
    if token is not None:
        for name in ("keys", "values"):
            aliases[list(given).index(name)] = len(made)
            made["written_" + name] = jax.ShapeDtypeStruct(given[name].shape, given[name].dtype)

    # Queries meet keys in 16 bits where both have them.
    wide = jnp.dtype(cached.keys.dtype) not in (jnp.dtype(query.dtype), jnp.dtype(jnp.int8))
    meeting = jnp.float32 if wide else query.dtype
    kernel = functools.partial(_decode, tuple(given), tuple(made), scale, tiles, meeting)
    found = dict(
        zip(
            made,
            pl.pallas_call(
                kernel,
                grid=(batch * kv_heads, -(-length * group // tiles.rows), tiles.splits),
                out_shape=list(made.values()),
                input_output_aliases=aliases,
                compiler_params=pltriton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
                interpret=interpret,
                name="decode_attention",
            )(*given.values()),
            strict=True,
        )
    )
    mixed = found["mixed"]
    if tiles.splits > 1:
        mixed = _together(mixed, found["total"], found["top"], query.dtype, interpret)
    if token is not None:
        cached = cached._replace(keys=found["written_keys"], values=found["written_values"])
    return mixed.reshape(query.shape), cached


def _decode(given: tuple[str, ...], made: tuple[str, ...], scale: float, tiles: Tiles, meeting: Any, *refs: Any) -> None:
    """One program: a tile of queries of one text and one key head, and its part of the keys in front of them."""
    source: Mapping[str, Any] = dict(zip(given, refs[: len(given)], strict=True))
    target: Mapping[str, Any] = dict(zip(made, refs[len(given) :], strict=True))
    _, length, kv_heads, group, head = source["query"].shape
    text, kv_head = lax.div(pl.program_id(0), kv_heads), lax.rem(pl.program_id(0), kv_heads)
    split = pl.program_id(2)
    layer = source["layer"][()]

    row = counted(tiles.rows, pl.program_id(1) * tiles.rows)
    there = row < length * group
    at_token, member = lax.div(row, group), lax.rem(row, group)
    position = load(source["positions"].at[text, at_token], there, -1)

    parts = [(0, head)] if "cos" not in source else [(0, head // 2), (head // 2, head // 2)]
    query = []
    for first, width in parts:
        columns, mask = cells(there, first, width)
        query.append(load(source["query"].at[text, at_token[:, None], kv_head, member[:, None], columns], mask))
    if "cos" in source:
        columns, mask = cells(there, 0, head // 2)
        query = _turned(query, *(load(source[name].at[text, at_token[:, None], columns], mask) for name in ("cos", "sin")))
    query = [part.astype(meeting) for part in query]
    slopes = load(source["slopes"].at[kv_head, member], there) if "slopes" in source else None
    score = blocks.scorer(scale, slopes)

    # Keys in front of the tile's last query; a new token's own key is not read.
    stop = jnp.max(position) + (0 if "new_key" in source else 1)
    each = lax.div(lax.div(stop + tiles.splits - 1, tiles.splits) + tiles.keys - 1, tiles.keys)
    first_key = split * each * tiles.keys
    count = jnp.clip(lax.div(stop - first_key + tiles.keys - 1, tiles.keys), 0, each)

    def block(at: jax.Array) -> Any:
        inside = at < stop
        lead = (layer, kv_head, text)
        key = []
        for first, width in parts:
            columns, mask = cells(inside, first, width)
            key.append(load(source["keys"].at[(*lead, at[:, None], columns)], mask))
        columns, mask = cells(inside, 0, head)
        value = load(source["values"].at[(*lead, at[:, None], columns)], mask)
        scales = [load(source[n].at[(*lead, at)], inside) if n in source else None for n in ("key_scale", "value_scale")]
        visible = inside[None, :] & (at[None, :] <= position[:, None])
        return key, value, *scales, visible

    sums = blocks.nothing_seen(tiles.rows, padded(head))
    if "new_key" in source:
        sums = _write(source, target, parts, query, score, text, kv_head, layer, split, tiles.rows)
    sums = blocks.walk(count, tiles.keys, first_key, query, block, score, sums)

    columns, mask = cells(there, 0, head)
    if tiles.splits == 1:
        place = target["mixed"].at[text, at_token[:, None], kv_head, member[:, None], columns]
        pltriton.store(place, blocks.finished(sums).astype(target["mixed"].dtype), mask=mask)
        return
    pltriton.store(target["mixed"].at[split, text, at_token[:, None], kv_head, member[:, None], columns], sums.mixed, mask=mask)
    pltriton.store(target["total"].at[split, text, at_token, kv_head, member], sums.total, mask=there)
    pltriton.store(target["top"].at[split, text, at_token, kv_head, member], sums.top, mask=there)


def _turned(halves: list[jax.Array], cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
    """Both halves of vectors, rotated in float32, in their dtype."""
    first, second = (half.astype(jnp.float32) for half in halves)
    return [part.astype(halves[0].dtype) for part in (first * cos - second * sin, second * cos + first * sin)]


def _write(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    parts: list[tuple[int, int]],
    query: list[jax.Array],
    score: Any,
    text: jax.Array,
    kv_head: jax.Array,
    layer: jax.Array,
    split: jax.Array,
    rows: int,
) -> Sums:
    """Write the new token of a text into its slot, and return the sums over it alone; in a text's other parts, over nothing."""
    head = source["query"].shape[-1]
    position = source["positions"][text, 0]
    slots = source["keys"].shape[3]
    mine = (split == 0) & (position >= 0)
    writes = mine & (pl.program_id(1) == 0) & (position < slots)
    slot = jnp.clip(position, 0, slots - 1)

    def vector(ref: Any, lead: tuple[Any, ...], first: int, width: int) -> jax.Array:
        columns, inside = line(first, width)
        return load(ref.at[(*lead, columns)], inside)

    key = [vector(source["new_key"], (text, 0, kv_head), *part) for part in parts]
    if "cos" in source:
        key = _turned(key, *(vector(source[name], (text, 0), 0, head // 2) for name in ("cos", "sin")))
    key = [part.astype(target["written_keys"].dtype) for part in key]
    value = vector(source["new_value"], (text, 0, kv_head), 0, head).astype(target["written_values"].dtype)
    for name, vectors, places in (("written_keys", key, parts), ("written_values", [value], [(0, head)])):
        for numbers, (first, width) in zip(vectors, places, strict=True):
            columns, inside = line(first, width)
            pltriton.store(target[name].at[layer, kv_head, text, slot, columns], numbers, mask=inside & writes)

    products = [jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None, :], axis=1) for q, k in zip(query, key, strict=True)]
    scores = score(functools.reduce(jnp.add, products)[:, None], jnp.full((1,), position, jnp.int32))
    # Of a tile of one column, the column.
    top = jnp.where(mine, jnp.max(scores, axis=1), blocks.LOWEST)
    total = jnp.where(mine, jnp.full((rows,), 1.0), 0.0)
    return Sums(jnp.where(mine, jnp.broadcast_to(value.astype(jnp.float32)[None, :], (rows, len(value))), 0.0), total, top)


def _together(
    mixed: Float32[Array, "splits batch length kv_heads group head"],
    total: Float32[Array, "splits batch length kv_heads group"],
    top: Float32[Array, "splits batch length kv_heads group"],
    dtype: Any,
    interpret: bool,
) -> Float[Array, "batch length kv_heads group head"]:
    """The parts of each query put together: what was seen of no key weighs nothing, exactly."""
    splits, *places, head = mixed.shape
    rows = math.prod(places)

    def kernel(mixed_ref: Any, total_ref: Any, top_ref: Any, out_ref: Any) -> None:
        row, part = pl.program_id(0), counted(splits)
        tops = top_ref[:, row]
        weights = jnp.exp2(tops - jnp.max(tops))
        columns, inside = line(0, head)
        parts = load(mixed_ref.at[part[:, None], row, columns[None, :]], (part >= 0)[:, None] & inside[None, :])
        whole = jnp.sum(weights * total_ref[:, row])
        numbers = jnp.sum(weights[:, None] * parts, axis=0) / jnp.where(whole > 0, whole, 1.0)
        pltriton.store(out_ref.at[row, columns], numbers.astype(dtype), mask=inside)

    found = pl.pallas_call(
        kernel,
        grid=(rows,),
        out_shape=jax.ShapeDtypeStruct((rows, head), dtype),
        compiler_params=pltriton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="join_parts",
    )(mixed.reshape(splits, rows, head), total.reshape(splits, rows), top.reshape(splits, rows))
    return found.reshape(*places, head)
