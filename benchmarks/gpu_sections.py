"""The benchmark's measurements, section by section, in a process that holds the GPU: cases by name, each giving rows."""

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gpu_checks
import gpu_model
import gpu_peers
import gpu_timing
import jax
import jax.numpy as jnp
from gpu_report import OPS_TARGETS, size_name
from isolated import Row, first_line, progress

from quikjax.models.attention import attend
from quikjax.models.base import Positions
from quikjax.pallas_kernels import api
from quikjax.pallas_kernels.arg_specs import MODELS, LinearSpec

Make = Callable[[jax.Array], tuple[Any, ...]]
FORMATS = ((4, 4), (8, 8), (4, 8), (4, 16))


class Run:
    """The things every case needs: the device, the clock, the ceilings measured before, and where its rows go."""

    def __init__(self, given: Mapping[str, Any]):
        self.dry, self.backend = bool(given["dry"]), str(given["backend"])
        self.every, self.threads = bool(given["every"]), int(given["threads"])
        self.device = api.current_device()
        repetitions = 1 if self.dry else int(given["repetitions"])
        self.clock = gpu_timing.Clock("wall" if self.dry else "device", repetitions, self.threads)
        self.dtype = jnp.bfloat16
        self.bandwidth, self.rate = float(given.get("bandwidth", 0)), float(given.get("rate", 0))
        self.emit: Callable[[Row], None] = lambda row: None

    def shape(self, *numbers: int) -> tuple[int, ...]:
        """Sizes as asked for, or a sixty-fourth of them in a dry run."""
        return tuple(max(8, n // 64 // 8 * 8) for n in numbers) if self.dry else numbers

    def rows(self, count: int) -> int:
        return min(count, 16) if self.dry else count

    def add(self, section: str, name: str, timing: gpu_timing.Timing | None = None, **details: Any) -> None:
        """One row; what was not measured or could not be reckoned is left out."""
        row = {"section": section, "name": name, **details}
        if timing is not None:
            row |= {"samples": timing.samples, "clock": timing.clock, "compile_seconds": timing.compile_seconds}
        self.emit({key: value for key, value in row.items() if value is not None})

    def sets(self, make: Make) -> gpu_timing.Sets:
        return gpu_timing.make_sets(make, 0, self.dry)

    def time_all(self, section: str, jobs: Mapping[str, tuple[Callable[..., Any], gpu_timing.Sets, Row]]) -> dict[str, float]:
        """Compile all jobs side by side, time one after the other, a row for each. Returns the medians of what ran."""
        programs = gpu_timing.compile_all(
            [(function, sets[0], ()) for function, sets, _ in jobs.values()], self.threads, progress
        )
        medians = {}
        for (name, (_, sets, details)), program in zip(jobs.items(), programs, strict=True):
            try:
                if isinstance(program, Exception):
                    raise program
                timing = self.clock.time_program(program, sets)
            except Exception as failure:
                self.add(section, name, failed=first_line(failure))
                continue
            medians[name] = timing.median
            self.add(section, name, timing, **details)
        return medians

    def ideal(self, spec: LinearSpec, rows: int) -> float | None:
        """Milliseconds that bytes and operations of a QUIK layer take at this run's ceilings, int8 at twice the bf16 rate."""
        if not self.bandwidth:
            return None
        weights = spec.outputs * (spec.base * spec.weight_bits / 8 + spec.outliers * 2 + 8)
        out = rows * spec.outputs * 2
        if spec.bits == 16:
            move, read = 0, weights + rows * spec.inputs * 2 + out
            work: float = 2 * rows * spec.outputs * spec.inputs
        else:
            split = rows * (spec.base + 2 * spec.outliers + 8)
            move, read = rows * spec.inputs * 2 + split, weights + split + out
            work = 2 * rows * spec.outputs * (spec.base / 2 + spec.outliers)
        return 1e3 * (move / self.bandwidth + max(read / self.bandwidth, work / self.rate))

    def ideal_bf16(self, rows: int, outputs: int, inputs: int) -> float | None:
        """The same of a bf16 layer."""
        if not self.bandwidth:
            return None
        read = 2 * (rows * inputs + outputs * inputs + rows * outputs)
        return 1e3 * max(read / self.bandwidth, 2 * rows * outputs * inputs / self.rate)


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)


def _tensors(*shapes: tuple[int, ...]) -> Make:
    """Makes random bfloat16 tensors from a key."""
    return lambda key: tuple(_normal(jax.random.fold_in(key, i), *shape) for i, shape in enumerate(shapes))


def _layer(run: Run, spec: LinearSpec) -> Callable[..., Any]:
    return lambda x, packed: api.linears((x,), [packed], [None], spec.bits, backend=run.backend)[0]


def _layers(run: Run, spec: LinearSpec, rows: int) -> gpu_timing.Sets:
    return run.sets(lambda key: gpu_peers.random_layer(key, spec, rows, run.dtype))


def _dense(run: Run, rows: int, outputs: int, inputs: int) -> tuple[Callable[..., Any], gpu_timing.Sets, Row]:
    sets = run.sets(_tensors((rows, inputs), (outputs, inputs)))
    name = f"bf16 {size_name(rows, outputs, inputs)}"
    return gpu_peers.bf16, sets, {"of": name, "ideal_milliseconds": run.ideal_bf16(rows, outputs, inputs)}


def ceilings(run: Run, case: str) -> None:
    """Copy bandwidth and the bf16 product's rate, which everything is held against; device and versions."""
    import jaxlib

    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": platform.python_version()}
    run.emit({"device": str(run.device), "platform": run.device.platform, "versions": versions})
    if run.device.platform != "gpu" and not run.dry:
        return
    (length,), (n,) = run.shape(2**28), run.shape(8192)
    copy = run.clock.time(lambda x: x + 1, run.sets(lambda key: (jax.random.randint(key, (length,), 0, 9, jnp.int32),)))
    run.add("ceilings", "copy", copy, moved_bytes=8 * length)
    square = run.clock.time(gpu_peers.bf16, run.sets(_tensors((n, n), (n, n))))
    run.add("ceilings", "bf16 product", square, operations=2 * n**3)


def correctness(run: Run, case: str) -> None:
    """Codes and accumulators bit for bit, results within a bound of float64, before anything is timed."""
    spec, rows = gpu_checks.cases(run.every)[case]
    if run.dry:
        spec, rows = gpu_checks.dry(spec, rows)
    try:
        run.add("correctness", case, None, **gpu_checks.check(spec, rows, run.dtype, run.backend))
    except Exception as failure:
        run.add("correctness", case, failed=first_line(failure))


def _targets() -> dict[str, tuple[int, int, int]]:
    return {size_name(m, n, k): (m, n, k) for counts, n, k, *_ in OPS_TARGETS for m in counts}


def ops(run: Run, case: str) -> None:
    """The issue's table: QUIK layers and XLA's peers, each QUIK layer compared with the reference before it is timed."""
    rows, outputs, inputs = _targets()[case]
    rows, (outputs, inputs) = run.rows(rows), run.shape(outputs, inputs)
    size = size_name(rows, outputs, inputs)
    of = f"bf16 {size}"
    run.time_all("ops", {of: _dense(run, rows, outputs, inputs)})

    quik: dict[str, tuple[Callable[..., Any], gpu_timing.Sets, Row]] = {}
    for weight_bits, bits in FORMATS:
        spec = LinearSpec("ops", "", outputs, inputs, inputs // 16, weight_bits, bits)
        details = {"of": of, "ideal_milliseconds": run.ideal(spec, rows)}
        quik[f"QUIK W{weight_bits}A{bits} {size}"] = _layer(run, spec), _layers(run, spec, rows), details
    for name, ((_, bits), (function, sets, _)) in zip(list(quik), zip(FORMATS, quik.values(), strict=True), strict=True):
        try:
            want = jax.jit(lambda x, w, bits=bits: api.linears((x,), [w], [None], bits, backend="xla")[0])(*sets[0])
            gpu_checks.poison(rows * outputs)
            error = gpu_checks.distance(jax.jit(function)(*sets[0]), want)
            # Two roundings to bfloat16 are half of this.
            if not error <= 2**-8:
                raise ValueError(f"results differ from the reference by {error:.1e}: not timed")
        except Exception as failure:
            run.add("ops", name, failed=first_line(failure))
            del quik[name]
    run.time_all("ops", quik)

    def sides(dtype: Any) -> Make:
        def make(key: jax.Array) -> tuple[Any, ...]:
            codes = jax.random.randint(key, (outputs, inputs), -8, 8, jnp.int8).astype(dtype)
            return _normal(key, rows, inputs), codes, jax.random.uniform(key, (outputs,), jnp.float32)

        return make

    peers = {
        f"XLA int4 weight-only {size}": (gpu_peers.xla_weight_only, run.sets(sides(jnp.int4)), {"of": of}),
        f"XLA int8, quantization apart {size}": (gpu_peers.xla_int8, run.sets(sides(jnp.int8)), {"of": of}),
    }
    run.time_all("ops", peers)


def torch(run: Run, case: str) -> None:
    """PyTorch's products at the same shapes, in a process without JAX's memory."""
    rows, outputs, inputs = _targets()[case]
    rows, (outputs, inputs) = run.rows(rows), run.shape(outputs, inputs)
    size = size_name(rows, outputs, inputs)
    for name, samples in gpu_peers.torch_peers(rows, outputs, inputs, run.clock.repetitions).items():
        if isinstance(samples, str):
            run.add("torch", f"{name} {size}", failed=samples)
        else:
            run.add("torch", f"{name} {size}", samples=samples, clock="events", of=f"bf16 {size}")


_SPLITS = {f"{rows} x {inputs}": (rows, inputs) for rows, inputs in ((2048, 4096), (2048, 8192), (2048, 28672), (1, 8192))}


def split(run: Run, case: str) -> None:
    """`split_quantize` and its fused forms, as a share of the copy bandwidth (bytes in plus bytes out)."""
    rows, inputs = _SPLITS[case]
    rows, (inputs,) = run.rows(rows), run.shape(inputs)
    outliers = inputs // 16
    columns = jax.random.permutation(jax.random.key(1), inputs).astype(jnp.int32)
    jobs: dict[str, tuple[Callable[..., Any], gpu_timing.Sets, Row]] = {}
    for producer in (api.Identity(), api.RmsNorm(), api.LayerNorm(), api.SiluMul(), api.Gelu()):
        parameters = tuple(jnp.ones(inputs, run.dtype) for _ in range(producer.parameters))

        def call(columns: Any, parameters: Any, *tensors: jax.Array, producer: Any = producer) -> Any:
            return api.split_quantize(
                tensors, columns, inputs - outliers, 4, producer=producer, parameters=parameters, backend=run.backend
            )

        make = _tensors(*[(rows, inputs)] * producer.inputs)
        moved = rows * (producer.inputs * inputs * 2 + (inputs - outliers) + 2 * outliers + 8)
        sets = [(columns, parameters, *tensors) for tensors in run.sets(make)]
        jobs[f"{type(producer).__name__} {rows} x {inputs}"] = call, sets, {"moved_bytes": moved}
    run.time_all("split", jobs)


_STAGES = {size_name(*shape): shape for shape in ((2048, 8192, 8192), (2048, 4096, 4096), (16, 8192, 8192))}
_OUTLIERS = (0, 64, 128, 256, 512, 1024)


def stages(run: Run, case: str) -> None:
    """The paper's stages, one after the other."""
    rows, outputs, inputs = _STAGES[case]
    rows, (outputs, inputs) = run.rows(rows), run.shape(outputs, inputs)
    size, spec = size_name(rows, outputs, inputs), LinearSpec("stages", "", outputs, inputs, inputs // 16)
    sets, of = _layers(run, spec, rows), f"bf16 for stages {size}"
    jobs: dict[str, tuple[Callable[..., Any], gpu_timing.Sets, Row]] = {of: (*_dense(run, rows, outputs, inputs)[:2], {"of": of})}
    for name, function in gpu_peers.ablation(4, run.device, run.backend).items():
        jobs[f"{name} {size}"] = function, sets, {"of": of, "ideal_milliseconds": run.ideal(spec, rows)}
    run.time_all("stages", jobs)


def outliers(run: Run, case: str) -> None:
    """Throughput against the number of outliers."""
    rows, (outputs, inputs) = run.rows(2048), run.shape(8192, 8192)
    jobs: dict[str, tuple[Callable[..., Any], gpu_timing.Sets, Row]] = {}
    for count in _OUTLIERS:
        spec = LinearSpec("outliers", "", outputs, inputs, min(count, inputs // 2))
        details = {"operations": 2 * rows * outputs * inputs, "ideal_milliseconds": run.ideal(spec, rows)}
        jobs[f"O={count}"] = _layer(run, spec), _layers(run, spec, rows), details
    run.time_all("outliers", jobs)


def blocks(run: Run, case: str) -> None:
    """One whole block of a large model reading 2048 tokens: linear layers, norms, attention."""
    rows = run.rows(2048)
    for name in ("bf16", "QUIK-4B"):
        built = gpu_model.build((gpu_model.TINY_BLOCKS if run.dry else gpu_model.BLOCKS)[case], name == "QUIK-4B", run.dtype)
        function, arguments = gpu_model.prefill(built, rows)
        details: Row = {"of": f"bf16 {case}, one block", "ideal_milliseconds": _ideal_prefill(run, built, rows)}
        run.time_all("blocks", {f"{name} {case}, one block": (function, [arguments], details)})
        del built, arguments


def model(run: Run, case: str) -> None:
    """LLaMA-2-7B's shape, random weights, QUIK-4B or bf16 under the same jit: memory; prefill and decode by the host's clock."""
    fields = gpu_model.TINY if run.dry else gpu_model.LLAMA_2_7B
    length, contexts = (16, (8, 32)) if run.dry else (2048, (128, 2048))
    built = gpu_model.build(fields, case == "QUIK-4B", run.dtype)
    run.add("model", f"{case} parameters", bytes=built.bytes, of="bf16 parameters")
    # Batch 1 first: the allocator's peak only grows.
    shapes = [(batch, context) for batch in (1, 16) for context in contexts]
    steps = {shape: gpu_model.decode(built, *shape) for shape in shapes}
    read, arguments = gpu_model.prefill(built, length)
    jobs = [(read, arguments, ()), *((function, inputs, (3,)) for function, inputs in steps.values())]
    reading, *decoding = gpu_timing.compile_all(jobs, run.threads, progress)
    programs = dict(zip(shapes, decoding, strict=True))
    needed = [program.peak_bytes for program in (reading, programs[1, contexts[-1]]) if isinstance(program, gpu_timing.Program)]
    name = "peak memory, batch 1, context 2048"
    if len(needed) == 2 and all(needed):
        run.add("model", f"{case} {name}", bytes=max(n for n in needed if n), of=f"bf16 {name}")

    prompt = f"{case} prefill of {length}"
    ideal = _ideal_prefill(run, built, length)
    _time_wall(run, reading, [arguments], prompt, of=f"bf16 prefill of {length}", ideal_milliseconds=ideal)
    for (batch, context), program in programs.items():
        label = f"decode batch {batch} context {context}"
        *inputs, cache = steps[batch, context][1]
        _decode(run, program, tuple(inputs), gpu_model.random_cache(cache), f"{case} {label}", f"bf16 {label}", built)
        if (batch, context) == (1, contexts[-1]):
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
            run.add("model", f"{case} allocator's peak so far, batch 1", bytes=peak, of="bf16 allocator's peak so far, batch 1")


def shares(run: Run, case: str) -> None:
    """The prefill of the same model by the device's clock, and where its time goes."""
    fields = gpu_model.TINY if run.dry else gpu_model.LLAMA_2_7B
    length = 16 if run.dry else 2048
    built = gpu_model.build(fields, case == "QUIK-4B", run.dtype)
    read, arguments = gpu_model.prefill(built, length)
    (reading,) = gpu_timing.compile_all([(read, arguments, ())], run.threads, progress)
    if isinstance(reading, Exception):
        raise reading
    timing, ideal = run.clock.time_program(reading, [arguments]), _ideal_prefill(run, built, length)
    name = f"prefill of {length}, device alone"
    run.add("model", f"{case} {name}", timing, of=f"bf16 {name}", ideal_milliseconds=ideal)
    if case == "QUIK-4B":
        _shares(run, fields, timing.median, length)


def _time_wall(run: Run, program: Any, sets: gpu_timing.Sets, name: str, **details: Any) -> None:
    if isinstance(program, Exception):
        run.add("model", name, failed=first_line(program))
        return
    clock = gpu_timing.Clock("wall", run.clock.repetitions, run.threads)
    run.add("model", name, clock.time_program(program, sets), **details)


def _decode(run: Run, program: Any, inputs: tuple[Any, ...], cache: Any, name: str, of: str, built: gpu_model.Model) -> None:
    """Time a step; beside it the time of the bytes it must move: parameters but the embedding, keys and values."""
    try:
        if isinstance(program, Exception):
            raise program
        embedding = 2 * built.fields["vocab_size"] * built.fields["hidden_size"]
        moved = built.bytes - embedding + gpu_timing.size(cache)
        timing, _ = run.clock.time_steps(program, inputs, cache, 2 if run.dry else 8)
        ideal = 1e3 * moved / run.bandwidth if run.bandwidth else None
        run.add("model", name, timing, of=of, ideal_milliseconds=ideal)
    except Exception as failure:
        run.add("model", name, failed=first_line(failure))


def _ideal_prefill(run: Run, built: gpu_model.Model, rows: int) -> float | None:
    """The least time of the linear layers, and of attention's products at the bf16 rate."""
    if not run.bandwidth:
        return None
    quantized = any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(built.params))
    hidden, layers = built.fields["hidden_size"], built.fields["num_hidden_layers"]
    linear = [run.ideal(s, rows) if quantized else run.ideal_bf16(rows, s.outputs, s.inputs) for s in built.linears]
    return sum(ms for ms in linear if ms) + 1e3 * layers * 2 * rows**2 * hidden / run.rate


def _shares(run: Run, fields: Mapping[str, Any], whole: float, rows: int) -> None:
    """Split prefill's time: each part timed alone at its shape, times the number of layers; the rest is what is left."""
    hidden, layers = fields["hidden_size"], fields["num_hidden_layers"]
    parts = {"split": 0.0, "integer product": 0.0, "outlier product": 0.0}
    for spec in MODELS["llama-2-7b"]:
        # q, k, v share one split, and so do gate and up.
        products = {"q": 3, "gate": 2}.get(spec.name, 1)
        outputs, inputs = run.shape(spec.outputs, spec.inputs)
        outliers = inputs // 16
        part = LinearSpec("shares", spec.name, outputs, inputs, outliers, spec.weight_bits, spec.bits)
        base = LinearSpec("shares", spec.name, outputs, inputs - outliers, 0, spec.weight_bits, spec.bits)
        parameters = tuple(jnp.ones(inputs, run.dtype) for _ in range(spec.producer.parameters))
        columns = jnp.arange(inputs, dtype=jnp.int32)
        bits, producer = spec.bits, spec.producer

        def split_alone(columns: Any, parameters: Any, *tensors: Any, bits: int = bits, producer: Any = producer) -> Any:
            width = columns.shape[0] - columns.shape[0] // 16
            return api.split_quantize(
                tensors, columns, width, bits, producer=producer, parameters=parameters, backend=run.backend
            )

        plain = functools.partial(split_alone, producer=api.Identity())
        x = run.sets(_tensors((rows, inputs)))
        fused = [(columns, parameters, *t) for t in run.sets(_tensors(*[(rows, inputs)] * producer.inputs))]
        full, without, alone, bare = (
            run.clock.time(function, sets).median
            for function, sets in (
                (_layer(run, part), _layers(run, part, rows)),
                (_layer(run, base), _layers(run, base, rows)),
                (split_alone, fused),
                (plain, [(columns, (), *t) for t in x]),
            )
        )
        parts["split"] += layers * alone
        parts["outlier product"] += layers * products * max(0.0, full - without)
        parts["integer product"] += layers * products * max(0.0, without - bare)
    heads = fields["num_attention_heads"]
    shape = (1, rows, heads, hidden // heads)
    positions = Positions(jnp.arange(rows, dtype=jnp.int32)[None])
    attention = run.clock.time(
        lambda q, k, v, positions: attend(q, k, v, positions, None, scale=shape[-1] ** -0.5)[0],
        [(*tensors, positions) for tensors in run.sets(_tensors(shape, shape, shape))],
    )
    parts["attention"] = layers * attention.median
    parts["rest"] = whole - sum(parts.values())
    for name, ms in parts.items():
        run.add("shares", f"{name} of prefill {rows}", milliseconds=ms, share=ms / whole)


# In the order in which they are worth having when time runs out.
SECTIONS: dict[str, tuple[Callable[[Run, str], None], Callable[[bool], Sequence[str]]]] = {
    "ceilings": (ceilings, lambda every: ["ceilings"]),
    "correctness": (correctness, lambda every: list(gpu_checks.cases(every))),
    "ops": (ops, lambda every: list(_targets())),
    "model": (model, lambda every: ["QUIK-4B", "bf16"]),
    "shares": (shares, lambda every: ["QUIK-4B", "bf16"]),
    "split": (split, lambda every: list(_SPLITS)),
    "stages": (stages, lambda every: list(_STAGES)),
    "outliers": (outliers, lambda every: ["outliers"]),
    "torch": (torch, lambda every: list(_targets())),
    "blocks": (blocks, lambda every: list(gpu_model.BLOCKS)),
}
# Each case in a process of its own: a peak of memory is the process's.
ALONE = ("model", "shares")
# These are timed by the host's clock only, and as they would run: launched as CUDA graphs.
WITH_GRAPHS = ("model", "torch")


def runner(section: str, given: Mapping[str, Any]) -> Callable[[str, Callable[[Row], None]], None]:
    """The function that runs one case of a section in this process."""
    run, function = Run(given), SECTIONS[section][0]

    def case(name: str, emit: Callable[[Row], None]) -> None:
        run.emit = emit
        function(run, name)

    return case
