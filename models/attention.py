"""Attention over explicit positions: one function for prefill, decoding, padding on either side and grouped heads."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from quikjax.models.base import KeyValues, Place

# Queries are taken this many at a time when all keys come from the same call: keys behind a chunk are never multiplied.
_CHUNK = 512


def attend(
    query: Float[Array, "batch length heads head"],
    key: Float[Array, "batch length kv_heads head"],
    value: Float[Array, "batch length kv_heads head"],
    place: Place,
    cache: KeyValues | None,
    *,
    scale: float,
    slopes: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "batch length heads head"], KeyValues]:
    """Softmax attention of `query` over the keys at positions in `[0, own position]`; what was written is returned with it.

    Without a cache the keys are this call's; with one they are written behind its `used` slots first. Positions must grow along
    a row wherever they are not padding. A row that sees no key (padding) gets finite numbers of no meaning. `slopes` adds
    ALiBi's `slope * key_position` to the scores before they are scaled, rounded to bfloat16 as Falcon was trained with it.
    """
    if cache is None:
        written, key_positions = KeyValues(key, value), place.positions
    else:
        assert place.slots is not None
        assert place.used is not None
        at = (0, place.used, 0, 0)
        written = KeyValues(
            jax.lax.dynamic_update_slice(cache.keys, key.astype(cache.keys.dtype), at),
            jax.lax.dynamic_update_slice(cache.values, value.astype(cache.values.dtype), at),
        )
        key_positions = place.slots
    length = query.shape[1]
    chunk = length if cache is not None else _CHUNK
    parts = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        seen = written.keys.shape[1] if cache is not None else stop
        parts.append(
            _softmax_attention(
                query[:, start:stop],
                written.keys[:, :seen],
                written.values[:, :seen],
                place.positions[:, start:stop],
                key_positions[:, :seen],
                scale,
                slopes,
            )
        )
    return jnp.concatenate(parts, axis=1), written


def _softmax_attention(
    query: Float[Array, "batch length heads head"],
    key: Float[Array, "batch slots kv_heads head"],
    value: Float[Array, "batch slots kv_heads head"],
    query_positions: Int32[Array, "batch length"],
    key_positions: Int32[Array, "batch slots"],
    scale: float,
    slopes: Float[Array, " heads"] | None,
) -> Float[Array, "batch length heads head"]:
    batch, length, heads, head = query.shape
    slots, kv_heads = key.shape[1:3]
    group = heads // kv_heads
    # Heads that share a key become rows of one matrix product; XLA on CPU is slow at products over inner axes.
    rows = query.reshape(batch, length, kv_heads, group, head).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head)
    over_head = (((3,), (3,)), ((0, 1), (0, 2)))
    scores = jax.lax.dot_general(rows, key, over_head, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(batch, kv_heads, group, length, slots)
    if slopes is not None:
        # Positions beyond 256 are rounded too: neighbours then share one bias. That is what the published weights know.
        coarse = slopes.astype(jnp.bfloat16)[:, None] * key_positions[:, None, :].astype(jnp.bfloat16)
        bias = coarse.astype(jnp.float32).reshape(coarse.shape[0], kv_heads, -1, 1, coarse.shape[-1]) * scale
        scores = scores + bias
    visible = (key_positions[:, None, :] >= 0) & (key_positions[:, None, :] <= query_positions[:, :, None])
    # The most negative finite number, not infinity: a row that sees nothing must not become NaN.
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    over_slots = (((3,), (1,)), ((0, 1), (0, 2)))
    mixed = jax.lax.dot_general(
        weights.astype(value.dtype).reshape(batch, kv_heads, -1, slots), value, over_slots, preferred_element_type=jnp.float32
    ).reshape(batch, kv_heads, group, length, head)
    # Divided after the product: as exact, and `head` numbers a row instead of `slots`.
    mixed = (mixed / total).astype(query.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head)
