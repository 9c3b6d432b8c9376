"""Coordinate descent over GPTQ's codes (QuantEase, Behdin et al., arXiv 2309.01885), with outliers that absorb the error.

GPTQ rounds every column once, knowing nothing of the errors still to come. Here each code is looked at again while all others
stay: with `W` `[N, B]` the base columns, `W_hat = s q`, and `S` what the Hessian leaves of them once the outlier columns have
made up for what they can (its Schur complement),

    loss = sum over rows of (W - W_hat) S (W - W_hat)^T
    q_i <- clip(round((W_hat_i + G_i / S_ii) / s)),    G = (W - W_hat) S          column by column, `G` kept up to date
    s   <- s (W_hat S W^T) / (W_hat S W_hat^T)                                    per row, after each sweep

Every step is the best one for its code or its scale alone, so the loss never rises.

Like GPTQ one `fori_loop` over blocks of columns: a panel takes rank-one updates, a block takes products from its panels, all
columns take one product per block.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float32, Int8, Int32

from quikjax.algorithms.gptq import PANEL, product
from quikjax.algorithms.numerics import largest_code


@partial(jax.jit, static_argnames=("base",))
def curvature(U: Float32[Array, "k k"], *, base: int) -> Float32[Array, "base base"]:
    """`S` of the first `base` columns, from GPTQ's `U` (`H^-1 = U^T U`): `R R^T` with `R` the inverse of its leading square."""
    R = solve_triangular(U[:base, :base], jnp.eye(base, dtype=U.dtype), lower=False)
    return jnp.matmul(R, R.T, precision=jax.lax.Precision.HIGHEST)


@partial(jax.jit, static_argnames=("bits", "sweeps", "block"))
def descend(
    W: Float32[Array, "n k"],
    U: Float32[Array, "k k"],
    S: Float32[Array, "base base"],
    dead: Bool[Array, " k"],
    q: Int8[Array, "n base"],
    s: Float32[Array, " n"],
    *,
    bits: int,
    sweeps: int,
    block: int = 128,
) -> tuple[Int8[Array, "n base"], Float32[Array, " n"], Float32[Array, "n outliers"]]:
    """Codes and scales after `sweeps` over all base columns, and the outliers that belong to them: `(codes, s, outliers)`.

    Args:
        W, U, dead: as GPTQ got them, permuted, the outliers last.
        S: `curvature` of `U`.
        q, s: GPTQ's codes and scales.
        bits, block: as GPTQ's.
    """
    W = jnp.where(dead, 0.0, W)
    n, base = q.shape
    if base == 0:
        return q, s, W
    padding = -base % block
    # Transposed, a column is contiguous. Padding columns have no curvature, no gradient and no code but zero.
    pad = ((0, padding), (0, 0))
    curved = jnp.pad(S, ((0, padding), (0, padding)))
    codes = jnp.pad(q.astype(jnp.float32).T, pad)
    target = product(curved, jnp.pad(W[:, :base].T, pad))  # S W^T

    def sweep(_: Int32[Array, ""], state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        codes, s, gradient = state

        def one_block(b: Int32[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
            codes, gradient = state
            start = b * block
            strip = jax.lax.dynamic_slice(curved, (start, 0), (block, base + padding))
            square = jax.lax.dynamic_slice(strip, (0, start), (block, block))
            part = jax.lax.dynamic_slice(codes, (start, 0), (block, n))
            slope = jax.lax.dynamic_slice(gradient, (start, 0), (block, n))
            new = _descend_block(part, slope, square, s, bits)
            gradient = gradient - product(strip, (new - part) * s)
            return jax.lax.dynamic_update_slice(codes, new, (start, 0)), gradient

        codes, gradient = jax.lax.fori_loop(0, (base + padding) // block, one_block, (codes, gradient))
        reached = target - gradient  # S W_hat^T
        along, curve = jnp.sum(codes * target, axis=0) * s, jnp.sum(codes * reached, axis=0) * s
        factor = jnp.where((along > 0) & (curve > 0), along / jnp.where(curve > 0, curve, 1.0), 1.0)
        return codes, s * factor, target - reached * factor

    gradient = target - product(curved, codes * s)
    codes, s, _ = jax.lax.fori_loop(0, sweeps, sweep, (codes, s, gradient))
    gap = W[:, :base].T - codes[:base] * s
    E = solve_triangular(U[:base, :base], gap, trans="T", lower=False)
    outliers = W[:, base:] - product(E, U[:base, base:])
    return codes[:base].T.astype(jnp.int8), s, outliers


def _descend_block(
    codes: Float32[Array, "block n"],
    gradient: Float32[Array, "block n"],
    S: Float32[Array, "block block"],
    s: Float32[Array, " n"],
    bits: int,
) -> Float32[Array, "block n"]:
    """One block's codes (columns as rows) after one pass over them."""
    block, n = codes.shape
    inverse, qmax = 1 / s, largest_code(bits)

    def panel(p: Int32[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        codes, gradient = state
        start = p * PANEL
        part = jax.lax.dynamic_slice(codes, (start, 0), (PANEL, n))
        slopes = jax.lax.dynamic_slice(gradient, (start, 0), (PANEL, n))
        strip = jax.lax.dynamic_slice(S, (start, 0), (PANEL, block))
        square = jax.lax.dynamic_slice(strip, (0, start), (PANEL, PANEL))

        def column(i: Int32[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
            part, slopes = state
            curve = square[i, i]
            step = jnp.where(curve > 0, slopes[i] / jnp.where(curve > 0, curve, 1.0), 0.0)
            new = jnp.clip(jnp.round(part[i] + step * inverse), -qmax - 1, qmax)
            slopes = slopes - square[i][:, None] * ((new - part[i]) * s)
            return part.at[i].set(new), slopes

        new, _ = jax.lax.fori_loop(0, PANEL, column, (part, slopes))
        gradient = gradient - product(strip, (new - part) * s)
        return jax.lax.dynamic_update_slice(codes, new, (start, 0)), gradient

    return jax.lax.fori_loop(0, block // PANEL, panel, (codes, gradient))[0]
