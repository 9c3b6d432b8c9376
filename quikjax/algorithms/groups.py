"""Round to nearest in groups along the inputs, symmetric or asymmetric: the weights of ZeroQuant (Yao et al., arXiv 2206.01861),
AWQ and GPTQ's W4A16 g128.

Per output row and group of `group` columns, with `b` bits:

    symmetric     s = max|w| / (2^(b-1) - 1),       q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1),    w_hat = s q
    asymmetric    s = (max - min) / (2^b - 1),      z = round(-min / s),      zero forced into [min, max]
                  q = clip(round(w / s) + z, 0, 2^b - 1),                                             w_hat = s (q - z)

Where `s` is stored in 16 bits it is rounded before anything is divided by it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from quikjax.algorithms.numerics import largest_code


class Grid(NamedTuple):
    """The scale and the zero point of a group, of any leading shape; `zero` is 0 where the grid is symmetric."""

    scale: Float32[Array, "*groups"]
    zero: Float32[Array, "*groups"]


class Grouped(NamedTuple):
    """Codes with a scale and a zero point per row and group. The last group may be shorter than `group`."""

    codes: Int32[Array, "n k"]
    scale: Float32[Array, "n groups"]
    zero: Float32[Array, "n groups"]

    def dequantize(self, group: int) -> Float32[Array, "n k"]:
        """`scale * (codes - zero)`, every column with its group's."""
        k = self.codes.shape[1]
        return spread(self.scale, group, k) * (self.codes - spread(self.zero, group, k))


def spread(each: Float32[Array, "n groups"], group: int, k: int) -> Float32[Array, "n k"]:
    """Each group's value, repeated for each of its columns."""
    return jnp.repeat(each, group, axis=1)[:, :k]


def find_grid(W: Float32[Array, "*groups group"], *, bits: int, symmetric: bool, scale_dtype: Any = jnp.float32) -> Grid:
    """Find scale and zero point over the last axis, whose padding is zeros. A group of zeros has scale 1."""
    qmax, levels = largest_code(bits), 2**bits - 1
    smallest, largest = jnp.minimum(jnp.min(W, axis=-1), 0.0), jnp.maximum(jnp.max(W, axis=-1), 0.0)
    reach, steps = (jnp.maximum(largest, -smallest), qmax) if symmetric else (largest - smallest, levels)
    s = reach * np.float32(1 / steps)
    s = s.astype(scale_dtype).astype(jnp.float32)
    s = jnp.where(s >= _smallest(scale_dtype), s, 1.0)
    zero = jnp.zeros_like(s) if symmetric else jnp.clip(jnp.round(-smallest * (1 / s)), 0, levels)
    return Grid(s, zero)


def _smallest(scale_dtype: Any) -> float:
    """Below this a group counts as zeros. 16-bit floats have few digits left there, and float32 differs between platforms."""
    info = jnp.finfo(scale_dtype)
    return float(info.tiny) if info.bits == 32 else 32 * float(info.smallest_subnormal)


def to_codes(w: Float32[Array, "*shape"], grid: Grid, *, bits: int, symmetric: bool) -> Float32[Array, "*shape"]:
    """`q`, as whole float32 numbers: from `-2^(b-1)` on a symmetric grid, from 0 on an asymmetric one. Broadcasts."""
    low, high = (-largest_code(bits) - 1, largest_code(bits)) if symmetric else (0, 2**bits - 1)
    return jnp.clip(jnp.round(w * (1 / grid.scale)) + grid.zero, low, high)


@partial(jax.jit, static_argnames=("bits", "group", "symmetric", "scale_dtype"))
def rtn_groups(W: Float32[Array, "n k"], *, bits: int, group: int, symmetric: bool, scale_dtype: Any = jnp.float32) -> Grouped:
    """Quantize `W` in groups of `group` columns, without data. A group of zeros has scale 1."""
    n, k = W.shape
    padded = jnp.pad(W, ((0, 0), (0, -k % group))).reshape(n, -1, group)
    grid = find_grid(padded, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    wide = Grid(*(part[..., None] for part in grid))
    codes = to_codes(padded, wide, bits=bits, symmetric=symmetric).astype(jnp.int32).reshape(n, -1)[:, :k]
    return Grouped(codes, *grid)
