"""Weights and inputs for the kernels' tests, as arrays or as shapes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.pallas_kernels import api, choice, layout
from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.pallas_kernels.codebook_matmul import layout as codebook_layout
from quikjax.pallas_kernels.codebook_matmul import mosaic as codebook_mosaic
from quikjax.pallas_kernels.devices import H100
from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer
from quikjax.pallas_kernels.split_quantize.producers import LayerNorm, RmsNorm
from quikjax.planning.counts import splits_inside


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
    parameters = tuple(s((spec.inputs,), dtype) for _ in range(spec.producer.parameters))
    bias = s((spec.outputs,), jnp.float32) if spec.bias else None
    call = functools.partial(_layer, bits=spec.bits, producer=spec.producer)
    return call, (inputs, packed, bias, parameters)


def joined_shapes(specs: Sequence[LinearSpec], rows: int, residual: bool = False) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Layers that read one tensor and are one product for Mosaic on an H100, or one to whose result something is added."""
    inputs, packed, biases, parameters = zip(*(layer_shapes(spec, rows)[1] for spec in specs), strict=True)
    joined = jax.eval_shape(api.join, packed) if len(specs) > 1 else packed[0]
    onto = jax.ShapeDtypeStruct((rows, specs[0].outputs), jnp.bfloat16) if residual else None

    def call(inputs: Any, packed: Any, biases: Any, parameters: Any, onto: Any) -> Any:
        first = specs[0]
        settings: dict[str, Any] = {"producer": first.producer, "parameters": parameters, "residual": onto}
        return api.linears(inputs, [packed], biases, first.bits, **settings, backend="mosaic", device=H100)

    return call, (inputs[0], joined, biases, parameters[0], onto)


def _layer(inputs: Any, packed: Any, bias: Any, parameters: Any, *, bits: int, producer: Any) -> Any:
    return api.linears(inputs, [packed], [bias], bits, producer=producer, parameters=parameters, backend="mosaic", device=H100)[0]


def has_split_kernel(spec: LinearSpec, rows: int) -> bool:
    """Tell whether a kernel splits for the layer. Weight-only ones quantize nothing; one layer is too wide: XLA splits it."""
    dtype = jnp.int4 if spec.weight_bits == 4 else jnp.int8
    wanted = (rows, spec.inputs, spec.outputs, spec.base, dtype, spec.bits, jnp.bfloat16, jnp.bfloat16, spec.producer)
    return spec.bits < 16 and choice.why_not_mosaic_split(choice.Problem(*wanted), H100) is None


def _tile_widths(spec: LinearSpec) -> tuple[int, int]:
    """Base and outlier columns as a product knows them, which is padded: 1 and 36 outliers of 4096 are one kernel."""
    return layout.round_up(spec.base, layout.WEIGHT_TILE), layout.round_up(spec.outliers, layout.OUTLIER_TILE)


def _split_widths(spec: LinearSpec) -> tuple[int, int]:
    """Base and outlier columns as a split knows them: padded, but for a norm, which counts each column once."""
    if isinstance(spec.producer, RmsNorm | LayerNorm):
        return spec.base, spec.outliers
    return layout.round_up(spec.base, layout.COLUMN_TILE), layout.round_up(spec.outliers, layout.COLUMN_TILE)


def row_kernel(spec: LinearSpec, rows: int) -> tuple[tuple[Any, ...], Callable[..., Any], tuple[Any, ...]]:
    """A layer whose kernel splits its one row: a key that tells it from others, the function, the shapes of its arguments."""
    assert splits_inside(spec, rows)
    widths = (*_split_widths(spec), *_tile_widths(spec))
    key = ("row", spec.outputs, spec.inputs, *widths, spec.weight_bits, spec.bits, spec.bias, spec.producer)
    return key, *layer_shapes(spec, rows)


