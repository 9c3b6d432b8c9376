"""Activations before a split: the definitions, and the forms that the kernels compute, against float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.models.activations import ACTIVATIONS, activated
from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.split_quantize.elementwise import elementwise
from quikjax.weights.linear import Produced

X = np.linspace(-8, 8, 20001).astype(np.float32)


def _gelu(x: np.ndarray, approximate: bool) -> np.ndarray:
    """In float64, without the cancellation of `1 + tanh` below zero."""
    wide = x.astype(np.float64)
    if approximate:
        return wide / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    return wide * 0.5 * np.array([math.erfc(-v / math.sqrt(2)) for v in wide])


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_of_the_kernels_is_gelu(approximate: bool) -> None:
    """The stated error, of every magnitude that counts and of the ends of float32."""
    producer, want = api.Gelu(approximate), _gelu(X, approximate)
    got = np.asarray(elementwise(producer, [jnp.asarray(X)]), np.float64)
    assert np.abs(got - want).max() <= 6e-7
    near = (X > -3) & (X != 0)
    assert (np.abs(got - want)[near] <= 2e-5 * np.abs(want[near])).all()
    ends = jnp.asarray([-3e38, -1e4, -100, -0.0, 0, 100, 3e38, np.inf, np.nan], jnp.float32)
    np.testing.assert_array_equal(np.asarray(elementwise(producer, [ends])), np.asarray(producer(ends)))


def test_one_rounding_to_16_bits() -> None:
    """In bfloat16 the definitions are their float32 values rounded once, as PyTorch's are."""
    x = jnp.asarray(X, jnp.bfloat16)
    for producer in (api.Gelu(), api.Gelu(True)):
        want = producer(x.astype(jnp.float32)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(producer(x)), np.asarray(want))
        rounded_on_the_way = jax.nn.gelu(x, approximate=producer.approximate)
        assert (np.asarray(rounded_on_the_way) != np.asarray(want)).any(), "this would not tell them apart"


def test_activations_are_what_jax_computes_in_float32() -> None:
    x = jnp.asarray(X)
    pairs = {"gelu": api.Gelu(), "gelu_new": api.Gelu(True), "gelu_pytorch_tanh": api.Gelu(True), "relu": api.Relu()}
    for name, producer in pairs.items():
        made = activated(name, x)
        assert isinstance(made, Produced)
        assert made.producer == producer
        want = jax.nn.relu(x) if name == "relu" else jax.nn.gelu(x, approximate=name != "gelu")
        np.testing.assert_array_equal(np.asarray(made.value()), np.asarray(want))
        np.testing.assert_array_equal(np.asarray(ACTIVATIONS[name](x)), np.asarray(want))
    assert isinstance(activated("silu", x), jax.Array), "no kernel has it alone"
