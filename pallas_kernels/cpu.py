"""The XLA backend on a CPU, for many rows and for weights in panels: the reference's integers with less memory traffic.

Three things cost a CPU more than the arithmetic, so they are done another way; codes, scales, zeros and accumulators are
bit-identical to `reference`.

- Moving activations. `reference.split_quantize` gathers the base columns of `x`; here codes stay in the order of `x` and the
  weight's codes are put in that order instead, zero in the outlier columns, once a call.
- Making `x` again. XLA fuses what made it (a norm, a gate) into each of its readers, of which a split has five; here it is
  written once.
- int8 products. Codes of up to 8 bits are bfloat16 numbers; their products and sums are float32 numbers while they stay within
  2^24. Where the CPU has bfloat16 instructions that takes two thirds of the time, with the same integers.

Weights in panels (`native`), whose codes are in the order of `x` already, are multiplied by the compiled product, whatever the
number of rows.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Int32

from quikjax.pallas_kernels import reference
from quikjax.pallas_kernels.layout import Packed, Paneled
from quikjax.pallas_kernels.native import panels
from quikjax.pallas_kernels.reference import Split

# Measured with benchmarks/prefill.py. Below, moving the weight costs more than moving the activations.
FEWEST_ROWS = 256
# Every further piece is another pass over the sums; beyond two an int8 product is as fast.
MOST_PIECES = 2


def linears(
    x: Float[Array, "rows k"], weights: Sequence[Packed] | Sequence[Paneled], biases: Sequence[Any], bits: int, *, bfloat16: bool
) -> list[Float[Array, "rows _"]]:
    """`x W^T + bias` for weights of one form with the same columns, in the dtype of `x`; `bits` of the activations is 4 or 8.

    `bfloat16`: multiply that way where it is exact.
    """
    (rows, k), first = x.shape, weights[0]
    pieces = bfloat16_pieces(k, bits, max(weight.weight_bits for weight in weights))
    carrier = jnp.bfloat16 if bfloat16 and pieces <= MOST_PIECES else jnp.int8
    x = written_once(x, first.columns) if rows >= FEWEST_ROWS else x
    split = split_quantize(x, first.columns, first.base, bits, carrier, first.level_clip)
    paneled = [weight for weight in weights if isinstance(weight, Paneled)]
    if len(paneled) == len(weights):
        made = panels.quik_products(split, bits, [_in_panels(weight) for weight in paneled])
        return [
            (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype) for y, bias in zip(made, biases, strict=True)
        ]
    results = []
    for weight, bias in zip(weights, biases, strict=True):
        accumulator = None
        if weight.base:
            accumulator = integer_matmul(split.codes, unpermuted(weight.qweight, weight.columns).astype(carrier), pieces)
        y = reference.epilogue(accumulator, split, weight.scale, weight.reduced, weight.outliers, bias, bits)
        results.append(y.astype(x.dtype))
    return results


def _in_panels(weight: Paneled) -> panels.QuikPanels:
    return panels.QuikPanels(weight.qweight, weight.outliers, weight.scale, weight.reduced, weight.layer, weight.bits)


def written_once(x: Float[Array, "*batch k"], columns: Int[Array, " k"]) -> Float[Array, "*batch k"]:
    """`x`, in memory: a loop that no `columns` let run, which XLA cannot know, so nothing is fused across it.

    An optimization barrier would say so, but XLA drops those on a CPU before it fuses.
    """
    turns = jnp.minimum(columns[0], 0)
    return jax.lax.while_loop(lambda state: state[0] < turns, lambda state: (state[0] + 1, -state[1]), (jnp.int32(0), x))[1]


def split_quantize(
    x: Float[Array, "*batch k"],
    columns: Int[Array, " k"],
    base: int,
    bits: int,
    carrier: Any = jnp.int8,
    clip: tuple[int, int] | None = None,
) -> Split:
    """`reference.split_quantize` with `codes` `[*batch, K]` in the order of `x`, anything in the outlier columns.

    `carrier` is the dtype of the codes, int8 or bfloat16.
    """
    batch, k = x.shape[:-1], x.shape[-1]
    # `take` would gather a transposed copy and turn it back.
    outliers = jnp.take_along_axis(x, jnp.broadcast_to(columns[base:], (*batch, k - base)), axis=-1, mode="clip")
    if base == 0:
        return Split(jnp.zeros(x.shape, carrier), outliers, jnp.ones(batch, jnp.float32), jnp.zeros(batch, jnp.float32))
    grid = reference.checked_level_clip(bits, clip)
    wide = x.astype(jnp.float32)
    # An outlier column that repeats a base column changes neither extreme.
    is_outlier = jnp.zeros((k,), bool).at[columns[base:]].set(True)
    measured = jnp.where(is_outlier, jnp.take(wide, columns[:1], axis=-1, mode="clip"), wide)
    origin, scale, zero = reference.scale_and_zero(jnp.min(measured, axis=-1), jnp.max(measured, axis=-1), grid)
    return Split(reference.codes_of(wide, origin, scale, bits, grid).astype(carrier), outliers, scale, zero)


def unpermuted(qweight: Int[Array, "n base"], columns: Int[Array, " k"]) -> Int8[Array, "n k"]:
    """The codes of a weight in the order of `x`, zero in the outlier columns, carried by int8."""
    k, base = columns.shape[0], qweight.shape[1]
    position = jnp.zeros((k,), jnp.int32).at[columns].set(jnp.arange(k, dtype=jnp.int32), unique_indices=True)
    padded = jnp.pad(qweight.astype(jnp.int8), ((0, 0), (0, k - base)))
    return jnp.take(padded, position, axis=1, mode="clip")


def bfloat16_pieces(k: int, bits: int, weight_bits: int) -> int:
    """Into how many parts a sum of `k` products of signed codes must be cut for each to be exact in float32.

    >>> bfloat16_pieces(16384, 8, 4), bfloat16_pieces(1536, 8, 8)
    (1, 2)
    """
    largest_product = 2 ** (bits - 1) * 2 ** (weight_bits - 1)
    return -(-k * largest_product // 2**24)


def integer_matmul(codes: Array, qweight: Array, pieces: int) -> Int32[Array, "rows n"]:
    """`reference.integer_matmul` of codes carried by int8, or by bfloat16 with the sum cut into `pieces`: the same integers."""
    if codes.dtype == jnp.int8:
        return reference.integer_matmul(codes, qweight)
    ends = [codes.shape[1] * i // pieces for i in range(pieces + 1)]
    sums = [
        jax.lax.dot_general(
            codes[:, start:stop], qweight[:, start:stop], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        ).astype(jnp.int32)
        for start, stop in itertools.pairwise(ends)
    ]
    return sum(sums[1:], sums[0])
