"""Decoding compiled for a GPU that is not there: kernels, bytes copied and compile time, scanned and unrolled (`counted.py`)."""

import dataclasses
import functools
import os
from typing import Any

import absent_gpu
import gpu_model
import hlo
import jax
import jax.numpy as jnp

from quikjax.generation import decode
from quikjax.generation.settings import Sampling
from quikjax.models import cache as caches
from quikjax.pallas_kernels.devices import H100, tracing_for

_SLOTS = 256


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The compiled program of a chunk of tokens, which loops over them, and the CPU seconds that its compilation took."""

    compiled: absent_gpu.Compiled
    program: hlo.Program
    seconds: float

    @property
    def copied(self) -> int:
        """Bytes of the model's own arrays that are copied for kernels to read, for every token."""
        return sum(array.bytes * times for array, times in self.program.copied_for_kernels())

    @property
    def copies(self) -> int:
        """How many copies those are, for every token."""
        return sum(times for _, times in self.program.copied_for_kernels())


def compiled(fields: gpu_model.Fields, *, unrolled: bool | None = None, rows: int = 1, dtype: Any = jnp.bfloat16) -> Decoding:
    """The program that decodes `rows` texts with a QUIK-4B model of a published shape, for an absent H100. Allocates nothing."""
    made: dict[str, Any] = {}

    def build() -> Any:
        made["model"] = gpu_model.build(fields, True, dtype, unrolled)
        return made["model"].params

    with tracing_for(H100):
        params = jax.eval_shape(build)
        layout = made["model"].layout
        shape = (layout.config.layers, layout.config.kv_heads, rows, _SLOTS, layout.config.head_size)
        one = jax.ShapeDtypeStruct((rows,), jnp.int32)
        state = decode.State(
            cache=jax.eval_shape(lambda: caches.empty_cache(*shape, kind=layout.dtype)),
            last=one,
            at=one,
            running=jax.ShapeDtypeStruct((rows,), jnp.bool_),
            step=one,
            keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),
        )
        stops, limit = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        values = jax.eval_shape(lambda: Sampling().values())
        start = sum(os.times()[:4])
        chunk = functools.partial(decode.chunk, layout, kind=decode.Kind())
        lowered = absent_gpu.lower("h100", chunk, params, state, stops, values, limit, donate=(1,))
        found = absent_gpu.compile_lowered(lowered)
    return Decoding(found, hlo.Program(found.hlo), sum(os.times()[:4]) - start)


def table(rows: int, depths: tuple[int, int]) -> list[str]:
    """LLaMA-2-7B's shape, both ways, as a markdown table."""
    few, many = depths
    lines = [f"| LLaMA-2-7B, {rows} row{'s' if rows > 1 else ''} | launched a block | copies a block | MB copied a block |"]
    lines[0] += f" CPU seconds to compile {few} blocks | {many} blocks |"
    lines.append("|---" * 6 + "|")
    for name, unrolled in (("one scan over stacked blocks", False), ("blocks unrolled", True)):
        short, long = (
            compiled(gpu_model.LLAMA_2_7B | {"num_hidden_layers": depth}, unrolled=unrolled, rows=rows) for depth in depths
        )
        blocks = many - few
        launched = (long.program.launched() - short.program.launched()) / blocks
        copies, copied = (long.copies - short.copies) / blocks, (long.copied - short.copied) / blocks
        lines.append(
            f"| {name} | {launched:.1f} | {copies:.1f} | {copied / 1e6:.1f} | {short.seconds:.1f} | {long.seconds:.1f} |"
        )
    return lines
