"""The compiled programs of generation: read prompts, choose a token, decode up to `CHUNK` tokens. Pure functions of arrays.

One program reads all prompts of a length bucket, one decodes: a chunk of steps, ended early when every row has stopped. Streaming
and generating at once run the same chunks. Rows are padded on the right and stand in their own slots of the cache, so that a row
does not know what is beside it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Key

from quikjax.generation import sampling
from quikjax.generation.sampling import Forced, Values
from quikjax.generation.settings import Sampling
from quikjax.models import stacked
from quikjax.models.cache import Fresh, StackedCache, insert
from quikjax.models.stacked import Layout

CHUNK = 16
NOTHING = -1  # stands where a row that has stopped gets no token
# Data fields hold arrays, but also whatever a tree map puts there.
Leaf = Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """Choices compiled into a program: whether tokens are drawn, repetitions penalized, log-probabilities returned, sequences of
    how many tokens may not be repeated (0: any may), and whether there is a least length.
    """

    sampled: bool = False
    penalized: bool = False
    logprobs: bool = False
    ngram: int = 0
    least: bool = False

    @classmethod
    def of(cls, sampling: Sampling, logprobs: bool = False) -> "Kind":
        """The program that these settings need."""
        return cls(
            sampled=not sampling.greedy,
            penalized=sampling.repetition_penalty != 1,
            logprobs=logprobs,
            ngram=int(sampling.no_repeat_ngram),
            least=sampling.min_new_tokens > 0,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """The texts so far, as far as a program asks for them: `seen` bool `[batch, vocab]`, which tokens (`None` without a
    penalty), and `history` int32 `[batch, slots]`, the token at each position (`None` where sequences may be repeated).
    """

    seen: Leaf = None
    history: Leaf = None

    def with_(self, tokens: Int32[Array, " batch"], at: Int32[Array, " batch"], running: Bool[Array, " batch"]) -> "Past":
        """With a token at position `at` of each row that is `running`."""
        rows, seen, history = jnp.arange(tokens.shape[0]), self.seen, self.history
        if seen is not None:
            seen = seen.at[rows, tokens].set(seen[rows, tokens] | running)
        if history is not None:
            history = history.at[rows, jnp.where(running, at, history.shape[1])].set(tokens, mode="drop")
        return Past(seen=seen, history=history)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Decoding's state, one entry a row: the cache; `last`, the token chosen last, not yet read; `at`, the position where
    it will stand; `running`; `step`, how many tokens were chosen; `keys`, a PRNG key; `past`, what its text has; and for all rows
    `forced`, a `sampling.Forced` (`None` of a model that forces nothing).
    """

    cache: StackedCache
    last: Leaf
    at: Leaf
    running: Leaf
    step: Leaf
    keys: Leaf
    past: Past = dataclasses.field(default_factory=Past)
    forced: Leaf = None


def allowed(
    logits: Float32[Array, "batch vocab"],
    step: Int32[Array, " batch"],
    length: Int32[Array, " batch"],
    past: Past,
    stops: Int32[Array, " stops"],
    values: Values,
    kind: Kind,
    forced: Forced | None = None,
) -> Float32[Array, "batch vocab"]:
    """Logits of token number `step` of each row, whose text has `length` tokens: repetitions penalized, and `-inf` where a token
    may not be.
    """
    if kind.penalized:
        logits = sampling.penalized(logits, past.seen, values.repetition_penalty)
    if kind.ngram:
        logits = sampling.without_repeated(logits, past.history, length, kind.ngram)
    if kind.least:
        logits = sampling.unended(logits, step, stops, values.min_new_tokens)
    return logits if forced is None else sampling.forced(logits, step, forced)


