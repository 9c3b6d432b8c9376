"""The KL divergence against its equation in float64, and its gradients chunk by chunk against those of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.training.distill import kl_and_gradients, kl_divergence

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
