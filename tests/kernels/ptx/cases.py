"""Products and splits of the project as cases: made, compiled, executed, compared with the definition.

Arrays around the kernels are as an application leaves them: padding of activations holds rubbish (77, NaN), padding of weights
what tile form promises (`layout.py`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ptx.compiled import CompiledKernel, compile_kernel, shapes
from ptx.machine import OPPOSITE, Timing
from quikjax.pallas_kernels import api, layout, reference
from quikjax.pallas_kernels.quik_matmul import mosaic as matmul
from quikjax.pallas_kernels.quik_matmul.tiles import COMPUTE, LONGEST_ROWS, MatmulTiles, allocated_outputs
from quikjax.pallas_kernels.quik_matmul.unsplit import Unsplit
from quikjax.pallas_kernels.split_quantize import mosaic as split
from quikjax.pallas_kernels.split_quantize.mosaic import SplitTiles

BFLOAT16: Any = np.dtype(ml_dtypes.bfloat16)
# Half a unit in the last place of a result, of the type it is stored in.
_ROUNDING = {BFLOAT16: 2.0**-8, np.dtype(np.float16): 2.0**-11, np.dtype(np.float32): 2.0**-24}


@dataclasses.dataclass(frozen=True)
class Product:
    """`quik_matmul` with these tiles on a device of `cores` multiprocessors.

    `also`: numbers of outputs of further weights that are joined to the first. `residual`: one is added.
    """

    rows: int
    outputs: int
    inputs: int
    outliers: int
    weight_bits: int
    bits: int
    bias: bool
    tiles: MatmulTiles
    out: Any = BFLOAT16
    dtype: Any = BFLOAT16
    cores: int = 3
    also: tuple[int, ...] = ()
    residual: bool = False

    @property
    def members(self) -> tuple[int, ...]:
        """Outputs of each weight."""
        return (self.outputs, *self.also)

    def __str__(self) -> str:
        tiles = "x".join(str(part) for part in dataclasses.astuple(self.tiles))
        kind = np.dtype(self.out).name if self.dtype == BFLOAT16 else f"{np.dtype(self.dtype).name}-{np.dtype(self.out).name}"
        kind += "-residual" * self.residual
        outputs = "+".join(map(str, self.members))
        return f"{self.rows}x{outputs}x{self.inputs}-o{self.outliers}-w{self.weight_bits}a{self.bits}-{tiles}-{kind}"


def named(producer: api.Producer) -> str:
    """A producer's class, and which GELU it is."""
    return type(producer).__name__ + "-by-tanh" * (producer == api.Gelu(approximate=True))


@dataclasses.dataclass(frozen=True)
class Split:
    """`split_quantize` with these tiles."""

    rows: int
    inputs: int
    outliers: int
    bits: int
    producer: api.Producer
    tiles: SplitTiles
    dtype: Any = BFLOAT16
    clip: tuple[int, int] | None = None

    def __str__(self) -> str:
        name = named(self.producer)
        kind = np.dtype(self.dtype).name
        tiles = f"{self.tiles.rows}x{self.tiles.warpgroups}" + (f"-L{self.clip[0]}l{self.clip[1]}" if self.clip else "")
        return f"{self.rows}x{self.inputs}-o{self.outliers}-a{self.bits}-{name}-{tiles}-{kind}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row through `quik_matmul`, which splits it itself."""

    product: Product
    producer: api.Producer
    clip: tuple[int, int] | None = None

    def __str__(self) -> str:
        clip = f"-L{self.clip[0]}l{self.clip[1]}" if self.clip else ""
        return f"{named(self.producer)}{clip}-{self.product}"


