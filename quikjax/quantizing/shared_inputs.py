"""Decisions that layers that read one tensor take together, once: outliers, level clip, the Hessian's factor."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from quikjax.algorithms.descent import curvature
from quikjax.algorithms.gptq import inverse_factor, revive_dead_columns
from quikjax.algorithms.numerics import all_finite, take_columns
from quikjax.errors import QuikError
from quikjax.quantizing import outliers as choosing
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.level_clip import fixed_level_clip, search_level_clip
from quikjax.quantizing.recipe import AnyRule, Rule
from quikjax.quantizing.statistics import LayerStats
from quikjax.weights.quik import as_matrix


@dataclasses.dataclass(frozen=True)
class Factor:
    """Shared by layers with one input: the permutation as it is stored, and GPTQ's order with the factor in that order.

    `rounded` int32 `[K]`: base columns in the order in which GPTQ rounds them, then the outliers as stored. `restore` int32 `[B]`
    puts codes in that order back into the stored one. `U`: factor of the equally permuted, damped inverse Hessian. `S`: its
    `descent.curvature`, if the rule wants sweeps.
    """

    columns: Any
    rounded: Any
    restore: Any
    U: Any
    S: Any
    dead: Any
    damping: float


def input_axes(path: str, rule: AnyRule, ndim: int) -> tuple[int, ...]:
    """Find the input axes of the kernel at `path`, which has `ndim`: the rule's, or by the convention of its name.

    Raises:
        QuikError: the rule's do not fit, or nothing says.
    """
    if rule.in_axes is not None:
        axes = tuple(axis % ndim if -ndim <= axis < ndim else axis for axis in rule.in_axes)
        if not axes or len(set(axes)) != len(axes) or len(axes) >= ndim or max(axes) >= ndim:
            raise QuikError(f"in_axes {rule.in_axes} do not fit {path}, which has {ndim} axes")
        return axes
    name = path.rpartition(".")[2]
    if ndim == 2 and name in ("weight", "kernel"):
        return (1,) if name == "weight" else (0,)
    raise QuikError(f"which axes of {path} ({ndim} axes) are inputs is not known; state in_axes in the rule that matches it")


class SharedInputs:
    """Decisions that layers that read one tensor take together, once: outliers, level clip, the Hessian's factor.

    All layers are announced by `expect` before the first is asked for, since a choice may depend on the weights of all of them.
    """

    def __init__(self, hidden_size: int | None) -> None:
        self._hidden_size = hidden_size
        self._counts: dict[tuple[int, float, int], int] = {}
        self._matrices: dict[Any, list[tuple[Array, tuple[int, ...]]]] = {}
        self._columns: dict[Any, Array] = {}
        self._clips: dict[Any, tuple[int, int] | None] = {}
        self._factors: dict[Any, Factor] = {}

    def expect(self, path: str, kernel: Float[Array, "..."], rule: AnyRule, stats: LayerStats | None) -> None:
        """Announce a layer. Its weight is kept if a choice depends on it."""
        if stats is None:
            return
        in_axes = input_axes(path, rule, kernel.ndim)
        k = math.prod(kernel.shape[axis] for axis in in_axes)
        if stats.absmax.shape != (k,):
            raise QuikError(f"the statistics for {path} are of {stats.absmax.shape[0]} columns, the kernel has {k}")
        if not isinstance(rule, Rule):
            choosing.has_outliers(path, stats, 0.0)  # says so if an activation is not finite
        else:
            self._matrices.setdefault(self._key(path, rule, stats), []).append((kernel, in_axes))

    def count(self, path: str, rule: Rule, stats: LayerStats) -> int:
        """Count the outliers of a layer."""
        threshold = rule.zero_threshold * (2 if rule.weight_bits == 8 else 1)
        k = stats.absmax.shape[0]
        wanted = rule.wanted_outliers(k, self._hidden_size)
        known = (id(stats), threshold, wanted)
        if known not in self._counts:
            self._counts[known] = wanted if choosing.has_outliers(path, stats, threshold) else rule.fitting(0, k)
        if self._counts[known] > k:
            raise QuikError(f"{path} has {k} input columns, fewer than the {wanted} outliers that the recipe wants; use fewer")
        return self._counts[known]

    def columns(self, path: str, rule: Rule, stats: LayerStats) -> Int32[Array, " k"]:
        """Return the permutation with the outliers last, the same for all layers that choose them alike."""
        key = self._key(path, rule, stats)
        if key not in self._columns:
            members = self._views(key) if rule.outlier_score == "range" else []
            self._columns[key] = choosing.outliers_last(stats, self.count(path, rule, stats), rule.outlier_score, members)
        return self._columns[key]

    def group(self, path: str, rule: Rule, stats: LayerStats) -> str | None:
        """Name the layers whose columns are these: that of the tensor, unless others on it chose otherwise."""
        key = self._key(path, rule, stats)
        first = next(other for other in self._matrices if other[:2] == key[:2])
        if stats.group is None:
            return None
        group = stats.group if first == key else f"{stats.group}.{rule.outlier_score}"
        # Sparse weights are stored in the order of rounding.
        return group if rule.sparsity is None else f"{group}.{rule.order}"

    def level_clip(self, path: str, rule: Rule, stats: LayerStats) -> tuple[int, int] | None:
        """Return the rule's level clip, or the best on samples."""
        if rule.level_clip != "search":
            return fixed_level_clip(rule.level_clip, rule.activation_bits)
        key = self._key(path, rule, stats)
        if key not in self._clips:
            base = self.columns(path, rule, stats)[: stats.absmax.shape[0] - self.count(path, rule, stats)]
            real = jnp.arange(stats.sample.shape[0]) < stats.filled
            self._clips[key] = search_level_clip(
                take_columns(stats.sample, base), real, [take_columns(W, base) for W in self._views(key)]
            )
        return self._clips[key]

    def factor(self, path: str, rule: Rule, stats: LayerStats) -> "Factor":
        """Return the Hessian's factor in GPTQ's order."""
        key = (self._key(path, rule, stats), rule.damping, rule.order, rule.sweeps > 0)
        if key not in self._factors:
            self._factors[key] = _factor(path, rule, stats, self.columns(path, rule, stats), self.count(path, rule, stats))
        return self._factors[key]

    def plain_factor(
        self, path: str, rule: CodebookRule | GroupRule, stats: LayerStats, columns: Int32[Array, " k"], count: int
    ) -> "Factor":
        """Return the Hessian's factor in GPTQ's order of these columns, the last `count` of them not rounded."""
        key = (id(stats), np.asarray(columns[columns.shape[0] - count :]).tobytes(), rule.damping, rule.order)
        if key not in self._factors:
            self._factors[key] = _factor(path, rule, stats, columns, count)
        return self._factors[key]

    def _key(self, path: str, rule: Rule, stats: LayerStats) -> tuple[int, int, str]:
        return id(stats), self.count(path, rule, stats), rule.outlier_score

    def _views(self, key: Any) -> list[Float32[Array, "n k"]]:
        return [as_matrix(kernel, in_axes).astype(jnp.float32) for kernel, in_axes in self._matrices[key]]