def split_kernel(spec: LinearSpec, rows: int) -> tuple[tuple[Any, ...], Callable[..., Any], tuple[Any, ...]]:
    """The split of a layer alone: a key that tells it from others, the function, the shapes of its arguments in tile form."""
    s = jax.ShapeDtypeStruct
    shape = (rows, spec.inputs)
    columns = layout.round_up(spec.base, layout.COLUMN_TILE) + layout.round_up(spec.outliers, layout.COLUMN_TILE)
    inputs = tuple(s(shape, jnp.bfloat16) for _ in range(spec.producer.inputs))
    parameters = tuple(s((spec.inputs,), jnp.bfloat16) for _ in range(spec.producer.parameters))

    def function(inputs: Any, columns: Any, parameters: Any) -> Any:
        return mosaic_layer.split(inputs, columns, spec.base, spec.bits, spec.producer, parameters, H100)

    key = ("split", rows, spec.inputs, *_split_widths(spec), spec.bits, spec.producer)
    return key, function, (inputs, s((columns,), jnp.int32), parameters)


def product_kernel(spec: LinearSpec, rows: int) -> tuple[tuple[Any, ...], Callable[..., Any], tuple[Any, ...]]:
    """The product of a layer alone, likewise. Rows count up to 8: what the kernel sees of 1, 2, 3 and 8 rows is the same."""
    rows = layout.round_up(rows, 8)
    _, (_, packed, bias, _) = layer_shapes(dataclasses.replace(spec, producer=api.Identity()), rows)
    s = jax.ShapeDtypeStruct
    base, outliers = layout.round_up(spec.base, layout.COLUMN_TILE), layout.round_up(spec.outliers, layout.COLUMN_TILE)
    per_row = s((layout.round_up(rows, 256),), jnp.float32) if spec.bits < 16 else None
    tokens = s((rows, base), jnp.int8 if spec.bits < 16 else jnp.bfloat16)
    kept = s((rows, outliers), jnp.bfloat16) if spec.outliers else None

    def function(tokens: Any, scale: Any, zero: Any, kept: Any, packed: Any, bias: Any) -> Any:
        split = layout.TileSplit(tokens, scale, zero, kept)
        return mosaic_layer.product(split, rows, packed, [bias], spec.bits, jnp.bfloat16, H100)[0]

    key = ("product", rows, spec.outputs, base, outliers, *_tile_widths(spec), spec.weight_bits, spec.bits, spec.bias)
    return key, function, (tokens, per_row, per_row, kept, packed, bias)


def codebook_kernel(spec: LinearSpec, rows: int) -> tuple[tuple[Any, ...], Callable[..., Any], tuple[Any, ...]]:
    """The product of a layer with all of its columns in a 4-bit codebook, blocks of 64, likewise. Rows count up to 8."""
    s = jax.ShapeDtypeStruct
    n, k, rows = spec.outputs, spec.inputs, layout.round_up(rows, 8)
    blocks, steps = layout.round_up(n, codebook_layout.TILE) // codebook_layout.TILE, -(-k // codebook_layout.TILE)
    weight = codebook_layout.CodebookTiles(
        codes=s((blocks, steps, codebook_layout.TILE, 16), jnp.int32),
        absmax=s((blocks, 2 * steps, codebook_layout.TILE), jnp.float16),
        table=s((16,), jnp.float32),
        words=s((2, 8), jnp.int32),
        inputs=k,
        outputs=n,
    )
    tiles = codebook_mosaic.default_tiles(rows, blocks * codebook_layout.TILE, steps * codebook_layout.TILE, H100.cores)

    def function(x: Any, weight: Any) -> Any:
        return codebook_mosaic.codebook_matmul(x, weight, None, rows=rows, out_dtype=jnp.bfloat16, tiles=tiles)

    key = ("codebook", rows, n, k, *dataclasses.astuple(tiles))
    return key, function, (s((rows, steps * codebook_layout.TILE), jnp.bfloat16), weight)
