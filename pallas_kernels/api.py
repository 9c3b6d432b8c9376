"""The QUIK operations for callers: every array of any leading shape, every backend behind one signature.

`backend=None` takes the first that can run (`choice.choose` says which and why, and is what `plan` and `report` print); a named
backend that cannot run raises `BackendError`. `linears` is the whole layer: differentiable with respect to its inputs, with a
batching rule that folds the batch into the rows. The other functions are its parts, for tests, benchmarks and study.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from quikjax.pallas_kernels import cpu, reference
from quikjax.pallas_kernels.choice import BACKENDS, SPLIT, BackendError, Choice, Problem, choose
from quikjax.pallas_kernels.devices import Device, current_device
from quikjax.pallas_kernels.layout import Halved, Joined, Packed, Paneled, Tiled, from_tiles, halve, join, pack, part, to_tiles
from quikjax.pallas_kernels.reference import Split
from quikjax.pallas_kernels.split_quantize.producers import (
    Gelu,
    Identity,
    LayerNorm,
    Producer,
    Relu,
    RmsNorm,
    SiluMul,
)

# A weight in any form, for one layer or for several.
Form = Packed | Tiled | Halved | Paneled | Joined

__all__ = [
    "BACKENDS",
    "BackendError",
    "Choice",
    "Device",
    "Form",
    "Gelu",
    "Halved",
    "Identity",
    "Joined",
    "LayerNorm",
    "Packed",
    "Paneled",
    "Problem",
    "Producer",
    "Relu",
    "RmsNorm",
    "SiluMul",
    "Tiled",
    "choose",
    "current_device",
    "explain",
    "from_tiles",
    "halve",
    "join",
    "linears",
    "pack",
    "quik_matmul",
    "split_quantize",
    "to_tiles",
    "weight_only_matmul",
]


def explain(
    rows: int,
    packed: Form,
    bits: int,
    dtype: Any,
    *,
    producer: Producer = Identity(),  # noqa: B008 -- frozen
    backend: str | None = None,
    device: Device | None = None,
) -> Choice:
    """Which backend would run `linears` on `rows` tokens, and why. Needs shapes only: `packed` may hold `ShapeDtypeStruct`s.

    Raises:
        BackendError: as `linears` would.
    """
    return choose(_problem(rows, packed, bits, dtype, producer), device or current_device(), backend)


def _problem(rows: int, packed: Form, bits: int, dtype: Any, producer: Producer) -> Problem:
    return Problem(
        rows=rows,
        inputs=packed.inputs,
        outputs=packed.outputs,
        base=packed.base,
        weight_dtype=packed.code_dtype,
        bits=bits,
        dtype=jnp.dtype(dtype),
        outlier_dtype=jnp.dtype(packed.outliers.dtype),
        producer=producer,
    )


def split_quantize(
    inputs: Sequence[Float[Array, "*batch k"]],
    columns: Int[Array, " k"],
    base: int,
    bits: int,
    *,
    producer: Producer = Identity(),  # noqa: B008 -- frozen
    parameters: Sequence[Float[Array, " k"]] = (),
    clip: tuple[int, int] | None = None,
    backend: str | None = None,
    device: Device | None = None,
) -> Split:
    """Base and outlier columns of `producer(*inputs, *parameters)`, the base quantized per token to `bits` (4 or 8).

    Codes are bit-identical to `reference.split_quantize` of the same producer output; a backend that computes a norm, SiLU or
    GELU itself may differ from the reference's by one step in at most 1e-3 of the codes.

    Raises:
        BackendError: the named backend cannot run this.
    """
    *batch, k = inputs[0].shape
    rows = math.prod(batch)
    device = device or current_device()
    outlier_dtype = inputs[0].dtype
    # Outputs play no part in a split; a multiple of 8 keeps the product's own conditions out of the choice.
    problem = Problem(rows, k, 8, base, jnp.int8, bits, jnp.dtype(inputs[0].dtype), jnp.dtype(outlier_dtype), producer)
    taken = choose(problem, device, backend, SPLIT).backend
    flat = tuple(x.reshape(rows, k) for x in inputs)
    if taken == "mosaic":
        from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer

        tiled = mosaic_layer.split(flat, columns, base, bits, producer, tuple(parameters), device, clip)
        split = mosaic_layer.exact_split(tiled, rows, base, k - base)
    elif taken == "triton":
        from quikjax.pallas_kernels.quik_linear import triton as triton_layer

        split = triton_layer.split(flat, columns, base, bits, producer, tuple(parameters), clip=clip)
    else:
        split = reference.split_quantize(producer(*flat, *parameters), columns, base, bits, clip)
    return Split(*(part.reshape(*batch, *part.shape[1:]) for part in split))


def quik_matmul(
    split: Split,
    packed: Packed | Tiled | Halved | Paneled,
    bias: Float[Array, " n"] | None,
    bits: int,
    out_dtype: Any,
    *,
    backend: str | None = None,
    device: Device | None = None,
) -> Float[Array, "*batch n"]:
    """The product of split activations (of any backend) with a weight in either form, in `out_dtype`.

    Raises:
        BackendError: the named backend cannot run this.
    """
    batch = split.scale.shape
    rows = math.prod(batch)
    device = device or current_device()
    taken = choose(_problem(rows, packed, bits, split.outliers.dtype, Identity()), device, backend).backend
    flat = Split(*(part.reshape(rows, *part.shape[len(batch) :]) for part in split))
    if taken == "mosaic":
        from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer

        tiled = packed if isinstance(packed, Tiled) else from_tiles(packed)
        (y,) = mosaic_layer.product(mosaic_layer.tile_split(flat), rows, tiled, [bias], bits, out_dtype, device)
    elif taken == "triton":
        from quikjax.pallas_kernels.quik_linear import triton as triton_layer

        y = triton_layer.product(flat, triton_layer.readable(packed), bias, bits, out_dtype)
    else:
        y = _reference_product(flat, from_tiles(packed), bias, bits).astype(out_dtype)
    return y.reshape(*batch, packed.outputs)


def weight_only_matmul(
    x: Float[Array, "*batch k"],
    packed: Packed | Tiled | Halved | Paneled,
    bias: Float[Array, " n"] | None,
    *,
    backend: str | None = None,
    device: Device | None = None,
) -> Float[Array, "*batch n"]:
    """16-bit activations times a low-bit weight, in the dtype of `x`.

    Raises:
        BackendError: the named backend cannot run this.
    """
    return linears((x,), [packed], [bias], 16, backend=backend, device=device)[0]


def _reference_product(split: Split, packed: Packed, bias: Any, bits: int) -> jax.Array:
    return reference.quik_matmul(split, packed.qweight, packed.scale, packed.reduced, packed.outliers, bias, bits)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static arguments that one call of `linears` is specialized to; hashable, so that JAX caches by it."""

    bits: int
    producer: Producer
    backend: str | None
    device: Device


