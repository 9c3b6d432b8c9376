"""Measure how fast codebook weights are written and dequantized on this machine: weights a second, by bits and block.

    python benchmarks/codebook_speed.py [--shape 1536 576] [--layers 30]

Every layer is one compiled program, as in a model that runs; medians over `--repeats` passes through `--layers` layers of one
shape (135 million weights are 150 layers of 1536 x 576). Compilation is not counted. Beside the clock's figure stands that of the
time of all cores together: weights a second and core, which others on the machine disturb less. The last line is JSON, raw
samples included.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.quantizing.codebook import abstract_codebook, quantize_matrix
from quikjax.quantizing.codebook_rule import CodebookRule
from quikjax.weights.codebook import CodebookWeight, dequantize

KINDS: list[dict[str, Any]] = [
    {"data_type": "int", "bits": 3, "block": 64},
    {"data_type": "nf", "bits": 4, "block": 64},
    {"data_type": "nf", "bits": 4, "block": 64, "absmax": "double"},
    {"data_type": "float", "bits": 5, "block": 128},
    {"data_type": "quantile", "bits": 6, "block": 1024},
    {"data_type": "int", "bits": 7, "block": 100},
    {"data_type": "dynamic", "bits": 8, "block": "tensor"},
]


def measure(fields: dict[str, Any], layers: list[jax.Array], repeats: int) -> dict[str, Any]:
    """Weights a second of one kind."""
    rule = CodebookRule(match="x", **fields)
    columns = jnp.arange(layers[0].shape[1], dtype=jnp.int32)
    empty = abstract_codebook(rule, layers[0].shape, (1,), layers[0].shape[1])

    def write(W: jax.Array) -> CodebookWeight:
        return quantize_matrix("layer", W, rule, columns, empty)

    read = jax.jit(dequantize)
    packed = [write(W) for W in layers]
    jax.block_until_ready(read(packed[0]))
    weights = sum(W.size for W in layers)
    samples: dict[str, list[float]] = {}
    passes: list[tuple[str, Callable[[Any], Any], Sequence[Any], int]] = [
        ("dequantize", read, packed, repeats),
        ("write", write, layers, max(1, repeats // 5)),
    ]
    for name, work, inputs, count in passes:
        clock, cores = samples.setdefault(name, []), samples.setdefault(f"{name}_core", [])
        for _ in range(count):
            start, used = time.perf_counter(), time.process_time()
            for one in inputs:
                jax.block_until_ready(work(one))
            clock.append(time.perf_counter() - start)
            cores.append(time.process_time() - used)
    return {
        "kind": packed[0].label + (" double" if rule.absmax == "double" else ""),
        **{f"{name}_per_second": weights / statistics.median(times) for name, times in samples.items()},
        "samples": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(1536, 576))
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    layers = [jnp.asarray(rng.normal(size=args.shape), jnp.float32) for _ in range(args.layers)]
    rows = [measure(fields, layers, args.repeats) for fields in KINDS]
    print(f"{'kind':<18} {'dequantize':>11} {'a core':>8} {'write':>8} {'a core':>8}   million weights a second")
    for row in rows:
        numbers = [row[f"{name}_per_second"] / 1e6 for name in ("dequantize", "dequantize_core", "write", "write_core")]
        print(f"{row['kind']:<18} {numbers[0]:>11.0f} " + " ".join(f"{number:>8.0f}" for number in numbers[1:]))
    print(json.dumps({"device": jax.devices()[0].device_kind, "shape": list(args.shape), "rows": rows}))


if __name__ == "__main__":
    main()
