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
from jaxtyping import Array, Bool, Float32, Int8, Int32, UInt8

from quikjax.algorithms.gptq import PANEL, PRUNED, compensate
from quikjax.algorithms.numerics import clipped_scales, codes, largest_code, row_scales
from quikjax.algorithms.pruning import KEPT, largest_of_four

GROUP = PRUNED
# Two bits tell a place among four, so a byte has as many places.
PLACES = 4


@partial(jax.jit, static_argnames=("base", "bits", "clip", "block"))
def sparse_gptq(
    W: Float32[Array, "n k"],
    U: Float32[Array, "k k"],
    dead: Bool[Array, " k"],
    *,
    base: int,
    bits: int,
    clip: bool,
    block: int = 128,
) -> tuple[Int8[Array, "n base"], Float32[Array, " n"], Float32[Array, "n outliers"]]:
    """Quantize the first `base` columns of a permuted `W`, two of every four codes zero: `(codes, s, outliers)`, as `gptq` does.

    `base` is a multiple of 4, `block` of 16. Scales come from the base columns before any update.

    Raises:
        ValueError: `base` or `block` is not such a multiple.
    """
    if base % GROUP:
        raise ValueError(f"2:4 sparsity takes columns by four; {base} base columns are not a multiple")
    if block % PANEL:
        raise ValueError(f"block must be a multiple of {PANEL}, not {block}")
    W = jnp.where(dead, 0.0, W)
    s = (clipped_scales if clip else row_scales)(W[:, :base], bits)
    if base == 0:
        return jnp.zeros((W.shape[0], 0), jnp.int8), s, W
    qmax, inverse = largest_code(bits), 1 / s

    def rounded(w: Float32[Array, " n"], column: Int32[Array, ""]) -> Float32[Array, " n"]:
        del column
        return jnp.clip(jnp.round(w * inverse), -qmax - 1, qmax) * s

    W_hat, outliers = compensate(W, U, rounded, base=base, block=block, pruned=kept_of_four)
    return codes(W_hat, s, bits), s, outliers


def kept_of_four(part: Float32[Array, "four n"], diagonal: Float32[Array, " four"]) -> Bool[Array, "four n"]:
    """Choose, for each row of `W` (a column here), the two columns of four with the largest `w^2 / U_jj^2`; ties to the first."""
    return largest_of_four((part / diagonal[:, None]) ** 2)


def compress(codes: Int8[Array, "n base"]) -> tuple[Int8[Array, "n half"], UInt8[Array, "n places"]]:
    """Keep two codes of every four, and their places 0-3 among the four, ascending, four places to a byte from the lowest bits.

    Where fewer than two are left, zeros fill up. `places` has `ceil(base / 8)` bytes a row.
    """
    n, base = codes.shape
    fours = codes.reshape(n, base // GROUP, GROUP)
    marked = largest_of_four(jnp.moveaxis(fours != 0, 2, 0))
    # The first and the last that is marked: two of every four are.
    places = jnp.stack([jnp.argmax(marked, axis=0), GROUP - 1 - jnp.argmax(marked[::-1], axis=0)], axis=2)
    kept = jnp.take_along_axis(fours, places, axis=2).reshape(n, base // GROUP * KEPT)
    flat = places.astype(jnp.uint8).reshape(kept.shape)
    bytes_of = jnp.pad(flat, ((0, 0), (0, -kept.shape[1] % PLACES))).reshape(n, -(-kept.shape[1] // PLACES), PLACES)
    shifted = bytes_of << (2 * jnp.arange(PLACES, dtype=jnp.uint8))
    return kept, jnp.sum(shifted, axis=2, dtype=jnp.uint8)


def read_places(places: UInt8[Array, "n places"], half: int) -> UInt8[Array, "n half"]:
    """The places 0-3 of `half` kept codes a row, one in each element."""
    each = (places[..., None] >> (2 * jnp.arange(PLACES, dtype=jnp.uint8))) & 3
    return each.reshape(places.shape[0], places.shape[1] * PLACES)[:, :half]


def decompress(kept: Int8[Array, "n half"], places: UInt8[Array, "n places"]) -> Int8[Array, "n base"]:
    """Undo `compress`."""
    n, half = kept.shape
    where = read_places(places, half).reshape(n, half // KEPT, KEPT, 1) == jnp.arange(GROUP, dtype=jnp.uint8)
    fours = jnp.where(where, kept.reshape(n, half // KEPT, KEPT, 1), jnp.int8(0))
    return jnp.sum(fours, axis=2, dtype=jnp.int8).reshape(n, half // KEPT * GROUP)
