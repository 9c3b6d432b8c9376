"""How the next token is drawn: pure functions from logits to logits, in the order and with the meaning of transformers' own.

    repetition penalty -> no repeated sequence -> least length -> forced tokens -> temperature -> top-k -> top-p -> min-p -> draw

A token that may not be drawn has the logit `-inf`. Every setting is an argument of the compiled program, so one program
draws with any settings; those that are off change nothing. No function sorts: that would take a CPU longer than reading a small
model, so the thresholds of top-k and top-p are found by bisection over the bits of a float.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32


class Values(NamedTuple):
    """The settings of `settings.Sampling` as scalars of a program."""

    temperature: Float32[Array | np.float32, ""]
    top_k: Int32[Array | np.int32, ""]
    top_p: Float32[Array | np.float32, ""]
    min_p: Float32[Array | np.float32, ""]
    repetition_penalty: Float32[Array | np.float32, ""]
    min_new_tokens: Int32[Array | np.int32, ""]


class Forced(NamedTuple):
    """Tokens that a model forces as scalars of a program: `first` where a text begins, and `last` as its token number `at`,
    the last that there is room for. -1 forces none.
    """

    first: Int32[Array | np.int32, ""]
    last: Int32[Array | np.int32, ""]
    at: Int32[Array | np.int32, ""]


Logits = Float32[Array, "batch vocab"]


def penalized(logits: Logits, seen: Bool[Array, "batch vocab"], penalty: Float32[Array | np.float32, ""]) -> Logits:
    """Logits of `seen` tokens divided by `penalty` where positive, multiplied where negative."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def without_repeated(logits: Logits, history: Int32[Array, "batch slots"], length: Int32[Array, " batch"], n: int) -> Logits:
    """Logits without tokens that would end a sequence of `n` tokens which the text, `history[:length]`, has already."""
    rows, slots = history.shape
    if n > slots:
        return logits
    behind = jnp.arange(n - 1) + (length[:, None] - (n - 1))
    last = jnp.take_along_axis(history, jnp.maximum(behind, 0), axis=1)
    starts = slots - n + 1
    # Where a sequence ends inside the text; a text of fewer than `n` tokens has none.
    same = jnp.arange(starts) + n - 1 < length[:, None]

    def also(i: Array, same: Bool[Array, "batch starts"]) -> Bool[Array, "batch starts"]:
        here = jax.lax.dynamic_slice_in_dim(history, i, starts, axis=1)
        return same & (here == jax.lax.dynamic_slice_in_dim(last, i, 1, axis=1))

    if n > 1:
        same = jax.lax.fori_loop(0, n - 1, also, same)
    vocabulary = logits.shape[-1]
    ends = jnp.where(same, history[:, n - 1 :], vocabulary)
    return logits.at[jnp.arange(rows)[:, None], ends].set(-jnp.inf, mode="drop")


def unended(
    logits: Logits, step: Int32[Array, " batch"], stops: Int32[Array, " stops"], least: Int32[Array | np.int32, ""]
) -> Logits:
    """Logits without stop tokens (padded with negative numbers) in rows to which fewer than `least` tokens were added."""
    return jnp.where(among(stops, logits.shape[-1]) & (step < least)[:, None], -jnp.inf, logits)


def among(stops: Int32[Array, " stops"], vocabulary: int) -> Bool[Array, " vocab"]:
    """Which tokens of a vocabulary are stops (padded with negative numbers)."""
    return jnp.zeros(vocabulary, bool).at[jnp.where(stops < 0, vocabulary, stops)].set(True, mode="drop")


def top_k(logits: Logits, k: Int32[Array | np.int32, ""]) -> Logits:
    """Only the `k` most likely tokens, and those as likely as the last of them; 0 keeps all."""
    wanted = jnp.where(k > 0, jnp.minimum(k, logits.shape[-1]), logits.shape[-1])
    ordered = _ordered(logits)
    threshold = _highest(lambda at: jnp.sum(ordered >= at[:, None], axis=-1, dtype=jnp.int32) >= wanted, logits.shape[0])
    return jnp.where(ordered >= threshold[:, None], logits, -jnp.inf)


def top_p(logits: Logits, p: Float32[Array | np.float32, ""]) -> Logits:
    """Only the fewest most likely tokens whose probabilities sum to at least `p`, and those as likely as the last one."""
    ordered = _ordered(logits)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    enough = p * _sums(weights)
    threshold = _highest(lambda at: _sums(jnp.where(ordered >= at[:, None], weights, 0.0)) >= enough, logits.shape[0])
    return jnp.where((ordered >= threshold[:, None]) | (p >= 1), logits, -jnp.inf)


def min_p(logits: Logits, share: Float32[Array | np.float32, ""]) -> Logits:
    """Only tokens whose probability is at least `share` of the highest; 0 keeps all."""
    return jnp.where(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)) >= share, logits, -jnp.inf)


def processed(logits: Logits, values: Values) -> Logits:
    """Temperature, top-k, top-p and min-p, in this order."""
    return min_p(top_p(top_k(logits / values.temperature, values.top_k), values.top_p), values.min_p)


def forced(logits: Logits, step: Int32[Array, " batch"], tokens: Forced) -> Logits:
    """Logits that leave only the forced token, where token number `step` of a row is one."""
    due = jnp.where(step == 0, tokens.first, -1)
    due = jnp.where((step == tokens.at) & (tokens.last >= 0), tokens.last, due)[:, None]
    only = jnp.where(jnp.arange(logits.shape[-1]) == due, 0.0, -jnp.inf)
    return jnp.where(due >= 0, only, logits)


def draw(logits: Logits, keys: Key[Array, " batch"]) -> Int32[Array, " batch"]:
    """One token a row from `softmax(logits)`, each row with its own key: it depends on nothing else in the batch."""
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(seeds: UInt32[Array | np.ndarray, " rows"], samples: Int32[Array | np.ndarray, " rows"]) -> Key[Array, " rows"]:
    """A key for each row from its seed, and from which of that seed's samples it is."""
    return jax.vmap(lambda seed, sample: jax.random.fold_in(jax.random.key(seed), sample))(seeds, samples)


def _ordered(logits: Logits) -> UInt32[Array, "batch vocab"]:
    """Unsigned integers in the order of the floats (a float's bits, the negative ones turned round)."""
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)  # -0 is 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _highest(holds: Callable[[UInt32[Array, " batch"]], Bool[Array, " batch"]], batch: int) -> UInt32[Array, " batch"]:
    """The highest integer of each row at which `holds`, which is true at 0 and once false stays so."""

    def halve(i: Array, found: UInt32[Array, " batch"]) -> UInt32[Array, " batch"]:
        tried = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(holds(tried), tried, found)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros((batch,), jnp.uint32))


def _sums(weights: Float32[Array, "batch vocab"]) -> Float32[Array, " batch"]:
    """Sums along the vocabulary, in 128 lanes first: a CPU adds those with vector instructions, and a single sum without."""
    batch, vocabulary = weights.shape
    padded = jnp.pad(weights, ((0, 0), (0, -vocabulary % 128)))
    return jnp.sum(jnp.sum(padded.reshape(batch, -1, 128), axis=1), axis=-1)
