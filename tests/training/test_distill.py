"""The KL divergence against its equation in float64, and its gradients chunk by chunk against those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.training.distill import hidden_error, kl_and_gradients, kl_divergence, score_error, soft_cross_entropy

VOCABULARY, WIDTH = 11, 6


def test_kl_is_its_equation() -> None:
    rng = np.random.default_rng(0)
    teacher, student = (rng.normal(size=(4, VOCABULARY)) * 3 for _ in range(2))
    p = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
    q = np.exp(student) / np.exp(student).sum(-1, keepdims=True)
    found = kl_divergence(jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(-1), rtol=1e-5)
    assert (np.asarray(found) > 0).all()
    np.testing.assert_allclose(kl_divergence(jnp.asarray(teacher), jnp.asarray(teacher)), 0, atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 5, 10, 64])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(chunk: int) -> None:
    rng = np.random.default_rng(1)
    hidden, theirs = (jnp.asarray(rng.normal(size=(2, 5, WIDTH)).astype(np.float32)) for _ in range(2))
    table, gain = jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)), jnp.ones(WIDTH)

    def head(gain: jax.Array, rows: jax.Array) -> jax.Array:
        return (rows * gain) @ table.T

    def teacher_head(rows: jax.Array) -> jax.Array:
        return rows @ table.T

    value, d_gain, d_hidden = kl_and_gradients(head, gain, hidden, teacher_head, theirs, chunk)
    whole = jax.value_and_grad(lambda gain, hidden: kl_divergence(teacher_head(theirs), head(gain, hidden)).mean(), (0, 1))
    expected, (expected_gain, expected_hidden) = whole(gain, hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(d_gain, expected_gain, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(d_hidden, expected_hidden, rtol=1e-4, atol=1e-6)


def test_soft_cross_entropy_is_its_equation() -> None:
    rng = np.random.default_rng(2)
    teacher, student = (rng.normal(size=(4, 3)) * 3 for _ in range(2))
    p = np.exp(teacher / 2) / np.exp(teacher / 2).sum(-1, keepdims=True)
    q = np.exp(student / 2) / np.exp(student / 2).sum(-1, keepdims=True)
    found = soft_cross_entropy(jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32), 2.0)
    np.testing.assert_allclose(found, -(p * np.log(q)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_errors_of_states_and_scores_are_over_tokens_that_are_there(causal: bool) -> None:
    rng = np.random.default_rng(3)
    blocks, batch, length, heads, kv, head = 2, 2, 4, 4, 2, 3
    there = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool)
    theirs, mine = (rng.normal(size=(blocks, batch, length, 5)).astype(np.float32) for _ in range(2))
    expected = sum(((mine[b] - theirs[b]) ** 2).astype(np.float64).mean(-1)[there].mean() for b in range(blocks))
    np.testing.assert_allclose(hidden_error(jnp.asarray(theirs), jnp.asarray(mine), jnp.asarray(there)), expected, rtol=1e-5)

    teacher, student = (
        tuple(rng.normal(size=(blocks, batch, length, h, head)).astype(np.float32) for h in (heads, kv)) for _ in range(2)
    )
    total = 0.0
    for b in range(blocks):
        gaps = []
        for t in range(batch):
            for h in range(heads):
                for i in range(length):
                    for j in range(length):
                        if there[t, i] and there[t, j] and (j <= i or not causal):
                            scores = [
                                float(q[b, t, i, h].astype(np.float64) @ k[b, t, j, h // (heads // kv)]) / np.sqrt(head)
                                for q, k in (teacher, student)
                            ]
                            gaps.append((scores[0] - scores[1]) ** 2)
        total += np.mean(gaps)
    theirs, mine = jax.tree.map(jnp.asarray, (teacher, student))
    found = score_error(theirs, mine, jnp.asarray(there), causal=causal)
    np.testing.assert_allclose(found, total, rtol=1e-5)
