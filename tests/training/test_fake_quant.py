"""Straight-through quantizers: forwards the numbers of the integer path, backwards the gradients of the equations in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quikjax.pallas_kernels import reference
from quikjax.training.moving import start, student
from quikjax.weights.fake_quant import (
    FakeQuantWeight,
    as_stored,
    codes_in_order,
    fake_quantize,
    rounded_codes,
    straight_through,
)
from quikjax.weights.linear import linear, linears
from quikjax.weights.quik import QuikWeight

N, K, O, ROWS = 12, 20, 4, 6


def packed(seed: int = 0, bits: int = 4, activation_bits: int = 4, group: str | None = None) -> QuikWeight:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (N, K - O))
    scale = rng.uniform(0.01, 0.1, N).astype(np.float32)
    return QuikWeight(
        qweight=jnp.asarray(codes.astype(jnp.int4 if bits == 4 else np.int8)),
        scale=jnp.asarray(scale),
        reduced=jnp.asarray((scale.astype(np.float64) * codes.sum(1)).astype(np.float32)),
        outliers=jnp.asarray(rng.normal(size=(N, O)).astype(np.float16)),
        columns=jnp.asarray(np.random.default_rng(7).permutation(K).astype(np.int32)),
        weight_bits=bits,
        activation_bits=activation_bits,
        shape=(N, K),
        in_axes=(1,),
        base=K - O,
        group=group,
    )


def fake(weight: QuikWeight) -> FakeQuantWeight:
    still, moving = start({"w": weight})
    made = student(jax.tree.map(jnp.asarray, still), jax.tree.map(jnp.asarray, moving))["w"]
    assert isinstance(made, FakeQuantWeight)
    return made


def rows(seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(ROWS, K)).astype(np.float32))


def test_the_rounded_value_with_the_gradient_of_what_was_rounded() -> None:
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(straight_through(x, jnp.round(x)) * 3.0))(jnp.float32(1.4))
    assert value == 3.0
    assert gradient == 3.0
    halved = jax.grad(lambda x: as_stored(x, jnp.float16) ** 2)(jnp.float32(0.1))
    assert halved == 2 * np.float32(np.float16(0.1))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits_and_clip=st.sampled_from([(4, None), (8, None), (4, (16, -8)), (8, (256, -128))]),
    scale=st.floats(1e-3, 1e3),
)
def test_activations_are_the_reference_s_bit_for_bit(
    seed: int, bits_and_clip: tuple[int, tuple[int, int] | None], scale: float
) -> None:
    bits, clip = bits_and_clip
    x = rows(seed) * np.float32(scale)
    columns = packed().columns
    found = np.asarray(fake_quantize(x, columns, K - O, bits, (clip,)))
    split = reference.split_quantize(x, columns, K - O, bits, clip)
    widened = np.asarray(split.codes, np.float32) + np.float32(2 ** (bits - 1))
    base = np.asarray(columns)[: K - O]
    # The product may be fused into the sum, which rounds once where NumPy rounds twice.
    np.testing.assert_allclose(
        found[:, base], widened * np.asarray(split.scale)[:, None] + np.asarray(split.zero)[:, None], rtol=3e-7, atol=1e-6 * scale
    )
    again = (found[:, base].astype(np.float64) - np.asarray(split.zero, np.float64)[:, None]) / np.asarray(split.scale)[:, None]
    np.testing.assert_array_equal(np.round(again) - 2 ** (bits - 1), np.asarray(split.codes))


def test_a_clip_is_chosen_by_its_number() -> None:
    x, columns = rows(), packed().columns
    clips = (None, (17, 1))
    both = [np.asarray(fake_quantize(x, columns, K - O, 4, (clip,))) for clip in clips]
    assert (both[0] != both[1]).any()
    chosen = jax.jit(lambda number: fake_quantize(x, columns, K - O, 4, clips, number))
    for number, expected in enumerate(both):
        np.testing.assert_allclose(chosen(number), expected, rtol=1e-6, atol=1e-7)
    split = reference.split_quantize(x, columns, K - O, 4, clips[1])
    expected = (np.asarray(split.codes, np.float64) + 8) * np.asarray(split.scale)[:, None] + np.asarray(split.zero)[:, None]
    np.testing.assert_allclose(both[1][:, np.asarray(columns)[: K - O]], expected, rtol=1e-5, atol=1e-6)


def test_sixteen_bits_are_left_alone() -> None:
    np.testing.assert_array_equal(fake_quantize(rows(), packed().columns, K - O, 16), rows())


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 4), (8, 8), (4, 16)])
def test_the_layer_is_the_integer_path_s(bits: int, activation_bits: int) -> None:
    weight, bias = packed(bits=bits, activation_bits=activation_bits), jnp.arange(N, dtype=jnp.float32)
    x = rows().reshape(2, 3, K)
    np.testing.assert_allclose(linear(x, fake(weight), bias), linear(x, weight, bias), rtol=2e-5, atol=2e-5)


def test_layers_of_a_group_and_dense_ones_keep_their_order() -> None:
    first, second = packed(0, group="g"), packed(1, group="g")
    dense = jnp.asarray(np.random.default_rng(3).normal(size=(5, K)).astype(np.float32))
    found = linears(rows(), [fake(first), dense, fake(second)], [None, None, None])
    expected = linears(rows(), [first, dense, second], [None, None, None])
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


def test_gradients_are_those_of_the_equations() -> None:
    weight = packed()
    made, x = fake(weight), rows()
    dy = np.random.default_rng(5).normal(size=(ROWS, N))

    def loss(x: Any, scale: Any, outliers: Any, bias: Any) -> jax.Array:
        trained = dataclasses.replace(made, scale=scale, outliers=outliers)
        return jnp.sum(linear(x, trained, bias) * dy.astype(np.float32))

    bias = jnp.zeros(N)
    d_x, d_scale, d_outliers, d_bias = jax.grad(loss, argnums=(0, 1, 2, 3))(x, made.scale, made.outliers, bias)

    columns, wide = np.asarray(weight.columns), np.asarray(x, np.float64)
    q, s, F = (np.asarray(part, np.float64) for part in (weight.qweight, weight.scale, weight.outliers))
    base, outlying = columns[: K - O], columns[K - O :]
    x_hat = np.asarray(fake_quantize(x, weight.columns, K - O, 4), np.float64)[:, base]
    expected = np.zeros((ROWS, K))
    expected[:, base] = (dy * s) @ q
    expected[:, outlying] = dy @ F
    np.testing.assert_allclose(d_x, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_scale, (dy * (x_hat @ q.T)).sum(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_outliers, dy.T @ wide[:, outlying], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_bias, dy.sum(0), rtol=1e-4, atol=1e-5)


def test_codes_round_half_to_even_and_stop_at_their_range() -> None:
    u = jnp.asarray([-9.0, -8.0, -0.5, 0.5, 1.5, 6.9, 7.6], jnp.float32)
    np.testing.assert_array_equal(rounded_codes(u, 4), [-8, -8, 0, 0, 2, 7, 7])
    gradient = jax.grad(lambda u: rounded_codes(u, 4).sum())(u)
    np.testing.assert_array_equal(np.asarray(gradient)[[0, 2, 3, 4, 5, 6]], [0, 1, 1, 1, 1, 0])


def test_codes_in_the_order_of_x() -> None:
    weight = packed()
    codes, columns = codes_in_order(weight), np.asarray(weight.columns)
    np.testing.assert_array_equal(codes[:, columns[: K - O]], np.asarray(weight.qweight, np.int8))
    assert not codes[:, columns[K - O :]].any()
