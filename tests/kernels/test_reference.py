"""The definition itself against NumPy: codes and accumulators bit for bit, results against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quikjax.pallas_kernels import api, reference

CLIPS = [(15, 0), (16, 0), (16, 1), (17, 1), (19, 2)]
SYMMETRIC = {4: [(16, -8), (15, -8), (14, -8), (20, -8)], 8: [(256, -128), (255, -128), (254, -128)]}


def range_in_numpy(x: np.ndarray, clip: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each token's range, and where its steps are counted from."""
    low, top = x.min(-1), x.max(-1)
    if clip[1] >= 0:
        return low, top, low
    largest = np.abs(x).max(-1)
    return -largest, largest, np.zeros_like(low)


def quantize_in_numpy(x: np.ndarray, bits: int, clip: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The quantizer of the module's equations, one IEEE float32 operation after the other."""
    levels, lowest = clip = clip or (2**bits - 1, 0)
    x = np.asarray(x, np.float32)
    low, top, origin = range_in_numpy(x, clip)
    with np.errstate(under="ignore", over="ignore", invalid="ignore"):
        scale = np.maximum((top - low) * np.float32(1 / levels), np.float32(1e-30))
        steps = np.rint((x - origin[..., None]) * (np.float32(1) / scale)[..., None])
        codes = (np.clip(steps, lowest, lowest + 2**bits - 1) - lowest - 2 ** (bits - 1)).astype(np.int8)
        return codes, scale, origin + np.float32(lowest) * scale


def assert_same_split(x: np.ndarray, bits: int) -> None:
    want = quantize_in_numpy(x, bits)
    for quantize in (reference.quantize_activations, jax.jit(reference.quantize_activations, static_argnums=1)):
        for got, expected in zip(quantize(jnp.asarray(x), bits), want, strict=True):
            np.testing.assert_array_equal(np.asarray(got), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(64, 480), (3, 1), (2, 3, 5, 97), (0, 16)])
def test_codes_scale_and_zero_are_numpys(bits: int, dtype: jnp.dtype, shape: tuple[int, ...]) -> None:
    if 0 in shape:
        x = np.zeros(shape, np.float32)
        codes, scale, zero = reference.quantize_activations(jnp.asarray(x), bits)
        assert (codes.shape, scale.shape, zero.shape) == (shape, shape[:-1], shape[:-1])
        return
    values = kernel_cases.tokens(1, shape, dtype, min(8, shape[-1]))
    assert_same_split(np.asarray(values.astype(jnp.float32)), bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "row",
    [
        [0.0] * 8,
        [-3.25] * 8,
        [1e38, -1e38, 0.0, 1.0, -1.0, 5e37, -5e37, 2.0],
        [1e-38, 2e-38, 0.0, -1e-38, 3e-38, 1e-39, -2e-38, 1e-45],
        [1e-45, -1e-45, 0.0, 3e-45, 0.0, 0.0, 0.0, 0.0],
        [1e38, 1e-38, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [65504.0, -65504.0, 0.5, -0.5, 1.5, 2.5, 3.5, 4.5],
    ],
)
def test_extreme_rows(bits: int, row: list[float]) -> None:
    """All equal, the largest magnitudes, the smallest: finite scale, codes in range, the same in NumPy.

    Subnormals are compared by what they decode to: XLA on CPU flushes them, and the scale's floor of 1e-30 is far above.
    """
    x = np.asarray([row], np.float32)
    codes, scale, zero = (np.asarray(part) for part in reference.quantize_activations(jnp.asarray(x), bits))
    assert np.isfinite(scale).all()
    assert (scale >= np.float32(1e-30)).all()
    want_codes, want_scale, want_zero = quantize_in_numpy(x, bits)
    np.testing.assert_array_equal(codes, want_codes)
    np.testing.assert_array_equal(scale, want_scale)
    np.testing.assert_allclose(zero, want_zero, atol=float(np.finfo(np.float32).tiny))
    back = (codes.astype(np.float64) + 2 ** (bits - 1)) * scale[:, None] + zero[:, None]
    assert (np.abs(back - x) <= 0.5001 * scale[:, None] + 1e-30).all()


# One shape each, so that XLA compiles once: other shapes are in the cases above.
@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 21), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)),
    bits=st.sampled_from([4, 8]),
)
def test_any_finite_input_is_numpys_and_decodes_within_half_a_step(x: np.ndarray, bits: int) -> None:
    codes, scale, zero = reference.quantize_activations(jnp.asarray(x), bits)
    want = quantize_in_numpy(x, bits)
    for got, expected in zip((codes, scale, zero), want, strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)
    back = (np.asarray(codes, np.float64) + 2 ** (bits - 1)) * np.asarray(scale, np.float64)[..., None]
    back = back + np.asarray(zero, np.float64)[..., None]
    slack = 0.5 * np.asarray(scale, np.float64)[..., None] + 1e-6 * np.abs(x).max() + 1e-30
    assert (np.abs(back - x) <= slack).all()


