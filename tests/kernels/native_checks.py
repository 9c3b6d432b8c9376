"""Products of the compiled library against their definitions; also a script, for a process in which they are compiled otherwise.

python tests/kernels/native_checks.py FOLDER FLAG...
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from quikjax.pallas_kernels import api, cpu, layout, reference
from quikjax.pallas_kernels.native import library, panels

# Rows around the tiles of both kinds of instructions, and more than one part of rows.
ROWS = (1, 4, 6, 8, 13, 130)
# Outputs and inputs: whole panels and not, one and several groups of panels, inputs that fill no step.
SHAPES = ((37, 51), (1, 3), (192, 104))


def paneled(weight: api.Packed, layers: int = 1, layer: int = 0) -> api.Paneled:
    """A weight in panels as number `layer` of `layers`; the others are noise."""
    rng = np.random.default_rng(7)
    bits, n = weight.weight_bits, weight.outputs
    codes = np.zeros((n, weight.inputs), np.int8)
    codes[:, np.asarray(weight.columns)[: weight.base]] = np.asarray(weight.qweight.astype(jnp.int8))
    own: dict[str, Any] = {
        "qweight": panels.code_panels(jnp.asarray(codes), bits),
        "outliers": panels.float_panels(weight.outliers),
        "scale": weight.scale,
        "reduced": weight.reduced,
    }
    for name, array in own.items():
        noise = rng.integers(0, 100, (layers, *array.shape)).astype(array.dtype)
        own[name] = jnp.asarray(noise).at[layer].set(array)
    static = {name: getattr(weight, name) for name in ("columns", "base", "inputs", "outputs", "level_clip")}
    return layout.Paneled(**own, **static, layer=jnp.int32(layer), bits=bits)


def random_weight(rng: np.random.Generator, n: int, k: int, o: int, bits: int, outlier_dtype: Any = jnp.float16) -> api.Packed:
    """A packed weight whose codes take every value of `bits`."""
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k - o))
    scale = rng.uniform(0.5, 1.5, n).astype(np.float32)
    return layout.pack(
        jnp.asarray(codes, jnp.int8).astype(jnp.int4 if bits == 4 else jnp.int8),
        jnp.asarray(scale),
        jnp.asarray(scale * codes.sum(axis=1), jnp.float32),
        jnp.asarray(rng.normal(size=(n, o)), outlier_dtype),
        jnp.asarray(rng.permutation(k), jnp.int32),
    )


def check_floats(dtype: Any) -> None:
    """Products of floats: float64's up to rounding, and of every row those that it has alone."""
    rng = np.random.default_rng(0)
    for n, k in SHAPES:
        weight, other = (rng.normal(size=(n, k)).astype(dtype) for _ in range(2))
        stack = jnp.stack([panels.float_panels(jnp.asarray(one)) for one in (other, weight, other)])

        @jax.jit
        def alone(x: jax.Array, stack: jax.Array, n: int = n) -> jax.Array:
            return panels.float_products(x, [panels.FloatPanels(stack, jnp.int32(1), n)])[0]

        for rows in ROWS:
            x = rng.normal(size=(rows, k)).astype(np.float32)
            y = np.asarray(alone(jnp.asarray(x), stack))
            exact = x.astype(np.float64) @ weight.astype(np.float64).T
            size = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
            assert y.shape == (rows, n)
            assert (np.abs(y - exact) <= size * k * 2**-23).all(), (dtype, n, k, rows)
            if rows == 13:
                for take in (1, 2, 3, 4, 5, 6, 7, 8):
                    few = alone(jnp.asarray(x[:take]), stack)
                    assert np.array_equal(y[:take], few), (dtype, n, k, take)


def check_codes(bits: int, weight_bits: int) -> None:
    """Sums of codes are the reference's integers: read out of results whose other factors are one and zero."""
    rng = np.random.default_rng(bits)
    for n, k in (*SHAPES, (16, 1000)):
        codes = rng.integers(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1), (n, k)).astype(np.int8)
        if k == 1000:  # the largest sums that so many codes have
            codes[: n // 2], codes[n // 2 :] = -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
        stack = panels.code_panels(jnp.asarray(codes), weight_bits)[None]
        ones, zeros = jnp.ones((1, n)), jnp.zeros((1, n))
        for rows in ROWS:
            x = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, k)).astype(np.int8)
            if k == 1000:
                x[::2], x[1::2] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            split = reference.Split(jnp.asarray(x), jnp.zeros((rows, 0)), jnp.ones(rows), jnp.zeros(rows))
            none = jnp.zeros((1, panels.panel_count(n), 0, panels.PANEL), jnp.float16)
            weight = panels.QuikPanels(stack, none, ones, zeros, jnp.int32(0), weight_bits)
            (y,) = panels.quik_products(split, bits, [weight])
            # Below 2^24, so that float32 has every one of them.
            assert np.array_equal(np.asarray(y), x.astype(np.int64) @ codes.T.astype(np.int64)), (bits, weight_bits, n, k, rows)


def check_layers(bits: int, weight_bits: int, clip: tuple[int, int] | None, outlier_dtype: Any) -> None:
    """Whole layers against the definition, all columns outliers and none included."""
    rng = np.random.default_rng(weight_bits)
    for n, k in SHAPES:
        for o in (0, 3, k) if (n, k) == SHAPES[0] else (min(k - 1, 3),):
            weight = random_weight(rng, n, k, o, weight_bits, outlier_dtype)
            weight = dataclasses.replace(weight, level_clip=clip)
            in_panels = paneled(weight, layers=3, layer=1)
            bias = jnp.asarray(rng.normal(size=n), jnp.float32)
            for rows in (1, 8, cpu.FEWEST_ROWS + 1):
                x = jnp.asarray(rng.normal(size=(rows, k)), jnp.float32)
                split = reference.split_quantize(x, weight.columns, weight.base, bits, clip)
                fields = (weight.qweight, weight.scale, weight.reduced, weight.outliers)
                wanted = np.asarray(reference.quik_matmul(split, *fields, bias, bits))
                (y,) = api.linears((x,), [in_panels], [bias], bits)
                far = np.abs(np.asarray(y) - wanted).max()
                assert far <= 2e-6 * max(np.abs(wanted).max(), 1) * max(k, 8) ** 0.5, (bits, weight_bits, n, k, o, rows, far)


def check_all() -> None:
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        check_floats(dtype)
    for bits, weight_bits in ((4, 4), (8, 4), (8, 8)):
        check_codes(bits, weight_bits)
    check_layers(4, 4, (17, 1), jnp.bfloat16)
    check_layers(8, 8, None, jnp.float16)


if __name__ == "__main__":
    library.FLAGS = (*(flag for flag in library.FLAGS if not flag.startswith("-march")), *sys.argv[2:])
    assert library.why_not(Path(sys.argv[1])) is None, library.why_not(Path(sys.argv[1]))
    check_all()
    print("every product is right")