def linears(
    inputs: Sequence[Float[Array, "*batch k"]],
    weights: Sequence[Form],
    biases: Sequence[Float[Array, " _"] | None],
    bits: int,
    *,
    producer: Producer = Identity(),  # noqa: B008 -- frozen
    parameters: Sequence[Float[Array, " k"]] = (),
    residual: Float[Array, "*batch _"] | None = None,
    backend: str | None = None,
    device: Device | None = None,
) -> list[Float[Array, "*batch _"]]:
    """Layers that read one tensor `x = producer(*inputs, *parameters)`: `x W^T + bias` each, in the dtype of the inputs.

    All `weights` have the same `columns`, `base` and `level_clip`, so `x` is split and quantized once. A `Joined` one stands for
    as many as it has members, each with a bias and a result of its own. `bits` of the activations: 4, 8, 16. A `residual`, in the
    dtype of the inputs, is added to the result of a single weight: to the rounded `y`, as a sum beside it would be.
    Gradients flow to inputs, parameters and biases as if the activations were not quantized (the straight-through estimate:
    `dx = dy W_hat` with the dequantized weight); weights are frozen. Under `vmap` a batch axis of the inputs joins the rows.

    Raises:
        BackendError: the named backend cannot run one of the layers.
        ValueError: shapes that do not fit together.
    """
    outputs = [count for weight in weights for count in _outputs(weight)]
    if not weights or len(outputs) != len(biases):
        raise ValueError(f"{len(outputs)} weights with {len(biases)} biases")
    if residual is not None and (len(outputs) != 1 or residual.dtype != inputs[0].dtype):
        raise ValueError(f"a {residual.dtype} residual beside {len(outputs)} weights and {inputs[0].dtype} inputs")
    if bits not in (4, 8, 16):
        raise ValueError(f"activations have 4, 8 or 16 bits, not {bits}")
    if len(inputs) != producer.inputs or len(parameters) != producer.parameters:
        raise ValueError(
            f"{type(producer).__name__} reads {producer.inputs} inputs and {producer.parameters} parameters, "
            f"got {len(inputs)} and {len(parameters)}"
        )
    *batch, k = inputs[0].shape
    for packed in weights:
        if packed.level_clip != weights[0].level_clip:
            raise ValueError(f"weights that share x have one level clip, not {packed.level_clip} and {weights[0].level_clip}")
        if packed.inputs != k or packed.base != weights[0].base:
            raise ValueError(
                f"x has {k} columns, weights read {packed.inputs} with {packed.base} base columns, the first {weights[0].base}"
            )
    call = _Call(bits, producer, backend, device or current_device())
    flat = tuple(x.reshape(-1, k) for x in inputs)
    # Only a kernel gains by adding it; elsewhere the sum stands beside the product.
    fused = residual is not None and _backends(call, flat[0].shape[0], weights[0], flat[0].dtype)[0] == "mosaic"
    residuals = (residual.reshape(-1, outputs[0]),) if residual is not None and fused else ()
    results = _differentiable(call, flat, tuple(parameters), tuple(weights), tuple(biases), residuals)
    ys = [y.reshape(*batch, count) for y, count in zip(results, outputs, strict=True)]
    return ys if residual is None or fused else [residual + y for y in ys]


