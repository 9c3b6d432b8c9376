"""Pruning by magnitude: masks, one for a weight that is kept and zero for one that is not (arXiv 2301.12017, section on
composability; 2:4 as NVIDIA's sparse tensor cores take it, Mishra et al., arXiv 2104.08378).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int8

KEPT = 2  # of four


def largest_of_four(score: Float[Array, "four ..."] | Bool[Array, "four ..."]) -> Bool[Array, "four ..."]:
    """Mark the two largest of every four, the first ones where they are equal. By counting: sorting fours takes a CPU hundreds of
    times as long.
    """
    first = jnp.arange(score.shape[0]).reshape(-1, *[1] * (score.ndim - 1))
    # How many of the four come before each: those that score more, and of equal ones the first.
    before = (score[:, None] > score) | ((score[:, None] == score) & (first[:, None] < first))
    return jnp.sum(before, axis=0) < KEPT


def semi_structured(W: Float32[Array, "n k"]) -> Int8[Array, "n k"]:
    """2:4: of every four inputs side by side the two of largest magnitude, the first ones where they are equal.

    Inputs beyond the last whole four are kept.
    """
    n, k = W.shape
    whole = k // 4 * 4
    fours = jnp.abs(W[:, :whole]).reshape(n, -1, 4)
    kept = jnp.moveaxis(largest_of_four(jnp.moveaxis(fours, 2, 0)), 0, 2).reshape(n, whole).astype(jnp.int8)
    return jnp.concatenate([kept, jnp.ones((n, k - whole), jnp.int8)], axis=1)


def unstructured(W: Float32[Array, "n k"], share: float) -> Int8[Array, "n k"]:
    """Without the `share` of the matrix that is smallest in magnitude; of equal ones the last are dropped first."""
    dropped = round(W.size * share)
    if dropped == W.size:
        return jnp.zeros(W.shape, jnp.int8)
    sizes = jnp.abs(W).reshape(-1)
    least = jnp.sort(sizes)[dropped]  # of those that stay
    above, equal = sizes > least, sizes == least
    kept = above | (equal & (jnp.cumsum(equal) <= W.size - dropped - jnp.sum(above)))
    return kept.astype(jnp.int8).reshape(W.shape)


def structured(W: Float32[Array, "n k"], share: float, width: int = 1) -> Int8[Array, "n k"]:
    """Whole units of `width` inputs side by side (1: single inputs, the rows of the layer before; a head's size: heads), without
    the `share` of them whose columns have the least L1 norm.
    """
    n, k = W.shape
    norms = jnp.sum(jnp.abs(W), axis=0).reshape(-1, width).sum(axis=1)
    rank = jnp.argsort(jnp.argsort(-norms, stable=True), stable=True)
    kept = rank < len(norms) - round(len(norms) * share)
    return jnp.broadcast_to(jnp.repeat(kept, width).astype(jnp.int8), (n, k))


def kept_layers(layers: int, removed: int) -> tuple[int, ...]:
    """Which layers stay when `removed` are taken out, spread evenly: the first and the last stay while any others can go.

    >>> kept_layers(6, 2)
    (0, 2, 3, 5)
    """
    kept = np.linspace(0, layers - 1, layers - removed)
    return tuple(int(index) for index in np.floor(kept + 0.5))
