"""A QUIK layer out of the two Mosaic kernels: padding, tiles, and what travels between them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quikjax.pallas_kernels import layout, reference, tuned
from quikjax.pallas_kernels.devices import Device
from quikjax.pallas_kernels.layout import Joined, Packed, Tiled, TileSplit
from quikjax.pallas_kernels.quik_matmul import mosaic as matmul_kernel
from quikjax.pallas_kernels.quik_matmul.tiles import LONGEST_ROWS
from quikjax.pallas_kernels.quik_matmul.unsplit import Form, Unsplit
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
        inputs, columns, base, padded_base, bits, producer, parameters, tiles, LONGEST_ROWS, clip
    )
    return TileSplit(codes, scale, zero, outliers)


def tile_split(exact: Split) -> TileSplit:
    """Tile form of a split that any backend made, `[M, ...]`."""
    rows = layout.round_up(exact.codes.shape[0], 8)
    long = layout.round_up(rows, LONGEST_ROWS)
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


def splits_inside(
    rows: int, k: int, dtype: Any, packed: Packed | Tiled | Joined, bits: int, producer: Producer, device: Device
) -> bool:
    """Whether the product's kernel splits its activations itself: one row, if that leaves room for a ring of weights."""
    if rows != 1 or bits == 16:
        return False
    n, base = (layout.round_up(count, layout.WEIGHT_TILE) for count in (packed.outputs, packed.base))
    tiles, _ = tuned.matmul_tiles(rows, n, base, packed.weight_bits, bits, device)
    form = row_form(k, dtype, packed.base, bits, producer)
    return form.why_not(tiles, base, layout.round_up(k - packed.base, layout.OUTLIER_TILE), packed.weight_bits, bits) is None


def row_form(k: int, dtype: Any, base: int, bits: int, producer: Producer) -> Form:
    """The static properties of a row of `k` columns that is not split yet, without a level clip."""
    columns = layout.round_up(base, layout.COLUMN_TILE) + layout.round_up(k - base, layout.COLUMN_TILE)
    return Form(producer, k, base, columns, jnp.dtype(dtype), reference.checked_level_clip(bits, None))


def unsplit(
    inputs: tuple[jax.Array, ...],
    columns: jax.Array,
    base: int,
    bits: int,
    producer: Producer,
    parameters: tuple[jax.Array, ...],
    clip: tuple[int, int] | None = None,
) -> Unsplit:
    """One row `[1, K]` of each of `inputs` as `product` takes it where `splits_inside` says so."""
    tiled = layout.tile_columns(columns, base, inputs[0].shape[1])
    return Unsplit(inputs, tiled, parameters, base, producer, reference.checked_level_clip(bits, clip))


def product(
    tiled: TileSplit | Unsplit,
    rows: int,
    packed: Packed | Tiled | Joined,
    biases: Sequence[jax.Array | None],
    bits: int,
    out_dtype: Any,
    device: Device,
    residual: jax.Array | None = None,
) -> list[jax.Array]:
    """`y [M, N]` of a split in tile form, or of a row not split yet, and a weight in any form.

    One for each weight of a joined one; so are `biases`. A `residual` `[M, N]` in `out_dtype` is added to the only `y`, once that
    is rounded: in the kernel where that takes few rows.
    """
    weight = packed if isinstance(packed, Joined) else layout.to_tiles(packed)
    n, base = weight.padded
    tiles, _ = tuned.matmul_tiles(rows, n, base, weight.weight_bits, bits, device)
    bias = None
    if any(given is not None for given in biases):
        lengths = [length for _, _, length in weight.places] if isinstance(weight, Joined) else [n]
        padded = [
            jnp.zeros(length, jnp.float32) if given is None else layout.pad_to(given.astype(jnp.float32), (length,))
            for given, length in zip(biases, lengths, strict=True)
        ]
        bias = padded[0] if len(padded) == 1 else jnp.concatenate(padded)
    fused = rows <= matmul_kernel.DIRECT_ROWS
    ys = matmul_kernel.quik_matmul(
        tiled,
        weight,
        bias,
        rows=rows,
        bits=bits,
        out_dtype=out_dtype,
        tiles=tiles,
        cores=device.cores,
        residual=residual if fused else None,
    )
    return ys if residual is None or fused else [y + residual for y in ys]
