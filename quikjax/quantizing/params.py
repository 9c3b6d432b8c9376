"""From a parameter tree, a recipe and statistics to a tree with packed weights: pure, on any Flax tree.

`quantize_params` does a whole tree in one call; `quantize_block` the layers of one transformer block that `stats` covers, which
is what the sequential pipeline loops over.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from quikjax.algorithms.descent import descend
from quikjax.algorithms.gptq import gptq
from quikjax.algorithms.numerics import all_finite, reduced_rows, relative_error, signal_to_noise, take_columns
from quikjax.algorithms.rtn import rtn
from quikjax.algorithms.sparsegpt import sparse_gptq
from quikjax.errors import QuikError
from quikjax.quantizing import outliers as choosing
from quikjax.quantizing.codebook import Order, abstract_codebook, quantize_matrix
from quikjax.quantizing.codebook_rule import CodebookRule, wants_proxies
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.groups import abstract_groups, quantize_groups
from quikjax.quantizing.level_clip import fixed_level_clip
from quikjax.quantizing.recipe import AnyRule, Recipe, Rule, find_recipe
from quikjax.quantizing.shared_inputs import SharedInputs, input_axes
from quikjax.quantizing.statistics import LayerStats
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.formats import PackedWeight, dequantize, is_packed
from quikjax.weights.groups import GroupWeight
from quikjax.weights.linear import linear
from quikjax.weights.quik import QuikWeight, as_matrix
from quikjax.weights.sparse import SparseWeight, sparse


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
    """The result of quantizing one layer: bits, outliers and errors.

    `relative_error` is `||y - y_hat|| / ||y||` of the layer's output on sampled calibration rows, weights and activations
    quantized (without statistics: of the weights alone); `snr_db` the same in decibels. `damping` is what GPTQ took, `None` for
    RTN. `level_clip`: that of the activations, `None` without one. `format` names the packed format in a word. `distilled`: of
    a block that was distilled, the mean squared error of its output over that before; errors are then of the trained weights.
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
    distilled: float | None = None

    def as_json(self) -> dict[str, Any]:
        """A JSON object; an infinite `snr_db` (an exact layer) becomes `None`, what there may not be and is not is left out."""
        fields = dataclasses.asdict(self)
        for name in ("level_clip", "distilled"):
            if fields[name] is None:
                del fields[name]
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
            `proxies` left out; the recipe distils.
    """
    recipe = find_recipe(recipe)
    if recipe.distillation is not None:
        raise QuikError(
            f'recipe "{recipe.name}" distils block after block, and parameters alone have no blocks; use quantize_model or '
            "quantize_checkpoint, or a recipe without distillation"
        )
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
    inputs = SharedInputs(hidden_size)
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
    inputs = SharedInputs(hidden_size)
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
    if isinstance(rule, GroupRule):
        return abstract_groups(rule, shape, (1,))
    kind: Any = QuikWeight if rule.sparsity is None else SparseWeight
    codes = {"qweight": None} if rule.sparsity is None else {"kept": None, "places": None}
    weight: PackedWeight = kind(
        **codes,
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
    return weight


def after_distillation(
    result: LayerResult, weight: PackedWeight, kernel: Float[Array, "n k"], sample: Float32[Array, "rows k"], loss: float
) -> LayerResult:
    """The result of a layer whose block was distilled to the share `loss` of its error, measured again on the same sample.

    A layer may be further from its original alone: it also makes up for what the others of its block lose.
    """
    error = float(_layer_error(weight, as_matrix(kernel, weight.in_axes).astype(jnp.float32), sample))
    return dataclasses.replace(result, relative_error=error, snr_db=signal_to_noise(error), distilled=loss)


def dotted_path(path: tuple[Any, ...]) -> str:
    """A pytree path as published names are written: `params.Dense_0.kernel`. The `.value` of an NNX variable is left out."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(names[:-1] if names and names[-1] == "value" else names)


def _quantize_kernel(
    path: str,
    kernel: Float[Array, "..."],
    rule: AnyRule,
    stats: LayerStats | None,
    scores: Float32[Array, " columns"] | None,
    inputs: SharedInputs,
) -> tuple[PackedWeight, LayerResult]:
    if stats is None and rule.needs_data():
        raise QuikError(
            f"{path} cannot be quantized without statistics of its input; calibrate, or use a recipe that needs no data"
        )
    in_axes = input_axes(path, rule, kernel.ndim)
    W = as_matrix(kernel, in_axes).astype(jnp.float32)
    n, k = W.shape
    if not all_finite(W):
        raise QuikError(f"{path} has weights that are not finite; the checkpoint is damaged")
    weight: PackedWeight
    if isinstance(rule, CodebookRule):
        weight, damping = _codebook_weight(path, W, rule, stats, scores, kernel.shape, in_axes, inputs)
    elif isinstance(rule, GroupRule):
        weight, damping = _group_weight(path, W, rule, stats, kernel.shape, in_axes, inputs)
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
        level_clip=None if isinstance(weight, CodebookWeight) else weight.level_clip,
    )


