"""Activations between blocks: in memory, or on disk where they exceed a budget, and on disk in any case for a killed run.

DIR/STEP/0.npy, 1.npy, ...       one host array per batch
DIR/STEP/sums.json               dtype and SHA-256 of each, written last: without it the step does not count
DIR/inputs/GROUP.0.npy, ...      what a group of layers reads in each batch of the block in work, only where it is on disk

Where they are changes no number: a quantization gives the same bits in memory and on disk, and goes on from one in the other.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from quikjax.errors import QuikError, resumable


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """An array in a `.npy` file, read when it is needed. The file does not say its dtype where NumPy has none (bfloat16)."""

    path: Path
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Map the file: only what is used is read, and memory is free again once the result is dropped.

        Raises:
            QuikError: the file is gone, or is not what was written.
        """
        try:
            return np.asarray(np.load(self.path, mmap_mode="r", allow_pickle=False)).view(self.dtype)
        except (OSError, ValueError, TypeError, EOFError):
            raise QuikError(f"the activations in {self.path} cannot be read; begin again with --restart") from None


# One batch, wherever it is.
Batch = np.ndarray | OnDisk


def read(batch: Batch) -> np.ndarray:
    """The batch as an array, mapped where it is on disk: keep it no longer than it is used."""
    return batch.read() if isinstance(batch, OnDisk) else batch


class Activations:
    """A store of a quantization's activations in memory only."""

    def put(self, step: str, batches: Iterable[np.ndarray]) -> list[Batch]:
        """Take what enters or leaves a block, batch by batch."""
        return list(batches)

    def keep(self, group: str, index: int, x: np.ndarray) -> Batch:
        """Take what a group of layers reads in a batch, for the later passes over the same block."""
        return x


class ActivationStore(Activations):
    """Write the activations that left the last finished step to `directory`. Steps are named by the caller, in order.

    `put` writes a step whole before `commit` removes the one before it, so that at every moment one step is whole. With `spill`
    the files are all there is: batches are mapped from them one at a time, and what groups read is written beside them.
    """

    def __init__(self, directory: Path, *, spill: bool = False) -> None:
        self.directory = directory
        self.spill = spill

    def put(self, step: str, batches: Iterable[np.ndarray]) -> list[Batch]:
        """Write a step's activations, each batch as it comes. `commit` removes the others once nobody needs them any more.

        Raises:
            QuikError: the disk is full or refuses.
        """
        target = self.directory / step
        with self._disk_errors():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
        written: list[Batch] = []
        sums = []
        for index, batch in enumerate(batches):
            written.append(self._write(target / f"{index}.npy", batch, sync=True))
            sums.append([str(batch.dtype), _digest(batch)])
        with self._disk_errors(), open(target / "sums.json", "w", encoding="utf-8") as text:
            json.dump(sums, text)
            text.flush()
            os.fsync(text.fileno())
        return written

    def keep(self, group: str, index: int, x: np.ndarray) -> Batch:
        """Take what a group of layers reads in a batch, until the block's `commit`. No later run reads it.

        Raises:
            QuikError: the disk is full or refuses.
        """
        if not self.spill:
            return x
        directory = self.directory / "inputs"
        with self._disk_errors():
            directory.mkdir(parents=True, exist_ok=True)
        return self._write(directory / f"{group}.{index}.npy", x, sync=False)

    def commit(self, step: str) -> None:
        """Remove everything but this step."""
        for other in self.directory.iterdir():
            if other.name != step:
                shutil.rmtree(other, ignore_errors=True)

    def get(self, step: str) -> list[Batch]:
        """Find a step again, every batch compared with its checksum.

        Raises:
            QuikError: it is not there, or not what was written.
        """
        directory = self.directory / step
        try:
            sums = [
                (np.dtype(dtype), digest) for dtype, digest in json.loads((directory / "sums.json").read_text(encoding="utf-8"))
            ]
        except (OSError, ValueError, TypeError):
            raise QuikError(f"the activations in {directory} cannot be read; begin again with --restart") from None
        batches: list[Batch] = []
        for index, (dtype, digest) in enumerate(sums):
            stored = OnDisk(directory / f"{index}.npy", dtype)
            batch = stored.read()
            if _digest(batch) != digest:
                raise QuikError(
                    f"the activations in {directory} have changed since they were written; begin again with --restart"
                )
            batches.append(stored if self.spill else np.array(batch))
        return batches

    def _write(self, path: Path, batch: np.ndarray, *, sync: bool) -> Batch:
        with self._disk_errors(), open(path, "wb") as file:
            np.save(file, batch, allow_pickle=False)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        return OnDisk(path, batch.dtype) if self.spill else batch

    def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
        return resumable(f"cannot keep activations in {self.directory}")


def _digest(batch: np.ndarray) -> str:
    digest = hashlib.sha256(f"{batch.dtype}{batch.shape}".encode())
    digest.update(np.ascontiguousarray(batch).view(np.uint8).data)
    return digest.hexdigest()
