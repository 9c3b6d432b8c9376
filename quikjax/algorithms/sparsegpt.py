"""2:4 sparsity inside GPTQ's loop (SparseGPT: Frantar and Alistarh, arXiv 2301.00774), with QUIK's dense outlier columns.

`W` and `U` come in permuted, outliers last, as for `gptq`. At every fourth base column the two of the next four with the smallest
`w^2 / U_jj^2` are set to zero, row by row; what is left is rounded as the loop comes to it, and the error that is passed on
includes what was cut:

    e = (w_i - w_hat_i) / U_ii,    w_hat_i = 0 where cut, else s q(w_i),    W[:, i+1:] -= e U[i, i+1:]

The pattern lives in the permuted order: base columns must be stored in it. Outlier columns stay dense and absorb error.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int8, Int32

from quikjax.algorithms.numerics import clipped_scales, codes, largest_code, row_scales

GROUP, KEPT = 4, 2


@partial(jax.jit, static_argnames=("base", "bits", "clip"))
def sparse_gptq(
    W: Float32[Array, "n k"], U: Float32[Array, "k k"], dead: Bool[Array, " k"], *, base: int, bits: int, clip: bool
) -> tuple[Int8[Array, "n base"], Float32[Array, " n"], Float32[Array, "n outliers"]]:
    """Quantize the first `base` columns of a permuted `W`, two of every four codes zero: `(codes, s, outliers)`.

    `base` is a multiple of 4. Scales come from the base columns before any update.

    Raises:
        ValueError: `base` is not a multiple of 4.
    """
    if base % GROUP:
        raise ValueError(f"2:4 sparsity takes columns by four; {base} base columns are not a multiple")
    W = jnp.where(dead, 0.0, W)
    s = (clipped_scales if clip else row_scales)(W[:, :base], bits)
    qmax, inverse = largest_code(bits), 1 / s
    k = W.shape[1]

    def four(g: Int32[Array, ""], rows: Float32[Array, "k n"]) -> Float32[Array, "k n"]:
        start = g * GROUP
        part = jax.lax.dynamic_slice(rows, (start, 0), (GROUP, rows.shape[1]))
        strip = jax.lax.dynamic_slice(U, (start, 0), (GROUP, k))
        square = jax.lax.dynamic_slice(strip, (0, start), (GROUP, GROUP))
        kept = kept_of_four(part, jnp.diagonal(square))
        errors = []
        for i in range(GROUP):
            w = part[i]
            w_hat = jnp.where(kept[i], jnp.clip(jnp.round(w * inverse), -qmax - 1, qmax) * s, 0.0)
            e = (w - w_hat) / square[i, i]
            part = (part - jnp.where(jnp.arange(GROUP) > i, square[i], 0.0)[:, None] * e).at[i].set(w_hat)
            errors.append(e)
        behind = jnp.where(jnp.arange(k) >= start + GROUP, strip, 0.0)
        rows = rows - jnp.matmul(behind.T, jnp.stack(errors), precision=jax.lax.Precision.HIGHEST)
        return jax.lax.dynamic_update_slice(rows, part, (start, 0))

    rows = jax.lax.fori_loop(0, base // GROUP, four, W.T)
    return codes(rows[:base].T, s, bits), s, rows[base:].T


def kept_of_four(part: Float32[Array, "four n"], diagonal: Float32[Array, " four"]) -> Bool[Array, "four n"]:
    """Choose, for each row of `W` (a column here), the two columns of four with the largest `w^2 / U_jj^2`; ties to the first."""
    score = (part / diagonal[:, None]) ** 2
    order = jnp.argsort(-score, axis=0, stable=True)
    return jnp.argsort(order, axis=0) < KEPT


def compress(codes: Int8[Array, "n base"]) -> tuple[Int8[Array, "n half"], Int8[Array, "n half"]]:
    """Keep two codes of every four, and their places 0-3 among the four (two bits each); zeros fill up where fewer are left."""
    n, base = codes.shape
    fours = codes.reshape(n, -1, GROUP)
    order = jnp.argsort(fours == 0, axis=2, stable=True)[..., :KEPT]
    places = jnp.sort(order, axis=2)
    kept = jnp.take_along_axis(fours, places, axis=2)
    return kept.reshape(n, base // 2), places.astype(jnp.int8).reshape(n, base // 2)


def decompress(kept: Int8[Array, "n half"], places: Int8[Array, "n half"]) -> Int8[Array, "n base"]:
    """Undo `compress`."""
    n, half = kept.shape
    fours = jnp.zeros((n, half // KEPT, GROUP), jnp.int8)
    where = places.reshape(n, -1, KEPT).astype(jnp.int32)
    rows, groups = jnp.meshgrid(jnp.arange(n), jnp.arange(half // KEPT), indexing="ij")
    return fours.at[rows[..., None], groups[..., None], where].set(kept.reshape(n, -1, KEPT)).reshape(n, half * 2)
