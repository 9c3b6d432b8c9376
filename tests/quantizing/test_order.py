"""Which columns are outliers, in which order GPTQ rounds the others, and that how they are stored does not depend on that."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.quantizing.statistics import LayerStats, empty_stats, observe
from quikjax.weights.quik import QuikWeight

K, N, OUTLIERS = 60, 20, 4


def data(seed: int) -> tuple[np.ndarray, np.ndarray, LayerStats]:
    """Correlated columns of unequal size and a weight `[N, K]`."""
    rng = np.random.default_rng(seed)
    mix = np.eye(K) + rng.normal(size=(K, K)) / np.sqrt(K)
    X = (rng.normal(size=(400, K)) @ mix * np.exp(rng.normal(size=K))).astype(np.float32)
    return X, rng.normal(size=(N, K)).astype(np.float32), observe(empty_stats(K), jnp.asarray(X), rows=256)


def quantized(W: np.ndarray, stats: LayerStats, **fields: Any) -> QuikWeight:
    rule = Rule(match="weight", outliers=OUTLIERS, clip=False, **fields)
    return quantize_params({"weight": jnp.asarray(W)}, Recipe(name="x", rules=(rule,)), {"weight": stats})["weight"]


def slow(W: np.ndarray, X: np.ndarray, rounded: np.ndarray, s: np.ndarray) -> np.ndarray:
    """GPTQ in float64 over columns in a given order, outliers last: codes by column of the layer."""
    base = K - OUTLIERS
    W, X = W.astype(np.float64)[:, rounded], X.astype(np.float64)[:, rounded]
    H = 2 * X.T @ X
    H += 0.01 * np.mean(np.diag(H)) * np.eye(K)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    Q = np.zeros((N, K))
    for i in range(base):
        Q[:, rounded[i]] = np.clip(np.round(W[:, i] / s), -8, 7)
        W[:, i + 1 :] -= np.outer((W[:, i] - Q[:, rounded[i]] * s) / U[i, i], U[i, i + 1 :])
    return Q


@pytest.mark.parametrize("order", ["hessian", "activation"])
def test_codes_are_those_of_the_plain_loop_in_that_order(order: str) -> None:
    X, W, stats = data(0)
    weight = quantized(W, stats, order=order)
    weight.validate()
    stored = np.argsort(np.abs(X).max(axis=0), kind="stable")
    np.testing.assert_array_equal(weight.columns, stored)  # by rising maximum, whatever the order of rounding
    base = stored[: K - OUTLIERS]
    if order == "hessian":
        base = base[np.argsort(-np.sum(X.astype(np.float64) ** 2, axis=0)[base], kind="stable")]
    Q = slow(W, X, np.concatenate([base, stored[K - OUTLIERS :]]), np.asarray(weight.scale, np.float64))
    found = np.asarray(weight.qweight, np.int8)
    assert np.mean(found != Q[:, stored[: K - OUTLIERS]]) <= 2e-3


def test_rounding_what_matters_first_is_better() -> None:
    better = 0
    for seed in range(10):
        X, W, stats = data(seed)
        errors = []
        for order in ("hessian", "activation"):
            weight = quantized(W, stats, order=order)
            W_hat = np.zeros_like(W)
            codes = np.asarray(weight.qweight, np.float32) * np.asarray(weight.scale)[:, None]
            W_hat[:, np.asarray(weight.columns)] = np.concatenate([codes, np.asarray(weight.outliers, np.float32)], axis=1)
            errors.append(np.linalg.norm(X @ (W - W_hat).T))
        better += errors[0] < errors[1]
    assert better >= 8


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_outliers_by_the_largest_activation_or_by_the_mean_square(method: str) -> None:
    X, W, _ = data(3)
    X[:, 5] *= 0.01
    X[7, 5] = 1e3  # once, and never again
    X[:, 11] = np.where(np.arange(len(X)) % 2, 60.0, -60.0)
    stats = observe(empty_stats(K), jnp.asarray(X))
    for score, of_column in (("maximum", np.abs(X).max(axis=0)), ("mean_square", np.mean(X.astype(np.float64) ** 2, axis=0))):
        weight = quantized(W, stats, method=method, outlier_score=score)
        weight.validate()
        np.testing.assert_array_equal(weight.columns, np.argsort(of_column, kind="stable"))
    by_maximum = quantized(W, stats, method=method)
    assert by_maximum.columns[-1] == 5
    assert weight.columns[-1] == 11


def test_layers_that_choose_outliers_otherwise_share_no_factor() -> None:
    X, W, _ = data(4)
    X[7, 5] = 1e3
    stats = observe(empty_stats(K), jnp.asarray(X))
    rules = (
        Rule(match="first", outliers=OUTLIERS, in_axes=(1,)),
        Rule(match="second", outliers=OUTLIERS, in_axes=(1,), outlier_score="mean_square"),
    )
    tree = {"first": jnp.asarray(W), "second": jnp.asarray(W)}
    together = quantize_params(tree, Recipe(name="x", rules=rules), {"first": stats, "second": stats})
    assert (np.asarray(together["first"].columns) != np.asarray(together["second"].columns)).any()
    for name, rule in zip(tree, rules, strict=True):
        alone = quantize_params({name: tree[name]}, Recipe(name="x", rules=(rule,)), {name: stats})[name]
        np.testing.assert_array_equal(together[name].columns, alone.columns)
        np.testing.assert_array_equal(together[name].qweight, alone.qweight)
