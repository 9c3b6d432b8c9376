"""The kernel for callers: activations of any leading shape, gradients, and `vmap`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quikjax.pallas_kernels import layout as padding
from quikjax.pallas_kernels.codebook_matmul import layout
from quikjax.pallas_kernels.codebook_matmul.layout import CodebookTiles
from quikjax.pallas_kernels.devices import current_device


def product(
    x: Float[Array, "*batch k"], weight: CodebookTiles, bias: Float[Array, " n"] | None = None
) -> Float[Array, "*batch n"]:
    """`x W^T + bias` by the kernel, in the dtype of `x`; `choice.why_not_mosaic_codebook` says whether it can.

    Its definition is `layout.product`. Gradients flow to `x`, with the dequantized weight, and to the bias; a batch axis of
    `vmap` joins the rows as long as they stay few (the kernel takes 64).
    """
    flat = x.reshape(-1, x.shape[-1])
    return _differentiable(flat, weight, bias).reshape(*x.shape[:-1], weight.outputs)


@jax.custom_vjp
def _differentiable(x: Any, weight: Any, bias: Any) -> jax.Array:
    return _batched(x, weight, bias)


def _forward(x: Any, weight: Any, bias: Any) -> Any:
    return _batched(x, weight, bias), (x, weight, bias)


def _backward(saved: Any, dy: jax.Array) -> Any:
    x, weight, bias = saved
    dy = dy.astype(jnp.float32)
    dx = jnp.matmul(dy, layout.matrix(weight), precision=jax.lax.Precision.HIGHEST)
    return dx.astype(x.dtype), None, None if bias is None else dy.sum(0).astype(bias.dtype)


_differentiable.defvjp(_forward, _backward)


@jax.custom_batching.custom_vmap
def _batched(x: Any, weight: Any, bias: Any) -> jax.Array:
    return _run(x, weight, bias, current_device().cores)


@_batched.def_vmap
def _rule(axis_size: int, batched: Any, x: Any, weight: Any, bias: Any) -> Any:
    from quikjax.pallas_kernels.codebook_matmul import mosaic

    rows = x.shape[-2]
    if any(jax.tree.leaves(batched[1:])) or axis_size * rows > mosaic.MOST_ROWS:
        # One member after the other.
        def member(index: Any) -> jax.Array:
            return _batched(*jax.tree.map(lambda leaf, moves: leaf[index] if moves else leaf, (x, weight, bias), tuple(batched)))

        return jax.lax.map(member, jnp.arange(axis_size)), True
    return _batched(x.reshape(axis_size * rows, -1), weight, bias).reshape(axis_size, rows, -1), True


# Under `jit` of its own: a model has hundreds of layers in a handful of shapes, lowered once each.
@functools.partial(jax.jit, static_argnames="cores")
def _run(x: Float[Array, "m k"], weight: CodebookTiles, bias: Float[Array, " n"] | None, cores: int) -> Float[Array, "m n"]:
    from quikjax.pallas_kernels.codebook_matmul import mosaic

    rows = x.shape[0]
    blocks, steps = weight.codes.shape[:2]
    there = padding.pad_to(x, (padding.round_up(rows, 8), steps * layout.TILE))
    padded = None if bias is None else padding.pad_to(bias.astype(jnp.float32), (blocks * layout.TILE,))
    tiles = mosaic.default_tiles(rows, blocks * layout.TILE, steps * layout.TILE, cores)
    return mosaic.codebook_matmul(there, weight, padded, rows=rows, out_dtype=x.dtype, tiles=tiles)


def bytes_moved(rows: int, outputs: int, inputs: int, absmax_bytes: int = 2) -> int:
    """Bytes that the kernel reads from memory and writes, padding included (activations once: further tiles find them in L2)."""
    n, k, m = (padding.round_up(size, tile) for size, tile in ((outputs, layout.TILE), (inputs, layout.TILE), (rows, 8)))
    weights = n * k // 2 + n * (k // layout.BLOCK) * absmax_bytes
    return weights + m * k * 2 + rows * outputs * 2
