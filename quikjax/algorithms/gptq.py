"""GPTQ (Frantar et al., arXiv 2210.17323) with outlier columns that absorb the error (QUIK, arXiv 2310.09259, section 3.1).

`W` and `H` come in permuted, outliers last. With `U` the upper Cholesky factor of `H^-1`, column by column,

    e = (w_i - s q(w_i)) / U_ii,    W[:, i+1:] -= e U[i, i+1:]

for the base columns; outlier columns are never quantized, only updated.

The loop is a `fori_loop` over blocks of columns and compiles once per shape. Inside, three sizes keep the arithmetic in caches
and in matrix products: a panel of `PANEL` columns takes rank-one updates, a block takes products from its panels, the rest
of the matrix takes one product per block.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float32, Int8, Int32, UInt8

from quikjax.algorithms.codebooks import midpoints, nearest
from quikjax.algorithms.numerics import all_finite, clipped_scales, codes, largest_code, row_scales

PANEL = 16

# What a column becomes when it is rounded, given its place.
Rounding = Callable[[Array, Array], Array]

# Which weights of a few columns `[columns, n]`, side by side, are kept, given their part of the diagonal of `U`.
Pruning = Callable[[Array, Array], Array]
# How many columns side by side are pruned together (2:4 sparsity); divides PANEL.
PRUNED = 4

# The products behind a block have a static shape, so they run over columns that are already done. Cutting the loop into
# phases, each with its own shorter matrix, bounds the waste: 1 + 1/_PHASES of the products that cannot be avoided.
_PHASES = 4

# How often damping may grow tenfold before a Hessian is given up.
_TRIES = 8


def inverse_factor(H: Float32[Array, "k k"], damping: float) -> tuple[Float32[Array, "k k"], float]:
    """`U`, upper triangular with `H^-1 = U^T U`, and the damping that it took.

    `damping * mean(diag H)` is added to the diagonal; where that is not yet positive definite, ten times as much, and so on.
    `U` is not finite if no step sufficed. Columns that are dead (`H_ii = 0`) must have been given a diagonal.
    """
    U = _inverse_factor(H, jnp.float32(damping))
    for _ in range(_TRIES):
        if all_finite(U):
            break
        damping *= 10
        U = _inverse_factor(H, jnp.float32(damping))
    return U, damping


@jax.jit
def _inverse_factor(H: Float32[Array, "k k"], damping: Float32[Array, ""]) -> Float32[Array, "k k"]:
    """One try, apart so that a loop over tries holds no copies of its own: two of `H`'s size beside `H` and `U`.

    Reversed, `H = R R^T` with `R` upper triangular, and `U = R^-1`: one factorization and one triangular inverse, where
    inverting `H` and factoring again would cost three times as much and lose digits.
    """
    one = jnp.eye(H.shape[0], dtype=H.dtype)
    damped = H + damping * jnp.mean(jnp.diagonal(H)) * one
    L = jnp.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)
    return solve_triangular(L, one, lower=True)[::-1, ::-1]


@jax.jit
def revive_dead_columns(H: Float32[Array, "k k"]) -> tuple[Float32[Array, "k k"], Bool[Array, " k"]]:
    """Columns that no activation ever reached (`H_ii = 0`): their diagonal becomes 1; the caller zeroes their weights."""
    dead = jnp.diagonal(H) == 0
    return H + jnp.diag(dead.astype(H.dtype)), dead


@partial(jax.jit, static_argnames=("base", "bits", "clip", "block"))
def gptq(
    W: Float32[Array, "n k"],
    U: Float32[Array, "k k"],
    dead: Bool[Array, " k"],
    *,
    base: int,
    bits: int,
    clip: bool,
    block: int = 128,
) -> tuple[Int8[Array, "n base"], Float32[Array, " n"], Float32[Array, "n outliers"]]:
    """Quantize the first `base` columns of a permuted `W` per row: `(codes, s, outliers)`, the outliers having absorbed error.

    `U` is `inverse_factor` of the equally permuted Hessian, `dead` its columns without data. Scales come from the base
    columns before any update. `block` is a multiple of 16.
    """
    if block % PANEL:
        raise ValueError(f"block must be a multiple of {PANEL}, not {block}")
    W = jnp.where(dead, 0.0, W)
    s = (clipped_scales if clip else row_scales)(W[:, :base], bits)
    if base == 0:
        return jnp.zeros((W.shape[0], 0), jnp.int8), s, W
    inverse, qmax = 1 / s, largest_code(bits)

    def rounded(w: Float32[Array, " n"], column: Int32[Array, ""]) -> Float32[Array, " n"]:
        del column
        return jnp.clip(jnp.round(w * inverse), -qmax - 1, qmax) * s

    W_hat, outliers = compensate(W, U, rounded, base=base, block=block)
    # Base columns now hold `s * code`; the code is read back exactly, as rounding s * q / s cannot miss by half.
    return codes(W_hat, s, bits), s, outliers


@partial(jax.jit, static_argnames=("base", "block"))
def gptq_codebook(
    W: Float32[Array, "n k"],
    U: Float32[Array, "k k"],
    dead: Bool[Array, " k"],
    absmax: Float32[Array, "n base"],
    table: Float32[Array, " entries"],
    *,
    base: int,
    block: int = 128,
) -> tuple[UInt8[Array, "n base"], Float32[Array, "n outliers"]]:
    """Quantize the first `base` columns of a permuted `W` into a codebook: `(codes, outliers)`, as `gptq` does onto integers.

    `table` is the codebook, ascending, and `absmax` what each weight is divided by before it is looked up (0: of zeros).
    """
    if block % PANEL:
        raise ValueError(f"block must be a multiple of {PANEL}, not {block}")
    W = jnp.where(dead, 0.0, W)
    if base == 0:
        return jnp.zeros((W.shape[0], 0), jnp.uint8), W
    bounds = midpoints(table)
    scales = jnp.pad(absmax.T, ((0, -base % block), (0, 0)))
    inverse = jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1.0), 0.0)

    def rounded(w: Float32[Array, " n"], column: Int32[Array, ""]) -> Float32[Array, " n"]:
        return table[nearest(w * inverse[column], bounds).astype(jnp.int32)] * scales[column]

    W_hat, outliers = compensate(W, U, rounded, base=base, block=block)
    # A value of the codebook is found again, whatever its product with absmax and the reciprocal lose.
    return nearest(W_hat * inverse[:base].T, bounds), outliers


def compensate(
    W: Float32[Array, "n k"],
    U: Float32[Array, "k k"],
    rounded: Rounding,
    *,
    base: int,
    block: int,
    pruned: Pruning | None = None,
) -> tuple[Float32[Array, "n base"], Float32[Array, "n outliers"]]:
    """GPTQ's loop: `(W_hat, outliers)`, the base columns rounded one after the other, the error of each passed on to all later.

    `rounded(w, column)` is what a column `w` `[n]` becomes; `column` is its place in `W`, up to the next multiple of `block`.
    `pruned` says, whenever the loop comes to the first of PRUNED base columns, which weights of these are kept; the others become
    zero when their turn comes. `base` is then a multiple of PRUNED.
    """
    k = W.shape[1]
    blocks = -(-base // block)
    padding = max(0, blocks * block - k)
    # Transposed, a column is contiguous. Padding columns have no error to pass on and receive none.
    rows = jnp.pad(W.T, ((0, padding), (0, 0)))
    factor = jnp.pad(U, ((0, padding), (0, padding)))

    phase = -(-blocks // _PHASES)
    for first in range(0, blocks, phase):
        last = min(first + phase, blocks)
        offset = first * block
        tail = _quantize_blocks(
            rows[offset:], factor[offset:, offset:], rounded, pruned, offset, base, blocks=last - first, block=block
        )
        rows = jnp.concatenate([rows[:offset], tail])
    return rows[:base].T, rows[base:k].T


def _quantize_blocks(
    rows: Float32[Array, "k n"],
    U: Float32[Array, "k k"],
    rounded: Rounding,
    pruned: Pruning | None,
    offset: int,
    base: int,
    *,
    blocks: int,
    block: int,
) -> Float32[Array, "k n"]:
    """The first `blocks` blocks of `rows`, quantized in place, and everything behind them updated.

    The first of `rows` is column `offset` of the matrix.
    """
    k, n = rows.shape

    def one_block(b: Int32[Array, ""], rows: Float32[Array, "k n"]) -> Float32[Array, "k n"]:
        start = b * block
        part = jax.lax.dynamic_slice(rows, (start, 0), (block, n))
        strip = jax.lax.dynamic_slice(U, (start, 0), (block, k))
        square = jax.lax.dynamic_slice(strip, (0, start), (block, block))
        live = offset + start + jnp.arange(block) < base
        part, E = quantize_block(part, square, rounded, pruned, offset + start, live)
        behind = jnp.where(jnp.arange(k) >= start + block, strip, 0.0)
        rows = rows - product(behind, E)
        return jax.lax.dynamic_update_slice(rows, part, (start, 0))

    return jax.lax.fori_loop(0, blocks, one_block, rows)


def quantize_block(
    part: Float32[Array, "block n"],
    U: Float32[Array, "block block"],
    rounded: Rounding,
    pruned: Pruning | None,
    offset: Int32[Array, ""],
    live: Bool[Array, " block"],
) -> tuple[Float32[Array, "block n"], Float32[Array, "block n"]]:
    """One block's columns (as rows) quantized, and their errors `E`. Columns that are not `live` are only updated."""
    block, n = part.shape

    def panel(p: Int32[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        part, E = state
        start = p * PANEL
        columns = jax.lax.dynamic_slice(part, (start, 0), (PANEL, n))
        strip = jax.lax.dynamic_slice(U, (start, 0), (PANEL, block))
        square = jax.lax.dynamic_slice(strip, (0, start), (PANEL, PANEL))
        alive = jax.lax.dynamic_slice(live, (start,), (PANEL,))

        def column(i: Int32[Array, ""], state: tuple[Array, Array], kept: Array | None = None) -> tuple[Array, Array]:
            columns, errors = state
            w = columns[i]
            w_hat = rounded(w, offset + start + i)
            if kept is not None:
                w_hat = jnp.where(kept[i % PRUNED], w_hat, 0.0)
            diagonal = jnp.where(alive[i], square[i, i], 1.0)
            e = jnp.where(alive[i], (w - w_hat) / diagonal, 0.0)
            later = jnp.where(jnp.arange(PANEL) > i, square[i], 0.0)
            columns = columns - later[:, None] * e
            columns = columns.at[i].set(jnp.where(alive[i], w_hat, w))
            return columns, errors.at[i].set(e)

        def few(g: Int32[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
            assert pruned is not None
            first = g * PRUNED
            diagonal = jax.lax.dynamic_slice(jnp.diagonal(square), (first,), (PRUNED,))
            kept = pruned(jax.lax.dynamic_slice(state[0], (first, 0), (PRUNED, n)), diagonal)
            return jax.lax.fori_loop(first, first + PRUNED, partial(column, kept=kept), state)

        begun = (columns, jnp.zeros_like(columns))
        if pruned is None:
            columns, errors = jax.lax.fori_loop(0, PANEL, column, begun)
        else:
            columns, errors = jax.lax.fori_loop(0, PANEL // PRUNED, few, begun)
        behind = jnp.where(jnp.arange(block) >= start + PANEL, strip, 0.0)
        part = part - product(behind, errors)
        part = jax.lax.dynamic_update_slice(part, columns, (start, 0))
        return part, jax.lax.dynamic_update_slice(E, errors, (start, 0))

    return jax.lax.fori_loop(0, block // PANEL, panel, (part, jnp.zeros_like(part)))


def product(strip: Float32[Array, "e k"], errors: Float32[Array, "e n"]) -> Float32[Array, "k n"]:
    """`strip^T errors` at the highest precision the platform has."""
    return jax.lax.dot_general(strip, errors, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
