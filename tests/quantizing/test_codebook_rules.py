"""Codebook rules through `quantize_params` and the pipeline: data types and algorithms apart, GPTQ, proxy outliers."""

import json
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from quikjax import checkpoint
from quikjax.algorithms import codebooks
from quikjax.algorithms.gptq import gptq_codebook, inverse_factor
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.errors import QuikError
from quikjax.loading import load_params, open_source
from quikjax.models.base import count_parameters
from quikjax.models.registry import abstract_model, dotted, pure_params
from quikjax.planning.plan import make_plan
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.quantizing.model import quantize_model
from quikjax.quantizing.params import LayerResult, quantize_params
from quikjax.quantizing.recipe import RECIPES, Recipe, Rule, codebook_recipe, find_recipe
from quikjax.quantizing.statistics import empty_stats, observe
from quikjax.reports.artifact import read_report
from quikjax.testing import forward, tiny_config, tiny_model
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.formats import dequantize_params
from quikjax.weights.linear import linear
from quikjax.weights.quik import QuikWeight

ONE_BLOCK = {"num_hidden_layers": 1}


def slow_gptq(W: np.ndarray, H: np.ndarray, absmax: np.ndarray, table: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Column by column with the whole inverse Hessian, in float64: `(W_hat, outliers)`."""
    W, inverse = W.astype(np.float64).copy(), np.linalg.inv(H.astype(np.float64))
    for i in range(base):
        m = absmax[:, i]
        nearest = np.argmin(np.abs(table[None] - (W[:, i] / np.where(m > 0, m, 1))[:, None]), axis=1)
        w_hat = table[nearest] * m
        error = (W[:, i] - w_hat) / inverse[i, i]
        W[:, i + 1 :] -= error[:, None] * inverse[i, i + 1 :]
        W[:, i] = w_hat
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return W[:, :base], W[:, base:]


@pytest.mark.parametrize("table", [codebooks.integer(3), codebooks.normal_float(4), codebooks.floating(5)])
def test_gptq_into_a_codebook_is_its_equation(table: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    n, k, base, block = 6, 40, 37, 16
    W = rng.normal(size=(n, k)).astype(np.float32)
    x = rng.normal(size=(200, k)) @ rng.normal(size=(k, k))
    H = (x.T @ x / 200 + np.eye(k)).astype(np.float32)
    U, damping = inverse_factor(jnp.asarray(H), 0.01)
    absmax = np.array(codebooks.spread(codebooks.block_absmax(jnp.asarray(W[:, :base].reshape(-1)), block), n * base, block))
    absmax = absmax.reshape(n, base)
    codes, outliers = gptq_codebook(
        jnp.asarray(W), U, jnp.zeros(k, bool), jnp.asarray(absmax), jnp.asarray(table), base=base, block=16
    )
    damped = H + damping * np.diag(H).mean() * np.eye(k)
    expected, expected_outliers = slow_gptq(W, damped, absmax, table.astype(np.float64), base)
    found = table[np.asarray(codes)] * absmax
    # One weight near the middle between two values may fall to the other side, and shift those behind it.
    assert (np.abs(found - expected) < 1e-4).mean() > 0.98
    np.testing.assert_allclose(outliers, expected_outliers, atol=0.05)


def correlated(rows: int, k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, k)) @ rng.normal(size=(k, k))).astype(np.float32)


@pytest.mark.parametrize(("data_type", "bits"), [("int", 3), ("nf", 4), ("quantile", 3), ("dynamic", 5)])
def test_gptq_lowers_the_error_whatever_the_data_type(data_type: Any, bits: int) -> None:
    x = correlated(512, 64)
    params = {"a.weight": jnp.asarray(np.random.default_rng(1).normal(size=(32, 64)), jnp.float32)}
    stats = {"a.weight": observe(empty_stats(64), jnp.asarray(x), rows=256)}
    errors: dict[str, list[float]] = {"rtn": [], "gptq": []}
    methods: tuple[Literal["rtn", "gptq"], ...] = ("rtn", "gptq")
    for method in methods:
        rule = CodebookRule(match="weight", data_type=data_type, bits=bits, block=32, method=method)
        packed = quantize_params(
            params,
            Recipe(name="mine", rules=(rule,)),
            stats,
            on_layer=lambda layer, method=method: errors[method].append(layer.relative_error),  # type: ignore[misc]
        )
        packed["a.weight"].validate()
        y = linear(jnp.asarray(x), packed["a.weight"])
        exact = x @ np.asarray(params["a.weight"]).T
        assert float(np.linalg.norm(y - exact) / np.linalg.norm(exact)) == pytest.approx(errors[method][0], rel=0.1)
    assert errors["gptq"][0] < 0.8 * errors["rtn"][0]


def test_gptq_takes_layers_of_one_tensor_centered_with_outliers_and_dead_columns() -> None:
    x = correlated(300, 48)
    x[:, 5] = 0
    shared = observe(empty_stats(48, group="in"), jnp.asarray(x), rows=128)
    rng = np.random.default_rng(2)
    params = {name: jnp.asarray(rng.normal(size=(16, 48)) + 0.5, jnp.float32) for name in ("a.weight", "b.weight")}
    rule = CodebookRule(
        match="weight", data_type="float", bits=4, block=50, method="gptq", centered=True, proxy=0.1, absmax="double"
    )
    scores = jnp.asarray(rng.random(48), jnp.float32)
    packed = quantize_params(
        params, Recipe(name="m", rules=(rule,)), dict.fromkeys(params, shared), proxies=dict.fromkeys(params, scores)
    )
    for weight in packed.values():
        weight.validate()
        assert (weight.inputs - weight.base, weight.group) == (5, "in")
        assert set(np.asarray(weight.columns)) == set(np.argsort(np.asarray(scores))[-5:])


def test_data_type_and_algorithm_are_named_in_rules_and_recipes(tmp_path: Path) -> None:
    recipe = find_recipe("nf4").with_codebook(block=128, proxy=0.02, method="gptq")
    assert recipe.needs_data()
    assert not find_recipe("nf4").needs_data()
    assert all(isinstance(rule, CodebookRule) and rule.block == 128 for rule in recipe.rules)
    both = Recipe(name="both", rules=(Rule(match="down_proj"), *recipe.rules))
    assert Recipe.model_validate_json(both.model_dump_json()) == both
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "mine", "rules": [{"match": "x", "data_type": "int", "bit": 3}]}))
    with pytest.raises(QuikError, match=r"mine.json is not a recipe: rules\.0\.bit: Extra inputs"):
        find_recipe(file)
    for name, bits in (("int3", 3), ("float8", 8), ("fp4", 4)):
        rule = RECIPES[name].rules[0]
        assert (rule.weight_bits, rule.activation_bits) == (bits, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 2}, "greater than or equal to 3"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"data_type": "fp4", "bits": 5}, "fp4 has 4 bits, not 5"),
        ({"exponent_bits": 3}, 'data type "int" has no exponent_bits'),
        ({"data_type": "float", "exponent_bits": 4}, "from 1 to 3 exponent bits, not 4"),
        ({"block": 0}, "greater than or equal to 1"),
        ({"proxy": 1.5}, "less than or equal to 1"),
        ({"data_type": "int5"}, "Input should be"),
        ({"match": "("}, "not a regular expression"),
        ({"weight_bits": 4}, "Extra inputs"),
    ],
)
def test_rules_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CodebookRule(**{"match": "x", "data_type": "int", "bits": 4, **fields})


def test_options_that_do_not_belong_to_a_recipe_are_refused() -> None:
    with pytest.raises(QuikError, match='recipe "quik-4b" has no codebooks; --block belongs to recipes such as int4'):
        find_recipe("quik-4b").with_codebook(block=64)
    with pytest.raises(QuikError, match="block cannot be 0"):
        find_recipe("int4").with_codebook(block=0)
    with pytest.raises(QuikError, match='recipe "int4" has codebooks, whose outlier columns need no data'):
        find_recipe("int4").with_outliers(4)
    with pytest.raises(QuikError, match="there is no data type int9"):
        codebook_recipe("int", 9)


def test_weights_that_are_not_finite_are_refused() -> None:
    params = {"model.layers.0.mlp.up_proj.weight": jnp.full((4, 8), jnp.nan)}
    with pytest.raises(QuikError, match=r"up_proj\.weight has weights that are not finite; the checkpoint is damaged"):
        quantize_params(params, "nf4")
    with pytest.raises(
        QuikError, match='recipe "nf4" has proxy outliers; give proxies, or quantize the model with quantize_model'
    ):
        quantize_params({"a.q_proj.weight": jnp.ones((4, 8))}, find_recipe("nf4").with_codebook(proxy=0.1))
    with pytest.raises(QuikError, match=r"the proxies for a\.q_proj\.weight are of 9 columns, the kernel has 8"):
        quantize_params(
            {"a.q_proj.weight": jnp.ones((4, 8))},
            find_recipe("nf4").with_codebook(proxy=0.1),
            proxies={"a.q_proj.weight": jnp.ones(9)},
        )


@pytest.mark.long
def test_a_checkpoint_becomes_an_artifact_and_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Plan, quantize, report, restore, generate's model, sizes and export: a codebook recipe with proxy outliers."""
    recipe = find_recipe("int5").with_codebook(block=100, proxy=0.05)
    config = tiny_config()
    plan = make_plan(config, recipe, memory_bytes=10**9)
    assert not plan.problems
    assert any("no proxy outliers for attention_input of the first block" in note for note in plan.notes)
    out = tmp_path / "a"
    done = quantize_checkpoint(tiny_checkpoint, out, recipe)
    assert len(done.layers) == 21
    sizes = checkpoint.sizes(out)
    assert plan.quantized_bytes * 8 == sizes.linear_bits
    found = read_report(out)
    assert {kind.format for kind in found.layers} == {"int5/100"}
    assert sum(kind.count for kind in found.layers) == 21
    assert {(layer.pattern, layer.outliers, layer.count) for layer in plan.layers} == {
        (kind.pattern, kind.outliers, kind.count) for kind in found.layers
    }
    assert sum(row["outliers"] == 0 for row in done.layers) == 3  # the first block's q, k, v

    model, _ = checkpoint.restore(out)
    params = pure_params(model)
    source = open_source(tiny_checkpoint)
    abstract = abstract_model(source.config)
    whole: Any = load_params(source, abstract, list(dotted(pure_params(abstract))), jnp.float32)
    assert count_parameters(params) == count_parameters(whole)
    direct = quantize_model(nnx.merge(nnx.split(abstract)[0], whole), recipe, [])
    ids = jnp.arange(20)[None]
    logits = forward(model, ids)
    np.testing.assert_array_equal(logits, forward(nnx.merge(nnx.split(model)[0], direct), ids))
    dense = forward(nnx.merge(nnx.split(abstract)[0], dequantize_params(params)), ids)
    np.testing.assert_allclose(logits, dense, rtol=1e-4, atol=1e-4)

    export_safetensors(out, tmp_path / "hf", dtype="float32")
    exported = open_source(tmp_path / "hf")
    again: Any = load_params(exported, abstract, list(dotted(pure_params(abstract))), jnp.float32)
    for path, leaf in dotted(dequantize_params(params)).items():
        np.testing.assert_array_equal(leaf, dotted(again)[path])


@pytest.mark.long
def test_a_mixed_recipe_calibrates_and_keeps_both_formats() -> None:
    model = tiny_model(**ONE_BLOCK, num_key_value_heads=4)
    recipe = Recipe(
        name="mixed",
        rules=(
            Rule(match="down_proj", weight_bits=8, activation_bits=8, outliers=4),
            *find_recipe("nf4").with_codebook(method="gptq", proxy=0.1).rules,
        ),
    )
    seen: list[LayerResult] = []
    params = quantize_model(model, recipe, [jax.random.randint(jax.random.key(0), (2, 64), 0, 257)], on_layer=seen.append)
    kinds = {path: type(leaf) for path, leaf in dotted(params).items() if "proj" in path}
    assert {kind for path, kind in kinds.items() if "down_proj" in path} == {QuikWeight}
    assert {kind for path, kind in kinds.items() if "down_proj" not in path} == {CodebookWeight}
    assert {layer.format for layer in seen} == {"W8A8", "nf4/64"}
    assert all(layer.relative_error < 0.2 for layer in seen)
    out = forward(nnx.merge(nnx.split(model)[0], params), jnp.arange(30)[None])
    assert bool(jnp.isfinite(out).all())
