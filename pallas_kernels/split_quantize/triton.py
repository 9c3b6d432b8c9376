"""`split_quantize` in Triton: a program per token, the base columns gathered twice (minimum and maximum, then codes)."""

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.pallas_kernels.reference import LevelClip, Split, checked_level_clip
from quikjax.pallas_kernels.triton_support import constexpr, jax_triton, jit, libdevice, tl

_BLOCK = 1024


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
):
    row = tl.program_id(0).to(tl.int64)
    low = tl.full((block,), float("inf"), tl.float32)
    high = tl.full((block,), float("-inf"), tl.float32)
    for start in range(0, base, block):
        place = start + tl.arange(0, block)
        # Past the end the first column again, which moves neither minimum nor maximum.
        column = tl.load(columns + tl.where(place < base, place, 0))
        value = tl.load(x + row * inputs + column).to(tl.float32)
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
        value = tl.load(x + row * inputs + column, mask=inside, other=0.0).to(tl.float32)
        level = libdevice.rint((value - origin) * inverse)
        level = tl.minimum(tl.maximum(level, lowest), highest) - (lowest + highest + 1) / 2
        tl.store(codes + row * base + place, level.to(tl.int8), mask=inside)
    for start in range(base, inputs, block):
        place = start + tl.arange(0, block)
        inside = place < inputs
        column = tl.load(columns + place, mask=inside, other=0)
        value = tl.load(x + row * inputs + column, mask=inside, other=0.0)
        tl.store(outliers + row * (inputs - base) + place - base, value, mask=inside)
    tl.store(scales + row, scale)
    tl.store(zeros + row, origin + lowest * scale)


def constants(inputs: int, base: int, bits: int, clip: LevelClip) -> dict[str, int | float]:
    """The kernel's compile-time arguments."""
    return {
        "inputs": inputs,
        "base": base,
        "lowest": float(clip.lowest),
        "highest": float(clip.lowest + 2**bits - 1),
        "reciprocal": float(np.float32(1 / clip.levels)),
        "block": _BLOCK,
    }


def split_quantize(
    x: jax.Array, columns: jax.Array, base: int, bits: int, compute_capability: int | None, clip: tuple[int, int] | None = None
) -> Split:
    """Split `x` `[M, K]` and quantize its base columns per token."""
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
        **constants(inputs, base, bits, checked_level_clip(bits, clip)),
    )
    return Split(codes, outliers[:, :kept], scale, zero)
