"""Round to nearest: no data."""

from functools import partial

import jax
from jaxtyping import Array, Float32, Int8

from quikjax.algorithms.numerics import clipped_scales, codes, row_scales


@partial(jax.jit, static_argnames=("base", "bits", "clip"))
def rtn(
    W: Float32[Array, "n k"], *, base: int, bits: int, clip: bool
) -> tuple[Int8[Array, "n base"], Float32[Array, " n"], Float32[Array, "n outliers"]]:
    """Quantize the first `base` columns of a permuted `W` per row: `(codes, s, outliers)`, the outliers untouched.

    `clip` searches the scale (`numerics.clipped_scales`) instead of taking the row's maximum.
    """
    s = (clipped_scales if clip else row_scales)(W[:, :base], bits)
    return codes(W[:, :base], s, bits), s, W[:, base:]
