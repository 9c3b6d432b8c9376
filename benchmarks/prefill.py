"""Prefill of a quantized model against the same model in float32, side by side in one run.

    python benchmarks/prefill.py [--model smollm2-135m] [--tokens 2048] [--rounds 7] [--recipe quik-4b]

Both models take turns, so that whatever else the machine does meets both; medians are reported, compilation is apart. The
quantized model is made by rounding with the recipe's bits and outliers chosen from one short calibration: speed does not depend
on the codes.
"""

import argparse
import json
import platform
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quikjax.checkpoint.load import load
from quikjax.models.registry import pure_params
from quikjax.quantizing.model import calibrate
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, find_recipe
from quikjax.texts import calibration_text, tokenize


def rounded(recipe: Recipe) -> Recipe:
    """The recipe with rounding instead of GPTQ and without clip search: the same shapes in a fraction of the time."""
    return recipe.model_copy(
        update={"rules": tuple(rule.model_copy(update={"method": "rtn", "clip": False}) for rule in recipe.rules)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--recipe", default="quik-4b")
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    graphdef, params = nnx.split(model)[0], pure_params(model)
    tokens = tokenize(tokenizer, calibration_text("pydoc").content)
    stats = calibrate(graphdef, params, [tokens[None, :256]])
    packed = quantize_params(params, rounded(find_recipe(arguments.recipe)), stats, hidden_size=model.config.hidden_size)
    ids = jnp.asarray(tokens[None, : arguments.tokens])

    @partial(jax.jit, static_argnums=0)
    def prefill(graphdef: Any, params: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        return nnx.merge(graphdef, params).prefill(ids, ids.shape[1])

    runs = {"float32": params, arguments.recipe: packed}
    compiled, seconds = {}, {}
    for name, tree in runs.items():
        start = time.perf_counter()
        compiled[name] = prefill.lower(graphdef, tree, ids).compile()
        seconds[name] = time.perf_counter() - start
        jax.block_until_ready(compiled[name](tree, ids))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, tree in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](tree, ids))
            samples[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in samples.items()}
    ratios = [one / other for one, other in zip(samples["float32"], samples[arguments.recipe], strict=True)]
    print(f"| model | prefill of {arguments.tokens} tokens, median s | tokens/s | compiled in s |")
    print("|---|---:|---:|---:|")
    for name, value in median.items():
        print(f"| {name} | {value:.3f} | {arguments.tokens / value:.0f} | {seconds[name]:.1f} |")
    print(f"\n{arguments.recipe} over float32, median of {arguments.rounds} pairs: {statistics.median(ratios):.2f}x")
    print(
        json.dumps(
            {
                "machine": f"{platform.processor() or platform.machine()}, {jax.local_devices()[0].device_kind}",
                "jax": jax.__version__,
                "model": arguments.model,
                "tokens": arguments.tokens,
                "median_seconds": median,
                "ratio": statistics.median(ratios),
                "samples": samples,
                "spread": {name: float(np.ptp(values)) for name, values in samples.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
