"""The packed weight's invariant, its validator, and the linear layer that reads it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.quantizing.params import pack
from quikjax.quantizing.recipe import Rule
from quikjax.weights.formats import dequantize, dequantize_params
from quikjax.weights.linear import linear, linears
from quikjax.weights.quik import QuikWeight, as_matrix, from_matrix


def packed(
    shape: tuple[int, ...] = (12, 20),
    in_axes: tuple[int, ...] = (1,),
    outliers: int = 3,
    *,
    bits: int = 4,
    activation_bits: int = 4,
    group: str | None = None,
    seed: int = 0,
) -> QuikWeight:
    rng = np.random.default_rng(seed)
    k = int(np.prod([shape[axis] for axis in in_axes]))
    n = int(np.prod(shape)) // k
    high = 2 ** (bits - 1)
    return pack(
        jnp.asarray(rng.integers(-high, high, (n, k - outliers)), jnp.int8),
        jnp.asarray(rng.uniform(0.01, 0.1, n), jnp.float32),
        jnp.asarray(rng.normal(size=(n, outliers)), jnp.float32),
        jnp.asarray(np.random.default_rng(99).permutation(k), jnp.int32),
        Rule(match="x", weight_bits=bits, activation_bits=activation_bits),
        shape,
        in_axes,
        group,
    )


def slow_linear(x: np.ndarray, w: QuikWeight, bias: np.ndarray | None) -> np.ndarray:
    """spec: QUIK, sections 3 and 4, in float64 from the packed parts, one row at a time."""
    columns, base, b = np.asarray(w.columns), w.base, w.activation_bits
    q_w, s_w = np.asarray(w.qweight, np.float64), np.asarray(w.scale, np.float64)
    y = np.zeros((len(x), w.outputs))
    for m, row in enumerate(x):
        x_base, x_out = row[columns[:base]], row[columns[base:]].astype(np.float64)
        if b == 16:
            y[m] = (q_w @ x_base.astype(np.float64)) * s_w
        elif base:
            symmetric = w.lowest < 0
            z = np.float32(0) if symmetric else x_base.min()
            reach = 2 * np.abs(x_base).max() if symmetric else x_base.max() - z
            s = max(reach * np.float32(1 / w.levels), np.float32(1e-30))
            h = w.lowest + 2 ** (b - 1)
            q = np.clip(np.round((x_base - z) * (np.float32(1) / s)), w.lowest, w.lowest + 2**b - 1) - h
            y[m] = (q_w @ q) * s * s_w + (np.float64(z) + h * np.float64(s)) * s_w * q_w.sum(axis=1)
        y[m] += np.asarray(w.outliers, np.float64) @ x_out
    return y if bias is None else y + bias


@pytest.mark.parametrize(
    ("bits", "activation_bits", "outliers"),
    [
        pytest.param(*widths, outliers, marks=[pytest.mark.long] * (outliers != 3 and widths not in ((4, 4), (4, 16))))
        for widths in ((4, 4), (8, 8), (4, 8), (4, 16), (8, 4))
        for outliers in (0, 3, 20)
    ],
)
def test_linear_is_its_equation(bits: int, activation_bits: int, outliers: int) -> None:
    w = packed(bits=bits, activation_bits=activation_bits, outliers=outliers)
    rng = np.random.default_rng(1)
    x, bias = rng.normal(size=(7, 20)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    expected = slow_linear(x, w, bias)
    for function in (linear, jax.jit(linear)):
        y = function(jnp.asarray(x), w, jnp.asarray(bias))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear(jnp.asarray(x).reshape(7, 1, 20), w)[:, 0], slow_linear(x, w, None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [(15, 0), (16, 1), (17, 1), (19, 2), (16, -8), (15, -8)])
def test_a_level_clip_changes_the_equations_constants_and_no_gradient(clip: tuple[int, int]) -> None:
    plain = packed()
    w = dataclasses.replace(plain, level_clip=clip)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 20)), jnp.float32)
    for function in (linear, jax.jit(linear)):
        np.testing.assert_allclose(function(x, w), slow_linear(np.asarray(x), w, None), rtol=1e-5, atol=1e-5)
    same = np.array_equal(linear(x, w), linear(x, plain))
    assert same == (clip == (15, 0))
    slopes = [jax.grad(lambda x, weight=weight: jnp.sum(jnp.sin(linear(x, weight))))(x) for weight in (w, plain)]
    expected = np.cos(np.asarray(linear(x, w))) @ np.asarray(dequantize(w))
    np.testing.assert_allclose(slopes[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(dequantize(w), dequantize(plain))


@pytest.mark.parametrize(("activation_bits", "clip"), [(4, (16, -8)), (8, (256, -128))])
def test_symmetric_activations_make_nothing_of_zeros(activation_bits: int, clip: tuple[int, int]) -> None:
    """A token of zeros, such as padding, gives the bias alone: with a zero point it would be up to rounding of the sums."""
    w = dataclasses.replace(packed(activation_bits=activation_bits, outliers=0), level_clip=clip)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=12), jnp.float32)
    y = jax.jit(linear)(jnp.zeros((3, 20)).at[1, 4].set(1e-3), w, bias)
    np.testing.assert_array_equal(y[0], bias)
    np.testing.assert_array_equal(y[2], bias)
    assert (y[1] != bias).any()


def test_linear_is_close_to_the_dequantized_product() -> None:
    w = packed(bits=8, activation_bits=8, outliers=2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 20)), jnp.float32)
    exact = x @ dequantize(w).T
    assert float(jnp.linalg.norm(linear(x, w) - exact) / jnp.linalg.norm(exact)) < 0.01


@pytest.mark.parametrize(
    ("shape", "in_axes", "x_shape", "y_shape"),
    [
        ((20, 12), (0,), (2, 3, 20), (2, 3, 12)),  # a Flax kernel
        ((20, 4, 3), (0,), (5, 20), (5, 4, 3)),  # attention's query: embed to heads x head
        ((4, 5, 12), (0, 1), (2, 4, 5), (2, 12)),  # attention's output: heads x head to embed
        ((4, 12, 5), (0, 2), (7, 4, 5), (7, 12)),
    ],
)
def test_kernels_of_any_layout(
    shape: tuple[int, ...], in_axes: tuple[int, ...], x_shape: tuple[int, ...], y_shape: tuple[int, ...]
) -> None:
    w = packed(shape, in_axes, activation_bits=16)
    assert (w.inputs, w.outputs) == (20, 12)
    w.validate()
    x = jnp.asarray(np.random.default_rng(0).normal(size=x_shape), jnp.float32)
    y = linear(x, w)
    assert y.shape == y_shape
    kernel = dequantize(w)
    assert kernel.shape == shape
    batch = len(x_shape) - len(in_axes)
    axes = list(range(batch, len(x_shape)))
    np.testing.assert_allclose(y, jnp.tensordot(x, kernel, (axes, list(in_axes))), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(from_matrix(as_matrix(kernel, in_axes), shape, in_axes), kernel)
    with pytest.raises(ValueError, match="the weight reads"):
        linear(x[..., :-1], w)


def test_layers_of_a_group_share_one_split_and_give_the_same_bits() -> None:
    first, second = packed(group="in"), packed(group="in", seed=5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 20)), jnp.float32)
    together = linears(x, [first, second, packed(bits=8, activation_bits=8, group="in", seed=6)], [None, None, None])
    for y, w in zip(together, [first, second, packed(bits=8, activation_bits=8, seed=6)], strict=True):
        np.testing.assert_array_equal(y, linear(x, w))
    shared = jax.jit(lambda x, *w: linears(x, w, [None] * len(w))).lower(x, first, second).as_text()
    alone = jax.jit(lambda x, *w: [linear(x, one) for one in w]).lower(x, first, second).as_text()
    assert (shared.count("call @round"), alone.count("call @round")) == (1, 2)


def test_half_precision_in_half_precision_out() -> None:
    w = packed()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 20)), jnp.bfloat16)
    y = linear(x, w)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, linear(x.astype(jnp.float32), w).astype(jnp.bfloat16))


def test_size_counts_everything() -> None:
    w = packed()
    assert w.bits() == 12 * 17 * 4 + 12 * 3 * 16 + 2 * 12 * 32 + 20 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": jnp.zeros((12, 16), jnp.int4)}, r"layer.qweight has shape \(12, 16\), expected \(12, 17\)"),
        ({"qweight": jnp.zeros((12, 17), jnp.int8)}, "layer.qweight has dtype int8, expected int4"),
        ({"outliers": jnp.zeros((12, 3), jnp.float32)}, "layer.outliers has dtype float32"),
        ({"columns": jnp.zeros(20, jnp.int32)}, "not a permutation"),
        ({"scale": jnp.zeros(12)}, "not positive"),
        ({"scale": jnp.full(12, jnp.nan)}, "not finite"),
        ({"reduced": jnp.ones(12)}, "reduced is not scale times"),
        ({"version": 2}, "format 2"),
        ({"activation_bits": 5}, "W4A5"),
        ({"level_clip": (15, 1)}, r"layer: 4-bit activations cannot have the level clip \(15, 1\)"),
        ({"level_clip": (17, 1), "activation_bits": 8}, "8-bit activations cannot have the level clip"),
        ({"level_clip": (17, 1), "activation_bits": 16}, "not 16"),
        (
            {"level_clip": (16, -8), "activation_bits": 8},
            r"layer: 8-bit activations cannot .* a lowest code of -128 and at least",
        ),
    ],
)
def test_the_validator_names_what_is_wrong(change: dict[str, object], message: str) -> None:
    w = packed()
    w.validate("layer")
    with pytest.raises(QuikError, match=message):
        dataclasses.replace(w, **change).validate("layer")  # type: ignore[arg-type]


def test_a_packed_weight_is_a_pytree_node_with_static_fields() -> None:
    w = packed()
    assert len(jax.tree.leaves(w)) == 5
    shapes = jax.tree.map(lambda leaf: leaf.shape, w)
    assert shapes.qweight == (12, 17)
    assert str(jax.tree.structure(w)) != str(jax.tree.structure(packed(bits=8)))
    tree = {"a": w, "b": jnp.ones(2)}
    dense = dequantize_params(tree)
    assert dense["a"].shape == (12, 20)
    np.testing.assert_array_equal(dense["b"], tree["b"])
