"""The products that QUIK's kernels are compared with, in the same process, on the same shapes: XLA's own, and PyTorch's."""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import gpu_timing
import jax
import jax.numpy as jnp
from isolated import first_line

from quikjax.pallas_kernels import api, layout, reference
from quikjax.pallas_kernels.arg_specs import LinearSpec


@functools.partial(jax.jit, static_argnames=("spec", "rows", "dtype"))
def random_layer(key: jax.Array, spec: LinearSpec, rows: int, dtype: Any) -> tuple[jax.Array, api.Tiled]:
    """Activations with large outlier columns, and a packed weight in tile form, made on the device."""
    k_x, k_q, k_s, k_o, k_c = jax.random.split(key, 5)
    half = 2 ** (spec.weight_bits - 1)
    columns = jax.random.permutation(k_c, spec.inputs).astype(jnp.int32)
    x = jax.random.normal(k_x, (rows, spec.inputs), jnp.float32)
    x = x.at[:, columns[spec.base :]].multiply(30).astype(dtype)
    codes = jax.random.randint(k_q, (spec.outputs, spec.base), -half, half, jnp.int8)
    scale = jax.random.uniform(k_s, (spec.outputs,), jnp.float32, 0.01, 0.1)
    packed = api.pack(
        codes.astype(jnp.int4) if spec.weight_bits == 4 else codes,
        scale,
        scale * codes.astype(jnp.float32).sum(1),
        jax.random.normal(k_o, (spec.outputs, spec.outliers), jnp.float32).astype(dtype),
        columns,
    )
    return x, api.to_tiles(packed)


def bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    """The baseline of every ratio: `jnp.dot` with float32 accumulation."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


def xla_weight_only(x: jax.Array, qweight: jax.Array, scale: jax.Array) -> jax.Array:
    """int4 weights, 16-bit activations: convert, dot and scale, which XLA fuses into one GEMM."""
    return (bf16(x, qweight.astype(x.dtype)) * scale).astype(x.dtype)


def xla_int8(x: jax.Array, qweight: jax.Array, scale: jax.Array) -> jax.Array:
    """Per-token quantization by XLA, then its int8 GEMM; no outliers. `scale` also stands for the row sums of the weight."""
    codes, s, zero = reference.quantize_activations(x, 8)
    sums = jax.lax.dot_general(codes, qweight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * s[:, None] * scale + (zero + 128 * s)[:, None] * scale).astype(x.dtype)


def ablation(bits: int, device: api.Device, kernels: str) -> dict[str, Callable[[jax.Array, api.Tiled], jax.Array]]:
    """The stages of QUIK's section 3.4, each a function of activations and weight, `kernels` naming the fused backend.

    Barriers keep XLA from fusing what a stage is meant to leave apart.
    """
    apart = jax.lax.optimization_barrier

    def separate_product(split: reference.Split, packed: api.Tiled, dtype: Any) -> jax.Array:
        plain = api.from_tiles(packed)
        sums = apart(reference.integer_matmul(split.codes, plain.qweight))
        outlier = apart(bf16(split.outliers, plain.outliers)) if plain.outlier_count else jnp.zeros((), dtype)
        offset = split.zero + 2 ** (bits - 1) * split.scale
        y = sums.astype(jnp.float32) * split.scale[:, None] * plain.scale + offset[:, None] * plain.reduced
        return (y + outlier.astype(jnp.float32)).astype(dtype)

    def unfused(x: jax.Array, packed: api.Tiled) -> jax.Array:
        plain = api.from_tiles(packed)
        x_base, x_out = apart(reference.split_columns(x, plain.columns, plain.base))
        codes, scale, zero = apart(reference.quantize_activations(x_base, bits))
        return separate_product(reference.Split(codes, x_out, scale, zero), packed, x.dtype)

    def split(x: jax.Array, packed: api.Tiled) -> reference.Split:
        # Mosaic reads columns in tile form: to cut them here would be two more kernels, microseconds at few rows.
        columns = packed.columns if kernels == "mosaic" else api.from_tiles(packed).columns
        return api.split_quantize((x,), columns, packed.base, bits, backend=kernels, device=device)

    def fused_quantization(x: jax.Array, packed: api.Tiled) -> jax.Array:
        return separate_product(apart(split(x, packed)), packed, x.dtype)

    def fused_epilogue(x: jax.Array, packed: api.Tiled) -> jax.Array:
        parts = apart(split(x, packed))
        # Still in tile form, the base alone.
        columns = packed.columns[: layout.round_up(packed.base, layout.COLUMN_TILE)]
        base_only = dataclasses.replace(packed, outliers=packed.outliers[:, :0], columns=columns, inputs=packed.base)
        y = api.quik_matmul(
            parts._replace(outliers=parts.outliers[:, :0]), base_only, None, bits, x.dtype, backend=kernels, device=device
        )
        if not packed.outlier_count:
            return y
        outlier = apart(bf16(parts.outliers, api.from_tiles(packed).outliers))
        return (y.astype(jnp.float32) + outlier.astype(jnp.float32)).astype(x.dtype)

    def one_kernel(x: jax.Array, packed: api.Tiled) -> jax.Array:
        return api.linears((x,), [packed], [None], bits, backend=kernels, device=device)[0]

    return {
        "unfused": unfused,
        "fused quantization": fused_quantization,
        "fused epilogue": fused_epilogue,
        "one kernel": one_kernel,
    }


def torch_peers(rows: int, outputs: int, inputs: int, repetitions: int) -> dict[str, list[float] | str]:
    """PyTorch on the same GPU: milliseconds per call by CUDA events, or the reason why a peer did not run.

    int8 and FP8 are products alone: nothing is quantized and no outlier added in the time.
    """
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return {"torch": "PyTorch is not installed"}
    if not torch.cuda.is_available():
        return {"torch": "PyTorch sees no GPU"}
    gpu = torch.device("cuda")
    x = torch.randn(rows, inputs, device=gpu, dtype=torch.bfloat16)

    def weights(make: Callable[[], Any]) -> list[Any]:
        first = make()
        count = max(2, min(gpu_timing.MOST_SETS, -(-gpu_timing.BEYOND_CACHES // (first.numel() * first.element_size()))))
        return [first, *(make() for _ in range(count - 1))]

    def dense() -> Any:
        return torch.randn(outputs, inputs, device=gpu, dtype=torch.bfloat16)

    def bf16_linear() -> tuple[Callable[[Any], Any], list[Any]]:
        return lambda w: torch.nn.functional.linear(x, w), weights(dense)

    def int4_weight_only() -> tuple[Callable[[Any], Any], list[Any]]:
        def pack() -> Any:
            pairs = torch.randint(0, 256, (outputs, inputs // 2), device=gpu, dtype=torch.uint8)
            return torch.ops.aten._convert_weight_to_int4pack(pairs, 8)

        scales = torch.ones(inputs // 128, outputs, 2, device=gpu, dtype=torch.bfloat16)
        return lambda w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales), weights(pack)

    def int8_product() -> tuple[Callable[[Any], Any], list[Any]]:
        def codes(count: int) -> Any:
            return torch.randint(-128, 127, (count, inputs), device=gpu, dtype=torch.int8)

        left = codes(rows)
        return lambda w: torch._int_mm(left, w.t()), weights(lambda: codes(outputs))

    def fp8_product() -> tuple[Callable[[Any], Any], list[Any]]:
        one = torch.ones((), device=gpu)
        left = x.to(torch.float8_e4m3fn)

        def product(w: Any) -> Any:
            return torch._scaled_mm(left, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        return product, weights(lambda: dense().to(torch.float8_e4m3fn))

    peers = {
        "torch bf16": bf16_linear,
        "torch int4 weight-only (_weight_int4pack_mm)": int4_weight_only,
        "torch int8, product alone (_int_mm)": int8_product,
        "torch fp8, product alone (_scaled_mm)": fp8_product,
    }
    results: dict[str, list[float] | str] = {}
    for name, prepare in peers.items():
        try:
            results[name] = _torch_time(torch, *prepare(), repetitions)
        except Exception as failure:
            results[name] = first_line(failure)
        torch.cuda.empty_cache()
    return results


def _torch_time(torch: Any, call: Callable[[Any], Any], weights: list[Any], repetitions: int) -> list[float]:
    deadline = time.perf_counter() + gpu_timing.WARM_UP_SECONDS
    for w in weights:
        call(w)
    while time.perf_counter() < deadline:
        for w in weights:
            call(w)
        torch.cuda.synchronize()
    samples = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for w in weights:
            call(w)
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / len(weights))
    return samples
