"""GPTQ with a scale and a zero point for each group of columns (Frantar et al., arXiv 2210.17323, and its authors' code).

The loop is `algorithms.gptq`'s, the grid `algorithms.groups`'. There are two times at which a group's grid can be found:

    as its turn comes    from its columns as they then are, with the error that all columns before it passed on
    static               from the original columns, in the order in which they are stored, whatever the order of rounding
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from quikjax.algorithms.gptq import PANEL, compensate, product, quantize_block
from quikjax.algorithms.groups import Grid, Grouped, find_grid, to_codes


@partial(jax.jit, static_argnames=("bits", "group", "symmetric", "scale_dtype"))
def gptq_groups(
    W: Float32[Array, "n k"],
    U: Float32[Array, "k k"],
    dead: Bool[Array, " k"],
    *,
    bits: int,
    group: int,
    symmetric: bool,
    scale_dtype: Any = jnp.float32,
) -> Grouped:
    """Quantize `W`, its columns in the order of rounding, in groups of `group` of them, each fitted as its turn comes.

    `U` is `inverse_factor` of the equally permuted Hessian, `dead` its columns without data.

    Raises:
        ValueError: `group` is not a multiple of 16.
    """
    if group % PANEL:
        raise ValueError(f"a group must be a multiple of {PANEL} columns, not {group}")
    n, k = W.shape
    groups = -(-k // group)
    padding = groups * group - k
    rows = jnp.pad(jnp.where(dead, 0.0, W).T, ((0, padding), (0, 0)))
    factor = jnp.pad(U, ((0, padding), (0, padding)))

    def one_group(g: Int32[Array, ""], state: tuple[Array, Grid]) -> tuple[Array, Grid]:
        rows, grids = state
        start = g * group
        part = jax.lax.dynamic_slice(rows, (start, 0), (group, n))
        strip = jax.lax.dynamic_slice(factor, (start, 0), (group, k + padding))
        square = jax.lax.dynamic_slice(strip, (0, start), (group, group))
        # All columns before have passed their error on; padding is zeros and stays so.
        grid = find_grid(part.T, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)

        def rounded(w: Float32[Array, " n"], column: Int32[Array, ""]) -> Float32[Array, " n"]:
            del column
            return (to_codes(w, grid, bits=bits, symmetric=symmetric) - grid.zero) * grid.scale

        part, E = quantize_block(part, square, rounded, None, start, start + jnp.arange(group) < k)
        behind = jnp.where(jnp.arange(k + padding) >= start + group, strip, 0.0)
        rows = jax.lax.dynamic_update_slice(rows - product(behind, E), part, (start, 0))
        return rows, Grid(*(every.at[g].set(one) for every, one in zip(grids, grid, strict=True)))

    empty = Grid(jnp.ones((groups, n), jnp.float32), jnp.zeros((groups, n), jnp.float32))
    rows, grids = jax.lax.fori_loop(0, groups, one_group, (rows, empty))
    return _read_back(rows[:k], Grid(*(jnp.repeat(part, group, axis=0)[:k] for part in grids)), grids, bits, symmetric)


@partial(jax.jit, static_argnames=("bits", "symmetric", "block"))
def gptq_static_groups(
    W: Float32[Array, "n k"],
    U: Float32[Array, "k k"],
    dead: Bool[Array, " k"],
    scale: Float32[Array, "n k"],
    zero: Float32[Array, "n k"],
    *,
    bits: int,
    symmetric: bool,
    block: int = 128,
) -> Int32[Array, "n k"]:
    """Quantize `W`, its columns in the order of rounding, on grids that are there already: the codes.

    `scale` and `zero` are those of each column's group. Otherwise as `gptq_groups`.

    Raises:
        ValueError: `block` is not a multiple of 16.
    """
    if block % PANEL:
        raise ValueError(f"block must be a multiple of {PANEL}, not {block}")
    k = W.shape[1]
    padding = ((0, -k % block), (0, 0))
    grids = Grid(jnp.pad(scale.T, padding, constant_values=1.0), jnp.pad(zero.T, padding))

    def rounded(w: Float32[Array, " n"], column: Int32[Array, ""]) -> Float32[Array, " n"]:
        grid = Grid(grids.scale[column], grids.zero[column])
        return (to_codes(w, grid, bits=bits, symmetric=symmetric) - grid.zero) * grid.scale

    W_hat, _ = compensate(jnp.where(dead, 0.0, W), U, rounded, base=k, block=block)
    return _read_back(W_hat.T, Grid(scale.T, zero.T), grids, bits, symmetric).codes


def _read_back(rows: Float32[Array, "k n"], each: Grid, grids: Grid, bits: int, symmetric: bool) -> Grouped:
    """Codes of columns that are on their grid: rounding (s (q - z)) / s cannot miss by half."""
    codes = to_codes(rows, each, bits=bits, symmetric=symmetric)
    return Grouped(codes.T.astype(jnp.int32), grids.scale.T, grids.zero.T)
