"""Operations that may stand directly before a split and be fused into it, with their definitions in plain `jnp`.

A producer computes in float32 and rounds once, to its input's dtype; the split reads that rounded value.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Producer:
    """Base of the producers. `inputs`: how many tensors `[..., K]` it reads; `parameters`: how many vectors `[K]`.

    `exact`: kernels that compute it give the bits of its definition. Others divide or add as the device does.
    """

    @property
    def inputs(self) -> int:
        return 1

    @property
    def parameters(self) -> int:
        return 0

    @property
    def exact(self) -> bool:
        return False

    def __call__(self, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        """The definition: inputs, then parameters, to the tensor that is split."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Identity(Producer):
    """Nothing stands before the split."""

    @property
    def exact(self) -> bool:
        return True

    def __call__(self, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        (x,) = arrays
        return x


@dataclasses.dataclass(frozen=True)
class RmsNorm(Producer):
    """`x * rsqrt(mean(x^2) + epsilon) * weight`."""

    epsilon: float = 1e-5

    @property
    def parameters(self) -> int:
        return 1

    def __call__(self, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        x, weight = arrays
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * inverse * weight.astype(jnp.float32)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class LayerNorm(Producer):
    """`(x - mean(x)) * rsqrt(var(x) + epsilon) * weight + bias`, the variance in two passes."""

    epsilon: float = 1e-5

    @property
    def parameters(self) -> int:
        return 2

    def __call__(self, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        x, weight, bias = arrays
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        return (centred * inverse * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class SiluMul(Producer):
    """`silu(gate) * up`, `silu(x) = x / (1 + exp(-x))`: the input of a gated MLP's last layer."""

    @property
    def inputs(self) -> int:
        return 2

    def __call__(self, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        gate, up = arrays
        wide = gate.astype(jnp.float32)
        return (wide / (1 + jnp.exp(-wide)) * up.astype(jnp.float32)).astype(gate.dtype)


@dataclasses.dataclass(frozen=True)
class Gelu(Producer):
    """`x Phi(x)`, `Phi` being the normal distribution's function (arXiv 1606.08415); `approximate`: as a tanh gives it."""

    approximate: bool = False

    def __call__(self, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        (x,) = arrays
        return jax.nn.gelu(x.astype(jnp.float32), approximate=self.approximate).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Relu(Producer):
    """`max(x, 0)`."""

    @property
    def exact(self) -> bool:
        return True

    def __call__(self, *arrays: Float[Array, "..."]) -> Float[Array, "..."]:
        (x,) = arrays
        return jax.nn.relu(x)
