"""Weights with 2:4 sparsity and weights in groups: their equations from the stored bits, their sizes, and their validators."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quikjax.algorithms.sparsegpt import compress, decompress
from quikjax.errors import QuikError
from quikjax.pallas_kernels.choice import BackendError
from quikjax.quantizing.group_rule import GroupRule
from quikjax.quantizing.groups import abstract_groups, quantize_groups
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe
from quikjax.quantizing.statistics import empty_stats, observe
from quikjax.weights.formats import dequantize, is_packed
from quikjax.weights.groups import GroupWeight
from quikjax.weights.linear import explain, linear
from quikjax.weights.quik import QuikWeight
from quikjax.weights.sparse import sparse
from quikjax.weights.tiled import put_on_device

RNG = np.random.default_rng(0)


def sparse_codes(rng: np.random.Generator, n: int, base: int, bits: int) -> np.ndarray:
    """Random codes of which two of every four, sometimes more, are zero."""
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, base // 4, 4)).astype(np.int8)
    codes[np.argsort(rng.random(codes.shape), axis=2) < 2] = 0
    return codes.reshape(n, base)


def quik(codes: np.ndarray, bits: int = 4, outliers: int = 3) -> QuikWeight:
    n, base = codes.shape
    rng = np.random.default_rng(1)
    scale = np.asarray(rng.uniform(0.01, 0.1, n), np.float32)
    return QuikWeight(
        qweight=jnp.asarray(codes).astype(jnp.int4 if bits == 4 else jnp.int8),
        scale=jnp.asarray(scale),
        reduced=jnp.asarray((scale.astype(np.float64) * codes.sum(axis=1)).astype(np.float32)),
        outliers=jnp.asarray(rng.normal(size=(n, outliers)), jnp.float16),
        columns=jnp.asarray(rng.permutation(base + outliers), jnp.int32),
        weight_bits=bits,
        activation_bits=bits,
        shape=(n, base + outliers),
        in_axes=(1,),
        base=base,
        group=None,
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n=st.sampled_from([1, 5]), fours=st.sampled_from([0, 1, 9]), bits=st.sampled_from([4, 8]))
def test_two_of_four_are_stored_and_come_back(seed: int, n: int, fours: int, bits: int) -> None:
    codes = sparse_codes(np.random.default_rng(seed), n, 4 * fours, bits)
    kept, places = jax.jit(compress)(codes)
    assert kept.shape == (n, 2 * fours)
    assert places.shape == (n, -(-fours // 2))
    np.testing.assert_array_equal(jax.jit(decompress)(kept, places), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_sparse_weight_is_its_equation_and_half_the_codes(bits: int) -> None:
    codes = sparse_codes(RNG, 6, 20, bits)
    whole = quik(codes, bits)
    w = sparse(whole)
    w.validate("layer")
    # The docstring's equation, from the stored bits.
    kept, places = np.asarray(w.kept).astype(int), np.asarray(w.places)
    expected = np.zeros((6, 20), int)
    for n in range(6):
        for i in range(10):
            place = places[n, i // 4] >> 2 * (i % 4) & 3
            expected[n, 4 * (i // 2) + place] = kept[n, i]
    np.testing.assert_array_equal(expected, codes)
    assert w.bits() == 6 * (10 * bits + 8 * 3) + 16 * w.outliers.size + 64 * 6 + 32 * 23
    assert w.label == f"W{bits}A{bits} 2:4"
    x = jnp.asarray(RNG.normal(size=(4, 23)), jnp.float32)
    np.testing.assert_array_equal(dequantize(w), dequantize(whole))
    np.testing.assert_array_equal(linear(x, w), linear(x, whole))
    assert explain(w, 4, jnp.float32).backend == explain(whole, 4, jnp.float32).backend
    placed = put_on_device({"layer": w})["layer"]
    assert isinstance(placed, QuikWeight)
    np.testing.assert_array_equal(np.asarray(placed.qweight).astype(int), codes)
    codes[0, :3] = 1
    with pytest.raises(ValueError, match="not 2:4 sparse"):
        sparse(quik(codes, bits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": jnp.zeros((6, 9), jnp.int4)}, r"layer.kept is int4 \(6, 9\), expected int4 \(6, 10\)"),
        ({"kept": jnp.zeros((6, 10), jnp.int8)}, r"layer.kept is int8 \(6, 10\), expected int4"),
        ({"places": jnp.zeros((6, 3), jnp.uint8)}, "places are not two ascending places"),
        ({"base": 19}, "19 base columns, which is no multiple of 4"),
        ({"version": 9}, "sparse format 9"),
        ({"scale": jnp.full(6, jnp.nan, jnp.float32)}, "scale"),
    ],
)
def test_the_validator_of_sparse_weights_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    w = sparse(quik(sparse_codes(np.random.default_rng(2), 6, 20, 4)))
    with pytest.raises(QuikError, match=message):
        dataclasses.replace(w, **change).validate("layer")


GROUPS: list[dict[str, Any]] = [
    {},
    {"symmetric": True, "bits": 8, "activation_bits": 8},
    {"symmetric": True, "activation_bits": 8, "level_clip": "symmetric", "method": "rtn"},
    {"bits": 3, "group_size": 7, "method": "rtn"},
    {"order": "hessian"},
    {"order": "hessian", "static_groups": True, "group_size": 6},
]


def grouped(fields: dict[str, Any]) -> tuple[GroupWeight, np.ndarray]:
    """A random kernel quantized by a rule, by way of `quantize_params`, and the kernel."""
    rule = GroupRule(**{"match": "layer", "group_size": 16, **fields})
    rng = np.random.default_rng(5)
    kernel = rng.normal(size=(12, 40)).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(200, 40)) * np.linspace(0.5, 2, 40), jnp.float32)
    stats = {"layer.weight": observe(empty_stats(40), x)} if rule.needs_data() else None
    params = quantize_params({"layer": {"weight": jnp.asarray(kernel)}}, Recipe(name="groups", rules=(rule,)), stats)
    return params["layer"]["weight"], kernel


@pytest.mark.parametrize("fields", GROUPS)
def test_a_weight_in_groups_is_its_equation(fields: dict[str, Any]) -> None:
    w, kernel = grouped(fields)
    w.validate("layer")
    planes = [np.unpackbits(np.asarray(plane), bitorder="little") for plane in w.codes]
    columns = np.asarray(w.columns) if w.permuted else np.arange(40)
    expected = np.empty((12, 40))
    for n in range(12):
        for i in range(40):
            code = sum(int(plane[n * 40 + i]) << j for j, plane in enumerate(planes))
            zero = 2 ** (w.bits_per_code - 1) if w.symmetric else int(w.zero[n, i // w.group_size])
            expected[n, columns[i]] = (code - zero) * float(w.scale[n, i // w.group_size])
    np.testing.assert_allclose(dequantize(w), expected, rtol=1e-6, atol=1e-7)
    assert np.linalg.norm(expected - kernel) / np.linalg.norm(kernel) < {3: 0.35, 4: 0.2, 8: 0.02}[w.bits_per_code]
    assert w.bits() == 8 * sum(array.nbytes for array in jax.tree.leaves(w))
    assert is_packed(w)
    x = RNG.normal(size=(3, 40)).astype(np.float32)
    if w.activation_bits == 16:
        read = np.float64(x)
    else:
        low, high = np.float64(x).min(axis=1, keepdims=True), np.float64(x).max(axis=1, keepdims=True)
        step = (high - low) / (2**w.activation_bits - 1)
        read = np.round((x - low) / step) * step + low
        if fields.get("level_clip") == "symmetric":
            assert w.level_clip == (256, -128)
            step = np.abs(np.float64(x)).max(axis=1, keepdims=True) / 128
            read = np.clip(np.round(x / step), -128, 127) * step
    y = jax.jit(linear)(jnp.asarray(x), w)
    # A code on a boundary may go either way: one step of one activation.
    np.testing.assert_allclose(y, read @ expected.T, rtol=1e-4, atol=1e-4 if w.activation_bits == 16 else 0.2)


def test_weights_in_groups_are_run_by_xla_and_by_nothing_else() -> None:
    w, _ = grouped({})
    assert explain(w, 2, jnp.float32).backend == "xla"
    with pytest.raises(BackendError, match="mosaic cannot run weights in groups"):
        linear(jnp.ones((2, 40)), w, backend="mosaic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": jnp.zeros((4, 59), jnp.uint8)}, r"layer.codes has shape \(4, 59\), expected \(4, 60\)"),
        ({"scale": jnp.ones((12, 3), jnp.float32)}, "layer.scale has dtype float32, expected float16"),
        ({"scale": jnp.zeros((12, 3), jnp.float16)}, "not positive and finite"),
        ({"zero": jnp.full((12, 3), 16, jnp.uint8)}, "zero has values beyond 4 bits"),
        ({"version": 3}, "group format 3"),
        ({"level_clip": (16, -8)}, "layer: activations are quantized to 4 or 8 bits, not 16"),
        ({"bits_per_code": 2}, "W2A16/16, which is no group format"),
        ({"permuted": True, "columns": jnp.zeros(40, jnp.int32)}, "columns is not a permutation of the 40"),
    ],
)
def test_the_validator_of_groups_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    w, _ = grouped({"method": "rtn"})
    with pytest.raises(QuikError, match=message):
        dataclasses.replace(w, **change).validate("layer")


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    rule = GroupRule(match="x", group_size=16, method="rtn")
    huge = jnp.full((2, 16), 1e7, jnp.float32)
    with pytest.raises(QuikError, match="a group of layer overflows a scale in float16"):
        quantize_groups("layer", huge, rule, abstract_groups(rule, (2, 16), (1,)))
