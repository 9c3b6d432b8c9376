"""A weight in groups in training: what `GroupWeight` computes, in float32 so that gradients flow through it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quikjax.pallas_kernels.reference import quantize_activations
from quikjax.weights.fake_quant import product, straight_through
from quikjax.weights.linear import Trained


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeGroupWeight(Trained):
    """A `GroupWeight` in training: `y = x~ W~^T + bias` in float32, with `x~` the activation, rounded token by token.

    Data: `matrix` float32 `[N, K]`, the dequantized weight, straight-through. Static: as in `GroupWeight`.
    """

    matrix: Any
    activation_bits: int = dataclasses.field(metadata={"static": True})
    group: str | None = dataclasses.field(metadata={"static": True})
    level_clip: tuple[int, int] | None = dataclasses.field(metadata={"static": True})

    def products(
        self, x: Float[Array, "*batch k"], weights: Sequence[Any], biases: Sequence[Float[Array, " _"] | None]
    ) -> list[Float[Array, "*batch _"]]:
        """See `Trained`. The activation is quantized once."""
        *batch, k = x.shape
        rows = x.reshape(-1, k).astype(jnp.float32)
        if self.activation_bits != 16:
            codes, scale, zero = quantize_activations(jax.lax.stop_gradient(rows), self.activation_bits, self.level_clip)
            half = 2 ** (self.activation_bits - 1)
            rows = straight_through(rows, (codes.astype(jnp.float32) + half) * scale[:, None] + zero[:, None])
        results = []
        for weight, bias in zip(weights, biases, strict=True):
            y = product(rows, weight.matrix)
            if bias is not None:
                y = y + bias.astype(jnp.float32)
            results.append(y.astype(x.dtype).reshape(*batch, -1))
        return results
