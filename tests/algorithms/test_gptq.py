"""GPTQ against its equations in float64, and against what it is for."""

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.algorithms.gptq import gptq, inverse_factor, revive_dead_columns
from quikjax.algorithms.rtn import rtn


def correlated(rng: np.random.Generator, k: int, tokens: int) -> np.ndarray:
    """Activations whose columns are correlated and of unequal size, as real ones are."""
    mix = np.eye(k) + rng.normal(size=(k, k)) / np.sqrt(k)
    return rng.normal(size=(tokens, k)) @ mix * np.exp(rng.normal(size=k))


def slow_gptq(W: np.ndarray, H: np.ndarray, base: int, bits: int, s: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Column by column in float64, without blocks; spec: QUIK, section 2."""
    W, H, qmax = W.astype(np.float64), H.astype(np.float64).copy(), 2 ** (bits - 1) - 1
    for dead in np.flatnonzero(np.diag(H) == 0):
        H[dead, dead], W[:, dead] = 1, 0
    H += damping * np.mean(np.diag(H)) * np.eye(len(H))
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    Q = np.zeros((len(W), base))
    for i in range(base):
        Q[:, i] = np.clip(np.round(W[:, i] / s), -qmax - 1, qmax)
        e = (W[:, i] - Q[:, i] * s) / U[i, i]
        W[:, i + 1 :] -= np.outer(e, U[i, i + 1 :])
    return Q, W[:, base:]


def run(W: np.ndarray, H: np.ndarray, base: int, bits: int, *, clip: bool = False, damping: float = 0.01, block: int = 128):  # type: ignore[no-untyped-def]
    revived, dead = revive_dead_columns(jnp.asarray(H))
    U, used = inverse_factor(revived, damping)
    q, s, outliers = gptq(jnp.asarray(W), U, dead, base=base, bits=bits, clip=clip, block=block)
    return np.asarray(q), np.asarray(s), np.asarray(outliers), float(used)


@pytest.mark.parametrize(
    ("n", "k", "base", "bits", "block"),
    [
        (5, 40, 36, 4, 128),  # less than a block
        (24, 128, 128, 4, 128),  # one block, no outliers
        pytest.param(24, 256, 240, 8, 128, marks=pytest.mark.long),
        pytest.param(17, 300, 290, 4, 128, marks=pytest.mark.long),  # no multiple of anything
        (9, 300, 1, 4, 128),  # a single base column
        (33, 700, 513, 4, 128),  # the base ends one column into a block
        (8, 200, 180, 4, 32),  # many small blocks: all four phases
    ],
)
def test_codes_and_absorbed_outliers_equal_the_plain_loop(n: int, k: int, base: int, bits: int, block: int) -> None:
    rng = np.random.default_rng(k)
    X = correlated(rng, k, 3 * k)
    H = (X.T @ X).astype(np.float32)
    W = rng.normal(size=(n, k)).astype(np.float32)
    q, s, outliers, _ = run(W, H, base, bits, block=block)
    Q, O = slow_gptq(W, H, base, bits, s.astype(np.float64), 0.01)
    # float32 may round a value at half a step the other way, and what follows then differs: rare, and small.
    assert np.mean(q != Q) <= 2e-3
    if (q == Q).all():
        np.testing.assert_allclose(outliers, O, atol=2e-4 * np.abs(W).max())


def test_everything_an_outlier_leaves_the_weight_alone() -> None:
    rng = np.random.default_rng(0)
    W = rng.normal(size=(3, 20)).astype(np.float32)
    q, s, outliers, _ = run(W, np.eye(20, dtype=np.float32), 0, 4)
    assert q.shape == (3, 0)
    np.testing.assert_array_equal(s, np.ones(3))
    np.testing.assert_array_equal(outliers, W)


def test_dead_columns_become_zero() -> None:
    rng = np.random.default_rng(0)
    X = correlated(rng, 30, 90)
    X[:, [4, 29]] = 0
    W = rng.normal(size=(6, 30)).astype(np.float32)
    q, _, outliers, _ = run(W, (X.T @ X).astype(np.float32), 28, 4)
    np.testing.assert_array_equal(q[:, 4], 0)
    np.testing.assert_array_equal(outliers[:, 1], 0)
    Q, _ = slow_gptq(W, (X.T @ X), 28, 4, np.asarray(run(W, (X.T @ X).astype(np.float32), 28, 4)[1], np.float64), 0.01)
    np.testing.assert_array_equal(q, Q)


def test_gptq_beats_rounding_on_the_layers_output_and_outliers_absorb_error() -> None:
    rng = np.random.default_rng(3)
    X = correlated(rng, 192, 800)
    W = rng.normal(size=(64, 192)).astype(np.float32)
    H = (X.T @ X).astype(np.float32)

    def error(q: np.ndarray, s: np.ndarray, outliers: np.ndarray) -> float:
        return float(np.linalg.norm(X @ (W - np.concatenate([q * s[:, None], outliers], axis=1)).T))

    plain = error(*(np.asarray(part) for part in rtn(jnp.asarray(W), base=180, bits=4, clip=False)))
    q, s, outliers, _ = run(W, H, 180, 4)
    assert error(q, s, outliers) < 0.8 * plain
    assert error(q, s, outliers) < error(q, s, W[:, 180:])  # the same codes without the absorbed error


def test_the_factor_is_the_inverses_and_damping_grows_until_it_exists() -> None:
    rng = np.random.default_rng(0)
    X = correlated(rng, 50, 200)
    H = (X.T @ X).astype(np.float32)
    U, damping = inverse_factor(jnp.asarray(H), 0.01)
    assert float(damping) == pytest.approx(0.01)
    damped = H.astype(np.float64) + 0.01 * np.mean(np.diag(H)) * np.eye(50)
    np.testing.assert_array_equal(np.tril(np.asarray(U), -1), 0)
    np.testing.assert_allclose(np.asarray(U, np.float64).T @ np.asarray(U), np.linalg.inv(damped), rtol=2e-3, atol=1e-6)
    # A matrix with a negative eigenvalue: 0.01 and 0.1 of the mean diagonal do not mend it.
    broken = np.eye(4, dtype=np.float32)
    broken[0, 1] = broken[1, 0] = 1.5
    U, damping = inverse_factor(jnp.asarray(broken), 0.01)
    assert float(damping) == pytest.approx(1.0)
    assert np.isfinite(np.asarray(U)).all()
    U, _ = inverse_factor(jnp.full((4, 4), jnp.nan), 0.01)
    assert not np.isfinite(np.asarray(U)).any()


def test_a_block_that_is_no_multiple_of_a_panel_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        gptq(jnp.ones((2, 8)), jnp.eye(8), jnp.zeros(8, bool), base=8, bits=4, clip=False, block=24)
