"""Dispatch by readable reasons, and what holds on every backend: gradients, batching, sharding, tile form."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quikjax.pallas_kernels import api, choice, layout
from quikjax.pallas_kernels.arg_specs import ROWS, all_linears
from quikjax.pallas_kernels.choice import Problem, choose
from quikjax.pallas_kernels.devices import A100, CPU, H100, L40S
from quikjax.pallas_kernels.quik_matmul import tiles as matmul_kernel

PROBLEM = Problem(16, 4096, 4096, 3840, jnp.int4, 4, jnp.bfloat16, jnp.bfloat16)


def ran(function: Callable[..., Any], *arguments: Any) -> set[str]:
    """The backends in a traced program, by the scopes that `api` puts around them."""
    text = str(jax.jit(function).lower(*arguments).as_text(debug_info=True))
    return {name for name in api.BACKENDS if f"quik_{name}" in text}


def test_every_model_layer_runs_on_hopper_at_every_number_of_rows() -> None:
    for spec in all_linears():
        dtype = jnp.int4 if spec.weight_bits == 4 else jnp.int8
        for rows in ROWS:
            problem = Problem(
                rows, spec.inputs, spec.outputs, spec.base, dtype, spec.bits, jnp.bfloat16, jnp.bfloat16, spec.producer
            )
            assert choice.why_not_mosaic(problem, H100) is None, (spec, rows)
            # What feeds the layer is fused into its split, but for the one layer that is wider than the kernel's registers.
            too_wide = (spec.model, spec.name) == ("falcon-180b", "4h_to_h")
            assert (choice.why_not_mosaic_split(problem, H100) is None) != too_wide, (spec, rows)


@pytest.mark.parametrize(
    ("change", "device", "reason"),
    [
        ({}, CPU, "Hopper"),
        ({}, A100, "Hopper"),
        ({"dtype": jnp.float32}, H100, "float32"),
        ({"outlier_dtype": jnp.float16}, H100, "one dtype"),
        ({"weight_dtype": jnp.uint8}, H100, "uint8"),
        ({"base": 0}, H100, "no base columns"),
        ({"rows": 0}, H100, "no rows"),
        ({"outputs": 4097}, H100, "multiple of 8"),
        ({"inputs": 262144, "base": 262144}, H100, "overflow"),
    ],
)
def test_a_backend_that_cannot_run_says_why_and_raises_when_named(change: dict, device: api.Device, reason: str) -> None:
    problem = dataclasses.replace(PROBLEM, **change)
    why = choice.why_not_mosaic(problem, device)
    assert why is not None
    assert reason in why
    with pytest.raises(api.BackendError, match="'mosaic' cannot run this layer: "):
        choose(problem, device, "mosaic")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": 4099, "base": 3843}, "4099 input columns are not a multiple of 8"),
        ({"inputs": 59392, "base": 58368}, "464 values per thread do not fit"),
        ({"inputs": 131072, "base": 131071}, "shared memory"),
    ],
)
def test_a_split_that_mosaic_cannot_do_leaves_it_the_product(change: dict, reason: str) -> None:
    problem = dataclasses.replace(PROBLEM, **change)
    assert reason in str(choice.why_not_mosaic_split(problem, H100))
    taken = choose(problem, H100)
    assert taken.backend == "mosaic"
    assert "split by XLA" in taken.reason
    assert reason in taken.reason
    with pytest.raises(api.BackendError, match="'mosaic' cannot run this layer: "):
        choose(problem, H100, "mosaic", choice.SPLIT)
    assert "XLA" not in choose(PROBLEM, H100).reason


def test_choice_names_the_reason_for_every_refused_backend() -> None:
    assert choose(PROBLEM, H100).backend == "mosaic"
    on_cpu = choose(PROBLEM, CPU)
    assert on_cpu.backend == "xla"
    assert set(on_cpu.refused) == {"mosaic", "triton"}
    assert "Hopper" in str(on_cpu)
    assert choose(PROBLEM, H100, "xla").backend == "xla"
    for device in (A100, L40S):
        assert "Hopper" in choose(PROBLEM, device).refused["mosaic"]
    with pytest.raises(api.BackendError, match="no backend 'cuda'; choose one of mosaic, triton, xla"):
        choose(PROBLEM, H100, "cuda")
    with pytest.raises(api.BackendError, match="no backend can run"):
        choose(dataclasses.replace(PROBLEM, inputs=262144, base=262144), CPU)


def test_default_tiles_keep_the_multiprocessors_busy() -> None:
    """In whole waves: a third of K each for three blocks where halves would leave a second wave almost empty."""
    few = functools.partial(matmul_kernel.default_tiles, 1, base=3840, weight_bits=4, bits=4, cores=132)
    assert [few(outputs=n).splits for n in (1024, 4096, 5120, 8192, 11008, 22016)] == [4, 4, 3, 2, 3, 3]
    # 129 rows of 4096 outputs are 32 of the largest tiles, a quarter of the machine; 2048 rows are two waves of them.
    many = functools.partial(matmul_kernel.default_tiles, outputs=4096, base=3840, weight_bits=4, bits=4, cores=132)
    assert (many(129).n, many(129).m) == (64, 64)
    assert (many(2048).n, many(2048).m) == (128, 128)


def test_explain_takes_shapes_and_what_runs_is_what_it_says() -> None:
    packed = kernel_cases.weight(0, 64, 128, 8)
    shapes = jax.eval_shape(lambda: packed)
    assert api.explain(3, shapes, 4, jnp.bfloat16, device=CPU).backend == "xla"
    x = kernel_cases.tokens(1, (3, 128))
    assert ran(lambda x: api.linears((x,), [packed], [None], 4)[0], x) == {"xla"}
    with pytest.raises(api.BackendError, match="cannot run"):
        api.linears((x,), [packed], [None], 4, backend="mosaic", device=CPU)


def test_arguments_that_do_not_fit_are_refused() -> None:
    packed, x = kernel_cases.weight(0, 64, 128, 8), kernel_cases.tokens(1, (3, 128))
    with pytest.raises(ValueError, match="4, 8 or 16 bits, not 5"):
        api.linears((x,), [packed], [None], 5)
    with pytest.raises(ValueError, match="1 weights with 2 biases"):
        api.linears((x,), [packed], [None, None], 4)
    with pytest.raises(ValueError, match="x has 64 columns"):
        api.linears((x[:, :64],), [packed], [None], 4)
    with pytest.raises(ValueError, match="SiluMul reads 2 inputs"):
        api.linears((x,), [packed], [None], 4, producer=api.SiluMul())


@pytest.mark.parametrize("outliers", [0, 36, 256])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_tile_form_changes_no_bit(outliers: int, bits: int) -> None:
    packed = kernel_cases.weight(3, 72, 640, outliers)
    tiled = api.to_tiles(packed)
    assert tiled.qweight.shape == (5 if outliers < 128 else 3, 128, 16)
    assert tiled.padded == (128, layout.round_up(640 - outliers, 128))
    assert tiled.columns.shape[0] % layout.COLUMN_TILE == 0
    assert api.to_tiles(tiled).qweight is tiled.qweight
    for name in ("qweight", "scale", "reduced", "outliers", "columns"):
        np.testing.assert_array_equal(
            np.asarray(getattr(api.from_tiles(tiled), name)), np.asarray(getattr(packed, name)), err_msg=name
        )
    x = kernel_cases.tokens(4, (5, 640), jnp.float32)
    (plain,), (padded,) = (api.linears((x,), [weight], [None], bits) for weight in (packed, tiled))
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(padded))


@settings(max_examples=15)
@given(rows=st.integers(1, 5), steps=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_words_hold_codes_where_a_thread_of_the_tensor_core_reads_them(rows: int, steps: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, 128 * steps))
    laid = layout.feed(jnp.asarray(codes, jnp.int4))
    np.testing.assert_array_equal(np.asarray(layout.fed_codes(laid)).astype(int), codes)
    words = np.asarray(laid)
    for row, column in np.ndindex(codes.shape):
        step, within = divmod(column, 128)
        w, rest = divmod(within, 32)
        h, rest = divmod(rest, 16)
        t, j = divmod(rest, 4)
        assert (int(words[step, row, 4 * t + w]) >> 4 * (2 * j + h)) & 15 == codes[row, column] & 15


def _dequantized(packed: api.Packed) -> np.ndarray:
    dense = np.zeros((packed.outputs, packed.inputs))
    columns = np.asarray(packed.columns)
    dense[:, columns[: packed.base]] = np.asarray(packed.qweight, np.float64) * np.asarray(packed.scale, np.float64)[:, None]
    dense[:, columns[packed.base :]] = np.asarray(packed.outliers, np.float64)
    return dense


def test_gradient_is_that_of_the_dequantized_weight() -> None:
    """Straight through the quantizer; several layers add up; weights get none."""
    weights = [kernel_cases.weight(seed, 48, 192, 12) for seed in (0, 1)]
    weights[1] = dataclasses.replace(weights[1], columns=weights[0].columns)
    x = kernel_cases.tokens(2, (2, 3, 192), jnp.float32)
    bias = jnp.ones(48)
    cotangents = [np.random.default_rng(i).normal(size=(2, 3, 48)) for i in (0, 1)]

    def loss(x: jax.Array, bias: jax.Array) -> jax.Array:
        results = api.linears((x,), weights, [bias, None], 4)
        return jnp.stack([(y * jnp.asarray(c, jnp.float32)).sum() for y, c in zip(results, cotangents, strict=True)]).sum()

    dx, d_bias = jax.jit(jax.grad(loss, (0, 1)))(x, bias)
    want = sum(c @ _dequantized(w) for c, w in zip(cotangents, weights, strict=True))
    np.testing.assert_allclose(np.asarray(dx), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(d_bias), cotangents[0].sum((0, 1)), rtol=1e-4)


@pytest.mark.parametrize(
    "producer", [api.RmsNorm(1e-5), api.LayerNorm(1e-5), api.SiluMul(), api.Gelu(), api.Relu()], ids=lambda p: type(p).__name__
)
def test_gradient_flows_through_a_fused_producer(producer: api.Producer) -> None:
    packed = kernel_cases.weight(7, 40, 96, 6)
    inputs = tuple(kernel_cases.tokens(i, (4, 96), jnp.float32) for i in range(producer.inputs))
    parameters = tuple(jnp.linspace(0.5, 1.5, 96) for _ in range(producer.parameters))
    dense = jnp.asarray(_dequantized(packed), jnp.float32)
    got = jax.grad(lambda t, p: api.linears(t, [packed], [None], 8, producer=producer, parameters=p)[0].sum(), argnums=(0, 1))(
        inputs, parameters
    )
    want = jax.grad(lambda t, p: (producer(*t, *p) @ dense.T).sum(), argnums=(0, 1))(inputs, parameters)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-3)


def test_vmap_folds_the_batch_into_the_rows() -> None:
    packed = kernel_cases.weight(1, 64, 160, 10)
    x = kernel_cases.tokens(2, (3, 5, 160), jnp.float32)
    layer = jax.jit(lambda x: api.linears((x,), [packed], [None], 4)[0])
    mapped = jax.jit(jax.vmap(layer))
    np.testing.assert_array_equal(np.asarray(mapped(x)), np.asarray(layer(x)))
    np.testing.assert_array_equal(np.asarray(jax.vmap(layer, in_axes=1, out_axes=1)(x)), np.asarray(layer(x)))
    assert "scan" not in str(jax.make_jaxpr(jax.vmap(layer))(x)), "no loop over the batch"
    gradient = jax.grad(lambda x: (layer(x) ** 2).sum())
    np.testing.assert_allclose(np.asarray(jax.vmap(gradient)(x)), np.asarray(gradient(x)), rtol=1e-5, atol=1e-4)


def test_vmap_over_weights_takes_them_one_by_one() -> None:
    weights = [kernel_cases.weight(seed, 64, 160, 10) for seed in (0, 1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
    x = kernel_cases.tokens(2, (4, 160), jnp.float32)
    got = jax.vmap(lambda w: api.linears((x,), [w], [None], 4)[0])(stacked)
    want = jnp.stack([api.linears((x,), [w], [None], 4)[0] for w in weights])
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-4)


@pytest.mark.long
def test_sharded_over_outputs_and_over_inputs() -> None:
    """Four virtual devices in a process of their own: the same integers, and results equal up to the order of float32 sums."""
    program = textwrap.dedent(
        """
        import functools, json
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from quikjax.pallas_kernels import api, reference, sharded

        n, k, o, shards, bits = 64, 256, 8, 4, 4
        rng = np.random.default_rng(0)
        local_k, local_o = k // shards, o // shards
        local_b = local_k - local_o
        # Outliers chosen per shard: each shard's columns are local indices, base first.
        columns = np.stack([rng.permutation(local_k) for _ in range(shards)]).astype(np.int32)
        q = rng.integers(-8, 8, (shards, n, local_b)).astype(np.int8)
        scale = rng.uniform(0.01, 0.2, n).astype(np.float32)
        outliers = rng.normal(size=(shards, n, local_o)).astype(np.float32)
        x = jnp.asarray(rng.normal(size=(6, k)) * 3, jnp.float32)
        mesh = jax.make_mesh((shards,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

        def whole(columns, q, outliers):
            offset = np.arange(shards)[:, None] * local_k
            everywhere = columns + offset
            order = np.concatenate([everywhere[:, :local_b].ravel(), everywhere[:, local_b:].ravel()]).astype(np.int32)
            codes = np.concatenate(list(q), axis=1)
            fp = jnp.asarray(np.concatenate(list(outliers), axis=1), jnp.bfloat16)
            reduced = jnp.asarray(scale * codes.sum(1))
            return api.pack(jnp.asarray(codes, jnp.int4), jnp.asarray(scale), reduced, fp, jnp.asarray(order))

        packed = whole(columns, q, outliers)
        want = api.linears((x,), [packed], [None], bits)[0]
        split = reference.split_quantize(x, packed.columns, packed.base, bits)
        sums = reference.integer_matmul(split.codes, packed.qweight)
        even = reference.split_quantize(x, packed.columns, packed.base, bits, (16, -8))
        even_sums = reference.integer_matmul(even.codes, packed.qweight)

        over_n = jax.jit(jax.shard_map(
            lambda x, qw, s, r, w, c: api.linears((x,), [api.pack(qw, s, r, w, c)], [None], bits)[0],
            mesh=mesh, in_specs=(P(), P("d"), P("d"), P("d"), P("d"), P()), out_specs=P(None, "d")))
        by_n = over_n(x, packed.qweight, packed.scale, packed.reduced, packed.outliers, packed.columns)

        def local(c, qw, w):
            qw = qw[0].astype(jnp.int4)
            reduced = jnp.asarray(scale) * qw.astype(jnp.float32).sum(1)
            return api.pack(qw, jnp.asarray(scale), reduced, w[0].astype(jnp.bfloat16), c[0])

        def row_parallel(x, c, qw, w):
            packed = local(c, qw, w)
            part = sharded.split_quantize_over_k(x, packed.columns, packed.base, bits, "d")
            total = jax.lax.psum(reference.integer_matmul(part.codes, packed.qweight), "d")
            even = sharded.split_quantize_over_k(x, packed.columns, packed.base, bits, "d", (16, -8))
            even_total = jax.lax.psum(reference.integer_matmul(even.codes, packed.qweight), "d")
            y = sharded.linear_over_k(x, packed, None, bits, "d")
            return y, total, part.scale, part.zero, even_total, even.scale

        by_k, total, s, z, even_total, even_s = jax.jit(jax.shard_map(
            row_parallel, mesh=mesh, in_specs=(P(None, "d"), P("d"), P("d"), P("d")), out_specs=P()))(
            x, jnp.asarray(columns), jnp.asarray(q), jnp.asarray(outliers))
        print(json.dumps({
            "devices": jax.device_count(),
            "n": float(jnp.abs(by_n - want).max() / jnp.abs(want).max()),
            "k": float(jnp.abs(by_k - want).max() / jnp.abs(want).max()),
            "sums": bool((total == sums).all()), "scale": bool((s == split.scale).all()), "zero": bool((z == split.zero).all()),
            "symmetric": bool((even_total == even_sums).all() and (even_s == even.scale).all()),
        }))
        """
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["devices"] == 4
    assert result["sums"]
    assert result["scale"]
    assert result["zero"]
    assert result["symmetric"]
    assert result["n"] <= 1e-6
    assert result["k"] <= 1e-5
