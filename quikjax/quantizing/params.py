"""From a parameter tree, a recipe and statistics to a tree with packed weights: pure, on any Flax tree.

`quantize_params` does a whole tree in one call; `quantize_block` the layers of one transformer block that `stats` covers, which
is what the sequential pipeline loops over.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32

from quikjax.algorithms.descent import curvature, descend
from quikjax.algorithms.gptq import gptq, inverse_factor, revive_dead_columns
from quikjax.algorithms.numerics import reduced_rows, relative_error, signal_to_noise
from quikjax.algorithms.rtn import rtn
from quikjax.errors import QuikError
from quikjax.quantizing import outliers as choosing
from quikjax.quantizing.codebook import Order, abstract_codebook, quantize_matrix
from quikjax.quantizing.codebook_rule import CodebookRule, wants_proxies
from quikjax.quantizing.level_clip import search_level_clip
from quikjax.quantizing.recipe import AnyRule, Recipe, Rule, find_recipe
from quikjax.quantizing.statistics import LayerStats
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.formats import PackedWeight, dequantize, is_packed
from quikjax.weights.linear import linear
from quikjax.weights.quik import QuikWeight, as_matrix


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
    """The result of quantizing one layer: bits, outliers and errors.

    `relative_error` is `||y - y_hat|| / ||y||` of the layer's output on sampled calibration rows, weights and activations
    quantized (without statistics: of the weights alone); `snr_db` the same in decibels. `damping` is what GPTQ took, `None` for
    RTN. `level_clip`: that of 4-bit activations, `None` without one. `format` names the packed format in a word.
    """

    path: str
    format: str
    outputs: int
    inputs: int
    method: str
    weight_bits: int
    activation_bits: int
    outliers: int
    relative_error: float
    snr_db: float
    damping: float | None
    bits_per_weight: float
    level_clip: tuple[int, int] | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON object; an infinite `snr_db` (an exact layer) becomes `None`, a `level_clip` that there is not is left out."""
        fields = dataclasses.asdict(self)
        if self.level_clip is None:
            del fields["level_clip"]
        fields["snr_db"] = None if np.isinf(self.snr_db) else self.snr_db
        return fields


OnLayer = Callable[[LayerResult], None]


