"""Scales, clip search, codes and outliers against their equations, written the slow way in float64."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quikjax.algorithms.numerics import (
    clipped_scales,
    codes,
    reduced_rows,
    relative_error,
    row_scales,
    signal_to_noise,
)

# Every shape is a compilation.
shapes = st.sampled_from([(1, 1), (6, 24), (2, 9)])
matrices = hnp.arrays(np.float32, shapes, elements=st.floats(-100, 100, width=32, allow_subnormal=False))


def slow_codes(W: np.ndarray, s: np.ndarray, bits: int) -> np.ndarray:
    qmax = 2 ** (bits - 1) - 1
    # float32 reciprocal and product, as the definition says; rounding half to even.
    return np.clip(np.round(W * (np.float32(1) / s)[:, None]), -qmax - 1, qmax)


@given(matrices, st.sampled_from([4, 8]))
@settings(deadline=None)
def test_scales_and_codes_follow_their_equations(W: np.ndarray, bits: int) -> None:
    qmax = 2 ** (bits - 1) - 1
    s = np.asarray(row_scales(jnp.asarray(W), bits))
    largest = np.abs(W).max(axis=1)
    expected = largest * np.float32(1 / qmax)
    expected[expected < np.finfo(np.float32).tiny] = 1  # so small a row is a row of zeros
    np.testing.assert_array_equal(s, expected)
    q = np.asarray(codes(jnp.asarray(W), jnp.asarray(s), bits))
    np.testing.assert_array_equal(q, slow_codes(W, s, bits))
    assert np.abs(q).max() <= qmax + 1
    # Round to nearest: never further than half a step (and float32's own rounding).
    assert (np.abs(W - q * s[:, None].astype(np.float64)) <= s[:, None] * (0.5 + 1e-4)).all()
    jitted = jax.jit(codes, static_argnums=2)(jnp.asarray(W), jnp.asarray(s), bits)
    np.testing.assert_array_equal(q, np.asarray(jitted))


def test_a_row_of_zeros_has_scale_one() -> None:
    W = jnp.zeros((2, 5)).at[1, 2].set(3.0)
    np.testing.assert_array_equal(row_scales(W, 4), np.array([1, np.float32(3) * np.float32(1 / 7)], np.float32))
    np.testing.assert_array_equal(row_scales(jnp.zeros((3, 0)), 4), np.ones(3))
    np.testing.assert_array_equal(clipped_scales(W, 4)[0], 1.0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["heavy", "normal", "uniform", "two values", "lonely maximum", "zeros"])
def test_clip_search_is_the_first_strict_minimum(kind: str, bits: int) -> None:
    rng = np.random.default_rng(0)
    W = {
        "heavy": rng.standard_t(3, size=(12, 60)),
        "normal": rng.normal(size=(12, 60)),
        "uniform": rng.uniform(-1, 1, (12, 60)),
        "two values": rng.choice([-0.3, 1.0], (3, 60)),
        "lonely maximum": np.concatenate([np.full((3, 1), 40.0), rng.normal(size=(3, 300)) * 0.01], axis=1),
        "zeros": np.concatenate([np.zeros((1, 60)), rng.normal(size=(2, 60))]),
    }[kind].astype(np.float32)
    found = np.asarray(clipped_scales(jnp.asarray(W), bits))
    full = np.asarray(row_scales(jnp.asarray(W), bits))
    for row in range(len(W)):
        errors = []
        for i in range(80):
            s = np.float32(full[row] * (np.float32(1) - np.float32(i) * np.float32(0.01)))
            w_hat = slow_codes(W[row : row + 1], np.array([s]), bits)[0] * np.float64(s)
            errors.append(np.sum(np.abs(W[row].astype(np.float64) - w_hat) ** 2.4))
        best = int(np.argmin(errors))
        chosen = int(np.argmin([abs(found[row] - full[row] * (1 - i / 100)) for i in range(80)]))
        # float32 sums may take a neighbour whose error is the same to seven digits, nothing else.
        assert errors[chosen] <= errors[best] * (1 + 1e-5), (row, chosen, best)


def test_clipping_helps_a_row_with_a_lonely_maximum() -> None:
    rng = np.random.default_rng(1)
    W = rng.normal(size=(1, 256)).astype(np.float32)
    W[0, 3] = 12.0
    full, clipped = row_scales(jnp.asarray(W), 4), clipped_scales(jnp.asarray(W), 4)
    assert clipped[0] < full[0]
    errors = [np.linalg.norm(W - np.asarray(codes(jnp.asarray(W), s, 4)) * np.asarray(s)[:, None]) for s in (full, clipped)]
    assert errors[1] < errors[0]


def test_reduced_and_errors() -> None:
    q = jnp.asarray([[1, -2, 3], [7, 7, 7]], jnp.int8)
    np.testing.assert_allclose(reduced_rows(q, jnp.asarray([0.5, 2.0])), [1.0, 42.0])
    y = jnp.asarray([3.0, 4.0])
    assert float(relative_error(y, y)) == 0
    assert float(relative_error(y, jnp.asarray([3.0, 3.0]))) == pytest.approx(0.2)
    assert float(relative_error(jnp.zeros(2), jnp.zeros(2))) == 0
    assert np.isinf(float(relative_error(jnp.zeros(2), y)))
    assert signal_to_noise(0.0) == np.inf