class ProductRun:
    """A product's arrays, its kernel, and what it should give. `given`: activations to multiply, in place of random ones."""

    def __init__(self, case: Product, seed: int = 0, given: reference.Split | None = None):
        self.case = case
        rng = np.random.default_rng(seed)
        base, m = case.inputs - case.outliers, case.rows
        quantized = case.bits < 16
        self.rows_there = layout.round_up(m, 8)
        # Weights, padded as `layout.to_tiles` does it.
        there = [np.arange(layout.round_up(n, layout.WEIGHT_TILE)) < n for n in case.members]
        real = np.concatenate(there)
        rows, n = len(real), int(real.sum())
        half = 2 ** (case.weight_bits - 1)
        codes = np.zeros((rows, layout.round_up(base, layout.WEIGHT_TILE)), np.int8)
        codes[real, :base] = rng.integers(-half, half, (n, base))
        scale = np.ones(rows, np.float32)
        scale[real] = rng.uniform(0.01, 0.2, n)
        reduced = scale * codes.sum(1, dtype=np.float32)
        w_outliers = np.zeros((rows, layout.round_up(case.outliers, layout.OUTLIER_TILE)), case.dtype)
        w_outliers[real, : case.outliers] = rng.normal(size=(n, case.outliers))
        bias = np.zeros(rows, np.float32)
        bias[real] = rng.normal(size=n)
        # Activations: rubbish in columns that meet zeros, NaN where no row is.
        tokens = np.full((self.rows_there, layout.round_up(base, layout.COLUMN_TILE)), 77, np.int8 if quantized else case.dtype)
        if quantized:
            lowest = 2 ** (case.bits - 1)
            tokens[:m, :base] = rng.integers(-lowest, lowest, (m, base))
        else:
            tokens[:m, :base] = rng.normal(size=(m, base))
        vectors = np.full((2, layout.round_up(m, LONGEST_ROWS)), np.nan, np.float32)
        vectors[0, :m], vectors[1, :m] = rng.uniform(0.01, 0.1, m), rng.normal(size=m)
        kept = np.full((self.rows_there, layout.round_up(case.outliers, layout.COLUMN_TILE)), 7, case.dtype)
        kept[:m, : case.outliers] = rng.normal(size=(m, case.outliers))
        if given is not None:
            tokens[:m, :base], vectors[0, :m], vectors[1, :m] = given.codes, given.scale, given.zero
            kept[:m, : case.outliers] = given.outliers
        qweight = np.asarray(layout.feed(jnp.asarray(codes))) if case.weight_bits == 4 else codes
        named: dict[str, Any] = {"tokens": tokens, "qweight": qweight, "scale": scale}
        if quantized:
            named |= {"x_scale": vectors[0], "x_zero": vectors[1], "reduced": reduced}
        if case.outliers:
            named |= {"x_outliers": kept, "w_outliers": w_outliers}
        if case.bias:
            named["bias"] = bias
        if case.residual:
            named["residual"] = rng.normal(size=(m, n)).astype(case.out)
        self.real = real
        self.names, self.inputs = list(named), list(named.values())
        self.compiled = self._compile()
        self.want, self.magnitude = self._float64(codes, named, kept, w_outliers)

    def _compile(self) -> CompiledKernel:
        def function(*arrays: jax.Array) -> list[jax.Array]:
            named = dict(zip(self.names, arrays, strict=True))
            tokens = layout.TileSplit(*[named.get(name) for name in ("tokens", "x_scale", "x_zero", "x_outliers")])  # type: ignore[arg-type]
            return self.multiply(tokens, named)

        return compile_kernel(function, *shapes(self.inputs))

    def multiply(self, activations: layout.TileSplit | Unsplit, named: dict[str, Any]) -> list[jax.Array]:
        """The kernel on the weight's arrays by name."""
        case = self.case
        fields: dict[str, Any] = {
            "qweight": named["qweight"],
            "scale": named["scale"],
            "reduced": named.get("reduced"),
            "outliers": named.get("w_outliers"),
            "columns": None,
            "base": case.inputs - case.outliers,
            "inputs": case.inputs,
        }
        joined = layout.Joined(**fields, outputs=len(self.real), members=case.members) if case.also else None
        return matmul.quik_matmul(
            activations,
            joined or layout.Tiled(**fields, outputs=case.outputs),
            named.get("bias"),
            rows=case.rows,
            bits=case.bits,
            out_dtype=case.out,
            tiles=case.tiles,
            cores=case.cores,
            residual=named.get("residual"),
        )

    def _float64(
        self, codes: np.ndarray, named: dict[str, Any], kept: np.ndarray, w_outliers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The result, and the sum of magnitudes of what is added up to it."""
        case, m, real, base = self.case, self.case.rows, self.real, self.case.inputs - self.case.outliers
        x, weight = named["tokens"][:m, :base].astype(np.float64), codes[real, :base].astype(np.float64)
        scale = named["scale"][real].astype(np.float64)
        if case.bits < 16:
            s, z = (named[name][:m, None].astype(np.float64) for name in ("x_scale", "x_zero"))
            parts = [x @ weight.T * s * scale, (z + 2 ** (case.bits - 1) * s) * named["reduced"][real].astype(np.float64)]
            magnitude = np.abs(parts[0]) + np.abs(parts[1])
        else:
            parts = [x @ weight.T * scale]
            magnitude = np.abs(x) @ np.abs(weight).T * scale
        x_out, w_out = kept[:m, : case.outliers].astype(np.float64), w_outliers[real, : case.outliers].astype(np.float64)
        parts.append(x_out @ w_out.T)
        magnitude = magnitude + np.abs(x_out) @ np.abs(w_out).T
        if case.bias:
            parts.append(np.broadcast_to(named["bias"][real].astype(np.float64), (m, int(real.sum()))))
            magnitude = magnitude + np.abs(parts[-1])
        return np.sum(parts, axis=0), magnitude

    def result(self, timing: Timing, compiled: CompiledKernel | None = None) -> np.ndarray:
        """`[rows, outputs]`, of joined weights side by side."""
        compiled, case = compiled or self.compiled, self.case
        direct = case.rows <= matmul.DIRECT_ROWS
        ys = [
            np.full((case.rows, n) if direct else (self.rows_there, allocated_outputs(n)), np.nan, case.out) for n in case.members
        ]
        arrays = [*self.inputs, *ys]
        touched = ["residual", "x_scale", "x_zero", "scale", "reduced", "bias"]
        pointers = [self.names.index(name) for name in touched if name in self.names]
        # Few rows are stored from registers, more by the copy engine.
        pointers += range(len(self.inputs), len(arrays)) if direct else []
        after, _ = compiled.run(arrays, pointers, timing)
        results = [y[: case.rows, :n] for y, n in zip(after[len(self.inputs) :], case.members, strict=True)]
        return np.concatenate(results, axis=1)

    def error(self, timing: Timing, compiled: CompiledKernel | None = None) -> float:
        """The largest error over the stated bound: one rounding to `out`, and 64 of float32 of all magnitudes together.

        With a residual: infinite unless it is to the bit what a sum behind the same product without one gives.
        """
        case, y = self.case, self.result(timing, compiled)
        if case.residual:
            alone = product_run(dataclasses.replace(case, residual=False)).result(timing)
            residual = self.inputs[self.names.index("residual")]
            added = (alone.astype(np.float32) + residual.astype(np.float32)).astype(case.out)
            return 0.0 if np.array_equal(y, added) else float("inf")
        got = y.astype(np.float64)
        bound = _ROUNDING[np.dtype(case.out)] * np.abs(self.want) * 1.01 + 64 * 2.0**-24 * self.magnitude
        error = np.abs(got - self.want) / bound
        return float("inf") if np.isnan(error).any() else float(error.max())


class SplitRun:
    """A split's arrays, its kernel, and what it should give."""

    def __init__(self, case: Split, seed: int = 0):
        self.case = case
        rng = np.random.default_rng(seed)
        producer, base, k = case.producer, case.inputs - case.outliers, case.inputs
        columns = rng.permutation(k).astype(np.int32)
        large = np.where(np.isin(np.arange(k), columns[base:]), 30, 1)
        self.tensors = [(rng.normal(size=(case.rows, k)) * large).astype(case.dtype) for _ in range(producer.inputs)]
        self.norm = [rng.normal(1, 0.2, k).astype(BFLOAT16) for _ in range(producer.parameters)]
        self.base, self.padded_base = base, layout.round_up(base, layout.COLUMN_TILE)
        self.padded = np.full(self.padded_base + layout.round_up(case.outliers, layout.COLUMN_TILE), columns[0], np.int32)
        self.padded[:base] = columns[:base]
        self.padded[self.padded_base : self.padded_base + case.outliers] = columns[base:]
        reason = split.why_not(k, self.padded_base, len(self.padded) - self.padded_base, case.dtype, producer, case.tiles)
        assert reason is None, reason
        self.want = _reference_split(tuple(self.tensors), tuple(self.norm), columns, base, case.bits, producer, case.clip)
        self.compiled = self._compile()

    def _compile(self) -> CompiledKernel:
        case, count = self.case, len(self.tensors)

        def function(*arrays: jax.Array) -> Any:
            tensors, columns, norm = arrays[:count], arrays[count], arrays[count + 1 :]
            return split.split_quantize(
                tensors,
                columns,
                base=self.base,
                padded_base=self.padded_base,
                bits=case.bits,
                producer=case.producer,
                parameters=norm,
                tiles=case.tiles,
                row_padding=LONGEST_ROWS,
                clip=case.clip,
            )

        return compile_kernel(function, *shapes([*self.tensors, self.padded, *self.norm]))

    def run(self, timing: Timing, compiled: CompiledKernel | None = None) -> reference.Split:
        """The split as the kernel leaves it, without padding."""
        case, m = self.case, self.case.rows
        rows, long = layout.round_up(m, 8), layout.round_up(m, LONGEST_ROWS)
        arrays = [*self.tensors, self.padded, *self.norm, np.full((rows, self.padded_base), 99, np.int8)]
        if case.outliers:
            arrays.append(np.full((rows, len(self.padded) - self.padded_base), np.nan, case.dtype))
        arrays += [np.full(long, np.nan, np.float32), np.full(long, np.nan, np.float32)]
        read, end = len(self.tensors), len(arrays)
        written = range(read + 1 + len(self.norm), end - 2)
        # As the kernel first touches them: columns, a norm's vectors, scale and zero, codes, outliers.
        pointers = [*range(read, read + 1 + len(self.norm)), end - 2, end - 1, *written]
        after, _ = (compiled or self.compiled).run(arrays, pointers, timing)
        codes, scale, zero = after[written[0]], after[-2], after[-1]
        kept = after[written[1]][:m, : case.outliers] if case.outliers else np.zeros((m, 0), case.dtype)
        assert (codes[:m, self.base :] == codes[:m, :1]).all(), "padding does not repeat the first base column"
        return reference.Split(codes[:m, : self.base], kept, scale[:m], zero[:m])  # type: ignore[arg-type]

    def problems(self, timing: Timing, compiled: CompiledKernel | None = None) -> list[str]:
        """List what differs from the definition: nothing may; where a producer is not exact, one code in a thousand by a step."""
        got, want = self.run(timing, compiled), self.want
        if self.case.producer.exact:
            names = zip(reference.Split._fields, got, want, strict=True)
            return [name for name, a, b in names if not np.array_equal(np.asarray(a), np.asarray(b))]
        found = []
        steps = np.abs(np.asarray(got.codes, np.int32) - np.asarray(want.codes, np.int32))
        if steps.max() > 1 or (steps > 0).mean() > 1e-3:
            found.append(f"codes: {int((steps > 0).sum())} differ, by {int(steps.max())} at most")
        # One unit in the last place of what the producer rounds to.
        unit = 2 * 2.0**-8 if self.case.dtype == BFLOAT16 else 2.0**-10
        for name in ("outliers", "scale"):
            a, b = np.asarray(getattr(got, name), np.float64), np.asarray(getattr(want, name), np.float64)
            # Far below zero GELU by tanh is a difference of nearly equal numbers.
            if not (np.abs(a - b) <= unit * np.abs(b) + 1e-6).all():
                found.append(name)
        if not (np.abs(np.asarray(got.zero) - np.asarray(want.zero)) <= unit * np.abs(np.asarray(want.zero))).all():
            found.append("zero")
        return found


@functools.partial(jax.jit, static_argnames=("base", "bits", "producer", "clip"))
def _reference_split(
    tensors: Any, norm: Any, columns: Any, base: int, bits: int, producer: api.Producer, clip: Any
) -> reference.Split:
    return reference.split_quantize(producer(*tensors, *norm), columns, base, bits, clip)


class RowRun:
    """A row's arrays and its kernel, and the two kernels that it stands for."""

    def __init__(self, case: Row):
        self.case, product = case, case.product
        # Two warpgroups as well, so that a norm's sums are taken in the same order.
        tiles = SplitTiles(1, COMPUTE)
        self.split = split_run(
            Split(1, product.inputs, product.outliers, product.bits, case.producer, tiles, product.dtype, case.clip)
        )
        self.product = ProductRun(product, given=self.split.run(OPPOSITE[0]))
        activations = ("tokens", "x_scale", "x_zero", "x_outliers")
        own = {
            name: array for name, array in zip(self.product.names, self.product.inputs, strict=True) if name not in activations
        }
        self.names, self.weights = list(own), list(own.values())
        self.source = [*self.split.tensors, self.split.padded, *self.split.norm]
        self.compiled = self._compile()

    def _compile(self) -> CompiledKernel:
        case, tensors, count = self.case, len(self.split.tensors), len(self.source)
        clip = reference.checked_level_clip(case.product.bits, case.clip)

        def function(*arrays: jax.Array) -> list[jax.Array]:
            inputs, columns, norm = arrays[:tensors], arrays[tensors], arrays[tensors + 1 : count]
            row = Unsplit(inputs, columns, norm, self.split.base, case.producer, clip)
            return self.product.multiply(row, dict(zip(self.names, arrays[count:], strict=True)))

        return compile_kernel(function, *shapes([*self.source, *self.weights]))

    def result(self, timing: Timing, compiled: CompiledKernel | None = None) -> np.ndarray:
        """`[1, outputs]`, of joined weights side by side."""
        members = self.case.product.members
        arrays = [*self.source, *self.weights, *[np.full((1, n), np.nan, self.case.product.out) for n in members]]
        count, end = len(self.source), len(arrays)
        # As the kernel first touches them.
        pointers = [*range(len(self.split.tensors), count)]
        touched = ["residual", "scale", "reduced", "bias"]
        pointers += [count + self.names.index(name) for name in touched if name in self.names]
        pointers += range(end - len(members), end)
        after, _ = (compiled or self.compiled).run(arrays, pointers, timing)
        return np.concatenate(after[end - len(members) :], axis=1)

    def problems(self, timing: Timing, compiled: CompiledKernel | None = None) -> list[str]:
        """List what is not to the bit what the two kernels give, one after the other."""
        got, want = self.result(timing, compiled), self.product.result(timing)
        bits = f"u{got.dtype.itemsize}"
        different = int((got.view(bits) != want.view(bits)).sum())
        return [f"{different} of {got.size} outputs differ"] if different else []


# JAX compiles a kernel once in a process: a second time there is no PTX to be seen.
product_run, split_run, row_run = functools.cache(ProductRun), functools.cache(SplitRun), functools.cache(RowRun)


def wrong(case: Product | Split | Row) -> list[str]:
    """List what a case gets wrong under each of two opposite timings; nothing if all is as it should be."""
    if isinstance(case, Product):
        product = product_run(case)
        errors = [(timing, product.error(timing)) for timing in OPPOSITE]
        return [f"{error:.3g} times the bound under {timing}" for timing, error in errors if not error <= 1]
    tried: SplitRun | RowRun = row_run(case) if isinstance(case, Row) else split_run(case)
    return [f"{problem} under {timing}" for timing in OPPOSITE for problem in tried.problems(timing)]
