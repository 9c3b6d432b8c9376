"""4-bit codebooks on a GPU: tile form, the definition, who is refused and why, and a whole layer compiled for an H100."""

import dataclasses
from typing import Any

import absent_gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.pallas_kernels import choice
from quikjax.pallas_kernels.choice import BackendError, CodebookProblem
from quikjax.pallas_kernels.codebook_matmul import layout as tile_form
from quikjax.pallas_kernels.codebook_matmul import mosaic
from quikjax.pallas_kernels.devices import A100, CPU, H100, tracing_for
from quikjax.quantizing.codebook import abstract_codebook, quantize_matrix
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.weights.codebook import CodebookWeight
from quikjax.weights.codebook_tiles import TiledCodebook, dequantize_tiled, tile_codebook
from quikjax.weights.linear import explain, linear
from quikjax.weights.tiled import put_on_device

W = np.random.default_rng(0).normal(size=(72, 320)).astype(np.float32)


def quantized(W: np.ndarray = W, **fields: Any) -> CodebookWeight:
    rule = CodebookRule(match="x", **{"data_type": "nf", "bits": 4, "block": 64, **fields})
    columns = jnp.arange(W.shape[1], dtype=jnp.int32)
    return quantize_matrix("layer", jnp.asarray(W), rule, columns, abstract_codebook(rule, W.shape, (1,), W.shape[1]))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"data_type": "int", "bits": 3, "absmax": "double"},
        {"data_type": "quantile", "block": "tensor"},
        {"data_type": "fp4", "block": 640, "absmax": "float32"},  # two rows to a block
    ],
)
def test_tile_form_is_the_same_layer(fields: dict[str, Any]) -> None:
    w = quantized(**fields)
    tiled = tile_codebook(w)
    assert tiled.tiles.codes.shape == (1, 3, 128, 16)
    np.testing.assert_array_equal(dequantize_tiled(tiled), w.matrix())
    # The definition against its equation in float64, F rounded to the dtype of x.
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 320)), jnp.bfloat16)
    codes = np.asarray(tile_form.codes_of(tiled.tiles))
    F = np.asarray(tiled.tiles.table.astype(jnp.bfloat16), np.float64)
    table = np.asarray(w.table(), np.float64)
    scale = np.where(table[codes] == 0, 0, np.asarray(w.matrix(), np.float64) / np.where(table[codes] == 0, 1, table[codes]))
    expected = np.asarray(x, np.float64) @ (F[codes] * scale).T
    np.testing.assert_allclose(tile_form.product(x, tiled.tiles), expected, rtol=1e-5, atol=1e-4)
    # That rounding is of the order of what dense weights in bfloat16 suffer.
    exact = np.asarray(x, np.float64) @ np.asarray(w.matrix(), np.float64).T
    assert np.linalg.norm(expected - exact) / np.linalg.norm(exact) < 2.0**-8


def test_the_bytes_of_a_table_are_those_of_its_values() -> None:
    tiles = tile_codebook(quantized()).tiles
    for row, dtype in enumerate(tile_form.DTYPES):
        words = np.asarray(tiles.words)[row].view(np.uint8).reshape(2, 16)
        values = (words[0].astype(np.uint16) | words[1].astype(np.uint16) << 8).view(np.dtype(dtype))
        np.testing.assert_array_equal(values, np.asarray(tiles.table.astype(dtype)))


