"""A QUIK layer out of the two Mosaic kernels: padding, tiles, and what travels between them."""

from typing import Any

import jax
import jax.numpy as jnp

from quikjax.pallas_kernels import layout, reference, tuned
from quikjax.pallas_kernels.devices import Device
from quikjax.pallas_kernels.layout import Packed, Tiled, TileSplit
from quikjax.pallas_kernels.quik_matmul import mosaic as matmul_kernel
from quikjax.pallas_kernels.reference import Split
from quikjax.pallas_kernels.split_quantize import mosaic as split_kernel
from quikjax.pallas_kernels.split_quantize.producers import Identity, Producer


def split(
    inputs: tuple[jax.Array, ...],
    columns: jax.Array,
    base: int,
    bits: int,
    producer: Producer,
    parameters: tuple[jax.Array, ...],
    device: Device,
    clip: tuple[int, int] | None = None,
) -> TileSplit:
    """Split `inputs` `[M, K]`; `bits = 16` only gathers (XLA fuses that with the producer).

    What one kernel cannot hold is done in two steps: the producer by XLA and the split by the kernel, or both by XLA.
    """
    m, k = inputs[0].shape
    exact, columns = layout.exact_columns(columns, base, k), layout.tile_columns(columns, base, k)
    padded_base = layout.round_up(base, layout.COLUMN_TILE)
    if bits == 16:
        x = producer(*inputs, *parameters)
        x = layout.pad_to(jnp.take(x, columns, axis=1, mode="clip"), (layout.round_up(m, 8), columns.shape[0]))
        return TileSplit(x[:, :padded_base], None, None, x[:, padded_base:] if base < k else None)
    tiles, _ = tuned.split_tiles(m, k, producer, device)
    if split_kernel.why_not(k, padded_base, columns.shape[0] - padded_base, inputs[0].dtype, producer, tiles) is not None:
        if producer != Identity():
            return split((producer(*inputs, *parameters),), columns, base, bits, Identity(), (), device, clip)
        return tile_split(reference.split_quantize(inputs[0], exact, base, bits, clip))
    codes, outliers, scale, zero = split_kernel.split_quantize(
        inputs, columns, base, padded_base, bits, producer, parameters, tiles, matmul_kernel.LONGEST_ROWS, clip
    )
    return TileSplit(codes, scale, zero, outliers)


def tile_split(exact: Split) -> TileSplit:
    """Tile form of a split that any backend made, `[M, ...]`."""
    rows = layout.round_up(exact.codes.shape[0], 8)
    long = layout.round_up(rows, matmul_kernel.LONGEST_ROWS)
    outliers = None
    if count := exact.outliers.shape[1]:
        outliers = layout.pad_to(exact.outliers, (rows, layout.round_up(count, layout.COLUMN_TILE)))
    return TileSplit(
        layout.pad_to(exact.codes, (rows, layout.round_up(exact.codes.shape[1], layout.COLUMN_TILE))),
        layout.pad_to(exact.scale, (long,)),
        layout.pad_to(exact.zero, (long,)),
        outliers,
    )


def exact_split(tiled: TileSplit, rows: int, base: int, outliers: int) -> Split:
    """The split without padding, as `reference.split_quantize` returns it."""
    if tiled.scale is None or tiled.zero is None:
        raise ValueError("a weight-only split is not quantized")
    kept = jnp.zeros((rows, 0), tiled.tokens.dtype) if tiled.outliers is None else tiled.outliers[:rows, :outliers]
    return Split(tiled.tokens[:rows, :base], kept, tiled.scale[:rows], tiled.zero[:rows])


def product(
    tiled: TileSplit, rows: int, packed: Packed | Tiled, bias: jax.Array | None, bits: int, out_dtype: Any, device: Device
) -> jax.Array:
    """`y [M, N]` of a split in tile form and a weight in either form."""
    weight = layout.to_tiles(packed)
    n, base = weight.qweight.shape
    tiles, _ = tuned.matmul_tiles(rows, n, base, weight.weight_bits, bits, device)
    padded_bias = None if bias is None else layout.pad_to(bias.astype(jnp.float32), (n,))
    y = matmul_kernel.quik_matmul(tiled, weight, padded_bias, bits=bits, out_dtype=out_dtype, tiles=tiles, cores=device.cores)
    return y[:rows]