@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 21), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)),
    clip=st.sampled_from(CLIPS + SYMMETRIC[4]),
)
def test_a_level_clip_is_numpys_and_decodes_to_the_nearest_level(x: np.ndarray, clip: tuple[int, int]) -> None:
    """Against float64: what a code decodes to is the nearest of the 16 levels there are, up to rounding at a boundary."""
    found = reference.quantize_activations(jnp.asarray(x), 4, clip)
    for got, expected in zip(found, quantize_in_numpy(x, 4, clip), strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)
    codes, scale, zero = (np.asarray(part, np.float64)[..., None] for part in found)
    back = (codes[..., 0] + 8) * scale + zero
    wide = x.astype(np.float64)
    low, top, origin = range_in_numpy(wide, clip)
    step = np.maximum((top - low) / clip[0], 1e-30)[:, None]
    grid = origin[:, None, None] + np.arange(clip[1], clip[1] + 16) * step[..., None]
    nearest = np.abs(grid - wide[..., None]).min(-1)
    assert (np.abs(back - wide) <= nearest + 1e-4 * step + 1e-6 * np.abs(wide).max()).all()


def test_the_whole_range_is_the_level_clip_of_todays_numbers() -> None:
    x = kernel_cases.tokens(4, (5, 64), jnp.float32)
    for a, b in zip(reference.quantize_activations(x, 4), reference.quantize_activations(x, 4, (15, 0)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@settings(max_examples=40, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 21), elements=st.just(0.0) | st.floats(-1e6, 1e6, width=32, allow_subnormal=False)),
    bits_and_clip=st.sampled_from([(bits, clip) for bits, clips in SYMMETRIC.items() for clip in clips]),
)
def test_symmetric_activations_are_numpys_and_keep_zeros_and_signs(
    x: np.ndarray, bits_and_clip: tuple[int, tuple[int, int]]
) -> None:
    bits, clip = bits_and_clip
    half = 2 ** (bits - 1)
    found = codes, scale, zero = [np.asarray(part) for part in reference.quantize_activations(jnp.asarray(x), bits, clip)]
    for got, expected in zip(found, quantize_in_numpy(x, bits, clip), strict=True):
        np.testing.assert_array_equal(got, expected)
    # Nothing is left of the zero point in the epilogue, so a zero has no part in any sum.
    assert (zero + np.float32(half) * scale == 0).all()
    assert (codes[x == 0] == 0).all()
    # Everything has its mirror image but the lowest code.
    mirrored = np.asarray(reference.quantize_activations(jnp.asarray(-x), bits, clip)[0])
    np.testing.assert_array_equal(np.maximum(mirrored, 1 - half), -np.maximum(codes, 1 - half))


@pytest.mark.parametrize(
    ("bits", "clip"),
    [
        *[(8, (16, 0)), (4, (14, 0)), (4, (15, 1)), (4, (19, 3)), (4, (16, -1))],
        *[(4, (13, -8)), (4, (16, -7)), (8, (256, -8)), (8, (253, -128)), (8, (257, 1))],
    ],
)
def test_level_clips_that_cannot_be(bits: int, clip: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{bits}-bit activations cannot have the level clip"):
        reference.checked_level_clip(bits, clip)


@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from([(1, 300, 7), (2, 1, 40), (5, 129, 33)]), bits=st.sampled_from([4, 8]), seed=st.integers(0, 999))
def test_accumulators_are_exact(shape: tuple[int, int, int], bits: int, seed: int) -> None:
    rows, base, outputs = shape
    rng = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (rows, base))
    weight = rng.integers(-half, half, (outputs, base))
    dtype = jnp.int4 if bits == 4 else jnp.int8
    got = reference.integer_matmul(jnp.asarray(codes, jnp.int8), jnp.asarray(weight, dtype))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got), codes.astype(np.int64) @ weight.T.astype(np.int64))


