"""Perplexity over non-overlapping windows, and how far a model is from another one on the same tokens.

The protocol of the quantization papers: the text as one row of tokens, cut into windows that do not overlap, each read from an
empty context; all tokens of a window but the first are predicted, and `perplexity = exp(mean cross-entropy)`.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from quikjax.errors import QuikError
from quikjax.files import described
from quikjax.models.base import Block, CausalLM, Positions, default_positions
from quikjax.models.registry import pure_params
from quikjax.models.tokens import checked_model, checked_tokens
from quikjax.weights.tiled import put_on_device

# Logits are made for this many tokens at a time: a vocabulary of 50 000 makes 100 MB of them.
_CHUNK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model's figures on some windows. `stderr` is the perplexity's standard error over tokens.

    Against another model: `kl` is the mean of `KL(other || this)` per token in nats, with its standard error, and
    `top1_agreement` the share of tokens to which both give the same most likely successor.
    """

    perplexity: float
    stderr: float
    tokens: int
    windows: int
    window: int
    seconds: float
    tokens_per_second: float
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON object; figures against another model only where there was one."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Reference(NamedTuple):
    """Another model and what it made of the same windows, so that several models can be held against it."""

    model: CausalLM
    hidden: list[np.ndarray]


def windows(tokens: Any, length: int, count: int | None = None) -> Int32[np.ndarray, "count length"]:
    """The first `count` (all, if `None`) non-overlapping windows of `length` tokens of one row; a shorter rest is left out.

    Raises:
        QuikError: `tokens` is not one row of whole numbers, or shorter than one window, or than `count` of them.
    """
    try:
        row = np.asarray(tokens)
    except ValueError:
        row = np.empty((0, 0))
    if row.ndim != 1 or (row.dtype.kind not in "iu" and row.size):
        raise QuikError(f"windows are cut from one row of token ids, not from {described(tokens)} of shape {row.shape}")
    if length < 2:
        raise QuikError(f"a window needs at least 2 tokens to predict one, not {length}")
    available = len(row) // length
    if available == 0:
        raise QuikError(f"the text has {len(row)} tokens, fewer than one window of {length}; use more text or a smaller window")
    if count is not None and count < 1:
        raise QuikError(f"the number of windows must be positive, not {count}")
    if count is not None and count > available:
        raise QuikError(f"the text has {available} windows of {length} tokens, {count} were asked for")
    used = count or available
    return row[: used * length].astype(np.int32).reshape(used, length)


def reference(model: CausalLM, ids: Any) -> Reference:
    """Run a model over windows `[count, length]` once, to hold others against it.

    Raises:
        QuikError: as `evaluate`.
    """
    model = _on_device(checked_model(model))
    return Reference(model, [np.asarray(_hidden(model, row[None])) for row in _checked(model, ids)])


def evaluate(model: CausalLM, ids: Any, against: Reference | None = None) -> Evaluation:
    """Perplexity of a model on windows of tokens `[count, length]`, and its distance to `against`.

    `seconds` and `tokens_per_second` are of the model's own forward passes, compilation not counted.

    Raises:
        QuikError: a window is longer than the model's context, a token outside its vocabulary, or a logit not finite.
    """
    model = _on_device(checked_model(model))
    ids = _checked(model, ids)
    if against is not None and len(against.hidden) != len(ids):
        raise QuikError(f"the reference was made from {len(against.hidden)} windows, not from these {len(ids)}")
    graphdef, params = nnx.split(model)[0], pure_params(model)
    other = None if against is None else (nnx.split(against.model)[0], pure_params(against.model))
    losses, divergences, agreements, seconds = [], [], [], 0.0
    for index, row in enumerate(ids):
        start = time.perf_counter()
        hidden = _hidden(model, row[None])
        loss = jax.block_until_ready(_loss(graphdef, params, hidden, row[None]))
        if index:
            seconds += time.perf_counter() - start
        elif len(ids) == 1:
            # Everything is compiled in the first pass, so a single window is passed over twice for its time.
            start = time.perf_counter()
            jax.block_until_ready(_loss(graphdef, params, _hidden(model, row[None]), row[None]))
            seconds = time.perf_counter() - start
        losses.append(np.asarray(loss, np.float64))
        if not np.isfinite(losses[-1]).all():  # at once, not after hours
            raise QuikError("the model's logits are not finite; a weight or an activation overflowed, try dtype float32")
        if other is not None and against is not None:
            kl, same = _distance(graphdef, params, hidden, *other, against.hidden[index])
            divergences.append(np.asarray(kl, np.float64))
            agreements.append(np.asarray(same, np.float64))
    loss = np.concatenate(losses)
    with np.errstate(over="ignore"):  # infinite then, which is what it is
        perplexity = float(np.exp(np.mean(loss)))
    timed = max(1, len(ids) - 1) * ids.shape[1]
    kl = np.concatenate(divergences) if divergences else None
    return Evaluation(
        perplexity=perplexity,
        stderr=perplexity * float(np.std(loss, ddof=1) / np.sqrt(loss.size)) if loss.size > 1 else float("nan"),
        tokens=int(loss.size),
        windows=ids.shape[0],
        window=ids.shape[1],
        seconds=seconds,
        tokens_per_second=timed / seconds,
        kl=None if kl is None else float(np.mean(kl)),
        kl_stderr=None if kl is None or kl.size < 2 else float(np.std(kl, ddof=1) / np.sqrt(kl.size)),
        top1_agreement=None if kl is None else float(np.mean(np.concatenate(agreements))),
    )


