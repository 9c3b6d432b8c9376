"""Seconds that an evaluation takes, over those of the plain forward passes of the same windows.

    python benchmarks/evaluation_cost.py [--model smollm2-135m] [--window 2048] [--windows 3] [--rounds 5]

A plain pass is `model(ids)` under `jit`, window after window: all logits, and nothing made of them. Both take turns, so that
whatever else the machine does meets both; compiling is apart, in a round that is not counted. Beside the clock's seconds stand
those of the CPU's, over all cores, which other programs disturb less.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from quikjax.checkpoint.load import load
from quikjax.evaluation import evaluate, windows
from quikjax.models.registry import pure_params
from quikjax.texts import evaluation_text, tokenize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    ids = windows(tokenize(tokenizer, evaluation_text("pydoc").content), arguments.window, arguments.windows)
    graphdef, params = nnx.split(model)[0], pure_params(model)

    @jax.jit
    def logits(params: Any, ids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(ids)

    def plain() -> None:
        for window in ids:
            logits(params, jnp.asarray(window[None])).block_until_ready()

    runs: dict[str, Callable[[], Any]] = {"plain": plain, "evaluate": lambda: evaluate(model, ids)}
    clock: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(arguments.rounds + 1):
        for name, run in runs.items():
            started, before = time.perf_counter(), time.process_time()
            run()
            if counted:
                clock[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - before)
    result = {"window": arguments.window, "windows": arguments.windows, "clock": clock, "cpu": cpu}
    print(f"medians of {arguments.rounds}, {arguments.windows} windows of {arguments.window} tokens")
    for what, seconds in (("seconds", clock), ("CPU seconds", cpu)):
        middle = {name: statistics.median(some) for name, some in seconds.items()}
        ratio = middle["evaluate"] / middle["plain"]
        result[f"{what} ratio"] = ratio
        print(f"{what}: plain {middle['plain']:.2f}, evaluate {middle['evaluate']:.2f}: {ratio:.3f}x")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
