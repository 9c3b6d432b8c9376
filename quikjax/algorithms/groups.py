"""Round to nearest in groups along the inputs, symmetric or asymmetric: the weights of ZeroQuant (Yao et al., arXiv 2206.01861),
AWQ and GPTQ's W4A16 g128.

Per output row and group of `group` columns, with `b` bits:

    symmetric     s = max|w| / (2^(b-1) - 1),       q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1),    w_hat = s q
    asymmetric    s = (max - min) / (2^b - 1),      z = round(-min / s),      zero forced into [min, max]
                  q = clip(round(w / s) + z, 0, 2^b - 1),                                             w_hat = s (q - z)
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from quikjax.algorithms.numerics import largest_code


class Grouped(NamedTuple):
    """Codes with a scale and a zero point per row and group. The last group may be shorter than `group`."""

    codes: Int32[Array, "n k"]
    scale: Float32[Array, "n groups"]
    zero: Float32[Array, "n groups"]

    def dequantize(self, group: int) -> Float32[Array, "n k"]:
        """`scale * (codes - zero)`, every column with its group's."""
        k = self.codes.shape[1]
        scale, zero = (jnp.repeat(part, group, axis=1)[:, :k] for part in (self.scale, self.zero))
        return scale * (self.codes - zero)


@partial(jax.jit, static_argnames=("bits", "group", "symmetric"))
def rtn_groups(W: Float32[Array, "n k"], *, bits: int, group: int, symmetric: bool) -> Grouped:
    """Quantize `W` in groups of `group` columns, without data. A group of zeros has scale 1."""
    n, k = W.shape
    padded = jnp.pad(W, ((0, 0), (0, -k % group))).reshape(n, -1, group)
    tiny = jnp.finfo(jnp.float32).tiny
    if symmetric:
        qmax = largest_code(bits)
        s = jnp.max(jnp.abs(padded), axis=2) * np.float32(1 / qmax)
        s = jnp.where(s >= tiny, s, 1.0)
        z = jnp.zeros_like(s)
        low, high = -qmax - 1, qmax
    else:
        levels = 2**bits - 1
        smallest, largest = jnp.minimum(jnp.min(padded, axis=2), 0.0), jnp.maximum(jnp.max(padded, axis=2), 0.0)
        s = (largest - smallest) * np.float32(1 / levels)
        s = jnp.where(s >= tiny, s, 1.0)
        z = jnp.round(-smallest * (1 / s))
        low, high = 0, levels
    steps = jnp.round(padded * (1 / s)[..., None]) + z[..., None]
    codes = jnp.clip(steps, low, high).astype(jnp.int32).reshape(n, -1)[:, :k]
    return Grouped(codes, s, z)
