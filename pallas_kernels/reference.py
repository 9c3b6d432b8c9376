"""The definition of QUIK's numbers, in plain `jnp`: every other backend is tested against this file.

A linear layer `y = x W^T + bias` with `W` of shape `[N, K]` is held as `B` base columns in `b`-bit integers and `O = K - B`
outlier columns in 16-bit floats. At run time (QUIK, arXiv 2310.09259, sections 3.2-3.3)

    x_base, x_out = x[columns[:B]], x[columns[B:]]
    low, high = min(x_base), max(x_base);  origin = low                                              per token
    s = max((high - low) * c, 1e-30);  c = float32(1 / L)
    q = clip(round((x_base - origin) * (1 / s)), l, l + 2^b - 1) - l - h;  h = 2^(b - 1)              int8 carries it
    z = origin + l * s                                                                               x_base ~ (q + h) * s + z
    acc = q @ qweight^T                                                                              int32, exact
    y = acc * s * scale + (z + h * s) * reduced + x_out @ outliers^T + bias                           float32
    reduced[n] = scale[n] * sum_k qweight[n, k]

`(L, l)` is `(2^b - 1, 0)` unless a layer of 4-bit activations has a level clip of its own: `L > 15` divides the token's range
into more steps than there are codes, and what lies below the lowest or above the highest saturates. Only constants change, and
what a product needs to know of it is in `z` (`l` is 0, 1, 2 or `-h`, so that `l * s` is exact).

Symmetric activations, of 4 or 8 bits, are those with `l = -h`. Their range is `[-m, m]`, `m` the token's largest magnitude, and
steps are counted from zero; everything else stays:

    low, high = -m, m;  m = max(max(x_base), -min(x_base));  origin = 0

so `q = clip(round(x_base * (1 / s)), -h, h - 1)`, and zero is code 0 and comes back as zero, exactly: `z + h * s = 0`. `L = 2^b`
is the released code of arXiv 2301.12017 (`s = 2 m / 2^b`, with a code for `-m` but none for `m`); `2^b - 1` and `2^b - 2` are
other conventions, of coarser steps that lose less at `m`.

Contract. `q`, `s`, `z` and `acc` are bit-identical on every backend for identical `x`: all quantizer arithmetic is float32,
rounds half to even, and multiplies by `c` and by `1 / s` where a division would let a compiler choose the bits. One exception:
this file compiled by XLA for a GPU takes `1 / s` from an approximate instruction, and a code on the boundary of two may be the
other one; kernels there are held against the CPU's. The float32 epilogue is equal within a stated tolerance. Values must be
finite and `max - min` below the float32 maximum; int32 cannot overflow for `B <= MAX_BASE`.

Dtypes of the outlier product: `x` in its own dtype and `outliers` in theirs, both widened to float32 (exact), products
accumulated in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int8, Int32

# |q_x| <= 128 and |q_w| <= 128, so this many products stay inside int32.
MAX_BASE = (2**31 - 1) // (128 * 128)
SMALLEST_SCALE = 1e-30

# Below this many rows XLA's integer product on CPU takes a scalar path; rows of zeros cost less than that.
_FEWEST_ROWS = 4


class LevelClip(NamedTuple):
    """Into how many steps a token's range is divided: `levels` (`L`), and which of them the lowest code is: `lowest` (`l`)."""

    levels: int
    lowest: int

    @property
    def symmetric(self) -> bool:
        """Steps are counted from zero, not from the token's minimum."""
        return self.lowest < 0


def symmetric_clip(bits: int) -> tuple[int, int]:
    """The level clip of symmetric activations, as the released code of arXiv 2301.12017 has it: `2^b` steps for `[-m, m]`.

    >>> symmetric_clip(4), symmetric_clip(8)
    ((16, -8), (256, -128))
    """
    return 2**bits, -(2 ** (bits - 1))