def choose(
    logits: Float32[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    step: Int32[Array, " batch"],
    length: Int32[Array, " batch"],
    past: Past,
    stops: Int32[Array, " stops"],
    values: Values,
    kind: Kind,
    forced: Forced | None = None,
) -> tuple[Int32[Array, " batch"], Float32[Array, " batch"] | None]:
    """The next token of each row, and on request its log-probability under the model's own distribution, before any setting.

    Token number `step` of a row is drawn with the row's key folded with `step`.
    """
    given = logits
    logits = allowed(logits, step, length, past, stops, values, kind, forced)
    if kind.sampled:
        chosen = sampling.draw(sampling.processed(logits, values), jax.vmap(jax.random.fold_in)(keys, step))
    else:
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not kind.logprobs:
        return chosen, None
    taken = jnp.take_along_axis(given, chosen[:, None], axis=1)[:, 0]
    return chosen, taken - jax.nn.logsumexp(given, axis=-1)


def is_stop(tokens: Int32[Array, " batch"], stops: Int32[Array, " stops"]) -> Bool[Array, " batch"]:
    """Which tokens are among `stops` (padded with `NOTHING`)."""
    return (tokens[:, None] == stops).any(axis=1)


def place(
    cache: StackedCache, logits: jax.Array, fresh: Fresh, given: jax.Array, row: jax.Array
) -> tuple[StackedCache, jax.Array]:
    """A cache and logits `[batch, vocab]` with those of some prompts put into the rows from `row` on."""
    return insert(cache, fresh, row), jax.lax.dynamic_update_slice(logits, given, (row, 0))


def begin(
    logits: Float32[Array, "batch vocab"],
    cache: StackedCache,
    lengths: Int32[Array, " batch"],
    running: Bool[Array, " batch"],
    keys: Key[Array, " batch"],
    past: Past,
    stops: Int32[Array, " stops"],
    values: Values,
    forced: Forced | None,
    kind: Kind,
) -> tuple[Int32[Array, "batch 1"], Float32[Array, "batch 1"] | None, State]:
    """The first token of each row from the logits behind its prompt, and the state that `chunk` goes on with."""
    step = jnp.zeros_like(lengths)
    chosen, logprob = choose(logits, keys, step, lengths, past, stops, values, kind, forced)
    tokens = jnp.where(running, chosen, NOTHING)[:, None]
    state = State(
        cache=cache,
        last=chosen,
        at=lengths,
        running=running & ~is_stop(chosen, stops),
        step=step + 1,
        keys=keys,
        past=past.with_(chosen, lengths, running),
        forced=forced,
    )
    return tokens, None if logprob is None else logprob[:, None], state


def chunk(
    layout: Layout,
    params: Mapping[str, Any],
    state: State,
    stops: Int32[Array, " stops"],
    values: Values,
    limit: Int32[Array, ""],
    kind: Kind,
) -> tuple[Int32[Array, "batch chunk"], Float32[Array, "batch chunk"] | None, State]:
    """Up to `limit` (at most `CHUNK`) further tokens of each row, fewer when all rows have stopped.

    A row's stop token is among its tokens; what follows it is `NOTHING`.
    """
    batch = state.last.shape[0]
    tokens = jnp.full((batch, CHUNK), NOTHING, jnp.int32)
    logprobs = jnp.zeros((batch, CHUNK), jnp.float32) if kind.logprobs else None
    one = jnp.ones((batch,), jnp.int32)

    def alive(carry: Any) -> Array:
        done, _, _, state = carry
        return (done < limit) & state.running.any()

    def advance(carry: Any) -> Any:
        done, tokens, logprobs, state = carry
        logits, cache = stacked.extend(layout, params, state.last[:, None], state.at, one, state.cache)
        length = state.at + 1
        chosen, logprob = choose(logits, state.keys, state.step, length, state.past, stops, values, kind, state.forced)
        running = state.running
        here = (jnp.int32(0), done)
        tokens = jax.lax.dynamic_update_slice(tokens, jnp.where(running, chosen, NOTHING)[:, None], here)
        if logprobs is not None and logprob is not None:
            logprobs = jax.lax.dynamic_update_slice(logprobs, logprob[:, None], here)
        after = State(
            cache=cache,
            # A row that has stopped stays where it is, and writes the same slot again and again.
            last=jnp.where(running, chosen, state.last),
            at=state.at + running,
            running=running & ~is_stop(chosen, stops),
            step=state.step + running,
            keys=state.keys,
            past=state.past.with_(chosen, length, running),
            forced=state.forced,
        )
        return done + 1, tokens, logprobs, after

    _, tokens, logprobs, state = jax.lax.while_loop(alive, advance, (jnp.int32(0), tokens, logprobs, state))
    return tokens, logprobs, state
