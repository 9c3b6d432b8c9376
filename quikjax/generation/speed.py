"""How fast a model reads and decodes, in the tests that llama-bench made known: `pp512`, `tg128`, `pp512+tg128 @ depth`.

Encoders are measured by `encoding.speed`, in the same rounds.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.errors import QuikError
from quikjax.generation.decode import NOTHING, Kind
from quikjax.generation.generator import Generator
from quikjax.generation.rows import bucket
from quikjax.generation.settings import Sampling
from quikjax.models import stacked
from quikjax.rounds import Prepared, Speed, speeds
from quikjax.speed_tests import Test


def measure(generators: Mapping[str, Generator], tests: Sequence[Test], rounds: int) -> dict[str, list[Speed[Test]]]:
    """Every model in every test: one run to warm up, then the models in turn, `rounds` times.

    Raises:
        QuikError: a test does not fit a model's context or memory, or `rounds` is not positive.
    """
    for generator in generators.values():
        for test in tests:
            if test.depth + test.prompt + test.new > generator.context:
                raise QuikError(f"{test.name} exceeds the context of {generator.context} tokens; give a smaller test")
            generator.check_memory(_slots(test), test.batch)
    prepare = {name: functools.partial(_prepared, generator) for name, generator in generators.items()}
    return speeds(tests, prepare, lambda test: test.batch * (test.prompt + test.new), rounds)


def _slots(test: Test) -> int:
    return test.depth + (bucket(test.prompt) if test.prompt else 0) + test.new + 1


def _prepared(generator: Generator, test: Test) -> Prepared:
    batch, run = test.batch, generator.programs.run
    rng = np.random.default_rng(0)
    lengths = np.full((batch,), test.prompt, np.int32)
    ids = np.zeros((batch, bucket(max(test.prompt, 1))), np.int32)
    ids[:, : test.prompt] = rng.integers(0, generator.config.vocab_size, (batch, test.prompt))
    start = np.full((batch,), test.depth, np.int32)
    stops = np.full((8,), NOTHING, np.int32)
    real, seeds, numbers = np.ones(batch, bool), np.zeros(batch, np.uint32), np.zeros(batch, np.int32)

    def once() -> float:
        cache = generator.new_cache(batch, generator.slots(_slots(test)))
        logits: Any = np.zeros((batch, generator.config.vocab_size), np.float32)
        jax.block_until_ready(cache)
        begin, compiling = time.perf_counter(), generator.programs.seconds
        if test.prompt:
            arguments = (generator.params, ids, start, lengths, cache)
            logits, cache = run(stacked.extend, (generator.layout,), arguments, donate=(4,))
        if test.new:
            at = np.maximum(start + lengths, 1)
            decoding = generator.begin(
                [[0]] * batch, logits, cache, at, real, seeds, numbers, test.new, Sampling().values(), stops, Kind()
            )
            decoding.advance()
            # The first token is chosen from the prompt's logits; without a prompt it takes no step.
            decoding.remaining += not test.prompt
            while decoding.remaining > 0:
                decoding.advance()
            jax.block_until_ready(decoding.state)
        else:
            jax.block_until_ready((logits, cache))
        return time.perf_counter() - begin - (generator.programs.seconds - compiling)

    before, generator.programs.largest = generator.programs.seconds, 0
    once()
    return Prepared(once, generator.programs.seconds - before, generator.programs.largest)


def bytes_per_token(generator: Generator, test: Test) -> int:
    """Bytes that decoding one step reads at least: every block's parameters, the head, and the keys and values at `depth`."""
    rest = jax.tree_util.tree_leaves_with_path(generator.params["rest"])
    untied = any("lm_head" in jax.tree_util.keystr(path) for path, _ in rest)
    looked_up = ("embed", "embeddings") if untied else ("embed_positions",)
    # Scalars say which of several weights is meant.
    read = sum(leaf.nbytes for path, leaf in rest if leaf.ndim and not any(n in jax.tree_util.keystr(path) for n in looked_up))
    blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(generator.params["runs"]) if leaf.ndim)
    config = generator.config
    width = 2 * config.layers * config.kv_heads * (config.head_size * jnp.dtype(generator.cache).itemsize)
    return blocks + read + test.batch * width * (test.depth + test.prompt)


def bandwidth(megabytes: int = 256, rounds: int = 5) -> float:
    """Bytes per second at which a CPU reads an array with all its cores, or another device copies one, the best of some rounds.

    Decoding reads. XLA's copy on a CPU is no measure of that: it writes to memory that the system clears first.
    """
    count = megabytes * 250_000
    if jax.default_backend() == "cpu":
        parts = np.array_split(np.ones(count, np.float32), os.cpu_count() or 1)
        with ThreadPoolExecutor(len(parts)) as pool:
            return 4 * count / min(_seconds(lambda: list(pool.map(np.max, parts))) for _ in range(rounds))
    array = jnp.zeros((count,), jnp.float32)
    shifted = jax.jit(lambda array: array + 1)
    jax.block_until_ready(shifted(array))
    return 2 * array.nbytes / min(_seconds(lambda: jax.block_until_ready(shifted(array))) for _ in range(rounds))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
