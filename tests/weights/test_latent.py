"""Latent floats: what the student computes with is what is stored and run, and gradients reach what the equations say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, find_recipe
from quikjax.weights import latent
from quikjax.weights.formats import dequantize
from quikjax.weights.linear import linear

N, K = 6, 24
PATH = "layer.0.q_proj.weight"
_GROUPS: dict[str, Any] = {"match": "q_proj", "group_size": 8, "method": "rtn", "bits": 4, "activation_bits": 4}
RECIPES = {
    "rows": find_recipe("rtn-w4a4"),
    "groups": Recipe.model_validate({"name": "g", "rules": [_GROUPS]}),
    "symmetric groups": Recipe.model_validate({"name": "s", "rules": [{**_GROUPS, "symmetric": True}]}),
    "symmetric activations": find_recipe("rtn-w4a4-sym"),
    "symmetric everything": Recipe.model_validate(
        {"name": "e", "rules": [{**_GROUPS, "symmetric": True, "level_clip": "symmetric"}]}
    ),
}
W = np.random.default_rng(0).normal(size=(N, K)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(5, K)).astype(np.float32)


def quantized(recipe: Recipe) -> Any:
    """The matrix, packed."""
    return quantize_params({PATH: jnp.asarray(W)}, recipe)[PATH]


def both(recipe: Recipe, mask: np.ndarray | None = None) -> tuple[Any, dict[str, Any], Any]:
    weight = quantized(recipe)
    start = latent.within_its_code(weight, W)
    halves = latent.start({PATH: weight}, {PATH: start}, {} if mask is None else {PATH: mask})
    return weight, *jax.tree.map(jnp.asarray, halves)


@pytest.mark.parametrize("name", RECIPES)
def test_the_student_computes_what_will_run(name: str) -> None:
    weight, still, moving = both(RECIPES[name])
    # Step 0 is the quantizer's own.
    same = latent.finish({PATH: weight}, still, moving)[PATH]
    np.testing.assert_array_equal(dequantize(same), dequantize(weight))
    moved = {PATH: {"value": moving[PATH]["value"] * 1.1, "sigma": moving[PATH]["sigma"] + 0.05}}
    finished = latent.finish({PATH: weight}, still, moved)[PATH]
    finished.validate(PATH)
    assert (finished.label, finished.bits()) == (weight.label, weight.bits())
    mine = linear(jnp.asarray(X), latent.student(still, moved)[PATH])
    np.testing.assert_allclose(mine, linear(jnp.asarray(X), finished), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_a_mask_is_zero_in_what_runs_and_lets_no_gradient_through(name: str) -> None:
    mask = np.random.default_rng(2).integers(0, 2, (N, K)).astype(np.int8)
    weight, still, moving = both(RECIPES[name], mask)
    finished = latent.finish({PATH: weight}, still, moving)[PATH]
    assert (np.asarray(dequantize(finished))[mask == 0] == 0).all()

    def loss(moving: Any) -> jax.Array:
        return jnp.sum(linear(jnp.asarray(X), latent.student(still, moving)[PATH]) ** 2)

    gradient = jax.grad(loss)(moving)[PATH]
    assert (np.asarray(gradient["value"])[mask == 0] == 0).all()
    assert np.isfinite(gradient["sigma"]).all()
    assert (np.asarray(gradient["value"])[mask == 1] != 0).any()


@pytest.mark.parametrize("name", [*RECIPES, "dense"])
def test_what_may_come_back_learns_as_if_it_were_there(name: str) -> None:
    mask = np.random.default_rng(2).integers(0, 2, (N, K)).astype(np.int8)
    packed: Any = jnp.asarray(W) if name == "dense" else quantized(RECIPES[name])
    start = W if name == "dense" else latent.within_its_code(packed, W)
    still, moving = jax.tree.map(jnp.asarray, latent.start({PATH: packed}, {PATH: start}, {PATH: mask}, revives=True))
    finished = latent.finish({PATH: packed}, still, moving)[PATH]
    left = np.asarray(finished if name == "dense" else dequantize(finished))
    assert (left[mask == 0] == 0).all()
    np.testing.assert_array_equal(moving[PATH]["value"], start)

    def loss(moving: Any) -> jax.Array:
        return jnp.sum(linear(jnp.asarray(X), latent.student(still, moving)[PATH]))

    gradient = np.asarray(jax.grad(loss)(moving)[PATH]["value"])
    assert (gradient[mask == 0] != 0).all()
    if name == "dense":
        np.testing.assert_allclose(gradient, np.broadcast_to(X.sum(axis=0), (N, K)), rtol=1e-5)


def test_step_sizes_learn_as_in_lsq() -> None:
    _, still, moving = both(RECIPES["rows"])
    low = np.asarray(moving[PATH]["value"]).copy()
    low[0, 0] = -100.0  # far beyond the range
    moving = {PATH: {**moving[PATH], "value": jnp.asarray(low)}}

    def matrix(own: Any) -> jax.Array:
        weight = latent.student(still, {PATH: own})[PATH]
        return weight.codes * weight.scale[:, None]

    # d W_hat / d sigma = s (q - W / s) inside the range, s q at its ends; d W_hat / d W = 1 inside, 0 beyond.
    ones, back = jax.vjp(matrix, moving[PATH])
    gradient = back(jnp.ones_like(ones))[0]
    s = np.asarray(still[PATH].scale, np.float64)[:, None]
    u = low.astype(np.float64) / s
    q = np.clip(np.round(u), -8, 7)
    inside = (u > -8) & (u < 7)
    np.testing.assert_allclose(gradient["sigma"], (s * np.where(inside, q - u, q)).sum(1), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradient["value"][0, 0], 0)
    np.testing.assert_allclose(np.asarray(gradient["value"])[inside], 1, rtol=1e-5)


def test_codes_that_the_quantizer_chose_are_where_training_begins() -> None:
    weight = quantized(Recipe.model_validate({"name": "c", "rules": [{"match": "q_proj", "method": "rtn", "outliers": 0}]}))
    other = W + 0.3 * np.random.default_rng(3).normal(size=W.shape).astype(np.float32)
    value = latent.within_its_code(weight, other)
    still, moving = jax.tree.map(jnp.asarray, latent.start({PATH: weight}, {PATH: value}))
    np.testing.assert_array_equal(dequantize(latent.finish({PATH: weight}, still, moving)[PATH]), dequantize(weight))


def test_what_cannot_be_trained_is_said() -> None:
    with pytest.raises(QuikError, match="only layers in QUIK format and in groups can be trained"):
        latent.is_quantized(PATH, quantized(find_recipe("nf4")))
    weight, still, moving = both(RECIPES["rows"])
    wild = {PATH: {**moving[PATH], "sigma": jnp.full(N, jnp.inf)}}
    with pytest.raises(QuikError, match="train at lower rates"):
        latent.finish({PATH: weight}, still, wild)
