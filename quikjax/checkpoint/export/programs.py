"""From a model to a directory of programs that generate without quikjax: `jax.export`, arrays that NumPy reads, and a runner.

DIR/export.json                          how to call the programs; name, shape and dtype of every parameter
DIR/prefill-PLATFORM.jax, decode-...     the programs, serialized by `jax.export`
DIR/params.npz                           the parameters: int4 as two codes in a byte, bfloat16 as its bits in uint16
DIR/tokenizer.json                       the tokenizer, if the model has one that the library tokenizers reads
DIR/run.py                               a greedy loop over the programs
"""

import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.checkpoint import atomic
from quikjax.checkpoint.export import runner
from quikjax.checkpoint.load import load
from quikjax.checkpoint.output import beside, is_empty, real_path, refuse_file_in_the_way, remove
from quikjax.errors import QuikError
from quikjax.generation.export import NOT_EXPORTED, ExportedPrograms, check_platforms, export_programs
from quikjax.texts import tokenize

DESCRIPTION, PARAMS, RUNNER, TOKENIZER = "export.json", "params.npz", "run.py", "tokenizer.json"
LENGTH, CONTEXT = 128, 1024


class Exported(NamedTuple):
    """A finished export: its files, their bytes together, and what it was made for."""

    files: tuple[str, ...]
    bytes: int
    programs: ExportedPrograms


def export_jax(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    length: int | None = None,
    context: int | None = None,
    batch: int = 1,
    cache: str | None = None,
    platforms: Sequence[str] = ("cpu",),
) -> Exported:
    """Write the programs of greedy generation with an artifact or a published model to the directory `out`, with a runner.

    Args:
        model: whatever `load` takes. All of it is held in memory, its largest stack of blocks twice.
        out: a directory that does not exist, or is empty. Until the export is whole, it is `OUT.exporting`, or
            `OUT/quikjax.exporting` where OUT is there already.
        length: tokens that prompts are padded to; left out, 128, or all but one of a shorter context.
        context: tokens of a prompt and its continuation at most; left out, 1024, or the model's own if that is shorter.
        batch, cache, platforms: see `export_programs`.

    Raises:
        QuikError: as `load` and `export_programs`; `out` exists, or the disk is full or refuses. Nothing is left of `out` then.
    """
    platforms = check_platforms(platforms)
    target = real_path(out)
    refuse_file_in_the_way(target)
    if os.path.lexists(target) and not (target.is_dir() and is_empty(target)):
        raise QuikError(f"{target} exists; choose another directory")
    partial = beside(target, "exporting")
    if os.path.lexists(partial) and not (partial.is_dir() and _is_ours(partial)):
        raise QuikError(f"{partial} is needed to write the export, but is something else; move it away")
    network, tokenizer = load(os.fspath(model))
    context = min(CONTEXT, network.config.context_length) if context is None else context
    made = export_programs(
        network,
        length=min(LENGTH, context - 1) if length is None else length,
        context=context,
        batch=batch,
        cache=cache,
        platforms=platforms,
        release=True,
    )
    with atomic.disk_errors(f"cannot export to {target}", "; nothing was kept"):
        partial.mkdir(parents=True, exist_ok=True)
        lock = atomic.lock(partial)
        try:
            for left in partial.iterdir():  # by an export that was killed
                remove(left)
            _write(partial, made, tokenizer)
            atomic.sync_tree(partial)
            if partial.parent == target:
                # A directory that was there stays, as a mount point must; what says how programs are called comes last.
                for name in sorted(os.listdir(partial), key=lambda name: (name == DESCRIPTION, name)):
                    os.rename(partial / name, target / name)
                partial.rmdir()
                atomic.sync(target)
            else:
                atomic.publish(partial, target, replace=False)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)
    files = tuple(sorted(name for name in os.listdir(target) if _is_our_file(name)))
    return Exported(files, sum((target / file).stat().st_size for file in files), made)


def _is_ours(partial: Path) -> bool:
    return all(_is_our_file(name) or name.endswith(".tmp") for name in os.listdir(partial))


def _is_our_file(name: str) -> bool:
    return name in (DESCRIPTION, PARAMS, RUNNER, TOKENIZER) or name.endswith(".jax")


def _write(directory: Path, made: ExportedPrograms, tokenizer: Any) -> None:
    places: dict[str, dict[str, str]] = {}
    for platform, programs in made.programs.items():
        for name, program in programs.items():
            places.setdefault(platform, {})[name] = f"{name}-{platform}.jax"
            (directory / places[platform][name]).write_bytes(program)
    write_arrays(directory / PARAMS, made.params)
    description = {
        "jax": jax.__version__,
        "programs": places,
        "not_exported": NOT_EXPORTED,
        "calls": {
            "prefill": "(params, ids int32 [batch, length] padded on the right, lengths int32 [batch], running bool [batch], "
            "stops int32 [stops]) -> tokens int32 [batch, 1], state",
            "decode": "(params, state, stops, limit int32 [] up to chunk) -> tokens int32 [batch, chunk], state; -1 behind a "
            "row's stop token, state['running'] says which rows go on",
        },
        "batch": made.batch,
        "length": made.length,
        "context": made.context,
        "chunk": made.chunk,
        "cache": {"dtype": made.cache, "slots": made.slots},
        "stops": made.stops.tolist(),
        # What the tokenizer puts before a text; what it puts behind would end the text.
        "before": [] if tokenizer is None else tokenize(tokenizer, "").tolist(),
        "parameters": {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in made.params.items()},
    }
    atomic.write_text(directory / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        core.save(str(directory / TOKENIZER))
    shutil.copyfile(runner.__file__, directory / RUNNER)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as an `.npz` that `numpy.load` opens, one after the other; equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            # A fixed date; entries beyond 4 GB.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, carried(np.asarray(array)), allow_pickle=False)


def carried(array: np.ndarray) -> np.ndarray:
    """An array in a dtype that NumPy knows: int4 as int8 `[ceil(size / 2)]`, two codes each, the first in the lower half; other
    dtypes of JAX alone as the bits of unsigned integers.

    >>> carried(np.array([1, -1, 7], jnp.int4)).tolist()
    [-15, 7]
    """
    if array.dtype == jnp.int4:
        codes = array.reshape(-1).astype(np.int8)
        pairs = np.append(codes, np.zeros(codes.size % 2, np.int8)).reshape(-1, 2)
        return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
    if array.dtype.isbuiltin != 1:
        return array.view(f"u{array.dtype.itemsize}")
    return array
