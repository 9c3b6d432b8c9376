"""The memory of this process's device, and what a cache of keys and values takes of it. Counted, not measured."""

import os

import jax

from quikjax.models import cache
from quikjax.models.base import Config


def cache_bytes(config: Config, itemsize: int, batch: int, length: int) -> int:
    """Keys and values of all blocks that keep them: `2 layers batch length kv_heads head d`."""
    return 2 * config.cached_layers * batch * length * config.kv_heads * config.head_size * itemsize


def most_slots(config: Config, kind: str, batch: int, free: int) -> int:
    """How many tokens each of `batch` rows may have for a cache of `kind` to take at most `free` bytes; 0 if none."""
    one = cache.cache_bytes(config.layers, config.kv_heads, batch, 1, config.head_size, kind)
    return max(free, 0) // one


def device_memory() -> int:
    """Bytes that the default device of this process can hold: what it says of itself, or physical memory."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit") or physical_memory())


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