def _codebook_weight(
    path: str,
    W: Float32[Array, "n k"],
    rule: CodebookRule,
    stats: LayerStats | None,
    scores: Float32[Array, " columns"] | None,
    shape: tuple[int, ...],
    in_axes: tuple[int, ...],
    inputs: SharedInputs,
) -> tuple[CodebookWeight, float | None]:
    """A `CodebookWeight`, and the damping that GPTQ took."""
    k = W.shape[1]
    if scores is not None and scores.shape != (k,):
        raise QuikError(f"the proxies for {path} are of {scores.shape[0]} columns, the kernel has {k}")
    count = 0 if scores is None else rule.outlier_count(k)
    columns = jnp.arange(k, dtype=jnp.int32) if scores is None else choosing.base_then_outliers(scores, count)
    empty = abstract_codebook(rule, shape, in_axes, k - count, None if stats is None else stats.group)
    if rule.method == "rtn":
        return quantize_matrix(path, W, rule, columns, empty), None
    assert stats is not None
    shared = inputs.plain_factor(path, rule, stats, columns, count)
    order = Order(shared.rounded, shared.restore, shared.U, shared.dead)
    return quantize_matrix(path, W, rule, columns, empty, order), shared.damping


def _group_weight(
    path: str,
    W: Float32[Array, "n k"],
    rule: GroupRule,
    stats: LayerStats | None,
    shape: tuple[int, ...],
    in_axes: tuple[int, ...],
    inputs: SharedInputs,
) -> tuple[GroupWeight, float | None]:
    """A `GroupWeight`, and the damping that GPTQ took."""
    empty = abstract_groups(rule, shape, in_axes, None if stats is None else stats.group)
    if rule.method == "rtn":
        return quantize_groups(path, W, rule, empty), None
    assert stats is not None
    factor = inputs.plain_factor(path, rule, stats, jnp.arange(W.shape[1], dtype=jnp.int32), 0)
    return quantize_groups(path, W, rule, empty, factor), factor.damping


def _quik_weight(
    path: str,
    W: Float32[Array, "n k"],
    rule: Rule,
    stats: LayerStats | None,
    shape: tuple[int, ...],
    in_axes: tuple[int, ...],
    inputs: SharedInputs,
) -> tuple[QuikWeight | SparseWeight, float | None]:
    """A `QuikWeight`, or a `SparseWeight` where the rule wants one, and the damping that GPTQ took."""
    k, damping = W.shape[1], None
    base = k - (0 if stats is None else inputs.count(path, rule, stats))
    if rule.method == "gptq":
        assert stats is not None
        shared = inputs.factor(path, rule, stats)
        columns, damping = shared.columns, shared.damping
        permuted, how = take_columns(W, shared.rounded), {"bits": rule.weight_bits, "block": rule.column_block}
        search = gptq if rule.sparsity is None else sparse_gptq
        q, s, outliers = search(permuted, shared.U, shared.dead, base=base, clip=rule.clip, **how)
        if rule.sweeps:
            q, s, outliers = descend(permuted, shared.U, shared.S, shared.dead, q, s, sweeps=rule.sweeps, **how)
        if rule.sparsity is None:
            q = take_columns(q, shared.restore)
        else:
            columns = shared.rounded  # the order in which the pattern was chosen
    else:
        columns = jnp.arange(k, dtype=jnp.int32) if stats is None else inputs.columns(path, rule, stats)
        q, s, outliers = rtn(take_columns(W, columns), base=base, bits=rule.weight_bits, clip=rule.clip)

    group = None if stats is None else inputs.group(path, rule, stats)
    weight = pack(q, s, outliers, columns, rule, shape, in_axes, group)
    if stats is not None:
        weight = dataclasses.replace(weight, level_clip=inputs.level_clip(path, rule, stats))
    elif rule.level_clip != "search":
        weight = dataclasses.replace(weight, level_clip=fixed_level_clip(rule.level_clip, rule.activation_bits))
    if not all_finite(weight.outliers):
        raise QuikError(f'an outlier weight of {path} overflows {rule.outlier_dtype}; set outlier_dtype to "bfloat16"')
    return weight if rule.sparsity is None else sparse(weight), damping


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
    qweight, reduced, stored = _stored(q, s, outliers, rule.weight_bits, rule.outlier_dtype)
    return QuikWeight(
        qweight=qweight,
        scale=s,
        reduced=reduced,
        outliers=stored,
        columns=columns,
        weight_bits=rule.weight_bits,
        activation_bits=rule.activation_bits,
        shape=tuple(shape),
        in_axes=in_axes,
        base=q.shape[1],
        group=group,
    )


@partial(jax.jit, static_argnames=("bits", "outlier_dtype"))
def _stored(
    q: Int8[Array, "n base"], s: Float32[Array, " n"], outliers: Float[Array, "n outliers"], bits: int, outlier_dtype: str
) -> tuple[Array, Float32[Array, " n"], Float[Array, "n outliers"]]:
    return q.astype(jnp.int4 if bits == 4 else jnp.int8), reduced_rows(q, s), outliers.astype(outlier_dtype)


def _layer_error(weight: PackedWeight, W: Float32[Array, "n k"], sample: Float32[Array, "rows k"] | None) -> Array:
    if sample is None or sample.shape[0] == 0:
        return relative_error(W, as_matrix(dequantize(weight), weight.in_axes))
    y_hat = linear(sample.reshape(-1, *weight.in_shape), weight).reshape(sample.shape[0], -1)
    return _output_error(W, sample, y_hat)


@jax.jit
def _output_error(
    W: Float32[Array, "n k"], sample: Float32[Array, "rows k"], y_hat: Float[Array, "rows n"]
) -> Float32[Array, ""]:
    return relative_error(sample @ W.T, y_hat)
