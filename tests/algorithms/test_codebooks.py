"""Codebooks against the papers' tables, block-wise quantization against its equation, errors against other libraries' figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quikjax.algorithms import codebooks
from quikjax.errors import QuikError

NF4 = [
    *(-1, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1),
]


def mirrored(positive: list[float]) -> list[float]:
    return sorted({*positive, *(-value for value in positive)})


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (codebooks.integer(3), [-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1]),
        (codebooks.integer(4), [value / 7 for value in range(-7, 8)]),
        (codebooks.floating(4, 2), mirrored([0, 0.0052083333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1])),
        (codebooks.floating(4, 3), mirrored([0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])),
        (codebooks.floating(3, 2), mirrored([0, 0.25, 0.5, 1])),
        (codebooks.floating(3), mirrored([0, 0.25, 0.5, 1])),
        (codebooks.dynamic(4), sorted([*mirrored([0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]), 0, 1])),
        (codebooks.normal_float(4), NF4),
        (codebooks.fp4(), mirrored([0, 0.0625 / 12, 2 / 12, 3 / 12, 4 / 12, 6 / 12, 8 / 12, 1])),
    ],
)
def test_tables_are_the_papers(made: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_allclose(made, expected, rtol=0, atol=6e-8)  # the last of seven digits
    assert made.dtype == np.float32


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("data_type", ["int", "float", "dynamic", "nf", "quantile"])
def test_every_codebook_has_two_to_the_k_values_or_one_fewer(bits: int, data_type: str) -> None:
    if data_type == "quantile":
        made = codebooks.quantile(np.random.default_rng(0).normal(size=5000), bits)
    else:
        made = codebooks.codebook(data_type, bits)  # type: ignore[arg-type]
    assert len(made) == 2**bits - (data_type in ("int", "float"))
    assert (np.diff(made) > 0).all()
    assert np.abs(made).max() == 1
    assert 0 in made


@pytest.mark.parametrize("bits", range(3, 9))
def test_floats_are_their_definition_for_every_number_of_exponent_bits(bits: int) -> None:
    """Written out bit by bit: sign, exponent, mantissa."""
    for exponent_bits in range(1, bits):
        mantissa_bits, bias, values = bits - 1 - exponent_bits, 2 ** (exponent_bits - 1) + 1, set()
        for code in range(2**bits):
            sign, e = code >> (bits - 1), (code >> mantissa_bits) % 2**exponent_bits
            f = code % 2**mantissa_bits / 2**mantissa_bits
            value = f * 2.0**-bias if e == 0 else (1 + f) * 2.0 ** -(e - 1 - bias)
            values.add(-value if sign else value)
        largest = max(values)
        made = codebooks.floating(bits, exponent_bits)
        np.testing.assert_array_equal(made, np.array(sorted(value / largest for value in values), np.float32))
    for wrong in (0, bits):
        with pytest.raises(QuikError, match=f"a float of {bits} bits has from 1 to {bits - 1} exponent bits, not {wrong}"):
            codebooks.floating(bits, wrong)


def test_the_formula_of_nf_gives_the_published_table() -> None:
    """To the digits to which its authors rounded the probability at the end."""
    from statistics import NormalDist

    offset = 1 - (1 / 15 + 1 / 16) / 4
    positive = [NormalDist().inv_cdf(0.5 + (offset - 0.5) * i / 8) for i in range(1, 9)]
    np.testing.assert_allclose(codebooks.normal_float(4)[8:], np.array(positive) / positive[-1], atol=2e-7)
    assert codebooks.normal_float(3).tolist()[3] == 0
    np.testing.assert_allclose(codebooks.normal_float(5)[16:].max(), 1)


def test_quantile_gives_every_code_as_many_weights() -> None:
    values = np.random.default_rng(0).gumbel(size=20_000)
    made = codebooks.quantile(values, 4)
    d = 1 / 30
    quantiles = np.quantile(values, np.linspace(d, 1 - d, 15))
    np.testing.assert_allclose(made, np.sort([*quantiles, 0]) / np.abs(quantiles).max(), rtol=1e-6)
    assert codebooks.quantile(np.zeros(7), 3).tolist() == [0]


def test_what_is_refused() -> None:
    for bits in (2, 9):
        with pytest.raises(QuikError, match=f"codebooks have from 3 to 8 bits, not {bits}"):
            codebooks.codebook("int", bits)
    with pytest.raises(QuikError, match="fp4 has 4 bits, not 5"):
        codebooks.codebook("fp4", 5)


def slow_codes(flat: np.ndarray, table: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The equation, a weight at a time, in float64: how far each value is from the nearest one, and what came back."""
    least, values = np.empty(len(flat)), np.empty(len(flat))
    for start in range(0, len(flat), block):
        part = flat[start : start + block].astype(np.float64)
        m = np.abs(part).max()
        for i, value in enumerate(part):
            distances = np.abs(table.astype(np.float64) - (value / m if m else 0))
            least[start + i], values[start + i] = distances.min() * m, table[np.argmin(distances)] * m
    return least, values


SETTINGS = settings(max_examples=25, deadline=None)
TABLES = [codebooks.codebook("int", 3), codebooks.codebook("float", 5), codebooks.codebook("dynamic", 8), codebooks.fp4()]


