"""What the processes do that `test_kill.py` kills. A module of its own, because they are started from a fork server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint  # noqa: F401  (before the fork: the library itself imports it late, and each process would wait for it)
from tiny_artifacts import SMALL, build, pack, random_params

from quikjax import checkpoint

PARTS = [f"block.{index}" for index in range(4)]


def save_two_by_turns(path: Path, started: Callable[[], None]) -> None:
    """Replace an artifact by another and back, without end."""
    models = [build(random_params(seed, config=SMALL), SMALL) for seed in (0, 1)]
    started()
    while True:
        for model in models:
            checkpoint.save(path, model, force=True)


def part(name: str) -> dict[str, Any]:
    """The parameters of one part, the same every time."""
    rng = np.random.default_rng(PARTS.index(name))
    return {f"{name}.packed": pack(rng, (16, 16)), f"{name}.dense": rng.normal(size=(8, 8)).astype(np.float32)}


def write_resumably(path: Path, started: Callable[[], None]) -> None:
    """A long run: goes on where an earlier one was killed, then finishes."""
    made = {name: part(name) for name in PARTS}
    started()
    with checkpoint.Writer(path, recipe={"name": "r"}, resume=True) as writer:
        for name in PARTS:
            if name not in writer.completed_parts():
                writer.write_part(name, made[name])
        writer.finish(report=[{"layer": name} for name in PARTS])
