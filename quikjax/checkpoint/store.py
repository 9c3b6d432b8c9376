"""Arrays on disk, by Orbax: the only module that knows it.

What Orbax does not promise is promised elsewhere: bits and dtypes by the manifest, atomic replacement by `atomic`.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Beyond this, an array is stored in several chunks: compressing one takes a copy of it, whatever the array's size.
CHUNK_BYTES = 1 << 26


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns through absl about things that are as we want them (no OCDBT, no sharding file)."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
        finally:
            handler.close()


def load_tree(directory: Path, names: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arrays whose places `names` gives (a nested dictionary; its leaves do not matter) as stored, as NumPy arrays."""
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    with _quiet():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        try:
            # No target and no dtype: with either, Orbax would cast without a word.
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            return handler.restore(epath.Path(directory), args=ocp.args.PyTreeRestore(restore_args=arguments))
        finally:
            handler.close()