def quantize_params(
    params: Any,
    recipe: Recipe | str,
    stats: Mapping[str, LayerStats] | None = None,
    *,
    hidden_size: int | None = None,
    proxies: Mapping[str, Float32[Array, " k"]] | None = None,
    on_layer: OnLayer | None = None,
) -> Any:
    """Replace every kernel that a rule of `recipe` matches by a packed weight; the tree's structure and other leaves stay.

    Args:
        params: any pytree of arrays: our models' nested dictionaries, an `nnx.State`, a Linen `params` collection.
        recipe: rules over dotted paths, or a recipe's name.
        stats: statistics of each matched kernel's input, by dotted path. May be `None` for a recipe that needs no data.
        hidden_size: the model's width, to which numbers of outliers refer; left out, each layer's own input width.
        proxies: scores of each matched kernel's input columns, by dotted path, for codebook rules with proxy outliers
            (`quantizing.proxies`). A kernel without scores gets no outliers.
        on_layer: called with one `LayerResult` per layer, in the tree's order.

    Raises:
        QuikError: a recipe with rules matches nothing; statistics are missing, of another width or not finite; a weight is not
            finite, or an outlier overflows its dtype; a kernel's input axes cannot be known; proxy outliers are wanted and
            `proxies` left out.
    """
    recipe = find_recipe(recipe)
    if proxies is None and wants_proxies(recipe.rules):
        raise QuikError(f'recipe "{recipe.name}" has proxy outliers; give proxies, or quantize the model with quantize_model')
    leaves, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)
    paths = [dotted_path(path) for path, _ in leaves]
    rules = [
        recipe.rule_for(path) if isinstance(leaf, jax.Array | np.ndarray) else None
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    if recipe.rules and not any(rules):
        some = ", ".join(paths[:3])
        raise QuikError(f'recipe "{recipe.name}" matches none of the {len(paths)} parameters ({some}, ...)')
    inputs = _Inputs(hidden_size)
    for path, rule, (_, leaf) in zip(paths, rules, leaves, strict=True):
        if rule is not None:
            inputs.expect(path, leaf, rule, (stats or {}).get(path))
    scores = proxies or {}
    results = []
    for path, rule, (_, leaf) in zip(paths, rules, leaves, strict=True):
        if rule is None:
            results.append(leaf)
            continue
        weight, outcome = _quantize_kernel(path, leaf, rule, (stats or {}).get(path), scores.get(path), inputs)
        if on_layer is not None:
            on_layer(outcome)
        results.append(weight)
    return jax.tree.unflatten(structure, results)


def quantize_block(
    params: Mapping[str, Any],
    recipe: Recipe | str,
    stats: Mapping[str, LayerStats | None],
    *,
    prefix: str = "",
    hidden_size: int | None = None,
    proxies: Mapping[str, Float32[Array, " k"]] | None = None,
    on_layer: OnLayer | None = None,
) -> dict[str, Any]:
    """Quantize the layers of one block that `stats` covers and the recipe matches; everything else stays.

    `params` are the block's own, a flat dictionary by dotted path; `stats` has the same keys, and `None` where a rule needs no
    data. `proxies`, as of `quantize_params`, has paths within the block too. `prefix` is put before a path for the recipe's
    rules and the report (`model.layers.3.`). Layers sharing one `LayerStats` share outliers and the Hessian's factorization.

    Raises:
        QuikError: as `quantize_params`.
    """
    recipe = find_recipe(recipe)
    inputs = _Inputs(hidden_size)
    rules = {path: rule for path in stats if (rule := recipe.rule_for(prefix + path)) is not None}
    for path, rule in rules.items():
        inputs.expect(prefix + path, params[path], rule, stats[path])
    result = dict(params)
    for path, rule in rules.items():
        score = (proxies or {}).get(path)
        result[path], outcome = _quantize_kernel(prefix + path, params[path], rule, stats[path], score, inputs)
        if on_layer is not None:
            on_layer(outcome)
    return result


def abstract_weight(rule: AnyRule, shape: tuple[int, ...], base: int) -> PackedWeight:
    """The packed weight `[N, K]` that a rule makes, without its arrays: its `bits` counts what it stores."""
    if isinstance(rule, CodebookRule):
        return abstract_codebook(rule, shape, (1,), base)
    return QuikWeight(
        qweight=None,
        scale=None,
        reduced=None,
        outliers=None,
        columns=None,
        weight_bits=rule.weight_bits,
        activation_bits=rule.activation_bits,
        shape=shape,
        in_axes=(1,),
        base=base,
        group=None,
    )


def dotted_path(path: tuple[Any, ...]) -> str:
    """A pytree path as published names are written: `params.Dense_0.kernel`. The `.value` of an NNX variable is left out."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(names[:-1] if names and names[-1] == "value" else names)


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


class _Inputs:
    """What layers that read one tensor decide together and make once: outliers, level clip, the Hessian's factor.

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
        if isinstance(rule, CodebookRule):
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
            self._counts[known] = wanted if choosing.has_outliers(path, stats, threshold) else 0
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
        return stats.group if stats.group is None or first == key else f"{stats.group}.{rule.outlier_score}"

    def level_clip(self, path: str, rule: Rule, stats: LayerStats) -> tuple[int, int] | None:
        """Return the rule's level clip, or the best on samples."""
        if rule.level_clip != "search":
            return rule.level_clip
        key = self._key(path, rule, stats)
        if key not in self._clips:
            base = self.columns(path, rule, stats)[: stats.absmax.shape[0] - self.count(path, rule, stats)]
            real = jnp.arange(stats.sample.shape[0]) < stats.filled
            self._clips[key] = search_level_clip(stats.sample[:, base], real, [W[:, base] for W in self._views(key)])
        return self._clips[key]

    def factor(self, path: str, rule: Rule, stats: LayerStats) -> "Factor":
        """Return the Hessian's factor in GPTQ's order."""
        key = (self._key(path, rule, stats), rule.damping, rule.order, rule.sweeps > 0)
        if key not in self._factors:
            self._factors[key] = _factor(path, rule, stats, self.columns(path, rule, stats), self.count(path, rule, stats))
        return self._factors[key]

    def codebook_factor(
        self, path: str, rule: CodebookRule, stats: LayerStats, columns: Int32[Array, " k"], count: int
    ) -> "Factor":
        """Return the Hessian's factor in GPTQ's order of these columns."""
        key = (id(stats), np.asarray(columns[columns.shape[0] - count :]).tobytes(), rule.damping, rule.order)
        if key not in self._factors:
            self._factors[key] = _factor(path, rule, stats, columns, count)
        return self._factors[key]

    def _key(self, path: str, rule: Rule, stats: LayerStats) -> tuple[int, int, str]:
        return id(stats), self.count(path, rule, stats), rule.outlier_score

    def _views(self, key: Any) -> list[Float32[Array, "n k"]]:
        return [as_matrix(kernel, in_axes).astype(jnp.float32) for kernel, in_axes in self._matrices[key]]


def _factor(path: str, rule: AnyRule, stats: LayerStats, columns: Int32[Array, " k"], count: int) -> Factor:
    base = columns[: columns.shape[0] - count]
    order = jnp.arange(base.shape[0]) if rule.order == "stored" else choosing.rounding_order(stats, base, rule.order)
    rounded = jnp.concatenate([base[order], columns[base.shape[0] :]])
    H, dead = permuted_hessian(stats.hessian, stats.count, rounded)
    U, damping = inverse_factor(H, rule.damping)
    if not bool(jnp.isfinite(U).all()):
        raise QuikError(f"the Hessian of {path} stays indefinite up to a damping of {damping:.3g}; calibrate on more text")
    S = curvature(U, base=base.shape[0]) if rule.sweeps else None
    # Seven digits are all a float32 has; the rest would only look precise.
    return Factor(columns, rounded, jnp.argsort(order), U, S, dead, float(f"{damping:.7g}"))


@jax.jit
def permuted_hessian(
    hessian: Float32[Array, "k k"], count: Array, columns: Array
) -> tuple[Float32[Array, "k k"], Bool[Array, " k"]]:
    """The paper's `H` from a sum over `count` sequences, permuted, dead columns revived; compiled as one, it is held once."""
    H = hessian[columns[:, None], columns] * (2 / jnp.maximum(count, 1).astype(jnp.float32))
    return revive_dead_columns(H)


def _quantize_kernel(
    path: str,
    kernel: Float[Array, "..."],
    rule: AnyRule,
    stats: LayerStats | None,
    scores: Float32[Array, " columns"] | None,
    inputs: _Inputs,
) -> tuple[PackedWeight, LayerResult]:
    if stats is None and rule.needs_data():
        raise QuikError(
            f"{path} cannot be quantized without statistics of its input; calibrate, or use a recipe that needs no data"
        )
    in_axes = input_axes(path, rule, kernel.ndim)
    W = as_matrix(kernel, in_axes).astype(jnp.float32)
    n, k = W.shape
    if not bool(jnp.isfinite(W).all()):
        raise QuikError(f"{path} has weights that are not finite; the checkpoint is damaged")
    weight: PackedWeight
    if isinstance(rule, CodebookRule):
        weight, damping = _codebook_weight(path, W, rule, stats, scores, kernel.shape, in_axes, inputs)
    else:
        weight, damping = _quik_weight(path, W, rule, stats, kernel.shape, in_axes, inputs)
    error = float(_layer_error(weight, W, None if stats is None else stats.sample[: int(stats.filled)]))
    return weight, LayerResult(
        path=path,
        format=weight.label,
        outputs=n,
        inputs=k,
        method=rule.method,
        weight_bits=weight.weight_bits,
        activation_bits=weight.activation_bits,
        outliers=k - weight.base,
        relative_error=error,
        snr_db=signal_to_noise(error),
        damping=damping,
        bits_per_weight=weight.bits() / (n * k),
        level_clip=weight.level_clip if isinstance(weight, QuikWeight) else None,
    )


def _codebook_weight(
    path: str,
    W: Float32[Array, "n k"],
    rule: CodebookRule,
    stats: LayerStats | None,
    scores: Float32[Array, " columns"] | None,
    shape: tuple[int, ...],
    in_axes: tuple[int, ...],
    inputs: _Inputs,
) -> tuple[CodebookWeight, float | None]:
    """A `CodebookWeight`, and the damping that GPTQ took."""
    k = W.shape[1]
    if scores is not None and scores.shape != (k,):
        raise QuikError(f"the proxies for {path} are of {scores.shape[0]} columns, the kernel has {k}")
    count = 0 if scores is None else rule.outlier_count(k)
    columns = jnp.arange(k, dtype=jnp.int32)
    if scores is not None:
        chosen = choosing.largest_last(scores, count)
        columns = jnp.concatenate([jnp.sort(chosen[: k - count]), jnp.sort(chosen[k - count :])])
    empty = abstract_codebook(rule, shape, in_axes, k - count, None if stats is None else stats.group)
    if rule.method == "rtn":
        return quantize_matrix(path, W, rule, columns, empty), None
    assert stats is not None
    shared = inputs.codebook_factor(path, rule, stats, columns, count)
    order = Order(shared.rounded, shared.restore, shared.U, shared.dead)
    return quantize_matrix(path, W, rule, columns, empty, order), shared.damping


def _quik_weight(
    path: str,
    W: Float32[Array, "n k"],
    rule: Rule,
    stats: LayerStats | None,
    shape: tuple[int, ...],
    in_axes: tuple[int, ...],
    inputs: _Inputs,
) -> tuple[QuikWeight, float | None]:
    """A `QuikWeight`, and the damping that GPTQ took."""
    k, damping = W.shape[1], None
    base = k - (0 if stats is None else inputs.count(path, rule, stats))
    if rule.method == "gptq":
        assert stats is not None
        shared = inputs.factor(path, rule, stats)
        columns, damping = shared.columns, shared.damping
        permuted, how = W[:, shared.rounded], {"bits": rule.weight_bits, "block": rule.column_block}
        q, s, outliers = gptq(permuted, shared.U, shared.dead, base=base, clip=rule.clip, **how)
        if rule.sweeps:
            q, s, outliers = descend(permuted, shared.U, shared.S, shared.dead, q, s, sweeps=rule.sweeps, **how)
        q = q[:, shared.restore]
    else:
        columns = jnp.arange(k, dtype=jnp.int32) if stats is None else inputs.columns(path, rule, stats)
        q, s, outliers = rtn(W[:, columns], base=base, bits=rule.weight_bits, clip=rule.clip)

    group = None if stats is None else inputs.group(path, rule, stats)
    weight = pack(q, s, outliers, columns, rule, shape, in_axes, group)
    if stats is not None:
        weight = dataclasses.replace(weight, level_clip=inputs.level_clip(path, rule, stats))
    elif rule.level_clip != "search":
        weight = dataclasses.replace(weight, level_clip=rule.level_clip)
    if not bool(jnp.isfinite(weight.outliers.astype(jnp.float32)).all()):
        raise QuikError(f'an outlier weight of {path} overflows {rule.outlier_dtype}; set outlier_dtype to "bfloat16"')
    return weight, damping


def pack(
    q: Int8[Array, "n base"],
    s: Float32[Array, " n"],
    outliers: Float[Array, "n outliers"],
    columns: Array,
    rule: Rule,
    shape: tuple[int, ...],
    in_axes: tuple[int, ...],
    group: str | None,
) -> QuikWeight:
    """A `QuikWeight` from a quantizer's codes, scales and outlier columns (in the order of `columns`)."""
    return QuikWeight(
        qweight=q.astype(jnp.int4 if rule.weight_bits == 4 else jnp.int8),
        scale=s,
        reduced=reduced_rows(q, s),
        outliers=outliers.astype(rule.outlier_dtype),
        columns=columns,
        weight_bits=rule.weight_bits,
        activation_bits=rule.activation_bits,
        shape=tuple(shape),
        in_axes=in_axes,
        base=q.shape[1],
        group=group,
    )


def _layer_error(weight: PackedWeight, W: Float32[Array, "n k"], sample: Float32[Array, "rows k"] | None) -> Array:
    if sample is None or sample.shape[0] == 0:
        return relative_error(W, as_matrix(dequantize(weight), weight.in_axes))
    y_hat = linear(sample.reshape(-1, *weight.in_shape), weight).reshape(sample.shape[0], -1)
    return relative_error(sample @ W.T, y_hat)
