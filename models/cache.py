"""The cache of keys and values: of one block (`KeyValues`), and of all blocks as one preallocated array (`StackedCache`).

In a `StackedCache` the token at position `p` of a row stands in slot `p` of that row. So a row's numbers do not depend on how
long its neighbours are, and a conversation goes on where it ended: slots behind a query's own position are never seen, whatever
an earlier text or padding left there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from quikjax.models.dtypes import check_cache_kind
from quikjax.pallas_kernels import api

# Rows whose slots are written one after the other without a loop: each is one more operation to compile.
_UNROLLED_ROWS = 16

# Data fields hold arrays, but also whatever a tree map puts there (shapes, shardings), so they stay unchecked.
Leaf = Any


class KeyValues(NamedTuple):
    """Keys and values of one block."""

    keys: Float[Array, "batch slots kv_heads head"]
    values: Float[Array, "batch slots kv_heads head"]

    def write(
        self,
        key: Float[Array, "batch length kv_heads head"],
        value: Float[Array, "batch length kv_heads head"],
        at: Int32[Array, ""],
    ) -> "KeyValues":
        """This cache with further tokens in the slots from `at` on."""
        where = (0, at, 0, 0)
        return KeyValues(
            jax.lax.dynamic_update_slice(self.keys, key.astype(self.keys.dtype), where),
            jax.lax.dynamic_update_slice(self.values, value.astype(self.values.dtype), where),
        )

    def by_head(self) -> tuple[Float[Array, "kv_heads batch slots head"], Float[Array, "kv_heads batch slots head"]]:
        """Keys and values, heads first."""
        return self.keys.transpose(2, 0, 1, 3), self.values.transpose(2, 0, 1, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """Keys and values that cross-attention has of each row's text: made once for a text, and only read from then on.

    `parts` are a `Fresh` of all blocks, `[layers, heads, batch, slots, head]`, in the form of the cache that the memory belongs
    to; `lengths` int32 `[batch]` counts the tokens of each text, which stand in the first slots.
    """

    parts: Leaf
    lengths: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StackedCache:
    """Keys and values of all blocks, heads first, so that attention reads each head's as one matrix.

    `keys` and `values` `[layers, kv_heads, batch, slots, head]` are float32, bfloat16, float16, or int8 codes; of codes,
    `key_scale` and `value_scale` float32 `[layers, kv_heads, batch, slots]` hold one scale per token and head,
    `x ~ codes * scale` with `scale = max |x| / 127`. `memory` is there where blocks attend across to another text. `key_block`
    (static): attention takes so many slots at a time, in order, and
    none behind the longest row; 0 takes all slots at once.
    """

    keys: Leaf
    values: Leaf
    key_scale: Leaf = None
    value_scale: Leaf = None
    memory: Leaf = None
    key_block: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def slots(self) -> int:
        """Tokens for which there is room in each row."""
        return int(self.keys.shape[3])

    @property
    def batch(self) -> int:
        """Rows."""
        return int(self.keys.shape[2])

    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))


class Fresh(NamedTuple):
    """Keys and values as a prompt's reading leaves them: heads first, in the cache's form, scales where that has them."""

    keys: Array
    values: Array
    key_scale: Array | None = None
    value_scale: Array | None = None


def empty_cache(
    layers: int, kv_heads: int, batch: int, slots: int, head: int, kind: str = "float32", key_block: int = 0
) -> StackedCache:
    """A cache without tokens; `kind` is one of `dtypes.CACHE_KINDS`.

    Raises:
        QuikError: there is no such kind.
    """
    check_cache_kind(kind)
    shape = (layers, kv_heads, batch, slots, head)
    dtype = jnp.dtype(kind)
    scales = [jnp.zeros(shape[:-1], jnp.float32) for _ in range(2)] if kind == "int8" else [None, None]
    return StackedCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        key_scale=scales[0],
        value_scale=scales[1],
        key_block=key_block,
    )


def cache_bytes(layers: int, kv_heads: int, batch: int, slots: int, head: int, kind: str) -> int:
    """Keys and values of all blocks: `2 layers batch slots kv_heads (head d + 4 if int8)`, `d` the bytes of one number.

    >>> cache_bytes(30, 3, 1, 1024, 64, "float32"), cache_bytes(30, 3, 1, 1024, 64, "int8")
    (47185920, 12533760)
    """
    each = head * jnp.dtype(kind).itemsize + (4 if kind == "int8" else 0)
    return 2 * layers * batch * slots * kv_heads * each


def encode(x: Float[Array, "*batch head"]) -> tuple[Int8[Array, "*batch head"], Float32[Array, "*batch"]]:
    """int8 codes with one scale per vector: `x ~ codes * scale`, `scale = max |x| / 127`; rounds half to even."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1) / 127
    codes = jnp.round(wide / jnp.maximum(scale, 1e-30)[..., None])
    return codes.astype(jnp.int8), scale