@SETTINGS
@given(
    st.sampled_from([1, 130]),  # every shape is a compilation
    st.sampled_from([1, 64, 1000]),
    st.sampled_from(range(len(TABLES))),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.integers(0, 2**32),
)
def test_block_wise_quantization_is_its_equation(weights: int, block: int, which: int, size: float, seed: int) -> None:
    rng, table = np.random.default_rng(seed), TABLES[which]
    flat = (rng.normal(size=weights) * size).astype(np.float32)
    flat[rng.random(weights) < 0.2] = 0
    flat[: block // 2] = 0  # half a block of zeros, or a whole one
    absmax = codebooks.block_absmax(jnp.asarray(flat), block)
    codes = codebooks.encode(jnp.asarray(flat), absmax, jnp.asarray(table), block=block)
    decoded = np.asarray(codebooks.decode(codes, absmax, jnp.asarray(table), block=block), np.float64)
    least, _ = slow_codes(flat, table, block)
    # Where two values are as near, rounding may take either: what counts is the distance.
    np.testing.assert_allclose(np.abs(decoded - flat), least, rtol=1e-4, atol=3e-7 * size)
    largest = [np.abs(flat[start : start + block]).max() for start in range(0, weights, block)]
    np.testing.assert_array_equal(absmax, largest)


def test_an_all_zero_block_comes_back_as_zeros() -> None:
    flat = jnp.zeros(130).at[70].set(3.0)
    table = jnp.asarray(codebooks.normal_float(4))
    absmax = codebooks.block_absmax(flat, 64)
    assert absmax.tolist() == [0, 3, 0]
    np.testing.assert_array_equal(
        codebooks.decode(codebooks.encode(flat, absmax, table, block=64), absmax, table, block=64), flat
    )


@SETTINGS
@given(st.integers(3, 8), st.sampled_from([0, 1, 8, 37]), st.integers(0, 2**32))
def test_packing_comes_back_and_is_exactly_as_large(bits: int, weights: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, weights).astype(np.uint8)
    planes = codebooks.pack(jnp.asarray(codes), bits)
    assert planes.shape == (bits, -(-weights // 8))
    np.testing.assert_array_equal(codebooks.unpack(planes, weights), codes)
    for j in range(bits):
        np.testing.assert_array_equal(np.unpackbits(np.asarray(planes)[j], bitorder="little")[:weights], (codes >> j) & 1)


def test_double_quantization_is_its_equation() -> None:
    absmax = np.random.default_rng(0).uniform(1, 3, 700).astype(np.float32)
    codes, scales, mean = codebooks.double_quantize(jnp.asarray(absmax))
    assert (codes.shape, scales.shape, mean.shape) == ((700,), (3,), (1,))
    np.testing.assert_allclose(mean[0], absmax.mean(), rtol=1e-6)
    _, expected = slow_codes(absmax - np.asarray(mean), codebooks.dynamic(8), 256)
    found = np.asarray(codebooks.undo_double(codes, scales, mean))
    np.testing.assert_allclose(found, expected + np.asarray(mean), rtol=1e-6)
    assert np.abs(found / absmax - 1).max() < 0.02
    assert codebooks.undo_double(*codebooks.double_quantize(jnp.zeros(3))).tolist() == [0, 0, 0]


def errors(x: jax.Array, table: np.ndarray, block: int) -> tuple[float, float]:
    absmax = codebooks.block_absmax(x, block)
    y = codebooks.decode(codebooks.encode(x, absmax, jnp.asarray(table), block=block), absmax, jnp.asarray(table), block=block)
    gap = jnp.abs(x - y)
    return float(jnp.mean(gap)), float(jnp.mean(gap / jnp.abs(x)))


# bitsandbytes' tests, block-wise 4 bits of N(0, 1): mean absolute and mean relative error by block, means over 200 samples of a
# million weights. Ours is one sample: three of their standard deviations are 0.3 % (blocks of 32) to 1.5 % (4096).
BITSANDBYTES = {
    "nf": {32: (0.067746, 0.189726), 64: (0.072798, 0.203339), 256: (0.080337, 0.226105), 4096: (0.092547, 0.262473)},
    "fp4": {32: (0.088925, 0.242443), 64: (0.096543, 0.260125), 256: (0.108684, 0.289831), 4096: (0.129536, 0.337169)},
}


@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("data_type", ["nf", "fp4"])
def test_errors_are_those_that_bitsandbytes_publishes(data_type: str, block: int) -> None:
    x = jax.random.normal(jax.random.key(0), (1024 * 1024,))
    found = errors(x, codebooks.codebook(data_type, 4), block)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, BITSANDBYTES[data_type][block], rtol=0.015 if block == 4096 else 0.005)


def test_eight_dynamic_bits_are_within_what_bitsandbytes_publishes() -> None:
    absolute, relative = errors(jax.random.normal(jax.random.key(0), (1024 * 256,)), codebooks.dynamic(8), 4096)
    assert absolute < 0.011
    assert relative < 0.018


@pytest.mark.parametrize(
    ("table", "block", "published", "spread"),
    [
        (codebooks.integer(8), 4096, 0.00765991, 0.04),  # theirs has 127.5 steps to absmax, and rounds the result to bfloat16
        (codebooks.integer(4), 4096, 0.122559, 0.06),  # theirs has 7.5 steps
        (codebooks.normal_float(4), 512, 0.0986328, 0.005),  # their tile of 32 spans an axis of 16 behind it; bfloat16 again
    ],
)
def test_errors_are_near_those_that_qwix_publishes(table: np.ndarray, block: int, published: float, spread: float) -> None:
    with jax.threefry_partitionable(False):
        x = jax.random.normal(jax.random.key(42), (10, 256, 16), jnp.bfloat16).astype(jnp.float32).reshape(-1)
    assert errors(x, table, block)[0] / float(jnp.mean(jnp.abs(x))) == pytest.approx(published, rel=spread)
