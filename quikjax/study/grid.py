"""A grid of runs, one JSON row per cell, that goes on where a killed run stopped.

The file of rows is append-only: a row is written whole, with its newline, and synced before the next cell begins. A row's `key`
is the SHA-256 of its cell's parameters and of `inputs`, so a changed text, model or recipe computes anew instead of quoting
an old figure. Rows hold no time and no path: a grid that was killed and went on leaves the bytes of one that was not.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from quikjax.errors import QuikError, resumable
from quikjax.files import user_path

Json = Any


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid: `parameters`, JSON values that tell it from the others, and the `command` that repeats it alone."""

    parameters: Mapping[str, Json]
    command: str = ""

    @property
    def label(self) -> str:
        """The parameters in one line, for people.

        >>> Cell({"outliers": 0.25, "clip": True}).label
        'outliers 0.25, clip true'
        """
        return ", ".join(
            f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in self.parameters.items()
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """A finished cell with its `result`, a JSON object. Numbers in it that are not finite are `None`."""

    key: str
    parameters: Mapping[str, Json]
    command: str
    result: Mapping[str, Json]

    def as_json(self) -> dict[str, Json]:
        """A JSON object, as the file of rows has it."""
        return dataclasses.asdict(self)


@runtime_checkable
class Progress(Protocol):
    """Callbacks of a running grid."""

    def start(self, cells: int, finished: int) -> None:
        """Work begins: so many cells, so many of them finished by an earlier run."""

    def begin(self, cell: Cell) -> None:
        """A cell begins."""

    def end(self, row: Row, done: int, total: int, seconds: float, seconds_left: float) -> None:
        """A cell's row is on disk."""


class NoProgress:
    def start(self, cells: int, finished: int) -> None: ...
    def begin(self, cell: Cell) -> None: ...
    def end(self, row: Row, done: int, total: int, seconds: float, seconds_left: float) -> None: ...


def key_of(parameters: Mapping[str, Json], inputs: Mapping[str, Json]) -> str:
    """SHA-256 of a cell's parameters and of what all cells share, whatever the order of their names.

    Raises:
        QuikError: JSON cannot hold one of them.
    """
    try:
        text = json.dumps({"parameters": dict(parameters), "inputs": dict(inputs)}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise QuikError(f"the parameters of a cell cannot be saved as JSON: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()


def read_rows(path: str | os.PathLike[str]) -> dict[str, Row]:
    """The finished rows of a grid by key, none where there is no file. A last line that a kill cut short does not count.

    Raises:
        QuikError: a line is no row of a grid.
    """
    try:
        text = user_path(path).read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise QuikError(f"cannot read {path}: {error.strerror}") from None
    found = {}
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError):
            raise QuikError(f"line {number} of {path} is no row of a study; move the file away to begin again") from None
        found[row.key] = row
    return found


def finished_cells(cells: Sequence[Cell], path: str | os.PathLike[str], inputs: Mapping[str, Json]) -> list[bool]:
    """Which cells `run_grid` would find done, in their order: what a dry run prints."""
    rows = read_rows(path)
    return [key_of(cell.parameters, inputs) in rows for cell in cells]


def run_grid(
    cells: Sequence[Cell],
    compute: Callable[[Cell], Mapping[str, Json]],
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, Json],
    progress: Progress | None = None,
) -> list[Row]:
    """Compute every cell that has no row in `path` yet, in order, and return the rows of all.

    Args:
        cells: with parameters of their own each.
        compute: gives a cell's result, a JSON object. An error it raises ends the run; what was finished stays.
        path: the file of rows; made, with its directory, if it is not there. Rows of other cells in it are left alone.
        inputs: what all cells share and every figure depends on: fingerprints of model and texts, the library's version.
        progress: told of each cell.

    Raises:
        QuikError: two cells have the same parameters, another run is writing to `path`, a line of it is no row, or the disk
            refuses.
    """
    progress = progress or NoProgress()
    keys = [key_of(cell.parameters, inputs) for cell in cells]
    for cell, key in zip(cells, keys, strict=True):
        if keys.count(key) > 1:
            raise QuikError(f"two cells have the same parameters ({cell.label})")
    target = user_path(path)
    with _locked(target):
        rows = read_rows(target)
        missing = [(cell, key) for cell, key in zip(cells, keys, strict=True) if key not in rows]
        progress.start(len(cells), len(cells) - len(missing))
        began = time.perf_counter()
        for done, (cell, key) in enumerate(missing, 1):
            progress.begin(cell)
            started = time.perf_counter()
            row = Row(key, dict(cell.parameters), cell.command, _finite(dict(compute(cell))))
            _append(target, json.dumps(row.as_json(), allow_nan=False) + "\n")
            rows[key] = row
            now = time.perf_counter()
            left = (now - began) / done * (len(missing) - done)
            progress.end(row, len(cells) - len(missing) + done, len(cells), now - started, left)
    return [rows[key] for key in keys]


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """The directory is there, nobody else writes, and the file ends in a whole row. The lock ends with the process."""
    with resumable(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise QuikError(f"another run is writing to {target}; wait for it, or give another directory") from None
        text = target.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.ftruncate(handle, whole)
        yield
    finally:
        os.close(handle)


def _append(target: Path, line: str) -> None:
    with resumable(f"cannot write {target}"), open(target, "ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _finite(value: Json) -> Json:
    if isinstance(value, Mapping):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if hasattr(value, "item"):  # NumPy's and JAX's scalars
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
