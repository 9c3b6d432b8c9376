"""Attention by the GPU kernels of `pallas_kernels.flash_attention` where they take a call; elsewhere `None`, for the definition.

They do not take a cache of one block (`KeyValues`), whose slots are in any order, cross-attention, whose keys lie under a mask of
their own, and what `choice.why_not` refuses. The definition is in `models.attention`, and runs there.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from quikjax.models.base import Positions
from quikjax.models.cache import LayerCache
from quikjax.models.rope import Rope, rotate, turns
from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.flash_attention import choice
from quikjax.pallas_kernels.flash_attention.choice import AttentionProblem

Queries = Float[Array, "batch length heads head"]
Keys = Float[Array, "batch length kv_heads head"]


def _tiles(query: Array, kv_heads: int, slots: int, kind: Any, cached: bool, alone: bool) -> choice.Tiles | None:
    """The kernels' tiles for a call on this device, `None` where they do not take it."""
    batch, length, heads, head = query.shape
    problem = AttentionProblem(batch, length, heads, kv_heads, head, slots, query.dtype, kind, cached, alone)
    device = api.current_device()
    return choice.tiles(problem, device) if choice.why_not(problem, device) is None else None


def over_cache(
    query: Queries,
    key: Keys,
    value: Keys,
    positions: Positions,
    cache: LayerCache,
    scale: float,
    slopes: Float[Array, " heads"] | None,
    rope: Rope | None,
) -> tuple[Queries, LayerCache] | None:
    """Attention of new tokens over a cache of all blocks, and the cache with them; `rope` rotates queries and keys first."""
    whole = cache.stacked
    tiles = _tiles(query, key.shape[2], whole.slots, whole.keys.dtype, True, cache.key_block > 0)
    if tiles is None:
        return None
    from quikjax.pallas_kernels.flash_attention.decode import Cached, Token, decode

    token, turned = None, None
    if query.shape[1] == 1 and whole.key_scale is None:
        # Rotated and written by the kernel that reads the rest.
        token = Token(key, value)
        turned = None if rope is None else turns(positions.queries, rope, query.shape[-1])
    else:
        if rope is not None:
            query, key = rotate(query, positions.queries, rope), rotate(key, positions.queries, rope)
        assert positions.write_at is not None
        cache = cache.write(key, value, positions.write_at)
        whole = cache.stacked
    held = Cached(whole.keys, whole.values, whole.key_scale, whole.value_scale)
    mixed, held = decode(
        query, held, cache.layer, positions.queries, scale=scale, tiles=tiles, slopes=slopes, turns=turned, token=token
    )
    return mixed, cache.holding(held.keys, held.values)


def over_prompt(
    query: Queries,
    key: Keys,
    value: Keys,
    places: Int32[Array, "batch length"],
    slopes: Float[Array, " heads"] | None,
    *,
    scale: float,
    causal: bool,
    definition: Callable[..., Queries],
) -> Queries | None:
    """`definition(query, key, value, places, slopes)` by a kernel. Backwards and under `vmap` the definition runs."""
    tiles = _tiles(query, key.shape[2], key.shape[1], key.dtype, False, False)
    if tiles is None or value.dtype != key.dtype:
        return None
    from quikjax.pallas_kernels.flash_attention.prefill import prefill

    @jax.custom_batching.custom_vmap
    def kernel(query: Any, key: Any, value: Any, places: Any, slopes: Any) -> Any:
        return prefill(query, key, value, places, scale=scale, tiles=tiles, causal=causal, slopes=slopes)

    @kernel.def_vmap
    def batched(size: int, moving: Any, *arrays: Any) -> tuple[Any, bool]:
        del size
        axes = jax.tree.map(lambda moves: 0 if moves else None, tuple(moving))
        return jax.vmap(definition, in_axes=axes)(*arrays), True

    differentiable = jax.custom_vjp(kernel)
    differentiable.defvjp(
        lambda *arrays: (kernel(*arrays), arrays), lambda arrays, cotangent: jax.vjp(definition, *arrays)[1](cotangent)
    )
    return differentiable(query, key, value, places, slopes)