def formed(keys: Float[Array, "..."], values: Float[Array, "..."], kind: str) -> Fresh:
    """Keys and values, heads first, in the form that a cache of `kind` holds."""
    if kind != "int8":
        return Fresh(keys.astype(kind), values.astype(kind))
    (k, k_scale), (v, v_scale) = encode(keys), encode(values)
    return Fresh(k, v, k_scale, v_scale)


def kind_of(cache: StackedCache) -> str:
    """Which of `dtypes.CACHE_KINDS` a cache is."""
    return str(jnp.dtype(cache.keys.dtype))


def insert(cache: StackedCache, fresh: Fresh, row: Int32[Array, ""]) -> StackedCache:
    """The cache with what was read of prompts `[layers, kv_heads, rows, length, ...]`, from slot 0 of row `row` on."""

    def put(whole: Array | None, part: Array | None) -> Array | None:
        if whole is None or part is None:
            return None
        return jax.lax.dynamic_update_slice(whole, part, (0, 0, row, 0, 0)[: whole.ndim])

    return dataclasses.replace(
        cache,
        keys=put(cache.keys, fresh.keys),
        values=put(cache.values, fresh.values),
        key_scale=put(cache.key_scale, fresh.key_scale),
        value_scale=put(cache.value_scale, fresh.value_scale),
    )


def repeat_rows(cache: StackedCache, times: int) -> StackedCache:
    """The cache with every row, and what it remembers of a text, so many times, one next to the other."""
    memory = cache.memory
    if memory is not None:
        memory = Memory(
            jax.tree.map(lambda part: jnp.repeat(part, times, axis=2), memory.parts), jnp.repeat(memory.lengths, times)
        )
    return dataclasses.replace(_by_row(cache, lambda part: jnp.repeat(part, times, axis=2)), memory=memory)


def take_rows(cache: StackedCache, rows: Int32[Array, " batch"]) -> StackedCache:
    """The cache with row `rows[b]` in place of row `b`. What rows remember of a text stays: they are of the same text."""
    return _by_row(cache, lambda part: _from_bits(jnp.take(_as_bits(part), rows, axis=2), part.dtype))


def _by_row(cache: StackedCache, change: Callable[[Array], Array]) -> StackedCache:
    parts = (cache.keys, cache.values, cache.key_scale, cache.value_scale)
    keys, values, key_scale, value_scale = (None if part is None else change(part) for part in parts)
    return dataclasses.replace(cache, keys=keys, values=values, key_scale=key_scale, value_scale=value_scale)


