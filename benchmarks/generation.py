"""Decoding side by side: float32, bfloat16 and QUIK-4B here, and Hugging Face's PyTorch `generate` where it is installed.

    python benchmarks/generation.py [--model smollm2-135m] [--batches 1 8] [--tokens 64] [--rounds 5] [--unrolled]
    python benchmarks/generation.py --compile-growth     # seconds to compile 8 and 32 equal blocks

A CPU's products are compiled ones where it has a compiler; QUIKJAX_NATIVE=0 asks for XLA's. Everything takes turns, so that
whatever else the machine does meets all of it; medians are reported, compilation is apart. Packed weights are made by rounding
with the recipe's bits and outliers from one short calibration: speed does not depend on the codes.
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
from flax import nnx
from prefill import rounded

from quikjax.checkpoint.load import load
from quikjax.generation import Generator
from quikjax.models.base import Transformer
from quikjax.models.registry import dotted, pure_params
from quikjax.quantizing.model import calibrate
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import find_recipe
from quikjax.testing import tiny_model
from quikjax.texts import calibration_text, tokenize


def packed(model: Transformer, tokens: np.ndarray, recipe: str) -> Transformer:
    """The model in a recipe's shapes and bits, rounded."""
    graphdef, params = nnx.split(model)[0], pure_params(model)
    stats = calibrate(graphdef, params, [tokens[None, :128]])
    return nnx.merge(graphdef, quantize_params(params, rounded(find_recipe(recipe)), stats, hidden_size=model.config.hidden_size))


def hugging_face(model: Transformer) -> Callable[[np.ndarray, int], np.ndarray]:
    """The same weights in transformers' PyTorch model, float32, as a function that generates."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(model.published or "{}")
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32).eval()
    state = {name: torch.tensor(np.asarray(leaf)) for name, leaf in dotted(pure_params(model)).items()}
    left = network.load_state_dict(state, strict=False)
    assert set(left.missing_keys) <= {"lm_head.weight"}, left.missing_keys
    network.tie_weights()

    def run(prompts: np.ndarray, tokens: int) -> np.ndarray:
        ids = torch.tensor(prompts, dtype=torch.long)
        with torch.inference_mode():
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        return out[:, prompts.shape[1] :].numpy()

    return run


def decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of whole requests, prompt included."""
    model, tokenizer = load(arguments.model)
    tokens = tokenize(tokenizer, calibration_text("pydoc").content)
    runs: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {}
    compiled: dict[str, float] = {}
    if importlib.util.find_spec("torch") is not None:
        runs["HF PyTorch float32"] = hugging_face(model)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), pure_params(model))
    models = {
        "float32": model,
        "bfloat16": nnx.merge(nnx.split(model)[0], narrow),
        # As most checkpoints are published: values of bfloat16, computed with in float32.
        "float32 of bfloat16": nnx.merge(nnx.split(model)[0], jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)),
        arguments.recipe: packed(model, tokens, arguments.recipe),
    }
    generators = {name: Generator(one, batch_size=max(arguments.batches)) for name, one in models.items()}
    if arguments.unrolled:
        again = {name: Generator(one, batch_size=max(arguments.batches), unrolled=True) for name, one in models.items()}
        generators |= {f"{name}, unrolled": generator for name, generator in again.items()}

    def ours(generator: Generator) -> Callable[[np.ndarray, int], np.ndarray]:
        return lambda prompts, count: generator.generate(prompts, max_new_tokens=count, stop=()).tokens

    runs |= {name: ours(generator) for name, generator in generators.items()}
    results: dict[str, Any] = {"samples": {}, "median_tokens_per_second": {}, "ratio_to_hf": {}}
    for batch in arguments.batches:
        prompts = np.stack([tokens[64 * i : 64 * i + arguments.prompt] for i in range(batch)])
        texts = {}
        for name, run in runs.items():
            texts[name] = run(prompts, arguments.tokens)
            if name in generators:
                compiled[name] = generators[name].programs.seconds
        if "HF PyTorch float32" in texts:
            results.setdefault("equal_tokens", {})[batch] = float((texts["HF PyTorch float32"] == texts["float32"]).mean())
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run(prompts, arguments.tokens)
                samples[name].append(batch * arguments.tokens / (time.perf_counter() - start))
        results["samples"][batch] = samples
        results["median_tokens_per_second"][batch] = {name: statistics.median(values) for name, values in samples.items()}
        if (base := samples.get("HF PyTorch float32")) is not None:
            results["ratio_to_hf"][batch] = {
                name: statistics.median(a / b for a, b in zip(values, base, strict=True)) for name, values in samples.items()
            }
    print("| model | batch | tokens/s, median | over HF |\n|---|---:|---:|---:|")
    for batch, medians in results["median_tokens_per_second"].items():
        for name, value in medians.items():
            ratio = results["ratio_to_hf"].get(batch, {}).get(name)
            print(f"| {name} | {batch} | {value:.1f} | {'' if ratio is None else f'{ratio:.2f}x'} |")
    return {**results, "compile_seconds": compiled}


def growth(rounds: int) -> dict[str, Any]:
    """Seconds to trace and compile reading and decoding, for 8 and for 32 blocks that are alike. Alternating, medians."""
    seconds: dict[int, list[float]] = {8: [], 32: []}
    prompt = [list(range(20))]
    models = {blocks: tiny_model(num_hidden_layers=blocks) for blocks in seconds}
    for _ in range(rounds):
        for blocks, model in models.items():
            jax.clear_caches()
            generator = Generator(model)
            generator.generate(prompt, max_new_tokens=20)
            seconds[blocks].append(generator.programs.seconds)
    medians = {blocks: statistics.median(values) for blocks, values in seconds.items()}
    print(f"compiled in {medians[8]:.2f} s with 8 blocks, {medians[32]:.2f} s with 32: {medians[32] / medians[8]:.2f}x")
    return {"compile_seconds": seconds, "growth": medians[32] / medians[8]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="quik-4b")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unrolled", action="store_true", help="beside blocks that are scanned, blocks compiled one by one")
    parser.add_argument("--compile-growth", action="store_true")
    arguments = parser.parse_args()
    figures = growth(arguments.rounds) if arguments.compile_growth else decoding(arguments)
    machine = f"{platform.processor() or platform.machine()}, {jax.local_devices()[0].device_kind}"
    print(json.dumps({"machine": machine, "jax": jax.__version__, **figures}))


if __name__ == "__main__":
    main()