GOOD = CodebookProblem(8, 4096, 4096, 4096, 4, 64, False, jnp.dtype(jnp.bfloat16))
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bits": 5}, "codes have 5 bits; the kernel looks up 16 values"),
    ({"base": 4014}, "82 columns are outliers"),
    ({"centered": True}, "weights are centered"),
    ({"block": 96}, "blocks of 96 do not cut rows of 4096 into whole multiples of 64"),
    ({"block": 192}, "blocks of 192 do not cut rows of 4096"),
    ({"dtype": jnp.dtype(jnp.float32)}, "activations are float32"),
    ({"rows": 0}, "there are no rows"),
    ({"rows": 65}, "65 rows: from 65 on weights are dequantized once"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_kernel_refuses_it_says(change: dict[str, Any], reason: str) -> None:
    problem = dataclasses.replace(GOOD, **change)
    chosen = choice.choose_codebook(problem, H100)
    assert chosen.backend == "xla"
    assert reason in chosen.refused["mosaic"]
    assert reason in chosen.reason
    with pytest.raises(BackendError, match="mosaic cannot run codebook weights"):
        choice.choose_codebook(problem, H100, "mosaic")


def test_the_choice_by_device() -> None:
    assert choice.choose_codebook(GOOD, H100).backend == "mosaic"
    assert choice.choose_codebook(GOOD, H100, "xla").backend == "xla"
    for device in (A100, CPU):
        assert "need a Hopper GPU" in choice.choose_codebook(GOOD, device).refused["mosaic"]
    with pytest.raises(BackendError, match="no such backend"):
        choice.choose_codebook(GOOD, H100, "cuda")
    assert explain(quantized(), 8, jnp.bfloat16, device=H100).backend == "mosaic"
    assert explain(tile_codebook(quantized()), 8, jnp.float16, device=H100).backend == "mosaic"
    assert "blocks of 7" in explain(quantized(block=7), 8, jnp.bfloat16, device=H100).refused["mosaic"]


def test_put_on_device_makes_tile_form_where_a_kernel_reads_it() -> None:
    params = {"a": quantized(), "b": quantized(block=7), "c": quantized(bits=8, data_type="int"), "d": jnp.ones(3)}
    assert put_on_device(params, A100) is params
    placed = put_on_device(params, H100)
    assert isinstance(placed["a"], TiledCodebook)
    assert isinstance(placed["b"], CodebookWeight)
    assert isinstance(placed["c"], CodebookWeight)
    assert put_on_device(placed, H100)["a"].tiles.codes is placed["a"].tiles.codes
    # On this process's CPU it multiplies as it did.
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 320)), jnp.float32)
    np.testing.assert_allclose(linear(x, placed["a"]), linear(x, params["a"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "wanted"), [((2, 4), 1), ((65,), 0)])
@pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))
def test_a_layer_compiles_for_an_h100(rows: tuple[int, ...], wanted: int) -> None:
    weight = tile_codebook(quantized())
    x, bias = jax.ShapeDtypeStruct((*rows, 320), jnp.bfloat16), jax.ShapeDtypeStruct((72,), jnp.bfloat16)
    with tracing_for(H100):
        compiled = absent_gpu.compile_for("h100", lambda x, weight, bias: linear(x, weight, bias), x, weight, bias)
    assert compiled.kernels == wanted
    assert compiled.complaints() == []
    if wanted:
        assert set(compiled.products) == {"m64n8k16.f32.bf16.bf16"}


@pytest.mark.skipif(absent_gpu.missing() is not None, reason=str(absent_gpu.missing()))
def test_gradients_and_vmap_compile_for_an_h100() -> None:
    weight = tile_codebook(quantized())

    def loss(x: jax.Array, weight: TiledCodebook) -> jax.Array:
        return jnp.sum(jax.vmap(lambda x: linear(x, weight))(x).astype(jnp.float32))

    with tracing_for(H100):
        x = jax.ShapeDtypeStruct((3, 4, 320), jnp.bfloat16)
        compiled = absent_gpu.compile_for("h100", jax.value_and_grad(loss), x, weight)
    assert compiled.kernels == 1


def test_tiles_fill_the_machine() -> None:
    """LLaMA-2-7B: 32 tiles of 128 outputs, four parts each, on 132 multiprocessors; shared memory holds every choice."""
    assert mosaic.default_tiles(1, 4096, 4096, 132) == mosaic.CodebookMatmulTiles(8, 8, 4)
    for rows in (1, 16, 17, 64):
        for outputs, inputs in ((128, 128), (1024, 8192), (11008, 4096), (28672, 8192), (640, 640)):
            tiles = mosaic.default_tiles(rows, outputs, inputs, 132)
            assert rows <= tiles.m
            assert mosaic.shared_memory(tiles) <= 230400
            assert tiles.stages >= 2
            assert tiles.splits == 1 or inputs // 128 >= 2 * tiles.splits
