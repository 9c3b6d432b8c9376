"""How far a quantized encoder's embeddings are from the original's: their cosines, and whether similarities keep their order."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from quikjax.algorithms.ranks import spearman
from quikjax.errors import QuikError


class Similarity(NamedTuple):
    """Two models' embeddings `a_i`, `b_i` of the same texts, all of length 1.

    `cosine`, `cosine_5th_percentile` and `cosine_least` are of `a_i . b_i` over the texts; `spearman` is the rank correlation of
    `a_i . a_j` and `b_i . b_j` over all pairs `i < j`; `same_nearest` how often the other text nearest to a text is the same.
    """

    cosine: float
    cosine_5th_percentile: float
    cosine_least: float
    spearman: float
    same_nearest: float


def compare_embeddings(
    original: Float[np.ndarray, "texts width"], quantized: Float[np.ndarray, "others their_width"]
) -> Similarity:
    """Compare two models by their embeddings of the same texts, which are normalized here.

    Raises:
        QuikError: there are fewer than three texts, or not the same number and width of embeddings.
    """
    if original.shape != quantized.shape:
        raise QuikError(f"embeddings of the same texts are compared; these are {original.shape} and {quantized.shape}")
    if len(original) < 3:
        raise QuikError(f"similarities are compared over at least 3 texts, not {len(original)}")
    a, b = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (original.astype(np.float64), quantized))
    cosine = np.sum(a * b, axis=1)
    above = np.triu_indices(len(a), 1)
    grids = [vectors @ vectors.T for vectors in (a, b)]
    nearest = [np.argmax(grid - 3 * np.eye(len(grid)), axis=1) for grid in grids]
    return Similarity(
        cosine=float(cosine.mean()),
        cosine_5th_percentile=float(np.percentile(cosine, 5)),
        cosine_least=float(cosine.min()),
        spearman=spearman(grids[0][above], grids[1][above]),
        same_nearest=float(np.mean(nearest[0] == nearest[1])),
    )
