"""The same integers without moving activations: codes stay in the order of `x`, and the weight is put in that order instead.

`reference.split_quantize` gathers the base columns of `x`; for XLA on CPU that costs as much as the product it feeds. Here
outlier columns of the codes are zero instead of absent, and so are the weight's. Zeros add nothing to an integer sum, minimum and
maximum pass over them, and every other operation is the reference's: codes, scales, zeros and accumulators are bit-identical.
The weight's int8 codes are gathered once a call, so this pays from a few hundred rows on.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from quikjax.pallas_kernels.reference import SMALLEST_SCALE, Split

# Measured with benchmarks/prefill.py: below, moving the weight costs more than moving the activations.
FEWEST_ROWS = 256


def split_quantize(x: Float[Array, "*batch k"], columns: Int[Array, " k"], base: int, bits: int) -> Split:
    """`reference.split_quantize` with `codes` `[*batch, K]` in the order of `x`, zero in the outlier columns."""
    batch, k = x.shape[:-1], x.shape[-1]
    outliers = jnp.take(x, columns[base:], axis=-1, mode="clip")
    if base == 0:
        return Split(jnp.zeros(x.shape, jnp.int8), outliers, jnp.ones(batch, jnp.float32), jnp.zeros(batch, jnp.float32))
    levels = 2**bits - 1
    wide = x.astype(jnp.float32)
    is_base = jnp.ones((k,), bool).at[columns[base:]].set(False)
    zero = jnp.min(jnp.where(is_base, wide, jnp.inf), axis=-1)
    spread = jnp.max(jnp.where(is_base, wide, -jnp.inf), axis=-1) - zero
    scale = jnp.maximum(spread * np.float32(1 / levels), np.float32(SMALLEST_SCALE))
    steps = jnp.round((wide - zero[..., None]) * (1 / scale)[..., None])
    codes = jnp.clip(steps, 0, levels) - 2 ** (bits - 1)
    return Split(jnp.where(is_base, codes, 0).astype(jnp.int8), outliers, scale, zero)


def unpermuted(qweight: Int[Array, "n base"], columns: Int[Array, " k"]) -> Int8[Array, "n k"]:
    """The codes of a weight in the order of `x`, zero in the outlier columns, carried by int8."""
    k, base = columns.shape[0], qweight.shape[1]
    position = jnp.zeros((k,), jnp.int32).at[columns].set(jnp.arange(k, dtype=jnp.int32), unique_indices=True)
    padded = jnp.pad(qweight.astype(jnp.int8), ((0, 0), (0, k - base)))
    return jnp.take(padded, position, axis=1, mode="clip")
