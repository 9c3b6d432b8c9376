"""Perplexity by position in the window, `PPL(t)`: does a model fail more, the longer its context is?

The failure analysis of the INT4 paper (arXiv 2301.12017): a quantized decoder whose errors accumulate falls behind the original
with every token it has read.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from quikjax.evaluation.distance import exponential, standard_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionRow:
    """Tokens that have between `first` and `last` tokens before them (both included) in their windows."""

    first: int
    last: int
    tokens: int
    perplexity: float
    stderr: float
    original_perplexity: float | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON object, without what is not known."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None and not math.isnan(value)}


def by_position(
    loss: Float64[np.ndarray, " tokens"],
    position: Int[np.ndarray, " tokens"],
    original_loss: Float64[np.ndarray, " tokens"] | None = None,
) -> list[PositionRow]:
    """Perplexity for positions 1, 2-3, 4-7, ... of a window.

    `position` counts the tokens that stand before a predicted one; `original_loss` is the original's cross-entropy of it.
    """
    rows = []
    first = 1
    while first <= position.max(initial=0):
        last = 2 * first - 1
        inside = (position >= first) & (position <= last)
        if inside.any():
            mine = loss[inside]
            perplexity = exponential(float(mine.mean()))
            rows.append(
                PositionRow(
                    first=first,
                    last=int(min(last, position.max())),
                    tokens=int(inside.sum()),
                    perplexity=perplexity,
                    stderr=perplexity * standard_error(mine),
                    original_perplexity=None if original_loss is None else exponential(float(original_loss[inside].mean())),
                )
            )
        first *= 2
    return rows
