"""The GPU benchmark in one command: correctness first, then operations, stages, blocks and a whole model.

    python benchmarks/gpu.py                       # on a GPU: a table and JSON under benchmarks/results/
    python benchmarks/gpu.py --sections ops split  # parts of it
    python benchmarks/gpu.py --dry-run --out DIR   # anywhere: every code path at tiny shapes; its times mean nothing

Times are medians of device time (CUPTI) over several input sets, whole models also by the host's clock. Every ratio is to a bf16
product of the same run, with everything included: split, quantization, outlier product, epilogue. Beside it stands the ratio
that the bytes and operations allow at the copy bandwidth and bf16 rate measured in this run, int8 counted at twice the bf16 rate.
"""

import argparse
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# PyTorch's peers share the device: leave them memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import gpu_model
import gpu_peers
import gpu_timing
import jax
import jax.numpy as jnp
import numpy as np
from gpu_timing import Clock

from quikjax.pallas_kernels import api, reference
from quikjax.pallas_kernels.arg_specs import BLOCKS, LinearSpec

TARGETS = [(m, 8192, 8192) for m in (1, 16, 64, 2048)] + [(2048, 11008, 4096), (2048, 4096, 4096)]
Row = dict[str, Any]


class Run:
    """What every section needs: the device, the clock, the ceilings measured first, and the rows collected."""

    def __init__(self, dry: bool, repetitions: int, backend: str):
        self.dry, self.backend = dry, backend
        self.device = api.current_device()
        self.clock = Clock("wall" if dry else "device", 2 if dry else repetitions)
        self.dtype = jnp.bfloat16
        self.rows: list[Row] = []
        self.bandwidth = self.rate = 0.0

    def shape(self, *numbers: int) -> tuple[int, ...]:
        """Sizes as asked for, or a sixty-fourth of them in a dry run."""
        return tuple(max(8, n // 64 // 8 * 8) for n in numbers) if self.dry else numbers

    def some(self, items: Sequence[Any]) -> Sequence[Any]:
        """All of them; in a dry run the first, which goes through the same code."""
        return items[:1] if self.dry else items

    def add(self, section: str, name: str, milliseconds: float | None, **details: Any) -> None:
        self.rows.append({"section": section, "name": name, "milliseconds": milliseconds, **details})
        shown = "-" if milliseconds is None else f"{milliseconds:.4f} ms"
        print(f"{section:12} {name:60} {shown}", file=sys.stderr, flush=True)

    def time(
        self, function: Callable[..., Any], make: Callable[[jax.Array], tuple[Any, ...]], seed: int = 0
    ) -> gpu_timing.Timing:
        return self.clock.time(function, gpu_timing.make_sets(make, seed, self.dry))

    def allowed(self, spec: LinearSpec, rows: int, bf16_ms: float) -> float:
        """The best ratio to bf16 that bytes and operations allow at this run's ceilings."""
        move = rows * spec.inputs * 2 + rows * (spec.base + 2 * spec.outliers + 8)
        weights = spec.outputs * (spec.base * spec.weight_bits / 8 + spec.outliers * 2 + 8)
        read = weights + rows * (spec.base + 2 * spec.outliers) + rows * spec.outputs * 2
        compute = 2 * rows * spec.outputs * (spec.base / 2 + spec.outliers) / self.rate
        return bf16_ms / (1e3 * (move / self.bandwidth + max(read / self.bandwidth, compute)))


def correctness(run: Run) -> None:
    """Codes and accumulators bit for bit, results within a bound, before anything is timed.

    Raises:
        SystemExit: with the first difference.
    """
    for rows, outputs, inputs, outliers, bits in run.some(
        [(17, 1024, 1024, 64, 4), (1, 512, 576, 36, 4), (129, 4672, 4544, 284, 8)]
    ):
        rows, outputs, inputs = (rows, *run.shape(outputs, inputs)) if run.dry else (rows, outputs, inputs)
        spec = LinearSpec("check", "", outputs, inputs, min(outliers, inputs // 16), bits, bits)
        x, packed = gpu_peers.random_layer(jax.random.key(rows), spec, rows, run.dtype)
        plain = api.from_tiles(packed)
        want = jax.jit(reference.split_quantize, static_argnums=(2, 3))(x, plain.columns, plain.base, bits)
        got = api.split_quantize((x,), plain.columns, plain.base, bits, backend=run.backend)
        for name, a, b in zip(want._fields, want, got, strict=True):
            if not np.array_equal(np.asarray(a), np.asarray(b)):
                sys.exit(f"{run.backend} split_quantize: {name} differs from the reference at {spec}, {rows} rows")
        ones = jnp.ones(outputs)
        sums_of = api.pack(plain.qweight, ones, 0 * ones, plain.outliers[:, :0], plain.columns[: plain.base])
        unit = reference.Split(want.codes, x[:, :0], jnp.ones(rows), jnp.zeros(rows))
        # Sums of this many codes are exact in float32, so the result is the accumulator.
        sums = api.quik_matmul(unit, sums_of, None, bits, jnp.float32, backend=run.backend)
        exact = reference.integer_matmul(want.codes, plain.qweight).astype(jnp.float32)
        if not np.array_equal(np.asarray(sums), np.asarray(exact)):
            sys.exit(f"{run.backend} quik_matmul: accumulators differ from the reference at {spec}, {rows} rows")
        y = np.asarray(api.linears((x,), [packed], [None], bits, backend=run.backend)[0], np.float64)
        full = np.asarray(
            reference.quik_matmul(want, plain.qweight, plain.scale, plain.reduced, plain.outliers, None, bits), np.float64
        )
        error = float(np.abs(y - full).max() / np.abs(full).max())
        if not error <= 2**-7:
            sys.exit(f"{run.backend}: results differ from the reference by {error:.2e} of the largest at {spec}, {rows} rows")
        run.add("correctness", f"{rows} x {outputs} x {inputs} W{bits}A{bits}", None, relative_error=error)


def ceilings(run: Run) -> None:
    """Copy bandwidth and the bf16 product's rate, which everything is held against."""
    (length,) = run.shape(2**28)
    copy = run.time(lambda x: x + 1, lambda key: (jax.random.randint(key, (length,), 0, 9, jnp.int32),))
    run.bandwidth = 8 * length / (copy.median * 1e-3)
    run.add("ceilings", "copy", copy.median, gigabytes_per_second=run.bandwidth / 1e9, samples=copy.samples)
    (n,) = run.shape(8192)
    square = run.time(gpu_peers.bf16, lambda key: (_normal(key, n, n), _normal(jax.random.fold_in(key, 1), n, n)))
    run.rate = 2 * n**3 / (square.median * 1e-3)
    run.add("ceilings", "bf16 product", square.median, teraflops=run.rate / 1e12, samples=square.samples)


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)


def _tensors(count: int, *shape: int) -> Callable[[jax.Array], tuple[Any, ...]]:
    """Makes `count` random tensors of one shape from a key."""
    return lambda key: tuple(_normal(jax.random.fold_in(key, i), *shape) for i in range(count))


def _layers(spec: LinearSpec, rows: int, dtype: Any) -> Callable[[jax.Array], tuple[Any, ...]]:
    """Makes activations and a packed weight from a key."""
    return lambda key: gpu_peers.random_layer(key, spec, rows, dtype)


def _bf16_ms(run: Run, rows: int, outputs: int, inputs: int) -> gpu_timing.Timing:
    return run.time(
        gpu_peers.bf16, lambda key: (_normal(key, rows, inputs), _normal(jax.random.fold_in(key, 1), outputs, inputs))
    )


def _layer(run: Run, spec: LinearSpec, rows: int) -> gpu_timing.Timing:
    return run.time(
        lambda x, packed: api.linears((x,), [packed], [None], spec.bits, backend=run.backend)[0],
        _layers(spec, rows, run.dtype),
    )


def ops(run: Run) -> None:
    """The issue's table: QUIK layers and their peers, with the ratio to bf16 and what the ceilings allow."""
    for rows, outputs, inputs in run.some(TARGETS):
        outputs, inputs = run.shape(outputs, inputs)
        rows = min(rows, 16) if run.dry else rows
        size = f"{rows} x {outputs} x {inputs}"
        dense = _bf16_ms(run, rows, outputs, inputs)
        run.add("ops", f"bf16 {size}", dense.median, ratio=1.0, samples=dense.samples, rows=rows)
        for bits in ((4, 4), (8, 8), (4, 8), (4, 16)):
            spec = LinearSpec("ops", "", outputs, inputs, inputs // 16, *bits)
            timing = _layer(run, spec, rows)
            allowed = run.allowed(spec, rows, dense.median)
            run.add(
                "ops",
                f"QUIK W{bits[0]}A{bits[1]} {size}",
                timing.median,
                ratio=dense.median / timing.median,
                ceiling=allowed,
                samples=timing.samples,
                compile_seconds=timing.compile_seconds,
                rows=rows,
            )
        _jax_peers(run, rows, outputs, inputs, size, dense.median)
        peers = gpu_peers.torch_peers(rows, outputs, inputs, run.clock.repetitions)
        for name, samples in peers.items():
            if isinstance(samples, str):
                run.add("ops", f"{name} {size}", None, reason=samples, rows=rows)
            else:
                ms = gpu_peers.median(samples)
                run.add("ops", f"{name} {size}", ms, ratio=dense.median / ms, samples=samples, rows=rows)


def _jax_peers(run: Run, rows: int, outputs: int, inputs: int, size: str, dense_ms: float) -> None:
    def make(dtype: Any) -> Callable[[jax.Array], tuple[Any, ...]]:
        def sides(key: jax.Array) -> tuple[Any, ...]:
            codes = jax.random.randint(key, (outputs, inputs), -8, 8, jnp.int8).astype(dtype)
            return _normal(key, rows, inputs), codes, jnp.ones(outputs)

        return sides

    peers: dict[str, tuple[Callable[..., Any], Any]] = {
        "XLA int4 weight-only": (gpu_peers.xla_weight_only, jnp.int4),
        "XLA int8, quantization apart": (gpu_peers.xla_int8, jnp.int8),
    }
    for name, (function, dtype) in peers.items():
        timing = run.time(function, make(dtype))
        run.add("ops", f"{name} {size}", timing.median, ratio=dense_ms / timing.median, samples=timing.samples, rows=rows)


def split(run: Run) -> None:
    """`split_quantize` and its fused forms, as a share of the copy bandwidth (bytes in plus bytes out)."""
    for rows, inputs in run.some([(2048, 4096), (2048, 8192), (2048, 28672), (1, 8192)]):
        (inputs,) = run.shape(inputs)
        rows = min(rows, 16) if run.dry else rows
        outliers = inputs // 16
        for producer in (api.Identity(), api.RmsNorm(), api.SiluMul()):
            columns = jax.random.permutation(jax.random.key(1), inputs).astype(jnp.int32)
            parameters = tuple(jnp.ones(inputs, run.dtype) for _ in range(producer.parameters))

            def run_split(
                *tensors: jax.Array, columns: Any = columns, parameters: Any = parameters, producer: Any = producer
            ) -> Any:
                base = columns.shape[0] - columns.shape[0] // 16
                return api.split_quantize(
                    tensors, columns, base, 4, producer=producer, parameters=parameters, backend=run.backend
                )

            timing = run.time(
                run_split,
                _tensors(producer.inputs, rows, inputs),
            )
            moved = rows * (producer.inputs * inputs * 2 + (inputs - outliers) + 2 * outliers + 8)
            share = moved / (timing.median * 1e-3) / run.bandwidth
            name = f"{type(producer).__name__} {rows} x {inputs}"
            run.add("split", name, timing.median, share_of_copy_bandwidth=share, samples=timing.samples)


def stages(run: Run) -> None:
    """The paper's stages, and throughput against the number of outliers."""
    for rows, outputs, inputs in run.some([(2048, 8192, 8192), (2048, 4096, 4096), (16, 8192, 8192)]):
        outputs, inputs = run.shape(outputs, inputs)
        rows = min(rows, 16) if run.dry else rows
        spec = LinearSpec("stages", "", outputs, inputs, inputs // 16)
        dense = _bf16_ms(run, rows, outputs, inputs).median
        for name, function in gpu_peers.ablation(4, run.device, run.backend).items():
            timing = run.time(function, _layers(spec, rows, run.dtype))
            label = f"{name} {rows} x {outputs} x {inputs}"
            run.add("stages", label, timing.median, ratio=dense / timing.median, samples=timing.samples)
    outputs, inputs = run.shape(8192, 8192)
    rows = 16 if run.dry else 2048
    for outliers in run.some((64, 0, 128, 256, 512, 1024)):
        outliers = min(outliers, inputs // 2)
        timing = _layer(run, LinearSpec("outliers", "", outputs, inputs, outliers), rows)
        rate = 2 * rows * outputs * inputs / (timing.median * 1e-3) / 1e12
        run.add("outliers", f"O={outliers} {rows} x {outputs} x {inputs}", timing.median, teraops=rate, samples=timing.samples)


def blocks(run: Run) -> None:
    """The linear layers of one block of large models, 2048 tokens, against the same layers in bf16."""
    repeats = {"q": 1, "k": 2, "gate": 2}
    for model, specs in run.some(list(BLOCKS.items())):
        total, dense_total = 0.0, 0.0
        for spec in specs:
            outputs, inputs = run.shape(spec.outputs, spec.inputs)
            rows = 16 if run.dry else 2048
            small = LinearSpec(model, spec.name, outputs, inputs, min(spec.outliers, inputs // 16), spec.weight_bits, spec.bits)
            # q counts for k and v too where they are as wide; gate for up.
            count = 3 if spec.name == "q" and all(s.name != "k" for s in specs) else repeats.get(spec.name, 1)
            total += count * _layer(run, small, rows).median
            dense_total += count * _bf16_ms(run, rows, outputs, inputs).median
        run.add("blocks", f"{model}: linear layers of one block", total, ratio=dense_total / total, bf16_milliseconds=dense_total)


def model(run: Run) -> None:
    """LLaMA-2-7B's shape with random weights, QUIK-4B and bf16 under the same jit: prefill, decode, memory, shares."""
    fields = gpu_model.TINY if run.dry else gpu_model.LLAMA_2_7B
    length, contexts = (16, (8, 32)) if run.dry else (2048, (128, 2048))
    cases = [("prefill", 1, length)] + [("decode", batch, context) for context in run.some(contexts) for batch in (1, 16)]
    times: dict[str, dict[tuple[str, int, int], float]] = {}
    sizes: dict[str, int] = {}
    # Quantized first: the peak is the process's, and the dense model's is larger.
    for name in ("QUIK-4B", "bf16"):
        built = gpu_model.build(fields, name == "QUIK-4B", run.dtype)
        sizes[name], times[name] = built.bytes, {}
        for case in cases:
            kind, batch, context = case
            function, arguments = (
                gpu_model.prefill(built, context) if kind == "prefill" else gpu_model.decode(built, batch, context, fields)
            )
            timing = run.clock.time(function, [arguments], wall=True)
            device_timing = timing if run.dry else run.clock.time(function, [arguments])
            times[name][case] = timing.median
            dense = times["QUIK-4B"][case] / timing.median if name == "bf16" else None
            run.add(
                "model",
                f"{name} {kind} batch {batch} context {context}",
                timing.median,
                quik_speedup=None if dense is None else 1 / dense,
                device_milliseconds=device_timing.median,
                samples=timing.samples,
            )
            del function, arguments
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        run.add("model", f"{name} parameters", None, bytes=sizes[name], peak_bytes_so_far=peak)
        del built
    run.add("model", "parameters relative to bf16", None, ratio=sizes["QUIK-4B"] / sizes["bf16"])
    _shares(run, fields, times["QUIK-4B"][cases[0]], length)


def _split_alone(x: jax.Array, *, columns: jax.Array, base: int, bits: int, backend: str) -> Any:
    return api.split_quantize((x,), columns, base, bits, backend=backend)


def _shares(run: Run, fields: dict[str, Any], whole: float, rows: int) -> None:
    """Where prefill's time goes: each part timed alone at its shape, times the number of layers; the rest is what is left."""
    hidden, wide, layers = fields["hidden_size"], fields["intermediate_size"], fields["num_hidden_layers"]
    kinds = [(hidden, hidden, 4, 4), (wide, hidden, 2, 4), (hidden, wide, 1, 8)]
    parts = {"split": 0.0, "integer product": 0.0, "outlier product": 0.0}
    for outputs, inputs, count, bits in kinds:
        outliers = round(inputs / 16)
        full = _layer(run, LinearSpec("share", "", outputs, inputs, outliers, bits, bits), rows).median
        without = _layer(run, LinearSpec("share", "", outputs, inputs - outliers, 0, bits, bits), rows).median
        columns = jnp.arange(inputs, dtype=jnp.int32)
        alone = run.time(
            functools.partial(_split_alone, columns=columns, base=inputs - outliers, bits=bits, backend=run.backend),
            _tensors(1, rows, inputs),
        ).median
        # q, k, v share one split, and gate and up; o and down have their own.
        splits = {hidden: 2 if outputs == hidden else 1, wide: 1}[inputs]
        parts["split"] += layers * splits * alone
        parts["outlier product"] += layers * count * max(0.0, full - without)
        parts["integer product"] += layers * count * max(0.0, without - alone)
    heads = fields["num_attention_heads"]
    shape = (1, rows, heads, hidden // heads)
    attention = run.time(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        _tensors(3, *shape),
    ).median
    parts["attention"] = layers * attention
    parts["rest"] = whole - sum(parts.values())
    for name, ms in parts.items():
        run.add("shares", f"{name} of prefill {rows}", ms, share=ms / whole)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "ops": ops,
    "split": split,
    "stages": stages,
    "blocks": blocks,
    "model": model,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--backend", default="mosaic", choices=api.BACKENDS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the xla backend; the times mean nothing")
    arguments = parser.parse_args()
    if arguments.repetitions < 1:
        parser.error("--repetitions must be at least 1")
    if not arguments.dry_run and jax.default_backend() != "gpu":
        print("this benchmark needs a GPU, and JAX sees none here; --dry-run exercises it without one", file=sys.stderr)
        return 1
    run = Run(arguments.dry_run, arguments.repetitions, "xla" if arguments.dry_run else arguments.backend)
    correctness(run)
    ceilings(run)
    for section in arguments.sections:
        SECTIONS[section](run)
    write(run, arguments.out, " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]))
    return 0


def write(run: Run, out: Path, command: str) -> None:
    """A markdown table and JSON, named by the device."""
    import jaxlib

    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "python": platform.python_version()}
    head = {"device": str(run.device), "versions": versions, "command": command, "dry_run": run.dry, "backend": run.backend}
    out.mkdir(parents=True, exist_ok=True)
    stem = ("dry-run" if run.dry else "gpu-" + "-".join(str(run.device).lower().split())) + f"-jax-{jax.__version__}"
    (out / f"{stem}.json").write_text(json.dumps({**head, "rows": run.rows}, indent=1) + "\n")
    lines = [f"# {run.device}" + (" (dry run: these times mean nothing)" if run.dry else ""), "", f"`{command}`", ""]
    lines += [", ".join(f"{name} {version}" for name, version in versions.items()), ""]
    lines += ["| section | what | ms | ratio to bf16 | ceiling | of ceiling | other |", "|---|---|---|---|---|---|---|"]
    for row in run.rows:
        ratio, ceiling = row.get("ratio"), row.get("ceiling")
        other = {
            k: v for k, v in row.items() if k not in ("section", "name", "milliseconds", "ratio", "ceiling", "samples", "rows")
        }
        cells = [
            row["section"],
            row["name"],
            "" if row["milliseconds"] is None else f"{row['milliseconds']:.4f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if ceiling is None else f"{ceiling:.2f}",
            "" if ratio is None or ceiling is None else f"{ratio / ceiling:.0%}",
            ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in other.items() if v is not None),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    (out / f"{stem}.md").write_text("\n".join(lines) + "\n")
    print(json.dumps({"written": str(out / f"{stem}.md"), "rows": len(run.rows)}))


if __name__ == "__main__":
    sys.exit(main())
