"""Measure how fast codebook weights are written and dequantized on this machine: weights a second, by bits and block.

    python benchmarks/codebook_speed.py [--shape 1536 576] [--layers 30]

Every layer is one compiled program, as in a model that runs; medians over `--repeats` passes through `--layers` layers of one
shape (135 million weights are 150 layers of 1536 x 576). Compilation is not counted. The last line is JSON, raw samples included.
"""

import argparse
import json
import statistics
import time
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
    samples: dict[str, list[float]] = {"write": [], "dequantize": []}
    for _ in range(repeats):
        start = time.perf_counter()
        for weight in packed:
            jax.block_until_ready(read(weight))
        samples["dequantize"].append(time.perf_counter() - start)
    for _ in range(max(1, repeats // 5)):
        start = time.perf_counter()
        for W in layers:
            jax.block_until_ready(write(W))
        samples["write"].append(time.perf_counter() - start)
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
    print(f"{'kind':<18} {'dequantize':>14} {'write':>14}   million weights a second, on {jax.devices()[0].device_kind}")
    for row in rows:
        print(f"{row['kind']:<18} {row['dequantize_per_second'] / 1e6:>14.0f} {row['write_per_second'] / 1e6:>14.0f}")
    print(json.dumps({"device": jax.devices()[0].device_kind, "shape": list(args.shape), "rows": rows}))


if __name__ == "__main__":
    main()
