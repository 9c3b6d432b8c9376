"""Attention against its definition in float64: long texts in pieces, shared keys, padding, a cache, ALiBi."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.models.attention import attend
from quikjax.models.base import KeyValues, Positions
from quikjax.models.rope import Rope, rotate

OPTIMIZED = True
HEAD = 8


def expected(q: Any, k: Any, v: Any, positions: Any, scale: float, slopes: Any) -> np.ndarray:
    """Softmax over what each position may see, one head after the other."""
    out = np.zeros(q.shape, np.float64)
    for b, p in enumerate(positions):
        seen = (p[None, :] >= 0) & (p[None, :] <= p[:, None])
        for h in range(q.shape[2]):
            shared = h * k.shape[2] // q.shape[2]
            scores = q[b, :, h] @ k[b, :, shared].T * scale
            if slopes is not None:
                scores = scores + slopes[h] * np.asarray(p, jnp.bfloat16).astype(np.float64) * scale
            scores = np.where(seen, scores, -1e9)
            weights = np.where(seen, np.exp(scores - scores.max(axis=1, keepdims=True)), 0)
            out[b, p >= 0, h] = (weights @ v[b, :, shared])[p >= 0] / weights[p >= 0].sum(axis=1, keepdims=True)
    return out


# One operation after the other, long texts compile much that a program of their own does not.
@pytest.mark.parametrize(
    ("batch", "length", "padding", "alibi", "jitted"),
    [
        pytest.param(*case, jitted, marks=[pytest.mark.long] * (case[1] > 64 and not jitted))
        for case in [
            *[(2, 9, 3, False), (1, 63, 0, True), (1, 64, 5, False)],
            *[(2, 512, 300, False), (1, 513, 0, False), (1, 1100, 7, True)],
        ]
        for jitted in (False, True)
    ],
)
def test_against_the_definition(batch: int, length: int, padding: int, alibi: bool, jitted: bool) -> None:
    rng = np.random.default_rng(length)
    q, k, v = (rng.normal(size=(batch, length, heads, HEAD)) for heads in (6, 2, 2))
    positions = np.tile(np.arange(length), (batch, 1))
    positions[0] -= padding  # left padding: negative positions are seen by nobody
    # Powers of two, so that their products with rounded positions need no rounding.
    slopes = np.asarray([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0]) if alibi else None
    where = Positions(jnp.asarray(positions, jnp.int32))

    def run(q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v, where, None, scale=0.3, slopes=None if slopes is None else jnp.asarray(slopes, jnp.float32))

    found, written = (jax.jit(run) if jitted else run)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    assert np.isfinite(found).all()
    real = positions >= 0
    np.testing.assert_allclose(np.asarray(found)[real], expected(q, k, v, positions, 0.3, slopes)[real], atol=2e-5)
    np.testing.assert_array_equal(written.keys, np.asarray(k, np.float32))


def test_a_long_second_prompt_reads_the_cache() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 700, heads, HEAD)).astype(np.float32) for heads in (4, 2, 2))
    query, key, value = (jnp.asarray(x) for x in (q, k, v))
    whole, _ = attend(query, key, value, Positions(jnp.arange(700, dtype=jnp.int32)[None]), None, scale=0.3)
    slots = jnp.where(jnp.arange(800) < 700, jnp.arange(800), -1).astype(jnp.int32)[None]
    empty = jnp.zeros((1, 800, 2, HEAD))
    cache = KeyValues(empty.at[:, :100].set(key[:, :100]), empty.at[:, :100].set(value[:, :100]))
    where = Positions(jnp.arange(100, 700, dtype=jnp.int32)[None], keys=slots, write_at=jnp.int32(100))
    rest, written = attend(query[:, 100:], key[:, 100:], value[:, 100:], where, cache, scale=0.3)
    assert isinstance(written, KeyValues)
    np.testing.assert_allclose(rest, whole[:, 100:], atol=1e-5)
    np.testing.assert_array_equal(written.keys[:, :700], k)


def test_gradients_flow_through_the_pieces() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 512, 2, HEAD)), jnp.float32) for _ in range(3))
    where = Positions(jnp.arange(512, dtype=jnp.int32)[None])
    towards = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def loss(q: Any) -> Any:
        return jnp.vdot(attend(q, k, v, where, None, scale=0.3)[0], towards)

    gradient = jax.grad(loss)(q)
    step = 1e-2 * towards / jnp.linalg.norm(towards)
    slope = (loss(q + step) - loss(q - step)) / 2
    np.testing.assert_allclose(jnp.vdot(gradient, step), slope, rtol=1e-2)


@pytest.mark.parametrize("jitted", [pytest.param(False, marks=pytest.mark.long), True])
def test_many_positions_turn_as_each_alone(jitted: bool) -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 100, 3, HEAD)), jnp.float32)
    positions = jnp.asarray(np.stack([np.arange(100), np.arange(100) + 3000]), jnp.int32)
    run = jax.jit(rotate, static_argnums=2) if jitted else rotate
    whole = run(x, positions, Rope())
    parts = [run(x[:, i : i + 20], positions[:, i : i + 20], Rope()) for i in range(0, 100, 20)]
    np.testing.assert_allclose(whole, jnp.concatenate(parts, axis=1), atol=1e-6)
    angles = np.asarray(positions)[..., None] * 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    first, second = np.asarray(x[..., : HEAD // 2], np.float64), np.asarray(x[..., HEAD // 2 :], np.float64)
    turned = first * np.cos(angles)[:, :, None] - second * np.sin(angles)[:, :, None]
    np.testing.assert_allclose(whole[..., : HEAD // 2], turned, atol=2e-3)  # float32 angles of up to 3100
