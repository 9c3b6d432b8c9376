"""AWQ-style scaling (Lin et al., arXiv 2306.00978): protect the weights that large activations multiply, by scaling before
rounding.

With `x_j` the size of activations in channel `j` and `Q` a rounding of weights in groups,

    s_j = x_j^alpha, divided by sqrt(max s * min s);    alpha in {0, 1/20, ..., 19/20} with the least ||W X - Q(W s) s^-1 X||^2

The paper takes the mean of `|x|`; here it is the root mean square, which the Hessian's diagonal holds. The error is
`tr(D H D^T)`, `D = W - Q(W s) s^-1`, with `H = X^T X` of all calibration tokens.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from quikjax.algorithms.groups import rtn_groups

ALPHAS = tuple(step / 20 for step in range(20))


def awq(
    weights: Sequence[Float32[Array, "_ k"]], H: Float32[Array, "k k"], *, bits: int, group: int, symmetric: bool = False
) -> tuple[list[Float32[Array, "_ k"]], float]:
    """Round the weights of layers that read one tensor, under the common scaling that serves them best.

    Returns:
        the rounded weights, the scaling undone in them, and the `alpha` that was chosen (0: none).
    """
    errors = [
        sum(float(_error(W, H, _round(W, channel_scales(H, alpha), bits, group, symmetric))) for W in weights) for alpha in ALPHAS
    ]
    alpha = ALPHAS[int(np.argmin(errors))]
    s = channel_scales(H, alpha)
    return [_round(W, s, bits, group, symmetric) for W in weights], alpha


def channel_scales(H: Float32[Array, "k k"], alpha: float) -> Float32[Array, " k"]:
    """Compute `s` for one `alpha`; channels that no activation ever reached count as the smallest that one did."""
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(H), 0.0))
    smallest = jnp.min(jnp.where(size > 0, size, jnp.inf))
    s = jnp.where(size > 0, size, jnp.where(jnp.isfinite(smallest), smallest, 1.0)) ** alpha
    return s / jnp.sqrt(jnp.max(s) * jnp.min(s))


@partial(jax.jit, static_argnames=("bits", "group", "symmetric"))
def _round(W: Float32[Array, "n k"], s: Float32[Array, " k"], bits: int, group: int, symmetric: bool) -> Float32[Array, "n k"]:
    return rtn_groups(W * s, bits=bits, group=group, symmetric=symmetric).dequantize(group) / s


@jax.jit
def _error(W: Float32[Array, "n k"], H: Float32[Array, "k k"], W_hat: Float32[Array, "n k"]) -> Float32[Array, ""]:
    D = W - W_hat
    return jnp.sum(jnp.matmul(D, H, precision=jax.lax.Precision.HIGHEST) * D)
