"""The XLA backend's way on a CPU: the reference's integers, bit for bit, without moving activations."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quikjax.pallas_kernels import api, cpu, reference
from quikjax.pallas_kernels.devices import CPU, H100, cpu_has_bfloat16


def activations(rows: int, k: int) -> np.ndarray:
    x = np.random.default_rng(k).normal(size=(rows, k)).astype(np.float32) * 3
    x[0] = 1.25  # all equal
    x[1] = 0
    x[2, 0] = 1e38
    x[3] *= 1e-38
    return x


@pytest.mark.parametrize("carrier", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize(("bits", "clip"), [(4, None), (8, None), (4, (17, 1)), (4, (16, -8))])
@pytest.mark.parametrize(
    ("k", "outliers"),
    [(33, 0), (17, 17), (576, 36), pytest.param(20, 3, marks=pytest.mark.long), pytest.param(129, 1, marks=pytest.mark.long)],
)
def test_integers_are_the_references(bits: int, clip: tuple[int, int] | None, k: int, outliers: int, carrier: type) -> None:
    rng = np.random.default_rng(0)
    base, n = k - outliers, 24
    columns = jnp.asarray(rng.permutation(k), jnp.int32)
    high = 2 ** (bits - 1)
    qweight = jnp.asarray(rng.integers(-high, high, (n, base)), jnp.int4 if bits == 4 else jnp.int8)
    x = jnp.asarray(activations(9, k))
    for wrap in (lambda f: f, jax.jit):
        expected = wrap(lambda x: reference.split_quantize(x, columns, base, bits, clip))(x)
        found = wrap(lambda x: cpu.split_quantize(x, columns, base, bits, carrier, clip))(x)
        assert found.codes.dtype == carrier
        for name in ("outliers", "scale", "zero"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        np.testing.assert_array_equal(np.asarray(found.codes, np.int8)[:, columns[:base]], expected.codes)
        if base:
            moved = wrap(cpu.unpermuted)(qweight, columns)
            assert moved.shape == (n, k)
            np.testing.assert_array_equal(
                cpu.integer_matmul(found.codes, moved.astype(carrier), cpu.bfloat16_pieces(k, bits, bits)),
                reference.integer_matmul(expected.codes, qweight),
            )


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([1, 1024, 1500]), st.sampled_from([(4, 4), (4, 8), (8, 4), (8, 8)]), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_bfloat16_sums_are_exact(k: int, widths: tuple[int, int], extreme: bool, seed: int) -> None:
    """With every code at its largest the sums come closest to what a float32 cannot hold."""
    bits, weight_bits = widths
    rng = np.random.default_rng(seed)
    codes, qweight = (rng.integers(-(2 ** (b - 1)), 2 ** (b - 1), (5, k)) for b in widths)
    if extreme:
        codes[0], qweight[0], qweight[1] = -(2 ** (bits - 1)), -(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1
    found = cpu.integer_matmul(
        jnp.asarray(codes, jnp.bfloat16), jnp.asarray(qweight, jnp.bfloat16), cpu.bfloat16_pieces(k, bits, weight_bits)
    )
    np.testing.assert_array_equal(found, codes @ qweight.T)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("rows", [300, 512])
@pytest.mark.parametrize(("bits", "clip"), [(4, (19, 2)), (8, (256, -128))])
def test_the_xla_backend_gives_the_same_either_way(
    bits: int, clip: tuple[int, int] | None, rows: int, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    columns = jnp.asarray(rng.permutation(40), jnp.int32)
    codes = jnp.asarray(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (24, 36)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, 24), jnp.float32)
    packed = api.Packed(
        qweight=codes.astype(jnp.int4 if bits == 4 else jnp.int8),
        scale=scale,
        reduced=scale * codes.astype(jnp.int32).sum(1).astype(jnp.float32),
        outliers=jnp.asarray(rng.normal(size=(24, 4)), jnp.float16),
        columns=columns,
        base=36,
        inputs=40,
        outputs=24,
        level_clip=clip,
    )
    weights = [packed, dataclasses.replace(packed, scale=scale * 2)]
    biases = [None, jnp.asarray(rng.normal(size=24), jnp.float32)]
    device = dataclasses.replace(CPU, bfloat16_products=bfloat16)
    x = jnp.asarray(rng.normal(size=(rows, 40)), jnp.float32)
    moved = api.linears((x,), weights, biases, bits, backend="xla", device=device)
    monkeypatch.setattr(cpu, "FEWEST_ROWS", 10**9)
    gathered = api.linears((x,), weights, biases, bits, backend="xla", device=device)
    for one, other in zip(moved, gathered, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_what_made_the_activations_is_computed_once() -> None:
    """XLA must not see through the loop that never runs: one exponential in the whole program, and the same numbers."""
    packed = kernel_cases.weight(3, 24, 40, 4)
    gate, up = (jnp.asarray(np.random.default_rng(i).normal(size=(700, 40)), jnp.float32) for i in (1, 2))

    def layer(gate: jax.Array, up: jax.Array, packed: api.Packed) -> jax.Array:
        return api.linears((gate, up), [packed], [None], 8, producer=api.SiluMul(), device=CPU)[0]

    compiled = jax.jit(layer).lower(gate, up, packed).compile()
    assert len(re.findall(r" = f32\[700,40\]\S* exponential\(", str(compiled.as_text()))) == 1
    x = api.SiluMul()(gate, up)
    split = reference.split_quantize(x, packed.columns, packed.base, 8)
    want = reference.quik_matmul(split, packed.qweight, packed.scale, packed.reduced, packed.outliers, None, 8)
    # A unit in the last place of the gate may move a code by a step of 1/255 of a token's range.
    np.testing.assert_allclose(compiled(gate, up, packed), want, rtol=0.02, atol=0.02)


def test_only_a_cpu_moves_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def note(x: jax.Array, *_rest: object, **_more: object) -> list[jax.Array]:
        called.append(x.shape[0])
        return [x]

    monkeypatch.setattr(cpu, "linears", note)
    packed = api.pack(
        jnp.zeros((8, 6), jnp.int4), jnp.ones(8), jnp.zeros(8), jnp.zeros((8, 2), jnp.float16), jnp.arange(8, dtype=jnp.int32)
    )
    for device in (CPU, H100):
        for rows in (cpu.FEWEST_ROWS - 1, cpu.FEWEST_ROWS):
            api.linears((jnp.ones((rows, 8)),), [packed], [None], 4, backend="xla", device=device)
    assert called == [cpu.FEWEST_ROWS]


def test_bfloat16_instructions_are_read_from_the_system(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    for text, expected in (
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("processor : 0\nflags\t\t: fpu avx512f sse\n", False),
        ("Features : fp asimd bf16\n", False),
    ):
        file.write_text(text)
        assert cpu_has_bfloat16.__wrapped__(file) is expected
    assert cpu_has_bfloat16.__wrapped__(tmp_path / "absent") is False
