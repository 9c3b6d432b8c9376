"""The compiled products of CPUs: their numbers, their panels, and what happens where they cannot be compiled."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import native_checks as checks
import numpy as np
import pytest

from quikjax.executables import cache_directory
from quikjax.pallas_kernels import api, layout, reference
from quikjax.pallas_kernels.native import library, panels

REASON = library.why_not(cache_directory() / "native")
compiled = pytest.mark.skipif(REASON is not None, reason=f"products are not compiled here: {REASON}")


@compiled
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_float_products_are_right_and_rows_do_not_see_each_other(dtype: type) -> None:
    checks.check_floats(dtype)


@compiled
@pytest.mark.parametrize(("bits", "weight_bits"), [(4, 4), (4, 8), (8, 4), (8, 8)])
def test_sums_of_codes_are_the_references_integers(bits: int, weight_bits: int) -> None:
    checks.check_codes(bits, weight_bits)


@compiled
@pytest.mark.parametrize(
    ("bits", "weight_bits", "clip", "dtype"),
    [(4, 4, None, jnp.float16), (4, 4, (16, -8), jnp.bfloat16), (8, 4, None, jnp.float16), (8, 8, (256, -128), jnp.float16)],
)
def test_layers_are_the_references(bits: int, weight_bits: int, clip: tuple[int, int] | None, dtype: type) -> None:
    checks.check_layers(bits, weight_bits, clip, dtype)


@compiled
def test_weights_multiplied_in_one_call_give_what_each_gives_alone() -> None:
    rng = np.random.default_rng(6)
    columns = rng.permutation(51)
    weights = []
    for n, bits in ((37, 4), (192, 8), (1, 4), (70, 4)):
        weight = checks.random_weight(rng, n, 51, 5, bits)
        weights.append(
            checks.paneled(dataclasses.replace(weight, columns=jnp.asarray(columns, jnp.int32)), layers=2, layer=n % 2)
        )
    for rows in (1, 9, 130):
        x = jnp.asarray(rng.normal(size=(rows, 51)), jnp.float32)
        together = api.linears((x,), weights, [None] * len(weights), 8)
        for one, y in zip(weights, together, strict=True):
            np.testing.assert_array_equal(y, api.linears((x,), [one], [None], 8)[0])
        matrices = []
        for n, dtype in ((20, jnp.float32), (300, jnp.bfloat16), (3, jnp.float16)):
            stack = panels.float_panels(jnp.asarray(rng.normal(size=(n, 51)), dtype))[None]
            matrices.append(panels.FloatPanels(stack, jnp.int32(0), n))
        for matrix, y in zip(matrices, panels.float_products(x, matrices), strict=True):
            np.testing.assert_array_equal(y, panels.float_products(x, [matrix])[0])


@compiled
def test_the_same_products_for_avx2(tmp_path: Path) -> None:
    """Machines with AVX-512 run what those without compile; elsewhere this is what the other tests ran."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, checks.__file__, str(tmp_path), "-march=haswell"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "every product is right", done.stderr


@hypothesis.given(st.integers(1, 70), st.integers(1, 40), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=8)
def test_panels_hold_every_code_and_float_once(n: int, k: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k)).astype(np.int8)
    made = np.asarray(panels.code_panels(jnp.asarray(codes), bits))
    assert np.array_equal(panels.code_matrix(jnp.asarray(made), n, k, bits), codes)
    step = 8 if bits == 4 else 4
    for row, column in zip(rng.integers(0, n, 5), rng.integers(0, k, 5), strict=True):  # where `products.cc` says it is
        byte = made[row // 16, column // step, row % 16 * 4 + column % 4]
        found = byte if bits == 8 else byte >> 4 if column % 8 > 3 else byte & 15
        assert int(found) - 2 ** (bits - 1) == codes[row, column]
    floats = rng.normal(size=(n, k)).astype(np.float32)
    assert np.array_equal(panels.float_matrix(panels.float_panels(jnp.asarray(floats)), n), floats)


@compiled
@hypothesis.given(st.integers(1, 70), st.integers(2, 40), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=8)
def test_the_library_packs_what_the_definition_says(n: int, k: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    base, columns = int(rng.integers(0, k + 1)), rng.permutation(k).astype(np.int32)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, base)).astype(np.int8)
    whole = np.zeros((n, k), np.int8)
    whole[:, columns[:base]] = codes
    memory = np.empty((panels.panel_count(n), panels.code_steps(k, bits), 64), np.uint8)
    panels.pack_codes(codes, columns, memory, bits)
    assert np.array_equal(memory, panels.code_panels(jnp.asarray(whole), bits))
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        floats = rng.normal(size=(n, k)).astype(dtype)
        packed = np.full((panels.panel_count(n), k, panels.PANEL), 3, dtype)
        panels.pack_floats(floats, packed)
        assert np.array_equal(packed, panels.float_panels(jnp.asarray(floats)))


@compiled
def test_memory_that_panels_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"panels need float32 memory \(2, 8, 16\) without gaps, not float32 \(1, 8, 16\)"):
        panels.pack_floats(np.ones((20, 8), np.float32), np.empty((1, 8, 16), np.float32))
    with pytest.raises(ValueError, match="panels need uint8 memory"):
        panels.pack_codes(np.ones((20, 8), np.int8), np.arange(8), np.empty((2, 1, 64), np.int8), 4)


