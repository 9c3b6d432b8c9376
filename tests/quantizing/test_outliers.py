"""Which columns are outliers, against the definition written the slow way."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quikjax.errors import QuikError
from quikjax.quantizing.outliers import count_outliers, has_outliers, largest_last, outliers_last, range_outliers, rounding_order
from quikjax.quantizing.statistics import LayerStats, empty_stats, observe

ROWS, K = 12, 10


def stats_of(x: np.ndarray) -> LayerStats:
    return observe(empty_stats(x.shape[-1], rows=len(x)), jnp.asarray(x, jnp.float32), rows=len(x))


def cost(x: np.ndarray, norms: np.ndarray, base: list[int]) -> float:
    """Return `J` of `range_outliers` in float64."""
    kept = x[:, base]
    return float(np.mean((kept.max(1) - kept.min(1)) ** 2) * norms[base].sum())


def greedy(x: np.ndarray, norms: np.ndarray, count: int) -> list[float]:
    """Drop the column that leaves the least cost, again and again; return the costs along the way."""
    base, costs = list(range(x.shape[1])), []
    for _ in range(count):
        trials = [cost(x, norms, [k for k in base if k != column]) for column in base]
        base.pop(int(np.argmin(trials)))
        costs.append(min(trials))
    return costs


# Every size is a compilation.
@given(
    hnp.arrays(np.float32, st.sampled_from([1, 4, 40]), elements=st.floats(0, 1e6, width=32, allow_subnormal=False)), st.data()
)
@settings(deadline=None, max_examples=40)
def test_the_largest_come_last_in_a_permutation(a: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([0, 1, len(a)]))
    columns = np.asarray(largest_last(jnp.asarray(a), count))
    expected = np.arange(len(a)) if count == 0 else np.argsort(a, kind="stable")
    np.testing.assert_array_equal(columns, expected)


@given(
    x=hnp.arrays(np.float32, (ROWS, K), elements=st.floats(-100, 100, width=16, allow_subnormal=False)),
    norms=hnp.arrays(np.float32, K, elements=st.floats(0.5, 4, width=16)),
    filled=st.integers(2, ROWS),
)
@settings(deadline=None, max_examples=60)
def test_range_outliers_are_the_greedy_choice(x: np.ndarray, norms: np.ndarray, filled: int) -> None:
    """Ties may fall either way, so the cost that is reached is compared, not the columns. Rows that do not count do not."""
    dropped = np.asarray(range_outliers(jnp.asarray(x), jnp.arange(ROWS) < filled, jnp.asarray(norms), 1))
    assert dropped.sum() == 1
    wide, weights = x[:filled].astype(np.float64), norms.astype(np.float64)
    reached = cost(wide, weights, list(np.flatnonzero(~dropped)))
    assert reached <= greedy(wide, weights, 1)[0] * (1 + 1e-5) + 1e-6


def test_several_range_outliers_are_dropped_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, K)) * np.exp(rng.normal(size=K))
    norms = rng.uniform(1, 2, K)
    dropped = np.asarray(range_outliers(jnp.asarray(x, jnp.float32), jnp.ones(ROWS, bool), jnp.asarray(norms, jnp.float32), 4))
    reached = cost(x, norms, list(np.flatnonzero(~dropped)))
    np.testing.assert_allclose(reached, greedy(x, norms, 4)[-1], rtol=1e-5)


def test_what_many_tokens_share_is_worth_more_than_one_large_value() -> None:
    x = np.full((ROWS, K), 0.1)
    x[0, 3] = 20.0  # once
    x[:, 7] = 10.0  # always
    stats, matrices = stats_of(x), [jnp.ones((4, K))]
    assert int(outliers_last(stats, 1, "maximum")[-1]) == 3
    assert int(outliers_last(stats, 1, "range", matrices)[-1]) == 7
    assert int(outliers_last(stats, 1, "mean_square")[-1]) == 7
    for count in (0, K - 1, K):
        assert sorted(np.asarray(outliers_last(stats, count, "range", matrices))) == list(range(K))


def test_the_order_of_rounding() -> None:
    stats = stats_of(np.asarray([[1.0, 3.0, 2.0, 9.0]]))
    base = outliers_last(stats, 1, "maximum")[:3]
    np.testing.assert_array_equal(base, [0, 2, 1])
    np.testing.assert_array_equal(rounding_order(stats.hessian, base), [2, 1, 0])


def test_a_threshold_and_what_is_not_finite() -> None:
    stats = stats_of(np.asarray([[1.0, -3.0]]))
    assert has_outliers("layer", stats, 0.0)
    assert has_outliers("layer", stats, 2.9)
    assert not has_outliers("layer", stats, 3.0)
    with pytest.raises(QuikError, match="enter layer are not finite"):
        has_outliers("layer", stats_of(np.asarray([[1.0, np.inf]])), 0.0)


def test_counts_may_exceed_the_columns_for_callers_to_refuse() -> None:
    assert count_outliers("auto", 4096) == 256
    assert count_outliers(10, 4) == 10
    assert count_outliers(0.5, 32, 16, scaled=True) == 16
