"""Similarity of two models' embeddings against its definition."""

import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.evaluation.similarity import compare_embeddings


def test_it_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((7, 5)).astype(np.float32)
    b = a + 0.4 * rng.standard_normal((7, 5)).astype(np.float32)
    found = compare_embeddings(a, b)

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(sum(x * y) / np.sqrt(sum(x * x) * sum(y * y)))

    cosines = [cosine(*pair) for pair in zip(a.astype(float), b.astype(float), strict=True)]
    np.testing.assert_allclose(found.cosine, sum(cosines) / 7, rtol=1e-6)
    np.testing.assert_allclose(found.cosine_least, min(cosines), rtol=1e-6)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    ranks = [np.argsort(np.argsort([cosine(x[i], x[j]) for i, j in pairs])) for x in (a.astype(float), b.astype(float))]
    count = len(pairs)
    expected = 1 - 6 * float(np.sum((ranks[0] - ranks[1]) ** 2)) / (count * (count**2 - 1))
    np.testing.assert_allclose(found.spearman, expected, rtol=1e-6)
    nearest = [[max((cosine(x[i], x[j]), j) for j in range(7) if j != i)[1] for i in range(7)] for x in (a, b)]
    assert found.same_nearest == np.mean([one == other for one, other in zip(*nearest, strict=True)])


def test_the_same_embeddings_are_alike_whatever_their_length() -> None:
    a = np.random.default_rng(1).standard_normal((5, 4))
    found = compare_embeddings(a, 2 * a)
    np.testing.assert_allclose(found, (1, 1, 1, 1, 1))


def test_what_cannot_be_compared() -> None:
    with pytest.raises(QuikError, match=r"\(3, 4\) and \(3, 5\)"):
        compare_embeddings(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(QuikError, match="at least 3 texts, not 2"):
        compare_embeddings(np.ones((2, 4)), np.ones((2, 4)))
