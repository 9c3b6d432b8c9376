"""Are the kernels right on this device: codes and accumulators bit for bit, results within a bound of float64."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import gpu_peers
import jax
import jax.numpy as jnp
import numpy as np

from quikjax.pallas_kernels import api, reference
from quikjax.pallas_kernels.arg_specs import MODELS, ROWS, LinearSpec, all_linears

# Rows whose results are recomputed in float64, at most; accumulators are compared in all.
_IN_FLOAT64 = 48
# Powers of two, so that scaling a token scales its codes' inputs exactly; 0 makes a token of equal values.
_EXTREMES = (1.0, 0.0, 2.0**-60, 2.0**60)


def cases(every: bool) -> dict[str, tuple[LinearSpec, int]]:
    """Layers and numbers of rows by name: each number of rows and each format once, or (`every`) every layer of the lists."""
    formats = [LinearSpec("format", f"w{w}a{a}", 1024, 1024, 64, w, a, bias=True) for w, a in ((4, 8), (8, 4), (8, 8), (4, 16))]
    layers = all_linears() if every else [layer for name in ("smollm2-135m", "llama-2-7b", "opt-6.7b") for layer in MODELS[name]]
    chosen = [(layer, ROWS[i % len(ROWS)]) for i, layer in enumerate(layers)]
    chosen += [(layer, rows) for layer, rows in zip(formats, (17, 129, 8, 64), strict=True)]
    chosen += [(LinearSpec("outliers", "none", 1024, 1024, 0), 2), (LinearSpec("falcon-7b", "qkv", 4672, 4544, 284), 2048)]
    return {f"{layer.model}.{layer.name} W{layer.weight_bits}A{layer.bits}, {rows} rows": (layer, rows) for layer, rows in chosen}


def poison(count: int) -> None:
    """Leave NaN in the memory that the allocator gives out next: what a kernel does not write shows."""
    jax.block_until_ready([jnp.full(count, jnp.nan, jnp.float32) for _ in range(2)])


def exactly(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of the arguments on the host, where the reference's bits are those of its definition.

    XLA takes a GPU's approximate reciprocal for the quantizer's `1 / scale`: there the reference itself is a code off at times.
    """
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.block_until_ready(jax.jit(function)(*jax.device_put(arguments, cpu)))


def distance(got: Any, want: Any) -> float:
    """`||got - want|| / ||want||`; NaN where either holds one."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(spec: LinearSpec, rows: int, dtype: Any, backend: str) -> dict[str, float]:
    """Run one layer on `backend` and compare it.

    Returns:
        `error` in units of the bound (at most 1), and for fused producers the share of codes that are a step off.

    Raises:
        ValueError: what differs, in words.
    """
    x, packed = gpu_peers.random_layer(jax.random.key(rows + spec.inputs), spec, rows, dtype)
    bias = jax.random.normal(jax.random.key(3), (spec.outputs,), jnp.float32) if spec.bias else None
    x = x * jnp.asarray(_EXTREMES, dtype)[jnp.arange(rows) % len(_EXTREMES)][:, None]
    plain = jax.jit(api.from_tiles)(packed)
    poison(rows * spec.outputs)
    y = jax.jit(lambda x, packed: api.linears((x,), [packed], [bias], spec.bits, backend=backend)[0])(x, packed)
    seen = np.unique(np.linspace(0, rows - 1, min(rows, _IN_FLOAT64)).astype(int))
    if spec.bits == 16:
        return {"error": _against_float64(y, None, x, plain, bias, 16, seen)}
    shares = {"codes_off": _check_split(spec, rows, dtype, plain.columns, backend)}
    want = exactly(lambda x, columns: reference.split_quantize(x, columns, plain.base, spec.bits), x, plain.columns)
    _same_split(jax.jit(lambda x: _split((x,), plain.columns, spec, api.Identity(), (), backend))(x), want)
    _check_sums(want, plain, rows, spec, backend)
    return shares | {"error": _against_float64(y, want, x, plain, bias, spec.bits, seen)}


def _split(inputs: Sequence[Any], columns: Any, spec: LinearSpec, producer: api.Producer, parameters: Any, backend: str) -> Any:
    # The named backend's layer may leave a split that its kernel cannot hold to XLA.
    try:
        return api.split_quantize(
            inputs, columns, spec.base, spec.bits, producer=producer, parameters=parameters, backend=backend
        )
    except api.BackendError:
        return api.split_quantize(inputs, columns, spec.base, spec.bits, producer=producer, parameters=parameters, backend="xla")


def _same_split(got: reference.Split, want: reference.Split) -> None:
    for name, a, b in zip(want._fields, got, want, strict=True):
        if not np.array_equal(np.asarray(a), np.asarray(b)):
            raise ValueError(
                f"split_quantize: {name} differs from the reference in {np.mean(np.asarray(a) != np.asarray(b)):.1e}"
            )


def _check_split(spec: LinearSpec, rows: int, dtype: Any, columns: Any, backend: str) -> float:
    """The split behind the layer's own producer: the share of codes a step off."""
    keys = jax.random.split(jax.random.key(5), spec.producer.inputs)
    inputs = tuple(jax.random.normal(key, (rows, spec.inputs), jnp.float32).astype(dtype) for key in keys)
    parameters = tuple(jnp.linspace(0.5, 1.5, spec.inputs).astype(dtype) for _ in range(spec.producer.parameters))

    def codes_of(backend: str, inputs: Any, columns: Any, parameters: Any) -> Any:
        return _split(inputs, columns, spec, spec.producer, parameters, backend).codes

    arguments = (inputs, columns, parameters)
    got = jax.jit(functools.partial(codes_of, backend))(*arguments)
    want = exactly(functools.partial(codes_of, "xla"), *arguments)
    off = np.abs(np.asarray(got, np.int32) - np.asarray(want, np.int32))
    share = float((off > 0).mean())
    if off.max() > 1 or share > (0 if spec.producer.exact else 1e-3):
        raise ValueError(
            f"split_quantize behind {type(spec.producer).__name__}: {share:.1e} of the codes differ, by up to {off.max()}"
        )
    return share