# XLA's CPU backend has no bfloat16 but in products: a slice written into such an array costs a copy of all of it in float32.
def _as_bits(x: Array) -> Array:
    """Floats of 16 bits as integers; anything else as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _kept_as_it_lies(x: Array, dtype: Any) -> Array:
    """`_from_bits` of a cache that goes round a loop, written where it lies.

    On a GPU attention would like slots to be neighbours, and XLA turns the whole cache round for it, before and behind every loop
    over tokens. It would also write once more, for itself, into what attention reads, which then needs a copy of what was there.
    An exported program, made for a GPU of no known kind, may carry no constraint of layout.
    """
    device = api.current_device()
    if device.platform == "gpu":
        if device.capability is not None:
            x = with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
        x = jax.lax.optimization_barrier(x)
    return _from_bits(x, dtype)


def _from_bits(x: Array, dtype: Any) -> Array:
    """The inverse of `_as_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One block's part of a `StackedCache`: written in place, read without its neighbours."""

    stacked: StackedCache
    layer: Leaf

    @property
    def key_block(self) -> int:
        return self.stacked.key_block

    def write(
        self,
        key: Float[Array, "batch length kv_heads head"],
        value: Float[Array, "batch length kv_heads head"],
        at: Int32[Array, "..."],
    ) -> "LayerCache":
        """This cache with further tokens in the slots from `at` on: one slot for all rows, or one for each."""
        cache = self.stacked
        fresh = formed(key.transpose(2, 0, 1, 3), value.transpose(2, 0, 1, 3), kind_of(cache))

        def put(whole: Array | None, part: Array | None) -> Array | None:
            if whole is None or part is None:
                return None
            tail, dtype = (0,) * (whole.ndim - 4), whole.dtype
            whole, part = _as_bits(whole), _as_bits(part[None])
            if at.ndim == 0:
                return _kept_as_it_lies(jax.lax.dynamic_update_slice(whole, part, (self.layer, 0, 0, at, *tail)), dtype)
            if api.current_device().platform == "gpu":
                # One kernel, where a slice for each row would be one for each.
                texts, slots = jnp.arange(part.shape[2])[:, None], at[:, None] + jnp.arange(part.shape[3])
                new = jnp.moveaxis(part[0], 0, 2)
                whole = whole.at[self.layer, :, texts, slots].set(new, mode="drop", unique_indices=True)
                return _kept_as_it_lies(whole, dtype)

            def row(b: Any, whole: Array) -> Array:
                one = jax.lax.dynamic_slice_in_dim(part, b, 1, axis=2)
                return jax.lax.dynamic_update_slice(whole, one, (self.layer, 0, b, at[b], *tail))

            rows = part.shape[2]
            if rows > _UNROLLED_ROWS:
                return _from_bits(jax.lax.fori_loop(0, rows, row, whole), dtype)
            for b in range(rows):
                whole = row(b, whole)
            return _from_bits(whole, dtype)

        stacked = dataclasses.replace(
            cache,
            keys=put(cache.keys, fresh.keys),
            values=put(cache.values, fresh.values),
            key_scale=put(cache.key_scale, fresh.key_scale),
            value_scale=put(cache.value_scale, fresh.value_scale),
        )
        return dataclasses.replace(self, stacked=stacked)

    def holding(self, keys: Array, values: Array) -> "LayerCache":
        """This cache with the keys and values of all blocks that something else has written into it."""
        return dataclasses.replace(self, stacked=dataclasses.replace(self.stacked, keys=keys, values=values))

    def by_head(
        self, start: Any = 0, count: int | None = None
    ) -> tuple[Float[Array, "kv_heads batch count head"], Float[Array, "kv_heads batch count head"]]:
        """Keys and values of `count` slots from `start` on (default: all), heads first, as floats."""
        cache = self.stacked
        return self._floats(cache, start, cache.slots if count is None else count)

    def memory(
        self,
    ) -> tuple[Float[Array, "heads batch slots head"], Float[Array, "heads batch slots head"], Bool[Array, "batch slots"]]:
        """Keys and values of the text that this block attends across to, heads first, and which slots hold a token."""
        held = self.stacked.memory
        assert isinstance(held, Memory)
        slots = held.parts.keys.shape[3]
        return *self._floats(held.parts, 0, slots), jnp.arange(slots) < held.lengths[:, None]

    def _floats(self, whole: "StackedCache | Fresh", start: Any, count: int) -> tuple[Array, Array]:
        def part(array: Array) -> Array:
            tail, sizes = (0,) * (array.ndim - 4), array.shape[4:]
            found = jax.lax.dynamic_slice(
                _as_bits(array), (self.layer, 0, 0, start, *tail), (1, *array.shape[1:3], count, *sizes)
            )
            return _from_bits(found[0], array.dtype)

        keys, values = part(whole.keys), part(whole.values)
        if whole.key_scale is not None and whole.value_scale is not None:
            keys = keys.astype(jnp.float32) * part(whole.key_scale)[..., None]
            values = values.astype(jnp.float32) * part(whole.value_scale)[..., None]
        return keys, values


# What a block takes and gives back.
BlockCache = KeyValues | LayerCache
