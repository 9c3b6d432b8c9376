"""Codes in the order of `x`: the reference's integers, bit for bit, without moving activations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quikjax.pallas_kernels import api, in_place, reference


def activations(rows: int, k: int) -> np.ndarray:
    x = np.random.default_rng(k).normal(size=(rows, k)).astype(np.float32) * 3
    x[0] = 1.25  # all equal
    x[1] = 0
    x[2, 0] = 1e38
    x[3] *= 1e-38
    return x


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "outliers"), [(20, 3), (33, 0), (17, 17), (576, 36), (129, 1)])
def test_integers_are_the_references(bits: int, k: int, outliers: int) -> None:
    rng = np.random.default_rng(0)
    base, n = k - outliers, 24
    columns = jnp.asarray(rng.permutation(k), jnp.int32)
    high = 2 ** (bits - 1)
    qweight = jnp.asarray(rng.integers(-high, high, (n, base)), jnp.int4 if bits == 4 else jnp.int8)
    x = jnp.asarray(activations(9, k))
    for wrap in (lambda f: f, jax.jit):
        expected = wrap(lambda x: reference.split_quantize(x, columns, base, bits))(x)
        found = wrap(lambda x: in_place.split_quantize(x, columns, base, bits))(x)
        for name in ("outliers", "scale", "zero"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        np.testing.assert_array_equal(np.asarray(found.codes)[:, columns[:base]], expected.codes)
        np.testing.assert_array_equal(np.asarray(found.codes)[:, columns[base:]], 0)
        if base:
            moved = wrap(in_place.unpermuted)(qweight, columns)
            assert moved.shape == (n, k)
            np.testing.assert_array_equal(
                reference.integer_matmul(found.codes, moved), reference.integer_matmul(expected.codes, qweight)
            )


def test_the_xla_backend_gives_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    columns = jnp.asarray(rng.permutation(40), jnp.int32)
    codes = jnp.asarray(rng.integers(-8, 8, (24, 36)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, 24), jnp.float32)
    packed = api.Packed(
        qweight=codes.astype(jnp.int4),
        scale=scale,
        reduced=scale * codes.astype(jnp.int32).sum(1).astype(jnp.float32),
        outliers=jnp.asarray(rng.normal(size=(24, 4)), jnp.float16),
        columns=columns,
        base=36,
        inputs=40,
        outputs=24,
    )
    x = jnp.asarray(rng.normal(size=(300, 40)), jnp.float32)
    moved = api.linears((x,), [packed, dataclasses.replace(packed, scale=scale * 2)], [None, None], 4, backend="xla")
    monkeypatch.setattr(in_place, "FEWEST_ROWS", 10**9)
    gathered = api.linears((x,), [packed, dataclasses.replace(packed, scale=scale * 2)], [None, None], 4, backend="xla")
    for one, other in zip(moved, gathered, strict=True):
        np.testing.assert_array_equal(one, other)
