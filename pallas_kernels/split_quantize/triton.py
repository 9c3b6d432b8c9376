"""`split_quantize` in Triton: a program per token, the base columns gathered twice (minimum and maximum, then codes).

An activation before the split is computed on what is gathered, both times; anything else stands before the kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.pallas_kernels.reference import LevelClip, Split, checked_level_clip
from quikjax.pallas_kernels.split_quantize.producers import Gelu, Identity, Producer, Relu
from quikjax.pallas_kernels.triton_support import constexpr, jax_triton, jit, libdevice, tl

_BLOCK = 1024
# What the kernel computes itself, by the number that it is compiled for.
FUSED: tuple[Producer, ...] = (Identity(), Relu(), Gelu(), Gelu(approximate=True))


@jit
def _produced(value, producer: constexpr):  # type: ignore[no-untyped-def]
    # The producer's result in float32, rounded as a model that does not fuse would.
    wide = value.to(tl.float32)
    if producer == 1:
        wide = tl.maximum(wide, 0.0)
    elif producer == 2:
        wide = 0.5 * wide * (1.0 + tl.erf(0.7071067811865476 * wide))
    elif producer == 3:
        wide = wide / (1.0 + tl.exp(-1.5957691216057308 * wide * (1.0 + 0.044715 * wide * wide)))
    return wide.to(value.dtype)


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x,
    columns,
    codes,
    outliers,
    scales,
    zeros,
    inputs: constexpr,
    base: constexpr,
    lowest: constexpr,
    highest: constexpr,
    reciprocal: constexpr,
    block: constexpr,
    producer: constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    low = tl.full((block,), float("inf"), tl.float32)
    high = tl.full((block,), float("-inf"), tl.float32)
    for start in range(0, base, block):
        place = start + tl.arange(0, block)
        # Past the end the first column again, which moves neither minimum nor maximum.
        column = tl.load(columns + tl.where(place < base, place, 0))
        value = _produced(tl.load(x + row * inputs + column), producer).to(tl.float32)
        low = tl.minimum(low, value)
        high = tl.maximum(high, value)
    origin = tl.min(low, 0)
    reach = tl.max(high, 0) - origin
    if lowest < 0:  # symmetric
        reach = 2 * tl.maximum(tl.max(high, 0), -origin)
        origin = 0.0
    scale = tl.maximum(reach * reciprocal, 1e-30)
    inverse = libdevice.rcp_rn(scale)
    for start in range(0, base, block):
        place = start + tl.arange(0, block)
        inside = place < base
        column = tl.load(columns + place, mask=inside, other=0)
        value = _produced(tl.load(x + row * inputs + column, mask=inside, other=0.0), producer).to(tl.float32)
        level = libdevice.rint((value - origin) * inverse)
        level = tl.minimum(tl.maximum(level, lowest), highest) - (lowest + highest + 1) / 2
        tl.store(codes + row * base + place, level.to(tl.int8), mask=inside)
    for start in range(base, inputs, block):
        place = start + tl.arange(0, block)
        inside = place < inputs
        column = tl.load(columns + place, mask=inside, other=0)
        value = _produced(tl.load(x + row * inputs + column, mask=inside, other=0.0), producer)
        tl.store(outliers + row * (inputs - base) + place - base, value, mask=inside)
    tl.store(scales + row, scale)
    tl.store(zeros + row, origin + lowest * scale)


def constants(inputs: int, base: int, bits: int, clip: LevelClip, producer: Producer = FUSED[0]) -> dict[str, int | float]:
    """The kernel's compile-time arguments."""
    return {
        "inputs": inputs,
        "base": base,
        "lowest": float(clip.lowest),
        "highest": float(clip.lowest + 2**bits - 1),
        "reciprocal": float(np.float32(1 / clip.levels)),
        "block": _BLOCK,
        "producer": FUSED.index(producer),
    }


def split_quantize(
    x: jax.Array,
    columns: jax.Array,
    base: int,
    bits: int,
    compute_capability: int | None,
    clip: tuple[int, int] | None = None,
    producer: Producer = FUSED[0],
) -> Split:
    """Split what a producer, one of `FUSED`, makes of `x` `[M, K]`, and quantize its base columns per token."""
    rows, inputs = x.shape
    # A result without elements is no buffer: give an unused column to it and cut it off.
    kept = inputs - base
    codes, outliers, scale, zero = jax_triton.triton_call(
        x,
        columns,
        kernel=_kernel,
        out_type=[
            jax.ShapeDtypeStruct((rows, base), jnp.int8),
            jax.ShapeDtypeStruct((rows, max(1, kept)), x.dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        grid=(rows,),
        num_warps=8,
        compute_capability=compute_capability,
        backend_options={"ptx_version": 87, "enable_fp_fusion": False},
        **constants(inputs, base, bits, checked_level_clip(bits, clip), producer),
    )
    return Split(codes, outliers[:, :kept], scale, zero)
