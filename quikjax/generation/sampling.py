"""How the next token is drawn: pure functions from logits to logits, in the order and with the meaning of transformers' own.

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

A token that may not be drawn has the logit `-inf`. Every setting is an argument of the compiled program, so one program
draws with any settings; those that are off change nothing. No function sorts: that would take a CPU longer than reading a small
model, so the thresholds of top-k and top-p are found by bisection over the bits of a float.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Key, UInt32

from quikjax.errors import QuikError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens. The default is greedy: always the most likely one.

    `temperature` divides the logits, 0 is greedy. `top_k` keeps the most likely `k` tokens, 0 all. `top_p` keeps the fewest most
    likely tokens whose probabilities sum to at least `p` (arXiv 1904.09751), 1 all. `min_p` keeps tokens at least `min_p` times
    as likely as the most likely one (arXiv 2407.01082), 0 all. `repetition_penalty` divides positive logits of tokens that are
    already in the text by it and multiplies negative ones (arXiv 1909.05858), 1 leaves them.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            QuikError: naming the setting and what it may be.
        """
        if not (0 <= self.temperature < math.inf):
            raise QuikError(f"the temperature is 0 (the most likely token, always) or more, not {self.temperature:g}")
        if self.top_k < 0:
            raise QuikError(f"top-k keeps that many tokens, 0 for all of them, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise QuikError(f"top-p is a probability above 0 and up to 1, not {self.top_p:g}")
        if not 0 <= self.min_p <= 1:
            raise QuikError(f"min-p is a share of the highest probability, from 0 to 1, not {self.min_p:g}")
        if not 0 < self.repetition_penalty < math.inf:
            raise QuikError(f"the repetition penalty is above 0, 1 for none, not {self.repetition_penalty:g}")
        if self.greedy and (self.top_k or self.top_p < 1 or self.min_p):
            raise QuikError("top-k, top-p and min-p choose among tokens to draw; give a temperature above 0 as well")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def values(self) -> "Values":
        """The settings as the arguments of a compiled program."""
        return Values(
            np.float32(1.0 if self.greedy else self.temperature),
            np.int32(self.top_k),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.float32(self.repetition_penalty),
        )


class Values(NamedTuple):
    """The settings of `Sampling` as scalars of a program."""

    temperature: Float32[Array | np.float32, ""]
    top_k: Int32[Array | np.int32, ""]
    top_p: Float32[Array | np.float32, ""]
    min_p: Float32[Array | np.float32, ""]
    repetition_penalty: Float32[Array | np.float32, ""]


Logits = Float32[Array, "batch vocab"]


def penalized(logits: Logits, seen: Bool[Array, "batch vocab"], penalty: Float32[Array | np.float32, ""]) -> Logits:
    """Logits of `seen` tokens divided by `penalty` where positive, multiplied where negative."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


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
