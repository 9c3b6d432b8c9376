"""Generation under `jit`: one executable reads the prompt, one runs the whole decoding loop."""

import dataclasses
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from quikjax.errors import QuikError
from quikjax.models.base import Cache, CausalLM
from quikjax.weights.tiled import put_on_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The tokens that `generate` added, and how fast it added them.

    `tokens` int32 `[batch, new]`: the continuation of each row, from `lengths[row]` on filled with stop tokens (which are
    not counted). Seconds of `prefill` and `decode` are of running alone; `compile` is apart.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens read per second, over the whole batch."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens decoded per second, over the whole batch; 0 where the prefill gave the only one."""
        decoded = int(self.tokens.shape[0] * max(self.steps - 1, 0))
        return decoded / self.decode_seconds if decoded else 0.0

    @property
    def steps(self) -> int:
        """Tokens generated before every row had stopped."""
        return int(min(self.lengths.max(initial=0) + 1, self.tokens.shape[1]))


def generate(
    graphdef: nnx.GraphDef[CausalLM],
    params: Mapping[str, Any],
    ids: Int[Any, "batch length"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    stop: SupportsIndex | Iterable[Any] | None = None,
) -> Generation:
    """Continue prompts greedily: the most likely token, again and again.

    Args:
        graphdef: `nnx.split(model)[0]`.
        params: nested dictionaries, dense or with packed weights.
        ids: prompts of equal length.
        max_new_tokens: how many tokens to add at most.
        stop: a row ends before this token, or before any of several; with all rows ended, decoding ends. Left out, they are the
            model's own (`model.stops`); empty, no row ends early.

    Raises:
        QuikError: a prompt is empty, has a token outside the vocabulary, or does not fit the context with what is asked for.
    """
    params = put_on_device(params)
    model = nnx.merge(graphdef, params)
    prompt = np.asarray(ids, np.int32)
    _check(model, prompt, max_new_tokens)
    stops = _stops(model, stop)
    capacity = prompt.shape[1] + max_new_tokens
    batch = prompt.shape[0]

    start = time.perf_counter()
    prefill = _prefill.lower(graphdef, params, prompt, capacity).compile()
    shapes = jax.eval_shape(partial(_prefill, graphdef, capacity=capacity), params, prompt)
    decode = _decode.lower(graphdef, params, *shapes, stops, max_new_tokens).compile()
    compiled = time.perf_counter()
    first, cache = jax.block_until_ready(prefill(params, prompt))
    read = time.perf_counter()
    tokens, lengths, _ = jax.block_until_ready(decode(params, first, cache, stops))
    done = time.perf_counter()
    return Generation(
        tokens=np.asarray(tokens),
        lengths=np.asarray(lengths),
        prompt_tokens=batch * prompt.shape[1],
        prefill_seconds=read - compiled,
        decode_seconds=done - read,
        compile_seconds=compiled - start,
    )


def _check(model: CausalLM, prompt: np.ndarray, max_new_tokens: int) -> None:
    config = model.config
    if prompt.ndim != 2 or prompt.size == 0:
        raise QuikError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise QuikError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if prompt.min() < 0 or prompt.max() >= config.vocab_size:
        raise QuikError(f"the prompt has a token outside the model's vocabulary of {config.vocab_size}")
    if prompt.shape[1] + max_new_tokens > config.context_length:
        raise QuikError(
            f"a prompt of {prompt.shape[1]} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{config.context_length}; shorten one of them"
        )


def _stops(model: CausalLM, stop: SupportsIndex | Iterable[Any] | None) -> Int32[np.ndarray, " stops"]:
    """The tokens that end a row, as an array."""
    several = model.stops if stop is None else stop if isinstance(stop, Iterable) else [stop]
    try:
        return np.asarray(sorted({operator.index(token) for token in several}), np.int32)
    except TypeError:
        raise QuikError(f"stop is {stop!r}; give a token's number, or several of them") from None


def _any_of(tokens: Int32[Array, "*batch"], stops: Int32[Array, " stops"]) -> Bool[Array, "*batch"]:
    return (tokens[..., None] == stops).any(-1)


@partial(jax.jit, static_argnums=(0, 3))
def _prefill(
    graphdef: nnx.GraphDef[CausalLM], params: Mapping[str, Any], ids: Int[Array, "batch length"], capacity: int
) -> tuple[Int32[Array, " batch"], Cache]:
    logits, cache = nnx.merge(graphdef, params).prefill(ids, capacity)
    return _choose(logits), cache


@partial(jax.jit, static_argnums=(0, 5), donate_argnums=(3,))
def _decode(
    graphdef: nnx.GraphDef[CausalLM],
    params: Mapping[str, Any],
    first: Int32[Array, " batch"],
    cache: Cache,
    stops: Int32[Array, " stops"],
    count: int,
) -> tuple[Int32[Array, "batch count"], Int32[Array, " batch"], Cache]:
    """From the prompt's successor on: `count` tokens, fewer if all rows stop.

    The cache is donated, carried, and returned only so that its memory is used again.
    """
    model = nnx.merge(graphdef, params)
    batch = first.shape[0]
    filling = stops[0] if stops.size else jnp.int32(0)
    tokens = jnp.full((batch, count), filling, jnp.int32).at[:, 0].set(first)
    position = jnp.max(cache.positions, axis=1, keepdims=True) + 1

    def alive(state: tuple[Array, Array, Array, Cache]) -> Array:
        step, _tokens, running, _ = state
        return (step < count) & running.any()

    def advance(state: tuple[Array, Array, Array, Cache]) -> tuple[Array, Array, Array, Cache]:
        step, tokens, running, cache = state
        last = jax.lax.dynamic_slice(tokens, (0, step - 1), (batch, 1))
        logits, cache = model.extend(last, position + step - 1, cache)
        chosen = jnp.where(running, _choose(logits[:, 0]), filling)
        tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (0, step))
        return step + 1, tokens, running & ~_any_of(chosen, stops), cache

    _, tokens, _, cache = jax.lax.while_loop(alive, advance, (jnp.int32(1), tokens, ~_any_of(first, stops), cache))
    ended = _any_of(tokens, stops)
    return tokens, jnp.where(ended.any(axis=1), jnp.argmax(ended, axis=1), count).astype(jnp.int32), cache


def _choose(logits: Float[Array, "batch vocab"]) -> Int32[Array, " batch"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
