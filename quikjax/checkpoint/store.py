"""Arrays on disk, written by Orbax and read by the library that Orbax reads and writes by: the only module that knows them.

What Orbax does not promise is promised elsewhere: bits and dtypes by the manifest, atomic replacement by `atomic`.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Beyond this, an array is stored in several chunks: compressing one takes a copy of it, whatever the array's size.
CHUNK_BYTES = 1 << 26


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from talking: what is wrong is raised.

    Through absl it warns about things that are as we want them (no OCDBT, no sharding file) and repeats the errors it raises. And
    when one array fails, the others, still being written, find its event loop closed and print that as if nobody caught it.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def filtered(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = filtered
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def _settle(directory: Path, still: float = 0.1, patience: float = 30.0) -> None:
    """After a failure, wait until the writes that Orbax left behind have ended: until nothing changes for a while."""
    before, end = None, time.monotonic() + patience
    while time.monotonic() < end:
        now = [(path, path.stat().st_size) for path in sorted(directory.rglob("*")) if path.exists()]
        if now == before:
            return
        before = now
        time.sleep(still)


def save_tree(directory: Path, tree: Mapping[str, Any]) -> None:
    """Write a nested dictionary of NumPy arrays, none of them empty, into an existing empty directory (an absolute path).

    Always host arrays, and without OCDBT: the same tree gives the same files with the same bytes. The handler is called
    without Orbax's `Checkpointer`, whose own commit files hold a time and a path.
    """
    import jax
    import orbax.checkpoint as ocp
    from etils import epath  # type: ignore[import-untyped]

    with _quiet():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        try:
            arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
            handler.save(epath.Path(directory), args=ocp.args.PyTreeSave(tree, save_args=arguments))
        except BaseException:
            _settle(directory)
            raise
        finally:
            handler.close()


def load_arrays(directory: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read arrays that `save_tree` wrote, as stored, by their full names `a.b.c`.

    Without Orbax, which takes several times as long as reading does: each array is a Zarr directory of its full name.

    Raises:
        ValueError: an array is not there, or damaged.
    """
    import tensorstore

    # All are on their way before the first is waited for.
    specs = {
        name: {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{directory / name}/"}, "fill_missing_data_reads": False}
        for name in names
    }
    opened = {name: tensorstore.open(spec, read=True) for name, spec in specs.items()}
    reading = {name: array.result().read() for name, array in opened.items()}
    return {name: array.result() for name, array in reading.items()}
