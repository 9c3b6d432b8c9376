"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout that Hugging Face publishes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `theta^(-2i/size)` for pair `i` of a head of `size`."""

    theta: float = 10000.0

    def frequencies(self, size: int) -> np.ndarray:
        """Radians per position, float32 `[size / 2]`."""
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        return (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)


def rotate(
    x: Float[Array, "batch length heads head"], positions: Int32[Array, "batch length"], rope: Rope
) -> Float[Array, "batch length heads head"]:
    """Rotate each pair `(x[i], x[i + head/2])` by `position * frequency[i]`, computed in float32."""
    half = x.shape[-1] // 2
    angles: Float32[Array, "batch length half"] = positions[..., None].astype(jnp.float32) * rope.frequencies(x.shape[-1])
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
