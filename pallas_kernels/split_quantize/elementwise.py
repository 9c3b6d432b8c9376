"""Producers that take a column alone (gates, activations), in operations that Mosaic lowers and PTX has: no `erf`, no `tanh`.

`exp` and the division are the device's, a unit in the last place off now and then: codes behind these are promised within a step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.pallas_kernels.split_quantize.producers import Gelu, Producer, Relu, SiluMul

# `log(Phi(x) / Phi(-x)) / x` by powers of `x^2` up to `_FARTHEST^2`: for GELU by tanh it is such a polynomial, for the exact one
# a least-squares fit, weighted so that the largest error of GELU is the least.
_BY_TANH = (2 * (2 / np.pi) ** 0.5, 2 * (2 / np.pi) ** 0.5 * 0.044715)
_EXACT = (1.5957653, 7.2674601e-2, -6.9778594e-5, -1.0961295e-4, 7.8379078e-6, -2.6156659e-7, 3.5075873e-9)
_FARTHEST = 5.5


def elementwise(producer: Producer, inputs: list[jax.Array]) -> jax.Array:
    """The producer's result in float32, of its inputs in float32; of a norm, which takes more than a column, its input."""
    match producer:
        case SiluMul():
            gate, up = inputs
            return silu(gate) * up
        case Gelu(approximate):
            return gelu(inputs[0], approximate)
        case Relu():
            return jnp.maximum(inputs[0], np.float32(0))
    return inputs[0]


def silu(x: jax.Array) -> jax.Array:
    """`x / (1 + exp(-x))`."""
    return x / (np.float32(1) + jnp.exp(-x))


def gelu(x: jax.Array, approximate: bool) -> jax.Array:
    """`x / (1 + exp(-x P(x^2)))`, `P` a polynomial.

    Within 6e-7 of GELU, and above -3 within a part in 50 000 of its value. The tail below -5.5, where GELU is less than 1.1e-7,
    goes to 0 at a pace of its own.
    """
    square = jnp.minimum(x * x, np.float32(_FARTHEST**2))
    *lower, slope = [np.float32(c) for c in (_BY_TANH if approximate else _EXACT)]
    polynomial = slope * square
    for coefficient in reversed(lower[1:]):
        polynomial = (polynomial + coefficient) * square
    return x / (np.float32(1) + jnp.exp(-x * (polynomial + lower[0])))
