"""A thousand ragged prompts through one process: each answer against its solo run, programs compiled, memory.

    python benchmarks/many_prompts.py [--model smollm2-135m] [--prompts 1000] [--solo 1000] [--tokens 8]

Prompts are pieces of the demo text, 1 to `--longest` tokens, in an order of a fixed seed, `--request` of them a call; greedy,
`deterministic=True`. Each of the first `--solo` is asked again by itself. Ends with status 1 where an answer differs, where
anything is compiled after each pair of a prompt's and a cache's bucket was met once, or where the process holds 5 % more in its
second half than in its first (medians; a request in between takes a moment's more).
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from quikjax.checkpoint.load import load
from quikjax.generation import Generator
from quikjax.generation.rows import bucket
from quikjax.texts import calibration_text, tokenize


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--solo", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--longest", type=int, default=200)
    parser.add_argument("--request", type=int, default=40)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    text = tokenize(tokenizer, calibration_text("pydoc").content)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, arguments.longest + 1, arguments.prompts)
    starts = rng.integers(0, len(text) - arguments.longest, arguments.prompts)
    prompts = [text[at : at + length].tolist() for at, length in zip(starts, lengths, strict=True)]
    generator = Generator(model, deterministic=True, release=True)

    def answer(some: list[list[int]]) -> np.ndarray:
        return generator.generate(some, max_new_tokens=arguments.tokens, stop=()).tokens

    # Every bucket of prompts beside every longer one, in every size of cache that it may need.
    met: dict[tuple[int, int], int] = {}
    for length in range(1, arguments.longest + 1):
        met.setdefault((bucket(length), generator.slots(max(length + arguments.tokens, bucket(length)))), length)
    for longer in met.values():
        for shorter in sorted({bucket(length) for length in range(1, longer + 1)}):
            answer([prompts[0][:1] * longer, prompts[0][:1] * min(shorter, longer)])
    compiled, start = generator.programs.compiled, time.perf_counter()
    answers, memory = [], []
    for at in range(0, arguments.prompts, arguments.request):
        answers.append(answer(prompts[at : at + arguments.request]))
        memory.append(resident())
    together, seconds = np.concatenate(answers), time.perf_counter() - start
    solo = range(min(arguments.solo, arguments.prompts))
    different = [i for i in solo if not np.array_equal(answer([prompts[i]])[0], together[i])]
    recompiled = generator.programs.compiled - compiled
    first, second = (statistics.median(part) for part in (memory[: len(memory) // 2], memory[len(memory) // 2 :]))
    growth = second / first - 1
    print(
        f"{arguments.prompts} prompts of 1 to {arguments.longest} tokens, {arguments.tokens} new ones each, in {seconds:.0f} s; "
        f"{len(different)} of {len(solo)} answers differ from their solo runs; {compiled} programs, {recompiled} compiled later; "
        f"memory {first / 1e6:.0f} MB in the first half, {second / 1e6:.0f} MB in the second ({growth:+.1%})"
    )
    machine = f"{platform.processor() or platform.machine()}, {jax.local_devices()[0].device_kind}"
    figures = {
        "machine": machine,
        "jax": jax.__version__,
        **vars(arguments),
        "seconds": seconds,
        "different": different,
        "compiled": compiled,
        "compiled_later": recompiled,
        "resident_bytes": memory,
    }
    print(json.dumps(figures))
    sys.exit(bool(different or recompiled or growth > 0.05))


if __name__ == "__main__":
    main()
