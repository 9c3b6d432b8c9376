"""Choose outlier columns, how many and which, and the order in which the others are rounded.

A permutation of the columns says it all: base columns first, in the order in which they are stored, outliers last.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from quikjax.errors import QuikError
from quikjax.quantizing.statistics import LayerStats

Score = Literal["maximum", "mean_square", "range"]
Order = Literal["hessian", "activation"]


def count_outliers(
    outliers: int | float | Literal["auto"], inputs: int, hidden_size: int | None = None, *, scaled: bool = False
) -> int:
    """Count the outliers that a layer of `inputs` columns should have in a model of width `hidden_size` (left out: its own).

    That may be more than there are columns: callers refuse it, or take them all.

    Args:
        outliers: for a layer as wide as the hidden state: a count, a fraction of it, or "auto": the paper's 256 from a width of
            4096 on, and 1/16 of the width below.
        scaled: in proportion to the layer's own width.
    """
    hidden = hidden_size or inputs
    if outliers == "auto":
        count = 256 if hidden >= 4096 else round(hidden / 16)
    elif isinstance(outliers, float):
        count = round(outliers * hidden)
    else:
        count = int(outliers)
    if scaled:
        count = round(count * inputs / hidden)
    return count


def has_outliers(path: str, stats: LayerStats, threshold: float) -> bool:
    """Tell whether an input has activations large enough for outliers: one above `threshold`, of which 0 means any input has.

    Raises:
        QuikError: an activation is not finite.
    """
    largest = float(jnp.max(stats.absmax, initial=0.0))
    if not np.isfinite(largest):
        raise QuikError(f"activations that enter {path} are not finite; calibrate in float32 or on other text")
    return threshold == 0 or largest > threshold


def outliers_last(
    stats: LayerStats, count: int, score: Score, matrices: Sequence[Float32[Array, "_ k"]] = ()
) -> Int32[Array, " k"]:
    """Return a permutation of the columns with the `count` outliers last.

    `score` says which they are: the columns of the largest activation ("maximum"), of the largest mean square ("mean_square"),
    or those without which the rounding of activations costs least ("range", `range_outliers`), for which `matrices` are the
    weights of all layers that read the tensor.
    """
    if score == "range" and 0 < count < stats.absmax.shape[0] - 1:
        norms = jnp.sum(jnp.stack([jnp.sum(W * W, axis=0) for W in matrices]), axis=0)
        dropped = range_outliers(stats.sample, jnp.arange(stats.sample.shape[0]) < stats.filled, norms, count)
        return largest_last(jnp.where(dropped, jnp.inf, stats.absmax), count)
    return largest_last(jnp.diagonal(stats.hessian) if score == "mean_square" else stats.absmax, count)


def largest_last(score: Float32[Array, " k"], count: int) -> Int32[Array, " k"]:
    """Return a permutation of the columns by ascending `score`, so that the `count` largest come last; ties keep their order.

    Without outliers nothing needs to move, and a gather is saved at run time: the identity.
    """
    if count == 0:
        return jnp.arange(score.shape[0], dtype=jnp.int32)
    return jnp.argsort(score, stable=True).astype(jnp.int32)


@partial(jax.jit, static_argnames="count")
def range_outliers(
    X: Float32[Array, "rows k"], real: Bool[Array, " rows"], norms: Float32[Array, " k"], count: int
) -> Bool[Array, " k"]:
    """Mark the `count` columns that are best left out of the range of a token, chosen one after the other.

    Rounding a token's base columns `B` over its range costs, up to a factor (each column's error is spread evenly over a step),

        J = mean_t (max_{k in B} x_tk - min_{k in B} x_tk)^2 * sum_{k in B} ||W_k||^2

    `norms` are the `||W_k||^2`, `real` marks the rows of `X` that count; at least two columns remain. One large value that many
    tokens share is worth more than the largest of all in one token.
    """
    X = jnp.where(real[:, None], X, 0.0)

    def drop(_: Int32[Array, ""], base: Bool[Array, " k"]) -> Bool[Array, " k"]:
        high, next_high, highest = _two_largest(jnp.where(base, X, -jnp.inf))
        low, next_low, lowest = _two_largest(jnp.where(base, -X, -jnp.inf))
        square = (high + low) ** 2
        # What a token's squared range becomes without the column that is its maximum, or its minimum.
        less = jnp.zeros(X.shape[1]).at[highest].add((next_high + low) ** 2 - square)
        less = less.at[lowest].add((high + next_low) ** 2 - square)
        rest = jnp.sum(jnp.where(base, norms, 0.0)) - norms
        cost = (jnp.sum(square) + less) * rest
        return base.at[jnp.argmin(jnp.where(base, cost, jnp.inf))].set(False)

    return ~jax.lax.fori_loop(0, count, drop, jnp.ones(X.shape[1], bool))


def _two_largest(
    values: Float32[Array, "rows k"],
) -> tuple[Float32[Array, " rows"], Float32[Array, " rows"], Int32[Array, " rows"]]:
    """Each row's largest value, the next one, and where the first of the largest is. On a CPU XLA's `top_k` takes a hundred times
    as long.
    """
    at = jnp.argmax(values, axis=1)
    others = jnp.where(jnp.arange(values.shape[1]) == at[:, None], -jnp.inf, values)
    return jnp.max(values, axis=1), jnp.max(others, axis=1), at


def rounding_order(hessian: Float32[Array, "k k"], base: Int32[Array, " base"]) -> Int32[Array, " base"]:
    """Return positions in `base` in the order in which GPTQ rounds them: by falling diagonal of the Hessian.

    What matters most is rounded while all others can still make up for it (GPTQ's own "act order").
    """
    return jnp.argsort(jnp.diagonal(hessian)[base], stable=True, descending=True)


def base_then_outliers(score: Float32[Array, " k"], count: int) -> Int32[Array, " k"]:
    """Return a permutation of the columns: the `count` of the largest `score` last, both parts ascending."""
    chosen, base = largest_last(score, count), score.shape[0] - count
    return jnp.concatenate([jnp.sort(chosen[:base]), jnp.sort(chosen[base:])])
