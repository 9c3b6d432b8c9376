"""Beam search as compiled programs: of each text the most likely continuations, side by side. Pure functions of arrays.

Rows of the cache are the beams, those of one text next to each other. In every step all continuations by one token of all
beams of a text compete; the best that do not end go on, and the cache's rows follow them. What ends is kept apart, by its score.
The rules of what competes, and of when a search ends, are transformers' (`GenerationMixin._beam_search`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from quikjax.generation.decode import CHUNK, Kind, Past, allowed, is_stop
from quikjax.generation.programs import Programs
from quikjax.generation.sampling import Forced, Values, among
from quikjax.generation.settings import Beams
from quikjax.models import stacked
from quikjax.models.cache import StackedCache, repeat_rows, take_rows
from quikjax.models.stacked import Layout

# The sum of a beam that is none yet: in place of -inf, which could not be told apart from a token that may not be.
NEVER = np.float32(-1e9)
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuations:
    """Some continuations of each text: `tokens` int32 `[texts, beams, room]`, `lengths` int32 and `scores` float32 `[texts,
    beams]`, best first. A score is a sum of log-probabilities; of what has ended, over its length to the power of the penalty.
    """

    tokens: Leaf
    lengths: Leaf
    scores: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """The state of a search: the cache; `last`, each beam's newest token, not yet read; `at`, the position where it will stand;
    `past`, what each beam's text has; `going`, the continuations that go on, and `ended`, those that do not; `open`, bool
    `[texts]`; `step`, how many tokens were chosen; and `forced`, a `sampling.Forced` or `None`.
    """

    cache: StackedCache
    last: Leaf
    at: Leaf
    past: Past
    going: Continuations
    ended: Continuations
    open: Leaf
    step: Leaf
    forced: Leaf = None


def begin(
    logits: Float32[Array, "texts vocab"],
    cache: StackedCache,
    lengths: Int32[Array, " texts"],
    real: Bool[Array, " texts"],
    past: Past,
    stops: Int32[Array, " stops"],
    values: Values,
    forced: Forced | None,
    limit: Int32[Array, ""],
    kind: Kind,
    beams: Beams,
    room: int,
) -> Search:
    """The first token of each beam, from the logits behind each text; there is `room` for more tokens than `limit` asks for."""
    texts = lengths.shape[0]

    def each(x: Array) -> Array:
        return jnp.repeat(x, beams.count, axis=0)

    # All beams of a text are alike, and only the first one competes.
    sums = jnp.broadcast_to(jnp.where(jnp.arange(beams.count) == 0, jnp.float32(0), NEVER), (texts, beams.count))
    nothing = Continuations(
        tokens=jnp.zeros((texts, beams.count, room), jnp.int32),
        lengths=jnp.zeros((texts, beams.count), jnp.int32),
        scores=sums,
    )
    search = Search(
        cache=repeat_rows(cache, beams.count),
        last=jnp.zeros(texts * beams.count, jnp.int32),
        at=each(lengths) - 1,
        past=jax.tree.map(each, past),
        going=nothing,
        ended=dataclasses.replace(nothing, scores=jnp.full_like(sums, -jnp.inf)),
        open=real,
        step=jnp.int32(0),
        forced=forced,
    )
    return advanced(search, each(logits), stops, values, limit, kind, beams)


def chunk(
    layout: Layout,
    params: Mapping[str, Any],
    search: Search,
    stops: Int32[Array, " stops"],
    values: Values,
    limit: Int32[Array, ""],
    kind: Kind,
    beams: Beams,
) -> Search:
    """Up to `CHUNK` further steps, as long as a text is open and `limit` tokens are not reached."""
    end = jnp.minimum(search.step + CHUNK, limit)
    one = jnp.ones_like(search.last)

    def alive(search: Search) -> Array:
        return (search.step < end) & search.open.any()

    def advance(search: Search) -> Search:
        logits, cache = stacked.extend(layout, params, search.last[:, None], search.at, one, search.cache)
        return advanced(dataclasses.replace(search, cache=cache), logits, stops, values, limit, kind, beams)

    return jax.lax.while_loop(alive, advance, search)


def advanced(
    search: Search,
    logits: Float32[Array, "rows vocab"],
    stops: Int32[Array, " stops"],
    values: Values,
    limit: Int32[Array, ""],
    kind: Kind,
    beams: Beams,
) -> Search:
    """The search one token further, by the logits behind each beam."""
    count, (rows, vocabulary) = beams.count, logits.shape
    texts, length = rows // count, search.at + 1
    steps = jnp.broadcast_to(search.step, (rows,))
    chances = allowed(jax.nn.log_softmax(logits), steps, length, search.past, stops, values, kind, search.forced)
    sums = (chances.reshape(texts, count, vocabulary) + search.going.scores[..., None]).reshape(texts, -1)
    last_step = search.step + 1 == limit

    # What ends, among the best: a stop token, or no room for more.
    best, where = jax.lax.top_k(sums, count)
    token = (where % vocabulary).astype(jnp.int32)
    ends = (is_stop(token.reshape(-1), stops).reshape(texts, count) | last_step) & search.open[:, None] & (best > NEVER / 2)
    ended = _best(
        search.ended,
        dataclasses.replace(
            _longer(search.going, where // vocabulary, token, search.step),
            scores=jnp.where(ends, best / _power(search.step + 1, beams.length_penalty), -jnp.inf),
        ),
    )

    # What goes on: the best that are no stop tokens.
    best, where = jax.lax.top_k(jnp.where(jnp.tile(among(stops, vocabulary), count), 2 * NEVER, sums), count)
    beam, token = where // vocabulary, (where % vocabulary).astype(jnp.int32)
    going = dataclasses.replace(_longer(search.going, beam, token, search.step), scores=best)
    came_from = (jnp.arange(texts)[:, None] * count + beam).reshape(-1)
    past = jax.tree.map(lambda x: x[came_from], search.past)

    hoped = limit if beams.early_stopping == "never" and beams.length_penalty > 0 else search.step + 1
    full = (ended.lengths > 0).all(axis=1)
    worst = jnp.where(full, ended.scores.min(axis=1), -jnp.inf)
    # Not the first of them: XLA would take a slice of what `top_k` gives for one of a whole sort, and sort all candidates.
    better = going.scores.max(axis=1) / _power(hoped, beams.length_penalty) > worst
    still = search.open & better & ~last_step & ~(full if beams.early_stopping is True else False)
    return Search(
        cache=take_rows(search.cache, came_from),
        last=token.reshape(-1),
        at=length,
        past=past.with_(token.reshape(-1), length, jnp.ones(rows, bool)),
        going=going,
        ended=ended,
        open=still,
        step=search.step + 1,
        forced=search.forced,
    )


def _power(length: Int32[Array, ""], penalty: float) -> Float32[Array, ""]:
    return length.astype(jnp.float32) ** jnp.float32(penalty)


def _longer(
    given: Continuations, beam: Int32[Array, "texts beams"], token: Int32[Array, "texts beams"], step: Int32[Array, ""]
) -> Continuations:
    """Continuations of these beams by one more token; the scores are to be set."""
    tokens = jnp.take_along_axis(given.tokens, beam[..., None], axis=1)
    tokens = jax.lax.dynamic_update_slice(tokens, token[..., None], (jnp.int32(0), jnp.int32(0), step))
    return Continuations(tokens=tokens, lengths=jnp.full_like(token, step + 1), scores=given.scores)


def _best(kept: Continuations, new: Continuations) -> Continuations:
    """The best of both by their scores; one with a score of `-inf` is none, and has no length."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), kept, new)
    scores, where = jax.lax.top_k(both.scores, kept.scores.shape[1])
    tokens = jnp.take_along_axis(both.tokens, where[..., None], axis=1)
    lengths = jnp.take_along_axis(both.lengths, where, axis=1)
    return Continuations(tokens=tokens, lengths=jnp.where(scores > -jnp.inf, lengths, 0), scores=scores)


@dataclasses.dataclass
class Searching:
    """A batch being searched: `advance` until it is `done`."""

    programs: Programs
    layout: Layout
    params: Mapping[str, Any]
    search: Search
    stops: np.ndarray
    values: Values
    limit: int
    kind: Kind
    beams: Beams

    def advance(self) -> None:
        """At most `CHUNK` steps."""
        self.search = self.programs.run(
            chunk,
            (self.layout,),
            (self.params, self.search, self.stops, self.values, np.int32(self.limit)),
            donate=(1,),
            named={"kind": self.kind, "beams": self.beams},
        )

    @property
    def done(self) -> bool:
        """Whether no text is open."""
        return not np.asarray(self.search.open).any()
