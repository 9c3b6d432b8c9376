"""Attention over explicit positions: one function for prefill, decoding, padding on either side and grouped heads."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32

from quikjax.models import gpu_attention
from quikjax.models.base import Observe, Positions
from quikjax.models.cache import BlockCache, KeyValues, LayerCache
from quikjax.models.rope import Rope, rotate
from quikjax.weights.linear import KEPT

# Queries are taken this many at a time when all keys come from the same call: keys behind a chunk are never multiplied.
_CHUNK = 512
# From this many queries on, a CPU takes one head after the other, and of those so many queries.
_ROWS_IN_TURN = 64
_QUERIES = 256


def attend(
    query: Float[Array, "batch length heads head"],
    key: Float[Array, "batch length kv_heads head"],
    value: Float[Array, "batch length kv_heads head"],
    positions: Positions,
    cache: BlockCache | None,
    *,
    scale: float,
    slopes: Float[Array, " heads"] | None = None,
    rope: Rope | None = None,
    causal: bool = True,
    observe: Observe | None = None,
) -> tuple[Float[Array, "batch length heads head"], BlockCache]:
    """Softmax attention of `query` over the keys at positions in `[0, own position]`; what was written is returned with it.

    Without `causal` a query sees every key that is no padding, and there is no cache.

    Without a cache the keys are this call's; with one they are written into its slots first, from `positions.write_at` on.
    Positions must grow along a row wherever they are not padding. A row that sees no key (padding) gets finite numbers of no
    meaning. `slopes` adds ALiBi's `slope * key_position` to the scores before they are scaled, rounded to bfloat16 as Falcon
    was trained with it. `rope` rotates queries and keys first. `observe` is shown "query" and "key" as the scores are made of
    them. On a GPU a kernel takes what it can (`gpu_attention`); the definition is what stands here.
    """
    if isinstance(cache, LayerCache) and observe is None:
        found = gpu_attention.over_cache(query, key, value, positions, cache, scale, slopes, rope)
        if found is not None:
            return found
    if rope is not None:
        query, key = rotate(query, positions.queries, rope), rotate(key, positions.queries, rope)
    if observe is not None:
        query, key = observe("query", query), observe("key", key)
    length = query.shape[1]
    if cache is None:
        # Where order does not matter, all tokens stand at 0, and see each other.
        places = positions.queries if causal else jnp.minimum(positions.queries, 0)
        definition = partial(_over_prompt, scale=scale, causal=causal)
        mixed = gpu_attention.over_prompt(query, key, value, places, slopes, scale=scale, causal=causal, definition=definition)
        if mixed is None:
            mixed = definition(query, key, value, places, slopes)
        return checkpoint_name(mixed, KEPT), KeyValues(key, value)
    assert causal
    assert positions.write_at is not None
    written = cache.write(key, value, positions.write_at)
    if isinstance(written, LayerCache):
        if written.key_block and length < _ROWS_IN_TURN:
            return _in_key_blocks(query, written, positions.queries, scale, slopes), written
        slots = jnp.arange(written.stacked.slots, dtype=jnp.int32)
        key_positions = jnp.broadcast_to(slots, (query.shape[0], len(slots)))
    else:
        assert positions.keys is not None
        key_positions = positions.keys
    keys, values = written.by_head()
    return _softmax_attention(query, keys, values, positions.queries, key_positions, scale, slopes), written


def _over_prompt(
    query: Float[Array, "batch length heads head"],
    key: Float[Array, "batch length kv_heads head"],
    value: Float[Array, "batch length kv_heads head"],
    places: Int32[Array, "batch length"],
    slopes: Float[Array, " heads"] | None,
    *,
    scale: float,
    causal: bool,
) -> Float[Array, "batch length heads head"]:
    """Attention of tokens at `places` over the keys of the same call."""
    keys, values = KeyValues(key, value).by_head()
    parts = [
        _softmax_attention(
            query[:, start : start + _CHUNK],
            keys[:, :, : start + _CHUNK if causal else None],
            values[:, :, : start + _CHUNK if causal else None],
            places[:, start : start + _CHUNK],
            places[:, : start + _CHUNK if causal else None],
            scale,
            slopes,
        )
        for start in range(0, query.shape[1], _CHUNK)
    ]
    return jnp.concatenate(parts, axis=1)


def attend_across(
    query: Float[Array, "batch length heads head"],
    key: Float[Array, "heads batch slots head"],
    value: Float[Array, "heads batch slots head"],
    there: Bool[Array, "batch slots"],
    *,
    scale: float,
) -> Float[Array, "batch length heads head"]:
    """Softmax attention of `query` over another text's keys, heads first: every query sees every slot that is `there`."""
    places = jnp.zeros(query.shape[:2], jnp.int32)
    slots = jnp.where(there, 0, -1)
    parts = [
        _softmax_attention(query[:, start : start + _CHUNK], key, value, places[:, start : start + _CHUNK], slots, scale, None)
        for start in range(0, query.shape[1], _CHUNK)
    ]
    return jnp.concatenate(parts, axis=1)


