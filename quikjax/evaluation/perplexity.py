"""Perplexity over windows of a text, and how far a model is from another one on the same tokens.

The protocol of the quantization papers: the text as one row of tokens, cut into windows that do not overlap, each read from an
empty context; all tokens of a window but the first are predicted, and `perplexity = exp(mean cross-entropy)`. With a stride,
windows overlap, and of each but the first only the last `stride` tokens count: no token twice, each with more context.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32

from quikjax.errors import QuikError
from quikjax.evaluation.distance import Distance, TokenDistances, exponential, standard_error, summarize, token_distances
from quikjax.evaluation.forward import by_chunks, checked_windows, hidden_states, on_device, token_logits
from quikjax.evaluation.positions import PositionRow, by_position
from quikjax.files import described
from quikjax.models.base import CausalLM, Transformer
from quikjax.models.registry import pure_params
from quikjax.models.tokens import checked_model, whole_number

# Short windows go through a model together, up to this many tokens. More cost a CPU's caches more than they save.
BATCH_TOKENS = 2048

# Told after every batch: windows done, windows in all, the perplexity so far.
OnBatch = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model's figures on some windows. `stderr` is the perplexity's standard error over tokens.

    `positions` is its perplexity by position in the window. `distance` is there if it was held against another model, whose
    `kl`, `kl_stderr` and `top1_agreement` can be read here too.
    """

    perplexity: float
    stderr: float
    tokens: int
    windows: int
    window: int
    stride: int
    seconds: float
    tokens_per_second: float
    positions: tuple[PositionRow, ...]
    distance: Distance | None = None

    @property
    def kl(self) -> float | None:
        """The mean KL divergence per token in nats."""
        return None if self.distance is None else self.distance.kl

    @property
    def kl_stderr(self) -> float | None:
        """Its standard error."""
        return None if self.distance is None else self.distance.kl_stderr

    @property
    def top1_agreement(self) -> float | None:
        """The share of tokens with the same most likely successor."""
        return None if self.distance is None else self.distance.top1_agreement

    def as_json(self) -> dict[str, Any]:
        """A JSON object; figures against another model only where there was one, and none that is not a number."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["distance"]
        fields["positions"] = [row.as_json() for row in self.positions]
        fields |= {} if self.distance is None else dataclasses.asdict(self.distance)
        return {name: value for name, value in fields.items() if not (isinstance(value, float) and math.isnan(value))}


class Reference(NamedTuple):
    """Another model and what it made of the same windows, so that several models can be held against it."""

    model: CausalLM
    hidden: list[np.ndarray]


def windows(tokens: Any, length: int, count: int | None = None, stride: int | None = None) -> Int32[np.ndarray, "count length"]:
    """The first `count` (all, if `None`) windows of `length` tokens, each `stride` behind the one before; a rest is left out.

    Left out, `stride` is `length`: windows do not overlap.

    Raises:
        QuikError: `tokens` is not one row of whole numbers, or shorter than one window, or than `count` of them; the stride
            is not between 1 and `length`.
    """
    try:
        row = np.asarray(tokens)
    except ValueError:
        row = np.empty((0, 0))
    if row.ndim != 1 or (row.dtype.kind not in "iu" and row.size):
        raise QuikError(f"windows are cut from one row of token ids, not from {described(tokens)} of shape {row.shape}")
    length = whole_number(length, "the tokens of a window", 0)
    if length < 2:
        raise QuikError(f"a window needs at least 2 tokens to predict one, not {length}")
    if stride is not None and not 1 <= stride <= length:
        raise QuikError(f"the stride must be between 1 and the window's {length} tokens, not {stride}")
    step = stride or length
    available = (len(row) - length) // step + 1
    if available < 1:
        raise QuikError(f"the text has {len(row)} tokens, fewer than one window of {length}; use more text or a smaller window")
    if count is not None and count < 1:
        raise QuikError(f"the number of windows must be positive, not {count}")
    if count is not None and count > available:
        raise QuikError(f"the text has {available} windows of {length} tokens, {count} were asked for")
    used = count or available
    whole = row[: (used - 1) * step + length].astype(np.int32)
    return np.lib.stride_tricks.sliding_window_view(whole, length)[::step].copy()


def reference(model: Transformer, ids: Any) -> Reference:
    """Run a model over windows `[count, length]` once, to hold others against it. Its hidden states stay in host memory.

    Raises:
        QuikError: as `evaluate`.
    """
    model = on_device(checked_model(model))
    return Reference(model, [np.asarray(hidden_states(model, row[None])[0]) for row in checked_windows(model, ids)])


def evaluate(
    model: Transformer,
    ids: Any,
    against: Reference | Transformer | None = None,
    *,
    stride: int | None = None,
    batch: int | None = None,
    on_batch: OnBatch | None = None,
) -> Evaluation:
    """Perplexity of a model on windows of tokens, and its distance to `against`.

    Args:
        model: dense or with packed weights.
        ids: `windows` of a text, `[count, length]`.
        against: the original. As a model it runs beside this one, and only a batch is held; as a `Reference` it has run already.
        stride: what `windows` was given; of every window but the first, only the last `stride` tokens count.
        batch: at most so many windows go through the model together; left out, as many as make `BATCH_TOKENS` tokens. 4-bit
            activations on a boundary fall to either side with it, so that figures differ far within their error.
        on_batch: told of the progress.

    `seconds` and `tokens_per_second` are of the model's own forward passes, compilation not counted.

    Raises:
        QuikError: a model is an encoder, a window is longer than its context, a token outside its vocabulary, the other model has
            another vocabulary or has run over other windows, `batch` is no positive whole number, or a logit is not finite.
    """
    model = on_device(checked_model(model))
    ids = checked_windows(model, ids)
    if isinstance(against, Reference) and len(against.hidden) != len(ids):
        raise QuikError(f"the reference was made from {len(against.hidden)} windows, not from these {len(ids)}")
    count, length = ids.shape
    graphdef, params = nnx.split(model)[0], pure_params(model)
    if against is not None and not isinstance(against, Reference):
        against = on_device(checked_model(against))
    other = against.model if isinstance(against, Reference) else against
    if other is not None:
        checked_windows(other, ids)
        if other.config.vocab_size != model.config.vocab_size:
            raise QuikError(
                f"the models have vocabularies of {model.config.vocab_size} and {other.config.vocab_size} tokens; "
                "they cannot be compared token by token"
            )
    original = None if other is None else (nnx.split(other)[0], pure_params(other))
    most = max(1, BATCH_TOKENS // length) if batch is None else whole_number(batch, "batch")
    size = batch_size(count, most)
    losses: list[np.ndarray] = []
    distances: list[TokenDistances] = []
    seconds, timed = 0.0, 0
    for first in range(0, count, size):
        # The last batch is filled up, so that one compilation serves all; what the filling gave is dropped.
        rows = np.resize(ids[first : first + size], (size, length))
        real = min(size, count - first)
        targets = _targets(rows)
        for again in (False, True):
            start = time.perf_counter()
            hidden = hidden_states(model, rows)
            loss = jax.block_until_ready(token_losses(graphdef, params, _predicting(hidden), targets))
            # Everything is compiled in the first pass, so a single batch is passed over twice for its time.
            if first or again:
                seconds += time.perf_counter() - start
                timed += rows.size
            if first or size < count or again:
                break
        losses.append(np.asarray(loss, np.float64).reshape(size, -1)[:real])
        if not np.isfinite(losses[-1]).all():  # at once, not after hours
            raise QuikError("the model's logits are not finite; a weight or an activation overflowed, try dtype float32")
        if original is not None and against is not None:
            theirs = _original_hidden(against, rows, first)
            found = token_distances(graphdef, params, _predicting(hidden), *original, _predicting(theirs), targets)
            distances.append(TokenDistances(*(np.asarray(values, np.float64).reshape(size, -1)[:real] for values in found)))
        if on_batch is not None:
            on_batch(first + real, count, exponential(float(np.mean(np.concatenate(losses)))))
    position = np.broadcast_to(np.arange(1, length), (count, length - 1))
    counts = _counted(count, length, stride or length)
    loss = np.concatenate(losses)[counts]
    joined = TokenDistances(*(np.concatenate(parts)[counts] for parts in zip(*distances, strict=True))) if distances else None
    perplexity = exponential(float(np.mean(loss)))
    return Evaluation(
        perplexity=perplexity,
        stderr=perplexity * standard_error(loss),
        tokens=int(loss.size),
        windows=count,
        window=length,
        stride=stride or length,
        seconds=seconds,
        tokens_per_second=timed / seconds,
        positions=tuple(by_position(loss, position[counts], None if joined is None else joined.original_loss)),
        distance=None if joined is None else summarize(loss, joined),
    )


def batch_size(count: int, most: int) -> int:
    """Windows a batch: at most `most`, as even as can be, because the last batch is filled up to the size of the others."""
    return -(-count // -(-count // most))


def _targets(ids: Int[np.ndarray, "batch length"]) -> Int32[Array, " predicted"]:
    """All tokens of all windows but their first."""
    return jnp.asarray(ids[:, 1:].reshape(-1), jnp.int32)


def _predicting(hidden: Float[Array, "batch length hidden"]) -> Float[Array, "predicted hidden"]:
    """The hidden states that predict `_targets`: those of all tokens but the windows' last."""
    return hidden[:, :-1].reshape(-1, hidden.shape[2])


