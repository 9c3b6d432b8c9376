"""The kernel for callers: activations of any leading shape, gradients, and `vmap`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from quikjax.pallas_kernels import layout as padding
from quikjax.pallas_kernels.codebook_matmul import layout, mosaic
from quikjax.pallas_kernels.codebook_matmul.layout import CodebookTiles
from quikjax.pallas_kernels.devices import current_device


def product(x: Float[Array, "*batch k"], weight: CodebookTiles) -> Float32[Array, "*batch n"]:
    """`x W^T` in float32, by the kernel; `choice.why_not_mosaic_codebook` says whether it can.

    Its definition is `layout.product`. The gradient flows to `x`, with the dequantized weight; a batch axis of `vmap` joins the
    rows, as long as they stay few (the kernel takes 64).
    """
    flat = x.reshape(-1, x.shape[-1])
    return _differentiable(flat, weight).reshape(*x.shape[:-1], weight.outputs)


@jax.custom_vjp
def _differentiable(x: Any, weight: Any) -> jax.Array:
    return _batched(x, weight)


def _forward(x: Any, weight: Any) -> Any:
    return _batched(x, weight), (x, weight)


def _backward(saved: Any, dy: jax.Array) -> Any:
    x, weight = saved
    return jnp.matmul(dy, layout.matrix(weight), precision=jax.lax.Precision.HIGHEST).astype(x.dtype), None


_differentiable.defvjp(_forward, _backward)


@jax.custom_batching.custom_vmap
def _batched(x: Any, weight: Any) -> jax.Array:
    return _run(x, weight, current_device().cores)


@_batched.def_vmap
def _rule(axis_size: int, batched: Any, x: Any, weight: Any) -> Any:
    moves, weight_moves = batched[0], jax.tree.leaves(batched[1])
    rows = x.shape[-2]
    if any(weight_moves) or axis_size * rows > mosaic.MOST_ROWS:
        # One member after the other.
        def member(index: Any) -> jax.Array:
            mine = jax.tree.map(lambda leaf, leaf_moves: leaf[index] if leaf_moves else leaf, weight, batched[1])
            return _batched(x[index] if moves else x, mine)

        return jax.lax.map(member, jnp.arange(axis_size)), True
    return _batched(x.reshape(axis_size * rows, -1), weight).reshape(axis_size, rows, -1), True


# Under `jit` of its own: a model has hundreds of layers in a handful of shapes, lowered once each.
@functools.partial(jax.jit, static_argnames="cores")
def _run(x: Float[Array, "m k"], weight: CodebookTiles, cores: int) -> Float32[Array, "m n"]:
    rows = x.shape[0]
    blocks, steps = weight.codes.shape[:2]
    x = padding.pad_to(x, (padding.round_up(rows, 8), steps * layout.TILE))
    tiles = mosaic.default_tiles(rows, blocks * layout.TILE, steps * layout.TILE, cores)
    return mosaic.codebook_matmul(x, weight, None, out_dtype=jnp.float32, tiles=tiles)[:rows]


def bytes_moved(rows: int, outputs: int, inputs: int, absmax_bytes: int = 2) -> int:
    """What the kernel reads from memory and writes, padding included (activations once: further tiles find them in L2)."""
    n, k, m = (padding.round_up(size, tile) for size, tile in ((outputs, layout.TILE), (inputs, layout.TILE), (rows, 8)))
    weights = n * k // 2 + n * (k // layout.BLOCK) * absmax_bytes
    return weights + m * k * 2 + m * outputs * 4
