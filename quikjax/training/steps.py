"""One step of a classifier's training: the losses, their gradient, the optimizer; and the average of what has moved.

The student computes with straight-through quantizers; losses are those of INT4 training (Wu et al., arXiv 2301.12017).
"""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from quikjax.models.base import Positions
from quikjax.models.encoder import masked_positions
from quikjax.training import blocks, distill
from quikjax.training.blocks import Dropout, Skeleton, Tree
from quikjax.training.examples import Batch
from quikjax.training.moving import Moving
from quikjax.training.train_settings import TrainSettings, optimizer


def total_loss(
    student: Skeleton,
    still: Tree,
    moving: Mapping[str, Moving],
    teacher: tuple[Skeleton, Tree, Mapping[str, Moving], tuple[int, ...]] | None,
    batch: Batch,
    settings: TrainSettings,
    key: Array | None = None,
) -> Float[Array, ""]:
    """The sum of the losses, each times its weight. Traceable. `key` is that of the student's dropout."""
    positions = masked_positions(jnp.asarray(batch.ids), batch.mask)
    attention = bool(settings.attention_weight)
    dropout = None if key is None else Dropout(settings.dropout, key)
    mine, logits = _run(student, still, moving, batch, positions, attention=attention, dropout=dropout)
    total = jnp.float32(0)
    if settings.label_weight:
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        total += settings.label_weight * jnp.mean(each)
    if teacher is None:
        return total
    skeleton, teacher_still, teacher_moving, matching = teacher
    theirs, target = _run(skeleton, teacher_still, teacher_moving, batch, positions, attention=attention)
    theirs, target = jax.lax.stop_gradient((theirs, target))
    there, at = positions >= 0, np.asarray(matching)
    if settings.soft_weight:
        total += settings.soft_weight * jnp.mean(distill.soft_cross_entropy(target, logits, settings.temperature))
    if settings.hidden_weight:
        total += settings.hidden_weight * distill.hidden_error(theirs.hidden[at], mine.hidden, there)
    if settings.attention_weight:
        scores = distill.score_error((theirs.query[at], theirs.key[at]), (mine.query, mine.key), there, causal=False)
        total += settings.attention_weight * scores
    return total


def _run(
    skeleton: Skeleton,
    still: Tree,
    moving: Mapping[str, Moving],
    batch: Batch,
    positions: Array,
    *,
    attention: bool,
    dropout: Dropout | None = None,
) -> tuple[blocks.Traces, Float[Array, "batch classes"]]:
    model = blocks.outside(skeleton, still, moving)
    hidden = model.embed(jnp.asarray(batch.ids), positions, batch.types).astype(jnp.float32)
    where = Positions(positions)
    traces = blocks.forward_traced(skeleton, still, moving, hidden, where, attention=attention, dropout=dropout)
    return traces, model.head(traces.hidden[-1], positions)


@functools.lru_cache(maxsize=8)
def make_step(
    student: Skeleton, teacher: Skeleton | None, matching: tuple[int, ...], settings: TrainSettings
) -> Callable[..., Any]:
    """One compiled step: of `(still, moving, optimizer state, teacher's still and moving, batch, dropout's key)` comes
    `(moving, optimizer state, loss, finite)`. Where loss or gradient is not finite, nothing moves.
    """
    transform = optimizer(settings)

    # Nothing is donated: where the loss is not finite, the loop saves what it gave.
    @jax.jit
    def step(still: Tree, moving: Any, state: Any, taught: Any, batch: Batch, key: Array | None = None) -> Any:
        guide = None if teacher is None else (teacher, *taught, matching)

        def loss_of(moving: Any) -> Array:
            return total_loss(student, still, moving, guide, batch, settings, key)

        loss, gradient = jax.value_and_grad(loss_of)(moving)
        squares = sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient))
        finite = jnp.isfinite(loss) & jnp.isfinite(squares)
        updates, after = transform.update(gradient, state, moving)
        kept = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        return kept(optax.apply_updates(moving, updates), moving), kept(after, state), loss, finite

    return step


def dropout_key(settings: TrainSettings, index: int) -> Array | None:
    """The key of dropout in step `index`, counted from 0; none without dropout."""
    return jax.random.fold_in(jax.random.key(settings.seed % 2**32), index) if settings.dropout else None


def next_average(average: Any, values: Any, index: int, decay: float) -> Any:
    """The running average of what moves, behind step `index`: `d average + (1 - d) values`, `d = min(decay, (1 + n) / (10 + n))`.

    With n steps taken before this one; the second term lets go of the beginning while few steps have been taken. An average of
    `None` stays that.
    """
    if average is None:
        return None
    return _incremental_update(values, average, jnp.float32(1 - min(decay, (1 + index) / (10 + index))))


_incremental_update = jax.jit(optax.incremental_update)
