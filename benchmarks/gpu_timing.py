"""Timing of JAX programs: device time by CUPTI on a GPU, wall time without one; medians over several input sets."""

import concurrent.futures
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# An H100 has 50 MB of L2, an H200 60; input sets together are several times that.
BEYOND_CACHES = 256 * 2**20
MOST_SETS = 16
# An idle GPU runs at a sixth of its clock and takes some hundredths of a second to leave it.
WARM_UP_SECONDS = 0.15

Sets = Sequence[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: each sample is the mean over the input sets of one repetition. Compiling apart, in seconds.

    `clock` says what was measured: `device` is the sum of the kernels' own times (gaps between kernels are not in it), `queue`
    and `wall` are the host's clock, around calls that are waited for together or one by one.
    """

    samples: tuple[float, ...]
    compile_seconds: float
    clock: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function, called with argument sets of one shape."""

    call: Callable[..., Any]
    compile_seconds: float

    @property
    def peak_bytes(self) -> int | None:
        """Device memory that one call needs: arguments, results and temporaries, shared buffers once."""
        memory = getattr(self.call, "memory_analysis", lambda: None)()
        if memory is None:
            return None
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return int(kept + memory.temp_size_in_bytes)


def without_graphs(flags: str) -> dict[str, str]:
    """Environment for processes that read the device clock: XLA's flags, and no CUDA graphs.

    XLA's own sources say that launching a graph while CUPTI traces corrupts memory.
    """
    return {"XLA_FLAGS": f"{flags} --xla_gpu_enable_command_buffer=".strip()}


def compile_all(
    jobs: Sequence[tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]],
    threads: int = 8,
    report: Callable[[str], None] = lambda text: None,
) -> list[Any]:
    """A `Program` for each `(function, arguments, donated)`, or the exception that it ended with; compiled side by side.

    One set's program, called for every set: with all sets in one program XLA would fuse across them. `report` is told of each
    program lowered and compiled: a whole model's take minutes.
    """
    started = time.perf_counter()

    def told(step: str, result: Any) -> Any:
        outcome = f"failed: {type(result).__name__}" if isinstance(result, Exception) else "done"
        report(f"{step} of a program {outcome}, {time.perf_counter() - started:.0f} s")
        return result

    def lower(job: Any) -> Any:
        function, arguments, donated = job
        start = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        return lowered, time.perf_counter() - start

    def finish(job: Any) -> Any:
        lowered, seconds = job
        start = time.perf_counter()
        return Program(lowered.compile(), seconds + time.perf_counter() - start)

    def guarded(step: Callable[[Any], Any], job: Any) -> Any:
        try:
            return job if isinstance(job, Exception) else step(job)
        except Exception as failure:
            return failure

    # Lowering is Python and gains nothing from threads.
    lowered = [told("lowering", guarded(lower, job)) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        return list(pool.map(lambda job: told("compilation", guarded(finish, job)), lowered))


@dataclasses.dataclass(frozen=True)
class Clock:
    """How to time: `device` is CUPTI's sum of kernel times, `wall` is the host's clock around calls that are waited for."""

    kind: str
    repetitions: int = 20
    threads: int = 8

    def time(self, function: Callable[..., Any], sets: Sets) -> Timing:
        """Compile `function` and time it over the argument sets, in order."""
        (program,) = compile_all([(function, sets[0], ())], 1)
        if isinstance(program, Exception):
            raise program
        return self.time_program(program, sets)

    def time_program(self, program: Program, sets: Sets) -> Timing:
        """Time a compiled program over the argument sets, in order, so that no set is still in the caches when it comes again."""

        def once() -> None:
            # Results are dropped as soon as they are there: those of a repetition may not all fit.
            for arguments in sets:
                result = program.call(*arguments)
            jax.block_until_ready(result)

        self._warm_up(once)
        clock = "wall"
        if self.kind == "device":
            samples = _device_samples(once, self.repetitions)
            clock = "device" if samples else "queue"
        else:
            samples = None
        samples = samples or [_host_milliseconds(once) for _ in range(self.repetitions)]
        return Timing(tuple(sample / len(sets) for sample in samples), program.compile_seconds, clock)

    def time_steps(self, program: Program, arguments: tuple[Any, ...], state: Any, steps: int) -> tuple[Timing, Any]:
        """Time `result, state = program(*arguments, state)`, the state donated, `steps` at a time before the host waits.

        So the host prepares a step while the device runs the one before, as in a loop that nobody waits for. Returns the state.
        """

        def several(state: Any) -> Any:
            for _ in range(steps):
                result, state = program.call(*arguments, state)
            jax.block_until_ready((result, state))
            return state

        deadline = time.perf_counter() + (WARM_UP_SECONDS if self.kind == "device" else 0)
        state = several(state)
        while time.perf_counter() < deadline:
            state = several(state)
        samples = []
        for _ in range(self.repetitions):
            start = time.perf_counter()
            state = several(state)
            samples.append((time.perf_counter() - start) * 1e3 / steps)
        return Timing(tuple(samples), program.compile_seconds, "queue"), state

    def _warm_up(self, once: Callable[[], None]) -> None:
        deadline = time.perf_counter() + (WARM_UP_SECONDS if self.kind == "device" else 0)
        once()
        while time.perf_counter() < deadline:
            once()


def _host_milliseconds(once: Callable[[], None]) -> float:
    start = time.perf_counter()
    once()
    return (time.perf_counter() - start) * 1e3


def _device_samples(once: Callable[[], None], repetitions: int) -> list[float] | None:
    """Milliseconds of kernels in each repetition, or None where CUPTI gives no such numbers.

    JAX's own `profiler.measure` calls one program with one set of arguments: its weights would come out of the L2.
    """
    # Attaching takes a while, in which the clock may fall again: the first repetitions are left out.
    warm = 3
    try:
        from jax.experimental.mosaic.gpu import profiler

        cupti: Any = profiler.mosaic_gpu_lib._mosaic_gpu_ext
        cupti._cupti_init()
    except Exception:
        return None
    try:
        for _ in range(warm + repetitions):
            once()
    finally:
        kernels = cupti._cupti_get_timings(True)
    each, odd = divmod(len(kernels), warm + repetitions)
    if each == 0 or odd:
        return None
    return [sum(ms for _, ms in kernels[each * i : each * (i + 1)]) for i in range(warm, warm + repetitions)]


def size(arrays: Any) -> int:
    """Bytes of arrays on a device, where int4 takes half a byte."""
    return sum(leaf.size * (4 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize * 8) // 8 for leaf in jax.tree.leaves(arrays))


def make_sets(make: Callable[[jax.Array], tuple[Any, ...]], seed: int, few: bool) -> list[tuple[Any, ...]]:
    """Fresh random argument sets, as many as together outgrow the caches (two in a dry run)."""
    first = make(jax.random.key(seed))
    count = 2 if few else max(2, min(MOST_SETS, -(-BEYOND_CACHES // max(1, size(first)))))
    return [first] + [make(jax.random.key(seed + 1 + i)) for i in range(count - 1)]
