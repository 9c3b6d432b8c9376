"""Which calls of attention the GPU kernels take, and the tiles they take them in."""

import dataclasses
import importlib.util
from typing import Any

import jax.numpy as jnp

from quikjax.pallas_kernels.devices import Device

# Tensor cores of these dtypes; float32 is multiplied exactly, which only few rows can afford.
_SHORT = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
_LARGEST_HEAD = 256
# Keys of a text are split over so many programs where a text's numbers may not depend on how many texts there are.
_FIXED_SPLITS = 4
_MOST_SPLITS = 16
# A program that reads fewer slots than this costs more than it saves.
_FEWEST_SLOTS = 256


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """One call of attention by what is static: `length` queries in each of `batch` texts, over `slots` keys.

    `heads` of `head` numbers share `kv_heads` keys; `dtype` is the queries', `kind` that of keys and values (int8: codes).
    `cached`: keys lie in a cache of all blocks, where a slot is a position. `alone`: a text's numbers may not depend on how many
    other texts or free slots there are.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head: int
    slots: int
    dtype: Any
    kind: Any
    cached: bool
    alone: bool = False

    @property
    def group(self) -> int:
        """Heads that share a key."""
        return self.heads // self.kv_heads

    @property
    def product_dtype(self) -> Any:
        """The dtype in which queries meet keys: the 16 bits that both have (codes are exact in any), else float32."""
        dtype, kind = jnp.dtype(self.dtype), jnp.dtype(self.kind)
        return dtype if dtype in _SHORT and kind in (dtype, jnp.dtype(jnp.int8)) else jnp.dtype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries (heads that share a key, times tokens) and keys of a program at a time, and programs that split a text's keys.

    `warps` and `stages` (keys being copied while others are multiplied) go to the compiler.
    """

    rows: int
    keys: int
    splits: int = 1
    warps: int = 4
    stages: int = 2


def why_not(problem: AttentionProblem, device: Device) -> str | None:
    """The reason why the kernels do not take a call, or `None`."""
    if device.platform != "gpu" or device.capability is None or device.capability < (8, 0):
        return f"attention kernels need an NVIDIA GPU of compute capability 8.0 or later, this is {device}"
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return "this version of JAX lowers no Pallas kernel through Triton"
    if not jnp.issubdtype(problem.dtype, jnp.floating) or jnp.dtype(problem.dtype).itemsize > 4:
        return f"queries are {jnp.dtype(problem.dtype)}; the kernels take float32, bfloat16 and float16"
    if problem.head > _LARGEST_HEAD:
        return f"heads of {problem.head} numbers do not fit the registers; {_LARGEST_HEAD} do"
    if not problem.cached and problem.product_dtype not in _SHORT:
        return f"{jnp.dtype(problem.dtype)} prompts are multiplied faster by XLA: tensor cores take bfloat16 and float16"
    if 0 in (problem.batch, problem.length, problem.slots):
        return "there is nothing to attend to"
    return None


def tiles(problem: AttentionProblem, device: Device) -> Tiles:
    """Reasoned tiles, not measured ones."""
    wide = problem.product_dtype not in _SHORT
    keys = 32 if wide or problem.head > 128 else 64
    rows = problem.group * problem.length
    # A tensor core takes 16 rows at least.
    tile = next((size for size in (16, 32) if rows <= size), 16 if wide else 64)
    if not problem.cached or (problem.alone and problem.length > 1 and not wide):
        # A text's numbers do not depend on how long the longest of several new texts is.
        tile = 64
    warps = 4
    if tile == 64 and not device.hopper and problem.head > 64:
        # Without Hopper's products, which read keys from shared memory, more would spill.
        keys, warps = 32, 8 if problem.head > 128 else 4
    if not problem.cached:
        return Tiles(tile, keys, warps=warps)
    if problem.alone:
        return Tiles(tile, keys, _FIXED_SPLITS, warps)
    programs, splits = problem.batch * problem.kv_heads * -(-rows // tile), 1
    while (
        2 * splits * programs <= (device.cores or 132) and problem.slots >= 2 * splits * _FEWEST_SLOTS and splits < _MOST_SPLITS
    ):
        splits *= 2
    return Tiles(tile, keys, splits, warps)
