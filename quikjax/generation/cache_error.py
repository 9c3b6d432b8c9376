"""How far a narrow KV cache moves what a model says, measured on a text."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from quikjax.errors import QuikError
from quikjax.generation.generator import Generator
from quikjax.generation.rows import padded
from quikjax.models import cache as caches
from quikjax.models import stacked
from quikjax.models.cache import Fresh, StackedCache

# The kind that loses nothing; what the others cost is measured against it.
EXACT = "float32"
DECODED = 32  # tokens


class CacheError(NamedTuple):
    """The error of a cache of a kind, against one in float32.

    `keys` and `values`: `||x - x_cached|| / ||x||` over all blocks of the text. `kl`: mean `KL(float32 cache || this one)` of the
    next token, in nats, over `tokens` tokens that are decoded behind it.
    """

    keys: float
    values: float
    kl: float
    tokens: int


def cache_error(generator: Generator, ids: np.ndarray, decoded: int = DECODED) -> CacheError:
    """Read `ids` `[tokens]` but for the last `decoded` of them, then decode those with both caches.

    Raises:
        QuikError: the text is shorter than that, or exceeds the context.
    """
    if not decoded < len(ids) <= generator.context:
        raise QuikError(f"{decoded + 1} to {generator.context} tokens are needed to measure a cache's error, not {len(ids)}")
    prompt, rest = ids[:-decoded], ids[-decoded:]
    slots = generator.slots(len(ids))
    exact, exact_read = _read(generator, EXACT, prompt, slots)
    narrow, narrow_read = _read(generator, generator.cache, prompt, slots)
    key_error, value_error = (
        float(x) for x in generator.programs.run(_relative, (), (exact_read, narrow_read, np.int32(len(prompt))))
    )
    total = 0.0
    for i, token in enumerate(rest):
        given = (np.array([[token]], np.int32), np.array([len(prompt) + i], np.int32), np.array([1], np.int32))
        theirs, exact = _extended(generator, given, exact)
        mine, narrow = _extended(generator, given, narrow)
        total += float(generator.programs.run(_kl, (), (theirs, mine)))
    return CacheError(key_error, value_error, total / decoded, decoded)


def _read(generator: Generator, kind: str, prompt: np.ndarray, slots: int) -> tuple[StackedCache, Fresh]:
    config = generator.config
    ids, lengths = padded([prompt.tolist()])
    _, fresh = generator.programs.run(stacked.read, (generator.layout,), (generator.params, ids, lengths), named={"kind": kind})
    shape = (config.layers, config.kv_heads, 1, max(slots, ids.shape[1]), config.head_size, kind, generator.key_block)
    return caches.insert(caches.empty_cache(*shape), fresh, jnp.int32(0)), fresh


def _extended(generator: Generator, given: Any, cache: StackedCache) -> tuple[Array, StackedCache]:
    found: tuple[Array, StackedCache] = generator.programs.run(
        stacked.extend, (generator.layout,), (generator.params, *given, cache), donate=(4,)
    )
    return found


def _relative(exact: Fresh, narrow: Fresh, length: Any) -> tuple[Array, Array]:
    real = jnp.arange(exact.keys.shape[3]) < length

    def error(x: Array, stored: Array, scale: Array | None) -> Array:
        wide = stored.astype(jnp.float32)
        off = x - (wide if scale is None else wide * scale[..., None])
        masked = jnp.where(real[:, None], jnp.stack([off, x]), 0)
        return jnp.linalg.norm(masked[0].ravel()) / jnp.linalg.norm(masked[1].ravel())

    return error(exact.keys, narrow.keys, narrow.key_scale), error(exact.values, narrow.values, narrow.value_scale)


def _kl(exact: Float[Array, "1 vocab"], narrow: Float[Array, "1 vocab"]) -> Float[Array, ""]:
    theirs, mine = jax.nn.log_softmax(exact), jax.nn.log_softmax(narrow)
    return jnp.sum(jnp.exp(theirs) * (theirs - mine))