def _check_sums(split: reference.Split, plain: api.Packed, rows: int, spec: LinearSpec, backend: str) -> None:
    """With scales of one, no zero point and no outliers the result is the accumulator, exact in float32 below 2^24."""
    ones = jnp.ones(plain.outputs, jnp.float32)
    base = api.pack(plain.qweight, ones, 0 * ones, plain.outliers[:, :0], jnp.arange(plain.base, dtype=jnp.int32))
    device = jax.devices()[0]
    codes, kept = jax.device_put((split.codes, split.outliers[:, :0]), device)
    unit = reference.Split(codes, kept, jnp.ones(rows, jnp.float32), jnp.zeros(rows, jnp.float32))
    poison(rows * spec.outputs)
    got = jax.jit(lambda unit, base: api.quik_matmul(unit, base, None, spec.bits, jnp.float32, backend=backend))(unit, base)
    want = jax.jit(reference.integer_matmul)(codes, plain.qweight).astype(jnp.float32)
    differ = float(jnp.mean(got != want))
    if differ:
        raise ValueError(f"quik_matmul: {differ:.1e} of the accumulators differ from the reference")


def _against_float64(y: Any, split: Any, x: Any, plain: api.Packed, bias: Any, bits: int, seen: np.ndarray) -> float:
    """The largest error of the rows `seen`, over: one rounding to its dtype plus 64 of float32 of what is added."""

    def wide(array: Any) -> np.ndarray:
        return np.asarray(array).astype(np.float64)

    codes = np.asarray(plain.qweight.astype(jnp.int8)).astype(np.float64)
    scale, outliers = wide(plain.scale), wide(plain.outliers)
    if split is None:
        gathered = wide(x[seen])[:, np.asarray(plain.columns)]
        base, kept = gathered[:, : plain.base], gathered[:, plain.base :]
        parts = [base @ codes.T * scale, kept @ outliers.T]
        magnitude = np.abs(base) @ np.abs(codes).T * scale + np.abs(kept) @ np.abs(outliers).T
    else:
        s, z, kept = wide(split.scale[seen])[:, None], wide(split.zero[seen])[:, None], wide(split.outliers[seen])
        parts = [wide(split.codes[seen]) @ codes.T * s * scale, (z + 2.0 ** (bits - 1) * s) * wide(plain.reduced)]
        magnitude = sum(np.abs(part) for part in parts) + np.abs(kept) @ np.abs(outliers).T
        parts.append(kept @ outliers.T)
    if bias is not None:
        parts.append(wide(bias)[None])
        magnitude = magnitude + np.abs(wide(bias))
    want = sum(parts)
    rounding = float(jnp.finfo(y.dtype).eps)
    # Below the smallest normal number a rounding is absolute.
    bound = rounding * np.abs(want) + 64 * np.finfo(np.float32).eps * magnitude + float(jnp.finfo(y.dtype).tiny)
    error = float((np.abs(wide(y[seen]) - want) / bound).max())
    if not error <= 1:
        raise ValueError(f"a result is {error:.2g} times the bound away from float64")
    return error


def dry(spec: LinearSpec, rows: int) -> tuple[LinearSpec, int]:
    """A case at a size that a CPU does at once."""
    inputs = min(spec.inputs, 192)
    outliers = min(spec.outliers, inputs // 16)
    return dataclasses.replace(spec, outputs=min(spec.outputs, 72), inputs=inputs, outliers=outliers), min(rows, 9)
