"""Activations between blocks, on disk, so that a killed quantization goes on with the very bits it had.

DIR/STEP/0.npy, 1.npy, ...   one host array per batch
DIR/STEP/sums.json           SHA-256 of each, written last: without it the step does not count
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

from quikjax.errors import QuikError


class ActivationStore:
    """Keep the activations that left the last finished step. Steps are named by the caller, in order.

    `put` writes a step whole before the one before it is removed, so that at every moment one step is whole.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(self, step: str, batches: list[np.ndarray]) -> None:
        """Write a step's activations. `commit` removes the others once the caller no longer needs them.

        Raises:
            QuikError: the disk is full or refuses.
        """
        target = self.directory / step
        try:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for index, batch in enumerate(batches):
                with open(target / f"{index}.npy", "wb") as file:
                    np.save(file, batch, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
            sums = target / "sums.json"
            with open(sums, "w") as text:
                json.dump([_digest(batch) for batch in batches], text)
                text.flush()
                os.fsync(text.fileno())
        except OSError as error:
            raise QuikError(
                f"cannot keep activations in {self.directory}: {error.strerror}; make room and run the same command again"
            ) from None

    def commit(self, step: str) -> None:
        """Remove every other step."""
        for other in self.directory.iterdir():
            if other.name != step:
                shutil.rmtree(other, ignore_errors=True)

    def get(self, step: str) -> list[np.ndarray]:
        """Read a step back.

        Raises:
            QuikError: it is not there, or not what was written.
        """
        directory = self.directory / step
        try:
            sums = json.loads((directory / "sums.json").read_text())
            batches = [np.load(directory / f"{index}.npy", allow_pickle=False) for index in range(len(sums))]
        except (OSError, ValueError, EOFError):
            raise QuikError(f"the activations in {directory} cannot be read; begin again with --restart") from None
        if [_digest(batch) for batch in batches] != sums:
            raise QuikError(f"the activations in {directory} have changed since they were written; begin again with --restart")
        return batches

    def clear(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _digest(batch: np.ndarray) -> str:
    return hashlib.sha256(f"{batch.dtype}{batch.shape}".encode() + np.ascontiguousarray(batch).tobytes()).hexdigest()
