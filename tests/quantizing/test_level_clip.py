"""The search for a level clip, and how a rule's choice reaches the packed weight."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quikjax.quantizing.level_clip import LEVEL_CLIPS, search_level_clip
from quikjax.quantizing.params import LayerResult, quantize_params
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.quantizing.statistics import empty_stats, observe


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


@pytest.mark.parametrize(("asked", "one"), [("search", None), ((16, 1), (16, 1)), (None, None)])
def test_layers_that_share_an_input_share_the_level_clip(
    asked: str | tuple[int, int] | None, one: tuple[int, int] | None
) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(128, 256)).astype(np.float32)
    stats = observe(empty_stats(256, group="in"), jnp.asarray(x), rows=128)
    tree = {name: {"kernel": jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)} for name in "ab"}
    rule = Rule(match="kernel", outliers=4, level_clip=asked, outlier_score="range")
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
    "change", [{"activation_bits": 8, "level_clip": "search"}, {"level_clip": (14, 0)}, {"level_clip": (20, 3)}]
)
def test_rules_refuse_level_clips_that_cannot_be(change: dict) -> None:
    with pytest.raises(ValidationError, match=r"level.clip"):
        Rule(match="x", **change)
