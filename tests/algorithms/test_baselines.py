"""Each baseline against its equation, written the slow way in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.algorithms.awq import ALPHAS, awq, channel_scales
from quikjax.algorithms.gptq import inverse_factor
from quikjax.algorithms.gptq_groups import gptq_groups, gptq_static_groups
from quikjax.algorithms.groups import rtn_groups, spread
from quikjax.algorithms.llm_int8 import llm_int8
from quikjax.algorithms.smoothquant import smoothing_scales
from quikjax.algorithms.sparsegpt import kept_of_four, sparse_gptq

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_rounded_one_by_one(symmetric: bool, bits: int) -> None:
    W = normal(5, 20)
    W[0, :8] = 0
    W[1, :8] = np.abs(W[1, :8]) + 1  # a group of one sign: zero is forced into its range
    found = rtn_groups(jnp.asarray(W), bits=bits, group=8, symmetric=symmetric)
    W_hat = np.asarray(found.dequantize(8))
    for row in range(5):
        for start in range(0, 20, 8):
            w = W[row, start : start + 8].astype(np.float64)
            if symmetric:
                qmax = 2 ** (bits - 1) - 1
                s = np.abs(w).max() / qmax or 1.0
                expected = s * np.clip(np.round(w / s), -qmax - 1, qmax)
            else:
                low, high = min(w.min(), 0), max(w.max(), 0)
                s = (high - low) / (2**bits - 1) or 1.0
                z = np.round(-low / s)
                expected = s * (np.clip(np.round(w / s) + z, 0, 2**bits - 1) - z)
            np.testing.assert_allclose(W_hat[row, start : start + 8], expected, rtol=1e-5, atol=1e-6)
    assert found.scale.shape == (5, 3)
    limits = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert limits[0] <= int(found.codes.min()) <= int(found.codes.max()) <= limits[1]


def test_smaller_groups_and_zero_points_lose_less() -> None:
    W = normal(16, 64) + 1

    def loss(group: int, symmetric: bool) -> float:
        return float(
            np.linalg.norm(W - np.asarray(rtn_groups(jnp.asarray(W), bits=4, group=group, symmetric=symmetric).dequantize(group)))
        )

    assert loss(16, False) < loss(64, False) < loss(64, True)


def test_smoothing_scales_are_the_papers() -> None:
    a, weights = np.abs(normal(12)) + 0.1, [normal(3, 12), normal(7, 12)]
    a[3] = 0
    for alpha in (0.0, 0.5, 0.85):
        s = np.asarray(smoothing_scales(jnp.asarray(a), [jnp.asarray(W) for W in weights], alpha))
        for j in range(12):
            w = max(np.abs(W[:, j]).max() for W in weights)
            expected = 1.0 if a[j] == 0 else max(a[j] ** alpha / w ** (1 - alpha), 1e-5)
            assert s[j] == pytest.approx(expected, rel=1e-5)


def test_awq_takes_the_scaling_of_the_least_error() -> None:
    x = normal(100, 16) * np.where(np.arange(16) % 5 == 0, 20, 1).astype(np.float32)
    H, weights = x.T @ x, [normal(8, 16), normal(4, 16)]
    found, alpha = awq([jnp.asarray(W) for W in weights], jnp.asarray(H), bits=4, group=8)

    def loss(W_hats: list[np.ndarray]) -> float:
        return sum(float(np.linalg.norm(x @ (W - W_hat).T) ** 2) for W, W_hat in zip(weights, W_hats, strict=True))

    losses = []
    for candidate in ALPHAS:
        size = np.sqrt(np.diag(H).astype(np.float64)) ** candidate
        s = size / np.sqrt(size.max() * size.min())
        np.testing.assert_allclose(channel_scales(jnp.asarray(H), candidate), s, rtol=1e-4)
        rounded = [
            rtn_groups(jnp.asarray(W * s, jnp.float32), bits=4, group=8, symmetric=False).dequantize(8) / s for W in weights
        ]
        losses.append(loss([np.asarray(W_hat) for W_hat in rounded]))
    assert loss([np.asarray(W_hat) for W_hat in found]) == pytest.approx(min(losses), rel=1e-2)
    assert alpha > 0
    assert min(losses) < losses[0]


def test_llm_int8_is_int8_outside_the_columns_of_large_activations() -> None:
    x, W = normal(2, 5, 24), normal(7, 24)
    x[0, 2, 4], x[1, 1, 9] = 8, -6
    y, large = llm_int8(jnp.asarray(x), jnp.asarray(W))
    assert np.flatnonzero(large).tolist() == [4, 9]
    small = [column for column in range(24) if column not in (4, 9)]
    xs, ws = x[..., small].astype(np.float64), W[:, small].astype(np.float64)
    s_x, s_w = np.abs(xs).max(-1, keepdims=True) / 127, np.abs(ws).max(-1, keepdims=True) / 127
    expected = (np.round(xs / s_x) @ np.round(ws / s_w).T) * s_x * s_w[:, 0] + x[..., [4, 9]].astype(np.float64) @ W[:, [4, 9]].T
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    lost = np.abs(x @ W.T - np.asarray(llm_int8(jnp.asarray(x), jnp.asarray(W), threshold=1e9)[0])).max()
    assert np.abs(x @ W.T - np.asarray(y)).max() < lost


def slow_sparse_gptq(W: np.ndarray, U: np.ndarray, base: int, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    W = W.astype(np.float64).copy()
    codes = np.zeros((W.shape[0], base))
    for start in range(0, base, 4):
        score = W[:, start : start + 4] ** 2 / np.diag(U)[start : start + 4] ** 2
        cut = np.argsort(-score, axis=1, kind="stable")[:, 2:]
        for i in range(4):
            at = start + i
            q = np.clip(np.round(W[:, at] / s), -8, 7)
            q[(cut == i).any(axis=1)] = 0
            codes[:, at] = q
            e = (W[:, at] - s * q) / U[at, at]
            W[:, at + 1 :] -= e[:, None] * U[at, at + 1 :]
    return codes, W[:, base:]


def test_sparse_gptq_is_its_loop() -> None:
    x = normal(200, 20) @ normal(20, 20)
    W = normal(6, 20)
    H = jnp.asarray(x.T @ x * (2 / 200))
    U, _ = inverse_factor(H, 0.01)
    dead = jnp.zeros(20, bool)
    codes, s, outliers = sparse_gptq(jnp.asarray(W), U, dead, base=16, bits=4, clip=False)
    expected, rest = slow_sparse_gptq(W, np.asarray(U, np.float64), 16, np.asarray(s, np.float64))
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_allclose(outliers, rest, rtol=1e-3, atol=1e-3)
    assert ((np.asarray(codes).reshape(6, 4, 4) != 0).sum(axis=2) <= 2).all()
    # What GPTQ passes on makes up for part of what is cut: better than cutting and rounding alone.
    kept = np.asarray(kept_of_four(jnp.asarray(W[:, :4].T), jnp.ones(4)))
    assert (kept.sum(axis=0) == 2).all()
    mask = np.concatenate(
        [np.asarray(kept_of_four(jnp.asarray(W[:, at : at + 4].T), jnp.ones(4))).T for at in range(0, 16, 4)], axis=1
    )
    plain = np.concatenate(
        [np.where(mask, np.clip(np.round(W[:, :16] / np.asarray(s)[:, None]), -8, 7) * np.asarray(s)[:, None], 0), W[:, 16:]],
        axis=1,
    )
    ours = np.concatenate([np.asarray(codes) * np.asarray(s)[:, None], np.asarray(outliers)], axis=1)
    assert np.linalg.norm(x @ (W - ours).T) < np.linalg.norm(x @ (W - plain).T)
    with pytest.raises(ValueError, match="not a multiple"):
        sparse_gptq(jnp.asarray(W), U, dead, base=15, bits=4, clip=False)


def slow_grid(w: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of every row of a group, as `groups.py` states them."""
    if symmetric:
        return np.abs(w).max(axis=1) / (2 ** (bits - 1) - 1), np.zeros(len(w))
    low, high = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)
    s = (high - low) / (2**bits - 1)
    return s, np.round(-low / s)


