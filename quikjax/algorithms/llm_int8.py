"""LLM.int8() (Dettmers et al., arXiv 2208.07339): columns with a large activation in full precision, the rest in int8.

Which columns is decided at run time: those with any `|x| >= threshold` in the call. Under static shapes that is a mask on both
sides, not a smaller product: this is the method's mathematics, for comparison, and nothing is claimed of its speed.

    outside the mask    s_x = max|x| / 127 per token,  s_w = max|w| / 127 per row,  y = s_x s_w (round(x / s_x) @ round(w /
    s_w)^T) inside              y += x @ w^T
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int8

THRESHOLD = 6.0


def llm_int8(
    x: Float32[Array, "*batch k"], W: Float32[Array, "n k"], threshold: float = THRESHOLD
) -> tuple[Float32[Array, "*batch n"], Bool[Array, " k"]]:
    """Multiply `x W^T` in mixed precision: the result, and which columns were in full precision."""
    large = jnp.max(jnp.abs(x).reshape(-1, x.shape[-1]), axis=0) >= threshold
    q, s_x = _absmax_codes(jnp.where(large, 0.0, x))
    p, s_w = _absmax_codes(jnp.where(large, 0.0, W))
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    whole = jax.lax.dot_general(q, p, dimensions, preferred_element_type=jnp.int32).astype(jnp.float32)
    exact = jax.lax.dot_general(
        jnp.where(large, x, 0.0), jnp.where(large, W, 0.0), dimensions, precision=jax.lax.Precision.HIGHEST
    )
    return whole * s_x[..., None] * s_w + exact, large


def _absmax_codes(rows: Float32[Array, "*batch k"]) -> tuple[Int8[Array, "*batch k"], Float32[Array, "*batch"]]:
    s = jnp.max(jnp.abs(rows), axis=-1) * np.float32(1 / 127)
    s = jnp.where(s > 0, s, 1.0)
    return jnp.round(rows * (1 / s)[..., None]).astype(jnp.int8), s
