"""One part of a layer quantized and the other exact, in every packed format, against dense products."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.evaluation.rounding import only, rounded_activations
from quikjax.pallas_kernels import reference
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import find_recipe
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.formats import PackedWeight, dequantize
from quikjax.weights.linear import linear
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import sparse

PATH = "q_proj.weight"
RNG = np.random.default_rng(0)
DENSE = {f"x.{PATH}": jnp.asarray(RNG.standard_normal((8, 32)), jnp.float32), "x.norm": jnp.ones(4)}
X = jnp.asarray(RNG.standard_normal((5, 32)), jnp.float32)
BIAS = jnp.asarray(RNG.standard_normal(8), jnp.float32)


def packed(name: str) -> PackedWeight:
    """The kernel as a recipe packs it; of "sparse", two of every four codes of the first are zero."""
    recipe = find_recipe("rtn-w4a4" if name == "sparse" else name)
    weight: Any = quantize_params({"x": {"q_proj": {"weight": DENSE[f"x.{PATH}"]}}}, recipe)["x"]["q_proj"]["weight"]
    if name == "sparse":
        assert isinstance(weight, QuikWeight)
        codes = jnp.where(jnp.arange(32) % 4 < 2, weight.qweight.astype(jnp.int8), 0)
        reduced = weight.scale * jnp.sum(codes, axis=1)
        return sparse(dataclasses.replace(weight, qweight=codes.astype(jnp.int4), reduced=reduced))
    return weight


@pytest.mark.parametrize("name", ["rtn-w4a4", "rtn-w4a4-sym", "rtn-w8a8", "sparse", "zeroquant-w8a8", "int4"])
def test_each_part_alone(name: str) -> None:
    weight = packed(name)
    tree = {**DENSE, f"x.{PATH}": weight}
    W, rounded = DENSE[f"x.{PATH}"], X
    if not isinstance(weight, CodebookWeight):  # whose activations are exact
        bits = weight.activation_bits
        codes, scale, zero = reference.quantize_activations(X, bits, weight.level_clip)
        rounded = (codes + 2.0 ** (bits - 1)) * scale[:, None] + zero[:, None]
        assert not np.allclose(rounded, X, atol=1e-4)
    np.testing.assert_allclose(rounded_activations(X, weight), rounded, rtol=1e-5, atol=1e-5)
    expected = {"both": rounded @ dequantize(weight).T, "weights": X @ dequantize(weight).T, "activations": rounded @ W.T}
    for part in ("both", "weights", "activations"):
        found = only(part, tree, DENSE)
        assert found["x.norm"] is DENSE["x.norm"]
        y = linear(X, found[f"x.{PATH}"], BIAS)
        np.testing.assert_allclose(y, expected[part] + BIAS, rtol=2e-3, atol=2e-3, err_msg=part)
