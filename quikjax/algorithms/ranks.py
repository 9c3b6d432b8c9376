"""How alike two scores order the same things."""

import numpy as np
from jaxtyping import Array, Float


def spearman(one: Float[Array | np.ndarray, " k"], other: Float[Array | np.ndarray, " k"]) -> float:
    """Spearman's rank correlation of two scores of the same things; ties take the mean of their ranks.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0]))
    0.5
    """
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (one, other)]
    deviations = [rank - rank.mean() for rank in ranks]
    size = np.sqrt(np.prod([np.sum(deviation**2) for deviation in deviations]))
    return float(np.sum(deviations[0] * deviations[1]) / size) if size else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
