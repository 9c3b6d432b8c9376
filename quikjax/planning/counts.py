"""Times that bytes and operations would make, for layers in QUIK format and in bf16, where nothing can be timed.

A kernel takes a fixed time and the longer of its bytes at the device's bandwidth and its operations at its rate. What is assumed
of a device is in `ASSUMED`; nothing is measured, and `benchmarks/gpu.py` is what a prediction is to be held against.
`benchmarks/counted.py` prints these for the models of `arg_specs`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from quikjax.pallas_kernels import api, layout, tuned
from quikjax.pallas_kernels.arg_specs import LinearSpec
from quikjax.pallas_kernels.devices import H100, Device
from quikjax.pallas_kernels.quik_linear import mosaic as mosaic_layer
from quikjax.pallas_kernels.quik_linear.mosaic import row_form
from quikjax.pallas_kernels.quik_matmul.tiles import COMPUTE, K_STEP, MatmulTiles, outlier_step, shortened


@dataclasses.dataclass(frozen=True)
class Assumed:
    """Bytes a second as a large copy reaches them, bf16 operations a second of a large product, int8 twice as many."""

    name: str
    bandwidth: float
    rate: float
    # Microseconds of a kernel beside its bytes and operations: launch, first loads, last stores.
    fixed: float = 2.5
    # Microseconds of one row's split inside a product, while the ring fills with weights.
    split: float = 2.0


ASSUMED = (Assumed("H100", 3.0e12, 798e12), Assumed("H200", 4.3e12, 798e12))


def assumed_of(device: Device) -> Assumed | None:
    """The assumptions about a device, or `None`: there are none about others than Hopper's GPUs."""
    return next((assumed for assumed in ASSUMED if device.hopper and assumed.name in device.kind), None)


@dataclasses.dataclass(frozen=True)
class Count:
    """The demands of one layer on a device: bytes of its split and of its product, and operations at the bf16 rate."""

    split_bytes: int
    product_bytes: int
    operations: float
    dense_bytes: int
    dense_operations: float


