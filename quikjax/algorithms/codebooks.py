"""Data types of k bits as codebooks, and weights written with them in blocks (Dettmers & Zettlemoyer, arXiv 2212.09720).

A data type is a codebook `F`: at most `2^k` ascending values in [-1, 1], the largest magnitude 1. A tensor is flattened and cut
into blocks of `B` weights (the last one may be short); with `m_b = max|T_b|`,

    code = argmin_j |F[j] - T_i / m_b|,    T_i ~ F[code] m_b                          (the lower code where two are as near)

A block of zeros has `m_b = 0` and comes back as zeros.
"""

import statistics
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt8

from quikjax.errors import QuikError

MIN_BITS, MAX_BITS = 3, 8

DataType = Literal["int", "float", "dynamic", "quantile", "nf", "fp4"]

# Blocks of absmax that share a scale where they are quantized themselves (QLoRA, arXiv 2305.14314, section 3).
DOUBLE_BLOCK = 256

# Comparisons with every weight each time that weights are gone through.
BOUNDS_PER_PASS = 16

_NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)


def integer(bits: int) -> Float32[np.ndarray, " entries"]:
    """The integers of `bits` bits without the most negative: `linspace(-1, 1, 2^k - 1)`.

    >>> (integer(3) * 3).tolist()
    [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    """
    return _normalized(np.linspace(-1, 1, 2 ** _checked(bits) - 1))


def default_exponent_bits(bits: int) -> int:
    """The number of exponent bits of the paper's main runs: 2 for 3 bits, 3 above."""
    return 2 if bits == 3 else 3


def floating(bits: int, exponent_bits: int | None = None) -> Float32[np.ndarray, " entries"]:
    """Floats of a sign, `E = exponent_bits` and `M = k - 1 - E` bits of mantissa, without infinities and NaN.

    With bias `2^(E-1) + 1`: subnormals `f 2^-bias`, normals `(1 + f) 2^-(e - 1 - bias)`, `f` a multiple of `2^-M` below 1, all
    divided by the largest (paper, section 2.1). bitsandbytes' `create_fp8_map` has another bias, and subnormals four times as
    large; OCP's E2M1 is another table again.

    Raises:
        QuikError: `exponent_bits` leaves no sign, or is 0.
    """
    exponent = default_exponent_bits(_checked(bits)) if exponent_bits is None else exponent_bits
    mantissa = bits - 1 - exponent
    if exponent < 1 or mantissa < 0:
        raise QuikError(f"a float of {bits} bits has from 1 to {bits - 1} exponent bits, not {exponent}")
    bias = 2 ** (exponent - 1) + 1
    fractions = np.arange(2**mantissa) / 2**mantissa
    positive = [fractions * 2.0**-bias]
    positive += [(1 + fractions) * 2.0 ** -(e - 1 - bias) for e in range(1, 2**exponent)]
    return _normalized(_both_signs(np.concatenate(positive)))


def dynamic(bits: int) -> Float32[np.ndarray, " entries"]:
    """Dynamic exponents (Dettmers, arXiv 1511.04561): a run of zeros is a decimal exponent, the bits behind it a linear fraction.

    For `i = 0 .. k-2` the means of neighbours in `linspace(0.1, 1, 2^i + 1)` times `10^(i - k + 2)`, both signs, with 0 and 1.
    """
    _checked(bits)
    runs = []
    for i in range(bits - 1):
        edges = np.linspace(0.1, 1, 2**i + 1)
        runs.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - bits + 2))
    return _normalized(np.concatenate([_both_signs(np.concatenate(runs)), [0.0, 1.0]]))


def quantile(values: Float[np.ndarray, "..."], bits: int) -> Float32[np.ndarray, " entries"]:
    """The data type that gives every code as many of the tensor's weights.

    Its `2^k - 1` quantiles at `linspace(d, 1 - d)`, `d = 1/(2 (2^k - 1))`, and 0. All divided by
    the largest magnitude, so it is a data type of this one tensor and must be stored with it. A tensor of zeros gives only 0.
    """
    count = 2 ** _checked(bits) - 1
    d = 1 / (2 * count)
    # Sorted in their own dtype first: twice as fast.
    found = np.quantile(np.sort(values, axis=None).astype(np.float64), np.linspace(d, 1 - d, count)) if np.size(values) else [0.0]
    return _normalized(np.concatenate([found, [0.0]]))


