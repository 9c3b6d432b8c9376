"""The search for a level clip, and how a rule's choice reaches the packed weight."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quikjax.errors import QuikError
from quikjax.pallas_kernels.reference import symmetric_clip
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.level_clip import LEVEL_CLIPS, search_level_clip
from quikjax.quantizing.params import LayerResult, quantize_params
from quikjax.quantizing.recipe import Recipe, Rule, find_recipe
from quikjax.quantizing.statistics import empty_stats, observe
from quikjax.weights.linear import linear


def slow_error(x: np.ndarray, W: np.ndarray, clip: tuple[int, int]) -> float:
    """`||W (x_hat - x)||^2` in float64, every token rounded to the nearest of its 16 levels."""
    total = 0.0
    for row in x.astype(np.float64):
        step = (row.max() - row.min()) / clip[0]
        grid = row.min() + step * np.arange(clip[1], clip[1] + 16)
        nearest = grid[np.abs(grid[:, None] - row).argmin(0)]
        total += float(np.sum((W.astype(np.float64) @ (nearest - row)) ** 2))
    return total


@given(seed=st.integers(0, 10_000), tail=st.floats(1.5, 30))
@settings(deadline=None, max_examples=25)
def test_the_search_finds_the_least_error(seed: int, tail: float) -> None:
    """From light to heavy tails. Where two pairs are as good as each other, either will do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(tail, size=(20, 24)).astype(np.float32)
    W = rng.normal(size=(8, 24)).astype(np.float32)
    real = np.arange(20) < 13
    found = search_level_clip(jnp.asarray(x), jnp.asarray(real), [jnp.asarray(W[:3]), jnp.asarray(W[3:])])
    errors = {clip: slow_error(x[real], W, clip) for clip in LEVEL_CLIPS}
    assert errors[found or (15, 0)] <= min(errors.values()) * 1.001


def test_values_at_both_ends_want_no_clip_and_long_tails_do() -> None:
    rng = np.random.default_rng(0)
    ends, W = np.sign(rng.normal(size=(64, 32))), jnp.asarray(rng.normal(size=(8, 32)), jnp.float32)
    assert search_level_clip(jnp.asarray(ends, jnp.float32), jnp.ones(64, bool), [W]) is None
    normal = rng.normal(size=(256, 512)).astype(np.float32)
    wide = jnp.asarray(rng.normal(size=(8, 512)), jnp.float32)
    assert search_level_clip(jnp.asarray(normal), jnp.ones(256, bool), [wide]) is not None
    assert search_level_clip(jnp.zeros((4, 0)), jnp.ones(4, bool), [jnp.zeros((3, 0))]) is None


@pytest.mark.parametrize(("asked", "one"), [("search", None), ((16, 1), (16, 1)), ("symmetric", (16, -8)), (None, None)])
def test_layers_that_share_an_input_share_the_level_clip(
    asked: str | tuple[int, int] | None, one: tuple[int, int] | None
) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(128, 256)).astype(np.float32)
    stats = observe(empty_stats(256, group="in"), jnp.asarray(x), rows=128)
    tree = {name: {"kernel": jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)} for name in "ab"}
    rule = Rule(match="kernel", method="rtn", outliers=4, level_clip=asked, outlier_score="range")
    seen: list[LayerResult] = []
    packed = quantize_params(
        tree, Recipe(name="x", rules=(rule,)), dict.fromkeys(("a.kernel", "b.kernel"), stats), on_layer=seen.append
    )
    first, second = packed["a"]["kernel"], packed["b"]["kernel"]
    first.validate()
    np.testing.assert_array_equal(first.columns, second.columns)
    assert first.level_clip == second.level_clip == seen[0].level_clip == seen[1].level_clip
    assert first.group == second.group == "in"
    if asked == "search":
        assert first.level_clip in LEVEL_CLIPS[1:]
        assert seen[0].as_json()["level_clip"] == first.level_clip
    else:
        assert first.level_clip == one
        assert ("level_clip" in seen[0].as_json()) == (one is not None)


