"""Errors by depth against the definition, layer by layer, in NumPy."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from quikjax.algorithms.rtn import rtn
from quikjax.errors import QuikError
from quikjax.evaluation.layers import errors_by_depth
from quikjax.evaluation.rounding import rounded_activations
from quikjax.models.base import CausalLM, Positions, default_positions
from quikjax.models.registry import dotted, nested, pure_params
from quikjax.pallas_kernels import reference
from quikjax.quantizing.params import pack
from quikjax.quantizing.recipe import Rule
from quikjax.testing import tiny_model
from quikjax.weights.linear import linear
from quikjax.weights.quik import QuikWeight, dequantize

IDS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLM, CausalLM]:
    """A quantized model and its original."""
    original = tiny_model(num_hidden_layers=2)
    rng = np.random.default_rng(0)
    params = dotted(pure_params(original))
    orders = {width: jnp.asarray(rng.permutation(width), jnp.int32) for width in (64, 112)}
    for path, kernel in params.items():
        if "_proj" in path:
            # Rounded to nearest, outliers at random: how well it is done is not what is measured here.
            rule = Rule(match="", activation_bits=8 if "down_proj" in path else 4)
            columns = orders[kernel.shape[1]]
            q, s, outliers = rtn(kernel[:, columns], base=kernel.shape[1] - 4, bits=4, clip=False)
            params[path] = pack(q, s, outliers, columns, rule, kernel.shape, (1,), path.split(".")[3])
    return nnx.merge(nnx.split(original)[0], nested(params)), original


def relative(right: Any, other: Any) -> float:
    right, other = np.asarray(right, np.float64), np.asarray(other, np.float64)
    return float(np.linalg.norm(right - other) / np.linalg.norm(right))


def by_token(right: Any, other: Any) -> np.ndarray:
    right, other = np.asarray(right, np.float64), np.asarray(other, np.float64)
    return np.linalg.norm(right - other, axis=-1) / np.linalg.norm(right, axis=-1)


@partial(jax.jit, static_argnums=0)
def run(blockdef: Any, params: Any, hidden: Any) -> tuple[Any, dict[str, Any]]:
    reads: dict[str, Any] = {}
    where = Positions(default_positions(hidden[..., 0].astype(jnp.int32)))
    return nnx.merge(blockdef, params)(hidden, where, observe=lambda group, x: reads.setdefault(group, x))[0], reads


def test_errors_are_their_definitions(pair: tuple[CausalLM, CausalLM]) -> None:
    quantized, original = pair
    found = errors_by_depth(quantized, original, IDS)
    dense, packed = dotted(pure_params(original)), dotted(pure_params(quantized))
    assert [layer.path for layer in found.layers] == [
        f"model.layers.{block}.{layer}.weight"
        for block in range(2)
        for members in next(iter(original.blocks.values())).groups.values()
        for layer in members
    ]
    ids = jnp.asarray(IDS)
    teacher = free = original.embed(ids, default_positions(ids))
    rows = {layer.path: layer for layer in found.layers}
    for key, block in original.blocks.items():
        forced, _ = run(*nnx.split(quantized.blocks[key]), teacher)
        free, own_reads = run(*nnx.split(quantized.blocks[key]), free)
        teacher, reads = run(*nnx.split(block), teacher)
        row = found.blocks[int(key)]
        assert row.hidden_forced == pytest.approx(relative(teacher, forced), rel=1e-3)
        assert row.hidden_free == pytest.approx(relative(teacher, free), rel=1e-3)
        tokens = found.tokens[int(key)]
        np.testing.assert_allclose(tokens.forced, by_token(teacher, forced), rtol=1e-2)  # a code at a boundary
        np.testing.assert_allclose(tokens.free, by_token(teacher, free), rtol=1e-2)
        for index, (group, members) in enumerate(block.groups.items()):
            read = found.ranges[4 * int(key) + index]
            assert read.layers == tuple(f"model.layers.{key}.{layer}.weight" for layer in members)
            np.testing.assert_allclose(read.absmax, np.abs(reads[group]).max(axis=(0, 1)), rtol=1e-5)
            for layer in members:
                path = f"model.layers.{key}.{layer}.weight"
                W, weight, errors = dense[path], packed[path], rows[path]
                y = reads[group] @ W.T
                assert errors.weights == pytest.approx(relative(W, dequantize(weight)), rel=1e-3)
                of_tokens = by_token(reads[group], rounded_activations(reads[group], weight))
                assert errors.rounding_by_token == pytest.approx(of_tokens.mean(), rel=1e-3)
                assert errors.inputs == pytest.approx(relative(reads[group], own_reads[group]), rel=1e-3, abs=1e-6)
                assert errors.output_forced == pytest.approx(relative(y, linear(reads[group], weight)), rel=1e-3)
                assert errors.output_free == pytest.approx(relative(y, linear(own_reads[group], weight)), rel=1e-3)
    for ends, hidden in zip(found.ends, (teacher, free), strict=True):
        # As a whole: a code at a boundary falls to either side in two programs, and moves its token's numbers.
        assert relative(hidden, np.concatenate(ends)) < 1e-4
    assert found.blocks[0].hidden_free == pytest.approx(found.blocks[0].hidden_forced, rel=1e-5)
    assert found.blocks[-1].hidden_free > found.blocks[-1].hidden_forced


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_rounded_activations_are_what_the_layer_multiplies(pair: tuple[CausalLM, CausalLM], bits: int) -> None:
    weight = dotted(pure_params(pair[0]))["model.layers.1.mlp.down_proj.weight"]
    assert isinstance(weight, QuikWeight)
    weight = dataclasses.replace(weight, activation_bits=bits)
    x = jax.random.normal(jax.random.key(0), (5, weight.inputs))
    rounded = rounded_activations(x, weight)
    if bits == 16:
        np.testing.assert_array_equal(rounded, x)
        return
    split = reference.split_quantize(x, weight.columns, weight.base, bits)
    codes, scale, zero = (np.asarray(part, np.float64) for part in (split.codes, split.scale[:, None], split.zero[:, None]))
    base = (codes + 2 ** (bits - 1)) * scale + zero
    np.testing.assert_allclose(rounded[:, weight.columns[: weight.base]], base, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rounded[:, weight.columns[weight.base :]], x[:, weight.columns[weight.base :]])


def test_only_a_model_and_its_original_can_be_compared(pair: tuple[CausalLM, CausalLM]) -> None:
    with pytest.raises(QuikError, match="have 2 and 1 blocks"):
        errors_by_depth(pair[0], tiny_model(num_hidden_layers=1), IDS)
