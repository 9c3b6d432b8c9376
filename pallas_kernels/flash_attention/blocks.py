"""Steps that the kernels share: tiles of memory with their edges, and softmax over blocks of keys (arXiv 1805.02867)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

LOWEST = float(np.finfo(np.float32).min)
# Scores are in units of log 2: an exponential of base 2 is one instruction.
LOG2_E = float(np.log2(np.e))


class Sums(NamedTuple):
    """Softmax of a tile of queries over the keys seen so far.

    `mixed` float32 `[rows, head]` are values weighted by `2^(score - top)`, `total` `[rows]` the sums of the weights, and `top`
    `[rows]` the highest scores.
    """

    mixed: Any
    total: Any
    top: Any


def nothing_seen(rows: int, head: int) -> Sums:
    """Sums over no key."""
    return Sums(jnp.zeros((rows, head), jnp.float32), jnp.zeros((rows,), jnp.float32), jnp.full((rows,), LOWEST, jnp.float32))


def counted(count: int, first: Any = 0) -> jax.Array:
    """`count` int32 numbers from `first` on."""
    return first + jnp.arange(count, dtype=jnp.int32)


def padded(width: int) -> int:
    """The columns of a tile that holds `width` of them: a power of two, 16 at least, as tensor cores want."""
    return max(16, pl.next_power_of_2(width))


def line(first: int, width: int) -> tuple[jax.Array, jax.Array]:
    """`width` columns from `first` on, padded, and which of them there are."""
    offsets = counted(padded(width))
    return first + offsets, offsets < width


def cells(there: jax.Array, first: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Columns `[1, padded]` from `first` on, and the mask of a tile whose rows are `there`."""
    columns, inside = line(first, width)
    return columns[None, :], there[:, None] & inside[None, :]


def load(ref: Any, mask: jax.Array, other: Any = 0) -> jax.Array:
    """Elements where `mask`, and `other` elsewhere."""
    return pltriton.load(ref, mask=mask, other=other)


def product(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
    """`a b` (`a b^T`) in float32: exact products of 16 bits on tensor cores, float32 with all its bits."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return pltriton.dot(a, b, trans_b=transposed, precision=precision)


def walk(
    blocks: Any,
    keys: int,
    first: Any,
    query: Sequence[jax.Array],
    block: Callable[[jax.Array], tuple[Sequence[jax.Array], jax.Array, Any, Any, jax.Array]],
    score: Callable[[jax.Array, jax.Array], jax.Array],
    sums: Sums,
) -> Sums:
    """`sums`, and with it the keys of `blocks` blocks of `keys`, the first of which begins at `first`.

    `query`: parts of the queries, `[rows, part]`. `block(at)` loads keys (in the parts of the query), values, their scales (or
    `None`) and which query sees which key, `[rows, keys]`; `score(products, at)` makes scores of the sums of products.
    A block that a query does not see leaves its sums bit for bit as they were.
    """
    dtype = query[0].dtype

    def take(index: Any, sums: Sums) -> Sums:
        at = counted(keys, first + index * keys)
        key, value, key_scale, value_scale, visible = block(at)
        products = functools.reduce(
            jnp.add, [product(q, k.astype(dtype), transposed=True) for q, k in zip(query, key, strict=True)]
        )
        if key_scale is not None:
            products = products * key_scale[None, :]
        scores = jnp.where(visible, score(products, at), LOWEST)
        top = jnp.maximum(sums.top, jnp.max(scores, axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - top[:, None]), 0.0)
        kept = jnp.exp2(sums.top - top)
        total = sums.total * kept + jnp.sum(weights, axis=1)
        if value_scale is not None:
            weights = weights * value_scale[None, :]
        mixed = sums.mixed * kept[:, None] + product(weights.astype(dtype), value.astype(dtype))
        return Sums(mixed, total, top)

    return lax.fori_loop(0, blocks, take, sums)


def scorer(scale: float, slopes: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Scores in units of log 2 of products with the keys at some positions; `slopes` `[rows]` (bfloat16 numbers) add ALiBi."""

    def score(products: jax.Array, at: jax.Array) -> jax.Array:
        scores = products * scale
        if slopes is not None:
            # Both factors and their product are rounded to bfloat16, as in the definition.
            coarse = at.astype(jnp.float32).astype(jnp.bfloat16)
            scores = scores + (slopes.astype(jnp.bfloat16)[:, None] * coarse[None, :]).astype(jnp.float32) * scale
        return scores * LOG2_E

    return score


def finished(sums: Sums) -> jax.Array:
    """The mixed values, float32 `[rows, head]`; zeros where no key was seen."""
    return sums.mixed / jnp.where(sums.total > 0, sums.total, 1.0)[:, None]
