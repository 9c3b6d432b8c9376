"""SmoothQuant (Xiao et al., arXiv 2211.10438): move the range of activations into the weights before both are rounded.

Per input channel `j` of the layers that read one tensor, with `a_j = max|X_j|` and `w_j` the largest `|W[:, j]|` of all of them,

    s_j = max(a_j^alpha / w_j^(1 - alpha), 1e-5)

The norm that makes the tensor is divided by `s`, every `W[:, j]` multiplied by `s_j`: the same function, in other numbers.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float32

_SMALLEST = 1e-5


def smoothing_scales(a: Float32[Array, " k"], weights: Sequence[Float32[Array, "_ k"]], alpha: float) -> Float32[Array, " k"]:
    """Compute `s`. A channel that no activation ever reached, or no weight reads, keeps its numbers: `s_j = 1`."""
    w = jnp.max(jnp.stack([jnp.max(jnp.abs(W), axis=0) for W in weights]), axis=0)
    alive = (a > 0) & (w > 0)
    s = jnp.where(alive, a, 1.0) ** alpha / jnp.where(alive, w, 1.0) ** (1 - alpha)
    return jnp.where(alive, jnp.maximum(s, _SMALLEST), 1.0)
