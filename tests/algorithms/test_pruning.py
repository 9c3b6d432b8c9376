"""Masks against the rules they follow, spelled out number by number."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quikjax.algorithms.pruning import kept_layers, semi_structured, structured, unstructured


def matrix(seed: int, n: int, k: int) -> np.ndarray:
    """Small whole numbers, so that many are equal."""
    return np.random.default_rng(seed).integers(-4, 5, (n, k)).astype(np.float32)


@given(st.integers(0, 99), st.sampled_from([(1, 4), (3, 8), (2, 11), (2, 3)]))
def test_two_of_four_are_the_largest(seed: int, shape: tuple[int, int]) -> None:
    W = matrix(seed, *shape)
    mask = np.asarray(semi_structured(jnp.asarray(W)))
    for row, kept in zip(W, mask, strict=True):
        for at in range(0, shape[1] - shape[1] % 4, 4):
            four = [abs(float(x)) for x in row[at : at + 4]]
            first = sorted(range(4), key=lambda i: (-four[i], i))[:2]
            assert [i for i in range(4) if kept[at + i]] == sorted(first)
        assert kept[shape[1] // 4 * 4 :].all()


@given(st.integers(0, 99), st.sampled_from([0.1, 0.5, 0.75]))
def test_the_smallest_share_goes(seed: int, share: float) -> None:
    W = matrix(seed, 3, 7)
    mask = np.asarray(unstructured(jnp.asarray(W), share))
    order = sorted(range(W.size), key=lambda i: (-abs(float(W.flat[i])), i))
    assert sorted(np.flatnonzero(mask)) == sorted(order[: W.size - round(W.size * share)])


@given(st.integers(0, 99), st.sampled_from([1, 2, 4]))
def test_whole_units_go_by_the_norm_of_their_columns(seed: int, width: int) -> None:
    W = matrix(seed, 3, 8)
    mask = np.asarray(structured(jnp.asarray(W), 0.5, width))
    norms = [sum(abs(float(x)) for x in W[:, at : at + width].flat) for at in range(0, 8, width)]
    units = len(norms)
    kept = sorted(range(units), key=lambda i: (-norms[i], i))[: units - round(units * 0.5)]
    for unit in range(units):
        assert (mask[:, unit * width : (unit + 1) * width] == (unit in kept)).all()


def test_layers_go_evenly() -> None:
    assert kept_layers(6, 2) == (0, 2, 3, 5)
    assert kept_layers(12, 3) == (0, 1, 3, 4, 6, 7, 8, 10, 11)
    assert kept_layers(6, 0) == tuple(range(6))
    assert kept_layers(6, 5) == (0,)