def _factor(path: str, rule: AnyRule, stats: LayerStats, columns: Int32[Array, " k"], count: int) -> Factor:
    base = columns.shape[0] - count
    rounded, restore = _order(stats.hessian, columns, base, by_hessian=rule.order == "hessian")
    H, dead = permuted_hessian(stats.hessian, stats.count, rounded)
    U, damping = inverse_factor(H, rule.damping)
    if not all_finite(U):
        raise QuikError(f"the Hessian of {path} stays indefinite up to a damping of {damping:.3g}; calibrate on more text")
    S = curvature(U, base=base) if rule.sweeps else None
    # Seven digits are all a float32 has; the rest would only look precise.
    return Factor(columns, rounded, restore, U, S, dead, float(f"{damping:.7g}"))


@partial(jax.jit, static_argnames=("base", "by_hessian"))
def _order(
    hessian: Float32[Array, "k k"], columns: Int32[Array, " k"], base: int, *, by_hessian: bool
) -> tuple[Int32[Array, " k"], Int32[Array, " base"]]:
    """`rounded` and `restore` of a `Factor`."""
    stored = columns[:base]
    order = choosing.rounding_order(hessian, stored) if by_hessian else jnp.arange(base, dtype=jnp.int32)
    return jnp.concatenate([stored[order], columns[base:]]), jnp.argsort(order)


@jax.jit
def permuted_hessian(
    hessian: Float32[Array, "k k"], count: Int32[Array, ""], columns: Int32[Array, " k"]
) -> tuple[Float32[Array, "k k"], Bool[Array, " k"]]:
    """The paper's `H` from a sum over `count` sequences, permuted, dead columns revived; compiled as one, it is held once."""
    H = hessian[columns[:, None], columns] * (2 / jnp.maximum(count, 1).astype(jnp.float32))
    return revive_dead_columns(H)