def slow_gptq_groups(
    W: np.ndarray, U: np.ndarray, group: int, bits: int, symmetric: bool, grids: tuple[np.ndarray, np.ndarray] | None
) -> np.ndarray:
    """Column by column in float64; each group's grid found when its first column comes, unless `grids` `[n, k]` are given."""
    W = W.astype(np.float64).copy()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    for i in range(W.shape[1]):
        if grids is not None:
            s, z = grids[0][:, i], grids[1][:, i]
        elif i % group == 0:
            s, z = slow_grid(W[:, i : i + group], bits, symmetric)
        w_hat = s * (np.clip(np.round(W[:, i] / s) + z, low, high) - z)
        error = (W[:, i] - w_hat) / U[i, i]
        W[:, i] = w_hat
        W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
    return W


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_in_groups_is_its_loop(symmetric: bool) -> None:
    rng = np.random.default_rng(11)
    x = rng.normal(size=(300, 40)) @ rng.normal(size=(40, 40))
    W = rng.normal(size=(6, 40)).astype(np.float32)
    H = jnp.asarray(x.T @ x / 300 + np.eye(40), jnp.float32)
    U, _ = inverse_factor(H, 0.01)
    dead, exact = jnp.zeros(40, bool), np.asarray(U, np.float64)
    # The last group is short.
    found = gptq_groups(jnp.asarray(W), U, dead, bits=4, group=16, symmetric=symmetric)
    expected = slow_gptq_groups(W, exact, 16, 4, symmetric, None)
    np.testing.assert_allclose(found.dequantize(16), expected, rtol=1e-3, atol=1e-3)
    # Static: the grids of rounding to nearest, in groups of any size.
    plain = rtn_groups(jnp.asarray(W), bits=4, group=6, symmetric=symmetric)
    scale, zero = spread(plain.scale, 6, 40), spread(plain.zero, 6, 40)
    codes = gptq_static_groups(jnp.asarray(W), U, dead, scale, zero, bits=4, symmetric=symmetric)
    static = slow_gptq_groups(W, exact, 6, 4, symmetric, (np.asarray(scale, np.float64), np.asarray(zero, np.float64)))
    np.testing.assert_allclose(np.asarray(scale) * (np.asarray(codes) - np.asarray(zero)), static, rtol=1e-3, atol=1e-3)
    # What is passed on makes up for part of what is lost.
    assert np.linalg.norm(x @ (W - static).T) < np.linalg.norm(x @ (W - np.asarray(plain.dequantize(6))).T)
    with pytest.raises(ValueError, match="multiple of 16"):
        gptq_groups(jnp.asarray(W), U, dead, bits=4, group=10, symmetric=symmetric)
