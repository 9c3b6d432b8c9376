"""A QUIK layer out of two Triton kernels (jax-triton, an extra): Ampere, Ada, and Hopper for comparison.

The same two steps as the Mosaic layer, without its machinery: split and quantize a row per program, then one product kernel
whose integer and outlier accumulators share an epilogue. Weights of 4 bits are read as bytes of two codes (`layout.Halved`) and
widened in registers, so that they cross memory in 4 bits: made once where a model is put on a device, or here for every call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from quikjax.pallas_kernels.layout import Halved, Packed, Paneled, Tiled, from_tiles, halve
from quikjax.pallas_kernels.reference import Split, split_columns
from quikjax.pallas_kernels.split_quantize.producers import Identity, Producer


def split(
    inputs: tuple[jax.Array, ...],
    columns: jax.Array,
    base: int,
    bits: int,
    producer: Producer,
    parameters: tuple[jax.Array, ...],
    compute_capability: int | None = None,
    clip: tuple[int, int] | None = None,
) -> Split:
    """Split `inputs` `[M, K]`. XLA computes what the kernel does not (norms, gates) before it.

    `compute_capability` (80, 89, 90) compiles for an absent GPU.
    """
    from quikjax.pallas_kernels.split_quantize import triton

    if producer not in triton.FUSED:
        inputs, producer = (producer(*inputs, *parameters),), Identity()
    return triton.split_quantize(inputs[0], columns, base, bits, compute_capability, clip, producer)


def readable(packed: Packed | Tiled | Halved | Paneled) -> Packed | Halved:
    """A weight as the kernel reads it: of 4 bits two codes to a byte, of 8 bits without padding."""
    if isinstance(packed, Halved):
        return packed
    whole = from_tiles(packed)
    return halve(whole) if whole.weight_bits == 4 else whole


def product(
    split: Split,
    packed: Packed | Halved,
    bias: jax.Array | None,
    bits: int,
    out_dtype: Any,
    compute_capability: int | None = None,
) -> jax.Array:
    """`y [M, N]` of a split and a weight that is `readable`. With `bits` 16 the split's `codes` are the base columns."""
    from quikjax.pallas_kernels.quik_matmul import triton

    return triton.quik_matmul(
        split,
        packed,
        jnp.zeros_like(packed.scale) if bias is None else bias.astype(jnp.float32),
        bits,
        out_dtype,
        compute_capability,
    )


def run(
    inputs: tuple[jax.Array, ...],
    parameters: tuple[jax.Array, ...],
    producer: Producer,
    weights: list[Packed | Halved],
    biases: list[jax.Array | None],
    bits: int,
    compute_capability: int | None = None,
) -> list[jax.Array]:
    """All layers that read one tensor; `bits = 16` only gathers, which XLA fuses with the producer."""
    first = weights[0]
    if bits == 16:
        x = producer(*inputs, *parameters)
        ones = jnp.ones(x.shape[0], jnp.float32)
        shared = Split(*split_columns(x, first.columns, first.base), ones, ones)
    else:
        shared = split(inputs, first.columns, first.base, bits, producer, parameters, compute_capability, clip=first.level_clip)
    one = functools.partial(product, shared, bits=bits, out_dtype=inputs[0].dtype, compute_capability=compute_capability)
    return [one(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