def _original_hidden(
    against: Reference | CausalLM, rows: Int[np.ndarray, "batch length"], first: int
) -> Float[Array, "batch length hidden"]:
    if not isinstance(against, Reference):
        return hidden_states(against, rows)
    kept = against.hidden[first : first + len(rows)]
    return jnp.asarray(np.stack([*kept, *[kept[0]] * (len(rows) - len(kept))]))


def _counted(count: int, length: int, stride: int) -> np.ndarray:
    """Which predictions count, `[count, length - 1]`: all of the first window, and the last `stride` of the others."""
    fresh = np.zeros((count, length - 1), bool)
    fresh[:, -stride:] = True
    fresh[0] = True
    return fresh


@partial(jax.jit, static_argnums=0)
def token_losses(
    graphdef: nnx.GraphDef[Transformer],
    params: Mapping[str, Any],
    hidden: Float[Array, "tokens hidden"],
    targets: Int32[Array, " tokens"],
) -> Float32[Array, " tokens"]:
    """Cross-entropy of each target, predicted from the hidden state that left the last block at the token before it (of a masked
    language model, at its own place).
    """
    model = nnx.merge(graphdef, params)

    def chunk(hidden: Array, targets: Array) -> Array:
        logits = token_logits(model, hidden)
        return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]

    losses: Array = by_chunks(chunk, hidden, targets)
    return losses