def _backends(call: _Call, rows: int, weight: Form, dtype: Any) -> list[str]:
    """Which backend runs each of the weights that `weight` stands for."""
    problem = _problem(rows, weight, call.bits, dtype, call.producer)
    return [choose(dataclasses.replace(problem, outputs=n), call.device, call.backend).backend for n in _outputs(weight)]


def _outputs(weight: Form) -> tuple[int, ...]:
    return weight.members if isinstance(weight, Joined) else (weight.outputs,)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(
    call: _Call, inputs: Any, parameters: Any, weights: Any, biases: Any, residuals: Any
) -> tuple[jax.Array, ...]:
    return _batched(call, inputs, parameters, weights, biases, residuals)


def _forward(
    call: _Call, inputs: Any, parameters: Any, weights: Any, biases: Any, residuals: Any
) -> tuple[tuple[jax.Array, ...], Any]:
    count = tuple(None for _ in residuals)  # what it adds is not needed backwards
    return _batched(call, inputs, parameters, weights, biases, residuals), (inputs, parameters, weights, biases, count)


def _backward(call: _Call, saved: Any, cotangents: tuple[jax.Array, ...]) -> tuple[Any, Any, None, Any, Any]:
    inputs, parameters, weights, biases, residuals = saved
    x, pull = jax.vjp(lambda tensors, norm: call.producer(*tensors, *norm), inputs, parameters)
    dx = jnp.zeros(x.shape, jnp.float32)
    apart = [member for weight in weights for member in (part(weight) if isinstance(weight, Joined) else [weight])]
    for dy, weight in zip(cotangents, apart, strict=True):
        dx = dx + _times_dequantized(dy.astype(jnp.float32), from_tiles(weight))
    d_inputs, d_parameters = pull(dx.astype(x.dtype))
    d_biases = tuple(
        None if bias is None else dy.astype(jnp.float32).sum(0).astype(bias.dtype)
        for dy, bias in zip(cotangents, biases, strict=True)
    )
    return d_inputs, d_parameters, None, d_biases, tuple(cotangents[: len(residuals)])


