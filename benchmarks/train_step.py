"""A step of quantization-aware training with distillation beside a step of fine-tuning in floats, in turn, medians.

    python benchmarks/train_step.py [MODEL] [--recipe rtn-w4a4] [--batch 32] [--rounds 7]

Batches of random tokens, full to each length that texts are padded to. The ratio counts the teacher's forward pass.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.checkpoint.load import load
from quikjax.quantizing.recipe import find_recipe
from quikjax.training import masks
from quikjax.training.examples import Batch, Examples
from quikjax.training.student import as_classifier, beginning
from quikjax.training.train import make_step, take_student, take_teacher
from quikjax.training.train_settings import TrainSettings, optimizer


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="all-minilm-l6-v2")
    parser.add_argument("--recipe", default="rtn-w4a4")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64])
    given = parser.parse_args()
    start = as_classifier(beginning(load(given.model)[0]), ("no", "yes"), 0)
    nothing = Examples([], None, np.zeros(0, np.int32))
    alone = TrainSettings(label_weight=1, soft_weight=0, hidden_weight=0, attention_weight=0)
    teacher = take_teacher(start, tuple(range(start.model.config.layers)))
    ways = {}
    for name, recipe, settings, guide in (("float", "fp", alone, None), (given.recipe, given.recipe, TrainSettings(), teacher)):
        student, (moving, found) = take_student(start, find_recipe(recipe), settings, nothing)
        step = make_step(
            student.skeleton, None if guide is None else guide.skeleton, () if guide is None else guide.matching, settings
        )
        taught = None if guide is None else (guide.still, guide.moving)
        ways[name] = [step, masks.put(student.still, found), moving, optimizer(settings).init(moving), taught]
    print(f"| length | float | {given.recipe} | ratio |\n|---:|---:|---:|---:|")
    for length in given.lengths:
        batch = random_batch(start.model.config.vocab_size, given.batch, length)
        laps: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(given.rounds + 1):
            for name, way in ways.items():
                taken = timed(way, batch)
                if turn:  # the first compiles
                    laps[name].append(taken)
        float_time, other = (statistics.median(laps[name]) for name in ways)
        print(f"| {length} | {float_time:.3f} s | {other:.3f} s | {other / float_time:.2f} |", flush=True)


def random_batch(vocabulary: int, rows: int, length: int) -> Batch:
    """Random tokens, none of them padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, vocabulary, (rows, length)).astype(np.int32)
    labels = rng.integers(0, 2, rows).astype(np.int32)
    return Batch(ids, np.ones_like(ids), None, labels, np.ones(rows, np.float32))


def timed(way: list[Any], batch: Batch) -> float:
    """Take one step, and say how many seconds it took."""
    step, still, moving, state, taught = way
    began = time.perf_counter()
    moving, state, loss, _ = jax.block_until_ready(step(still, moving, state, taught, batch))
    took = time.perf_counter() - began
    assert bool(jnp.isfinite(loss))
    way[2:4] = moving, state
    return took


if __name__ == "__main__":
    main()
