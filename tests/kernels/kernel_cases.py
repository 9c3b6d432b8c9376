"""Weights and inputs for the kernels' tests, as arrays or as shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.pallas_kernels.devices import H100


def weight(seed: int, outputs: int, inputs: int, outliers: int, bits: int = 4, dtype: Any = jnp.bfloat16) -> api.Packed:
    """A random packed weight with codes over their whole range."""
    rng = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (outputs, inputs - outliers))
    scale = rng.uniform(0.01, 0.2, outputs).astype(np.float32)
    return api.pack(
        jnp.asarray(codes, jnp.int4 if bits == 4 else jnp.int8),
        jnp.asarray(scale),
        jnp.asarray(scale * codes.sum(1).astype(np.float32)),
        jnp.asarray(rng.normal(size=(outputs, outliers)), dtype),
        jnp.asarray(rng.permutation(inputs), jnp.int32),
    )


def tokens(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, outlier_columns: int = 8) -> jax.Array:
    """Random activations, a few columns of them large."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    x[..., rng.permutation(shape[-1])[:outlier_columns]] *= 30
    return jnp.asarray(x, dtype)


def layer_shapes(spec: LinearSpec, rows: int, dtype: Any = jnp.bfloat16) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A whole layer (split, quantize, product) for Mosaic on an H100, and the shapes of its arguments, weight in tile form."""
    s = jax.ShapeDtypeStruct
    plain = api.Packed(
        qweight=s((spec.outputs, spec.base), jnp.int4 if spec.weight_bits == 4 else jnp.int8),
        scale=s((spec.outputs,), jnp.float32),
        reduced=s((spec.outputs,), jnp.float32),
        outliers=s((spec.outputs, spec.outliers), dtype),
        columns=s((spec.inputs,), jnp.int32),
        base=spec.base,
        inputs=spec.inputs,
        outputs=spec.outputs,
    )
    packed = jax.eval_shape(api.to_tiles, plain)
    inputs = tuple(s((rows, spec.inputs), dtype) for _ in range(spec.producer.inputs))
    parameters = tuple(s((spec.inputs,), jnp.float32) for _ in range(spec.producer.parameters))
    bias = s((spec.outputs,), jnp.float32) if spec.bias else None
    call = functools.partial(_layer, bits=spec.bits, producer=spec.producer)
    return call, (inputs, packed, bias, parameters)


def _layer(inputs: Any, packed: Any, bias: Any, parameters: Any, *, bits: int, producer: Any) -> Any:
    return api.linears(inputs, [packed], [bias], bits, producer=producer, parameters=parameters, backend="mosaic", device=H100)[0]
