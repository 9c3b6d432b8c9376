"""A QUIK layer out of two Triton kernels (jax-triton, an extra): Ampere, Ada, and Hopper for comparison.

The same two steps as the Mosaic layer, without its machinery: split and quantize a row per program, then one product kernel
whose integer and outlier accumulators share an epilogue. Weights are widened to int8 before the product (Triton's dot has no
int4), so here INT4 is a format of storage only, and not yet of bandwidth.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from quikjax.pallas_kernels.layout import Packed
from quikjax.pallas_kernels.reference import Split
from quikjax.pallas_kernels.split_quantize.producers import Producer


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
    """Split `inputs` `[M, K]`. XLA fuses the producer; `compute_capability` (80, 89, 90) compiles for an absent GPU."""
    from quikjax.pallas_kernels.split_quantize import triton

    return triton.split_quantize(producer(*inputs, *parameters), columns, base, bits, compute_capability, clip)


def product(
    split: Split, packed: Packed, bias: jax.Array | None, bits: int, out_dtype: Any, compute_capability: int | None = None
) -> jax.Array:
    """`y [M, N]` of a split and a weight without padding."""
    from quikjax.pallas_kernels.quik_matmul import triton

    return triton.quik_matmul(
        split,
        packed.qweight.astype(jnp.int8),
        packed.scale,
        packed.reduced,
        packed.outliers,
        jnp.zeros_like(packed.scale) if bias is None else bias.astype(jnp.float32),
        bits,
        out_dtype,
        compute_capability,
    )


def run(
    inputs: tuple[jax.Array, ...],
    parameters: tuple[jax.Array, ...],
    producer: Producer,
    weights: list[Packed],
    biases: list[jax.Array | None],
    bits: int,
) -> list[jax.Array]:
    """All layers that read one tensor."""
    shared = split(inputs, weights[0].columns, weights[0].base, bits, producer, parameters, clip=weights[0].level_clip)
    one = functools.partial(product, shared, bits=bits, out_dtype=inputs[0].dtype)
    return [one(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
