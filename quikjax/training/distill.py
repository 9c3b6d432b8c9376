"""Losses of distillation: how far a student's next-token distribution is from a teacher's, over the whole vocabulary."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

# Logits are made for this many tokens at a time: a vocabulary of 50 000 makes 100 MB of them, several times over.
CHUNK = 512

Head = Callable[[Any, Array], Array]


def kl_divergence(teacher: Float[Array, "*batch vocab"], student: Float[Array, "*batch vocab"]) -> Float32[Array, "*batch"]:
    """`KL(teacher || student)` per token in nats, from logits of both, at temperature 1."""
    theirs, mine = jax.nn.log_softmax(teacher.astype(jnp.float32)), jax.nn.log_softmax(student.astype(jnp.float32))
    return jnp.sum(jnp.exp(theirs) * (theirs - mine), axis=-1)


def kl_and_gradients(
    head: Head,
    params: Any,
    hidden: Float[Array, "batch length hidden"],
    teacher_head: Callable[[Array], Array],
    teacher_hidden: Float[Array, "batch length _"],
    chunk: int = CHUNK,
) -> tuple[Float32[Array, ""], Any, Float[Array, "batch length hidden"]]:
    """The mean KL over all tokens, its gradient by `params`, and by `hidden`.

    Args:
        head: `head(params, hidden)` are the student's logits `[tokens, vocab]` of hidden states `[tokens, hidden]`.
        hidden: what leaves the student's last block; `teacher_hidden`, the teacher's, through `teacher_head(hidden)`.
        chunk: of how many tokens logits are held at once. Each chunk is differentiated as it comes, so that none is made twice.
    """
    mine, real = _chunks(hidden, chunk)
    theirs, _ = _chunks(teacher_hidden, chunk)
    tokens = hidden.shape[0] * hidden.shape[1]

    def one(sums: tuple[Array, Any], parts: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array]:
        mine, theirs, real = parts
        target = jax.lax.stop_gradient(teacher_head(theirs))

        def loss(params: Any, mine: Array) -> Array:
            return jnp.sum(jnp.where(real, kl_divergence(target, head(params, mine)), 0)) / tokens

        value, (d_params, d_mine) = jax.value_and_grad(loss, argnums=(0, 1))(params, mine)
        return (sums[0] + value, jax.tree.map(jnp.add, sums[1], d_params)), d_mine

    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    (value, d_params), d_hidden = jax.lax.scan(one, nothing, (mine, theirs, real))
    return value, d_params, d_hidden.reshape(-1, hidden.shape[-1])[:tokens].reshape(hidden.shape)


def _chunks(hidden: Float[Array, "batch length width"], chunk: int) -> tuple[Array, Array]:
    """Hidden states `[chunks, chunk, width]`, zeros behind the last, and which of them are real."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    missing = -rows.shape[0] % chunk
    real = jnp.arange(rows.shape[0] + missing) < rows.shape[0]
    return jnp.pad(rows, ((0, missing), (0, 0))).reshape(-1, chunk, rows.shape[1]), real.reshape(-1, chunk)
