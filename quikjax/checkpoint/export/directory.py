"""A Hugging Face directory from an artifact, whatever form its weights are to have there.

    DIR/config.json, DIR/model.safetensors            or, above SHARD_BYTES,
    DIR/model-00001-of-0000N.safetensors, DIR/model.safetensors.index.json
    DIR/tokenizer.json, ...                           the artifact's tokenizer, if it has one: the source's own files
    DIR/generation_config.json                        which tokens end a text: the source's, or all that its files name

One part (a transformer block) is in memory at a time: a file's header, which the format wants first, follows from shapes alone.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from quikjax.checkpoint import REST, Reader, atomic, tokenizers
from quikjax.checkpoint.manifest import Part, canonical
from quikjax.checkpoint.output import TOKENIZER, beside, is_empty, real_path, refuse_file_in_the_way, remove
from quikjax.errors import QuikError
from quikjax.loading.source import GENERATION_CONFIG, stops_of
from quikjax.models.base import CausalLM, Transformer
from quikjax.models.registry import abstract_model
from quikjax.models.stops import named_stops

SHARD_BYTES = 5 * 10**9
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NAMES = {**FLOATS, "int32": "I32"}

# Called with how many parts are written, and how many there are.
Progress = Callable[[int, int], None]


class Exported(NamedTuple):
    """A finished export: the files that hold weights, their bytes together, and the dtype of what is in floats."""

    files: tuple[str, ...]
    bytes: int
    dtype: str


class Tensor(NamedTuple):
    """A tensor that a directory will hold."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How a directory holds an artifact's parameters.

    `tensors`: by part in the order of the files, by published name in the order within one. `arrays` gives, of a part's
    parameters by their own paths, arrays in that order, one at a time. `dtype` is that of what is in floats. `config`: fields to
    add to the configuration.
    """

    dtype: str
    tensors: Mapping[str, Mapping[str, Tensor]]
    arrays: Callable[[Mapping[str, Any]], Iterator[tuple[str, np.ndarray]]]
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def export_directory(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form_of: Callable[[Reader, type[Transformer]], Form],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Write the artifact in directory `artifact` as the Hugging Face directory `out`.

    Args:
        artifact: its directory, or its hub name.
        out: a directory that does not exist, or is empty. Until the export is whole, it is `OUT.exporting`, or
            `OUT/quikjax.exporting` where OUT is there already.
        form_of: how, given the artifact and its model's class.
        shard_bytes: begin another file beyond this; a part is never divided.

    Raises:
        QuikError: the artifact is damaged or no model of ours, `out` exists, or the disk is full or refuses; and what the form
            raises. Nothing is left of `out` then.
    """
    target = real_path(out)
    refuse_file_in_the_way(target)
    if os.path.lexists(target) and not (target.is_dir() and is_empty(target)):
        raise QuikError(f"{target} exists; choose another directory")
    reader = Reader(artifact)
    if reader.manifest.config is None:
        raise QuikError(f"{reader.path} holds parameters without a model configuration; there is no model to export")
    family = type(abstract_model(reader.manifest.config))
    form = form_of(reader, family)
    sizes = {name: sum(tensor.bytes for tensor in held.values()) for name, held in form.tensors.items()}
    shards, total = _shards(sizes, shard_bytes), sum(sizes.values())
    partial, tokenizer = beside(target, "exporting"), reader.path / TOKENIZER
    if os.path.lexists(partial) and not partial.is_dir():
        raise QuikError(f"{partial} is needed as a directory to write the export, but is a file; move it away")
    with atomic.disk_errors(f"cannot export to {target}", "; nothing was kept"):
        partial.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(partial.parent).free
        if free < total:
            raise QuikError(f"{target} needs {total / 1e6:.0f} MB, the disk has {free / 1e6:.0f} MB left; nothing was written")
        partial.mkdir(exist_ok=True)
        _refuse_strangers(partial, tokenizer)
        lock = atomic.lock(partial)
        try:
            for left in partial.iterdir():  # by an export that was killed
                remove(left)
            files = _write_weights(partial, reader, form, shards, progress)
            config = {
                "architectures": [family.__name__],
                **_for_any_version(reader.manifest.config),
                "torch_dtype": form.dtype,
                **form.config,
            }
            atomic.write_text(partial / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
            generation_config = _generation_config(reader) if issubclass(family, CausalLM) else reader.generation_config()
            if generation_config is not None:
                atomic.write_text(partial / GENERATION_CONFIG, canonical(generation_config))
            if tokenizer.is_dir():
                tokenizers.export(tokenizer, partial)
            atomic.sync_tree(partial)
            if partial.parent == target:
                # A directory that was there stays; what makes it a model, its configuration, comes last.
                for name in sorted(os.listdir(partial), key=lambda name: (name == "config.json", name)):
                    os.rename(partial / name, target / name)
                partial.rmdir()
                atomic.sync(target)
                return Exported(tuple(files), total, form.dtype)
            if os.path.lexists(target):
                raise QuikError(f"{target} appeared while it was written; choose another directory")
            atomic.publish(partial, target, replace=False)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(lock)
    return Exported(tuple(files), total, form.dtype)


def _generation_config(reader: Reader) -> dict[str, Any] | None:
    """The source's `generation_config.json`; where it had none, one with the end tokens, if its tokenizer names more of them.

    Libraries that generate from such a directory read this file or `config.json`, and ask no tokenizer.
    """
    written, config = reader.generation_config(), reader.manifest.config or {}
    if written is not None:
        return written
    named = named_stops(config, "config.json")
    more = set(stops_of(config, None, reader.tokenizer(), str(reader.path))) - set(named)
    if not more:
        return None
    ends = [*named, *sorted(more)]
    others = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    return others | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def _for_any_version(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that transformers 4 reads as transformers 5 does, which gave some fields new names.

    Version 4 passes over what it does not know, and would rotate positions by its own default base.

    >>> _for_any_version({"dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    {'rope_parameters': {'rope_type': 'default', 'rope_theta': 500000.0}, 'rope_theta': 500000.0}
    """
    fields = {name: value for name, value in config.items() if name != "dtype"}  # of the source's files
    rope = fields.get("rope_parameters")
    if isinstance(rope, Mapping):
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        older = {"rope_theta": rope.get("rope_theta"), "rope_scaling": None}
        if scaling.get("rope_type", "default") != "default":
            older["rope_scaling"] = scaling
        fields |= {name: value for name, value in older.items() if value is not None and fields.get(name) is None}
    return fields


def _refuse_strangers(partial: Path, tokenizer: Path) -> None:
    """Remove what a killed export left; refuse anything else, which is somebody's."""
    beside = {entry.name for entry in tokenizer.iterdir()} if tokenizer.is_dir() else set()
    ours = r"(model[\w.-]*\.(safetensors|json)|(generation_)?config\.json)(\.tmp)?"
    for entry in sorted(os.listdir(partial)):
        if entry not in beside and not re.fullmatch(ours, entry):
            raise QuikError(f"{partial} is needed to write the export but holds {entry}; move it away")


def in_order(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Embeddings and head, then the blocks by number ("10" after "9")."""

    def place(name: str) -> tuple[int, str]:
        number = name.rpartition(".")[2]
        return (-1 if name == REST else int(number) if number.isdigit() else 0, name)

    return {name: parts[name] for name in sorted(parts, key=place)}


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Parts divided into files, in order, each as full as `limit` allows.

    >>> _shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6)
    [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _write_weights(directory: Path, reader: Reader, form: Form, shards: list[list[str]], progress: Progress | None) -> list[str]:
    """Every shard, and the index if there are several; the names of the shards."""
    files, places, done = [], {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        files.append(file)
        inside = {tensor: held for name in names for tensor, held in form.tensors[name].items()}
        places.update(dict.fromkeys(inside, file))
        with (directory / file).open("wb") as stream:
            _write_header(stream, inside)
            for name in names:
                written = []
                for tensor, array in form.arrays(reader.read_part(name)):
                    if (array.shape, array.dtype.name) != inside[tensor]:
                        raise AssertionError(f"{tensor} is {array.dtype} {array.shape}, its header says {inside[tensor]}")
                    # Not every dtype (bfloat16) can hand out a buffer of its own.
                    stream.write(np.ascontiguousarray(array).view(f"u{array.itemsize}").data)
                    written.append(tensor)
                if written != list(form.tensors[name]):
                    raise AssertionError(f"{name} was written as {written}, its header says {list(form.tensors[name])}")
                done += 1
                if progress is not None:
                    progress(done, len(form.tensors))
    if len(shards) > 1:
        size = sum(tensor.bytes for held in form.tensors.values() for tensor in held.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        atomic.write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return files


def _write_header(stream: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """The head of a safetensors file: its length in eight bytes, then JSON, padded to a multiple of eight."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.bytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
