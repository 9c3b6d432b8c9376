"""Products of a block's layers on a CPU, for few rows: XLA's, compiled ones, and PyTorch's where it is installed.

    python benchmarks/cpu_products.py [--rows 1 2 8] [--layers 30] [--rounds 9]

Decoding on a CPU is little else. Each shape has `--layers` weights of its own, one after the other in one program, as an
unrolled model has (in a scanned one XLA copies each weight out of the stacked ones besides); medians of a product, in
microseconds. XLA's: float32 weights `[N, K]`, int8 codes `[N, K]` with int32 sums (`reference.integer_matmul`, which fills a
single row up to the fewest that XLA multiplies fast). Compiled: float32 and bfloat16 weights, and QUIK products of 4-bit codes
without outliers. PyTorch's: float32. The last line is one JSON object.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from quikjax.pallas_kernels import reference
from quikjax.pallas_kernels.native import panels
from quikjax.reports.tables import markdown_table
from quikjax.weights.compiled import why_no_compiled_products

# Outputs and inputs of SmolLM2-135M's layers: k and v, q and o, gate and up, down.
SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536))


def median_us(once: Callable[[], Any], layers: int, rounds: int) -> float:
    """Microseconds of a product, from so many rounds of all layers."""
    once()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) / layers * 1e6


def xla(product: Callable[[Array, Array], Array], x: Array, weights: list[Array]) -> Callable[[], Any]:
    """All products, each waiting for the one before it, as layers do."""

    @jax.jit
    def run(x: Array, weights: list[Array]) -> Array:
        for weight in weights:
            # Nothing is so large; but XLA cannot know that.
            x = x + (product(x, weight)[:, :1] > 1 << 30).astype(x.dtype)
        return x

    return lambda: jax.block_until_ready(run(x, weights))


def compiled(given: np.ndarray, codes: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Products with weights in panels: of float32, of bfloat16, and of codes of 4 bits (`given` are activations' codes)."""
    rows, n = given.shape[0], codes[0].shape[0]
    ones, none = jnp.ones((1, n)), jnp.zeros((1, panels.panel_count(n), 0, panels.PANEL), jnp.float16)

    def floats(x: Array, weight: Array) -> Array:
        return panels.float_products(x, [panels.FloatPanels(weight, jnp.int32(0), n)])[0]

    def quik(x: Array, weight: Array) -> Array:
        split = reference.Split(x, jnp.zeros((rows, 0)), jnp.ones(rows), jnp.zeros(rows))
        return panels.quik_products(split, 4, [panels.QuikPanels(weight, none, ones, ones, jnp.int32(0), 4)])[0]

    whole = [panels.float_panels(jnp.asarray(one, jnp.float32))[None] for one in codes]
    return {
        "compiled float32": xla(floats, jnp.asarray(given, jnp.float32), whole),
        "compiled bfloat16": xla(floats, jnp.asarray(given, jnp.float32), [one.astype(jnp.bfloat16) for one in whole]),
        "compiled 4 bits": xla(quik, jnp.asarray(given), [panels.code_panels(jnp.asarray(one), 4)[None] for one in codes]),
    }


def pytorch(x: np.ndarray, weights: list[np.ndarray]) -> Callable[[], Any]:
    import torch  # type: ignore[import-not-found, unused-ignore]

    given, held = torch.from_numpy(x), [torch.from_numpy(weight) for weight in weights]

    def run() -> None:
        with torch.inference_mode():
            for weight in held:
                torch.nn.functional.linear(given, weight)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rng, found = np.random.default_rng(0), []
    with_compiled = why_no_compiled_products() is None
    with_torch = importlib.util.find_spec("torch") is not None
    for rows in arguments.rows:
        for outputs, inputs in SHAPES:
            codes = [rng.integers(-8, 8, (outputs, inputs)).astype(np.int8) for _ in range(arguments.layers)]
            floats = [weight.astype(np.float32) for weight in codes]
            given = rng.integers(-8, 8, (rows, inputs)).astype(np.int8)
            runs = {
                "float32": xla(reference.float_matmul, jnp.asarray(given, jnp.float32), [jnp.asarray(one) for one in floats]),
                "int8": xla(reference.integer_matmul, jnp.asarray(given), [jnp.asarray(one) for one in codes]),
            }
            if with_compiled:
                runs |= compiled(given, codes)
            if with_torch:
                runs["PyTorch float32"] = pytorch(given.astype(np.float32), floats)
            times = {name: median_us(once, arguments.layers, arguments.rounds) for name, once in runs.items()}
            found.append({"rows": rows, "outputs": outputs, "inputs": inputs, "us": times})
    names = list(found[0]["us"])
    cells = [
        [str(row["rows"]), f"{row['outputs']} x {row['inputs']}", *(f"{row['us'][name]:.0f}" for name in names)] for row in found
    ]
    print(markdown_table(("rows", "weight", *(f"{name}, us" for name in names)), cells))
    print(json.dumps({"machine": f"{platform.machine()}, {jax.default_backend()}", "jax": jax.__version__, "products": found}))


if __name__ == "__main__":
    main()