def _on_device(model: CausalLM) -> CausalLM:
    """The model with its weights in the form that this device's kernels read."""
    params = pure_params(model)
    placed = put_on_device(params)
    return model if placed is params else nnx.merge(nnx.split(model)[0], placed)


def _checked(model: CausalLM, ids: Any) -> Int32[np.ndarray, "count length"]:
    checked = checked_tokens(ids, model.config, "a set of windows")
    if checked.shape[1] < 2:
        raise QuikError("a window needs at least 2 tokens to predict one, not 1")
    return checked


def _hidden(model: CausalLM, ids: Int[np.ndarray, "batch length"]) -> Float[Array, "batch length hidden"]:
    """Compute the last block's output. One function is compiled per kind of block; the whole model would take a minute."""
    tokens = jnp.asarray(ids)
    hidden = model.embed(tokens, default_positions(tokens))
    for block in model.blocks.values():
        blockdef, params = nnx.split(block)
        hidden = _through_block(blockdef, nnx.to_pure_dict(params), hidden)
    return jax.block_until_ready(hidden)


@partial(jax.jit, static_argnums=0)
def _through_block(
    blockdef: nnx.GraphDef[Block], params: Mapping[str, Any], hidden: Float[Array, "batch length hidden"]
) -> Float[Array, "batch length hidden"]:
    positions = jnp.broadcast_to(jnp.arange(hidden.shape[1], dtype=jnp.int32), hidden.shape[:2])
    return nnx.merge(blockdef, params)(hidden, Positions(positions))[0]


def _chunks(hidden: Float[Array, "1 length hidden"]) -> Float[Array, "chunks chunk hidden"]:
    rows = hidden[0]
    return jnp.pad(rows, ((0, -rows.shape[0] % _CHUNK), (0, 0))).reshape(-1, _CHUNK, rows.shape[1])


@partial(jax.jit, static_argnums=0)
def _loss(
    graphdef: nnx.GraphDef[CausalLM],
    params: Mapping[str, Any],
    hidden: Float[Array, "1 length hidden"],
    ids: Int[Array, "1 length"],
) -> Float32[Array, " predicted"]:
    """Cross-entropy of every token but the first."""
    model = nnx.merge(graphdef, params)
    length = ids.shape[1]
    targets = jnp.pad(ids[0, 1:], (0, 1 + -length % _CHUNK)).reshape(-1, _CHUNK)

    def chunk(parts: tuple[Array, Array]) -> Array:
        logits = model.head(parts[0][None])[0]
        chosen = jnp.take_along_axis(logits, parts[1][:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen

    return jax.lax.map(chunk, (_chunks(hidden), targets)).reshape(-1)[: length - 1]


@partial(jax.jit, static_argnums=(0, 3))
def _distance(
    graphdef: nnx.GraphDef[CausalLM],
    params: Mapping[str, Any],
    hidden: Float[Array, "1 length hidden"],
    other_graphdef: nnx.GraphDef[CausalLM],
    other_params: Mapping[str, Any],
    other_hidden: Float[Array, "1 length other"],
) -> tuple[Float32[Array, " length"], Float32[Array, " length"]]:
    """Per token `KL(other || this)` in nats, and 1 where both have the same most likely successor."""
    model, other = nnx.merge(graphdef, params), nnx.merge(other_graphdef, other_params)

    def chunk(parts: tuple[Array, Array]) -> tuple[Array, Array]:
        mine = jax.nn.log_softmax(model.head(parts[0][None])[0])
        theirs = jax.nn.log_softmax(other.head(parts[1][None])[0])
        kl = jnp.sum(jnp.exp(theirs) * (theirs - mine), axis=1)
        return kl, (jnp.argmax(mine, axis=1) == jnp.argmax(theirs, axis=1)).astype(jnp.float32)

    kl, same = jax.lax.map(chunk, (_chunks(hidden), _chunks(other_hidden)))
    return kl.reshape(-1)[: hidden.shape[1]], same.reshape(-1)[: hidden.shape[1]]
