"""Arrays in host memory that JAX on a CPU takes as they are: where models of gigabytes are loaded, copying them costs seconds.

Matrices of a model's blocks that are alike lie in one memory (`empty_parts`), so that the array of all of them, which a scan
over the blocks reads, is there already (`joined`). Memory that was never used costs more than what is written to it: the system
clears it first.
"""

import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# XLA's alignment on a CPU: memory that is not so aligned is copied.
_ALIGNMENT = 64
# From this many bytes on NumPy asks the system for huge pages. Where it has none at hand, to make them takes several times as
# long as to clear small ones; generating was measured to be as fast from these.
_MAPPED = 1 << 22

# The memory that parts of `empty_parts` are in, by the address of each, for as long as anybody uses one of them.
_HOMES: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory for an array `shape` of `dtype`, aligned so that `adopt` need not copy it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size >= _MAPPED and hasattr(mmap, "MAP_PRIVATE"):  # Windows has no such maps
        mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(mapped, np.uint8).view(dtype).reshape(shape)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def adopt(array: np.ndarray) -> jax.Array:
    """`array` on JAX's default device; on a CPU without a copy where it is aligned. Nobody may write to it afterwards."""
    if jax.default_backend() != "cpu":
        return jnp.asarray(array)
    return jax.device_put(array, may_alias=True)


def empty_parts(count: int, shape: tuple[int, ...], dtype: Any) -> list[np.ndarray]:
    """Memory for `count` arrays that are alike, one behind the other: what `adopt` makes of them, `joined` joins without a copy.

    It is freed when the last of them is.
    """
    memory = empty((count, *shape), dtype)
    if memory[0].nbytes % _ALIGNMENT == 0:
        # A view holds the array that owns its memory, not the view that it was made of.
        home = memory.base
        assert home is not None
        _HOMES.update((part.ctypes.data, home) for part in memory)
    return list(memory)


def joined(parts: Sequence[jax.Array]) -> jax.Array | None:
    """One array `[len(parts), ...]` of arrays on a CPU that are alike and lie one behind the other; `None` where they do not."""
    first, size = parts[0].unsafe_buffer_pointer(), parts[0].nbytes
    home = _HOMES.get(first)
    if home is None or any(part.unsafe_buffer_pointer() != first + i * size for i, part in enumerate(parts)):
        return None
    begin = first - home.ctypes.data
    if begin + len(parts) * size > home.nbytes:
        return None  # the next memory happens to begin where this one ends
    return adopt(home[begin : begin + len(parts) * size].view(parts[0].dtype).reshape(len(parts), *parts[0].shape))


def is_here(array: Any) -> bool:
    """Whether an array is where NumPy can read it without a copy: on one CPU device, and not of a program being traced."""
    return (
        jax.default_backend() == "cpu"
        and isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and array.ndim > 0
        and len(array.devices()) == 1
    )
