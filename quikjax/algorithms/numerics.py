"""The small pieces of QUIK's weight maths that every quantizer shares: scales, clip search, codes, errors.

Letters as in the paper: `W` `[N, K]`, `a` the per-column maximum of the activations, `s` one scale per row. Products with
float32 reciprocals stand where the paper divides, so that no compiler chooses the bits.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, Shaped

# The clip search of the authors' code: how far a row's maximum may be clipped, in hundredths, and the norm it minimizes.
CLIP_STEPS = 80
CLIP_NORM = 2.4


def largest_code(bits: int) -> int:
    """`qmax`: 7 for 4 bits, 127 for 8."""
    return 2 ** (bits - 1) - 1


def row_scales(W: Float32[Array, "n b"], bits: int) -> Float32[Array, " n"]:
    """`s = max|W| / qmax` per row; 1 for a row of zeros or without columns (QUIK, section 3)."""
    if W.shape[1] == 0:
        return jnp.ones(W.shape[0], jnp.float32)
    s = jnp.max(jnp.abs(W), axis=1) * np.float32(1 / largest_code(bits))
    # Whether a smaller number is zero differs between platforms; a row of them is a row of zeros.
    return jnp.where(s >= jnp.finfo(jnp.float32).tiny, s, 1.0)


def codes(W: Float32[Array, "n b"], s: Float32[Array, " n"], bits: int) -> Int8[Array, "n b"]:
    """`clip(round(W / s), -qmax - 1, qmax)` with the reciprocal of `s`, half to even, carried by int8."""
    qmax = largest_code(bits)
    return jnp.clip(jnp.round(W * (1 / s)[:, None]), -qmax - 1, qmax).astype(jnp.int8)


def clipped_scales(W: Float32[Array, "n b"], bits: int) -> Float32[Array, " n"]:
    """Per row the first of the scales `p * max|W| / qmax`, `p = 1 - i/100`, `i = 0..79`, with the least `sum |W - W_hat|^2.4`.

    From the authors' code; the paper says squared error. The search ends early where no smaller scale can win: what clipped
    weights alone contribute only grows as scales shrink, so once that exceeds the least error of every row, the rest is known.
    """
    full, qmax = row_scales(W, bits), largest_code(bits)

    def error(s: Float32[Array, " n"]) -> tuple[Float32[Array, " n"], Float32[Array, " n"]]:
        """The rows' errors, and what of them is clipped weights'."""
        steps = W * (1 / s)[:, None]
        gap = jnp.abs(W - codes(W, s, bits).astype(jnp.float32) * s[:, None])
        # XLA vectorizes exp and log on CPU, not pow; log(0) = -inf gives the 0 it should.
        each = jnp.exp(CLIP_NORM * jnp.log(gap))
        return jnp.sum(each, axis=1), jnp.sum(jnp.where((steps > qmax) | (steps < -qmax - 1), each, 0), axis=1)

    def searching(state: tuple[Array, Array, Array, Array]) -> Bool[Array, ""]:
        return (state[0] < CLIP_STEPS) & state[3]

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        i, best, least, _ = state
        s = full * (1 - i.astype(jnp.float32) * np.float32(0.01))
        e, clipped = error(s)
        better = e < least
        least = jnp.where(better, e, least)
        # A thousandth more, so that the rounding of a sum ends nothing.
        return i + 1, jnp.where(better, s, best), least, jnp.any(clipped < 1.001 * least)

    return jax.lax.while_loop(searching, step, (jnp.int32(1), full, error(full)[0], jnp.bool_(True)))[1]


@jax.jit
def take_columns(matrix: Shaped[Array, "n k"], columns: Int32[Array, " m"]) -> Shaped[Array, "n m"]:
    """`matrix[:, columns]` of columns that are there, as one program: indexing outside of a compiled function takes five."""
    return matrix.at[:, columns].get(mode="promise_in_bounds")


def all_finite(x: Float[Array, "..."] | Float[np.ndarray, "..."]) -> bool:
    """Whether no value is infinite or NaN."""
    return bool(_all_finite(x))


@jax.jit
def _all_finite(x: Float[Array, "..."]) -> Bool[Array, ""]:
    return jnp.isfinite(x).all()


@jax.jit
def reduced_rows(q: Int8[Array, "n b"], s: Float32[Array, " n"]) -> Float32[Array, " n"]:
    """`r = s * sum_k q`: what the activations' zero point is multiplied by."""
    return s * jnp.sum(q.astype(jnp.int32), axis=1).astype(jnp.float32)


def signal_to_noise(relative_error: float) -> float:
    """Decibels from a relative error `||y - y_hat|| / ||y||`; infinite for an exact result.

    >>> round(signal_to_noise(0.1), 6)
    20.0
    """
    return math.inf if relative_error == 0 else -20 * math.log10(relative_error)


@jax.jit
def relative_error(y: Float[Array, "..."], y_hat: Float[Array, "..."]) -> Float32[Array, ""]:
    """`||y - y_hat|| / ||y||` (Frobenius); 0 where both are zero."""
    size = jnp.linalg.norm(y.astype(jnp.float32))
    gap = jnp.linalg.norm(y.astype(jnp.float32) - y_hat.astype(jnp.float32))
    return jnp.where(size > 0, gap / jnp.where(size > 0, size, 1), jnp.where(gap > 0, jnp.inf, 0.0))
