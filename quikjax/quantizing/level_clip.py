"""Choose the level clip of 4-bit activations: how much finer the steps of a token's range are than 16 codes over all of it.

Most values of a token lie far from both ends of its range. With `(L, l)` the range has `L` steps, of which the 16 codes cover
those from `l` to `l + 15`: a finer step for all, paid for by the few values beyond. The
equations are in `pallas_kernels.reference`.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from quikjax.pallas_kernels.reference import quantize_activations

# From no clip to a quarter of the range.
LEVEL_CLIPS = ((15, 0), (16, 0), (16, 1), (17, 1), (19, 2))


def search_level_clip(
    x: Float32[Array, "rows base"], real: Bool[Array, " rows"], matrices: Sequence[Float32[Array, "_ base"]]
) -> tuple[int, int] | None:
    """Find the pair of `LEVEL_CLIPS` with the least `sum ||W (x_hat - x)||^2` over sampled tokens and the layers that read them.

    `x` are base columns, `real` marks the rows that count. `None` is `(15, 0)`: no clip.
    """
    if x.shape[1] == 0:
        return None
    errors = jnp.stack([_error(x, real, tuple(matrices), clip) for clip in LEVEL_CLIPS])
    best = LEVEL_CLIPS[int(jnp.argmin(errors))]
    return None if best == (15, 0) else best


@partial(jax.jit, static_argnames="clip")
def _error(
    x: Float32[Array, "rows base"], real: Bool[Array, " rows"], matrices: tuple[Array, ...], clip: tuple[int, int]
) -> Float32[Array, ""]:
    codes, scale, zero = quantize_activations(x, 4, clip)
    gap = (codes.astype(jnp.float32) + 8) * scale[:, None] + zero[:, None] - x
    gap = jnp.where(real[:, None], gap, 0.0)
    products = [jnp.matmul(gap, W.T, precision=jax.lax.Precision.HIGHEST) for W in matrices]
    return jnp.sum(jnp.stack([jnp.sum(product**2) for product in products]))
