"""Arrays in host memory that JAX on a CPU takes as they are: where models of gigabytes are loaded, copying them costs seconds."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# XLA's alignment on a CPU: memory that is not so aligned is copied.
_ALIGNMENT = 64


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory for an array `shape` of `dtype`, aligned so that `adopt` need not copy it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def adopt(array: np.ndarray) -> jax.Array:
    """`array` on JAX's default device; on a CPU without a copy where it is aligned. Nobody may write to it afterwards."""
    if jax.default_backend() != "cpu":
        return jnp.asarray(array)
    return jax.device_put(array, may_alias=True)
