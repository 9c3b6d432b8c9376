"""What QUIK's kernels are compared with, in the same process and on the same shapes: XLA's own products, and PyTorch's."""

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from quikjax.pallas_kernels import api, reference
from quikjax.pallas_kernels.arg_specs import LinearSpec

Timer = Callable[[], list[float]]


def random_layer(key: jax.Array, spec: LinearSpec, rows: int, dtype: Any) -> tuple[jax.Array, api.Packed]:
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
    return x, jax.jit(api.to_tiles)(packed)


def bf16(x: jax.Array, w: jax.Array) -> jax.Array:
    """The baseline of every ratio: `jnp.dot` with float32 accumulation."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


def xla_weight_only(x: jax.Array, qweight: jax.Array, scale: jax.Array) -> jax.Array:
    """int4 weights, 16-bit activations: convert, dot and scale, which XLA fuses into one GEMM."""
    return (bf16(x, qweight.astype(x.dtype)) * scale).astype(x.dtype)


def xla_int8(x: jax.Array, qweight: jax.Array, scale: jax.Array) -> jax.Array:
    """Per-token quantization by XLA, then its int8 GEMM; no outliers."""
    codes, s, zero = reference.quantize_activations(x, 8)
    sums = jax.lax.dot_general(codes, qweight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * s[:, None] * scale + zero[:, None]).astype(x.dtype)


def ablation(bits: int, device: api.Device, kernels: str) -> dict[str, Callable[[jax.Array, api.Packed], jax.Array]]:
    """The stages of QUIK's section 3.4, each a function of activations and weight, `kernels` naming the fused backend.

    Barriers keep XLA from fusing what a stage is meant to leave apart.
    """
    apart = jax.lax.optimization_barrier

    def separate_product(split: reference.Split, packed: api.Packed, dtype: Any) -> jax.Array:
        packed = api.from_tiles(packed)
        sums = apart(reference.integer_matmul(split.codes, packed.qweight))
        outlier = apart(bf16(split.outliers, packed.outliers)) if packed.outlier_count else jnp.zeros((), dtype)
        offset = split.zero + 2 ** (bits - 1) * split.scale
        y = sums.astype(jnp.float32) * split.scale[:, None] * packed.scale + offset[:, None] * packed.reduced
        return (y + outlier.astype(jnp.float32)).astype(dtype)

    def unfused(x: jax.Array, packed: api.Packed) -> jax.Array:
        plain = api.from_tiles(packed)
        x_base, x_out = apart(reference.split_columns(x, plain.columns, plain.base))
        codes, scale, zero = apart(reference.quantize_activations(x_base, bits))
        return separate_product(reference.Split(codes, x_out, scale, zero), packed, x.dtype)

    def split(x: jax.Array, packed: api.Packed) -> reference.Split:
        plain = api.from_tiles(packed)
        return api.split_quantize((x,), plain.columns, plain.base, bits, backend=kernels, device=device)

    def fused_quantization(x: jax.Array, packed: api.Packed) -> jax.Array:
        return separate_product(apart(split(x, packed)), packed, x.dtype)

    def fused_epilogue(x: jax.Array, packed: api.Packed) -> jax.Array:
        plain = api.from_tiles(packed)
        parts = apart(split(x, packed))
        base_only = api.pack(plain.qweight, plain.scale, plain.reduced, plain.outliers[:, :0], plain.columns[: plain.base] * 0)
        y = api.quik_matmul(
            parts._replace(outliers=parts.outliers[:, :0]), base_only, None, bits, x.dtype, backend=kernels, device=device
        )
        if not plain.outlier_count:
            return y
        outlier = apart(bf16(parts.outliers, plain.outliers))
        return (y.astype(jnp.float32) + outlier.astype(jnp.float32)).astype(x.dtype)

    def one_kernel(x: jax.Array, packed: api.Packed) -> jax.Array:
        return api.linears((x,), [packed], [None], bits, backend=kernels, device=device)[0]

    return {
        "unfused": unfused,
        "fused quantization": fused_quantization,
        "fused epilogue": fused_epilogue,
        "one kernel": one_kernel,
    }


def torch_peers(rows: int, outputs: int, inputs: int, repetitions: int) -> dict[str, list[float] | str]:
    """PyTorch on the same GPU: milliseconds per call by CUDA events, or the reason why a peer did not run."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        return {"torch": "PyTorch is not installed"}
    if not torch.cuda.is_available():
        return {"torch": "PyTorch sees no GPU"}
    gpu = torch.device("cuda")
    x = torch.randn(rows, inputs, device=gpu, dtype=torch.bfloat16)
    count = max(2, min(8, -(-(256 * 2**20) // (outputs * inputs))))
    weights = [torch.randn(outputs, inputs, device=gpu, dtype=torch.bfloat16) for _ in range(count)]

    def bf16_linear() -> Callable[[int], Any]:
        return lambda i: torch.nn.functional.linear(x, weights[i])

    def int4_weight_only() -> Callable[[int], Any]:
        packed = []
        for w in weights:
            codes = torch.randint(0, 16, w.shape, device=gpu, dtype=torch.int32)
            packed.append(torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8))
        scales = torch.ones(inputs // 128, outputs, 2, device=gpu, dtype=torch.bfloat16)
        return lambda i: torch.ops.aten._weight_int4pack_mm(x, packed[i], 128, scales)

    def int8_product() -> Callable[[int], Any]:
        codes = torch.randint(-128, 127, x.shape, device=gpu, dtype=torch.int8)
        sides = [torch.randint(-128, 127, w.shape, device=gpu, dtype=torch.int8).t() for w in weights]
        return lambda i: torch._int_mm(codes, sides[i])

    def fp8_product() -> Callable[[int], Any]:
        one = torch.ones((), device=gpu)
        left = x.to(torch.float8_e4m3fn)
        sides = [w.to(torch.float8_e4m3fn).t() for w in weights]
        return lambda i: torch._scaled_mm(left, sides[i], scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    peers = {
        "torch bf16": bf16_linear,
        "torch int4 weight-only (_weight_int4pack_mm)": int4_weight_only,
        "torch int8 (_int_mm)": int8_product,
        "torch fp8 (_scaled_mm)": fp8_product,
    }
    results: dict[str, list[float] | str] = {}
    for name, prepare in peers.items():
        try:
            results[name] = _torch_time(torch, prepare(), count, repetitions)
        except Exception as failure:
            results[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
    return results


def _torch_time(torch: Any, call: Callable[[int], Any], count: int, repetitions: int) -> list[float]:
    for i in range(count):
        call(i)
    samples = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(count):
            call(i)
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) / count)
    return samples


def median(samples: list[float]) -> float:
    """The median of torch's samples."""
    return statistics.median(samples)