def normal_float(bits: int) -> Float32[np.ndarray, " entries"]:
    """NF of `bits` bits (QLoRA, arXiv 2305.14314): quantiles of a normal distribution, half of them on each side of an exact 0.

    `2^(k-1)` positive ones and one fewer negative ones, from probability 1/2 to `1 - (1/(2^k - 1) + 1/2^k) / 4`. For 4 bits the
    published table, which was computed with that probability rounded to seven digits.
    """
    half = 2 ** (_checked(bits) - 1)
    if bits == 4:
        return np.array(_NF4, np.float32)
    offset = 1 - (1 / (2 * half - 1) + 1 / (2 * half)) / 4
    normal = statistics.NormalDist()

    def side(count: int) -> list[float]:
        return [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, count + 1)[:-1].tolist()]

    return _normalized(np.array([*(-x for x in side(half - 1)), 0.0, *side(half)]))


def fp4() -> Float32[np.ndarray, " entries"]:
    """bitsandbytes' FP4: magnitudes `{0, 1/16, 2, 3, 4, 6, 8, 12} / 12`, both signs."""
    return _normalized(_both_signs(np.array([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12))


def codebook(data_type: DataType, bits: int, exponent_bits: int | None = None) -> Float32[np.ndarray, " entries"]:
    """The codebook of a data type that depends on no tensor (`quantile` does).

    Raises:
        QuikError: this data type does not have as many bits.
    """
    if data_type == "fp4":
        if bits != 4:
            raise QuikError(f"fp4 has 4 bits, not {bits}; take float for another number")
        return fp4()
    if data_type == "float":
        return floating(bits, exponent_bits)
    return {"int": integer, "dynamic": dynamic, "nf": normal_float}[data_type](bits)


def _checked(bits: int) -> int:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise QuikError(f"codebooks have from {MIN_BITS} to {MAX_BITS} bits, not {bits}")
    return bits


def _both_signs(values: np.ndarray) -> np.ndarray:
    return np.concatenate([-values, values])


def _normalized(values: np.ndarray) -> Float32[np.ndarray, " entries"]:
    """Ascending, each once, divided by the largest magnitude."""
    # Adding 0 turns -0 into 0.
    distinct = np.unique(values + 0.0)
    largest = np.abs(distinct).max()
    return (distinct / (largest if largest > 0 else 1.0)).astype(np.float32)


@partial(jax.jit, static_argnames="block", inline=True)
def block_absmax(flat: Float32[Array, " weights"], block: int) -> Float32[Array, " blocks"]:
    """`m_b = max|T_b|` of every block of a flattened tensor; the last block may be short."""
    padded = jnp.pad(jnp.abs(flat), (0, -flat.shape[0] % block))
    return jnp.max(padded.reshape(-1, block), axis=1, initial=0.0)


@partial(jax.jit, static_argnames=("weights", "block"), inline=True)
def spread(per_block: Float[Array, " blocks"], weights: int, block: int) -> Float[Array, " weights"]:
    """Each block's number for each of its weights."""
    blocks = per_block.shape[0]
    return jnp.broadcast_to(per_block[:, None], (blocks, block)).reshape(-1)[:weights]


def midpoints(table: Float32[Array, " entries"]) -> Float32[Array, " bounds"]:
    """Where one code ends and the next begins."""
    return (table[1:] + table[:-1]) / 2


def nearest(
    x: Float32[Array, "..."], bounds: Float32[Array, " bounds"], passes: Int32[Array, ""] | int | None = None
) -> UInt8[Array, "..."]:
    """The code whose value is nearest to each `x`: how many of a codebook's `midpoints` are below it.

    With `passes`, which may be traced, only the first `passes * BOUNDS_PER_PASS` bounds are looked at: one compilation serves
    codebooks of every size, their bounds padded with infinity.
    """
    # One comparison per bound and weight beats a binary search: it is eight weights wide, or sixteen. Several bounds to a pass,
    # since a pass reads and writes all weights.
    padded = jnp.pad(bounds, (0, -bounds.shape[0] % BOUNDS_PER_PASS), constant_values=jnp.inf)

    def compare(index: Any, codes: UInt8[Array, "..."]) -> UInt8[Array, "..."]:
        some = jax.lax.dynamic_slice(padded, (index * BOUNDS_PER_PASS,), (BOUNDS_PER_PASS,))
        for j in range(BOUNDS_PER_PASS):
            codes = codes + (x > some[j]).astype(jnp.uint8)
        return codes

    count = padded.shape[0] // BOUNDS_PER_PASS if passes is None else passes
    return jax.lax.fori_loop(0, count, compare, jnp.zeros(x.shape, jnp.uint8))


@partial(jax.jit, static_argnames="block")
def encode(
    flat: Float32[Array, " weights"], absmax: Float32[Array, " blocks"], table: Float32[Array, " entries"], *, block: int
) -> UInt8[Array, " weights"]:
    """The codes of a flattened tensor in blocks of `block`, given what each block is divided by (for zero, anything)."""
    m = spread(absmax, flat.shape[0], block)
    return nearest(flat / jnp.where(m > 0, m, 1.0), midpoints(table))


@partial(jax.jit, static_argnames="block", inline=True)
def decode(
    codes: UInt8[Array, " weights"], absmax: Float32[Array, " blocks"], table: Float32[Array, " entries"], *, block: int
) -> Float32[Array, " weights"]:
    """`F[code] m_b`."""
    values = table.at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")
    return values * spread(absmax, codes.shape[0], block)


def double_quantize(
    absmax: Float32[Array, " blocks"],
) -> tuple[UInt8[Array, " blocks"], Float32[Array, " groups"], Float32[Array, " 1"]]:
    """Absmax in 8 bits (QLoRA, section 3): `(codes, scales, mean)`, the dynamic data type around their mean, in blocks of 256."""
    mean = jnp.mean(absmax, keepdims=True) if absmax.shape[0] else jnp.zeros(1, jnp.float32)
    centered = absmax - mean
    scales = block_absmax(centered, DOUBLE_BLOCK)
    return encode(centered, scales, jnp.asarray(dynamic(8)), block=DOUBLE_BLOCK), scales, mean


def undo_double(
    codes: UInt8[Array, " blocks"], scales: Float32[Array, " groups"], mean: Float32[Array, " 1"]
) -> Float32[Array, " blocks"]:
    """The absmax that `double_quantize` wrote, none of them negative."""
    return jnp.maximum(decode(codes, scales, jnp.asarray(dynamic(8)), block=DOUBLE_BLOCK) + mean, 0.0)


@partial(jax.jit, static_argnames="bits")
def pack(codes: UInt8[Array, " weights"], bits: int) -> UInt8[Array, "bits octets"]:
    """Codes as bit planes: bit `i % 8` of byte `i // 8` of plane `j` is bit `j` of code `i`. `bits * ceil(weights / 8)` bytes."""
    padded = jnp.pad(codes, (0, -codes.shape[0] % 8)).reshape(-1, 8)
    place = jnp.arange(8, dtype=jnp.uint8)
    planes = [jnp.sum(((padded >> j) & 1) << place, axis=1, dtype=jnp.uint8) for j in range(bits)]
    return jnp.stack(planes)


@partial(jax.jit, static_argnames="weights", inline=True)
def unpack(planes: UInt8[Array, "bits octets"], weights: int) -> UInt8[Array, " weights"]:
    """The first `weights` codes of bit planes."""
    place = jnp.arange(8, dtype=jnp.uint8)
    codes = jnp.zeros((planes.shape[1], 8), jnp.uint8)
    for j in range(planes.shape[0]):
        codes |= ((planes[j][:, None] >> place) & 1) << j
    return codes.reshape(-1)[:weights]