def _in_key_blocks(
    query: Float[Array, "batch length heads head"],
    cache: LayerCache,
    query_positions: Int32[Array, "batch length"],
    scale: float,
    slopes: Float[Array, " heads"] | None,
) -> Float[Array, "batch length heads head"]:
    """Attention over the cache's slots, `key_block` at a time and none behind the longest row (online softmax, arXiv 1805.02867).

    A block that a row does not see leaves the row's sums bit for bit as they were. So they do not depend on the cache's size, nor
    on longer rows beside it.
    """
    batch, length, heads, head = query.shape
    kv_heads, size = cache.stacked.keys.shape[1], cache.key_block
    group = heads // kv_heads
    rows = query.reshape(batch, length, kv_heads, group, head).transpose(2, 0, 3, 1, 4)
    rows = rows.reshape(kv_heads, batch, group * length, head).astype(jnp.float32)
    last = jnp.broadcast_to(query_positions[:, None, :], (batch, group, length)).reshape(1, batch, group * length, 1)
    bias = None
    if slopes is not None:
        bias = jnp.broadcast_to(slopes.astype(jnp.bfloat16).reshape(kv_heads, 1, group, 1), (kv_heads, batch, group, length))
        bias = bias.reshape(kv_heads, batch, group * length, 1)
    lowest = jnp.finfo(jnp.float32).min

    def take(block: Any, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, total, top = sums
        keys, values = (part.astype(jnp.float32) for part in cache.by_head(block * size, size))
        scores = jax.lax.dot_general(rows, keys, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32) * scale
        at = block * size + jnp.arange(size, dtype=jnp.int32)
        if bias is not None:
            scores = scores + (bias * at.astype(jnp.bfloat16)).astype(jnp.float32) * scale
        visible = at <= last
        scores = jnp.where(visible, scores, lowest)
        higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - higher), 0.0)
        kept = jnp.exp(top - higher)
        added = jax.lax.dot_general(weights, values, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
        return mixed * kept + added, total * kept + jnp.sum(weights, axis=-1, keepdims=True), higher

    blocks = jnp.max(query_positions) // size + 1
    start = (jnp.zeros(rows.shape, jnp.float32), *(jnp.full((*rows.shape[:-1], 1), x, jnp.float32) for x in (0, lowest)))
    mixed, total, _ = jax.lax.fori_loop(0, blocks, take, start)
    # Padding saw nothing.
    mixed = (mixed / jnp.where(total > 0, total, 1.0)).reshape(kv_heads, batch, group, length, head)
    return mixed.transpose(1, 3, 0, 2, 4).reshape(batch, length, heads, head).astype(query.dtype)


def _softmax_attention(
    query: Float[Array, "batch length heads head"],
    key: Float[Array, "kv_heads batch slots head"],
    value: Float[Array, "kv_heads batch slots head"],
    query_positions: Int32[Array, "batch length"],
    key_positions: Int32[Array, "batch slots"],
    scale: float,
    slopes: Float[Array, " heads"] | None,
) -> Float[Array, "batch length heads head"]:
    batch, length, heads, head = query.shape
    kv_heads = key.shape[0]
    group = heads // kv_heads
    visible = (key_positions[:, None, :] >= 0) & (key_positions[:, None, :] <= query_positions[:, :, None])
    # Positions beyond 256 are rounded too: neighbours then share one bias. That is what the published weights know.
    coarse = key_positions.astype(jnp.bfloat16)
    slopes = None if slopes is None else slopes.astype(jnp.bfloat16).reshape(kv_heads, group)
    rows = query.reshape(batch, length, kv_heads, group, head).transpose(2, 0, 3, 1, 4)
    by_head = (rows, key, value, slopes)

    # Backwards, scores are computed again: kept, they would be written to memory and read back, which a CPU feels most.
    one = jax.checkpoint(partial(_heads_of_one_key, scale=scale), prevent_cse=False)

    def over_texts(one: Callable[..., Array], over: Any, head: Any) -> Any:
        *shared, slopes = head
        return over(lambda text: one(*text, slopes), (*shared, visible, coarse))

    def at_once(by_head: Any) -> Any:
        return jax.vmap(partial(over_texts, one, lambda f, texts: jax.vmap(f)(texts)))(by_head)

    def in_turn(by_head: Any) -> Any:
        return jax.lax.map(partial(over_texts, partial(_piecewise, one), jax.lax.map), by_head)

    # On a CPU the scores of one head and a few queries fit its caches; those of all heads are written to memory and read back
    # five times.
    mixed = at_once(by_head) if length < _ROWS_IN_TURN else jax.lax.platform_dependent(by_head, cpu=in_turn, default=at_once)
    return mixed.transpose(1, 3, 0, 2, 4).reshape(batch, length, heads, head)


def _heads_of_one_key(
    rows: Float[Array, "group length head"],
    key: Float[Array, "slots head"],
    value: Float[Array, "slots head"],
    visible: Bool[Array, "length slots"],
    coarse: Float[Array, " slots"],
    slopes: Float[Array, " group"] | None,
    *,
    scale: float,
) -> Float[Array, "group length head"]:
    """The heads that share one key, in one text: rows of one matrix product. `coarse`: the keys' positions."""
    group, length, head = rows.shape
    scores = _product(rows.reshape(-1, head), key, over=1).reshape(group, length, -1) * scale
    if slopes is not None:
        scores = scores + (slopes[:, None] * coarse).astype(jnp.float32)[:, None] * scale
    # The most negative finite number, not infinity: a row that sees nothing must not become NaN.
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = _product(weights.astype(value.dtype).reshape(group * length, -1), value, over=0)
    # Divided after the product: as exact, and `head` numbers a row instead of `slots`.
    return (mixed.reshape(rows.shape) / total).astype(rows.dtype)


def _piecewise(
    one: Callable[..., Array],
    rows: Float[Array, "group length head"],
    key: Float[Array, "slots head"],
    value: Float[Array, "slots head"],
    visible: Bool[Array, "length slots"],
    *rest: Any,
) -> Float[Array, "group length head"]:
    """`one`, with its queries in pieces one after the other."""
    group, length, head = rows.shape
    whole = length // _QUERIES * _QUERIES if length > _QUERIES else 0
    parts = []
    if whole:
        pieces = (
            rows[:, :whole].reshape(group, -1, _QUERIES, head).swapaxes(0, 1),
            visible[:whole].reshape(-1, _QUERIES, len(key)),
        )
        mixed = jax.lax.map(lambda piece: one(piece[0], key, value, piece[1], *rest), pieces)
        parts.append(mixed.swapaxes(0, 1).reshape(group, whole, head))
    if whole < length:
        parts.append(one(rows[:, whole:], key, value, visible[whole:], *rest))
    return jnp.concatenate(parts, axis=1)


def _product(rows: Float[Array, "rows inner"], matrix: Float[Array, "_ _"], *, over: int) -> Float[Array, "rows outer"]:
    return jax.lax.dot_general(rows, matrix, (((1,), (over,)), ((), ())), preferred_element_type=jnp.float32)
