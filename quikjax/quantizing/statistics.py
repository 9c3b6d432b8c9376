"""Statistics of a layer's input: what outlier selection and GPTQ need, gathered batch by batch, as a pytree."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Rows of input kept to report a layer's error on.
SAMPLE_ROWS = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStats:
    """Statistics of the tensor `x` `[tokens, K]` that one or more layers read, over `count` sequences.

    `absmax` float32 `[K]`: `max |x|` per column. `hessian` float32 `[K, K]`: the sum of `x^T x`; the paper's `H` is `2/count` of
    it. `sample` float32 `[rows, K]`: some rows of `x`, `filled` of them set. `group` names the layers that share the tensor.
    """

    absmax: Any
    hessian: Any
    sample: Any
    filled: Any
    count: Any
    group: str | None = dataclasses.field(default=None, metadata={"static": True})


def empty_stats(inputs: int, *, group: str | None = None, rows: int = SAMPLE_ROWS) -> LayerStats:
    """Statistics of nothing yet, for a tensor with `inputs` columns."""
    return LayerStats(
        absmax=jnp.zeros((inputs,), jnp.float32),
        hessian=jnp.zeros((inputs, inputs), jnp.float32),
        sample=jnp.zeros((rows, inputs), jnp.float32),
        filled=jnp.int32(0),
        count=jnp.int32(0),
        group=group,
    )


@partial(jax.jit, static_argnames="rows", inline=True)
def observe(stats: LayerStats, x: Float[Array, "*batch k"], *, rows: int = 16) -> LayerStats:
    """The statistics with `x` added: `[sequences, tokens, K]`, or any leading shape, each leading row a sequence.

    `rows` evenly spaced tokens of `x` join the sample while it has room. float32 at the highest precision the platform has, so
    that the same tokens give the same Hessian.
    """
    k = x.shape[-1]
    sequences = x.shape[0] if x.ndim > 2 else 1
    flat = x.reshape(-1, k).astype(jnp.float32)
    rows = min(rows, flat.shape[0], stats.sample.shape[0])
    picked = flat[:: max(1, flat.shape[0] // rows)][:rows]
    capacity = stats.sample.shape[0]
    at = jnp.minimum(stats.filled, capacity - rows)
    sample = jnp.where(stats.filled + rows <= capacity, jax.lax.dynamic_update_slice(stats.sample, picked, (at, 0)), stats.sample)
    gram = jax.lax.dot_general(flat, flat, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    return dataclasses.replace(
        stats,
        absmax=jnp.maximum(stats.absmax, jnp.max(jnp.abs(flat), axis=0)),
        hessian=stats.hessian + gram,
        sample=sample,
        filled=jnp.minimum(stats.filled + rows, capacity),
        count=stats.count + sequences,
    )
