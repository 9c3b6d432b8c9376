"""The Mosaic kernels' own bodies run on a CPU by `hopper_machine`, against the reference.

Small shapes that still meet every branch: rows and outputs that end inside a tile, outliers that end inside a step, several
tiles per thread block, K split over a cluster, every fused producer.
"""

from typing import Any

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from hopper_machine import running

from quikjax.pallas_kernels import api, hopper, reference, tuned
from quikjax.pallas_kernels.devices import H100, Device
from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer
from quikjax.pallas_kernels.quik_matmul.tiles import MatmulTiles
from quikjax.pallas_kernels.split_quantize import mosaic as split_kernel
from quikjax.pallas_kernels.split_quantize.mosaic import SplitTiles

PRODUCERS = [api.Identity(), api.RmsNorm(1e-5), api.LayerNorm(1e-5), api.SiluMul(), api.Gelu(), api.Gelu(True), api.Relu()]


def _parameters(producer: api.Producer, inputs: int) -> tuple[jnp.ndarray, ...]:
    rng = np.random.default_rng(9)
    # In bfloat16, as models hold them.
    return tuple(jnp.asarray(rng.normal(1, 0.2, inputs), jnp.bfloat16) for _ in range(producer.parameters))


@pytest.mark.parametrize("producer", PRODUCERS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("rows", "inputs", "outliers", "bits", "tiles", "clip"),
    [
        (3, 576, 36, 4, SplitTiles(2, 1), (17, 1)),
        (2, 2048, 0, 8, SplitTiles(1, 3), None),
        (1, 1536, 300, 4, SplitTiles(1, 8), None),
    ],
)
def test_split(
    monkeypatch: pytest.MonkeyPatch,
    producer: api.Producer,
    rows: int,
    inputs: int,
    outliers: int,
    bits: int,
    tiles: SplitTiles,
    clip: tuple[int, int] | None,
) -> None:
    """Codes, outliers, scale and zero bit for bit; behind a norm, SiLU or GELU at most one code in a thousand one step off."""
    columns = jnp.asarray(np.random.default_rng(rows).permutation(inputs), jnp.int32)
    tensors = tuple(kernel_cases.tokens(i, (rows, inputs)) for i in range(producer.inputs))
    arguments = (tensors, columns, inputs - outliers, bits)
    keywords: dict[str, Any] = {"producer": producer, "parameters": _parameters(producer, inputs), "clip": clip}
    want = api.split_quantize(*arguments, **keywords, backend="xla")
    monkeypatch.setattr(tuned, "split_tiles", lambda *_: (tiles, True))
    with running(monkeypatch):
        got = api.split_quantize(*arguments, **keywords, backend="mosaic", device=H100)
    if producer.exact:
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        return
    difference = np.abs(np.asarray(got.codes, np.int32) - np.asarray(want.codes, np.int32))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3
    # One unit of bfloat16 in what the producer rounds to, and the cancellation in GELU's tail.
    kept, expected = (np.asarray(split.outliers, np.float32) for split in (got, want))
    np.testing.assert_allclose(kept, expected, rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(np.asarray(got.scale), np.asarray(want.scale), rtol=2**-7)


@pytest.mark.long
@pytest.mark.parametrize(
    ("producer", "inputs"),
    [(api.Identity(), 332), (api.RmsNorm(1e-5), 332), (api.RmsNorm(1e-5), 14336)],
    ids=["by XLA", "behind a norm, by XLA", "behind a norm, by the kernel"],
)
def test_a_layer_whose_split_no_kernel_can_hold_whole(
    monkeypatch: pytest.MonkeyPatch, producer: api.Producer, inputs: int
) -> None:
    """332 columns are not a multiple of 8; a norm of 14336 is more than the registers of 128 threads hold, the split is not."""
    packed = kernel_cases.weight(5, 64, inputs, 20, dtype=jnp.float16)
    x = kernel_cases.tokens(2, (3, inputs), jnp.float16)
    parameters = _parameters(producer, inputs)
    want = api.split_quantize((x,), packed.columns, packed.base, 4, producer=producer, parameters=parameters, backend="xla")
    monkeypatch.setattr(tuned, "split_tiles", lambda *_: (SplitTiles(1, 1), True))
    splits: list[api.Producer] = []
    kernel = split_kernel.split_quantize

    def note(*arguments: Any, **keywords: Any) -> Any:
        splits.append(arguments[5])
        return kernel(*arguments, **keywords)

    monkeypatch.setattr(split_kernel, "split_quantize", note)
    with running(monkeypatch):
        tiled = mosaic_layer.split((x,), api.to_tiles(packed).columns, packed.base, 4, producer, parameters, H100)
        (y,) = mosaic_layer.product(tiled, 3, packed, [None], 4, jnp.float32, H100)
    assert splits == ([] if inputs == 332 else [api.Identity()])
    # XLA computes the norm either way, so nothing differs.
    for got, expected in zip(mosaic_layer.exact_split(tiled, 3, packed.base, 20), want, strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    plain = reference.quik_matmul(want, packed.qweight, packed.scale, packed.reduced, packed.outliers, None, 4)
    np.testing.assert_allclose(np.asarray(y), np.asarray(plain), rtol=1e-4, atol=1e-4 * np.abs(plain).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_every_staged_row_begins_where_the_copy_engine_can_write(dtype: Any) -> None:
    """A multiple of 128 bytes; elsewhere the copy faults on the device, and neither compiler nor simulator says so."""
    for columns in range(8, 3000, 8):
        unit = hopper.row_unit(columns)
        assert unit is not None
        lines = split_kernel.staged_lines(columns, dtype)
        assert lines * unit >= columns
        assert lines * unit * jnp.dtype(dtype).itemsize % 128 == 0


MATMULS = [
    # rows, outputs, inputs, outliers, weight bits, activation bits, bias, tiles
    (3, 192, 576, 36, 4, 4, True, MatmulTiles(64, 8, 3, 1, 1)),
    (17, 264, 640, 0, 4, 4, False, MatmulTiles(64, 32, 4, 1, 2)),
    (8, 128, 1024, 130, 4, 8, True, MatmulTiles(64, 8, 2, 1, 4)),
    pytest.param((40, 576, 640, 64, 8, 8, False, MatmulTiles(64, 16, 3, 2, 1)), marks=pytest.mark.long),
    pytest.param((130, 320, 384, 36, 4, 4, False, MatmulTiles(128, 64, 5, 8, 1)), marks=pytest.mark.long),
    (5, 256, 1024, 64, 4, 16, True, MatmulTiles(64, 8, 4, 1, 2)),
    (70, 192, 576, 36, 8, 16, False, MatmulTiles(64, 32, 3, 2, 1)),
]


@pytest.mark.parametrize("case", MATMULS, ids=lambda c: "-".join(str(part) for part in c[:6]))
def test_product(monkeypatch: pytest.MonkeyPatch, case: tuple) -> None:
    """Against float64 from the reference's accumulators: the float32 epilogue and one rounding to bfloat16."""
    rows, outputs, inputs, outliers, weight_bits, bits, with_bias, tiles = case
    packed = kernel_cases.weight(rows, outputs, inputs, outliers, weight_bits)
    x = kernel_cases.tokens(rows + 1, (rows, inputs))
    bias = jnp.asarray(np.random.default_rng(4).normal(size=outputs), jnp.float32) if with_bias else None
    # Three multiprocessors, so that a thread block walks several tiles.
    device = Device("gpu", H100.kind, H100.capability, 3)
    monkeypatch.setattr(tuned, "matmul_tiles", lambda *_: (tiles, True))
    with running(monkeypatch):
        if bits == 16:
            split = mosaic_layer.split((x,), packed.columns, packed.base, 16, api.Identity(), (), device)
            (got,) = mosaic_layer.product(split, rows, packed, [bias], 16, jnp.float16, device)
        else:
            exact = reference.split_quantize(x, packed.columns, packed.base, bits)
            got = api.quik_matmul(exact, packed, bias, bits, jnp.float16, backend="mosaic", device=device)
    want, magnitude = _float64(x, packed, bias, bits)
    error = np.abs(np.asarray(got, np.float64) - want)
    assert got.shape == (rows, outputs)
    assert (error <= 2**-11 * np.abs(want) + 64 * np.finfo(np.float32).eps * magnitude).all()


ROWS = [
    # outputs, inputs, outliers, weight bits, activation bits, producer, tiles
    (264, 576, 36, 4, 4, api.Identity(), MatmulTiles(64, 8, 3, 1, 2)),
    (520, 640, 0, 4, 8, api.Identity(), MatmulTiles(64, 8, 4, 1, 1)),  # more tiles than multiprocessors
    (72, 1384, 86, 8, 8, api.SiluMul(), MatmulTiles(64, 8, 3, 1, 4)),
    (40, 1024, 260, 8, 4, api.RmsNorm(1e-5), MatmulTiles(64, 8, 3, 1, 3)),
    (72, 640, 40, 4, 4, api.Gelu(), MatmulTiles(64, 8, 4, 1, 1)),
]


@pytest.mark.parametrize("case", ROWS, ids=lambda c: "-".join(str(part) for part in c[:5]))
def test_one_row_is_split_where_it_is_multiplied(monkeypatch: pytest.MonkeyPatch, case: tuple) -> None:
    outputs, inputs, outliers, weight_bits, bits, producer, tiles = case
    packed = kernel_cases.weight(2, outputs, inputs, outliers, weight_bits)
    tensors = tuple(kernel_cases.tokens(3 + i, (1, inputs)) for i in range(producer.inputs))
    parameters = _parameters(producer, inputs)
    device = Device("gpu", H100.kind, H100.capability, 3)
    monkeypatch.setattr(tuned, "matmul_tiles", lambda *_: (tiles, True))
    assert mosaic_layer.splits_inside(1, inputs, jnp.bfloat16, packed, bits, producer, device)
    with running(monkeypatch):
        row = mosaic_layer.unsplit(tensors, packed.columns, packed.base, bits, producer, parameters)
        (got,) = mosaic_layer.product(row, 1, packed, [None], bits, jnp.bfloat16, device)
    want, magnitude = _float64(producer(*tensors, *parameters), packed, None, bits)
    error = np.abs(np.asarray(got, np.float64) - want)
    # Behind a producer a code on the boundary of two may fall to the other side: one in a thousand, by a step of the activations.
    step = 0.0 if producer.exact else 2e-3 * float(np.abs(want).max())
    assert (error <= 2**-8 * np.abs(want) + 64 * np.finfo(np.float32).eps * magnitude + step).all()


def test_what_no_thread_block_can_split() -> None:
    def inside(rows: int, inputs: int, bits: int = 4, producer: api.Producer = PRODUCERS[0]) -> bool:
        packed = jax.eval_shape(lambda: kernel_cases.weight(0, 128, inputs, 32))
        return mosaic_layer.splits_inside(rows, inputs, jnp.bfloat16, packed, bits, producer, H100)

    assert inside(1, 4096)
    assert not inside(2, 4096)
    assert not inside(1, 4096, 16), "nothing is quantized"
    assert not inside(1, 332), "no width for the copy engine"
    assert not inside(1, 14848, 4, api.LayerNorm(1e-5)), "more values than registers"


def _float64(x: jnp.ndarray, packed: api.Packed, bias: jnp.ndarray | None, bits: int) -> tuple[np.ndarray, np.ndarray]:
    from test_reference import layer_in_numpy

    if bits < 16:
        return layer_in_numpy(np.asarray(x, np.float32), packed, None if bias is None else np.asarray(bias), bits)
    columns = np.asarray(packed.columns)
    weight = np.concatenate(
        [
            np.asarray(packed.qweight, np.float64) * np.asarray(packed.scale, np.float64)[:, None],
            np.asarray(packed.outliers, np.float64),
        ],
        axis=1,
    )
    wide = np.asarray(x, np.float64)[:, columns]
    shift = 0 if bias is None else np.asarray(bias, np.float64)
    return wide @ weight.T + shift, np.abs(wide) @ np.abs(weight).T + np.abs(shift)


def test_accumulators_are_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    """With scales of one, no zero point and no outliers the result *is* the accumulator."""
    packed = kernel_cases.weight(11, 128, 640, 0)
    ones = jnp.ones(128, jnp.float32)
    packed = api.pack(packed.qweight, ones, jnp.zeros(128), packed.outliers, packed.columns)
    codes = jnp.asarray(np.random.default_rng(1).integers(-8, 8, (9, 640)), jnp.int8)
    split = reference.Split(codes, jnp.zeros((9, 0), jnp.bfloat16), jnp.ones(9), jnp.zeros(9))
    for tiles in (MatmulTiles(64, 16, 3, 1, 1), MatmulTiles(64, 16, 3, 1, 4)):
        monkeypatch.setattr(tuned, "matmul_tiles", lambda *_, tiles=tiles: (tiles, True))
        with running(monkeypatch):
            got = api.quik_matmul(split, packed, None, 4, jnp.float32, backend="mosaic", device=H100)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(reference.integer_matmul(codes, packed.qweight)))


def test_many_tiles_are_each_walked_once() -> None:
    """The order of tiles in a persistent grid is a permutation, also where strips do not divide."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    for grid in [(1, 1), (3, 5), (8, 7), (17, 4), (64, 3)]:
        for strip in (1, 2, 8):
            walked = [tuple(int(i) for i in plgpu.planar_snake(jnp.int32(n), grid, 0, strip)) for n in range(grid[0] * grid[1])]
            assert sorted(walked) == [(i, j) for i in range(grid[0]) for j in range(grid[1])]
