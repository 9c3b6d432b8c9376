"""Run the Triton kernels' bodies on a CPU, under Triton's own interpreter, and print as JSON what differs from the definition.

    TRITON_INTERPRET=1 python tests/kernels/triton_interpreted.py

A process of its own: Triton reads the variable when a kernel is decorated. The interpreter takes PyTorch's tensors, of which
`Buffer` has what it asks for; `libdevice` has no body on a CPU, so its two functions have stand-ins. Outlier products are in
float16: the interpreter multiplies bfloat16 wrongly.
"""

import importlib
import json
import os
import sys
from typing import Any

import jax.numpy as jnp
import kernel_cases
import numpy as np

from quikjax.pallas_kernels import layout, reference
from quikjax.pallas_kernels.quik_matmul import triton as matmul
from quikjax.pallas_kernels.split_quantize import triton as split
from quikjax.pallas_kernels.split_quantize.producers import Gelu, Identity, Relu

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
tl: Any = importlib.import_module("triton.language")
interpreter: Any = importlib.import_module("triton.runtime.interpreter")


class Buffer:
    """A NumPy array as the interpreter sees a tensor in memory: its own storage, copied nowhere."""

    def __init__(self, array: np.ndarray):
        self.array = np.ascontiguousarray(array)
        self.dtype = str(self.array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Buffer":
        return self

    def cpu(self) -> "Buffer":
        return self

    def new_empty(self, size: int, device: str) -> "Buffer":
        del size, device
        return Buffer(np.empty(0, self.array.dtype))

    def set_(self, storage: "Buffer", *_: Any) -> "Buffer":
        self.array = storage.array
        return self

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return ()

    def copy_(self, other: "Buffer") -> None:
        assert other.array is self.array


class StandIn:
    """The two functions of `libdevice` that the kernels call."""

    @staticmethod
    def rcp_rn(x: Any) -> Any:
        return 1.0 / x

    @staticmethod
    def rint(x: Any) -> Any:
        return tl.tensor(interpreter.TensorHandle(np.rint(x.handle.data), x.handle.dtype), x.type)


def splits() -> list[str]:
    """Compare codes, outliers, scale and zero: bit for bit; behind GELU a code in a thousand by a step, others by a rounding."""
    wrong = []
    cases: list[Any] = [
        (3, 576, 36, 4, None, Identity()),
        (2, 1100, 0, 8, None, Identity()),
        (1, 264, 200, 4, (17, 1), Identity()),
        (2, 300, 20, 4, (16, -8), Identity()),
        (2, 576, 36, 4, None, Relu()),
        (3, 1100, 60, 8, None, Gelu()),
        (3, 576, 36, 4, None, Gelu(approximate=True)),
    ]
    for rows, inputs, outliers, bits, clip, producer in cases:
        base = inputs - outliers
        x = np.asarray(kernel_cases.tokens(rows, (rows, inputs), jnp.float16))
        columns = np.random.default_rng(bits).permutation(inputs).astype(np.int32)
        want = reference.split_quantize(producer(jnp.asarray(x)), jnp.asarray(columns), base, bits, clip)
        grid = reference.checked_level_clip(bits, clip)
        results = [np.full((rows, base), 99, np.int8), np.zeros((rows, max(1, outliers)), np.float16)]
        results += [np.zeros(rows, np.float32), np.zeros(rows, np.float32)]
        split._kernel[(rows,)](
            *[Buffer(array) for array in (x, columns, *results)],
            **split.constants(inputs, base, bits, grid, producer),
        )
        got = [results[0], results[1][:, :outliers], *results[2:]]
        names = zip(reference.Split._fields, got, want, strict=True)
        same = np.array_equal if producer.exact else _nearly
        wrong += [f"{producer} {rows} x {inputs}: {name}" for name, a, b in names if not same(a, np.asarray(b))]
    return wrong


def _nearly(got: np.ndarray, want: np.ndarray) -> bool:
    if want.dtype == np.int8:
        steps = np.abs(got.astype(int) - want.astype(int))
        return bool(steps.max() <= 1 and (steps > 0).mean() <= 1e-3)
    return np.allclose(got.astype(np.float64), want.astype(np.float64), rtol=2.0**-10, atol=1e-6)


def products() -> list[str]:
    """Compare results with float64, within one rounding to float16 and 64 of float32."""
    wrong = []
    cases = [
        (3, 40, 576, 36, 4, 4),
        (17, 130, 300, 0, 8, 8),
        (65, 64, 320, 100, 4, 8),
        (2, 40, 450, 36, 4, 16),
        (3, 64, 200, 0, 8, 16),
    ]
    for rows, outputs, inputs, outliers, weight_bits, bits in cases:
        packed = kernel_cases.weight(rows, outputs, inputs, outliers, weight_bits, jnp.float16)
        x = kernel_cases.tokens(rows, (rows, inputs), jnp.float16)
        if bits < 16:
            parts = reference.split_quantize(x, packed.columns, packed.base, bits)
        else:
            parts = reference.Split(*reference.split_columns(x, packed.columns, packed.base), jnp.ones(rows), jnp.zeros(rows))
        halved = layout.halve(packed) if weight_bits == 4 else packed
        if not np.array_equal(layout.from_tiles(halved).qweight.astype(jnp.int8), packed.qweight.astype(jnp.int8)):
            wrong.append(f"codes two to a byte, {inputs} columns")
        bias = np.random.default_rng(1).normal(size=outputs).astype(np.float32)
        empty = np.zeros((1, 1), np.float16)
        y = np.full((rows, outputs), np.nan, np.float16)
        left, right = (np.asarray(part) if outliers else empty for part in (parts.outliers, packed.outliers))
        arrays = [parts.codes, left, parts.scale, parts.zero, halved.qweight, packed.scale, packed.reduced]
        block_m, block_n = matmul.blocks(rows)
        matmul._kernel[(-(-rows // block_m), -(-outputs // block_n))](
            *[Buffer(np.asarray(array)) for array in (*arrays, right, bias, y)],
            **matmul.constants(rows, outputs, packed.base, outliers, bits, weight_bits),
        )
        codes, weight = np.asarray(parts.codes, np.float64), np.asarray(packed.qweight.astype(jnp.int8), np.float64)
        s, z = np.asarray(parts.scale, np.float64)[:, None], np.asarray(parts.zero, np.float64)[:, None]
        scale, reduced = np.asarray(packed.scale, np.float64), np.asarray(packed.reduced, np.float64)
        kept, w_out = np.asarray(parts.outliers, np.float64), np.asarray(packed.outliers, np.float64)
        terms = [codes @ weight.T * s * scale, (z + 2 ** (bits - 1) * s) * reduced * (bits < 16), kept @ w_out.T, bias + 0 * s]
        magnitude = np.abs(terms[0]) if bits < 16 else np.abs(codes) @ np.abs(weight).T * scale
        magnitude = magnitude + np.abs(terms[1]) + np.abs(kept) @ np.abs(w_out).T + np.abs(bias)
        want = sum(terms)
        bound = 2.0**-11 * np.abs(want) * 1.01 + 64 * 2.0**-24 * magnitude
        if not (np.abs(y.astype(np.float64) - want) <= bound).all():
            wrong.append(f"product {rows} x {outputs} x {inputs}, W{weight_bits}A{bits}")
    return wrong


if __name__ == "__main__":
    split.libdevice = StandIn
    print(json.dumps(splits() + products()))
    sys.exit(0)