def _times_dequantized(dy: jax.Array, weight: Packed) -> jax.Array:
    """`dy W_hat` `[M, K]`, the scale folded into `dy` so that the codes are only widened."""
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    base = exact(dy * weight.scale, weight.qweight.astype(jnp.int8).astype(jnp.float32))
    outliers = exact(dy, weight.outliers.astype(jnp.float32))
    permuted = jnp.concatenate([base, outliers], axis=1)
    return jnp.zeros_like(permuted).at[:, weight.columns].set(permuted, unique_indices=True)


_differentiable.defvjp(_forward, _backward)


# One program also where the caller is not under `jit`, in place of one for each operation; inside of another it leaves no trace.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _batched(call: _Call, inputs: Any, parameters: Any, weights: Any, biases: Any, residuals: Any) -> tuple[jax.Array, ...]:
    """`_run` with its batching rule: a kernel knows nothing of `vmap`, but rows are independent."""
    run = jax.custom_batching.custom_vmap(functools.partial(_run, call))

    @run.def_vmap
    def rule(axis_size: int, batched: Any, inputs: Any, parameters: Any, weights: Any, biases: Any, residuals: Any) -> Any:
        out_batched = tuple(True for _ in biases)
        if any(jax.tree.leaves(batched[1:4])):
            # Weights differ along the axis: one member after the other.
            arguments = (inputs, parameters, weights, biases, residuals)
            moving = jax.tree.map(lambda array, moves: array if moves else None, arguments, tuple(batched))

            def member(part: Any) -> Any:
                whole = jax.tree.map(
                    lambda whole, part: whole if part is None else part, arguments, part, is_leaf=lambda leaf: leaf is None
                )
                return _batched(call, *whole)

            return jax.lax.map(member, moving), out_batched
        rows = inputs[0].shape[1 if batched[0][0] else 0]

        def folded(arrays: Any, moving: Any) -> tuple[jax.Array, ...]:
            return tuple(
                (x if moves else jnp.broadcast_to(x, (axis_size, *x.shape))).reshape(axis_size * rows, -1)
                for x, moves in zip(arrays, moving, strict=True)
            )

        results = _batched(call, folded(inputs, batched[0]), parameters, weights, biases, folded(residuals, batched[4]))
        return tuple(y.reshape(axis_size, rows, -1) for y in results), out_batched

    return run(inputs, parameters, weights, biases, residuals)


def _run(call: _Call, inputs: Any, parameters: Any, weights: Any, biases: Any, residuals: Any) -> tuple[jax.Array, ...]:
    rows, dtype = inputs[0].shape[0], inputs[0].dtype
    # What each backend runs: weights, and the numbers of their results. Joined ones stay so where Mosaic takes every member.
    taken: dict[str, list[tuple[Any, list[int]]]] = {}
    first = 0
    for weight in weights:
        choices = _backends(call, rows, weight, dtype)
        numbers = list(range(first, first + len(choices)))
        first += len(choices)
        if not isinstance(weight, Joined) or set(choices) == {"mosaic"}:
            taken.setdefault(choices[0], []).append((weight, numbers))
            continue
        for member, number, backend in zip(part(weight), numbers, choices, strict=True):
            taken.setdefault(backend, []).append((member, [number]))
    results: dict[int, jax.Array] = {}
    for backend in BACKENDS:
        if backend not in taken:
            continue
        order = [number for _, numbers in taken[backend] for number in numbers]
        members = [weight for weight, _ in taken[backend]]
        with jax.named_scope(f"quik_{backend}"):
            products = _RUNNERS[backend](call, inputs, parameters, members, [biases[i] for i in order], rows, residuals)
        results.update(zip(order, products, strict=True))
    return tuple(results[number] for number in range(first))


