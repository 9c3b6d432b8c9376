"""Straight-through quantizers: what runs in integers, computed in float32 so that gradients flow through it.

The forward numbers are the real quantizer's; backwards a rounded tensor counts as the one it was rounded from (Bengio et al.,
arXiv 1308.3432). Pure functions of arrays, for weights and activations of any training.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Shaped

from quikjax.pallas_kernels import cpu
from quikjax.weights.linear import KEPT, Trained
from quikjax.weights.quik import QuikWeight


@jax.custom_vjp
def straight_through(x: Float[Array, "..."], rounded: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x + stop_gradient(rounded - x)`, without the rounding error of that sum: `rounded`, whose gradient goes to `x` whole."""
    return rounded


def _forward(x: Array, rounded: Array) -> tuple[Array, None]:
    return rounded, None


def _backward(_saved: None, cotangent: Array) -> tuple[Array, Array]:
    return cotangent, jnp.zeros_like(cotangent)


straight_through.defvjp(_forward, _backward)


def as_stored(x: Float32[Array, "..."], dtype: Any) -> Float32[Array, "..."]:
    """A float32 master as the artifact will hold it: rounded to `dtype`, straight-through."""
    return x if jnp.dtype(dtype) == jnp.float32 else straight_through(x, x.astype(dtype).astype(jnp.float32))


def rounded_codes(u: Float32[Array, "..."], bits: int) -> Float32[Array, "..."]:
    """`clip(round(u), -2^(b-1), 2^(b-1) - 1)`, straight-through inside the clip range and without gradient beyond it."""
    return rounded_between(u, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def rounded_between(u: Float32[Array, "..."], low: int, high: int) -> Float32[Array, "..."]:
    """`clip(round(u), low, high)`, straight-through inside the range and without gradient beyond it."""
    clipped = jnp.clip(u, low, high)
    return straight_through(clipped, jnp.round(clipped))


def fake_quantize(
    x: Float[Array, "rows k"],
    columns: Shaped[Array, " k"],
    base: int,
    bits: int,
    clips: Sequence[tuple[int, int] | None] = (None,),
    clip: Shaped[Array, ""] | int = 0,
) -> Float32[Array, "rows k"]:
    """`x_hat` of the base columns, straight-through, in the order of `x`; anything (finite) in the outlier columns.

    Codes, scale and zero are the bits of `reference.split_quantize` with the level clip `clips[clip]`, and `x_hat = (code +
    2^(b-1)) * scale + zero`. Minimum and maximum count as constants. With 16 bits `x` itself.
    """
    wide = x.astype(jnp.float32)
    if bits == 16:
        return wide

    def dequantized(x: Array, clip: tuple[int, int] | None) -> Array:
        split = cpu.split_quantize(x, columns, base, bits, clip=clip)
        return (split.codes.astype(jnp.float32) + 2 ** (bits - 1)) * split.scale[..., None] + split.zero[..., None]

    # Blocks that differ in their clip alone share one compiled loop: which clip it is comes as a number.
    ways = [functools.partial(dequantized, clip=each) for each in clips]
    fixed = jax.lax.stop_gradient(x)
    return straight_through(wide, ways[0](fixed) if len(ways) == 1 else jax.lax.switch(clip, ways, fixed))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeQuantWeight(Trained):
    """A `QuikWeight` in training. With `x~` the fake-quantized activation and `P` the outlier columns of `x`

        y = scale * (x~ codes^T) + (x P) outliers^T + bias                                      float32

    Data: `codes` `[N, K]`, integers of any dtype, in the order of `x` and zero in the outlier columns; `scale` float32 `[N]`;
    `outliers` float32 `[N, O]`; `columns` int32 `[K]`; `clip`, a number: which of the static `clips` the activation has. Other
    static fields as in `QuikWeight`.
    """

    codes: Any
    scale: Any
    outliers: Any
    columns: Any
    clip: Any
    activation_bits: int = dataclasses.field(metadata={"static": True})
    base: int = dataclasses.field(metadata={"static": True})
    group: str | None = dataclasses.field(metadata={"static": True})
    clips: tuple[tuple[int, int] | None, ...] = dataclasses.field(metadata={"static": True})

    def products(
        self, x: Float[Array, "*batch k"], weights: Sequence[Any], biases: Sequence[Float[Array, " _"] | None]
    ) -> list[Float[Array, "*batch _"]]:
        """See `Trained`. The activation is quantized once; no column is gathered, whose backward pass a CPU scatters slowly."""
        *batch, k = x.shape
        rows = x.reshape(-1, k)
        quantized = fake_quantize(rows, self.columns, self.base, self.activation_bits, self.clips, self.clip)
        # A product with ones and zeros picks columns exactly, forwards and backwards.
        picks = jax.nn.one_hot(self.columns[self.base :], k, dtype=jnp.float32)
        outliers = product(rows.astype(jnp.float32), picks)
        results = []
        for weight, bias in zip(weights, biases, strict=True):
            sums = checkpoint_name(product(quantized, weight.codes.astype(jnp.float32)), KEPT)
            y = sums * weight.scale
            if k > self.base:
                y = y + product(outliers, weight.outliers)
            if bias is not None:
                y = y + bias.astype(jnp.float32)
            results.append(y.astype(x.dtype).reshape(*batch, -1))
        return results


def product(x: Float32[Array, "rows k"], weight: Float32[Array, "n k"]) -> Float32[Array, "rows n"]:
    """`x W^T` in float32."""
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def codes_in_order(weight: QuikWeight) -> np.ndarray:
    """The codes of a packed weight as int8 `[N, K]` in the order of `x`, zero in the outlier columns; on the host."""
    codes = np.zeros((weight.outputs, weight.inputs), np.int8)
    codes[:, np.asarray(weight.columns)[: weight.base]] = np.asarray(weight.qweight, np.int8)
    return codes
