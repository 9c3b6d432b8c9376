"""Weights in panels, and products with them by the compiled library (`products.cc` says what a panel is and why).

`float_panels` and `code_panels` define the two forms in plain `jnp`; `pack_floats` and `pack_codes` make the same bytes where a
model is put together, many times faster. Panels of layers that are alike lie in one array `[L, ...]` and a product names its
layer, so that a scan over blocks copies none out: XLA hands a part of an array to a call only as an array of its own.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Int32, UInt8

from quikjax.pallas_kernels.native import library
from quikjax.pallas_kernels.reference import Split

PANEL = 16  # outputs


def panel_count(outputs: int) -> int:
    """How many panels `outputs` rows of a weight take; what is missing in the last one is zero."""
    return -(-outputs // PANEL)


def code_steps(inputs: int, bits: int) -> int:
    """How many times 64 bytes the codes of a panel take: 4 inputs of 8 bits, or 8 of 4 bits, at a time."""
    return -(-inputs // (8 if bits == 4 else 4))


def float_panels(weight: Float[Array, "n k"]) -> Float[Array, "panels k 16"]:
    """A dense matrix in panels, in its own dtype."""
    n, k = weight.shape
    padded = jnp.pad(weight, ((0, panel_count(n) * PANEL - n), (0, 0)))
    return padded.reshape(panel_count(n), PANEL, k).transpose(0, 2, 1)


def float_matrix(panels: Float[Array, "panels k 16"], outputs: int) -> Float[Array, "n k"]:
    """The dense matrix `[outputs, k]` of panels."""
    count, k, _ = panels.shape
    return panels.transpose(0, 2, 1).reshape(count * PANEL, k)[:outputs]


def code_panels(codes: Int8[Array, "n k"], bits: int) -> UInt8[Array, "panels steps 64"]:
    """Codes of 4 or 8 bits in panels, in the order of the inputs, with `2^(bits - 1)` added to each."""
    n, k = codes.shape
    count, steps, step = panel_count(n), code_steps(k, bits), 8 if bits == 4 else 4
    padded = jnp.pad(codes, ((0, count * PANEL - n), (0, steps * step - k)))
    raised = (padded.astype(jnp.int32) + 2 ** (bits - 1)).astype(jnp.uint8).reshape(count, PANEL, steps, step // 4, 4)
    ordered = raised.transpose(0, 2, 3, 1, 4).reshape(count, steps, step // 4, 64)
    return ordered[:, :, 0] | (ordered[:, :, 1] << 4) if bits == 4 else ordered[:, :, 0]


def code_matrix(panels: UInt8[Array, "panels steps 64"], outputs: int, inputs: int, bits: int) -> Int8[Array, "n k"]:
    """The codes `[outputs, inputs]`, carried by int8, of panels."""
    count, steps, _ = panels.shape
    halves = (panels & 15, panels >> 4) if bits == 4 else (panels,)
    raised = jnp.stack([half.reshape(count, steps, PANEL, 4) for half in halves], axis=2)
    rows = raised.transpose(0, 3, 1, 2, 4).reshape(count * PANEL, steps * (8 if bits == 4 else 4))[:outputs, :inputs]
    return (rows.astype(jnp.int32) - 2 ** (bits - 1)).astype(jnp.int8)


def pack_floats(weight: np.ndarray, memory: np.ndarray) -> None:
    """Write the panels of a matrix `[N, K]` into `memory` `[panels, K, 16]` of its dtype, of 2 or 4 bytes."""
    n, k = weight.shape
    weight = np.ascontiguousarray(weight)
    _check(memory, (panel_count(n), k, PANEL), weight.dtype)
    library.loaded().quikjax_pack_floats(weight.ctypes.data, memory.ctypes.data, n, k, weight.dtype.itemsize)


def pack_codes(qweight: np.ndarray, columns: np.ndarray, memory: np.ndarray, bits: int) -> None:
    """Write the panels of codes `[N, B]` into `memory` `[panels, steps, 64]`, uint8.

    `columns` `[K]` says which input each column of codes belongs to; inputs behind the first `B` of them have code zero.
    """
    n, base = qweight.shape
    codes, k = np.ascontiguousarray(qweight.astype(np.int8, copy=False)), len(columns)
    named = np.ascontiguousarray(columns[:base], np.int32)
    _check(memory, (panel_count(n), code_steps(k, bits), 64), np.uint8)
    library.loaded().quikjax_pack_codes(codes.ctypes.data, named.ctypes.data, memory.ctypes.data, n, base, k, bits == 4)


def _check(memory: np.ndarray, shape: tuple[int, ...], dtype: Any) -> None:
    # What the library writes to is not checked there.
    if memory.shape != shape or memory.dtype != dtype or not memory.flags.c_contiguous:
        raise ValueError(f"panels need {np.dtype(dtype)} memory {shape} without gaps, not {memory.dtype} {memory.shape}")


class FloatPanels(NamedTuple):
    """A dense matrix `[outputs, K]`, number `layer` of those in `panels`."""

    panels: Float[Array, "layers panels k 16"]
    layer: Int32[Array, ""]
    outputs: int


class QuikPanels(NamedTuple):
    """A packed weight, number `layer` of those in its arrays: codes, of `bits`, and outliers in panels."""

    qweight: UInt8[Array, "layers panels steps 64"]
    outliers: Float[Array, "layers panels o 16"]
    scale: Float32[Array, "layers n"]
    reduced: Float32[Array, "layers n"]
    layer: Int32[Array, ""]
    bits: int


def float_products(x: Float[Array, "*batch k"], weights: Sequence[FloatPanels]) -> list[Float32[Array, "*batch _"]]:
    """`x W^T` in float32 with every matrix, widened to float32: one sum over the inputs in their order.

    A row's bits do not depend on the rows beside it. Several matrices are one call: its threads meet once.
    """
    *batch, k = x.shape
    rows = x.reshape(math.prod(batch), k).astype(jnp.float32)
    results = tuple(jax.ShapeDtypeStruct((rows.shape[0], weight.outputs), jnp.float32) for weight in weights)
    arguments = [array for weight in weights for array in (weight.panels, weight.layer)]
    found = jax.ffi.ffi_call("quikjax_float_products", results)(rows, *arguments)
    return [y.reshape(*batch, weight.outputs) for y, weight in zip(found, weights, strict=True)]


def quik_products(split: Split, bits: int, weights: Sequence[QuikPanels]) -> list[Float32[Array, "rows _"]]:
    """`reference.quik_matmul` without a bias, with every weight; those of the same bits are one call.

    `split` has the codes, of `bits`, of all columns in their order (`cpu.split_quantize`). Sums of codes are the reference's
    integers, the epilogue and the product of outliers float32.
    """
    offset = split.zero + 2 ** (bits - 1) * split.scale
    activations = (split.codes, split.scale, offset, split.outliers.astype(jnp.float32))
    found: dict[int, Array] = {}
    for width in dict.fromkeys(weight.bits for weight in weights):
        taken = [i for i, weight in enumerate(weights) if weight.bits == width]
        shapes = [(split.codes.shape[0], weights[i].scale.shape[1]) for i in taken]
        call = jax.ffi.ffi_call("quikjax_quik_products", tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
        arguments = [array for i in taken for array in weights[i][:5]]
        found.update(zip(taken, call(*activations, *arguments, halves=width == 4), strict=True))
    return [found[i] for i in range(len(weights))]