def test_accumulator_at_the_limit_of_int32() -> None:
    base = reference.MAX_BASE
    codes = jnp.full((1, base), -128, jnp.int8)
    got = reference.integer_matmul(codes, jnp.full((1, base), -128, jnp.int8))
    assert int(got[0, 0]) == base * 128 * 128
    with pytest.raises(ValueError, match="overflow"):
        reference.integer_matmul(jnp.zeros((1, base + 1), jnp.int8), jnp.zeros((1, base + 1), jnp.int8))


def layer_in_numpy(x: np.ndarray, packed: api.Packed, bias: np.ndarray | None, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The layer in float64 from NumPy's codes, and the sum of magnitudes that rounding errors are measured against."""
    columns, base = np.asarray(packed.columns), packed.base
    x_base, x_out = x[..., columns[:base]], x[..., columns[base:]].astype(np.float64)
    q = np.asarray(packed.qweight, np.int64)
    scale, outliers = np.asarray(packed.scale, np.float64), np.asarray(packed.outliers, np.float64)
    parts = []
    if base:
        codes, s, z = quantize_in_numpy(x_base, bits, packed.level_clip)
        s, z = s.astype(np.float64), z.astype(np.float64)
        parts.append((codes.astype(np.int64) @ q.T) * s[..., None] * scale)
        parts.append((z + 2 ** (bits - 1) * s)[..., None] * np.asarray(packed.reduced, np.float64))
    parts.append(x_out @ outliers.T)
    magnitude = np.abs(x_out) @ np.abs(outliers).T + sum(np.abs(part) for part in parts[:-1])
    if bias is not None:
        parts.append(np.broadcast_to(bias.astype(np.float64), parts[0].shape))
        magnitude = magnitude + np.abs(bias)
    return np.asarray(sum(parts)), np.asarray(magnitude)


# Every pair of widths and outliers with one form of batch in the fast tests, and with each of them in the long ones.
LAYERS = [
    pytest.param(*layer, batch, id=f"{batch}-{layer[2]}-outliers-{layer[0]}-{layer[1]}", marks=[pytest.mark.long] * bool(far % 3))
    for number, layer in enumerate(
        (bits, clip, outliers)
        for bits, clip in [(4, None), (8, None), (4, (17, 1)), (4, (16, -8)), (8, (256, -128))]
        for outliers in (0, 1, 36, 96, 256)
    )
    for far, batch in enumerate([(1,), (2, 3), (17,)], number)
]


@pytest.mark.parametrize(("bits", "clip", "outliers", "batch"), LAYERS)
def test_layer_against_float64(bits: int, clip: tuple[int, int] | None, outliers: int, batch: tuple[int, ...]) -> None:
    """Float32 epilogue: within 32 roundings of the magnitudes added. 256 of 256 columns is the layer without a base."""
    packed = kernel_cases.weight(outliers, 40, 256, outliers, bits)
    packed = dataclasses.replace(packed, level_clip=clip and clip)
    x = kernel_cases.tokens(2, (*batch, 256), jnp.float32)
    bias = jnp.asarray(np.random.default_rng(3).normal(size=40), jnp.float32)
    (y,) = api.linears((x,), [packed], [bias], bits, backend="xla")
    want, magnitude = layer_in_numpy(np.asarray(x), packed, np.asarray(bias), bits)
    assert y.shape == (*batch, 40)
    assert (np.abs(np.asarray(y, np.float64) - want) <= 32 * np.finfo(np.float32).eps * magnitude).all()


def test_rows_do_not_depend_on_their_batch() -> None:
    packed = kernel_cases.weight(5, 48, 320, 20)
    x = kernel_cases.tokens(6, (4, 5, 320), jnp.float32)
    whole = reference.split_quantize(x, packed.columns, packed.base, 4)
    for i in range(4):
        part = reference.split_quantize(x[i], packed.columns, packed.base, 4)
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b)[i])