def count(spec: LinearSpec, rows: int, outputs: tuple[int, ...] | None = None, residual: bool = False) -> Count:
    """Bytes and operations of one layer for `rows` tokens: what the kernels move, padding included.

    `outputs`: of several joined layers, each its own; left out, the layer's alone. `residual`: it is read, and added.
    """
    outputs = (spec.outputs,) if outputs is None else outputs
    base, kept = layout.round_up(spec.base, layout.COLUMN_TILE), layout.round_up(spec.outliers, layout.COLUMN_TILE)
    there = layout.round_up(rows, 8)
    # Inputs and column indices in; codes, outliers, scale and zero out.
    split = rows * spec.inputs * 2 * spec.producer.inputs + 4 * (base + kept) + 2 * spec.inputs * spec.producer.parameters
    written = rows * (base + 2 * kept + 8)
    n, b = sum(layout.round_up(n, layout.WEIGHT_TILE) for n in outputs), layout.round_up(spec.base, layout.WEIGHT_TILE)
    o = layout.round_up(spec.outliers, layout.OUTLIER_TILE)
    weight = n * (b * spec.weight_bits // 8 + 2 * o + 8 + 4 * spec.bias)
    read = there * (b + 2 * o + 8)
    return Count(
        split_bytes=split + written,
        product_bytes=weight + read + (1 + residual) * there * sum(outputs) * 2,
        operations=2 * rows * sum(outputs) * (spec.base / 2 + spec.outliers),
        dense_bytes=2 * (rows * spec.inputs + sum(outputs) * spec.inputs + rows * sum(outputs)),
        dense_operations=2.0 * rows * sum(outputs) * spec.inputs,
    )


def joined(spec: LinearSpec, outputs: tuple[int, ...]) -> LinearSpec:
    """Layers that are one product, as one layer."""
    return dataclasses.replace(spec, outputs=sum(layout.round_up(n, layout.WEIGHT_TILE) for n in outputs))


def splits_inside(spec: LinearSpec, rows: int) -> bool:
    """Tell whether the layer is one kernel, whose thread blocks split its one row themselves."""
    shape = jax.ShapeDtypeStruct
    packed = api.Packed(
        qweight=shape((spec.outputs, spec.base), jnp.int4 if spec.weight_bits == 4 else jnp.int8),
        scale=shape((spec.outputs,), jnp.float32),
        reduced=shape((spec.outputs,), jnp.float32),
        outliers=shape((spec.outputs, spec.outliers), jnp.bfloat16),
        columns=shape((spec.inputs,), jnp.int32),
        base=spec.base,
        inputs=spec.inputs,
        outputs=spec.outputs,
    )
    return mosaic_layer.splits_inside(rows, spec.inputs, jnp.bfloat16, packed, spec.bits, spec.producer, H100)


def tiles_of(spec: LinearSpec, rows: int, outputs: tuple[int, ...], inside: bool) -> MatmulTiles:
    """The tiles of the product of layers that are one, its ring shortened where it splits its row itself (`inside`)."""
    whole, base = joined(spec, outputs), layout.round_up(spec.base, layout.WEIGHT_TILE)
    tiles, _ = tuned.matmul_tiles(rows, whole.outputs, base, spec.weight_bits, spec.bits, H100)
    if not inside:
        return tiles
    form = row_form(spec.inputs, jnp.bfloat16, spec.base, spec.bits, spec.producer)
    outliers = layout.round_up(spec.outliers, layout.OUTLIER_TILE) // outlier_step(spec.weight_bits)
    more = form.shared_memory(tiles, base // K_STEP, outliers, spec.weight_bits)
    return shortened(tiles, spec.weight_bits, spec.bits, more=more)


def microseconds(device: Assumed, bytes_: int, operations: float) -> float:
    """Predicted time of one kernel."""
    return device.fixed + 1e6 * max(bytes_ / device.bandwidth, operations / device.rate)


def microseconds_of_row(device: Assumed, found: Count, spec: LinearSpec, outputs: int, tiles: MatmulTiles) -> float:
    """Predicted time of a product that splits its row: nothing is multiplied meanwhile, but the ring fills."""
    slot = COMPUTE * tiles.n * K_STEP * spec.weight_bits // 8
    blocks = min(H100.cores, outputs // (COMPUTE * tiles.n) * tiles.splits)
    arrived = min(blocks * tiles.stages * slot, found.product_bytes)
    exposed = max(0.0, device.split - 1e6 * arrived / device.bandwidth)
    # Inputs and columns are read by the first thread block from memory, by the others out of L2.
    read = spec.inputs * (2 * spec.producer.inputs + 4 + 2 * spec.producer.parameters)
    return exposed + microseconds(device, found.product_bytes + read, found.operations)


def quik_microseconds(
    device: Assumed, spec: LinearSpec, rows: int, products: list[tuple[int, ...]], residual: bool = False, inside: bool = False
) -> float:
    """Predicted time of layers that read one tensor in QUIK format: a split, and products of the outputs of joined layers.

    `inside`: there is one product, which splits its row itself.
    """
    counts = [count(spec, rows, outputs, residual) for outputs in products]
    if inside:
        (found,), (outputs,) = counts, products
        return microseconds_of_row(device, found, spec, joined(spec, outputs).outputs, tiles_of(spec, rows, outputs, inside))
    return microseconds(device, counts[0].split_bytes, 0.0) + sum(
        microseconds(device, found.product_bytes, found.operations) for found in counts
    )


def dense_microseconds(device: Assumed, spec: LinearSpec, rows: int, outputs: tuple[int, ...]) -> float:
    """Predicted time of the same layers in bf16, a product each."""
    each = [count(spec, rows, (n,)) for n in outputs]
    return sum(microseconds(device, found.dense_bytes, found.dense_operations) for found in each)
