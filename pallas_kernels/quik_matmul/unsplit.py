"""The split inside the product, for one row: each thread block makes it before its first product.

A row is short, and every thread block needs all of its range, so each makes the whole split for itself while the memory warpgroup
already fills the ring with weights: a kernel less to launch, and no codes that cross memory.

    memory warpgroup        x ----> shared memory, then weights into the ring
    compute warpgroups      gather, norm, minimum and maximum, as `split_quantize` does them (and with its code)
                            codes and outliers of this block's steps -> shared memory, as the operands of its products

The tensor core's second operand has eight rows at least: the one row is written to all of them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from quikjax.pallas_kernels import hopper, layout
from quikjax.pallas_kernels.quik_matmul.tiles import COMPUTE, K_STEP, MatmulTiles, outlier_step, shortened
from quikjax.pallas_kernels.reference import LevelClip
from quikjax.pallas_kernels.split_quantize import mosaic as split_kernel
from quikjax.pallas_kernels.split_quantize.producers import Producer

ROWS = 8  # of the tensor core's second operand, at least
FEWEST_STAGES = 4  # of the ring: fewer would not keep memory busy
MOST_VALUES = 128  # a thread's: with 174 (a LayerNorm of 14848 columns) hundreds of bytes spilled


@dataclasses.dataclass(frozen=True)
class Unsplit:
    """A row that is not split yet.

    `inputs` `[1, K]` each and `parameters` `[K]` each are what `producer` reads; `columns` int32 in tile form, `base` of them
    true base columns.
    """

    inputs: tuple[jax.Array, ...]
    columns: jax.Array
    parameters: tuple[jax.Array, ...]
    base: int
    producer: Producer
    clip: LevelClip

    @property
    def form(self) -> "Form":
        k, dtype = self.inputs[0].shape[1], self.inputs[0].dtype
        return Form(self.producer, k, self.base, len(self.columns), jnp.dtype(dtype), self.clip)

    def operands(self) -> list[jax.Array]:
        """The kernel's arrays, the inputs in lines that the copy engine takes."""
        unit = self.form.unit
        return [*[x.reshape(-1, unit) for x in self.inputs], self.columns, *self.parameters]


@dataclasses.dataclass(frozen=True)
class Form:
    """The static properties of an `Unsplit`, and the shared memory that it needs."""

    producer: Producer
    inputs: int
    base: int
    columns: int
    dtype: Any
    clip: LevelClip

    @property
    def unit(self) -> int:
        unit = hopper.row_unit(self.inputs)
        assert unit is not None, "why_not refuses such widths"
        return unit

    @property
    def padded_base(self) -> int:
        return layout.round_up(self.base, layout.COLUMN_TILE)

    @property
    def count(self) -> int:
        """Arrays of `Unsplit.operands`."""
        return self.producer.inputs + 1 + self.producer.parameters

    def scratch(self, tiles: MatmulTiles, base_steps: int, outlier_steps: int, weight_bits: int) -> dict[str, Any]:
        """Shared memory: the staged row, places to reduce in, and the operands of a thread block's steps."""
        lines = split_kernel.staged_lines(self.inputs, self.dtype)
        copies = self.producer.inputs * math.ceil(self.inputs // self.unit / hopper.LONGEST_BOX)
        found: dict[str, Any] = {
            "staged": plgpu.SMEM((1, self.producer.inputs, lines, self.unit), self.dtype),
            "slots": plgpu.SMEM((split_kernel.Slots.count(1, COMPUTE),), jnp.float32),
            "staged_there": plgpu.Barrier(num_arrivals=copies),
            "meet": plgpu.Barrier(num_arrivals=COMPUTE),
            "tokens": hopper.swizzled((math.ceil(base_steps / tiles.splits), ROWS, K_STEP), jnp.int8),
        }
        if outlier_steps:
            steps = math.ceil(outlier_steps / tiles.splits)
            found["tokens16"] = hopper.swizzled((steps, ROWS, outlier_step(weight_bits)), self.dtype)
        return found

    def why_not(self, tiles: MatmulTiles, base: int, outliers: int, weight_bits: int, bits: int) -> str | None:
        """`None` when the product's kernel can split, otherwise the reason. `base` and `outliers` are the weight's, padded."""
        split_tiles = split_kernel.SplitTiles(1, COMPUTE)
        reason = split_kernel.why_not(
            self.inputs, self.padded_base, self.columns - self.padded_base, self.dtype, self.producer, split_tiles
        )
        if reason is not None:
            return reason
        values = (1 + self.producer.parameters) * self.columns // (COMPUTE * hopper.WARPGROUP)
        if values > MOST_VALUES:
            return f"{values} values per thread do not fit into registers"
        if tiles.m != ROWS:
            return f"tiles of {tiles.m} rows are not the tensor core's least"
        more = self.shared_memory(tiles, base // K_STEP, outliers // outlier_step(weight_bits), weight_bits)
        if shortened(tiles, weight_bits, bits, more=more).stages < min(tiles.stages, FEWEST_STAGES):
            return f"{more} bytes of activations leave no room for weights on their way"
        return None

    def shared_memory(self, tiles: MatmulTiles, base_steps: int, outlier_steps: int, weight_bits: int) -> int:
        """Bytes of `scratch`, barriers left out."""
        shapes = [item for item in self.scratch(tiles, base_steps, outlier_steps, weight_bits).values() if hasattr(item, "dtype")]
        return sum(math.prod(item.shape) * jnp.dtype(item.dtype).itemsize for item in shapes)


def stage(form: Form, refs: tuple[Any, ...], scratch: dict[str, Any]) -> None:
    """The memory warpgroup: bring the row into shared memory."""
    lines = form.inputs // form.unit
    for j, x in enumerate(refs[: form.producer.inputs]):
        for first in range(0, lines, hopper.LONGEST_BOX):
            part = pl.ds(first, min(hopper.LONGEST_BOX, lines - first))
            plgpu.copy_gmem_to_smem(x.at[part], scratch["staged"].at[0, j, part], scratch["staged_there"])


def split(
    form: Form,
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
    bits: int,
    group: Any,
    base: tuple[int, int, Any],
    outliers: tuple[int, int, Any],
) -> tuple[Any, Any]:
    """The compute warpgroups: write the operands of this thread block's steps; the row's scale and zero.

    `base` and `outliers` name those steps: how many there are in all, every how manieth is this block's, and its first.
    """
    columns, norm = refs[form.producer.inputs], refs[form.producer.inputs + 1 :]
    plgpu.barrier_wait(scratch["staged_there"])

    def meet_all() -> None:
        plgpu.barrier_arrive(scratch["meet"])
        plgpu.barrier_wait(scratch["meet"])

    slot = split_kernel.Slots(scratch["slots"], group, 1, COMPUTE)
    arguments = (columns, scratch["staged"], norm, form.inputs, form.base, form.padded_base, form.producer, slot, meet_all)
    parts = split_kernel.gather(*arguments)
    quantizer = split_kernel.Quantizer(0, slot, form.clip, bits)
    for part in parts:
        is_base = part.first < form.padded_base
        target = scratch["tokens"] if is_base else scratch["tokens16"]
        values = quantizer.codes(part.values[0]) if is_base else part.values[0]
        steps, apart, first = base if is_base else outliers
        hopper.store_in_every_row(
            target, values, part.layout, part.start - part.first, first=jnp.int32(first), apart=apart, steps=steps
        )
    # What the threads wrote is the tensor core's to read, in both warpgroups.
    plgpu.commit_smem()
    meet_all()
    return quantizer.scale, quantizer.zero