def checked_level_clip(bits: int, clip: tuple[int, int] | None = None) -> LevelClip:
    """`clip`, or without one the whole range in as many steps as `bits` have.

    Raises:
        ValueError: activations are not quantized to so many bits, or their codes cannot be clipped so.
    """
    if bits not in (4, 8):
        raise ValueError(f"activations are quantized to 4 or 8 bits, not {bits}")
    steps = 2**bits - 1
    levels, lowest = clip or (steps, 0)
    half = 2 ** (bits - 1)
    symmetric = lowest == -half and levels >= steps - 1
    finer = bits == 4 and lowest in (0, 1, 2) and levels >= lowest + steps
    if not (symmetric or finer or (levels, lowest) == (steps, 0)):
        others = f", others one of 0, 1 or 2 and at least {steps} levels above it" if bits == 4 else ""
        raise ValueError(
            f"{bits}-bit activations cannot have the level clip ({levels}, {lowest}): symmetric ones have a lowest code of "
            f"{-half} and at least {steps - 1} levels{others}"
        )
    return LevelClip(levels, lowest)


def scale_and_zero(
    low: Float32[Array, "*batch"], high: Float32[Array, "*batch"], clip: LevelClip
) -> tuple[Float32[Array, "*batch"], Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """`origin`, `s` and `z` of tokens from the least and the largest of their base columns."""
    origin = low
    if clip.symmetric:
        high = jnp.maximum(high, -low)
        low, origin = -high, jnp.zeros_like(low)
    scale = jnp.maximum((high - low) * np.float32(1 / clip.levels), np.float32(SMALLEST_SCALE))
    return origin, scale, origin + np.float32(clip.lowest) * scale if clip.lowest else origin


class Split(NamedTuple):
    """One tensor of activations, split and quantized once for all the layers that read it.

    `codes`: the base columns in `b` bits, carried by int8, in `[-2^(b-1), 2^(b-1) - 1]`. `outliers`: the outlier columns in the
    dtype of `x`. `scale` and `zero`: per token, `x_base ~ (codes + 2^(b-1)) * scale + zero`.
    """

    codes: Int8[Array, "*batch base"]
    outliers: Float[Array, "*batch outliers"]
    scale: Float32[Array, "*batch"]
    zero: Float32[Array, "*batch"]


def quantize_activations(
    x: Float[Array, "*batch base"], bits: int, clip: tuple[int, int] | None = None
) -> tuple[Int8[Array, "*batch base"], Float32[Array, "*batch"], Float32[Array, "*batch"]]:
    """Per-token codes of the base columns: `(codes, scale, zero)`, see the module's equations; without a `clip` asymmetric.

    `bits` is 4 or 8. Without columns there is nothing to measure: `scale = 1`, `zero = 0`.
    """
    grid = checked_level_clip(bits, clip)
    batch = x.shape[:-1]
    if x.shape[-1] == 0:
        return jnp.zeros(x.shape, jnp.int8), jnp.ones(batch, jnp.float32), jnp.zeros(batch, jnp.float32)
    x = x.astype(jnp.float32)
    origin, scale, zero = scale_and_zero(jnp.min(x, axis=-1), jnp.max(x, axis=-1), grid)
    return codes_of(x, origin, scale, bits, grid).astype(jnp.int8), scale, zero


def codes_of(
    x: Float32[Array, "*batch base"],
    origin: Float32[Array, "*batch"],
    scale: Float32[Array, "*batch"],
    bits: int,
    clip: LevelClip,
) -> Float32[Array, "*batch base"]:
    """`q` in float32, of values of tokens whose `origin` and scale are known (`scale_and_zero`)."""
    steps = jnp.round((x - origin[..., None]) * (1 / scale)[..., None])
    return jnp.clip(steps, clip.lowest, clip.lowest + 2**bits - 1) - (clip.lowest + 2 ** (bits - 1))


def split_columns(
    x: Float[Array, "*batch k"], columns: Int[Array, " k"], base: int
) -> tuple[Float[Array, "*batch base"], Float[Array, "*batch outliers"]]:
    """The base columns and the outlier columns of `x`, in the weight's order (`columns`: base first, outliers last)."""
    permuted = jnp.take(x, columns, axis=-1, mode="clip")
    return permuted[..., :base], permuted[..., base:]


def split_quantize(
    x: Float[Array, "*batch k"], columns: Int[Array, " k"], base: int, bits: int, clip: tuple[int, int] | None = None
) -> Split:
    """Gather base and outlier columns of `x` and quantize the base per token to `bits` (4 or 8)."""
    x_base, x_out = split_columns(x, columns, base)
    codes, scale, zero = quantize_activations(x_base, bits, clip)
    return Split(codes, x_out, scale, zero)


def integer_matmul(codes: Int8[Array, "*batch base"], qweight: Int[Array, "n base"]) -> Int32[Array, "*batch n"]:
    """`codes @ qweight^T` with int32 accumulation, exact. `qweight` is int4 or int8; both sides travel as int8."""
    *batch, base = codes.shape
    if base > MAX_BASE:
        raise ValueError(f"{base} base columns could overflow an int32 accumulator; at most {MAX_BASE} are exact")
    rows = codes.reshape(-1, base)
    count = rows.shape[0]
    if 0 < count < _FEWEST_ROWS:
        rows = jnp.pad(rows, ((0, _FEWEST_ROWS - count), (0, 0)))
    accumulator = jax.lax.dot_general(rows, qweight.astype(jnp.int8), (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return accumulator[:count].reshape(*batch, qweight.shape[0])


def float_matmul(x: Float[Array, "*batch k"], weight: Float[Array, "n k"]) -> Float32[Array, "*batch n"]:
    """`x @ weight^T`: both operands widened to float32, accumulated in float32."""
    return jax.lax.dot_general(
        x.astype(jnp.float32),
        weight.astype(jnp.float32),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def quik_matmul(
    split: Split,
    qweight: Int[Array, "n base"],
    scale: Float32[Array, " n"],
    reduced: Float32[Array, " n"],
    outliers: Float[Array, "n outliers"],
    bias: Float[Array, " n"] | None,
    bits: int,
) -> Float32[Array, "*batch n"]:
    """The QUIK product of split activations with a packed weight, float32 epilogue (module's equations).

    `bits` is the activations' width, the same that `split` was made with. The result is float32; the caller casts.
    """
    accumulator = integer_matmul(split.codes, qweight) if qweight.shape[1] else None
    return epilogue(accumulator, split, scale, reduced, outliers, bias, bits)


def epilogue(
    accumulator: Int32[Array, "*batch n"] | None,
    split: Split,
    scale: Float32[Array, " n"],
    reduced: Float32[Array, " n"],
    outliers: Float[Array, "n outliers"],
    bias: Float[Array, " n"] | None,
    bits: int,
) -> Float32[Array, "*batch n"]:
    """`y` from the integer sums (`None`: no base columns), the outlier product and the bias, in float32."""
    y = jnp.zeros((*split.scale.shape, scale.shape[0]), jnp.float32)
    if accumulator is not None:
        offset = split.zero + 2 ** (bits - 1) * split.scale
        y = accumulator.astype(jnp.float32) * split.scale[..., None] * scale + offset[..., None] * reduced
    if outliers.shape[1]:
        y = y + float_matmul(split.outliers, outliers)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y


def weight_only_matmul(
    x: Float[Array, "*batch k"],
    columns: Int[Array, " k"],
    qweight: Int[Array, "n base"],
    scale: Float32[Array, " n"],
    outliers: Float[Array, "n outliers"],
    bias: Float[Array, " n"] | None,
) -> Float32[Array, "*batch n"]:
    """16-bit activations: `y = (x_base @ qweight^T) * scale + x_out @ outliers^T + bias`, float32 throughout."""
    x_base, x_out = split_columns(x, columns, qweight.shape[1])
    # Through int8: not every backend of XLA converts int4 to floats.
    y = float_matmul(x_base, qweight.astype(jnp.int8).astype(jnp.float32)) * scale
    if outliers.shape[1]:
        y = y + float_matmul(x_out, outliers)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y
