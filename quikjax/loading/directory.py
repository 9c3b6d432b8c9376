"""A directory as Hugging Face publishes it: `config.json`, tokenizer files, and weights as safetensors or Flax msgpack."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quikjax.errors import QuikError
from quikjax.loading import safetensors_header
from quikjax.loading.source import GENERATION_CONFIG, Source, TensorInfo, read_json
from quikjax.loading.tokenizer import read_tokenizer, tokenizer_files


class DirectorySource(Source, abc.ABC):
    """A directory with `config.json` and tokenizer, whatever the format of its weights."""

    def __init__(self, directory: Path, revision: str | None = None) -> None:
        """Read `config.json` of `directory`.

        Raises:
            QuikError: there is none, it is damaged, or it says that the weights are already quantized.
        """
        self.directory = directory
        self.revision = revision
        self.where = str(directory) if revision is None else revision
        if not (directory / "config.json").is_file():
            raise QuikError(f"{directory} has no config.json; it is not the directory of a published model")
        self.config = read_json(directory / "config.json")
        quantization = self.config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
            raise QuikError(f'{self.where} is already quantized (quantization_config: "{method}"); give the original model')

    def tokenizer(self) -> Any | None:
        return read_tokenizer(self.directory, self.config)

    def tokenizer_files(self) -> tuple[Path, ...]:
        return tokenizer_files(self.directory)

    def generation_config(self) -> dict[str, Any] | None:
        path = self.directory / GENERATION_CONFIG
        return read_json(path) if path.is_file() else None


def read_index(path: Path) -> dict[str, list[str]]:
    """Read an index file: the tensors that it expects in each shard, `{shard: names}`, shards in order of name.

    Raises:
        QuikError: it is damaged, or names a shard that is not there.
    """
    entries = read_json(path).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(shard, str) for shard in entries.values()):
        raise QuikError(f'{path} has no usable "weight_map"; copy or download it again')
    shards: dict[str, list[str]] = {shard: [] for shard in sorted(set(entries.values()))}
    for name, shard in entries.items():
        shards[shard].append(name)
    missing = [shard for shard in shards if Path(shard).name != shard or not (path.parent / shard).is_file()]
    if missing:
        raise QuikError(f"{path.parent} lacks {len(missing)} of {len(shards)} shards of the weights: {', '.join(missing[:3])}")
    return shards


def check_shards(path: Path, expected: Mapping[str, list[str]], held: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare an index file with what its shards hold.

    Raises:
        QuikError: a tensor is not in the shard that the index names (two shards swapped, or mixed with another model's), or
            is in one that the index does not name.
    """
    really = {name: shard for shard, names in held.items() for name in names}
    for shard, names in expected.items():
        for name in names:
            if name in held[shard]:
                continue
            found = f"it is in {really[name]}: the shards are swapped" if name in really else "no shard has it"
            raise QuikError(f"{path.parent}: tensor {name} is not in {shard}, where {path.name} has it ({found})")
    listed = {name for names in expected.values() for name in names}
    extra = [name for name in really if name not in listed]
    if extra or sum(map(len, held.values())) != len(really):
        odd = extra[0] if extra else next(n for s, names in held.items() for n in names if really[n] != s)
        raise QuikError(f"{path.parent}: {path.name} and its shards do not belong together (tensor {odd})")


class SafetensorsSource(DirectorySource):
    """`model.safetensors`, or shards with `model.safetensors.index.json`."""

    def __init__(self, directory: Path, revision: str | None = None) -> None:
        """Read the configuration, the index and the header of every shard, and compare them.

        Raises:
            QuikError: any of them is missing, damaged, truncated, or contradicts another.
        """
        super().__init__(directory, revision)
        single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
        if single.is_file():
            self.files = (single,)
            held = {single.name: safetensors_header.read_header(single)}
        elif index.is_file():
            expected = read_index(index)
            self.files = tuple(directory / shard for shard in expected)
            held = {path.name: safetensors_header.read_header(path) for path in self.files}
            check_shards(index, expected, held)
        else:
            raise QuikError(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
        self._entries = {name: (directory / shard, entry) for shard, entries in held.items() for name, entry in entries.items()}
        self._tensors = {
            name: TensorInfo(entry.shape, entry.dtype, entry.dtype.name, entry.size) for name, (_, entry) in self._entries.items()
        }

    def tensors(self) -> dict[str, TensorInfo]:
        return self._tensors

    def _read(self, name: str) -> np.ndarray:
        path, entry = self._entries[name]
        array = np.fromfile(
            path, dtype=entry.dtype.newbyteorder("<"), count=entry.size // entry.dtype.itemsize, offset=entry.offset
        )
        if array.nbytes != entry.size:
            raise OSError("the file became shorter while it was being read")
        return array.reshape(entry.shape)
