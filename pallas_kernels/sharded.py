"""QUIK layers inside `jax.shard_map`: outputs split over a mesh axis (column-parallel) or inputs split over it (row-parallel).

Over `N` every device holds some rows of the weight and the whole input: nothing to exchange, `api.linears` on the local weight
is the whole story. Over `K` every device holds some columns of input and weight, with outliers chosen per shard; the per-token
minimum and maximum are all-reduced before anything is quantized, so every shard uses the same scale and the int32 sums of the
shards add up, exactly and in any order, to those of one device:

    low, high = pmin(min(x_base)), pmax(max(x_base))          acc = psum(q_local @ qweight_local^T)
    y = acc * s * scale + (z + h * s) * psum(reduced_local) + psum(x_out_local @ outliers_local^T) + bias
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from quikjax.pallas_kernels import reference
from quikjax.pallas_kernels.layout import Packed, from_tiles
from quikjax.pallas_kernels.reference import Split


def split_quantize_over_k(
    x: Float[Array, "*batch local_k"],
    columns: Int[Array, " local_k"],
    base: int,
    bits: int,
    axis: str,
    clip: tuple[int, int] | None = None,
) -> Split:
    """This shard's part of a split whose scale and zero are those of the whole token.

    `columns` are local indices, base first; `base` may not be 0. Codes are those of the same columns unsharded, bit for bit.
    """
    grid = reference.checked_level_clip(bits, clip)
    if base == 0:
        raise ValueError("a shard without base columns has no minimum to share")
    x_base, x_out = reference.split_columns(x, columns, base)
    wide = x_base.astype(jnp.float32)
    low = jax.lax.pmin(jnp.min(wide, axis=-1), axis)
    origin, scale, zero = reference.scale_and_zero(low, jax.lax.pmax(jnp.max(wide, axis=-1), axis), grid)
    return Split(reference.codes_of(wide, origin, scale, bits, grid).astype(jnp.int8), x_out, scale, zero)


def linear_over_k(
    x: Float[Array, "*batch local_k"], packed: Packed, bias: Float[Array, " n"] | None, bits: int, axis: str
) -> Float[Array, "*batch n"]:
    """`x W^T + bias` in the dtype of `x`, with `x` and `W` split along their input columns over the mesh axis `axis`.

    `packed` is this shard's weight: local codes, outliers and columns, `scale` (equal on all shards) and its own `reduced`. The
    result is replicated. Runs the reference product: the reduction across devices stands between integer sums and epilogue.
    """
    packed = from_tiles(packed)
    split = split_quantize_over_k(x, packed.columns, packed.base, bits, axis, packed.level_clip)
    sums = jax.lax.psum(reference.integer_matmul(split.codes, packed.qweight), axis)
    reduced: Float32[Array, " n"] = jax.lax.psum(packed.reduced, axis)
    offset = split.zero + np.float32(2 ** (bits - 1)) * split.scale
    y = sums.astype(jnp.float32) * split.scale[..., None] * packed.scale + offset[..., None] * reduced
    if packed.outlier_count:
        y = y + jax.lax.psum(reference.float_matmul(split.outliers, packed.outliers), axis)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)
