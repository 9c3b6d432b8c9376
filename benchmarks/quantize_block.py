"""Quantizing one block, split into forward pass, Hessians, factorization, clip search and GPTQ; the whole model from it.

    python benchmarks/quantize_block.py [--shape llama-2-7b] [--samples 8] [--seqlen 2048] [--recipe quik-4b] [--dtype float32]

Random weights and activations in the shape of a published model; every part is the pipeline's own function, compiled before it is
timed. Beside GPTQ stands what it cannot avoid, every column's error into all later columns,

    N B (K - B) + N B^2 / 2   multiply-adds for N rows, B base columns of K,

at the rate of one large square product timed in the same run.
"""

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from random_checkpoint import random_weight

from quikjax.algorithms.gptq import gptq, inverse_factor
from quikjax.algorithms.numerics import clipped_scales
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.quantizing.model import _forward_all, _run
from quikjax.quantizing.outliers import largest_last
from quikjax.quantizing.params import pack
from quikjax.quantizing.recipe import Rule, find_recipe
from quikjax.quantizing.shared_inputs import permuted_hessian
from quikjax.quantizing.statistics import LayerStats, empty_stats, observe
from quikjax.weights.quik import dequantize

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_hidden_layers": 2},
}
COMMON: dict[str, Any] = {"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


class Clock:
    """Seconds by part. What has new shapes runs once untimed first, so that compilation is not counted."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._seen: set[Any] = set()

    def __call__(self, part: str, key: Any, run: Callable[[], Any]) -> Any:
        if (part, key) not in self._seen:
            self._seen.add((part, key))
            jax.block_until_ready(run())
        start = time.perf_counter()
        result = jax.block_until_ready(run())
        self.seconds[part] += time.perf_counter() - start
        return result


_scales = jax.jit(clipped_scales, static_argnames=("bits",))


@partial(jax.jit, static_argnames=("blockdef", "group"))
def _seen_by(blockdef: Any, params: Any, hidden: Any, kept: Any, group: str) -> Any:
    return _run(blockdef, params, hidden, kept)[1][group]


def products_rate(size: int) -> float:
    """Multiply-adds a second of one square float32 product, the best of three: what a perfect GPTQ would run at."""
    one = jnp.ones((size, size), jnp.float32)
    product = jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(product(one, one))
        seconds.append(time.perf_counter() - start)
    return size**3 / min(seconds[1:])


def quantize_group(clock: Clock, weights: dict[str, jax.Array], rules: dict[str, Rule], stats: LayerStats, hidden: int) -> Any:
    """The layers of one group as `quantization.quantize_block` does them, part by part: dequantized weights, multiply-adds."""
    results, products = {}, 0
    shared: dict[Any, Any] = {}
    for path, W in weights.items():
        rule, (n, k) = rules[path], W.shape
        W = W.astype(jnp.float32)
        count = rule.outlier_count(k, hidden)
        if count not in shared:
            columns = largest_last(stats.absmax, count)
            H, dead = permuted_hessian(stats.hessian, stats.count, columns)
            U, _ = clock("factorization", k, partial(inverse_factor, H, rule.damping))
            shared[count] = columns, U, dead
        columns, U, dead = shared[count]
        permuted, base = W[:, columns], k - count
        if rule.clip:
            clock("clip search", (n, k), partial(_scales, permuted[:, :base], bits=rule.weight_bits))
        # Without its clip search, which is timed above; speed does not depend on the scales.
        run = partial(gptq, permuted, U, dead, base=base, bits=rule.weight_bits, clip=False, block=rule.column_block)
        q, s, outliers = clock("GPTQ", (n, k), run)
        results[path] = dequantize(pack(q, s, outliers, columns, rule, W.shape, (1,), None))
        products += n * base * (k - base) + n * base * base // 2
    return results, products


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of quantizing one block, by part.")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--recipe", default="quik-4b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    fields: dict[str, Any] = COMMON | SHAPES[arguments.shape]
    dtype, recipe = jnp.dtype(arguments.dtype), find_recipe(arguments.recipe)
    one = abstract_model(fields | {"num_hidden_layers": 1}, dtype)
    block = next(iter(one.blocks.values()))
    prefix = ".".join((*one.block_path, "0")) + "."
    rng = np.random.default_rng(0)
    params = {
        path.removeprefix(prefix): jnp.asarray(random_weight(rng, leaf.shape), dtype)
        for path, leaf in dotted(pure_params(one)).items()
        if path.startswith(prefix)
    }
    width = fields["hidden_size"]
    hidden = [
        np.asarray(jnp.asarray(rng.standard_normal((1, arguments.seqlen, width), np.float32), dtype))
        for _ in range(arguments.samples)
    ]
    blockdef, clock, products = nnx.split(block)[0], Clock(), 0
    kept: list[dict[str, Any]] = [{} for _ in hidden]
    for group, layers in block.groups.items():
        paths = [f"{layer}.weight" for layer in layers]
        rules = {path: rule for path in paths if isinstance(rule := recipe.rule_for(prefix + path), Rule)}
        stats = empty_stats(params[paths[0]].shape[1], group=group)
        for batch, known in zip(hidden, kept, strict=True):
            run = partial(_seen_by, blockdef, nested(params), batch, known, group=group)
            x = clock("forward", group, run)
            stats = clock("Hessian", group, partial(observe, stats, x))
            known[group] = np.asarray(x)
        done, count = quantize_group(clock, {path: params[path] for path in rules}, rules, stats, width)
        params |= {path: weight.astype(dtype) for path, weight in done.items()}
        products += count
    clock("forward", "out", lambda: [jnp.asarray(h) for h in _forward_all(blockdef, nested(params), hidden, kept)])

    seconds = dict(clock.seconds)
    alone = products / products_rate(min(width, 4096))
    total = sum(seconds.values())
    print(f"one block of {arguments.shape}, {arguments.samples} x {arguments.seqlen} tokens, {recipe.name}, {dtype}\n")
    print("| part | seconds | share |\n|---|---:|---:|")
    for part, value in seconds.items():
        print(f"| {part} | {value:.2f} | {value / total:.0%} |")
    print(f"| together | {total:.2f} | |")
    ratio = seconds["GPTQ"] / alone
    print(f"\nGPTQ over the products that it cannot avoid ({2 * products / 1e12:.2f} TFLOP, {alone:.2f} s): {ratio:.2f}x")
    print(f"all {fields['num_hidden_layers']} blocks: {total * fields['num_hidden_layers'] / 60:.0f} min")
    device = jax.devices()[0]
    print(
        json.dumps(
            {
                "machine": f"{platform.machine()}, {device.device_kind}",
                "jax": jax.__version__,
                **vars(arguments),
                "seconds": seconds,
                "unavoidable_seconds": alone,
                "unavoidable_flop": 2 * products,
                "gptq_ratio": ratio,
            }
        )
    )


if __name__ == "__main__":
    main()
