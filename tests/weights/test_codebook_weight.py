"""The codebook weight's equation, its validator, and the linear layer that dequantizes it when its turn comes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.algorithms import codebooks
from quikjax.errors import QuikError
from quikjax.pallas_kernels.choice import BackendError
from quikjax.quantizing.codebook import abstract_codebook, quantize_matrix
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.formats import dequantize, dequantize_params, is_packed
from quikjax.weights.linear import explain, linear, linears
from quikjax.weights.quik import as_matrix

W = np.random.default_rng(0).normal(size=(12, 20)).astype(np.float32)


def quantized(W: np.ndarray = W, outliers: int = 0, in_axes: tuple[int, ...] = (1,), **fields: Any) -> CodebookWeight:
    rule = CodebookRule(match="x", **{"data_type": "nf", "bits": 4, "block": 16, **fields})
    matrix = as_matrix(jnp.asarray(W), in_axes)
    base = matrix.shape[1] - outliers
    columns = np.random.default_rng(3).permutation(matrix.shape[1]).astype(np.int32)
    columns = np.concatenate([np.sort(columns[:base]), np.sort(columns[base:])])
    return quantize_matrix("layer", matrix, rule, jnp.asarray(columns), abstract_codebook(rule, W.shape, in_axes, base))


def slow_matrix(w: CodebookWeight) -> np.ndarray:
    """The docstring's equation, a weight at a time, in float64, from the stored bits."""
    planes = [np.unpackbits(np.asarray(plane), bitorder="little") for plane in w.codes]
    table = np.asarray(w.table(), np.float64)
    if w.absmax_format == "double":
        eight = codebooks.dynamic(8).astype(np.float64)
        scale, mean = np.asarray(w.absmax_scale, np.float64), float(w.absmax_mean[0])
        absmax = [max(eight[code] * scale[i // 256] + mean, 0) for i, code in enumerate(np.asarray(w.absmax))]
    else:
        absmax = np.asarray(w.absmax, np.float64).tolist()
    base = np.empty(w.outputs * w.base)
    for i in range(len(base)):
        code = sum(int(plane[i]) << j for j, plane in enumerate(planes))
        base[i] = table[code] * absmax[i // w.block] + (float(w.mean[0]) if w.centered else 0)
    matrix = np.empty((w.outputs, w.inputs))
    columns = np.asarray(w.columns)
    matrix[:, [column for column in range(w.inputs) if column not in columns]] = base.reshape(w.outputs, w.base)
    matrix[:, columns] = np.asarray(w.outliers, np.float64)
    return matrix


KINDS: list[dict[str, Any]] = [
    {},
    {"data_type": "int", "bits": 3, "block": 7},  # divides nothing: the last block is short
    {"data_type": "float", "bits": 5, "exponent_bits": 2, "outliers": 3},
    {"data_type": "dynamic", "bits": 8, "absmax": "double", "block": 1},
    {"data_type": "quantile", "bits": 6, "block": "tensor", "absmax": "float32"},
    {"data_type": "fp4", "centered": True, "outliers": 20},  # all of them outliers
    {"data_type": "int", "bits": 7, "centered": True, "outliers": 1, "outlier_dtype": "bfloat16"},
]


@pytest.mark.parametrize("fields", KINDS)
def test_dequantize_and_linear_are_the_equation(fields: dict[str, Any]) -> None:
    w = quantized(**fields)
    w.validate("layer")
    expected = slow_matrix(w)
    np.testing.assert_allclose(dequantize(w), expected, rtol=2e-6, atol=1e-7)
    rng = np.random.default_rng(1)
    x, bias = rng.normal(size=(2, 7, 20)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    y = jax.jit(linear)(jnp.asarray(x), w, jnp.asarray(bias))
    np.testing.assert_allclose(y, x.astype(np.float64) @ expected.T + bias, rtol=1e-5, atol=1e-5)
    # Each weight is as near as the codebook has it.
    table = np.asarray(w.table(), np.float64)
    if not w.base:
        return
    # (A codebook may end before -1 or 1, where a weight may be as far away as that.)
    step = max(np.diff(table).max() / 2, 1 + table[0], 1 - table[-1]) * np.asarray(w.full_absmax()).max()
    assert np.abs(expected - W).max() <= step * 1.02 + 0.05 * (w.absmax_format == "double")


def test_kernels_of_any_layout() -> None:
    kernel = np.random.default_rng(0).normal(size=(4, 5, 12)).astype(np.float32)
    w = quantized(kernel, in_axes=(0, 1), bits=8, data_type="int")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.float32)
    assert dequantize(w).shape == kernel.shape
    np.testing.assert_allclose(linear(x, w), jnp.tensordot(x, dequantize(w), ([1, 2], [0, 1])), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the weight reads"):
        linear(x[..., :-1], w)


@pytest.mark.parametrize("fields", KINDS)
def test_size_is_what_is_stored(fields: dict[str, Any]) -> None:
    w = quantized(**fields)
    assert w.bits() == 8 * sum(array.nbytes for array in jax.tree.leaves(w))
    assert dataclasses.replace(w, codes=None, absmax=None, outliers=None, columns=None).bits() == w.bits()


def test_a_large_layer_has_the_papers_bits_per_parameter() -> None:
    """k + 16/B + p (16 - k), and the columns, which the paper does not count."""
    rule = CodebookRule(match="x", data_type="float", bits=3, block=64, proxy=0.02)
    n = k = 4096
    outliers = rule.outlier_count(k)
    assert outliers == 82
    bits = abstract_codebook(rule, (n, k), (1,), k - outliers).bits()
    p = outliers / k
    assert bits - 32 * outliers == pytest.approx(n * k * ((1 - p) * (3 + 16 / 64) + p * 16), rel=1e-6)


def test_half_precision_in_half_precision_out_and_layers_beside_others() -> None:
    w, dense = quantized(), jnp.asarray(W, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 20)), jnp.bfloat16)
    first, second = linears(x, [w, dense], [None, None])
    assert first.dtype == second.dtype == jnp.bfloat16
    assert float(jnp.linalg.norm(first - second) / jnp.linalg.norm(second)) < 0.15
    assert explain(w, 6, jnp.bfloat16).backend == "xla"
    with pytest.raises(BackendError, match="mosaic cannot run codebook weights: Mosaic kernels need a Hopper GPU"):
        linear(x, w, backend="mosaic")


def test_dense_weights_are_made_when_their_turn_comes_and_not_before() -> None:
    """Inside a loop over tokens: what does not change from turn to turn must not be kept, every layer dense at once."""
    layers = [quantized(np.random.default_rng(i).normal(size=(256, 256)).astype(np.float32), block=64) for i in range(12)]

    def run(weights: list[CodebookWeight], x: jax.Array) -> jax.Array:
        def step(_: jax.Array, x: jax.Array) -> jax.Array:
            for w in weights:
                x = jnp.tanh(linear(x, w))
            return x

        return jax.lax.fori_loop(0, 3, step, x)

    compiled = jax.jit(run).lower(layers, jnp.ones((1, 256))).compile()
    dense = 256 * 256 * 4
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 3 * dense  # of twelve


def test_a_codebook_weight_is_a_packed_leaf() -> None:
    w = quantized(outliers=3)
    tree = {"a": w, "b": jnp.ones(2)}
    assert [is_packed(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_packed)] == [True, False]
    assert dequantize_params(tree)["a"].shape == (12, 20)
    assert w.label == "nf4/16"
    assert quantized(block="tensor", data_type="fp4").label == "fp4/tensor"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": jnp.zeros((4, 25), jnp.uint8)}, r"layer.codes has shape \(4, 25\), expected \(4, 26\)"),
        ({"absmax": jnp.zeros(13, jnp.float32)}, "layer.absmax has dtype float32, expected float16"),
        ({"absmax": jnp.full(13, jnp.nan, jnp.float16)}, "absmax has values that are not finite"),
        ({"absmax": jnp.full(13, -1, jnp.float16)}, "absmax has negative values"),
        ({"columns": jnp.zeros(3, jnp.int32)}, "columns are not ascending columns of 20"),
        ({"columns": jnp.array([3, 7, 20], jnp.int32)}, "columns are not ascending columns of 20"),
        ({"outliers": jnp.zeros((12, 3), jnp.float32)}, "layer.outliers has dtype float32"),
        ({"data_type": "int", "codes": jnp.full((4, 26), 255, jnp.uint8)}, "layer.codes has code 15; int4/16 has 15 codes"),
        ({"version": 2}, "codebook format 2"),
        ({"bits_per_code": 9}, "9 bits"),
        ({"data_type": "quantile", "codebook": jnp.ones(16, jnp.float16) * 2}, r"codebook is not ascending within \[-1, 1\]"),
    ],
)
def test_the_validator_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    w = quantized(outliers=3)
    w.validate("layer")
    with pytest.raises(QuikError, match=message):
        dataclasses.replace(w, **change).validate("layer")


def test_what_cannot_be_stored_is_refused() -> None:
    huge = W.copy()
    huge[0, 0] = 1e6
    with pytest.raises(QuikError, match='a block of layer overflows an absmax in float16; set absmax to "float32"'):
        quantized(huge)
    assert np.isfinite(np.asarray(dequantize(quantized(huge, absmax="float32")))).all()
    with pytest.raises(QuikError, match="an outlier weight of layer overflows float16"):
        quantized(huge, outliers=20)
    zeros = quantized(np.zeros((12, 20), np.float32), data_type="quantile", absmax="double")
    zeros.validate()
    assert not np.asarray(dequantize(zeros)).any()
