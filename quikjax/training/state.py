"""The state on disk from which a killed recovery goes on: written beside and renamed, checked when it is read.

WORK/inputs.json             what the run was started with; another run with the same output must have the same
WORK/states/step-000050/     everything that moves, at a step; the newest whole one counts (`quikjax.checkpoint.parts`)
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.checkpoint import atomic, parts
from quikjax.checkpoint.writer import differences
from quikjax.errors import QuikError, resumable

INPUTS, STATES = "inputs.json", "states"


class State(NamedTuple):
    """A recovery after `step` steps: what moves, the optimizer's state, what moved to the best validation figure so far.

    `notes` are JSON: the figures of the evaluations so far, and which of them is the best.
    """

    step: int
    moving: Any
    optimizer: Any
    best: Any
    notes: dict[str, Any]


class Store:
    """The directory `work`, held against other processes until `close`.

    Raises:
        QuikError: another process holds it; an earlier run with the same output had other inputs; the disk refuses.
    """

    def __init__(self, work: Path, inputs: Mapping[str, Any], *, restart: bool) -> None:
        self.work = work
        self._doing = f"cannot write {work}"
        now = json.loads(json.dumps(inputs))
        with resumable(self._doing):
            work.mkdir(parents=True, exist_ok=True)
        self._lock = atomic.lock(work)
        try:
            with resumable(self._doing):
                if restart:
                    self._empty()
                if (work / INPUTS).exists():
                    self._compare(now)
                else:
                    self._empty()
                    atomic.write_text(work / INPUTS, json.dumps(now, sort_keys=True, indent=1) + "\n")
                (work / STATES).mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    def _empty(self) -> None:
        for entry in self.work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _compare(self, now: dict[str, Any]) -> None:
        try:
            before = json.loads((self.work / INPUTS).read_text())
        except ValueError:
            raise QuikError(f"{self.work / INPUTS} is damaged; begin again with --restart") from None
        different = differences(before, now)
        if different:
            raise QuikError(
                f"{self.work} was left by a run with other inputs ({different}); repeat that run's inputs to go on, "
                "or begin again with --restart"
            )

    def save(self, state: State) -> None:
        """Write a state; older ones go once it is whole.

        Raises:
            QuikError: the disk is full or refuses. The state before is kept.
        """
        name = f"step-{state.step:06d}"
        arrays = {
            f"{half}.{index}": np.atleast_1d(np.asarray(leaf))
            for half, tree in (("moving", state.moving), ("optimizer", state.optimizer), ("best", state.best))
            for index, leaf in enumerate(jax.tree.leaves(tree))
        }
        arrays["notes"] = np.frombuffer(json.dumps(state.notes).encode(), np.uint8)
        with atomic.disk_errors(self._doing, "; the state before is kept, make room and run the same command again"):
            parts.write(self.work / STATES, name, arrays)
            for other in (self.work / STATES).iterdir():
                if other.name not in (name, f"{name}.json"):
                    shutil.rmtree(other) if other.is_dir() else other.unlink()

    def load(self, like: State) -> State | None:
        """The newest whole state, or `None`. `like` has the structure and the shapes, whatever its numbers.

        Raises:
            QuikError: there are states, and none of them is what was written.
        """
        damaged = None
        for label in sorted((self.work / STATES).glob("step-*.json"), reverse=True):
            name = label.stem
            try:
                held = parts.read(self.work / STATES, name, parts.read_label(self.work / STATES, name))
            except QuikError as error:
                damaged = error
                continue
            trees = [
                jax.tree.unflatten(
                    jax.tree.structure(tree),
                    [
                        jnp.asarray(held[f"{half}.{index}"]).reshape(np.shape(leaf))
                        for index, leaf in enumerate(jax.tree.leaves(tree))
                    ],
                )
                for half, tree in (("moving", like.moving), ("optimizer", like.optimizer), ("best", like.best))
            ]
            step, notes = int(name.removeprefix("step-")), json.loads(bytes(np.asarray(held["notes"])))
            return State(step, trees[0], trees[1], trees[2], notes)
        if damaged is not None:
            raise QuikError(f"{damaged}; begin again with --restart")
        return None

    def remove(self) -> None:
        """Delete the directory: the artifact is there."""
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        """Let other processes in."""
        os.close(self._lock)
