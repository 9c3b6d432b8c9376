"""Products with 4-bit codebooks as cases: made, compiled, executed, compared with the definition in float64.

Activations past the last row hold NaN, where the kernel may read but nothing may show.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ptx.cases import BFLOAT16
from ptx.compiled import CompiledKernel, compile_kernel, shapes
from ptx.machine import OPPOSITE, Timing
from quikjax.pallas_kernels import layout
from quikjax.pallas_kernels.codebook_matmul import layout as codebook_layout
from quikjax.pallas_kernels.codebook_matmul import mosaic
from quikjax.pallas_kernels.codebook_matmul.mosaic import CodebookMatmulTiles

_ROUNDING = {BFLOAT16: 2.0**-8, np.dtype(np.float16): 2.0**-11, np.dtype(np.float32): 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Codebook:
    """`codebook_matmul` of random codes in a random codebook of `entries` values."""

    rows: int
    outputs: int
    inputs: int
    block: int
    bias: bool
    tiles: CodebookMatmulTiles
    entries: int = 16
    absmax: Any = np.float16
    dtype: Any = BFLOAT16
    out: Any = BFLOAT16

    def __str__(self) -> str:
        tiles = "x".join(str(part) for part in dataclasses.astuple(self.tiles))
        kinds = "-".join(np.dtype(kind).name for kind in (self.absmax, self.dtype, self.out))
        return f"{self.rows}x{self.outputs}x{self.inputs}-b{self.block}-e{self.entries}-{tiles}-{kinds}"


class CodebookRun:
    """A product's arrays, its kernel, and what it should give."""

    def __init__(self, case: Codebook, seed: int = 0):
        self.case = case
        rng = np.random.default_rng(seed)
        m, n, k = case.rows, case.outputs, case.inputs
        codes = rng.integers(0, case.entries, (n, k)).astype(np.uint8)
        absmax = rng.uniform(0.01, 0.2, (n, -(-k // case.block))).astype(case.absmax)
        table = np.sort(rng.uniform(-1, 1, case.entries)).astype(np.float32)
        self.weight = codebook_layout.to_tiles(jnp.asarray(codes), jnp.asarray(absmax), jnp.asarray(table), case.block)
        x = np.full((layout.round_up(m, 8), layout.round_up(k, codebook_layout.TILE)), np.nan, case.dtype)
        x[:m] = 0
        x[:m, :k] = rng.normal(size=(m, k))
        bias = np.zeros(layout.round_up(n, codebook_layout.TILE), np.float32)
        bias[:n] = rng.normal(size=n)
        tiled = [np.asarray(array) for array in (self.weight.codes, self.weight.absmax, self.weight.words)]
        self.inputs = [x, *tiled, *([bias] if case.bias else [])]
        self.compiled = self._compile()
        # F in the dtype of x, the rest exact.
        F = table.astype(case.dtype).astype(np.float64)
        W = F[codes] * np.repeat(absmax.astype(np.float64), case.block, axis=1)[:, :k]
        there = x[:m, :k].astype(np.float64)
        self.want = there @ W.T + (bias[:n] if case.bias else 0)
        self.magnitude = np.abs(there) @ np.abs(W).T + (np.abs(bias[:n]) if case.bias else 0)

    def _compile(self) -> CompiledKernel:
        case = self.case

        def function(x: jax.Array, codes: jax.Array, absmax: jax.Array, words: jax.Array, *bias: jax.Array) -> jax.Array:
            weight = dataclasses.replace(self.weight, codes=codes, absmax=absmax, words=words)
            given = bias[0] if bias else None
            return mosaic.codebook_matmul(x, weight, given, rows=case.rows, out_dtype=case.out, tiles=case.tiles)

        return compile_kernel(function, *shapes(self.inputs))

    def error(self, timing: Timing, compiled: CompiledKernel | None = None) -> float:
        """The largest error over the stated bound: one rounding to `out`, and 64 of float32 of all magnitudes together."""
        case = self.case
        y = np.full((case.rows, case.outputs), np.nan, case.out)
        pointers = list(range(3, len(self.inputs) + 1))  # words, bias and y: others only the copy engine touches
        after, _ = (compiled or self.compiled).run([*self.inputs, y], pointers, timing)
        got = after[-1].astype(np.float64)
        bound = _ROUNDING[np.dtype(case.out)] * np.abs(self.want) * 1.01 + 64 * 2.0**-24 * self.magnitude
        error = np.abs(got - self.want) / bound
        return float("inf") if np.isnan(error).any() else float(error.max())


# JAX compiles a kernel once in a process: a second time there is no PTX to be seen.
codebook_run = functools.cache(CodebookRun)


def wrong(case: Codebook) -> list[str]:
    """List what a case gets wrong under each of two opposite timings; nothing if all is as it should be."""
    run = codebook_run(case)
    errors = [(timing, run.error(timing)) for timing in OPPOSITE]
    return [f"{error:.3g} times the bound under {timing}" for timing, error in errors if not error <= 1]