def _run_xla(call: _Call, inputs: Any, parameters: Any, weights: Any, biases: Any, rows: int, _: Any) -> list[jax.Array]:
    x = call.producer(*inputs, *parameters)
    if call.bits < 16 and all(isinstance(weight, Paneled) for weight in weights):
        return cpu.linears(x, weights, biases, call.bits, bfloat16=False)
    weights = [from_tiles(weight) for weight in weights]
    if call.bits == 16:
        return [
            reference.weight_only_matmul(x, w.columns, w.qweight, w.scale, w.outliers, bias).astype(x.dtype)
            for w, bias in zip(weights, biases, strict=True)
        ]
    if call.device.platform == "cpu" and rows >= cpu.FEWEST_ROWS:
        return cpu.linears(x, weights, biases, call.bits, bfloat16=call.device.bfloat16_products)
    split = reference.split_quantize(x, weights[0].columns, weights[0].base, call.bits, weights[0].level_clip)
    return [_reference_product(split, w, bias, call.bits).astype(x.dtype) for w, bias in zip(weights, biases, strict=True)]


def _run_mosaic(
    call: _Call, inputs: Any, parameters: Any, weights: Any, biases: Any, rows: int, residuals: Any
) -> list[jax.Array]:
    from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer

    first, biases = weights[0], iter(biases)
    residual = residuals[0] if residuals else None
    split = (first.columns, first.base, call.bits, call.producer, parameters, call.device, first.level_clip)
    if len(weights) == 1 and not isinstance(first, Halved):
        dtype = inputs[0].dtype
        if mosaic_layer.splits_inside(rows, first.inputs, dtype, first, call.bits, call.producer, call.device):
            return _mosaic_row(inputs, *split, first, list(biases), residual)
    tiled = _mosaic_split(inputs, *split)
    results = []
    for weight in weights:
        own = [next(biases) for _ in _outputs(weight)]
        weight = from_tiles(weight) if isinstance(weight, Halved) else weight
        results += _mosaic_product(tiled, rows, weight, own, call.bits, inputs[0].dtype, call.device, residual)
    return results


# Under `jit` of their own: a model has hundreds of layers in a handful of shapes, and JAX traces and lowers an inner function
# once per shape. Without, a LLaMA-2-7B took four minutes to lower, seven seconds a block.
@functools.partial(jax.jit, static_argnames=("base", "bits", "producer", "device", "clip"))
def _mosaic_split(
    inputs: Any,
    columns: Any,
    base: int,
    bits: int,
    producer: Producer,
    parameters: Any,
    device: Device,
    clip: tuple[int, int] | None,
) -> Any:
    from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer

    return mosaic_layer.split(inputs, columns, base, bits, producer, parameters, device, clip)


@functools.partial(jax.jit, static_argnames=("base", "bits", "producer", "device", "clip"))
def _mosaic_row(
    inputs: Any,
    columns: Any,
    base: int,
    bits: int,
    producer: Producer,
    parameters: Any,
    device: Device,
    clip: tuple[int, int] | None,
    packed: Packed | Tiled | Joined,
    biases: Any,
    residual: Any,
) -> list[jax.Array]:
    from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer

    row = mosaic_layer.unsplit(inputs, columns, base, bits, producer, parameters, clip)
    return mosaic_layer.product(row, 1, packed, biases, bits, inputs[0].dtype, device, residual)


@functools.partial(jax.jit, static_argnames=("rows", "bits", "out_dtype", "device"))
def _mosaic_product(
    tiled: Any,
    rows: int,
    packed: Packed | Tiled | Joined,
    biases: Any,
    bits: int,
    out_dtype: Any,
    device: Device,
    residual: Any,
) -> list[jax.Array]:
    from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer

    return mosaic_layer.product(tiled, rows, packed, biases, bits, out_dtype, device, residual)


def _run_triton(call: _Call, inputs: Any, parameters: Any, weights: Any, biases: Any, rows: int, _: Any) -> list[jax.Array]:
    from quikjax.pallas_kernels.quik_linear import triton as triton_layer

    del rows
    return triton_layer.run(inputs, parameters, call.producer, [triton_layer.readable(w) for w in weights], biases, call.bits)


_RUNNERS = {"mosaic": _run_mosaic, "triton": _run_triton, "xla": _run_xla}
