"""Timing of JAX programs: device time by CUPTI on a GPU, wall time without one; medians over several input sets."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# An H100 has 50 MB of L2, an H200 the same; input sets together are several times that.
BEYOND_CACHES = 256 * 2**20
MOST_SETS = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: each sample is the mean over the input sets of one repetition. `compile` apart, in seconds."""

    samples: tuple[float, ...]
    compile_seconds: float
    clock: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclasses.dataclass(frozen=True)
class Clock:
    """How to time: `device` is CUPTI's sum of kernel times, `wall` is the host's clock around calls that are waited for."""

    kind: str
    repetitions: int = 20

    def time(self, function: Callable[..., Any], sets: Sequence[tuple[Any, ...]], wall: bool = False) -> Timing:
        """Time `function(*arguments)` over the argument sets, in order, in one compiled program each repetition."""

        @jax.jit
        def all_sets(sets: Sequence[tuple[Any, ...]]) -> list[Any]:
            return [function(*arguments) for arguments in sets]

        start = time.perf_counter()
        jax.block_until_ready(all_sets(sets))
        compile_seconds = time.perf_counter() - start
        jax.block_until_ready(all_sets(sets))
        if self.kind == "device" and not wall:
            from jax.experimental.mosaic.gpu import profiler

            _, measured = profiler.measure(all_sets, iterations=self.repetitions)(sets)
            if measured is None:
                raise RuntimeError("CUPTI saw no kernel: the program did not run on the GPU")
            # One repetition comes back as a number, several as a list.
            values = measured if isinstance(measured, list) else [measured]
            return Timing(tuple(value / len(sets) for value in values), compile_seconds, "device")
        samples = []
        for _ in range(self.repetitions):
            start = time.perf_counter()
            jax.block_until_ready(all_sets(sets))
            samples.append((time.perf_counter() - start) * 1e3 / len(sets))
        return Timing(tuple(samples), compile_seconds, "wall")


def size(arrays: Any) -> int:
    """Bytes of arrays on a device, where int4 takes half a byte."""
    return sum(leaf.size * (4 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize * 8) // 8 for leaf in jax.tree.leaves(arrays))


def make_sets(make: Callable[[jax.Array], tuple[Any, ...]], seed: int, few: bool) -> list[tuple[Any, ...]]:
    """Fresh random argument sets, as many as together outgrow the caches (two in a dry run)."""
    first = make(jax.random.key(seed))
    count = 2 if few else max(2, min(MOST_SETS, -(-BEYOND_CACHES // max(1, size(first)))))
    return [first] + [make(jax.random.key(seed + 1 + i)) for i in range(count - 1)]