@compiled
def test_a_weight_in_panels_is_the_weight() -> None:
    weight = checks.random_weight(np.random.default_rng(3), 37, 51, 5, 4)
    back = layout.from_tiles(checks.paneled(weight, layers=2, layer=1))
    for name in ("qweight", "scale", "reduced", "outliers", "columns"):
        assert getattr(back, name).dtype == getattr(weight, name).dtype
        assert np.array_equal(np.asarray(getattr(back, name), np.float32), np.asarray(getattr(weight, name), np.float32))


@compiled
def test_layers_in_panels_differentiate_and_batch_like_others() -> None:
    weight = checks.random_weight(np.random.default_rng(4), 20, 24, 3, 4)
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 24)), jnp.float32)

    def total(x: jax.Array, weight: api.Form) -> jax.Array:
        return jnp.sin(api.linears((x,), [weight], [None], 4)[0]).sum()

    wanted, found = (jax.grad(total)(x, one) for one in (weight, checks.paneled(weight)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    batched = jax.vmap(lambda x: api.linears((x,), [checks.paneled(weight)], [None], 4)[0])(x)
    np.testing.assert_allclose(batched, api.linears((x,), [weight], [None], 4)[0], rtol=1e-5, atol=1e-4)


@compiled
def test_panels_of_another_shape_are_refused() -> None:
    table = panels.float_panels(jnp.ones((20, 8)))[None]
    x = jnp.ones((2, 8))
    for layer, outputs in ((1, 20), (-1, 20), (0, 40)):
        with pytest.raises(Exception, match="quikjax: "):
            jax.block_until_ready(panels.float_products(x, [panels.FloatPanels(table, jnp.int32(layer), outputs)]))
    split = reference.Split(jnp.zeros((2, 9), jnp.int8), jnp.zeros((2, 0)), jnp.ones(2), jnp.zeros(2))
    codes, none = panels.code_panels(jnp.zeros((20, 8), jnp.int8), 4)[None], jnp.zeros((1, 2, 0, 16), jnp.float16)
    wrong = panels.QuikPanels(codes, none, jnp.ones((1, 20)), jnp.ones((1, 20)), jnp.int32(0), 4)
    with pytest.raises(Exception, match="quikjax: panels of codes"):
        jax.block_until_ready(panels.quik_products(split, 4, [wrong]))


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


on_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="elsewhere the reason is the machine")


@on_x86
def test_reasons_why_products_are_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "kept"
    fails = compiler(tmp_path, "echo 'products.cc:20:2: error: no such instructions' >&2; exit 1")
    with pytest.raises(library.Unavailable, match=r"could not compile them: products.cc:20:2: error: no such instructions$"):
        library.build(folder, fails)
    with pytest.raises(library.Unavailable, match="could not compile them: it said nothing"):
        library.build(folder, compiler(tmp_path, "exit 3"))
    with pytest.raises(library.Unavailable, match=r"could not be compiled in .* with /no/compiler: No such file"):
        library.build(folder, "/no/compiler")
    with pytest.raises(library.Unavailable, match=r"products are written for AVX2 and AVX-512, which this CPU does not have"):
        library.build(folder, flags=(*library.FLAGS, "-mno-avx2"))
    assert not list(folder.iterdir())  # nothing half done is left
    (tmp_path / "file").write_text("")
    with pytest.raises(library.Unavailable, match=r"could not be compiled in .*file"):
        library.build(tmp_path / "file" / "kept")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(library.Unavailable, match=r"no C\+\+ compiler"):
        library.build(folder)
    monkeypatch.setattr(library, "SOURCE", tmp_path / "gone.cc")
    with pytest.raises(library.Unavailable, match=r"gone\.cc could not be read: No such file"):
        library.build(folder, fails)
    monkeypatch.setattr(library.platform, "machine", lambda: "arm64")
    with pytest.raises(library.Unavailable, match="written for x86-64 under Linux and macOS, and this is arm64"):
        library.build(folder)


@on_x86
def test_a_library_is_compiled_once_and_anew_where_anything_changed(tmp_path: Path) -> None:
    counting = compiler(tmp_path, f"echo once >> {tmp_path}/calls; while [ $# -gt 1 ]; do shift; done; echo damaged > $1")
    killed, working = tmp_path / "kept" / "compiling-1", tmp_path / "kept" / "compiling-2"
    killed.mkdir(parents=True)
    working.mkdir()
    os.utime(killed, (0, 0))
    paths = [library.build(tmp_path / "kept", counting) for _ in range(2)]
    assert (killed.exists(), working.exists()) == (False, True)
    other = library.build(tmp_path / "kept", counting, flags=(*library.FLAGS, "-g"))
    assert paths[0] == paths[1] != other
    assert (tmp_path / "calls").read_text().split() == ["once"] * 2
    with pytest.raises(library.Unavailable, match=r"could not be loaded \(.*\); delete it to have it compiled anew$"):
        library.load(other)
    assert other.exists()