def test_a_searched_level_clip_lowers_the_layers_error() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(256, 256)).astype(np.float32)
    stats = observe(empty_stats(256), jnp.asarray(x), rows=256)
    tree = {"kernel": jnp.asarray(rng.normal(size=(256, 32)), jnp.float32)}
    errors = []
    for clip in (None, "search"):
        rule = Rule(match="kernel", outliers=0, weight_bits=8, level_clip=clip)
        quantize_params(
            tree, Recipe(name="x", rules=(rule,)), {"kernel": stats}, on_layer=lambda r: errors.append(r.relative_error)
        )
    assert errors[1] < 0.95 * errors[0]


def test_layers_that_choose_outliers_differently_are_not_taken_for_one_group() -> None:
    """They share the tensor and the number of outliers but not the columns, so one split cannot serve both."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 16)).astype(np.float32)
    x[0, 3], x[:, 7] = 20, 10
    stats = observe(empty_stats(16, group="in"), jnp.asarray(x), rows=64)
    tree = {name: {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)} for name in "ab"}
    rules = (Rule(match="a", outliers=1), Rule(match="b", outliers=1, outlier_score="mean_square"))
    packed = quantize_params(tree, Recipe(name="x", rules=rules), dict.fromkeys(("a.kernel", "b.kernel"), stats))
    assert int(packed["a"]["kernel"].columns[-1]) == 3
    assert int(packed["b"]["kernel"].columns[-1]) == 7
    assert packed["a"]["kernel"].group != packed["b"]["kernel"].group


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_bits": 8, "level_clip": "search"}, "searched for 4-bit activations; these have 8 bits"),
        ({"activation_bits": 16, "level_clip": "symmetric"}, "of quantized activations; these have 16 bits"),
        ({"level_clip": "symmetrical"}, '"search", "symmetric" or two whole numbers such as [17, 1], not \'symmetrical\''),
        ({"level_clip": [16]}, '"symmetric" or two whole numbers such as [17, 1], not [16]'),
        ({"level_clip": [16.5, -8]}, "not [16.5, -8]"),
        ({"level_clip": [14, 0]}, "4-bit activations cannot have the level clip (14, 0)"),
        ({"level_clip": [20, 3]}, "4-bit activations cannot have the level clip (20, 3)"),
        ({"level_clip": [16, -8], "activation_bits": 8}, "8-bit activations cannot have the level clip (16, -8)"),
        ({"group_size": 16, "activation_bits": 4, "level_clip": "search"}, 'a level clip is "symmetric" or two whole numbers'),
        ({"group_size": 16, "level_clip": "symmetric"}, "of quantized activations; these have 16 bits"),
    ],
)
def test_recipes_refuse_level_clips_that_cannot_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One sentence, and where in the file: nothing of the types that a field may have."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "mine", "rules": [{"match": "x", **change}]}))
    with pytest.raises(QuikError, match=r"mine.json is not a recipe: rules.0(\.level_clip)?: [^:]*" + re.escape(message)):
        find_recipe(file)


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_activations_of_either_width_serve_layers_of_any_format(bits: int) -> None:
    """A QUIK layer with outliers, one in groups: the same word, the same numbers in the packed weight, and in JSON the word."""
    x = np.random.default_rng(4).normal(size=(64, 32)).astype(np.float32)
    stats = observe(empty_stats(32, group="in"), jnp.asarray(x), rows=64)
    tree = {name: {"kernel": jnp.asarray(np.random.default_rng(5).normal(size=(32, 8)), jnp.float32)} for name in "ab"}
    rules = (
        Rule(match="a", method="rtn", outliers=2, activation_bits=bits, level_clip="symmetric"),
        GroupRule(match="b", method="rtn", group_size=16, activation_bits=bits, level_clip="symmetric"),
    )
    recipe = Recipe(name="x", rules=rules)
    seen: list[LayerResult] = []
    packed = quantize_params(tree, recipe, dict.fromkeys(("a.kernel", "b.kernel"), stats), on_layer=seen.append)
    for name, layer in zip("ab", seen, strict=True):
        weight = packed[name]["kernel"]
        weight.validate(name)
        assert weight.level_clip == layer.level_clip == symmetric_clip(bits)
        np.testing.assert_array_equal(linear(jnp.zeros((2, 32)), weight), 0)
        np.testing.assert_allclose(layer.relative_error, {4: 0.2, 8: 0.1}[bits], atol=0.1)
    assert [rule["level_clip"] for rule in recipe.model_dump(mode="json")["rules"]] == ["symmetric"] * 2
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
