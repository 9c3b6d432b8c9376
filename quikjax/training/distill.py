"""Losses of distillation: how far a student is from a teacher in its outputs (next-token distributions over the whole vocabulary,
a classifier's classes), in its hidden states, and in its attention.

The last two and their unweighted sum are those of INT4 training (Wu et al., arXiv 2301.12017, and DeepSpeed's released code).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

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


def soft_cross_entropy(
    teacher: Float[Array, "*batch classes"], student: Float[Array, "*batch classes"], temperature: float = 1.0
) -> Float32[Array, "*batch"]:
    """`-sum_v softmax(t / T)_v log softmax(s / T)_v`, from logits of both."""
    target = jax.nn.softmax(teacher.astype(jnp.float32) / temperature)
    return -jnp.sum(target * jax.nn.log_softmax(student.astype(jnp.float32) / temperature), axis=-1)


def hidden_error(
    teacher: Float[Array, "blocks batch length hidden"],
    student: Float[Array, "blocks batch length hidden"],
    there: Bool[Array, "batch length"],
) -> Float32[Array, ""]:
    """The mean squared error of what leaves a block, over its tokens that are `there` (no padding); summed over blocks."""
    each = jnp.mean((student.astype(jnp.float32) - teacher.astype(jnp.float32)) ** 2, axis=-1)
    return jnp.sum(jnp.where(there, each, 0)) / jnp.sum(there)


def score_error(
    teacher: tuple[Float[Array, "blocks batch length heads head"], Float[Array, "blocks batch length kv_heads head"]],
    student: tuple[Float[Array, "blocks batch length heads head"], Float[Array, "blocks batch length kv_heads head"]],
    there: Bool[Array, "batch length"],
    *,
    causal: bool,
) -> Float32[Array, ""]:
    """The mean squared error of attention scores before the softmax, `q k^T / sqrt(head)`, over pairs of tokens of which the
    first sees the second; summed over blocks. Takes queries and keys of both, and as many heads in both.
    """
    seen = there[:, :, None] & there[:, None, :]
    if causal:
        length = there.shape[1]
        seen = seen & (jnp.arange(length)[:, None] >= jnp.arange(length)[None, :])
    heads = teacher[0].shape[3]

    def one(sums: Array, block: Any) -> tuple[Array, None]:
        theirs, mine = (_scores(*pair) for pair in block)
        return sums + jnp.sum(jnp.where(seen[:, None], (mine - theirs) ** 2, 0)), None

    total, _ = jax.lax.scan(one, jnp.float32(0), (teacher, student))
    return total / (heads * jnp.sum(seen))


def _scores(
    query: Float[Array, "batch length heads head"], key: Float[Array, "batch length kv_heads head"]
) -> Float32[Array, "batch heads length length"]:
    wide = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("bqhd,bkhd->bhqk", query, wide, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
