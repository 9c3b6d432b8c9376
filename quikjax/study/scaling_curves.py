"""Curves of loss over model bits, one per precision, and which of them is lowest at a budget (arXiv 2212.09720, section 4).

A point is a model written with some bits: how many in all, and its loss in nats per token on the same windows of text as all
others. Between the models of a family a precision's loss is interpolated linearly over the logarithm of the bits; beyond them
it says nothing.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

# The paper caps perplexity at 100: beyond, a model has broken down, and how far says nothing.
CAP = math.log(100)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model in one precision: all its bits, and the loss in nats per token of every window."""

    bits: int
    losses: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Winner:
    """The best precision at one budget of bits.

    `losses` of every precision that reaches the budget, capped. `wins` is the share of resamples of the windows in which each
    is lowest: what the choice of text leaves open. (What the choice of models leaves open is not in it.)
    """

    budget: float
    precision: str
    losses: Mapping[str, float]
    wins: Mapping[str, float]


def interpolate(points: Sequence[tuple[float, float]], bits: float) -> float | None:
    """The loss at a number of bits, linear over log bits between the nearest points; `None` outside them.

    >>> interpolate([(1e6, 4.0), (1e8, 2.0)], 1e7), interpolate([(1e6, 4.0), (1e8, 2.0)], 2e8)
    (3.0, None)
    """
    ordered = sorted(points)
    if not ordered or not ordered[0][0] * (1 - 1e-12) <= bits <= ordered[-1][0] * (1 + 1e-12):
        return None
    x = [math.log(point[0]) for point in ordered]
    return float(np.interp(math.log(bits), x, [point[1] for point in ordered]))


def budgets(curves: Mapping[str, Sequence[Measured]], count: int = 9) -> list[float]:
    """Numbers of bits, evenly spaced in their logarithm, from the first to the last that two precisions reach."""
    ends = [(min(point.bits for point in points), max(point.bits for point in points)) for points in curves.values() if points]
    edges = sorted({bits for end in ends for bits in end})
    inside = [bits for bits in edges if sum(low <= bits <= high for low, high in ends) >= 2]
    return [float(bits) for bits in np.geomspace(inside[0], inside[-1], count)] if inside else []


def winners(
    curves: Mapping[str, Sequence[Measured]], at: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> list[Winner]:
    """The best precision at every budget that at least two of them reach.

    Windows are resampled together for all points (they are the same text), so what is common to all of them cancels.
    """
    count = min((len(point.losses) for points in curves.values() for point in points), default=0)
    if not count:
        return []
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    found = []
    for budget in at:
        losses, drawn = {}, {}
        for name, points in curves.items():
            whole = interpolate([(float(point.bits), min(float(np.mean(point.losses)), CAP)) for point in points], budget)
            if whole is not None:
                losses[name] = whole
                drawn[name] = _interpolated([(point.bits, _resampled(point.losses, draws)) for point in points], budget)
        if len(losses) < 2:
            continue
        names = list(losses)
        lowest = np.argmin(np.stack([drawn[name] for name in names]), axis=0)
        wins = {name: float(np.mean(lowest == index)) for index, name in enumerate(names)}
        best = min(losses, key=lambda name: losses[name])
        found.append(Winner(budget=budget, precision=best, losses=losses, wins=wins))
    return found


def pearson(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation; `None` of fewer than three pairs, or where one side does not vary.

    >>> pearson([1.0, 2.0, 3.0], [6.0, 4.0, 2.0])
    -1.0
    """
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    x, y = np.asarray(one, np.float64) - np.mean(one), np.asarray(other, np.float64) - np.mean(other)
    return float(np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)))


def _resampled(losses: Sequence[float], draws: np.ndarray) -> Float[np.ndarray, " resamples"]:
    return np.minimum(np.asarray(losses, np.float64)[draws].mean(axis=1), CAP)


def _interpolated(points: Sequence[tuple[int, np.ndarray]], bits: float) -> Float[np.ndarray, " resamples"]:
    """`interpolate` of many draws at once; `bits` is within the points."""
    ordered = sorted(points, key=lambda point: point[0])
    x = [math.log(point[0]) for point in ordered]
    after = min(max(int(np.searchsorted(x, math.log(bits))), 1), len(x) - 1) if len(x) > 1 else 0
    before = max(after - 1, 0)
    share = 0.0 if after == before else min(max((math.log(bits) - x[before]) / (x[after] - x[before]), 0.0), 1.0)
    return ordered[before][1] * (1 - share) + ordered[after][1] * share
