"""The QUIK product in Triton: int8 tensor cores into int32, 16-bit ones into float32, one epilogue.

Codes of 4 bits are read two to a byte (`layout.Halved`) and widened in registers: of each tile of 128 columns the low halves are
the first 64 and the high halves the last, so each is a product with 64 columns of the activations as they lie. Weight-only, the
same kernel multiplies the base columns in 16 bits, and its epilogue is `acc * scale + bias`.
"""

import jax
import jax.numpy as jnp

from quikjax.pallas_kernels.layout import Halved, Packed
from quikjax.pallas_kernels.reference import Split
from quikjax.pallas_kernels.triton_support import constexpr, jax_triton, jit, tl, triton


@jit
def _kernel(  # type: ignore[no-untyped-def]
    codes,
    x_outliers,
    x_scale,
    x_zero,
    qweight,
    scale,
    reduced,
    w_outliers,
    bias,
    y,
    rows: constexpr,
    outputs: constexpr,
    base: constexpr,
    outliers: constexpr,
    half: constexpr,
    stride: constexpr,
    quantized: constexpr,
    halved: constexpr,
    block_m: constexpr,
    block_n: constexpr,
    block_k: constexpr,
    block_o: constexpr,
):
    m = (tl.program_id(0) * block_m + tl.arange(0, block_m)).to(tl.int64)
    n = (tl.program_id(1) * block_n + tl.arange(0, block_n)).to(tl.int64)
    in_m, in_n = m < rows, n < outputs
    sums = tl.zeros((block_m, block_n), tl.int32 if quantized else tl.float32)
    for start in range(0, base, block_k):
        if halved:
            j = tl.arange(0, block_k // 2)
            k = start + j
            pairs = tl.load(qweight + n[None, :] * stride + (start // 2 + j)[:, None], mask=in_n[None, :], other=0)
            signed = pairs.to(tl.int8, bitcast=True)
            low, high = (signed << 4) >> 4, signed >> 4
            left = tl.load(codes + m[:, None] * base + k[None, :], mask=in_m[:, None] & (k < base)[None, :], other=0)
            k += block_k // 2
            left_high = tl.load(codes + m[:, None] * base + k[None, :], mask=in_m[:, None] & (k < base)[None, :], other=0)
            # Without the type Triton 3.6 takes the sums of integers for float32, and refuses them.
            sums = tl.dot(left, low.to(codes.dtype.element_ty), sums, out_dtype=sums.dtype)
            sums = tl.dot(left_high, high.to(codes.dtype.element_ty), sums, out_dtype=sums.dtype)
        else:
            k = start + tl.arange(0, block_k)
            left = tl.load(codes + m[:, None] * base + k[None, :], mask=in_m[:, None] & (k < base)[None, :], other=0)
            right = tl.load(qweight + n[None, :] * stride + k[:, None], mask=in_n[None, :] & (k < base)[:, None], other=0)
            sums = tl.dot(left, right.to(codes.dtype.element_ty), sums, out_dtype=sums.dtype)
    value = sums.to(tl.float32)
    if quantized:
        s = tl.load(x_scale + m, mask=in_m, other=0.0)
        z = tl.load(x_zero + m, mask=in_m, other=0.0)
        value = value * s[:, None] * tl.load(scale + n, mask=in_n, other=0.0)[None, :]
        value += (z + half * s)[:, None] * tl.load(reduced + n, mask=in_n, other=0.0)[None, :]
    else:
        value = value * tl.load(scale + n, mask=in_n, other=0.0)[None, :]
    value += tl.load(bias + n, mask=in_n, other=0.0)[None, :]
    for start in range(0, outliers, block_o):
        o = start + tl.arange(0, block_o)
        left16 = tl.load(x_outliers + m[:, None] * outliers + o[None, :], mask=in_m[:, None] & (o < outliers)[None, :], other=0.0)
        right16 = tl.load(
            w_outliers + n[None, :] * outliers + o[:, None], mask=in_n[None, :] & (o < outliers)[:, None], other=0.0
        )
        value = tl.dot(left16, right16, value)
    target = y + m[:, None] * outputs + n[None, :]
    tl.store(target, value.to(y.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


def blocks(rows: int) -> tuple[int, int]:
    """Rows and outputs of a program's tile."""
    return (16, 64) if rows <= 16 else (64, 64) if rows <= 64 else (128, 128)


def constants(rows: int, outputs: int, base: int, outliers: int, bits: int, weight_bits: int) -> dict[str, int]:
    """The kernel's compile-time arguments."""
    block_m, block_n = blocks(rows)
    return {
        "rows": rows,
        "outputs": outputs,
        "base": base,
        "outliers": outliers,
        "half": 2 ** (bits - 1),
        "stride": -(-base // 128) * 64 if weight_bits == 4 else base,
        "quantized": bits < 16,
        "halved": weight_bits == 4,
        "block_m": block_m,
        "block_n": block_n,
        "block_k": 128,
        "block_o": 32,
    }


def quik_matmul(
    split: Split,
    weight: Packed | Halved,
    bias: jax.Array,
    bits: int,
    out_dtype: jnp.dtype,
    compute_capability: int | None,
) -> jax.Array:
    """`y [M, N]`, as `reference.quik_matmul` has it; `weight` of 4 bits is `Halved`, of 8 bits `Packed`.

    With `bits` 16 `split.codes` are the base columns in 16 bits, and its scale and zero are not looked at.
    """
    rows, base = split.codes.shape
    outputs, outliers = weight.outliers.shape
    block_m, block_n = blocks(rows)
    # Without outliers the kernel reads none: any buffer of the dtype will do.
    empty = jnp.zeros((1, 1), split.outliers.dtype)
    return jax_triton.triton_call(
        split.codes,
        split.outliers if outliers else empty,
        split.scale,
        split.zero,
        weight.qweight,
        weight.scale,
        weight.reduced,
        weight.outliers if outliers else empty,
        bias,
        kernel=_kernel,
        out_type=jax.ShapeDtypeStruct((rows, outputs), out_dtype),
        grid=(triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n)),
        num_warps=4 if block_m <= 64 else 8,
        num_stages=3,
        compute_capability=compute_capability,
        backend_options={"ptx_version": 87},
        **constants(rows, outputs, base, outliers, bits, weight.weight_bits),
    )
